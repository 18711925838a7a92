import dataclasses
import math

import numpy as np
import pytest

from nanovllm_jax.errors import RequestError
from nanovllm_jax.sampling_params import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (16, 0, False)
    assert (params.seed, params.logprobs, params.prompt_logprobs, params.logit_bias) == (None,) * 4
    assert (params.detokenize, params.skip_special_tokens) == (True, True)
    assert params.include_stop_str_in_output is False
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n", 0),
        ("n", 16385),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop", 5),
        ("logit_bias", [1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 7),
        ("stop", [""]),
        ("stop", [3]),
        ("bad_words", [""]),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "a"}),
    ],
)
def test_a_value_outside_its_limits_is_named_with_its_value(argument, value):
    shown = value[0] if isinstance(value, list) else next(iter(value)) if isinstance(value, dict) else value
    with pytest.raises(RequestError) as error:
        SamplingParams(**{argument: value})
    assert argument in str(error.value)
    assert repr(shown) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value", "stored"),
    [
        ("temperature", 1, 1.0),
        ("temperature", 0.001, 0.01),
        ("temperature", 1e-6, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_k", -1, 0),
        ("top_k", np.int64(5), 5),
        ("max_tokens", None, None),
        ("seed", -1, None),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("logprobs", True, 1),
        ("logprobs", 0, 0),
        ("stop", "end", ("end",)),
        ("stop", ["a", "b", "a"], ("a", "b")),
        ("stop_token_ids", [3, 5, 3], (3, 5)),
        ("bad_words", ["x", "x"], ("x",)),
        ("logit_bias", {"3": 200, 4: -math.inf, 5: 1}, {3: 100.0, 4: -100.0, 5: 1.0}),
    ],
)
def test_a_value_is_stored_in_one_form(argument, value, stored):
    assert getattr(SamplingParams(**{argument: value}), argument) == stored


def test_temperature_zero_switches_the_filters_off():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_several_greedy_samples_are_refused():
    with pytest.raises(RequestError, match="n is 2 at temperature 0"):
        SamplingParams(n=2, temperature=0)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(RequestError, match="min_tokens is 17, above max_tokens 16"):
        SamplingParams(min_tokens=17)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17


def test_stop_strings_need_detokenize():
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_copy_with_changes_is_checked_again():
    params = SamplingParams(stop="x", temperature=0.5)
    assert dataclasses.replace(params, seed=3) == SamplingParams(stop="x", temperature=0.5, seed=3)
    with pytest.raises(RequestError, match="top_p"):
        dataclasses.replace(params, top_p=2)
