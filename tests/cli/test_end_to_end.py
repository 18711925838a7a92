"""The commands over the real engine and the built-in model."""

import json
import subprocess
import sys

from typer.testing import CliRunner

from nanovllm_jax.cli import app

OPTIONS = ["--max-model-len", "512", "--seed", "1", "--temperature", "0.8"]


def test_console_script_streams_what_json_reports():
    arguments = ["generate", "Once upon a time", "--max-tokens", "8", "--ignore-eos", *OPTIONS]
    command = [sys.executable, "-c", "from nanovllm_jax.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("8 tokens in ")
    result = CliRunner().invoke(app, [*arguments, "--json", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert len(line["token_ids"]) == 8
    assert line["finish_reason"] == "length"
    assert done.stdout == line["prompt"] + line["text"] + "\n"


def test_chat_answers_each_line_of_a_pipe():
    result = CliRunner().invoke(
        app, ["chat", "--max-tokens", "5", "--enforce-eager", *OPTIONS], input="Who art thou?\n/reset\nSpeak.\n"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) >= 2


def test_prompt_over_the_limit_is_one_line():
    result = CliRunner().invoke(app, ["generate", "word " * 600, "--enforce-eager", *OPTIONS])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "512" in result.stderr
    assert result.stderr.count("\n") == 1
