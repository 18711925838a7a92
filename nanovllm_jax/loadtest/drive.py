"""Sends many requests: at random moments (a Poisson process), at a fixed concurrency, or both."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from nanovllm_jax.errors import NanoVLLMError
from nanovllm_jax.loadtest.client import Outcome, Target, complete, fetch_json, open_session, root_of


@dataclass(frozen=True)
class Load:
    """How requests come.

    Attributes:
        request_rate: of the Poisson process, in requests a second; infinity sends all at once.
        max_concurrency: requests under way at most; what comes beyond waits here, outside of the latencies.
        seed: of the moments.

    Raises:
        ValueError: if a value is out of range.
    """

    request_rate: float = math.inf
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ValueError(f"request_rate is {self.request_rate}; it must be above 0, or inf for all at once.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency is {self.max_concurrency}; it must be at least 1.")

    def moments(self, count: int) -> list[float]:
        """When to send each of `count` requests, in s from the first.

        Gaps are exponential, then scaled to the rate exactly: a few hundred draws are off by several percent, and
        runs of different seeds should ask for the same.
        """
        if not math.isfinite(self.request_rate):
            return [0.0] * count
        draw = random.Random(self.seed)
        ends = list(itertools.accumulate(draw.expovariate(1.0) for _ in range(count)))
        return [end * count / (self.request_rate * ends[-1]) for end in [0.0, *ends[:-1]]]


@dataclass(frozen=True)
class Served:
    """A finished run: its load, its outcomes in the order of the prompts, and its wall time in s."""

    load: Load
    outcomes: list[Outcome]
    seconds: float


async def find_model(url: str, key: str | None) -> dict[str, Any]:
    """The first model that a server lists.

    Raises:
        NanoVLLMError: if it lists none or cannot be reached.
    """
    async with open_session() as session:
        listed = (await fetch_json(session, f"{root_of(url)}/v1/models", key)).get("data")
    if not listed:
        raise NanoVLLMError(f"{url} lists no model; name one with --model.")
    return listed[0]


async def as_text(target: Target, prompts: Sequence[list[int]]) -> list[str]:
    """The texts of token ids, by the server's own tokenizer.

    Raises:
        NanoVLLMError: if the server has no `/detokenize`, which vLLM's and this package's have.
    """
    async with open_session() as session:
        return [
            (
                await fetch_json(
                    session, f"{target.root}/detokenize", target.key, {"model": target.model, "tokens": ids}
                )
            )["prompt"]
            for ids in prompts
        ]


async def drive(
    target: Target,
    prompts: Sequence[list[int]] | Sequence[str],
    output_lens: Sequence[int],
    load: Load,
    on_end: Callable[[int], None] = lambda num_ended: None,
) -> Served:
    """Send all prompts and wait for their ends.

    Args:
        target: where to.
        prompts: token ids or texts.
        output_lens: tokens to ask for, one a prompt.
        load: when to send them.
        on_end: called with the number of requests that ended, after each.
    """
    gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else nullcontext()
    num_ended = 0

    async def one(prompt: list[int] | str, output_len: int) -> Outcome:
        nonlocal num_ended
        async with gate:
            outcome = await complete(session, target, prompt, output_len)
        num_ended += 1
        on_end(num_ended)
        return outcome

    async with open_session() as session:
        started = time.perf_counter()
        tasks = []
        for prompt, output_len, due in zip(prompts, output_lens, load.moments(len(prompts)), strict=True):
            if (wait := started + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(prompt, output_len)))
        outcomes = await asyncio.gather(*tasks)
        return Served(load, outcomes, time.perf_counter() - started)
