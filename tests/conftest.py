"""Eight host devices; shapes and dtypes of jitted code are checked against its annotations while the tests run."""

import os
import signal

import pytest
from jaxtyping import install_import_hook

# Eight devices on any machine; JAX reads this when it starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# A shell starts what it runs in the background with Ctrl-C ignored; tests that send it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook(["nanovllm_jax.models", "nanovllm_jax.step", "nanovllm_kernels"], "beartype.beartype")


@pytest.fixture
def no_xla_cache():
    """Without XLA's own cache: other tests turn it on, and what comes from there is not kept."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()
