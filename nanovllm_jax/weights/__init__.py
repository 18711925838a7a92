"""From a model's name to its config, tokenizer and parameters."""

from nanovllm_jax.weights.convert import convert
from nanovllm_jax.weights.generation import GenerationDefaults, load_generation_defaults
from nanovllm_jax.weights.load import load_model_config, load_params
from nanovllm_jax.weights.orbax_files import save_orbax
from nanovllm_jax.weights.source import ModelSource, locate
from nanovllm_jax.weights.tokenizer_files import load_tokenizer

__all__ = [
    "GenerationDefaults",
    "ModelSource",
    "convert",
    "load_generation_defaults",
    "load_model_config",
    "load_params",
    "load_tokenizer",
    "locate",
    "save_orbax",
]
