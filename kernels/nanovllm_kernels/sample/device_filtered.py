"""Device code of `sample` for rows with filters: maxima of groups, the threshold that they lead to, and the draw."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.sample.device import (
    LOG2_E,
    MINUS_INF,
    NO_ID,
    PLUS_INF,
    best_of,
    gumbel,
    key_of,
    largest_key,
    list_groups,
    load_groups,
    noise_words,
    store_token,
    take_better,
    value_of,
)
from nanovllm_kernels.sample.device_plain import load_temperature, merge_splits, race
from nanovllm_kernels.sample.device_search import HELD_GROUPS, READ_GROUPS, find_threshold, mass_from, share


@triton.jit
@no_type_check
def load_filters(top_k_ptr, top_p_ptr, min_p_ptr, row, VOCAB: tl.constexpr):
    """The row's filters, with 0 for a top_k that keeps all."""
    top_k = tl.load(top_k_ptr + row)
    return tl.where(top_k < VOCAB, tl.maximum(top_k, 0), 0), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)


@triton.jit
@no_type_check
def draws_from_all(greedy, top_k, top_p, min_p):
    """Whether nothing is filtered out, so that the scan has done the row's race."""
    return greedy | ((top_k == 0) & (top_p >= 1) & (min_p <= 0))


@triton.jit
@no_type_check
def nucleus_of_all(top_k, min_p):
    """Whether top-p is of all tokens, whose mass the scan has added up."""
    return (top_k == 0) & (min_p <= 0)


@triton.jit
@no_type_check
def scan_kernel(
    logits_ptr,
    temperature_ptr,
    key_ptr,
    position_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    split_groups,
    score_ptr,  # float32 [B, splits], of rows without filters
    id_ptr,  # int32 [B, splits], of rows without filters
    maxima_ptr,  # float32 [B, groups], of rows with filters; +inf if a logit is NaN
    masses_ptr,  # float32 [B, groups], of rows with top-p alone: mass relative to the group's maximum
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    SCAN_GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    greedy, inverse = load_temperature(temperature_ptr, row)
    top_k, top_p, min_p = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, row, VOCAB)
    begin = split * (split_groups * GROUP)
    end = tl.minimum(begin + split_groups * GROUP, VOCAB)
    row_ptr = logits_ptr + row * VOCAB
    if draws_from_all(greedy, top_k, top_p, min_p):
        score, token = race(
            row_ptr, begin, end, greedy, inverse, key_ptr, position_ptr, row, 0, VOCAB, SCAN_GROUPS * GROUP
        )
        part = row * tl.num_programs(1) + split
        tl.store(score_ptr + part, score)
        tl.store(id_ptr + part, token)
    else:
        NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
        needs_mass = nucleus_of_all(top_k, min_p)
        for start in range(begin, end, SCAN_GROUPS * GROUP):
            groups = start // GROUP + tl.arange(0, SCAN_GROUPS)
            ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=MINUS_INF)
            x = tl.where(x == x, x, PLUS_INF)
            maxima = tl.max(x, 1)
            tl.store(maxima_ptr + row * NUM_GROUPS + groups, maxima, mask=groups < NUM_GROUPS)
            if needs_mass:
                shift = tl.where(maxima == MINUS_INF, 0.0, maxima)  # -inf - -inf is NaN
                mass = tl.sum(tl.exp2((x - shift[:, None]) * (inverse * LOG2_E)), 1)
                tl.store(masses_ptr + row * NUM_GROUPS + groups, mass, mask=groups < NUM_GROUPS)


@triton.jit
@no_type_check
def top_k_threshold(
    row_ptr, list_ptr, values_ptr, maxima, floor, largest, top_k, VOCAB: tl.constexpr, GROUP: tl.constexpr
):
    """The k-th largest value; the floor if it is below that."""
    wanted = top_k.to(tl.uint32)
    # If k groups' maxima are this large, k tokens are.
    each = tl.full([maxima.shape[0]], 1, tl.uint32)
    low = largest_key(key_of(maxima), each, key_of(floor), key_of(largest) + 1, wanted)
    return find_threshold(
        row_ptr, list_ptr, values_ptr, maxima, value_of(low), largest, wanted, 0.0, 0.0, False, VOCAB, GROUP
    )


@triton.jit
@no_type_check
def top_p_threshold(
    row_ptr, list_ptr, values_ptr, maxima, floor, largest, top_p, slope, total, VOCAB: tl.constexpr, GROUP: tl.constexpr
):
    """The smallest value in the nucleus of the tokens >= floor, whose mass is `total`; the floor at least."""
    # Shares add up to between 2^30 and 2^31, as in `filters`.
    power = (total.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.div_rn(1073741824.0, power)
    # At least 1: with p * total rounded to 0, nothing at all would be enough.
    wanted = tl.maximum(top_p * (total * scale), 1.0).to(tl.uint32)
    # Below 2^-31.7 of the largest a share is 0. And if groups' maxima add up to p, the tokens above them do.
    low = key_of(tl.maximum(floor, largest - tl.div_rn(22.0, slope)))
    low = largest_key(key_of(maxima), share(maxima, largest, slope, scale), low, key_of(largest) + 1, wanted)
    return find_threshold(
        row_ptr, list_ptr, values_ptr, maxima, value_of(low), largest, wanted, slope, scale, True, VOCAB, GROUP
    )


@triton.jit
@no_type_check
def select_kernel(
    logits_ptr,
    temperature_ptr,
    key_ptr,
    position_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    score_ptr,
    id_ptr,
    maxima_ptr,
    masses_ptr,
    num_splits,
    tokens_ptr,
    list_ptr,  # int32 [B, TILE_ALL_GROUPS], of this kernel alone
    values_ptr,  # float32 [B, HELD_GROUPS * GROUP], of this kernel alone
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ALL_GROUPS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    greedy, inverse = load_temperature(temperature_ptr, row)
    top_k, top_p, min_p = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, row, VOCAB)
    if draws_from_all(greedy, top_k, top_p, min_p):
        score, token = merge_splits(score_ptr, id_ptr, row, num_splits, TILE_SPLITS)
        store_token(tokens_ptr, row, score, token)
    else:
        NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
        row_ptr = logits_ptr + row * VOCAB
        list_ptr += row * TILE_ALL_GROUPS
        values_ptr += row * (HELD_GROUPS * GROUP)
        slope = inverse * LOG2_E
        groups = tl.arange(0, TILE_ALL_GROUPS)
        maxima = tl.load(maxima_ptr + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=MINUS_INF)
        largest = tl.max(maxima, 0)
        best, token = MINUS_INF, -1
        if (largest > MINUS_INF) & (largest < PLUS_INF):
            floor = largest + tl.where(min_p < 1, tl.div_rn(tl.log(min_p), inverse), 0.0)
            if top_k > 0:
                kth = top_k_threshold(row_ptr, list_ptr, values_ptr, maxima, floor, largest, top_k, VOCAB, GROUP)
                floor = tl.maximum(floor, kth)
            if top_p < 1:
                if nucleus_of_all(top_k, min_p):
                    mass = tl.load(masses_ptr + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=0.0)
                    total = tl.sum(mass * tl.exp2((maxima - largest) * slope), 0)
                else:
                    num_groups = list_groups(maxima, floor, list_ptr)
                    total = mass_from(row_ptr, list_ptr, num_groups, floor, largest, slope, VOCAB, GROUP)
                nucleus = top_p_threshold(
                    row_ptr, list_ptr, values_ptr, maxima, floor, largest, top_p, slope, total, VOCAB, GROUP
                )
                floor = tl.maximum(floor, nucleus)

            word0, word1 = noise_words(key_ptr, position_ptr, row)
            scores = tl.full([READ_GROUPS, GROUP], MINUS_INF, tl.float32)
            score_ids = tl.full([READ_GROUPS, GROUP], NO_ID, tl.int32)
            num_groups = list_groups(maxima, floor, list_ptr)
            for first in range(0, num_groups, READ_GROUPS):
                x, ids = load_groups(row_ptr, list_ptr, first, num_groups, VOCAB, GROUP, READ_GROUPS)
                noisy = tl.where(x >= floor, x * inverse + gumbel(ids, word0, word1), MINUS_INF)
                scores, score_ids = take_better(noisy, ids, scores, score_ids)
            best, token = best_of(scores, score_ids)
        store_token(tokens_ptr, row, best, token)
