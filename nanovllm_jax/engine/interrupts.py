"""Ctrl-C, held back while the engine changes what must change as a whole.

Signals come to the main thread alone; in any other these contexts do nothing. Nor do they where Ctrl-C is ignored or
ends the process without Python.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

_previous: Callable[[int, FrameType | None], Any] | None = None  # the handler that ours stands before, or last stood
_depth = 0  # blocks that hold Ctrl-C back
_pending: list[tuple[int, FrameType | None]] = []


@contextmanager
def watched_interrupt() -> Iterator[None]:
    """Let Ctrl-C pass as ever, and make `deferred_interrupt` inside cost about 2 us: its system calls take 5 to 20."""
    global _previous
    handler = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
    if handler is _on_interrupt or not callable(handler):
        yield
        return
    _previous = handler
    try:
        signal.signal(signal.SIGINT, _on_interrupt)
        yield
    finally:
        if _is_installed():  # else another was set meanwhile, and stays
            signal.signal(signal.SIGINT, handler)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, be it with an error."""
    global _depth
    if not _in_main_thread():
        yield
        return
    with nullcontext() if _is_installed() else watched_interrupt():
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            if _pending and not _depth:
                first = _pending[0]
                _pending.clear()
                _on_interrupt(*first)


def _is_installed() -> bool:
    """Asked of the system and not remembered: others may set handlers, or put ours back after a call has ended."""
    return signal.getsignal(signal.SIGINT) is _on_interrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _depth:
        _pending.append((number, frame))
    elif _previous is not None:
        _previous(number, frame)
