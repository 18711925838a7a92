"""A model that is split over devices writes what it writes on one."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel_runs import PROMPTS, TIGHT, UNCACHED, generate, open_llm
from tiny_models import write_tiny_model

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.errors import ConfigError, DeviceError
from nanovllm_jax.parallel.collectives import check_exchange, exchange_params
from nanovllm_jax.parallel.mesh import make_mesh, split_heads
from nanovllm_jax.step import decode, prefill, runner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model("llama-bias", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model):
    return generate(model)[0]


@pytest.mark.parametrize(
    ("shards", "settings"),
    [
        pytest.param(2, {}, id="2"),
        pytest.param(2, TIGHT | UNCACHED, id="2-tight-uncached"),
        pytest.param(4, TIGHT, id="4-tight", marks=pytest.mark.slow),
        pytest.param(8, {}, id="8-copied-kv-heads"),
        pytest.param(8, TIGHT, id="8-tight", marks=pytest.mark.slow),
    ],
)
def test_shards_change_no_token(model, alone, shards, settings):
    tokens, num_preemptions = generate(model, shards, **settings)
    assert tokens == alone
    assert bool(num_preemptions) == (TIGHT.items() <= settings.items())


def open_with_wrong_sums(model, monkeypatch, shard):
    """Two shards, of which one finds its sums of every decode step wrong."""

    def counters(*_):  # of which the first is zero where all went well
        return (jax.lax.axis_index("model") == shard).astype(jnp.int32)[None]

    monkeypatch.setattr(decode, "fused_counters", counters)
    return LLM(
        str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=2,
        max_num_batched_tokens=64, enforce_eager=True, tensor_parallel_size=2,
    )  # fmt: skip


@pytest.mark.parametrize("shard", [0, 1])
def test_sums_that_one_shard_took_too_early_end_the_request(model, monkeypatch, shard):
    with open_with_wrong_sums(model, monkeypatch, shard) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"


def test_a_shard_that_waits_in_vain_while_requests_run_fails_the_engine(model, monkeypatch):
    exchange = exchange_params(make_mesh(2, 1), exchanged=True)["exchange"]
    failed = {"exchange": replace(exchange, buffers=exchange.buffers.at[0, 1, -1].set(-1))}
    monkeypatch.setattr(runner, "check_exchange", lambda params: check_exchange(params | failed))
    with open_with_wrong_sums(model, monkeypatch, shard=1) as llm:
        with pytest.raises(DeviceError, match="waited in vain for parts of 1 sums"):
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False)
        with pytest.raises(DeviceError, match=r"failed earlier.*waited in vain"):
            llm.step()


@pytest.mark.parametrize("most_tokens", [64, 63], ids=["even", "odd"])
def test_prompts_in_parts_change_no_token(model, alone, monkeypatch, most_tokens):
    monkeypatch.setattr(prefill, "MIN_TOKENS_IN_PARTS", 16)
    assert generate(model, 2, max_num_batched_tokens=most_tokens)[0] == alone


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_a_step_see_what_comes_before_them(num_parts):
    starts, q_lens, size = np.array([5, 0, 7, 0]), np.array([3, 9, 1, 0]), 16 // num_parts
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    seen = [[] for _ in starts]
    for part in range(num_parts):
        its, context_lens = prefill.part_of_tokens(cu_q_lens, jnp.asarray(starts, jnp.int32), part * size, size)
        for sequence, (count, end) in enumerate(zip(np.diff(its), context_lens.tolist(), strict=True)):
            seen[sequence] += range(end - count, end)
    assert seen == [list(range(start, start + n)) for start, n in zip(starts, q_lens, strict=True)]


def test_logprobs_are_those_of_one_device(model):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    found = []
    for shards in (1, 2):
        with LLM(
            str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=2,
            max_num_batched_tokens=64, enforce_eager=True, tensor_parallel_size=shards,
        ) as llm:  # fmt: skip
            output = llm.generate([list(range(20))], params, use_tqdm=False)[0]
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found.append([{token: (entry.rank, entry.logprob) for token, entry in each.items()} for each in positions])
    for one, two in zip(*found, strict=True):
        assert {token: rank for token, (rank, _) in one.items()} == {token: rank for token, (rank, _) in two.items()}
        assert [lp for _, lp in one.values()] == pytest.approx([lp for _, lp in two.values()], abs=1e-4)


@pytest.mark.slow
def test_in_bfloat16_shards_choose_among_the_five_likeliest():
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with open_llm(None, 4, 1, dtype="bfloat16") as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    scores = SamplingParams(max_tokens=1, prompt_logprobs=5)
    with open_llm(None, 1, 1, dtype="bfloat16") as llm:
        scored = llm.generate(texts, scores, use_tqdm=False)
    for text, output in zip(texts, scored, strict=True):
        ranks = [entries[token].rank for token, entries in zip(text[-24:], output.prompt_logprobs[-24:], strict=True)]
        assert max(ranks) <= 5
        assert sum(rank == 1 for rank in ranks) >= 20


def config(**sizes):
    defaults = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8,
    }  # fmt: skip
    return ModelConfig(
        family="llama",
        num_layers=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        **defaults | sizes,
    )


@pytest.mark.parametrize(
    ("sizes", "shards", "named"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "num_heads 9"),
        ({"intermediate_size": 65}, 2, "intermediate_size 65"),
        ({"vocab_size": 65}, 2, "vocab_size 65"),
        ({"num_heads": 12, "num_kv_heads": 6}, 4, "6 KV heads"),
    ],
)
def test_what_does_not_divide_is_named(sizes, shards, named):
    with pytest.raises(ConfigError, match=named):
        split_heads(config(**sizes), shards)


def test_fewer_kv_heads_than_shards_are_copied():
    split = split_heads(config(num_kv_heads=2), 8)
    assert (split.num_kv_heads, split.kv_head_copies, split.group_size) == (8, 4, 1)
