import json
import random

import pytest

from nanovllm_jax.errors import NanoVLLMError
from nanovllm_jax.loadtest.offline import random_requests, timed_run
from nanovllm_jax.sampling_params import SamplingParams


def test_draws_are_those_of_nano_vllm():
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    assert random_requests(0, 256, (100, 1024), (100, 1024)) == (prompts, lengths)


def test_throughput_prints_a_table_and_a_json_line(cli, fakes):
    result = cli("bench throughput --num-prompts 4 --input-len 3:5 --output-len 20 --repeats 2 --model m")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["min"] <= figures["output_tok_s"] <= figures["max"]
    assert (figures["model"], figures["num_prompts"], figures["input_len"]) == ("m", 4, [3, 5])
    assert "output tok/s" in result.stderr
    timed = fakes.llm.params[16:]
    assert [(p.max_tokens, p.temperature, p.ignore_eos) for p in timed] == [(20, 0.6, True)] * 8
    ids = [prompt["prompt_token_ids"] for prompt in fakes.llm.prompts]
    assert len({tuple(prompt) for prompt in ids}) == len(ids)
    assert max(map(max, ids)) < fakes.llm.model_config.vocab_size


def test_the_built_in_model_is_named_in_the_figures(cli):
    result = cli("bench throughput --num-prompts 1 --output-len 20 --repeats 1")
    assert json.loads(result.stdout)["model"] == "tiny"


def test_lengths_out_of_order_are_refused(cli, fakes):
    for text in ("5:3", "0", "many"):
        assert cli(f"bench throughput --input-len {text}").exit_code == 2
    assert not fakes.made


def test_short_output_voids_the_figure(fakes):
    llm = fakes.make()
    llm.generate = lambda prompts, params, use_tqdm: [llm._output(prompts[0], SamplingParams(max_tokens=1))]
    with pytest.raises(NanoVLLMError, match=r"1 tokens.*2 were asked for"):
        timed_run(llm, ([[1, 2]], [2]))
