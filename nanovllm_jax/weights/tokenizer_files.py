"""The tokenizer of a model, from its directory or from inside its GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

# transformers prints that PyTorch is missing, which is as it should be here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.weights.gguf_file import GGUFFile
from nanovllm_jax.weights.gguf_tokenizer import gguf_tokenizer
from nanovllm_jax.weights.messages import reason
from nanovllm_jax.weights.source import ModelSource, download, locate

_HUB_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]


def load_tokenizer(source: ModelSource | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template.

    Args:
        source: of a model; or the name of a tokenizer: a directory, a hub id, a `.gguf` file or `smollm2`.

    Raises:
        ConfigError: if it is not found or of a kind that cannot be read.
    """
    if isinstance(source, str):
        directory = Path(source).expanduser()
        if directory.is_file() or source == "smollm2":
            source = locate(source)
        elif not directory.is_dir():
            directory = download(source, _HUB_PATTERNS)
    else:
        directory = source.path
    if isinstance(source, ModelSource) and source.kind == "gguf":
        return gguf_tokenizer(GGUFFile(source.path))
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers and its validators raise many classes
        raise ConfigError(
            f"The tokenizer in {directory} cannot be loaded ({reason(error)}). It needs tokenizer.json and "
            "tokenizer_config.json; pass tokenizer= with a directory or hub id that has them."
        ) from error
