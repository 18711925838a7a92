"""What the Pallas Mosaic GPU kernels share: programs of three warpgroups, of which two multiply and one fetches.

Pallas is imported where it is needed: it takes over a second, and launch parameters are read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._streaming import stream_copies

CONSUMERS, CONSUMER_ROWS = 2, 64  # warpgroups that multiply, and rows of each: the M of wgmma
ROW_ALIGNMENT = 8  # rows that TMA moves together under swizzle
LOG2_E = math.log2(math.e)
# A program of three warpgroups starts with 168 registers a thread and can only shift them between warpgroups.
_REGISTERS = (CONSUMERS + 1) * 168


@dataclass(frozen=True)
class Registers:
    """Registers a thread of the two kinds of warpgroups.

    Raises:
        ValueError: if the warpgroups together want more registers than there are; the kernel would wait for
            them for ever.
    """

    consumer: int
    producer: int

    def __post_init__(self) -> None:
        wanted = CONSUMERS * self.consumer + self.producer
        if wanted > _REGISTERS:
            raise ValueError(
                f"{CONSUMERS} consumers of {self.consumer} registers and a producer of {self.producer} want {wanted} "
                f"of {_REGISTERS}; lower one of them."
            )


def swizzled(dtype: Any, width: int) -> tuple[Any, ...]:
    """Transforms of a tile in shared memory whose rows are `width` elements: the widest swizzle that divides them.

    wgmma reads tiles of 8 rows by the bytes of the swizzle, at most 128.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    itemsize = jnp.dtype(dtype).itemsize
    num_bytes = math.gcd(width * itemsize, 128)
    return (plgpu.TilingTransform((8, num_bytes // itemsize)), plgpu.SwizzleTransform(num_bytes))  # pyright: ignore[reportAbstractUsage]


def weigh(acc: Any, maximum: Any, total: Any, scores: Any, scale: float) -> tuple[tuple[Any, Any, Any], Any]:
    """A tile's part of an online softmax: weighted values, maximum of log2 and sum of the weights; the tile's weights.

    The values weighted so far are scaled for them, but theirs are still to be added. Scores are scaled to powers of 2
    in the same multiply-add that subtracts the maximum.
    """
    factor = scale * LOG2_E
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1) * factor)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    total = total * decay + jnp.sum(weights, axis=1)
    return (acc, new_maximum, total), weights


Roles = tuple[Callable[[Any], None], Callable[[], None]]  # what each consumer does, by its index, and the producer


def warpgroup_kernel(
    program: Callable[..., Roles],
    *,
    registers: Registers,
    scratch_types: dict[str, Any],
    out_type: Any,
    grid: dict[str, int],
    interpret: Any,
    cluster: dict[str, int] | None = None,
    streams: bool = False,
) -> Callable[..., Any]:
    """A function of arrays that launches `program` over `grid`, whose axes are named.

    `program` takes references to the arrays, the output and the scratch. Warpgroups touch shared memory between
    explicit barriers and commits only: a barrier before every copy would cost `ragged_prefill`'s producer 16 a tile.
    `cluster`: another axis, whose programs run at the same time and reach each other's shared memory.
    `streams`: whether L2 gives up first what the kernel copies, and so keeps what others read again.
    `interpret`: parameters of Mosaic's interpreter.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def kernel(*refs: Any) -> None:
        consume, produce = program(*refs)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(registers.consumer, action="increase")
            consume(warpgroup)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(registers.producer, action="decrease")
            produce()

    return plgpu.kernel(
        stream_copies(kernel) if streams else kernel,
        out_type=out_type,
        scratch_types=[scratch_types],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or {}),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
