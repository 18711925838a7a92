"""Triton implementation: a program a multiprocessor, which goes through tiles of the vocabulary and keeps the best.

One loop over all steps of all its tiles: while it computes noise for a tile (40 operations a logit), the loads of the
next ones go on.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Float32, Int32, UInt32

from nanovllm_kernels._compat import current_target, triton_call
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.sample.device import MINUS_INF, NO_ID, PLUS_INF, gumbel, noise_words, take_better
from nanovllm_kernels.sample.device_plain import load_temperature, merge_kernel
from nanovllm_kernels.skinny_matmul.device import load_tile

_MIN_ROWS, _MOST_ROWS = 16, 64  # of a tile: what tl.dot needs; what registers hold
_TILE_IDS, _TILE_INPUTS = 128, 64
_MOST_STAGES = 9
_RESERVED_BYTES = 8 * 1024  # of shared memory, for what is not the loop's


@triton.jit
@no_type_check
def head_race_kernel(
    hidden_ptr,
    head_ptr,
    temperature_ptr,
    key_ptr,
    position_ptr,
    num_rows,
    score_ptr,  # float32 [B, programs]
    id_ptr,  # int32 [B, programs]
    NUM_INPUTS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_IDS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    rows = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    present = rows < num_rows
    rows = tl.minimum(rows, num_rows - 1)  # those past the end repeat the last one
    greedy, inverse = load_temperature(temperature_ptr, rows)
    word0, word1 = noise_words(key_ptr, position_ptr, rows)
    inputs = tl.arange(0, TILE_INPUTS)
    hidden_tile = hidden_ptr + rows[:, None] * NUM_INPUTS + inputs[None, :]
    acc = tl.zeros([TILE_IDS, TILE_ROWS], tl.float32)
    best = tl.full([TILE_ROWS], MINUS_INF, tl.float32)
    best_ids = tl.full([TILE_ROWS], NO_ID, tl.int32)
    STEPS: tl.constexpr = (NUM_INPUTS + TILE_INPUTS - 1) // TILE_INPUTS
    MASK: tl.constexpr = NUM_INPUTS % TILE_INPUTS != 0
    num_tiles = tl.cdiv(tl.cdiv(VOCAB, TILE_IDS) - program, num_programs)
    for turn in tl.range(0, num_tiles * STEPS, num_stages=STAGES):
        step = turn % STEPS
        ids = (program + turn // STEPS * num_programs) * TILE_IDS + tl.arange(0, TILE_IDS)
        columns = step * TILE_INPUTS + inputs
        head_rows = head_ptr + tl.minimum(ids, VOCAB - 1).to(tl.int64)[:, None] * NUM_INPUTS
        inside = columns < NUM_INPUTS
        head = load_tile(head_rows + columns[None, :], None, inside, False, MASK)
        hidden = load_tile(hidden_tile + step * TILE_INPUTS, None, inside, False, MASK)
        acc = tl.dot(head, tl.trans(hidden), acc)
        if step == STEPS - 1:
            noise = gumbel(ids[:, None], word0[None, :], word1[None, :])
            score = tl.where(greedy[None, :], acc, acc * inverse[None, :] + noise)
            score = tl.where(score == score, score, PLUS_INF)
            score = tl.where((ids < VOCAB)[:, None], score, MINUS_INF)
            top = tl.max(score, 0)
            top_ids = tl.min(tl.where(score == top[None, :], ids[:, None], NO_ID), 0)
            best, best_ids = take_better(top, top_ids, best, best_ids)
            acc = tl.zeros([TILE_IDS, TILE_ROWS], tl.float32)
    part = rows * num_programs + program
    tl.store(score_ptr + part, best, mask=present)
    tl.store(id_ptr + part, best_ids, mask=present)


def sample_head_triton(
    hidden: Float[Array, "B E"],
    head: Float[Array, "V E"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
) -> Int32[Array, " B"]:
    target, num_rows, (vocab_size, num_inputs) = current_target(), len(hidden), head.shape
    tile_rows = min(_MOST_ROWS, max(_MIN_ROWS, next_power_of_2(num_rows)))
    programs = min(target.multiprocessors, ceil_div(vocab_size, _TILE_IDS))
    stage_bytes = (_TILE_IDS + tile_rows) * _TILE_INPUTS * hidden.dtype.itemsize
    stages = min(_MOST_STAGES, (target.shared_bytes - _RESERVED_BYTES) // stage_bytes)
    scores = triton_call(
        hidden,
        head,
        temperature,
        key,
        position,
        num_rows,
        kernel=head_race_kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, programs), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, programs), jnp.int32),
        ),
        grid=(programs, ceil_div(num_rows, tile_rows)),
        num_warps=4 if tile_rows < _MOST_ROWS else 8,
        num_stages=stages,
        NUM_INPUTS=num_inputs,
        VOCAB=vocab_size,
        TILE_ROWS=tile_rows,
        TILE_IDS=_TILE_IDS,
        TILE_INPUTS=_TILE_INPUTS,
        STAGES=stages,
    )
    return triton_call(
        *scores,
        programs,
        kernel=merge_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        grid=(num_rows,),
        num_warps=1,
        num_stages=1,
        TILE_SPLITS=next_power_of_2(programs),
    )
