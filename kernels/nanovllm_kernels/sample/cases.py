"""Problems for `sample` that tests and the benchmark share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SampleCase:
    """Rows of normal logits that all ask for the same; `filters` False calls without top-k, top-p and min-p."""

    name: str
    num_rows: int
    vocab_size: int = 151_936
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    filters: bool = True

    @property
    def read_bytes(self) -> int:
        """Bytes of the logits, each read once: what the problem needs to move."""
        return 4 * self.num_rows * self.vocab_size


BENCHMARKS = (
    SampleCase("256 x 151936, top_k 20, top_p 0.95", 256, top_k=20, top_p=0.95),
    SampleCase("256 x 151936, top_p 0.95", 256, top_p=0.95),
    SampleCase("256 x 151936, temperature", 256, filters=False),
    SampleCase("32 x 151936, top_k 20, top_p 0.95", 32, top_k=20, top_p=0.95),
    SampleCase("1 x 151936, top_k 20, top_p 0.95", 1, top_k=20, top_p=0.95),
    SampleCase("1 x 151936, temperature", 1, filters=False),
)


def sample_inputs(case: SampleCase, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(logits, temperature, key, position) and the filters by name; each row has a key of its own."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((case.num_rows, case.vocab_size), np.float32)
    wishes = [(case.temperature, case.top_k, case.top_p, case.min_p)] * case.num_rows
    args, filters = _arrays(logits, wishes, seed)
    return args, filters if case.filters else {}


_FILTERS = (  # temperature, top_k, top_p, min_p
    (1.0, 20, 0.95, 0.0),
    (1.0, 0, 0.95, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 500, 1.0, 0.0),
    (0.0, 5, 0.5, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.5, 0, 0.99, 1e-3),
    (1.0, 3000, 0.7, 0.0),
    (1.0, 10**9, 1.0, 0.0),
    (1.0, 0, 1.0, 1.0),
    (1.7, 50, 0.9, 0.01),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (5.0, 0, 0.3, 0.0),
    (0.01, 0, 0.9, 0.0),
    (1.0, 0, 0.9999, 0.0),
)
_FEW_FILTERS = 9  # of these the odd logits get


def hard_inputs(vocab_size: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`sample_inputs` of about 130 rows that ask for different things of flat, peaked, tied, banned and bad logits."""
    rng = np.random.default_rng(seed)
    rows, wishes = [], []
    for wish in _FILTERS:
        flat = rng.standard_normal(vocab_size, np.float32)
        likely = rng.random(vocab_size) < 30 / vocab_size
        rows += [flat, 2 * flat + np.where(likely, rng.gamma(3.0, 4.0, vocab_size), 0.0)]
        wishes += [wish] * 2
    for wish in _FILTERS[:_FEW_FILTERS]:
        odd = list(_odd_rows(vocab_size, rng))
        rows += odd
        wishes += [wish] * len(odd)
    return _arrays(np.stack(rows).astype(np.float32), wishes, seed)


def _odd_rows(vocab_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    flat, choice = rng.standard_normal(vocab_size), rng.random(vocab_size)
    banned = np.full(vocab_size, -np.inf)
    yield np.full(vocab_size, 1.5)  # all equal
    yield rng.integers(-2, 3, vocab_size)  # few values
    yield np.where(choice < 0.5, 0.0, -0.0)  # equal, but not in bits
    yield np.where(choice < 0.9, banned, flat)
    yield np.where(np.arange(vocab_size) == vocab_size // 2, -1e38, banned)  # one token is left
    yield banned
    yield np.where(np.arange(vocab_size) == vocab_size // 3, np.nan, flat)
    yield np.where(np.arange(vocab_size) == vocab_size - 1, np.inf, flat)
    yield flat * 1e-30
    yield flat * 1e37
    yield np.where(np.arange(vocab_size) < 40, 10.0, flat - 50.0)  # 40 equals far above the rest


def _arrays(
    logits: np.ndarray, wishes: list[tuple[float, int, float, float]], seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rng = np.random.default_rng(seed + 1)
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*wishes, strict=True))
    key = rng.integers(0, 2**32, (len(logits), 2), np.uint32)
    position = rng.integers(0, 2**31, len(logits), np.int32)
    filters = {
        "top_k": top_k.astype(np.int32),
        "top_p": top_p.astype(np.float32),
        "min_p": min_p.astype(np.float32),
    }
    return (logits, temperature.astype(np.float32), key, position), filters
