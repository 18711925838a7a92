"""Shapes of `paged_decode` that tests and the benchmark share."""

from __future__ import annotations

from typing import Any

from nanovllm_kernels._cases import AttentionCase

# Rows of length 0 and 1, at a block's border, and long enough for several splits.
_LENGTHS = (0, 1, 15, 16, 17, 300, 1024, 0)


def _case(name: str, num_heads: int, num_kv_heads: int, head_dim: int, **options: Any) -> AttentionCase:
    return AttentionCase(name, _LENGTHS, num_heads, num_kv_heads, head_dim, **options)


CASES = (
    _case("qwen3_0_6b", 16, 8, 128),
    _case("qwen3_8b", 32, 8, 128),
    _case("smollm2", 9, 3, 64),
    _case("multi_head", 4, 4, 80),
    _case("multi_query", 16, 1, 96),
    _case("wide_head", 4, 2, 256),
    _case("tiny_head", 4, 2, 16),
    _case("small_head", 6, 2, 32),
    _case("block_8", 4, 2, 128, block_size=8),
    _case("block_64", 4, 2, 128, block_size=64),
    _case("block_256", 4, 2, 128, block_size=256),
    _case("float16", 4, 2, 128, dtype="float16"),
    _case("float32", 4, 2, 128, dtype="float32"),
    _case("float32_wide_head", 4, 2, 256, dtype="float32"),
    _case("float32_group_of_3", 9, 3, 64, dtype="float32"),
    _case("window", 4, 2, 128, sliding_window=100),
    _case("window_of_1", 4, 2, 64, sliding_window=1, dtype="float32"),
    _case("soft_cap", 4, 2, 256, soft_cap=30.0, sliding_window=64),
    _case("float32_soft_cap", 4, 2, 64, soft_cap=2.0, dtype="float32"),
    _case("float8", 16, 8, 128, cache_dtype="float8_e4m3fn"),
    _case("float8_of_float32", 4, 2, 64, cache_dtype="float8_e4m3fn", dtype="float32"),
    _case("one_of_several_queries", 16, 8, 128, num_queries=1),
    _case("four_queries", 16, 8, 128, num_queries=4),
    _case("eight_queries_in_a_window", 12, 4, 64, num_queries=8, sliding_window=40),
    _case("float32_three_queries", 4, 2, 64, num_queries=3, dtype="float32"),
    AttentionCase("one_row_among_many", (*(64,) * 60, 8192, *(0, 3)), 4, 2, 128),
    AttentionCase("one_long_row", (4096,), 16, 8, 128),
    AttentionCase("many_rows", tuple(range(0, 512, 2)), 16, 8, 128),
)
BENCHMARKS = (
    AttentionCase("uniform", (1024,) * 256, 16, 8, 128),
    AttentionCase("skewed", (*(256,) * 255, 32768), 16, 8, 128),
    AttentionCase("one_row", (32768,), 16, 8, 128),
    AttentionCase("32q8kv", (4096,) * 64, 32, 8, 128),
    AttentionCase("fp8", (1024,) * 256, 16, 8, 128, cache_dtype="float8_e4m3fn"),
)
