"""Loads a model over two host devices, and prints how much memory that took: a subprocess of test_host_memory.py.

    python tests/weights/host_memory.py SMALL_MODEL MODEL

The small one, of the same format, is loaded before, so that imports and thread pools are not counted. The devices are
host memory too: what is printed is their parameters and all that was beside them, pages of mapped files excepted.
"""

import json
import os
import sys
import threading
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

from nanovllm_jax.parallel.mesh import make_mesh, param_shardings
from nanovllm_jax.weights import load_model_config, load_params, locate


def load(path: str) -> list[jax.Array]:
    """All parameters in bfloat16, split over the devices, ready."""
    source = locate(path)
    config = load_model_config(source)
    params = load_params(source, config, "bfloat16", param_shardings(config, make_mesh(2, 1)))
    return jax.block_until_ready(jax.tree.leaves(params))


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(small: str, model: str) -> None:
    """Prints bytes of the parameters and the most that was in use at once."""
    load(small)
    before, samples, done = anonymous_bytes(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    leaves = load(model)
    samples.append(anonymous_bytes())
    done.set()
    thread.join()
    split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    print(
        json.dumps(
            {
                "params": sum(leaf.nbytes for leaf in leaves),
                "split": sum(leaf.nbytes for leaf in split),
                "peak": max(samples) - before,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
