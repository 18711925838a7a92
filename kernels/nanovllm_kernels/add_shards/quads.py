"""Four words at a time, 128 bits, each thread for itself: how a sum's programs read, send and await.

A quad is an element of a tensor of addresses (int64, bytes) and of four tensors of words. What Triton offers for words
would await them with all threads of a program: a look at every word, a reduction over warps, and again. Here a thread
waits for its own words, in a loop of its own. A tensor of quads must have no more threads than elements, so that no
other thread reads or empties the same ones.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.add_shards.exchange import EMPTY

_EMPTY = tl.constexpr(EMPTY)


@triton.constexpr_function
@no_type_check
def await_ptx(shards):
    """Reads `shards` quads, all but the own one, until none of their words is empty or no look is left.

    Operands: the quads' words; the first address, the bytes between quads, the own rank and words, how many looks.
    """
    words = [f"${at}" for at in range(4 * shards)]
    first, stride, rank, *mine, looks = (f"${4 * shards + at}" for at in range(8))
    quads = [words[4 * shard : 4 * shard + 4] for shard in range(shards)]
    lines = [f".reg .pred other<{shards}>, again; .reg .s64 at; .reg .s32 left;", f"mov.b32 left, {looks};"]
    for shard, quad in enumerate(quads):
        lines.append(f"setp.ne.s32 other{shard}, {rank}, {shard};")
        lines += [f"mov.b32 {word}, {own};" for word, own in zip(quad, mine, strict=True)]
    lines += ["look:", f"mov.b64 at, {first};"]
    for shard, quad in enumerate(quads):
        lines.append(f"@other{shard} ld.volatile.global.v4.b32 {{{', '.join(quad)}}}, [at];")
        lines.append(f"add.s64 at, at, {stride};")
    lines.append("mov.pred again, 0;")
    lines += [f"setp.eq.or.s32 again, {word}, {EMPTY}, again;" for word in words]
    lines += ["sub.s32 left, left, 1;", "setp.ge.and.s32 again, left, 0, again;", "@again bra look;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
@no_type_check
def await_constraints(shards):
    """A word of each quad is written before all operands have been read."""
    return ",".join(["=&r"] * 4 * shards + ["l", "l", *["r"] * 6])


@triton.constexpr_function
@no_type_check
def words_of(shards):
    return (tl.int32,) * (4 * shards)


@triton.jit
@no_type_check
def load_quads(at):
    """The four words at each address."""
    ptx: tl.constexpr = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    return tl.inline_asm_elementwise(ptx, "=r,=r,=r,=r,l", [at], dtype=words_of(1), is_pure=False, pack=1)


@triton.jit
@no_type_check
def store_quads(at, words):
    """Stores four words at each address."""
    ptx: tl.constexpr = "st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"  # asm must have a result
    operands = [at, words[0], words[1], words[2], words[3]]
    tl.inline_asm_elementwise(ptx, "=r,l,r,r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
@no_type_check
def await_quads(at, stride, rank, words, looks, SHARDS: tl.constexpr):
    """The 4 * SHARDS words of all shards: the own `words` at `rank`, others from `at`, `stride` bytes apart.

    Where `looks` end before a quad has come, some of its words are EMPTY. At least one look is taken.
    """
    return tl.inline_asm_elementwise(
        await_ptx(SHARDS),
        await_constraints(SHARDS),
        [at, stride, rank, words[0], words[1], words[2], words[3], looks],
        dtype=words_of(SHARDS),
        is_pure=False,
        pack=1,
    )
