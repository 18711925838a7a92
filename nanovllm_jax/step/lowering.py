"""Lowering in processes of their own: tracing is Python, which runs one thread at a time in a process.

    key --worker: trace, lower, compile Triton's and Mosaic's kernels--> StableHLO --here--> XLA

A worker has no GPU; it is told what GPU it lowers for.
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
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from jax.export import Exported

from nanovllm_jax.step.catalogue import ProgramKey

logger = logging.getLogger(__name__)

MOST_WORKERS = 12  # each starts with 2 to 3 s of imports, which more workers would not earn back
_LEAST_PROGRAMS = 4  # that are worth a worker


@dataclass(frozen=True)
class Lowered:
    """A program that a worker has lowered."""

    exported: Exported
    seconds: float


class LoweringWorkers:
    """Starts workers, and has each lower its part of the programs.

    Args:
        module: what a worker runs; it reads a pickled order and then keys from its input until that ends, and answers
            each key with a pickled `Lowered`.
        order: what the worker needs to know to describe the programs, which pickle can write.
    """

    def __init__(self, module: str, order: Any) -> None:
        self._module, self._order = module, pickle.dumps(order)

    def lower(self, keys: Sequence[ProgramKey]) -> Iterator[tuple[ProgramKey, Lowered | None]]:
        """Every program as soon as it is lowered, in any order; None if that is left to this process.

        Neighbours share kernels, so a worker begins with a run of neighbours; when it has no more, it takes the last
        program of the longest run.
        """
        count = min(MOST_WORKERS, (os.cpu_count() or 1) * 3 // 4, len(keys) // _LEAST_PROGRAMS)
        runs = [deque(keys[i * len(keys) // count : (i + 1) * len(keys) // count]) for i in range(count)]
        lock, done = threading.Lock(), queue.SimpleQueue[tuple[ProgramKey, Lowered | None]]()

        def next_key(run: deque[ProgramKey]) -> ProgramKey | None:
            with lock:
                if run:
                    return run.popleft()
                longest = max(runs, key=len)
                return longest.pop() if longest else None

        def work(run: deque[ProgramKey]) -> None:
            with closing(_Worker(self._module, self._order)) as worker:
                while (key := next_key(run)) is not None:
                    done.put((key, worker.lower(key)))

        for run in runs:
            threading.Thread(target=work, args=(run,), daemon=True).start()
        if not runs:
            yield from ((key, None) for key in keys)
            return
        for _ in keys:
            yield done.get()


class _Worker:
    """One process; after its first failure it lowers nothing more."""

    def __init__(self, module: str, order: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._failed = False
        self._send(order)

    def close(self) -> None:
        """Let the process end."""
        with suppress(OSError):
            self._process.communicate()

    def lower(self, key: ProgramKey) -> Lowered | None:
        """The program; None, and a warning, if the worker fails."""
        assert self._process.stdout is not None
        if self._failed:
            return None
        try:
            self._send(pickle.dumps(key))
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("a lowering process ended at %s (%r); its programs are lowered here, slowly", key, error)
            self._failed = True
            return None

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(message)
        self._process.stdin.flush()
