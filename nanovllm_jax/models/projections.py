"""The products of a layer, each with the norm before it and the addition or activation after it.

Decode steps have few rows and are bound by reading the weights: there, on a GPU, each is one fused kernel
(`nanovllm_kernels.skinny_matmul`). Elsewhere they are XLA's einsums. Which one runs is decided once a step, by
`fused_counters`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanovllm_jax.models.params import Params
from nanovllm_jax.parallel.collectives import sum_shards
from nanovllm_kernels import skinny_matmul, split_counters
from nanovllm_kernels.norm import rms_norm

MAX_FUSED_ROWS = 128  # past that XLA's products are the faster ones


def fused_counters(backend: Literal["xla", "triton"], num_tokens: int, dtype: DTypeLike) -> Int[Array, " tiles"] | None:
    """What the fused kernels of a step share, or None where its products are XLA's."""
    fused = backend == "triton" and num_tokens <= MAX_FUSED_ROWS and jnp.dtype(dtype).itemsize == 2
    return split_counters() if fused else None


def poison_unless_zero(x: Float[Array, "T E"], counters: Int[Array, " tiles"]) -> Float[Array, "T E"]:
    """NaN instead of hidden states that a product may have added up too early.

    Every product that splits K has a first tile, whose counter is back at zero if all went well.
    """
    return jnp.where(counters[0] == 0, x, jnp.nan)


@jax.named_scope("qkv")
def project_qkv(
    x: Float[Array, "T E"], params: Params, eps: float, counters: jax.Ref | None
) -> Float[Array, "T K heads D"]:
    """Queries, keys and values of the normalised hidden states."""
    weight, bias = params["qkv"], params.get("qkv_bias")
    if counters is None:
        return _add_bias(einsum("te,ekgd->tkgd", rms_norm(x, params["input_norm"], eps), weight), bias)
    flat = weight.reshape(x.shape[1], -1)
    flat_bias = None if bias is None else bias.reshape(-1)
    options = {"norm": params["input_norm"], "eps": eps, "bias": flat_bias}
    return skinny_matmul(x, flat, **options, counters=counters, backend="triton").reshape(-1, *weight.shape[1:])


@jax.named_scope("o")
def add_attention(
    x: Float[Array, "T E"],
    heads: Float[Array, "T K G D"],
    params: Params,
    axis_name: str | None,
    counters: jax.Ref | None,
) -> Float[Array, "T E"]:
    """Hidden states plus the output projection of the attended heads, summed over shards."""
    weight, bias = params["o"], params.get("o_bias")
    if counters is None:
        return x + _add_bias(sum_shards(einsum("tkgd,kgde->te", heads, weight), axis_name), bias)
    flat, flat_weight = heads.reshape(x.shape[0], -1), weight.reshape(-1, x.shape[1])
    return _add_fused(x, flat, flat_weight, bias, axis_name, counters)


def add_mlp(
    x: Float[Array, "T E"], params: Params, eps: float, axis_name: str | None, counters: jax.Ref | None
) -> Float[Array, "T E"]:
    """Hidden states plus the gated MLP of them normalised, summed over shards."""
    gate_up_bias, down_bias = params.get("gate_up_bias"), params.get("down_bias")
    if counters is None:
        with jax.named_scope("gate_up"):
            normalised = rms_norm(x, params["post_norm"], eps)
            gate_up = _add_bias(einsum("te,ezf->tzf", normalised, params["gate_up"]), gate_up_bias)
            gated = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
        with jax.named_scope("down"):
            update = einsum("tf,fe->te", gated, params["down"])
            return x + _add_bias(sum_shards(update, axis_name), down_bias)
    options = {"norm": params["post_norm"], "eps": eps, "bias": gate_up_bias}
    with jax.named_scope("gate_up"):
        gated = skinny_matmul(x, params["gate_up"], **options, counters=counters, backend="triton")
    with jax.named_scope("down"):
        return _add_fused(x, gated, params["down"], down_bias, axis_name, counters)


def _add_fused(
    x: Float[Array, "T E"],
    inputs: Float[Array, "T F"],
    weight: Float[Array, "F E"],
    bias: Float[Array, " E"] | None,
    axis_name: str | None,
    counters: jax.Ref,
) -> Float[Array, "T E"]:
    if axis_name is None:
        added = skinny_matmul(inputs, weight, bias=bias, residual=x, counters=counters, backend="triton")
        # A kernel's result has no mesh in its type, for which the next layer would be another function. XLA folds this.
        return jax.lax.select(True, added, x)
    # Each shard has a part of the sum: bias and residual count once, after it.
    update = skinny_matmul(inputs, weight, counters=counters, backend="triton")
    return x + _add_bias(sum_shards(update, axis_name), bias)


def _add_bias(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def einsum(equation: str, x: Array, weight: Array, out: DTypeLike | None = None) -> Array:
    """A product in the operands' dtype; float32 means float32, not the tensor cores' TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=out)
