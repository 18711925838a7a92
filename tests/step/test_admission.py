import jax.numpy as jnp
import numpy as np

from nanovllm_jax.step.admission import ADMISSIONS, ENTRIES, UPDATE_LENGTH, pack_updates, update_rows
from nanovllm_jax.step.state import RowFloat, RowInt

ROWS, COLUMNS = 2 * ADMISSIONS, 80


def apply(admissions, spans):
    rows = {
        "block_tables": np.zeros((ROWS + 1, COLUMNS), np.int32),
        "ints": np.zeros((ROWS + 1, len(RowInt)), np.int32),
        "floats": np.zeros((ROWS + 1, len(RowFloat)), np.float32),
    }
    packed = pack_updates(admissions, spans)
    assert all(array.shape == (UPDATE_LENGTH,) for array in packed)
    rows = {name: jnp.asarray(array) for name, array in rows.items()}
    for array in packed:
        rows = update_rows(rows, jnp.asarray(array))
    return {name: np.asarray(array) for name, array in rows.items()}, len(packed)


def test_more_than_fits_a_call_arrives_in_several():
    rng = np.random.default_rng(0)
    order = rng.permutation(ROWS)[: ADMISSIONS + 3].tolist()
    ints = rng.integers(0, 2**31, (ROWS, len(RowInt)))
    floats = rng.random((ROWS, len(RowFloat)), np.float32)
    first = rng.integers(0, 5, ROWS).tolist()
    blocks = {row: rng.integers(1, 10**6, rng.integers(1, COLUMNS - 5)).tolist() for row in order}
    assert sum(map(len, blocks.values())) > ENTRIES
    rows, calls = apply(
        [(row, ints[row].tolist(), floats[row].tolist()) for row in order],
        [(row, first[row], blocks[row]) for row in order],
    )
    assert calls == max(2, -(-sum(map(len, blocks.values())) // ENTRIES))
    tables = np.zeros((ROWS + 1, COLUMNS), np.int32)
    for row in order:
        tables[row, first[row] : first[row] + len(blocks[row])] = blocks[row]
    np.testing.assert_array_equal(rows["block_tables"], tables)
    np.testing.assert_array_equal(rows["ints"][order], ints[order])
    np.testing.assert_array_equal(rows["floats"][order], floats[order])
    assert not rows["ints"][sorted(set(range(ROWS + 1)) - set(order))].any()


def test_words_of_a_key_keep_their_bits():
    rows, _ = apply([(3, [7, 5, 1, 20, 2**32 - 1, 2**31], [0.5] * len(RowFloat))], [])
    assert rows["ints"][3].astype(np.uint32).tolist() == [7, 5, 1, 20, 2**32 - 1, 2**31]


def test_nothing_new_takes_no_call():
    assert pack_updates([], []) == []
