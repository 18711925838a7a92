"""The buffers through which shards on one machine exchange parts of a sum, and the table that says where they are.

GPUs of one process have one address space, in which XLA lets each of them reach the memory of the others: a kernel
needs no more than addresses. The buffers are JAX arrays, which must live as long as anything uses the table.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Words are of 32 bits, two elements. Programs of a sum are few, one for each multiprocessor, until they are large.
SLOT_WORDS, MAX_PROGRAMS, FEW_PROGRAMS = 1024, 512, 128
EMPTY = -1  # a word of which both halves are NaN of a kind that no GPU computes
TIMED_OUT = -1  # instead of a program's parity


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exchange:
    """Buffers of every device of a mesh, and for each of them a table of those that it adds with.

    `table` is int32 [*mesh, 1 + 2 * shards], split over all axes of the mesh: on each device its rank, then the low
    and the high half of the address of each buffer, its own first and then those of the shards after it. `buffers` is
    int32 [*mesh, words], split likewise: two sets of slots (of each shard, for each program), then the parity of each
    program.
    """

    table: Any
    buffers: Any


def reach_each_other(devices: Sequence[Any]) -> bool:
    """Whether these GPUs (`jax.Device`s) can write to one another's memory, and XLA allocates it so that they may."""
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() not in ("default", "bfc", "platform"):
        return False  # memory of CUDA's own pools is not mapped for peers
    cuda, possible = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    for one, other in itertools.permutations(devices, 2):
        status = cuda.cuDeviceCanAccessPeer(ctypes.byref(possible), one.local_hardware_id, other.local_hardware_id)
        if status or not possible.value:
            return False
    return True


@dataclass(frozen=True)
class SumPlan:
    """How a sum is cut into programs: `quads` of eight elements for each, one for each of its threads."""

    programs: int
    quads: int

    @property
    def elements(self) -> int:
        """Of a program."""
        return 8 * self.quads


def plan_of(shape: Sequence[int], shards: int) -> SumPlan | None:
    """How arrays of 16-bit elements are added, or None where that is left to XLA.

    Programs should not go past the end of a row, be few, and small, in this order. Over two shards 256 rows of 4096
    take 8.5 us on H200s; over more, each of which sends its part to all others, 1 MB is the most that was measured.
    """
    elements = math.prod(shape)
    plans = [SumPlan(elements // (8 * quads), quads) for quads in (64, 128, 256)]
    plans = [plan for plan in plans if 0 < plan.programs <= MAX_PROGRAMS and elements % plan.elements == 0]
    if elements > (1 << 20 if shards == 2 else 1 << 19):
        return None

    def preference(plan: SumPlan) -> tuple[int, ...]:
        return shape[-1] % plan.elements > 0, max(plan.programs, FEW_PROGRAMS), plan.quads

    return min(plans, key=preference, default=None)


def shards_of(table: jax.Array) -> int:
    """How many shards a device's part of `Exchange.table` speaks of."""
    return (table.shape[-1] - 1) // 2


def buffer_words(shards: int) -> int:
    """32-bit words of one device's buffer."""
    return 2 * shards * MAX_PROGRAMS * SLOT_WORDS + MAX_PROGRAMS


def abstract_exchange(mesh: Mesh, axis_name: str) -> Exchange:
    """Shapes, dtypes and shardings of `make_exchange`."""
    shards, everything = mesh.shape[axis_name], NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    sizes = (1 + 2 * shards, buffer_words(shards))
    return Exchange(
        *(jax.ShapeDtypeStruct((*mesh.devices.shape, size), jnp.int32, sharding=everything) for size in sizes)
    )


def make_exchange(mesh: Mesh, axis_name: str) -> Exchange:
    """Buffers for `add_shards` over `axis_name` of a mesh of this process's devices."""
    everything = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    words = buffer_words(mesh.shape[axis_name])

    def emptied() -> jax.Array:
        parities = jnp.arange(words) >= words - MAX_PROGRAMS
        return jnp.broadcast_to(jnp.where(parities, 0, EMPTY).astype(jnp.int32), (*mesh.devices.shape, words))

    buffers = jax.block_until_ready(jax.jit(emptied, out_shardings=everything)())
    pointers = {shard.device: shard.data.unsafe_buffer_pointer() for shard in buffers.addressable_shards}
    addresses = np.vectorize(pointers.__getitem__, otypes=[np.uint64])(mesh.devices)
    axis = mesh.axis_names.index(axis_name)
    tables = np.apply_along_axis(address_tables, axis, addresses)  # the table's entries come after `axis`
    return Exchange(jax.device_put(np.moveaxis(tables, axis + 1, -1), everything), buffers)


def address_tables(addresses: np.ndarray) -> np.ndarray:
    """The table of each shard, int32 [shards, 1 + 2 * shards], of their buffers' addresses, uint64 [shards]."""
    halves = [np.roll(addresses, -rank).view(np.int32) for rank in range(len(addresses))]
    return np.concatenate([np.arange(len(addresses), dtype=np.int32)[:, None], np.stack(halves)], axis=1)


def programs_that_failed(exchange: Exchange) -> int:
    """How many programs, of all devices, have waited in vain for a part and add no more; waits for the devices."""
    parities = exchange.buffers[..., -MAX_PROGRAMS:]
    return int(np.sum(np.asarray(parities) == TIMED_OUT))
