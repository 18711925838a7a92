"""`LLM` as its users meet it, on a tiny random model."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_tiny_model

from nanovllm_jax import LLM, ConfigError, DeviceError, RequestError, SamplingParams
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine import build

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SETTINGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, **SETTINGS) as llm:
        yield llm


def tokens(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def generate(llm, prompts, params):
    return tokens(llm.generate(prompts, params, use_tqdm=False))


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [[length] * length for length in (40, 1, 17, 3, 64, 9)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    assert outputs[0]["token_ids"] == outputs[0].outputs[0].token_ids


def test_one_prompt_may_stand_alone(llm):
    assert generate(llm, [5, 6, 7], GREEDY) == generate(llm, [[5, 6, 7]], GREEDY)
    assert generate(llm, {"prompt_token_ids": [5, 6, 7]}, GREEDY) == generate(llm, [[5, 6, 7]], GREEDY)


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5)]
    assert [len(samples[0]) for samples in generate(llm, [[1], [1]], params)] == [1, 5]


def test_a_repeated_prompt_hits_the_prefix_cache(llm):
    llm.reset_prefix_cache()
    prompt = list(range(40))
    first, second = (llm.generate([prompt], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert tokens([first]) == tokens([second])


def test_a_salt_keeps_prefixes_apart(llm):
    prompt = list(range(50, 90))
    salted = [{"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("a", "b", "a")]
    hits = [llm.generate(one, GREEDY, use_tqdm=False)[0].num_cached_tokens for one in salted]
    assert hits == [0, 0, 32]


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(llm):
    seeded = SamplingParams(temperature=1.0, max_tokens=12, seed=7, ignore_eos=True)
    alone = generate(llm, [[1, 2, 3]], seeded)
    others = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True, top_k=20, repetition_penalty=1.2)
    crowd = generate(llm, [[9] * 30, [1, 2, 3], [4] * 20], [others, seeded, others])
    assert crowd[1] == alone[0]


def test_samples_of_one_request_differ_and_repeat(llm):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=12, seed=1, ignore_eos=True)
    first = generate(llm, [[1, 2, 3]], params)
    assert len({tuple(sample) for sample in first[0]}) == 3
    assert generate(llm, [[1, 2, 3]], params) == first


def test_a_filter_of_one_token_is_greedy(llm):
    greedy = generate(llm, [[1, 2, 3]], GREEDY)
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, **filters)
        assert generate(llm, [[1, 2, 3]], params) == greedy


def test_a_stop_token_ends_the_output(llm):
    greedy = generate(llm, [[1, 2, 3]], GREEDY)[0][0]
    stop = next(token for token in greedy if token != greedy[0])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    output = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == greedy[: greedy.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_min_tokens_puts_stop_tokens_off(llm):
    stop = generate(llm, [[1, 2, 3]], GREEDY)[0][0][0]
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=4, ignore_eos=True, stop_token_ids=[stop])
    assert stop not in generate(llm, [[1, 2, 3]], params)[0][0][:4]


def test_a_bias_decides_the_token(llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={11: 100.0})
    assert generate(llm, [[1, 2, 3]], params) == [[[11] * 4]]


def test_a_row_does_not_inherit_the_bias_of_its_last_request(llm):
    greedy = generate(llm, [[1, 2, 3]], GREEDY)[0]
    biased = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={11: 100.0})
    penalised = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    generate(llm, [[1, 2, 3]] * 4, biased)
    assert generate(llm, [[1, 2, 3]] * 4, penalised) == [greedy] * 4


def test_a_large_repetition_penalty_forbids_repeats(llm):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, repetition_penalty=1e6)
    output = generate(llm, [[1, 2, 3]], params)[0][0]
    assert len(set(output) | {1, 2, 3}) == 19


def test_logprobs_hold_the_token_and_the_best(llm):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    output = llm.generate([list(range(1, 40))], params, use_tqdm=False)[0]
    sample = output.outputs[0]
    for token, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        assert entries[token].rank == 1
        assert len(entries) == 2
    assert sample.cumulative_logprob == pytest.approx(
        sum(entries[token].logprob for token, entries in zip(sample.token_ids, sample.logprobs, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 39
    assert all(token in entries for token, entries in zip(range(2, 40), output.prompt_logprobs[1:], strict=True))


def test_priority_serves_the_smallest_first(model):
    with LLM(model, **SETTINGS | {"max_num_seqs": 1}, scheduling_policy="priority") as llm:
        for name, priority in (("low", 5), ("high", 0), ("middle", 3)):
            llm.add_request(name, [1, 2, 3], GREEDY, priority=priority)
        order = []
        while llm.has_unfinished():
            order += [output.request_id for output in llm.step()]
    assert order == ["high", "middle", "low"]


def test_a_stream_grows_to_the_whole_output(llm):
    seen = [list(output.outputs[0].token_ids) for output in llm.stream([1, 2, 3], GREEDY)]
    assert [len(ids) for ids in seen] == list(range(1, 9))
    assert seen[-1] == generate(llm, [[1, 2, 3]], GREEDY)[0][0]


def test_leaving_a_stream_ends_its_request(llm):
    for _ in llm.stream([1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True)):
        break
    assert not llm.has_unfinished()


def test_a_stream_ends_with_its_aborted_request(llm):
    seen = 0
    for output in llm.stream([1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True)):
        seen += 1
        llm.abort(output.request_id)
    assert seen == 1
    assert not llm.has_unfinished()


def test_an_aborted_request_gives_no_output(llm):
    llm.add_request("kept", [1, 2, 3], GREEDY)
    llm.add_request("dropped", [4, 5, 6], GREEDY)
    llm.step()
    llm.abort("dropped")
    finished = []
    while llm.has_unfinished():
        finished += [output.request_id for output in llm.step()]
    assert finished == ["kept"]


def test_ctrl_c_ends_the_requests_and_leaves_the_engine_usable(llm):
    greedy = generate(llm, [[1, 2, 3]], GREEDY)
    steps = 0

    def interrupt(schedule, dispatch=llm._engine.replicas[0].runner.dispatch):
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return dispatch(schedule)

    llm._engine.replicas[0].runner.dispatch = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(llm, [[1, 2, 3]], SamplingParams(max_tokens=100, ignore_eos=True))
    finally:
        del llm._engine.replicas[0].runner.dispatch
    assert not llm.has_unfinished()
    assert generate(llm, [[1, 2, 3]], GREEDY) == greedy


def test_a_second_ctrl_c_does_not_wait_for_a_device_that_hangs(model):
    def multiply(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: np.float32(1e-3) * x @ x, x)[0].astype(np.int32)

    matrix = jax.numpy.ones((500, 500))
    slow = jax.jit(multiply).lower(matrix, 20).compile()
    slow(matrix, 20).block_until_ready()
    began = time.perf_counter()
    slow(matrix, 20).block_until_ready()
    two_seconds = int(20 * 2 / (time.perf_counter() - began))
    llm = LLM(model, **SETTINGS)
    generate(llm, [[1, 2, 3]], GREEDY)  # nothing compiles below
    llm.add_request("a", [1, 2, 3], GREEDY)
    llm.step()  # dispatches only
    llm._engine.replicas[0].in_flight[0].tokens = hung = slow(matrix, two_seconds)
    presses = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in (0.1, 0.5)]
    for press in presses:
        press.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        assert not hung.is_ready()
        with pytest.raises(DeviceError, match="Ctrl-C came twice"):
            llm.step()
        llm.close()
        assert not hung.is_ready()
    finally:
        for press in presses:
            press.join()


def test_ctrl_c_while_prompts_are_queued_leaves_the_engine_usable(llm, monkeypatch):
    scheduler, greedy = llm._engine.replicas[0].scheduler, generate(llm, [[1, 2, 3]], GREEDY)
    with monkeypatch.context() as patch:
        add = scheduler.add
        patch.setattr(scheduler, "add", lambda request: (add(request), signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            generate(llm, [[1, 2, 3], [4, 5, 6]], GREEDY)
    assert not llm.has_unfinished()
    assert generate(llm, [[1, 2, 3]], GREEDY) == greedy


_LEAVE_HALF_READ = """
from nanovllm_jax import LLM, SamplingParams

llm = LLM(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, enforce_eager=True)
stream = llm.stream([1], SamplingParams(max_tokens=100, ignore_eos=True))
next(stream)
"""


def test_a_process_may_end_with_a_stream_half_read():
    ended = subprocess.run([sys.executable, "-c", _LEAVE_HALF_READ], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "max_length"])
def test_only_template_variables_reach_the_template(name):
    with LLM(max_model_len=128, max_num_seqs=1, enforce_eager=True) as llm, pytest.raises(RequestError, match=name):
        llm.chat([{"role": "user", "content": "Hi"}], chat_template_kwargs={name: 1})


def test_a_conversation_is_a_list_of_dicts():
    with LLM(max_model_len=128, max_num_seqs=1, enforce_eager=True) as llm:
        for wrong in ("hi", ["hi", "you"], {"role": "user", "content": "hi"}, [["hi"]]):
            with pytest.raises(RequestError, match="give a list of dicts"):
                llm.chat(wrong)


def test_ctrl_c_while_a_stream_begins_leaves_the_engine_usable(llm, monkeypatch):
    scheduler = llm._engine.replicas[0].scheduler
    with monkeypatch.context() as patch:
        add = scheduler.add
        patch.setattr(scheduler, "add", lambda request: (add(request), signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            next(llm.stream([1, 2, 3], GREEDY))
    assert not llm.has_unfinished()
    assert len(generate(llm, [[1, 2, 3]], GREEDY)[0][0]) == 8


def test_a_request_that_cannot_be_queued_leaves_nothing_behind(llm, monkeypatch):
    scheduler = llm._engine.replicas[0].scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "add", lambda request: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.add_request("again", [1, 2, 3], GREEDY)
    llm.add_request("again", [1, 2, 3], GREEDY)
    llm.abort("again")
    assert not llm.has_unfinished()


def test_ctrl_c_in_a_loop_of_steps_loses_no_output(llm, monkeypatch):
    runner, finished = llm._engine.replicas[0].runner, []
    read = runner.read
    monkeypatch.setattr(runner, "read", lambda step: (read(step), signal.raise_signal(signal.SIGINT))[0])
    for request_id in ("first", "second"):
        llm.add_request(request_id, [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    while llm.has_unfinished():
        with suppress(KeyboardInterrupt):
            finished += [output.request_id for output in llm.step()]
    assert sorted(finished) == ["first", "second"]


def test_a_stream_has_the_engine_for_itself(llm):
    with pytest.raises(RequestError, match="1000000"):
        llm.stream([10**6])
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    next(stream)
    for wrong in (llm.step, lambda: llm.add_request("other", [1, 2, 3])):
        with pytest.raises(RequestError, match=r"while stream\(\) runs"):
            wrong()
    assert len(list(stream)[-1].outputs[0].token_ids) == 5
    llm.add_request("other", [1, 2, 3], GREEDY)
    llm.abort("other")


def test_it_generates_in_a_thread_of_its_own(llm):
    found = []
    thread = threading.Thread(target=lambda: found.extend(generate(llm, [[1, 2, 3]], GREEDY)))
    thread.start()
    thread.join()
    assert found == generate(llm, [[1, 2, 3]], GREEDY)


def test_close_gives_the_device_memory_back(model):
    before = {id(array) for array in jax.live_arrays()}
    llm = LLM(model, **SETTINGS)
    generate(llm, [[1, 2, 3]], GREEDY)
    llm.close()
    assert not [array for array in jax.live_arrays() if id(array) not in before and array.nbytes > 1024]
    with pytest.raises(DeviceError, match="closed"):
        llm.generate([[1]], GREEDY, use_tqdm=False)


def test_close_gives_the_device_memory_back_when_the_step_in_flight_fails(model):
    before = {id(array) for array in jax.live_arrays()}
    llm = LLM(model, **SETTINGS)
    llm.add_request("a", [1, 2, 3], GREEDY)
    llm.step()  # dispatches only

    def fail(step):
        raise RuntimeError("no device")

    llm._engine.replicas[0].runner.read = fail
    with pytest.raises(DeviceError, match="no device"):
        llm.close()
    assert not [array for array in jax.live_arrays() if id(array) not in before and array.nbytes > 1024]
    llm.close()  # changes nothing any more
    with pytest.raises(DeviceError, match="closed"):
        llm.step()


def test_two_engines_one_after_the_other_agree(model):
    results = []
    for _ in range(2):
        with LLM(model, **SETTINGS) as llm:
            results.append(generate(llm, [[1, 2, 3]], GREEDY))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "no tokens"),
        (["text"], GREEDY, "no tokenizer"),
        ([[1, 10**6]], GREEDY, "1000000"),
        ([[-1]], GREEDY, "-1"),
        ([[1] * 500], GREEDY, "128"),
        ([[1.5]], GREEDY, "token ids"),
        ([{"promt": "x"}], GREEDY, "prompt_token_ids"),
        (5, GREEDY, "int"),
        ([[1], [2]], [GREEDY], "1 sampling parameters for 2 prompts"),
        ([[1]], ["greedy"], "SamplingParams"),
        ([[1]], 3, "sampling_params is 3"),
        ([[1]], {"max_tokens": 3}, "sampling_params is {'max_tokens': 3}"),
        ([[1]], SamplingParams(logprobs=21), "20"),
        ([[1]], SamplingParams(logit_bias={10**6: 1.0}), "1000000"),
        ([[1]], SamplingParams(bad_words=["x"]), "tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_and_loses_nothing(llm, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert not llm.has_unfinished()
    assert len(generate(llm, [[1, 2, 3]], GREEDY)[0][0]) == 8


@pytest.mark.parametrize(("priority", "message"), [(1, "priority is 1"), ([1, 2], "2 priorities for 1 prompts")])
def test_a_priority_for_each_prompt_is_asked_for(llm, priority, message):
    with pytest.raises(RequestError, match=message):
        llm.generate([[1]], GREEDY, use_tqdm=False, priority=priority)


def test_a_full_step_starts_before_the_last_prompt_is_checked(llm, monkeypatch):
    events, engine = [], llm._engine
    prepare, dispatch = engine.prepare, engine.replicas[0].runner.dispatch
    monkeypatch.setattr(engine, "prepare", lambda *args, **kw: events.append("prepare") or prepare(*args, **kw))
    monkeypatch.setattr(
        engine.replicas[0].runner, "dispatch", lambda schedule: events.append("dispatch") or dispatch(schedule)
    )
    prompts = [[index] * 40 for index in range(1, 7)]
    outputs = generate(llm, prompts, GREEDY)
    assert events[:4] == ["prepare"] * 2 + ["dispatch", "prepare"]
    assert outputs == [generate(llm, [prompt], GREEDY)[0] for prompt in prompts]


def test_steps_go_on_while_prompts_are_tokenised(llm, monkeypatch):
    events, engine = [], llm._engine
    prepare, dispatch = engine.prepare, engine.replicas[0].runner.dispatch

    def tokenise(*args, **kwargs):
        engine.wait()  # as long as the devices work
        events.append("prepare")
        return prepare(*args, **kwargs)

    monkeypatch.setattr(engine, "prepare", tokenise)
    monkeypatch.setattr(
        engine.replicas[0].runner, "dispatch", lambda schedule: events.append("dispatch") or dispatch(schedule)
    )
    prompts = [[index] * 40 for index in range(201, 221)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    while events[-1] == "dispatch":
        events.pop()
    assert events.count("dispatch") > len(prompts) / 2  # a step for each prompt, but where all rows have ended
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert tokens(outputs) == [generate(llm, [prompt], GREEDY)[0] for prompt in prompts]


def test_a_prompt_that_is_refused_amid_others_that_ended_leaves_the_engine_usable(llm, monkeypatch):
    ended, engine = [], llm._engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda **kwargs: [ended.append(out) or out for out in step(**kwargs)])
    monkeypatch.setattr(engine, "prepare", lambda *args, p=engine.prepare, **kw: engine.wait() or p(*args, **kw))
    prompts = [[index] * 40 for index in range(1, 41)]
    with pytest.raises(RequestError, match="1000000"):
        llm.generate([*prompts, [10**6], *prompts], GREEDY, use_tqdm=False)
    assert ended
    assert not llm.has_unfinished()
    assert [len(samples[0]) for samples in generate(llm, prompts[:3], GREEDY)] == [8] * 3


def test_no_garbage_is_collected_before_the_first_step(llm, monkeypatch):
    enabled, engine = [], llm._engine
    prepare, dispatch = engine.prepare, engine.replicas[0].runner.dispatch
    monkeypatch.setattr(engine, "prepare", lambda *args, **kw: enabled.append(gc.isenabled()) or prepare(*args, **kw))
    monkeypatch.setattr(
        engine.replicas[0].runner, "dispatch", lambda schedule: enabled.append(gc.isenabled()) or dispatch(schedule)
    )
    generate(llm, [[index] * 40 for index in range(101, 104)], GREEDY)  # none of them cached
    assert enabled[:4] == [False, False, False, True]
    with pytest.raises(RequestError):
        generate(llm, [[10**6]], GREEDY)
    assert gc.isenabled()
    gc.disable()
    try:
        generate(llm, [[1]], GREEDY)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_prompt_that_is_refused_after_a_step_started_loses_nothing(llm):
    with pytest.raises(RequestError, match="1000000"):
        llm.generate([*([index] * 40 for index in range(1, 7)), [10**6]], GREEDY, use_tqdm=False)
    assert not llm.has_unfinished()
    assert len(generate(llm, [[1, 2, 3]], GREEDY)[0][0]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization is True"),
        ({"max_num_seqs": 2.0}, "max_num_seqs is 2.0"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization is '0.5'"),
        ({"max_logprobs": -1}, "max_logprobs is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"block_size": 7}, "block_size is 7"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"tensor_parallel_size": 3}, "does not divide"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0"),
        ({"max_model_len": 10**6}, "256"),
        ({"max_num_batched_tokens": 2}, "max_num_seqs"),
        ({"dtype": "int8"}, "int8"),
        ({"attention_backend": "flash"}, "flash"),
        ({"attention_backend": "triton"}, "need an NVIDIA GPU"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        LLM(model, **SETTINGS | arguments)


def test_sizes_may_be_numpys():
    config = EngineConfig(max_num_seqs=np.int64(4), seed=np.uint32(1))
    assert config == EngineConfig(max_num_seqs=4, seed=1)
    assert type(config.max_num_seqs) is int


def test_more_shards_than_devices_are_refused(model):
    with pytest.raises(
        DeviceError, match=r"tensor_parallel_size 16 needs 16 devices, but JAX sees 8 .*device_count=16"
    ):
        LLM(model, **SETTINGS, tensor_parallel_size=16)


@pytest.mark.parametrize(
    "arguments", [{"tensor_parallel_size": 16}, {"tensor_parallel_size": 3}, {"max_model_len": 10**6}]
)
def test_sizes_that_cannot_be_are_told_before_anything_is_read(model, monkeypatch, arguments):
    for slow in ("load_tokenizer", "load_params"):
        monkeypatch.setattr(build, slow, lambda *args: pytest.fail("it was read"))
    with pytest.raises((ConfigError, DeviceError)):
        LLM(model, **SETTINGS | {"skip_tokenizer_init": False} | arguments)


def test_too_few_blocks_are_refused(model):
    with pytest.raises(DeviceError, match="raise num_gpu_blocks_override or lower max_num_seqs"):
        LLM(model, **SETTINGS, num_gpu_blocks_override=3)


def test_unknown_arguments_are_refused(model):
    with pytest.raises(TypeError, match="max_sequences"):
        LLM(model, max_sequences=4)


def test_non_finite_logits_end_their_request_alone(tmp_path):
    # Its head is a matrix of its own: with a tied one, every request's logits would hold the poison.
    with LLM(str(write_tiny_model("qwen3-untied", tmp_path)), **SETTINGS) as llm:
        greedy = generate(llm, [[1, 2, 3]], GREEDY)
        runner = llm._engine.replicas[0].runner
        embed = runner._params["embed"]
        runner._params["embed"] = embed.at[200].set(float("nan"))
        outputs = llm.generate([[1, 2, 200], [1, 2, 3]], GREEDY, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].token_ids == greedy[0][0]


def test_what_a_failed_request_computed_is_not_shared(tmp_path):
    prompt = [*range(1, 20), 200, *range(20, 50)]
    with LLM(str(write_tiny_model("qwen3-untied", tmp_path)), **SETTINGS) as llm:
        expected = generate(llm, [prompt], GREEDY)
        llm.reset_prefix_cache()
        runner = llm._engine.replicas[0].runner
        embed = runner._params["embed"]
        runner._params["embed"] = embed.at[200].set(float("nan"))
        assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "error"
        runner._params["embed"] = embed
        assert generate(llm, [prompt], GREEDY) == expected


def test_nothing_compiles_after_warm_up(model):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    rng = random.Random(0)
    with LLM(model, **SETTINGS | {"enforce_eager": False}) as llm:
        assert compiled
        compiled.clear()
        added = 0
        while added < 500 or llm.has_unfinished():
            for _ in range(rng.randrange(4) if added < 500 else 0):
                llm.add_request(str(added), random_prompt(rng), random_params(rng))
                added += 1
            llm.step()
    assert compiled == []


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.choice((1, 3, 15, 16, 17, 40, 100)))]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 5)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        max_tokens=rng.choice((1, 4, 12)),
        logprobs=rng.choice((None, None, 3)),
        prompt_logprobs=rng.choice((None, None, None, 2)),
        min_tokens=rng.choice((0, 0, 1)),
        n=1,
        ignore_eos=True,
    )


def test_generate_does_not_swallow_the_outputs_of_added_requests(llm):
    llm.add_request("added", [1, 2, 3], GREEDY)
    with pytest.raises(RequestError, match="unfinished"):
        llm.generate([[1]], GREEDY, use_tqdm=False)
    llm.abort("added")


def test_scales_of_a_float8_cache_come_from_the_checkpoint(tmp_path):
    """As compressed-tensors writes them: 1 changes nothing, 0.001 saturates what the cache can hold."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    plain = write_tiny_model("qwen3", tmp_path / "plain")

    def logprobs(scale, kv_cache_dtype):
        directory = shutil.copytree(plain, tmp_path / f"{scale}")
        if scale is not None:
            config, tensors = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors")
            config["quantization_config"] = {"config_groups": {}, "kv_cache_scheme": scheme}
            for layer, name in itertools.product(range(config["num_hidden_layers"]), ("k_scale", "v_scale")):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = np.full(1, scale, np.float32)
            (directory / "config.json").write_text(json.dumps(config))
            save_file(tensors, directory / "model.safetensors")
        with LLM(str(directory), **SETTINGS | {"kv_cache_dtype": kv_cache_dtype}) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
            output = llm.generate([list(range(1, 40))], params, use_tqdm=False)[0].outputs[0]
        shutil.rmtree(directory)
        return [next(iter(position.values())).logprob for position in output.logprobs]

    assert logprobs(1.0, "fp8") == logprobs(None, "fp8")
    assert logprobs(0.001, "fp8") != logprobs(None, "fp8")
    assert logprobs(0.001, "auto") == logprobs(None, "auto")
