"""Pallas Mosaic GPU implementation for sm_90: launch of the persistent kernel that `mosaic_shape.py` describes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, update_in_place
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, swizzled
from nanovllm_kernels._streaming import stream_copies
from nanovllm_kernels.rope_paged_decode.mosaic_consumer import consume
from nanovllm_kernels.rope_paged_decode.mosaic_producer import produce
from nanovllm_kernels.rope_paged_decode.mosaic_queries import make_queries
from nanovllm_kernels.rope_paged_decode.mosaic_shape import AREA, TILE_COLUMNS, Arrays, KernelShape, Launch, Shared

# Measured on an H200: with three stages 64 rows x 1,152 take 1 µs more, then with 208 or 176 registers a consumer too.
LAUNCH = Launch(tile_tokens=64, stages=2, consumer_registers=192, producer_registers=64, query_registers=64)


def scratch_types_of(shape: KernelShape) -> dict[str, Any]:
    """The type of each field of `Shared`."""
    rings = CONSUMERS * shape.launch.stages
    transforms = swizzled(shape.dtype, shape.head_dim)
    ring = plgpu.SMEM((rings, shape.launch.tile_tokens, shape.head_dim), shape.dtype, transforms=transforms)
    each = plgpu.Barrier(num_barriers=CONSUMERS)
    heads = AREA * (CONSUMERS - 1) + CONSUMER_ROWS
    return {
        "k": ring,
        "v": ring,
        "heads": plgpu.SMEM((heads, shape.head_dim), shape.dtype),
        "arrived": plgpu.SMEM((CONSUMERS,), jnp.int32),
        "raw_ready": each,
        "heads_ready": each,
        "heads_free": each,
        "ready": plgpu.Barrier(num_arrivals=2 * shape.tile_blocks, num_barriers=rings),
        "free": plgpu.Barrier(num_barriers=rings),
    }


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _attention(
    inputs: dict[str, Any],
    counters: jax.Ref,
    k_cache: jax.Ref,
    v_cache: jax.Ref,
    *,
    shape: KernelShape,
    interpret: Any,
) -> tuple[Float[Array, "B H D"], Float[Array, "rows D"], Float[Array, "rows columns"]]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""

    def kernel(
        inputs: Any, counters: Any, k_cache: Any, v_cache: Any, out: Any, parts: Any, lse: Any, scratch: Any
    ) -> None:
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        arrays = Arrays(**inputs, counters=counters, **caches, out=out, parts=parts, lse=lse)
        shared = Shared(**scratch)
        launch, warpgroup = shape.launch, lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(launch.consumer_registers, action="increase")
            consume(arrays, shared, shape, warpgroup)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(launch.producer_registers, action="decrease")
            produce(arrays, shared, shape)

        @pl.when(warpgroup == CONSUMERS + 1)
        def _() -> None:
            plgpu.set_max_registers(launch.query_registers, action="decrease")
            make_queries(arrays, shared, shape)

    rows = shape.num_pieces * shape.num_kv_heads * shape.group
    return plgpu.kernel(
        stream_copies(kernel),
        out_type=(
            jax.ShapeDtypeStruct((len(inputs["qkv"]), shape.num_kv_heads * shape.group, shape.head_dim), shape.dtype),
            jax.ShapeDtypeStruct((rows, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, TILE_COLUMNS), jnp.float32),
        ),
        scratch_types=[scratch_types_of(shape)],
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(inputs, counters, k_cache, v_cache)


def rope_paged_decode_mosaic(
    qkv: Float[Array, "B K heads D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    pieces: Int[Array, "pieces 8"],
    *,
    scale: float,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    eps: float,
    counters: jax.Ref,
    launch: Launch = LAUNCH,
    programs: int | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """As `rope_paged_decode`, for what `_mosaic_takes` allows and pieces that begin with a block.

    `interpret`: parameters of Mosaic's interpreter.
    """
    _, num_kv_heads, heads, head_dim = qkv.shape
    num_blocks, _, block_size, _ = k_cache.shape
    shape = KernelShape(
        num_pieces=len(pieces),
        num_kv_heads=num_kv_heads,
        group=heads - 2,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        table_width=block_tables.shape[1],
        scale=scale,
        eps=eps,
        dtype=qkv.dtype,
        launch=launch,
        programs=programs or current_target().multiprocessors,
        interpreted=interpret is not None,
    )
    norms = () if q_norm is None or k_norm is None else (q_norm.astype(qkv.dtype), k_norm.astype(qkv.dtype))
    inputs = {"qkv": qkv, "cos": cos, "sin": sin, "norms": norms, "tables": block_tables, "pieces": pieces}
    pages = (num_blocks * num_kv_heads, block_size, head_dim)
    results = []

    def attend(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        results.append(_attention(inputs, counters, k_cache, v_cache, shape=shape, interpret=interpret)[0])

    k_pages, v_pages = update_in_place(attend, k_cache.reshape(pages), v_cache.reshape(pages))
    return results[0], k_pages.reshape(k_cache.shape), v_pages.reshape(v_cache.shape)
