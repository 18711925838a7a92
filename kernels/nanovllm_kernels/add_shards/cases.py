"""Shapes of `add_shards` that tests share, in the order in which they are added: programs change from sum to sum."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SumCase:
    """One sum of [rows, width] elements."""

    rows: int
    width: int
    residual: bool = True
    dtype: str = "bfloat16"


CASES = (
    SumCase(64, 4096),
    SumCase(1, 4096, residual=False),
    SumCase(8, 4096),
    SumCase(128, 4096),
    SumCase(3, 1024, dtype="float16"),
    SumCase(16, 2560),
    SumCase(1, 512),
    SumCase(64, 4096, residual=False, dtype="float16"),
    SumCase(64, 5120),
    SumCase(32, 4096),
    SumCase(37, 3584),
)
REFUSED = (SumCase(1, 100), SumCase(512, 4096), SumCase(8, 4096, dtype="float32"))
