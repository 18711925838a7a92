"""What the name of a model may be, as far as it can be told without JAX or the network."""

from __future__ import annotations

import re
from pathlib import Path

from nanovllm_jax.errors import ConfigError

EMBEDDED = "tiny"  # the built-in model's
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_model_name(model: str) -> None:
    """Whether a name is a place on disk, or could be a hub id.

    Raises:
        ConfigError: if it is neither.
    """
    if Path(model).expanduser().exists():
        return
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise ConfigError(f"Model {model!r}: no such file or directory, and not a hub id either (owner/name).")
