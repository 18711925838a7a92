"""Shapes of `gated_matmul` that tests share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm_kernels._cases import DTYPES


@dataclass(frozen=True)
class GatedCase:
    """One product."""

    name: str
    rows: int
    inputs: int
    outputs: int
    bias: bool = False
    dtype: str = "bfloat16"


CASES = (
    GatedCase("many_tiles", 4096, 1024, 1280),
    GatedCase("last_rows", 2120, 512, 2048),
    GatedCase("bias", 65, 256, 128, bias=True),
    GatedCase("odd", 7, 96, 100),
    GatedCase("float16", 2048, 256, 2176, dtype="float16"),
    GatedCase("float32", 20, 96, 64, dtype="float32"),
)


def gated_inputs(case: GatedCase, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by name; some gates are so far below zero that their exponential has no number."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.rows, case.inputs))
    x[::5] *= 30
    arrays = {"x": x, "w": rng.standard_normal((case.inputs, 2, case.outputs)) * case.inputs**-0.5}
    if case.bias:
        arrays["bias"] = rng.standard_normal((2, case.outputs))
    return {name: array.astype(DTYPES[case.dtype]) for name, array in arrays.items()}
