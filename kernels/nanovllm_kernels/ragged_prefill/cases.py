"""Shapes of `ragged_prefill` that tests and the benchmark share."""

from __future__ import annotations

from typing import Any

from nanovllm_kernels._cases import AttentionCase

# A whole prompt, a chunk after a prefix, a decode row, an unused sequence, one new token, a prefix that ends
# inside a block; then rows that belong to nobody.
_Q_LENS = (150, 70, 1, 0, 1, 129, 0)
_CONTEXTS = (150, 333, 500, 0, 1, 202, 64)
_PADDING = 29


def _case(name: str, num_heads: int, num_kv_heads: int, head_dim: int, **options: Any) -> AttentionCase:
    return AttentionCase(
        name, _CONTEXTS, num_heads, num_kv_heads, head_dim, q_lens=_Q_LENS, padding=_PADDING, **options
    )


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
    AttentionCase("small_bucket", (9, 200), 4, 2, 128, q_lens=(5, 1), padding=2),
    AttentionCase("all_padding", (0, 0), 4, 2, 128, q_lens=(0, 0), padding=40),
)
BENCHMARKS = (
    AttentionCase("16 x 1024, 16/8 x 128", (1024,) * 16, 16, 8, 128, q_lens=(1024,) * 16),
    AttentionCase("4 x 4096, 16/8 x 128", (4096,) * 4, 16, 8, 128, q_lens=(4096,) * 4),
    AttentionCase("16 x 1024 after 7168, 16/8 x 128", (8192,) * 16, 16, 8, 128, q_lens=(1024,) * 16),
)
