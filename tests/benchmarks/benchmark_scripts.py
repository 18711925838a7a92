"""Where the benchmarks are, their modules for the tests, and a stand-in for another engine."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EMBEDDED = BENCHMARKS.parent / "nanovllm_jax" / "assets" / "tiny"


def import_all() -> None:
    """Imports them; their folder does not stay on the path, where its `kernels` would pass for another package."""
    sys.path.insert(0, str(BENCHMARKS))
    for name in ("collectives", "limit", "models", "results_log", "scaling", "steps", "tables", "workloads"):
        importlib.import_module(name)
    sys.path.remove(str(BENCHMARKS))


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    """The script as a user runs it, on the embedded model."""
    command = [sys.executable, str(BENCHMARKS / script), "--model", str(EMBEDDED), *options]
    return subprocess.run(command, capture_output=True, text=True)


def figures(done: subprocess.CompletedProcess) -> dict[str, dict]:
    """Its JSON lines by the figures' names."""
    return {line["figure"]: line for line in map(json.loads, done.stdout.splitlines())}


def vllm_that(generates: str, folder: Path) -> list[str]:
    """Arguments for a stand-in of vLLM whose `generate` goes on with that code; it writes down its options."""
    (folder / "torch.py").write_text(TORCH)
    (folder / "vllm.py").write_text(VLLM + generates)
    return ["--engine=vllm", f"--pythonpath=vllm={folder}"]


OBEYS = "return [Output(p.given['max_tokens']) for p in params]"
TORCH = """
class cuda:
    get_device_name = staticmethod(lambda index: "Pretend GPU")
"""
VLLM = """
import json, os, pathlib, sys, threading
print("noise on stdout")
class SamplingParams:
    def __init__(self, **given):
        self.given = given
class Output:
    def __init__(self, length):
        self.token_ids, self.outputs, self.num_cached_tokens = [0] * length, [self], 0
class LLM:
    def __init__(self, model, **options):
        pathlib.Path(__file__).with_name("options.json").write_text(json.dumps(options))
        assert not any(path.endswith(("benchmarks", "engines")) for path in sys.path), sys.path
    def generate(self, prompts, params, use_tqdm):
        assert all(p.given["temperature"] == 0.6 and p.given["ignore_eos"] for p in params)
        """
