"""The results file: one JSON line a figure, the last line of a name counts."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = ROOT / "benchmarks" / "results"

# Options that say where things are on one machine, which another has elsewhere; --record itself is kept.
_PLACES = (
    *("--pythonpath", "--python", "--model-dir", "--caches", "--chart", "--plot", "--trace"),
    *("--commit", "--record"),
)


def figure_line(
    name: str,
    values: Sequence[float],
    unit: str,
    limit: float | None,
    *,
    device: str,
    versions: Mapping[str, str],
    commit: str | None = None,
) -> dict:
    """A figure of this command and this commit, as it is recorded; `value` is the median.

    `device` and `versions` are those of the process that was measured.
    """
    return {
        "figure": name,
        "value": _rounded(statistics.median(values)),
        "n": len(values),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
        "unit": unit,
        "limit": None if limit is None else _rounded(limit),
        "device": device,
        "versions": dict(versions),
        "commit": commit or commit_name(),
        "command": command(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(lines: Sequence[dict], folder: Path) -> Path:
    """Appends lines of one device to the file of its model in `folder`, such as `h200.jsonl`."""
    match = re.search(r"\b[A-Z]+\d+\w*", lines[0]["device"])
    path = folder / f"{match.group().lower() if match else 'cpu'}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def recorded(path: Path) -> list[dict]:
    """All lines, the oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def latest(lines: Iterable[dict]) -> dict[str, dict]:
    """The line that counts of each figure's name, in the order in which the names first came."""
    return {line["figure"]: line for line in lines}


def beside(lines: Sequence[dict]) -> dict[str, dict]:
    """The last lines, but of our figures that other engines have, too, those that ran with theirs.

    That is at their commit, and of those by their command, if there are any: another may have run on another machine.
    """
    chosen = latest(lines)
    of_others = {figure.partition("/")[2]: line for figure, line in chosen.items() if "/" in figure}
    ours = [line for line in lines if line["figure"] in of_others]
    at_their_commit = [line for line in ours if line["commit"] == of_others[line["figure"]]["commit"]]
    by_their_command = [line for line in at_their_commit if line["command"] == of_others[line["figure"]]["command"]]
    return chosen | latest(at_their_commit) | latest(by_their_command)


def measured_here() -> dict[str, Any]:
    """`device` and `versions` of a figure that this process measured itself; opens the device."""
    import jax

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("jax", "jaxlib", "jax-triton", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def device_name(kind: str, num_devices: int = 1) -> str:
    """Kind of the devices, with their number if there are several."""
    return f"{num_devices} x {kind}" if num_devices > 1 else kind


def number(value: float) -> str:
    """For a table: three or four digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def commit_name() -> str | None:
    """Hash of the checkout, with `-dirty` if files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "-dirty" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command line of this process: the script from the repository's root, without paths of this machine."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *without_places(sys.argv[1:])])


def without_places(arguments: Sequence[str]) -> list[str]:
    """Arguments that mean the same on another machine: of `_PLACES` neither option nor value, but `--record` stays."""
    kept, is_place = [], False
    for argument in arguments:
        option, _, _ = argument.partition("=")
        if argument.startswith("-"):
            is_place = option in _PLACES
            if option == "--record":
                kept.append(option)
            elif not is_place:
                kept.append(argument)
        elif not is_place:
            kept.append(argument)
    return kept


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _rounded(value: float) -> float:
    return round(value, 4 if abs(value) < 10 else 1)
