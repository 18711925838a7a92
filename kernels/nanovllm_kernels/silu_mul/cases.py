"""Shapes of `silu_mul` that tests and the benchmark share."""

from __future__ import annotations

import numpy as np

from nanovllm_kernels._cases import DTYPES, RowsCase

CASES = (
    RowsCase("qwen3_0_6b", 65, 3072),
    RowsCase("one_token", 1, 12288),
    RowsCase("smollm2", 33, 1536),
    RowsCase("smallest", 3, 1),
    RowsCase("odd", 7, 4999),
    RowsCase("float16", 20, 4864, dtype="float16"),
    RowsCase("float32", 20, 704, dtype="float32"),
)
BENCHMARKS = (RowsCase("16384 x 3072", 16384, 3072),)


def silu_mul_inputs(case: RowsCase, seed: int = 0) -> np.ndarray:
    """Gates and values; some gates are so far below zero that their exponential has no number."""
    rng = np.random.default_rng(seed)
    gate_up = 3 * rng.standard_normal((case.num_tokens, 2, case.size))
    gate_up[:, 0, ::5] *= 100
    return gate_up.astype(DTYPES[case.dtype])
