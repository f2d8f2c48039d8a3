import math

import pytest
import torch
from helpers import NAMED, name

import sdediff as sd
from sdediff.exact import LowRank

F64 = torch.float64
G = torch.Generator().manual_seed(0)
FACTORS = torch.randn(3, 5, 2, dtype=F64, generator=G)
MEANS = torch.randn(3, 5, dtype=F64, generator=G) * 2
ROOTS = torch.randn(3, 5, 5, dtype=F64, generator=G)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0])
FULL = sd.exact.GaussianMixture(WEIGHTS, MEANS, ROOTS @ ROOTS.mT / 5 + 0.05 * torch.eye(5))
LOW = sd.exact.GaussianMixture(WEIGHTS, MEANS, LowRank(FACTORS, torch.tensor([0.01, 0.1, 0.5])))
GAUSSIAN = sd.exact.Gaussian(MEANS[0], ROOTS[0] @ ROOTS[0].T + 0.1 * torch.eye(5))
TARGETS = {"full": FULL, "low": LOW, "gaussian": GAUSSIAN}


def dense(target, sde, t):
    """The marginal as a torch distribution with dense covariances."""
    linear = sd.as_linear(sde)
    alpha, sigma = linear.alpha(t), linear.sigma(t)
    if target is LOW:
        covs = FACTORS @ FACTORS.mT + torch.tensor([0.01, 0.1, 0.5])[:, None, None] * torch.eye(5)
    elif target is FULL:
        covs = ROOTS @ ROOTS.mT / 5 + 0.05 * torch.eye(5)
    else:
        covs = (ROOTS[0] @ ROOTS[0].T + 0.1 * torch.eye(5))[None]
    means, weights = (MEANS, WEIGHTS) if target is not GAUSSIAN else (MEANS[:1], torch.ones(1))
    components = torch.distributions.MultivariateNormal(
        alpha * means, alpha**2 * covs.double() + sigma**2 * torch.eye(5, dtype=F64)
    )
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights.double()), components)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_marginal_density_and_score_are_those_of_dense_gaussians(target, sde):
    target = TARGETS[target]
    model = target.model(sde)
    for t in torch.tensor([sde.t_min or 1e-3, 0.3 * sde.t_max, sde.t_max], dtype=F64):
        x = target.marginal(sde, t).sample(6, seed=1)
        far = x * 1.5 + 0.1 * sde.sigma(t)
        for points in (x, far):
            points = points.detach().requires_grad_()
            density = dense(target, sde, t).log_prob(points)
            torch.testing.assert_close(target.marginal(sde, t).log_prob(points), density, rtol=1e-8, atol=1e-8)
            (score,) = torch.autograd.grad(density.sum(), points)
            got = model.score(t, points.detach())
            assert (got - score).norm() <= 1e-8 * score.norm()


@pytest.mark.parametrize("target", TARGETS)
def test_samples_have_the_stated_moments(target):
    """Each mean and covariance entry within 5 standard errors (the latter bounded by fourth moments)."""
    target, n = TARGETS[target], 100_000
    x = target.sample(n, seed=0)
    scale = target.cov.diagonal().sqrt()
    assert ((x.mean(0) - target.mean) / scale).abs().max() < 5 / n**0.5
    product = (x - target.mean)[:, :, None] * (x - target.mean)[:, None, :]
    error = product.std(0) / n**0.5
    assert ((product.mean(0) - target.cov) / error).abs().max() < 5


def test_log_prob_integrates_to_one():
    mixture = sd.exact.GaussianMixture(
        torch.tensor([1.0, 3.0]), torch.tensor([[-1.0], [2.0]]), torch.tensor([0.2, 0.5])
    )
    x = torch.linspace(-12, 12, 20001, dtype=F64)[:, None]
    assert torch.trapezoid(mixture.log_prob(x).exp(), x[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_covariances_may_be_given_in_short():
    means = torch.zeros(2, 3, dtype=F64)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(2)
    full = sd.exact.GaussianMixture(weights, means, torch.stack([0.5 * torch.eye(3), 2 * torch.eye(3)]))
    for covs in (torch.tensor([0.5, 2.0]), torch.tensor([[0.5] * 3, [2.0] * 3])):
        torch.testing.assert_close(sd.exact.GaussianMixture(weights, means, covs).log_prob(x), full.log_prob(x))
    lone = sd.exact.Gaussian(torch.zeros(3, dtype=F64), 2.0)
    torch.testing.assert_close(lone.log_prob(x), -x.square().sum(1) / 4 - 1.5 * math.log(4 * math.pi))


def test_events_of_any_shape():
    mean = torch.arange(6, dtype=F64).reshape(1, 2, 3)
    target = sd.exact.Gaussian(mean, torch.diag(torch.arange(1, 7, dtype=F64)))
    flat = sd.exact.Gaussian(mean.flatten(), torch.diag(torch.arange(1, 7, dtype=F64)))
    x = target.sample(5, seed=0)
    assert x.shape == (5, 1, 2, 3)
    torch.testing.assert_close(target.log_prob(x), flat.log_prob(x.flatten(1)))
    got = target.model(sd.VP()).score(0.4, x)
    torch.testing.assert_close(got.flatten(1), flat.model(sd.VP()).score(0.4, x.flatten(1)))


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_the_gaussian_flow_solves_the_probability_flow(sde):
    """d/dt of the closed-form flow is the exact velocity."""
    target = GAUSSIAN
    model, x = target.model(sde), target.marginal(sde, 0.5 * sde.t_max).sample(4, seed=2)
    t, h = 0.3 * sde.t_max, 1e-4 * sde.t_max
    after, before = (target.flow(sde, x, 0.5 * sde.t_max, t + s * h) for s in (1, -1))
    here = target.flow(sde, x, 0.5 * sde.t_max, t)
    torch.testing.assert_close((after - before) / (2 * h), model.velocity(t, here), rtol=1e-4, atol=1e-5)
    back = target.flow(sde, here, t, 0.5 * sde.t_max)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_models_agree_with_float64_at_both_ends(target):
    target = TARGETS[target]
    for sde in NAMED:
        model = target.model(sde)
        for t in (sde.t_min or 1e-3, sde.t_max):
            x = target.marginal(sde, t).sample(16, seed=3).float()
            wide, single = model.noise(t, x.double()), model.noise(t, x)
            assert (single - wide).abs().max() < 2e-2 * wide.abs().max()
            wide, single = model.denoised(t, x.double()), model.denoised(t, x)
            assert (single - wide).abs().max() < 1e-3 * (1 + wide.abs().max())


def test_bad_mixtures_are_refused():
    ok = (torch.ones(2), torch.zeros(2, 3), torch.ones(2))
    for arguments, error, word in (
        ((torch.ones(3), *ok[1:]), sd.ShapeError, "one per mean"),
        ((torch.tensor([1.0, -1.0]), *ok[1:]), sd.OptionError, "positive"),
        ((*ok[:2], torch.ones(2, 4)), sd.ShapeError, "LowRank"),
        ((*ok[:2], torch.tensor([1.0, 0.0])), sd.OptionError, "positive definite"),
        ((*ok[:2], torch.ones(2, 3, 3).triu()), sd.OptionError, "symmetric"),
        ((*ok[:2], LowRank(torch.ones(2, 4, 1), 0.1)), sd.ShapeError, "factors"),
    ):
        with pytest.raises(error, match=word):
            sd.exact.GaussianMixture(*arguments)
    with pytest.raises(sd.ShapeError, match="batch, 3"):
        sd.exact.GaussianMixture(*ok).log_prob(torch.zeros(4, 2))
