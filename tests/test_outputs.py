import pytest

from nanovllm_jax.outputs import CompletionOutput, RequestOutput


def test_a_request_output_answers_as_nano_vllms_dict():
    samples = [CompletionOutput(0, "hi", [1, 2], finish_reason="stop"), CompletionOutput(1, "ho", [3])]
    output = RequestOutput("0", "say", [7], samples, finished=False)
    assert output["text"] == "hi"
    assert output["token_ids"] == [1, 2]
    assert [sample.finished() for sample in samples] == [True, False]


def test_another_key_names_the_keys_there_are():
    output = RequestOutput("0", None, [7], [CompletionOutput(0, "hi", [1])], finished=False)
    with pytest.raises(KeyError, match="'logprobs': only 'text' and 'token_ids'"):
        output["logprobs"]
