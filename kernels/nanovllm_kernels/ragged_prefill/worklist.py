"""The tiles of queries of a ragged batch, costliest first: what a persistent kernel walks through.

Plain XLA operations on the lengths alone. Every layer of a step has the same lengths, so XLA keeps one copy of
them for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Rows of a tile start at a multiple of this, the rows of a swizzled tile in shared memory: TMA moves whole ones.
ROW_ALIGNMENT = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkList:
    """Tiles of `tile_queries` rows of q, each with rows of one sequence (or of the padding) only.

    The first `count` of W tiles are real, in runs: tiles of one sequence that cost about the same. Of each:
    `run` and `run_tiles`, where its run starts and how many tiles it has; `row`, its first row of q, a multiple of `ROW_ALIGNMENT`
    and so perhaps before the sequence's first; `first` and `last`, the rows in it that are the sequence's,
    from `first` up to without `last`; `position` of `row` in the sequence (negative before its start); `keys`,
    how many positions its rows see, 0 for padding; `seq` and `context`, the sequence and its length.
    """

    # int32 arrays, [1] and [W]; in the kernel, references to them.
    count: Any
    run: Any
    run_tiles: Any
    row: Any
    first: Any
    last: Any
    position: Any
    keys: Any
    seq: Any
    context: Any


def work_list(
    context_lens: Int[Array, " S"], cu_q_lens: Int[Array, "S+1"], *, num_tokens: int, tile_queries: int, bands: int = 4
) -> WorkList:
    """The tiles of all sequences and of the padding behind them, by the keys they see, most first.

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
    band = -(-keys * bands // jnp.maximum(jnp.max(keys), 1))
    run_of = jnp.where(index < tile_ends[-1], seq - (num_seqs + 1) * band, num_seqs + 1)
    order = jnp.lexsort((-keys, run_of))
    sorted_run = run_of[order]
    same, before = sorted_run[None, :] == sorted_run[:, None], sorted_run[None, :] < sorted_run[:, None]
    return WorkList(
        count=tile_ends[-1:],
        run=jnp.sum(before, axis=1, dtype=jnp.int32),
        run_tiles=jnp.sum(same, axis=1, dtype=jnp.int32),
        row=row[order],
        first=jnp.maximum(begin[seq] - row, 0)[order],
        last=jnp.minimum(end[seq] - row, tile_queries)[order],
        position=position[order],
        keys=keys[order],
        seq=jnp.minimum(seq, num_seqs - 1)[order],
        context=context[seq][order],
    )
