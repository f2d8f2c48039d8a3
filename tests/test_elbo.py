"""The ELBO of diffusion models: any reverse variance, two decompositions, all forms of a term, its rise to log p.

On Gaussian data the expectation of a bound over data and noise is a mean over the points of a cubature, exactly: every
part is quadratic in both. The closed forms are sums over eigen-directions of the covariance, with
`mmse = lambda / (1 + lambda snr)`.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers import NAMED, TwoFunctions, fitted_order, name
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.model import PREDICTIONS
from sdediff.testing import strategies
from sdediff.variance import EntryVariance, ReverseSteps, StepVariance, variance_of

F64 = torch.float64
ALL = [*NAMED, TwoFunctions()]
EIGEN = torch.tensor([0.09, 0.8], dtype=F64)
ROTATION = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=F64)
TARGET = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), ROTATION @ EIGEN.diag() @ ROTATION.T)


def mixture():
    means = torch.tensor([[-1.0, 0.0], [1.0, 1.0]], dtype=F64)
    return sd.exact.GaussianMixture(torch.tensor([1.0, 2.0]), means, torch.tensor([[0.02, 0.3], [0.2, 0.05]]))


@dataclass(frozen=True)
class Known(StepVariance):
    """The best single number for Gaussian data with these eigenvalues."""

    eigen: tuple[float, ...] = tuple(EIGEN.tolist())

    def table(self, steps):
        at = steps.at[:-1]
        left = torch.stack([e * at.sigma**2 / (at.alpha**2 * e + at.sigma**2) for e in self.eigen]).mean(0)
        return steps.nu**2 + steps.gain**2 * left


@dataclass(frozen=True)
class ByEntry(EntryVariance):
    """Another variance, as a network would give it: one number a step, times one number an entry."""

    of: StepVariance
    factors: tuple[float, ...] = (1.0, 1.0)

    def along(self, model, steps):
        values, factors = self.of.table(steps), torch.tensor(self.factors, dtype=F64)
        return model, lambda i, x: (values[i] * factors).expand(x.shape)


VARIANCES = ["posterior", "beta", Known()]


def chain_of(sde, times):
    return ReverseSteps.to_data(TARGET.model(sde).point(torch.as_tensor(times, dtype=F64)))


def table_of(variance, chain):
    table = variance_of(variance, "the test").table(chain)
    if not table[-1] > 0:
        table[-1] = (chain.at.sigma[-2] / chain.at.alpha[-2]) ** 2
    return table


def expected(function, sde, target=TARGET, *, draws, samples=1, **options):
    """The bound in expectation over data and noise, for a model that is affine in x."""
    size = len(target.mean)
    root = torch.linalg.cholesky(target.cov)
    ends = math.sqrt(size) * torch.cat([torch.eye(size, dtype=F64), -torch.eye(size, dtype=F64)])
    points = math.sqrt(draws * size) * torch.eye(draws * size, dtype=F64).reshape(-1, draws, size)
    x = (target.mean + ends @ root.T).repeat_interleave(len(points), 0)
    numbers = points.repeat(len(ends), 1, 1).transpose(0, 1)
    asked = samples * (2 + (options.get("steps") or len(options.get("times", ()))))
    noise = sd.Recorded(numbers.repeat(-(-asked // draws), 1, 1))
    options.setdefault("prior", target.marginal(sde, sd.as_linear(sde).t_max))
    result = function(target.model(sde), x, samples=samples, noise=noise, seed=0, **options)
    return result, {
        part: value.mean(-1)
        for part, value in vars(result).items()
        if isinstance(value, torch.Tensor) and part not in ("times", "stderr")
    }


def closed_form(sde, times, variance, eigen=EIGEN):
    """`(reconstruction, prior, terms)` of Gaussian data with its exact model and prior, over data and noise."""
    chain = chain_of(sde, times)
    V = table_of(variance, chain)[:, None]
    snr = (chain.at.alpha[:-1] / chain.at.sigma[:-1])[:, None] ** 2
    best = chain.nu[:, None] ** 2 + chain.gain[:, None] ** 2 * eigen / (1 + eigen * snr)
    terms = (best[:-1] / V[:-1] - 1 + (V[:-1] / chain.nu[:-1, None] ** 2).log()).sum(1) / 2
    reconstruction = -((2 * math.pi * V[-1]).log() + best[-1] / V[-1]).sum() / 2
    return reconstruction, (1 + eigen * snr[0]).log().sum() / 2, terms


def entropy(eigen=EIGEN):
    """`-E log p(x)`."""
    return ((2 * math.pi * eigen).log() + 1).sum() / 2


def gap_of(sde, times, variance, eigen=EIGEN):
    """`E log p(x) - E bound`, step by step: what each kernel misses of the true one, `KL(N(., V*) || N(., V))`."""
    chain = chain_of(sde, times)
    snr = (chain.at.alpha[:-1] / chain.at.sigma[:-1])[:, None] ** 2
    best = chain.nu[:, None] ** 2 + chain.gain[:, None] ** 2 * eigen / (1 + eigen * snr)
    excess = best / table_of(variance, chain)[:, None] - 1
    return (excess - torch.log1p(excess)).sum(1) / 2


# Any variance


@pytest.mark.parametrize("variance", VARIANCES, ids=name)
@pytest.mark.parametrize("sde", ALL, ids=name)
def test_with_any_variance_the_bound_is_its_closed_form(sde, variance):
    for steps in (1, 4):
        result, found = expected(sd.elbo, sde, draws=1, steps=steps, variance=variance)
        reconstruction, prior, terms = closed_form(sde, result.times, variance)
        torch.testing.assert_close(found["terms"], terms, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found["reconstruction"], reconstruction, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found["prior"], prior, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found["total"], reconstruction - prior - terms.sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance", VARIANCES[1:], ids=name)
@pytest.mark.parametrize("sde", ALL, ids=name)
def test_a_variance_of_every_entry_has_the_bound_of_the_same_of_every_step(sde, variance):
    entries = ByEntry(variance_of(variance, "the test"))
    _, one = expected(sd.elbo, sde, draws=1, steps=3, variance=variance)
    _, other = expected(sd.elbo, sde, draws=1, steps=3, variance=entries)
    for part, value in one.items():
        torch.testing.assert_close(other[part], value, rtol=1e-7, atol=1e-8)


def test_a_variance_that_differs_between_entries_is_the_divergence_of_their_gaussians():
    """Against torch's own divergence of the two kernels, and its own log-density, with the same numbers."""
    sde, target, factors = sd.VP(), mixture(), (0.7, 1.9)
    model, x = target.model(sde), target.sample(5, seed=0)
    numbers = torch.randn(4, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1.0, 0.6, 0.2, 0.05], dtype=F64)
    variance = ByEntry(Known(), factors)
    # with a vanishing scale nothing of the noise is taken off
    found = sd.elbo(model, x, times=times, samples=1, variance=variance, noise=sd.Recorded(numbers), scale=1e-9, seed=0)
    V = Known().table(ReverseSteps.to_data(model.point(times)))[:, None] * torch.tensor(factors, dtype=F64)
    signs = (1, -1)
    terms = torch.zeros(3, 5, dtype=F64)
    for sign in signs:
        for i in range(3):
            z = sde.perturb(times[i], x, sign * numbers[1 + i])
            mean_q, std = sde.posterior(times[i + 1], times[i], x, z)
            mean_p, _ = sde.posterior(times[i + 1], times[i], model.denoised(times[i], z), z)
            q = torch.distributions.Normal(mean_q, std)
            p = torch.distributions.Normal(mean_p, V[i].sqrt())
            terms[i] += torch.distributions.kl_divergence(q, p).sum(1) / 2
    decoders = [
        torch.distributions.Normal(model.denoised(times[3], sde.perturb(times[3], x, sign * numbers[0])), V[3].sqrt())
        for sign in signs
    ]
    torch.testing.assert_close(found.terms, terms, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.reconstruction, sum(d.log_prob(x).sum(1) for d in decoders) / 2)


@pytest.mark.parametrize("variance", ["posterior", "beta", Known(), ByEntry(Known(), (0.5, 1.5))], ids=name)
def test_the_standard_error_and_what_is_taken_off(variance):
    """The same x in 600 rows has 600 seeds; the scale changes the spread, not the mean."""
    sde, x = sd.VP(), TARGET.sample(1, seed=3).expand(600, 2)
    totals = []
    for scale in (0.5, 2.0):
        # a grid is given, as that of `steps` depends on the scale
        options = {"times": sd.grids.log_snr(sde, 5, t_min=0.01), "samples": 8, "scale": scale, "variance": variance}
        result = sd.elbo(TARGET.model(sde), x, seed=1, **options)
        assert result.stderr.square().mean().sqrt().item() == pytest.approx(result.total.std().item(), rel=0.12)
        totals.append(result)
    error = sum(r.stderr.square().mean() / 600 for r in totals).sqrt()
    assert abs(totals[0].total.mean() - totals[1].total.mean()) < 4 * error
    assert totals[0].total.std() != totals[1].total.std()


def test_what_is_taken_off_is_most_of_the_variance_of_small_steps():
    """For a variance of entries too: against a vanishing scale, with which nothing is taken off."""
    sde, x = sd.VP(), TARGET.sample(1, seed=3).expand(300, 2)
    times = sd.grids.log_snr(sde, 30, t_min=0.001)
    for variance in ("posterior", ByEntry(Known())):
        spreads = [
            sd.elbo(TARGET.model(sde), x, times=times, samples=4, scale=scale, variance=variance, seed=0).total.var()
            for scale in (0.6, 1e-9)
        ]
        assert spreads[0] < 0.2 * spreads[1]


def test_the_decoder_of_each_variance_is_the_last_kernel_of_the_chain():
    sde, times = sd.VE(), torch.tensor([1.0, 0.5, 0.1], dtype=F64)
    chain = chain_of(sde, times)
    assert (chain.at.alpha[-1], chain.at.sigma[-1], chain.at.t[-1]) == (1, 0, 0)
    assert (chain.nu[-1], chain.kept[-1], chain.gain[-1], chain.fresh[-1]) == (0, 0, 1, 1)
    torch.testing.assert_close(
        variance_of("beta", "")._fixed and table_of("beta", chain)[-1], sde.sigma(times[-1]) ** 2
    )
    left = EIGEN / (1 + EIGEN * sde.log_snr(times[-1]).exp())
    torch.testing.assert_close(Known().table(chain)[-1], left.mean())


# The rise to log p

TIMES = {1: 0, 10: 0, 100: 0, 1000: 0}


@pytest.mark.parametrize("sde", [sd.VP(t_min=0.01), sd.EDM(sigma_min=0.1)], ids=name)
def test_the_bound_rises_to_log_p_at_rate_one_over_steps_but_for_the_decoder(sde):
    """`E log p - ELBO(T) = decoder + c / T + O(1 / T^2)`; c and the decoder's part are known."""
    gaps, totals = {}, []
    for steps in TIMES:
        result, found = expected(sd.elbo, sde, draws=1, steps=steps)
        gap = gap_of(sde, result.times, "posterior")
        assert (-entropy() - found["total"] - gap.sum()).abs() < 1e-8
        gaps[steps] = gap[:-1].sum().item()
        totals.append(found["total"])
        snr = sde.log_snr(result.times[-1]).exp()
        ratio = EIGEN * snr / (1 + EIGEN * snr)  # mmse / s^2
        decoder = (ratio - 1 - ratio.log()).sum() / 2
        torch.testing.assert_close(gap[-1], decoder)
        assert decoder > 1e-4
    assert totals[0] < totals[1] < totals[2] < totals[3] < -entropy()
    # c: with v = log(1 + lambda snr), c = 1/4 int (dv / dw)^2 dw over the unit interval w of the grid
    w = torch.linspace(0, 1, 20_001, dtype=F64)[:, None]
    ends = torch.log1p(sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=F64)).exp())
    u = ends[0] + w * (ends[1] - ends[0])
    v = torch.log1p(EIGEN * torch.expm1(u))
    constant = (v.diff(dim=0) / w.diff(dim=0)).square().mean(0).sum().item() / 4
    assert gaps[1000] * 1000 == pytest.approx(constant, rel=0.02)
    assert abs(gaps[1000] * 1000 - constant) < 0.2 * abs(gaps[100] * 100 - constant)
    assert fitted_order([gaps[100], gaps[1000]], [100, 1000]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sde", [sd.VP(t_min=0.01), sd.EDM(sigma_min=0.1)], ids=name)
def test_with_random_data_and_noise_the_bound_is_its_closed_form_within_its_errors(sde):
    x = TARGET.sample(400, seed=0)
    prior = TARGET.marginal(sde, sde.t_max)
    for steps, rows in ((1, 400), (10, 400), (100, 100)):
        for variance in VARIANCES:
            result = sd.elbo(
                TARGET.model(sde), x[:rows], steps=steps, variance=variance, prior=prior, samples=2, seed=steps
            )
            reconstruction, prior_kl, terms = closed_form(sde, result.times, variance)
            off = result.total.mean() - (reconstruction - prior_kl - terms.sum())
            assert off.abs() < 4 * result.total.std() / rows**0.5


@pytest.mark.parametrize("sde", ALL, ids=name)
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_with_the_best_variance_every_number_of_steps_is_exact_on_isotropic_data(sde, steps):
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), 0.4)
    _, found = expected(sd.elbo, sde, target, draws=1, steps=steps, variance=Known((0.4,)))
    assert (found["total"] + entropy(torch.full((2,), 0.4, dtype=F64))).abs() < 1e-6


@pytest.mark.parametrize("sde", [sd.VP(t_min=0.01), sd.EDM(sigma_min=0.1)], ids=name)
def test_one_number_a_step_misses_the_ratio_of_arithmetic_and_geometric_mean(sde):
    """`D/2 log(mean / geometric mean)` of the best variances of the directions, for every step."""
    inner = []
    for steps in (10, 100, 1000):
        result, found = expected(sd.elbo, sde, draws=1, steps=steps, variance=Known())
        chain = chain_of(sde, result.times)
        best = torch.stack([Known((e,)).table(chain) for e in EIGEN.tolist()])
        gap = (best.mean(0).log() - best.log().mean(0)) * len(EIGEN) / 2
        assert (-entropy() - found["total"] - gap.sum()).abs() < 1e-8
        assert gap.sum() < gap_of(sde, result.times, "posterior").sum()
        assert gap.sum() < gap_of(sde, result.times, "beta").sum()
        inner.append(gap[:-1].sum().item())
    assert fitted_order(inner[1:], [100, 1000]) == pytest.approx(1, abs=0.1)


def test_the_continuous_form_has_the_gap_of_the_decoder_only():
    sde = sd.VP(t_min=0.01)
    x = TARGET.sample(500, seed=0)
    result = sd.elbo(TARGET.model(sde), x, samples=64, prior=TARGET.marginal(sde, 1.0), seed=1)
    snr = sde.log_snr(torch.tensor([sde.t_min], dtype=F64)).exp()
    error = (x - TARGET.mean) @ ROTATION / (1 + EIGEN * snr)  # in expectation over the noise, for every x
    mmse = error**2 + EIGEN**2 * snr / (1 + EIGEN * snr) ** 2
    decoder = -(snr * mmse).sum(1) / 2 - (2 * math.pi / snr).log()
    # what x has of log N(alpha x; marginal at t_min), and so the whole integral, is known
    law = TARGET.marginal(sde, sde.t_min)
    alpha, sigma = sde.alpha(sde.t_min), sde.sigma(sde.t_min)
    spent = (
        -law.log_prob(alpha * x)
        + sigma**2 / 2 * (1 / law.variances).sum()
        - (1 + math.log(2 * math.pi))
        - 2 * math.log(sigma)
    )
    off = result.total - (decoder - spent)
    assert off.mean().abs() < 4 * (result.stderr.square().sum().sqrt() / 500)
    ratio = EIGEN * snr / (1 + EIGEN * snr)
    gap = (ratio - 1 - ratio.log()).sum() / 2
    missing = TARGET.log_prob(x).mean() - (decoder - spent).mean()
    assert missing.item() == pytest.approx(gap.item(), abs=0.01)


def test_the_discrete_bound_tends_to_the_continuous_one_at_rate_one_over_steps():
    """With the noise integrated, the sum over steps is a left Riemann sum of the integral in log(1 + snr)."""
    sde, steps = sd.CosineVP(t_min=0.05), [50, 100, 200]
    snr = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=F64)).exp()[:, None]
    integral = torch.log1p(EIGEN * snr).diff(dim=0).sum().item() / 2
    errors = [expected(sd.elbo, sde, draws=1, steps=n)[1]["diffusion"].item() - integral for n in steps]
    assert errors[0] > errors[2] > 0
    assert fitted_order(errors, steps) == pytest.approx(1, abs=0.03)


def test_what_the_prior_misses_is_in_its_term():
    """`KL(p_T || prior)` and no more separates the SDE's own prior from the exact marginal."""
    sde = sd.VP(beta_max=4.0)
    _, own = expected(sd.elbo, sde, draws=1, steps=5, prior=None)
    _, exact = expected(sd.elbo, sde, draws=1, steps=5)
    snr = sde.log_snr(torch.tensor(1.0, dtype=F64)).exp()
    torch.testing.assert_close(own["prior"], snr / 2 * (EIGEN.sum() + TARGET.mean.square().sum()))
    end = TARGET.marginal(sde, 1.0)
    p = torch.distributions.MultivariateNormal(end.mean, end.cov)
    prior = torch.distributions.MultivariateNormal(0 * end.mean, sde.sigma(1.0) ** 2 * torch.eye(2, dtype=F64))
    missed = torch.distributions.kl_divergence(p, prior)
    torch.testing.assert_close(exact["total"] - own["total"], missed, rtol=1e-6, atol=1e-9)
    assert missed > 0.01


@dataclass(frozen=True)
class Retimed(sd.LinearSDE):
    """A process on another clock: `scales(s(t))` with `s` monotone, from end to end."""

    of: sd.LinearSDE
    bend: float
    t_min: float = 1e-3
    t_max: float = 1.0

    def scales(self, t):
        part = (t - self.t_min) / (self.t_max - self.t_min)
        return self.of.scales(self.of.t_min + (self.of.t_max - self.of.t_min) * part * (1 + self.bend * (1 - part)))


def test_schedules_with_the_same_end_points_have_the_same_continuous_bound():
    """VP, the cosine schedule between VP's end points, and VP on other clocks, with the same random numbers."""
    target, x = mixture(), mixture().sample(6, seed=0)
    vp = sd.VP(t_min=0.01)
    ends = vp.log_snr(torch.tensor([vp.t_min, vp.t_max], dtype=F64))
    early, late = sd.CosineVP(t_min=1e-5, t_max=1 - 1e-9).time(ends).tolist()
    totals = [
        sd.elbo(target.model(sde), x, seed=5, samples=32).total
        for sde in (vp, sd.CosineVP(t_min=early, t_max=late), Retimed(vp, 0.9), Retimed(vp, -0.9))
    ]
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], rtol=1e-10, atol=1e-10)
    steps = [
        sd.elbo(target.model(sde), x, seed=5, times=sd.grids.uniform(sde, 6)).total for sde in (vp, Retimed(vp, 0.9))
    ]
    assert (steps[0] - steps[1]).abs().min() > 0.1, "with few steps the schedule matters"


# The consistency form


@pytest.mark.parametrize("variance", VARIANCES, ids=name)
@pytest.mark.parametrize("sde", ALL, ids=name)
def test_both_decompositions_are_the_same_number(sde, variance):
    """Exactly, with data and noise integrated."""
    for steps in (1, 4):
        _, denoising = expected(sd.elbo, sde, draws=1, steps=steps, variance=variance)
        _, consistency = expected(sd.consistency_elbo, sde, draws=steps + 1, steps=steps, variance=variance)
        torch.testing.assert_close(consistency["total"], denoising["total"], rtol=1e-8, atol=1e-7)
        torch.testing.assert_close(consistency["reconstruction"], denoising["reconstruction"], rtol=1e-8, atol=1e-7)
        assert consistency["terms"].shape == (steps,)


@pytest.mark.parametrize("variance", ["posterior", "beta", ByEntry(Known(), (0.7, 1.6))], ids=name)
def test_the_decompositions_agree_on_mixtures_within_their_errors(variance):
    sde, x = sd.VP(), mixture().sample(200, seed=0)
    options = {"steps": 8, "samples": 16, "variance": variance}
    one = sd.elbo(mixture().model(sde), x, seed=0, **options)
    other = sd.consistency_elbo(mixture().model(sde), x, seed=1, **options)
    error = ((one.stderr.square() + other.stderr.square()).sum().sqrt() / 200).item()
    assert abs((one.total - other.total).mean().item()) < 4 * error
    assert error < 0.3
    assert one.nfe == other.nfe == 2 * 16 * 9


@pytest.mark.parametrize("sde", [sd.VP(), sd.EDM()], ids=name)
@pytest.mark.parametrize(("steps", "ratio"), [(8, 4), (40, 6)])
def test_the_consistency_form_has_the_higher_variance(sde, steps, ratio):
    """Of the total, and more so of the terms of small steps; the standard error says so."""
    x = mixture().sample(1, seed=0).expand(300, 2)
    one, other = (
        function(mixture().model(sde), x, steps=steps, samples=4, seed=0) for function in (sd.elbo, sd.consistency_elbo)
    )
    assert other.total.var() > ratio * one.total.var()
    assert (other.terms.var(1) > one.terms.var(1)).all()
    assert other.terms.var(1).median() > 3 * ratio * one.terms.var(1).median()
    assert other.stderr.square().mean().sqrt().item() == pytest.approx(other.total.std().item(), rel=0.15)


def test_a_consistency_term_is_the_ratio_of_its_two_densities():
    """Against torch's own log-densities, on a path from the same numbers."""
    sde, target = sd.VE(), mixture()
    model, x = target.model(sde), target.sample(5, seed=0)
    numbers = torch.randn(3, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1.0, 0.6, 0.2], dtype=F64)
    found = sd.consistency_elbo(model, x, times=times, samples=1, variance="beta", noise=sd.Recorded(numbers), seed=0)
    parts = torch.zeros(4, 5, dtype=F64)
    for sign in (1, -1):
        last = sde.perturb(times[2], x, sign * numbers[2])
        middle = sde.advance(times[2], times[1], last, sign * numbers[1])
        first = sde.advance(times[1], times[0], middle, sign * numbers[0])
        states = [first, middle, last, x]
        for i in (0, 1):
            t, s = times[i], times[i + 1]
            mean, _ = sde.posterior(s, t, model.denoised(t, states[i]), states[i])
            p = torch.distributions.Normal(mean, sde.transition(s, t)[1])
            scale, std = (sde.alpha(s), sde.sigma(s)) if i else sde.transition(times[2], s)
            q = torch.distributions.Normal(scale * states[i + 2], std)
            parts[i] += (q.log_prob(states[i + 1]) - p.log_prob(states[i + 1])).sum(1) / 2
        scale, std = sde.transition(times[1], times[0])
        prior = torch.distributions.Normal(torch.zeros(2, dtype=F64), sde.sigma(1.0))
        parts[2] += torch.distributions.kl_divergence(torch.distributions.Normal(scale * middle, std), prior).sum(1) / 2
        decoder = torch.distributions.Normal(model.denoised(times[2], last), sde.sigma(times[2]))
        parts[3] += decoder.log_prob(x).sum(1) / 2
    torch.testing.assert_close(found.terms, parts[:2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.prior, parts[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.reconstruction, parts[3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.total, parts[3] - parts[2] - parts[:2].sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [sd.VP(t_min=0.01), sd.EDM(sigma_min=0.1)], ids=name)
def test_divergences_that_forget_how_the_states_depend_are_a_looser_bound(sde):
    """`sum E KL(q(z_i | z_(i+1)) || p(z_i | z_(i-1)))`, as often printed, in closed form: not the bound, but below it.

    With K the gain of x_t in the mean of p, z_i stays apart from z_(i-1) given z_(i+1): what was
    `E (z_i - K z_(i-1))^2 = best` gains twice K times their covariance given z_(i+1).
    """
    result, found = expected(sd.consistency_elbo, sde, draws=5, steps=4)
    chain = chain_of(sde, result.times)
    at, n = chain.at, 4
    V = table_of("posterior", chain)
    printed = torch.zeros(2, dtype=F64)
    for i in range(1, n + 1):
        t, s = i - 1, i
        snr = (at.alpha[t] / at.sigma[t]) ** 2
        best = chain.nu[t] ** 2 + chain.gain[t] ** 2 * EIGEN / (1 + EIGEN * snr)
        denoise = at.alpha[t] * EIGEN / (at.alpha[t] ** 2 * EIGEN + at.sigma[t] ** 2)
        slope = chain.kept[t] / at.sigma[t] + chain.gain[t] * denoise
        forward = at.sigma[s] ** 2 * chain.fresh[s]  # of q(z_i | z_(i+1))
        covariance = at.alpha[t] / at.alpha[s] * forward
        printed += ((best + 2 * slope * covariance) / V[t] - 1 + (V[t] / forward).log()) / 2
    assert printed.sum() > found["terms"].sum() + 0.5
    _, denoising = expected(sd.elbo, sde, draws=1, steps=4)
    kl = denoising["reconstruction"] - found["prior"] - printed.sum()
    assert kl < denoising["total"] - 0.5


# All forms of a term


@given(
    sde=st.one_of(st.sampled_from([sd.as_linear(s) for s in ALL]), strategies.linear_sdes()),
    kind=st.sampled_from([*PREDICTIONS]),
    variance=st.sampled_from(["posterior", "beta", Known()]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_data_noise_score_velocity_and_mean_form_of_a_term_are_one(sde, kind, variance, seed, data):
    times = data.draw(strategies.time_grids(sde, max_steps=6))
    if sde.alpha(times[0]) == 0:
        times = torch.cat([times[:1] * 0.99, times[1:]])
    model = TARGET.model(sde)
    steps = ReverseSteps.of(model.point(times))
    V = variance_of(variance, "the test").table(steps)
    x, eps = torch.randn(2, len(V), 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
    guess = torch.randn(len(V), 2, dtype=F64, generator=torch.Generator().manual_seed(seed + 100))  # any xhat
    t, s = times[:-1], times[1:]
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    z = alpha * x + sigma * eps
    p, q = (value[:, None] for value in PREDICTIONS[kind](steps.at[:-1]))
    # epshat - eps, without the difference of large numbers that z would bring in
    moved = -alpha / sigma * (guess - x)
    error = p * (guess - x) + q * moved
    by_kind = steps.kl_weights(kind, V) * error.square().sum(1)
    by_data = steps.kl_weights("data", V) * (guess - x).square().sum(1)
    torch.testing.assert_close(by_kind, by_data, rtol=1e-10, atol=0)
    mean_q, std = sde.posterior(s, t, x, z)
    difference = steps.gain[:, None] * (guess - x)
    mean_p, _ = sde.posterior(s, t, guess, z)
    scale = mean_q.abs().max().item() + mean_p.abs().max().item()
    torch.testing.assert_close(mean_p - mean_q, difference, rtol=1e-6, atol=1e-13 * scale)
    by_mean = difference.square().sum(1) / (2 * V)
    torch.testing.assert_close(by_mean, by_data, rtol=1e-10, atol=0)
    covs = [torch.diag_embed(v[:, None].expand(-1, 2)) for v in (std**2, V)]
    kernels = [torch.distributions.MultivariateNormal(m, c) for m, c in zip((0 * x, difference), covs, strict=True)]
    rho = std**2 / V
    full = torch.distributions.kl_divergence(*kernels)
    torch.testing.assert_close(by_data + rho - 1 - rho.log(), full, rtol=1e-9, atol=1e-9)
    if variance == "posterior":
        snr = sde.log_snr(times).exp()
        gain = -snr[1:] * torch.expm1(sde.log_snr(t) - sde.log_snr(s))  # snr_s - snr_t
        torch.testing.assert_close(by_data, gain / 2 * (guess - x).square().sum(1), rtol=1e-10, atol=0)


def test_the_weights_of_a_discrete_chain_are_those_of_ddpm():
    """`b^2 / (2 V a (1 - abar))` on the noise, with V = b and with the posterior's."""
    betas = torch.linspace(1e-3, 0.1, 30, dtype=F64)
    chain = sd.DiscreteVP(betas)
    steps = ReverseSteps.of(TARGET.model(chain).point(chain.times))
    abar = (1 - betas).cumprod(0)
    b, a, kept = betas[1:].flip(0), (1 - betas)[1:].flip(0), abar[1:].flip(0)
    before = abar[:-1].flip(0)
    for variance, V in (("beta", b), ("posterior", b * (1 - before) / (1 - kept))):
        table = variance_of(variance, "").table(steps)
        torch.testing.assert_close(table, V, rtol=1e-10, atol=0)
        torch.testing.assert_close(steps.kl_weights("noise", table), b**2 / (2 * V * a * (1 - kept)), rtol=1e-9, atol=0)


# Inputs


def test_the_variance_is_told():
    model, x = mixture().model(sd.VP()), mixture().sample(2, seed=0)
    told = [
        sd.elbo(model, x, steps=2, samples=1, variance=v).settings["variance"] for v in ("posterior", "beta", Known())
    ]
    assert told == ["posterior", "beta", "Known"]
    assert sd.elbo(model, x).settings["variance"] == "posterior"
    assert sd.consistency_elbo(model, x, steps=2, samples=1, variance="beta").settings["variance"] == "beta"


def test_a_decoder_takes_the_place_of_the_step_to_the_data_with_any_variance():
    model = mixture().model(sd.VP())
    decoder = sd.decoders.Softmax(levels=8, interval=(-2.0, 2.0))
    x = decoder.points(torch.tensor([[0, 7], [3, 4]]), dtype=F64)
    times = sd.grids.log_snr(sd.VP(), 3, t_min=0.05)
    options = {"times": times, "samples": 2, "seed": 0}
    found = [
        sd.elbo(model, x, variance=v, decoder=decoder, **options).reconstruction
        for v in ("posterior", "beta", ByEntry(Known()))
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert (found[0] <= 0).all()
    assert (sd.elbo(model, x, variance="beta", **options).reconstruction - found[0]).abs().min() > 0.1


@pytest.mark.parametrize("function", [sd.elbo, sd.consistency_elbo])
@pytest.mark.parametrize("variance", ["beta", ByEntry(Known())], ids=name)
def test_rows_do_not_depend_on_the_batch(function, variance):
    model, x = mixture().model(sd.VP()), mixture().sample(30, seed=0)
    whole = function(model, x, steps=3, samples=2, variance=variance, seed=7)
    chunked = function(model, x, steps=3, samples=2, variance=variance, seed=7, batch_size=7)
    torch.testing.assert_close(chunked.total, whole.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.terms, whole.terms, rtol=1e-12, atol=1e-12)
    assert whole.nfe == chunked.nfe == 16


@pytest.mark.parametrize(
    ("function", "message", "bad"),
    [
        (sd.elbo, "Unknown variance 'small' for elbo: write 'posterior' or 'beta'", {"steps": 2, "variance": "small"}),
        (sd.elbo, "In continuous time the variance is not a choice.*got variance='beta'", {"variance": "beta"}),
        (sd.elbo, "In continuous time the variance is not a choice", {"variance": Known()}),
        (sd.elbo, "whole number of steps >= 1, or None for continuous time; got 0", {"steps": 0}),
        (sd.consistency_elbo, r"that of a discrete chain: give steps=\.\.\..* or times=.*got steps=None", {}),
        (sd.consistency_elbo, r"that of a discrete chain.* whole number of steps >= 1, .*got steps=0", {"steps": 0}),
        (sd.consistency_elbo, "Unknown variance 3 for consistency_elbo", {"steps": 2, "variance": 3}),
        (sd.consistency_elbo, "whole number of samples >= 1; got 0", {"steps": 2, "samples": 0}),
        (sd.consistency_elbo, "discrete chain.* whole number of steps >= 1.*got steps=-1", {"steps": -1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_bad_input_gets_a_sentence(function, message, bad):
    with pytest.raises(sd.OptionError, match=message):
        function(mixture().model(sd.VP()), torch.zeros(2, 2, dtype=F64), **bad)


def test_an_unknown_prediction_has_no_weights():
    steps = ReverseSteps.of(TARGET.model(sd.VP()).point(torch.tensor([1.0, 0.5], dtype=F64)))
    with pytest.raises(sd.OptionError, match="Unknown prediction 'mean': write one of 'noise', 'data'"):
        steps.kl_weights("mean", torch.ones(1))


@dataclass(frozen=True)
class Negative(StepVariance):
    def table(self, steps):
        return torch.tensor([1.0, -0.25, 1.0], dtype=F64)


@dataclass(frozen=True)
class Widened(StepVariance):
    """`V = nu^2 (1 + T^-power)`, the step to the data as the posterior's."""

    power: float

    def table(self, steps):
        return steps.nu**2 * (1 + (len(steps.nu) - 1) ** -self.power)


def test_only_variances_that_tend_to_the_posteriors_have_its_limit():
    """The loss of bound falls with the steps for `V / nu^2 - 1 = 1 / T`, and grows as them for `V = 2 nu^2`."""
    model, x = TARGET.model(sd.VP()), TARGET.sample(20, seed=0)

    def loss(power, steps):
        totals = [
            sd.elbo(model, x, steps=steps, variance=v, samples=1, seed=0).total for v in ("posterior", Widened(power))
        ]
        return (totals[0] - totals[1]).mean().item()

    assert abs(loss(1.0, 200)) < 0.5 * abs(loss(1.0, 50))
    assert loss(0.0, 200) > 3.5 * loss(0.0, 50) > 0


@pytest.mark.parametrize("function", [sd.elbo, sd.consistency_elbo])
def test_a_variance_of_a_step_that_is_not_positive_is_refused(function):
    message = r"must be >= 0; Negative has -0\.25 for the step that starts at t = 0\.5"
    with pytest.raises(sd.OptionError, match=message):
        function(mixture().model(sd.VP()), torch.zeros(3, 2, dtype=F64), times=[1.0, 0.5, 0.1], variance=Negative())


@pytest.mark.parametrize("function", [sd.elbo, sd.consistency_elbo])
def test_a_variance_of_entries_that_is_not_a_number_names_time_and_rows(function):
    @dataclass(frozen=True)
    class Wrong(EntryVariance):
        def along(self, model, steps):
            return (
                model,
                lambda i, x: torch.where(torch.arange(len(x))[:, None] == 1, math.nan if i == 1 else 1.0, 1.0) + 0 * x,
            )

    with pytest.raises(sd.DivergenceError, match=r"NaN or infinite at t = 0\.5, rows 1") as caught:
        function(mixture().model(sd.VP()), torch.zeros(3, 2, dtype=F64), times=[1.0, 0.5, 0.1], variance=Wrong())
    assert caught.value.rows == [1]
