"""Shapes of `skinny_matmul` that tests, the tuner and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from nanovllm_kernels._cases import DTYPES
from nanovllm_kernels.skinny_matmul.launch import padded_rows


@dataclass(frozen=True)
class SkinnyCase:
    """One product. `gated` means w is [K, 2, N]; `scale` "tensor" or "channel" means fp8 weights.

    `scaled` means x is a `Scaled`, `next_norm` that the result is made one for the norm that follows.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    norm: bool = False
    bias: bool = False
    residual: bool = False
    gated: bool = False
    scaled: bool = False
    next_norm: bool = False
    scale: str | None = None
    w_layout: str = "kn"
    dtype: str = "bfloat16"
    out_dtype: str | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Shape of what belongs to each output feature."""
        return (2, self.outputs) if self.gated else (self.outputs,)

    @property
    def w_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs) if self.w_layout == "nk" else (self.inputs, *self.channels)

    @property
    def options(self) -> dict[str, Any]:
        """The static keyword arguments of the operation."""
        return {"eps": 1e-6, "w_layout": self.w_layout, "out_dtype": self.out_dtype}


CASES = (
    SkinnyCase("one_row", 1, 1024, 512, norm=True),
    SkinnyCase("one_row_split", 1, 3072, 128, residual=True),
    SkinnyCase("one_row_gated", 1, 1024, 256, norm=True, gated=True),
    SkinnyCase("qkv", 8, 1024, 4096, norm=True),
    SkinnyCase("qkv_bias", 8, 896, 1152, norm=True, bias=True),
    SkinnyCase("o", 8, 2048, 1024, residual=True),
    SkinnyCase("gate_up_few", 24, 1024, 3072, norm=True, gated=True),
    SkinnyCase("gate_up", 33, 1024, 3072, norm=True, gated=True),
    SkinnyCase("gate_up_bias", 3, 256, 96, norm=True, gated=True, bias=True),
    SkinnyCase("down", 64, 3072, 1024, residual=True),
    SkinnyCase("down_bias", 100, 3072, 1024, residual=True, bias=True),
    SkinnyCase("all_rows", 256, 1024, 1024, norm=True),
    SkinnyCase("norm_split", 20, 4096, 64, norm=True),
    SkinnyCase("gated_split", 20, 4096, 48, norm=True, gated=True, residual=True),
    SkinnyCase("odd", 5, 300, 77, norm=True, bias=True, residual=True),
    SkinnyCase("odd_one_row", 1, 300, 77, norm=True, bias=True, residual=True),
    SkinnyCase("smallest", 1, 1, 1),
    SkinnyCase("head", 9, 1024, 1000, w_layout="nk", out_dtype="float32"),
    SkinnyCase("head_one_row", 1, 1024, 1000, w_layout="nk", out_dtype="float32"),
    SkinnyCase("fp8_tensor", 8, 1024, 512, norm=True, scale="tensor"),
    SkinnyCase("fp8_channel", 1, 2048, 256, residual=True, scale="channel"),
    SkinnyCase("fp8_gated", 65, 512, 256, gated=True, scale="channel"),
    SkinnyCase("float16", 17, 1024, 512, norm=True, dtype="float16"),
    SkinnyCase("float16_split", 40, 2048, 128, residual=True, dtype="float16"),
    SkinnyCase("passed_on", 64, 1024, 512, scaled=True, residual=True, next_norm=True),
    SkinnyCase("passed_on_gated", 20, 3072, 256, scaled=True, gated=True),
    SkinnyCase("passed_on_split", 3, 3072, 128, bias=True, next_norm=True),
    SkinnyCase("passed_on_one_row", 1, 300, 77, scaled=True, residual=True, next_norm=True),
    SkinnyCase("float32", 4, 256, 128, norm=True, residual=True, dtype="float32"),
)


def as_in_a_layer(case: SkinnyCase) -> SkinnyCase:
    """The product of a model in which one before a norm passes on what the one after it takes."""
    return replace(case, norm=False, scaled=case.norm, next_norm=case.residual)


# The four products of a layer, by model: what the tuner and the benchmark time.
PRODUCTS = {
    "qwen3_0_6b": (
        SkinnyCase("qkv", 1, 1024, 4096, norm=True),
        SkinnyCase("o", 1, 2048, 1024, residual=True),
        SkinnyCase("gate_up", 1, 1024, 3072, norm=True, gated=True),
        SkinnyCase("down", 1, 3072, 1024, residual=True),
    ),
    "qwen3_8b": (
        SkinnyCase("qkv", 1, 4096, 6144, norm=True),
        SkinnyCase("o", 1, 4096, 4096, residual=True),
        SkinnyCase("gate_up", 1, 4096, 12288, norm=True, gated=True),
        SkinnyCase("down", 1, 12288, 4096, residual=True),
    ),
    # One shard of it; residuals are added after the sum over shards.
    "qwen3_8b_tp2": (
        SkinnyCase("qkv", 1, 4096, 3072, norm=True),
        SkinnyCase("o", 1, 2048, 4096),
        SkinnyCase("gate_up", 1, 4096, 6144, norm=True, gated=True),
        SkinnyCase("down", 1, 6144, 4096),
    ),
    "qwen3_8b_tp4": (
        SkinnyCase("qkv", 1, 4096, 1536, norm=True),
        SkinnyCase("o", 1, 1024, 4096),
        SkinnyCase("gate_up", 1, 4096, 3072, norm=True, gated=True),
        SkinnyCase("down", 1, 3072, 4096),
    ),
    "qwen3_32b_tp4": (
        SkinnyCase("qkv", 1, 5120, 2560, norm=True),
        SkinnyCase("o", 1, 2048, 5120),
        SkinnyCase("gate_up", 1, 5120, 6400, norm=True, gated=True),
        SkinnyCase("down", 1, 6400, 5120),
    ),
}


def skinny_inputs(case: SkinnyCase, seed: int = 0) -> dict[str, np.ndarray]:
    """Array arguments by name; outputs come out of the order of 1."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    # Large rows of x when a norm follows: their size must not matter.
    size = 10.0 ** rng.uniform(-1, 2, (case.rows, 1)) if case.norm or case.scaled else 1.0
    w = rng.standard_normal(case.w_shape, np.float32) * case.inputs**-0.5
    arrays = {"x": (size * rng.standard_normal((case.rows, case.inputs))).astype(dtype)}
    if case.scale is None:
        arrays["w"] = w.astype(dtype)
    else:
        scale = np.array(np.abs(w).max() / 448, np.float32)
        if case.scale == "channel":
            scale = (np.abs(w).max(axis=0) / 448).astype(np.float32)
        arrays |= {"w": (w / scale).astype(ml_dtypes.float8_e4m3fn), "w_scale": scale}
    if case.norm:
        arrays["norm"] = rng.uniform(0.5, 2.0, case.inputs).astype(dtype)
    if case.scaled:
        parts = np.array_split(arrays["x"].astype(np.float32) ** 2, 10, axis=1)
        squares = np.stack([part.sum(axis=1) for part in parts])
        arrays["squares"] = np.pad(squares, ((0, 0), (0, padded_rows(case.rows) - case.rows)), constant_values=np.nan)
        arrays["x"] = (arrays["x"] * rng.uniform(0.5, 2.0, case.inputs)).astype(dtype)
    if case.next_norm:
        arrays["next_norm"] = rng.uniform(0.5, 2.0, case.outputs).astype(dtype)
    if case.bias:
        arrays["bias"] = rng.standard_normal(case.channels).astype(dtype)
    if case.residual:
        arrays["residual"] = rng.standard_normal((case.rows, case.outputs)).astype(dtype)
    return arrays


def product_of(arrays: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The operation on a case's arrays: the result, and what is passed on, a `Scaled` or None."""
    from nanovllm_kernels.skinny_matmul import Scaled, skinny_matmul, skinny_matmul_scaled

    arrays = dict(arrays)
    if "squares" in arrays:
        arrays["x"] = Scaled(arrays["x"], arrays.pop("squares"))
    if "next_norm" not in arrays:
        return skinny_matmul(**arrays, **options), None
    # It is for 16-bit weights and results of x's dtype alone.
    options = {name: option for name, option in options.items() if name not in ("w_layout", "out_dtype")}
    return skinny_matmul_scaled(**arrays, **options)
