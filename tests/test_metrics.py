"""Distances between sample sets, against closed forms and exact enumerations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sdediff import ShapeError
from sdediff.metrics import energy_distance, sliced_wasserstein

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quantiles(n, mean=0.0, std=1.0):
    """`n` equally likely points of a normal distribution, as a set of samples `(n, 1)`."""
    return torch.from_numpy(stats.norm.ppf((np.arange(n) + 0.5) / n, loc=mean, scale=std))[:, None]


def mean_gap(mean, std):
    """`E |z|` for z ~ N(mean, std^2)."""
    z = mean / std
    return std * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + mean * (1 - 2 * stats.norm.cdf(-z))


# Energy distance


@pytest.mark.parametrize(("shape", "event"), [((4, 3), (2,)), ((2, 5), ()), ((3, 3), (2, 2))])
def test_energy_distance_is_its_double_sums(shape, event):
    """Over all pairs between the sets, and over all pairs of different members within them."""
    a, b = drawn(shape[0], *event), 0.5 + 2 * drawn(shape[1], *event, seed=1)

    def far(x, y):
        return (x - y).square().sum().sqrt().item()

    between = np.mean([far(x, y) for x in a for y in b])
    within = sum(np.mean([far(x, y) for x, y in itertools.permutations(c, 2)]) for c in (a, b))
    assert energy_distance(a, b) == pytest.approx(2 * between - within, rel=1e-12)


@pytest.mark.parametrize("other", [(0.0, 1.0), (0.3, 1.0), (2.0, 1.0), (-1.0, 0.4), (0.0, 3.0)])
def test_energy_distance_of_two_normals_is_the_closed_form(other):
    mean, std = other
    exact = 2 * mean_gap(mean, math.hypot(1, std)) - mean_gap(0, math.sqrt(2)) - mean_gap(0, math.sqrt(2) * std)
    # on quantiles for samples, the error falls as 1 / n: one extrapolation
    coarse, fine = (energy_distance(quantiles(n), quantiles(n, mean, std)) for n in (500, 1000))
    assert 2 * fine - coarse == pytest.approx(exact, abs=3e-4)


@pytest.mark.parametrize("q", [[0.0, 1.0, 3.0], [4.0, 0.5, 1.0]])
def test_energy_distance_is_unbiased(q):
    """Its mean over every possible draw of two and three samples is the distance itself: zero for equal ones."""
    p = [0.0, 1.0, 3.0]
    far = lambda u, v: np.mean([abs(x - y) for x in u for y in v])  # noqa: E731
    expected = 2 * far(p, q) - far(p, p) - far(q, q)
    assert (expected == pytest.approx(0, abs=1e-12)) == (p == q)
    draws = itertools.product(itertools.product(p, repeat=2), itertools.product(q, repeat=3))
    values = [energy_distance(torch.tensor(a)[:, None], torch.tensor(b)[:, None]) for a, b in draws]
    assert np.mean(values) == pytest.approx(expected, abs=1e-12)
    assert min(values) < -0.1, "an unbiased estimate may be negative"


# Sliced Wasserstein


@settings(max_examples=20)
@given(shift=st.floats(-5, 5), n=st.integers(2, 40))
def test_on_a_line_two_shifted_sets_are_as_far_as_the_shift(shift, n):
    a = drawn(n, 1)
    assert sliced_wasserstein(a, (a + shift)[torch.randperm(n)]) == pytest.approx(abs(shift), abs=1e-12)


@pytest.mark.parametrize(("mean", "std"), [(1.5, 1.0), (0.0, 2.0), (-1.0, 0.5)])
def test_on_a_line_two_normals_are_at_their_wasserstein_distance(mean, std):
    """`W_2^2 = (m_1 - m_2)^2 + (s_1 - s_2)^2`."""
    got = sliced_wasserstein(quantiles(4000), quantiles(4000, mean, std))
    assert got == pytest.approx(math.hypot(mean, std - 1), rel=2e-3)


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_shifted_sets_are_at_the_root_mean_square_projection_of_the_shift(event):
    """`|shift| / sqrt(D)` over all directions; over 4096 of them within 5 standard errors."""
    a, shift = drawn(50, *event), drawn(*event, seed=7)
    size, k = math.prod(event), 4096
    exact = shift.norm().item() / math.sqrt(size)
    # var of <u, e>^2 on the sphere is 2 (D - 1) / (D^2 (D + 2))
    error = exact * size * math.sqrt(2 * (size - 1) / (size**2 * (size + 2)) / k) / 2
    assert abs(sliced_wasserstein(a, a + shift, directions=k) - exact) < 5 * error


def test_a_scaled_set_is_at_the_root_mean_square_of_its_projections():
    """b = 3 a: every quantile moves by twice itself, so W^2 = 4 mean |a|^2 / D on average over directions."""
    a = drawn(200, 2)
    exact = 2 * math.sqrt(a.square().sum(1).mean().item() / 2)
    assert sliced_wasserstein(a, 3 * a, directions=4096) == pytest.approx(exact, rel=0.02)


def test_sets_of_unequal_sizes_are_compared_by_their_quantile_functions():
    a, b = drawn(30, 2), 1 + drawn(30, 2, seed=1)
    assert sliced_wasserstein(a, a.repeat(4, 1)) == 0
    assert sliced_wasserstein(a, b.repeat(3, 1)) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)
    assert sliced_wasserstein(a.repeat(5, 1), b) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)
    # quantile functions 0, 1 on halves and 0, 0.5, 1 on thirds differ by 0.5 on a third of [0, 1]
    got = sliced_wasserstein(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [1.0], [0.0]]))
    assert got == pytest.approx(math.sqrt(0.25 / 3), rel=1e-12)


def test_directions_follow_the_seed():
    a, b = drawn(20, 3), drawn(20, 3, seed=1)
    assert sliced_wasserstein(a, b, seed=1, directions=4) == sliced_wasserstein(a, b, seed=1, directions=4)
    assert sliced_wasserstein(a, b, seed=1, directions=4) != sliced_wasserstein(a, b, seed=2, directions=4)


# Both


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
def test_distances_are_symmetric_scale_with_the_data_and_ignore_order_and_place(distance):
    a, b = drawn(9, 2), 1 + drawn(7, 2, seed=1)
    value = distance(a, b)
    assert distance(b, a) == pytest.approx(value, rel=1e-12)
    assert distance(3 * a, 3 * b) == pytest.approx(3 * value, rel=1e-10)
    assert distance(a.flip(0) + 5, b.roll(2, 0) + 5) == pytest.approx(value, rel=1e-9)
    assert distance(a.float(), b.float()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 1)), ((1, 2), (3, 2)), ((3, 2), (1, 2)), ((4, 2, 2), (4, 4))])
def test_sets_that_do_not_compare_are_refused_with_their_shapes(distance, a, b):
    with pytest.raises(ShapeError) as caught:
        distance(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)
    assert "at least two samples of one event shape" in str(caught.value)
