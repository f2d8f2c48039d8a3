"""Each named process is the one of its name: derived consistency cannot catch a wrong source."""

import math

import mpmath
import pytest
import torch
from helpers import NAMED, name

import sdediff as sd
from sdediff.linear import LinearSDE

F64 = torch.float64
T = torch.tensor([1e-5, 1e-3, 0.02, 0.3, 0.6, 0.99], dtype=F64)


def test_vp_has_linear_beta_and_preserves_variance():
    sde = sd.VP(0.2, 15.0)
    a, g = sde.rates(T)
    beta = 0.2 + T * 14.8
    torch.testing.assert_close(a, -beta / 2)
    torch.testing.assert_close(g**2, beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.alpha(T) ** 2 + sde.sigma(T) ** 2, torch.ones_like(T))


def test_subvp_has_the_published_diffusion():
    sde = sd.SubVP(0.2, 15.0)
    a, g = sde.rates(T)
    beta, integral = 0.2 + T * 14.8, 0.2 * T + 7.4 * T**2
    torch.testing.assert_close(a, -beta / 2)
    torch.testing.assert_close(g**2, beta * -torch.expm1(-2 * integral), rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.sigma(T), 1 - sde.alpha(T) ** 2, rtol=1e-9, atol=1e-16)


def test_ve_is_geometric_and_carries_its_blur():
    sde = sd.VE(0.02, 30.0)
    a, g = sde.rates(T)
    sigma = 0.02 * 1500**T
    torch.testing.assert_close(sde.sigma(T), sigma)
    assert torch.equal(a, torch.zeros_like(a))
    torch.testing.assert_close(g, sigma * math.sqrt(2 * math.log(1500)))
    assert sde.sigma(0.0) == sde.initial_std == 0.02
    assert sde.transition(0.0, 1.0)[1].item() == pytest.approx(math.sqrt(30**2 - 0.02**2), rel=1e-12)


def test_edm_time_is_the_noise_level():
    sde = sd.EDM(0.01, 60.0)
    t = torch.tensor([0.01, 1.0, 60.0], dtype=F64)
    a, g = sde.rates(t)
    assert torch.equal(sde.alpha(t), torch.ones_like(t))
    assert torch.equal(sde.sigma(t), t)
    assert torch.equal(a, torch.zeros_like(a))
    torch.testing.assert_close(g, (2 * t).sqrt())
    assert (sde.t_min, sde.t_max) == (0.01, 60.0)


def test_cosine_has_the_published_alpha():
    f = lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    sde = sd.CosineVP()
    torch.testing.assert_close(sde.alpha(T) ** 2, f(T) / f(torch.zeros((), dtype=F64)))
    torch.testing.assert_close(sde.alpha(T) ** 2 + sde.sigma(T) ** 2, torch.ones_like(T))


def test_sigmoid_has_sigmoid_beta():
    sde = sd.SigmoidVP(12.0, 5.0)
    a, g = sde.rates(T)
    beta = 12 * torch.sigmoid(5 * (2 * T - 1))
    torch.testing.assert_close(-2 * a, beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(g**2, beta, rtol=1e-8, atol=0)


def test_rectified_flow_is_a_straight_line():
    sde = sd.RectifiedFlow()
    torch.testing.assert_close(sde.alpha(T) + sde.sigma(T), torch.ones_like(T))
    assert torch.equal(sde.sigma(T), T)
    torch.testing.assert_close(torch.stack(sde.scale_rates(T)), torch.stack([-torch.ones_like(T), torch.ones_like(T)]))


def test_a_discrete_chain_is_its_betas():
    betas = torch.tensor([0.01, 0.2, 0.05, 0.4, 0.1], dtype=F64)
    sde = sd.DiscreteVP(betas)
    i = torch.arange(1, 6, dtype=F64) / 5
    torch.testing.assert_close(sde.alpha(i) ** 2, (1 - betas).cumprod(0), rtol=1e-13, atol=0)
    scale, std = sde.transition(torch.cat([torch.zeros(1, dtype=F64), i[:-1]]), i)
    torch.testing.assert_close(scale, (1 - betas).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(std**2, betas, rtol=1e-10, atol=0)
    assert sde.timestep(i).tolist() == [0, 1, 2, 3, 4]
    assert sde.timestep(i).dtype == torch.int64
    torch.testing.assert_close(sde.times, i.flip(0))
    fine = torch.linspace(0, 1, 1001, dtype=F64)
    assert (sde.alpha(fine).diff() < 0).all()


def _exact_sigma(sde, t):
    """sigma in 50 digits."""
    mpmath.mp.dps = 50
    t = mpmath.mpf(t)
    if isinstance(sde, (sd.VP, sd.SubVP)):
        integral = sde.beta_min * t + (mpmath.mpf(sde.beta_max) - sde.beta_min) / 2 * t**2
        gone = 1 - mpmath.exp(-integral)
        return gone if isinstance(sde, sd.SubVP) else mpmath.sqrt(gone)
    if isinstance(sde, sd.SigmoidVP):
        beta = lambda u: sde.beta_max / (1 + mpmath.exp(-sde.ramp * (2 * u - 1)))  # noqa: E731
        return mpmath.sqrt(1 - mpmath.exp(-mpmath.quad(beta, [0, t])))
    s = mpmath.mpf(sde.offset)
    f = lambda u: mpmath.cos((u + s) / (1 + s) * mpmath.pi / 2) ** 2  # noqa: E731
    return mpmath.sqrt(1 - f(t) / f(0))


@pytest.mark.parametrize("sde", [sd.VP(), sd.SubVP(), sd.SigmoidVP(), sd.CosineVP()], ids=name)
@pytest.mark.parametrize("t", [1e-12, 1e-8, 1e-5, 1e-2, 0.9])
def test_sigma_is_accurate_relative_to_itself_down_to_zero(sde, t):
    single = torch.tensor(t, dtype=torch.float32)
    assert sde.sigma(t).item() == pytest.approx(float(_exact_sigma(sde, t)), rel=1e-11)
    assert sde.sigma(single).item() == pytest.approx(float(_exact_sigma(sde, single.item())), rel=1.2e-7)


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_closed_form_times_agree_with_bisection(sde):
    log_snr = sde.log_snr(torch.linspace(0.01, 0.99, 20, dtype=F64) * sde.t_max)
    torch.testing.assert_close(sde.time(log_snr), sd.LinearSDE._time_of(sde, log_snr), rtol=1e-9, atol=1e-13)


def test_schedules_also_at_the_published_grid_of_diffusers():
    """alphas_cumprod of diffusers' linear and cosine schedules are those of DiscreteVP and CosineVP."""
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, 1e-4, 0.02, "linear")
    sde = sd.DiscreteVP(scheduler.betas.double())
    i = torch.arange(1, 1001, dtype=F64) / 1000
    torch.testing.assert_close(sde.alpha(i) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sde", [*NAMED, sd.VP(0.2, 15.0), sd.SubVP(0.2, 15.0), sd.CosineVP(0.1, t_max=1.0)], ids=name)
def test_derivatives_in_closed_form_are_those_of_automatic_differentiation(sde):
    t = sde.t_max * torch.cat([T, torch.ones(1, dtype=F64)])
    closed, derived = (torch.stack(rates) for rates in (sde.scale_rates(t), LinearSDE.scale_rates(sde, t)))
    torch.testing.assert_close(closed, derived, rtol=1e-10, atol=1e-15)
    rates, derived_rates = (torch.stack(pair)[:, :-1] for pair in (sde.rates(t), LinearSDE.rates(sde, t)))
    torch.testing.assert_close(rates, derived_rates, rtol=1e-9, atol=0)
    with torch.inference_mode():
        assert torch.equal(torch.stack(LinearSDE.scale_rates(sde, t + 0)), derived)


@pytest.mark.parametrize("sde", [sd.VP(), sd.CosineVP(), sd.SigmoidVP(), sd.VP().discretize(20)], ids=name)
def test_scales_that_preserve_variance_are_sigmoids_of_the_log_snr(sde):
    gamma = -sde.log_snr(T)
    torch.testing.assert_close(sde.alpha(T) ** 2, torch.sigmoid(-gamma), rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.sigma(T) ** 2, torch.sigmoid(gamma), rtol=1e-12, atol=0)
