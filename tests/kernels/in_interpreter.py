"""Runs one of the `interpreted_*` scripts: Triton's interpreter must be asked for before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def run_interpreted(script: str, *arguments: object, timeout: float | None = 300) -> None:
    """Runs a script of this folder in a process of its own and expects it to pass; `timeout` in seconds."""
    paths = os.pathsep.join(map(str, (_HERE, _HERE.parent.parent / "kernels")))
    done = subprocess.run(
        [sys.executable, str(_HERE / script), *map(str, arguments)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
