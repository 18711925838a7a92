"""`nanovllm-jax bench serve` against a real server, and its arithmetic."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from nanovllm_jax.cli import app
from nanovllm_jax.cli.bench_serve import parse_goals
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.loadtest.client import Outcome, Target
from nanovllm_jax.loadtest.drive import Load, Served
from nanovllm_jax.loadtest.figures import summarise

SHORT = "--num-prompts 12 --input-len 8:16 --output-len 2:6"


def bench(served, line):
    return CliRunner().invoke(app, ["bench", "serve", "--base-url", served.url, *line.split()])


def test_a_sweep_prints_and_writes_its_figures(served, tmp_path):
    files = f"--json {tmp_path}/load.json --plot {tmp_path}/load.png"
    result = bench(served, f"{SHORT} --request-rate 50,inf --goodput ttft:60000 tpot:60000 {files}")
    assert result.exit_code == 0, result.output
    slow, fast = json.loads(result.stdout)["runs"]
    assert (slow["request_rate"], fast["request_rate"]) == (50, "inf")
    for run in (slow, fast):
        assert (run["num_requests"], run["num_failed"]) == (12, 0)
        assert 12 * 2 <= run["num_output_tokens"] <= 12 * 6
        assert run["goodput_req_s"] == run["req_s"]
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            assert 0 < run[name]["median"] <= run[name]["p99"]
    for word in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "output tok/s", "all rates"):
        assert word in result.stderr
    written = json.loads((tmp_path / "load.json").read_text())["runs"]
    assert [len(run["requests"]) for run in written] == [12, 12]
    assert [one["num_output_tokens"] for one in written[0]["requests"]] != [2] * 12
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_text_prompts_at_a_fixed_concurrency(served, tmp_path):
    result = bench(served, f"{SHORT} --max-concurrency 2 --prompts text --plot {tmp_path}/load.png")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert (run["max_concurrency"], run["num_failed"], run["goodput_req_s"]) == (2, 0, None)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said(served):
    assert "other" in bench(served, f"{SHORT} --model other").stderr
    assert "max_model_len" in bench(served, "--input-len 300 --num-prompts 1").stderr
    assert bench(served, f"{SHORT} --request-rate 0").exit_code == 2
    nowhere = SimpleNamespace(url="http://127.0.0.1:9")
    assert "Is the server running there?" in bench(nowhere, SHORT).stderr


def test_requests_that_fail_are_counted_apart():
    outcomes = [
        Outcome(0.0, [0.1, 0.2, 0.4], num_prompt_tokens=10, num_output_tokens=4),
        Outcome(1.0, [1.3], num_prompt_tokens=10, num_output_tokens=1),
        Outcome(1.5, error="503: full"),
    ]
    figures = summarise(Served(Load(2.0), outcomes, 2.0), {"ttft": 201, "tpot": 101})
    assert (figures["num_failed"], figures["errors"]) == (1, ["503: full"])
    assert (figures["req_s"], figures["output_tok_s"], figures["total_tok_s"]) == (1.0, 2.5, 12.5)
    assert figures["ttft_ms"] == {"mean": 200.0, "median": 200.0, "p99": 298.0}
    assert figures["tpot_ms"] == {"mean": 100.0, "median": 100.0, "p99": 100.0}
    assert figures["itl_ms"]["mean"] == 150.0
    assert figures["e2e_ms"]["median"] == 350.0
    assert figures["goodput_req_s"] == 0.5


def test_moments_are_random_and_their_rate_is_exact():
    moments = Load(8.0, seed=3).moments(400)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert moments[0] == 0
    assert moments[-1] == pytest.approx(400 / 8, rel=0.02)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.15)  # of an exponential: its mean
    assert Load(8.0, seed=3).moments(400) == moments
    assert Load(math.inf).moments(3) == [0, 0, 0]


def test_goals_are_read_as_vllm_writes_them():
    assert parse_goals(["ttft:200", "tpot:50"]) == parse_goals(["ttft:200 tpot:50"]) == {"ttft": 200, "tpot": 50}
    for wrong in ("ttft", "itl:3", "ttft:-1", "ttft:fast"):
        with pytest.raises(ConfigError, match="ttft:200"):
            parse_goals([wrong])


def test_other_servers_are_not_asked_for_what_they_do_not_know():
    assert "ignore_eos" not in Target("http://x/v1/", "m", ignore_eos=False).body("Once", 5)
    assert Target("http://x/v1/", "m").root == "http://x"
    assert Target("http://x", "m", "secret").headers == {"Authorization": "Bearer secret"}
