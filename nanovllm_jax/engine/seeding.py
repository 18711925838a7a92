"""The 64-bit random key of one sample of one request, made on the host.

The key and a token's position are all that the device's noise depends on (see `nanovllm_kernels.sample.noise`), so
a sample's tokens do not depend on what runs beside it.
"""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def make_key(seed: int, sample_index: int) -> tuple[int, int]:
    """Mixes a request's seed and a sample's index (0 to n - 1) into two 32-bit words.

    The mix is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014), once over the seed and once more after the index is added: with one seed, different
    indices never meet, and neighbouring seeds or indices share no bits. Seeds count modulo 2**64, so negative
    ones are fine.

    Returns:
        the high and the low word of the key, each in [0, 2**32).
    """
    mixed = _mix(seed + _GOLDEN)
    key = _mix(mixed + (sample_index + 1) * _GOLDEN)
    return key >> 32, key & 0xFFFFFFFF


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
