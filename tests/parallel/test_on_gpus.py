"""Replicas and shards on GPUs of one host: they write what one GPU writes."""

import jax
import pytest

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.step import executables
from nanovllm_jax.step.relocation import load_relocated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no GPU"),
]
PROMPTS = [[1, 2, 3], list(range(50, 90)), [7] * 20, [300, 400, 500, 600]]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ARGUMENTS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "compile_at_start": False,
    "num_gpu_blocks_override": 64,  # else programs are compiled to learn how much memory they need
}


def generate(prompts, **settings):
    with LLM(skip_tokenizer_init=True, **ARGUMENTS | settings) as llm:
        logs = [replica.runner.programs.compile_log for replica in llm._engine.replicas]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], logs


@pytest.fixture
def own_cache(tmp_path, monkeypatch, no_xla_cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_program_that_is_loaded_as_if_for_other_devices_does_the_same(own_cache, monkeypatch):
    alone, _ = generate(PROMPTS)

    def load(payload, in_tree, out_tree, *, backend, execution_devices):
        ids = [device.id for device in execution_devices]
        return load_relocated((payload, in_tree, out_tree), ids, execution_devices, None)

    monkeypatch.setattr(executables.serialize_executable, "deserialize_and_load", load)
    again, (log,) = generate(PROMPTS)
    assert again == alone
    assert len(log) > 3
    assert all(record.trace_s == 0 for record in log)


@pytest.mark.parametrize("shards", [1, 2])
def test_programs_that_processes_without_a_gpu_compile_do_the_same(own_cache, caplog, shards):
    if jax.device_count() < shards:
        pytest.skip(f"needs {shards} GPUs")
    here, (log_here,) = generate(PROMPTS, tensor_parallel_size=shards)
    for record in log_here:  # what was compiled here is not to be found
        assert not record.cache_hit
    there, (log,) = generate(PROMPTS, tensor_parallel_size=shards, compile_at_start=True, max_logprobs=19)
    assert there == here
    assert len(log) > len(log_here)
    assert not any(record.cache_hit for record in log)
    assert caplog.text == ""


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
def test_each_replica_writes_what_one_gpu_writes_and_only_the_first_compiles(own_cache):
    count = min(jax.device_count(), len(PROMPTS))
    # A prompt a replica, alone in its bucket as it is on one GPU.
    alone = [generate([prompt])[0][0] for prompt in PROMPTS[:count]]
    tokens, logs = generate(PROMPTS[:count], data_parallel_size=count)
    assert tokens == alone
    assert all(record.trace_s == 0 for log in logs for record in log)


SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(jax.device_count() < size, reason=f"needs {size} GPUs"))
    for size in (2, 4, 8)
]


@pytest.mark.parametrize("shards", SIZES)
def test_shards_write_what_one_gpu_writes(shards):
    alone, _ = generate(PROMPTS, dtype="float32")
    tokens, _ = generate(PROMPTS, dtype="float32", tensor_parallel_size=shards)
    assert tokens == alone


@pytest.mark.parametrize("shards", SIZES)
def test_in_bfloat16_shards_choose_among_the_five_likeliest_of_one_gpu(shards):
    tokens, _ = generate(PROMPTS, tensor_parallel_size=shards)
    texts = [[*prompt, *its_tokens] for prompt, its_tokens in zip(PROMPTS, tokens, strict=True)]
    scores = SamplingParams(max_tokens=1, prompt_logprobs=5)
    with LLM(skip_tokenizer_init=True, **ARGUMENTS) as llm:
        scored = llm.generate(texts, scores, use_tqdm=False)
    for text, output in zip(texts, scored, strict=True):
        pairs = zip(text[-NUM_TOKENS:], output.prompt_logprobs[-NUM_TOKENS:], strict=True)
        ranks = [entries[token].rank for token, entries in pairs]
        assert max(ranks) <= 5
        assert sum(rank == 1 for rank in ranks) >= NUM_TOKENS * 5 // 6


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four GPUs")
def test_replicas_of_two_shards_write_what_one_gpu_writes():
    alone, _ = generate(PROMPTS, dtype="float32")
    tokens, logs = generate(PROMPTS, dtype="float32", tensor_parallel_size=2, data_parallel_size=2)
    assert tokens == alone
    assert all(log for log in logs)
