"""The results file: one JSON line a figure, the last line of a name counts."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("nanovllm-jax", "jax", "jaxlib", "jax-triton", "triton")


def figure_line(
    name: str,
    values: Sequence[float],
    unit: str,
    limit: float | None,
    *,
    num_devices: int = 1,
    commit: str | None = None,
) -> dict:
    """A figure of this process, this machine and this commit, as it is recorded; `value` is the median."""
    return {
        "figure": name,
        "value": _rounded(statistics.median(values)),
        "n": len(values),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
        "unit": unit,
        "limit": limit,
        "device": device_name(num_devices),
        "versions": versions(),
        "commit": commit or commit_name(),
        "command": command(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(lines: Sequence[dict], folder: Path) -> Path:
    """Appends to the file of this device's model in `folder`, such as `h200.jsonl`."""
    match = re.search(r"\b[A-Z]+\d+\w*", device_name())
    path = folder / f"{match.group().lower() if match else 'cpu'}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def device_name(num_devices: int = 1) -> str:
    """Kind of the devices, with their number if there are several."""
    import jax

    kind = jax.devices()[0].device_kind
    return f"{num_devices} x {kind}" if num_devices > 1 else kind


def versions() -> dict[str, str]:
    """Of Python and the packages that decide speed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit_name() -> str | None:
    """Hash of the checkout, with `-dirty` if files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "-dirty" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command line of this process, with the script's path from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _rounded(value: float) -> float:
    return round(value, 4 if abs(value) < 10 else 1)
