"""What the engine counts: gauges, totals and latency histograms, cheap enough to keep always."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# vLLM's buckets, in seconds.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)


class Histogram:
    """Counts of observations in buckets.

    Attributes:
        bounds: upper bounds of the buckets, which belong to them; one more bucket has none.
        counts: observations in each bucket.
        sum: of all observations.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Take `count` observations of one value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


@dataclass
class EngineStats:
    """The engine's figures. One thread writes them; others may read single values at any time.

    Attributes:
        num_running: requests with a row.
        num_waiting: requests in the queue.
        cache_usage: share of the KV cache's blocks that running requests hold, 0 to 1.
        num_queried_tokens: prompt tokens looked up in the prefix cache.
        num_hit_tokens: those of them that were found.
        num_preemptions: times a running request gave its row and blocks back.
        num_prompt_tokens: prompt tokens of requests that were admitted.
        num_generation_tokens: output tokens.
        num_finished: requests that ended, by finish reason.
        time_to_first_token: s from a request's arrival.
        inter_token_latency: s from one token of a sample to the next.
        e2e_latency: s from a request's arrival to its end.
        queue_time: s from a request's arrival to its first step.
    """

    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_finished: Counter[str] = field(default_factory=lambda: Counter(stop=0, length=0, abort=0, error=0))
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_S))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_BETWEEN_TOKENS_S))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    queue_time: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
