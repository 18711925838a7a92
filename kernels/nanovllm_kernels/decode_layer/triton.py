"""Triton implementation: one kernel, whose programs pass numbers to each other as they become ready."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from collections.abc import Mapping
from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import ceil_div, next_power_of_2
from nanovllm_kernels.decode_layer.attention import attend, open_piece
from nanovllm_kernels.decode_layer.exchange import reads_before_giving_up, receive
from nanovllm_kernels.decode_layer.launch import Launch, Tilings, launch_parameters, tilings
from nanovllm_kernels.decode_layer.products import (
    PIECES_OF,
    SENT,
    STORED,
    SUMS_OF,
    load_weights,
    product,
    task_columns,
    with_sums,
)
from nanovllm_kernels.paged_decode.triton import plan_pieces

NUM_PHASES = 6  # what a program does one after the other
_FLAGS = 4  # int32 before the words: whether a wait failed; padded to what loads of two words want


@triton.jit
@no_type_check
def add_down(
    x_ptr,
    o_words,
    down_words,
    out_ptr,
    call,
    failed_ptr,
    most_reads,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    O_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    TASKS: tl.constexpr,
):
    """The layer's output: hidden states after attention plus the last product, by each tile's first program."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    task = tl.program_id(0)
    if (task < TASKS) & (task % SPLITS == 0):
        cols, mask = task_columns(task, WIDTH, COLS, COLS, SPLITS)
        x = with_sums(x_ptr, o_words, cols, mask, call, failed_ptr, most_reads, WIDTH, O_SPLITS)
        SPLIT_TILE: tl.constexpr = triton.next_power_of_2(SPLITS)
        splits = tl.arange(0, SPLIT_TILE)
        sums_mask = (splits < SPLITS)[:, None] & mask[None, :]
        sums_ptrs = down_words + splits[:, None] * WIDTH + cols[None, :]
        sums = receive(sums_ptrs, call, sums_mask, failed_ptr, most_reads)
        x = x.to(dtype).to(tl.float32) + tl.sum(sums, 0)
        tl.store(out_ptr + cols, x.to(dtype), mask=mask)


@triton.jit
@no_type_check
def decode_layer_kernel(
    x_ptr,
    input_norm_ptr,
    qkv_w_ptr,
    qkv_bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    o_w_ptr,
    post_norm_ptr,
    gate_up_w_ptr,
    down_w_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    pieces_ptr,  # int32 [pieces, 5], see `paged_decode.triton.plan_pieces`
    rows_ptr,  # int32 [1, 2], likewise
    call_ptr,
    words_ptr,  # int32, see `num_words`
    k_cache_ptr,
    v_cache_ptr,
    num_kv_heads,
    out_ptr,  # [1, E]
    FIRST: tl.constexpr,  # phases to run; all of them but in the interpreter, where no program can wait for another
    LAST: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PIECES: tl.constexpr,
    FLAGS: tl.constexpr,
    QKV_INPUTS: tl.constexpr,
    QKV_OUTPUTS: tl.constexpr,
    QKV_COLS: tl.constexpr,
    QKV_TILE_COLS: tl.constexpr,
    QKV_TILE_INPUTS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_SPLIT_INPUTS: tl.constexpr,
    QKV_TASKS: tl.constexpr,
    O_INPUTS: tl.constexpr,
    O_OUTPUTS: tl.constexpr,
    O_COLS: tl.constexpr,
    O_TILE_COLS: tl.constexpr,
    O_TILE_INPUTS: tl.constexpr,
    O_SPLITS: tl.constexpr,
    O_SPLIT_INPUTS: tl.constexpr,
    O_TASKS: tl.constexpr,
    GATE_UP_INPUTS: tl.constexpr,
    GATE_UP_OUTPUTS: tl.constexpr,
    GATE_UP_COLS: tl.constexpr,
    GATE_UP_TILE_COLS: tl.constexpr,
    GATE_UP_TILE_INPUTS: tl.constexpr,
    GATE_UP_SPLITS: tl.constexpr,
    GATE_UP_SPLIT_INPUTS: tl.constexpr,
    GATE_UP_TASKS: tl.constexpr,
    DOWN_INPUTS: tl.constexpr,
    DOWN_OUTPUTS: tl.constexpr,
    DOWN_COLS: tl.constexpr,
    DOWN_TILE_COLS: tl.constexpr,
    DOWN_TILE_INPUTS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_SPLIT_INPUTS: tl.constexpr,
    DOWN_TASKS: tl.constexpr,
):
    NORM: tl.constexpr = q_norm_ptr is not None
    failed_ptr = words_ptr
    most_reads = reads_before_giving_up(failed_ptr)
    call = tl.load(call_ptr)
    num_pieces = tl.load(rows_ptr + 1)
    qkv_words = (words_ptr + FLAGS).to(tl.pointer_type(tl.int64))
    parts_words = qkv_words + QKV_OUTPUTS
    lse_words = parts_words + PIECES * O_INPUTS
    o_words = lse_words + PIECES * (O_INPUTS // HEAD_DIM)
    gated_words = o_words + O_SPLITS * O_OUTPUTS
    down_words = gated_words + DOWN_INPUTS

    if FIRST <= 0:
        w = load_weights(
            qkv_w_ptr, QKV_OUTPUTS, QKV_INPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS,
            QKV_SPLIT_INPUTS, False,
        )  # fmt: skip
    if FIRST <= 1 and LAST >= 1:
        opened = open_piece(
            num_pieces, pieces_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, k_cache_ptr, v_cache_ptr, table_ptr,
            num_kv_heads, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS,
        )  # fmt: skip
    if FIRST <= 0:
        product(
            w, x_ptr, None, input_norm_ptr, qkv_bias_ptr, qkv_words, call, failed_ptr, most_reads, num_pieces, STORED,
            QKV_INPUTS, QKV_OUTPUTS, QKV_COLS, QKV_TILE_COLS, QKV_TILE_INPUTS, QKV_SPLITS, QKV_SPLIT_INPUTS, QKV_TASKS,
            False, EPS, HEAD_DIM, PIECES, 1,
        )  # fmt: skip
    if FIRST <= 1 and LAST >= 1:
        attend(
            opened, qkv_words, parts_words, lse_words, k_cache_ptr, v_cache_ptr, table_ptr, num_pieces, num_kv_heads,
            call, failed_ptr, most_reads, EPS, SCALE, WINDOW, GROUP, BLOCK_SIZE, HEAD_DIM, TILE_HEADS, TILE_TOKENS,
            STAGES, NORM,
        )  # fmt: skip
    if FIRST <= 2 and LAST >= 2:
        w = load_weights(
            o_w_ptr, O_OUTPUTS, O_INPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS, O_SPLIT_INPUTS, False
        )
        product(
            w, parts_words, lse_words, None, None, o_words, call, failed_ptr, most_reads, num_pieces, PIECES_OF,
            O_INPUTS, O_OUTPUTS, O_COLS, O_TILE_COLS, O_TILE_INPUTS, O_SPLITS, O_SPLIT_INPUTS, O_TASKS, False, EPS,
            HEAD_DIM, PIECES, 1,
        )  # fmt: skip
    if FIRST <= 3 and LAST >= 3:
        w = load_weights(
            gate_up_w_ptr, GATE_UP_OUTPUTS, GATE_UP_INPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS,
            GATE_UP_SPLITS, GATE_UP_SPLIT_INPUTS, True,
        )  # fmt: skip
        product(
            w, x_ptr, o_words, post_norm_ptr, None, gated_words, call, failed_ptr, most_reads, num_pieces, SUMS_OF,
            GATE_UP_INPUTS, GATE_UP_OUTPUTS, GATE_UP_COLS, GATE_UP_TILE_COLS, GATE_UP_TILE_INPUTS, GATE_UP_SPLITS,
            GATE_UP_SPLIT_INPUTS, GATE_UP_TASKS, True, EPS, HEAD_DIM, PIECES, O_SPLITS,
        )  # fmt: skip
    if FIRST <= 4 and LAST >= 4:
        w = load_weights(
            down_w_ptr, DOWN_OUTPUTS, DOWN_INPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS,
            DOWN_SPLIT_INPUTS, False,
        )  # fmt: skip
        product(
            w, gated_words, None, None, None, down_words, call, failed_ptr, most_reads, num_pieces, SENT, DOWN_INPUTS,
            DOWN_OUTPUTS, DOWN_COLS, DOWN_TILE_COLS, DOWN_TILE_INPUTS, DOWN_SPLITS, DOWN_SPLIT_INPUTS, DOWN_TASKS,
            False, EPS, HEAD_DIM, PIECES, 1,
        )  # fmt: skip
    if LAST >= 5:
        add_down(
            x_ptr, o_words, down_words, out_ptr, call, failed_ptr, most_reads, DOWN_OUTPUTS, DOWN_COLS, O_SPLITS,
            DOWN_SPLITS, DOWN_TASKS,
        )  # fmt: skip


def num_words(tiles: Tilings, most_pieces: int, head_dim: int) -> int:
    """int32 elements that the programs share: flags, then words of 64 bits for all that they send each other."""
    sums = tiles.o.splits * tiles.o.outputs + tiles.down.splits * tiles.down.outputs
    pieces = next_power_of_2(most_pieces) * (tiles.o.inputs + tiles.o.inputs // head_dim)
    return _FLAGS + 2 * (tiles.qkv.outputs + pieces + sums + tiles.down.inputs)


def decode_layer_triton(
    x: Float[Array, "1 E"],
    weights: Mapping[str, Array],
    cos: Float[Array, "1 half"],
    sin: Float[Array, "1 half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "1 P"],
    context_lens: Int[Array, "1"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None,
    words: jax.Ref,
    call: Int[Array, ""],
    launch: Launch | None = None,
) -> tuple[Float[Array, "1 E"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    launch = launch or launch_parameters(current_target(), num_kv_heads)
    window, group = sliding_window or 0, weights["qkv"].shape[2] - 2
    most_pieces = min(launch.most_pieces, ceil_div(block_tables.shape[1] * block_size, launch.tile_tokens))
    plan, rows = plan_pieces(context_lens, window=window, tile_tokens=launch.tile_tokens, most_pieces=most_pieces)
    names = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "post_norm", "gate_up", "down")
    results = []

    def run(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        results.append(
            triton_call(
                x,
                *map(weights.get, names),
                cos,
                sin,
                block_tables,
                plan,
                rows,
                call,
                words,
                k_cache,
                v_cache,
                num_kv_heads,
                kernel=decode_layer_kernel,
                out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
                grid=(launch.programs,),
                num_warps=launch.num_warps,
                num_stages=1,
                FIRST=0,
                LAST=NUM_PHASES - 1,
                EPS=eps,
                SCALE=scale,
                WINDOW=window,
                GROUP=group,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                TILE_HEADS=next_power_of_2(group + 2),
                TILE_TOKENS=launch.tile_tokens,
                STAGES=launch.num_stages,
                PIECES=next_power_of_2(launch.most_pieces),
                FLAGS=_FLAGS,
                **tilings(launch, weights).constants,
            )
        )

    new_k_cache, new_v_cache = update_in_place(run, k_cache, v_cache)
    return results[0], new_k_cache, new_v_cache
