"""latency.py, decode_step.py and startup.py, with a stand-in for the engine."""

import json

import pytest
from benchmark_scripts import OBEYS, figures, run, vllm_that

# The first process in a cache folder finds it empty, the second finds what the first left there.
CACHES = """
        kept = pathlib.Path(os.environ["XDG_CACHE_HOME"], "programs")
        with open(pathlib.Path(__file__).with_name("starts.txt"), "a") as file:
            print("warm" if kept.exists() else "cold", file=file)
        kept.parent.mkdir(exist_ok=True)
        kept.touch()
        """


def test_latency_of_each_batch_and_context(tmp_path):
    grid = ["--batch=1", "--batch=4", "--context=16", "--new-tokens=3", "--repeats=2", "--ceilings", "1", "0.001"]
    done = run("latency.py", *vllm_that(OBEYS, tmp_path), *grid, f"--plot={tmp_path / 'plot.png'}")
    assert done.returncode == 0, done.stderr
    lines = figures(done)
    assert list(lines) == [f"vllm/{kind}_ms_b{batch}_c16" for batch in (1, 4) for kind in ("ttft", "tpot")]
    assert all(line["limit"] > 0 and line["n"] == 2 and line["unit"] == "ms" for line in lines.values())
    assert lines["vllm/ttft_ms_b4_c16"]["limit"] == pytest.approx(4 * lines["vllm/ttft_ms_b1_c16"]["limit"], rel=0.01)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_context_beyond_the_model_length_is_refused():
    done = run("latency.py", "--context=4096")
    assert done.returncode == 2
    assert "context 4096 and 64 new tokens exceed 4096" in done.stderr


def test_decode_step_on_weights_of_the_engines_own(tmp_path):
    done = run("decode_step.py", *vllm_that(OBEYS, tmp_path), "--batch=2", "--new-tokens=3", "--repeats=2")
    assert done.returncode == 0, done.stderr
    assert list(figures(done)) == ["vllm/tp1_8b_b2_step_ms"]
    options = json.loads((tmp_path / "options.json").read_text())
    assert (options["load_format"], options["tensor_parallel_size"]) == ("dummy", 1)
    assert "cannot make weights of its own" in run("decode_step.py", "--engine=nano-vllm").stderr


def test_startup_finds_empty_caches_then_filled_ones(tmp_path):
    done = run("startup.py", *vllm_that(CACHES + OBEYS, tmp_path), "--repeats=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts.txt").read_text().split() == ["cold", "warm"] * 2
    assert list(figures(done)) == ["vllm/startup_cold_s", "vllm/startup_warm_s"]


def test_decode_step_of_replicas_and_shards():
    sizes = ["--tensor-parallel-size=2", "--data-parallel-size=2", "--batch=2", "--new-tokens=3", "--repeats=1"]
    small = [f"--llm={option}" for option in ("max_num_seqs=4", "max_num_batched_tokens=64", "enforce_eager=true")]
    done = run("decode_step.py", *sizes, *small, "--context=16", "--ceilings", "1", "0.001")
    assert done.returncode == 0, done.stderr
    (line,) = figures(done).values()
    assert (line["figure"], line["device"]) == ("dp2tp2_8b_b2_step_ms", "4 x cpu")
    assert line["limit"] > 0


def test_startup_in_caches_that_are_filled_is_warm(tmp_path):
    filled = tmp_path / "caches"
    filled.mkdir()
    (filled / "programs").touch()
    done = run("startup.py", *vllm_that(CACHES + OBEYS, tmp_path), f"--caches={filled}", "--repeats=2")
    assert (tmp_path / "starts.txt").read_text().split() == ["warm"] * 2
    assert list(figures(done)) == ["vllm/startup_warm_s"]


def test_startup_keeps_the_starts_that_ended_in_time(tmp_path):
    stuck = CACHES + "if 'warm' in pathlib.Path(__file__).with_name('starts.txt').read_text():\n"
    stuck += "            threading.Event().wait()\n        "
    done = run("startup.py", *vllm_that(stuck + OBEYS, tmp_path), "--repeats=2", "--time-limit=6")
    assert "vllm used up its time; dropped: start-up" in done.stderr
    assert [line["n"] for line in figures(done).values()] == [1]


def test_cells_that_do_not_fit_are_left_out(tmp_path):
    grid = ["--batch=1", "--batch=1000000", "--context=512", "--new-tokens=2", "--repeats=1"]
    engine = vllm_that(OBEYS, tmp_path)
    (tmp_path / "torch.py").write_text((tmp_path / "torch.py").read_text().replace("Pretend GPU", "NVIDIA H200"))
    done = run("latency.py", *engine, *grid)
    assert list(figures(done)) == ["vllm/ttft_ms_b1_c512", "vllm/tpot_ms_b1_c512"]
    assert "vllm: 1000000 rows, context 512: more than the cache holds, left out" in done.stderr
