"""The noise of codes, computed independently: SplitMix64 with NumPy's unsigned integers, and Gumbel-max in float64."""

import numpy as np


def splitmix64(seed: int, count: int) -> np.ndarray:
    """The first outputs of SplitMix64 from a seed, uint64 (count,): Java's SplittableRandom, by its own statements."""
    with np.errstate(over="ignore"):
        state, found = np.uint64(seed & (2**64 - 1)), []
        for _ in range(count):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            z = state
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found.append(z ^ (z >> np.uint64(31)))
    return np.array(found)


def seed_of(output: int) -> int:
    """The seed, as a signed integer, whose first output is the given unsigned one: every step of the hash undone."""
    whole = 2**64

    def unshifted(x: int, shift: int) -> int:
        found = x
        for _ in range(64 // shift + 1):
            found = x ^ (found >> shift)
        return found

    z = unshifted(output, 31)
    z = unshifted(z * pow(0x94D049BB133111EB, -1, whole) % whole, 27)
    z = unshifted(z * pow(0xBF58476D1CE4E5B9, -1, whole) % whole, 30)
    seed = (z - 0x9E3779B97F4A7C15) % whole
    return seed - whole if seed >= whole // 2 else seed


def uniform(seed: int, count: int) -> np.ndarray:
    """Numbers in (0, 1), float64: the upper 52 bits as signed integers, shifted to the middle of their cells."""
    upper = splitmix64(seed, count).view(np.int64) // 2**12
    return (upper + 2**51 + 0.5) / 2.0**52


def pick(p, seed) -> int:
    """The code of a seed under probabilities (V,): argmax of log p plus Gumbel noise."""
    gumbel = -np.log(-np.log(uniform(int(seed), len(p))))
    with np.errstate(divide="ignore"):
        return int((np.log(np.asarray(p, dtype=np.float64)) + gumbel).argmax())
