"""`AsyncLLM` as its users meet it, on a tiny random model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import aclosing

import pytest
from tiny_models import write_tiny_model

from nanovllm_jax import LLM, AsyncLLM, DeviceError, RequestError, SamplingParams, async_llm
from nanovllm_jax.engine import collector

SETTINGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
}
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shared(model):
    llm = AsyncLLM(model, **SETTINGS)
    yield llm
    llm.close()


async def last(llm, prompt, params, **kwargs):
    outputs = [output async for output in llm.generate(prompt, params, **kwargs)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


def is_empty(llm):
    blocks = llm._engine.replicas[0].scheduler.block_manager
    return (llm.stats.num_running, llm.num_unfinished, blocks.num_free_blocks) == (0, 0, blocks.num_blocks)


def test_many_tasks_get_what_generate_gives(shared, model):
    prompts = [[i + 1] * (3 * i + 1) for i in range(12)]
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=5 + i, ignore_eos=True) for i in range(12)]

    async def main():
        return await asyncio.gather(*(last(shared, p, s) for p, s in zip(prompts, params, strict=True)))

    got = asyncio.run(main())
    with LLM(model, **SETTINGS) as llm:
        wanted = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
    assert is_empty(shared)


def test_outputs_grow(shared):
    async def main():
        return [len(o.outputs[0].token_ids) async for o in shared.generate([1, 2], LONG)]

    lengths = asyncio.run(main())
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 100


def test_requests_that_stream_share_the_reports(shared, monkeypatch):
    monkeypatch.setattr(collector, "_REPORT_S", 1e6)  # none is due after the first

    async def main():
        return [len(o.outputs[0].token_ids) async for o in shared.generate([1, 2], LONG)]

    assert asyncio.run(main()) == [1, 100]


def test_only_the_end_is_reported_without_stream(shared):
    async def main():
        return [o async for o in shared.generate([1, 2], LONG, stream=False)]

    (output,) = asyncio.run(main())
    assert output.finished


def test_cancelled_left_and_aborted_requests_hold_nothing(shared):
    async def main():
        task = asyncio.create_task(last(shared, [1], LONG))
        async with aclosing(shared.generate([2], LONG)) as outputs:
            async for _ in outputs:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        reasons = []
        async for output in shared.generate([3], LONG, "mine"):
            await shared.abort("mine")
            reasons.append(output.outputs[0].finish_reason)
        assert reasons[-1] == "abort"
        assert await shared.reset_prefix_cache()

    asyncio.run(main())
    assert is_empty(shared)


def test_an_abort_while_the_prompt_is_tokenised_counts(shared, monkeypatch):
    prepare, go_on = shared._engine.prepare, threading.Event()

    def wait_then_prepare(*args, **kwargs):
        go_on.wait()
        return prepare(*args, **kwargs)

    monkeypatch.setattr(shared._engine, "prepare", wait_then_prepare)
    monkeypatch.setattr(async_llm, "_is_text", lambda prompt: True)

    async def main():
        task = asyncio.create_task(last(shared, [1], LONG, request_id="early"))
        await asyncio.sleep(0)
        await shared.abort("early")
        go_on.set()
        return await task

    assert asyncio.run(main()).outputs[0].finish_reason == "abort"
    assert is_empty(shared)


def test_refused_requests_leave_the_others_alone(shared):
    async def main():
        good = asyncio.create_task(last(shared, [1, 2, 3], LONG, request_id="good"))
        await asyncio.sleep(0)
        for prompt, id in (([], None), ([1] * 200, None), ([99999], None), ([1], "good")):
            with pytest.raises(RequestError):
                await last(shared, prompt, LONG, request_id=id)
        return await good

    assert len(asyncio.run(main()).outputs[0].token_ids) == 100
    assert is_empty(shared)


def test_a_request_that_raises_inside_the_engine_ends_alone(shared, monkeypatch):
    on_tokens = shared._engine._collector.on_tokens

    def break_one(request, *args):
        if request.prompt_token_ids == [6] and len(request.output_token_ids) == 3:
            raise ValueError("broken")
        return on_tokens(request, *args)

    monkeypatch.setattr(shared._engine._collector, "on_tokens", break_one)

    async def main():
        return await asyncio.gather(*(last(shared, [token], LONG) for token in (6, 5)))

    bad, good = asyncio.run(main())
    assert bad.outputs[0].finish_reason == "error"
    assert (good.outputs[0].finish_reason, len(good.outputs[0].token_ids)) == ("length", 100)
    assert is_empty(shared)


@pytest.mark.parametrize(
    ("prompt", "arguments", "param"),
    [
        ({"prompt_token_ids": [1] * 60, "cache_salt": "\ud800"}, {}, "cache_salt"),
        ([1], {"priority": "high"}, "priority"),
    ],
)
def test_what_the_engine_cannot_use_is_refused_before_it_gets_there(shared, prompt, arguments, param):
    async def main():
        with pytest.raises(RequestError) as caught:
            await last(shared, prompt, LONG, **arguments)
        await shared.check_health()
        return caught.value, await last(shared, [1], LONG)

    error, good = asyncio.run(main())
    assert error.param == param
    assert good.finished


def test_an_id_may_be_used_again_at_once(shared):
    async def main():
        async with aclosing(shared.generate([1, 2], LONG, "same")) as outputs:
            await anext(outputs)
        return await last(shared, [3, 4, 5], LONG, request_id="same")

    output = asyncio.run(main())
    assert (output.request_id, output.prompt_token_ids) == ("same", [3, 4, 5])
    assert output.outputs[0].finish_reason == "length"
    assert is_empty(shared)


def test_a_closed_event_loop_ends_its_own_requests_alone(shared):
    reading = []

    async def leave():
        stream = await shared.add_request([1], LONG, stream=False)
        reading.append(asyncio.ensure_future(anext(stream)))
        await asyncio.sleep(0)  # it waits now

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert asyncio.run(last(shared, [2], LONG)).outputs[0].finish_reason == "length"
    assert is_empty(shared)


_LEAVE_BUSY = """
import asyncio
from nanovllm_jax import AsyncLLM, SamplingParams

llm = AsyncLLM(max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64, enforce_eager=True)
params = SamplingParams(max_tokens=1000, ignore_eos=True)

async def main():
    streams = [await llm.add_request([token], params) for token in range(1, 9)]
    await anext(streams[-1])
    return streams

loop = asyncio.new_event_loop()
streams = loop.run_until_complete(main())
"""


def test_a_process_may_end_while_requests_run():
    ended = subprocess.run([sys.executable, "-c", _LEAVE_BUSY], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_an_engine_that_fails_ends_all_with_an_error(model, monkeypatch):
    llm = AsyncLLM(model, **SETTINGS)

    async def main():
        waiting = asyncio.create_task(last(llm, [1], LONG))
        async for _ in llm.generate([2], LONG):
            break

        def fail(schedule):
            raise RuntimeError("no device")

        monkeypatch.setattr(llm._engine.replicas[0].runner, "dispatch", fail)
        with pytest.raises(DeviceError, match="no device"):
            await waiting
        with pytest.raises(DeviceError):
            await llm.check_health()
        with pytest.raises(DeviceError):
            await last(llm, [1], LONG)

    asyncio.run(main())
    llm.close()


def test_close_ends_what_waits(model):
    llm = AsyncLLM(model, **SETTINGS)

    async def main():
        async for _ in llm.generate([2], LONG):
            await asyncio.to_thread(llm.close)

    with pytest.raises(DeviceError, match="closed"):
        asyncio.run(main())


def test_unknown_argument_is_refused(model):
    with pytest.raises(TypeError, match="max_seqs"):
        AsyncLLM(model, max_seqs=3)
