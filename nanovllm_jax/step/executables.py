"""Whole compiled programs, kept on disk: a start that finds them traces, lowers and compiles nothing.

XLA's own persistent cache is keyed by the lowered program, so finding something in it costs tracing and lowering, and
Triton kernels are compiled anew for every process while they are lowered. Here the key is what the program is made
from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import nanovllm_kernels
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.relocation import load_relocated
from nanovllm_kernels._compat import register_gpu_runtimes

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton")
KEPT_FOLDERS = 16  # one for each combination of model, arguments and versions; the least recently used goes first


def pack(compiled: jax.stages.Compiled, devices: Sequence[Any]) -> bytes:
    """A whole program and the devices it was compiled for, in the order of their mesh; `ExecutableStore` reads it."""
    # As it is: kernels are compressed already, so that zlib would gain 8% and take as long as serialising does.
    return pickle.dumps(([device.id for device in devices], serialize_executable.serialize(compiled)))


class ExecutableStore:
    """The compiled programs of one catalogue on one kind of device; replicas on other devices share them.

    Loading runs code that the files hold, as with any cache of executables: the folder must be the user's own.

    Args:
        root: folder of all stores.
        catalogue: what the programs are made from.
        options: XLA's options that they are compiled with.
    """

    def __init__(self, root: Path, catalogue: Catalogue, options: Mapping[str, Any] | None) -> None:
        self.folder = root / _digest(catalogue, options)
        self._options = options
        self._devices = list(catalogue.mesh.devices.flat)
        if self._devices[0].platform == "gpu":
            register_gpu_runtimes()

    def load(self, key: ProgramKey) -> jax.stages.Compiled | None:
        """The program, or None if it is not there or does not load."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return self.unpack(path.read_bytes())
        except Exception as error:  # whatever is wrong with the file, compiling is the remedy
            logger.warning("%s does not load (%s); it is compiled again", path, error)
            return None

    def unpack(self, packed: bytes) -> jax.stages.Compiled:
        """What `pack` wrote, here or in another process, on this store's devices."""
        compiled_for, serialized = pickle.loads(packed)
        if compiled_for != [device.id for device in self._devices]:
            return load_relocated(serialized, compiled_for, self._devices, self._options)
        return serialize_executable.deserialize_and_load(
            *serialized, backend=self._devices[0].client, execution_devices=self._devices
        )

    def save(self, key: ProgramKey, compiled: jax.stages.Compiled) -> None:
        """Keep a program; a back end that cannot is worth a warning."""
        try:
            packed = pack(compiled, self._devices)
        except Exception as error:
            logger.warning("%s is not kept for the next start: %s", key, error)
        else:
            self.keep(key, packed)

    def keep(self, key: ProgramKey, packed: bytes) -> None:
        """Keep what `pack` gave; a full disk is worth a warning."""
        try:
            self._write(self._path(key).name, packed)
        except OSError as error:
            logger.warning("%s is not kept for the next start: %s", key, error)

    def mark_used(self) -> None:
        """Make this the most recently used store, and remove the least recently used beyond `KEPT_FOLDERS`."""
        if not self.folder.exists():
            return
        with suppress(OSError):  # another process may remove one meanwhile; a shared folder may be another user's
            os.utime(self.folder)
            folders = sorted(self.folder.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
            for folder in folders[KEPT_FOLDERS:]:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, key: ProgramKey) -> Path:
        return self.folder / f"{key.kind}-{key.size}.bin"

    def _write(self, name: str, content: bytes) -> None:
        """All or nothing, also where two processes start at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                os.unlink(file.name)  # a full disk is not made fuller
                raise
        os.replace(file.name, self.folder / name)


def _digest(catalogue: Catalogue, options: Mapping[str, Any] | None) -> str:
    device = catalogue.mesh.devices.flat[0]
    abstract = jax.tree.map(
        lambda x: (x.shape, str(x.dtype), str(x.sharding.spec)), (catalogue.params, catalogue.caches)
    )
    made_from = (
        catalogue.config,
        abstract,
        catalogue.num_logprobs,
        sorted((options or {}).items()),
        tuple(catalogue.mesh.shape.items()),
        (device.platform, device.device_kind, device.client.platform_version),
        getattr(device, "core_count", None),  # fewer multiprocessors than the GPU has, where it is shared
        [(name, _version(name)) for name in _PACKAGES],
        os.environ.get("XLA_FLAGS", ""),
        _sources(),
    )
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _sources() -> str:
    """Digest of this package's and the kernels' files: what traces, and what tunes."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(nanovllm_kernels.__file__).parent):
        for path in sorted([*package.rglob("*.py"), *package.rglob("tuning/*.json")]):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()
