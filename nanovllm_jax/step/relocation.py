"""A serialised program, on other devices than those it was compiled for: one compilation serves all replicas.

The machine code of a program does not depend on which devices run it; a serialised one names them in two places. XLA's
executable takes its device assignment from the compile options that it is loaded with (which is how JAX's persistent
cache, whose keys leave the assignment out on GPUs, loads what another device compiled). JAX's shardings beside it name
devices by their ids, which are replaced while they are unpickled.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.compiler import get_compile_options  # loading with options has no public function
from jax.experimental.serialize_executable import _JaxPjrtUnpickler  # likewise


def load_relocated(
    serialized: tuple[bytes, Any, Any],
    compiled_for: Sequence[int],
    devices: Sequence[Any],
    options: Mapping[str, Any] | None,
) -> jax.stages.Compiled:
    """The program on `devices`.

    Args:
        serialized: what `jax.experimental.serialize_executable.serialize` gave.
        compiled_for: ids of the devices that it was compiled for, in the order of their mesh.
        devices: as many others, in the same order.
        options: XLA's options of the catalogue's programs; those of single programs only matter while compiling.
    """
    payload, in_tree, out_tree = serialized
    unpickler = _Relocating(payload, compiled_for, devices, options)
    unloaded, flat_arguments, no_kwargs = unpickler.load()
    arguments = in_tree.unflatten(flat_arguments)
    return jax.stages.Compiled(unloaded.load(), [], arguments, out_tree, no_kwargs=no_kwargs)


class _Relocating(_JaxPjrtUnpickler):
    def __init__(
        self, payload: bytes, compiled_for: Sequence[int], devices: Sequence[Any], options: Mapping[str, Any] | None
    ) -> None:
        super().__init__(io.BytesIO(payload), devices[0].client, devices)
        self.devices_by_id = dict(zip(compiled_for, devices, strict=True))
        self._options = get_compile_options(
            num_replicas=1,
            num_partitions=len(devices),
            device_assignment=np.array([[device.id for device in devices]]),
            env_options_overrides=dict(options or {}),
            backend=devices[0].client,
        )

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "exec":
            return self.backend.deserialize_executable(
                pid[1], executable_devices=self.execution_devices, compile_options=self._options
            )
        return super().persistent_load(pid)
