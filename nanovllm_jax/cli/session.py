"""Opens a model for a command and turns its options into sampling parameters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nanovllm_jax.cli.terminal import set_up_logging, stderr
from nanovllm_jax.sampling_params import SamplingParams

_MIN_PREFILL, _MAX_PREFILL = 64, 16384
_STATED_BY_MODELS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Session:
    """An open engine and what opening it took."""

    llm: Any
    startup_s: float


@contextmanager
def open_session(model: str | None, *, verbose: bool, **engine_args: Any) -> Iterator[Session]:
    """Opens `LLM(model, **engine_args)`, with a spinner on a terminal, and closes it."""
    set_up_logging(verbose)
    started = time.perf_counter()
    with stderr().status(f"Loading {model or 'the built-in model'}, compiling"):
        from nanovllm_jax import LLM  # brings JAX along

        llm = LLM(model, **engine_args)
    try:
        yield Session(llm, time.perf_counter() - started)
    finally:
        llm.close()


def prefill_size(num_tokens: int) -> int:
    """Tokens a prefill step may take: a power of two that holds `num_tokens`, so that little is compiled."""
    return min(_MAX_PREFILL, max(_MIN_PREFILL, 1 << (num_tokens - 1).bit_length()))


def sampling_params(llm: Any, *, max_tokens: int, **given: Any) -> SamplingParams:
    """The model's own sampling defaults, overridden by what was `given` (None means not given).

    Greedy if neither the model nor the user says anything about sampling.
    """
    given = {name: value for name, value in given.items() if value is not None}
    params = llm.get_default_sampling_params()
    plain = SamplingParams()
    says_nothing = all(getattr(params, name) == getattr(plain, name) for name in _STATED_BY_MODELS)
    if says_nothing and given.get("n", 1) == 1 and not given.keys() & {*_STATED_BY_MODELS, "seed"}:
        given["temperature"] = 0.0
    return replace(params, max_tokens=max_tokens, **given)
