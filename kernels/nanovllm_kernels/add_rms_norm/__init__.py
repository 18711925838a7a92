"""The residual addition of a transformer layer and the root-mean-square norm that follows it, in one pass."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float

from nanovllm_kernels._checks import check_backend, check_float, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.add_rms_norm.reference import add_rms_norm_xla


def add_rms_norm(
    x: Float[Array, "T E"],
    update: Float[Array, "T E"] | None,
    weight: Float[Array, " E"],
    *,
    eps: float,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """`x + update`, and that sum normalised over E and multiplied with `weight`; each row is read once.

    Without an update the sum is `x` as it is, and only its norm is computed.

    T tokens, E model dim, all of one dtype: float32, bfloat16 or float16. The sum is rounded to it before the norm,
    which is float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), and so are normalised values before
    they are multiplied with the weight.

    Returns:
        (sum, normalised sum).

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_float(x=x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}; it must be [T, E] with E above 0.")
    if update is not None:
        check_shape("update", update, x.shape, "T, E")
    check_shape("weight", weight, x.shape[1:], "E")
    for name, array in (("update", update), ("weight", weight)):
        if array is not None and array.dtype != x.dtype:
            raise ValueError(f"{name} is {array.dtype} and x {x.dtype}; they must be the same.")
    if backend == "xla" or x.shape[0] == 0:
        return add_rms_norm_xla(x, update, weight, eps=eps)
    import_jax_triton()
    from nanovllm_kernels.add_rms_norm.triton import add_rms_norm_triton

    return add_rms_norm_triton(x, update, weight, eps=eps)
