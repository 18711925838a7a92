"""What the server does beside generating: limits, keys, clients that leave, faults."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import httpx
import openai
import pytest
from live_server import held, serving, wait_until, wait_until_idle

from nanovllm_jax import AsyncLLM

LONG = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True}
SHORT = {"prompt": "Once", "max_tokens": 4}


def test_tokenize_and_detokenize_are_inverse(served):
    tokens = httpx.post(f"{served.url}/tokenize", json={"prompt": "Once upon a time"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    text = httpx.post(f"{served.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "Once upon a time"}
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert httpx.post(f"{served.url}/tokenize", json=chat).json()["count"] > 3


def test_operations(served):
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/version").json()["version"]
    assert httpx.post(f"{served.url}/reset_prefix_cache").json() == {"success": True}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": [1], "cache_salt": "\\ud800"}', 400),
        (b'{"prompt": [1], "bad_words": ["\\ud800"]}', 400),
        (b'{"prompt": ""}', 400),
        (b'{"prompt": []}', 400),
        (b'{"prompt": [999999]}', 400),
        (b'{"prompt": "a", "seed": 1e400}', 400),
        (b"[" * 100_000, 400),
        (b" " * (5 * 2**20), 413),
    ],
)
def test_malformed_and_oversized_bodies_are_refused(served, content, status):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    answer = httpx.post(f"{served.url}/v1/completions", content=iter([content]), headers=headers)  # no length stated
    assert answer.status_code == status


def test_a_text_to_tokenize_must_be_unicode(served):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/tokenize", content=b'{"prompt": "\\ud800"}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("name", ["padding", "max_length", "tools", "tokenizer_kwargs", "tokenize", "messages", "self"])
def test_only_template_variables_reach_the_template(served, name):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    url = f"{served.url}/v1/chat/completions"
    answer = httpx.post(url, json={**body, "chat_template_kwargs": {name: None}})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "chat_template_kwargs", "unsupported_parameter")
    assert name in answer.json()["error"]["message"]
    assert httpx.post(url, json={**body, "chat_template_kwargs": {"enable_thinking": False}}).status_code == 200


@pytest.mark.parametrize("prompt", ["a", [1]], ids=["text", "ids"])
def test_a_body_holds_a_thousand_prompts_at_most(served, prompt):
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": [prompt] * 1025, "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_unknown_paths_and_methods_have_the_same_body(served):
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405


def test_keys_are_required_and_keep_prefixes_apart(llm):
    prompt = {"model": "tiny", "prompt": [7] * 60, "max_tokens": 1}

    def cached(client, **extra):
        usage = client.completions.create(**prompt, extra_body=extra).usage
        return usage.prompt_tokens_details.cached_tokens

    with serving(llm, api_keys=("first", "second")) as served:
        for key in ("no", "firs", "third"):
            answer = httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{served.url}/health").status_code == 200
        with served.client("first") as first, served.client("second") as second:
            assert [cached(first), cached(first), cached(second), cached(first, cache_salt="x")] == [0, 48, 0, 0]


def test_a_key_is_compared_as_bytes_and_its_scheme_in_any_case(llm):
    with serving(llm, api_keys=("clé-鍵",)) as served:
        for scheme, key, status in (("bearer", "clé-鍵", 200), ("BEARER", "clé-鍵", 200), ("Basic", "clé-鍵", 401)):
            headers = {"Authorization": f"{scheme} {key}".encode()}
            assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == status


def test_the_queue_counts_every_sample_of_a_body(llm):
    num_rows = llm.config.max_num_seqs

    def body(num_prompts, n):
        return {**SHORT, "prompt": ["Once"] * num_prompts, "n": n}

    async def main(served):
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            never = await client.post("/v1/completions", json=body(num_rows, 2))
            with held(llm):
                first = asyncio.ensure_future(client.post("/v1/completions", json=SHORT))
                await asyncio.to_thread(wait_until, lambda: llm.num_unfinished == 1)
                refused = await client.post("/v1/completions", json=body(1, num_rows + 1))
                rest = asyncio.ensure_future(client.post("/v1/completions", json=body(num_rows // 2, 2)))
                await asyncio.to_thread(wait_until, lambda: llm.num_unfinished == 1 + num_rows)
            return never, refused, await first, await rest

    with serving(llm, max_queue=1) as served:
        answers = asyncio.run(main(served))
    assert [answer.status_code for answer in answers] == [400, 503, 200, 200]
    assert answers[1].json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("max_queue", [0, 2])
def test_beyond_the_queue_is_503(llm, max_queue):
    num_accepted = llm.config.max_num_seqs + max_queue

    async def main(served):
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            with held(llm):
                jobs = [asyncio.ensure_future(client.post("/v1/completions", json=SHORT)) for _ in range(num_accepted)]
                await asyncio.to_thread(wait_until, lambda: llm.num_unfinished == num_accepted)
                refused = await client.post("/v1/completions", json=SHORT)
            return refused, await asyncio.gather(*jobs)

    with serving(llm, max_queue=max_queue) as served:
        refused, answers = asyncio.run(main(served))
    assert [answer.status_code for answer in answers] == [200] * num_accepted
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("seconds", [10, pytest.param(120, marks=pytest.mark.slow)])
def test_clients_that_leave_hold_nothing(served, seconds):
    """200 clients at a time, each of which leaves after up to a second, wherever its request then is."""
    draw = random.Random(0)
    num_started = 0

    async def request(client):
        nonlocal num_started
        num_started += 1
        body = {**LONG, "stream": draw.random() < 0.5, "n": draw.choice([1, 2])}
        try:
            async with asyncio.timeout(draw.random()), client.post("/v1/completions", json=body) as answer:
                async for _ in answer.content.iter_any():
                    pass
        except TimeoutError:
            pass

    async def one(client, end):
        while asyncio.get_running_loop().time() < end:
            await request(client)

    async def main():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(served.url, connector=connector) as client:
            end = asyncio.get_running_loop().time() + seconds
            await asyncio.gather(*(one(client, end) for _ in range(200)))

    asyncio.run(main())
    wait_until_idle(served)
    assert num_started > 200
    assert httpx.post(f"{served.url}/reset_prefix_cache").status_code == 200
    body = {"prompt": "Once", "max_tokens": 2, "ignore_eos": True}
    assert httpx.post(f"{served.url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2


def test_a_request_that_fails_ends_alone_and_a_dead_engine_says_so(monkeypatch):
    llm = AsyncLLM(max_model_len=256, max_num_seqs=2, max_num_batched_tokens=64, enforce_eager=True)
    on_tokens = llm._engine._collector.on_tokens

    def break_one(request, *args):
        if request.prompt_token_ids == [66, 66]:
            raise ValueError("broken")
        return on_tokens(request, *args)

    def fail(schedule):
        raise RuntimeError("no device")

    with serving(llm) as served, served.client() as client:
        monkeypatch.setattr(llm._engine._collector, "on_tokens", break_one)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt=[66, 66])
        assert caught.value.status_code == 500
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=200, stream=True)
        next(stream)
        monkeypatch.setattr(llm._engine.replicas[0].runner, "dispatch", fail)
        with pytest.raises(openai.APIError, match="no device"):
            list(stream)
        assert httpx.get(f"{served.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="Once")
        assert caught.value.status_code == 503
    llm.close()
