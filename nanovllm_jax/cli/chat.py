"""`nanovllm-jax chat`: a conversation in the terminal, or one turn a line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Annotated, Any

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.session import open_session, sampling_params
from nanovllm_jax.cli.terminal import note, show_error, write
from nanovllm_jax.errors import ConfigError, RequestError
from nanovllm_jax.sampling_params import SamplingParams

_PREFILL = 512  # tokens a step; a longer prompt takes several, and less is compiled
_HELP = "/reset starts anew, /system TEXT does so with another system prompt, /exit or Ctrl-D ends."


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(self, llm: Any, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        if not llm.get_tokenizer().chat_template:
            raise ConfigError("the model has no chat template; use `nanovllm-jax generate` instead.")
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forgets all turns; `system` replaces the system prompt."""
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def reply(self, message: str) -> Generator[str]:
        """Pieces of the reply. Closed early, it keeps what was said; without a word, it drops the turn."""
        turn = [*self.messages, {"role": "user", "content": message}]
        ids = self._llm.render_chat(turn, add_generation_prompt=True)
        outputs = self._llm.stream({"prompt_token_ids": ids}, self._params)
        text = ""
        try:
            for output in outputs:
                piece, text = output.outputs[0].text[len(text) :], output.outputs[0].text
                yield piece
        finally:
            outputs.close()  # takes the request out of the engine if it still runs
            if text:
                self.messages = [*turn, {"role": "assistant", "content": text}]


def chat(
    model: options.Model = None,
    system: Annotated[
        str | None, typer.Option(show_default="the model's", help="What the model is told first.")
    ] = None,
    max_tokens: options.MaxTokens = 1024,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.DType = "auto",
    kv_cache_dtype: options.KvCacheDType = "auto",
    max_model_len: options.MaxModelLen = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    attention_backend: options.AttentionBackend = "auto",
    enforce_eager: options.EnforceEager = False,
    verbose: options.Verbose = False,
) -> None:
    """Talks with a model. Ctrl-C stops a reply, Ctrl-D ends; /help lists the commands.

    [bold]Examples[/bold]

    \b
      nanovllm-jax chat --model smollm2
      nanovllm-jax chat --model Qwen/Qwen3-0.6B --system "Answer in one sentence."
      echo "What is JAX?" | nanovllm-jax chat --model smollm2
    """  # noqa: D301
    with open_session(
        model,
        verbose=verbose,
        tokenizer=tokenizer,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        attention_backend=attention_backend,
        enforce_eager=enforce_eager,
        max_num_seqs=1,
        max_num_batched_tokens=_PREFILL,
    ) as session:
        params = sampling_params(
            session.llm,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
        )
        conversation = Conversation(session.llm, params, system)
        for line in _lines():
            if line.startswith("/"):
                if not _command(conversation, line):
                    break
            elif line:
                _say(conversation, line)


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    from prompt_toolkit import PromptSession

    note(_HELP)
    prompt = PromptSession[str]()
    while True:
        try:
            yield prompt.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _say(conversation: Conversation, message: str) -> None:
    reply = conversation.reply(message)
    try:
        for piece in reply:
            write(piece)
        write("\n")
    except KeyboardInterrupt:
        reply.close()
        write("\n")
        note("stopped")
    except RequestError as error:
        show_error(f"{error} /reset starts anew.")


def _command(conversation: Conversation, line: str) -> bool:
    """Obeys a line that starts with a slash; False means the end."""
    name, _, argument = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/reset":
        conversation.reset()
    elif name == "/system" and argument.strip():
        conversation.reset(argument.strip())
    else:
        note(_HELP)
    return True
