"""Integer arithmetic on the host, which launch parameters take without triton."""

from __future__ import annotations


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
