"""The short lists of shapes that steps are compiled for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SMALLEST_PREFILL = 64  # tokens
ROW_TILE = 64  # rows that a product of many rows computes together
ROWS_A_COPY = 8  # rows that Mosaic's products copy together (its ROW_ALIGNMENT); other rows are Triton's


def decode_buckets(max_num_seqs: int, *, fine: bool) -> list[int]:
    """Row counts of decode steps, up to and including `max_num_seqs`.

    With `fine` (GPUs, where a step's time follows its rows) 1, multiples of 8 by steps of a quarter of the power of two
    below, and `max_num_seqs`. From 64 on steps are of no less than 64 rows, since products take tiles of as many, and
    the kernels of attention have no work for padding. Else powers of four, since each program costs seconds to compile.
    """
    if not fine:
        return sampling_buckets(max_num_seqs)
    sizes = {1}
    for power in _powers(ROWS_A_COPY, max_num_seqs, 2):
        least = ROW_TILE if power >= ROW_TILE else ROWS_A_COPY
        sizes.update(range(power, 2 * power, max(least, power // 4)))
    return sorted(size for size in sizes if size <= max_num_seqs)


def sampling_buckets(max_num_seqs: int) -> list[int]:
    """Row counts of programs that run too rarely for padding to matter: powers of four."""
    return _powers(1, max_num_seqs, 4)


def filtered_buckets(max_num_seqs: int, *, fine: bool) -> list[int]:
    """Row counts of decode steps with filters: on GPUs one, and powers of two, since each program lengthens a start."""
    return sorted({1, *_powers(ROWS_A_COPY, max_num_seqs, 2)}) if fine else sampling_buckets(max_num_seqs)


def prefill_buckets(max_num_tokens: int, *, fine: bool) -> list[int]:
    """Token counts of prefill and mixed steps, up to and including `max_num_tokens`."""
    return _powers(SMALLEST_PREFILL, max_num_tokens, 2 if fine else 4)


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    return buckets[bisect_left(buckets, size)]


def _powers(first: int, last: int, ratio: int) -> list[int]:
    """first, first * ratio, ... below `last`, then `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= ratio
    return [*sizes, last]
