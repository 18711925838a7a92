"""The step as pure functions of donated device state.

    params, caches, rows, delta --decode--> caches, rows, tokens            K tokens a row, sampling included
    params, caches, rows, delta --prefill_forward | decode_forward--> caches, rows, hidden, sampled_rows
    head, rows, hidden, sampled_rows --draw--> rows, tokens

What every step does is one program; what few need (prompts, and sampling that the host has a part in) is two, so that
sampling variants add to the number of programs instead of multiplying it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.params import Params
from nanovllm_jax.models.transformer import LayerCache
from nanovllm_jax.step.state import StateShape

FP8 = jnp.dtype(jnp.float8_e4m3fn)


@dataclass(frozen=True)
class StepConfig:
    """Everything static about the step."""

    model: ModelConfig
    shape: StateShape
    backend: Literal["xla", "triton"]  # of the kernels
    axis_name: str | None = None  # mesh axis over which the model is split, if it is
    decode_steps: int = 1  # most tokens of a row in one decode step


def attention_options(config: StepConfig) -> dict[str, Any]:
    """Of every attention kernel."""
    return {"scale": config.model.head_dim**-0.5, "sliding_window": config.model.sliding_window}


def opened(cache: LayerCache) -> LayerCache:
    """K and V as kernels take them: float8 that is kept as bytes is viewed as float8."""
    keys, values = cache
    return (keys.view(FP8), values.view(FP8)) if keys.dtype == jnp.uint8 else cache


def closed(cache: LayerCache, like: LayerCache) -> LayerCache:
    """K and V as they are kept. On a CPU float8 would be copied wherever it is moved: views of bytes cancel out."""
    return cache[0].view(like[0].dtype), cache[1].view(like[1].dtype)


def norms_and_scales(layer: Params, cache: LayerCache) -> dict[str, Any]:
    """What attention takes of a layer's parameters; scales are those of a float8 cache."""
    scales = ("k_scale", "v_scale") if cache[0].dtype == FP8 else ()
    return {name: layer.get(name) for name in ("q_norm", "k_norm", *scales)}
