"""Device code of `sample` for rows without filters: a race of noisy scores, in parts of a row, and its winner."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from nanovllm_kernels.sample.device import (
    MINUS_INF,
    NO_ID,
    PLUS_INF,
    best_of,
    gumbel,
    noise_words,
    store_token,
    take_better,
)

GREEDY_BELOW = tl.constexpr(1e-5)


@triton.jit
@no_type_check
def load_temperature(temperature_ptr, row):
    """Whether the row is greedy, and its inverse temperature."""
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature < GREEDY_BELOW
    return greedy, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature))


@triton.jit
@no_type_check
def race(
    logits_ptr,
    begin,
    end,
    greedy,
    inverse,
    key_ptr,
    position_ptr,
    row,
    first_id,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The best score of the logits in [begin, end), of which the first of all has the id `first_id`, and its id.

    The score is +inf if one is NaN.
    """
    best = tl.full([TILE], MINUS_INF, tl.float32)
    best_ids = tl.full([TILE], NO_ID, tl.int32)
    word0, word1 = noise_words(key_ptr, position_ptr, row)
    for start in range(begin, end, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=MINUS_INF)
        if greedy:
            score = x
        else:
            score = x * inverse + gumbel(first_id + ids, word0, word1)
        score = tl.where(x == x, score, PLUS_INF)
        best, best_ids = take_better(score, ids, best, best_ids)
    score, token = best_of(best, best_ids)
    return score, tl.where(token == NO_ID, NO_ID, first_id + token)


@triton.jit
@no_type_check
def plain_kernel(
    logits_ptr,
    temperature_ptr,
    key_ptr,
    position_ptr,
    first_id_ptr,  # int32 [1], of a shard of the vocabulary
    split_groups,
    score_ptr,  # float32 [B, splits]
    id_ptr,  # int32 [B, splits]
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    SCAN_GROUPS: tl.constexpr,
    SHARD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    greedy, inverse = load_temperature(temperature_ptr, row)
    begin = split * (split_groups * GROUP)
    end = tl.minimum(begin + split_groups * GROUP, VOCAB)
    first_id = tl.load(first_id_ptr) if SHARD else 0
    score, token = race(
        logits_ptr + row * VOCAB, begin, end, greedy, inverse, key_ptr, position_ptr, row, first_id, VOCAB,
        SCAN_GROUPS * GROUP,
    )  # fmt: skip
    part = row * tl.num_programs(1) + split
    tl.store(score_ptr + part, score)
    tl.store(id_ptr + part, token)


@triton.jit
@no_type_check
def merge_splits(score_ptr, id_ptr, row, num_splits, TILE_SPLITS: tl.constexpr):
    splits = tl.arange(0, TILE_SPLITS)
    score = tl.load(score_ptr + row * num_splits + splits, mask=splits < num_splits, other=MINUS_INF)
    ids = tl.load(id_ptr + row * num_splits + splits, mask=splits < num_splits, other=NO_ID)
    return best_of(score, ids)


@triton.jit
@no_type_check
def merge_kernel(score_ptr, id_ptr, num_splits, tokens_ptr, TILE_SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    score, token = merge_splits(score_ptr, id_ptr, row, num_splits, TILE_SPLITS)
    store_token(tokens_ptr, row, score, token)
