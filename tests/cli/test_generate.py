import json

import pytest

from nanovllm_jax.errors import ConfigError, DeviceError, RequestError, WeightsError
from nanovllm_jax.sampling_params import SamplingParams


def test_one_prompt_is_printed_with_its_continuation(cli, fakes):
    result = cli("generate 'to be'")
    assert result.exit_code == 0
    assert result.stdout == "to be TO BE\n"
    assert "6 tokens in" in result.stderr
    assert "tok/s" in result.stderr
    assert fakes.llm.model is None
    assert fakes.llm.closed


def test_no_echo_prints_the_continuation_alone(cli):
    assert cli("generate 'to be' --no-echo").stdout == " TO BE\n"


def test_markup_and_emoji_codes_in_prompts_are_left_alone(cli):
    assert cli("generate '[bold]a[/] :smile:'").stdout.startswith("[bold]a[/] :smile: [BOLD]")


def test_several_prompts_keep_their_order(cli, fakes):
    result = cli("generate 'a b' c --no-echo")
    assert result.stdout == " A B\n C\n"
    assert fakes.llm.arguments["max_num_seqs"] == 2


def test_json_gives_one_line_a_sample(cli, fakes):
    result = cli("generate 'hé' b --json --n 2 --temperature 0.5")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], line["index"]) for line in lines] == [("hé", 0), ("hé", 1), ("b", 0), ("b", 1)]
    assert lines[0]["text"] == " HÉ"
    assert lines[0]["finish_reason"] == "length"
    assert lines[2]["token_ids"] == [ord(" "), ord("B")]
    assert fakes.llm.arguments["max_num_seqs"] == 4


def test_many_samples_of_a_short_prompt_fit_a_step(cli, fakes):
    assert cli("generate x --n 1000 --temperature 1").exit_code == 0
    assert fakes.llm.arguments["max_num_batched_tokens"] >= fakes.llm.arguments["max_num_seqs"] == 256


def test_prompts_come_from_a_file_and_from_stdin(cli, fakes, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("eins\n\nzwei\n", encoding="utf-8")
    assert cli(f"generate null --file {file} --no-echo").stdout == " NULL\n EINS\n ZWEI\n"
    assert cli("generate --file - --no-echo", input="drei\n").stdout == " DREI\n"


def test_file_that_cannot_be_read_is_a_usage_error(cli, fakes):
    result = cli("generate --file /no/such/file")
    assert result.exit_code == 2
    assert "/no/such/file" in result.stderr
    assert not fakes.made


def test_without_a_prompt_it_says_what_to_do(cli, fakes):
    result = cli("generate")
    assert result.exit_code == 2
    assert "--file" in result.stderr
    assert not fakes.made


@pytest.mark.parametrize("line", ["''", "a ''", "a --model /no/such", "a --tokenizer ./none", "a --max-model-len 1"])
def test_what_cannot_work_is_told_before_a_model_is_opened(cli, fakes, line):
    assert cli(f"generate {line}").exit_code == 2
    assert not fakes.made


def test_greedy_unless_model_or_user_says_otherwise(cli, fakes):
    cli("generate a")
    cli("generate a --top-p 0.9")
    cli("generate a --n 2")
    fakes.defaults = SamplingParams(temperature=0.6, top_k=20)
    cli("generate a")
    cli("generate a --temperature 0")
    params = [llm.params[0] for llm in fakes.made]
    assert [p.temperature for p in params] == [0.0, 1.0, 1.0, 0.6, 0.0]
    assert params[1].top_p == 0.9
    assert params[3].top_k == 20


def test_options_reach_engine_and_sampler(cli, fakes):
    result = cli(
        "generate a -m m --max-tokens 3 --temperature 0.5 --top-p 0.8 --top-k 7 --min-p 0.1 --seed 4 "
        "--stop x --stop y --ignore-eos --tokenizer t --dtype float32 --kv-cache-dtype fp8 "
        "--max-model-len 99 -tp 2 -dp 3 --gpu-memory-utilization 0.5 --attention-backend xla --enforce-eager"
    )
    assert result.exit_code == 0, result.output
    assert fakes.llm.model == "m"
    assert fakes.llm.arguments == {
        "tokenizer": "t",
        "dtype": "float32",
        "kv_cache_dtype": "fp8",
        "max_model_len": 99,
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "gpu_memory_utilization": 0.5,
        "attention_backend": "xla",
        "enforce_eager": True,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 64,
    }
    assert fakes.llm.params == [
        SamplingParams(
            max_tokens=3,
            temperature=0.5,
            top_p=0.8,
            top_k=7,
            min_p=0.1,
            seed=4,
            stop=["x", "y"],
            ignore_eos=True,
        )
    ]


def test_prefill_holds_all_prompts(cli, fakes):
    cli(f"generate {'a' * 1000} {'b' * 2000}")
    assert fakes.llm.arguments["max_num_batched_tokens"] == 4096


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("dtype is 'x'"), 2),
        (RequestError("too long"), 2),
        (WeightsError("corrupt"), 1),
        (DeviceError("no memory"), 1),
    ],
)
def test_errors_are_one_line(cli, fakes, error, code):
    fakes.behaviour = {"error": error}
    result = cli("generate a --no-echo")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert result.stdout == ""
    assert fakes.llm.closed


def test_bad_sampling_value_is_one_line(cli):
    result = cli("generate a --temperature 9")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: temperature is 9.0")


def test_ctrl_c_ends_with_130_and_closes_the_engine(cli, fakes):
    fakes.behaviour = {"interrupt_after": 3}
    result = cli("generate abcdef")
    assert result.exit_code == 130
    assert result.stdout == "abcdef A\n"
    assert fakes.llm.closed


def test_output_that_ended_with_an_error_fails_the_command(cli, fakes):
    fakes.behaviour = {"finish_reason": "error"}
    result = cli("generate a b")
    assert result.exit_code == 1
    assert "2 of 2 outputs" in result.stderr
