"""Totals of flops and bytes against closed formulas, and kernels against counting pair by pair."""

import jax
import jax.numpy as jnp
import pytest
from inspection_reports import SHAPES, inspected

from nanovllm_jax.inspection.kernel_costs import (
    BY_LOAD,
    BY_OPERANDS,
    Call,
    Load,
    Site,
    keys_read,
    prefill_load,
    visible_pairs,
)
from nanovllm_jax.inspection.plan import ProgramKey

BF16, F32, CONTEXT, BLOCK = 2, 4, 512, 16
DECODE_STEPS = 4  # tokens a row in one decode step on a GPU


def closed_formula(config, tokens, sequences, pairs, keys, *, is_prefill=False):
    """(flops, bytes) of a whole step of bfloat16: weights once, activations of products, K and V.

    Of a prefill also what norms and activations move, apart from products there, and queries between kernels; less what
    the last layer does after attention, which only the last tokens pass.
    """
    E, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv, D = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.head_dim
    weights = E * (heads + 2 * kv) + heads * E + 3 * E * F
    flops = L * (2 * tokens * weights + 4 * config.num_heads * D * pairs)
    activations = tokens * ((E + heads + 2 * kv) + (heads + E) + (E + 2 * F) + (F + E))
    # Projections read, keys and values cached; cosine and sine are float32. A prefill reads what it has cached again.
    attention = 2 * keys * kv + tokens * (2 * heads + 2 * kv) + tokens * D * F32 / BF16
    if is_prefill:
        attention += 2 * tokens * (heads + kv)
    moved = L * (weights + activations + attention)
    if is_prefill:
        flops -= 2 * tokens * (heads * E + 3 * E * F)
        moved += L * tokens * (4 * E + 3 * F) - tokens * (heads + 5 * E + 6 * F)
    return flops, BF16 * moved


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "llama-3.1-8b"])
def test_totals_are_within_2_percent_of_the_closed_formula(name):
    keys = [ProgramKey("decode", 16), ProgramKey("prefill", 1024), ProgramKey("plain", 16)]
    decode, prefill, sample = inspected(name, keys=keys, context=CONTEXT, max_model_len=2048).programs
    config = SHAPES[name]
    V, E = config.vocab_size, config.hidden_size
    head_bytes = V * E * BF16 + 16 * E * BF16  # logits are not written
    flops, moved = closed_formula(config, 16, 16, 16 * CONTEXT, 16 * CONTEXT)
    assert decode.flops == pytest.approx(DECODE_STEPS * (flops + 2 * 16 * V * E), rel=0.02)
    assert decode.bytes == pytest.approx(DECODE_STEPS * (moved + head_bytes), rel=0.02)
    assert decode.flops_source == "XLA, and formulas of custom calls"
    flops, moved = closed_formula(config, 1024, 2, CONTEXT * (CONTEXT + 1), 1024, is_prefill=True)
    assert prefill.flops == pytest.approx(flops, rel=0.02)
    assert prefill.bytes == pytest.approx(moved, rel=0.02)
    assert prefill.flops_source == "XLA, and formulas of custom calls"
    assert sample.bytes == pytest.approx(head_bytes, rel=0.02)
    assert sample.flops >= 2 * 16 * V * E


@pytest.mark.parametrize("window", [None, 3, 5, 64])
@pytest.mark.parametrize(("q_len", "context"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9)])
def test_pairs_and_keys_are_those_that_the_mask_leaves(q_len, context, window):
    seen = [
        (query, key)
        for query in range(context - q_len, context)
        for key in range(query + 1)
        if window is None or key > query - window
    ]
    load = Load(3, q_len, context)
    assert visible_pairs(load, window) == 3 * len(seen)
    assert keys_read(load, window) == 3 * len({key for _, key in seen})


def test_prompts_longer_than_the_bucket_are_one_chunk_of_a_prefix():
    assert prefill_load(256, 1024) == Load(1, 256, 1024)
    assert prefill_load(1024, 256) == Load(4, 256, 256)


def test_heads_split_over_devices_split_the_work():
    config, load = SHAPES["qwen3-8b"], Load(8, 1, 100)
    whole, half = (BY_LOAD["rope_paged_decode"](Site(config, load, BF16, BF16, BLOCK, shards)) for shards in (1, 2))
    assert half.flops == whole.flops / 2
    assert half.bytes == pytest.approx(whole.bytes / 2, rel=0.01)


def test_all_layers_in_one_kernel_are_counted_by_their_weights_and_what_they_see():
    (decode,) = inspected("qwen3-0.6b", keys=[ProgramKey("decode", 1)], context=CONTEXT, max_model_len=2048).programs
    config = SHAPES["qwen3-0.6b"]
    E, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = E * (heads + 2 * kv) + heads * E + 3 * E * F
    (row,) = [row for row in decode.kernels if row.name == "decode_layers"]
    assert (row.kind, row.scope, row.count) == ("triton", "decode_layers", DECODE_STEPS)
    assert row.flops == pytest.approx(row.count * L * (2 * weights + 4 * heads * CONTEXT), rel=0.01)
    assert row.bytes == pytest.approx(row.count * L * BF16 * (weights + 2 * CONTEXT * kv), rel=0.01)
    # Nothing of a layer is counted twice: what is left are the output head and the sampler.
    assert not [kernel for kernel in decode.kernels if kernel.scope.startswith("layer")]
    head_bytes = config.vocab_size * (E * BF16 + 2 * F32)
    assert decode.bytes == pytest.approx(row.bytes + DECODE_STEPS * head_bytes, rel=0.05)


def test_sums_over_shards_are_counted_with_and_without_what_they_pass_on():
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    part, table, counted = array(64, 4096), array(9, dtype=jnp.int32), BY_OPERANDS["add_shards_kernel"]
    alone = counted(Call("add_shards_kernel", (part, table), (part, array(1), array(1))))
    assert alone.flops == 3 * 64 * 4096
    assert alone.bytes == pytest.approx(2 * 2 * 64 * 4096, rel=1e-3)
    results = part, part, array(2, 128, dtype=jnp.float32)
    passed_on = counted(Call("add_shards_kernel", (part, part, array(4096), table), results))
    assert passed_on.flops == 7 * 64 * 4096
    assert passed_on.bytes == pytest.approx(4 * 2 * 64 * 4096, rel=1e-2)
