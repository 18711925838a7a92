"""The host shell decides without JAX: what it imports starts no device and takes no second."""

import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm_jax.engine

MODULES = sorted(path.stem for path in Path(nanovllm_jax.engine.__path__[0]).glob("*.py"))
OF_THE_START = {"__init__", "build", "plan", "compile_worker"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - OF_THE_START))
def test_it_imports_no_jax(module):
    program = f"import sys, nanovllm_jax.engine.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
