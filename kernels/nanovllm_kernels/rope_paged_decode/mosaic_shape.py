"""What the parts of the Mosaic kernel share: its shape, its shared memory, and which pieces are whose.

A persistent kernel, one program a multiprocessor, of four warpgroups. A producer copies keys and values page by page
with TMA into rings that hold several tiles. Two consumers attend a piece each, with a ring of their own. Another
warpgroup makes the queries of each consumer's next piece while it attends this one: behind all the tiles that are in
flight small loads take microseconds, and a consumer that made its queries itself stood still for 4 µs a piece.

Refs and scalars of a kernel have no Python type that says more than Any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels._mosaic import CONSUMERS

_REGISTERS = (CONSUMERS + 2) * 128  # a thread of each warpgroup
TILE_COLUMNS = 8  # of wgmma's layout, two a thread; as many copies of a log-sum-exp are stored
AREA = 8  # rows of a piece's queries, newest key and newest value, and what lies between two such


@dataclass(frozen=True)
class Launch:
    """Launch parameters: tokens of a tile, tiles in flight a consumer, registers a thread.

    Raises:
        ValueError: if the warpgroups together want more registers than there are; the kernel would wait for them for
            ever.
    """

    tile_tokens: int
    stages: int
    consumer_registers: int
    producer_registers: int
    query_registers: int

    def __post_init__(self) -> None:
        wanted = CONSUMERS * self.consumer_registers + self.producer_registers + self.query_registers
        if wanted > _REGISTERS:
            raise ValueError(f"the warpgroups want {wanted} registers a thread of {_REGISTERS}; lower one of them.")


@dataclass(frozen=True)
class KernelShape:
    """What the kernel is compiled for. `scale` and `eps` as in `rope_paged_decode`."""

    num_pieces: int
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    table_width: int
    scale: float
    eps: float
    dtype: Any
    launch: Launch
    programs: int
    interpreted: bool

    @property
    def tile_blocks(self) -> int:
        return self.launch.tile_tokens // self.block_size


@dataclass(frozen=True)
class Arrays:
    """References to the arrays of a launch; rows of `parts` and `lse` are [pieces, K, G]."""

    qkv: Any  # [B, K, G + 2, D]
    cos: Any  # float32 [B, D / 2]
    sin: Any
    norms: tuple[Any, ...]  # of queries and of keys, [D] each; or none
    tables: Any  # int32 [B, P]
    pieces: Any  # int32 [pieces, 8], see `plan_pieces`
    counters: Any  # int32, a word for each row that may be cut and KV head; zero before and after
    k_cache: Any  # [N * K, block_size, D]
    v_cache: Any
    out: Any  # [B, H, D]
    parts: Any  # float32 [pieces * K * G, D]
    lse: Any  # float32 [pieces * K * G, 8]: copies of log2 of the sum of exp2(scores)


@dataclass(frozen=True)
class Shared:
    """Shared memory and barriers of a program; each by consumer, then by stage."""

    k: Any  # [consumers * stages, tile_tokens, D]
    v: Any
    heads: Any  # [consumers * 8 + 56, D]: queries, key and value of a piece; who reads queries reads 64 rows
    arrived: Any  # int32 [consumers]
    raw_ready: Any
    heads_ready: Any
    heads_free: Any
    ready: Any
    free: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Piece:
    """Scalars of one piece of a row, for one KV head; see `plan_pieces`."""

    ordinal: Any
    row: Any
    head: Any
    context: Any
    begin: Any
    end: Any
    whole: Any
    cuts_before: Any
    first: Any
    count: Any

    @property
    def has_newest(self) -> Any:
        """Whether the newest token is this piece's."""
        return (self.end == self.context) & (self.context > 0)

    @property
    def keys(self) -> Any:
        """Keys that are read from the cache, from `begin` on."""
        return jnp.maximum(jnp.minimum(self.end, self.context - 1) - self.begin, 0)

    def tiles(self, shape: KernelShape) -> Any:
        """At least one: the consumer's last tile is not one of its loop."""
        return jnp.maximum(lax.div(self.keys + shape.launch.tile_tokens - 1, shape.launch.tile_tokens), 1)


def page_of(arrays: Arrays, piece: Piece, column: Any, shape: KernelShape) -> Any:
    """Where the block of that column of the row's table lies, for the piece's KV head."""
    return arrays.tables[piece.row, column] * shape.num_kv_heads + piece.head


def _index_of(ordinal: Any, consumer: Any, shape: KernelShape) -> Any:
    """Consumers take pieces in turn, forwards then backwards, so that longest first also means evenly."""
    first, stride = consumer * shape.programs + lax.axis_index("program"), CONSUMERS * shape.programs
    return ordinal * stride + jnp.where(lax.rem(ordinal, 2) == 0, first, stride - 1 - first)


def rounds_of(arrays: Arrays, consumer: Any, shape: KernelShape) -> Any:
    """How many pieces that consumer of this program has.

    Pieces that there are not come last. All are looked up at once here, not each in its turn.
    """
    total, rounds = shape.num_pieces * shape.num_kv_heads, jnp.int32(0)
    for ordinal in range(ceil_div(total, CONSUMERS * shape.programs)):
        index = _index_of(jnp.int32(ordinal), consumer, shape)
        row = arrays.pieces[lax.div(jnp.minimum(index, total - 1), shape.num_kv_heads), 0]
        rounds += ((index < total) & (row >= 0)).astype(jnp.int32)
    return rounds


def piece_at(arrays: Arrays, ordinal: Any, consumer: Any, shape: KernelShape) -> Piece:
    """The piece that consumer takes in that round; any where it takes none."""
    index = jnp.minimum(_index_of(ordinal, consumer, shape), shape.num_pieces * shape.num_kv_heads - 1)
    place = lax.div(index, shape.num_kv_heads)
    row, *values = [arrays.pieces[place, column] for column in range(8)]
    return Piece(place, row, lax.rem(index, shape.num_kv_heads), *values)


def for_each_piece(
    arrays: Arrays, consumer: Any, shape: KernelShape, visit: Callable[[Piece, Any], Any], carry: Any
) -> Any:
    """`visit(piece, carry) -> carry` for the pieces of that consumer of this program.

    The scalars of the next piece are loaded before a piece is worked on, which hides their latency.
    """

    def turn(ordinal: Any, carry: Any) -> Any:
        piece, carry = carry
        following = piece_at(arrays, ordinal + 1, consumer, shape)
        return following, visit(piece, carry)

    first = piece_at(arrays, jnp.int32(0), consumer, shape)
    return lax.fori_loop(0, rounds_of(arrays, consumer, shape), turn, (first, carry))[1]
