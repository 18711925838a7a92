"""Shapes of `decode_layers` that tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class LayerCase:
    """One problem; by default layers of Qwen3-0.6B. A context of 0 marks a padding row."""

    name: str
    context: int
    width: int = 1024
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 3072
    block_size: int = 16
    qk_norm: bool = True
    qkv_bias: bool = False
    sliding_window: int | None = None
    num_layers: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operation."""
        return {"eps": 1e-6, "scale": self.head_dim**-0.5, "sliding_window": self.sliding_window}


_SMALL: dict[str, Any] = {"width": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "mlp": 1536}
CASES = (
    LayerCase("qwen3_0_6b", 401),
    LayerCase("first_token", 1),
    LayerCase("whole_tile", 65),
    LayerCase("new_block", 17),
    LayerCase("long", 5000),
    LayerCase("padding", 0),
    LayerCase("window", 401, sliding_window=100),
    LayerCase("window_of_a_long_row", 3000, sliding_window=1024),
    LayerCase("block_of_256", 1000, block_size=256),
    LayerCase("smollm2_135m", 300, **_SMALL, qk_norm=False),
    LayerCase("bias", 300, **_SMALL, qk_norm=False, qkv_bias=True),
    LayerCase("split_inside_a_head", 77, 896, 14, 2, 64, 2048, qk_norm=False, qkv_bias=True),
)


def layer_inputs(case: LayerCase, seed: int = 0) -> tuple[Any, ...]:
    """The operation's positional arguments: blocks in random order, NaN in every slot that is not to be read."""
    rng = np.random.default_rng(seed)
    E, K, D, F = case.width, case.num_kv_heads, case.head_dim, case.mlp
    group = case.num_heads // K

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (np.float32(size) * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    def near_one(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(ml_dtypes.bfloat16)

    def layer() -> dict[str, np.ndarray]:
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
        return weights

    count = -(-case.context // case.block_size)
    blocks = rng.permutation(count + 3)[:count]
    positions = np.arange(max(case.context - 1, 0))

    def cache() -> np.ndarray:
        cache = np.full((count + 3, K, case.block_size, D), np.nan, np.float32)
        tokens = rng.standard_normal((len(positions), K, D), np.float32)
        cache[blocks[positions // case.block_size], :, positions % case.block_size] = tokens
        return cache.astype(ml_dtypes.bfloat16)

    layers = [layer() for _ in range(case.num_layers)]
    caches = [(cache(), cache()) for _ in range(case.num_layers)]
    tables = np.full((1, count + 2), -1, np.int32)
    tables[0, :count] = blocks
    angles = rng.uniform(0, 2 * np.pi, (1, D // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return normal(1, E), layers, cos, sin, caches, tables, np.array([case.context], np.int32)
