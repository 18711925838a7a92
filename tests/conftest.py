"""Shapes and dtypes of the jitted code are checked against its annotations while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(["nanovllm_jax.models", "nanovllm_jax.step", "nanovllm_kernels"], "beartype.beartype")
