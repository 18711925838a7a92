"""The tiles of queries of a ragged batch, in the order in which persistent programs take them.

Costly ones first, so that programs end together; but tiles that read the same keys together, so that all but one find
them in the L2 cache. In order of cost alone, 16 sequences with 7,168 cached tokens each run at the rate at which
memory gives 132 programs 132 different streams of keys.

Plain XLA operations on the lengths alone. Every layer of a step has the same lengths, so XLA keeps one copy of
them for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nanovllm_kernels._mosaic import ROW_ALIGNMENT

# Of the range of costs: tiles of a sequence that are in the same one run together.
_BANDS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkList:
    """Tiles of `tile_queries` rows of q, each with rows of one sequence (or of the padding) only.

    The first `count` of W tiles are real. Of each: `row`, its first row of q, a multiple of `ROW_ALIGNMENT`
    and so perhaps before the sequence's first; `first` and `last`, the rows in it that are the sequence's,
    from `first` up to without `last`; `position` of `row` in the sequence (negative before its start); `keys`,
    how many positions its rows see, 0 for padding; `seq` and `context`, the sequence and its length.

    Each tile is computed once for each of U units of heads. `order` holds tile * U + unit of the first count * U
    in their order.
    """

    # int32 arrays, [1], [W * U] and [W]; in the kernel, references to them.
    count: Any
    order: Any
    row: Any
    first: Any
    last: Any
    position: Any
    keys: Any
    seq: Any
    context: Any


def work_list(
    context_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, "S+1"],
    *,
    num_tokens: int,
    tile_queries: int,
    units: int,
    programs: int,
) -> WorkList:
    """The tiles of all sequences and of the padding behind them, for `programs` programs that take turns.

    As many entries as the shapes allow tiles: the ragged ends and starts of at most S + 1 runs of rows.
    """
    num_seqs = context_lens.shape[0]
    runs = min(num_seqs + 1, num_tokens)
    bound = (num_tokens + runs * (tile_queries - 1 + ROW_ALIGNMENT - 1)) // tile_queries
    # The padding is one more sequence, without a context.
    begin = cu_q_lens
    end = jnp.append(cu_q_lens[1:], num_tokens).astype(jnp.int32)
    context = jnp.append(context_lens, 0).astype(jnp.int32)
    first_row = begin // ROW_ALIGNMENT * ROW_ALIGNMENT
    tiles = jnp.where(end > begin, (end - first_row + tile_queries - 1) // tile_queries, 0)
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)

    index = jnp.arange(bound, dtype=jnp.int32)
    seq = jnp.sum((tile_ends[None, :] <= index[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    seq = jnp.minimum(seq, num_seqs)
    row = first_row[seq] + (index - (tile_ends - tiles)[seq]) * tile_queries
    position = context[seq] - end[seq] + row
    keys = jnp.clip(position + tile_queries, 0, context[seq])
    keys = jnp.where(index < tile_ends[-1], keys, -1)
    return WorkList(
        count=tile_ends[-1:],
        order=_order(keys, seq, units=units, programs=programs),
        row=row,
        first=jnp.maximum(begin[seq] - row, 0),
        last=jnp.minimum(end[seq] - row, tile_queries),
        position=position,
        keys=keys,
        seq=jnp.minimum(seq, num_seqs - 1),
        context=context[seq],
    )


def _order(keys: Int[Array, " W"], seq: Int[Array, " W"], *, units: int, programs: int) -> Int[Array, " order"]:
    """The order of tiles and units of heads, of which those whose keys are below 0 come last."""
    # A run: the tiles of one sequence and one band of costs. All of one unit of heads, then all of the next.
    band = jnp.where(keys < 0, -1, -(-keys * _BANDS // jnp.maximum(jnp.max(keys), 1)))
    run = seq - band * (jnp.max(seq) + 1)
    tile = jnp.argsort(run).astype(jnp.int32)
    sorted_run = run[tile]
    start = jnp.sum(sorted_run[None, :] < sorted_run[:, None], axis=1, dtype=jnp.int32)
    length = jnp.sum(sorted_run[None, :] == sorted_run[:, None], axis=1, dtype=jnp.int32)

    index = jnp.arange(keys.shape[0] * units, dtype=jnp.int32)
    in_run = index // units
    offset = index - start[in_run] * units
    unit = offset // length[in_run]
    tile = tile[start[in_run] + offset % length[in_run]]
    # Programs take turns forwards and backwards: costliest first in each round, they end up with equal sums.
    place = index // programs * (jnp.max(keys) + 2) + jnp.max(keys) - keys[tile]
    return (tile * units + unit)[jnp.argsort(place)]
