"""Shapes of `decode_layer` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class LayerCase:
    """One problem; by default a layer of Qwen3-0.6B. A context of 0 marks a padding row."""

    name: str
    context_lens: tuple[int, ...]
    width: int = 1024
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 3072
    block_size: int = 16
    qk_norm: bool = True
    qkv_bias: bool = False
    sliding_window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operation."""
        return {"eps": 1e-6, "scale": self.head_dim**-0.5, "sliding_window": self.sliding_window}


_RAGGED = (5, 0, 17, 1, 300, 64, 1000, 16, 129)
CASES = (
    LayerCase("one_row", (401,)),
    LayerCase("one_short_row", (1,)),
    LayerCase("one_long_row", (5000,)),
    LayerCase("three_rows", (400, 1, 65)),
    LayerCase("ragged", _RAGGED),
    LayerCase("sixteen_rows", tuple(range(380, 396))),
    LayerCase("long_and_short", (4000, *(30,) * 12)),
    LayerCase("thirty_two_rows", tuple(range(390, 422))),
    LayerCase("window", _RAGGED, sliding_window=100),
    LayerCase("window_of_one_row", (401,), sliding_window=100),
    LayerCase("qwen2_0_5b", _RAGGED, 896, 14, 2, 64, 4864, qk_norm=False, qkv_bias=True),
    LayerCase("llama3_1b", (300, 77), 2048, 32, 8, 64, 8192, qk_norm=False),
    LayerCase("one_row_of_8b", (401,), 4096, 32, 8, 128, 12288),
    LayerCase("rows_of_8b", (401, 3, 99), 4096, 32, 8, 128, 12288),
)


def layer_inputs(case: LayerCase, seed: int = 0) -> tuple[Any, ...]:
    """The operation's positional arguments: blocks in random order, NaN in every slot that is not to be read."""
    rng = np.random.default_rng(seed)
    E, K, D, F = case.width, case.num_kv_heads, case.head_dim, case.mlp
    group = case.num_heads // K

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal(shape, np.float32)).astype(BF16)

    def near_one(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(BF16)

    weights = {
        "input_norm": near_one(E),
        "qkv": normal(E, K, group + 2, D, size=E**-0.5),
        "o": normal(K, group, D, E, size=(K * group * D) ** -0.5),
        "post_norm": near_one(E),
        "gate_up": normal(E, 2, F, size=E**-0.5),
        "down": normal(F, E, size=F**-0.5),
    }
    if case.qkv_bias:
        weights["qkv_bias"] = normal(K, group + 2, D)
    if case.qk_norm:
        weights |= {"q_norm": near_one(D), "k_norm": near_one(D)}
    rows = len(case.context_lens)
    blocks_of = [-(-length // case.block_size) for length in case.context_lens]
    num_blocks = sum(blocks_of) + 3
    k_cache, v_cache = np.full((2, num_blocks, K, case.block_size, D), np.nan, np.float32)
    tables = np.full((rows, max(1, *blocks_of, 1) + 2), -1, np.int32)
    free = rng.permutation(num_blocks)
    for row, (length, count) in enumerate(zip(case.context_lens, blocks_of, strict=True)):
        tables[row, :count], free = free[:count], free[count:]
        for position in range(length - 1):
            block, offset = tables[row, position // case.block_size], position % case.block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = rng.standard_normal((2, K, D), np.float32)
    angles = rng.uniform(0, 2 * np.pi, (rows, D // 2))
    x = normal(rows, E)
    arrays = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), *map(_bf16, (k_cache, v_cache)))
    return (x, weights, *arrays, tables, np.array(case.context_lens, np.int32))


def _bf16(array: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.bfloat16))
