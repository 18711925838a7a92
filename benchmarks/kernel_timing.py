"""Device time of compiled calls, from a profiler trace: what the host does between them does not count.

Importing this asks XLA to keep launching captured graphs while a trace is taken, as it does without one; import it
before JAX starts its device.
"""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_enable_command_buffers_during_profiling=true".strip()
)

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

# Runs are told apart by the pause between them, which is far longer than any gap inside one.
_PAUSE, _GAP_NS = 4e-3, 1e6


def spans(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds from the start of the first kernel to the end of the last one, of each call, run once and in order.

    Of a call that runs on several devices, those of the last one to start: the others wait for it.

    Raises:
        RuntimeError: if the trace does not show as many separate runs as there were calls.
    """
    devices = [_runs([(start, end) for start, end, _ in events]) for events in _traced(calls)]
    for found in devices:
        if len(found) != len(calls):
            raise RuntimeError(f"the trace shows {len(found)} runs of {len(calls)} calls; trace fewer at a time.")
    return [min(spans) for spans in zip(*devices, strict=True)]


def longest_kernels(call: Callable[[], object], count: int) -> list[tuple[str, float, int]]:
    """Names, median microseconds and number of the kernels that a call spends most time in, of one of its devices.

    Of several devices, the one whose kernels took least: what waits for others takes longer.
    """
    by_name = []
    for events in _traced([call]):
        found: dict[str, list[float]] = {}
        for start, end, name in events:
            found.setdefault(name, []).append((end - start) / 1e3)
        by_name.append(found)
    least = min(by_name, key=lambda found: sum(map(sum, found.values())))
    longest = sorted(least, key=lambda name: -sum(least[name]))[:count]
    return [(name, statistics.median(least[name]), len(least[name])) for name in longest]


def _traced(calls: Sequence[Callable[[], object]]) -> list[list[tuple[float, float, str]]]:
    """Start and end in ns and name of everything that ran, in order, of each device that ran anything."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for call in calls:
                time.sleep(_PAUSE)
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
    devices = [
        sorted(
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
        for plane in planes
        if plane.name.startswith("/device:GPU")
    ]
    return [events for events in devices if events]


def _runs(events: list[tuple[float, float]]) -> list[float]:
    """Spans in seconds of the groups of events between which the device was idle for long."""
    found: list[list[float]] = []
    for start, end in events:
        if not found or start - found[-1][1] > _GAP_NS:
            found.append([start, end])
        found[-1][1] = max(found[-1][1], end)
    return [(end - start) / 1e9 for start, end in found]
