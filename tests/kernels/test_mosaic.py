"""The Mosaic kernels in the interpreter, which follows every barrier and copy; and the work list they walk through."""

import functools
import importlib

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import prefill_oracle, relative_error

from nanovllm_kernels._cases import AttentionCase, attention_inputs
from nanovllm_kernels._compat import Target
from nanovllm_kernels._mosaic import ROW_ALIGNMENT
from nanovllm_kernels.ragged_prefill.worklist import work_list

NUM_TOKENS, NUM_SEQS = 200, 4
# A prompt longer than a tile, a chunk after a prefix, a decode row, an unused sequence; then padding. Sequences
# start and end inside tiles and pages.
LENGTHS = {"q_lens": (70, 21, 1, 0), "context_lens": (70, 150, 9, 0), "padding": 68}


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("two_heads_a_program", num_heads=2, num_kv_heads=1, head_dim=64, **LENGTHS),
        AttentionCase("one_head_a_program", num_heads=1, num_kv_heads=1, head_dim=64, dtype="float16", **LENGTHS),
    ],
    ids=lambda case: case.name,
)
def test_interpreted_kernel_matches_the_oracle_and_reads_no_unused_slot(case, monkeypatch):
    mosaic = importlib.import_module("nanovllm_kernels.ragged_prefill.mosaic")
    # Two programs, so that each has several tiles and some have none.
    monkeypatch.setattr(mosaic, "current_target", lambda: Target(90, 2, 227 * 1024))
    inputs = attention_inputs(case)
    params = plgpu.InterpretGPUParams()
    got = jax.jit(lambda *args: mosaic.ragged_prefill_mosaic(*args, scale=case.options["scale"], interpret=params))(
        *inputs.args
    )
    assert relative_error(got, prefill_oracle(*inputs.args, **case.options)) < 5e-3
    assert not np.asarray(got)[case.num_tokens - case.padding :].any()


@st.composite
def lengths(draw):
    left, q_lens = NUM_TOKENS, []
    for _ in range(NUM_SEQS):
        q_lens.append(draw(st.sampled_from([0, min(1, left), left]) | st.integers(0, left)))
        left -= q_lens[-1]
    prefixes = [draw(st.integers(0, 300)) for _ in q_lens]
    return np.array(q_lens), np.array(prefixes)


UNITS, PROGRAMS = 3, 5


@functools.cache
def jitted(tile_queries):
    sizes = {"num_tokens": NUM_TOKENS, "tile_queries": tile_queries, "units": UNITS, "programs": PROGRAMS}
    return jax.jit(lambda *args: work_list(*args, **sizes))


@pytest.mark.parametrize("tile_queries", [64, 128])
@settings(deadline=None)
@given(lengths=lengths())
def test_work_list_has_each_row_and_unit_once_and_rounds_begin_with_the_costliest_tiles(tile_queries, lengths):
    q_lens, prefixes = lengths
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    contexts = (q_lens + prefixes).astype(np.int32)
    work = jax.tree.map(np.asarray, jitted(tile_queries)(contexts, cu_q_lens))
    count = work.count[0]
    assert count <= work.row.size
    order = work.order[: count * UNITS]
    assert sorted(order) == list(range(count * UNITS))
    keys = work.keys[order // UNITS]
    for start in range(0, order.size, PROGRAMS):
        assert not (np.diff(keys[start : start + PROGRAMS]) > 0).any()
    # What each row of q should be given: its sequence and position, or nothing for padding.
    seqs = np.repeat(np.arange(NUM_SEQS), q_lens)
    positions = np.arange(cu_q_lens[-1]) - cu_q_lens[seqs] + prefixes[seqs]
    times = np.zeros(NUM_TOKENS, int)
    for tile in range(count):
        assert work.row[tile] % ROW_ALIGNMENT == 0
        rows = np.arange(work.first[tile], work.last[tile])
        times[work.row[tile] + rows] += 1
        for row in rows:
            token = work.row[tile] + row
            if token < cu_q_lens[-1]:
                assert work.seq[tile] == seqs[token]
                assert work.position[tile] + row == positions[token]
                assert work.position[tile] + row < work.keys[tile] <= work.context[tile] == contexts[seqs[token]]
            else:
                assert work.keys[tile] == 0
    assert (times == 1).all()


def test_programs_read_the_same_keys_at_the_same_time():
    units, programs = 8, 132
    contexts, cu_q_lens = jnp.full(16, 8192, jnp.int32), 1024 * jnp.arange(17, dtype=jnp.int32)
    work = work_list(contexts, cu_q_lens, num_tokens=16384, tile_queries=64, units=units, programs=programs)
    work = jax.tree.map(np.asarray, work)
    order = work.order[: work.count[0] * units]
    for start in range(0, order.size, programs):
        tile, unit = np.divmod(order[start : start + programs], units)
        assert len(set(zip(work.seq[tile], unit, strict=True))) <= 10  # of 128
