"""Any model that can be loaded, written as an Orbax checkpoint (`nanovllm-jax convert`)."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from nanovllm_jax.models.params import abstract_params, map_specs
from nanovllm_jax.weights.generation import load_generation_defaults
from nanovllm_jax.weights.load import load_model_config, load_params
from nanovllm_jax.weights.orbax_files import save_orbax
from nanovllm_jax.weights.source import locate
from nanovllm_jax.weights.tokenizer_files import load_tokenizer


def convert(model: str | None, directory: Path, dtype: DTypeLike | None = None) -> None:
    """Load `model` into host memory and write it to `directory`.

    Args:
        model: as in `locate`.
        directory: new or empty.
        dtype: of the arrays; None keeps what the model was saved in.

    Raises:
        ConfigError: if the model is not found or not supported, or the directory is not empty.
        WeightsError: if its weights cannot be read.
    """
    source = locate(model)
    config = load_model_config(source)
    sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shardings = map_specs(lambda _: sharding, abstract_params(config))
    params = load_params(source, config, dtype or config.dtype, shardings)
    save_orbax(params, config, load_tokenizer(source), load_generation_defaults(source), directory)
