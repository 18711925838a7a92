"""Problems for `sample_head` that tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from nanovllm_kernels._cases import DTYPES


@dataclass(frozen=True)
class SampleHeadCase:
    """Rows of `inputs` hidden states and a head of `vocab_size` ids."""

    name: str
    num_rows: int
    inputs: int
    vocab_size: int
    dtype: str = "bfloat16"

    @property
    def read_bytes(self) -> int:
        """Bytes of the head and the hidden states, each read once: what the problem needs to move."""
        return jnp.dtype(self.dtype).itemsize * self.inputs * (self.vocab_size + self.num_rows)


CASES = (
    SampleHeadCase("float16", 9, 64, 300, dtype="float16"),
    SampleHeadCase("bfloat16", 9, 64, 300),
    SampleHeadCase("float32", 9, 64, 300, dtype="float32"),
)
INTERPRETED = (
    SampleHeadCase("last_ids", 5, 64, 300, dtype="float16"),
    SampleHeadCase("odd_inputs", 33, 72, 128, dtype="float16"),
    SampleHeadCase("two_tiles_of_rows", 70, 64, 130, dtype="float16"),
)
ON_GPU = tuple(SampleHeadCase(f"{rows}_rows", rows, 576, 32_001) for rows in (1, 5, 32, 64, 70))
BENCHMARKS = (
    SampleHeadCase("32 x 1024 x 151936", 32, 1024, 151_936),
    SampleHeadCase("64 x 1024 x 151936", 64, 1024, 151_936),
)


def sample_head_inputs(case: SampleHeadCase, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(hidden, head, temperature, key, position); a row in four is greedy, the hidden states of one are NaN."""
    rng, rows = np.random.default_rng(seed), case.num_rows
    hidden = rng.standard_normal((rows, case.inputs), np.float32)
    hidden[rows // 2] = np.nan
    head = rng.standard_normal((case.vocab_size, case.inputs), np.float32) * 0.3
    return (
        hidden.astype(DTYPES[case.dtype]),
        head.astype(DTYPES[case.dtype]),
        np.array([0.0, 0.6, 1.0, 2.0], np.float32)[np.arange(rows) % 4],
        rng.integers(2**32, size=(rows, 2), dtype=np.uint32),
        rng.integers(1000, size=rows, dtype=np.int32),
    )
