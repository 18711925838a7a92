"""What lives on the device between steps, and the layout of what the host sends down each step.

Device state is three donated pytrees of plain arrays:

- `caches`: for each layer K and V, [N, K, block_size, D];
- `rows`: for each row slot its block table, counters and sampling parameters;
- `extras`: what only penalties, biases and bans need (made when the first such request arrives).

Row slots are 0..R-1; slot R is a dummy that padding reads and writes, so that no step needs a branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.parallel.mesh import MODEL_AXIS

# How each is split over the mesh: the cache by KV head, counts by vocabulary.
CACHE_SPEC = PartitionSpec(None, MODEL_AXIS)
EXTRAS_SPECS = {
    "counts": PartitionSpec(None, MODEL_AXIS),
    "adjust_ids": PartitionSpec(),
    "adjust_values": PartitionSpec(),
    "adjust_until": PartitionSpec(),
}

Abstract = jax.ShapeDtypeStruct
Caches = list[tuple[jax.Array, jax.Array]]
Rows = dict[str, jax.Array]
Extras = dict[str, jax.Array]


class RowInt(IntEnum):
    """Columns of `rows["ints"]` [R + 1, 6]."""

    NUM_TOKENS = 0  # tokens whose K and V are in the cache
    LAST_TOKEN = 1  # sampled, not yet in the cache
    NUM_OUTPUT = 2  # sampled so far
    TOP_K = 3
    KEY_LOW = 4
    KEY_HIGH = 5


class RowFloat(IntEnum):
    """Columns of `rows["floats"]` [R + 1, 6]."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5


@dataclass(frozen=True)
class StateShape:
    """Sizes that fix every device array's shape."""

    num_blocks: int  # N
    block_size: int
    max_num_seqs: int  # R
    max_model_len: int
    max_adjustments: int = 512  # biases and bans a row

    @property
    def blocks_per_row(self) -> int:
        """P, entries of a row's block table."""
        return -(-self.max_model_len // self.block_size)


def cache_shape(config: ModelConfig, shape: StateShape) -> tuple[int, int, int, int]:
    """Shape of one layer's K (or V) cache: [N, K, block_size, D]."""
    return shape.num_blocks, config.num_kv_heads, shape.block_size, config.head_dim


def block_bytes(config: ModelConfig, block_size: int, dtype: DTypeLike) -> int:
    """Bytes of one block over all layers, K and V."""
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return token * block_size


def abstract_caches(
    config: ModelConfig, shape: StateShape, dtype: DTypeLike, mesh: Mesh, *, as_bytes: bool
) -> list[tuple[Abstract, Abstract]]:
    """Shapes, dtypes and shardings of the cache; float8 is kept `as_bytes` where XLA runs attention."""
    if as_bytes and dtype == jnp.float8_e4m3fn:
        dtype = jnp.uint8
    array = jax.ShapeDtypeStruct(cache_shape(config, shape), dtype, sharding=NamedSharding(mesh, CACHE_SPEC))
    return [(array, array) for _ in range(config.num_layers)]


def abstract_rows(shape: StateShape, mesh: Mesh) -> dict[str, Abstract]:
    """Shapes and dtypes of the row slots, which every device holds."""
    slots, sharding = shape.max_num_seqs + 1, NamedSharding(mesh, PartitionSpec())
    return {
        "block_tables": jax.ShapeDtypeStruct((slots, shape.blocks_per_row), jnp.int32, sharding=sharding),
        "ints": jax.ShapeDtypeStruct((slots, len(RowInt)), jnp.int32, sharding=sharding),
        "floats": jax.ShapeDtypeStruct((slots, len(RowFloat)), jnp.float32, sharding=sharding),
    }


def slots_of(rows: Rows, row: Int[Array, " B"]) -> Int[Array, " B"]:
    """The slots of rows; of padding, which is negative, the dummy's."""
    return jnp.where(row >= 0, row, rows["ints"].shape[0] - 1)


def abstract_extras(config: ModelConfig, shape: StateShape, mesh: Mesh) -> dict[str, Abstract]:
    """Shapes, dtypes and shardings of the sampler's rarely used state."""
    slots, adjustments = shape.max_num_seqs + 1, shape.max_adjustments
    arrays = {
        "counts": ((shape.max_num_seqs, config.vocab_size), jnp.uint16),
        "adjust_ids": ((slots, adjustments), jnp.int32),
        "adjust_values": ((slots, adjustments), jnp.float32),
        "adjust_until": ((slots, adjustments), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, EXTRAS_SPECS[name]))
        for name, (size, dtype) in arrays.items()
    }


def device_bytes(tree: object) -> int:
    """Bytes that one device holds of all arrays (or abstract arrays) of a pytree."""

    def held(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(held, jax.tree.leaves(tree)))


@dataclass(frozen=True)
class PrefillDelta:
    """The host's side of a prefill or mixed step, packed into one int32 array of length T + 4 S + 1.

    tokens [T]: ids, or -1 for a row's last sampled token, which the device knows and the host may not yet.
    cu_q_lens [S + 1]; rows [S]: row slots (-1 unused); starts [S]: position of each sequence's first token;
    samples [S]: 1 where the step reaches the sequence's last known token, so that a token is drawn.
    """

    num_tokens: int  # T, the bucket
    num_sequences: int  # S

    @property
    def length(self) -> int:
        """Elements of the packed array."""
        return self.num_tokens + 4 * self.num_sequences + 1

    def pack(
        self,
        tokens: Sequence[int] | np.ndarray,
        q_lens: Sequence[int],
        rows: Sequence[int],
        starts: Sequence[int],
        samples: Sequence[bool],
    ) -> np.ndarray:
        """One int32 array; unused tokens are 0, unused sequences have row -1 and length 0."""
        T, S, count = self.num_tokens, self.num_sequences, len(rows)
        packed = np.zeros(self.length, np.int32)
        packed[: len(tokens)] = tokens
        cu_q_lens = packed[T : T + S + 1]
        cu_q_lens[1 : count + 1] = np.cumsum(q_lens)
        cu_q_lens[count + 1 :] = cu_q_lens[count]
        slots, first, draws = packed[T + S + 1 :].reshape(3, S)
        slots[:count], slots[count:] = rows, -1
        first[:count] = starts
        draws[:count] = samples
        return packed

    def unpack(self, packed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """(tokens [T], cu_q_lens [S + 1], rows [S], starts [S], samples [S])."""
        T, S = self.num_tokens, self.num_sequences
        rows, starts, samples = packed[T + S + 1 :].reshape(3, S)
        return packed[:T], packed[T : T + S + 1], rows, starts, samples
