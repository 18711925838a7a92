"""The script as a user runs it, with the embedded model; other engines are stand-ins on a path of their own."""

import json

from benchmark_scripts import OBEYS, figures, run, vllm_that

OURS_SMALL = [f"--llm={option}" for option in ("max_num_seqs=16", "max_num_batched_tokens=64", "enforce_eager=true")]
SCRIPT = "throughput.py"


def test_engines_side_by_side_and_a_missing_one_is_named(tmp_path):
    done = run(
        SCRIPT,
        "--smoke",
        "--engine=nanovllm-jax",
        "--engine=nano-vllm",
        f"--pythonpath=nano-vllm={tmp_path}",
        *vllm_that(OBEYS, tmp_path),
        *("--case=single", "--case=shared-prefix", "--repeats=2", f"--chart={tmp_path / 'chart.png'}"),
        *OURS_SMALL,
    )
    assert done.returncode == 0, done.stderr
    lines = figures(done)
    ours = ["single_out_tok_s", "shared_prefix_tok_s", "shared_prefix_computed_frac"]
    assert list(lines) == [*ours, "vllm/single_out_tok_s", "vllm/shared_prefix_tok_s"]
    for line in lines.values():
        assert line["n"] == 2
        assert 0 < line["min"] <= line["value"] <= line["max"]
        assert line["command"].startswith("python benchmarks/throughput.py --model")
    # 6 prompts of 48 ids, 4 of which share 36: 3 are spared 2 blocks of 16.
    computed = lines["shared_prefix_computed_frac"]
    assert computed["value"] == computed["limit"] == round(1 - 3 * 32 / (6 * 48), 4)
    assert lines["vllm/single_out_tok_s"]["device"] == "Pretend GPU"
    assert lines["single_out_tok_s"]["limit"] is None
    assert "nano-vllm is not installed and is skipped: ModuleNotFoundError: No module named 'nanovllm'" in done.stderr
    options = json.loads((tmp_path / "options.json").read_text())
    assert options == {"dtype": "bfloat16", "max_num_seqs": 512, "seed": 0, "max_model_len": 1024}
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_output_of_another_length_voids_the_figure(tmp_path):
    done = run(
        SCRIPT, "--smoke", *vllm_that("return [Output(3) for p in params]", tmp_path), "--case=single", "--repeats=1"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "vllm failed (single): output 0 has 3 tokens" in done.stderr


def test_engine_that_raises_shows_the_end_of_its_log(tmp_path):
    done = run(
        SCRIPT, "--smoke", *vllm_that("raise RuntimeError('out of memory')", tmp_path), "--case=single", "--repeats=1"
    )
    assert done.returncode == 1
    assert "vllm failed (single): RuntimeError: out of memory" in done.stderr
    assert "  | Traceback (most recent call last):" in done.stderr


def test_engine_that_dies_is_named_and_the_next_one_goes_on(tmp_path):
    dying = vllm_that("os._exit(3)", tmp_path)
    done = run(SCRIPT, "--smoke", *dying, "--engine=nano-vllm", f"--pythonpath=nano-vllm={tmp_path}", "--case=single")
    assert done.returncode == 1
    assert "vllm failed (single): its process ended with status 3" in done.stderr
    assert "nano-vllm is not installed" in done.stderr


def test_time_limit_ends_a_run_and_names_what_is_dropped(tmp_path):
    stuck = vllm_that("threading.Event().wait()", tmp_path)
    done = run(SCRIPT, "--smoke", *stuck, "--case=single", "--case=batch32", "--case=bench256-fp8kv", "--time-limit=1")
    assert done.returncode == 1
    assert "vllm used up its time; dropped: single, batch32\n" in done.stderr


def test_recording_needs_the_shape_that_the_names_stand_for():
    done = run(SCRIPT, "--record")
    assert done.returncode == 2
    assert "--record is for --model qwen3-0.6b" in done.stderr


def test_replicas_get_a_draw_each_and_the_figure_says_so():
    done = run(SCRIPT, "--smoke", "--case=single", "--repeats=1", "--data-parallel-size=2", *OURS_SMALL)
    assert done.returncode == 0, done.stderr
    (line,) = figures(done).values()
    assert (line["figure"], line["device"]) == ("dp2_single_out_tok_s", "2 x cpu")
    refused = run(SCRIPT, "--smoke", "--engine=vllm", "--data-parallel-size=2")
    assert "--data-parallel-size is for nanovllm-jax alone" in refused.stderr
    refused = run(SCRIPT, "--smoke", "--llm=tensor_parallel_size=2")
    assert "--llm tensor_parallel_size: write --tensor-parallel-size 2" in refused.stderr
