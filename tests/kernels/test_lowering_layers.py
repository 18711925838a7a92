"""The kernel of all layers compiles for every supported architecture, on a machine that has no GPU."""

import json
import math
import re

import jax
import pytest
from lowering import ARCHITECTURES

from nanovllm_kernels import decode_layers, lowering_for
from nanovllm_kernels.decode_layers.cases import LayerCase, layer_inputs


def lower_layers(case, architecture, donate=()):
    def call(*args):
        return decode_layers(*args, **case.options, backend="triton")

    with lowering_for(architecture) as target:
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layer_inputs(case))
        traced = jax.jit(call, donate_argnums=donate).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text(), target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "case",
    [
        LayerCase("with_norms", 100, 256, 4, 2, 128, 512),
        LayerCase("with_bias", 100, 448, 7, 1, 64, 1024, qk_norm=False, qkv_bias=True, sliding_window=50),
    ],
    ids=lambda case: case.name,
)
def test_layers_compile_to_one_kernel_that_updates_the_caches_in_place(compiled, architecture, case):
    text, limit = lower_layers(case, architecture, donate=(4,))
    assert text.count("custom_call @triton_kernel_call_ffi") == 1
    assert [name for name, _ in compiled] == ["decode_layers_kernel"]
    assert all(shared <= limit for _, shared in compiled)
    assert text.count("tf.aliasing_output") == 2 * case.num_layers


LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.blocked<\{sizePerThread = (.*?), threadsPerWarp = (.*?), warpsPerCTA = (.*?), order", re.MULTILINE
)
VOLATILE = re.compile(r"tt\.load .*isVolatile = true.*tensor<([\dx]+)x!tt\.ptr<i(?:32|64)>, (#\w+)>")


@pytest.mark.parametrize("head_dim", [16, 128])
def test_no_two_threads_read_the_same_word_that_a_program_waits_for(layouts, head_dim):
    # Each would read it at a time of its own, and the check whether it has come asks only one of them.
    lower_layers(LayerCase("small", 100, 256, 4, 2, head_dim, 512), 90)
    (ir,) = layouts
    parts = {name: [json.loads(part) for part in parts] for name, *parts in LAYOUT.findall(ir)}
    loads = VOLATILE.findall(ir)
    assert len(loads) == ir.count("isVolatile = true") > 10
    for shape, layout in loads:
        sizes = [math.prod(along) for along in zip(*parts[layout], strict=True)]
        assert all(size <= int(length) for size, length in zip(sizes, shape.split("x"), strict=True)), (shape, sizes)
