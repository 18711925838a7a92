"""Runs the Triton kernels of `sample_head` in Triton's interpreter, on arrays of this machine.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_sample_head.py

Exits with an error if a token is wrong. The environment variable must be set before triton is imported, hence a process
of its own.
"""

import importlib

import numpy as np
from interpreted_sample import interpret, patch_interpreter
from sample_oracle import assert_draws
from test_sample_head import logits_of

from nanovllm_kernels import lowering_for
from nanovllm_kernels.sample_head.cases import INTERPRETED, sample_head_inputs

launch = importlib.import_module("nanovllm_kernels.sample_head.triton")


def main():
    patch_interpreter()
    launch.triton_call = interpret
    with lowering_for(90), np.errstate(all="ignore"):
        for case in INTERPRETED:
            hidden, head, *rest = sample_head_inputs(case)
            tokens = launch.sample_head_triton(hidden, head, *rest)
            assert_draws(tokens, logits_of(hidden, head), *rest)


if __name__ == "__main__":
    main()
