# pyright: strict
"""Draws random numbers as pure functions of a key. There is no hidden state to save, restore or share.

Uses the raw words of Philox-4x64 (Salmon et al., SC 2011), which NumPy keeps stable between versions.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def random_words(*key: int | str, count: int) -> NDArray[np.uint64]:
    """Return `count` uniform 64-bit words that depend on `key` alone."""
    words = np.random.Philox(key=philox_key(*key)).random_raw(count)
    return np.asarray(words, dtype=np.uint64)


def philox_key(*key: int | str) -> NDArray[np.uint64]:
    """Return the key of Philox: uint64 [2]. Generators on a device take it too."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), dtype="<u8")


def philox_keys(*key: int | str, endings: Sequence[str]) -> NDArray[np.uint64]:
    """Return `philox_key` for each key that ends with one of `endings`, uint64 [number, 2].

    `key` has at least two parts. Hashing what the keys share once halves the time.
    """
    shared = hashlib.blake2b(repr(key).encode()[:-1] + b", ", digest_size=16)
    digests: list[bytes] = []
    for ending in endings:
        whole = shared.copy()
        whole.update(f"{ending!r})".encode())
        digests.append(whole.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def uniform(*key: int | str, count: int) -> NDArray[np.float64]:
    """Return `count` uniform numbers in [0, 1) with 53 random bits."""
    return np.ldexp((random_words(*key, count=count) >> np.uint64(11)).astype(np.float64), -53)


def uniform_within(*key: int | str, bounds: NDArray[np.float64], num_columns: int) -> NDArray[np.float32]:
    """Return uniform numbers in [-bound, bound), one row of `num_columns` for each bound."""
    numbers = 2 * uniform(*key, count=len(bounds) * num_columns) - 1
    return (numbers.reshape(len(bounds), num_columns) * bounds[:, None]).astype(np.float32)


def normal(*key: int | str, count: int) -> NDArray[np.float64]:
    """Return `count` standard normal numbers (Box and Muller 1958)."""
    half = -(-count // 2)
    numbers = uniform(*key, count=2 * half)
    length, angle = np.sqrt(-2 * np.log1p(-numbers[:half])), 2 * np.pi * numbers[half:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count]


def permutation(*key: int | str, count: int) -> NDArray[np.int64]:
    """Return a random permutation of range(count)."""
    return np.argsort(random_words(*key, count=count), kind="stable")


def coin_flips(*key: int | str, count: int, threshold: int) -> NDArray[np.bool_]:
    """Return `count` booleans, each True with probability threshold / 65536. One word yields four."""
    words = random_words(*key, count=-(-count // 4))
    return words.view(np.uint16)[:count] < threshold
