"""Pallas Mosaic GPU implementation for sm_90: launch of the persistent kernel in `mosaic_device.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target
from nanovllm_kernels._mosaic import (
    CONSUMER_ROWS,
    CONSUMERS,
    ROW_ALIGNMENT,
    Registers,
    Roles,
    swizzled,
    warpgroup_kernel,
)
from nanovllm_kernels.ragged_prefill.mosaic_consumer import consume
from nanovllm_kernels.ragged_prefill.mosaic_device import KernelShape, Launch, Shared
from nanovllm_kernels.ragged_prefill.mosaic_producer import produce
from nanovllm_kernels.ragged_prefill.worklist import WorkList, work_list


def launch_parameters(*, head_dim: int) -> Launch:
    """Measured on an H200 at D=128, reasoned at 64.

    At D=128, two stages of 128 tokens are what shared memory holds beside queries and outputs. With these registers
    ptxas spills nothing; 224 and 56, or 232 and 40, are within 0.5% on every case.
    """
    return Launch(tile_tokens=128, stages=2 if head_dim > 64 else 4, registers=Registers(216, 72))


def scratch_types_of(shape: KernelShape) -> dict[str, Any]:
    """The type of each field of `Shared`."""
    stages, tile_tokens, head_dim = shape.launch.stages, shape.launch.tile_tokens, shape.head_dim
    transforms = swizzled(shape.dtype, head_dim)
    rows = (CONSUMERS, CONSUMER_ROWS, head_dim)
    ring = plgpu.SMEM((stages, tile_tokens, head_dim), shape.dtype, transforms=transforms)
    return {
        "q": plgpu.SMEM(rows, shape.dtype, transforms=transforms),
        "k": ring,
        "v": ring,
        "outs": plgpu.RefUnion(plgpu.SMEM(rows, shape.dtype, transforms=transforms), plgpu.SMEM(rows, shape.dtype)),
        "q_ready": plgpu.Barrier(num_arrivals=CONSUMERS),
        "q_free": plgpu.Barrier(num_arrivals=CONSUMERS),
        "k_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "tail_ready": plgpu.Barrier(num_arrivals=shape.tile_blocks),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _attention(
    work: WorkList,
    tables: Int[Array, "S P"],
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "pages block_size D"],
    v_pages: Float[Array, "pages block_size D"],
    *,
    shape: KernelShape,
    interpret: Any,
) -> Float[Array, "T H D"]:
    """The kernel; a jitted function of its own, so that the layers of a model lower it once."""

    def program(work: Any, tables: Any, q: Any, k_pages: Any, v_pages: Any, out: Any, scratch: Any) -> Roles:
        out_tiles, out_rows = scratch.pop("outs")
        shared = Shared(out=out_tiles, out_rows=out_rows, **scratch)
        return (
            lambda consumer: consume(work, out, shared, shape, consumer),
            lambda: produce(work, tables, q, k_pages, v_pages, shared, shape),
        )

    return warpgroup_kernel(
        program,
        registers=shape.launch.registers,
        scratch_types=scratch_types_of(shape),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid={"program": shape.programs},
        interpret=interpret,
    )(work, tables, q, k_pages, v_pages)


def ragged_prefill_mosaic(
    q: Float[Array, "T H D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    context_lens: Int[Array, " S"],
    *,
    scale: float,
    interpret: Any = None,
) -> Float[Array, "T H D"]:
    """As `ragged_prefill`, for what `mosaic_supports` allows; `interpret`: parameters of Mosaic's interpreter."""
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    shape = KernelShape(
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        table_width=block_tables.shape[1],
        scale=scale,
        dtype=q.dtype,
        launch=launch_parameters(head_dim=head_dim),
        programs=current_target().multiprocessors,
        interpreted=interpret is not None,
    )
    # TMA moves whole groups of rows. The rows added are padding like any other.
    num_rows = max(num_tokens + -num_tokens % ROW_ALIGNMENT, CONSUMER_ROWS)
    padded_q = jnp.pad(q, ((0, num_rows - num_tokens), (0, 0), (0, 0)))
    work = work_list(
        context_lens,
        cu_q_lens,
        num_tokens=num_rows,
        tile_queries=shape.tile_queries,
        units=shape.units,
        programs=shape.programs,
    )
    pages = (num_blocks * num_kv_heads, block_size, head_dim)
    out = _attention(
        work, block_tables, padded_q, k_cache.reshape(pages), v_cache.reshape(pages), shape=shape, interpret=interpret
    )
    return out[:num_tokens]
