"""Shapes of `add_rms_norm` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm_kernels._cases import DTYPES


@dataclass(frozen=True)
class AddRmsNormCase:
    """One problem."""

    name: str
    num_tokens: int
    size: int
    dtype: str = "bfloat16"


CASES = (
    AddRmsNormCase("qwen3_0_6b", 301, 1024),
    AddRmsNormCase("one_token", 1, 4096),
    AddRmsNormCase("smollm2", 33, 576),
    AddRmsNormCase("smallest", 3, 1),
    AddRmsNormCase("wide", 9, 8192),
    AddRmsNormCase("wide_and_odd", 5, 10_001),
    AddRmsNormCase("float16", 100, 896, dtype="float16"),
    AddRmsNormCase("float32", 100, 2560, dtype="float32"),
)
BENCHMARKS = (AddRmsNormCase("16384 x 1024", 16384, 1024),)


def add_rms_norm_inputs(case: AddRmsNormCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, update, weight); rows are of very different lengths, and some are zero."""
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-2, 2, (2, case.num_tokens, 1))
    lengths[:, ::7] = 0
    x, update = lengths * rng.standard_normal((2, case.num_tokens, case.size))
    dtype = DTYPES[case.dtype]
    return x.astype(dtype), update.astype(dtype), rng.uniform(0.5, 1.5, case.size).astype(dtype)
