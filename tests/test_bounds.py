"""Bounds from denoising errors: closed forms on Gaussian data, with the noise integrated exactly where it can be.

Given noise makes the expectation over it exact: every row of a batch gets one node of Gauss and Hermite's quadrature,
for all its draws, and the weighted sum over the nodes is the expectation of anything quadratic in the noise.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import MEAN, NAMED, VARIANCE, TwoFunctions, fitted_order, name, scalar_target

import sdediff as sd
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError

F64 = torch.float64
NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(4))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
X = torch.tensor([-1.5, 0.2, 0.7, 2.0], dtype=F64)
ALL = [*NAMED, TwoFunctions()]
ESTIMATES = [sd.elbo, sd.denoising_log_prob, sd.sde_bound]
CASES = [(sd.elbo, {"steps": 3}), *((function, {}) for function in ESTIMATES)]


def gaussian(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=F64, generator=generator) / size**0.5
    mean = torch.randn(size, dtype=F64, generator=generator)
    return sd.exact.Gaussian(mean, root @ root.T + 0.1 * torch.eye(size, dtype=F64))


def mixture():
    means = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]], dtype=F64)
    return sd.exact.GaussianMixture(torch.tensor([1.0, 2.0, 3.0]), means, torch.tensor([0.02, 0.1, 0.3]))


def value_of(result):
    parts = result if isinstance(result, dict) else vars(result)
    return parts["total" if "total" in parts else "value"]


def integrated(function, model, x=X, samples=2, **options):
    """The estimate with the mean over its noise taken exactly: for models that are affine in x, one entry an event."""
    rows = x.repeat_interleave(len(NODES))[:, None]
    draws = samples * (2 + options.get("steps", 0)) + 2
    numbers = NODES.repeat(len(x)).expand(draws, len(rows))[..., None]
    result = function(model, rows, samples=samples, noise=sd.Recorded(numbers), seed=3, **options)

    def mean(values):
        return (values.reshape(*values.shape[:-1], len(x), len(NODES)) * WEIGHTS).sum(-1)

    return {
        name: mean(value) for name, value in vars(result).items() if isinstance(value, torch.Tensor) and name != "times"
    }


def data_error(sde, t, x):
    """`E |x - xhat(z)|^2` over the noise, for the exact model of the scalar target."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    total = alpha**2 * VARIANCE + sigma**2
    return ((x - MEAN) * sigma**2 / total) ** 2 + (alpha * VARIANCE * sigma / total) ** 2


def off(values, errors, truth):
    """How many stated standard errors the mean of the values is off."""
    return ((values - truth).mean() / (errors.square().mean() / len(values)).sqrt()).abs().item()


# The parts of the discrete bound


@pytest.mark.parametrize("sde", ALL, ids=name)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_prior_term_is_the_closed_form_divergence(sde, size):
    target = gaussian(size)
    linear, x = sd.as_linear(sde), target.sample(3, seed=1)
    alpha, sigma = linear.scales_at(torch.tensor(linear.t_max, dtype=F64))
    eye = torch.eye(size, dtype=F64)
    q = torch.distributions.MultivariateNormal(alpha * x, sigma**2 * eye)
    end = target.marginal(sde, linear.t_max)
    tilted = torch.distributions.Normal(torch.linspace(0, 1, size, dtype=F64), torch.linspace(1, 2, size, dtype=F64))
    whole = torch.distributions.Independent(tilted, 1)
    for prior, (mean, cov) in (
        (None, (0 * eye[0], sigma**2 * eye)),
        (end, (end.mean, end.cov)),
        (tilted, (tilted.mean, tilted.variance.diag())),
        (whole, (tilted.mean, tilted.variance.diag())),
    ):
        expected = torch.distributions.kl_divergence(q, torch.distributions.MultivariateNormal(mean, cov))
        found = sd.elbo(target.model(sde), x, samples=2, prior=prior, seed=0).prior
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sde", ALL, ids=name)
def test_every_term_of_the_discrete_bound_is_its_closed_form(sde):
    linear = sd.as_linear(sde)
    found = integrated(sd.elbo, scalar_target().model(sde), steps=7)
    times = sd.elbo(scalar_target().model(sde), X[:, None], steps=7, samples=1, seed=0).times
    assert times[0] == linear.t_max
    assert times[-1] == linear.t_min
    snr = linear.log_snr(times).exp()
    for i in range(7):
        expected = (snr[i + 1] - snr[i]) / 2 * data_error(linear, times[i], X)
        torch.testing.assert_close(found["terms"][i], expected, rtol=1e-8, atol=0)
    spread = linear.sigma(times[-1]) / linear.alpha(times[-1])
    decoder = torch.distributions.Normal(0 * X, spread).log_prob(0 * X)
    reconstruction = decoder - data_error(linear, times[-1], X) / (2 * spread**2)
    torch.testing.assert_close(found["reconstruction"], reconstruction, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found["diffusion"], found["terms"].sum(0))
    torch.testing.assert_close(found["total"], found["reconstruction"] - found["prior"] - found["diffusion"])


@pytest.mark.parametrize("size", [3, 16])
def test_the_terms_of_correlated_data_are_within_their_errors(size):
    """`E |x - xhat|^2 = |(I - K alpha) (x - m)|^2 + sigma^2 tr K K^T`, with K the gain of the exact model."""
    sde, target = sd.VP(), gaussian(size)
    x = target.sample(4, seed=1)
    times = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.02], dtype=F64)
    result = sd.elbo(target.model(sde), x, times=times, samples=200, seed=2)
    total, eye = 0, torch.eye(size, dtype=F64)
    for t, s in itertools.pairwise(times):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        gain = alpha * torch.linalg.solve(alpha**2 * target.cov + sigma**2 * eye, target.cov)
        bias = (x - target.mean) @ (eye - alpha * gain)
        error = bias.square().sum(1) + sigma**2 * gain.square().sum()
        total = total + (sde.log_snr(s).exp() - sde.log_snr(t).exp()) / 2 * error
    assert result.terms.shape == (4, 4)
    assert ((result.diffusion - total).abs() < 5 * result.stderr).all()
    torch.testing.assert_close(result.terms.sum(0), result.diffusion)


def test_a_single_step_is_a_variational_autoencoder():
    result = integrated(sd.elbo, scalar_target().model(sd.VP()), steps=1)
    sde = sd.VP()
    snr = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=F64)).exp()
    torch.testing.assert_close(result["terms"], ((snr[1] - snr[0]) / 2 * data_error(sde, sde.t_max, X))[None])


# The continuous limit


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.RectifiedFlow()], ids=name)
def test_the_discrete_bound_rises_to_log_p_at_rate_one_over_steps(sde):
    target, steps = scalar_target(), [160, 320, 640]
    prior, points = target.marginal(sde, sde.t_max), MEAN + VARIANCE**0.5 * NODES  # the mean over data is exact too
    gaps = []
    for n in steps:
        bound = integrated(sd.elbo, target.model(sde), points, steps=n, prior=prior, samples=1)["total"]
        gaps.append(((target.log_prob(points[:, None]) - bound) * WEIGHTS).sum().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert fitted_order(gaps, steps) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("function", ESTIMATES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_with_the_noise_integrated_every_estimate_is_log_p(sde, function):
    """Row by row: only the random times are left, 200 strata of them, and what the density curves at t_min."""
    target, linear = scalar_target(), sd.as_linear(sde)
    start = target if function is not sd.sde_bound else target.marginal(sde, linear.t_min)
    found = integrated(function, target.model(sde), samples=400, prior=target.marginal(sde, linear.t_max))
    error = value_of(found) - start.log_prob(X[:, None])
    blur = (linear.sigma(linear.t_min) / linear.alpha(linear.t_min)) ** 2 / VARIANCE
    assert (error.abs() < 0.01 + 0.6 * blur * (1 + (X - MEAN) ** 2 / VARIANCE)).all()


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.CosineVP()], ids=name)
@pytest.mark.parametrize("size", [3, 16])
def test_exact_models_have_log_p_within_the_stated_errors(sde, size):
    target = gaussian(size)
    x, states = target.sample(300, seed=1), target.marginal(sde, sde.t_min).sample(300, seed=2)
    for seed, function in enumerate(ESTIMATES):
        at, law = (states, target.marginal(sde, sde.t_min)) if function is sd.sde_bound else (x, target)
        result = function(target.model(sde), at, prior=target.marginal(sde, sde.t_max), samples=32, seed=seed)
        assert off(value_of(result), result.stderr, law.log_prob(at)) < 4


@pytest.mark.parametrize("sde", [sd.VP(), sd.EDM()], ids=name)
def test_mixtures_have_log_p_within_the_stated_errors(sde):
    target = mixture()
    x, states = target.sample(300, seed=1), target.marginal(sde, sde.t_min).sample(300, seed=2)
    for seed, function in enumerate(ESTIMATES):
        at, law = (states, target.marginal(sde, sde.t_min)) if function is sd.sde_bound else (x, target)
        result = function(target.model(sde), at, samples=64, seed=seed)
        assert off(value_of(result), result.stderr, law.log_prob(at)) < 4
        assert result.stderr.square().mean().sqrt() < 0.5


class _Schedule(sd.LinearSDE):
    """A process with a given scale of the data and a log-SNR falling from 10 to -10 with a given bend."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, power, size):
        self.power, self.size = power, size

    def scales(self, t):
        alpha = (1 - 0.7 * t) * self.size
        return alpha, alpha * (10 * (t**self.power + t) / 2 - 5 + 5 * (t**2 + t) / 2).exp()


def test_the_continuous_bound_depends_on_the_schedule_through_its_end_points_only():
    """With the same noise and the same levels it is the same number, not the same on average only."""
    target, totals = mixture(), []
    x = target.sample(6, seed=0)
    for sde in (_Schedule(1.0, 1.0), _Schedule(3.0, 0.3)):
        torch.testing.assert_close(
            sde.log_snr(torch.tensor([0.0, 1.0], dtype=F64)), torch.tensor([10.0, -20.0], dtype=F64)
        )
        totals.append(sd.elbo(target.model(sde), x, seed=5).total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("sde", [sd.RectifiedFlow(t_max=1.0)], ids=name)
def test_a_process_that_ends_in_pure_noise_has_bounds(sde):
    target, x = mixture(), mixture().sample(400, seed=0)
    for function in ESTIMATES:
        result = function(target.model(sde), x, samples=32, seed=1)
        assert off(value_of(result), result.stderr, target.log_prob(x)) < 4
    assert (sd.elbo(target.model(sde), x, steps=20, seed=0).prior == 0).all()
    blind = sd.ScoreModel(target.model(sde).noise, sde, "noise")
    for function, options in ((sd.elbo, {"steps": 3}), (sd.denoising_log_prob, {})):
        with pytest.raises(CapabilityError, match="predicts 'noise' says nothing of the data: use elbo in continuous"):
            function(blind, x, **options)


# The reverse SDE's bound


@pytest.mark.parametrize("t_min", [0.02, 0.3])
def test_the_sde_bound_starts_from_states_at_any_time(t_min):
    sde, target = sd.VP(), scalar_target()
    law = target.marginal(sde, t_min)
    found = integrated(sd.sde_bound, target.model(sde), samples=400, t_min=t_min, prior=target.marginal(sde, 1.0))
    assert (found["value"] - law.log_prob(X[:, None])).abs().max() < 0.01


def test_a_wrong_score_lowers_the_sde_bound_by_its_weighted_square():
    """By `1/2 int E|shift|^2 dlambda` over states from the model's own law."""
    sde, shift, t_min = sd.VP(), 0.2, 0.05
    target = gaussian(3)
    exact = target.model(sde)
    wrong = sd.ScoreModel(lambda x, t: exact.noise(t, x) + shift, sde, "noise", time=lambda t: t)
    x = target.marginal(sde, t_min).sample(2000, seed=0)
    options = {"t_min": t_min, "samples": 16, "seed": 1, "prior": target.marginal(sde, 1.0)}
    loss = sd.sde_bound(exact, x, **options).value - sd.sde_bound(wrong, x, **options).value
    expected = 3 * shift**2 / 2 * (sde.log_snr(t_min) - sde.log_snr(1.0))
    assert expected > 5 * loss.std() / 2000**0.5
    assert abs(loss.mean() - expected) < 4 * loss.std() / 2000**0.5


# The bracket


def test_the_riemann_sums_enclose_the_mean_of_log_p_and_close_with_the_samples():
    sde, target = sd.VP(), mixture()
    x, widths = target.sample(1000, seed=0), []
    truth = target.log_prob(x)
    for samples in (16, 64):
        result = sd.denoising_log_prob(target.model(sde), x, samples=samples, seed=1)
        assert result.lower.mean() < truth.mean() < result.upper.mean()
        assert result.lower.mean() < result.value.mean() < result.upper.mean()
        widths.append((result.upper - result.lower).mean().item())
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


def test_the_sums_are_those_of_the_rows_own_grid():
    """With noise and data integrated, the bracket holds without an error bar, and is as wide as the grid is coarse."""
    sde = sd.EDM()
    steps = 40
    x = MEAN + VARIANCE**0.5 * NODES
    target = scalar_target()
    prior = target.marginal(sde, sde.t_max)
    coarse = integrated(sd.denoising_log_prob, target.model(sde), x, samples=steps, prior=prior)
    low, value, high = ((coarse[part] * WEIGHTS).sum() for part in ("lower", "value", "upper"))
    truth = (target.log_prob(x[:, None]) * WEIGHTS).sum()
    assert low < truth < high
    assert low < value < high
    discrete = integrated(sd.elbo, target.model(sde), x, samples=1, steps=steps, prior=prior)["total"]
    assert abs((discrete * WEIGHTS).sum() - low) < truth - low  # the grid is as fine, but random


def test_the_sums_are_those_of_every_row_s_own_times():
    """A denoiser that says the time, and noise of size 1, leave nothing to chance but the times, which it saw."""
    seen, sde, x = [], sd.VP(t_min=0.01), torch.tensor([[0.3], [-1.2], [2.0]], dtype=F64)

    def network(z, t):
        seen.append(t)
        return t[:, None].expand(z.shape)

    model = sd.ScoreModel(network, sde, "data", time=lambda t: t)
    ones = sd.Recorded(torch.ones(8, 3, 1, dtype=F64))
    found = sd.denoising_log_prob(model, x, samples=6, scale=0.7, seed=0, noise=ones)
    inner, ends = torch.stack(seen[:12:2]), torch.stack(seen[12::2])
    t = torch.cat([inner, ends]).sort(0, descending=True).values
    mmse, snr = (x[:, 0] - t) ** 2, sde.log_snr(t).exp()
    base = -(math.log(2 * math.pi) + 1 - snr[-1].log()) / 2 - snr[0] * x[:, 0] ** 2 / 2
    torch.testing.assert_close(found.lower, base - (mmse[:-1] * snr.diff(dim=0)).sum(0) / 2)
    torch.testing.assert_close(found.upper, base - (mmse[1:] * snr.diff(dim=0)).sum(0) / 2)
    u = torch.log1p(0.49 * snr)
    errors = ((x[:, 0] - inner) ** 2 * (sde.log_snr(inner).exp() + 1 / 0.49)).mean(0)
    torch.testing.assert_close(found.value, base - (u[-1] - u[0]) / 2 * errors)


# Randomness


@pytest.mark.parametrize(("function", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_rows_do_not_depend_on_the_batch_or_on_chunks(function, options):
    model, x = mixture().model(sd.VP()), mixture().sample(70, seed=0)
    whole = function(model, x, samples=4, seed=7, **options)
    part = function(model, x[:5], samples=4, seed=7, **options)
    chunked = function(model, x, samples=4, seed=7, batch_size=9, **options)
    other = function(model, x, samples=4, seed=8, **options)
    for key, value in vars(whole).items():
        if isinstance(value, torch.Tensor) and key not in ("times", "prior", "reconstruction"):
            torch.testing.assert_close(getattr(part, key), value[..., :5], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(getattr(chunked, key), value, rtol=1e-12, atol=1e-12)
            assert (getattr(other, key) != value).all()
    assert whole.nfe == part.nfe == chunked.nfe


def test_every_row_has_times_of_its_own_two_to_a_stratum():
    seen = []

    def network(x, t):
        seen.append(t)
        return 0 * x

    sde = sd.VP()
    sd.elbo(sd.ScoreModel(network, sde, "data", time=lambda t: t), torch.zeros(50, 1, dtype=F64), samples=8, seed=0)
    t = torch.stack([t for t in seen[::2] if len(t.unique()) > 1])  # both signs of the noise; not the data end
    assert t.shape == (8, 50)
    u = torch.log1p(sde.log_snr(t).exp())
    ends = torch.log1p(sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=F64)).exp())
    strata = 4 * (u - ends[0]) / (ends[1] - ends[0])
    assert torch.equal(strata.floor(), torch.arange(4).repeat_interleave(2)[:, None].expand(8, 50).double())
    inside = strata % 1
    assert inside.mean().item() == pytest.approx(0.5, abs=0.06)
    assert len(inside.unique()) == 400


@pytest.mark.parametrize("t_min", [1e-5, 0.3])
@pytest.mark.parametrize(("function", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_standard_error_is_the_spread_over_seeds(function, options, t_min):
    """The same x in 600 rows has 600 seeds. At a late t_min the reconstruction is as uncertain as the integral."""
    target = gaussian(3)
    x = target.sample(1, seed=3).expand(600, 3)
    exact = target.model(sd.VP())
    model = sd.ScoreModel(lambda x, t: exact.view("v", t, x) + 0.5, sd.VP(), "v", time=lambda t: t)  # a poor model
    for samples in (4, 16):
        result = function(model, x, samples=samples, seed=samples, t_min=t_min, **options)
        assert result.stderr.square().mean().sqrt().item() == pytest.approx(value_of(result).std().item(), rel=0.12)


def test_a_single_sample_has_no_error_bar_and_no_seed_follows_the_global_one():
    model, x = mixture().model(sd.VP()), mixture().sample(3, seed=0)
    assert sd.elbo(model, x, steps=2, samples=1, seed=0).stderr.isnan().all()
    torch.manual_seed(1)
    first = sd.elbo(model, x).total
    torch.manual_seed(1)
    assert torch.equal(sd.elbo(model, x).total, first)


@pytest.mark.parametrize("function", ESTIMATES, ids=lambda f: f.__name__)
def test_the_scale_changes_the_error_bar_only(function):
    target, sde = mixture(), sd.VP()
    x = target.marginal(sde, 0.01).sample(400, seed=0)
    law = target.marginal(sde, 0.01)
    for scale in (0.2, 5.0):
        if function is sd.sde_bound:
            result, truth = function(target.model(sde), x, t_min=0.01, samples=32, scale=scale, seed=0), law.log_prob(x)
        else:
            result, truth = function(target.model(sde), x, samples=32, scale=scale, seed=0), target.log_prob(x)
        assert off(value_of(result), result.stderr, truth) < 4
        assert result.settings["scale"] == scale
    retold = sd.ScoreModel(target.model(sde).network, sde, "edm", sigma_data=0.3)
    assert sd.elbo(retold, x[:2], samples=2, seed=0).settings["scale"] == 0.3


# Inputs


@pytest.mark.parametrize("event", [(), (2, 3), (1, 2, 2)], ids=str)
def test_events_of_any_shape_and_float32(event):
    size, sde = math.prod(event), sd.VP()
    target = sd.exact.Gaussian(torch.linspace(-1, 1, size, dtype=F64).reshape(event), 0.3)
    flat = sd.exact.Gaussian(torch.linspace(-1, 1, size, dtype=F64), 0.3)
    x = target.sample(4, seed=0)
    for function in ESTIMATES:
        numbers = torch.randn(200, 4, size, dtype=F64, generator=torch.Generator().manual_seed(0))
        folded = sd.Recorded(numbers.reshape(200, 4, *event))
        result = function(target.model(sde), x, seed=0, noise=folded, prior=target.marginal(sde, 1.0))
        other = function(
            flat.model(sde), x.reshape(4, size), seed=0, noise=sd.Recorded(numbers), prior=flat.marginal(sde, 1.0)
        )
        torch.testing.assert_close(value_of(result), value_of(other))
        single = function(target.model(sde), x.float(), seed=0, noise=folded, prior=target.marginal(sde, 1.0))
        assert value_of(single).dtype == F64
        torch.testing.assert_close(value_of(single), value_of(result), rtol=1e-2, atol=1e-2)


def test_any_prediction_gives_the_same_bound():
    sde, target = sd.CosineVP(), mixture()
    x = target.sample(5, seed=0)
    exact = target.model(sde)
    for function in ESTIMATES:
        expected = value_of(function(exact, x, seed=1))
        for kind in ("noise", "score", "data"):
            told = sd.ScoreModel(lambda x, t, kind=kind: exact.view(kind, t, x), sde, kind, time=lambda t: t)
            torch.testing.assert_close(value_of(function(told, x, seed=1)), expected, rtol=1e-6, atol=1e-6)


def test_the_condition_is_cut_with_the_rows_and_the_network_is_in_evaluation_mode():
    class Network(torch.nn.Module):
        def forward(self, x, t, label):
            assert not self.training
            assert not torch.is_grad_enabled()
            assert len(label) == len(x)
            return label[:, None] * x

    network = Network()
    model, label = sd.ScoreModel(network, sd.VP()), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    x = torch.zeros(3, 2, dtype=F64)
    for function in ESTIMATES:
        whole = function(model, x, condition=label, batch_size=2, seed=0)
        torch.testing.assert_close(value_of(whole), value_of(function(model.given(label), x, seed=0)))
    assert network.training


def test_the_price_and_the_protocol_are_told():
    model, x = mixture().model(sd.VP()), mixture().sample(2, seed=0)
    assert sd.elbo(model, x, samples=6).nfe == 24
    assert sd.elbo(model, x, steps=5, samples=3).nfe == 36
    assert sd.sde_bound(model, x, samples=6).nfe == 12
    result = sd.denoising_log_prob(model, x, samples=6, t_min=0.01, seed=4)
    assert result.nfe == 16
    assert result.settings == {
        "samples": 6, "t_min": 0.01, "t_max": 1.0, "scale": 1.0, "prior": "the SDE's own", "seed": 4
    }  # fmt: skip
    assert sd.elbo(model, x, times=[1.0, 0.5, 0.1], samples=1).settings["steps"] == 2
    assert sd.elbo(model, x).settings["steps"] is None
    assert sd.elbo(model, x).terms is None


BAD = [
    (OptionError, "must be a ScoreModel; got VP", {"model": sd.VP()}),
    (ShapeError, "at least one row; got x with 0 rows", {"x": torch.zeros(0, 2)}),
    (ShapeError, "floating-point dtype", {"x": torch.zeros(2, 2, dtype=torch.long)}),
    (OptionError, "even number of samples, two to a stratum of time; got 3", {"samples": 3}),
    (OptionError, "even number of samples, two to a stratum of time; got 0", {"samples": 0}),
    (OptionError, "scale must be positive, a rough standard deviation of the data; got 0", {"scale": 0.0}),
    (OptionError, "prior must be a Normal, .* got GaussianMixture", {"prior": mixture()}),
    (OptionError, "prior must be a Normal, .* got Uniform", {"prior": torch.distributions.Uniform(0.0, 1.0)}),
    (OptionError, "seed must be a whole number; got 'a'", {"seed": "a"}),
    (TimeError, r"t_min = 2 must lie in \[0, 1\)", {"t_min": 2.0}),
    (TimeError, "no noise at t = 0, where no bound is finite: end later, with t_min", {"t_min": 0.0}),
]


@pytest.mark.parametrize("function", ESTIMATES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("kind", "sentence", "bad"), BAD, ids=lambda v: "" if isinstance(v, type) else str(v)[:30])
def test_bad_input_gets_a_sentence(function, kind, sentence, bad):
    arguments = {"model": mixture().model(sd.VP()), "x": torch.zeros(2, 2, dtype=F64)} | bad
    with pytest.raises(kind, match=sentence):
        function(arguments.pop("model"), arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("kind", "sentence", "bad"),
    [
        (OptionError, "whole number of steps >= 1, or None for continuous time; got 0", {"steps": 0}),
        (OptionError, "whole number of samples >= 1; got 0", {"steps": 2, "samples": 0}),
        (OptionError, "Give either times=", {"steps": 2, "times": [1.0, 0.1]}),
        (TimeError, "strictly decreasing", {"times": [0.1, 1.0]}),
        (TimeError, "times starts at 0.9, but the prior is that of t_max = 1", {"times": [0.9, 0.1]}),
    ],
    ids=str,
)
def test_bad_steps_get_a_sentence(kind, sentence, bad):
    with pytest.raises(kind, match=sentence):
        sd.elbo(mixture().model(sd.VP()), torch.zeros(2, 2, dtype=F64), **bad)


def test_an_error_that_is_not_finite_names_time_and_rows():
    model = sd.ScoreModel(lambda x, t: torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, x), sd.VP())
    x = torch.zeros(5, 2, dtype=F64)
    with pytest.raises(DivergenceError, match=r"NaN or infinite at t = 1e-05, rows 1\. Check the network"):
        sd.elbo(model, x, seed=0)
    with pytest.raises(DivergenceError) as caught:
        sd.sde_bound(model, x, seed=0, batch_size=3)
    assert caught.value.rows == [1]
    assert 0 < caught.value.time < 1


def test_a_row_is_named_by_its_place_in_the_batch_whatever_the_chunks():
    def network(x, t):
        return torch.where(x[:, :1].abs() > 1e6, torch.nan, x)

    x = torch.zeros(6, 2, dtype=torch.float64)
    x[4] = 1e12
    model = sd.ScoreModel(network, sd.VP(), "v")
    for batch_size in (None, 2, 3):
        with pytest.raises(DivergenceError, match=r"rows 4\."):
            sd.elbo(model, x, steps=2, seed=0, batch_size=batch_size)


def test_the_bound_of_the_reverse_sde_counts_what_is_seen_of_the_state_at_the_noise_end():
    """An early noise end, where alpha is not small: the kernel that starts from states at t_min, not from data."""
    sde = sd.VP(t_max=0.4)
    target = sd.exact.Gaussian(torch.tensor([1.5], dtype=F64), 0.3)
    start, prior = target.marginal(sde, 0.2), target.marginal(sde, 0.4)
    x = start.sample(2000, seed=1)
    bound = sd.sde_bound(target.model(sde), x, t_min=0.2, prior=prior, samples=16, seed=0)
    off = (bound.value - start.log_prob(x)).mean()
    error = bound.stderr.square().sum().sqrt() / len(x)
    assert error < 0.01
    assert off.abs() < 4 * error + 1e-4
