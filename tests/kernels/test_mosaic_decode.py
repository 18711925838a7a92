"""`rope_paged_decode`'s Mosaic kernel in the interpreter, which follows every barrier and copy."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracle import relative_error

from nanovllm_kernels import rope_paged_decode
from nanovllm_kernels._cases import AttentionCase
from nanovllm_kernels.paged_decode.plan import plan_pieces
from nanovllm_kernels.rope_paged_decode.cases import rope_paged_decode_inputs
from nanovllm_kernels.rope_paged_decode.mosaic import rope_paged_decode_mosaic

# No token, only the newest, at borders of blocks and tiles, and a row that is long enough to be cut.
LENGTHS = (0, 1, 300, 16, 17, 64, 65, 66)


# `tile_tokens`: what pieces begin at multiples of, tiles of the kernel or halves of them.
@pytest.mark.parametrize("most_pieces", [1, 4], ids=["whole_rows", "a_row_in_pieces"])
@pytest.mark.parametrize(
    ("case", "tile_tokens"),
    [
        (AttentionCase("group_of_4", LENGTHS, 4, 1, 128), 64),
        (AttentionCase("two_heads", LENGTHS[1:5], 4, 2, 128, block_size=8), 32),
    ],
    ids=["group_of_4", "two_heads"],
)
def test_interpreted_kernel_matches_the_reference_and_reads_no_unused_slot(case, tile_tokens, most_pieces):
    args, options = rope_paged_decode_inputs(case)
    if case.num_kv_heads == 2:
        options |= {"q_norm": None, "k_norm": None}
    args = tuple(map(jnp.asarray, args))
    want, *expected = rope_paged_decode(*args, **options, backend="xla")
    pieces, cuts = plan_pieces(args[6], window=0, tile_tokens=tile_tokens, most_pieces=most_pieces)
    assert (np.asarray(cuts)[:, 2] > 1).any() == (most_pieces > 1)

    # Three programs of two consumers: some have several pieces, and some another number than others. With two, both
    # consumers of one would leave pieces of the same row, which the interpreter does not count atomically.
    def call(*args):
        counters = jax.new_ref(jnp.zeros(8, jnp.int32))
        params = plgpu.InterpretGPUParams()
        kernel_options = {name: options.get(name) for name in ("scale", "q_norm", "k_norm", "eps")}
        results = rope_paged_decode_mosaic(
            *args[:6], pieces, **kernel_options, counters=counters, programs=3, interpret=params
        )
        return results, jax.freeze(counters)

    (got, *caches), counters = jax.jit(call)(*args)
    assert relative_error(got, want) < 1e-2
    assert not np.asarray(got)[np.asarray(args[6]) == 0].any()
    assert not np.asarray(counters).any()
    for cache, other in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(cache, np.float32), np.asarray(other, np.float32))
