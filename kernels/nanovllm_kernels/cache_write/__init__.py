"""Writes keys and values of new tokens into the paged KV cache."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_cache, check_float, check_int32, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.cache_write.reference import cache_write_xla


def cache_write(
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
    *,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """Writes token t's key and value to slot `slots[t]`: block slot // block_size, offset slot % block_size.

    T tokens, K KV heads, D head dim, N blocks. `k` and `v` are cast to the cache's dtype (float32, bfloat16
    or float16). A token with a negative slot is not written; neither is one past the last slot. The slots
    that are written must differ from each other. In place when the caches are donated to the enclosing jit.

    Returns:
        The updated (k_cache, v_cache).

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    check_cache(k_cache, v_cache)
    check_float(k=k, v=v)
    check_int32(slots=slots)
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if slots.ndim != 1:
        raise ValueError(f"slots has shape {slots.shape}; it must be [T].")
    for name, array in (("k", k), ("v", v)):
        check_shape(name, array, (slots.shape[0], num_kv_heads, head_dim), "T, K, D")
    if slots.shape[0] == 0:
        return k_cache, v_cache
    if backend == "xla":
        return cache_write_xla(k, v, k_cache, v_cache, slots)
    import_jax_triton()
    from nanovllm_kernels.cache_write.triton import cache_write_triton

    return cache_write_triton(k, v, k_cache, v_cache, slots)
