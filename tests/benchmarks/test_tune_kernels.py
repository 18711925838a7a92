"""What the tuner keeps of what it has timed; timing itself needs a GPU."""

import subprocess
import sys

from benchmark_scripts import BENCHMARKS

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from tune_kernels import Launch, SkinnyCase, Tiling, Timed, entries_of
case = SkinnyCase("qkv", 64, 4096, 3072, norm=True)
tried = {
    "split": Tiling(64, 64, 64, 10, 2), "split more": Tiling(64, 64, 64, 8, 4), "whole": Tiling(64, 64, 64, 10),
    "second": Launch(64, 64, 64, 2, 4, 6), "triton": Launch(64, 64, 64, 1, 4, 6),
}
names = {launch: name for name, launch in tried.items()}
timed = [Timed(launch, 1e-6, name != "second") for name, launch in tried.items()]
for first in (0, 2, 4):
    print([names[entry.launch] for entry in entries_of(case, timed[first:])])
"""


def test_beside_the_best_the_best_without_a_split_and_the_best_of_triton_are_kept():
    command = [sys.executable, "-c", DRIVER, str(BENCHMARKS)]
    kept = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # A launch whose splits a second kernel adds is not for the engine.
    assert kept == ["['split', 'whole', 'triton']", "['whole', 'triton']", "['triton']"]
