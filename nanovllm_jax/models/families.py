"""The model families: which parser reads the `config.json` of which architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models import llama, mistral, qwen2, qwen3
from nanovllm_jax.models.hf_config import Attributes

_PARSERS: dict[str, Callable[[Attributes], ModelConfig]] = {
    "llama": llama.model_config,
    "mistral": mistral.model_config,
    "qwen2": qwen2.model_config,
    "qwen3": qwen3.model_config,
}
_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
        ConfigError: if the architecture, an attribute or its value is not supported; the message names it.
    """
    architectures = raw.get("architectures") or []
    if architectures:
        family = next((_FAMILIES[name] for name in architectures if name in _FAMILIES), None)
    else:
        family = raw.get("model_type") if raw.get("model_type") in _PARSERS else None
    if family is None:
        named = ", ".join(architectures) or f"model_type {raw.get('model_type')!r}"
        raise ConfigError(f"Architecture {named} is not supported; supported are {', '.join(sorted(_FAMILIES))}.")
    return _PARSERS[family](Attributes(raw, family))
