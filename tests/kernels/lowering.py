"""Lowers operations for a GPU that this machine need not have."""

import functools

import jax
import jax.numpy as jnp

from nanovllm_kernels import lowering_for, paged_decode, rope_cache_write, rope_paged_decode

ARCHITECTURES = (80, 86, 89, 90, 100)
FP8_ARCHITECTURES = (89, 90, 100)
QWEN3 = {"group": 2, "head_dim": 128, "block_size": 16, "dtype": "bfloat16"}


def arguments(
    operation,
    *,
    group,
    head_dim,
    block_size,
    dtype,
    cache_dtype=None,
    rows=4,
    tokens=256,
    kv_heads=2,
    table_width=512,
    queries=(),
):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    index = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    caches = (shape((64, kv_heads, block_size, head_dim), dtype=jnp.dtype(cache_dtype or dtype)),) * 2
    if operation is rope_cache_write:
        angles = (shape((tokens, head_dim // 2), dtype=jnp.float32),) * 2
        return (shape((tokens, kv_heads, group + 2, head_dim)), *angles, *caches, index((tokens,)))
    if operation is rope_paged_decode:
        angles = (shape((rows, head_dim // 2), dtype=jnp.float32),) * 2
        qkv = shape((rows, kv_heads, group + 2, head_dim))
        return (qkv, *angles, *caches, index((rows, table_width)), index((rows,)))
    heads = kv_heads * group
    if operation is paged_decode:
        return (shape((rows, *queries, heads, head_dim)), *caches, index((rows, table_width)), index((rows,)))
    lengths = index((rows + 1,)), index((rows,))
    return (shape((tokens, heads, head_dim)), *caches, index((rows, table_width)), *lengths)


def lower(operation, architecture, options=None, donate=(), backend="triton", **shapes):
    """The StableHLO of one call, and the shared memory that one block may use."""
    keywords = (options or {}) if operation is rope_cache_write else {"scale": 0.1, **(options or {})}

    def call(*args):
        return operation(*args, **keywords, backend=backend)

    with lowering_for(architecture) as target:
        traced = jax.jit(call, donate_argnums=donate).trace(*arguments(operation, **shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text(), target.shared_bytes
