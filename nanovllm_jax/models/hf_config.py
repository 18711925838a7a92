"""Reading a Hugging Face `config.json` attribute by attribute, so that nothing in it is overlooked.

A family's parser takes the attributes it knows. Whatever is left must be harmless (it does not change the
logits) or empty; anything else is refused by name, since ignoring it would give wrong text without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

# Training, bookkeeping and generation settings: they do not change the logits.
# fmt: off
_HARMLESS = frozenset([
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "name_or_path",
    "auto_map", "tokenizer_class", "id2label", "label2id", "task_specific_params", "num_labels",
    "problem_type", "finetuning_task", "prefix", "is_llama_config", "transformers.js_config",
    "return_dict", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_implementation", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "num_beams", "num_return_sequences", "max_new_tokens", "unsloth_version", "unsloth_fixed",
    "chunk_size_feed_forward",
])
# fmt: on

# Attributes that change the result, with the value at which they do not.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "is_causal": True,
}

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_FIELDS: dict[str, Callable[[Any], Any]] = {
    "factor": float,
    "original_max_position_embeddings": int,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "truncate": bool,
}


class Attributes:
    """The attributes of a `config.json` that nobody has read yet."""

    def __init__(self, raw: Mapping[str, Any], family: str) -> None:
        self.family = family
        self._left = dict(raw)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """The value of `name`; `default` if it is absent or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def take_int(self, name: str, default: int | None = None) -> int:
        """Like `take` for whole numbers.

        Raises:
            ConfigError: if there is no value and no default, or it is no whole number.
        """
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(
                f"config.json of this {self.family} model has {name} = {value!r}; it must be a whole number."
            )
        return value

    def take_float(self, name: str, default: float) -> float:
        """Like `take` for numbers.

        Raises:
            ConfigError: if the value is no number.
        """
        value = self.take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"config.json of this {self.family} model has {name} = {value!r}; it must be a number.")
        return float(value)

    def refuse_rest(self) -> None:
        """Refuse what is left and may change the result.

        Raises:
            ConfigError: naming each such attribute and its value.
        """
        refused = {
            name: value
            for name, value in self._left.items()
            if name not in _HARMLESS
            and not name.startswith("_")
            and not (value == _NEUTRAL[name] if name in _NEUTRAL and value is not None else _is_empty(value))
        }
        if refused:
            listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(refused.items()))
            raise ConfigError(
                f"config.json has attributes that are not supported for {self.family} models: {listed}. "
                "They may change the result; use a model without them, or delete those that you know to be "
                "harmless from the config.json of a local copy."
            )


def _has_kv_cache_scales(attributes: Attributes) -> bool:
    """Whether `quantization_config`, as compressed-tensors writes it, is of the cache alone: a static scale a layer."""
    found = attributes.take("quantization_config")
    if not found:
        return False
    scheme = found.get("kv_cache_scheme") or {}
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    if found.get("config_groups") or any(scheme.get(name) != value for name, value in wanted.items()):
        raise ConfigError(
            f"config.json of this {attributes.family} model has quantization_config = {found!r}. Weights cannot be "
            "quantised, and a cache in static float8 only, one scale a layer: use the model without it."
        )
    return True


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == {} or value == [] or value == ""


def dense_config(
    attributes: Attributes,
    *,
    max_position_embeddings: int,
    num_kv_heads: int | None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """Read what all families share and refuse what is left.

    Args:
        attributes: of `config.json`, after the family has taken its own.
        max_position_embeddings: the family's default.
        num_kv_heads: the family's default; None means as many as query heads.
        head_dim: the family's default; None means E / H.
        qkv_bias: whether query, key and value projections have a bias.
        o_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the MLP's projections have biases.
        qk_norm: whether each head's query and key are normalised.

    Raises:
        ConfigError: naming a missing, malformed or unsupported attribute.
    """
    hidden_size = attributes.take_int("hidden_size")
    num_heads = attributes.take_int("num_attention_heads")
    # Stated as null it means "as many as query heads", whatever the family's default.
    if num_kv_heads is None or "num_key_value_heads" in attributes:
        num_kv_heads = num_heads
    max_position_embeddings = attributes.take_int("max_position_embeddings", max_position_embeddings)
    rope = parse_rope(attributes, max_position_embeddings)
    if rope.type == "yarn" and rope.original_max_position_embeddings is not None:
        # The stated length is the one before stretching (Qwen2.5) or the one after (Llama 2 YaRN).
        stretched = int(rope.original_max_position_embeddings * rope.factor)
        max_position_embeddings = max(max_position_embeddings, stretched)
    dtype = attributes.take("dtype", attributes.take("torch_dtype", "bfloat16")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"config.json says dtype {dtype!r}; supported are {', '.join(DTYPES)}.")
    config = ModelConfig(
        family=attributes.family,
        vocab_size=attributes.take_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=attributes.take_int("intermediate_size"),
        num_layers=attributes.take_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=attributes.take_int("num_key_value_heads", num_kv_heads),
        head_dim=attributes.take_int("head_dim", head_dim or hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=attributes.take_float("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=bool(attributes.take("tie_word_embeddings", False)),
        kv_cache_scales=_has_kv_cache_scales(attributes),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        dtype=dtype,
    )
    attributes.refuse_rest()
    return config


def parse_rope(attributes: Attributes, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises:
        ConfigError: naming the type or the field that is not supported.
    """
    parameters = dict(attributes.take("rope_scaling", {})) | dict(attributes.take("rope_parameters", {}))
    theta = attributes.take_float("rope_theta", 10_000.0)
    theta = float(parameters.pop("rope_theta", None) or theta)
    old_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or old_type or "default"
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(f"rope type {rope_type!r} is not supported; supported are {', '.join(_ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor") == 1.0:
        del parameters["partial_rotary_factor"]
    parameters.pop("finetuned", None)  # a note of the YaRN authors
    stated = {
        name: convert(parameters.pop(name))
        for name, convert in _ROPE_FIELDS.items()
        if parameters.get(name) is not None
    }
    unknown = {name: value for name, value in parameters.items() if not _is_empty(value)}
    if unknown:
        listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(unknown.items()))
        raise ConfigError(f"rope parameters that are not supported: {listed}. They may change the result.")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type in ("llama3", "yarn"):
        stated.setdefault("original_max_position_embeddings", max_position_embeddings)
    if rope_type == "yarn":
        stated.setdefault("factor", max_position_embeddings / stated["original_max_position_embeddings"])
    required = ("factor", "low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ("factor",)
    missing = [name for name in required if name not in stated]
    if missing:
        raise ConfigError(f"rope type {rope_type!r} needs {', '.join(missing)}, which config.json does not give.")
    return RopeConfig(theta=theta, type=rope_type, **stated)


def with_sliding_window(config: ModelConfig, window: int, num_sliding_layers: int) -> ModelConfig:
    """Apply a window of `window` tokens that `num_sliding_layers` of the layers attend within.

    If only some layers have it, the length is capped at the window instead: within it all layers see all.
    """
    if num_sliding_layers == 0 or window >= config.max_position_embeddings:
        return config
    if num_sliding_layers == config.num_layers:
        return replace(config, sliding_window=window)
    logger.warning(
        "%d of %d layers of this model attend within a sliding window of %d tokens; a window is supported "
        "only in all layers alike, so the length is capped at %d instead of %d tokens.",
        num_sliding_layers,
        config.num_layers,
        window,
        window,
        config.max_position_embeddings,
    )
    return replace(config, max_position_embeddings=window)
