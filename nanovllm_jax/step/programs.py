"""Programs compiled ahead of time, side by side, and kept: after `compile_all()` nothing compiles any more."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax

from nanovllm_jax.models.projections import most_fused_rows
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.executables import ExecutableStore
from nanovllm_jax.step.lowering import Lowered, LoweringWorkers, usable_cores
from nanovllm_jax.step.step import num_parts

logger = logging.getLogger(__name__)

_RECORDED_BY_DEFAULT = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"  # in jaxlib 0.11.2
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
# By the folder that keeps the program; an entry goes with the last thread that holds or waits for it.
_being_made: WeakValueDictionary[tuple[str, ProgramKey], threading.Lock] = WeakValueDictionary()
_being_made_guard = threading.Lock()
_cache_hits: Counter[int] = Counter()  # by thread: compilation reports its hits on the thread that asked


def _count_cache_hit(event: str, **_: Any) -> None:
    if event == CACHE_HIT_EVENT:
        _cache_hits[threading.get_ident()] += 1


jax.monitoring.register_event_listener(_count_cache_hit)


def cache_folder() -> Path:
    """Where this user's compiled programs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm-jax"


def use_persistent_cache() -> None:
    """Have XLA keep what it compiles in the user's cache folder, unless JAX is already told where to keep it."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _gpu_options(command_buffers: bool, several_devices: bool) -> dict[str, Any]:
    if not command_buffers:
        return {"xla_gpu_enable_command_buffer": ""}
    # Under a profiler XLA would otherwise launch kernel by kernel, and the trace show a step bound by the host.
    options: dict[str, Any] = {"xla_enable_command_buffers_during_profiling": True}
    if several_devices:
        # A collective outside of a graph cuts it in two: a sum of 64 x 4096 then costs two GPUs 32 us, and 11 inside.
        # XLA's own collective kernels, which it prefers, are not recorded; NCCL's are.
        options["xla_gpu_enable_command_buffer"] = f"{_RECORDED_BY_DEFAULT},COLLECTIVES"
        options["xla_gpu_experimental_use_collective_kernels"] = ""
    return options


@dataclass(frozen=True)
class CompileRecord:
    """One compilation: what, when and how long (seconds), and whether a cache had it.

    Programs are compiled side by side, so the parts of their times overlap.
    """

    key: ProgramKey
    started: float  # of tracing, on time.perf_counter's clock
    trace_s: float
    lower_s: float  # and tracing, where a worker did both
    compile_started: float
    compile_s: float
    cache_hit: bool


class Programs:
    """Compiles the programs of a catalogue ahead of time, and keeps them.

    Args:
        catalogue: what there is to compile.
        command_buffers: whether XLA may record its launches (on GPUs).
        kept_in: folder of whole executables, from which a start takes what an earlier one compiled; None keeps none.
        workers: processes that lower many programs side by side; without them they are lowered here.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        command_buffers: bool,
        kept_in: Path | None = None,
        workers: LoweringWorkers | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.compile_log: list[CompileRecord] = []
        devices = catalogue.mesh.devices
        self._options = _gpu_options(command_buffers, devices.size > 1) if devices.flat[0].platform == "gpu" else None
        self.store = None if kept_in is None else ExecutableStore(kept_in, catalogue, self._options)
        if self.store:
            self.store.mark_used()
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}
        self._workers = workers

    def __getitem__(self, key: ProgramKey) -> jax.stages.Compiled:
        """The compiled program; compiles it now if it is not yet there."""
        if key not in self._compiled:
            with self._one_at_once(key):
                if not self._load(key):
                    self._make(key, None)
        return self._compiled[key]

    def _one_at_once(self, key: ProgramKey) -> AbstractContextManager[object]:
        """Of replicas that need a program at once, one compiles for all."""
        if self.store is None:
            return nullcontext()
        with _being_made_guard:
            return _being_made.setdefault((str(self.store.folder), key), threading.Lock())

    def compiled(self) -> dict[ProgramKey, jax.stages.Compiled]:
        """What is compiled so far."""
        return dict(self._compiled)

    def compile_all(self) -> None:
        """Have every program: loaded if an earlier start kept it, else compiled."""
        self.compile(self.catalogue.all_keys())

    def compile(self, keys: Sequence[ProgramKey]) -> None:
        """Load programs side by side; lower and compile those that were not kept.

        Loading and XLA's compiler let other threads run meanwhile. Tracing and lowering are mostly Python, which does
        not, so workers do that for all but a few programs.
        """
        pool = ThreadPoolExecutor(min(usable_cores(), 16))
        try:
            missing = [key for key in keys if key not in self._compiled]
            absent = [key for key, found in zip(missing, pool.map(self._load, missing), strict=True) if not found]
            with closing(self._lower(absent)) as lowered:
                # The copied context says which GPU kernels are lowered for.
                for future in [pool.submit(copy_context().run, self._make, *one) for one in lowered]:
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun

    def _lower(self, keys: Sequence[ProgramKey]) -> Generator[tuple[ProgramKey, Lowered | None]]:
        """Programs that workers have lowered, as they come; None with a program that is left to this process."""
        if self._workers:
            yield from self._workers.lower(keys)
        else:
            yield from ((key, None) for key in keys)

    def _options_of(self, key: ProgramKey) -> dict[str, Any] | None:
        """XLA's options for a program.

        While it compiles, XLA would also compile and time dozens of its own kernels for each product and two kinds of
        code for each fusion. For the products of long prefills and for the output head it then keeps cuBLAS's kernel,
        or one as fast; those of decode steps of many rows gain from the trial.
        """
        if self._options is None:
            return None
        trials = key.kind.startswith("decode") and key.size > most_fused_rows()
        options: dict[str, Any] = {
            "xla_gpu_experimental_enable_fusion_autotuner": False,
            "xla_gpu_enable_triton_gemm": trials,
            **self._options,
        }
        if self._computes_in_parts(key):
            options["xla_gpu_enable_command_buffer"] = ""
        return options

    def _computes_in_parts(self, key: ProgramKey) -> bool:
        """Whether sums of one part of the tokens run beside what another one computes.

        Graphs would run one after the other; and they would have to be updated before the first kernel starts, which
        takes longer than it takes to launch kernels of 100 us one by one.
        """
        return key.kind == "prefill" and num_parts(self.catalogue.config.axis_name, key.size) > 1

    def _load(self, key: ProgramKey) -> bool:
        """Take a program that an earlier start has kept; whether there is one."""
        started = time.perf_counter()
        compiled = self.store.load(key) if self.store else None
        if compiled is None:
            return False
        self._compiled[key] = compiled
        self.compile_log.append(CompileRecord(key, started, 0.0, 0.0, started, time.perf_counter() - started, True))
        return True

    def _make(self, key: ProgramKey, elsewhere: Lowered | None) -> None:
        """Compile a program, lowered here or elsewhere, and keep it."""
        started = time.perf_counter()
        traced = self.catalogue.trace_exported(key, elsewhere.exported) if elsewhere else self.catalogue.trace(key)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at, hits = time.perf_counter(), _cache_hits[threading.get_ident()]
        self._compiled[key] = lowered.compile(compiler_options=self._options_of(key))
        seconds, hit = time.perf_counter() - lowered_at, _cache_hits[threading.get_ident()] > hits
        worked = elsewhere.seconds if elsewhere else 0.0
        record = CompileRecord(
            key, started - worked, traced_at - started, lowered_at - traced_at + worked, lowered_at, seconds, hit
        )
        self.compile_log.append(record)
        logger.debug("compiled %s", record)
        # What XLA's cache gave back need not serialise whole again: on a CPU such a program lacks functions later.
        if self.store and not hit:
            self.store.save(key, self._compiled[key])
