"""Programs compiled ahead of time, side by side, and kept: after `compile_all()` nothing compiles any more."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax

from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.compile_workers import CompileWorkers, Made, usable_cores
from nanovllm_jax.step.executables import ExecutableStore
from nanovllm_jax.step.xla_options import engine_options, is_timed, program_options

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class CompileRecord:
    """One compilation: what, when and how long (seconds), and whether a cache had it.

    Programs are compiled side by side, so the parts of their times overlap.
    """

    key: ProgramKey
    started: float  # of tracing, on time.perf_counter's clock
    trace_s: float
    lower_s: float
    compile_started: float
    compile_s: float
    cache_hit: bool


class Programs:
    """Compiles the programs of a catalogue ahead of time, and keeps them.

    Args:
        catalogue: what there is to compile.
        command_buffers: whether XLA may record its launches (on GPUs).
        kept_in: folder of whole executables, from which a start takes what an earlier one compiled; None keeps none.
        workers: processes that compile many programs side by side; without them they are compiled here. What they
            compile is kept, so there must be a folder.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        command_buffers: bool,
        kept_in: Path | None = None,
        workers: CompileWorkers | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.compile_log: list[CompileRecord] = []
        self._options = engine_options(catalogue, command_buffers=command_buffers)
        self.store = None if kept_in is None else ExecutableStore(kept_in, catalogue, self._options)
        if self.store:
            self.store.mark_used()
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}
        self._workers = workers
        self._lowering = threading.Lock()

    def __getitem__(self, key: ProgramKey) -> jax.stages.Compiled:
        """The compiled program; compiles it now if it is not yet there."""
        if key not in self._compiled:
            with self._one_at_once(key):
                if key not in self._compiled and not self._load(key):
                    self._make(key)
        return self._compiled[key]

    def have(self, key: ProgramKey) -> None:
        """Compile a program in another thread if it is not yet there; who waits for that may be interrupted."""
        if key not in self._compiled:
            pool = ThreadPoolExecutor(1)
            try:
                pool.submit(copy_context().run, self.__getitem__, key).result()
            finally:
                pool.shutdown(wait=False)

    def _one_at_once(self, key: ProgramKey) -> threading.Lock:
        """Of replicas, or after an interrupt of threads, that need a program at once, one compiles for all."""
        name = str(self.store.folder) if self.store else f"of {id(self)}"
        with _being_made_guard:
            return _being_made.setdefault((name, key), threading.Lock())

    def compiled(self) -> dict[ProgramKey, jax.stages.Compiled]:
        """What is compiled so far."""
        return dict(self._compiled)

    def compile_all(self) -> None:
        """Have every program: loaded if an earlier start kept it, else compiled."""
        self.compile(self.catalogue.all_keys())

    def compile(self, keys: Sequence[ProgramKey]) -> None:
        """Load programs side by side; compile those that were not kept.

        Loading and XLA's compiler let other threads run meanwhile. Tracing and lowering are mostly Python, which does
        not, and XLA does not compile all of one program beside another: so workers do that for all but a few.
        """
        pool = ThreadPoolExecutor(min(usable_cores(), 16))
        try:
            missing = [key for key in keys if key not in self._compiled]
            absent = [key for key, found in zip(missing, pool.map(self._load, missing), strict=True) if not found]
            with closing(self._made(absent)) as made:
                # The copied context says which GPU kernels are lowered for.
                for future in [pool.submit(copy_context().run, self._take, *one) for one in made]:
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun

    def _made(self, keys: Sequence[ProgramKey]) -> Generator[tuple[ProgramKey, Made | None]]:
        """Programs that workers have compiled, as they come; None with a program that is left to this process."""
        here = [key for key in keys if self._workers is None or (self._options and is_timed(key))]
        yield from ((key, None) for key in here)
        if self._workers:
            yield from self._workers.compile([key for key in keys if key not in here])

    def _load(self, key: ProgramKey) -> bool:
        """Take a program that an earlier start has kept; whether there is one."""
        started = time.perf_counter()
        compiled = self.store.load(key) if self.store else None
        if compiled is None:
            return False
        self._compiled[key] = compiled
        self.compile_log.append(CompileRecord(key, started, 0.0, 0.0, started, time.perf_counter() - started, True))
        return True

    def _take(self, key: ProgramKey, made: Made | None) -> None:
        """Keep a program that a worker has compiled, or compile it."""
        if made is None:
            self._make(key)
            return
        assert self.store is not None
        compile_started = time.perf_counter() - made.compile_s
        started = compile_started - made.lower_s - made.trace_s
        try:
            self._compiled[key] = self.store.unpack(made.executable)
        except Exception as error:  # whatever is wrong with it, compiling here is the remedy
            logger.warning("%s does not load (%s); it is compiled again", key, error)
            self._make(key)
            return
        self.store.keep(key, made.executable)
        self._log(CompileRecord(key, started, made.trace_s, made.lower_s, compile_started, made.compile_s, False))

    def _make(self, key: ProgramKey) -> None:
        """Compile a program, and keep it."""
        # Mostly Python, which does one thing at a time: what is lowered first compiles beside the next one.
        with self._lowering:
            started = time.perf_counter()
            traced = self.catalogue.trace(key)
            traced_at = time.perf_counter()
            lowered = traced.lower()
        lowered_at, hits = time.perf_counter(), _cache_hits[threading.get_ident()]
        self._compiled[key] = lowered.compile(compiler_options=program_options(self.catalogue, key, self._options))
        seconds, hit = time.perf_counter() - lowered_at, _cache_hits[threading.get_ident()] > hits
        self._log(CompileRecord(key, started, traced_at - started, lowered_at - traced_at, lowered_at, seconds, hit))
        # What XLA's cache gave back need not serialise whole again: on a CPU such a program lacks functions later.
        if self.store and not hit:
            self.store.save(key, self._compiled[key])

    def _log(self, record: CompileRecord) -> None:
        self.compile_log.append(record)
        logger.debug("compiled %s", record)
