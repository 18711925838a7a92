"""Reads a profiler's trace: what ran on the device, and the steps that the engine marked on the host.

The file is an XSpace (tsl/profiler/protobuf/xplane.proto). A GPU is a plane `/device:GPU:n` with a line a stream; a
CPU has no streams, its operations are events of the host's threads that carry an `hlo_op`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from nanovllm_jax.errors import ConfigError

STEP = re.compile(r"^(decode|prefill|mixed)\[(\d+)\]$")
_HOST = "/host:"
_GPU = re.compile(r"^/device:GPU:(\d+)$")
_PROGRAM_ID = re.compile(r"\(\d+\)$")
_TRANSFER = re.compile(r"memcpy.*(h2d|d2h|htod|dtoh)", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceEvent:
    """One kernel, copy or operation, in seconds of the trace's clock."""

    name: str
    start: float
    end: float
    module: str  # "" where the trace does not say
    op: str  # instruction of the module, "" likewise
    op_name: str  # JAX's name of it with its scopes, "" likewise
    run: int | None  # of the module, where the trace counts them
    launched: float | None  # when the host launched it
    launched_by: str  # the host thread
    is_transfer: bool  # a copy from or to the host, beside the step's work


@dataclass(frozen=True)
class StepMark:
    """One dispatched step: what the engine wrote into the trace."""

    name: str  # decode[256]
    start: float
    end: float
    thread: str
    number: int
    tokens: int
    sequences: int

    @property
    def size(self) -> int:
        """The bucket."""
        found = STEP.match(self.name)
        return int(found[2]) if found else 0


@dataclass(frozen=True)
class Trace:
    """Events and marks by their start."""

    events: list[DeviceEvent]
    marks: list[StepMark]
    device: str
    is_gpu: bool
    num_devices: int
    num_graph_launches: int


def read_trace(folder: str | Path) -> Trace:
    """The newest trace below a folder, of its first device.

    Raises:
        ConfigError: if there is none.
    """
    files = sorted(Path(folder).glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"{folder} holds no *.xplane.pb; give the folder that a profile was written to.")
    return trace_of(ProfileData.from_file(str(files[-1])))


def trace_of(data: Any) -> Trace:
    """Events and marks of a `jax.profiler.ProfileData`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the binding's types have no __module__
        planes = list(data.planes)
        gpus = sorted((int(found[1]), plane) for plane in planes if (found := _GPU.match(plane.name)))
        host = [plane for plane in planes if plane.name.startswith(_HOST)]
        marks, launches, num_graphs = _read_host(host)
        if gpus:
            ordinal, plane = gpus[0]
            events = _gpu_events(plane, launches)
            name = f"GPU {ordinal}"
        else:
            events, name = _cpu_events(host), "CPU"
    return Trace(
        sorted(events, key=lambda event: event.start),
        sorted(marks, key=lambda mark: mark.start),
        name,
        bool(gpus),
        max(len(gpus), 1),
        num_graphs,
    )


def _read_host(planes: list[Any]) -> tuple[list[StepMark], dict[int, tuple[float, str]], int]:
    """The steps' marks, when and by which thread each launch was made (by correlation id), how many were of graphs."""
    marks, launches, num_graphs = [], {}, 0
    for plane in planes:
        for index, line in enumerate(plane.lines):
            thread = f"{line.name}#{index}"
            for event in line.events:
                if STEP.match(event.name):
                    stats = dict(event.stats)
                    numbers = (int(stats.get(key, 0)) for key in ("step_num", "tokens", "sequences"))
                    marks.append(StepMark(event.name, event.start_ns / 1e9, event.end_ns / 1e9, thread, *numbers))
                elif event.name.startswith("cu"):  # CUDA's driver and runtime functions
                    num_graphs += "GraphLaunch" in event.name
                    number = dict(event.stats).get("correlation_id")
                    if number is not None:
                        launches[int(number)] = (event.start_ns / 1e9, thread)
    return marks, launches, num_graphs


def _gpu_events(plane: Any, launches: dict[int, tuple[float, str]]) -> list[DeviceEvent]:
    events = []
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue  # derived from the streams, such as "XLA Ops"
        for event in line.events:
            stats = dict(event.stats)
            launched, thread = launches.get(int(stats.get("correlation_id", -1)), (None, ""))
            events.append(_event(event, stats, launched, thread))
    return events


def _cpu_events(planes: list[Any]) -> list[DeviceEvent]:
    """Operations that hold no others; a loop is told by what it runs."""
    events = []
    for plane in planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                if event.name.startswith(("end: ", "$")) or event.duration_ns <= 0:
                    continue
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    found.append(_event(event, stats, None, ""))
            found.sort(key=lambda event: (event.start, -event.end))
            following = [*(event.start for event in found[1:]), float("inf")]
            events += [event for event, start in zip(found, following, strict=False) if start >= event.end]
    return events


def _event(event: Any, stats: dict[str, Any], launched: float | None, thread: str) -> DeviceEvent:
    run = stats.get("run_id")
    op_name = next((str(stats[key]) for key in ("tf_op", "name", "long_name") if "/" in str(stats.get(key, ""))), "")
    return DeviceEvent(
        name=event.name,
        start=event.start_ns / 1e9,
        end=event.end_ns / 1e9,
        module=_PROGRAM_ID.sub("", str(stats.get("hlo_module", ""))),
        op=str(stats.get("hlo_op", "")),
        op_name=op_name.rstrip(":"),
        run=None if run is None else int(run),
        launched=launched,
        launched_by=thread,
        is_transfer=bool(_TRANSFER.match(event.name)),
    )
