"""The products of a layer, each with the norm before it and the addition or activation after it.

Decode steps have few rows and are bound by reading the weights: there, on a GPU, each is one fused kernel
(`nanovllm_kernels.skinny_matmul`). Elsewhere they are XLA's einsums. On one GPU cuBLAS then adds what a product adds to
the hidden states; what is summed over shards first is left to the norm that follows, which reads both once
(`nanovllm_kernels.add_rms_norm`). Which one runs is decided once a step, by `fused_counters`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nanovllm_jax.models.params import Params
from nanovllm_jax.parallel.collectives import parts_passed_on, sum_shards
from nanovllm_kernels import (
    Scaled,
    add_rms_norm,
    add_shards_scaled,
    gated_matmul,
    scaled,
    skinny_matmul,
    skinny_matmul_scaled,
    split_counters,
)
from nanovllm_kernels.skinny_matmul import has_mosaic_kernel, passes_on

Backend = Literal["xla", "triton"]


class Residual(NamedTuple):
    """Hidden states as a sum whose addition waits for the next norm; nothing waits where `update` is None.

    `scaled` is there where fused products, or sums over shards, pass on what the product after the next norm takes.
    """

    x: Float[Array, "T E"]
    update: Float[Array, "T E"] | None = None
    scaled: Scaled | None = None

    def normalised(
        self, weight: Float[Array, " E"], eps: float, backend: Backend
    ) -> tuple[Residual, Float[Array, "T E"]]:
        """The sum, added up, and its root-mean-square norm."""
        total, normalised = add_rms_norm(self.x, self.update, weight, eps=eps, backend=backend)
        return Residual(typed_as(self.x, total)), normalised


def most_fused_rows() -> int:
    """Rows up to which a layer's products are the fused kernels; past that XLA's products are the faster ones."""
    return 256 if has_mosaic_kernel() else 128


def has_fused_products(backend: Backend, dtype: DTypeLike) -> bool:
    """Whether products of few rows are kernels of ours, rather than XLA's."""
    return backend == "triton" and jnp.dtype(dtype).itemsize == 2


def fused_counters(backend: Backend, num_tokens: int, dtype: DTypeLike) -> Int[Array, " tiles"] | None:
    """What the fused kernels of a step share, or None where its products are XLA's."""
    fused = has_fused_products(backend, dtype) and num_tokens <= most_fused_rows()
    return split_counters() if fused else None


def pass_on(
    x: Float[Array, "T E"],
    layer: Params,
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
    counters: Int[Array, " tiles"] | None,
) -> Residual:
    """Hidden states before the first layer, scaled for its norm where products, or sums over shards, pass that on."""
    if counters is None:
        return Residual(x)
    if axis_name is not None:
        biased = "o_bias" in layer or "down_bias" in layer  # which would be added after the sum
        parts = None if biased else parts_passed_on(x, table)
        return Residual(x, scaled=None if parts is None else scaled(x, layer["input_norm"], parts))
    if not passes_on(x):
        return Residual(x)

    def last_product(x: Array, weight: Array, norm: Array, counters: Array) -> Scaled:
        inputs = jnp.zeros((x.shape[0], weight.shape[0]), x.dtype)
        options = {"residual": x, "counters": jax.new_ref(counters), "backend": "triton"}
        return skinny_matmul_scaled(inputs, weight, next_norm=norm, **options)[1]

    # As many parts as a layer passes on make all layers the same function.
    like = jax.eval_shape(last_product, x, layer["down"], layer["input_norm"], counters)
    return Residual(x, scaled=scaled(x, layer["input_norm"], len(like.squares)))


def are_zero(counters: Int[Array, " tiles"]) -> Bool[Array, ""]:
    """Whether no product can have added up too early.

    Every product that splits K has a first tile, whose counter is back at zero if all went well.
    """
    return counters[0] == 0


def poison_unless_zero(x: Float[Array, "T E"], counters: Int[Array, " tiles"] | None) -> Float[Array, "T E"]:
    """NaN instead of hidden states that a product may have added up too early."""
    return x if counters is None else jnp.where(are_zero(counters), x, jnp.nan)


@jax.named_scope("qkv")
def project_qkv(
    residual: Residual, params: Params, eps: float, counters: jax.Ref | None, backend: Backend
) -> tuple[Residual, Float[Array, "T K heads D"]]:
    """Queries, keys and values of the normalised hidden states, and the hidden states."""
    weight, bias = params["qkv"], params.get("qkv_bias")
    if counters is None:
        residual, normalised = residual.normalised(params["input_norm"], eps, backend)
        return residual, _add_bias(einsum("te,ekgd->tkgd", normalised, weight), bias)
    flat = weight.reshape(weight.shape[0], -1)
    flat_bias = None if bias is None else bias.reshape(-1)
    qkv = _normed_product(residual, flat, params["input_norm"], eps, flat_bias, counters)
    return residual, qkv.reshape(-1, *weight.shape[1:])


@jax.named_scope("o")
def add_attention(
    residual: Residual,
    heads: Float[Array, "T K G D"],
    params: Params,
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
    counters: jax.Ref | None,
) -> Residual:
    """Hidden states, to which nothing waits to be added, plus the heads' output projection summed over shards."""
    weight, bias, x = params["o"], params.get("o_bias"), residual.x
    if counters is None:
        return _add(x, einsum("tkgd,kgde->te", heads, weight), bias, axis_name, table)
    flat, flat_weight = heads.reshape(x.shape[0], -1), weight.reshape(-1, x.shape[1])
    return _add_fused(residual, flat, flat_weight, bias, params["post_norm"], axis_name, table, counters)


def add_mlp(
    residual: Residual,
    params: Params,
    next_norm: Float[Array, " E"] | None,
    eps: float,
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
    counters: jax.Ref | None,
    backend: Backend,
) -> Residual:
    """Hidden states plus the gated MLP of them normalised, summed over shards.

    `next_norm`, of the norm after them, is needed where the hidden states come scaled.
    """
    gate_up_bias, down_bias = params.get("gate_up_bias"), params.get("down_bias")
    if counters is None:
        with jax.named_scope("gate_up"):
            residual, normalised = residual.normalised(params["post_norm"], eps, backend)
            gated = gated_matmul(normalised, params["gate_up"], bias=gate_up_bias, backend=backend)
        with jax.named_scope("down"):
            return _add(residual.x, einsum("tf,fe->te", gated, params["down"]), down_bias, axis_name, table)
    with jax.named_scope("gate_up"):
        gated = _normed_product(residual, params["gate_up"], params["post_norm"], eps, gate_up_bias, counters)
    with jax.named_scope("down"):
        return _add_fused(residual, gated, params["down"], down_bias, next_norm, axis_name, table, counters)


def _normed_product(
    residual: Residual, weight: Array, norm: Float[Array, " E"], eps: float, bias: Array | None, counters: jax.Ref
) -> Array:
    options = {"eps": eps, "bias": bias, "counters": counters}
    if residual.scaled is not None:
        return skinny_matmul(residual.scaled, weight, **options, backend="triton")
    return skinny_matmul(residual.x, weight, norm=norm, **options, backend="triton")


def _add(
    x: Float[Array, "T E"],
    product: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
) -> Residual:
    if axis_name is None:
        # XLA makes the addition cuBLAS's: 37 us less for each layer of Qwen3-0.6B at 16,384 tokens (H100).
        return Residual(x + _add_bias(product, bias))
    return Residual(x, _add_bias(sum_shards(product, axis_name, table=table), bias))


def _add_fused(
    residual: Residual,
    inputs: Float[Array, "T F"],
    weight: Float[Array, "F E"],
    bias: Float[Array, " E"] | None,
    next_norm: Float[Array, " E"] | None,
    axis_name: str | None,
    table: Int[Array, "*mesh entries"] | None,
    counters: jax.Ref,
) -> Residual:
    x, options = residual.x, {"counters": counters, "backend": "triton"}
    if residual.scaled is not None:
        assert next_norm is not None
        if axis_name is not None:
            assert table is not None
            update = skinny_matmul(inputs, weight, **options)
            total, passed_on = add_shards_scaled(update, x, next_norm=next_norm, table=table)
            return Residual(typed_as(x, total), scaled=passed_on)
        options |= {"bias": bias, "residual": x, "next_norm": next_norm}
        total, passed_on = skinny_matmul_scaled(inputs, weight, **options)
        return Residual(typed_as(x, total), scaled=passed_on)
    if axis_name is None:
        return Residual(typed_as(x, skinny_matmul(inputs, weight, bias=bias, residual=x, **options)))
    # Each shard has a part of the sum: bias and residual count once, after it.
    update = skinny_matmul(inputs, weight, **options)
    if bias is None:
        return Residual(sum_shards(update, axis_name, residual=x, table=table))
    return Residual(x + (sum_shards(update, axis_name, table=table) + bias))


def typed_as(x: Array, result: Array) -> Array:
    """A kernel's result has no mesh in its type, for which the next layer would be another function. XLA folds this."""
    return jax.lax.select(True, result, x)


def _add_bias(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def einsum(equation: str, x: Array, weight: Array, out: DTypeLike | None = None) -> Array:
    """A product in the operands' dtype; float32 means float32, not the tensor cores' TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=out)
