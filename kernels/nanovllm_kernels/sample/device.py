"""Triton device functions of `sample`: noise, the order of floats, and tokens of a row by groups.

A *group* is GROUP consecutive vocabulary ids. A list of groups lies in device memory: written, then read, by one
program alone, with a barrier between.
"""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))
PLUS_INF = tl.constexpr(float("inf"))
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
@no_type_check
def four_rounds(word0, word1, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr):
    word0 += word1
    word1 = ((word1 << R0) | (word1 >> (32 - R0))) ^ word0
    word0 += word1
    word1 = ((word1 << R1) | (word1 >> (32 - R1))) ^ word0
    word0 += word1
    word1 = ((word1 << R2) | (word1 >> (32 - R2))) ^ word0
    word0 += word1
    word1 = ((word1 << R3) | (word1 >> (32 - R3))) ^ word0
    return word0, word1


@triton.jit
@no_type_check
def noise_words(key_ptr, position_ptr, row):
    """Threefry-2x32 of the row's (position, 0) under its key, as in `noise`: two scalars of 32 bits."""
    key0 = tl.load(key_ptr + 2 * row)
    key1 = tl.load(key_ptr + 2 * row + 1)
    key2 = key0 ^ key1 ^ 0x1BD11BDA
    word0 = tl.load(position_ptr + row).to(tl.uint32) + key0
    word1 = key1
    word0, word1 = four_rounds(word0, word1, 13, 15, 26, 6)
    word0, word1 = word0 + key1, word1 + key2 + 1
    word0, word1 = four_rounds(word0, word1, 17, 29, 16, 24)
    word0, word1 = word0 + key2, word1 + key0 + 2
    word0, word1 = four_rounds(word0, word1, 13, 15, 26, 6)
    word0, word1 = word0 + key0, word1 + key1 + 3
    word0, word1 = four_rounds(word0, word1, 17, 29, 16, 24)
    word0, word1 = word0 + key1, word1 + key2 + 4
    word0, word1 = four_rounds(word0, word1, 13, 15, 26, 6)
    return word0 + key2, word1 + key0 + 5


@triton.jit
@no_type_check
def finalise(bits):
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    return bits ^ (bits >> 15)


@triton.jit
@no_type_check
def approximate_log2(x):
    """The GPU's own log2, to 2^-22 (absolute between 1/2 and 2, else relative): an eighth of tl.log2's work."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
@no_type_check
def gumbel(ids, word0, word1):
    """Gumbel noise of vocabulary ids, as in `noise`."""
    bits = finalise(finalise(ids.to(tl.uint32) + word0) + word1)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)
    # -log(1 - u), which for the small u that win must be right in relative terms: below 1/16 five terms of its
    # series are, to 2e-7, and above the logarithm is.
    series = uniform * (1 + uniform * (1 / 2 + uniform * (1 / 3 + uniform * (1 / 4 + uniform * (1 / 5)))))
    exponential = tl.where(uniform < 0.0625, series, approximate_log2(1.0 - uniform) * -LN_2)
    return approximate_log2(exponential) * -LN_2


@triton.jit
@no_type_check
def take_better(score, ids, best, best_ids):
    """Element by element the better score and its id; the earlier one among equals."""
    better = score > best
    return tl.where(better, score, best), tl.where(better, ids, best_ids)


@triton.jit
@no_type_check
def best_of(score, ids):
    """The largest score and its id, the lowest among equals."""
    top = tl.max(score)
    return top, tl.min(tl.where(score == top, ids, NO_ID))


@triton.jit
@no_type_check
def store_token(tokens_ptr, row, score, token):
    tl.store(tokens_ptr + row, tl.where((score > MINUS_INF) & (score < PLUS_INF), token, -1))


@triton.jit
@no_type_check
def key_of(value):
    """Maps float32 to int32 in order (-0.0 just below 0.0)."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
@no_type_check
def value_of(key):
    """The inverse of `key_of`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def largest_key(keys, weights, low, high, wanted):
    """The largest key in [low, high) such that the weights of keys >= it add up to `wanted`; low if none is."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = tl.sum(tl.where(keys >= middle, weights, 0)) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
@no_type_check
def list_groups(maxima, threshold, list_ptr):
    """Lists the groups whose maximum is `threshold` or more, in order; returns how many they are."""
    listed = (maxima >= threshold).to(tl.int32)
    places = tl.cumsum(listed, 0) - 1
    tl.debug_barrier()  # what was listed before has been read
    tl.store(list_ptr + places, tl.arange(0, maxima.shape[0]), mask=listed > 0)
    tl.debug_barrier()
    return tl.sum(listed, 0)


@triton.jit
@no_type_check
def load_groups(
    logits_ptr, list_ptr, first, num_groups, VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr
):
    """Logits and ids [NUM_GROUPS, GROUP] of the listed groups from `first` on; -inf past the list's end."""
    places = first + tl.arange(0, NUM_GROUPS)
    groups = tl.load(list_ptr + places, mask=places < num_groups, other=0)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + ids, mask=(places < num_groups)[:, None] & (ids < VOCAB), other=MINUS_INF)
    return x, ids
