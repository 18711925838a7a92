import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jaxtyping import config as jaxtyping_config
from sample_oracle import assert_draws

from nanovllm_kernels import sample_head
from nanovllm_kernels.sample_head.cases import CASES, SampleHeadCase, sample_head_inputs


def logits_of(hidden, head):
    return np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_draws_from_the_logits_of_hidden_states(case):
    hidden, head, *rest = sample_head_inputs(case)
    tokens = sample_head(*map(jnp.asarray, (hidden, head, *rest)), backend="xla")
    assert_draws(tokens, logits_of(hidden, head), *rest)


jitted = jax.jit(lambda *arrays: sample_head(*arrays, backend="xla"))


@settings(deadline=None, max_examples=30)
@given(
    case=st.builds(
        SampleHeadCase,
        name=st.just("any"),
        num_rows=st.sampled_from([1, 6]),
        inputs=st.sampled_from([16, 72]),
        vocab_size=st.sampled_from([1, 7, 300]),
        dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    ),
    temperatures=st.tuples(*[st.just(0.0) | st.floats(0.25, 4.0, width=32)] * 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_draw_what_the_oracle_draws(case, temperatures, seed):
    hidden, head, _, *rest = sample_head_inputs(case, seed)
    temperature = np.array(temperatures[: case.num_rows], np.float32)
    tokens = jitted(hidden, head, temperature, *rest)
    assert_draws(tokens, logits_of(hidden, head), temperature, *rest)


def test_interpreted_triton_kernels_draw_the_same():
    run_interpreted("interpreted_sample_head.py")


def test_no_rows_draw_no_tokens():
    hidden, head, *rest = sample_head_inputs(SampleHeadCase("any", 2, 16, 5))
    empty = [each[:0] for each in rest]
    assert sample_head(*map(jnp.asarray, (hidden[:0], head, *empty)), backend="xla").shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; it must be 'xla' or 'triton'"),
        ({"head": jnp.ones((5, 8))}, r"hidden has shape \(2, 16\) and head \(5, 8\); they must be \[B, E\] and"),
        ({"head": jnp.ones((5, 16), jnp.bfloat16)}, "head has dtype bfloat16; it must be hidden's, float32"),
        ({"temperature": jnp.ones(3)}, r"temperature has shape \(3,\); it must be \[B\] = \(2,\)"),
        ({"key": jnp.zeros((2, 3), jnp.uint32)}, r"key has shape \(2, 3\); it must be \[B, 2\]"),
        ({"position": jnp.zeros(2)}, "position has dtype float32; it must be int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    given = {
        "hidden": jnp.zeros((2, 16)),
        "head": jnp.ones((5, 16)),
        "temperature": jnp.ones(2),
        "key": jnp.zeros((2, 2), jnp.uint32),
        "position": jnp.zeros(2, jnp.int32),
    }
    # Off, the checks by annotation leave the errors to the function, as for a user.
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            sample_head(**({"backend": "xla"} | given | changes))
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
