"""Sub-sequences of chains: what steps cost, and the path of least cost."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variances import ANISOTROPIC, beyond, design, divergences, exact_estimate, gaussian_ratio

import sdediff as sd
from sdediff import subsequences
from sdediff.subsequences import StepCosts

F64 = torch.float64
CHAIN = sd.DiscreteVP.linear_betas(40, 1e-3, 0.2)
TARGET = sd.exact.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.05, 0.8], dtype=F64))


def costs_of(target, sde, times, variance=None):
    return StepCosts.of(sde, times, exact_estimate(target, sde, times), variance)


@st.composite
def tables(draw, max_times=8):
    """Costs from any errors that data may have: from a level on, at most those of normal data with the same error."""
    n = draw(st.integers(3, max_times))
    times = torch.arange(n, 0, -1, dtype=F64) / n
    chain = sd.DiscreteVP(torch.tensor(draw(st.lists(st.floats(0.01, 0.6), min_size=n, max_size=n)), dtype=F64))
    snr = chain.log_snr(times).exp().tolist()
    errors = [1 / (1 / draw(st.floats(0.1, 5)) + snr[0])]
    for before, after in itertools.pairwise(snr):
        errors.append(draw(st.floats(0.2, 1)) * errors[-1] / (1 + (after - before) * errors[-1]))
    w = [a * b for a, b in zip(snr, errors, strict=True)]
    return StepCosts.of(chain, times, sd.AnalyticVariance(times, chain.log_snr(times), w, [0.0] * n))


# Spread by a rule


@given(n=st.integers(1, 40), more=st.integers(0, 60))
def test_both_rules_give_distinct_rows_of_the_chain_with_both_ends(n, more):
    times = torch.arange(n + 1 + more, 0, -1, dtype=F64) / 7
    for rule in (subsequences.linear, subsequences.quadratic):
        found = rule(times, n)
        assert found.shape == (n + 1,)
        assert (found.diff() < 0).all()
        assert set(found.tolist()) <= set(times.tolist())
        assert (found[0], found[-1]) == (times[0], times[-1])
    if not more:
        assert torch.equal(found, times)


def test_they_are_those_of_ddim():
    times = torch.arange(1000, 0, -1, dtype=F64)  # the steps themselves, 1..1000
    assert subsequences.linear(times, 9).tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    squares = [round(999 * (i / 9) ** 2) + 1 for i in range(9, -1, -1)]
    assert subsequences.quadratic(times, 9).tolist() == squares
    # where squares fall together, the next that is free
    assert subsequences.quadratic(torch.arange(10, 0, -1, dtype=F64), 7).tolist() == [10, 8, 6, 5, 4, 3, 2, 1]


# What a step costs


@pytest.mark.parametrize("sde", [CHAIN, sd.VP(), sd.EDM(), sd.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("variance", [None, "posterior", "beta"])
def test_costs_are_the_mean_divergences_of_gaussian_data(sde, variance):
    """Against KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of two normal densities, at the exact moments of a design."""
    times = sd.grids.natural(sde, 4, t_min=sde.time(torch.tensor(3.0, dtype=F64)).item())
    costs = costs_of(TARGET, sde, times, variance)
    known = exact_estimate(TARGET, sde, times)
    data, noise = design(TARGET)
    eps, model = noise(1).numbers[0], TARGET.model(sde)
    for i, j in itertools.combinations(range(5), 2):
        t, s = times[i], times[j]
        xt = sde.perturb(t, data, eps)
        mean, std = sde.posterior(s, t, data, xt)
        guess, _ = sde.posterior(s, t, model.denoised(t, xt), xt)
        if variance == "posterior":
            spread = std**2
        elif variance == "beta":
            spread = sde.transition(s, t)[1] ** 2
        else:
            at = model.point(times[i : i + 1])
            slope = sde.posterior(s, t, torch.ones_like(xt), torch.zeros_like(xt))[0][0, 0]
            spread = std**2 + slope**2 * (at.sigma / at.alpha)[0] ** 2 * gaussian_ratio(TARGET, at)[0]
        p = torch.distributions.Normal(guess, spread.sqrt() * torch.ones_like(guess))
        q = torch.distributions.Normal(mean, std * torch.ones_like(mean))
        divergence = torch.distributions.kl_divergence(q, p).mean()
        torch.testing.assert_close(costs.steps[i, j], divergence, rtol=1e-6, atol=1e-9)
        xhat = model.denoised(s, sde.perturb(s, data, eps))
        error = (data - xhat).square().mean()
        alpha, sigma = sde.scales_at(s)
        std = {None: error.sqrt(), "posterior": sigma / alpha, "beta": sigma}[variance]
        decoder = -torch.distributions.Normal(xhat, std).log_prob(data).mean()
        torch.testing.assert_close(costs.decoder[j], decoder, rtol=1e-6, atol=1e-9)
    assert costs.steps.isinf().sum() == 15
    assert known.form == "residual"


def test_closed_forms_of_the_best_and_the_posterior_variance():
    times = CHAIN.times
    at = TARGET.model(CHAIN).point(times)
    snr = (at.alpha / at.sigma) ** 2
    error = gaussian_ratio(TARGET, at) / snr
    gap = snr[None] - snr[:, None]
    rows, columns = torch.triu_indices(40, 40, 1)
    best = (1 + gap * error[:, None]).log() / 2
    torch.testing.assert_close(
        costs_of(TARGET, CHAIN, times).steps[rows, columns], best[rows, columns], rtol=1e-7, atol=1e-10
    )
    fixed = costs_of(TARGET, CHAIN, times, "posterior").steps
    torch.testing.assert_close(fixed[rows, columns], (gap * error[:, None] / 2)[rows, columns], rtol=1e-7, atol=1e-10)
    assert (fixed >= best - 1e-12)[rows, columns].all()


@pytest.mark.parametrize("variance", ["analytic", "posterior", "beta"])
def test_prior_and_total_are_minus_the_elbo_wherever_the_path_ends(variance):
    """Within 4 standard errors of the rows."""
    known = exact_estimate(TARGET, CHAIN, CHAIN.times)
    kernels = known if variance == "analytic" else variance
    costs = StepCosts.of(CHAIN, CHAIN.times, known, kernels)
    x, model = TARGET.sample(4000, seed=0), TARGET.model(CHAIN)
    for end in (39, 30, 15):
        path = CHAIN.times[[0, 7, end]]
        bound = sd.elbo(model, x, times=path, variance=kernels, samples=1, seed=0)
        off = (-bound.total - bound.prior) / x[0].numel() - costs.total(path)
        assert abs(off.mean()) < 4 * off.std() / len(x) ** 0.5


def test_times_of_the_chain_may_be_float32():
    costs = costs_of(TARGET, CHAIN, CHAIN.times)
    path = CHAIN.times[[0, 9, 22, 39]]
    assert costs.total(path.float()) == costs.total(path)


def test_on_isotropic_gaussian_data_the_total_is_the_negative_elbo_and_all_paths_cost_the_same():
    """The best variance is exact there: prior + total = -E log p for every sub-sequence."""
    target = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 0.3)
    costs = costs_of(target, CHAIN, CHAIN.times)
    alpha, sigma = CHAIN.alpha(1.0), CHAIN.sigma(1.0)
    entropy = 0.5 * (math.log(2 * math.pi * math.e * 0.3))
    information = 0.5 * math.log(1 + 0.3 * alpha**2 / sigma**2)  # I(x_0; x_T), what the prior p_T costs
    for path in (subsequences.linear(CHAIN.times, 7), costs.best(3), CHAIN.times):
        assert costs.total(path) + information == pytest.approx(entropy, abs=1e-9)


# The best path


@given(costs=tables(), data=st.data())
def test_dynamic_programming_equals_brute_force_over_all_subsets(costs, data):
    rows = len(costs.times)
    n = data.draw(st.integers(1, rows - 1))
    paths = [costs.times[[0, *inner, rows - 1]] for inner in itertools.combinations(range(1, rows - 1), n - 1)]
    found = costs.best(n)
    assert found.shape == (n + 1,)
    assert costs.total(found) == pytest.approx(min(map(costs.total, paths)), rel=1e-12, abs=1e-12)
    free = [costs.times[[0, *inner]] for inner in itertools.combinations(range(1, rows), n)]
    found = costs.best(n, free_end=True)
    assert found.shape == (n + 1,)
    assert costs.total(found) == pytest.approx(min(map(costs.total, free)), rel=1e-12, abs=1e-12)


@given(costs=tables(max_times=30), data=st.data())
def test_it_is_never_worse_than_the_rules(costs, data):
    n = data.draw(st.integers(1, len(costs.times) - 1))
    best = costs.total(costs.best(n))
    for rule in (subsequences.linear, subsequences.quadratic):
        assert best <= costs.total(rule(costs.times, n)) + 1e-12
    assert costs.total(costs.best(n, free_end=True)) <= best + 1e-12


@given(costs=tables(max_times=12))
def test_more_steps_never_cost_more(costs):
    totals = [costs.total(costs.best(n)) for n in range(1, len(costs.times))]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(totals))


@pytest.mark.parametrize("steps", [5, 10])
def test_on_a_mixture_its_bound_is_higher_than_those_of_the_rules(steps):
    """The actual divergences on fresh data, by more than 3 standard errors; and they are what the table says."""
    chain = sd.VP().discretize(200)
    model = ANISOTROPIC.model(chain)
    errors = sd.AnalyticVariance.estimate(model, ANISOTROPIC.sample(4000, 1), chain.times, seed=0)
    costs = StepCosts.of(chain, chain.times, errors)
    x = ANISOTROPIC.sample(20_000, 2)
    paths = {rule: rule(chain.times, steps) for rule in (subsequences.linear, subsequences.quadratic)}
    best = costs.best(steps)
    bound = divergences(model, x, best, errors, 3)
    for path in paths.values():
        other = divergences(model, x, path, errors, 3)
        assert beyond(other - bound) > 3
    stated = 2 * (costs.total(best) - costs.decoder[-1].item())
    used = [chain.times.tolist().index(t) for t in best[:-1].tolist()]
    # the slope of D J in log w is at most D / 2 = 1
    allowed = sum((errors.stderr[k] / errors.ratio[k]) ** 2 for k in used) + (bound.var() / len(bound)).item()
    assert abs(bound.mean().item() - stated) < 4 * math.sqrt(allowed) < 0.3


def test_any_falling_rows_of_a_chain_are_a_grid_of_sample():
    chain = sd.DiscreteVP.linear_betas(50, 1e-3, 0.2)
    seen = []

    def network(x, t):
        seen.append(t[0].item())
        return 0 * x

    model = sd.ScoreModel(network, chain, time=chain.timestep)
    costs = StepCosts.of(chain, chain.times, exact_estimate(TARGET, chain, chain.times))
    result = sd.sample(model, (2, 2), solver=sd.DDPM(), times=costs.best(6), seed=0)
    places = [round(50 * t) - 1 for t in costs.best(6).tolist()]
    assert seen == places
    assert result.nfe == 7


# Bad input


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (sd.OptionError, lambda c: subsequences.linear(CHAIN.times, 0), "a whole number of steps from 1 to 39; got 0"),
        (sd.OptionError, lambda c: subsequences.quadratic(CHAIN.times, 40), "from 1 to 39; got 40"),
        (sd.OptionError, lambda c: subsequences.linear(CHAIN.times, 2.5), r"got 2\.5"),
        (sd.OptionError, lambda c: subsequences.linear(CHAIN.times, True), "got True"),
        (sd.TimeError, lambda c: subsequences.linear(CHAIN.times.flip(0), 3), "strictly decreasing"),
        (sd.OptionError, lambda c: c.best(40), "from 1 to 39; got 40"),
        (sd.OptionError, lambda c: c.total([1.0, 0.51, 0.025]), r"t = 0\.51 is not one of the 40 times"),
        (sd.TimeError, lambda c: c.total([0.5]), "at least two times"),
        (
            sd.OptionError,
            lambda c: costs_of(TARGET, CHAIN, CHAIN.times, sd.NoiseResidual(torch.sin)),
            "one number a step; got NoiseResidual",
        ),
        (sd.OptionError, lambda c: costs_of(TARGET, CHAIN, CHAIN.times, "small"), "Unknown variance 'small' for StepC"),
        (
            sd.TimeError,
            lambda c: StepCosts.of(CHAIN, CHAIN.times, exact_estimate(TARGET, CHAIN, CHAIN.times[5:])),
            "reach as far as the grid",
        ),
    ],
)
def test_bad_input_gets_a_sentence(error, make, message):
    with pytest.raises(error, match=message):
        make(costs_of(TARGET, CHAIN, CHAIN.times))
