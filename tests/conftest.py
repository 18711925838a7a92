"""Eight host devices; shapes and dtypes of jitted code are checked against its annotations while the tests run."""

import os

from jaxtyping import install_import_hook

# Eight devices on any machine; JAX reads this when it starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

install_import_hook(["nanovllm_jax.models", "nanovllm_jax.step", "nanovllm_kernels"], "beartype.beartype")
