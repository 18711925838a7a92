"""host_work.py, over clocks that need no time."""

import subprocess
import sys

from benchmark_scripts import BENCHMARKS


def test_a_call_with_many_texts_is_told_by_tenths_of_its_steps():
    command = [sys.executable, str(BENCHMARKS / "host_work.py"), "--texts=600", "--step-ms=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stderr.splitlines() if line.startswith("│")]
    assert [row[1] for row in rows] == [str(tenth) for tenth in range(1, 11)]
    assert "600 texts" in done.stderr
