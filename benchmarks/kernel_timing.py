"""Device time of compiled calls, from a profiler trace: what the host does between them does not count.

Importing this asks XLA to keep launching captured graphs while a trace is taken, as it does without one; import it
before JAX starts its device.
"""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_enable_command_buffers_during_profiling=true".strip()
)

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

# Runs are told apart by the pause between them, which is far longer than any gap inside one.
_PAUSE, _GAP_NS = 4e-3, 1e6


def spans(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds from the start of the first kernel to the end of the last one, of each call, run once and in order.

    Raises:
        RuntimeError: if the trace does not show as many separate runs as there were calls.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for call in calls:
                time.sleep(_PAUSE)
                jax.block_until_ready(call())
        found = _runs(_device_events(Path(folder)))
    if len(found) != len(calls):
        raise RuntimeError(f"the trace shows {len(found)} runs of {len(calls)} calls; trace fewer at a time.")
    return found


def _device_events(folder: Path) -> list[tuple[float, float]]:
    """Start and end in ns of everything that ran on the device, in order."""
    (path,) = folder.rglob("*.xplane.pb")
    return sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def _runs(events: list[tuple[float, float]]) -> list[float]:
    """Spans in seconds of the groups of events between which the device was idle for long."""
    found: list[list[float]] = []
    for start, end in events:
        if not found or start - found[-1][1] > _GAP_NS:
            found.append([start, end])
        found[-1][1] = max(found[-1][1], end)
    return [(end - start) / 1e9 for start, end in found]
