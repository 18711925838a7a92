"""Sums and maxima over the shards of a model; with one shard (`axis_name` None) they change nothing.

What decode steps add is small, and NCCL takes longer to begin than the data to arrive. GPUs that reach each other's
memory therefore add it with a kernel of our own, through buffers that are made once; their addresses are a parameter
of the model, so that programs stay pure functions and can be kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from nanovllm_jax.errors import DeviceError
from nanovllm_jax.models.params import Params
from nanovllm_jax.parallel.mesh import MODEL_AXIS
from nanovllm_kernels import add_shards
from nanovllm_kernels.add_shards import parts_of_row
from nanovllm_kernels.add_shards.exchange import (
    Exchange,
    abstract_exchange,
    make_exchange,
    programs_that_failed,
    reach_each_other,
    shards_of,
)
from nanovllm_kernels.sample import vocab
from nanovllm_kernels.sample.vocab import max_shards

__all__ = [
    "can_exchange",
    "check_exchange",
    "exchange_params",
    "max_shards",
    "parts_passed_on",
    "sum_shards",
    "table_of",
]

EXCHANGE = "exchange"
_SHARDS = (2, 4, 8)  # the kernel's tiles are powers of two


def sum_shards(
    value: Array,
    axis_name: str | None,
    *,
    residual: Array | None = None,
    table: Int[Array, "*mesh entries"] | None = None,
) -> Array:
    """The sum over the shards, plus `residual`; with a `table` small 16-bit sums are one kernel (see `add_shards`)."""
    if table is not None and axis_name is not None:
        return add_shards(value, residual, axis_name=axis_name, table=table, backend="triton")
    total = vocab.sum_shards(value, axis_name)
    return total if residual is None else residual + total


def parts_passed_on(x: Float[Array, "T E"], table: Int[Array, "*mesh entries"] | None) -> int | None:
    """In how many parts `add_shards_scaled` passes on the sums of squares of such rows; None where it does not."""
    return None if table is None or x.dtype != jnp.bfloat16 else parts_of_row(x, shards_of(table))


def can_exchange(mesh: Mesh) -> bool:
    """Whether the devices are GPUs that reach each other's memory."""
    devices = list(mesh.devices.flat)
    return len(devices) > 1 and devices[0].platform == "gpu" and reach_each_other(devices)


def exchange_params(mesh: Mesh, *, exchanged: bool, abstract: bool = False) -> Params:
    """What the weights of a split model have beside them: buffers for its sums, or nothing where XLA adds.

    Args:
        mesh: of this process's devices.
        exchanged: `can_exchange`, or the same of GPUs that need not be there.
        abstract: shapes, dtypes and shardings instead of arrays.
    """
    if not exchanged or mesh.shape[MODEL_AXIS] not in _SHARDS:
        return {}
    return {EXCHANGE: abstract_exchange(mesh, MODEL_AXIS) if abstract else make_exchange(mesh, MODEL_AXIS)}


def table_of(params: Params) -> Int[Array, "*mesh entries"] | None:
    """Where a device finds the buffers, for `sum_shards`."""
    exchange: Exchange | None = params.get(EXCHANGE)
    return None if exchange is None else exchange.table


def check_exchange(params: Params) -> None:
    """Waits for the devices, and finds out whether a shard has waited in vain for another.

    Raises:
        DeviceError: if one has, which makes all sums NaN from there on.
    """
    if (exchange := params.get(EXCHANGE)) is not None and (failed := programs_that_failed(exchange)):
        raise DeviceError(
            f"A GPU waited in vain for parts of {failed} sums that its peers add to: the GPUs of this machine do not "
            f"run side by side ({jax.local_devices()}). Free them of other work, or set tensor_parallel_size to 1."
        )
