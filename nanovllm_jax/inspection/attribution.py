"""Finds out of which step, program and named scope each event of a trace is.

A step is found by the launch that the host made inside the step's mark; where launches come from another thread or
are not recorded, by the order of modules on the device; at last by time. A scope is found by the event's instruction
in the compiled program's text. Kernels inside a CUDA graph may come without one: fusions are then known by their
kernel's name, and what stands between two of them (cuBLAS, Triton) is taken in the order of the program.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanovllm_jax.inspection.hlo_text import instruction_scopes, instructions, module_name
from nanovllm_jax.inspection.scopes import fold, scope_of_op
from nanovllm_jax.inspection.xplane import DeviceEvent, Trace
from nanovllm_jax.step.catalogue import ProgramKey

PRODUCT = re.compile(r"nvjet|gemm|cutlass|cublas|xmma|splitk|gemv|\bdot\b|__cublas", re.IGNORECASE)
STEP_KINDS = ("decode", "prefill")
_MOST = 0.9  # of the kernels, whose launch is known


@dataclass(frozen=True)
class ProgramText:
    """A compiled program as its text names it."""

    key: ProgramKey
    module: str
    scopes: dict[str, str]  # instruction: scope
    order: list[tuple[str, str, str]]  # as scheduled: kernel's name, custom call's target or opcode, scope
    places: dict[str, int]  # kernel's name: its place in `order`

    @staticmethod
    def parse(key: ProgramKey, text: str) -> ProgramText:
        """From the optimised HLO."""
        order = [(kernel_name(one.name), one.opcode, one.scope) for one in instructions(text)]
        places = {name: place for place, (name, _, _) in enumerate(order)}
        return ProgramText(key, module_name(text), instruction_scopes(text), order, places)

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"{self.key.kind}[{self.key.size}]" if self.key.size else self.key.kind


@dataclass(frozen=True)
class Origin:
    """Where an event comes from; empty where nothing tells."""

    program: str
    scope: str


def kernel_name(instruction: str) -> str:
    """What XLA calls the kernel of an instruction."""
    return re.sub(r"[^0-9A-Za-z_]", "_", instruction)


def steps_of_events(trace: Trace, programs: Sequence[ProgramText]) -> tuple[list[int | None], str]:
    """For each event the index of its step's mark (None: before the first), and how that was found."""
    starts = [mark.start for mark in trace.marks]

    def last_before(time: float) -> int | None:
        return bisect_right(starts, time) - 1 if starts and time >= starts[0] else None

    kernels = [event for event in trace.events if not event.is_transfer]
    threads = {mark.thread for mark in trace.marks}
    by_launch = _filled([None if e.launched is None else last_before(e.launched) for e in trace.events])
    if _share(kernels, lambda event: event.launched_by in threads) > _MOST:
        return by_launch, "Each kernel belongs to the step whose dispatch launched it."
    by_module = _by_modules(trace, {one.module for one in programs if one.key.kind.startswith(STEP_KINDS)}, programs)
    if by_module is not None:
        return by_module, "Steps were told apart by the order of modules on the device."
    if _share(kernels, lambda event: event.launched is not None) > _MOST:
        return by_launch, (
            "Each kernel belongs to the last step dispatched before its launch: launches came from another thread "
            "than the dispatches, so that a late one may be counted with the step after its own."
        )
    return [last_before(event.start) for event in trace.events], (
        "Steps were told apart by time alone, since the trace has neither launches nor modules: a kernel near a "
        "step's border may be counted with its neighbour."
    )


def _share(events: Sequence[DeviceEvent], holds: Callable[[DeviceEvent], bool]) -> float:
    return sum(map(holds, events)) / len(events) if events else 0.0


def _filled(steps: list[int | None]) -> list[int | None]:
    """An event of which nothing is known goes with the one before it on the device."""
    return list(itertools.accumulate(steps, lambda before, own: before if own is None else own))


def _by_modules(trace: Trace, steps: set[str], programs: Sequence[ProgramText]) -> list[int | None] | None:
    """One run of a decode or prefill module a mark; updates before it and the sampler after it are of its step."""
    before = {one.module for one in programs if one.key.kind.startswith("update")}
    runs: dict[tuple[str, int], list[int]] = {}
    previous, serial, first_op = "", 0, ""
    for index, event in enumerate(trace.events):
        if event.is_transfer or not event.module:
            continue
        if event.run is None:
            # Without a number, a run ends with another module, or when its first instruction comes again.
            if event.module != previous or (event.op and event.op == first_op):
                serial, previous, first_op = serial + 1, event.module, event.op
            runs.setdefault((event.module, serial), []).append(index)
        else:
            runs.setdefault((event.module, event.run), []).append(index)
    unknown = any(not event.module and not event.is_transfer for event in trace.events)
    if unknown or not trace.marks or sum(module in steps for module, _ in runs) != len(trace.marks):
        return None
    found: list[int | None] = [None] * len(trace.events)
    step, waiting = -1, []
    for (module, _), indices in runs.items():
        if module in before:
            waiting += indices
            continue
        if module in steps:
            step, indices, waiting = step + 1, [*waiting, *indices], []
        for index in indices:
            found[index] = step if step >= 0 else None
    return _filled(found)


def origins(events: Sequence[DeviceEvent], programs: Sequence[ProgramText]) -> tuple[list[Origin], int]:
    """The origin of each event of one step, and how many were placed by order alone.

    Args:
        events: of the step, by time.
        programs: those that the step may have run, the likeliest first.
    """
    found: list[Origin | None] = []
    anchors: list[tuple[int, int] | None] = []  # (program, place) of events that name their instruction
    for event in events:
        origin, anchor = _by_name(event, programs)
        found.append(origin)
        anchors.append(anchor)
    placed = 0
    index = 0
    while index < len(events):
        if found[index] is not None or events[index].is_transfer:
            index += 1
            continue
        end = index
        while end < len(events) and found[end] is None:
            end += 1
        before = next((anchor for anchor in reversed(anchors[:index]) if anchor), None)
        after = next((anchor for anchor in anchors[end:] if anchor), None)
        group = [position for position in range(index, end) if not events[position].is_transfer]
        for position, origin in zip(group, _between([events[p] for p in group], before, after, programs), strict=True):
            found[position] = origin
            placed += bool(origin.scope)
        index = end
    return [origin or Origin("", "") for origin in found], placed


def _by_name(event: DeviceEvent, programs: Sequence[ProgramText]) -> tuple[Origin | None, tuple[int, int] | None]:
    names = {event.op, event.name} - {""}
    for number, program in enumerate(programs):
        if event.module and program.module != event.module:
            continue
        for name in names:
            place = program.places.get(kernel_name(name))
            if place is not None:
                return Origin(program.name, fold(program.order[place][2])), (number, place)
            if name in program.scopes:
                return Origin(program.name, fold(program.scopes[name])), None
    if event.op_name:
        name = next((one.name for one in programs if one.module == event.module), "")
        return Origin(name, fold(scope_of_op(event.op_name))), None
    return None, None


def _between(
    events: Sequence[DeviceEvent],
    before: tuple[int, int] | None,
    after: tuple[int, int] | None,
    programs: Sequence[ProgramText],
) -> list[Origin]:
    """Kernels without a name of ours, matched with the custom calls between two known places of the program."""
    calls: list[tuple[str, str, str]] = []
    first, start = before or (after[0] if after else 0, -1)
    last, end = after or (first, len(programs[first].order) if programs else 0)
    if not programs:
        return [Origin("", "")] * len(events)
    if first == last and end <= start:  # a loop's next turn
        calls += _calls(programs[first], range(start + 1, len(programs[first].order)))
        calls += _calls(programs[first], range(end))
    elif first == last:
        calls += _calls(programs[first], range(start + 1, end))
    else:
        calls += _calls(programs[first], range(start + 1, len(programs[first].order)))
        calls += _calls(programs[last], range(end))
    found: list[Origin] = [Origin(programs[first].name if is_copy(event) else "", "") for event in events]
    for is_product in (True, False):
        kernels = [
            i for i, event in enumerate(events) if bool(PRODUCT.search(event.name)) == is_product and not is_copy(event)
        ]
        targets = [call for call in calls if bool(PRODUCT.search(call[1])) == is_product]
        for number, position in enumerate(kernels):
            if targets:  # one call may be several kernels
                program, _, scope = targets[number * len(targets) // len(kernels)]
                found[position] = Origin(program, fold(scope))
    return found


def is_copy(event: DeviceEvent) -> bool:
    """Whether an event moves or fills memory, without a kernel of the program."""
    return event.name.lower().startswith(("memcpy", "memset"))


def _calls(program: ProgramText, places: Iterable[int]) -> list[tuple[str, str, str]]:
    chosen = (program.order[place] for place in places)
    return [(program.name, target, scope) for _, target, scope in chosen if _is_call(target)]


def _is_call(target: str) -> bool:
    return target.startswith("__") or "$" in target or re.search(r"triton|mosaic", target) is not None
