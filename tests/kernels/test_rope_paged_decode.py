import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jaxtyping import config as jaxtyping_config
from kernel_oracle import decode_oracle, dequantised, relative_error, write_oracle

from nanovllm_kernels import rope_paged_decode
from nanovllm_kernels._cases import AttentionCase
from nanovllm_kernels.rope_paged_decode.cases import CASES, rope_paged_decode_inputs
from nanovllm_kernels.rope_paged_decode.reference import newest_slots

# The reference takes any shape the same way, so a few stand for all.
NAMES = ("qwen3_0_6b", "smollm2", "block_8", "float16", "window", "float32_soft_cap", "float8")
# Of these, lengths and contents vary too: with and without norms, a window, and a cache with scales.
VARIED = [case for case in CASES if case.name in ("smollm2", "block_8", "window", "float8")]
MAX_LENGTH = 150
ARRAYS = ("q_norm", "k_norm", "k_scale", "v_scale")
# Queries are rounded three times before they meet the keys, which the float64 oracle does not do.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def test_matches_the_oracles_and_does_not_read_the_slots_that_it_writes(case):
    args, options = rope_paged_decode_inputs(case)
    assert_like_the_oracles(case, args, options)


@pytest.mark.parametrize("case", VARIED, ids=lambda case: case.name)
@settings(deadline=None, max_examples=8)
@given(
    lengths=st.tuples(*[st.integers(0, MAX_LENGTH) | st.sampled_from([0, 1, 16, 17, 128, 129])] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_lengths_match_the_oracles(case, lengths, seed):
    # In float32: the softmax is narrow, and what 16 bits round of a query can change all of its weights.
    blocks = -(-MAX_LENGTH // case.block_size)
    case = replace(case, context_lens=lengths, dtype="float32")
    inputs = rope_paged_decode_inputs(case, seed, num_blocks=3 * blocks + 1, table_width=blocks + 1)
    assert_like_the_oracles(case, *inputs)


@functools.cache
def jitted(**static):
    return jax.jit(functools.partial(rope_paged_decode, **static, backend="xla"))


def assert_like_the_oracles(case, args, options):
    tables, lens = args[5:]
    arrays = {name: option for name, option in options.items() if name in ARRAYS}
    static = {name: option for name, option in options.items() if name not in ARRAYS}
    out, *caches = map(np.asarray, jitted(**static)(*args, **arrays))
    slots = np.asarray(newest_slots(jnp.asarray(tables), jnp.asarray(lens), case.block_size))
    norms = {name: options[name] for name in options if name in ("q_norm", "k_norm", "eps", "k_scale", "v_scale")}
    q, *expected = write_oracle(*args[:5], slots, **norms)
    tolerance = 1 / 16 if case.cache_dtype == "float8_e4m3fn" else TOLERANCE[case.dtype]
    for got, want, scale in zip(caches, expected, ("k_scale", "v_scale"), strict=True):
        wide = dequantised(got, options.get(scale))
        np.testing.assert_array_equal(np.isnan(wide), np.isnan(want))
        assert relative_error(*(np.nan_to_num(each).reshape(-1, case.head_dim) for each in (wide, want))) < tolerance
    attended = decode_oracle(q.astype(args[0].dtype), *caches, tables, lens, **case.options)
    assert out.dtype == args[0].dtype
    assert relative_error(out, attended) < TOLERANCE[case.dtype]
    assert not out[lens == 0].any()


def test_rows_without_tokens_leave_the_cache_as_it_is():
    case = AttentionCase("padding", (0, 0, 5), 4, 2, 16, dtype="float32")
    args, options = rope_paged_decode_inputs(case)
    _, *caches = rope_paged_decode(*map(jnp.asarray, args), **options, backend="xla")
    for before, after in zip(args[3:5], caches, strict=True):
        changed = (np.asarray(after).view(np.uint32) != before.view(np.uint32)).any(axis=(1, 3))
        assert np.argwhere(changed).tolist() == [[args[5][2, 0], 4]]


def test_wrong_arguments_are_refused_with_what_was_got_and_what_is_allowed():
    case = AttentionCase("any", (5, 3), 4, 2, 16)
    args, options = rope_paged_decode_inputs(case)
    names = ("qkv", "cos", "sin", "k_cache", "v_cache", "block_tables", "context_lens")
    arrays = dict(zip(names, map(jnp.asarray, args), strict=True))
    pieces, cuts = jnp.zeros((9, 8), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        for wrong, words in (
            ({"backend": "cuda"}, "backend is 'cuda'"),
            ({"qkv": arrays["qkv"][:, :1]}, r"qkv has shape \(2, 1, 4, 16\); it must be .* with K = 2, D = 16"),
            ({"qkv": arrays["qkv"][:, :, :2]}, "at least one query head"),
            ({"cos": arrays["cos"][:1]}, r"cos has shape \(1, 8\)"),
            ({"block_tables": arrays["block_tables"][:, :0]}, "P above 0"),
            ({"context_lens": arrays["context_lens"][:1]}, r"context_lens has shape \(1,\)"),
            ({"k_norm": None}, "q_norm and k_norm go together"),
            (
                {"plan": (jnp.zeros((9, 5), jnp.int32), cuts)},
                r"pieces are int32\[9, 5\]; they must be int32 \[pi",
            ),
            ({"plan": (pieces, cuts[:, :2])}, r"plan's cuts are int32\[2, 2\]; they must be int32 \[cuts, 3\]"),
            ({"plan": (pieces.astype(jnp.float32), cuts)}, r"plan's pieces are float32\[9, 8\]"),
            ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        ):
            with pytest.raises(ValueError, match=words):
                rope_paged_decode(**{**arrays, **options, "backend": "xla"} | wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_the_triton_kernel_is_right_in_the_interpreter():
    run_interpreted("interpreted_rope_decode.py")
