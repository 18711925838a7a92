"""Makes the goldens: greedy tokens and log-probabilities from Hugging Face transformers in float32.

Runs in an environment of its own, since the engine needs no PyTorch:

    python3.11 -m venv goldenv
    goldenv/bin/pip install torch==2.13.0 transformers safetensors numpy
    goldenv/bin/python tests/goldens/make_goldens.py            # all of them
    goldenv/bin/python tests/goldens/make_goldens.py qwen3 embedded

Prompts are prefixes of one stream of ids a model, so that they share blocks of the prefix cache. Streams are
tried until every generated position has a clear winner (`SEARCH_GAP`, ten times the `MIN_GAP` that is
asserted) and the text does not stick in a loop. Each step is one forward pass over the whole text without a
key-value cache.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_models import TINY_MODELS, tiny_weights, weights_sha256, write_tiny_model

GOLDENS = Path(__file__).resolve().parent
EMBEDDED = GOLDENS.parents[1] / "nanovllm_jax" / "assets" / "tiny"

BLOCK_SIZE = 16
# One token; a block less one, a block, a block and one; several blocks with and without a full tail.
PROMPT_LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 40, 100)
NEW_TOKENS = 24
MIN_DISTINCT = 8
MIN_GAP = 1e-3  # between the two largest log-probabilities: a smaller one is decided by rounding
SEARCH_GAP = 1e-2
MAX_ROUNDING = 3e-5  # float32 against float64, in any log-probability

# Shakespeare's sonnets 29 and 116 and the Gospel of John 1, King James: public domain.
PASSAGE = """When, in disgrace with fortune and men's eyes,
I all alone beweep my outcast state,
And trouble deaf heaven with my bootless cries,
And look upon myself and curse my fate,
Wishing me like to one more rich in hope,
Featured like him, like him with friends possess'd,
Desiring this man's art and that man's scope,
With what I most enjoy contented least;
Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no! it is an ever-fixed mark
That looks on tempests and is never shaken.
In the beginning was the Word, and the Word was with God, and the Word was God. The same was in the
beginning with God. All things were made by him; and without him was not any thing made that was made. In him
was life; and the life was the light of men. And the light shineth in darkness; and
the darkness comprehended it not."""


@dataclass(frozen=True)
class Generated:
    """Greedy continuation of one prompt."""

    token_ids: list[int]
    logprobs: list[float]
    min_gap: float  # smallest distance between the two largest log-probabilities over the positions


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float64: the model's float32 logits are the only rounding in a golden."""
    return logits.double().log_softmax(-1)


@torch.no_grad()
def generate(model: torch.nn.Module, prompt: list[int]) -> Generated:
    token_ids, logprobs, gaps = list(prompt), [], []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
        (first, second), (winner, _) = (column.tolist() for column in log_softmax(logits).topk(2))
        token_ids.append(winner)
        logprobs.append(first)
        gaps.append(first - second)
    return Generated(token_ids[len(prompt) :], logprobs, min(gaps))


@torch.no_grad()
def teacher_forced(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    """Log-probability of every id but the first, given those before it."""
    logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    chosen = torch.tensor(token_ids[1:])[:, None]
    return log_softmax(logits[:-1]).gather(1, chosen)[:, 0].numpy()


def find_goldens(model: torch.nn.Module, streams: list[list[int]]) -> tuple[int, list[Generated]]:
    """First stream whose continuations all keep `SEARCH_GAP` and hold `MIN_DISTINCT` different ids each."""
    for index, stream in enumerate(streams):
        found = []
        for length in PROMPT_LENGTHS:
            golden = generate(model, stream[:length])
            if golden.min_gap < SEARCH_GAP or len(set(golden.token_ids)) < MIN_DISTINCT:
                break
            found.append(golden)
        else:
            return index, found
    raise SystemExit(f"none of {len(streams)} prompts will do; try more of them")


def make_golden(name: str, directory: Path, digest: str, streams: list[list[int]]) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    left_over = {key: value for key, value in info.items() if value}
    assert not left_over, f"{name}: transformers did not load it as it is: {left_over}"
    tried, generated = find_goldens(model.eval(), streams)
    stream = streams[tried]
    prompt_logprobs = teacher_forced(model, stream)

    # What float32 cost: the same model in float64 (its norms and cosines still compute in float32).
    model.double()
    rounding = float(np.abs(teacher_forced(model, stream) - prompt_logprobs).max())
    for length, golden in zip(PROMPT_LENGTHS, generated, strict=True):
        exact = teacher_forced(model, stream[:length] + golden.token_ids)[length - 1 :]
        rounding = max(rounding, float(np.abs(exact - golden.logprobs).max()))
        assert golden.min_gap >= MIN_GAP, f"{name}, prompt of {length}: top two only {golden.min_gap} apart"
    assert rounding <= MAX_ROUNDING, f"{name}: float32 is {rounding} from float64"

    fields = {
        "weights_sha256": digest,
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "min_gap": min(golden.min_gap for golden in generated),
        "stream": stream,
        "prompt_logprobs": [None, *(round(value, 7) for value in prompt_logprobs.tolist())],
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in fields.items()]
    cases = [
        f'{{"prompt_length": {length},\n  "token_ids": {json.dumps(golden.token_ids)},\n'
        f'  "logprobs": {json.dumps([round(value, 7) for value in golden.logprobs])}}}'
        for length, golden in zip(PROMPT_LENGTHS, generated, strict=True)
    ]
    lines.append('"cases": [\n ' + ",\n ".join(cases) + "]")
    (GOLDENS / f"{name}.json").write_text("{" + ",\n ".join(lines) + "}\n")
    distinct_ids = min(len(set(golden.token_ids)) for golden in generated)
    print(
        f"{name:22} stream {tried:3}  smallest gap {fields['min_gap']:.4f}  "
        f"fewest distinct ids {distinct_ids}/{NEW_TOKENS}  float32 against float64 {rounding:.1e}"
    )


def make_tiny(name: str) -> None:
    model = TINY_MODELS[name]
    streams = [
        np.random.default_rng(seed).integers(model.vocab_size, size=max(PROMPT_LENGTHS)).tolist() for seed in range(500)
    ]
    with tempfile.TemporaryDirectory() as folder:
        directory = write_tiny_model(name, folder)
        make_golden(name, directory, weights_sha256(tiny_weights(model)), streams)


def make_embedded() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    ids = tokenizer.encode(PASSAGE, add_special_tokens=False)
    longest = max(PROMPT_LENGTHS)
    streams = [ids[start : start + longest] for start in range(len(ids) - longest + 1)]
    digest = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    make_golden("embedded", EMBEDDED, digest, streams)


def main(names: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    for name in names or [*TINY_MODELS, "embedded"]:
        if name == "embedded":
            make_embedded()
        else:
            make_tiny(name)


if __name__ == "__main__":
    main(sys.argv[1:])
