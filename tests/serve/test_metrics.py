"""The figures for Prometheus, the dashboard that shows them, and the line in the log."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.serve.metrics import Throughput

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
# vLLM's, with its prefix replaced.
NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
}


def families(served):
    return {family.name: family for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)}


def samples(served):
    return {
        (sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")): sample.value
        for family in families(served).values()
        for sample in family.samples
    }


def test_names_are_those_of_vllm(served):
    assert {name: family.type for name, family in families(served).items()} == {
        f"nanovllm:{name}": kind for name, kind in NAMES.items()
    }
    for family in families(served).values():
        assert {sample.labels["model_name"] for sample in family.samples} == {"tiny"}


def test_metrics_count_what_was_served(served):
    before = samples(served)
    httpx.post(f"{served.url}/v1/completions", json={"prompt": [5] * 20, "max_tokens": 7, "ignore_eos": True})
    after = samples(served)
    grown = {key: after[key] - before[key] for key in after if after[key] != before[key]}
    assert grown[("nanovllm:generation_tokens_total", None, None)] == 7
    assert grown[("nanovllm:prompt_tokens_total", None, None)] == 20
    assert grown[("nanovllm:prefix_cache_queries_total", None, None)] == 20
    assert grown[("nanovllm:request_success_total", "length", None)] == 1
    counts = {"time_to_first_token": 1, "inter_token_latency": 6, "e2e_request_latency": 1, "request_queue_time": 1}
    for name, count in counts.items():
        assert grown[(f"nanovllm:{name}_seconds_bucket", None, "+Inf")] == count
        assert grown[(f"nanovllm:{name}_seconds_count", None, None)] == count
    assert after[("nanovllm:num_requests_running", None, None)] == 0


def test_the_dashboard_shows_every_metric_and_no_other(served):
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    used = set(re.findall(r"nanovllm:\w+", " ".join(queries)))
    exported = {name for name, _, _ in samples(served)}
    assert used <= exported
    suffixes = {"gauge": "", "counter": "_total", "histogram": "_bucket"}
    assert used == {f"nanovllm:{name}{suffixes[kind]}" for name, kind in NAMES.items()}
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_a_line_says_what_was_done_and_none_that_nothing_was():
    stats = EngineStats(num_queried_tokens=200, num_hit_tokens=50, num_prompt_tokens=9)
    throughput = Throughput(stats, 100.0)
    assert throughput.line(110.0) is None
    stats.num_running, stats.num_waiting, stats.cache_usage = 3, 2, 0.125
    stats.num_prompt_tokens += 55
    stats.num_generation_tokens += 1000
    assert throughput.line(120.0) == (
        "Avg prompt throughput: 5.5 tokens/s, Avg generation throughput: 100.0 tokens/s, Running: 3 reqs, "
        "Waiting: 2 reqs, KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )
