"""collectives.py, without GPUs: what it asks of each process, and what it makes of the answers."""

import json
import subprocess
import sys
from argparse import Namespace

import collectives
from benchmark_scripts import BENCHMARKS

LINE = {"devices": 4, "kind": "NVIDIA H200", "versions": {"jax": "0.11.2"}, "kernels": []}


def test_a_way_is_a_row_of_the_table(capsys):
    lines = [LINE | {"way": way, "rows": rows, "us": rows / 2} for rows in (1, 64) for way in ("psum", "gather")]
    lines[0]["kernels"] = [["ncclDevKernel_AllReduce", 12.5, 24]]
    collectives.show("nccl", lines[:-1], [1, 64])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[:2] == [["nccl", "psum", "0.5", "32.0"], ["nccl", "gather", "0.5"]]
    assert printed[2] == ["psum", "1", "24", "x", "12.5", "us", "ncclDevKernel_AllReduce"]


def test_the_kernels_figure_is_recorded_under_the_devices(tmp_path):
    options = Namespace(record=str(tmp_path), commit="abc")
    collectives.record([LINE | {"all_us": [9.0, 7.0, 8.0]}], options)
    (figure,) = map(json.loads, (tmp_path / "h200.jsonl").read_text().splitlines())
    assert (figure["figure"], figure["value"], figure["unit"]) == ("allreduce_us_64x4096_x4", 8.0, "us")
    assert figure["device"] == "4 x NVIDIA H200"


def test_without_gpus_it_says_what_it_needs():
    command = [sys.executable, BENCHMARKS / "collectives.py", "--settings", "default", "--rows", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs at least 2 NVIDIA GPUs, but the devices are" in done.stdout


def test_processes_run_with_multicast_off(monkeypatch):
    started = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.update(options, command=command))
    collectives.start(collectives.SETTINGS["nccl+ll"], "lock", Namespace(time_limit=9.0, rows=[1], kernels=False))
    assert (started["env"]["NCCL_NVLS_ENABLE"], started["env"]["NCCL_PROTO"]) == ("0", "LL")
    assert "--xla_gpu_enable_command_buffer=+COLLECTIVES" in started["env"]["XLA_FLAGS"]
