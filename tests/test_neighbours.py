"""Precision, recall, density and coverage: against loops, known expectations, and sets where they are plain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdediff import OptionError, ShapeError
from sdediff.metrics import density_coverage, precision_recall

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


def by_loops(a, b, k):
    """The four numbers, from the definitions."""

    def far(x, y):
        return (x - y).square().sum().sqrt().item()

    def reach(c):
        return [sorted(far(x, y) for j, y in enumerate(c) if j != i)[k - 1] for i, x in enumerate(c)]

    reach_a, reach_b = reach(a), reach(b)
    in_b = np.array([[far(x, y) <= r for y, r in zip(b, reach_b, strict=True)] for x in a])
    in_a = np.array([[far(y, x) <= r for x, r in zip(a, reach_a, strict=True)] for y in b])
    return in_b.any(1).mean(), in_a.any(1).mean(), in_b.sum() / (k * len(a)), in_b.any(0).mean()


@settings(max_examples=20)
@given(m=st.integers(5, 14), n=st.integers(5, 14), k=st.integers(1, 4), shift=st.floats(0, 3), seed=st.integers(0, 99))
def test_the_four_are_their_definitions(m, n, k, shift, seed):
    a, b = drawn(m, 2, seed=seed), shift + 0.7 * drawn(n, 2, seed=seed + 100)
    precision, recall, density, coverage = by_loops(a, b, k)
    assert precision_recall(a, b, k) == pytest.approx((precision, recall), abs=1e-12)
    assert density_coverage(a, b, k) == pytest.approx((density, coverage), abs=1e-12)


def test_balls_reach_to_the_neighbours_that_scikit_learn_finds():
    from sklearn.neighbors import NearestNeighbors

    a, b, k = drawn(300, 5), 0.5 + drawn(200, 5, seed=1), 4
    reach = NearestNeighbors(n_neighbors=k + 1).fit(b.numpy()).kneighbors(b.numpy())[0][:, -1]
    far = NearestNeighbors(n_neighbors=200).fit(b.numpy()).kneighbors(a.numpy())
    inside = far[0] <= reach[far[1]]
    assert precision_recall(a, b, k).precision == inside.any(1).mean()
    assert density_coverage(a, b, k).density == pytest.approx(inside.sum() / (k * 300), rel=1e-12)
    nearest = NearestNeighbors(n_neighbors=1).fit(a.numpy()).kneighbors(b.numpy())[0][:, 0]
    assert density_coverage(a, b, k).coverage == (nearest <= reach).mean()


@pytest.mark.parametrize(("m", "n", "k"), [(12, 8, 2), (6, 20, 5), (30, 30, 1)])
@pytest.mark.parametrize("law", [torch.distributions.Exponential(1.0), torch.distributions.Cauchy(0.0, 1.0)])
def test_expected_density_and_coverage_of_one_distribution(m, n, k, law):
    """Density 1 and coverage `1 - prod (N - 1 - i) / (M + N - 1 - i)`, for any law: 400 draws, 4 standard errors."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sets = law.sample((400, m + n, 1)).double()
    values = np.array([density_coverage(c[:m], c[m:], k) for c in sets])
    exact = 1, 1 - math.prod((n - 1 - i) / (m + n - 1 - i) for i in range(k))
    assert np.all(np.abs(values.mean(0) - exact) < 4 * values.std(0) / 20)


def test_a_set_holds_itself():
    """A copy of every point: each lies in its own ball and, as k-th neighbour at the rim, in those of others."""
    b = drawn(60, 200)
    assert precision_recall(b.flip(0), b) == (1, 1)
    assert density_coverage(b.flip(0), b, k=3) == (pytest.approx(4 / 3), 1)


def test_the_rim_belongs_to_the_ball():
    """Balls of radius 1 about 0 and 1: of samples at 2 and 5, one is at the rim of one ball."""
    a, b = torch.tensor([[2.0], [5.0]]), torch.tensor([[0.0], [1.0]])
    assert precision_recall(a, b, k=1) == (0.5, 1)
    assert density_coverage(a, b, k=1) == (0.5, 0.5)


def test_disjoint_sets_hold_nothing_of_each_other():
    a, b = drawn(20, 2), 100 + drawn(30, 2)
    assert precision_recall(a, b) == (0, 0)
    assert density_coverage(a, b) == (0, 0)


def test_a_dropped_mode_is_seen_by_recall_and_coverage_only():
    """Samples of one of two modes, and data of both: all samples are good, half of the data is missing."""
    one, two = drawn(200, 2), 50 + drawn(200, 2, seed=1)
    samples, data = drawn(200, 2, seed=2), torch.cat([one, two])
    assert precision_recall(samples, data).precision > 0.9
    assert precision_recall(samples, data).recall == pytest.approx(0.5, abs=0.05)
    assert density_coverage(samples, data).density > 0.8
    assert density_coverage(samples, data).coverage == pytest.approx(0.5, abs=0.05)
    assert precision_recall(data, samples) == precision_recall(samples, data)[::-1]


def test_an_outlier_of_the_data_fools_precision_and_not_density():
    """One point far out, with a ball around everything near the data: bad samples lie in this ball only."""
    data = torch.cat([drawn(100, 2), torch.tensor([[100.0, 0.0]])])
    bad = torch.tensor([50.0, 0.0]) + drawn(100, 2, seed=1)
    assert precision_recall(bad, data).precision == 1
    assert density_coverage(bad, data).density == pytest.approx(1 / 5)


def test_events_of_any_shape_and_results_with_names():
    a, b = drawn(20, 2, 3), drawn(25, 2, 3, seed=1)
    got = precision_recall(a.float(), b.float()), density_coverage(a.float(), b.float())
    assert got == (precision_recall(a.flatten(1), b.flatten(1)), density_coverage(a.flatten(1), b.flatten(1)))
    assert got[0]._fields == ("precision", "recall")
    assert got[1]._fields == ("density", "coverage")
    assert all(isinstance(value, float) for pair in got for value in pair)


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_bad_input_gets_a_sentence(metric):
    a, b = drawn(8, 2), drawn(6, 2)
    for k in (0, 6, 2.0):
        with pytest.raises(OptionError, match=rf"1 to 5 for sets of 8 and 6 samples; got {k}"):
            metric(a, b, k)
    with pytest.raises(ShapeError, match=r"one event shape.*\(8, 2\) and \(6, 1\)"):
        metric(a, b[:, :1], 1)
    with pytest.raises(OptionError, match="The first set has 8 of 8 samples with NaN"):
        metric(a * math.nan, b, 1)
