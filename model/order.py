"""The order of training as a pure function: the place in the data is one integer."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8))


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014) of ``x + key``, modulo 2**64."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map ``indices`` by the permutation of 0 … n-1 that (seed, epoch) names; no table is made.

    Eight rounds of a Feistel network over a * b >= n cells, its halves added modulo a and b; what
    lands beyond n is mapped again (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002, sections 4 and 5).

    Args:
        indices: (k,) integers in [0, n).
        n: 1 … 2**62.
        seed, epoch: any integers.

    Returns:
        (k,) int64, the same on every machine.

    Raises:
        ValueError: ``n`` or an index out of range.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"n={n}: a permutation needs 1 … 2**62 items")
    values = np.array(indices, np.int64).reshape(-1)
    if len(values) and not (0 <= values.min() and values.max() < n):
        raise ValueError(f"indices {values.min()} … {values.max()} do not lie in 0 … {n - 1}")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(seed, epoch)
    pending = np.arange(len(values))
    x = values.astype(np.uint64)
    while len(pending):
        halves, sizes = [x // np.uint64(b), x % np.uint64(b)], (a, b)
        for number, key in enumerate(keys):
            this, other = number % 2, 1 - number % 2
            size = np.uint64(sizes[this])
            # the upper 32 bits scaled to 0 … size-1: a division would take longer than all the rest
            shift = ((_mix(halves[other], key) >> np.uint64(32)) * size) >> np.uint64(32)
            total = halves[this] + shift
            halves[this] = np.where(total >= size, total - size, total)
        x = halves[0] * np.uint64(b) + halves[1]
        inside = x < np.uint64(n)
        values[pending[inside]] = x[inside].astype(np.int64)
        pending, x = pending[~inside], x[~inside]
    return values


@dataclass(frozen=True)
class Sampler:
    """Which row sample number g is, for g from 0 to ``n_samples``; each row once an epoch.

    Neither the number of ranks nor the batch size enters: a run can go on from any sample on other
    devices.
    """

    n_rows: int
    seed: int
    epochs: int = 1

    @property
    def n_samples(self) -> int:
        return self.n_rows * self.epochs

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Return the rows of sample numbers: (k,) int64."""
        samples = np.asarray(samples, np.int64)
        epochs, places = np.divmod(samples, self.n_rows)
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(places[here], self.n_rows, self.seed, int(epoch))
        return rows

    def global_batch(self, position: int, size: int) -> range:
        """Return the sample numbers of the batch at ``position``; the last one may be shorter."""
        return range(min(position, self.n_samples), min(position + size, self.n_samples))

    def share(self, position: int, size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the rows of ``rank`` in the global batch at ``position``.

        The ranks' shares, joined in order, are the global batch; their sizes differ by at most one,
        so a rank may be left with none of a last, short batch.
        """
        batch = self.global_batch(position, size)
        start, stop = (len(batch) * r // world_size for r in (rank, rank + 1))
        return self.rows(np.arange(batch.start + start, batch.start + stop))
