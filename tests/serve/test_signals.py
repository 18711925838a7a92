"""The command `nanovllm-jax serve` in a process of its own, and how signals end it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

_COMMAND = [sys.executable, "-c", "from nanovllm_jax.cli import main; main()", "serve"]
_SETTINGS = "--port 0 --max-model-len 1024 --max-num-seqs 2 --max-num-batched-tokens 64 --enforce-eager"
BODY = {"prompt": "Once", "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def processes():
    """Two servers that start at the same time: a process, and its address once it is asked for."""
    started = [
        subprocess.Popen([*_COMMAND, *_SETTINGS.split()], stderr=subprocess.PIPE, text=True, bufsize=1)
        for _ in range(2)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def address(process):
    for line in process.stderr:
        if "http://" in line:
            return line.split()[-1]
    raise AssertionError(f"the server ended with {process.wait()}")


@contextmanager
def streaming(url, max_tokens):
    """The lines of a stream that has begun."""
    body = {**BODY, "max_tokens": max_tokens}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def wait_until_closed(url):
    for _ in range(600):
        try:
            httpx.get(f"{url}/version")
        except httpx.TransportError:
            return
    raise AssertionError("the server still accepts connections")


def test_sigterm_finishes_what_runs(processes):
    process = processes[0]
    with streaming(address(process), 300) as lines:
        process.send_signal(signal.SIGTERM)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log


def test_a_second_ctrl_c_stops_at_once(processes):
    process = processes[1]
    url = address(process)
    with streaming(url, 1000) as lines:
        process.send_signal(signal.SIGINT)
        wait_until_closed(url)
        process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
