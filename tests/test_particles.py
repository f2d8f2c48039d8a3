"""Weighted particles: effective numbers, resampling, means and their errors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sdediff as sd
from sdediff import particles
from sdediff.errors import OptionError, ShapeError

F64 = torch.float64
WEIGHTS = torch.tensor([0.05, 0.4, 0.0, 0.21, 0.34], dtype=F64)

log_weights = st.lists(st.floats(-30, 3), min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=F64))
methods = st.sampled_from(sorted(particles.RESAMPLINGS))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(weights, families=None, x=None):
    """Particles of these weights."""
    count = len(weights)
    x = torch.arange(count, dtype=F64)[:, None] if x is None else x
    families = torch.arange(count) if families is None else torch.tensor(families)
    log_w = (weights / weights.sum()).log()
    return sd.Particles(x, log_w, 0.0, 0.0, torch.ones(2), (), families, torch.tensor([1.0, 0.1]), 2)


# Logarithms of weights


@given(log_weights, st.floats(-1e4, 1e4))
def test_effective_number(log_w, offset):
    """One over the sum of the squares of normalised weights, whatever their scale."""
    weights = (log_w - log_w.max()).exp()
    weights = weights / weights.sum()
    expected = 1 / weights.square().sum().item()
    assert particles.effective_number(log_w) == pytest.approx(expected, rel=1e-10)
    assert particles.effective_number(log_w + offset) == pytest.approx(expected, rel=1e-8)


def test_effective_number_of_extremes():
    """All of equal weight, and one that has everything."""
    assert particles.effective_number(torch.full((17,), -1e4, dtype=F64)) == 17
    assert particles.effective_number(torch.tensor([-1e4, 3.0, -math.inf], dtype=F64)) == 1
    assert particles.effective_number(torch.tensor([0.0, 0.0, -math.inf], dtype=F64)) == 2


@given(log_weights, st.floats(-1e4, 1e4))
def test_log_mean(log_w, offset):
    """The logarithm of the mean; exact for equal numbers; normalised weights sum to one."""
    expected = log_w.logsumexp(0).item() - math.log(len(log_w))
    assert particles.log_mean(log_w) == pytest.approx(expected, abs=1e-10)
    assert particles.log_mean(log_w + offset) == pytest.approx(expected + offset, abs=1e-8)
    assert particles.log_mean(torch.full_like(log_w, offset)) == offset
    assert particles.normalised(log_w + offset).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_log_mean_of_no_weight():
    """Zero."""
    assert particles.log_mean(torch.full((3,), -math.inf, dtype=F64)) == -math.inf
    assert particles.log_mean(torch.tensor([-math.inf, 0.0], dtype=F64)) == pytest.approx(-math.log(2), abs=1e-15)


# Resampling


@given(log_weights, methods, st.integers(1, 60), st.integers(0, 2**31))
def test_counts(log_w, method, n, seed):
    """n are taken, in rising order; systematic takes floor(n w) or ceil(n w), residual floor(n w) at least."""
    taken = particles.ancestors(log_w - 1e4, n, method, generator(seed))
    assert taken.shape == (n,)
    assert bool((taken.diff() >= 0).all())
    counts = torch.bincount(taken, minlength=len(log_w))
    expected = n * torch.softmax(log_w, 0)
    if method == "systematic":
        assert bool(((counts - expected).abs() < 1 + 1e-9).all())
    if method == "residual":
        assert bool((counts >= (expected - 1e-9).floor()).all())


@example(49, "residual", 0, 0.0)  # 49 (1 / 49) < 1 in float64
@given(st.integers(1, 200), st.sampled_from(["systematic", "residual"]), st.integers(0, 2**31), st.floats(-1e4, 1e4))
def test_equal_weights_are_all_taken_once(count, method, seed, level):
    """No particle of equal weight is lost to rounding."""
    taken = particles.ancestors(torch.full((count,), level, dtype=F64), count, method, generator(seed))
    assert taken.tolist() == list(range(count))


def counts_of(method, n, draws):
    """Counts of many resamplings, `(draws, particles)`."""
    source = generator(7)
    scheme = particles.RESAMPLINGS[method]
    return torch.stack([scheme(3.7 * WEIGHTS, n, source) for _ in range(draws)]).to(F64)


@pytest.mark.parametrize("method", sorted(particles.RESAMPLINGS))
def test_expected_counts(method):
    """n w in the mean, to 4 standard errors, with the variance of the scheme; what has no weight is never taken."""
    n, draws = 7, 10000
    counts = counts_of(method, n, draws)
    assert bool((counts.sum(1) == n).all())
    assert bool((counts[:, 2] == 0).all())
    expected = n * WEIGHTS
    whole = expected.floor()
    variance = {
        "multinomial": expected * (1 - WEIGHTS),
        "residual": (expected - whole) * (1 - (expected - whole) / (expected - whole).sum()),
        "systematic": (expected - whole) * (1 - (expected - whole)),
    }[method]
    off = counts.mean(0) - expected
    assert bool((off.abs() <= 4 * (variance / draws).sqrt()).all()), off
    squares = (counts - expected).square()
    assert bool(((squares.mean(0) - variance).abs() <= 4 * squares.std(0) / draws**0.5 + 1e-12).all())


@pytest.mark.parametrize("method", sorted(particles.RESAMPLINGS))
def test_means_of_resampled_sets_are_unbiased(method):
    """Of any function: that of the sum is that of the weighted sum."""
    values = torch.tensor([3.0, -1.0, 100.0, 0.5, 2.0], dtype=F64)
    means = counts_of(method, 4, 10000) @ values / 4
    assert abs(means.mean() - WEIGHTS @ values) < 4 * means.std() / 100


def test_multinomial_choices_are_independent():
    """Pairs of counts have the covariance -n w_i w_j."""
    counts = counts_of("multinomial", 7, 10000)
    products = (counts[:, 1] - 7 * 0.4) * (counts[:, 4] - 7 * 0.34)
    assert abs(products.mean() + 7 * 0.4 * 0.34) < 4 * products.std() / 100


# Means and their errors


def test_weighted_moments():
    """Mean and covariance are weighted sums over the particles, of events of any shape."""
    x = torch.randn(5, 2, 3, generator=generator(1))
    result = made(WEIGHTS + 0.1, x=x)
    w = ((WEIGHTS + 0.1) / 1.5).tolist()
    flat = x.to(F64).reshape(5, 6)
    mean = sum(wi * row for wi, row in zip(w, flat, strict=True))
    cov = sum(wi * torch.outer(row - mean, row - mean) for wi, row in zip(w, flat, strict=True))
    assert result.mean().shape == (2, 3)
    assert result.mean().dtype == x.dtype
    torch.testing.assert_close(result.mean().to(F64), mean.reshape(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.cov().to(F64), cov, rtol=0, atol=1e-6)
    value, stderr = result.expectation(lambda x: (x > 0).float())
    assert value.shape == stderr.shape == (2, 3)
    torch.testing.assert_close(value, sum(wi * (row > 0) for wi, row in zip(w, x, strict=True)).to(F64))
    assert result.weights.sum().item() == pytest.approx(1)


def test_standard_errors_without_resampling():
    """Those of importance sampling: of the weights' mean, and of a ratio of means."""
    weights = torch.rand(30, generator=generator(2), dtype=F64)
    values = torch.randn(30, generator=generator(3), dtype=F64)
    result = made(weights, x=values[:, None])
    relative = weights.std() / weights.mean() / 30**0.5
    error = particles.family_error(particles.family_gain(weights.log() - 1e4, torch.arange(30)))
    assert error.item() == pytest.approx(relative.item(), rel=1e-10)
    value, stderr = result.expectation(lambda x: x[:, 0])
    parts = 30 * weights / weights.sum() * (values - value)
    assert stderr.item() == pytest.approx((parts.square().sum() / 29 / 30).sqrt().item(), rel=1e-12)


def test_standard_errors_by_families():
    """Sums over pairs of particles of one family, by brute force."""
    weights = torch.rand(8, generator=generator(4), dtype=F64)
    families = [0, 0, 3, 3, 3, 4, 5, 7]
    result = made(weights, families)
    w = (weights / weights.sum()).tolist()
    value, stderr = result.expectation(lambda x: x[:, 0])
    gain = together = 0.0
    for i in range(8):
        for j in range(8):
            if families[i] == families[j]:
                gain += (w[i] - 1 / 8) * (w[j] - 1 / 8)
                together += w[i] * w[j] * (i - value.item()) * (j - value.item())
    assert stderr.item() == pytest.approx((8 / 7 * together) ** 0.5, rel=1e-10)
    gains = particles.family_gain(weights.log(), result.families)
    assert particles.family_error(gains).item() == pytest.approx((8 / 7 * gain) ** 0.5, rel=1e-10)
    assert gains[[1, 2, 6]].tolist() == [0, 0, 0]


def test_resample():
    """Samples of equal weight: their number, their seed, and their law."""
    result = made(WEIGHTS)
    assert result.resample(seed=3).shape == (5, 1)
    x = result.resample(100000, seed=3)
    assert torch.equal(x, result.resample(100000, seed=3))
    assert not torch.equal(result.resample(9, 4, "multinomial"), result.resample(9, 5, "multinomial"))
    share = torch.bincount(x[:, 0].long(), minlength=5) / 1e5
    torch.testing.assert_close(share.to(F64), WEIGHTS, rtol=0, atol=1e-5)


# Bad input


def test_messages():
    """What came and what to write."""
    result = made(WEIGHTS)
    with pytest.raises(OptionError, match="Unknown resampling 'comb': write one of 'systematic', 'multinomial', 'res"):
        result.resample(5, 0, "comb")
    with pytest.raises(OptionError, match="n >= 1 particles; got 0"):
        result.resample(0, 0)
    with pytest.raises(ShapeError, match=r"an entry for every particle, shape \(5, ...\); got \(3,\)"):
        result.expectation(lambda x: x[:3, 0])
    with pytest.raises(ShapeError, match="got float"):
        result.expectation(lambda x: 1.0)
    with pytest.raises(ShapeError, match=r"shape \(particles,\); got \(2, 2\)"):
        particles.ancestors(torch.zeros(2, 2), 3, "systematic", generator())
    for none in (-math.inf, math.nan, math.inf):
        with pytest.raises(OptionError, match="positive, finite weight; the largest log-weight is"):
            particles.ancestors(torch.full((2,), none), 3, "systematic", generator())


def test_particles_are_a_value():
    """Frozen, and replaceable."""
    result = replace(made(WEIGHTS), log_evidence=3.0)
    assert result.log_evidence == 3
    with pytest.raises(AttributeError):
        result.nfe = 4


def test_family_number():
    """One over the sum of squares of the weights of families: N of N of equal weight, 1 of one."""
    one = made(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), [0, 0, 2, 2])
    assert one.family_number == pytest.approx(1 / (0.3**2 + 0.7**2), rel=1e-12)
    assert made(torch.ones(7, dtype=F64)).family_number == pytest.approx(7, rel=1e-12)
    assert made(torch.ones(7, dtype=F64), [3] * 7).family_number == pytest.approx(1, rel=1e-12)


def test_means_do_not_see_particles_of_weight_zero():
    """f may be NaN or infinite where the product is 0."""
    one = made(torch.tensor([1.0, 0.0, 3.0], dtype=F64), x=torch.tensor([[1.0], [-1.0], [4.0]], dtype=F64))
    value, stderr = one.expectation(lambda x: x.sqrt())
    assert value.item() == pytest.approx(0.25 + 0.75 * 2, rel=1e-12)
    assert bool(stderr.isfinite())
