"""A process of `collectives.py`: measures ways of adding over all GPUs of this machine, with the flags it was given."""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import kernel_timing  # before JAX starts its devices
import results_log
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax.parallel.mesh import MODEL_AXIS, make_mesh
from nanovllm_kernels import add_shards
from nanovllm_kernels.add_shards.exchange import Exchange, make_exchange

WIDTH, INNER, SUMS, RUNS = 4096, 512, 24, 7
Add = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of a shard's part, residual and table


def without(part: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    return lax.optimization_barrier(part)  # else only the columns that the next product reads would be computed


def psum(part: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    return add_shards(part, x, axis_name=MODEL_AXIS, backend="xla")


def gather(part: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    return x + jnp.sum(lax.all_gather(part, MODEL_AXIS), axis=0)


def permute(part: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    return x + (part + lax.ppermute(part, MODEL_AXIS, [(0, 1), (1, 0)]))


def exchange(part: jax.Array, x: jax.Array, table: jax.Array) -> jax.Array:
    return add_shards(part, x, axis_name=MODEL_AXIS, table=table, backend="triton")


WAYS: dict[str, Add] = {each.__name__: each for each in (psum, gather, permute, exchange)}


class Chain:
    """A program of 24 sums over a mesh."""

    def __init__(self, mesh: Mesh, buffers: Exchange, add: Add, rows: int) -> None:
        everywhere, shards = NamedSharding(mesh, PartitionSpec()), mesh.shape[MODEL_AXIS]
        x = jax.random.normal(jax.random.key(rows), (rows, WIDTH))
        weight = jax.random.normal(jax.random.key(0), (shards * INNER, WIDTH)) * (0.1 / (INNER * shards) ** 0.5)
        self.arguments = (
            jax.device_put(x.astype(jnp.bfloat16), everywhere),
            jax.device_put(weight.astype(jnp.bfloat16), NamedSharding(mesh, PartitionSpec(MODEL_AXIS))),
            buffers.table,
        )

        def body(x: jax.Array, weight: jax.Array, table: jax.Array) -> jax.Array:
            for _ in range(SUMS):
                x = add(x[:, :INNER] @ weight, x, table)
            return x

        specs = tuple(each.sharding.spec for each in self.arguments)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        self.program = jax.jit(mapped).lower(*self.arguments).compile()

    def __call__(self) -> jax.Array:
        return self.program(*self.arguments)


def measure(ways: Sequence[str], all_rows: Sequence[int], lock: str, *, kernels: bool) -> Iterator[dict]:
    """Microseconds a sum of each way and number of rows."""
    devices = jax.local_device_count()
    if jax.default_backend() != "gpu" or devices < 2:
        raise SystemExit(f"needs at least 2 NVIDIA GPUs, but the devices are {jax.devices()}: use a larger machine.")
    mesh = make_mesh(devices, 1)
    buffers = make_exchange(mesh, MODEL_AXIS)
    ways = [way for way in ways if way != "permute" or devices == 2]
    about = results_log.measured_here()
    cases = [(add, rows) for rows in all_rows for add in (without, *(WAYS[way] for way in ways))]
    with ThreadPoolExecutor() as pool:
        chains = dict(zip(cases, pool.map(lambda case: Chain(mesh, buffers, *case), cases), strict=True))
    jax.block_until_ready(chains[WAYS[ways[0]], all_rows[0]]())  # NCCL takes seconds to start
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for rows in all_rows:
            calls = [chain for (_, its), chain in chains.items() if its == rows]
            for call in calls * 2:  # the driver loads a kernel at its first launch, XLA captures a graph at its second
                jax.block_until_ready(call())
            spans = kernel_timing.spans(calls * RUNS)
            seconds = [spans[at :: len(calls)] for at in range(len(calls))]
            least = statistics.median(seconds[0])
            for way, call, those in zip(ways, calls[1:], seconds[1:], strict=True):
                values = [1e6 * (each - least) / SUMS for each in those]
                yield {
                    "way": way,
                    "rows": rows,
                    "us": statistics.median(values),
                    "all_us": values,
                    "devices": devices,
                    "kind": about["device"],
                    "versions": about["versions"],
                    "kernels": kernel_timing.longest_kernels(call, 4) if kernels else [],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, required=True)
    parser.add_argument("--rows", nargs="+", type=int, required=True)
    parser.add_argument("--lock", required=True, help="file that the one who measures has locked")
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    for line in measure(options.ways, options.rows, options.lock, kernels=options.kernels):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
