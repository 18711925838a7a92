"""Triton implementation: every shard writes its part into a buffer of each peer, then adds what came into its own.

One kernel, one hop over NVLink, and no flags beside the data: a slot of the buffer holds a value that no part has
until a part arrives in it (the method of TensorRT-LLM's "Lamport" all-reduce), so a part is awaited by reading it
until it is there. The reader empties the slot again. Slots are doubled: a peer writes the part after next only when
it has seen this shard's next one, and that is sent by a later kernel, which starts when this one has emptied its slots.

Program i of one shard speaks only to program i of the others, whatever shapes come after one another: its slots and
its parity are its own.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels.add_shards.exchange import EMPTY, MAX_PROGRAMS, SLOT_WORDS, TIMED_OUT, words_per_program
from nanovllm_kernels.skinny_matmul.launch import padded_rows

_EMPTY, _TIMED_OUT = tl.constexpr(EMPTY), tl.constexpr(TIMED_OUT)
_NAN_PAIR = tl.constexpr(0x7FFF7FFF)  # in bfloat16 and in float16
# On two GPUs a look took 0.35 us, so 7 s; shards come milliseconds apart, but for a step's first run, which loads it.
MAX_LOOKS = 20_000_000


@triton.jit
@no_type_check
def buffer_of(table_ptr, place):
    """A buffer whose address the table holds in two halves: this shard's at place 0, then those after it."""
    low = tl.load(table_ptr + 1 + 2 * place).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(table_ptr + 2 + 2 * place).to(tl.int64)
    return tl.multiple_of(((high << 32) | low).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
@no_type_check
def halves(words, DTYPE: tl.constexpr):
    """The two 16-bit elements of each word, in float32."""
    low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
@no_type_check
def words_of(low, high, DTYPE: tl.constexpr):
    """Words of two float32 tiles, rounded to 16-bit elements."""
    low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
@no_type_check
def any_missing(parts):
    """Whether a word has not come yet."""
    return tl.max(tl.max((parts == _EMPTY).to(tl.int32), axis=0), axis=0) != 0


@triton.jit
@no_type_check
def add_shards_kernel(
    part_ptr,
    residual_ptr,
    next_norm_ptr,
    table_ptr,
    out_ptr,
    scaled_ptr,
    squares_ptr,
    ROW_WORDS: tl.constexpr,
    SQUARES_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    SHARDS: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    MAX_LOOKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PASSES_ON: tl.constexpr,
):
    """One program: `WORDS` pairs of elements, of one row where it passes on what the norm after the sum needs."""
    DTYPE: tl.constexpr = part_ptr.dtype.element_ty
    SHARD_SLOTS: tl.constexpr = MAX_PROGRAMS * SLOT_WORDS
    program = tl.program_id(0)
    rank = tl.load(table_ptr)
    own = buffer_of(table_ptr, 0)
    parity_ptr = own + 2 * SHARDS * SHARD_SLOTS + program
    parity = tl.load(parity_ptr)
    alive = parity != _TIMED_OUT
    within = tl.arange(0, WORDS)
    offsets = program * WORDS + within
    slots = (parity & 1) * SHARDS * SHARD_SLOTS + program * SLOT_WORDS
    part = tl.load(part_ptr.to(tl.pointer_type(tl.int32)) + offsets)
    part = tl.where(part == _EMPTY, _NAN_PAIR, part)
    if alive:
        for place in tl.static_range(1, SHARDS + 1):  # each shard begins with another one, itself last
            tl.store(buffer_of(table_ptr, place % SHARDS) + slots + rank * SHARD_SLOTS + within, part)
    if HAS_RESIDUAL:  # read while the parts are under way
        residual = tl.load(residual_ptr.to(tl.pointer_type(tl.int32)) + offsets)
    if PASSES_ON:
        next_norm = tl.load(next_norm_ptr.to(tl.pointer_type(tl.int32)) + offsets % ROW_WORDS)
    awaited = own + slots + tl.arange(0, SHARDS)[:, None] * SHARD_SLOTS + within[None, :]
    parts = tl.load(awaited, volatile=True)
    missing = any_missing(parts)
    looks = 0
    while missing & alive & (looks < MAX_LOOKS):
        parts = tl.load(awaited, volatile=True)
        missing = any_missing(parts)
        looks += 1
    tl.store(awaited, tl.full([SHARDS, WORDS], _EMPTY, tl.int32))
    low, high = halves(parts, DTYPE)
    low, high = tl.sum(low, axis=0), tl.sum(high, axis=0)
    if HAS_RESIDUAL:
        residual_low, residual_high = halves(residual, DTYPE)
        low, high = low + residual_low, high + residual_high
    failed = missing | (not alive)
    total = tl.where(failed, _NAN_PAIR, words_of(low, high, DTYPE))
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + offsets, total)
    if PASSES_ON:
        low, high = halves(total, DTYPE)  # rounded, as the norm sees them
        norm_low, norm_high = halves(next_norm, DTYPE)
        scaled = words_of(low * norm_low, high * norm_high, DTYPE)
        tl.store(scaled_ptr.to(tl.pointer_type(tl.int32)) + offsets, scaled)
        first = program * WORDS
        place = (first % ROW_WORDS) // WORDS * SQUARES_STRIDE + first // ROW_WORDS
        tl.store(squares_ptr + place, tl.sum(low * low + high * high, axis=0))
    # A part that comes too late would be taken for a later one: who has lost one never adds again.
    tl.store(parity_ptr, tl.where(failed, _TIMED_OUT, 1 - parity))


def add_shards_triton(
    part: Float[Array, "*shape"],
    residual: Float[Array, "*shape"] | None,
    table: Int[Array, " entries"],
    next_norm: Float[Array, " N"] | None = None,
) -> list[Array]:
    """The sum of parts that `exchanges`; with `next_norm` also what `add_shards_scaled` passes on."""
    words = words_per_program(part.size // 2)
    if words is None:
        raise ValueError(f"part has {part.size} elements, which no number of programs adds; use `add_shards`.")
    row_words, stride = part.shape[-1] // 2, padded_rows(part.size // part.shape[-1])
    like, unused = jax.ShapeDtypeStruct(part.shape, part.dtype), jax.ShapeDtypeStruct((1,), part.dtype)
    squares = jax.ShapeDtypeStruct((max(1, row_words // words), stride), jnp.float32)
    results = triton_call(
        part,
        residual,
        next_norm,
        table,
        kernel=add_shards_kernel,
        out_type=(like, *((unused, unused) if next_norm is None else (like, squares))),
        grid=(part.size // 2 // words,),
        num_warps=max(1, min(8, words // 256)),
        num_stages=1,
        ROW_WORDS=row_words,
        SQUARES_STRIDE=stride,
        WORDS=words,
        SHARDS=(table.size - 1) // 2,
        SLOT_WORDS=SLOT_WORDS,
        MAX_PROGRAMS=MAX_PROGRAMS,
        MAX_LOOKS=MAX_LOOKS,
        HAS_RESIDUAL=residual is not None,
        PASSES_ON=next_norm is not None,
    )
    return list(results[:1] if next_norm is None else results)
