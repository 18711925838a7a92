"""The GGUF container: metadata, and tensors dequantised as they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). The
header is parsed here in 0.1 s where `gguf.GGUFReader` takes 3 s (a vocabulary of 50,000), and truncation is
found. Block formats and dequantisation come from the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from nanovllm_jax.errors import WeightsError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_ELEMENTS = 1 << 24  # dequantised in float32 at a time: 64 MiB


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # outermost axis first, as in numpy
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """One `.gguf` file.

    Attributes:
        path: of the file.
        metadata: key -> number, string, bool or list of these.
        tensors: name -> shape, block format and place in the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            WeightsError: if the file is no GGUF file, truncated or corrupt.
        """
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Header(data)
                self.metadata, self.tensors = header.metadata, header.tensors
                size = len(data)
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError, OSError) as error:
            raise WeightsError(
                f"{path} cannot be read as GGUF ({error}); it is truncated, corrupt or of another format: "
                "download or copy it again."
            ) from error
        end = max((tensor.offset + tensor.num_bytes for tensor in self.tensors.values()), default=0)
        if end > size:
            raise WeightsError(
                f"{path} is truncated: it has {size:,} bytes and its tensors need {end:,}. Download or copy it again."
            )

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor in numpy's axis order; quantised blocks become `dtype`, other tensors keep their own.

        Raises:
            WeightsError: if the tensor's block format is not known.
        """
        tensor = self.tensors[name]
        if tensor.type in _PLAIN:
            plain = _PLAIN[tensor.type]
            return np.fromfile(self.path, plain, count=math.prod(tensor.shape), offset=tensor.offset).reshape(
                tensor.shape
            )
        # Rows (the last axis) are made of whole blocks, so any number of rows is dequantised alone.
        num_rows, row_size = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        row_bytes = tensor.num_bytes // num_rows
        rows = np.empty((num_rows, row_size), dtype)
        step = max(_CHUNK_ELEMENTS // row_size, 1)
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            offset = tensor.offset + start * row_bytes
            blocks = np.fromfile(self.path, np.uint8, count=count * row_bytes, offset=offset)
            try:
                rows[start : start + count] = dequantize(blocks.reshape(count, row_bytes), tensor.type)
            except NotImplementedError as error:
                raise WeightsError(
                    f"{name} in {self.path} has block format {tensor.type.name}, which cannot be "
                    "dequantised; use a file with Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or K-quants."
                ) from error
        return rows.reshape(tensor.shape)


class _Header:
    """Parses a header front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._offset = data, 0
        if data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self._offset = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; supported are 2 and 3")
        num_tensors, num_keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._offset // alignment) * alignment
        self.tensors = {
            name: _Tensor(shape, kind, start + offset, _num_bytes(shape, kind)) for name, shape, kind, offset in infos
        }

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self._offset)
        self._offset += struct.calcsize(code)
        return value

    def _string(self) -> str:
        size = self._scalar("<Q")
        raw = self._data[self._offset : self._offset + size]
        if len(raw) < size:
            raise ValueError("the header ends within a string")
        self._offset += size
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("<I"), self._scalar("<Q")
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        code = _SCALARS[item]
        values = struct.unpack_from(f"<{count}{code[1]}", self._data, self._offset)
        self._offset += struct.calcsize(code) * count
        return list(values)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, num_axes = self._string(), self._scalar("<I")
        shape = tuple(self._scalar("<Q") for _ in range(num_axes))[::-1]
        return name, shape, GGMLQuantizationType(self._scalar("<I")), self._scalar("<Q")


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block_elements * block_bytes
