"""Small updates of the row slots that go down before a step: admitted rows and new block table entries.

One compiled program of fixed size; more than fits goes down in several calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nanovllm_jax.step.state import RowFloat, RowInt, Rows

ADMISSIONS = 64  # rows a call
ENTRIES = 1024  # block table entries a call
_ADMISSION_WIDTH = 1 + len(RowInt) + len(RowFloat)
UPDATE_LENGTH = ADMISSIONS * _ADMISSION_WIDTH + ENTRIES * 3

Admission = tuple[int, Sequence[int], Sequence[float]]  # row, RowInt values, RowFloat values
Entry = tuple[int, int, int]  # row, column, block


def pack_updates(admissions: Sequence[Admission], entries: Sequence[Entry]) -> list[np.ndarray]:
    """The packed int32 arrays, [UPDATE_LENGTH] each, that carry all admissions and table entries."""
    calls = max(-(-len(admissions) // ADMISSIONS), -(-len(entries) // ENTRIES))
    packed = []
    for call in range(calls):
        array = np.full(UPDATE_LENGTH, -1, np.int32)
        admitted = array[: ADMISSIONS * _ADMISSION_WIDTH].reshape(ADMISSIONS, _ADMISSION_WIDTH)
        some = admissions[call * ADMISSIONS : (call + 1) * ADMISSIONS]
        for slot, (row, ints, floats) in zip(admitted, some, strict=False):
            slot[0] = row
            slot[1 : 1 + len(RowInt)] = ints
            slot[1 + len(RowInt) :] = np.asarray(floats, np.float32).view(np.int32)
        table = array[ADMISSIONS * _ADMISSION_WIDTH :].reshape(ENTRIES, 3)
        part = entries[call * ENTRIES : (call + 1) * ENTRIES]
        if part:
            table[: len(part)] = part
        packed.append(array)
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
