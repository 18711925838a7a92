"""Times the kernels on the GPU at hand and prints a table: `python benchmarks/kernels.py [--sweep]`.

Each figure is the best and the median of several runs; a run is a chain of calls inside one jit, each feeding
the next, so that dispatch does not count. K and V are larger than the L2 cache wherever bandwidth is what is
measured. `--sweep` times the attention kernels at other launch parameters too.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from nanovllm_kernels import paged_decode, ragged_prefill, rope_cache_write
from nanovllm_kernels._cases import AttentionCase
from nanovllm_kernels.paged_decode.cases import BENCHMARKS as DECODES
from nanovllm_kernels.ragged_prefill.cases import BENCHMARKS as PREFILLS
from nanovllm_kernels.rope_cache_write.cases import BENCHMARKS as WRITES

CHAIN, RUNS = 10, 7


def seconds_a_call(step, carry, *args) -> tuple[float, float]:
    """Best and median seconds of one `step(carry, *args) -> carry`; the carry is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def chain(carry, *args):
        for _ in range(CHAIN):
            carry = step(carry, *args)
        return carry

    compiled = chain.lower(carry, *args).compile()
    carry = jax.block_until_ready(compiled(carry, *args))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, *args))
        times.append((time.perf_counter() - start) / CHAIN)
    return min(times), statistics.median(times)


def paged_arrays(case: AttentionCase):
    """q, k_cache, v_cache, block_tables in random block order, context_lens; made on the device."""
    blocks = [-(-length // case.block_size) for length in case.context_lens]
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (sum(blocks), case.num_kv_heads, case.block_size, case.head_dim)
    cache_dtype = jnp.dtype(case.cache_dtype or case.dtype)
    k_cache, v_cache = (jax.random.normal(key, shape, jnp.bfloat16).astype(cache_dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (case.num_tokens, case.num_heads, case.head_dim), jnp.dtype(case.dtype))
    order = iter(np.random.default_rng(0).permutation(sum(blocks)).tolist())
    tables = np.zeros((len(blocks), max(blocks)), np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = list(itertools.islice(order, count))
    return q, k_cache, v_cache, jnp.asarray(tables), jnp.array(case.context_lens, jnp.int32)


def decode(case: AttentionCase):
    """GB/s of keys and values read."""
    q, *args = paged_arrays(case)
    step = lambda q, *args: paged_decode(q, *args, **case.options, backend="triton")  # noqa: E731
    read = 2 * sum(case.context_lens) * case.num_kv_heads * case.head_dim * args[0].dtype.itemsize
    return seconds_a_call(step, q, *args), read / 1e9, "GB/s"


def prefill(case: AttentionCase, backend: str = "triton"):
    """TFLOP/s of the two products, of keys that are seen only."""
    q, k_cache, v_cache, tables, lens = paged_arrays(case)
    cu_q_lens = jnp.cumsum(jnp.array((0, *case.q_lens), jnp.int32), dtype=jnp.int32)
    step = lambda q, *args: ragged_prefill(q, *args, **case.options, backend=backend)  # noqa: E731
    return seconds_a_call(step, q, k_cache, v_cache, tables, cu_q_lens, lens), causal_tflop(case), "TFLOP/s"


def prefill_cudnn(case: AttentionCase):
    """The same attention over contiguous K and V by cuDNN, the peer; of all keys where there is a prefix.

    cuDNN's causal mask through JAX is aligned to the start, so a prefix is compared by TFLOP/s without a mask.
    """
    batch, new, context = len(case.q_lens), case.q_lens[0], case.context_lens[0]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, new, case.num_heads, case.head_dim), *[(batch, context, case.num_kv_heads, case.head_dim)] * 2]
    q, k, v = (jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True))
    causal = new == context
    step = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    tflop = causal_tflop(case) if causal else 4 * batch * new * context * case.num_heads * case.head_dim / 1e12
    return seconds_a_call(step, q, k, v), tflop, "TFLOP/s"


def causal_tflop(case: AttentionCase) -> float:
    pairs = sum(q * (context - (q - 1) / 2) for q, context in zip(case.q_lens, case.context_lens, strict=True))
    return 4 * pairs * case.num_heads * case.head_dim / 1e12


def write(case):
    """GB/s, bytes read and bytes written."""
    dtype, group = jnp.dtype(case.dtype), case.num_heads // case.num_kv_heads
    qkv = jax.random.normal(jax.random.key(1), (case.num_tokens, case.num_kv_heads, group + 2, case.head_dim), dtype)
    angles = jnp.ones((case.num_tokens, case.head_dim // 2))
    norm = jnp.ones(case.head_dim, dtype)
    shape = (max(case.num_tokens // case.block_size * 4, 64), case.num_kv_heads, case.block_size, case.head_dim)
    slots = jax.random.permutation(jax.random.key(0), shape[0] * case.block_size)[: case.num_tokens]

    def step(carry, angles, norm, slots):
        qkv, *caches = carry
        _, *caches = rope_cache_write(qkv, angles, angles, *caches, slots, q_norm=norm, k_norm=norm, backend="triton")
        return qkv, *caches

    moved = qkv.nbytes + 2 * angles.nbytes + qkv.nbytes  # q is written, and as many keys and values as are read
    carry = qkv, jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return seconds_a_call(step, carry, angles, norm, slots.astype(jnp.int32)), moved / 1e9, "GB/s"


def copy():
    """GB/s of x + 1 over 2 GiB, read and written: what memory gives XLA here."""
    x = jnp.zeros(2**30, jnp.bfloat16)
    step = lambda x: jax.lax.optimization_barrier(x + 1)  # noqa: E731
    return seconds_a_call(step, x), 2 * x.nbytes / 1e9, "GB/s"


def report(name: str, measured) -> None:
    (best, median), work, unit = measured
    print(f"{name:58} {best * 1e6:9.1f} {median * 1e6:9.1f} µs {work / best:9.1f} {unit}", flush=True)


def sweep() -> None:
    """Other launch parameters, one at a time in place of those that the kernels choose."""
    decode_launch = importlib.import_module("nanovllm_kernels.paged_decode.triton")
    prefill_launch = importlib.import_module("nanovllm_kernels.ragged_prefill.triton")
    choices = [
        *((decode_launch, decode, DECODES, c) for c in itertools.product((32, 64, 128), (2, 4), (3, 5))),
        *(
            (prefill_launch, prefill, PREFILLS, c)
            for c in (
                (64, 64, 4, 3),
                (128, 64, 8, 3),
                (128, 64, 4, 3),
                (128, 128, 8, 3),
                (64, 128, 4, 3),
                (128, 32, 8, 3),
            )
        ),
    ]
    for module, measure, cases, choice in choices:
        names = ("tile_tokens", "num_warps", "num_stages")
        changes = dict(zip(names if module is decode_launch else ("tile_rows", *names), choice, strict=True))
        chosen = module.launch_parameters
        module.launch_parameters = lambda *args, chosen=chosen, changes=changes, **shapes: dataclasses.replace(
            chosen(*args, **shapes), **changes
        )
        try:
            for case in cases:
                report(f"{case.name} {tuple(changes.values())}", measure(case))
        finally:
            module.launch_parameters = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other launch parameters too")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"needs an NVIDIA GPU, but the devices are {jax.devices()}")
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__}))
    print(f"{'':58} {'best':>9} {'median':>9}")
    report("copy: x + 1 over 2 GiB", copy())
    for case in DECODES:
        report(f"paged_decode {case.name}", decode(case))
    for case in PREFILLS:
        report(f"ragged_prefill {case.name}", prefill(case))
        report(f"  Mosaic {case.name}", prefill(case, "mosaic"))
        report(f"  cuDNN, contiguous {case.name}", prefill_cudnn(case))
    for case in WRITES:
        report(f"rope_cache_write {case.name}", write(case))
    if options.sweep:
        sweep()


if __name__ == "__main__":
    main()
