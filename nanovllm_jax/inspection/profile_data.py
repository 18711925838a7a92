"""What a profile found out, as plain data: steps, kernels, and the gaps in which the device waited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRow:
    """One step of a profiled run, in seconds since the run's first step was dispatched."""

    name: str  # decode[256]
    dispatch_start_s: float
    dispatch_s: float  # that the host took
    start_s: float | None  # of the first kernel; None if the trace has none of this step
    end_s: float | None
    busy_s: float
    host_gap_s: float  # the device was idle that long before it
    tokens: int
    sequences: int


@dataclass(frozen=True)
class StepKind:
    """All profiled steps of one name; seconds are means a step."""

    name: str
    steps: int
    tokens: int  # of all of them
    step_s: float | None  # from one dispatch to the next, by the host's clock; None for a single step
    kernels_s: float  # sum over kernels
    gaps_s: float  # between kernels of the step
    host_gap_s: float  # between the step before and this one


@dataclass(frozen=True)
class MeasuredKernel:
    """All runs of one kernel in the steps of one name."""

    step: str
    program: str  # plain[256]; "" if the trace does not tell
    name: str
    kind: str  # product, kernel, fusion, copy (on the device), transfer (from or to the host)
    scope: str  # folded over the layers
    count: int
    steps: int  # in which it ran
    total_s: float


@dataclass(frozen=True)
class Profile:
    """A profiled run: what the device did, and when it waited."""

    device: str
    folder: str
    span_s: float  # from the first kernel to the last one's end
    busy_s: float
    gaps_s: float  # between kernels, inside steps
    host_gap_s: float  # between one step's last kernel and the next one's first
    host_gap_frac: float  # of the span
    tokens: int
    kinds: list[StepKind]
    kernels: list[MeasuredKernel]  # the longest first
    steps: list[StepRow]
    notes: list[str]  # how events were attributed, and what could not be known
