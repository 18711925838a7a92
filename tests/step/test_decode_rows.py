"""How many rows decode steps are compiled for, and how many they compute."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import QWEN3, catalogue

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.step.buckets import decode_buckets, filtered_buckets
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.decode import decode, decode_forward, no_decodes
from nanovllm_jax.step.state import RowInt
from nanovllm_kernels import lowering_for

FINE = [1, 8, 16, 24, 32, 40, 48, 56, 64, 128, 192, 256]
QWEN3_8B = replace(QWEN3, hidden_size=4096, intermediate_size=12288, num_heads=32)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (4, [1, 4]), (12, [1, 8, 12]), (100, [*FINE[:9], 100]), (256, FINE), (320, [*FINE, 320])],
)
def test_a_gpus_steps_are_of_one_row_or_of_rows_that_are_copied_together(most, sizes):
    assert decode_buckets(most, fine=True) == sizes
    filtered = filtered_buckets(most, fine=True)
    assert set(filtered) <= set(sizes)
    assert filtered[-1] == most


def computes_eight_rows(model: ModelConfig, rows: int, kind: str = "decode", shards: int = 1, gpu: int = 90) -> bool:
    """Whether a decode step for a GPU has hidden states of 8 rows."""
    with lowering_for(gpu):
        jaxpr = str(catalogue("triton", shards, model=model).trace(ProgramKey(kind, rows)).jaxpr)
    return f"bf16[8,{model.hidden_size}]" in jaxpr


@pytest.mark.parametrize("kind", ["decode", "decode_filtered", "decode_forward"])
def test_rows_are_padded_to_what_products_copy_together(kind):
    assert computes_eight_rows(QWEN3_8B, 4, kind)
    assert computes_eight_rows(QWEN3_8B, 1, kind)
    assert not computes_eight_rows(QWEN3_8B, 16, kind)
    assert computes_eight_rows(QWEN3_8B, 4, kind, shards=2)


def test_one_row_stays_one_where_eight_are_not_known_to_be_quicker():
    assert not computes_eight_rows(QWEN3, 1)  # its layers are one kernel
    llama_1b = replace(QWEN3_8B, hidden_size=2048, intermediate_size=8192, head_dim=64)
    assert not computes_eight_rows(llama_1b, 1)  # products after a norm have no tiles
    assert not computes_eight_rows(QWEN3_8B, 1, shards=2)  # shards add it
    assert not computes_eight_rows(QWEN3_8B, 1, gpu=80)
    assert not computes_eight_rows(QWEN3_8B, 4, gpu=80)  # 16 rows are one tile there


@pytest.mark.parametrize(
    "step", [partial(decode, variant="plain"), partial(decode, variant="filtered"), decode_forward]
)
def test_padding_changes_no_row(step):
    programs = catalogue("xla")
    random = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(random.normal(size=x.shape, scale=0.1), x.dtype)  # noqa: E731
    params, caches = jax.tree.map(fill, (programs.params, programs.caches))
    rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), programs.rows)
    lengths = jnp.array([0, 5, 15, 30])
    rows["ints"] = rows["ints"].at[:4, RowInt.NUM_TOKENS].set(lengths).at[:4, RowInt.LAST_TOKEN].set(7)
    rows["block_tables"] = rows["block_tables"].at[:4, :3].set(jnp.arange(12).reshape(4, 3))
    delta = np.array([[0, 1, 2, 3], [-1, -1, 40, -1], [4, 4, 3, 1]], np.int32)

    def run(delta):
        caches_after, rows_after, first, *rest = jax.jit(partial(step, programs.config))(
            params=params, caches=caches, rows=rows, delta=delta
        )
        drawn = first[:4] if rest else jnp.where(jnp.arange(4)[:, None] < delta[2, :4], first[:, :4], 0)
        return caches_after, {name: x[:4] for name, x in rows_after.items()}, drawn, rest

    as_it_is, padded = run(delta), run(np.concatenate([delta, no_decodes(4)], axis=1))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, as_it_is, padded)))
    assert not np.array_equal(as_it_is[0][0][0], caches[0][0])
