"""The keyed permutation and the sampler: each row once an epoch, whatever the devices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.order import Sampler, permute

SIZES = [1, 2, 3, 4, 5, 7, 97, 255, 256, 257, 4095, 4096, 4097, 10007, 65536, 99991]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    for epoch in (0, 1, 12345):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_an_index_maps_the_same_alone_and_among_others() -> None:
    n = 10**12 + 39
    indices = np.random.default_rng(0).integers(0, n, 500)
    together = permute(indices, n, 3, 1)
    assert [int(permute(np.array([i]), n, 3, 1)[0]) for i in indices[:50]] == together[:50].tolist()
    assert len(np.unique(together)) == len(np.unique(indices))
    assert together.min() >= 0 and together.max() < n


def test_permutation_is_the_same_on_every_machine() -> None:
    """Computed here with Python's integers alone."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    from hashlib import blake2b

    n, a, b = 1000, 32, 32  # 32 * 32 cells hold 1000
    digest = blake2b(b"7 2").digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]

    def image(index: int) -> int:
        high, low = divmod(index, b)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                high = (high + (mix((low + key) % 2**64) >> 32) * a // 2**32) % a
            else:
                low = (low + (mix((high + key) % 2**64) >> 32) * b // 2**32) % b
        cell = high * b + low
        return cell if cell < n else image(cell)

    assert permute(np.arange(n), n, 7, 2).tolist() == [image(i) for i in range(n)]


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 10_000
    orders = [permute(np.arange(n), n, s, e) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1), (10, 0)]]
    for i, one in enumerate(orders):
        for other in [*orders[:i], np.arange(n)]:
            # two random permutations agree in one place on average, Poisson: 12 has chance 1e-10
            assert (one == other).sum() < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05  # 5 standard deviations


@pytest.mark.parametrize("n", [4096, 10007, 65537])
def test_positions_are_spread_like_chance(n: int) -> None:
    """Chi-square of (index block, image block) counts, and neighbours do not stay neighbours."""
    images = permute(np.arange(n), n, 5, 0)
    blocks = 16
    table = np.zeros((blocks, blocks))
    np.add.at(table, (np.arange(n) * blocks // n, images * blocks // n), 1)
    expected = n / blocks**2
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = (blocks - 1) ** 2
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    steps = np.abs(np.diff(images))
    assert abs(steps.mean() / (n / 3) - 1) < 0.05  # mean distance of two random places is n / 3
    assert (steps == 1).mean() < 20 / n


def test_every_order_of_four_rows_occurs() -> None:
    orders = {tuple(permute(np.arange(4), 4, seed, 0)) for seed in range(2000)}
    assert len(orders) == 24


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="n=0"):
        permute(np.arange(1), 0, 0, 0)
    with pytest.raises(ValueError, match=r"0 … 4"):
        permute(np.array([5]), 5, 0, 0)
    assert permute(np.empty(0, np.int64), 5, 0, 0).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 60),
    epochs=st.integers(1, 4),
    size=st.integers(1, 50),
    world_size=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_ranks_share_one_order(
    n_rows: int, epochs: int, size: int, world_size: int, seed: int
) -> None:
    sampler = Sampler(n_rows, seed, epochs)
    assert sampler.n_samples == n_rows * epochs
    order = []
    for position in range(0, sampler.n_samples + size, size):  # one batch beyond the end: empty
        shares = [sampler.share(position, size, rank, world_size) for rank in range(world_size)]
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        batch = np.concatenate(shares)
        assert batch.tolist() == sampler.share(position, size).tolist()
        assert len(batch) == len(sampler.global_batch(position, size))
        order.extend(batch.tolist())
    assert len(order) == sampler.n_samples  # the last batch is short, nothing is lost or repeated
    for epoch in range(epochs):
        rows = order[epoch * n_rows : (epoch + 1) * n_rows]
        assert sorted(rows) == list(range(n_rows))
        assert rows == permute(np.arange(n_rows), n_rows, seed, epoch).tolist()


def test_stopping_anywhere_continues_the_same_order_with_other_batches() -> None:
    sampler = Sampler(101, 3, 3)
    whole = sampler.rows(np.arange(sampler.n_samples))
    stop = 137
    rest = [
        sampler.share(position, 10, rank, 4)
        for position in range(stop, sampler.n_samples, 10)
        for rank in range(4)
    ]
    assert np.concatenate([whole[:stop], *rest]).tolist() == whole.tolist()
