"""Products, norms, activations, all layers and sums over GPUs on a real GPU: `pytest -m gpu tests/kernels`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kernel_oracle import (
    GPU_TOLERANCE,
    add_rms_norm_oracle,
    gated_oracle,
    layers_oracle,
    passed_on_oracle,
    relative_error,
    silu_mul_oracle,
    skinny_oracle,
)

from nanovllm_kernels import (
    add_rms_norm,
    add_shards,
    decode_layers,
    gated_matmul,
    silu_mul,
    split_counters,
)
from nanovllm_kernels.add_rms_norm.cases import CASES as NORM_CASES
from nanovllm_kernels.add_rms_norm.cases import add_rms_norm_inputs
from nanovllm_kernels.add_shards import add_shards_scaled, parts_of_row
from nanovllm_kernels.add_shards.cases import CASES as SUM_CASES
from nanovllm_kernels.add_shards.exchange import make_exchange, programs_that_failed
from nanovllm_kernels.decode_layers.cases import CASES as LAYER_CASES
from nanovllm_kernels.decode_layers.cases import layer_inputs
from nanovllm_kernels.gated_matmul.cases import CASES as GATED_CASES
from nanovllm_kernels.gated_matmul.cases import gated_inputs
from nanovllm_kernels.silu_mul.cases import CASES as SILU_CASES
from nanovllm_kernels.silu_mul.cases import silu_mul_inputs
from nanovllm_kernels.skinny_matmul.cases import CASES as SKINNY_CASES
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS, as_in_a_layer, product_of, skinny_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
def test_add_rms_norm(case, added):
    x, update, weight = add_rms_norm_inputs(case)
    arrays = x, update if added else None, weight
    got = jax.jit(lambda *arrays: add_rms_norm(*arrays, eps=1e-6, backend="triton"))(*arrays)
    for one, expected in zip(got, add_rms_norm_oracle(*arrays, eps=1e-6), strict=True):
        assert relative_error(one, expected) < GPU_TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", SILU_CASES, ids=lambda case: case.name)
def test_silu_mul(case):
    gate_up = silu_mul_inputs(case)
    got = jax.jit(lambda gate_up: silu_mul(gate_up, backend="triton"))(gate_up)
    assert relative_error(got, silu_mul_oracle(gate_up)) < GPU_TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", GATED_CASES, ids=lambda case: case.name)
def test_gated_matmul(case):
    arrays = gated_inputs(case)
    call = jax.jit(lambda arrays: gated_matmul(**arrays, backend="triton"))
    got = call(arrays)
    # Where gate and up are rounded first, that is one more rounding of each.
    assert relative_error(got, gated_oracle(**arrays)) < 2 * GPU_TOLERANCE[case.dtype]
    np.testing.assert_array_equal(np.asarray(call(arrays)), np.asarray(got))


@pytest.mark.parametrize("in_kernel_merge", [False, True])
@pytest.mark.parametrize("case", SKINNY_CASES, ids=lambda case: case.name)
def test_skinny_matmul(case, in_kernel_merge):
    def call(arrays):
        counters = jax.new_ref(split_counters()) if in_kernel_merge else None
        return product_of(arrays, **case.options, counters=counters, backend="triton")

    for seed in (0, 1):
        arrays = skinny_inputs(case, seed)
        got, passed_on = jax.jit(call)(arrays)
        assert relative_error(got, skinny_oracle(arrays, case)) < GPU_TOLERANCE[case.dtype]
        check_passed_on(got, passed_on, arrays)


def check_passed_on(got, passed_on, arrays):
    if passed_on is not None:
        scaled, squares = passed_on_oracle(got, arrays["next_norm"])
        assert relative_error(passed_on.x, scaled) < 5e-3
        assert relative_error(np.asarray(passed_on.squares).sum(axis=0)[: len(squares)], squares) < 1e-5


@pytest.mark.parametrize("in_a_layer", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 64, 100, 128, 256])
@pytest.mark.parametrize(
    "case", [*PRODUCTS["qwen3_0_6b"], *PRODUCTS["qwen3_8b_tp4"]], ids=lambda case: f"{case.name}-{case.outputs}"
)
def test_skinny_matmul_with_the_launches_of_a_model(case, rows, in_a_layer):
    case = dataclasses.replace(as_in_a_layer(case) if in_a_layer else case, rows=rows)
    arrays = skinny_inputs(case)

    # The same counters for all calls: each must find them at zero. Sums in a fixed order repeat to the bit.
    def calls(arrays):
        counters = jax.new_ref(split_counters())
        one = lambda: product_of(arrays, **case.options, counters=counters, backend="triton")  # noqa: E731
        return [one() for _ in range(20)], counters[...]

    got, counters = jax.jit(calls)(arrays)
    assert not np.asarray(counters).any()
    result, passed_on = got[0]
    assert relative_error(result, skinny_oracle(arrays, case)) < 5e-3
    check_passed_on(result, passed_on, arrays)
    compared = jax.tree.leaves([[y, s and (s.x, s.squares[:, :rows])] for y, s in got])
    for i, array in enumerate(compared):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(compared[i % (len(compared) // len(got))]))


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_decode_layers(case):
    call = jax.jit(lambda *args: decode_layers(*args, **case.options, backend="triton"))
    for seed in (0, 1):
        inputs = layer_inputs(case, seed)
        results = [call(*inputs) for _ in range(100)]
        x, caches = layers_oracle(*inputs, **case.options)
        assert relative_error(results[0][0], x) < 1e-2
        for got, cache in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(caches), strict=True):
            seen = ~np.isnan(cache)
            got = np.asarray(got, np.float64)
            assert not np.isnan(got[seen]).any()
            assert np.isnan(got[~seen]).all()
            assert relative_error(got[seen][None], cache[seen][None]) < 1e-2
        # Sums in a fixed order repeat to the bit.
        for other in results[1:]:
            for got, first in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
                np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(first).view(np.uint16))


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_add_shards(shards):
    """Sums of all shapes in turn, 100 times; each shard gets the same bits."""
    if shards > jax.local_device_count():
        pytest.skip(f"needs {shards} GPUs, not {jax.local_device_count()}")
    mesh = jax.make_mesh(
        (shards,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:shards]
    )
    exchange, split, same = make_exchange(mesh, "model"), PartitionSpec("model"), PartitionSpec()

    def add(parts, residuals, table):
        wanted = [residual if case.residual else None for case, residual in zip(SUM_CASES, residuals, strict=True)]
        options = {"axis_name": "model", "table": table, "backend": "triton"}
        sums, passed_on, earlier = [], [], jnp.float32(0)
        for part, residual in zip(parts, wanted, strict=True):
            part, _ = jax.lax.optimization_barrier((part[0], earlier))  # one after the other on every shard
            if residual is not None and part.dtype == jnp.bfloat16 and parts_of_row(part, shards):
                norm = jnp.linspace(0.5, 2, part.shape[1], dtype=part.dtype)
                total, scaled = add_shards_scaled(part, residual, next_norm=norm, table=table)
                wide = total.astype(jnp.float32)
                passed_on.append((scaled.x, (wide * norm.astype(jnp.float32)).astype(part.dtype)))
                passed_on.append((scaled.squares[:, : len(part)].sum(axis=0), (wide * wide).sum(axis=1)))
            else:
                total = add_shards(part, residual, **options)
            sums.append(total)
            earlier = sums[-1].astype(jnp.float32).sum()
        return jax.tree.map(lambda each: each[None], (sums, passed_on))

    specs = (split, same, split)
    step = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
    for seed in range(100):
        random = np.random.default_rng(seed)
        arrays = [random.normal(size=(shards + 1, case.rows, case.width)).astype(case.dtype) for case in SUM_CASES]
        sums, passed_on = step([each[:-1] for each in arrays], [each[-1] for each in arrays], exchange.table)
        for case, drawn, got in zip(SUM_CASES, arrays, map(np.asarray, sums), strict=True):
            assert (got.view(np.uint16) == got[:1].view(np.uint16)).all(), case
            want = drawn[: shards + case.residual].astype(np.float64).sum(axis=0)
            assert relative_error(got[0], want) < GPU_TOLERANCE[case.dtype], case
        assert passed_on
        for got, want in passed_on:
            assert relative_error(got, want) < 1e-5
    assert programs_that_failed(exchange) == 0
