import math

import limit
import pytest
from limit import Ceilings, case_seconds, computed_from, decode_seconds, decode_steps, prefill_seconds, shape_of
from models import QWEN3_0_6B, QWEN3_8B
from steps import Cell, least_times
from workloads import CASES

H200 = limit.MEASURED["NVIDIA H200"]
FIGURES = {figure.name: (case, figure) for case in CASES for figure in case.figures}
TINY = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 16,
    "vocab_size": 100,
}


# Counted by hand from the shape, at 4.3 TB/s and 790 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "draw", "expected"),
    [
        ("bench256_out_tok_s", 0, 36_400),
        ("bench256_out_tok_s", 1, 35_100),
        ("bench256_fp8kv_out_tok_s", 0, 64_800),
        ("bench256_fp8kv_out_tok_s", 1, 63_500),
        ("single_out_tok_s", 0, 3_480),
        ("batch32_out_tok_s", 0, 52_200),
        ("prefill_tok_s", 0, 791_000),
        ("shared_prefix_tok_s", 0, 1_842_000),
        ("shared_prefix_off_tok_s", 0, 840_000),
        ("shared_prefix_computed_frac", 0, 1 - 69 * 400 / 51_200),
    ],
)
def test_limits_of_the_cases_on_an_h200(name, draw, expected):
    case, figure = FIGURES[name]
    shape = shape_of(QWEN3_0_6B, kv_cache_bytes=limit.kv_cache_bytes(case.options))
    assert figure.limit(shape, H200, case.draw(case.first_seed + draw)) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("rows", "context", "milliseconds"), [(1, 512, 3.54), (64, 1024, 5.77)])
def test_decode_step_of_8b_on_an_h200(rows, context, milliseconds):
    shape = shape_of(QWEN3_8B)
    assert decode_seconds(shape, H200, rows, rows * context) * 1e3 == pytest.approx(milliseconds, rel=0.005)
    four = decode_seconds(shape, H200.of_devices(4), rows, rows * context)
    assert 4 * four == pytest.approx(decode_seconds(shape, H200, rows, rows * context))


def test_shape_counts_every_product_once():
    shape = shape_of(TINY, kv_cache_bytes=1)
    head_dim = 8 // 4
    q, kv, o = 8 * 4 * head_dim, 2 * 8 * 2 * head_dim, 4 * head_dim * 8
    assert shape.layer_params == 3 * (q + kv + o + 3 * 8 * 16)
    assert shape.head_params == 8 * 100
    assert shape.kv_bytes == 3 * 2 * 2 * head_dim
    assert shape.pair_flops == 3 * 4 * 4 * head_dim


def test_a_step_takes_what_is_slower():
    shape = shape_of(TINY)
    bytes_only, flops_only = Ceilings(1.0, math.inf), Ceilings(math.inf, 1.0)
    assert prefill_seconds(shape, bytes_only, [(0, 5)]) == shape.step_bytes + 5 * shape.kv_bytes
    pairs = 1 + 2 + 3 + 4 + 5
    flops = 2 * (5 * shape.layer_params + shape.head_params) + pairs * shape.pair_flops
    assert prefill_seconds(shape, flops_only, [(0, 5)]) == flops
    assert prefill_seconds(shape, Ceilings(1.0, 1.0), [(0, 5)]) == max(flops, shape.step_bytes + 5 * shape.kv_bytes)


def test_what_follows_a_cached_prefix_sees_all_of_it():
    shape, flops_only = shape_of(TINY), Ceilings(math.inf, 1.0)
    whole, start, rest = (prefill_seconds(shape, flops_only, [span]) for span in ((0, 7), (0, 4), (4, 7)))
    assert start + rest == whole + 2 * shape.head_params  # sampled from twice


def test_rows_leave_when_they_have_their_length():
    assert list(decode_steps([[0] * 10, [0] * 20], [1, 4])) == [(1, 21), (1, 22), (1, 23)]
    assert list(decode_steps([[0] * 10, [0] * 20], [3, 2])) == [(2, 32), (1, 12)]
    assert list(decode_steps([[0] * 10], [1])) == []


def test_shared_tokens_are_computed_once_and_one_of_each_prompt_always():
    prompts = [[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 9, 8], [1, 2, 3, 4], [7, 2, 3, 4]]
    assert computed_from(prompts) == [0, 2, 3, 3, 0]
    assert computed_from(prompts, block_size=2) == [0, 2, 2, 2, 0]
    shape, flops_only = shape_of(TINY), Ceilings(math.inf, 1.0)
    shared, apart = (
        case_seconds(shape, flops_only, (prompts, [1] * 5), share_prefixes=share) for share in (True, False)
    )
    assert shared < apart


def test_a_step_between_tokens_averages_its_contexts():
    shape, bytes_only = shape_of(TINY), Ceilings(1.0, math.inf)
    times = least_times(shape, bytes_only, Cell(0, 2, 10, 4, 99))
    assert times.per_token == shape.step_bytes + 2 * 12 * shape.kv_bytes  # after contexts of 11, 12 and 13
    assert times.first_token == prefill_seconds(shape, bytes_only, [(0, 10)] * 2)
