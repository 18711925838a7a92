"""Compiling in processes of their own, which a process does better than a thread.

    key --worker: trace, lower, compile--> a whole executable --here--> loaded, kept

Tracing is Python, which runs one thread at a time in a process. And while XLA compiles one of Mosaic's kernels it
compiles none of its own in that process, and the other way round, since LLVM's options are global. A worker has no GPU;
it is told what GPU it compiles for.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.fork_server import ForkServer

logger = logging.getLogger(__name__)

MOST_WORKERS = 24  # each takes up to 0.3 GB beside what all share
_LEAST_PROGRAMS = 4  # that are worth workers
_LEAST_SHARE = 2  # programs, to be worth one more worker


def usable_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Made:
    """A program that a worker has compiled, as `executables.pack` writes it, and what that took (seconds)."""

    executable: bytes
    trace_s: float
    lower_s: float
    compile_s: float


def compile_server(module: str) -> ForkServer:
    """The process whose forks are workers, and which imports for all of them; it is not started yet.

    Args:
        module: takes an order and then keys, and answers each key with a `Made`.
    """
    environment = {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads would not be in the forks
        # XLA would say of each program that the cache does not fit in 0.8 of the GPU's memory.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return ForkServer(module, environment)


class CompileWorkers:
    """Has each of several workers compile its part of the programs.

    Args:
        server: forks workers; it is started if need be, and ends with them when all is compiled.
        order: what a worker needs to know to describe the programs, which pickle can write.
    """

    def __init__(self, server: ForkServer, order: Any) -> None:
        self._server, self._order = server, order

    def compile(self, keys: Sequence[ProgramKey]) -> Iterator[tuple[ProgramKey, Made | None]]:
        """Every program as soon as it is compiled, in any order; None if that is left to this process.

        Neighbours share kernels, so a worker begins with a run of neighbours, each about as long as the others'; when
        it has no more, it takes the costliest that is left to others. Of a worker that fails the others take what is
        left; close this generator early, and all of them end at once.
        """
        count = min(MOST_WORKERS, usable_cores() * 3 // 4, len(keys) // _LEAST_SHARE)
        if count == 0 or len(keys) < _LEAST_PROGRAMS or not self._server.start():
            yield from ((key, None) for key in keys)
            return
        runs = [deque[ProgramKey]() for _ in range(count)]
        total, before = sum((key.cost for key in keys), 0.0), 0.0
        for key in keys:
            runs[int(before * count / total)].append(key)
            before += key.cost
        stopped = threading.Event()
        workers = [_Worker(self._server, self._order, stopped) for _ in runs]
        lock, idle = threading.Lock(), queue.SimpleQueue[tuple[_Worker, deque[ProgramKey]]]()
        for pair in zip(workers, runs, strict=True):
            idle.put(pair)

        def compile_next() -> tuple[ProgramKey, Made | None]:
            worker, run = idle.get()
            with lock:
                key = run.popleft() if run else _take_costliest(runs)
            made = worker.compile(key)
            with lock:
                # The last one of all goes on, to say of what is left that nobody compiles it.
                if not worker.failed or all(each.failed for each in workers):
                    idle.put((worker, run))
            return key, made

        pool = ThreadPoolExecutor(count)
        try:
            for future in as_completed([pool.submit(compile_next) for _ in keys]):
                yield future.result()
        finally:
            stopped.set()
            self._server.stop()  # first, so that nobody waits for an answer that nobody needs
            pool.shutdown(cancel_futures=True)


def _take_costliest(runs: Iterable[deque[ProgramKey]]) -> ProgramKey:
    run, key = max(((run, key) for run in runs for key in run), key=lambda pair: pair[1].cost)
    run.remove(key)
    return key


class _Worker:
    """One process, forked for its first key; after a failure it compiles nothing more."""

    def __init__(self, server: ForkServer, order: Any, stopped: threading.Event) -> None:
        self._server, self._order, self._stopped = server, order, stopped
        self._connection: Connection | None = None
        self.failed = False

    def compile(self, key: ProgramKey) -> Made | None:
        """The program; None, and a warning, if the process fails."""
        if self.failed or self._stopped.is_set():
            return None
        try:
            if self._connection is None:
                self._connection = self._server.fork()
                self._connection.send(self._order)
            self._connection.send(key)
            return self._connection.recv()
        except Exception as error:  # whatever went wrong there, others can compile too
            if not self._stopped.is_set():
                logger.warning("a compiling process ended at %s (%r); others compile its programs", key, error)
            self.failed = True
            return None
