"""The cases: what is drawn from which seeds, and the figures that each gives.

Draws are those that other engines are measured on, so that prompts are equal token by token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from limit import Ceilings, Shape, case_seconds, computed_from

from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, Requests, Run, random_requests

WARM_UP_SEED = 99
_SMOKE_TOKEN_ID = 255


@dataclass(frozen=True)
class Figure:
    """One number a run gives, and what an ideal run of the same requests would give.

    Attributes:
        limit_of_device: whether the limit depends on the device's ceilings.
    """

    name: str
    unit: str
    of: Callable[[Run], float]
    limit: Callable[[Shape, Ceilings, Requests], float]
    limit_of_device: bool = True


@dataclass(frozen=True)
class Case:
    """`draw(first_seed + i)` is run i, so no prompt of one run is in the prefix cache of the next.

    Attributes:
        smoke: a draw of the same kind for any small model on a CPU; its figures mean nothing.
        options: arguments of nanovllm-jax that the case is about; other engines then have no part in it.
    """

    name: str
    draw: Callable[[int], Requests]
    smoke: Callable[[int], Requests]
    first_seed: int
    figures: tuple[Figure, ...]
    options: Mapping[str, object] = field(default_factory=dict)


def uniform(seed: int, num_prompts: int, input_len: int, output_len: int, max_token_id: int = MAX_TOKEN_ID) -> Requests:
    """Prompts of one length, outputs of one length."""
    draw = random.Random(seed)
    prompts = [_ids(draw, input_len, max_token_id) for _ in range(num_prompts)]
    return prompts, [output_len] * num_prompts


def shared_prefix(
    seed: int,
    num_prompts: int = 100,
    num_sharing: int = 70,
    input_len: int = 512,
    prefix_len: int = 409,
    max_token_id: int = MAX_TOKEN_ID,
) -> Requests:
    """Prompts in random order, some of them with the same first ids; one token out of each."""
    draw = random.Random(seed)
    prefix = _ids(draw, prefix_len, max_token_id)
    prompts = [
        prefix + _ids(draw, input_len - prefix_len, max_token_id)
        if i < num_sharing
        else _ids(draw, input_len, max_token_id)
        for i in range(num_prompts)
    ]
    draw.shuffle(prompts)
    return prompts, [1] * num_prompts


def draw_for_replicas(draw: Callable[[int], Requests], first_seed: int, repeat: int, num_replicas: int) -> Requests:
    """Requests of one run: a draw for each replica; the first one's seed is `first_seed + repeat`."""
    draws = [draw(first_seed + repeat + 1000 * replica) for replica in range(num_replicas)]
    return [prompt for prompts, _ in draws for prompt in prompts], [n for _, lengths in draws for n in lengths]


def warm_up() -> Requests:
    """A few short requests, not timed."""
    return random_requests(WARM_UP_SEED, 16, (10, 20), (10, 20), _SMOKE_TOKEN_ID)


def _ids(draw: random.Random, length: int, max_token_id: int) -> list[int]:
    return [draw.randint(0, max_token_id) for _ in range(length)]


def _output_figure(name: str) -> Figure:
    """Output tokens over wall time, prefill included."""
    return Figure(
        name,
        "tok/s",
        lambda run: run.output_tok_s,
        lambda shape, ceilings, requests: sum(requests[1]) / case_seconds(shape, ceilings, requests),
    )


def _prompt_figure(name: str, *, share_prefixes: bool = True) -> Figure:
    """All prompt tokens, cached or computed, over wall time."""

    def limit(shape: Shape, ceilings: Ceilings, requests: Requests) -> float:
        seconds = case_seconds(shape, ceilings, requests, share_prefixes=share_prefixes)
        return sum(map(len, requests[0])) / seconds

    return Figure(name, "tok/s", lambda run: run.prompt_tok_s, limit)


def _least_computed(shape: Shape, ceilings: Ceilings, requests: Requests) -> float:
    """Share of the prompt tokens that must be computed where whole blocks of 16 are shared."""
    prompts, _ = requests
    return 1 - sum(computed_from(prompts, block_size=16)) / sum(map(len, prompts))


def _bench256(seed: int) -> Requests:
    """nano-vLLM's benchmark: 256 prompts of 100 to 1024 ids, 100 to 1024 tokens out of each."""
    return random_requests(seed, 256, (100, 1024), (100, 1024))


def _bench256_smoke(seed: int) -> Requests:
    return random_requests(seed, 6, (10, 40), (4, 12), _SMOKE_TOKEN_ID)


def _shared_prefix_smoke(seed: int) -> Requests:
    return shared_prefix(seed, 6, 4, 48, 36, _SMOKE_TOKEN_ID)


CASES = (
    Case("bench256", _bench256, _bench256_smoke, 0, (_output_figure("bench256_out_tok_s"),)),
    Case(
        "bench256-fp8kv",
        _bench256,
        _bench256_smoke,
        0,
        (_output_figure("bench256_fp8kv_out_tok_s"),),
        {"kv_cache_dtype": "fp8"},
    ),
    Case(
        "single",
        lambda seed: uniform(seed, 1, 128, 512),
        lambda seed: uniform(seed, 1, 16, 8, _SMOKE_TOKEN_ID),
        50,
        (_output_figure("single_out_tok_s"),),
    ),
    Case(
        "batch32",
        lambda seed: uniform(seed, 32, 128, 512),
        lambda seed: uniform(seed, 3, 16, 8, _SMOKE_TOKEN_ID),
        60,
        (_output_figure("batch32_out_tok_s"),),
    ),
    Case(
        "prefill",
        lambda seed: uniform(seed, 128, 1024, 1),
        lambda seed: uniform(seed, 4, 32, 1, _SMOKE_TOKEN_ID),
        70,
        (_prompt_figure("prefill_tok_s"),),
    ),
    Case(
        "shared-prefix",
        shared_prefix,
        _shared_prefix_smoke,
        80,
        (
            _prompt_figure("shared_prefix_tok_s"),
            Figure("shared_prefix_computed_frac", "1", lambda r: r.computed_frac, _least_computed, False),
        ),
    ),
    Case(
        "shared-prefix-off",
        shared_prefix,
        _shared_prefix_smoke,
        80,
        (_prompt_figure("shared_prefix_off_tok_s", share_prefixes=False),),
        {"enable_prefix_caching": False},
    ),
)

# Speed with prefix caching over speed without, the same prompts in both.
SPEEDUP, SPEEDUP_CASES = "shared_prefix_speedup", ("shared-prefix", "shared-prefix-off")
