"""A vLLM-class LLM inference engine as one pure JAX step over a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm_jax.errors import ConfigError, DeviceError, NanoVLLMError, RequestError, WeightsError
from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm_jax.async_llm import AsyncLLM
    from nanovllm_jax.inspection.recompile import no_recompile
    from nanovllm_jax.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "DeviceError",
    "Logprob",
    "NanoVLLMError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "WeightsError",
    "no_recompile",
]


def __getattr__(name: str) -> Any:
    """Import JAX only when an engine is asked for, so that `nanovllm-jax --help` is quick."""
    if name == "no_recompile":
        from nanovllm_jax.inspection.recompile import no_recompile

        return no_recompile
    if name == "LLM":
        from nanovllm_jax.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from nanovllm_jax.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
