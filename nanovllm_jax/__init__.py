"""A vLLM-class LLM inference engine as one pure JAX step over a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm_jax.errors import ConfigError, DeviceError, NanoVLLMError, RequestError, WeightsError
from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm_jax.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
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
]


def __getattr__(name: str) -> Any:
    """Import JAX only when `LLM` is asked for, so that `nanovllm-jax --help` is quick."""
    if name == "LLM":
        from nanovllm_jax.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
