"""Offline generation in a few lines.

    uv run python examples/quickstart.py [MODEL]

MODEL is a directory, a hub id, a .gguf file or `smollm2`; without one, the small built-in model is used.
"""

import sys

from nanovllm_jax import LLM, SamplingParams


def main() -> None:
    prompts = ["The king said", "In the beginning", "To be, or not to be"]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=0)
    with LLM(sys.argv[1] if len(sys.argv) > 1 else None, max_num_seqs=8, max_num_batched_tokens=256) as llm:
        for output in llm.generate(prompts, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
        (reply,) = llm.chat([{"role": "user", "content": "Who art thou?"}], params)
        print(f"chat -> {reply.outputs[0].text!r}")


if __name__ == "__main__":
    main()
