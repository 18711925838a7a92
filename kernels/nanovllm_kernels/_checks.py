"""Shape and dtype checks shared by the operations; each error says what was got, what is allowed and why."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from nanovllm_kernels._fp8 import FP8

FLOAT_DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16"))


def check_backend(backend: str, known: tuple[str, ...] = ("xla", "triton")) -> None:
    if backend not in known:
        raise ValueError(f"backend is {backend!r}; it must be {' or '.join(map(repr, known))}.")


def check_float(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
            raise ValueError(f"{name} has dtype {array.dtype}; the kernels take {allowed}.")


def check_int32(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} has dtype {array.dtype}; it must be int32.")


def check_shape(name: str, array: Array, expected: tuple[int, ...], letters: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}; it must be [{letters}] = {expected}.")


def check_cache(k_cache: Array, v_cache: Array) -> None:
    for name, array in (("k_cache", k_cache), ("v_cache", v_cache)):
        if array.dtype != FP8:
            check_float(**{name: array})
    if k_cache.ndim != 4 or 0 in k_cache.shape:
        raise ValueError(
            f"k_cache has shape {k_cache.shape}; it must be [N blocks, K KV heads, block_size, D], none of them 0."
        )
    if math.prod(k_cache.shape[:3]) >= 2**31:
        raise ValueError(f"k_cache has shape {k_cache.shape}; N * K * block_size must be below 2^31.")
    check_shape("v_cache", v_cache, k_cache.shape, "N, K, block_size, D")
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; they must be the same.")


def check_scales(k_cache: Array, k_scale: Array | None, v_scale: Array | None) -> None:
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale go together: give both or neither.")
    if k_scale is None or v_scale is None:
        return
    if k_cache.dtype != FP8:
        raise ValueError(f"k_scale is given, but the cache is {k_cache.dtype}; only a float8_e4m3fn cache has scales.")
    for name, array in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_shape(name, array, (k_cache.shape[1],), "K")
        check_float(**{name: array})


def check_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Array | None,
    v_scale: Array | None,
) -> None:
    check_cache(k_cache, v_cache)
    check_scales(k_cache, k_scale, v_scale)
    check_float(q=q)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.shape[-1] != head_dim:
        raise ValueError(f"q has shape {q.shape}; its last dimension must be D = {head_dim} as in the cache.")
    if q.shape[-2] == 0 or q.shape[-2] % num_kv_heads:
        raise ValueError(
            f"q has {q.shape[-2]} query heads, which is not a multiple of the cache's {num_kv_heads} KV heads."
        )
    check_scores(sliding_window, soft_cap)


def check_scores(sliding_window: int | None, soft_cap: float | None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1, or None for no window.")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be above 0, or None for no cap.")
