"""The engine's figures for Prometheus, under vLLM's names with the prefix `nanovllm:`, and as a log line."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm_jax.engine.stats import EngineStats

logger = logging.getLogger(__name__)

_GAUGES = {
    "num_requests_running": ("num_running", "Requests with a row."),
    "num_requests_waiting": ("num_waiting", "Requests in the queue."),
    "kv_cache_usage_perc": ("cache_usage", "Share of the KV cache's blocks that are held; 1 is all."),
}
_COUNTERS = {
    "prefix_cache_queries": ("num_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_hit_tokens", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("num_preemptions", "Times a request gave its row and blocks back."),
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens."),
    "generation_tokens": ("num_generation_tokens", "Output tokens."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "From arrival to the first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "From one token to the next."),
    "e2e_request_latency_seconds": ("e2e_latency", "From arrival to the end."),
    "request_queue_time_seconds": ("queue_time", "From arrival to the first step."),
}


class EngineCollector(Collector):
    """Reads `EngineStats` when Prometheus asks."""

    def __init__(self, stats: EngineStats, model_name: str) -> None:
        self._stats, self._labels = stats, {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        names, values = list(self._labels), list(self._labels.values())
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"nanovllm:{name}", text, labels=names)
            gauge.add_metric(values, getattr(self._stats, field))
            yield gauge
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"nanovllm:{name}", text, labels=names)
            counter.add_metric(values, getattr(self._stats, field))
            yield counter
        success = CounterMetricFamily("nanovllm:request_success", "Ended samples.", labels=[*names, "finished_reason"])
        for reason, count in dict(self._stats.num_finished).items():
            success.add_metric([*values, reason], count)
        yield success
        for name, (field, text) in _HISTOGRAMS.items():
            histogram = getattr(self._stats, field)
            family = HistogramMetricFamily(f"nanovllm:{name}", text, labels=names)
            bounds = [*map(str, histogram.bounds), "+Inf"]
            totals = itertools.accumulate(list(histogram.counts))
            family.add_metric(values, list(zip(bounds, totals, strict=True)), histogram.sum)
            yield family


def registry(stats: EngineStats, model_name: str) -> CollectorRegistry:
    """A registry of its own, so that several servers in a process do not clash."""
    result = CollectorRegistry()
    result.register(EngineCollector(stats, model_name))
    return result


class Throughput:
    """What the engine did since it was asked last.

    Args:
        stats: the engine's.
        now: s of a monotonic clock.
    """

    def __init__(self, stats: EngineStats, now: float) -> None:
        self._stats = stats
        self._before = (now, stats.num_prompt_tokens, stats.num_generation_tokens)

    def line(self, now: float) -> str | None:
        """A line as vLLM's; None if nothing was done and nothing waits."""
        stats, latest = self._stats, (now, self._stats.num_prompt_tokens, self._stats.num_generation_tokens)
        seconds, prompt, output = (after - before for before, after in zip(self._before, latest, strict=True))
        self._before = latest
        if not (prompt or output or stats.num_running or stats.num_waiting):
            return None
        return (
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {output / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {stats.cache_usage:.1%}, "
            f"Prefix cache hit rate: {stats.num_hit_tokens / max(1, stats.num_queried_tokens):.1%}"
        )


async def log_throughput(stats: EngineStats, every_s: float = 10.0) -> None:
    """Log a line every 10 s while there is something to say; runs until it is cancelled."""
    throughput = Throughput(stats, time.monotonic())
    while True:
        await asyncio.sleep(every_s)
        if line := throughput.line(time.monotonic()):
            logger.info(line)
