"""Shapes of `add_rms_norm` that tests and the benchmark share."""

from __future__ import annotations

import numpy as np

from nanovllm_kernels._cases import DTYPES, RowsCase

CASES = (
    RowsCase("qwen3_0_6b", 301, 1024),
    RowsCase("one_token", 1, 4096),
    RowsCase("smollm2", 33, 576),
    RowsCase("smallest", 3, 1),
    RowsCase("wide", 9, 8192),
    RowsCase("wide_and_odd", 5, 10_001),
    RowsCase("float16", 100, 896, dtype="float16"),
    RowsCase("float32", 100, 2560, dtype="float32"),
)
BENCHMARKS = (RowsCase("16384 x 1024", 16384, 1024),)


def add_rms_norm_inputs(case: RowsCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, update, weight); rows are of very different lengths, and some are zero."""
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-2, 2, (2, case.num_tokens, 1))
    lengths[:, ::7] = 0
    x, update = lengths * rng.standard_normal((2, case.num_tokens, case.size))
    dtype = DTYPES[case.dtype]
    return x.astype(dtype), update.astype(dtype), rng.uniform(0.5, 1.5, case.size).astype(dtype)
