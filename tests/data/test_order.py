"""The sample order: every sample once an epoch, the same for all, and well mixed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.data.order import SampleOrder
from ray_train_geo.errors import DataError, SpecError


def run(order: SampleOrder, steps: int) -> npt.NDArray[np.int64]:
    """All samples of the first ``steps`` steps, microbatch by microbatch."""
    count = order.global_batch // order.microbatch
    return np.concatenate([order.indices(s, m) for s in range(1, steps + 1) for m in range(count)])


@given(
    seed=st.integers(-(2**70), 2**70),
    samples=st.integers(1, 200),
    microbatch=st.integers(1, 9),
    microbatches=st.integers(1, 5),
)
@settings(deadline=None, max_examples=150)
def test_each_sample_occurs_once_per_epoch(
    seed: int, samples: int, microbatch: int, microbatches: int
) -> None:
    order = SampleOrder(seed, samples, microbatch * microbatches, microbatch)
    steps = -(-3 * samples // order.global_batch)
    stream = run(order, steps)
    for epoch in range(3):
        part = stream[epoch * samples : (epoch + 1) * samples]
        assert sorted(part) == list(range(samples))


@given(samples=st.integers(1, 100), sizes=st.sampled_from([(12, 1, 12), (12, 3, 4), (24, 2, 6)]))
@settings(deadline=None, max_examples=50)
def test_the_microbatch_size_does_not_change_the_stream(
    samples: int, sizes: tuple[int, int, int]
) -> None:
    global_batch, small, large = sizes
    a, b = (run(SampleOrder(7, samples, global_batch, m), 4) for m in (small, large))
    assert np.array_equal(a, b)


def test_a_microbatch_is_a_function_of_its_numbers_alone() -> None:
    order = SampleOrder(3, 1000, 32, 8)
    late = order.indices(77, 2)
    run(order, 5)
    assert np.array_equal(late, SampleOrder(3, 1000, 32, 8).indices(77, 2))
    assert late.dtype == np.int64
    assert late.shape == (8,)


def test_the_order_is_pinned() -> None:
    """A resumed run of an older version must see the samples that it would have seen."""
    assert SampleOrder(0, 10, 10, 10).indices(1, 0).tolist() == [8, 7, 9, 1, 0, 6, 5, 3, 2, 4]
    assert SampleOrder(1234, 10**12, 4, 4).indices(3, 0).tolist() == [
        736370136094,
        824315984499,
        214398187216,
        986684457998,
    ]


def test_epochs_and_seeds_differ() -> None:
    n = 500
    epochs = run(SampleOrder(0, n, n, n), 2)
    other = run(SampleOrder(1, n, n, n), 1)
    # Two random permutations agree at one place on average (Poisson).
    assert (epochs[:n] == epochs[n:]).sum() < 10
    assert (epochs[:n] == other).sum() < 10


@pytest.mark.parametrize("samples", [10**12, 2**62, 2**40 + 1, 2**40])
def test_large_datasets(samples: int) -> None:
    n = 50_000
    got = SampleOrder(5, samples, n, n).indices(1, 0)
    assert got.min() >= 0
    assert got.max() < samples
    assert len(np.unique(got)) == n
    # Uniform over the dataset: the mean of n uniforms has deviation samples / sqrt(12 n).
    assert abs(got.mean() / samples - 0.5) < 5 / np.sqrt(12 * n)
    last = SampleOrder(5, samples, 1, 1).indices(samples, 0)  # the epoch's last position
    assert 0 <= last[0] < samples


def test_a_run_may_be_longer_than_int64() -> None:
    assert SampleOrder(0, 10, 4, 4).indices(2**70, 0).max() < 10


@pytest.mark.parametrize("samples", [4096, 5000, 16385])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_structure_is_left(samples: int, seed: int) -> None:
    """Correlations with the position and between neighbours are those of a random order."""
    values = SampleOrder(seed, samples, samples, samples).indices(1, 0).astype(np.float64)
    noise = 1 / np.sqrt(samples)  # standard deviation of each coefficient below
    positions = np.arange(samples)
    assert abs(np.corrcoef(values, positions)[0, 1]) < 5 * noise  # values are ranks: Spearman's
    for lag in (1, 2, 3, 64, 128):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 5 * noise
    # First differences: none is frequent (a linear congruence has a single one, modulo n).
    _, counts = np.unique(np.diff(values) % samples, return_counts=True)
    assert counts.max() <= 12
    # Each of 64 windows draws evenly from each of 8 parts of the dataset.
    part = (values * 8 // samples).astype(int)
    window = positions * 64 // samples
    table = np.zeros((64, 8))
    np.add.at(table, (window, part), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / samples
    chi2, freedom = ((table - expected) ** 2 / expected).sum(), 63 * 7
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("step", "microbatch"), [(0, 0), (1, 4), (1, -1)])
def test_no_such_microbatch(step: int, microbatch: int) -> None:
    with pytest.raises(IndexError, match=r"microbatches 0 to 3"):
        SampleOrder(0, 100, 8, 2).indices(step, microbatch)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(DataError, match="samples"):
        SampleOrder(0, 0, 4, 2)
    with pytest.raises(DataError, match="samples"):
        SampleOrder(0, 2**62 + 1, 4, 2)
    with pytest.raises(SpecError, match="must divide"):
        SampleOrder(0, 10, 4, 3)
