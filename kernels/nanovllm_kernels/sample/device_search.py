"""Triton device functions of `sample` that find the threshold of top-k and top-p in one row.

The threshold is the largest value v such that the tokens >= v weigh enough: 1 each for top-k, their share of the
mass for top-p. Only groups whose maximum reaches a lower bound of v are read. Weights are integers, so their sums
do not depend on the order of adding.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.sample.device import MINUS_INF, key_of, largest_key, list_groups, load_groups, value_of

# For 8 warps. Groups searched in registers at once: 32 logits a thread. Groups read at a time: 64 bytes a thread.
# Groups compared with all thresholds at a time: 8 bytes a thread, several such loads in flight; then 128 registers do,
# and two programs share a multiprocessor.
HELD_GROUPS = tl.constexpr(64)
READ_GROUPS = tl.constexpr(32)
TALLY_GROUPS = tl.constexpr(4)
TALLY_UNROLL = tl.constexpr(4)


@triton.jit
@no_type_check
def share(x, largest, slope, scale):
    """Mass exp2((x - largest) * slope) in fixed point, as uint32."""
    return (tl.exp2((x - largest) * slope) * scale + 0.5).to(tl.uint32)


@triton.jit
@no_type_check
def mass_from(logits_ptr, list_ptr, num_groups, low, largest, slope, VOCAB: tl.constexpr, GROUP: tl.constexpr):
    """The mass of the tokens >= low of the listed groups, relative to the largest."""
    mass = tl.zeros([READ_GROUPS, GROUP], tl.float32)
    for first in range(0, num_groups, READ_GROUPS):
        x, _ = load_groups(logits_ptr, list_ptr, first, num_groups, VOCAB, GROUP, READ_GROUPS)
        mass += tl.where(x >= low, tl.exp2((x - largest) * slope), 0.0)
    return tl.sum(mass)


@triton.jit
@no_type_check
def tally(x, weights, threshold, weight, count, MASS: tl.constexpr):
    """Adds weight and number of the tokens >= threshold, element by element."""
    reached = x >= threshold
    count += reached.to(tl.int32)
    if MASS:
        weight += tl.where(reached, weights, 0)
    return weight, count


@triton.jit
@no_type_check
def settle(threshold, weight, count, wanted, low, high, above, count_low, count_high, MASS: tl.constexpr):
    """Moves one end of the interval of keys [low, high) to a threshold whose tally is complete."""
    count = tl.sum(count)
    if MASS:
        weight = tl.sum(weight)
    else:
        weight = count.to(tl.uint32)
    key = key_of(threshold)
    raised, lowered = (weight >= wanted) & (key > low), (weight < wanted) & (key < high)
    low, count_low = tl.where(raised, key, low), tl.where(raised, count, count_low)
    high, count_high = tl.where(lowered, key, high), tl.where(lowered, count, count_high)
    return low, high, tl.where(lowered, weight, above), count_low, count_high


@triton.jit
@no_type_check
def narrow(
    logits_ptr, list_ptr, num_groups, low, high, above, count_low, count_high, wanted, largest, slope, scale,
    MASS: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One pass that cuts the interval of keys [low, high) at six thresholds.

    One is the middle in the order of floats, which ends the search on any data. The others are equally spaced, which
    is faster where logits are smooth; one that is not inside, for lack of precision, is the middle again.
    """
    start, end = value_of(low), value_of(high)
    middle = value_of((low & high) + ((low ^ high) >> 1))
    step = (end - start) * (1 / 6)
    t1, t2, t3, t4, t5 = start + step, start + 2 * step, start + 3 * step, start + 4 * step, start + 5 * step
    t1 = tl.where((t1 > start) & (t1 < end), t1, middle)
    t2 = tl.where((t2 > start) & (t2 < end), t2, middle)
    t3 = tl.where((t3 > start) & (t3 < end), t3, middle)
    t4 = tl.where((t4 > start) & (t4 < end), t4, middle)
    t5 = tl.where((t5 > start) & (t5 < end), t5, middle)
    none, zero = tl.zeros([TALLY_GROUPS, GROUP], tl.int32), tl.zeros([TALLY_GROUPS, GROUP], tl.uint32)
    w0, w1, w2, w3, w4, w5 = zero, zero, zero, zero, zero, zero
    c0, c1, c2, c3, c4, c5 = none, none, none, none, none, none
    for start_group in range(0, num_groups, TALLY_GROUPS * TALLY_UNROLL):
        for part in tl.static_range(TALLY_UNROLL):
            first = start_group + part * TALLY_GROUPS
            x, _ = load_groups(logits_ptr, list_ptr, first, num_groups, VOCAB, GROUP, TALLY_GROUPS)
            weights = share(x, largest, slope, scale)
            w0, c0 = tally(x, weights, middle, w0, c0, MASS)
            w1, c1 = tally(x, weights, t1, w1, c1, MASS)
            w2, c2 = tally(x, weights, t2, w2, c2, MASS)
            w3, c3 = tally(x, weights, t3, w3, c3, MASS)
            w4, c4 = tally(x, weights, t4, w4, c4, MASS)
            w5, c5 = tally(x, weights, t5, w5, c5, MASS)
    ends = low, high, above, count_low, count_high
    ends = settle(middle, w0, c0, wanted, *ends, MASS)
    ends = settle(t1, w1, c1, wanted, *ends, MASS)
    ends = settle(t2, w2, c2, wanted, *ends, MASS)
    ends = settle(t3, w3, c3, wanted, *ends, MASS)
    ends = settle(t4, w4, c4, wanted, *ends, MASS)
    return settle(t5, w5, c5, wanted, *ends, MASS)


@triton.jit
@no_type_check
def collect(logits_ptr, list_ptr, num_groups, low, high, values_ptr, VOCAB: tl.constexpr, GROUP: tl.constexpr):
    """The values in [low, high) of the listed groups, at most as many as are held; -inf past their end."""
    num_values = 0
    for first in range(0, num_groups, READ_GROUPS):
        x, _ = load_groups(logits_ptr, list_ptr, first, num_groups, VOCAB, GROUP, READ_GROUPS)
        x = tl.reshape(x, [READ_GROUPS * GROUP])
        inside = (x >= low) & (x < high)
        places = num_values + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(values_ptr + places, x, mask=inside & (places < HELD_GROUPS * GROUP))
        num_values += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()
    places = tl.arange(0, HELD_GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(values_ptr + places, mask=places < num_values, other=MINUS_INF)


@triton.jit
@no_type_check
def find_threshold(
    logits_ptr, list_ptr, values_ptr, maxima, low, largest, wanted, slope, scale,
    MASS: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest value in [low, largest] such that the tokens >= it weigh `wanted`; low if none is.

    Up to HELD_GROUPS groups are searched in registers. From more, passes narrow the interval until the tokens in it
    can be held, or it is one value (equal logits).
    """
    low_key, high_key = key_of(low), key_of(largest) + 1
    above = tl.zeros([], tl.uint32)  # weight of the tokens >= high
    # Tokens >= low, of which VOCAB is as good as the number until low moves, and tokens >= high.
    count_low, count_high = tl.full([], VOCAB, tl.int32), tl.zeros([], tl.int32)
    num_groups = list_groups(maxima, low, list_ptr)
    while (num_groups > HELD_GROUPS) & (count_low - count_high > HELD_GROUPS * GROUP) & (low_key + 1 < high_key):
        low_key, high_key, above, count_low, count_high = narrow(
            logits_ptr, list_ptr, num_groups, low_key, high_key, above, count_low, count_high, wanted,
            largest, slope, scale, MASS, VOCAB, GROUP,
        )  # fmt: skip
        num_groups = list_groups(maxima, value_of(low_key), list_ptr)
    if num_groups <= HELD_GROUPS:
        x, _ = load_groups(logits_ptr, list_ptr, 0, num_groups, VOCAB, GROUP, HELD_GROUPS)
    else:
        x = collect(logits_ptr, list_ptr, num_groups, value_of(low_key), value_of(high_key), values_ptr, VOCAB, GROUP)
        wanted -= above
    if MASS:
        weights = share(x, largest, slope, scale)
    else:
        weights = (x > MINUS_INF).to(tl.uint32)
    return value_of(largest_key(key_of(x), weights, low_key, high_key, wanted))
