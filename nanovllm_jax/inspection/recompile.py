"""`no_recompile()`: code that must not compile anything, and why it did."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from nanovllm_jax.errors import NanoVLLMError

_COMPILED_EVENT = "/jax/core/compile/backend_compile_duration"
_EXPLAINS, _COMPILES = "jax._src.interpreters.partial_eval", "jax._src.interpreters.pxla"


class RecompileError(NanoVLLMError, RuntimeError):
    """Something compiled where nothing may; the message says what and which argument changed."""


class _Watch(logging.Handler):
    """Keeps what JAX says about programs that it compiles."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.explanations: list[str] = []
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("TRACING CACHE MISS"):
            self.explanations.append(message)
        elif message.startswith("Compiling "):
            self.names.append(message.split()[1])


@contextmanager
def no_recompile() -> Iterator[None]:
    """Raises at the end of the block if anything was compiled in it, on any thread.

    A program that the persistent cache had counts too: it was traced and looked up, which stalls the step.

    Raises:
        RecompileError: naming each program and the argument whose shape, dtype or sharding is new.
    """
    compiled, watch = 0, _Watch()
    active = True

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal compiled
        compiled += active and event == _COMPILED_EVENT

    loggers = [logging.getLogger(name) for name in (_EXPLAINS, _COMPILES)]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(watch)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with jax.explain_cache_misses(True):
            yield
    finally:
        active = False
        jax.monitoring.unregister_event_duration_listener(count)
        for logger, level, propagate in before:
            logger.removeHandler(watch)
            logger.setLevel(level)
            logger.propagate = propagate
    if compiled:
        raise RecompileError(_message(compiled, watch))


def _message(compiled: int, watch: _Watch) -> str:
    names = ", ".join(watch.names) or "a program compiled ahead of time"
    lines = [f"{compiled} program(s) compiled inside no_recompile(): {names}."]
    lines += watch.explanations or ["Nothing was traced anew: it was lowered and compiled explicitly."]
    lines.append("Run this shape before the guarded block, or pad the arguments to a shape that was compiled.")
    return "\n".join(lines)
