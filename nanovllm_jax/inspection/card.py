"""What a report is about: the model, the engine, the target, the versions and the flags."""

from __future__ import annotations

import importlib.metadata
import math
import os

import jax
import jax.numpy as jnp

from nanovllm_jax.inspection.gpus import Gpu
from nanovllm_jax.inspection.report import Card
from nanovllm_jax.step.catalogue import Catalogue

_PACKAGES = ("nanovllm-jax", "jax", "jaxlib", "jax-triton", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin")
_FLAGS = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")


def make_card(catalogue: Catalogue, model: str, target: str, peaks: Gpu | None, context: int, on_gpu: bool) -> Card:
    config, shape = catalogue.config.model, catalogue.config.shape
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Card(
        model=model,
        family=config.family,
        shape={name: getattr(config, name) for name in names},
        engine={
            "num_blocks": shape.num_blocks,
            "block_size": shape.block_size,
            "max_num_seqs": shape.max_num_seqs,
            "max_model_len": shape.max_model_len,
            "attention_backend": catalogue.config.backend,
            "tensor_parallel_size": catalogue.mesh.devices.size,
            "decode_sizes": " ".join(map(str, catalogue.decode_sizes)),
            "prefill_sizes": " ".join(map(str, catalogue.prefill_sizes)),
        },
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(catalogue.params)),
        dtype=jnp.dtype(catalogue.params["embed"].dtype).name,
        cache_dtype=catalogue.cache_dtype.name,
        target=target,
        devices=catalogue.mesh.devices.size,
        flops_per_s=peaks.flops_per_s if peaks else None,
        bytes_per_s=peaks.bytes_per_s if peaks else None,
        context=context,
        versions=versions,
        flags={name: os.environ[name] for name in _FLAGS if name in os.environ},
    )
