"""Triton implementation: launch of the kernels in `device.py`.

A program attends a piece of one row's context for one KV head; a second kernel merges. The query heads of a KV head
share every key and value that is read (Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). How a row is cut into pieces (`plan.py`) is decided on the
device from all rows' lengths: pieces are about as long as what one resident program would get if all keys were dealt
out evenly, so one long row among many short ones, or one row alone, is spread over the whole chip, and equal rows are
not cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import Target, current_target, triton_call, update_in_place
from nanovllm_kernels._device import FP8, dot_dtype, dot_itemsize
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.paged_decode.device import decode_kernel, merge_kernel
from nanovllm_kernels.paged_decode.plan import Plan, plan_pieces

# tl.dot maps to tensor cores with 16 rows or more; smaller query groups are padded up to that.
MIN_DOT = 16
# Programs a multiprocessor, if no row is cut, from which on whole rows fill the chip.
FULL = 1.9
# And from which on a float8 cache has many rows: launches of their own here, the two operations in `rope_paged_decode`.
MANY_FLOAT8 = 4.0
_MERGE_PARTS = 64  # pieces of a row that the merge reads at a time


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the attention kernel.

    `programs_per_multiprocessor` is how many pieces for each multiprocessor the keys of a step are cut into.
    """

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


def launch_parameters(target: Target, *, head_dim: int, itemsize: int, dot_itemsize: int, fill: float) -> Launch:
    """`itemsize` is the cache's, `dot_itemsize` of what is multiplied; `fill` programs a multiprocessor, none cut.

    Measured on an H200 at D=128, K=8, with 1 to 256 rows of equal and of mixed lengths. Few programs need much in
    flight each, so large tiles; many need room beside each other. Four stages of 16 KB, or eight warps, let two
    programs into a multiprocessor: with room for a third, some get three while others have one. Float8 of many rows
    has two warps, whose conversion then needs no exchange between more. What is multiplied as float32, and GPUs with
    less shared memory, have two stages of 16 KB, which fit everywhere.
    """
    roomy = target.shared_bytes >= 200 * 1024
    if dot_itemsize == 4 or not roomy:
        tile_bytes, num_warps, num_stages, programs = 16 * 1024, 2 if itemsize == 1 else 4, 2, 4
    elif itemsize == 1 and fill >= MANY_FLOAT8:
        tile_bytes, num_warps, num_stages, programs = 8 * 1024, 2, 3, 4
    elif itemsize == 1 or fill < FULL:
        tile_bytes, num_warps, num_stages, programs = 16 * 1024, 4, 3, 2
    elif fill < 3:
        tile_bytes, num_warps, num_stages, programs = 16 * 1024, 4, 4, 2
    elif fill < 7:
        tile_bytes, num_warps, num_stages, programs = 32 * 1024, 8, 2, 2
    else:
        tile_bytes, num_warps, num_stages, programs = 8 * 1024, 4, 4, 4
    row_bytes = next_power_of_2(max(head_dim, MIN_DOT)) * (4 if dot_itemsize == 4 else itemsize)
    tile_tokens = max(MIN_DOT, min(128, tile_bytes // row_bytes))
    return Launch(tile_tokens, num_warps, num_stages, programs)


def plan_for_chip(
    launch: Launch, context_lens: Int[Array, " B"], window: int, num_kv_heads: int, most_tokens: int
) -> Plan:
    """`plan_pieces` for the GPU at hand; no more than `most_tokens` tokens a row have tiles to be cut into."""
    useful = len(context_lens) * ceil_div(most_tokens, launch.tile_tokens)
    wanted = ceil_div(current_target().multiprocessors * launch.programs_per_multiprocessor, num_kv_heads)
    options = {"tile_tokens": launch.tile_tokens, "most_pieces": min(wanted, useful)}
    return plan_pieces(context_lens, window=window, **options)


def paged_decode_triton(
    q: Float[Array, "B Q H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
    plan: Plan | None = None,
) -> Float[Array, "B Q H D"]:
    _, queries, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group, window = num_heads // num_kv_heads, sliding_window or 0
    target = current_target()
    launch = launch_parameters(
        target,
        head_dim=head_dim,
        itemsize=k_cache.dtype.itemsize,
        dot_itemsize=dot_itemsize(q.dtype, k_cache.dtype),
        fill=len(q) * num_kv_heads / target.multiprocessors,
    )
    tile_dim = next_power_of_2(max(head_dim, MIN_DOT))
    seen = window + queries - 1 if window else 0
    most_tokens = block_tables.shape[1] * block_size
    pieces, cuts = plan or plan_for_chip(launch, context_lens, seen, num_kv_heads, most_tokens)
    out, parts, lse = triton_call(
        q,
        k_cache,
        v_cache,
        block_tables,
        pieces,
        pieces if k_scale is None else k_scale,  # not read where there are no scales
        pieces if v_scale is None else v_scale,
        num_kv_heads,
        block_tables.shape[1],
        kernel=decode_kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((len(pieces), num_kv_heads, queries * group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((len(pieces), num_kv_heads, queries * group), jnp.float32),
        ),
        grid=(num_kv_heads, len(pieces)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        WINDOW=window,
        QUERIES=queries,
        GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE_HEADS=max(MIN_DOT, next_power_of_2(queries * group)),
        TILE_TOKENS=launch.tile_tokens,
        TILE_DIM=tile_dim,
        DOT_DTYPE=dot_dtype(q.dtype, k_cache.dtype),
        PAIRS=k_cache.dtype == FP8,
        SCALED=k_scale is not None,
    )

    return merge_cut_rows(out, parts, lse, cuts)


def merge_cut_rows(
    out: Float[Array, "B *queries H D"],
    parts: Float[Array, "pieces K heads D"],
    lse: Float[Array, "pieces K heads"],
    cuts: Int[Array, "cuts 3"],
) -> Float[Array, "B *queries H D"]:
    """Fills in the rows that were cut, in place. `heads` are the Q * G queries of a KV head."""
    _, num_kv_heads, heads, head_dim = parts.shape
    group = out.shape[-2] // num_kv_heads

    def merge(out: jax.Ref) -> None:
        triton_call(
            parts,
            lse,
            cuts,
            out,
            num_kv_heads,
            kernel=merge_kernel,
            out_type=(),
            grid=(len(cuts), num_kv_heads, heads),
            num_warps=4,
            num_stages=1,
            QUERIES=heads // group,
            GROUP=group,
            HEAD_DIM=head_dim,
            TILE_DIM=next_power_of_2(max(head_dim, MIN_DOT)),
            TILE_PARTS=_MERGE_PARTS,
        )

    return update_in_place(merge, out)[0]
