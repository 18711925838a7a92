"""Shapes and dtypes of every annotated function are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(["nanovllm_jax", "nanovllm_kernels"], "beartype.beartype")
