"""`with llm.profile(folder):` a profiler's trace of every step inside, and what it says of the device.

The trace opens in XProf and Perfetto. Each dispatched step is marked in it (`decode[256]`), kernels carry the named
scopes of the model, and `Profiling.summary` tells them apart by step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jax

from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.schedule import Schedule
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.attribution import ProgramText
from nanovllm_jax.inspection.profile_data import Profile
from nanovllm_jax.inspection.step_times import summarise
from nanovllm_jax.inspection.xplane import Trace, read_trace
from nanovllm_jax.step.buckets import bucket_for
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.runner import Runner


class Profiling:
    """What `llm.profile()` yields; its summary is there after the block.

    Args:
        folder: that the trace is written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._summary: Profile | None = None

    @property
    def summary(self) -> Profile:
        """Steps, kernels, busy time and gaps.

        Raises:
            ConfigError: inside the block, when nothing is measured yet.
        """
        if self._summary is None:
            raise ConfigError("The profile is not finished: leave the `with llm.profile(folder)` block first.")
        return self._summary

    def finish(self, summary: Profile) -> None:
        """Set the summary."""
        self._summary = summary

    def __repr__(self) -> str:
        from nanovllm_jax.inspection.profile_summary import profile_tables
        from nanovllm_jax.inspection.summary import render

        if self._summary is None:
            return f"Profiling({str(self.folder)!r}, not finished)"
        return render(profile_tables(self._summary))


@contextmanager
def profile_engine(engine: Engine, folder: str | Path) -> Iterator[Profiling]:
    """Trace what an engine does inside the block, without Python's own calls, which would slow the host.

    Of several replicas the steps of the first are marked and summed up; the trace itself has all.

    Raises:
        ConfigError: if the trace has no step.
    """
    profiling = Profiling(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    runner = engine.replicas[0].runner
    engine.wait()  # a step from before the block must not run into it
    engine.annotate_step = _annotator(runner)
    try:
        with jax.profiler.trace(str(folder), profiler_options=options):
            yield profiling
            engine.wait()
    finally:
        engine.annotate_step = None
    trace = read_trace(folder)
    profiling.finish(summarise(trace, program_texts(trace, runner.programs), str(folder)))


def _annotator(runner: Runner) -> Callable[[Schedule], AbstractContextManager[object]]:
    numbers = itertools.count()

    def annotate(schedule: Schedule) -> AbstractContextManager[object]:
        return jax.profiler.StepTraceAnnotation(
            f"{schedule.kind}[{runner.step_key(schedule).size}]",
            step_num=next(numbers),
            tokens=schedule.num_tokens,
            sequences=len(schedule.sequences),
        )

    return annotate


def program_texts(trace: Trace, programs: Programs) -> list[ProgramText]:
    """The compiled programs that the trace's steps may have run: the model's are of a mark's size, or update rows."""
    sizes = {0} | {mark.size for mark in trace.marks}
    sizes |= {bucket_for(mark.sequences, programs.catalogue.sampling_sizes) for mark in trace.marks}
    return [
        ProgramText.parse(key, compiled.as_text() or "")
        for key, compiled in programs.compiled().items()
        if key.size in sizes
    ]


def measured_sizes(profile: Profile | None) -> tuple[int | None, int | None]:
    """Of decode and of prefill (or mixed) steps the bucket that took most of the run; None without one."""
    sizes: list[int | None] = []
    for names in (("decode",), ("prefill", "mixed")):
        kinds = [kind for kind in profile.kinds if kind.name.startswith(names)] if profile else []
        longest = max(kinds, key=lambda kind: kind.steps * kind.kernels_s, default=None)
        sizes.append(int(longest.name.partition("[")[2].rstrip("]")) if longest else None)
    return sizes[0], sizes[1]
