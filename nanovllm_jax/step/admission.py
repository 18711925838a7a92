"""Small updates of the row slots that go down before a step: admitted rows and new block table entries.

One compiled program of fixed size; more than fits goes down in several calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nanovllm_jax.step.state import RowFloat, RowInt, Rows

ADMISSIONS = 128  # rows a call
ENTRIES = 4096  # block table entries a call: those of a step of 16,384 tokens that shares much of its blocks
_ADMISSION_WIDTH = 1 + len(RowInt) + len(RowFloat)
UPDATE_LENGTH = ADMISSIONS * _ADMISSION_WIDTH + ENTRIES * 3

Admission = tuple[int, Sequence[int], Sequence[float]]  # row, RowInt values modulo 2**32, RowFloat values
TableSpan = tuple[int, int, Sequence[int]]  # row, first column, blocks


def pack_updates(admissions: Sequence[Admission], spans: Sequence[TableSpan]) -> list[np.ndarray]:
    """The packed int32 arrays, [UPDATE_LENGTH] each, that carry all admissions and table entries."""
    admitted, entries = _pack_admissions(admissions), _pack_entries(spans)
    calls = max(-(-len(admitted) // ADMISSIONS), -(-len(entries) // ENTRIES))
    packed = np.full((calls, UPDATE_LENGTH), -1, np.int32)
    split = ADMISSIONS * _ADMISSION_WIDTH
    for call, array in enumerate(packed):
        some = admitted[call * ADMISSIONS : (call + 1) * ADMISSIONS].ravel()
        array[: len(some)] = some
        part = entries[call * ENTRIES : (call + 1) * ENTRIES].ravel()
        array[split : split + len(part)] = part
    return list(packed)


def _pack_admissions(admissions: Sequence[Admission]) -> np.ndarray:
    """[admissions, _ADMISSION_WIDTH] int32: row, RowInt values, bits of the RowFloat values."""
    packed = np.empty((len(admissions), _ADMISSION_WIDTH), np.int32)
    if admissions:
        rows, ints, floats = zip(*admissions, strict=True)
        packed[:, 0] = rows
        packed[:, 1 : 1 + len(RowInt)] = np.array(ints, np.int64).astype(np.int32)  # keys are unsigned: they wrap
        packed[:, 1 + len(RowInt) :] = np.array(floats, np.float32).view(np.int32)
    return packed


def _pack_entries(spans: Sequence[TableSpan]) -> np.ndarray:
    """[entries, 3] int32: row, column, block."""
    if not spans:
        return np.empty((0, 3), np.int32)
    rows, columns, blocks = zip(*spans, strict=True)
    counts = np.array(list(map(len, blocks)))
    ends = np.cumsum(counts)
    packed = np.empty((ends[-1], 3), np.int32)
    packed[:, 0] = np.repeat(rows, counts)
    packed[:, 1] = np.arange(ends[-1]) + np.repeat(np.array(columns) - (ends - counts), counts)
    packed[:, 2] = np.fromiter(chain.from_iterable(blocks), np.int32, ends[-1])
    return packed


def update_rows(rows: Rows, packed: Int[Array, " n"]) -> Rows:
    """Apply one packed update to the (donated) row slots; unused places hold row -1 and are dropped."""
    split = ADMISSIONS * _ADMISSION_WIDTH
    admitted = packed[:split].reshape(ADMISSIONS, _ADMISSION_WIDTH)
    entries = packed[split:].reshape(ENTRIES, 3)
    nowhere = rows["ints"].shape[0]  # -1 would wrap to the last row
    row = jnp.where(admitted[:, 0] >= 0, admitted[:, 0], nowhere)
    ints = admitted[:, 1 : 1 + len(RowInt)]
    floats = jax.lax.bitcast_convert_type(admitted[:, 1 + len(RowInt) :], jnp.float32)
    table_row = jnp.where(entries[:, 0] >= 0, entries[:, 0], nowhere)
    return {
        "block_tables": rows["block_tables"].at[table_row, entries[:, 1]].set(entries[:, 2], mode="drop"),
        "ints": rows["ints"].at[row].set(ints, mode="drop"),
        "floats": rows["floats"].at[row].set(floats, mode="drop"),
    }
