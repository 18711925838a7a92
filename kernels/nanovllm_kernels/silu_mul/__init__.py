"""The gated activation of an MLP."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float

from nanovllm_kernels._checks import check_backend, check_float
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.silu_mul.reference import silu_mul_xla


def silu_mul(gate_up: Float[Array, "T 2 F"], *, backend: Literal["xla", "triton"]) -> Float[Array, "T F"]:
    """`silu(gate) * up`, where `gate_up[t]` holds the F gates of token t and then its F values.

    From Shazeer 2020 (https://arxiv.org/abs/2002.05202). T tokens, F MLP dim; float32, bfloat16 or float16, and
    float32 inside.

    Raises:
        ValueError: if the shape or dtype is another, or the backend unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_float(gate_up=gate_up)
    if gate_up.ndim != 3 or gate_up.shape[1] != 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; it must be [T, 2, F].")
    if backend == "xla" or 0 in gate_up.shape:
        return silu_mul_xla(gate_up)
    import_jax_triton()
    from nanovllm_kernels.silu_mul.triton import silu_mul_triton

    return silu_mul_triton(gate_up)
