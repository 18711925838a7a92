"""Norm, rotary embedding and the write of new keys and values into the paged cache, in one pass."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_cache, check_float, check_int32, check_scales, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.rope_cache_write.reference import rope_cache_write_xla


def rope_cache_write(
    qkv: Float[Array, "T K heads D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
    *,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    eps: float = 1e-6,
    k_scale: Float[Array, " K"] | None = None,
    v_scale: Float[Array, " K"] | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "T H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """Turns the product of the q, k and v projections into queries, and into cached keys and values.

    T tokens, K KV heads, G query heads for each (H = K * G), D head dim, N blocks. `qkv[t, k]` holds the G
    query heads of KV head k, its key and its value. Queries and keys are normed over D (`q_norm` and `k_norm`, both
    or neither; Qwen3), then rotated: the halves of D against each other by `cos` and `sin` (float32). Token t's key
    and value go to slot `slots[t]`: block slot // block_size, offset slot % block_size. A token with a negative slot
    is not written; neither is one past the last slot. The slots that are written must differ from each other. In
    place when the caches are donated to the enclosing jit.

    The cache is float32, bfloat16, float16 or float8_e4m3fn. In float8 a key is stored as key / `k_scale` of its KV
    head (a value likewise; None means 1), rounded to nearest and saturating at 448.

    Returns:
        (q [T, H, D] in qkv's dtype, k_cache, v_cache).

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_cache(k_cache, v_cache)
    check_float(qkv=qkv)
    check_int32(slots=slots)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if slots.ndim != 1:
        raise ValueError(f"slots has shape {slots.shape}; it must be [T].")
    if qkv.ndim != 4 or qkv.shape[2] < 3 or (*qkv.shape[:2], qkv.shape[3]) != (len(slots), num_kv_heads, head_dim):
        raise ValueError(
            f"qkv has shape {qkv.shape}; it must be [T, K, G + 2, D] with T = {len(slots)}, K = {num_kv_heads}, "
            f"D = {head_dim} and at least one query head."
        )
    for name, array in (("cos", cos), ("sin", sin)):
        check_shape(name, array, (len(slots), head_dim // 2), "T, D / 2")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both or neither.")
    for name, array in (("q_norm", q_norm), ("k_norm", k_norm)):
        if array is not None:
            check_shape(name, array, (head_dim,), "D")
    check_scales(k_cache, k_scale, v_scale)
    if slots.shape[0] == 0:
        return qkv[:, :, :-2].reshape(0, -1, head_dim), k_cache, v_cache
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "k_scale": k_scale, "v_scale": v_scale}
    if backend == "xla":
        return rope_cache_write_xla(qkv, cos, sin, k_cache, v_cache, slots, **norms)
    import_jax_triton()
    from nanovllm_kernels.rope_cache_write.triton import rope_cache_write_triton

    return rope_cache_write_triton(qkv, cos, sin, k_cache, v_cache, slots, **norms)
