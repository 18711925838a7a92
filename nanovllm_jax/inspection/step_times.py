"""The figures of a trace: each step's busy time and gaps, and the kernels of each kind of step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.attribution import (
    PRODUCT,
    STEP_KINDS,
    Origin,
    ProgramText,
    is_copy,
    kernel_name,
    origins,
    steps_of_events,
)
from nanovllm_jax.inspection.costs import has_formula
from nanovllm_jax.inspection.profile_data import MeasuredKernel, Profile, StepKind, StepRow
from nanovllm_jax.inspection.xplane import DeviceEvent, StepMark, Trace

_NUMBER_AT_END = re.compile(r"([._]\d+)+$")


def summarise(trace: Trace, programs: Sequence[ProgramText], folder: str) -> Profile:
    """The figures of a trace.

    A step lasts from its first kernel to its last. Between two of them the device waits for the host; copies from and
    to the host do not count as work, since nothing else runs while a step waits for them.

    Raises:
        ConfigError: if the trace has no step.
    """
    if not trace.marks:
        raise ConfigError(f"The trace in {folder} has no step: generate something inside the profiled block.")
    numbers, how = steps_of_events(trace, programs)
    events: list[list[DeviceEvent]] = [[] for _ in trace.marks]
    for event, number in zip(trace.events, numbers, strict=True):
        if number is not None:
            events[number].append(event)
    steps = _step_rows(trace, events)
    kernels, placed, unplaced = _kernels(trace, events, programs)
    span, busy = _span(steps), sum(step.busy_s for step in steps)
    host_gap = sum(step.host_gap_s for step in steps)
    return Profile(
        device=trace.device,
        folder=folder,
        span_s=span,
        busy_s=busy,
        gaps_s=sum(_gaps(step) for step in steps),
        host_gap_s=host_gap,
        host_gap_frac=host_gap / span if span else 0.0,
        tokens=sum(mark.tokens for mark in trace.marks),
        kinds=_kinds(steps, kernels),
        kernels=kernels,
        steps=steps,
        notes=[how, *_notes(trace, placed, unplaced)],
    )


def _step_rows(trace: Trace, events: Sequence[Sequence[DeviceEvent]]) -> list[StepRow]:
    zero, free_at, rows = trace.marks[0].start, None, []
    for mark, own in zip(trace.marks, events, strict=True):
        work = [event for event in own if not event.is_transfer]
        start, end = min((e.start for e in work), default=None), max((e.end for e in work), default=None)
        gap = max(0.0, start - free_at) if start is not None and free_at is not None else 0.0
        if end is not None:
            free_at = max(end, free_at or end)
        rows.append(
            StepRow(
                name=mark.name,
                dispatch_start_s=mark.start - zero,
                dispatch_s=mark.end - mark.start,
                start_s=None if start is None else start - zero,
                end_s=None if end is None else end - zero,
                busy_s=_union(work),
                host_gap_s=gap,
                tokens=mark.tokens,
                sequences=mark.sequences,
            )
        )
    return rows


def _union(events: Sequence[DeviceEvent]) -> float:
    """Seconds in which at least one of the events, sorted by their start, runs."""
    total, until = 0.0, float("-inf")
    for event in events:
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def _gaps(step: StepRow) -> float:
    return 0.0 if step.start_s is None or step.end_s is None else max(0.0, step.end_s - step.start_s - step.busy_s)


def _span(steps: Sequence[StepRow]) -> float:
    starts = [step.start_s for step in steps if step.start_s is not None]
    ends = [step.end_s for step in steps if step.end_s is not None]
    return max(ends) - min(starts) if starts else 0.0


@dataclass
class _Sum:
    kind: str = ""
    count: int = 0
    total: float = 0.0
    steps: int = 0
    last_step: int = -1


def _kernels(
    trace: Trace, events: Sequence[Sequence[DeviceEvent]], programs: Sequence[ProgramText]
) -> tuple[list[MeasuredKernel], int, int]:
    """The kernel table, how many events were placed by their order alone, and how many not at all."""
    sums: dict[tuple[str, str, str, str], _Sum] = {}
    placed = unplaced = 0
    for number, (mark, own) in enumerate(zip(trace.marks, events, strict=True)):
        found, by_order = origins(own, _likely(programs, mark, own))
        placed += by_order
        for event, origin in zip(own, found, strict=True):
            unplaced += not origin.program and not event.is_transfer
            one = sums.setdefault((mark.name, origin.program, _base_name(event.name), origin.scope), _Sum())
            one.kind = _kind(event, origin)
            one.count, one.total = one.count + 1, one.total + event.end - event.start
            one.steps += one.last_step != number
            one.last_step = number
    rows = [
        MeasuredKernel(step, program, name, one.kind, scope, one.count, one.steps, one.total)
        for (step, program, name, scope), one in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.total_s), placed, unplaced


def _likely(programs: Sequence[ProgramText], mark: StepMark, events: Sequence[DeviceEvent]) -> list[ProgramText]:
    """The programs of a step, in the order in which it runs them; of several that share a module the one that fits."""
    kind = "decode" if mark.name.startswith("decode") else "prefill"
    ran: dict[str, set[str]] = {}
    for event in events:
        ran.setdefault(event.module, set()).update((kernel_name(event.op), kernel_name(event.name)))

    def rank(program: ProgramText) -> tuple[int, int]:
        """Instructions that did not run less those that did; then the smallest bucket that holds the sequences."""
        names, size = ran.get(program.module, set()) | ran.get("", set()), program.key.size
        known = len(program.places.keys() & names)
        return len(program.places) - 2 * known, size if size >= mark.sequences else size + 1_000_000

    chosen: dict[str, ProgramText] = {}
    for program in sorted(programs, key=rank):
        if not program.key.kind.startswith(STEP_KINDS) or (
            program.key.kind.startswith(kind) and program.key.size == mark.size
        ):
            chosen.setdefault(program.module, program)
    order = ("update_rows", "update_extras", kind, "prompt_logprobs")
    return sorted(chosen.values(), key=lambda one: order.index(one.key.kind) if one.key.kind in order else len(order))


def _base_name(name: str) -> str:
    """One name for the same kernel of every layer."""
    return _NUMBER_AT_END.sub("", name)


def _kind(event: DeviceEvent, origin: Origin) -> str:
    if event.is_transfer:
        return "transfer"
    if is_copy(event):
        return "copy"
    if has_formula(origin.scope, event.name):
        return "kernel"
    return "product" if PRODUCT.search(event.name) or "->" in origin.scope.rpartition("/")[2] else "fusion"


def _kinds(steps: Sequence[StepRow], kernels: Sequence[MeasuredKernel]) -> list[StepKind]:
    found = []
    for name in dict.fromkeys(step.name for step in steps):
        own = [step for step in steps if step.name == name]
        # A dispatch waits for the step before the last one, so that only a third one in a row is paced by its own kind.
        periods = [
            following.dispatch_start_s - step.dispatch_start_s
            for before, step, following in zip(steps, steps[1:], steps[2:], strict=False)
            if before.name == step.name == following.name == name
        ]
        work = sum(row.total_s for row in kernels if row.step == name and row.kind != "transfer")
        found.append(
            StepKind(
                name=name,
                steps=len(own),
                tokens=sum(step.tokens for step in own),
                step_s=sum(periods) / len(periods) if periods else None,
                kernels_s=work / len(own),
                gaps_s=sum(map(_gaps, own)) / len(own),
                host_gap_s=sum(step.host_gap_s for step in own) / len(own),
            )
        )
    return found


def _notes(trace: Trace, placed: int, unplaced: int) -> list[str]:
    notes = []
    if not trace.is_gpu:
        notes.append(
            "On the CPU these are XLA's operations, which may run at the same time; kernels, streams and the gaps "
            "between launches need a GPU."
        )
    elif not trace.num_graph_launches:
        notes.append(
            "No CUDA graph was launched: the host launched each kernel by itself, which a profiler slows, so that the "
            "host's gaps are wider here than without it."
        )
    if trace.num_devices > 1:
        notes.append(f"Figures are of the first of {trace.num_devices} devices.")
    if placed:
        notes.append(
            f"{placed} of {len(trace.events)} kernels came without an instruction's name, as inside CUDA graphs: their "
            "scopes follow from their order in the compiled program."
        )
    if unplaced:
        notes.append(
            f"{unplaced} of {len(trace.events)} kernels are of no known program: neither name nor order tells it."
        )
    return notes
