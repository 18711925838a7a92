"""Compiling where nothing may is an error that names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection_reports import SHAPES

import nanovllm_jax
from nanovllm_jax.inspection import RecompileError
from nanovllm_jax.inspection.compilations import compilation_reason
from nanovllm_jax.inspection.plan import EngineConfig, ProgramKey, plan_catalogue

pytest_plugins = ["pytester"]


def test_running_what_is_compiled_passes():
    double = jax.jit(lambda x: x * 2)
    double(np.zeros(3, np.float32))
    with nanovllm_jax.no_recompile():
        double(np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("changed", "words"),
    [(np.zeros(4, np.float32), "at bias, now f32[4] and before f32[3]"), (np.zeros(3, np.int32), "now i32[3]")],
)
def test_a_recompilation_is_explained_by_the_argument_that_changed(changed, words):
    def add(weight, bias):
        return weight.sum() + bias

    weight, add = np.zeros(2, np.float32), jax.jit(add)
    add(weight, np.zeros(3, np.float32))
    with pytest.raises(RecompileError) as caught, nanovllm_jax.no_recompile():
        add(weight, changed)
    assert words in str(caught.value)
    assert "jit(add)" in str(caught.value)
    assert "at weight" not in str(caught.value)


def test_an_error_inside_comes_through():
    def compile_and_fail():
        with nanovllm_jax.no_recompile():
            jax.jit(jnp.sin).lower(np.zeros(5, np.float32)).compile()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compile_and_fail()


def test_fixture_fails_a_test_that_compiles(pytester):
    pytester.makeconftest('pytest_plugins = ["nanovllm_jax.testing"]')
    pytester.makepyfile(
        """
        import jax, numpy
        triple = jax.jit(lambda x: x * 3)
        triple(numpy.zeros(2))

        def test_same_shape(no_recompile):
            triple(numpy.ones(2))

        def test_new_shape(no_recompile):
            triple(numpy.ones(3))
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2, errors=1)


def test_each_compilation_of_the_engine_says_which_argument_is_new():
    catalogue = plan_catalogue(SHAPES["tiny"], EngineConfig(max_num_seqs=16), None)
    old, new = ProgramKey("decode", 4), ProgramKey("decode", 16)
    assert compilation_reason(catalogue, old, None) == "first program of kind decode"
    assert compilation_reason(catalogue, new, old) == "argument delta is int32[3, 16], was int32[3, 4]"
    static = compilation_reason(catalogue, ProgramKey("plain", 16), ProgramKey("plain", 4))
    assert static == "the static bucket is 16, was 4"
