"""scaling.py as a user runs it, on host devices; and its plan for more of them."""

import pytest
from benchmark_scripts import figures, run
from scaling_setups import LARGE, MIDDLE, PARTS, SMALL, Setup, plan, waves


def test_replicas_shards_and_both_on_host_devices(tmp_path):
    done = run("scaling.py", "--smoke", "--gpus=1,4,16", "--repeats=1", f"--plot={tmp_path / 'plot.png'}")
    assert done.returncode == 0, done.stderr
    assert "there are 8 devices; left out: 16" in done.stderr
    lines = figures(done)
    steps = [f"tp{n}_8b_{name}" for n in (1, 2, 4) for name in ("b64_step_ms", "b1_step_ms", "prefill_ms")]
    speedups = ["dp4_bench256_speedup", "dp2tp2_bench256_speedup", "tp2_8b_b64_speedup", "tp4_8b_b64_speedup"]
    rates = ["dp1_bench256_out_tok_s", "dp4_bench256_out_tok_s", "dp1tp2_bench256_out_tok_s"]
    assert lines.keys() == {*steps, *speedups, *rates, "dp2tp2_bench256_out_tok_s", "tp4_32b_b64_step_ms"}
    assert [lines[name]["limit"] for name in speedups] == [4, 2, 2, 4]
    assert lines["dp4_bench256_speedup"]["value"] == pytest.approx(
        lines["dp4_bench256_out_tok_s"]["value"] / lines["dp1_bench256_out_tok_s"]["value"], rel=0.01
    )
    assert lines["dp2tp2_bench256_speedup"]["device"] == "4 x cpu"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_time_limit_names_what_was_not_measured():
    done = run("scaling.py", "--smoke", "--gpus=1,2", "--only=tp", "--time-limit=0.1")
    assert done.returncode == 1
    for setup in ("qwen3-8b dp1 tp1", "qwen3-8b dp1 tp2"):
        assert f"nanovllm-jax used up its time; dropped: {setup}\n" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smoke", "--gpus=0"], "--gpus 0: a number must be at least 1"),
        (["--smoke", "--gpus=1;2"], "--gpus 1;2: write numbers with commas"),
        (["--smoke", "--tensor-parallel-size=2"], "the sizes follow from --gpus"),
        ([], "--smoke and --model go together"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    done = run("scaling.py", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_setups_that_fit_side_by_side_start_together_and_what_matters_most_comes_first():
    found = list(waves(plan([1, 2, 4, 8], PARTS), 8))
    sizes = [[setup.devices for setup in wave] for wave in found]
    assert sizes == [[1, 1, 4, 2], [8], [8], [8], [8], [2, 4]]
    assert found[1] == [Setup(SMALL, 8, bench=True)]
    assert found[3] == [Setup(MIDDLE, 4, 2, bench=True)]
    assert found[4] == [Setup(LARGE, 1, 8, ("b64",))]


def test_one_device_has_nothing_to_scale_to():
    assert plan([1], PARTS) == [Setup(MIDDLE, 1, 1, ("b64", "b1"))]
    assert plan([], PARTS) == []
