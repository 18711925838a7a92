"""What the sampler is compared with: NumPy in float64, by sorting, in the order that vLLM documents."""

import numpy as np
from sample_oracle import kept

from nanovllm_jax.engine.seeding import make_key
from nanovllm_jax.step.sampler import FullState, SamplerParams


def make_params(batch, *, seeds=0, position=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, num_output=0,
                repetition=1.0, presence=0.0, frequency=0.0):  # fmt: skip
    """Parameters of `batch` rows; each argument is one value for all rows or one a row."""

    def floats(value):
        return np.broadcast_to(np.asarray(value, np.float32), (batch,))

    def ints(value):
        return np.broadcast_to(np.asarray(value, np.int32), (batch,))

    seeds = np.broadcast_to(seeds, (batch,))
    return SamplerParams(
        temperature=floats(temperature),
        top_k=ints(top_k),
        top_p=floats(top_p),
        min_p=floats(min_p),
        key=np.array([make_key(int(seed), 0) for seed in seeds], np.uint32).reshape(batch, 2),
        position=ints(position),
        num_output=ints(num_output),
        repetition_penalty=floats(repetition),
        presence_penalty=floats(presence),
        frequency_penalty=floats(frequency),
    )


def make_state(batch, vocab_size, *, prompts=None, outputs=None, adjust=None, max_adjust=4):
    """State of rows with the given prompt and output ids and (id, value, until) adjustments, each a list a row."""
    prompts, outputs, adjust = (lists or [[]] * batch for lists in (prompts, outputs, adjust))
    counts = np.zeros((batch, vocab_size), np.uint16)  # bit 0: in the prompt; above it: times generated
    for row in range(batch):
        counts[row, np.array(prompts[row], int)] = 1
        np.add.at(counts[row], np.array(outputs[row], int), 2)
    ids, values = np.full((batch, max_adjust), -1, np.int32), np.zeros((batch, max_adjust), np.float32)
    until = np.full((batch, max_adjust), 1 << 30, np.int32)
    for row, entries in enumerate(adjust):
        for column, (token, value, limit) in enumerate(entries):
            ids[row, column], values[row, column], until[row, column] = token, value, limit
    return FullState(counts, np.arange(batch, dtype=np.int32), ids, values, until)


def changed_logits(logits, *, prompt=(), output=(), adjust=(), num_output=0,
                   repetition=1.0, presence=0.0, frequency=0.0):  # fmt: skip
    """Logits of one row [V] after adjustments and penalties."""
    logits = np.array(logits, np.float64)
    for token, value, until in adjust:
        if num_output < until:
            logits[token] += value
    for token in set(prompt) | set(output):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(output):
        logits[token] -= frequency * list(output).count(token) + presence
    return logits


def probabilities(logits, *, temperature=1.0, **filters):
    """The distribution of one row [V]."""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.where(
        kept(logits, temperature=temperature, **filters),
        np.exp(scaled - scaled[np.isfinite(scaled)].max()),
        0,
    )
    return weights / weights.sum()
