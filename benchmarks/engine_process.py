"""The side of an engine's process that asks: starts `engines/worker.py`, sends it prompts, reads its timings."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from nanovllm_jax.loadtest.offline import Requests, Run

OURS = "nanovllm-jax"
ENGINES = (OURS, "nano-vllm", "vllm", "transformers")
WORKER = Path(__file__).with_name("engines") / "worker.py"

# No look-ups on the network and no usage statistics.
_PEER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# No NVLink multicast, which not every machine allows.
_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_SHOWN_LOG_LINES = 15
_CLOSING_S = 20.0


class EngineMissing(Exception):
    """The engine cannot be imported."""


class EngineFailed(Exception):
    """The engine started and then raised, died or gave outputs of another length."""


class OutOfTime(Exception):
    """The time limit passed."""


@dataclass(frozen=True)
class EngineSpec:
    """How to start one engine.

    Attributes:
        name: one of `ENGINES`.
        python: the interpreter that has it.
        pythonpath: PYTHONPATH of its process, instead of this one's.
        options: arguments of its constructor.
        environment: variables of its process, over this one's.
        verbose: let its log through, instead of showing the end of it after a failure.
    """

    name: str
    python: str = sys.executable
    pythonpath: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    verbose: bool = False

    def process_environment(self) -> dict[str, str]:
        """All variables; what the user has set of a peer's defaults stays."""
        variables = _NO_MULTICAST | dict(os.environ)
        if self.name != OURS:
            variables = _PEER_ENVIRONMENT | variables
        if self.pythonpath is not None:
            variables["PYTHONPATH"] = self.pythonpath
        return variables | dict(self.environment)


class EngineProcess:
    """An engine that is ready, in a process group of its own; close it, or use it as a context.

    Attributes:
        startup_s: from the start of the process to ready.
        started: when the process was started, on `time.perf_counter`.
        device: kind of the GPU, without the number.
        versions: of Python and the packages that decide speed.

    Raises:
        EngineMissing: with the import error.
        EngineFailed: if it does not come up.
        OutOfTime: if it is not ready at `deadline`, on `time.monotonic`.
    """

    def __init__(self, spec: EngineSpec, model: str | None, deadline: float = math.inf) -> None:
        self.spec, self.deadline = spec, deadline
        self._log = None if spec.verbose else tempfile.TemporaryFile()  # noqa: SIM115
        self._unread = b""
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [spec.python, "-P", "-X", "no_debug_ranges", str(WORKER), spec.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=spec.process_environment(),
            start_new_session=True,
        )
        try:
            ready = self._ask({"model": model, "options": dict(spec.options)})
        except BaseException:
            self.kill()
            raise
        self.startup_s = time.perf_counter() - self.started
        self.device: str = ready["device"]
        self.versions: dict[str, str] = ready["versions"]

    def run(self, requests: Requests, trace: str | None = None) -> Run:
        """Times one `generate` call; with `trace`, a folder, it is profiled.

        Raises:
            EngineFailed: if the engine raises or an output has not the length that was asked for.
            OutOfTime: at the deadline.
        """
        prompts, output_lens = requests
        order = {"prompts": prompts, "output_lens": output_lens}
        answer = self._ask(order if trace is None else order | {"trace": trace})
        for i, (got, asked) in enumerate(zip(answer["output_lens"], output_lens, strict=True)):
            if got != asked:
                raise EngineFailed(f"output {i} has {got} tokens, {asked} were asked for; the figure is void")
        num_cached = answer["num_cached_tokens"] or 0
        return Run(answer["seconds"], sum(map(len, prompts)), num_cached, sum(output_lens))

    def close(self) -> None:
        """Lets the engine end by itself, then ends what is left of its processes."""
        self._process.stdin.close()
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            print(f"{self.spec.name} did not end within {_CLOSING_S:.0f} s and is killed", file=sys.stderr)
        self.kill()

    def kill(self) -> None:
        """Ends the process and what it started."""
        with suppress(ProcessLookupError):  # all gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):  # what was not sent has no reader any more
                if stream is not None:
                    stream.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    def _ask(self, order: dict) -> dict:
        with suppress(BrokenPipeError):  # why it ended is in its answer or its log
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._read_line())
        if "missing" in answer:
            raise EngineMissing(answer["missing"])
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}{self._end_of_log()}")
        return answer

    def _read_line(self) -> bytes:
        """One line of the worker's; waits in short turns, since children may hold the pipe of a dead worker."""
        while b"\n" not in self._unread:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            ready, _, _ = select.select([self._process.stdout], [], [], 0.5)
            chunk = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            self._unread += chunk
            if not chunk and (ready or self._process.poll() is not None):
                with suppress(subprocess.TimeoutExpired):  # a thread of its own may keep it from ending
                    self._process.wait(_CLOSING_S)
                raise EngineFailed(f"its process ended with status {self._process.returncode}{self._end_of_log()}")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _end_of_log(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-_SHOWN_LOG_LINES:]
        return "".join(f"\n  | {line}" for line in lines)
