import math

import pytest
import torch
from helpers import NAMED, TwoFunctions, name
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import fixed_quad

import sdediff as sd
from sdediff.testing import gaussian_targets, linear_sdes

F64 = torch.float64


@given(linear_sdes(), gaussian_targets(), st.floats(0, 2), st.floats(0.1, 0.9))
def test_the_drift_is_f_minus_half_one_plus_lambda_squared_g_squared_score(sde, target, level, part):
    ends = sde.clock(torch.tensor([sde.t_min, sde.t_max], dtype=F64))
    t = sde.unclock(ends[0] + part * (ends[1] - ends[0]))
    model = target.model(sde)
    x = target.marginal(sde, t).sample(3, seed=0)
    a, g = sde.rates(t)
    drift, diffusion = sd.Reverse(model, level).coefficients(t, x)
    terms = a * x, (1 + level**2) / 2 * g**2 * model.score(t, x)
    size = terms[0].abs().max() + terms[1].abs().max()
    assert (drift - (terms[0] - terms[1])).abs().max() <= 1e-9 * size
    assert diffusion.item() == pytest.approx(level * g.item(), rel=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_the_fokker_planck_equation_holds_for_every_noise_level(sde, level):
    """V = alpha^2 S + sigma^2: dV/dt = 2 J V - lambda^2 g^2 (time falls: noise has a minus); the mean has its ODE."""
    linear = sd.as_linear(sde)
    mean, variance = 0.7, 0.3
    process = sd.Reverse(sd.exact.Gaussian(torch.tensor([mean], dtype=F64), variance).model(sde), level)
    for t in torch.linspace(0.1, 0.9, 5, dtype=F64) * linear.t_max:
        alpha, sigma = linear.alpha(t), linear.sigma(t)
        d_alpha, d_sigma = linear.scale_rates(t)
        drift, diffusion = process.coefficients(t, torch.tensor([[0.0], [1.0]], dtype=F64))
        slope = (drift[1] - drift[0]).item()
        total = (alpha**2 * variance + sigma**2).item()
        assert drift[0].item() + slope * (alpha * mean).item() == pytest.approx(
            (d_alpha * mean).item(), rel=1e-6, abs=1e-7
        )
        rate = (2 * alpha * d_alpha * variance + 2 * sigma * d_sigma).item()
        assert 2 * slope * total - torch.as_tensor(diffusion).item() ** 2 == pytest.approx(rate, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.RectifiedFlow(), TwoFunctions()], ids=name)
def test_only_the_reverse_sde_has_the_paths_of_the_forward_process(sde):
    """Of Gaussian data, the covariance of x_s and x_t: `alpha_{t|s} V_s` forwards, `exp(-int_s^t J) V_t` backwards."""
    target = sd.exact.Gaussian(torch.tensor([0.7], dtype=F64), 0.3)
    linear = sd.as_linear(sde)
    s, t = 0.2 * linear.t_max, 0.6 * linear.t_max
    scale, _ = linear.transition(s, t)
    forward = (scale * target.marginal(linear, s).cov).item()

    def backward(level):
        process = sd.Reverse(target.model(linear), level)

        def slope(times):
            at, rows = torch.from_numpy(times), torch.ones(len(times), 1, dtype=F64)
            return (process.drift(at, rows) - process.drift(at, 0 * rows))[:, 0].numpy()

        return math.exp(-fixed_quad(slope, s, t, n=40)[0]) * target.marginal(linear, t).cov.item()

    assert backward(1.0) == pytest.approx(forward, rel=1e-6)
    for level in (0.0, 0.5, 1.5):
        assert abs(backward(level) / forward - 1) > 0.05


MIXTURE = sd.exact.GaussianMixture(
    torch.tensor([1.0, 2.0]), torch.tensor([[-1.0, 0.3], [0.8, -0.5]], dtype=F64), torch.tensor([0.2, 0.5])
)


@given(linear_sdes(), st.floats(0.1, 0.9), st.floats(0, 2))
def test_densities_that_are_not_gaussian_solve_the_fokker_planck_equation(sde, part, level):
    """`d log p / dt = -div b - b . score +- g^2 / 2 (div score + |score|^2)`: plus for the forward process, minus for
    a process of any noise level whose time falls. Everything by autograd of the density of a mixture."""
    ends = sde.clock(torch.tensor([sde.t_min, sde.t_max], dtype=F64))
    t = sde.unclock(ends[0] + part * (ends[1] - ends[0])).detach().requires_grad_()
    density = MIXTURE.marginal(sde, t)
    x = density.sample(3, seed=0).detach().requires_grad_()
    log_p = density.log_prob(x)
    rate = torch.stack([torch.autograd.grad(value, t, retain_graph=True)[0] for value in log_p])
    (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)

    def div(field):
        return sum(torch.autograd.grad(field[:, j].sum(), x, retain_graph=True)[0][:, j] for j in range(2))

    for process, sign in ((sde, 1), (sd.Reverse(MIXTURE.model(sde), level), -1)):
        drift, g = process.coefficients(t.detach(), x)
        terms = -div(drift), -(drift * score).sum(1), sign * g**2 / 2 * div(score), sign * g**2 / 2 * (score**2).sum(1)
        size = sum(term.abs() for term in terms)
        assert ((sum(terms) - rate).abs() <= 1e-7 * size).all()


def test_a_stationary_nonlinear_sde_is_kept_by_its_reverse():
    """dx = -x^3 dt + sqrt(2) dw keeps exp(-x^4 / 4): its flow stands still, its reversal is itself."""

    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 2**0.5

    model = sd.ScoreModel(lambda x, t: -(x**3), Cubic(), prediction="score")
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=F64)
    t = torch.tensor(0.5, dtype=F64)
    torch.testing.assert_close(sd.Reverse(model, 0.0).drift(t, x), torch.zeros_like(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(sd.Reverse(model, 1.0).drift(t, x), x**3)  # run with dt < 0
    assert sd.Reverse(model, 0.5).diffusion(t, x).item() == pytest.approx(0.5 * 2**0.5)
    for solver in (sd.EulerMaruyama(0.0), sd.Heun(), sd.TorchDiffEq(), sd.TorchSDE("srk", noise_level=0.0)):
        still = sd.sample(model, x.shape, x_init=x, solver=solver, final="none", steps=5, seed=0)
        torch.testing.assert_close(still.x, x, atol=1e-9, rtol=0)
