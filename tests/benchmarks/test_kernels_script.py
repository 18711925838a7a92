"""kernels.py from its command line to its figures, over times that are made up: the cases themselves need a GPU."""

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS

DRIVER = """
import sys, types
sys.path.insert(0, sys.argv[1])
rate = float(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
import jax, kernels
from kernels import Measured
kind = "NVIDIA H100 80GB HBM3"
class Timed(kernels.Bench):
    def prepare(self, *chains):
        pass
    def time(self, *chains, runs=None):
        seconds = lambda chain: (1 if "copy" in chain.name else 2) * chain.moved / rate
        found = [Measured(chain, (seconds(chain),) * (runs or self.runs)) for chain in chains]
        self.measured += found
        return found
kernels.Bench = Timed
kernels.kernel_cases.tune_kernels.passes_on = lambda x: x.shape[0] > 64
kernels.results_log.measured_here = lambda: {"device": kind, "versions": {}}
jax.devices = lambda: [types.SimpleNamespace(platform="gpu", device_kind=kind)]
kernels.main()
"""


def run(rate, *options):
    command = [sys.executable, "-c", DRIVER, str(BENCHMARKS), str(rate), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    done = run(3.1e12, "--quick", "--record", str(folder), "--plot", str(folder / "roofline.png"))
    assert done.returncode == 0, done.stderr
    return done, folder


def test_everything_but_products_beside_those_of_xla_is_recorded_with_the_ceilings_of_the_run(quick):
    _, folder = quick
    lines = {line["figure"]: line for line in map(json.loads, (folder / "h100.jsonl").read_text().splitlines())}
    assert lines["device_copy_tb_s"]["value"] == 3.1
    assert [name for name in lines if name.startswith("skinny")] == ["skinny_bw_frac_8b"]
    fractions = [line["value"] for line in lines.values() if line["unit"] == "of copy"]
    assert len(fractions) == 9
    assert set(fractions) == {0.5}
    assert lines["cache_write_vs_xla"]["value"] == 1


def test_the_roofline_can_be_drawn_elsewhere(quick):
    _, folder = quick
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    again = folder / "again.png"
    chart = [sys.executable, str(BENCHMARKS / "chart.py"), "roofline", str(folder / "roofline.json"), str(again)]
    assert subprocess.run(chart).returncode == 0
    assert again.read_bytes().startswith(b"\x89PNG")


def test_a_gpu_that_copies_more_slowly_than_its_kind_is_not_measured_on():
    done = run(1e12, "--quick")
    assert done.returncode == 1
    assert "the device copy reaches 1.00 TB/s" in done.stderr
