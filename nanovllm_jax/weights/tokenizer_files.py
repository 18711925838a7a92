"""The tokenizer of a model, from its directory or from inside its GGUF file.

transformers takes a second to import and with PyTorch installed `AutoTokenizer` imports that too, ten more: nothing of
it is imported before a tokenizer is wanted, and a directory that says which class reads it is given to that class.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.model_names import EMBEDDED
from nanovllm_jax.weights.generation import read_json
from nanovllm_jax.weights.gguf_file import GGUFFile
from nanovllm_jax.weights.messages import reason
from nanovllm_jax.weights.source import ModelSource, download, locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]

# The classes that `AutoTokenizer` takes as tokenizer_config.json names them, by the model's type in config.json (None
# where there is no such file). For others (LlamaTokenizer, Mistral's models) it has rules of its own.
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_ANY = ("PreTrainedTokenizerFast", "TokenizersBackend", *_QWEN2)
_TAKEN_AS_NAMED = {None: _ANY, "llama": _ANY, "qwen3": _ANY, "qwen2": _QWEN2}


def load_tokenizer(source: ModelSource | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template.

    Args:
        source: of a model; or the name of a tokenizer: a directory, a hub id, a `.gguf` file, `tiny` or `smollm2`.

    Raises:
        ConfigError: if it is not found or of a kind that cannot be read.
    """
    if isinstance(source, str):
        directory = Path(source).expanduser()
        if directory.is_file() or (source in (EMBEDDED, "smollm2") and not directory.is_dir()):
            source = locate(source)
            directory = source.path
        elif not directory.is_dir():
            directory = download(source, _HUB_PATTERNS)
    else:
        directory = source.path
    # transformers prints that PyTorch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(source, ModelSource) and source.kind == "gguf":
        from nanovllm_jax.weights.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(GGUFFile(source.path))
    try:
        _import_tokenizers()
        tokenizer_class = getattr(importlib.import_module("transformers"), _class_name(directory))
        return tokenizer_class.from_pretrained(directory)
    except Exception as error:  # transformers and its validators raise many classes
        raise ConfigError(
            f"The tokenizer in {directory} cannot be loaded ({reason(error)}). It needs tokenizer.json and "
            "tokenizer_config.json; pass tokenizer= with a directory or hub id that has them."
        ) from error


def _import_tokenizers() -> None:
    """Import transformers' fast tokenizers without PyTorch.

    In release 5.17 (not in 5.23) their module takes a function from the one that reads GGUF checkpoints, and that one
    imports PyTorch where it is installed, which takes seconds. Meanwhile a stand-in has its place, whose function
    fetches the real one when it is called.
    """
    name = "transformers.modeling_gguf_pytorch_utils"
    if name in sys.modules:
        return

    def load_gguf_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(name).load_gguf_checkpoint(*args, **kwargs)

    stand_in = ModuleType(name)
    stand_in.load_gguf_checkpoint = load_gguf_checkpoint  # pyright: ignore[reportAttributeAccessIssue]
    importlib.import_module("transformers")  # first: the stand-in is for that one import
    sys.modules[name] = stand_in
    try:
        importlib.import_module("transformers.tokenization_utils_tokenizers")
    except ImportError:  # a release that takes more from it, or has no such module, imports it in its own way
        pass
    finally:
        sys.modules.pop(name, None)  # a release that has it elsewhere may have taken it away


def _class_name(directory: Path) -> str:
    """The class that reads a directory: the one that `AutoTokenizer` would choose, or itself where that is not sure."""
    stated = read_json(directory / "tokenizer_config.json", {})
    model_type = read_json(directory / "config.json", {}).get("model_type")
    named: str = stated.get("tokenizer_class", "")
    sure = named in _TAKEN_AS_NAMED.get(model_type, ()) and "auto_map" not in stated
    return named if sure and (directory / "tokenizer.json").is_file() else "AutoTokenizer"
