"""Greedy text and log-probabilities are those of Hugging Face transformers, however requests are scheduled.

The goldens come from `tests/goldens/make_goldens.py`, which asserts that no position is decided by rounding:
one different token is a fault of the engine.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TINY_MODELS, tiny_weights, weights_sha256, write_tiny_model

from nanovllm_jax import LLM, RequestOutput, SamplingParams

GOLDENS = Path(__file__).parent / "goldens"
EMBEDDED = Path(__file__).parents[1] / "nanovllm_jax" / "assets" / "tiny"
MODELS = [*TINY_MODELS, "embedded"]
LOGPROB_TOLERANCE = 1e-4
BLOCK_SIZE = 16
UNLIMITED = 1024  # tokens a step: more than all prompts together
# The longest text fills 8 blocks. Prompts of 15 and 16 tokens grow from one block to three, so that more of them
# start at once than can end.
FEW_BLOCKS = 10


@dataclass(frozen=True)
class Setting:
    """How the engine schedules; none of it may change a token."""

    enable_prefix_caching: bool
    max_num_batched_tokens: int
    num_gpu_blocks_override: int | None
    batching: str
    decode_steps: int = 1

    def __str__(self) -> str:
        budget = "unlimited" if self.max_num_batched_tokens == UNLIMITED else self.max_num_batched_tokens
        cache = "cache" if self.enable_prefix_caching else "no_cache"
        blocks = "preempting" if self.num_gpu_blocks_override else "ample"
        return f"{cache}-{budget}-{blocks}-{self.batching}-{self.decode_steps}"


ALL_SETTINGS = [
    Setting(*values)
    for values in product(
        (True, False),
        (BLOCK_SIZE, BLOCK_SIZE + 1, UNLIMITED),
        (None, FEW_BLOCKS),
        ("prefill_first", "mixed"),
        (1, 3),
    )
]
# Every pair of values occurs together.
PAIRWISE = [
    Setting(True, BLOCK_SIZE, None, "prefill_first", 3),
    Setting(False, BLOCK_SIZE, FEW_BLOCKS, "mixed", 1),
    Setting(True, BLOCK_SIZE + 1, FEW_BLOCKS, "mixed", 3),
    Setting(False, BLOCK_SIZE + 1, None, "prefill_first", 1),
    Setting(True, UNLIMITED, None, "mixed", 1),
    Setting(False, UNLIMITED, FEW_BLOCKS, "prefill_first", 3),
]
# The model that goes through all of them; the others take one each, in turn.
THOROUGH = "qwen3"
QUICK = [(THOROUGH, setting) for setting in PAIRWISE] + [
    (name, PAIRWISE[index % len(PAIRWISE)]) for index, name in enumerate(MODELS) if name != THOROUGH
]


@dataclass(frozen=True)
class Golden:
    """One model's prompts, as prefixes of `stream`, with their greedy continuations."""

    weights_sha256: str
    stream: list[int]
    prompt_logprobs: list[float | None]
    cases: list[dict[str, Any]]

    def prompt(self, case: dict[str, Any]) -> list[int]:
        return self.stream[: case["prompt_length"]]


def load_golden(name: str) -> Golden:
    raw = json.loads((GOLDENS / f"{name}.json").read_text())
    return Golden(raw["weights_sha256"], raw["stream"], raw["prompt_logprobs"], raw["cases"])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory):
    """Writes a model the first time that it is asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        if name == "embedded":
            return EMBEDDED
        return folder / name if (folder / name).exists() else write_tiny_model(name, folder / name)

    return path


def make_llm(path: Path, setting: Setting) -> LLM:
    return LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        num_gpu_blocks_override=setting.num_gpu_blocks_override,
        enable_prefix_caching=setting.enable_prefix_caching,
        batching=setting.batching,
        decode_steps=setting.decode_steps,
        enforce_eager=True,
    )


def generate(llm: LLM, golden: Golden, cases: list[dict[str, Any]], logprobs: int | None = 0) -> list[RequestOutput]:
    params = SamplingParams(
        temperature=0, max_tokens=len(cases[0]["token_ids"]), ignore_eos=True, logprobs=logprobs, detokenize=False
    )
    return llm.generate([{"prompt_token_ids": golden.prompt(case)} for case in cases], params, use_tqdm=False)


def assert_golden(outputs: list[RequestOutput], cases: list[dict[str, Any]]) -> None:
    for output, case in zip(outputs, cases, strict=True):
        completion, length = output.outputs[0], case["prompt_length"]
        assert completion.token_ids == case["token_ids"], f"prompt of {length}"
        assert completion.logprobs is not None
        chosen = zip(completion.logprobs, completion.token_ids, strict=True)
        logprobs = [entry[token].logprob for entry, token in chosen]
        np.testing.assert_allclose(
            logprobs, case["logprobs"], rtol=0, atol=LOGPROB_TOLERANCE, err_msg=f"prompt of {length}"
        )


def check_setting(path: Path, golden: Golden, setting: Setting, seed: int) -> None:
    """Two batches in different orders, of which the second finds the first one's blocks in the cache."""
    with make_llm(path, setting) as llm:
        cases = golden.cases
        if setting.num_gpu_blocks_override:
            cases = 3 * [case for case in cases if case["prompt_length"] in (BLOCK_SIZE - 1, BLOCK_SIZE)] + cases
        outputs = generate(llm, golden, cases)
        assert_golden(outputs, cases)
        preempted = any(output.metrics.num_preemptions for output in outputs)
        assert preempted == (setting.num_gpu_blocks_override is not None)

        # Without log-probabilities, decode steps sample in one program, several tokens a row.
        plain = generate(llm, golden, cases, logprobs=None)
        assert [output.outputs[0].token_ids for output in plain] == [case["token_ids"] for case in cases]

        shuffled = random.Random(seed).sample(golden.cases, len(golden.cases))
        outputs = generate(llm, golden, shuffled)
        assert_golden(outputs, shuffled)
        if not setting.enable_prefix_caching:
            assert all(output.num_cached_tokens == 0 for output in outputs)
        elif setting.num_gpu_blocks_override is None:
            longest = max(outputs, key=lambda output: len(output.prompt_token_ids))
            assert longest.num_cached_tokens == len(golden.stream) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("name", MODELS)
def test_goldens_were_made_with_these_weights(name):
    if name == "embedded":
        digest = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    else:
        digest = weights_sha256(tiny_weights(TINY_MODELS[name]))
    assert digest == load_golden(name).weights_sha256, "run tests/goldens/make_goldens.py again"


@pytest.mark.parametrize(("name", "setting"), QUICK, ids=str)
def test_greedy_tokens_and_logprobs_equal_transformers(name, setting, model_path):
    check_setting(model_path(name), load_golden(name), setting, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logprobs_equal_transformers_in_every_setting(name, setting, model_path):
    for seed in range(2):
        check_setting(model_path(name), load_golden(name), setting, seed)


@pytest.mark.parametrize("name", ["qwen3", "llama3-rope", "mistral-window", "embedded"])
def test_prompt_logprobs_equal_transformers_across_chunks_and_cached_blocks(name, model_path):
    golden = load_golden(name)
    lengths = [len(golden.stream), BLOCK_SIZE + 1, 1]
    prompts = [{"prompt_token_ids": golden.stream[:length]} for length in lengths]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    with make_llm(model_path(name), Setting(True, BLOCK_SIZE + 1, None, "prefill_first")) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for output, length in zip(outputs, lengths, strict=True):
                logprobs = output.prompt_logprobs
                assert logprobs is not None
                assert len(logprobs) == length
                assert logprobs[0] is None
                got = [logprobs[i][golden.stream[i]].logprob for i in range(1, length)]
                np.testing.assert_allclose(got, golden.prompt_logprobs[1:length], rtol=0, atol=LOGPROB_TOLERANCE)
