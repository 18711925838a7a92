"""The cases: what is drawn from which seeds, and the figures that each gives.

Draws are those that other engines are measured on, so that prompts are equal token by token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm_jax.cli.bench import MAX_TOKEN_ID, Requests, Run, random_requests


@dataclass(frozen=True)
class Figure:
    """One number a run gives; `limit` is what the work allows for the Qwen3-0.6B shape on one H200.

    Limits count bf16 weights and cache at 4.3 TB/s and products at 790 TFLOP/s.
    """

    name: str
    unit: str
    of: Callable[[Run], float]
    limit: float
    on_any_device: bool = False  # the limit does not depend on the machine


@dataclass(frozen=True)
class Case:
    """`draw(first_seed + i)` is run i, so no prompt of one run is in the prefix cache of the next."""

    name: str
    draw: Callable[[int], Requests]
    first_seed: int
    figures: tuple[Figure, ...]


def bench256(seed: int) -> Requests:
    """nano-vLLM's benchmark: 256 prompts of 100 to 1024 ids, 100 to 1024 tokens out of each."""
    return random_requests(seed, 256, (100, 1024), (100, 1024))


def uniform(seed: int, num_prompts: int, input_len: int, output_len: int) -> Requests:
    """Prompts of one length, outputs of one length."""
    draw = random.Random(seed)
    prompts = [_ids(draw, input_len) for _ in range(num_prompts)]
    return prompts, [output_len] * num_prompts


def shared_prefix(seed: int) -> Requests:
    """100 prompts of 512 ids in random order, 70 of them with the same first 409; one token out of each."""
    draw = random.Random(seed)
    prefix = _ids(draw, 409)
    prompts = [prefix + _ids(draw, 103) if i < 70 else _ids(draw, 512) for i in range(100)]
    draw.shuffle(prompts)
    return prompts, [1] * 100


def _ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randint(0, MAX_TOKEN_ID) for _ in range(length)]


CASES = (
    Case("bench256", bench256, 0, (Figure("bench256_out_tok_s", "tok/s", lambda r: r.output_tok_s, 36_400),)),
    Case(
        "single",
        lambda seed: uniform(seed, 1, 128, 512),
        50,
        (Figure("single_out_tok_s", "tok/s", lambda r: r.output_tok_s, 3_480),),
    ),
    Case(
        "batch32",
        lambda seed: uniform(seed, 32, 128, 512),
        60,
        (Figure("batch32_out_tok_s", "tok/s", lambda r: r.output_tok_s, 52_200),),
    ),
    Case(
        "prefill",
        lambda seed: uniform(seed, 128, 1024, 1),
        70,
        (Figure("prefill_tok_s", "tok/s", lambda r: r.prompt_tok_s, 791_000),),
    ),
    Case(
        "shared-prefix",
        shared_prefix,
        80,
        (
            Figure("shared_prefix_tok_s", "tok/s", lambda r: r.prompt_tok_s, 1_842_000),
            # One of 70 sharers computes the prefix; 69 are spared its 25 whole blocks: 1 - 69 * 400 / 51200.
            Figure("shared_prefix_computed_frac", "1", lambda r: r.computed_frac, 0.4609, on_any_device=True),
        ),
    ),
)
