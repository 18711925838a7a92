"""`add_shards`: its contract over host devices, its exchange, and its device code in Triton's interpreter."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jax.sharding import PartitionSpec

from nanovllm_kernels import add_shards, lowering_for
from nanovllm_kernels._cases import DTYPES
from nanovllm_kernels.add_shards import exchanges
from nanovllm_kernels.add_shards.cases import CASES, REFUSED, SumCase
from nanovllm_kernels.add_shards.exchange import (
    MAX_PROGRAMS,
    SLOT_WORDS,
    abstract_exchange,
    buffer_words,
    make_exchange,
    plan_of,
    programs_that_failed,
)

SHARDS = 4


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, SHARDS), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def over(mesh, function):
    """`function` of a part and a residual, over the shards; what each of them gets."""
    specs = (PartitionSpec("model"), PartitionSpec())
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shard_gets_the_sum_and_the_residual(mesh, case):
    keys = jax.random.split(jax.random.key(0))
    parts = jax.random.normal(keys[0], (SHARDS, case.rows, case.width)).astype(case.dtype)
    residual = jax.random.normal(keys[1], parts.shape[1:]).astype(case.dtype)

    def add(part, residual):
        return add_shards(part[0], residual if case.residual else None, axis_name="model", backend="xla")[None]

    got = np.asarray(over(mesh, add)(parts, residual)).astype(np.float32)
    want = np.asarray(parts).astype(np.float32).sum(axis=0)
    want += np.asarray(residual).astype(np.float32) if case.residual else 0
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=0.1)


@cache
def added(mesh, residual):
    """Sums over the shards, jitted."""

    def add(part, with_it):
        return add_shards(part[0], with_it if residual else None, axis_name="model", backend="xla")[None]

    return over(mesh, add)


@settings(deadline=None, max_examples=20)
@given(
    case=st.builds(
        SumCase,
        rows=st.sampled_from([1, 3]),
        width=st.sampled_from([1, 100, 512]),
        residual=st.booleans(),
        dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sum_is_that_of_float64_but_for_a_rounding_an_addition(mesh, case, seed):
    rng, dtype = np.random.default_rng(seed), DTYPES[case.dtype]
    parts = (10.0 ** rng.uniform(-2, 2) * rng.standard_normal((SHARDS, case.rows, case.width))).astype(dtype)
    residual = rng.standard_normal(parts.shape[1:]).astype(dtype)
    got = np.asarray(added(mesh, case.residual)(parts, residual))
    assert got.dtype == dtype
    terms = [*parts, residual] if case.residual else [*parts]
    terms = np.array(terms, np.float64)
    most = len(terms) * jnp.finfo(dtype).eps / 2 * np.abs(terms).sum(axis=0)
    assert (np.abs(got.astype(np.float64) - terms.sum(axis=0)) <= most).all()
    np.testing.assert_array_equal(got, np.broadcast_to(got[0], got.shape))


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_small_sums_of_16_bits_in_whole_programs_are_exchanged(shards):
    shape = lambda case: jnp.zeros((case.rows, case.width), case.dtype)  # noqa: E731
    assert all(exchanges(shape(case), shards) for case in CASES)
    assert not any(exchanges(shape(case), shards) for case in (*REFUSED, SumCase(0, 512)))


def test_two_shards_exchange_twice_as_much_as_more():
    part = jnp.zeros((256, 4096), jnp.bfloat16)
    assert [exchanges(part, shards) for shards in (2, 4, 8)] == [True, False, False]


@pytest.mark.parametrize("width", [1024, 4096, 5120])
@pytest.mark.parametrize("rows", [1, 8, 32, 64, 102])
def test_a_plan_covers_a_sum_in_parts_of_rows_that_fit_slots(rows, width):
    plan = plan_of((rows, width), 4)
    assert plan.programs <= MAX_PROGRAMS
    assert plan.elements * plan.programs == rows * width
    assert plan.elements // 2 <= SLOT_WORDS
    assert width % plan.elements == 0


def test_a_residual_of_another_shape_or_dtype_is_refused():
    part = jnp.zeros((2, 512), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 512\)"):
        add_shards(part, part[:1], axis_name="model", backend="xla")
    with pytest.raises(ValueError, match="residual has dtype float32"):
        add_shards(part, part.astype(jnp.float32), axis_name="model", backend="xla")


def test_a_table_says_where_the_buffers_of_a_shard_and_of_those_after_it_are(mesh):
    exchange = make_exchange(mesh, "model")
    pointers = {each.device: each.data.unsafe_buffer_pointer() for each in exchange.buffers.addressable_shards}
    for each in exchange.table.addressable_shards:
        rank, *halves = np.asarray(each.data).reshape(-1)
        replica = next(row for row in mesh.devices if each.device in row)
        assert replica[rank] == each.device
        expected = [pointers[replica[(rank + step) % SHARDS]] for step in range(SHARDS)]
        assert np.array(halves, np.int32).view(np.uint64).tolist() == expected


def test_buffers_begin_empty_and_without_failures(mesh):
    exchange = make_exchange(mesh, "model")
    assert exchange.buffers.shape == (2, SHARDS, buffer_words(SHARDS))
    assert programs_that_failed(exchange) == 0
    like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), exchange)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract_exchange(mesh, "model")) == like


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_compiles_without_a_gpu(mesh, case):
    exchange = abstract_exchange(mesh, "model")
    parts = jax.ShapeDtypeStruct((SHARDS, case.rows, case.width), jnp.dtype(case.dtype))
    residual = jax.ShapeDtypeStruct(parts.shape[1:], parts.dtype)

    def add(part, residual, table):
        added = partial(add_shards, part[0], axis_name="model", table=table, backend="triton")
        return added(residual)[None] if case.residual else added()[None]

    specs = (PartitionSpec("model"), PartitionSpec(), PartitionSpec("data", "model"))
    mapped = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    with lowering_for(90):
        lowered = jax.jit(mapped).trace(parts, residual, exchange.table).lower(lowering_platforms=("cuda",))
    assert "all_reduce" not in lowered.as_text()
    assert "triton_kernel_call" in lowered.as_text()


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_side_by_side_add_in_tritons_interpreter(shards):
    run_interpreted("interpreted_add_shards.py", shards)
