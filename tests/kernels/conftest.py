"""What tests of kernels see: what Triton compiles, and memory full of NaN."""

import jax
import jax.numpy as jnp
import pytest

from nanovllm_kernels._compat import import_jax_triton


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """On a GPU freed memory holds NaN, so that an output row that nobody writes shows."""
    if request.node.get_closest_marker("gpu"):
        jax.block_until_ready(jnp.full((256, 1024, 1024), jnp.nan))


@pytest.fixture
def compiled(monkeypatch):
    """(name, shared memory in bytes) of each kernel that triton compiles during a test."""
    triton_lib = import_jax_triton().triton_lib
    compile_kernel = triton_lib.compile_ttir_inplace
    kernels = []

    def recorded(*args):
        result = compile_kernel(*args)
        kernels.append((result.name, result.shared_mem_bytes))
        return result

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", recorded)
    # Kernels are kept for the life of the process; here each test is to compile its own.
    monkeypatch.setattr(triton_lib.TritonFunction, "_kernel_cache", property(lambda _: {}))
    return kernels


@pytest.fixture
def layouts(compiled, monkeypatch):
    """TritonGPU IR of each such kernel, where layouts are settled."""
    backend = import_jax_triton().triton_lib.cb.CUDABackend
    make_ttgir, kernels = backend.make_ttgir, []

    def recorded(*args):
        module = make_ttgir(*args)
        kernels.append(str(module))
        return module

    monkeypatch.setattr(backend, "make_ttgir", staticmethod(recorded))
    return kernels
