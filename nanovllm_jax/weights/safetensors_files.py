"""Reading tensors by name from a Hugging Face directory of one or more safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from nanovllm_jax.errors import WeightsError
from nanovllm_jax.weights.messages import first_few

_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsReader:
    """Tensors of a directory; one file is mapped at a time, so that pages of the others are given back."""

    def __init__(self, directory: Path) -> None:
        """List every tensor of every file.

        Raises:
            WeightsError: if a file is missing, truncated or corrupt, or a tensor is not of floating point.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self._open_path: Path | None = None
        unsupported = []
        for path in _weight_files(directory):
            self._open(path)
            for name in self._file.keys():  # noqa: SIM118 - not a mapping
                tensor = self._file.get_slice(name)
                self.shapes[name] = tuple(tensor.get_shape())
                self._file_of[name] = path
                if tensor.get_dtype() not in _DTYPES:
                    unsupported.append(f"{name} is {tensor.get_dtype()}")
        if unsupported:
            raise WeightsError(
                f"{len(unsupported)} tensors of {directory} are of an unsupported dtype "
                f"({first_few(unsupported)}); supported are {', '.join(_DTYPES)}. Use a model that is not "
                "quantised, or its GGUF file."
            )

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor on the host, in the file's dtype."""
        self._open(self._file_of[name])
        return self._file.get_tensor(name)

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._open_path is not None:
            self._file.__exit__(None, None, None)
            self._open_path = None

    def _open(self, path: Path) -> None:
        if path == self._open_path:
            return
        self._close()
        try:
            self._file = safe_open(path, framework="numpy").__enter__()
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} cannot be read ({error}); it is truncated, corrupt or missing: download or copy it again."
            ) from error
        self._open_path = path


def _weight_files(directory: Path) -> list[Path]:
    """The files of the index if there is one, else all safetensors files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{index} is corrupt ({error!r}); download or copy it again.") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise WeightsError(
                f"{len(missing)} of {len(names)} weight files are missing in {directory}: "
                f"{first_few(missing)}. Download or copy the model again."
            )
        return [directory / name for name in names]
    files = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{directory} has no safetensors files. Other formats (pytorch_model.bin) are not read: save the "
            "model with safetensors, or use its GGUF file."
        )
    return files
