"""Shapes of `rope_cache_write` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from nanovllm_kernels._cases import DTYPES, kv_scales


@dataclass(frozen=True)
class RopeCacheWriteCase:
    """One problem; `dtype` is that of the projections, `cache_dtype` None means the same."""

    name: str
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    norm: bool = True


CASES = (
    RopeCacheWriteCase("qwen3_0_6b", 300, 16, 8, 128),
    RopeCacheWriteCase("one_token", 1, 32, 8, 128),
    RopeCacheWriteCase("head_of_80", 65, 9, 3, 80, norm=False),
    RopeCacheWriteCase("head_of_96", 65, 16, 1, 96),
    RopeCacheWriteCase("tiny_head", 33, 4, 2, 16, block_size=8),
    RopeCacheWriteCase("wide_head", 33, 1, 1, 256, block_size=256, norm=False),
    RopeCacheWriteCase("float32", 100, 6, 2, 96, dtype="float32"),
    RopeCacheWriteCase("float16", 100, 2, 2, 64, dtype="float16"),
    RopeCacheWriteCase("cast", 100, 4, 2, 64, dtype="float32", cache_dtype="bfloat16"),
    RopeCacheWriteCase("float8", 100, 4, 2, 128, cache_dtype="float8_e4m3fn"),
)
BENCHMARKS = tuple(RopeCacheWriteCase(f"{tokens} tokens, 16/8 x 128", tokens, 16, 8, 128) for tokens in (1, 256, 16384))


def rope_cache_write_inputs(case: RopeCacheWriteCase, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(qkv, cos, sin, k_cache, v_cache, slots) and the keyword arguments.

    Slots are in random order, a fifth of them negative, some blocks untouched. Some values are past what float8
    holds.
    """
    rng = np.random.default_rng(seed)
    num_blocks = 2 * -(-case.num_tokens // case.block_size) + 1
    group = case.num_heads // case.num_kv_heads
    qkv = rng.standard_normal((case.num_tokens, case.num_kv_heads, group + 2, case.head_dim), np.float32)
    values = qkv[:, :, -1]
    values[rng.random(values.shape) < 0.01] *= 1000
    old = rng.standard_normal((2, num_blocks, case.num_kv_heads, case.block_size, case.head_dim), np.float32)
    slots = rng.permutation(num_blocks * case.block_size)[: case.num_tokens].astype(np.int32)
    dropped = rng.random(case.num_tokens) < 0.2
    slots[dropped] = -rng.integers(1, 2**31 - 1, dropped.sum(), dtype=np.int32)
    angles = rng.uniform(0, 2 * np.pi, (case.num_tokens, case.head_dim // 2))
    cache_dtype = case.cache_dtype or case.dtype
    k_cache, v_cache = old.astype(DTYPES[cache_dtype])
    options: dict[str, Any] = {"eps": 1e-5, **kv_scales(cache_dtype, case.num_kv_heads, rng)}
    if case.norm:
        norms = rng.uniform(0.5, 1.5, (2, case.head_dim)).astype(DTYPES[case.dtype])
        options |= {"q_norm": jnp.asarray(norms[0]), "k_norm": jnp.asarray(norms[1])}
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return (qkv.astype(DTYPES[case.dtype]), cos, sin, k_cache, v_cache, slots), options
