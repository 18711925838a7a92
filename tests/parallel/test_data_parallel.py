"""Replicas write what one device writes, each with a cache of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

import pytest
from parallel_runs import PROMPTS, TIGHT, UNCACHED, generate, open_llm
from tiny_models import write_tiny_model

from nanovllm_jax import AsyncLLM, SamplingParams
from nanovllm_jax.engine.inputs import bad_word_ids
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.parallel.mesh import make_mesh, replica_meshes

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PRODUCTS = [(shards, replicas) for shards in (1, 2, 4, 8) for replicas in (1, 2, 4, 8) if 1 < shards * replicas <= 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model("llama-bias", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model):
    return {path: generate(path)[0] for path in (model, None)}


@pytest.mark.parametrize(
    ("shards", "replicas", "settings"),
    [
        pytest.param(1, 2, {}, id="dp2"),
        pytest.param(1, 2, TIGHT | UNCACHED, id="dp2-tight-uncached"),
        pytest.param(2, 2, TIGHT, id="tp2-dp2-tight"),
    ],
)
def test_replicas_change_no_token(model, alone, shards, replicas, settings):
    tokens, num_preemptions = generate(model, shards, replicas, **settings)
    assert tokens == alone[model] * replicas
    assert bool(num_preemptions) == (TIGHT.items() <= settings.items())


@pytest.mark.slow
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("settings", [{}, UNCACHED, TIGHT, TIGHT | UNCACHED], ids=["", "uncached", "tight", "both"])
@pytest.mark.parametrize(("shards", "replicas"), PRODUCTS)
def test_no_product_of_both_changes_a_token(model, alone, shards, replicas, settings, embedded):
    path = None if embedded else model
    tokens, num_preemptions = generate(path, shards, replicas, **settings)
    assert tokens == alone[path] * replicas
    assert bool(num_preemptions) == (TIGHT.items() <= settings.items())


@pytest.fixture(scope="module")
def two():
    with open_llm(None, 1, 2) as llm:
        yield llm


def devices_of(llm):
    return [replica.runner.programs.catalogue.mesh.devices.flatten().tolist() for replica in llm._engine.replicas]


def test_outputs_come_in_the_order_of_the_prompts_and_both_replicas_work(two):
    running = []
    step = two._engine.step
    replicas = two._engine.replicas
    two._engine.step = lambda **kw: running.append([r.scheduler.num_running for r in replicas]) or step(**kw)
    lengths = [9, 2, 12, 1, 7, 3, 11, 5]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = two.generate(PROMPTS, params, use_tqdm=False)
    del two._engine.step
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert all(max(counts) > 0 for counts in zip(*running, strict=True))


def test_a_prompt_goes_where_its_prefix_is_cached(two):
    prompt = list(range(100, 164))
    others = [[i] * 50 for i in range(3)]
    two.generate([prompt, *others], GREEDY, use_tqdm=False)
    for tail in range(4):
        assert two.generate([[*prompt, tail]], GREEDY, use_tqdm=False)[0].num_cached_tokens >= 48
    stats = two._engine.update_gauges()
    assert stats.num_hit_tokens == sum(r.scheduler.block_manager.num_hit_tokens for r in two._engine.replicas) >= 4 * 48
    assert two.reset_prefix_cache()
    assert two.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_requests_are_aborted_on_their_replica_and_the_caches_stay_while_one_runs(two):
    for i in range(4):
        two.add_request(str(i), [i] * 20, SamplingParams(max_tokens=50, ignore_eos=True))
    two.step()
    assert not two.reset_prefix_cache()
    assert [replica.scheduler.num_running for replica in two._engine.replicas] == [2, 2]
    for i in range(3):
        two.abort(str(i))
    finished = [output for _ in range(200) if two.has_unfinished() for output in two.step() if output.finished]
    assert [(output.request_id, len(output.outputs[0].token_ids)) for output in finished] == [("3", 50)]
    assert two.reset_prefix_cache()


@pytest.mark.slow
def test_many_tasks_share_the_replicas(two):
    arguments = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
    llm = AsyncLLM(None, skip_tokenizer_init=True, enforce_eager=True, data_parallel_size=2, **arguments)

    async def last(prompt):
        return [output async for output in llm.generate(prompt, GREEDY)][-1]

    async def all_at_once():
        return await asyncio.gather(*map(last, PROMPTS))

    try:
        tokens = [output.outputs[0].token_ids for output in asyncio.run(all_at_once())]
        assert llm.stats.num_finished["length"] == len(PROMPTS)
    finally:
        llm.close()
    assert tokens == [output.outputs[0].token_ids for output in two.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.slow
def test_bad_words_of_several_tokens_are_kept_out_on_every_replica():
    prompts = ["To be, or not to be", "Who is there?", "The king", "And God said"]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = []
    for replicas in (1, 2):
        with open_llm(None, 1, replicas, skip_tokenizer_init=False) as llm:
            words = [" ".join(o.outputs[0].text.split()[:2]) for o in llm.generate(prompts, params, use_tqdm=False)]
            without = dataclasses.replace(params, bad_words=words)
            found.append([o.outputs[0].text for o in llm.generate(prompts, without, use_tqdm=False)])
            assert any(len(word) > 1 for word in bad_word_ids(words, llm.get_tokenizer()))
    assert found[0] == found[1]


def test_an_inspection_looks_into_the_first_replica(two):
    report = two.inspect()
    assert report.card.devices == 1


def test_the_compile_log_has_every_replica(two):
    two.generate(PROMPTS, GREEDY, use_tqdm=False)
    report = two.inspect()
    logged = {(entry.replica, entry.program) for entry in two.compile_log}
    assert {program for replica, program in logged if replica == 0} == {one.program for one in report.compilations}
    assert {replica for replica, _ in logged} == {0, 1}


def test_the_start_says_what_each_device_holds(caplog):
    with caplog.at_level(logging.INFO, logger="nanovllm_jax"), open_llm(None, 2, 2) as llm:
        assert [[device.id for device in devices] for devices in devices_of(llm)] == [[0, 1], [2, 3]]
    assert "mesh of 4 x cpu (2 data, 2 model): each device holds" in caplog.text
    assert "replica 1: cpu:2, cpu:3" in caplog.text


def test_more_devices_than_there_are_name_both_sizes():
    with pytest.raises(DeviceError, match=r"data_parallel_size 4 x tensor_parallel_size 4 needs 16 devices.*sees 8"):
        make_mesh(4, 4)


def test_replicas_share_no_device():
    meshes = replica_meshes(make_mesh(2, 4))
    assert [dict(mesh.shape) for mesh in meshes] == [{"data": 1, "model": 2}] * 4
    assert len({device for mesh in meshes for device in mesh.devices.flat}) == 8
