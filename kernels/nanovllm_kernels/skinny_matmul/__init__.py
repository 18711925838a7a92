"""Products of few activation rows with a weight, with the norm before and the addition or activation after."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_float, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.skinny_matmul.reference import rms_norm_xla, skinny_matmul_xla

# One counter for each output tile of the largest launch that splits K; see `split_counters`.
NUM_COUNTERS = 4096
_FP8 = jnp.dtype("float8_e4m3fn")
_MOSAIC_CAPABILITY = 90  # wgmma, which later GPUs do not have
_FP8_CAPABILITY = 89  # the first GPUs that convert e4m3 in hardware


def split_counters() -> Int[Array, " tiles"]:
    """Counters for `skinny_matmul`, all zero, to be made a `jax.new_ref`.

    One set serves every call inside a jit, loops too, and each leaves them at zero: a program pays for one fill each
    time it is called, however many tokens it computes.
    """
    return jnp.zeros(NUM_COUNTERS, jnp.int32)


def skinny_matmul(
    x: Float[Array, "M K"],
    w: Array,
    *,
    norm: Float[Array, " K"] | None = None,
    eps: float = 1e-6,
    w_scale: Array | None = None,
    bias: Array | None = None,
    residual: Float[Array, "M N"] | None = None,
    w_layout: Literal["kn", "nk"] = "kn",
    out_dtype: DTypeLike | None = None,
    counters: jax.Ref | None = None,
    backend: Literal["xla", "triton"],
) -> Float[Array, "M N"]:
    """`residual + act(rms_norm(x) @ (w * w_scale) + bias)` for 1 to 256 rows, in one pass over the weight.

    M rows, K input and N output features. Every part but the product is optional. More rows are right too, but
    there XLA's product is the faster one. M * K and M * N must be below 2^31.

    Args:
        x: float32, bfloat16 or float16.
        w: [K, N]; [N, K] with `w_layout="nk"`; or [K, 2, N], gate and up projections of a gated MLP, for which
            the result is silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202). x's dtype, or
            float8_e4m3fn.
        norm: weight of a root-mean-square norm of x (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).
        eps: added to the mean square.
        w_scale: what fp8 weights are multiplied with: one number (shape []), or one for each output feature
            ([N], or [2, N] for gate and up).
        bias: [N], or [2, N] for gate and up.
        residual: added last.
        w_layout: "kn", or "nk" for an embedding used as output head.
        out_dtype: of the result, x's by default.
        counters: a `jax.new_ref` of `split_counters()`. With them a product that splits K is one kernel, whose last
            program for a tile adds the splits in order; without them a second kernel does.
        backend: float32 inputs, and fp8 weights on GPUs older than sm_89, run through XLA with either.

    Sums are float32. With a norm, x * norm is rounded to x's dtype before the product and the row's scale
    multiplies the float32 sum.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend or layout is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    num_outputs = _check(x, w, norm=norm, w_scale=w_scale, bias=bias, residual=residual, w_layout=w_layout)
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if x.shape[0] == 0:
        return jnp.zeros((0, num_outputs), dtype)
    parts = {"norm": norm, "eps": eps, "w_scale": w_scale, "bias": bias, "residual": residual}
    options = {**parts, "w_layout": w_layout, "out_dtype": dtype}
    if backend == "xla":
        return skinny_matmul_xla(x, w, **options)
    import_jax_triton()
    too_old = w.dtype == _FP8 and current_target().compute_capability < _FP8_CAPABILITY
    if x.dtype == jnp.float32 or too_old:
        return skinny_matmul_xla(x, w, **options)
    from nanovllm_kernels.skinny_matmul.launch import Tiling, launch_parameters

    if norm is not None and x.dtype == jnp.float16:
        # x * norm, which is not yet divided by the row's rms, may be past float16's largest number.
        options |= {"norm": None}
        x = rms_norm_xla(x, norm, eps)
    launch = launch_parameters(
        current_target(),
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=num_outputs,
        gated=w.ndim == 3,
        w_bytes=w.dtype.itemsize,
        mosaic=has_mosaic_kernel() and w_layout == "kn" and w.dtype == x.dtype and dtype == x.dtype,
    )
    if isinstance(launch, Tiling):
        from nanovllm_kernels.skinny_matmul.mosaic import skinny_matmul_mosaic

        parts = {name: options[name] for name in ("norm", "eps", "bias", "residual")}
        return skinny_matmul_mosaic(x, w, **parts, tiling=launch)
    from nanovllm_kernels.skinny_matmul.triton import skinny_matmul_triton

    return skinny_matmul_triton(x, w, **options, counters=counters, launch=launch)


def has_mosaic_kernel() -> bool:
    """Whether many rows have a kernel of their own on the GPU that kernels are compiled for."""
    return current_target().compute_capability == _MOSAIC_CAPABILITY


def _check(
    x: Array,
    w: Array,
    *,
    norm: Array | None,
    w_scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    w_layout: str,
) -> int:
    """N, if everything fits together."""
    check_float(x=x)
    if w_layout not in ("kn", "nk"):
        raise ValueError(f"w_layout is {w_layout!r}; it must be 'kn' or 'nk'.")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}; it must be [M, K] with K above 0.")
    gated = w.ndim == 3
    if w_layout == "nk":
        expected, fits = "[N, K]", w.ndim == 2 and w.shape[1] == x.shape[1]
    else:
        expected = "[K, N] or [K, 2, N]"
        fits = w.ndim in (2, 3) and w.shape[0] == x.shape[1] and (not gated or w.shape[1] == 2)
    if not fits or 0 in w.shape:
        raise ValueError(f"w has shape {w.shape}; it must be {expected} with K = {x.shape[1]} as in x, and N above 0.")
    if w.dtype not in (x.dtype, _FP8):
        raise ValueError(f"w has dtype {w.dtype}; it must be x's, {x.dtype}, or {_FP8}.")
    if w.dtype == _FP8 and w_scale is None:
        raise ValueError("w is fp8 without w_scale; pass the scale it was quantised with (1.0 if with none).")
    if w.dtype != _FP8 and w_scale is not None:
        raise ValueError(f"w_scale is given with weights of {w.dtype}; only fp8 weights have a scale.")
    num_outputs = w.shape[0] if w_layout == "nk" else w.shape[-1]
    if x.shape[0] * max(x.shape[1], num_outputs) >= 2**31:  # the kernels count elements in 32 bits
        raise ValueError(
            f"x has shape {x.shape} and the result {num_outputs} columns; M * K and M * N must be below 2^31: multiply "
            "fewer rows at a time."
        )
    channels = (2, num_outputs) if gated else (num_outputs,)
    letters = "2, N" if gated else "N"
    if norm is not None:
        check_float(norm=norm)
        check_shape("norm", norm, (x.shape[1],), "K")
    if w_scale is not None:
        check_float(w_scale=w_scale)
        if w_scale.ndim:
            check_shape("w_scale", w_scale, channels, letters)
    if bias is not None:
        check_float(bias=bias)
        check_shape("bias", bias, channels, letters)
    if residual is not None:
        check_float(residual=residual)
        check_shape("residual", residual, (x.shape[0], num_outputs), "M, N")
    return num_outputs
