"""One engine in a process of its own: `python -P benchmarks/engines/worker.py ENGINE`, driven over pipes.

Each JSON line on stdin is answered by one on the standard output that the process was started with; what the engine
itself prints goes to stderr. First `{"model": DIR, "options": {...}}`, answered when the engine is ready by its
device and versions, or by `missing` where it is not installed; then any number of
`{"prompts": [[id, ...], ...], "output_lens": [n, ...]}`, answered by the seconds of that one `generate` call, the
lengths of its outputs and the prompt tokens that came from the prefix cache (None where the engine does not say).
`"trace": DIR` beside the prompts profiles the call. The end of stdin is the end of the process.

The engine's own Python may be another one than the project's, so this file needs the standard library alone. `-P`
and loading by path keep this folder off `sys.path`, where `vllm.py` and its like would hide the packages.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import tomllib
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name = sys.argv[1]
    lines = (json.loads(line) for line in sys.stdin)

    def answer(**facts) -> None:
        answers.write(json.dumps(facts) + "\n")

    try:
        module, order = engine_module(name), next(lines)
        try:
            engine = module.Engine(order["model"], order["options"])
        except ImportError as error:
            return answer(missing=f"{type(error).__name__}: {error}")
        answer(device=engine.device(), versions=versions(module.PACKAGES))
        for order in lines:
            answer(**timed_run(engine, order))
        engine.close()
    except Exception as error:
        traceback.print_exc()  # before the answer, so that who reads it finds the log complete
        answer(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def engine_module(name: str) -> ModuleType:
    """The module of this folder that opens the engine."""
    path = Path(__file__).with_name(f"{name.replace('-', '_')}.py")
    spec = importlib.util.spec_from_file_location(f"benchmark_engine_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed_run(engine, order: dict) -> dict:
    """One `generate` call: from prompts in host memory to all tokens back."""
    profile = engine.trace(order["trace"]) if "trace" in order else contextlib.nullcontext()
    with profile:
        started = time.perf_counter()
        lengths, num_cached = engine.generate(order["prompts"], order["output_lens"])
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "output_lens": lengths, "num_cached_tokens": num_cached}


def versions(packages: list[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed or, as a checkout of their own, on the path."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))} | checkout_versions()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {name: found[name] for name in ("python", *packages) if name in found}


def checkout_versions() -> dict[str, str]:
    """What the `pyproject.toml` of each folder on the path says."""
    projects = (Path(folder, "pyproject.toml") for folder in sys.path if folder)
    tables = (tomllib.loads(file.read_text()).get("project", {}) for file in projects if file.is_file())
    return {table["name"]: table["version"] for table in tables if "version" in table}


if __name__ == "__main__":
    main()
