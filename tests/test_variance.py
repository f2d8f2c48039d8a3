"""Variances of reverse kernels: the fixed choices, the law of total variance, and samplers that take any of them."""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers import MEAN, NAMED, TwoFunctions, final_moments, moment_error, name
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.testing import strategies
from sdediff.variance import Beta, EntryVariance, Posterior, ReverseSteps, StepVariance, variance_of

F64 = torch.float64
SPREAD = 0.3


def steps_of(sde, times, eta=1.0):
    model = sd.exact.Gaussian(torch.zeros(1, dtype=F64), SPREAD).model(sde)
    return ReverseSteps.of(model.point(torch.as_tensor(times, dtype=F64)), eta)


def gaussian_variance(at, spread):
    """`Var[x_0 | x_t]` of data with this variance."""
    return spread * at.sigma**2 / (at.alpha**2 * spread + at.sigma**2)


@dataclass(frozen=True)
class Known(StepVariance):
    """The exact variance for Gaussian data."""

    spread: float = SPREAD

    def table(self, steps):
        return steps.nu**2 + steps.gain**2 * gaussian_variance(steps.at[:-1], self.spread)


@dataclass(frozen=True)
class ByEntry(EntryVariance):
    """The same for every entry, as a network would give it, and a record of what was asked."""

    scale: float = 1.0

    def along(self, model, steps):
        values = Known().table(steps)
        self_calls = []

        def network(x, t, *condition):
            self_calls.append(x)
            return model.network(x, t, *condition)

        def spread(i, x):
            assert len(self_calls) == i + 1
            torch.testing.assert_close(self_calls[-1], x)
            return self.scale * values[i].expand(x.shape)

        return sd.ScoreModel(network, model.sde, model.prediction, model.time, model.sigma_data), spread


@given(sde=strategies.linear_sdes(), data=st.data())
def test_the_fixed_variances_are_those_of_posterior_and_transition(sde, data):
    times = data.draw(strategies.time_grids(sde, max_steps=6))
    steps = steps_of(sde, times)
    t, s = times[:-1], times[1:]
    zeros = torch.zeros(len(t), 1, dtype=F64)
    _, posterior = sde.posterior(s, t, zeros, zeros)
    _, forward = sde.transition(s, t)
    torch.testing.assert_close(Posterior().table(steps), posterior**2, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(Beta().table(steps), forward**2, rtol=1e-9, atol=1e-300)
    mean, _ = sde.posterior(s, t, zeros + 1, zeros)
    # x_t = 0: the mean of q(x_s | x_t, x_0 = 1) is alpha_s - kept alpha_t / sigma_t
    torch.testing.assert_close(steps.gain, mean[:, 0], rtol=1e-7, atol=1e-10)


@given(
    sde=strategies.linear_sdes(),
    eta=st.floats(0, 1),
    spread=st.floats(0.01, 4),
    data=st.data(),
)
def test_the_law_of_total_variance_gives_the_reverse_kernel_of_gaussian_data(sde, eta, spread, data):
    times = data.draw(strategies.time_grids(sde, max_steps=6))
    steps = steps_of(sde, times, eta)
    at = steps.at
    alpha, sigma = at.alpha[:-1], at.sigma[:-1]
    # x_t = alpha x_0 + sigma eps, x_s = alpha_s x_0 + kept eps + nu z
    before = alpha**2 * spread + sigma**2
    after = at.alpha[1:] ** 2 * spread + steps.kept**2 + steps.nu**2
    cross = alpha * at.alpha[1:] * spread + sigma * steps.kept
    torch.testing.assert_close(after, at.alpha[1:] ** 2 * spread + at.sigma[1:] ** 2, rtol=1e-9, atol=1e-12)
    exact = after - cross**2 / before
    torch.testing.assert_close(Known(spread).table(steps), exact, rtol=1e-6, atol=1e-9 * after.max().item())


@given(data=st.data())
def test_beta_is_right_for_standard_normal_data_of_variance_preserving_processes(data):
    sde = data.draw(st.sampled_from([sd.VP(), sd.CosineVP(), sd.SigmoidVP()]))
    times = data.draw(strategies.time_grids(sde, max_steps=6))
    steps = steps_of(sde, times)
    torch.testing.assert_close(Known(1.0).table(steps), Beta().table(steps), rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
@pytest.mark.parametrize("solver", [sd.DDPM(Known()), sd.DDIM(0.0, Known()), sd.DDIM(0.6, Known())], ids=name)
@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_exact_variance_any_number_of_steps_is_exact_on_gaussian_data(sde, solver, steps):
    times = sd.grids.natural(sde, steps)
    assert moment_error(solver, sde, times, steps) < 1e-7


def test_without_it_few_steps_are_too_narrow_or_too_wide():
    times = sd.grids.natural(sd.VP(), 3)
    _, exact = final_moments(sd.DDPM(Known()), sd.VP(), times, 3)
    assert final_moments(sd.DDPM(), sd.VP(), times, 3)[1] < 0.9 * exact
    assert final_moments(sd.DDPM("beta"), sd.VP(), times, 3)[1] > 1.1 * exact


@pytest.mark.parametrize("make", [sd.DDPM, lambda variance: sd.DDIM(0.3, variance)])
def test_a_variance_of_every_entry_is_added_as_one_of_every_step(make):
    model = sd.exact.GaussianMixture([0.3, 0.7], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64), [0.1, 0.2])
    model = model.model(sd.VP())
    one, other = (
        sd.sample(model, (9, 2), solver=solver, steps=4, seed=3) for solver in (make(Known()), make(ByEntry()))
    )
    torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)
    assert one.nfe == other.nfe == 5
    wider = sd.sample(model, (9, 2), solver=sd.DDPM(ByEntry(4.0)), steps=4, seed=3)
    assert (wider.x - one.x).abs().min() > 1e-4


def test_gradients_flow_through_a_variance_of_every_entry():
    model = sd.exact.Gaussian(torch.tensor([MEAN], dtype=F64), SPREAD).model(sd.VP())
    x = torch.ones(2, 1, dtype=F64, requires_grad=True)
    solver = sd.DDPM(ByEntry())
    final = sd.sample(model, (2, 1), solver=solver, steps=3, seed=0, x_init=x, differentiable=True).x
    (slope,) = torch.autograd.grad(final.sum(), x)
    moved = [sd.sample(model, (2, 1), solver=solver, steps=3, seed=0, x_init=x.detach() + h).x for h in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_a_sampler_that_adds_noise_is_not_followed_back():
    assert sd.DDIM().deterministic
    assert not sd.DDIM(0.0, Known()).deterministic
    assert not sd.DDIM(0.5).deterministic
    model = sd.exact.Gaussian(torch.zeros(1), 1.0).model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(model, torch.zeros(2, 1), solver=sd.DDIM(0.0, Known()), steps=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.DDPM("small"), "Unknown variance 'small' for DDPM: write 'posterior' or 'beta', or pass"),
        (lambda: sd.DDPM(["beta"]), r"Unknown variance \['beta'\] for DDPM"),
        (lambda: sd.DDPM(0.5), r"Unknown variance 0\.5 for DDPM"),
        (lambda: sd.DDIM(0.0, "large"), "Unknown variance 'large' for DDIM"),
        (lambda: sd.DDIM(0.0, "beta"), r"write DDPM\('beta'\)"),
        (lambda: variance_of(torch.ones(3), "DDPM"), "Unknown variance tensor"),
    ],
)
def test_what_is_no_variance_is_refused(make, message):
    with pytest.raises(sd.OptionError, match=message):
        make()


class Entries(EntryVariance):
    """What a function of the states says, whatever its shape and sign."""

    def __init__(self, values):
        self.values = values

    def along(self, model, steps):
        return model, lambda i, x: self.values(x)


class Steps(StepVariance):
    """Likewise for steps."""

    def __init__(self, values):
        self.values = values

    def table(self, steps):
        return self.values(steps.nu)


def below_in_one(x):
    return torch.cat([torch.full_like(x[:1], -0.5), torch.ones_like(x[1:])])


def sampled(model, x, variance):
    return sd.sample(model, x.shape, solver=sd.DDPM(variance), steps=3, seed=0, dtype=x.dtype)


def bounded(model, x, variance):
    return sd.elbo(model, x, steps=3, samples=1, seed=0, variance=variance)


def bounded_along_paths(model, x, variance):
    return sd.consistency_elbo(model, x, steps=3, samples=1, seed=0, variance=variance)


@pytest.mark.parametrize("use", [sampled, bounded, bounded_along_paths])
@pytest.mark.parametrize(
    ("variance", "error", "message"),
    [
        (Entries(lambda x: torch.ones(2)), sd.ShapeError, r"Entries .* every entry .*\(4, 2\); got \(2,\)"),
        (Entries(lambda x: torch.ones(len(x), 1)), sd.ShapeError, r"Entries must .*\(4, 2\); got \(4, 1\)"),
        (Entries(below_in_one), sd.OptionError, r">= 0; Entries has 2 of 8 entries below, such as -0\.5, at t = "),
        (Steps(lambda nu: torch.ones(1)), sd.ShapeError, r"Steps must give one number for every step, .*; got \(1,\)"),
        (Steps(lambda nu: nu - 10), sd.OptionError, r">= 0; Steps has -9\..* for the step that starts at t = 1"),
        (Steps(lambda nu: nu * math.nan), sd.OptionError, r">= 0; Steps has nan for the step that starts at t = 1"),
    ],
    ids=["event", "column", "negative entries", "one number", "negative steps", "nan"],
)
def test_a_variance_of_another_shape_or_sign_is_named(use, variance, error, message):
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 0.5)
    with pytest.raises(error, match=message):
        use(target.model(sd.VP()), target.sample(4, 0), variance)


@pytest.mark.parametrize("bound", [sd.elbo, sd.consistency_elbo])
def test_a_bound_with_a_variance_of_zero_names_the_variance_and_not_the_model(bound):
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 0.5)
    variance = sd.SquaredNoise(lambda x, t: torch.zeros_like(x))
    with pytest.raises(sd.OptionError, match=r"SquaredNoise has 0 for 8 of 8 entries at t = 1e-05\. Give .* softplus"):
        bound(target.model(sd.VP()), target.sample(4, 0), steps=3, samples=1, seed=0, variance=variance)


@pytest.mark.parametrize("variance", [["beta"], 0.5, None, {}])
def test_what_is_no_variance_is_refused_whatever_it_is(variance):
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 0.5)
    with pytest.raises(sd.OptionError, match=r"Unknown variance .* for elbo: write 'posterior' or 'beta'"):
        sd.elbo(target.model(sd.VP()), target.sample(4, 0), steps=3, variance=variance)
