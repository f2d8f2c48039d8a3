"""The mean shift of chains: one step by hand, equal to the continuous form at first order, the same limit."""

import dataclasses

import pytest
import torch
from helpers import BasisStream, fitted_order

import sdediff as sd
from sdediff.runs import counted

F64 = torch.float64
MEAN, VARIANCE = 0.7, 0.3
Y, SPREAD = 1.6, 0.2
"""An observation `y = x_0 + n`, n of variance SPREAD: the log-likelihood is quadratic, and guided steps are affine."""
DATA = sd.exact.Gaussian(torch.tensor([MEAN], dtype=F64), VARIANCE)
KEPT = 1 / (1 / VARIANCE + 1 / SPREAD)
POSTERIOR = sd.exact.Gaussian(torch.tensor([KEPT * (MEAN / VARIANCE + Y / SPREAD)], dtype=F64), KEPT)
SDES = [sd.VP(), sd.CosineVP(), sd.VE(0.01, 5.0), sd.RectifiedFlow()]


def slope_of(sde, t, x, y=Y):
    """`grad log p(y | x_t)`: y is normal about `E[x_0 | x_t]` with variance `Var[x_0 | x_t] + SPREAD`."""
    t = torch.as_tensor(t, dtype=F64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    left = VARIANCE - gain * alpha * VARIANCE
    return gain * (y - MEAN - gain * (x - alpha * MEAN)) / (left + SPREAD)


def log_prob(sde):
    def value(t, x, y=Y):
        alpha, sigma = (sd.over(part, x) for part in (sde.alpha(t), sde.sigma(t)))
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        left = VARIANCE - gain * alpha * VARIANCE
        return (-((y - MEAN - gain * (x - alpha * MEAN)) ** 2) / (2 * (left + SPREAD))).sum(1)

    return value


def guided(sde, scale=1.0, **more):
    return sd.ClassifierGuidance(DATA.model(sde), log_prob(sde), scale, **more)


X = torch.linspace(-2, 2, 5, dtype=F64)[:, None]


def step(solver, model, t, s, z=0.0):
    times = torch.tensor([t, s], dtype=F64)
    noise = sd.Recorded(torch.full((1, len(X), 1), z, dtype=F64))
    return sd.sample(model, X.shape, solver=solver, times=times, x_init=X, final="none", noise=noise).x


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_a_step_by_hand(sde, variance):
    """DDPM's step on the plain model, and `w V g` with V read off its noise."""
    t, s = 0.6, 0.5
    plain = DATA.model(sde)
    mean = step(sd.DDPM(variance), plain, t, s)
    std = step(sd.DDPM(variance), plain, t, s, 1.0) - mean
    alpha_t, alpha_s, sigma_t, sigma_s = (
        f(torch.tensor(at, dtype=F64)) for f in (sde.alpha, sde.sigma) for at in (t, s)
    )
    left = 1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
    torch.testing.assert_close(std**2, left * (sigma_s if variance == "posterior" else sigma_t) ** 2 + 0 * X)
    for w in (0.0, 1.0, 2.5, torch.linspace(-1, 1, 5), lambda t: 2 * t):
        model = guided(sde, w)
        for at, time, place in (("state", t, X), ("mean", s, mean)):
            weight = w[:, None] if isinstance(w, torch.Tensor) else w(time) if callable(w) else w
            found = step(sd.GuidedDDPM(variance, at), model, t, s, 0.4)
            expected = mean + std**2 * weight * slope_of(sde, time, place) + 0.4 * std
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", ["state", "mean"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_a_step_is_that_of_the_guided_score_to_first_order(sde, variance, at):
    """Two forms of one thing: the difference of a single step falls with its square, that from no guidance does not."""
    counts = [80, 160, 320, 640]
    apart, from_none = [], []
    for n in counts:
        t, s = 0.6, 0.6 - 0.5 / n
        model = guided(sde, 1.7)
        found = step(sd.GuidedDDPM(variance, at), model, t, s)
        apart.append((found - step(sd.DDPM(variance), model, t, s)).abs().max().item())
        from_none.append((found - step(sd.DDPM(variance), DATA.model(sde), t, s)).abs().max().item())
    if isinstance(sde, sd.VE) and variance == "beta" and at == "state":
        assert max(apart) < 1e-14  # alpha_s = alpha_t: the two are one
    else:
        assert 1.85 < fitted_order(apart, counts) < 2.3
    assert 0.85 < fitted_order(from_none, counts) < 1.15


def moments(solver, model, times):
    """Exact mean and variance of the result, started from the marginal of the posterior; steps are affine."""
    sde, draws = model.sde, len(times) - 1
    x = torch.zeros(2 + draws, 1, dtype=F64)
    x[1] = 1
    with torch.no_grad():
        *_, x = solver.solve(solver.process(model), x, times, BasisStream())
    x = x[:, 0]
    start = POSTERIOR.marginal(sde, times[0])
    slope = x[1] - x[0]
    return x[0] + slope * start.mean[0], slope**2 * start.cov[0, 0] + (x[2:] - x[0]).square().sum()


@pytest.mark.parametrize("solver", [sd.GuidedDDPM(), sd.GuidedDDPM("beta"), sd.GuidedDDPM(at="mean")], ids=repr)
@pytest.mark.parametrize("sde", [sd.VP(), sd.CosineVP()], ids=lambda sde: type(sde).__name__)
def test_the_limit_is_the_posterior(sde, solver):
    """Exact linear recursions: mean and variance come to those of the posterior with the first power of the step."""
    counts, errors = [50, 100, 200], []
    for n in counts:
        times = torch.linspace(0.9, 0.05, n + 1, dtype=F64)
        end = POSTERIOR.marginal(sde, times[-1])
        mean, variance = moments(solver, guided(sde), times)
        errors.append(max((mean - end.mean[0]).abs().item(), (variance - end.cov[0, 0]).abs().item()))
    assert errors[-1] < 0.03
    assert 0.85 < fitted_order(errors, counts) < 1.3


def test_labels_scales_and_costs_follow_rows():
    sde, n = sd.VP(), 7
    labels = torch.linspace(-1, 2, n, dtype=F64)[:, None]
    inner, counter = counted(DATA.model(sde))
    scale = torch.linspace(0, 2, n)
    model = sd.ClassifierGuidance(inner, log_prob(sde), scale, label=labels)
    solver = sd.GuidedDDPM()
    whole = sd.sample(model, (n, 1), solver=solver, steps=10, seed=0, dtype=F64)
    assert whole.nfe == counter.calls == 11
    parts = sd.sample(model, (n, 1), solver=solver, steps=10, seed=0, dtype=F64, batch_size=3)
    assert torch.equal(whole.x, parts.x)
    first = sd.sample(DATA.model(sde), (n, 1), solver=sd.DDPM(), steps=10, seed=0)
    torch.testing.assert_close(whole.x[0], first.x[0])
    assert (whole.x[1:] - first.x[1:]).abs().min() > 1e-3
    shared = sd.ClassifierGuidance(DATA.model(sde), log_prob(sde), 1.0, label=torch.tensor([[Y]], dtype=F64))
    one = sd.sample(shared, (n, 1), solver=solver, steps=10, seed=0)
    torch.testing.assert_close(one.x, sd.sample(guided(sde), (n, 1), solver=solver, steps=10, seed=0).x)


def test_models_inside_keep_their_conditions_and_their_guidance():
    sde = sd.VP()
    network = lambda x, t, c=None: 0.5 * x if c is None else 0.5 * x + c[:, None]  # noqa: E731  # of one line
    condition = torch.linspace(-1, 1, 5, dtype=F64)
    model = sd.ScoreModel(network, sde)
    plain = step(sd.GuidedDDPM(), sd.ClassifierGuidance(model.given(condition), log_prob(sde)), 0.6, 0.5)
    mean = step(sd.DDPM(), model.given(condition), 0.6, 0.5)
    std = step(sd.DDPM(), model.given(condition), 0.6, 0.5, 1.0) - mean
    torch.testing.assert_close(plain, mean + std**2 * slope_of(sde, 0.6, X))
    times = torch.tensor([0.6, 0.5], dtype=F64)
    outer = sd.sample(
        sd.ClassifierGuidance(model, log_prob(sde)), X.shape, solver=sd.GuidedDDPM(), times=times, x_init=X,
        condition=condition, final="none", noise=sd.Recorded(torch.zeros(1, 5, 1, dtype=F64)),
    )  # fmt: skip
    torch.testing.assert_close(outer.x, plain)
    free = sd.ClassifierFree(model, 2.0).given(condition)
    nested = step(sd.GuidedDDPM(), sd.ClassifierGuidance(free, log_prob(sde)), 0.6, 0.5)
    torch.testing.assert_close(nested, step(sd.DDPM(), free, 0.6, 0.5) + std**2 * slope_of(sde, 0.6, X))
    similar = sd.SimilarityGuidance(model.given(condition), lambda x: 3 * x.sum(1))
    torch.testing.assert_close(step(sd.GuidedDDPM(), similar, 0.6, 0.5), mean + 3 * std**2)


def test_the_learned_variance_shifts_the_mean_too():
    """The published form: `mu + w V g` and noise of variance V, with V of the network, entry by entry."""
    chain = sd.DiscreteVP(torch.linspace(0.01, 0.2, 12, dtype=F64))
    network = sd.TwoHeads(lambda x, t: torch.cat([0.1 * x, 0.3 * x], 1))
    model = sd.ScoreModel(network, chain, "noise")
    t, s = chain.times[[4, 6]].tolist()
    learned = sd.DDPM(sd.LearnedVariance())
    mean = step(learned, model, t, s)
    variance = (step(learned, model, t, s, 1.0) - mean) ** 2
    assert variance.max() > 1.01 * variance.min()
    shifted = sd.ClassifierGuidance(model, log_prob(chain), 2.0)
    found = step(sd.GuidedDDPM(sd.LearnedVariance()), shifted, t, s, 0.7)
    torch.testing.assert_close(found, mean + 2 * variance * slope_of(chain, t, X) + 0.7 * variance.sqrt())


def test_it_starts_where_no_signal_is_left():
    """At alpha = 0 a model of "v" cannot be guided by a gradient, but the mean of a chain can be moved."""
    sde = sd.RectifiedFlow(t_max=1.0)
    model = guided(sde)
    with pytest.raises(sd.TimeError, match="alpha is 0"):
        sd.sample(model, (5, 1), solver=sd.DDPM(), steps=10, seed=0)
    solution = sd.sample(model, (5, 1), solver=sd.GuidedDDPM(), steps=10, seed=0, final="none")
    assert solution.x.isfinite().all()


def test_gradients_flow_through_its_steps():
    sde, start = sd.VP(), X.clone().requires_grad_()
    times = torch.tensor([0.6, 0.5], dtype=F64)
    x = sd.sample(
        guided(sde, 3.0), X.shape, solver=sd.GuidedDDPM(), times=times, x_init=start, final="none", differentiable=True,
        noise=sd.Recorded(torch.zeros(1, 5, 1, dtype=F64)),
    ).x  # fmt: skip
    (slope,) = torch.autograd.grad(x.sum(), start)
    ends = step(sd.GuidedDDPM(), guided(sde, 3.0), 0.6, 0.5)
    torch.testing.assert_close(slope, ((ends[-1] - ends[0]) / (X[-1] - X[0])).expand(5, 1))


def test_what_it_cannot_do_is_said():
    sde = sd.VP()
    for model in (DATA.model(sde), sd.clamp_denoised(guided(sde)), sd.ClassifierFree(DATA.model(sde), -1.0)):
        with pytest.raises(sd.CapabilityError, match=r"made by ClassifierGuidance.*guided last; got .*use DDPM\(\)"):
            sd.sample(model, (5, 1), solver=sd.GuidedDDPM(), steps=3)
    denoised = sd.SimilarityGuidance(DATA.model(sde), lambda x: x.sum(1), at="denoised")
    with pytest.raises(sd.CapabilityError, match=r"SimilarityGuidance\(at='noisy'\).*got .*GuidedByDenoised"):
        sd.sample(denoised, (5, 1), solver=sd.GuidedDDPM(), steps=3)
    with pytest.raises(sd.OptionError, match="'state' or 'mean'; got 'end'"):
        sd.GuidedDDPM(at="end")
    with pytest.raises(sd.OptionError, match=r"from the model: write sample\(ClassifierGuidance\(model, log_prob"):
        sd.GuidedDDPM(log_prob(sde))
    with pytest.raises(sd.OptionError, match="Unknown variance 'small' for GuidedDDPM"):
        sd.GuidedDDPM("small")
    assert dataclasses.replace(sd.GuidedDDPM(), at="mean") == sd.GuidedDDPM(at="mean")
    assert not sd.GuidedDDPM().deterministic
