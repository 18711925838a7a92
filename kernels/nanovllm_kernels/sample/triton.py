"""Triton implementation: one pass over the logits, and a program a row that reads what can be drawn once more.

`plain_kernel` (rows x splits) keeps the best score of its part of a row, `merge_kernel` picks the best of a row.
With filters `scan_kernel` does the same for rows that need none; of the others it keeps the maximum and the mass of
each group of 128 tokens. `select_kernel` then finds the row's threshold from the maxima and the few groups that can
hold it (see `device_search`), and draws from the groups that reach it. No sort; the same tokens for any grid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from nanovllm_kernels._compat import current_target, triton_call
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.sample.device_filtered import scan_kernel, select_kernel
from nanovllm_kernels.sample.device_plain import merge_kernel, plain_kernel
from nanovllm_kernels.sample.device_search import HELD_GROUPS

# A group is one load of 16 bytes for each thread of a warp, so its maximum needs no other warp.
GROUP = 128
_SCAN_WARPS, _SELECT_WARPS = 4, 8
_SCAN_GROUPS = 16  # a program of the scan reads at a time: 64 bytes for each of its threads
_MAX_SPLIT_TILES = 4  # 32 KB of logits a program
# Programs of the scan for each multiprocessor that fill the memory system.
_PROGRAMS_PER_MULTIPROCESSOR = 8


def split_tiles(multiprocessors: int, *, num_rows: int, vocab_size: int) -> int:
    """Tiles a program of the scan: fewer when rows are few, so that every multiprocessor reads. Not yet tuned."""
    tiles = num_rows * ceil_div(vocab_size, _SCAN_GROUPS * GROUP)
    wanted = tiles // (multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR)
    return max(1, min(_MAX_SPLIT_TILES, wanted))


def race_triton(
    logits: Float32[Array, "B V"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
    first_id: Int32[Array, " 1"] | None,
) -> tuple[Float32[Array, "B splits"], Int32[Array, "B splits"]]:
    """The best noisy score of each part of a row, without filters, and its id; the first logit is that of `first_id`.

    A score of +inf says that a logit is NaN or +inf.
    """
    num_rows, vocab_size = logits.shape
    split_groups, splits = _splits_of(num_rows, vocab_size)
    shape = jax.ShapeDtypeStruct((num_rows, splits), jnp.float32), jax.ShapeDtypeStruct((num_rows, splits), jnp.int32)
    return triton_call(
        logits,
        temperature,
        key,
        position,
        position if first_id is None else first_id,  # not read where there is none
        split_groups,
        kernel=plain_kernel,
        out_type=shape,
        grid=(num_rows, splits),
        num_warps=_SCAN_WARPS,
        num_stages=1,
        VOCAB=vocab_size,
        GROUP=GROUP,
        SCAN_GROUPS=_SCAN_GROUPS,
        SHARD=first_id is not None,
    )


def _splits_of(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Groups a program of the scan, and programs a row."""
    tiles = split_tiles(current_target().multiprocessors, num_rows=num_rows, vocab_size=vocab_size)
    return _SCAN_GROUPS * tiles, ceil_div(vocab_size, _SCAN_GROUPS * tiles * GROUP)


def sample_triton(
    logits: Float32[Array, "B V"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
    filters: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> Int32[Array, " B"]:
    num_rows, vocab_size = logits.shape
    # What follows from the number of rows is an argument, so that all row counts share one compiled kernel.
    split_groups, splits = _splits_of(num_rows, vocab_size)
    groups = ceil_div(vocab_size, GROUP)
    most_splits, all_groups = next_power_of_2(ceil_div(groups, _SCAN_GROUPS)), next_power_of_2(groups)
    shape = jax.ShapeDtypeStruct
    tokens = shape((num_rows,), jnp.int32)
    merge = {"grid": (num_rows,), "TILE_SPLITS": most_splits}
    rows = logits, temperature, key, position
    if filters is None:
        scores = race_triton(*rows, None)
        return triton_call(*scores, splits, kernel=merge_kernel, out_type=tokens, num_warps=1, num_stages=1, **merge)
    parts = shape((num_rows, splits), jnp.float32), shape((num_rows, splits), jnp.int32)
    tiles = {"num_stages": 1, "VOCAB": vocab_size, "GROUP": GROUP}
    scan = {"grid": (num_rows, splits), "num_warps": _SCAN_WARPS, "SCAN_GROUPS": _SCAN_GROUPS, **tiles}
    rows += filters
    of_groups = (shape((num_rows, groups), jnp.float32),) * 2
    found = triton_call(*rows, split_groups, kernel=scan_kernel, out_type=(*parts, *of_groups), **scan)
    scratch = shape((num_rows, all_groups), jnp.int32), shape((num_rows, HELD_GROUPS.value * GROUP), jnp.float32)
    drawn, *_ = triton_call(
        *rows,
        *found,
        splits,
        kernel=select_kernel,
        out_type=(tokens, *scratch),
        num_warps=_SELECT_WARPS,
        TILE_ALL_GROUPS=all_groups,
        **tiles,
        **merge,
    )
    return drawn
