"""Denoising score matching: every weighting against its own definition, and the minimum against its closed form."""

import math

import numpy as np
import pytest
import torch
from helpers import fitted_order
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import sdediff as sd
from sdediff.losses import WEIGHTINGS, denoising
from sdediff.model import PREDICTIONS, ScoreModel
from sdediff.testing import gaussian_targets, linear_sdes
from sdediff.times import NUMBERS, Even, LogSNR, Steps, low_discrepancy

F64 = torch.float64


def between(sde, n):
    """`n` times inside the span, even in the process's own clock."""
    ends = sde.clock(torch.tensor([sde.t_min, sde.t_max], dtype=F64)).nan_to_num(neginf=-12.0, posinf=12.0)
    part = torch.linspace(0.2, 0.8, n, dtype=F64)
    return sde.unclock(ends[0] + part * (ends[1] - ends[0]))


def retold(model, kind):
    """The same model through a network that predicts another kind."""
    sde, scale = model.linear, model.sigma_data

    def network(x, t):
        if kind == "edm":
            k = (sde.sigma(t) ** 2 + (sde.alpha(t) * scale) ** 2).sqrt()
            x = sd.over(k, x) * x
        return model.view(kind, t, x)

    return ScoreModel(network, sde, kind, time=lambda t: t, sigma_data=scale)


def cubature(target, rows_of_time):
    """Points `(x0, noise)` over which the mean of any quadratic is its exact expectation (degree 3, 4 D points)."""
    size = len(target.mean)
    root = torch.linalg.cholesky(target.cov)
    points = math.sqrt(2 * size) * torch.cat([torch.eye(2 * size, dtype=F64), -torch.eye(2 * size, dtype=F64)])
    x0, noise = target.mean + points[:, :size] @ root.T, points[:, size:]
    times = rows_of_time.repeat_interleave(len(points))
    n = len(rows_of_time)
    return x0.repeat(n, 1), noise.repeat(n, 1), times


def expected_loss(model, target, t, weighting="simple", times=None):
    """The exact expectation of the loss at every time, for a model that is affine in x."""
    x0, noise, rows = cubature(target, t)
    loss = denoising(model, x0, weighting=weighting, t=rows, times=times, noise=noise)
    return loss.reshape(len(t), -1).mean(1)


# The weightings


def errors(model, t, x0, noise):
    """Squared errors of what the model says of the data, the noise, the score and v, summed over the entries."""
    sde = model.linear
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    xt = alpha * x0 + sigma * noise
    told = {kind: model.view(kind, t, xt) for kind in ("data", "noise", "score", "v")}
    true = {"data": x0, "noise": noise, "score": -noise / sigma, "v": alpha * noise - sigma * x0}
    return {kind: (told[kind] - true[kind]).square().sum(1) for kind in told}


DEFINITIONS = {
    "simple": lambda e, alpha, sigma, g, s_d: e["noise"],
    "noise": lambda e, alpha, sigma, g, s_d: e["noise"],
    "likelihood": lambda e, alpha, sigma, g, s_d: g**2 / 2 * e["score"],
    "snr": lambda e, alpha, sigma, g, s_d: (1 + alpha**2 / sigma**2) * e["data"],
    "min_snr": lambda e, alpha, sigma, g, s_d: (alpha**2 / sigma**2).clamp(max=5) * e["data"],
    "edm": lambda e, alpha, sigma, g, s_d: ((sigma / alpha) ** 2 + s_d**2) / (sigma / alpha * s_d) ** 2 * e["data"],
}


def test_every_weighting_has_a_definition_here():
    assert {*DEFINITIONS, "vlb"} == set(WEIGHTINGS)


@pytest.mark.parametrize("weighting", DEFINITIONS)
@settings(max_examples=20)
@given(linear_sdes(), gaussian_targets(), st.floats(0.2, 2.0), st.sampled_from([*PREDICTIONS]))
def test_the_loss_is_its_definition_for_every_kind_of_prediction(weighting, sde, target, sigma_data, kind):
    """The data is not the model's, so that no error is small by luck."""
    exact = target.model(sde)
    exact = ScoreModel(exact.network, exact.sde, "v", time=exact.time, sigma_data=sigma_data)
    t = between(sde, 6)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, len(target.mean), dtype=F64, generator=generator)
    _, g = sde.rates(t)
    expected = DEFINITIONS[weighting](errors(exact, t, x0, noise), sde.alpha(t), sde.sigma(t), g, sigma_data)
    loss = denoising(retold(exact, kind), x0, weighting=weighting, t=t, noise=noise)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, expected / len(target.mean), rtol=1e-6, atol=1e-9)


@settings(max_examples=20)
@given(linear_sdes(), gaussian_targets(), st.sampled_from([*PREDICTIONS]))
def test_a_step_of_vlb_weighs_the_error_of_the_data_by_half_the_drop_of_the_snr(sde, target, kind):
    """Divided by the length of the step: the mean over `Steps` brings it back."""
    grid = between(sde, 6)
    x0, noise = torch.randn(2, 5, len(target.mean), dtype=F64, generator=torch.Generator().manual_seed(0))
    exact, snr = target.model(sde), sde.log_snr(grid).exp()
    expected = (snr[:-1] - snr[1:]) / (2 * grid.diff()) * errors(exact, grid[1:], x0, noise)["data"]
    loss = denoising(retold(exact, kind), x0, weighting="vlb", times=Steps(grid), t=grid[1:], noise=noise)
    torch.testing.assert_close(loss, expected / len(target.mean), rtol=1e-6, atol=1e-9)


def test_vlb_on_a_chain_is_the_weight_of_ddpm():
    """`b^2 / (2 v a (1 - abar))` on the error of the noise, v the posterior variance; per step, N times per unit t."""
    betas = torch.linspace(1e-3, 0.2, 12, dtype=F64)
    chain, a_bar = sd.DiscreteVP(betas), (1 - betas).cumprod(0)
    v = betas[1:] * (1 - a_bar[:-1]) / (1 - a_bar[1:])
    weight = betas[1:] ** 2 / (2 * v * (1 - betas[1:]) * (1 - a_bar[1:]))
    model = ScoreModel(lambda x, t: torch.zeros_like(x), chain)
    x0, noise = torch.randn(2, 11, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    loss = denoising(model, x0, weighting="vlb", t=torch.arange(2, 13, dtype=F64) / 12, noise=noise)
    torch.testing.assert_close(loss, 12 * weight * noise.square().mean(1), rtol=1e-8, atol=0)


def diffusion_term(model, target, grid):
    """`D (t_max - t_min)` times the expected loss of "vlb", which is the sum of the bound's KL terms, in nats."""
    law = Steps(grid)
    loss = expected_loss(model, target, law.of(model.linear)[1:], "vlb", times=law)
    share = law.weight(model.linear, law.of(model.linear)[1:])
    return (loss * share).mean() * len(target.mean) * (law.of(model.linear)[-1] - law.of(model.linear)[0])


@settings(max_examples=15)
@given(sde=linear_sdes(), target=gaussian_targets())
def test_vlb_tends_to_likelihood_as_the_grid_is_refined_at_first_order(sde, target):
    """From above (Kingma et al.): finer steps tighten the bound. Even steps in log SNR: the sum has a smooth limit."""
    ends = between(sde, 2)
    limit = likelihood_between(target, sde, ends)
    steps = [16, 32, 64]
    levels = sde.log_snr(ends)
    values = [
        diffusion_term(
            target.model(sde), target, sde.time(levels[0] + torch.linspace(0, 1, n + 1) * (levels[1] - levels[0]))
        )
        for n in steps
    ]
    gaps = torch.stack(values) - limit
    assert bool((gaps > 0).all())
    assert 0.85 < fitted_order(gaps.tolist(), steps) < 1.3


@pytest.mark.parametrize("sde", [sd.VP(t_min=1e-3), sd.DiscreteVP(torch.linspace(0.01, 0.3, 8))], ids=["VP", "chain"])
def test_vlb_sums_to_the_diffusion_term_of_the_bound(sde):
    """`elbo` over data against the loss's expectation, whole and step by step; 4.5 standard errors over 4000 rows."""
    target = sd.exact.Gaussian(torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 0.1], dtype=F64))
    exact = target.model(sde)
    off = ScoreModel(lambda x, t: exact.noise(t, x) + 0.1 - 0.05 * x, sde, time=lambda t: t)
    grid = getattr(sde, "times", sd.grids.log_snr(sde, 7))
    bound = sd.elbo(off, target.sample(4000, seed=0), times=grid, samples=1, seed=1)
    rising = Steps(grid).of(sde)
    terms = expected_loss(off, target, rising[1:], "vlb", times=Steps(grid)) * 2 * rising.diff()
    for got, wanted in [*zip(bound.terms, terms.flip(0), strict=True), (bound.diffusion, terms.sum())]:
        assert abs(got.mean() - wanted) < 4.5 * got.std() / math.sqrt(4000)
    torch.testing.assert_close(diffusion_term(off, target, grid), terms.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["likelihood", "vlb"])
def test_the_mean_over_the_weighting_s_own_times_is_the_bound_in_nats(weighting):
    """40,000 drawn rows against the closed form; 4.5 standard errors."""
    sde, n = sd.VP(t_min=1e-3), 40_000
    target = sd.exact.Gaussian(torch.tensor([0.4], dtype=F64), 0.6)
    loss = denoising(
        target.model(sde), target.sample(n, seed=0), weighting=weighting, generator=torch.Generator().manual_seed(1)
    ) * (sde.t_max - sde.t_min)  # fmt: skip
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=F64)
    wanted = likelihood_between(target, sde, ends) if weighting == "likelihood" else diffusion_term(
        target.model(sde), target, None
    )  # fmt: skip
    assert abs(loss.mean() - wanted) < 4.5 * loss.std() / math.sqrt(n)


def test_snr_weighting_is_the_error_of_v_for_a_variance_preserving_process():
    sde, target = sd.CosineVP(), sd.exact.Gaussian(torch.tensor([0.3, -1.0], dtype=F64), 0.5)
    t = between(sde, 5)
    x0, noise = torch.randn(2, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    loss = denoising(target.model(sde), x0, weighting="snr", t=t, noise=noise)
    torch.testing.assert_close(loss, errors(target.model(sde), t, x0, noise)["v"] / 2)


def test_min_snr_is_one_where_the_snr_is_below_five_and_five_over_it_above():
    model = ScoreModel(lambda x, t: torch.zeros_like(x), sd.EDM())
    t = torch.tensor([0.1, 0.4, 0.447, 0.448, 2.0], dtype=F64)
    x0 = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    ratio = denoising(model, x0, weighting="min_snr", t=t, noise=x0) / denoising(model, x0, t=t, noise=x0)
    torch.testing.assert_close(ratio, torch.tensor([0.05, 0.8, 5 * 0.447**2, 1, 1], dtype=F64))


@settings(max_examples=15)
@given(sde=linear_sdes(), event=st.sampled_from([(), (4,), (2, 3, 2)]))
def test_the_loss_of_events_of_any_shape_is_the_mean_over_their_entries(sde, event):
    """A network that says zero noise has the mean square of the noise as its simple loss, row by row."""
    model = ScoreModel(lambda x, t: torch.zeros_like(x), sde)
    x0, noise = torch.randn(2, 5, *event, dtype=F64, generator=torch.Generator().manual_seed(3))
    loss = denoising(model, x0, t=between(sde, 5), noise=noise)
    torch.testing.assert_close(loss, noise.reshape(5, -1).square().mean(1))


# The minimum


@settings(max_examples=20)
@given(sde=linear_sdes(), target=gaussian_targets())
def test_the_exact_model_s_loss_is_the_closed_form_minimum(sde, target):
    """`E |eps - E[eps | x]|^2 / D = tr[alpha^2 S (alpha^2 S + sigma^2)^-1] / D`, exactly, by cubature."""
    times = between(sde, 4)
    loss = expected_loss(target.model(sde), target, times)
    for value, t in zip(loss, times, strict=True):
        signal = sde.alpha(t) ** 2 * target.cov
        total = signal + sde.sigma(t) ** 2 * torch.eye(len(signal), dtype=F64)
        minimum = torch.linalg.solve(total, signal).diagonal().mean()
        torch.testing.assert_close(value, minimum, rtol=1e-7, atol=1e-10)


@settings(max_examples=15)
@given(sde=linear_sdes(), target=gaussian_targets(), shift=st.floats(-1, 1), tilt=st.floats(-0.5, 0.5))
def test_any_other_model_loses_by_its_squared_distance_from_the_exact_one(sde, target, shift, tilt):
    """So the exact model is the minimiser: `E loss(model) = E loss(exact) + E |model - exact|^2 / D`."""
    exact = target.model(sde)
    other = ScoreModel(lambda x, t: exact.noise(t, x) + shift + tilt * x, sde, time=lambda t: t)
    times = between(sde, 3)
    x0, noise, t = cubature(target, times)
    xt = sde.perturb(t, x0, noise)
    gap = (shift + tilt * xt).square().mean(1).reshape(3, -1).mean(1)
    torch.testing.assert_close(
        expected_loss(other, target, times), expected_loss(exact, target, times) + gap, rtol=1e-7, atol=1e-9
    )


def test_the_minimum_holds_over_random_draws():
    """The drawn times, data and noise together, against the integral of the closed form: 5 standard errors."""
    sde, variance, n = sd.VP(), 0.6, 40_000
    target = sd.exact.Gaussian(torch.tensor([0.4], dtype=F64), variance)
    loss = denoising(target.model(sde), target.sample(n, seed=0), generator=torch.Generator().manual_seed(1))
    t = sde.t_min + (torch.arange(100_000, dtype=F64) + 0.5) / 100_000 * (sde.t_max - sde.t_min)
    signal = sde.alpha(t) ** 2 * variance
    minimum = (signal / (signal + sde.sigma(t) ** 2)).mean()
    assert abs(loss.mean() - minimum) < 5 * loss.std() / math.sqrt(n)


def likelihood_between(target, sde, ends):
    """The exact model's diffusion term in continuous time, in nats: `I(x_0; x_s) - I(x_0; x_t)`."""
    snr = sde.log_snr(ends).exp()[:, None, None]
    information = torch.linalg.slogdet(torch.eye(len(target.mean), dtype=F64) + snr * target.cov).logabsdet / 2
    return information[0] - information[1]


@settings(max_examples=12)
@given(sde=linear_sdes(), target=gaussian_targets())
def test_likelihood_weighting_integrates_to_the_information_between_two_times(sde, target):
    """`D int_s^t loss du = I(x_0; x_s) - I(x_0; x_t)`, `I = log det(1 + snr S) / 2`: the bound's own terms, in nats."""
    ends = between(sde, 2)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(120))
    log_t = ends[0].log() + (nodes + 1) / 2 * (ends[1] / ends[0]).log()
    loss = expected_loss(target.model(sde), target, log_t.exp(), "likelihood") * len(target.mean)
    integral = (weights * loss * log_t.exp()).sum() * (ends[1] / ends[0]).log() / 2
    # a chain's schedule has kinks inside, where quadrature is second order
    loose = 5e-3 if isinstance(sde, sd.DiscreteVP) else 1e-6
    torch.testing.assert_close(integral, likelihood_between(target, sde, ends), rtol=loose, atol=1e-8)


# Times


class _Spy:
    """A network that keeps what it was given."""

    def __call__(self, x, t, *condition):
        self.x, self.t, self.condition = x, t, condition
        return torch.zeros_like(x)


@settings(max_examples=30)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_low_discrepancy_numbers_are_a_shifted_grid(n, seed):
    u = low_discrepancy(n, generator=torch.Generator().manual_seed(seed))
    assert u.dtype == F64
    assert u.shape == (n,)
    assert bool(((u >= 0) & (u < 1)).all())
    cells = (u * n).floor().long()
    assert sorted(cells.tolist()) == list(range(n)), "one number in every cell of width 1 / n"
    torch.testing.assert_close(u * n - cells, (u * n - cells)[:1].expand(n), rtol=0, atol=1e-9)


def test_each_low_discrepancy_number_is_uniform():
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([low_discrepancy(4, generator=generator) for _ in range(4000)])
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-7


@pytest.mark.parametrize("weighting", ["simple", "noise", "snr", "min_snr"])
@pytest.mark.parametrize("sde", [sd.VP(t_min=0.4), sd.VE(), sd.RectifiedFlow(), sd.EDM(sigma_min=9.0)])
def test_drawn_times_are_even_over_the_span(weighting, sde):
    spy, n = _Spy(), 64
    model = ScoreModel(spy, sde)
    denoising(model, torch.zeros(n, 2, dtype=F64), weighting=weighting, generator=torch.Generator().manual_seed(0))
    t = spy.t.sort().values
    torch.testing.assert_close(t.diff(), torch.full((n - 1,), (sde.t_max - sde.t_min) / n, dtype=F64))
    assert sde.t_min <= t[0] < sde.t_min + (sde.t_max - sde.t_min) / n


@pytest.mark.parametrize("sde", [sd.EDM(), sd.VP(), sd.VE(sigma_min=0.002)])
def test_edm_times_are_log_normal_in_sigma_over_alpha(sde):
    """Mean -1.2, standard deviation 1.2; stratified: one time in each of n equally likely cells."""
    spy, n = _Spy(), 200
    model = ScoreModel(spy, sde)
    denoising(model, torch.zeros(n, 2, dtype=F64), weighting="edm", generator=torch.Generator().manual_seed(0))
    log_s = -sde.log_snr(spy.t) / 2
    ends = -sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=F64)) / 2
    low, high = stats.norm.cdf(ends.numpy(), loc=-1.2, scale=1.2)
    u = (torch.from_numpy(stats.norm.cdf(log_s.numpy(), loc=-1.2, scale=1.2)) - low) / (high - low)
    assert sorted((u * n).floor().long().tolist()) == list(range(n))


def test_edm_times_stay_in_a_span_that_holds_only_part_of_them():
    """They are those of the normal that lie in it."""
    sde, spy, n = sd.EDM(sigma_min=0.2, sigma_max=0.5), _Spy(), 1000
    denoising(ScoreModel(spy, sde), torch.zeros(n, 1, dtype=F64), weighting="edm")
    assert 0.2 <= spy.t.min() < 0.2005
    assert 0.499 < spy.t.max() <= 0.5
    low, middle, high = stats.norm.cdf(np.log([0.2, 0.3, 0.5]), loc=-1.2, scale=1.2)
    assert (spy.t < 0.3).double().mean().item() == pytest.approx((middle - low) / (high - low), abs=1.5 / n)


# Draws and inputs


def test_the_generator_governs_times_and_noise_and_none_follows_the_global_seed():
    sde, x0 = sd.VP(), torch.randn(9, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    model = ScoreModel(lambda x, t: x, sde)
    first, second, other = (denoising(model, x0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(denoising(model, x0), first)


def test_drawn_noise_is_standard_normal_and_independent_of_time():
    spy, n = _Spy(), 50_000
    denoising(ScoreModel(spy, sd.EDM()), torch.zeros(n, 1, dtype=F64), generator=torch.Generator().manual_seed(3))
    noise = (spy.x[:, 0] / spy.t).double()
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-9
    time = (spy.t - spy.t.mean()) / spy.t.std()
    assert abs((noise * time).mean().item()) < 5 / math.sqrt(n)


def test_the_condition_reaches_the_network_and_so_does_the_model_s_own():
    spy, label = _Spy(), torch.tensor([3, 1, 4])
    model, x0 = ScoreModel(spy, sd.VP()), torch.zeros(3, 2, dtype=F64)
    denoising(model, x0, condition=label)
    assert spy.condition[0] is label
    denoising(model.given("fixed"), x0)
    assert spy.condition == ("fixed",)
    denoising(model, x0)
    assert spy.condition == ()


def test_float32_data_has_the_loss_of_float64_data():
    target = sd.exact.Gaussian(torch.tensor([0.3, -1.0], dtype=F64), 0.5)
    t = torch.tensor([0.001, 0.1, 0.9], dtype=F64)
    x0, noise = torch.randn(2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    for weighting in DEFINITIONS:
        wide = denoising(target.model(sd.VP()), x0, weighting=weighting, t=t, noise=noise)
        single = denoising(target.model(sd.VP()), x0.float(), weighting=weighting, t=t, noise=noise.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), wide, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_network_and_are_those_of_the_definition():
    """d/dc of mean |c x - eps|^2 for a network `c x` on `x = t eps` (EDM, zero data): 2 (c t - 1) t eps^2."""
    c = torch.tensor(0.7, dtype=F64, requires_grad=True)
    t, noise = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([[1.0], [-3.0]], dtype=F64)
    denoising(ScoreModel(lambda x, t: c * x, sd.EDM()), 0 * noise, t=t, noise=noise).mean().backward()
    torch.testing.assert_close(c.grad, (2 * (0.7 * t - 1) * t * noise[:, 0] ** 2).mean())


@pytest.mark.parametrize("law", [None, Even(), LogSNR()], ids=["own", "even", "log_snr"])
@pytest.mark.parametrize("weighting", ["simple", "likelihood", "snr", "edm"])
def test_gradients_in_a_learned_schedule_are_those_of_the_expectation(weighting, law, monkeypatch):
    """Against central differences of the mean by the midpoint rule of 4000 times, which move with the schedule."""
    monkeypatch.setitem(NUMBERS, "low_discrepancy", lambda n, generator: (torch.arange(n, dtype=F64) + 0.5) / n)
    sde = sd.LearnedVP(gamma_min=-6.0, gamma_max=4.0)
    model = ScoreModel(lambda x, t: 2 * x, sde)
    x0 = torch.ones(4000, 1, dtype=F64)

    def mean():
        return denoising(model, x0, weighting=weighting, times=law, noise=0.8 * x0).mean()

    places = [(sde.ends, 0), (sde.ends, 1), (sde.curve.log_heights, 0)]
    slopes = torch.autograd.grad(mean(), [sde.ends, sde.curve.log_heights])
    for (parameter, i), slope in zip(places, [slopes[0][0], slopes[0][1], slopes[1][0]], strict=True):
        sides = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter[i] += step
                sides.append(mean())
                parameter[i] -= step
        assert slope.item() == pytest.approx(((sides[0] - sides[1]) / 2e-3).item(), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", [kind for kind in PREDICTIONS if kind != "edm"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_loss_is_finite_and_continuous_where_no_data_is_left(kind, weighting):
    """At alpha = 0 an error of v, of the flow or of the data is none of the noise."""
    sde = sd.RectifiedFlow(t_max=1.0)
    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    model = ScoreModel(lambda x, t: scale * x, sde, kind)
    x0, noise = torch.randn(2, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    at_end, before = (denoising(model, x0, weighting=weighting, t=t, noise=noise) for t in (1.0, 1 - 1e-8))
    torch.testing.assert_close(at_end, before, rtol=1e-6, atol=1e-6)
    assert bool((at_end > 0).all()) == (kind in ("noise", "score"))
    assert torch.autograd.grad(at_end.sum(), scale)[0].isfinite()


@pytest.mark.parametrize(
    ("weighting", "sde", "t", "place"),
    [
        ("snr", sd.RectifiedFlow(t_max=1.0), 1.0, "t = 1"),
        ("edm", sd.RectifiedFlow(t_max=1.0), 1.0, "t = 1"),
        ("vlb", sd.VP(t_min=0.0), 0.001, "t = 0.001"),
        ("likelihood", sd.VP(t_min=0.0), 0.0, "t = 0"),
    ],
)
def test_an_infinite_weight_is_refused_and_its_time_named(weighting, sde, t, place):
    model = ScoreModel(lambda x, t: x, sde, "v")
    with pytest.raises(sd.TimeError, match=f"'{weighting}' is not finite at {place} of .*weighting='simple'"):
        denoising(model, torch.zeros(3, 2), weighting=weighting, t=t)


def test_a_loss_of_no_rows_is_refused():
    with pytest.raises(sd.ShapeError, match=r"at least one row; got data of shape \(0, 2\)"):
        denoising(ScoreModel(lambda x, t: x, sd.VP()), torch.zeros(0, 2))
