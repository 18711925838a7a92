import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jaxtyping import config as jaxtyping_config
from sample_oracle import assert_draws

from nanovllm_kernels import sample
from nanovllm_kernels.sample.cases import hard_inputs


@jax.jit
def draw(args, filters):
    return sample(*args, **filters, backend="xla")


@pytest.mark.parametrize("vocab_size", [1, 3, 130, 2003])
def test_hard_rows_draw_the_best_of_what_the_filters_keep(vocab_size):
    args, filters = hard_inputs(vocab_size)
    assert_draws(draw(args, {}), *args)
    assert_draws(draw(args, filters), *args, **filters)


ROWS, WIDTH = 8, 130
one_row = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.integers(0, 140),
    st.one_of(st.just(1.0), st.floats(0.0, 1.0, width=32)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(one_row, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0, 8.0]))
def test_any_mix_of_rows_draws_the_best_of_what_the_filters_keep(rows, seed, spread):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((ROWS, WIDTH)) * spread).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties
    logits[1::3, rng.integers(0, WIDTH, WIDTH // 2)] = -np.inf
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    args = (
        logits,
        temperature.astype(np.float32),
        rng.integers(0, 2**32, (ROWS, 2), np.uint32),
        rng.integers(0, 2**31, ROWS, np.int32),
    )
    filters = {
        "top_k": top_k.astype(np.int32),
        "top_p": top_p.astype(np.float32),
        "min_p": min_p.astype(np.float32),
    }
    assert_draws(draw(args, filters), *args, **filters)


def test_interpreted_triton_kernels_draw_the_best_of_what_the_filters_keep():
    run_interpreted("interpreted_sample.py", 8, 700, timeout=None)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [1, 3, 130, 2003, 5000])
def test_interpreted_triton_kernels_draw_from_every_hard_row(vocab_size):
    run_interpreted("interpreted_sample.py", 1, 700, vocab_size, timeout=None)


def test_no_rows_draw_no_tokens():
    args, filters = hard_inputs(3)
    empty = [arg[:0] for arg in args], {name: value[:0] for name, value in filters.items()}
    assert draw(*empty).shape == (0,)


def arguments(**changes):
    given = {
        "logits": jnp.zeros((2, 5)),
        "temperature": jnp.ones(2),
        "key": jnp.zeros((2, 2), jnp.uint32),
        "position": jnp.zeros(2, jnp.int32),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; it must be 'xla' or 'triton'"),
        ({"temperature": jnp.ones(3)}, r"temperature has shape \(3,\); it must be \[B\] = \(2,\)"),
        ({"key": jnp.zeros((2, 3), jnp.uint32)}, r"key has shape \(2, 3\); it must be \[B, 2\]"),
        ({"logits": jnp.zeros((2, 5), jnp.bfloat16)}, r"logits are bfloat16\[2, 5\]; they must be float32"),
        ({"position": jnp.zeros(2)}, "position has dtype float32; it must be int32"),
        ({"top_k": jnp.zeros(2, jnp.int32)}, "of the filters only top_k is given"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    # Off, the checks by annotation leave the errors to the function, as for a user.
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            sample(**({"backend": "xla"} | arguments(**changes)))
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
