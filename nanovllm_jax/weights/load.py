"""A model's config and parameters from wherever its source is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.models.families import model_config_from_hf
from nanovllm_jax.models.params import Params
from nanovllm_jax.weights.assemble import assemble
from nanovllm_jax.weights.generation import read_json
from nanovllm_jax.weights.gguf_file import GGUFFile
from nanovllm_jax.weights.gguf_model import GGUFReader, gguf_model_config
from nanovllm_jax.weights.orbax_files import load_orbax_config, load_orbax_params
from nanovllm_jax.weights.safetensors_files import SafetensorsReader
from nanovllm_jax.weights.source import ModelSource


def load_model_config(source: ModelSource) -> ModelConfig:
    """The model's shape.

    Raises:
        ConfigError: if the architecture or an attribute that changes the result is not supported.
        WeightsError: if the file that says it is missing or corrupt.
    """
    match source.kind:
        case "gguf":
            return gguf_model_config(GGUFFile(source.path))
        case "orbax":
            return load_orbax_config(source.path)
        case "safetensors":
            return model_config_from_hf(read_json(source.path / "config.json"))


def load_params(source: ModelSource, config: ModelConfig, dtype: DTypeLike, shardings: Params) -> Params:
    """The parameters on their devices.

    Args:
        source: of the model.
        config: its shape, as `load_model_config` gave it.
        dtype: of every leaf.
        shardings: pytree of shardings in the structure of `abstract_params(config)`.

    Raises:
        WeightsError: if a file is missing, corrupt or truncated, or tensors are missing, left over or of
            another shape than the config's; the message names them.
    """
    dtype = jnp.dtype(dtype)
    match source.kind:
        case "gguf":
            return assemble(GGUFReader(GGUFFile(source.path), config, np.dtype(dtype)), config, dtype, shardings)
        case "orbax":
            return load_orbax_params(source.path, config, dtype, shardings)
        case "safetensors":
            with SafetensorsReader(source.path) as reader:
                return assemble(reader, config, dtype, shardings)
