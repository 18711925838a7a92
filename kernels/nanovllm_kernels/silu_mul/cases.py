"""Shapes of `silu_mul` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm_kernels._cases import DTYPES


@dataclass(frozen=True)
class SiluMulCase:
    """One problem."""

    name: str
    num_tokens: int
    size: int
    dtype: str = "bfloat16"


CASES = (
    SiluMulCase("qwen3_0_6b", 65, 3072),
    SiluMulCase("one_token", 1, 12288),
    SiluMulCase("smollm2", 33, 1536),
    SiluMulCase("smallest", 3, 1),
    SiluMulCase("odd", 7, 4999),
    SiluMulCase("float16", 20, 4864, dtype="float16"),
    SiluMulCase("float32", 20, 704, dtype="float32"),
)
BENCHMARKS = (SiluMulCase("16384 x 3072", 16384, 3072),)


def silu_mul_inputs(case: SiluMulCase, seed: int = 0) -> np.ndarray:
    """Gates and values; some gates are so far below zero that their exponential has no number."""
    rng = np.random.default_rng(seed)
    gate_up = 3 * rng.standard_normal((case.num_tokens, 2, case.size))
    gate_up[:, 0, ::5] *= 100
    return gate_up.astype(DTYPES[case.dtype])
