import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import relative_error, silu_mul_oracle

from nanovllm_kernels import silu_mul
from nanovllm_kernels._cases import RowsCase
from nanovllm_kernels.silu_mul.cases import CASES, silu_mul_inputs

TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-6}

jitted = jax.jit(lambda gate_up: silu_mul(gate_up, backend="xla"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gated_values_are_those_of_the_oracle(case, seed):
    gate_up = silu_mul_inputs(case, seed)
    got = jitted(gate_up)
    assert got.dtype == jnp.dtype(case.dtype)
    assert relative_error(got, silu_mul_oracle(gate_up)) < TOLERANCE[case.dtype]


@settings(deadline=None, max_examples=30)
@given(
    case=st.builds(
        RowsCase,
        name=st.just("any"),
        num_tokens=st.sampled_from([1, 9]),
        size=st.sampled_from([2, 7, 96]),
        dtype=st.sampled_from(sorted(TOLERANCE)),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_give_what_the_oracle_gives(case, seed):
    gate_up = silu_mul_inputs(case, seed)
    got = jitted(gate_up)
    assert got.dtype == jnp.dtype(case.dtype)
    # Over all rows at once: a gate far below zero leaves a row of two almost nothing, which 16 bits round away.
    flat = silu_mul_oracle(gate_up).reshape(1, -1)
    assert relative_error(got.reshape(1, -1), flat) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_no_tokens_give_nothing_on_any_backend(backend):
    assert silu_mul(jnp.zeros((0, 2, 8)), backend=backend).shape == (0, 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 8), "float32", r"gate_up has shape \(4, 8\); it must be \[T, 2, F\]"),
        ((4, 3, 8), "float32", r"it must be \[T, 2, F\]"),
        ((1, 2, 4), "int32", "gate_up has dtype int32"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(shape, dtype, message):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            silu_mul(jnp.zeros(shape, dtype), backend="xla")
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
