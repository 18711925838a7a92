"""What `sample` is compared with: NumPy in float64, by sorting, in the order that vLLM documents."""

import numpy as np
from jax.extend.random import threefry_2x32


def kept(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens of one row [V] the filters keep; equals are kept together."""
    logits = np.asarray(logits, np.float64)
    scaled = (logits - logits.max()) / temperature
    keep = np.exp(scaled) >= min_p
    if 0 < top_k < len(logits):
        keep &= logits >= np.sort(logits)[-top_k]
    if top_p < 1.0:
        mass = np.where(keep, np.exp(scaled), 0.0)
        order = np.argsort(-logits, kind="stable")
        before = np.cumsum(mass[order]) - mass[order]
        nucleus = order[before < top_p * mass.sum()]
        keep &= logits >= (logits[nucleus].min() if len(nucleus) else logits.max())
    return keep & np.isfinite(logits)


def kept_for_sure_and_at_most(logits, *, top_p=1.0, min_p=0.0, rounding=1e-4, **filters):
    """Tokens that are kept, and that may be, when masses are rounded by a share of `rounding`."""
    less, more = 1 - rounding, 1 + rounding
    # A larger min_p leaves less for top_p to take a share of, so both ends vary on their own.
    ends = [
        kept(logits, top_p=min(top_p * a, 1.0) if top_p < 1 else 1.0, min_p=min(min_p * b, 1.0), **filters)
        for a in (less, more)
        for b in (less, more)
    ]
    return np.all(ends, axis=0), np.any(ends, axis=0)


def gumbel_noise(key, position, vocab_size):
    """Noise of ids 0 to V - 1 in float64, after the documented construction."""

    def finalise(bits):
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0xD35A2D97)
        return bits ^ (bits >> np.uint32(15))

    word0, word1 = np.asarray(threefry_2x32(np.asarray(key), np.array([position, 0], np.uint32)))
    bits = finalise(finalise(np.arange(vocab_size, dtype=np.uint32) + word0) + word1)
    return -np.log(-np.log1p(-np.minimum((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)))


def assert_draws(tokens, logits, temperature, key, position, top_k=None, top_p=None, min_p=None):
    """Each row's token is the best of those kept, up to the rounding of float32 masses and scores."""
    assert tokens.dtype == np.int32
    for row, token in enumerate(np.asarray(tokens).tolist()):
        x = np.asarray(logits[row], np.float64)
        if np.isnan(x).any() or np.isposinf(x).any() or np.isneginf(x).all():
            assert token == -1, row
        elif temperature[row] < 1e-5:
            assert token == int(np.argmax(x)), row
        else:
            heat = float(temperature[row])
            surely = possibly = np.isfinite(x)
            if top_k is not None:
                filters = {"top_k": int(top_k[row]), "top_p": float(top_p[row]), "min_p": float(min_p[row])}
                surely, possibly = kept_for_sure_and_at_most(x, temperature=heat, **filters)
            with np.errstate(over="ignore"):
                score = x / heat + gumbel_noise(key[row], position[row], len(x))
            tolerance = 2e-5 + 1e-6 * abs(score[surely].max())
            assert possibly[token], (row, token)
            assert score[token] >= score[surely].max() - tolerance, (row, token)
