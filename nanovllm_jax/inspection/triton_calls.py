"""Reads the compiled Triton kernels out of a lowered program: jax-triton carries their PTX along."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanovllm_kernels._compat import triton_ir

# Field numbers of jax-triton's message: a call holds a kernel, which holds these.
_NAME, _WARPS, _SHARED, _PTX = 1, 2, 3, 4


@dataclass(frozen=True)
class TritonKernel:
    """One kernel as it was compiled for the target."""

    name: str
    num_warps: int
    shared_bytes: int
    ptx: str
    ttir: str


def triton_kernels(lowered: Any) -> list[TritonKernel]:
    """The different Triton kernels of a `jax.stages.Lowered`, in the order of their first call."""
    found: dict[bytes, TritonKernel] = {}
    for operation in _operations(lowered.compiler_ir().operation):
        if operation.name != "stablehlo.custom_call" or "triton" not in str(operation.attributes["call_target_name"]):
            continue
        payload = zlib.decompress(operation.attributes["mhlo.backend_config"]["opaque"].value_bytes)
        kernel = _fields(_fields(_fields(payload)[1])[1])
        found.setdefault(
            kernel[_PTX],
            TritonKernel(
                kernel[_NAME].decode(),
                kernel.get(_WARPS, 0),
                kernel.get(_SHARED, 0),
                kernel[_PTX].decode(),
                triton_ir(kernel[_PTX].decode()),
            ),
        )
    return list(found.values())


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _fields(message: bytes) -> dict[int, Any]:
    """The first value of each field of a protocol buffer message (encoding: protobuf.dev)."""
    found: dict[int, Any] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
        elif wire == 2:
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        else:
            width = 8 if wire == 1 else 4
            value, position = message[position : position + width], position + width
        found.setdefault(number, value)
    return found


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
