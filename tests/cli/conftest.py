import logging
import re
import shlex
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import nanovllm_jax
from nanovllm_jax.cli import app
from nanovllm_jax.outputs import CompletionOutput, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def keep_logging():
    """The commands point logging at the runner's stderr, which is closed when they end."""
    root, package = logging.getLogger(), logging.getLogger("nanovllm_jax")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


class FakeTokenizer:
    chat_template = "{{ messages }}"


@dataclass
class FakeLLM:
    """Answers each prompt with its words upper-cased, a token a character."""

    model: str | None
    arguments: dict
    defaults: SamplingParams
    prompts: list = field(default_factory=list)
    params: list = field(default_factory=list)
    closed: bool = False
    aborted: int = 0
    interrupt_after: int | None = None
    error: Exception | None = None
    finish_reason: str = "length"

    def get_tokenizer(self):
        return FakeTokenizer()

    @property
    def model_config(self):
        return SimpleNamespace(vocab_size=300)

    def render_chat(self, messages, *, add_generation_prompt):
        turns = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return list((turns + "<assistant>" * add_generation_prompt).encode())

    def get_default_sampling_params(self):
        return self.defaults

    def generate(self, prompts, sampling_params, use_tqdm=True):
        if self.error:
            raise self.error
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        return [self._output(*request) for request in zip(prompts, sampling_params, strict=True)]

    def stream(self, prompt, sampling_params):
        if self.error:
            raise self.error
        done = self._output(prompt, sampling_params)
        completion = done.outputs[0]
        try:
            for end in range(1, len(completion.text) + 1):
                if end == self.interrupt_after:
                    raise KeyboardInterrupt
                part = CompletionOutput(0, completion.text[:end], completion.token_ids[:end])
                yield RequestOutput("0", done.prompt, done.prompt_token_ids, [part], finished=False)
            yield done
        except (KeyboardInterrupt, GeneratorExit):
            self.aborted += 1
            raise

    def close(self):
        self.closed = True

    def _output(self, prompt, params):
        self.prompts.append(prompt)
        self.params.append(params)
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt["prompt_token_ids"]
        text = re.split("<user>|<assistant>", bytes(i % 256 for i in ids).decode(errors="replace"))[-2:][0]
        completions = []
        for index in range(params.n):
            answer = (" " + text.upper())[: params.max_tokens].ljust(params.max_tokens * params.ignore_eos)
            completions.append(
                CompletionOutput(index, answer, [ord(c) for c in answer], finish_reason=self.finish_reason)
            )
        name = prompt if isinstance(prompt, str) else None
        return RequestOutput("0", name, ids, completions, finished=True)


class Fakes:
    """Every FakeLLM made, and how the next ones behave."""

    def __init__(self):
        self.made = []
        self.behaviour = {}
        self.defaults = SamplingParams()

    def make(self, model=None, **arguments):
        self.made.append(FakeLLM(model, arguments, self.defaults, **self.behaviour))
        return self.made[-1]

    @property
    def llm(self):
        (llm,) = self.made
        return llm


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()
    monkeypatch.setattr(nanovllm_jax, "LLM", fakes.make, raising=False)
    return fakes


@pytest.fixture
def cli(fakes):
    """Runs a command line over the fakes."""
    return lambda line, **kwargs: CliRunner().invoke(app, shlex.split(line), **kwargs)
