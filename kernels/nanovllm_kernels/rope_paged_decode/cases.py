"""Inputs of `rope_paged_decode` that tests and the benchmark share; its shapes are those of `paged_decode`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from nanovllm_kernels._cases import DTYPES, AttentionCase, attention_inputs
from nanovllm_kernels.paged_decode.cases import CASES as DECODE_CASES

# About two programs for each of an H100's multiprocessors: no row is cut but the longest ones.
_UNEVEN = (0, 1, 64, 65, *range(100, 700, 24), 3000, 9, 1500)
# Enough for Mosaic's kernel on an H100, with rows of one tile and one that is cut.
_MANY = (0, 1, 15, 16, 17, 64, 65, 128, 129, 3000, *range(100, 640, 10))
CASES = (
    *(case for case in DECODE_CASES if case.num_queries is None),
    AttentionCase("32_uneven_rows", _UNEVEN, 16, 8, 128),
    AttentionCase("many_rows", _MANY, 32, 8, 128),
    AttentionCase("many_rows_block_8", _MANY, 24, 8, 128, block_size=8),
    AttentionCase("float8_many_rows", tuple(range(0, 350, 5)), 16, 8, 128, cache_dtype="float8_e4m3fn"),
)
_WITHOUT_NORM = ("many_rows_block_8", "smollm2", "multi_head", "float32")


def rope_paged_decode_inputs(
    case: AttentionCase, seed: int = 0, **sizes: int
) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """(qkv, cos, sin, k_cache, v_cache, block_tables, context_lens) and the keyword arguments.

    The slots that are to be written hold NaN, as do all that no row owns. `sizes`: those of `attention_inputs`.
    """
    paged = attention_inputs(case, seed, **sizes)
    rng = np.random.default_rng(seed + 100)
    for table, length in zip(paged.block_tables, case.context_lens, strict=True):
        if length:
            block, offset = table[(length - 1) // case.block_size], (length - 1) % case.block_size
            for cache in (paged.k_cache, paged.v_cache):
                cache[block, :, offset] = np.nan
    rows, group = len(case.context_lens), case.num_heads // case.num_kv_heads
    qkv = rng.standard_normal((rows, case.num_kv_heads, group + 2, case.head_dim), np.float32)
    angles = rng.uniform(0, 2 * np.pi, (rows, case.head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    options: dict[str, Any] = {**case.options, "eps": 1e-5}
    if case.name not in _WITHOUT_NORM:
        # Large, so that the softmax is narrow and a wrong position shows.
        norms = rng.uniform(0.5, 2.5, (2, case.head_dim)).astype(DTYPES[case.dtype])
        options |= {"q_norm": jnp.asarray(norms[0]), "k_norm": jnp.asarray(norms[1])}
    caches = (paged.k_cache, paged.v_cache)
    return (qkv.astype(DTYPES[case.dtype]), cos, sin, *caches, paged.block_tables, paged.context_lens), options
