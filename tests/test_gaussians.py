"""Gaussian densities, entropies and divergences, against torch.distributions and quadrature."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal

import sdediff as sd
from sdediff.errors import DivergenceError, OptionError, ShapeError
from sdediff.gaussians import DiagonalGaussian, gaussian_of, kl_divergence
from sdediff.testing import gaussian_targets

F64 = torch.float64
NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))


def diagonal(seed, shape=(4, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, dtype=F64, generator=generator)
    return DiagonalGaussian(mean, torch.randn(shape, dtype=F64, generator=generator).exp())


def known(q):
    return Independent(Normal(q.mean, q.std), q.mean.ndim - 1)


def covariance(seed, size, batch=()):
    root = torch.randn(*batch, size, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT + 0.1 * torch.eye(size, dtype=F64)


@given(st.integers(0, 2**32))
def test_diagonal_gaussians_are_those_of_torch(seed):
    q, p = diagonal(seed), diagonal(seed + 1)
    x = diagonal(seed + 2).mean
    torch.testing.assert_close(q.log_prob(x), known(q).log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.entropy(), known(q).entropy(), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(known(q), known(p))
    torch.testing.assert_close(q.kl(p), expected, rtol=1e-11, atol=1e-11)
    assert bool((q.kl(p) > 0).all())
    assert bool((q.kl(q) == 0).all())


def test_a_small_difference_of_spread_keeps_its_digits():
    mean, std = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    d = 1e-6
    found = DiagonalGaussian(mean, std * math.exp(d)).kl(DiagonalGaussian(mean, std)).item()
    assert abs(found / (d**2 * (1 + 2 * d / 3)) - 1) < 1e-3  # (e^2d - 1 - 2d) / 2 = d^2 + 2/3 d^3 + ...


@given(st.integers(0, 2**32))
def test_a_draw_is_the_standard_normal_moved(seed):
    q = diagonal(seed)
    normal = diagonal(seed + 1).mean
    torch.testing.assert_close((q.draw(normal) - q.mean) / q.std, normal, rtol=1e-9, atol=1e-9)


@given(gaussian_targets(), st.integers(0, 2**32))
def test_the_full_divergence_is_that_of_torch(target, seed):
    mean, cov = target.mean, covariance(seed, len(target.mean))
    q, p = MultivariateNormal(0 * mean, cov), MultivariateNormal(mean, target.cov)
    expected = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(kl_divergence(0 * mean, cov, mean, target.cov), expected, rtol=1e-9, atol=1e-9)


@given(gaussian_targets(), st.integers(0, 2**32))
def test_the_full_divergence_is_its_formula(target, seed):
    """`1/2 [log |S2| / |S1| - d + tr(S2^-1 S1) + (m2 - m1)^T S2^-1 (m2 - m1)]` with inverse and determinants."""
    m2, s2, size = target.mean, target.cov, len(target.mean)
    s1 = covariance(seed, size)
    m1 = s1[0]
    quadratic = (m2 - m1) @ torch.linalg.inv(s2) @ (m2 - m1)
    expected = (s2.logdet() - s1.logdet() - size + (torch.linalg.inv(s2) @ s1).trace() + quadratic) / 2
    torch.testing.assert_close(kl_divergence(m1, s1, m2, s2), expected, rtol=1e-8, atol=1e-9)


def test_divergences_of_a_batch_are_one_by_one():
    m1, m2 = covariance(0, 3)[:2], covariance(1, 3)[:2]
    s1, s2 = covariance(2, 3, (2,)), covariance(3, 3, (2,))
    single = torch.stack([kl_divergence(m1[i], s1[i], m2[i], s2[i]) for i in range(2)])
    torch.testing.assert_close(kl_divergence(m1, s1, m2, s2), single)


@given(st.integers(0, 2**32))
def test_full_and_diagonal_agree(seed):
    q, p = diagonal(seed, (3, 4)), diagonal(seed + 1, (3, 4))
    full = kl_divergence(q.mean, torch.diag_embed(q.std**2), p.mean, torch.diag_embed(p.std**2))
    torch.testing.assert_close(q.kl(p), full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("move", "ratio"), [(0.0, 0.5), (0.7, 1.0), (-1.3, 1.8)])
def test_divergence_and_entropy_are_their_integrals(move, ratio):
    """`int q log q / p` over 12 standard deviations, by Gauss and Legendre."""
    x = (12 * NODES)[:, None]
    q = DiagonalGaussian(torch.zeros_like(x), torch.ones_like(x))
    p = DiagonalGaussian(torch.full_like(x, move), torch.full_like(x, ratio))
    density = q.log_prob(x).exp() * 12 * WEIGHTS
    torch.testing.assert_close(q.kl(p)[0], (density * (q.log_prob(x) - p.log_prob(x))).sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.entropy()[0], -(density * q.log_prob(x)).sum(), rtol=1e-10, atol=1e-12)


I2 = torch.eye(2, dtype=F64)
ZERO = torch.zeros(2, dtype=F64)
PAIR = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kl_divergence(ZERO, ZERO, ZERO, I2), ShapeError, ["cov_q", "(2,)", "diag_embed"]),
        (lambda: kl_divergence(ZERO, I2, ZERO[:1], I2), ShapeError, ["cov_p", "(2, 2)", "(1,)"]),
        (lambda: kl_divergence(ZERO, I2, ZERO[:1], I2[:1, :1]), ShapeError, ["q has 2", "p 1", "last dimension"]),
        (lambda: kl_divergence(ZERO, I2 + I2.roll(1, 0).triu(), ZERO, I2), OptionError, ["cov_q", "symmetric", ".mT"]),
        (lambda: kl_divergence(ZERO, I2, ZERO, -2 * I2), OptionError, ["cov_p", "positive definite", "-2"]),
        (lambda: gaussian_of(PAIR, "encoder[0]"), ShapeError, ["encoder[0]", "(mean, std)", "Tensor"]),
        (lambda: gaussian_of((PAIR,), "encoder[0]"), ShapeError, ["encoder[0]", "(mean, std)", "tuple"]),
        (lambda: gaussian_of((PAIR, PAIR[:, :1]), "decoder[1]"), ShapeError, ["decoder[1]", "(2, 1)"]),
        (lambda: gaussian_of((PAIR, PAIR + 1), "decoder[1]", PAIR[:1]), ShapeError, ["(1, 3)", "(2, 3)"]),
        (lambda: gaussian_of((PAIR, PAIR + 1), "encoder[0]", rows=5), ShapeError, ["(5, *event)", "(2, 3)"]),
        (lambda: gaussian_of((PAIR, PAIR), "encoder[0]"), OptionError, ["encoder[0]", "positive", "got 0", "softplus"]),
        (lambda: gaussian_of((PAIR, PAIR - 3), "encoder[0]"), OptionError, ["got -3", "exp"]),
        (lambda: gaussian_of((PAIR, PAIR + torch.nan), "encoder[0]"), DivergenceError, ["NaN", "rows 0, 1"]),
    ],
)
def test_bad_input_gets_a_sentence(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_the_module_is_public():
    assert sd.gaussians.kl_divergence is kl_divergence


def test_a_covariance_may_be_as_asymmetric_as_its_dtype_rounds():
    """Products in float32 differ from their transposes by rounding, in entries far below the largest too."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 30, generator=generator) * torch.logspace(-3, 3, 20)[:, None]
    cov = a @ a.T
    cov = cov * (1 + 1e-6 * torch.randn(20, 20, generator=generator))
    mean = torch.zeros(20)
    assert not torch.equal(cov, cov.mT)
    assert kl_divergence(mean, cov, mean, cov).abs() < 1e-2
    for dtype, off in ((torch.float32, 1e-3), (torch.float64, 1e-5)):
        tilted = torch.eye(2, dtype=dtype)
        tilted[0, 1] = off
        with pytest.raises(OptionError, match="symmetric"):
            kl_divergence(torch.zeros(2, dtype=dtype), tilted, torch.zeros(2, dtype=dtype), torch.eye(2, dtype=dtype))


def test_states_of_another_shape_do_not_broadcast():
    one, other = (DiagonalGaussian(torch.zeros(n, 2), torch.ones(n, 2)) for n in (1, 3))
    with pytest.raises(ShapeError, match=r"x has shape \(3, 2\) but the Gaussian \(1, 2\)"):
        one.log_prob(other.mean)
    with pytest.raises(ShapeError, match=r"other Gaussian has shape \(1, 2\) but the Gaussian \(3, 2\)"):
        other.kl(one)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_with_its_rows(bad):
    mean, std = torch.zeros(3, 2), torch.ones(3, 2)
    broken = torch.ones(3, 2)
    broken[1, 1] = bad
    for output in ((broken, std), (mean, broken)):
        with pytest.raises(DivergenceError, match=r"encoder\[0\] returned is NaN or infinite at rows 1\. ") as caught:
            gaussian_of(output, "encoder[0]")
        assert caught.value.rows == [1]
    with pytest.raises(OptionError, match="exp underflows"):
        gaussian_of((mean, (mean - 200).exp()), "encoder[0]")
