"""What the operations should give, token by token in NumPy float64, sharing no code with them."""

from __future__ import annotations

import numpy as np

GPU_TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}  # relative error of what a GPU computes


def attend(q, keys, values, *, scale, soft_cap):
    """One query [H, D] over the tokens it sees, keys and values [n, K, D]."""
    out = np.zeros(q.shape)
    group = q.shape[0] // keys.shape[1]
    for head in range(q.shape[0]):
        scores = keys[:, head // group] @ q[head] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out


def tokens_of(cache, table, length):
    """The first `length` tokens of a sequence, [length, K, D]."""
    block_size = cache.shape[2]
    tokens = [cache[table[p // block_size], :, p % block_size] for p in range(length)]
    return np.array(tokens, np.float64).reshape(length, cache.shape[1], cache.shape[3])


def dequantised(cache, scale):
    """The cache [N, K, block_size, D] as float64, times its KV heads' scales if it has any."""
    return cache.astype(np.float64) * (1 if scale is None else np.asarray(scale, np.float64)[:, None, None])


def prefill_oracle(
    q,
    k_cache,
    v_cache,
    block_tables,
    cu_q_lens,
    context_lens,
    *,
    scale,
    sliding_window,
    soft_cap,
    k_scale=None,
    v_scale=None,
):
    k_cache, v_cache = dequantised(k_cache, k_scale), dequantised(v_cache, v_scale)
    out = np.zeros(q.shape)
    for seq, length in enumerate(context_lens):
        begin, end = cu_q_lens[seq], cu_q_lens[seq + 1]
        if begin == end:
            continue
        keys = tokens_of(k_cache, block_tables[seq], length)
        values = tokens_of(v_cache, block_tables[seq], length)
        for row in range(begin, end):
            position = length - (end - row)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = slice(first, position + 1)
            query = q[row].astype(np.float64)
            out[row] = attend(query, keys[seen], values[seen], scale=scale, soft_cap=soft_cap)
    return out


def decode_oracle(q, k_cache, v_cache, block_tables, context_lens, **options):
    """q is [B, H, D] or [B, Q, H, D]; queries before the sequence's start give zeros."""
    queries = q if q.ndim == 4 else q[:, None]
    q_lens = np.minimum(np.asarray(context_lens), queries.shape[1]).astype(np.int64)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
    present = np.arange(queries.shape[1]) >= queries.shape[1] - q_lens[:, None]
    out = np.zeros(queries.shape)
    flat = prefill_oracle(queries[present], k_cache, v_cache, block_tables, cu_q_lens, context_lens, **options)
    out[present] = flat
    return out.reshape(q.shape)


def rope_oracle(x, cos, sin, weight, eps):
    """Heads [T, K, heads, D] normed if there is a weight, then rotated."""
    x = x.astype(np.float64)
    if weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    first, second = np.split(x, 2, -1)
    cos, sin = (angle[:, None, None].astype(np.float64) for angle in (cos, sin))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def write_oracle(qkv, cos, sin, k_cache, v_cache, slots, *, eps, q_norm=None, k_norm=None, k_scale=None, v_scale=None):
    """Queries [T, H, D] and what the caches represent (float64: scaled back), where written and where not."""
    q = rope_oracle(qkv[:, :, :-2], cos, sin, q_norm, eps)
    k = rope_oracle(qkv[:, :, -2:-1], cos, sin, k_norm, eps)[:, :, 0]
    block_size, limit = k_cache.shape[2], 448 if k_cache.dtype.itemsize == 1 else np.inf
    caches = []
    for cache, new, scale in ((k_cache, k, k_scale), (v_cache, qkv[:, :, -1].astype(np.float64), v_scale)):
        scale = np.ones(cache.shape[1]) if scale is None else np.asarray(scale, np.float64)
        expected = dequantised(cache, scale)
        for token, slot in enumerate(slots):
            if slot >= 0:
                stored = np.clip(new[token] / scale[:, None], -limit, limit) * scale[:, None]
                expected[slot // block_size, :, slot % block_size] = stored
        caches.append(expected)
    return q.reshape(len(q), -1, q.shape[-1]), *caches


def skinny_oracle(arrays, case, *, normed_dtype=None):
    """`normed_dtype` holds normalised rows, for implementations that round them before the product."""
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    x, w = wide["x"], wide["w"]
    if case.norm:
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * wide["norm"]
        if normed_dtype is not None:
            x = x.astype(normed_dtype).astype(np.float64)
    if case.scaled:
        x = x / np.sqrt(wide["squares"].sum(axis=0)[: len(x), None] / x.shape[1] + 1e-6)
    y = np.tensordot(x, w, axes=(1, 1 if case.w_layout == "nk" else 0))
    y = y * wide.get("w_scale", 1.0) + wide.get("bias", 0.0)
    if case.gated:
        y = y[:, 0] / (1 + np.exp(-y[:, 0])) * y[:, 1]
    return y + wide.get("residual", 0.0)


def passed_on_oracle(y, next_norm):
    """What is passed on of a result as its dtype holds it: times the norm that follows, and its sums of squares."""
    held = np.asarray(y, np.float64)
    return held * np.asarray(next_norm, np.float64), np.sum(held**2, axis=1)


def relative_error(got, expected):
    """Distance over size of the expected, largest over rows; NaN anywhere gives NaN."""
    got = np.asarray(got, np.float64).reshape(len(expected), -1)
    expected = expected.reshape(len(expected), -1)
    size = np.linalg.norm(expected, axis=1)
    distance = np.linalg.norm(got - expected, axis=1)
    return (distance / np.where(size > 0, size, 1)).max(initial=0)


def add_rms_norm_oracle(x, update, weight, *, eps):
    """The sum, and the norm of the sum as the dtype holds it: that rounding is part of what is asked for."""
    total = x.astype(np.float64) + (0 if update is None else update)
    held = total.astype(x.dtype).astype(np.float64)
    return total, held / np.sqrt(np.mean(held**2, axis=1, keepdims=True) + eps) * weight.astype(np.float64)


def silu_mul_oracle(gate_up):
    gate, up = gate_up.astype(np.float64).swapaxes(0, 1)
    return gate / 2 * (1 + np.tanh(gate / 2)) * up


def gated_oracle(x, w, bias=0.0):
    return silu_mul_oracle(np.tensordot(x.astype(np.float64), w.astype(np.float64), axes=1) + bias)


def layers_oracle(x, layers, cos, sin, caches, block_tables, context_lens, **options):
    """Hidden states [1, E] and caches after some layers, all in float64."""
    new_caches = []
    for weights, cache in zip(layers, caches, strict=True):
        x, *cache = layer_oracle(x, weights, cos, sin, *cache, block_tables, context_lens, **options)
        new_caches.append(tuple(cache))
    return x, new_caches


def layer_oracle(x, weights, cos, sin, k_cache, v_cache, block_tables, context_lens, *, eps, scale, sliding_window):
    """Hidden states [1, E] and caches after a layer, all in float64."""
    wide = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    x, position, block_size = np.asarray(x, np.float64), int(context_lens[0]) - 1, k_cache.shape[2]

    def normed(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    qkv = np.tensordot(normed(x, wide["input_norm"]), wide["qkv"], axes=1) + wide.get("qkv_bias", 0.0)
    slot = -1 if position < 0 else block_tables[0, position // block_size] * block_size + position % block_size
    norms = {"q_norm": wide.get("q_norm"), "k_norm": wide.get("k_norm"), "eps": eps}
    q, *caches = write_oracle(qkv, cos, sin, k_cache, v_cache, [slot], **norms)
    seen = {"scale": scale, "sliding_window": sliding_window, "soft_cap": None}
    attended = decode_oracle(q, *caches, block_tables, context_lens, **seen)
    x = x + attended.reshape(1, -1) @ wide["o"].reshape(-1, x.shape[1])
    gate, up = np.moveaxis(np.tensordot(normed(x, wide["post_norm"]), wide["gate_up"], axes=1), 1, 0)
    return x + gate / (1 + np.exp(-gate)) * up @ wide["down"], *caches
