import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import add_rms_norm_oracle, relative_error

from nanovllm_kernels import add_rms_norm
from nanovllm_kernels._cases import RowsCase
from nanovllm_kernels.add_rms_norm.cases import CASES, add_rms_norm_inputs

TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-6}

jitted = jax.jit(lambda *arrays: add_rms_norm(*arrays, eps=1e-6, backend="xla"))


@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_sum_and_its_norm_are_those_of_the_oracle(case, added):
    x, update, weight = add_rms_norm_inputs(case)
    arrays = x, update if added else None, weight
    for one, expected in zip(jitted(*arrays), add_rms_norm_oracle(*arrays, eps=1e-6), strict=True):
        assert one.dtype == jnp.dtype(case.dtype)
        assert relative_error(one, expected) < TOLERANCE[case.dtype]


@settings(deadline=None, max_examples=30)
@given(
    case=st.builds(
        RowsCase,
        name=st.just("any"),
        num_tokens=st.sampled_from([1, 9]),
        size=st.sampled_from([65, 96]),
        dtype=st.sampled_from(sorted(TOLERANCE)),
    ),
    added=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_give_what_the_oracle_gives(case, added, seed):
    x, update, weight = add_rms_norm_inputs(case, seed)
    arrays = x, update if added else None, weight
    for one, expected in zip(jitted(*arrays), add_rms_norm_oracle(*arrays, eps=1e-6), strict=True):
        assert one.dtype == jnp.dtype(case.dtype)
        # Rows are short, so two roundings of one dtype average less than in the cases.
        assert relative_error(one, expected) < 1.5 * TOLERANCE[case.dtype]


def test_no_tokens_give_nothing_on_any_backend():
    empty = jnp.zeros((0, 8))
    for backend in ("xla", "triton"):
        assert [one.shape for one in add_rms_norm(empty, empty, jnp.ones(8), eps=1e-6, backend=backend)] == [(0, 8)] * 2


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((4,), (4,), (4,)), ("float32",) * 3, r"x has shape \(4,\); it must be \[T, E\]"),
        (((2, 0), (2, 0), (0,)), ("float32",) * 3, r"E above 0"),
        (((2, 4), (3, 4), (4,)), ("float32",) * 3, r"update has shape \(3, 4\); it must be \[T, E\] = \(2, 4\)"),
        (((2, 4), (2, 4), (2,)), ("float32",) * 3, r"weight has shape \(2,\); it must be \[E\] = \(4,\)"),
        (((2, 4), (2, 4), (4,)), ("int32",) * 3, "x has dtype int32"),
        (((2, 4), (2, 4), (4,)), ("bfloat16", "float32", "bfloat16"), "update is float32 and x bfloat16"),
    ],
)
def test_what_does_not_fit_together_is_refused(shapes, dtypes, message):
    arrays = [jnp.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            add_rms_norm(*arrays, eps=1e-6, backend="xla")
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
