"""The server as OpenAI's own client meets it."""

from __future__ import annotations

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Who art thou?"}]
FIXED = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(served):
    with served.client() as client:
        yield client


def test_completion_and_its_stream_agree(client):
    whole = client.completions.create(prompt="Once upon a time", **FIXED)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    options = {"include_usage": True}
    chunks = list(client.completions.create(prompt="Once upon a time", stream=True, stream_options=options, **FIXED))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_and_its_stream_agree(client):
    whole = client.chat.completions.create(messages=MESSAGES, **FIXED)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **FIXED))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def test_async_client_streams_many_at_once(served):
    async def one(client, seed):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, max_tokens=12, temperature=0.9, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main():
        async with served.client(kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, seed % 3) for seed in range(9)))

    texts = asyncio.run(main())
    assert texts[:3] == texts[3:6] == texts[6:]
    assert len({*texts}) == 3


def test_several_prompts_and_samples_are_numbered(client):
    prompts = ["Once", "The king", "My lord"]
    given = {"model": "tiny", "prompt": prompts, "n": 2, "max_tokens": 4, "temperature": 1, "seed": 1}
    whole = client.completions.create(**given)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(stream=True, **given):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]


def test_stop_ends_before_the_string(client):
    text = client.completions.create(prompt="Once", **FIXED).choices[0].text
    stopped = client.completions.create(prompt="Once", stop=[text[3:6]], **FIXED).choices[0]
    assert stopped.text == text[: text.index(text[3:6])]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", text[3:6])


def test_logprobs_in_both_formats(client):
    choice = client.completions.create(prompt="Once", logprobs=2, **FIXED).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **FIXED).choices[0]
    assert [len(entry.top_logprobs) for entry in chat.logprobs.content] == [3] * 8
    for entry in chat.logprobs.content:  # greedy: the first of the best is the one that stands there
        assert entry.top_logprobs[0].logprob == entry.logprob
    chunks = client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **FIXED)
    streamed = [e.token for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == [entry.token for entry in chat.logprobs.content]


def test_logit_bias_forces_a_token(client):
    given = {**FIXED, "max_tokens": 3, "logit_bias": {"40": 100}}
    tokens = client.completions.create(prompt="Once", logprobs=0, **given).choices[0].logprobs.tokens
    without = (
        client.completions.create(prompt="Once", logprobs=0, **FIXED | {"max_tokens": 3}).choices[0].logprobs.tokens
    )
    assert len(set(tokens)) == 1
    assert tokens != without


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_errors_name_the_parameter(client, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **given})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="Once")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
