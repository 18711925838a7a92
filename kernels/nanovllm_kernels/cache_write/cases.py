"""Shapes of `cache_write` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm_kernels._cases import DTYPES


@dataclass(frozen=True)
class CacheWriteCase:
    """One problem; `dtype` is that of the new keys and values, `cache_dtype` None means the same."""

    name: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str | None = None


CASES = (
    CacheWriteCase("qwen3_0_6b", 300, 8, 128),
    CacheWriteCase("one_token", 1, 8, 128),
    CacheWriteCase("head_of_80", 65, 3, 80),
    CacheWriteCase("tiny_head", 33, 2, 16, block_size=8),
    CacheWriteCase("wide_head", 33, 1, 256, block_size=256),
    CacheWriteCase("float32", 100, 2, 96, dtype="float32"),
    CacheWriteCase("float16", 100, 2, 64, dtype="float16"),
    CacheWriteCase("cast", 100, 2, 64, dtype="float32", cache_dtype="bfloat16"),
)
BENCHMARKS = (CacheWriteCase("16384 tokens, 8 x 128", 16384, 8, 128),)


def cache_write_inputs(case: CacheWriteCase, seed: int = 0) -> tuple[Any, ...]:
    """k, v, k_cache, v_cache, slots: slots in random order, a fifth negative, some blocks untouched."""
    rng = np.random.default_rng(seed)
    num_blocks = 2 * -(-case.num_tokens // case.block_size) + 1
    new = rng.standard_normal((2, case.num_tokens, case.num_kv_heads, case.head_dim), np.float32)
    old = rng.standard_normal((2, num_blocks, case.num_kv_heads, case.block_size, case.head_dim), np.float32)
    slots = rng.permutation(num_blocks * case.block_size)[: case.num_tokens].astype(np.int32)
    dropped = rng.random(case.num_tokens) < 0.2
    slots[dropped] = -rng.integers(1, 2**31 - 1, dropped.sum(), dtype=np.int32)
    k, v = new.astype(DTYPES[case.dtype])
    k_cache, v_cache = old.astype(DTYPES[case.cache_dtype or case.dtype])
    return k, v, k_cache, v_cache, slots
