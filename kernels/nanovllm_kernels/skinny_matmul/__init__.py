"""Products of few activation rows with a weight, with the norm before and the addition or activation after."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_float, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.skinny_matmul import launch as launches
from nanovllm_kernels.skinny_matmul.launch import Tiling, padded_rows
from nanovllm_kernels.skinny_matmul.reference import rms_norm_xla, scaled_xla, skinny_matmul_xla

# One counter for each output tile of the largest launch that splits K; see `split_counters`.
NUM_COUNTERS = 4096
_FP8 = jnp.dtype("float8_e4m3fn")
_MOSAIC_CAPABILITY = 90  # wgmma, which later GPUs do not have
_MOST_NORMED, _WIDEST_PASSED_ON = 64, 1024  # rows and columns, see `passes_on`
_FP8_CAPABILITY = 89  # the first GPUs that convert e4m3 in hardware


class Scaled(NamedTuple):
    """Rows before a root-mean-square norm whose weight they are already multiplied with, and what else it takes.

    So a product that follows a norm is a plain one, whose result is multiplied by each row's 1 / rms.
    """

    x: Float[Array, "M K"]  # rows times the norm's weight, rounded to their dtype
    squares: Float[Array, "parts rows"]  # float32: parts of the rows' sums of squares; more than M rows


def scaled(x: Float[Array, "M K"], norm: Float[Array, " K"], parts: int = 1) -> Scaled:
    """What `skinny_matmul_scaled` passes on, of rows that come from elsewhere; all parts but the first are zero."""
    rows, squares = scaled_xla(x, norm)
    return Scaled(rows, jnp.pad(squares, ((0, parts - 1), (0, 0))))


def split_counters() -> Int[Array, " tiles"]:
    """Counters for `skinny_matmul`, all zero, to be made a `jax.new_ref`.

    One set serves every call inside a jit, loops too, and each leaves them at zero: a program pays for one fill each
    time it is called, however many tokens it computes.
    """
    return jnp.zeros(NUM_COUNTERS, jnp.int32)


def skinny_matmul(
    x: Float[Array, "M K"] | Scaled,
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
        x: float32, bfloat16 or float16. A `Scaled` is normed: `norm` stays None.
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
    parts = {"norm": norm, "w_scale": w_scale, "bias": bias, "residual": residual, "next_norm": None}
    (y,) = _results(x, w, parts, eps, w_layout, out_dtype, counters, backend)
    return y


def skinny_matmul_scaled(
    x: Float[Array, "M K"] | Scaled,
    w: Array,
    *,
    next_norm: Float[Array, " N"],
    norm: Float[Array, " K"] | None = None,
    eps: float = 1e-6,
    bias: Array | None = None,
    residual: Float[Array, "M N"] | None = None,
    counters: jax.Ref | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "M N"], Scaled]:
    """`skinny_matmul`, and its result for the norm that follows, with weight `next_norm`; not for float16.

    That norm then costs the product after it nothing. In it, the same norm takes 2 of 8 us at 128 rows, for each of
    its programs multiplies and squares the rows again.
    """
    rows = x.x if isinstance(x, Scaled) else x
    if rows.dtype == jnp.float16:
        raise ValueError("a float16 x cannot be scaled: before it is divided by its rms it may be past 65,504.")
    parts = {"norm": norm, "w_scale": None, "bias": bias, "residual": residual, "next_norm": next_norm}
    y, *passed_on = _results(x, w, parts, eps, "kn", None, counters, backend)
    return y, Scaled(*passed_on)


def _results(
    x: Array | Scaled,
    w: Array,
    parts: dict[str, Array | None],
    eps: float,
    w_layout: str,
    out_dtype: DTypeLike | None,
    counters: jax.Ref | None,
    backend: str,
) -> list[Array]:
    """The result, and what is passed on where `parts` has a next norm."""
    squares = None
    if isinstance(x, Scaled):
        x, squares = x
    check_backend(backend)
    num_outputs = _check(x, w, parts, squares, w_layout)
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if x.shape[0] == 0:
        y = jnp.zeros((0, num_outputs), dtype)
        return [y] if parts["next_norm"] is None else [y, y, jnp.zeros((1, 0), jnp.float32)]
    options = {**parts, "eps": eps, "squares": squares, "w_layout": w_layout, "out_dtype": dtype}
    if backend == "xla":
        return skinny_matmul_xla(x, w, **options)
    import_jax_triton()
    too_old = w.dtype == _FP8 and current_target().compute_capability < _FP8_CAPABILITY
    if x.dtype == jnp.float32 or too_old:
        return skinny_matmul_xla(x, w, **options)
    if options["norm"] is not None and x.dtype == jnp.float16:
        # x * norm, which is not yet divided by the row's rms, may be past float16's largest number.
        x = rms_norm_xla(x, options.pop("norm"), eps)
        options["norm"] = None
    given = {name: options[name] for name in ("norm", "bias", "residual", "squares", "next_norm")}
    mosaic = has_mosaic_kernel() and w_layout == "kn" and w.dtype == x.dtype and dtype == x.dtype
    launch = _launch_of(x, w, num_outputs, given, mosaic=mosaic)
    if isinstance(launch, Tiling):
        from nanovllm_kernels.skinny_matmul.mosaic import skinny_matmul_mosaic

        return skinny_matmul_mosaic(x, w, **given, eps=eps, tiling=launch)
    from nanovllm_kernels.skinny_matmul.triton import skinny_matmul_triton

    return skinny_matmul_triton(x, w, **options, counters=counters, launch=launch)


def _launch_of(
    x: jax.ShapeDtypeStruct | Array,
    w: jax.ShapeDtypeStruct | Array,
    num_outputs: int,
    given: dict[str, Any],
    *,
    mosaic: bool,
) -> launches.Launch | Tiling:
    """The launch for the GPU at hand, a `Tiling` only where the `mosaic` kernel may run and takes what is `given`."""
    target = current_target()

    def takes(tiling: Tiling) -> bool:
        from nanovllm_kernels.skinny_matmul.mosaic_shape import shape_of, takes

        return takes(shape_of(x, w, tiling, **given), target.shared_bytes)

    return launches.launch_parameters(
        target,
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=num_outputs,
        gated=len(w.shape) == 3,
        w_bytes=w.dtype.itemsize,
        normed=given["norm"] is not None or given["squares"] is not None,
        takes=takes if mosaic else None,
    )


def passes_on(x: jax.ShapeDtypeStruct | Array) -> bool:
    """Whether the products before a norm of x [M, E] should pass on what those after it take.

    Up to 64 rows a layer is the faster one without: 24.0 us for 26.6 of four products of Qwen3-0.6B at 64 rows (H200).
    Of wider models that has not been measured.
    """
    (rows, width), dtype = x.shape, x.dtype
    return (
        rows > _MOST_NORMED and width <= _WIDEST_PASSED_ON and jnp.dtype(dtype) == jnp.bfloat16 and has_mosaic_kernel()
    )


def has_mosaic_tile(w: jax.ShapeDtypeStruct | Array, rows: int) -> bool:
    """Whether so many normed rows times w [K, N] or [K, 2, N] run in the Mosaic kernel on the GPU at hand."""
    x = jax.ShapeDtypeStruct((rows, w.shape[0]), w.dtype)
    given = dict.fromkeys(("bias", "residual", "squares", "next_norm")) | {
        "norm": jax.ShapeDtypeStruct(x.shape[1:], w.dtype)
    }
    return isinstance(_launch_of(x, w, w.shape[-1], given, mosaic=has_mosaic_kernel()), Tiling)


def has_mosaic_kernel() -> bool:
    """Whether many rows have a kernel of their own on the GPU that kernels are compiled for."""
    return current_target().compute_capability == _MOSAIC_CAPABILITY


def _check(x: Array, w: Array, parts: dict[str, Array | None], squares: Array | None, w_layout: str) -> int:
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
    w_scale = parts["w_scale"]
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
    norm, residual, next_norm = (parts[name] for name in ("norm", "residual", "next_norm"))
    if norm is not None:
        check_float(norm=norm)
        check_shape("norm", norm, (x.shape[1],), "K")
    if squares is not None:
        if norm is not None:
            raise ValueError("x is scaled, and norm is given: a scaled x has been multiplied with the norm it is for.")
        if squares.ndim != 2 or squares.shape[1] != padded_rows(x.shape[0]):
            expected = f"[parts, {padded_rows(x.shape[0])}] for {x.shape[0]} rows"
            raise ValueError(f"squares of a scaled x have shape {squares.shape}; it must be {expected}.")
    if w_scale is not None:
        check_float(w_scale=w_scale)
        if w_scale.ndim:
            check_shape("w_scale", w_scale, channels, letters)
    if parts["bias"] is not None:
        check_float(bias=parts["bias"])
        check_shape("bias", parts["bias"], channels, letters)
    if residual is not None:
        check_float(residual=residual)
        check_shape("residual", residual, (x.shape[0], num_outputs), "M, N")
    if next_norm is not None:
        check_float(next_norm=next_norm)
        check_shape("next_norm", next_norm, (num_outputs,), "N")
    return num_outputs
