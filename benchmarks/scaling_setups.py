"""The engines that `scaling.py` measures: which setups, in which order, and which of them side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PARTS = ("dp", "tp", "both", "large")
SMALL, MIDDLE, LARGE = "qwen3-0.6b", "qwen3-8b", "qwen3-32b"
SIZES = {SMALL: "0.6b", MIDDLE: "8b", LARGE: "32b"}


@dataclass(frozen=True)
class Setup:
    """One engine and what is measured with it.

    Attributes:
        model: a name of `models.MODELS`.
        replicas: of the model.
        shards: devices of each replica.
        steps: names of decode steps to time: b64, b1.
        bench: whether to run bench256.
    """

    model: str
    replicas: int = 1
    shards: int = 1
    steps: tuple[str, ...] = ()
    bench: bool = False

    @property
    def devices(self) -> int:
        """Devices that it needs."""
        return self.replicas * self.shards

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.model} dp{self.replicas} tp{self.shards}"

    @property
    def bench_name(self) -> str:
        """What the names of its bench256's figures begin with."""
        return f"dp{self.replicas}{f'tp{self.shards}' if self.shards > 1 else ''}_bench256"

    @property
    def step_name(self) -> str:
        """What the names of its steps' figures begin with."""
        return f"tp{self.shards}_{SIZES[self.model]}"


def plan(gpus: Sequence[int], parts: Sequence[str]) -> list[Setup]:
    """What to measure, what matters most first; of equal setups one serves all parts."""
    setups: list[Setup] = []
    most, pair = max(gpus, default=0), Setup(MIDDLE, 1, 2, ("b64", "b1") if "tp" in parts else (), True)
    if "dp" in parts and most > 1:
        setups += [Setup(SMALL, n, 1, bench=True) for n in sorted({1, most})]
    if "tp" in parts:
        setups += [Setup(MIDDLE, 1, n, ("b64", "b1")) for n in gpus]
    if "both" in parts and most >= 4:
        setups = [setup for setup in setups if (setup.model, setup.devices) != (MIDDLE, 2)]
        setups += [pair, Setup(MIDDLE, most // 2, 2, bench=True)]
    if "large" in parts and most > 1:
        setups.append(Setup(LARGE, 1, most, ("b64",)))
    if "dp" in parts:
        setups += [Setup(SMALL, n, 1, bench=True) for n in gpus if 1 < n < most]
    return setups


def waves(setups: Sequence[Setup], num_devices: int) -> Iterator[list[Setup]]:
    """Setups that run side by side: each takes the first wave that has room for it."""
    found: list[list[Setup]] = []
    for setup in setups:
        for wave in found:
            if sum(other.devices for other in wave) + setup.devices <= num_devices:
                wave.append(setup)
                break
        else:
            found.append([setup])
    yield from found
