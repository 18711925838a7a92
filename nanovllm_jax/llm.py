"""`LLM`: load a model once, then generate from many prompts.

    with LLM() as llm:
        outputs = llm.generate(["To be, or"], SamplingParams(temperature=0.7, max_tokens=32))
        print(outputs[0].outputs[0].text)

Names and defaults are vLLM's.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from tqdm import tqdm

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.build import Built, build_engine
from nanovllm_jax.engine.engine import PreparedRequest
from nanovllm_jax.engine.inputs import Prompt, check_template_variables, render_chat
from nanovllm_jax.engine.interrupts import watched_interrupt
from nanovllm_jax.engine.step_filling import HeldBack, StepFilling
from nanovllm_jax.errors import RequestError
from nanovllm_jax.inspection.collect import collect
from nanovllm_jax.inspection.compilations import explain_compilations
from nanovllm_jax.inspection.plan import choose_keys
from nanovllm_jax.inspection.profile import Profiling, measured_sizes, profile_engine
from nanovllm_jax.inspection.report import Compilation, Report
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

Message = Mapping[str, Any]


class LLM:
    """A language model on one or several devices, with a paged, prefix-cached KV cache and continuous batching.

    Args:
        model: a Hugging Face directory, a hub id, a .gguf file, an Orbax directory made by `nanovllm-jax convert`,
            "smollm2", or None for the small built-in model.
        tokenizer: directory or hub id of another tokenizer than the model's.
        skip_tokenizer_init: load none; prompts are then token ids and outputs have no text.
        dtype: of the weights: "auto" (the checkpoint's; bfloat16 for float32 checkpoints on GPUs; float32 on the
            CPU), "bfloat16", "float16" or "float32".
        tensor_parallel_size: devices that share each layer: heads, MLP and vocabulary are split over them.
        data_parallel_size: replicas, each on devices of its own with a cache of its own; requests are spread over them,
            those with a cached prefix to the replica that has it. Limits count for each replica.
        max_model_len: longest prompt and output together, in tokens; None takes the model's limit.
        max_num_seqs: rows, requests that run at the same time.
        max_num_batched_tokens: tokens a step computes at most; longer prompts are computed in chunks.
        block_size: tokens a block of the KV cache holds.
        gpu_memory_utilization: share of the device's memory for weights, cache and temporaries.
        kv_cache_dtype: "auto" is the weights'; "fp8" (e4m3) holds twice as many tokens as bfloat16, with the
            scales that a checkpoint of compressed-tensors has for it, else 1.
        enable_prefix_caching: share the cached blocks of equal prefixes.
        enforce_eager: compile each program on its first use instead of all at the start, and let XLA record no
            command buffers.
        compile_at_start: False compiles each program on its first use too, but as fast as otherwise: for a few calls of
            known sizes, which would wait for programs that they never run.
        seed: of requests that bring none (and of random weights); None takes fresh entropy.
        scheduling_policy: "fcfs", or "priority" (smaller is served first).
        batching: "prefill_first" (steps of prompts only while any wait), or "mixed" (every step decodes all rows and
            fills up with prompts: smoother latency).
        attention_backend: "auto" is "triton" on GPUs and "xla" elsewhere.
        num_gpu_blocks_override: cache blocks, instead of what fits.
        load_format: "dummy" takes random weights and needs only a config.
        max_logprobs: most log-probabilities a token that a request may ask for.
        decode_steps: tokens of each row that one decode step computes before the host looks at them (None: 4 on GPUs, 1
            elsewhere). More hides more of the host's work; a request that stops early wastes up to as many tokens, and
            a new one waits for as many. While a request with logprobs, logit_bias, bad_words, min_tokens or a penalty
            runs, every row's step is one token.

    Raises:
        ConfigError: for unsupported models and arguments out of range.
        WeightsError: for missing, left-over or corrupt weights.
        DeviceError: if the device is missing or too small.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 16_384,
        block_size: int = 16,
        gpu_memory_utilization: float = 0.9,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        compile_at_start: bool = True,
        seed: int | None = 0,
        scheduling_policy: Literal["fcfs", "priority"] = "fcfs",
        batching: Literal["prefill_first", "mixed"] = "prefill_first",
        attention_backend: Literal["auto", "xla", "triton"] = "auto",
        num_gpu_blocks_override: int | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        max_logprobs: int = 20,
        decode_steps: int | None = None,
    ) -> None:
        config = EngineConfig(
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            compile_at_start=compile_at_start,
            seed=seed,
            scheduling_policy=scheduling_policy,
            batching=batching,
            attention_backend=attention_backend,
            num_gpu_blocks_override=num_gpu_blocks_override,
            load_format=load_format,
            max_logprobs=max_logprobs,
            decode_steps=decode_steps,
        )
        built = build_engine(
            None if model is None else str(model), tokenizer, config, skip_tokenizer=skip_tokenizer_init
        )
        self._take(built, config)

    @classmethod
    def from_built(cls, built: Built, config: EngineConfig) -> Self:
        """One over an engine that was built otherwise, from the arguments in `config`."""
        llm = cls.__new__(cls)
        llm._take(built, config)
        return llm

    def _take(self, built: Built, config: EngineConfig) -> None:
        self.config = config
        self.model_config, self._engine, self._defaults = built.model_config, built.engine, built.defaults
        self._name = built.source.name
        self.max_model_len = built.shape.max_model_len
        self._ids = itertools.count()
        self._streaming = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many; outputs come in the order of the prompts.

        Args:
            prompts: text, token ids or dicts (`prompt` or `prompt_token_ids`, and `cache_salt`); one or a list.
            sampling_params: one for all, or one a prompt; None takes the model's defaults.
            use_tqdm: show a progress bar with prompt and output tokens a second.
            priority: one a prompt; smaller is served first, with scheduling_policy="priority".

        Raises:
            RequestError: if a prompt or its parameters cannot be served; all of them then end without an output.
            DeviceError: if the device fails.
            KeyboardInterrupt: on Ctrl-C; these requests end, the engine goes on.
        """
        self._check_idle("generate")
        many = _as_list(prompts)
        params = self._params_for(many, sampling_params)
        ranks = _ranks(priority, len(many))
        ids = [f"generate-{next(self._ids)}" for _ in many]
        done: dict[str, RequestOutput] = {}
        try:
            with watched_interrupt(), closing(_Progress(len(ids), shown=use_tqdm)) as progress:
                for output in self._run(zip(ids, many, params, ranks, strict=True)):
                    done[output.request_id] = output
                    progress.on_output(output)
        except BaseException:
            self._engine.abandon(ids)
            raise
        return [done[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """`generate` from one conversation or many, through the model's chat template.

        Args:
            messages: dicts with `role` and `content`; one conversation or a list of them.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            chat_template: a Jinja template instead of the model's.
            add_generation_prompt: end with the header of the assistant's turn.
            chat_template_kwargs: variables of the template, such as `{"enable_thinking": False}`.

        Raises:
            RequestError: as `generate`, and if the model has no chat template or the messages do not fit it.
        """
        if chat_template_kwargs:
            check_template_variables(self.get_tokenizer(), chat_template_kwargs, {"tools", "continue_final_message"})
        one = isinstance(messages, str | Mapping) or (messages and isinstance(messages[0], Mapping))
        many = [messages] if one else list(messages)
        prompts = [
            self.render_chat(
                cast(Sequence[Message], conversation),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in many
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def render_chat(self, messages: Sequence[Message], **template_args: Any) -> list[int]:
        """Token ids of a conversation through the model's chat template.

        Raises:
            RequestError: without a tokenizer or template, or if the messages do not fit the template.
        """
        return render_chat(self.get_tokenizer(), messages, **template_args)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continue one prompt, yielding its output as it grows; the last one is finished.

        Leaving the loop early, `abort` inside of it, or Ctrl-C, ends the request.

        Raises:
            RequestError: if the prompt or the parameters cannot be served.
        """
        self._check_idle("stream")
        request_id, params = f"stream-{next(self._ids)}", sampling_params or self.get_default_sampling_params()
        return self._stream(self._engine.prepare(request_id, prompt, params, stream=True))

    def _stream(self, prepared: PreparedRequest) -> Iterator[RequestOutput]:
        self._check_idle("stream")
        self._streaming, finished = True, False
        try:
            self._engine.enqueue(prepared)
            while not finished and self._engine.has_unfinished:  # an abort ends it without an output
                for output in self._engine.step():
                    finished = output.finished
                    yield output
        finally:
            self._streaming = False
            if not finished:
                self._engine.abandon([prepared.request_id])

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        stream: bool = False,
    ) -> None:
        """Queue a prompt for `step`; with `stream` it is reported after each step, else at its end."""
        self._check_no_stream("add_request")
        params = sampling_params or self.get_default_sampling_params()
        self._engine.add_request(request_id, prompt, params, priority=priority, stream=stream)

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of requests that finished, and of those that stream and got tokens."""
        self._check_no_stream("step")
        return self._engine.step()

    def abort(self, request_id: str) -> None:
        """End a queued or running request without an output."""
        self._engine.abort(request_id)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return self._engine.has_unfinished

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing happens, while a request runs."""
        return self._engine.reset_prefix_cache()

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            RequestError: with skip_tokenizer_init=True.
        """
        if self._engine.tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init=True); make the LLM without it.")
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; else vLLM's defaults."""
        return self._defaults.sampling_params()

    def inspect(self, *, context: int = 1024, profile: Profiling | None = None) -> Report:
        """What the step compiled to: programs, kernels, flops, bytes, memory, and what deserves attention.

        Looks into the largest decode and prefill buckets and the plain sampler; with a profile, into the buckets
        that it measured most.

        Args:
            context: tokens that each sequence has, for the costs of attention.
            profile: from `profile()`; measured times then stand beside the computed limits.

        Raises:
            ConfigError: if the profile is not finished.
        """
        programs = self._engine.replicas[0].runner.programs  # all replicas' are equal
        summary = profile.summary if profile else None
        keys = choose_keys(programs.catalogue, None, *measured_sizes(summary))
        return collect(
            programs.catalogue,
            keys,
            model=self._name,
            programs=programs,
            context=context,
            buckets=[*programs.compiled(), *(key for key in keys if key not in programs.compiled())],
            profile=summary,
        )

    def profile(self, folder: str | Path) -> AbstractContextManager[Profiling]:
        """Trace what runs inside the block: `with llm.profile("trace") as profile: llm.generate(...)`.

        The folder opens in XProf and Perfetto; `profile.summary` has each kernel's time, the device's busy time and
        the gaps in which it waited for the host, and `inspect(profile=profile)` puts them into a report.

        Args:
            folder: where the trace goes; made if it is not there.

        Raises:
            ConfigError: after the block, if no step ran in it.
        """
        return profile_engine(self._engine, folder)

    @property
    def compile_log(self) -> list[Compilation]:
        """Each compilation so far, of every replica: seconds, whether the cache had it, which argument was new."""
        return explain_compilations([replica.runner.programs for replica in self._engine.replicas])

    def close(self) -> None:
        """End all requests and give the device memory back."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: Iterator[tuple[str, Prompt, SamplingParams, int]]) -> Iterator[RequestOutput]:
        """Serve requests, yielding their outputs as they end.

        Once they fill a step of each replica, these start, and the rest are tokenised while the devices work.
        """
        engine, replicas = self._engine, self._engine.replicas
        with _paused_collections():
            filling = {replica: StepFilling(replica.scheduler) for replica in replicas}
            for request in requests:
                prepared = self._prepare(*request)
                replica = engine.enqueue(prepared)
                for sample in prepared.samples:
                    filling[replica].add(sample)
                if all(step.is_full for step in filling.values()):
                    break
            engine.step()  # has nothing to read: `generate` starts with an idle engine
        held = HeldBack([replica.scheduler for replica in replicas])
        for request in requests:
            held.add(self._prepare(*request))
            if held.is_due:
                self._enqueue(held)
            if any(replica.wants_attention for replica in replicas):
                yield from engine.step(wait=False)
        self._enqueue(held)
        while engine.has_unfinished:
            yield from engine.step()

    def _prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> PreparedRequest:
        return self._engine.prepare(request_id, prompt, params, priority=priority)

    def _enqueue(self, held: HeldBack) -> None:
        for prepared in held.take():
            self._engine.enqueue(prepared)

    def _params_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if not isinstance(params, Sequence):
            raise RequestError(f"sampling_params is {params!r}; it takes SamplingParams, one or a list of them.")
        params = list(params)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for all or one for each."
            )
        for one in params:
            if not isinstance(one, SamplingParams):
                raise RequestError(f"sampling_params holds {one!r}; it takes SamplingParams.")
        return params

    def _check_idle(self, caller: str) -> None:
        """`generate` and `stream` drive the engine themselves and would swallow other requests' outputs."""
        if self.has_unfinished():
            raise RequestError(
                f"{caller} was called while requests are unfinished; call step() until has_unfinished() is False, or "
                "abort them."
            )

    def _check_no_stream(self, caller: str) -> None:
        if self._streaming:
            raise RequestError(f"{caller} was called while stream() runs, which drives the engine; end its loop first.")


@contextmanager
def _paused_collections() -> Iterator[None]:
    """No garbage is collected inside: the first collection walks over all prompts, for 3 to 5 ms."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__array__"):
        raise RequestError(f"prompts is {type(prompts).__name__}; give a string, token ids, a dict, or a list of them.")
    many = list(cast(Sequence[Any], prompts))
    if many and not isinstance(many[0], str | Mapping | Sequence) and not getattr(many[0], "ndim", 0):
        return [many]
    return many


def _ranks(priority: Sequence[int] | None, num_prompts: int) -> list[int]:
    """A priority for each prompt."""
    if priority is None:
        return [0] * num_prompts
    try:
        ranks = list(priority)
    except TypeError:
        raise RequestError(f"priority is {priority!r}; give a list with one for each prompt.") from None
    if len(ranks) != num_prompts:
        raise RequestError(f"{len(ranks)} priorities for {num_prompts} prompts; give one for each.")
    return ranks


class _Progress:
    """A progress bar over requests, with prompt and output tokens a second."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="Generating", disable=not shown, dynamic_ncols=True)
        self._prompt_tokens = self._output_tokens = 0
        self._start = time.perf_counter()

    def on_output(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._prompt_tokens += len(output.prompt_token_ids)
        self._output_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = time.perf_counter() - self._start
        prompt, out = self._prompt_tokens / seconds, self._output_tokens / seconds
        self._bar.set_postfix_str(f"prompt {prompt:,.0f} tok/s, output {out:,.0f} tok/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
