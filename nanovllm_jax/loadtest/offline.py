"""Offline generation, drawn and timed: what `nanovllm-jax bench` and `benchmarks/` share."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm_jax.errors import NanoVLLMError
from nanovllm_jax.sampling_params import SamplingParams

MAX_TOKEN_ID = 10_000  # of nano-vLLM's benchmark
_WARM_UP_SEED = 99
_LOG_WIDTH = 120


@dataclass(frozen=True)
class Run:
    """One timed `generate` call: from prompts in host memory to all tokens back."""

    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def output_tok_s(self) -> float:
        """Output tokens over wall time, prefill included."""
        return self.num_output_tokens / self.seconds

    @property
    def prompt_tok_s(self) -> float:
        """All prompt tokens, cached or computed, over wall time."""
        return self.num_prompt_tokens / self.seconds

    @property
    def computed_frac(self) -> float:
        """Prompt tokens that were computed, as a share of all."""
        return 1 - self.num_cached_tokens / self.num_prompt_tokens


Requests = tuple[list[list[int]], list[int]]  # prompts and their output lengths


def random_requests(
    seed: int,
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    max_token_id: int = MAX_TOKEN_ID,
) -> Requests:
    """Prompts of random ids and their output lengths, drawn as nano-vLLM's `bench.py` draws them.

    Lengths and ids are uniform and include both bounds.
    """
    draw = random.Random(seed)
    prompts = [[draw.randint(0, max_token_id) for _ in range(draw.randint(*input_len))] for _ in range(num_prompts)]
    return prompts, [draw.randint(*output_len) for _ in range(num_prompts)]


def warm_up(llm: Any, max_token_id: int = MAX_TOKEN_ID) -> None:
    """A few short requests, not timed."""
    timed_run(llm, random_requests(_WARM_UP_SEED, 16, (10, 20), (10, 20), max_token_id))


def timed_run(llm: Any, requests: Requests, *, detokenize: bool = False) -> Run:
    """Times one `generate` call at temperature 0.6 with full-length outputs.

    Args:
        llm: an `LLM`.
        requests: what to generate.
        detokenize: make texts too, as a server has to.

    Raises:
        NanoVLLMError: if an output has not the length that was asked for.
    """
    prompts, output_lens = requests
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=detokenize)
        for length in output_lens
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    for i, (output, length) in enumerate(zip(outputs, output_lens, strict=True)):
        got = len(output.outputs[0].token_ids)
        if got != length:
            raise NanoVLLMError(f"output {i} has {got} tokens, {length} were asked for; the figure is void.")
    return Run(
        seconds,
        sum(map(len, prompts)),
        sum(output.num_cached_tokens or 0 for output in outputs),
        sum(output_lens),
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr, wide enough for a log; the first column is a name, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns[:1], title=title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True, width=None if sys.stderr.isatty() else _LOG_WIDTH).print(table)
