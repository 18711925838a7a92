"""Triton implementation: every shard writes its part into a buffer of each peer, then adds what came into its own.

One kernel, one hop over NVLink, and no flags beside the data: a slot of the buffer holds a value that no part has
until a part arrives in it (the method of TensorRT-LLM's "Lamport" all-reduce), so a part is awaited by reading it
until it is there. The reader empties the slot again. Slots are doubled: a peer writes the part after next only when
it has seen this shard's next one, and that is sent by a later kernel, which starts when this one has emptied its slots.

Program i of one shard speaks only to program i of the others, whatever shapes come after one another: its slots and
its parity are its own. Each thread waits for its own words only; the own part stays in registers.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)
# ruff: noqa: RUF005 (Triton has no starred expressions in tuples)

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import triton_call
from nanovllm_kernels.add_shards.exchange import EMPTY, MAX_PROGRAMS, SLOT_WORDS, TIMED_OUT, plan_of, shards_of
from nanovllm_kernels.add_shards.quads import await_quads, load_quads, store_quads
from nanovllm_kernels.skinny_matmul.launch import padded_rows

_EMPTY, _TIMED_OUT = tl.constexpr(EMPTY), tl.constexpr(TIMED_OUT)
_NAN_PAIR = tl.constexpr(0x7FFF7FFF)  # in bfloat16 and in float16
# Some seconds, at a fraction of a microsecond a look; shards come milliseconds apart, but for a step's first run.
MAX_LOOKS = 20_000_000


@triton.jit
@no_type_check
def address_of(table_ptr, place):
    """The address of a buffer, which the table holds in two halves: this shard's at place 0, then those after it."""
    low = tl.load(table_ptr + 1 + 2 * place).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(table_ptr + 2 + 2 * place).to(tl.int64) << 32) | low


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
    """Words of two float32 tensors, rounded to 16-bit elements."""
    low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
@no_type_check
def sum_of(parts, residual, at: tl.constexpr, DTYPE: tl.constexpr):
    """Word `at` of the sum of quads, in their order; `residual` is a quad, or nothing."""
    low, high = halves(parts[at], DTYPE)
    for shard in tl.static_range(1, len(parts) // 4):
        part_low, part_high = halves(parts[4 * shard + at], DTYPE)
        low, high = low + part_low, high + part_high
    if len(residual) > 0:
        residual_low, residual_high = halves(residual[at], DTYPE)
        low, high = low + residual_low, high + residual_high
    return words_of(low, high, DTYPE)


@triton.jit
@no_type_check
def without_empty(words):
    """A quad that may be sent: the NaN that stands for an empty word becomes another one."""
    sent = ()
    for word in tl.static_range(4):
        sent = sent + (tl.where(words[word] == _EMPTY, _NAN_PAIR, words[word]),)
    return sent


@triton.jit
@no_type_check
def scaled_of(words, norm, DTYPE: tl.constexpr):
    """A quad times that of the norm's weights, and the sum of its squares."""
    scaled, squares = (), tl.zeros(words[0].shape, tl.float32)
    for word in tl.static_range(4):
        low, high = halves(words[word], DTYPE)  # rounded, as the norm sees them
        norm_low, norm_high = halves(norm[word], DTYPE)
        scaled = scaled + (words_of(low * norm_low, high * norm_high, DTYPE),)
        squares += low * low + high * high
    return scaled, squares


@triton.jit
@no_type_check
def both_sums(one_number, one_count, other_number, other_count):
    return one_number + other_number, one_count + other_count


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
    ROW_BYTES: tl.constexpr,
    SQUARES_STRIDE: tl.constexpr,
    QUADS: tl.constexpr,
    SHARDS: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    MAX_LOOKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PASSES_ON: tl.constexpr,
):
    """One program: `QUADS` quads of eight elements, of one row where it passes on what the norm after the sum needs."""
    DTYPE: tl.constexpr = part_ptr.dtype.element_ty
    STRIDE: tl.constexpr = 4 * MAX_PROGRAMS * SLOT_WORDS  # bytes between the slots of two shards
    program = tl.program_id(0)
    rank = tl.load(table_ptr)
    buffers = ()
    for place in tl.static_range(SHARDS):
        buffers = buffers + (address_of(table_ptr, place),)
    parity_ptr = (buffers[0] + 2 * SHARDS * STRIDE + 4 * program).to(tl.pointer_type(tl.int32))
    parity = tl.load(parity_ptr)
    alive = parity != _TIMED_OUT
    looks = tl.where(alive, MAX_LOOKS, 0)
    within = tl.arange(0, QUADS).to(tl.int64) * 16
    first = program.to(tl.int64) * (QUADS * 16)  # where its elements begin in an array, in bytes
    offsets = first + within
    slots = (parity & 1).to(tl.int64) * SHARDS * STRIDE + program.to(tl.int64) * (SLOT_WORDS * 4) + within
    part = without_empty(load_quads(part_ptr.to(tl.int64) + offsets))
    if alive:
        for place in tl.static_range(1, SHARDS):  # each shard begins with another one
            store_quads(buffers[place] + slots + rank * STRIDE, part)
    residual, norm = (), ()
    if HAS_RESIDUAL:  # read while the parts are under way
        residual = load_quads(residual_ptr.to(tl.int64) + offsets)
    if PASSES_ON:
        norm = load_quads(next_norm_ptr.to(tl.int64) + offsets % ROW_BYTES)
    parts = await_quads(buffers[0] + slots, STRIDE, rank, part, looks, SHARDS)
    empty = tl.full(within.shape, _EMPTY, tl.int32)
    for place in tl.static_range(1, SHARDS):
        store_quads(buffers[0] + slots + (rank + place) % SHARDS * STRIDE, (empty, empty, empty, empty))
    late = tl.zeros(within.shape, tl.int32)
    for word in tl.static_range(4 * SHARDS):
        late += (parts[word] == _EMPTY).to(tl.int32)
    failed = (late > 0) | (not alive)
    total = ()
    for word in tl.static_range(4):
        total = total + (tl.where(failed, _NAN_PAIR, sum_of(parts, residual, word, DTYPE)),)
    store_quads(out_ptr.to(tl.int64) + offsets, total)
    if PASSES_ON:
        scaled, squares = scaled_of(total, norm, DTYPE)
        store_quads(scaled_ptr.to(tl.int64) + offsets, scaled)
        squares, late = tl.reduce((squares, late), 0, both_sums)
        part_of_row = first % ROW_BYTES // (QUADS * 16)
        tl.store(squares_ptr + part_of_row * SQUARES_STRIDE + first // ROW_BYTES, squares)
    else:
        late = tl.sum(late, axis=0)
    # A part that comes too late would be taken for a later one: who has lost one never adds again.
    tl.store(parity_ptr, tl.where((late > 0) | (not alive), _TIMED_OUT, 1 - parity))


def add_shards_triton(
    part: Float[Array, "*shape"],
    residual: Float[Array, "*shape"] | None,
    table: Int[Array, " entries"],
    next_norm: Float[Array, " N"] | None = None,
) -> list[Array]:
    """The sum of parts that `exchanges`; with `next_norm` also what `add_shards_scaled` passes on."""
    plan, width = plan_of(part.shape, shards_of(table)), part.shape[-1]
    if plan is None:
        raise ValueError(f"part has shape {part.shape}, which no number of programs adds; use `add_shards`.")
    stride = padded_rows(part.size // width)
    like, unused = jax.ShapeDtypeStruct(part.shape, part.dtype), jax.ShapeDtypeStruct((1,), part.dtype)
    squares = jax.ShapeDtypeStruct((max(1, width // plan.elements), stride), jnp.float32)
    results = triton_call(
        part,
        residual,
        next_norm,
        table,
        kernel=add_shards_kernel,
        out_type=(like, *((unused, unused) if next_norm is None else (like, squares))),
        grid=(plan.programs,),
        num_warps=plan.quads // 32,
        num_stages=1,
        ROW_BYTES=2 * width,
        SQUARES_STRIDE=stride,
        QUADS=plan.quads,
        SHARDS=shards_of(table),
        SLOT_WORDS=SLOT_WORDS,
        MAX_PROGRAMS=MAX_PROGRAMS,
        MAX_LOOKS=MAX_LOOKS,
        HAS_RESIDUAL=residual is not None,
        PASSES_ON=next_norm is not None,
    )
    return list(results[:1] if next_norm is None else results)
