"""Device code of the Mosaic implementation: a persistent FlashAttention-3 over paged K and V.

Three warpgroups a program. The producer copies a tile of queries and then K and V, page by page with TMA, into a
ring of stages in shared memory. Two consumers, 64 rows each, share every tile of K and V: they are two query heads
of one KV head, or, where the group is odd, two neighbouring tiles of one head. While one does its softmax the other
has the tensor cores (Shah et al., FlashAttention-3, arXiv:2407.08608, section 3.1). One program a multiprocessor
walks through the work list, so that the producer fetches the next tile while the consumers finish this one.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, Registers


@dataclass(frozen=True)
class Launch:
    """Launch parameters: tokens of a tile of K and V, tiles of each in flight, registers a thread."""

    tile_tokens: int
    stages: int
    registers: Registers


@dataclass(frozen=True)
class KernelShape:
    """What the kernel is compiled for."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    table_width: int
    scale: float
    dtype: Any
    launch: Launch
    programs: int
    interpreted: bool

    @property
    def heads_a_program(self) -> int:
        """2: the consumers take two heads and the same queries. 1: one head and neighbouring queries."""
        return 2 if self.group % 2 == 0 else 1

    @property
    def units(self) -> int:
        """Programs' worth of heads a tile of queries."""
        return self.num_kv_heads * self.group // self.heads_a_program

    @property
    def tile_queries(self) -> int:
        return CONSUMER_ROWS * CONSUMERS // self.heads_a_program

    @property
    def tile_blocks(self) -> int:
        return self.launch.tile_tokens // self.block_size


@dataclass(frozen=True)
class Shared:
    """Shared memory and barriers of a program."""

    q: Any  # [consumers, 64, D]
    k: Any  # [stages, tile_tokens, D]
    v: Any
    out: Any  # [consumers, 64, D], swizzled: whole tiles
    out_rows: Any  # the same, row by row: tiles at the ends of a sequence
    q_ready: Any
    q_free: Any
    k_ready: Any  # [stages] each
    k_free: Any
    v_ready: Any
    v_free: Any
    tail_ready: Any
    turn: Any  # whose turn on the tensor cores it is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tile:
    """Scalars of one tile of queries and one unit of heads; see `WorkList`."""

    row: Any
    first: Any
    last: Any
    position: Any
    keys: Any
    seq: Any
    context: Any
    unit: Any


def for_each_tile(work: Any, shape: KernelShape, visit: Callable[[Tile, Any], Any]) -> Any:
    """Calls `visit(tile, step) -> step` for this program's tiles; `step` counts tiles of K and V, returned at the end.

    Programs take tiles in turn, forwards then backwards, so that costliest first also means evenly. The scalars
    of the next tile are loaded before a tile is worked on, which hides their latency.
    """
    programs = shape.programs
    program = lax.axis_index("program")
    total = work.count[0] * shape.units

    def index_of(ordinal: Any) -> Any:
        forwards = lax.rem(ordinal, 2) == 0
        return ordinal * programs + lax.select(forwards, program, programs - 1 - program)

    def load(ordinal: Any) -> Tile:
        index = jnp.minimum(index_of(ordinal), total - 1)
        place = work.order[index]
        entry, unit = lax.div(place, shape.units), lax.rem(place, shape.units)
        names = ("row", "first", "last", "position", "keys", "seq", "context")
        return Tile(**{name: getattr(work, name)[entry] for name in names}, unit=unit)

    def step(ordinal: Any, carry: Any) -> Any:
        tile, steps = carry
        following = load(ordinal + 1)
        return following, visit(tile, steps)

    rounds = lax.div(total, programs)
    tiles = rounds + (index_of(rounds) < total).astype(jnp.int32)
    _, steps = lax.fori_loop(0, tiles, step, (load(jnp.int32(0)), jnp.int32(0)))
    return steps


def head_and_row(tile: Tile, consumer: Any, shape: KernelShape) -> tuple[Any, Any]:
    """Query head of a consumer, and its first row in the tile."""
    if shape.heads_a_program == CONSUMERS:
        return tile.unit * CONSUMERS + consumer, jnp.int32(0)
    return tile.unit, consumer * CONSUMER_ROWS


def kv_tiles(tile: Tile, shape: KernelShape) -> Any:
    return lax.div(tile.keys + (shape.launch.tile_tokens - 1), shape.launch.tile_tokens)
