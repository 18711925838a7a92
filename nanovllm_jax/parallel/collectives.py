"""Reductions over the shards of a model; with one shard (`axis_name` None) they change nothing."""

from nanovllm_kernels.sample.vocab import max_shards, sum_shards

__all__ = ["max_shards", "sum_shards"]
