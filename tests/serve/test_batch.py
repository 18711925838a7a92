"""`run-batch`: files in OpenAI's batch format."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

import nanovllm_jax
from nanovllm_jax import DeviceError, cli
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.serve.batch import run_batch
from nanovllm_jax.serve.config import ServeConfig


def line(name, body, url="/v1/completions", **changes):
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body} | changes)


COMPLETION = {"model": "tiny", "prompt": "Once", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 4, "logprobs": True}
LINES = [
    line("a", COMPLETION),
    line("b", CHAT, "/v1/chat/completions"),
    '{"custom_id": "c", ',
    line("d", COMPLETION | {"temperature": 9}),
    line("e", COMPLETION | {"model": "other"}),
    line("f", COMPLETION, "/v1/embeddings"),
    line("a", COMPLETION),
    line("g", COMPLETION | {"stream": True}),
    line("h", COMPLETION | {"nonsense": 1}),
    "",
    line("i", COMPLETION, method="GET"),
    line("j", COMPLETION, priority=1),
    line("k", COMPLETION | {"prompt": ["My", "Lord"], "n": 2, "temperature": 1}),
]
STATUS = [200, 200, 400, 400, 404, 404, 400, 400, 400, 404, 400, 200]
PARAM = [None, None, None, "temperature", "model", "url", "custom_id", "stream", "nonsense", "url", "priority", None]


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    return source, tmp_path / "out.jsonl"


def run(llm, source, target):
    return asyncio.run(run_batch(llm, ServeConfig("tiny"), source, target))


def read(target):
    return [json.loads(text) for text in target.read_text().splitlines()]


def test_each_line_is_answered_or_refused_in_its_place(llm, files):
    counts = run(llm, *files)
    results = read(files[1])
    assert (counts.answered, counts.failed, counts.kept) == (3, 9, 0)
    assert [result["response"]["status_code"] for result in results] == STATUS
    assert [result["custom_id"] for result in results] == ["a", "b", None, *"def", None, *"ghi", None, "k"]
    errors = [result["response"]["body"].get("error", {}) for result in results]
    assert [error.get("param") for error in errors] == PARAM
    assert "Line 3" in errors[2]["message"]
    whole = results[0]["response"]["body"]
    assert (whole["object"], whole["usage"]["completion_tokens"]) == ("text_completion", 6)
    chat = results[1]["response"]["body"]["choices"][0]
    assert len(chat["logprobs"]["content"]) <= 4
    assert len(results[-1]["response"]["body"]["choices"]) == 4


def test_what_the_output_holds_is_not_done_again(llm, files):
    run(llm, *files)
    source, target = files
    whole = read(target)
    texts = target.read_bytes().splitlines(keepends=True)
    failed = json.loads(texts[-1])
    failed["response"]["status_code"] = 503
    # As an interrupted run leaves it: in another order, one to do again, one torn.
    target.write_bytes(b"".join([texts[3], json.dumps(failed).encode() + b"\n", texts[0], texts[1][:-9]]))
    counts = run(llm, source, target)
    assert counts.kept == 2
    again = read(target)
    assert [result["response"]["status_code"] for result in again] == STATUS
    assert [again[0], again[3]] == [whole[0], whole[3]]
    assert again[1]["id"] != whole[1]["id"]


def test_another_file_is_not_overwritten(llm, files):
    source, target = files
    for text in ("my thesis\n", "my thesis", '{"id": 3}'):
        target.write_text(text)
        with pytest.raises(ConfigError, match=r"Line 1 of .* is no line of a batch's output"):
            run(llm, source, target)
        assert target.read_text() == text


def test_an_engine_that_fails_keeps_what_was_done(llm, files, monkeypatch):
    source, target = files
    run(llm, source, target)
    target.write_text(target.read_text().splitlines()[0] + "\n")

    async def fail(*args, **kwargs):
        raise DeviceError("no device")

    monkeypatch.setattr(llm, "add_request", fail)
    with pytest.raises(DeviceError, match="no device"):
        run(llm, source, target)
    assert read(target)[0]["custom_id"] == "a"


def test_command(llm, files, monkeypatch):
    source, target = files
    monkeypatch.setattr(nanovllm_jax, "AsyncLLM", lambda model, **arguments: llm)
    monkeypatch.setattr(llm, "close", lambda: None)
    monkeypatch.setattr(cli.run_batch, "set_up_logging", lambda verbose: None)
    for counts in ("3 answered, 9 refused or failed, 0 done before", "0 answered, 3 refused or failed, 9 done before"):
        result = CliRunner().invoke(cli.app, ["run-batch", str(source), "-o", str(target)])
        assert result.exit_code == 0, result.output
        assert counts in result.stderr
    result = CliRunner().invoke(cli.app, ["run-batch", str(source), "-o", str(source)])
    assert result.exit_code == 2
    assert source.read_text().startswith(LINES[0])
