"""The `curl` commands of the README, run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def curl_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl")]


def test_there_are_examples_of_both_endpoints():
    text = " ".join(curl_commands())
    assert "/v1/completions" in text
    assert "/v1/chat/completions" in text


@pytest.mark.parametrize("command", curl_commands())
def test_curl_example(served, command):
    command = re.sub(r"(http://)?localhost:8000", served.url, command)
    done = subprocess.run(["bash", "-c", f"{command} --silent --show-error"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if '"stream": true' in command:
        *events, end, _ = done.stdout.split("\n\n")
        assert end == "data: [DONE]"
        answers = [json.loads(event.removeprefix("data: ")) for event in events]
    else:
        answers = [json.loads(done.stdout)]
    assert all("error" not in answer for answer in answers)
    texts = [choice.get("text") or choice.get("delta", {}).get("content") for a in answers for choice in a["choices"]]
    assert any(texts)
