"""Compiling in processes of their own, which a process does better than a thread.

    key --worker: trace, lower, compile--> a whole executable --here--> loaded, kept

Tracing is Python, which runs one thread at a time in a process. And while XLA compiles one of Mosaic's kernels it
compiles none of its own in that process, and the other way round, since LLVM's options are global. A worker has no GPU;
it is told what GPU it compiles for.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nanovllm_jax.step.catalogue import ProgramKey

logger = logging.getLogger(__name__)

MOST_WORKERS = 24  # each starts with two seconds of imports, and takes 0.35 GB beside what all share
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


class CompileWorkers:
    """Starts workers, and has each compile its part of the programs.

    Args:
        module: what a worker runs; it reads a pickled order and then keys from its input until that ends, and answers
            each key with a pickled `Made`.
        order: what the worker needs to know to describe the programs, which pickle can write.
    """

    def __init__(self, module: str, order: Any) -> None:
        self._module, self._order = module, pickle.dumps(order)

    def compile(self, keys: Sequence[ProgramKey]) -> Iterator[tuple[ProgramKey, Made | None]]:
        """Every program as soon as it is compiled, in any order; None if that is left to this process.

        Neighbours share kernels, so a worker begins with a run of neighbours, each about as long as the others'; when
        it has no more, it takes the last program of the longest run. Of a worker that fails the others take what is
        left; close this generator early, and all of them end at once.
        """
        count = min(MOST_WORKERS, usable_cores() * 3 // 4, len(keys) // _LEAST_SHARE)
        if count == 0 or len(keys) < _LEAST_PROGRAMS:
            yield from ((key, None) for key in keys)
            return
        runs = [deque[ProgramKey]() for _ in range(count)]
        total, before = sum(key.cost for key in keys), 0
        for key in keys:
            runs[before * count // total].append(key)
            before += key.cost
        workers = [_Worker(self._module, self._order) for _ in runs]
        lock, idle = threading.Lock(), queue.SimpleQueue[tuple[_Worker, deque[ProgramKey]]]()
        for pair in zip(workers, runs, strict=True):
            idle.put(pair)

        def compile_next() -> tuple[ProgramKey, Made | None]:
            worker, run = idle.get()
            with lock:
                key = run.popleft() if run else max(runs, key=_cost).pop()
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
            for worker in workers:
                worker.stop()  # first, so that nobody waits for an answer that nobody needs
            pool.shutdown(cancel_futures=True)
            for worker in workers:
                worker.end()


def _cost(run: deque[ProgramKey]) -> int:
    return sum(key.cost for key in run)


class _Worker:
    """One process, started for its first key; after a failure it compiles nothing more."""

    def __init__(self, module: str, order: bytes) -> None:
        self._module, self._order = module, order
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self.failed = False

    def compile(self, key: ProgramKey) -> Made | None:
        """The program; None, and a warning, if the process fails."""
        if self.failed or self._stopped:
            return None
        try:
            if self._process is None:
                self._process = self._start()
                if self._stopped:  # meanwhile, when there was nothing yet to terminate
                    self._process.terminate()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(pickle.dumps(key))
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except Exception as error:  # whatever went wrong there, others can compile too
            if not self._stopped:
                logger.warning("a compiling process ended at %s (%r); others compile its programs", key, error)
            self.failed = True
            return None

    def stop(self) -> None:
        """Have the process end whatever it does; it has nothing to put in order."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def end(self) -> None:
        """Stop, and wait until it has ended; nobody may be waiting for an answer of it any more."""
        self.stop()
        if self._process is not None:
            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                with suppress(OSError):
                    pipe.close()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C in a terminal is for the engine, which ends this process
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                # XLA would say of each program that the cache does not fit in 0.8 of the GPU's memory.
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
        )
        assert process.stdin is not None
        process.stdin.write(self._order)
        return process
