"""How the rows of a decode step are cut into pieces that programs attend. Plain XLA."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

Plan = tuple[Int[Array, "pieces 8"], Int[Array, "cuts 3"]]  # see `plan_pieces`


def plan_pieces(context_lens: Int[Array, " B"], *, window: int, tile_tokens: int, most_pieces: int) -> Plan:
    """Cuts rows into pieces of whole tiles, at least one a row and at most `most_pieces` + B in all.

    Returns for each piece its row (-1 if there is no such piece), the context of the row, where the piece begins and
    ends, whether it is all of the row, how many of the rows before are cut, the row's first piece and their number; and
    for each row that is cut the row, its first piece and their number (0 where there are fewer such rows). Longer
    pieces come first, since what starts last should be short. Plain XLA, the same for every layer of a step, so it
    runs once.
    """
    num_rows = len(context_lens)
    first_tile = jnp.maximum(context_lens - window, 0) // tile_tokens if window else jnp.zeros_like(context_lens)
    tiles = (context_lens + tile_tokens - 1) // tile_tokens - first_tile
    longest = jnp.maximum((jnp.sum(tiles) + most_pieces - 1) // most_pieces, 1)
    counts = jnp.maximum((tiles + longest - 1) // longest, 1)
    # Sums over [B, B] and [pieces, B] are one small kernel each; sorts and cumulative sums would be several.
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    whole = counts == 1
    length = (tiles + counts - 1) // counts
    earlier = (length > length[:, None]) | ((length == length[:, None]) & (rows < rows[:, None]))
    starts = jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=jnp.int32)
    pieces = jnp.arange(num_rows + most_pieces, dtype=jnp.int32)[:, None]
    own = (pieces >= starts) & (pieces < starts + counts)
    begins = (first_tile + (pieces - starts) * length) * tile_tokens
    ends = jnp.minimum(context_lens, begins + length * tile_tokens)
    cut_before = jnp.sum(~whole & (rows < rows[:, None]), axis=1, dtype=jnp.int32)
    columns = [rows + 1, context_lens, begins, ends, whole, cut_before, starts, counts]
    values = [jnp.sum(jnp.where(own, column, 0), axis=1, dtype=jnp.int32) for column in columns]
    # A row that is cut holds more than one of `most_pieces` equal parts of all tiles, so there are fewer of them.
    cuts = jnp.arange(min(num_rows, most_pieces), dtype=jnp.int32)[:, None]
    cut = ~whole & (cuts == cut_before)
    cut_rows = [jnp.sum(jnp.where(cut, column, 0), axis=1, dtype=jnp.int32) for column in (rows, starts, counts)]
    return jnp.stack([values[0] - 1, *values[1:]], axis=1), jnp.stack(cut_rows, axis=1)
