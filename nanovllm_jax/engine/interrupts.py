"""Ctrl-C, held back while the engine changes what must change as a whole, and while it waits for a device but once.

Signals come to the main thread alone; in any other these contexts do nothing. Nor do they where Ctrl-C is ignored or
ends the process without Python.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any

_depth = 0  # blocks that hold Ctrl-C back
_pending: list[Callable[[], Any]] = []
_most_held: float = math.inf  # of `_pending`; what comes beyond that passes at once


class _Watch:
    """A handler before another. Each call has its own: others may chain theirs between two of them."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _depth and len(_pending) < _most_held:
            _pending.append(partial(self._previous, number, frame))
        else:
            self._previous(number, frame)


@contextmanager
def watched_interrupt() -> Iterator[None]:
    """Let Ctrl-C pass as ever, and make `deferred_interrupt` inside cost about 2 us: its system calls take 5 to 20."""
    handler = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
    if isinstance(handler, _Watch) or not callable(handler):
        yield
        return
    watch = _Watch(handler)
    try:
        signal.signal(signal.SIGINT, watch)
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is watch:  # else another was set meanwhile, and stays
            signal.signal(signal.SIGINT, handler)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, be it with an error."""
    global _depth, _most_held
    if not _in_main_thread():
        yield
        return
    # Asked of the system and not remembered: others may set handlers, or put ours back after a call has ended.
    watched = isinstance(signal.getsignal(signal.SIGINT), _Watch)
    with nullcontext() if watched else watched_interrupt():
        if not _depth:
            _most_held = math.inf
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            if _pending and not _depth:
                _deliver()


@contextmanager
def held_interrupts(most: int) -> Iterator[None]:
    """Inside of `deferred_interrupt`, for what may take long or for ever: hold at most that many Ctrl-C back.

    The next one passes at once, and those before it with it. The block must not be one that has to be ended.
    """
    global _most_held
    if not _in_main_thread():
        yield
        return
    before = _most_held
    try:
        _most_held = most
        if len(_pending) > most:
            _deliver()
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            _pending.clear()
        raise
    finally:
        _most_held = before


def _deliver() -> None:
    first = _pending[0]
    _pending.clear()
    first()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
