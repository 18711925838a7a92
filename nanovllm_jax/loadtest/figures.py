"""Latencies and rates of a run, as vLLM's `bench serve` defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanovllm_jax.loadtest.client import Outcome
from nanovllm_jax.loadtest.drive import Served

LATENCIES = ("ttft", "tpot", "itl", "e2e")
GOALS = ("ttft", "tpot", "e2e")  # latencies that each request has one of
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between tokens",
    "e2e": "end to end",
}


def summarise(served: Served, goals_ms: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a run; what failed counts in `num_failed` alone.

    Args:
        served: the run.
        goals_ms: latency -> limit in ms; requests within all of them count for `goodput_req_s`.
    """
    good = [outcome for outcome in served.outcomes if outcome.error is None]
    prompt_tokens = sum(outcome.num_prompt_tokens for outcome in good)
    output_tokens = sum(outcome.num_output_tokens for outcome in good)
    rate = served.load.request_rate
    return {
        "request_rate": rate if math.isfinite(rate) else "inf",
        "max_concurrency": served.load.max_concurrency,
        "num_requests": len(served.outcomes),
        "num_failed": len(served.outcomes) - len(good),
        "errors": sorted({outcome.error for outcome in served.outcomes if outcome.error is not None})[:3],
        "seconds": round(served.seconds, 3),
        "num_prompt_tokens": prompt_tokens,
        "num_output_tokens": output_tokens,
        "req_s": round(len(good) / served.seconds, 3),
        "output_tok_s": round(output_tokens / served.seconds, 1),
        "total_tok_s": round((prompt_tokens + output_tokens) / served.seconds, 1),
        **{f"{name}_ms": _statistics(latencies_ms(good, name)) for name in LATENCIES},
        "goals_ms": dict(goals_ms),
        "goodput_req_s": round(sum(_meets(one, goals_ms) for one in good) / served.seconds, 3) if goals_ms else None,
    }


def latencies_ms(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """All values of one latency, in ms."""
    if name == "itl":
        return [1000 * gap for outcome in outcomes for gap in outcome.itls]
    values = [getattr(outcome, name) for outcome in outcomes]
    return [1000 * value for value in values if value is not None]


def per_request(served: Served) -> list[dict[str, Any]]:
    """Each request on its own, in the order of the prompts; times in ms, `sent` from the run's first."""
    start = min((outcome.sent for outcome in served.outcomes), default=0.0)
    rows = []
    for outcome in served.outcomes:
        row: dict[str, Any] = {"sent_ms": round(1000 * (outcome.sent - start), 3), "error": outcome.error}
        if outcome.error is None:
            row |= {"num_prompt_tokens": outcome.num_prompt_tokens, "num_output_tokens": outcome.num_output_tokens}
            row |= {f"{name}_ms": round(values[0], 3) for name in GOALS if (values := latencies_ms([outcome], name))}
        rows.append(row)
    return rows


def _statistics(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = {"mean": np.mean(values), "median": np.median(values), "p99": np.percentile(values, 99)}
    return {name: round(float(value), 3) for name, value in found.items()}


def _meets(outcome: Outcome, goals_ms: Mapping[str, float]) -> bool:
    """A request of a single token has no time per output token, so none that is too long."""
    return all(value <= limit for name, limit in goals_ms.items() for value in latencies_ms([outcome], name))
