"""The buffers through which shards on one machine exchange parts of a sum, and the table that says where they are.

GPUs of one process have one address space, in which XLA lets each of them reach the memory of the others: a kernel
needs no more than addresses. The buffers are JAX arrays, which must live as long as anything uses the table.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Words are of 32 bits, two elements. A program adds at least MIN_WORDS and at most SLOT_WORDS, all programs 1 MB.
MIN_WORDS, SLOT_WORDS, MAX_PROGRAMS = 256, 2048, 128
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


def words_per_program(num_words: int) -> int | None:
    """How many words each program adds, or None where no number of programs fits.

    As few as `MAX_PROGRAMS` allow: about one program for each multiprocessor.
    """
    words = MIN_WORDS
    while num_words > words * MAX_PROGRAMS:
        words *= 2
    return words if words <= SLOT_WORDS and num_words > 0 and num_words % words == 0 else None


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
