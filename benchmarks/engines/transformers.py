"""Hugging Face transformers' continuous batching over its paged cache."""

from __future__ import annotations

from contextlib import ExitStack

PACKAGES = ["transformers", "torch", "triton"]


class Engine:
    """`AutoModelForCausalLM` and one batching manager; `attn_implementation` is an option ("sdpa")."""

    def __init__(self, model: str, options: dict) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        attention = options.get("attn_implementation", "sdpa")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=attention)
        generation = GenerationConfig(
            do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0, max_new_tokens=4096
        )
        self.stack = ExitStack()
        self.manager = self.stack.enter_context(
            loaded.to(device)
            .eval()
            .continuous_batching_context_manager(
                generation_config=generation, continuous_batching_config=ContinuousBatchingConfig()
            )
        )

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[list[int], None]:
        """Lengths of the outputs; hits of the prefix cache are not reported."""
        ids = [
            self.manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            for prompt, length in zip(prompts, output_lens, strict=True)
        ]
        lengths = {}
        while len(lengths) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.error:
                raise RuntimeError(f"{result.request_id}: {result.error}")
            if result is not None and result.is_finished():
                lengths[result.request_id] = len(result.generated_tokens)
            elif not self.manager.is_running():
                raise RuntimeError(f"its batching thread ended after {len(lengths)} of {len(ids)} requests")
        return [lengths[request_id] for request_id in ids], None

    def device(self) -> str:
        """Name of the first GPU."""
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"

    def close(self) -> None:
        """Ends the batching thread."""
        self.stack.close()
