"""What the package says where a GPU is unknown, and where triton is missing."""

import subprocess
import sys

import pytest

from nanovllm_kernels import lowering_for


def test_unknown_architecture_is_refused_with_those_known():
    with (
        pytest.raises(ValueError, match=r"compute_capability is 75; known ones are \[80, 86, 89, 90"),
        lowering_for(75),
    ):
        pass


def test_package_works_without_triton():
    program = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import jax.numpy as jnp
from nanovllm_kernels import rope_cache_write
qkv, cache, slots = jnp.ones((1, 1, 3, 8)), jnp.zeros((2, 1, 4, 8)), jnp.zeros(1, jnp.int32)
args = qkv, jnp.ones((1, 4)), jnp.zeros((1, 4)), cache, cache, slots
assert rope_cache_write(*args, backend="xla")[1].sum() == 8
try:
    rope_cache_write(*args, backend="triton")
except ImportError as error:
    assert "use backend='xla'" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_gpu_runtimes_are_those_that_lowering_makes_known():
    """Mosaic's own module, which is slow to import, names the same library."""
    script = """
import os, sys
from nanovllm_kernels._compat import register_gpu_runtimes
register_gpu_runtimes()
quick = os.environ.pop("MOSAIC_GPU_RUNTIME_LIB_PATH")
assert os.path.exists(quick) and "jax.experimental.mosaic.gpu.core" not in sys.modules
import jax.experimental.mosaic.gpu.core
assert os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] == quick
"""
    subprocess.run([sys.executable, "-c", script], check=True)
