"""How many rows decode steps are compiled for, and how many they compute."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from test_programs import QWEN3, catalogue
from tiny_models import write_tiny_model

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.step import decode as decode_step
from nanovllm_jax.step.buckets import decode_buckets, filtered_buckets
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_kernels import lowering_for

FINE = [1, 8, 16, 24, 32, 40, 48, 56, 64, 128, 192, 256]


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (4, [1, 4]), (12, [1, 8, 12]), (100, [*FINE[:9], 100]), (256, FINE), (320, [*FINE, 320])],
)
def test_a_gpus_steps_are_of_one_row_or_of_rows_that_are_copied_together(most, sizes):
    assert decode_buckets(most, fine=True) == sizes
    filtered = filtered_buckets(most, fine=True)
    assert set(filtered) <= set(sizes)
    assert filtered[-1] == most


def computed_rows(model, rows, shards=1):
    """As many as hidden states have in a decode step for a GPU."""
    jaxpr = str(catalogue("triton", shards, model=model, most_rows=16).trace(ProgramKey("decode", rows)).jaxpr)
    return {count for count in {1, 4, 8, rows} if f"bf16[{count},{model.hidden_size}]" in jaxpr}


def test_products_of_other_rows_are_padded_but_one_row_that_has_a_kernel_or_is_added_over_shards():
    large = replace(QWEN3, hidden_size=4096, intermediate_size=12288)  # beyond a multiprocessor's registers
    with lowering_for(90):
        assert computed_rows(large, 1) == computed_rows(large, 4) == {8}
        assert computed_rows(large, 16) == {16}
        assert computed_rows(QWEN3, 1) == computed_rows(large, 1, shards=2) == {1}


def test_padded_steps_give_the_tokens_of_steps_as_they_are(monkeypatch, tmp_path):
    model = str(write_tiny_model("qwen3", tmp_path))
    prompts = [[7, 8, 9], [1] * 20, [5]]
    # Log-probabilities are drawn apart from the step.
    params = [
        SamplingParams(temperature=t, max_tokens=9, seed=1, logprobs=n) for t, n in ((0, None), (1, None), (0, 2))
    ]

    def generate():
        with LLM(model, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, decode_steps=2) as llm:
            both = [llm.generate(prompts[:count], params[:count], use_tqdm=False) for count in (2, 3)]
            return [[output.outputs[0].token_ids for output in outputs] for outputs in both]

    as_they_are, padded = generate(), []

    def pad(config, params, caches, delta):
        padded.append(delta.shape)
        return jnp.concatenate([delta, decode_step.no_decodes(-delta.shape[1] % 8)], axis=1)

    monkeypatch.setattr(decode_step, "_padded", pad)
    assert generate() == as_they_are
    assert (3, 4) in padded
