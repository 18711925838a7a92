"""Measures what a sum over the GPUs of one machine costs a decode step: `python benchmarks/collectives.py [--record]`.

A program of 24 products whose results are summed over the GPUs and added to a residual, against the products alone: the
difference of their device times, from traces, over 24. The addition of the residual, and what stands between kernels,
is in it. Every setting (XLA's flags, NCCL's variables) is a process of its own; they compile side by side and run one
at a time. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import results_log

ROWS = (1, 8, 64, 128)
WORKER = Path(__file__).with_name("collective_process.py")
OURS = ("exchange", 64)  # what is recorded
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclass(frozen=True)
class Setting:
    """XLA's flags, NCCL's variables, and the ways of adding that are measured with them."""

    flags: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    ways: tuple[str, ...] = ("psum",)


_NCCL = "--xla_gpu_experimental_use_collective_kernels="  # none of XLA's own kernels, which it takes where it can
_GRAPH = "--xla_gpu_enable_command_buffer=+COLLECTIVES"
_ORDER = "--xla_gpu_disable_async_collectives=ALLREDUCE"
SETTINGS = {
    "exchange": Setting(ways=("exchange",)),
    "default": Setting(ways=("psum", "gather", "permute")),
    "graph": Setting(_GRAPH),
    "order": Setting(_ORDER),
    "order+graph": Setting(f"{_ORDER} {_GRAPH}"),
    "nccl": Setting(_NCCL, ways=("psum", "gather", "permute")),
    "nccl+graph": Setting(f"{_NCCL} {_GRAPH}"),
    "nccl+order+graph": Setting(f"{_NCCL} {_ORDER} {_GRAPH}"),
    "nccl+ll": Setting(f"{_NCCL} {_ORDER} {_GRAPH}", {"NCCL_PROTO": "LL"}),
    "nccl+ll128": Setting(f"{_NCCL} {_ORDER} {_GRAPH}", {"NCCL_PROTO": "LL128"}),
    "nccl+registered": Setting(f"{_NCCL} {_ORDER} --xla_gpu_enable_nccl_user_buffers=true"),
    "nccl+symmetric": Setting(f"{_NCCL} {_ORDER} --xla_gpu_experimental_enable_nccl_symmetric_buffers=true"),
}


def main() -> int:
    """Starts a process for each setting and prints what they measure, as each ends; the exit status."""
    options = parse_args()
    print(f"{'setting':18} {'way':10} " + " ".join(f"{rows:>7}" for rows in options.rows) + "   rows of 4096: us a sum")
    failed = False
    with tempfile.NamedTemporaryFile() as lock:
        processes = {name: start(SETTINGS[name], lock.name, options) for name in options.settings}
        for name, process in processes.items():
            output, errors = process.communicate()
            lines = [json.loads(line) for line in output.splitlines()]
            show(name, lines, options.rows)
            record([line for line in lines if (line["way"], line["rows"]) == OURS], options)
            if process.returncode:
                print(f"{name}: status {process.returncode}: {errors[-options.error_length :]}", flush=True)
                failed = True
    return int(failed)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="all by default")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--kernels", action="store_true", help="name the kernels that took the time")
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="S", help="of each process")
    parser.add_argument("--error-length", type=int, default=1000, help="characters shown of a failure")
    parser.add_argument("--record", nargs="?", const=str(results_log.DEFAULT_FOLDER), help="folder to append to")
    parser.add_argument("--commit", help="hash to record where there is no git")
    return parser.parse_args()


def start(setting: Setting, lock: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that measures a setting as soon as it holds the lock."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {setting.flags}".strip()
    environment = {**os.environ, **NO_MULTICAST, **setting.environment, "XLA_FLAGS": flags}
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they are there all at once
    command = ["timeout", str(options.time_limit), sys.executable, str(WORKER), "--lock", lock]
    command += ["--ways", *setting.ways, "--rows", *map(str, options.rows), *["--kernels"] * options.kernels]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def show(setting: str, lines: Sequence[dict], all_rows: Sequence[int]) -> None:
    """A table row for each way."""
    found = {(line["way"], line["rows"]): line for line in lines}
    for way in dict.fromkeys(way for way, _ in found):
        cells = (f"{found[way, rows]['us']:7.1f}" if (way, rows) in found else " " * 7 for rows in all_rows)
        print(f"{setting:18} {way:10} {' '.join(cells)}", flush=True)
    for line in lines:
        for name, microseconds, count in line["kernels"]:
            print(f"    {line['way']:10} {line['rows']:4} {count:4} x {microseconds:6.1f} us {name[:70]}")


def record(lines: Sequence[dict], options: argparse.Namespace) -> None:
    """Prints the figure of our own kernel, and appends it to the results if that is asked for."""
    for line in lines:
        name, device = (
            f"allreduce_us_64x4096_x{line['devices']}",
            results_log.device_name(line["kind"], line["devices"]),
        )
        figure = results_log.figure_line(
            name, line["all_us"], "us", None, device=device, versions=line["versions"], commit=options.commit
        )
        print(json.dumps(figure), flush=True)
        if options.record:
            results_log.append([figure], Path(options.record))


if __name__ == "__main__":
    raise SystemExit(main())
