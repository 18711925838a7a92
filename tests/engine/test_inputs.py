import numpy as np
import pytest

from nanovllm_jax.engine.inputs import bad_word_ids, parse_prompt
from nanovllm_jax.engine.request import Request
from nanovllm_jax.errors import RequestError
from nanovllm_jax.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 99],
        (1, 2, 99),
        [np.int64(1), np.uint8(2), 99],
        np.array([1, 2, 99], np.int64),
        np.array([1, 2, 99], np.uint16),
        bytes([1, 2, 99]),
    ],
    ids=["list", "tuple", "mixed", "int64", "uint16", "bytes"],
)
def test_ids_of_any_integer_kind_become_plain_ones(prompt):
    token_ids = Request("r", parse_prompt(prompt, None, 100).token_ids, SamplingParams()).prompt_token_ids
    assert token_ids == [1, 2, 99]
    assert all(type(token) is int for token in token_ids)


@pytest.mark.parametrize("worst", [100, -1, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**64])
def test_an_id_outside_the_vocabulary_is_named(worst):
    with pytest.raises(RequestError, match=f"token id {worst};.* 0 to 99"):
        parse_prompt([5, worst, 7], None, 100)


@pytest.mark.parametrize("prompt", [[1.5], np.array([1.0]), ["a"], [None], [[1, 2]], 5, None])
def test_what_is_no_list_of_integers_is_refused(prompt):
    with pytest.raises(RequestError, match="give a string, a list of token ids"):
        parse_prompt(prompt, None, 100)


def test_half_a_surrogate_pair_is_refused_by_the_name_of_its_field():
    with pytest.raises(RequestError) as caught:
        parse_prompt("a\ud800", lambda text: None, 100)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError) as caught:
        parse_prompt({"prompt_token_ids": [1], "cache_salt": "a\ud800"}, None, 100)
    assert caught.value.param == "cache_salt"
    with pytest.raises(RequestError) as caught:
        bad_word_ids(["fine", "a\ud800"], lambda text, **kwargs: type("Encoding", (), {"input_ids": [1]}))
    assert caught.value.param == "bad_words"
