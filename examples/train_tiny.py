"""Train the small Qwen3-architecture model that nanovllm_jax carries, from public-domain text, in plain JAX.

    uv run --group train examples/train_tiny.py --out nanovllm_jax/assets/tiny

Writes a Hugging Face directory: bf16 safetensors, configs, a byte-level BPE tokenizer with a chat template,
and metrics.json with the held-out loss in bits per byte of what was saved. `--evaluate DIR` only measures a
saved directory. Nothing of the engine is used, so the loss is a second opinion on its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from safetensors.numpy import load_file, save_file
from tiny_corpus import END_OF_TEXT, TURN_END, load_corpus, tokenizer_config, train_tokenizer
from tiny_model import CONFIG, Params, forward, init_params
from tokenizers import Tokenizer

# Short windows first: attention over 1024 tokens costs as much as the weights do, and what is learnt first is
# local. (share of the run at which the stage ends, window length)
STAGES = ((0.6, 128), (0.8, 256), (0.92, 512), (1.0, 1024))
BATCH_TOKENS = 2048
# Muon for the projections, Adam for embedding and norms: after 120 steps of 4,096 tokens (a 2M-parameter
# shape) the loss was 4.83 nats, with AdamW alone (4e-3) 5.43.
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 4e-3, 0.01
WARMUP, FINAL_LR = 0.02, 0.02  # shares of the run and of the peak rate
EVALUATIONS = 5  # over a run; the checkpoint with the lowest held-out loss is kept


def window_nats(params: Params, windows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Nats of each predicted token [B, T] of windows [B, T + 1]; a negative id is padding and counts 0."""
    inputs, targets = jnp.maximum(windows[:, :-1], 0), windows[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, inputs, dtype), jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0.0)


def bits_per_byte(params: Params, tokenizer: Tokenizer, held_out: dict[str, list[str]]) -> dict[str, float]:
    """Held-out loss by source and over `all`: bits of every token, end-of-text ones too, over UTF-8 bytes.

    Each document is cut into consecutive windows of the model's full length, the first of which starts behind
    an end-of-text token; no token sees another document.
    """
    length, end = CONFIG["max_position_embeddings"], tokenizer.token_to_id(END_OF_TEXT)
    evaluate = jax.jit(partial(window_nats, dtype=jnp.dtype(jnp.float32)))
    nats, size = dict.fromkeys(held_out, 0.0), dict.fromkeys(held_out, 0)
    for source, documents in held_out.items():
        rows = []
        for document in documents:
            ids = [end, *tokenizer.encode(document).ids, end]
            for start in range(0, len(ids) - 1, length):
                row = ids[start : start + length + 1]
                rows.append(row + [-1] * (length + 1 - len(row)))
            size[source] += len(document.encode())
        rows += [[-1] * (length + 1)] * (-len(rows) % 4)
        for batch in np.asarray(rows, np.int32).reshape(-1, 4, length + 1):
            nats[source] += float(evaluate(params, batch).sum())
    nats["all"], size["all"] = sum(nats.values()), sum(size.values())
    return {source: nats[source] / math.log(2) / size[source] for source in nats}


def save(out: Path, params: Params, tokenizer: Tokenizer, metrics: dict[str, Any]) -> None:
    """Write the whole Hugging Face directory except its README."""
    out.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]
    ids = {"eos_token_id": ends, "pad_token_id": ends[1], "bos_token_id": None}
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    files = {
        "config.json": CONFIG | ids,
        "generation_config.json": ids | sampling,
        "tokenizer_config.json": tokenizer_config(CONFIG["max_position_embeddings"]),
        "metrics.json": metrics,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    weights = {name: np.asarray(value.astype(jnp.bfloat16)) for name, value in params.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def make_optimizer() -> optax.GradientTransformation:
    """Muon and Adam at their peak rates; the caller scales the updates by `learning_rate_share`."""

    def orthogonalised(params: Any) -> dict[str, Any]:
        numbers = optax.contrib.MuonDimensionNumbers()
        return {name: numbers if name.endswith("_proj.weight") else None for name in params}

    return optax.contrib.muon(
        MUON_LR,
        adam_learning_rate=ADAM_LR,
        adam_b2=0.98,
        weight_decay=WEIGHT_DECAY,
        muon_weight_dimension_numbers=orthogonalised,
    )


def learning_rate_share(progress: float) -> float:
    """Share of the peak rate at `progress` (0..1) of the run: linear warm-up, then a cosine."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_LR + (1 - FINAL_LR) * cosine


def train(out: Path, steps: int, minutes: float, seed: int) -> None:
    """Train, keeping the checkpoint of the lowest held-out loss.

    The run ends after `steps`, or after `minutes` if that comes first; the schedule follows whichever is
    nearer, so that a slow machine ends on a small rate too. While time does not bind, a seed repeats a run.
    """
    began = time.monotonic()
    corpus = load_corpus(seed)
    tokenizer = train_tokenizer(corpus.train)
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = np.asarray([i for e in tokenizer.encode_batch(corpus.train) for i in (*e.ids, end)], np.int32)
    params = init_params(jax.random.key(seed))
    parameters = sum(value.size for value in params.values())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens on {jax.devices()[0]}", flush=True)

    optimizer = make_optimizer()
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, windows: jax.Array, rate: float):
        loss, grads = jax.value_and_grad(lambda p: window_nats(p, windows, jnp.dtype(jnp.bfloat16)).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: u * rate, updates)), state, loss

    rng, best, step, progress = np.random.default_rng(seed), math.inf, 0, 0.0
    while progress < 1.0:
        length = next(window for share, window in STAGES if progress < share)
        starts = rng.integers(0, len(stream) - length, BATCH_TOKENS // length)
        windows = stream[starts[:, None] + np.arange(length + 1)]
        params, state, loss = update(params, state, windows, learning_rate_share(progress))
        step += 1
        before, progress = progress, max(step / steps, (time.monotonic() - began) / (60 * minutes))
        if step % 50 == 0:
            print(f"step {step} loss {float(loss):.3f} at {time.monotonic() - began:.0f} s", flush=True)
        if int(before * EVALUATIONS) == int(progress * EVALUATIONS):
            continue
        saved = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
        held_out = bits_per_byte(saved, tokenizer, corpus.held_out)
        print(f"step {step} held-out bits per byte {held_out}", flush=True)
        if held_out["all"] < best:
            best = held_out["all"]
            metrics = {
                "held_out_bits_per_byte": held_out,
                "parameters": parameters,
                "steps": step,
                "trained_tokens": step * BATCH_TOKENS,
                "training_set_tokens": len(stream),
                "seconds": round(time.monotonic() - began),
                "seed": seed,
                "backend": jax.default_backend(),
            }
            save(out, saved, tokenizer, metrics)


def main() -> None:
    """Parse the command line and train, or only evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write")
    parser.add_argument("--steps", type=int, default=3000, help="length of the run")
    parser.add_argument("--minutes", type=float, default=60.0, help="end the run here at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, help="only print the held-out loss of this directory")
    args = parser.parse_args()
    if args.evaluate:
        params = {name: jnp.asarray(value) for name, value in load_file(args.evaluate / "model.safetensors").items()}
        tokenizer = Tokenizer.from_file(str(args.evaluate / "tokenizer.json"))
        print(json.dumps(bits_per_byte(params, tokenizer, load_corpus(args.seed).held_out)))
    elif args.out:
        train(args.out, args.steps, args.minutes, args.seed)
    else:
        parser.error("give --out to train or --evaluate to measure")


if __name__ == "__main__":
    main()
