import math

import numpy as np
import pytest
import torch
from helpers import NAMED, TwoFunctions, name
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import sdediff as sd
from sdediff.testing import linear_sdes

F64 = torch.float64


class FromScales(sd.LinearSDE):
    t_min = 1e-4

    def scales(self, t):
        return (-t - t**3).exp(), (t**2 + 0.5 * t).sqrt()


class FromRates(sd.LinearSDE):
    """The same process, written by its rates."""

    t_min = 1e-4

    def rates(self, t):
        a = -1 - 3 * t**2
        return a, (2 * t + 0.5 - 2 * a * (t**2 + 0.5 * t)).sqrt()


class FromDrift(sd.SDE):
    """The same process, written by its drift and diffusion."""

    t_min = 1e-4

    def drift(self, t, x):
        return sd.over(FromRates().rates(t)[0], x) * x

    def diffusion(self, t, x):
        return FromRates().rates(t)[1]


TIMES = torch.tensor([1e-9, 1e-5, 0.01, 0.3, 0.77, 1.0], dtype=F64)


@pytest.mark.parametrize("sde", [FromScales(), FromRates(), FromDrift()], ids=lambda s: type(s).__name__)
def test_scales_and_rates_are_the_same_from_either_description(sde):
    sde = sd.as_linear(sde)
    alpha, sigma = sde.scales(TIMES)
    torch.testing.assert_close(alpha, (-TIMES - TIMES**3).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, (TIMES**2 + 0.5 * TIMES).sqrt(), rtol=1e-7, atol=0)
    torch.testing.assert_close(sigma[1:], (TIMES**2 + 0.5 * TIMES).sqrt()[1:], rtol=1e-10, atol=0)
    a, g = sde.rates(TIMES)
    torch.testing.assert_close(a, -1 - 3 * TIMES**2, rtol=1e-10, atol=0)
    torch.testing.assert_close(g, FromRates().rates(TIMES)[1], rtol=1e-9, atol=0)
    d_alpha, d_sigma = sde.scale_rates(TIMES)
    torch.testing.assert_close(d_alpha, (-1 - 3 * TIMES**2) * (-TIMES - TIMES**3).exp(), rtol=1e-10, atol=0)
    expected = (2 * TIMES + 0.5) / 2 / (TIMES**2 + 0.5 * TIMES).sqrt()
    torch.testing.assert_close(d_sigma[1:], expected[1:], rtol=1e-9, atol=0)


def test_rates_without_closed_form_agree_with_quadrature():
    sde = sd.as_linear(TwoFunctions())

    def a(u):
        return -2 * (1 + math.sin(3 * u) ** 2 + math.exp(u))

    def g(u):
        return math.sqrt(4 + 3 * math.cos(5 * u) * math.exp(-u))

    for t in (0.1, 0.5, 1.0):
        log_alpha = quad(a, 0, t, epsabs=1e-13)[0]
        integrand = lambda u: g(u) ** 2 * math.exp(-2 * quad(a, 0, u, epsabs=1e-12)[0])  # noqa: E731
        variance = math.exp(2 * log_alpha) * quad(integrand, 0, t, epsabs=1e-10)[0]
        assert sde.alpha(t).item() == pytest.approx(math.exp(log_alpha), rel=1e-11)
        assert sde.sigma(t).item() == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_an_initial_blur_is_carried_by_the_rates():
    class Blurred(sd.LinearSDE):
        t_min, initial_std = 0.0, 0.2

        def rates(self, t):
            return -torch.ones_like(t), torch.ones_like(t)

    sde = Blurred()
    expected = torch.exp(-2 * TIMES) * 0.04 + (1 - torch.exp(-2 * TIMES)) / 2
    torch.testing.assert_close(sde.sigma(TIMES) ** 2, expected, rtol=1e-12, atol=0)


@given(linear_sdes(), st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3, unique=True))
def test_transitions_and_posteriors_are_those_of_gaussian_conditioning(sde, parts):
    clock = sde.clock(torch.tensor([sde.t_min or 1e-4, sde.t_max * 0.999], dtype=F64))
    u, s, t = sde.unclock(clock[0] + torch.tensor(sorted(parts), dtype=F64) * (clock[1] - clock[0]))
    if not u < s < t:
        return
    alpha, sigma = sde.alpha, sde.sigma
    scale, std = sde.transition(s, t)
    scale_us, std_us = sde.transition(u, s)
    scale_ut, std_ut = sde.transition(u, t)
    assert scale.item() == pytest.approx((alpha(t) / alpha(s)).item(), rel=1e-12)
    assert (scale**2 * sigma(s) ** 2 + std**2).item() == pytest.approx(sigma(t).item() ** 2, rel=1e-9)
    assert scale_ut.item() == pytest.approx((scale * scale_us).item(), rel=1e-12)
    assert (scale**2 * std_us**2 + std**2).item() == pytest.approx(std_ut.item() ** 2, rel=1e-8)
    x0, xt = torch.tensor([[0.7, -1.0]], dtype=F64), torch.tensor([[0.2, 2.0]], dtype=F64)
    mean, post = sde.posterior(s, t, x0, xt)
    gain = scale * sigma(s) ** 2 / sigma(t) ** 2  # conditioning of the joint Gaussian of (x_s, x_t) given x_0
    torch.testing.assert_close(mean, alpha(s) * x0 + gain * (xt - alpha(t) * x0), rtol=1e-7, atol=1e-9)
    assert post.item() ** 2 == pytest.approx((sigma(s) ** 2 - gain * scale * sigma(s) ** 2).item(), rel=1e-5, abs=1e-12)


def test_kernels_at_the_ends_of_time():
    sde = sd.RectifiedFlow(t_max=1.0)
    scale, std = sde.transition(0.3, 1.0)
    assert (scale, std) == (0, 1)
    x0, xt = torch.ones(1, 2, dtype=F64), torch.full((1, 2), 3.0, dtype=F64)
    mean, post = sde.posterior(0.3, 1.0, x0, xt)
    torch.testing.assert_close(mean, 0.7 * x0)
    assert post.item() == pytest.approx(0.3)
    mean, post = sde.posterior(0.0, 0.5, x0, xt)
    torch.testing.assert_close(mean, x0)
    assert post == 0
    assert [v.item() for v in sde.transition(0.4, 0.4)] == [1, 0]


@given(st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=40))
def test_the_ddpm_posterior_is_the_published_one(betas):
    """Of every step of any chain, the first one (which ends at the data, without noise) included."""
    b = torch.tensor(betas, dtype=F64)
    sde, n = sd.DiscreteVP(b), len(b)
    bar = (1 - b).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    i = torch.arange(1, n + 1, dtype=F64)
    x0, xt = torch.full((n, 1), 1.3, dtype=F64), torch.full((n, 1), -0.4, dtype=F64)
    mean, std = sde.posterior((i - 1) / n, i / n, x0, xt)
    expected = (1 - b).sqrt() * (1 - before) / (1 - bar) * xt[:, 0] + before.sqrt() * b / (1 - bar) * x0[:, 0]
    torch.testing.assert_close(mean[:, 0], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(std**2, b * (1 - before) / (1 - bar), rtol=1e-9, atol=1e-14)


@given(linear_sdes(), st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True))
def test_the_snr_is_alpha_squared_over_sigma_squared_and_falls(sde, parts):
    s, t = sde.t_min + torch.tensor(sorted(parts), dtype=F64) * (sde.t_max - sde.t_min)
    ratio = (sde.alpha(t) / sde.sigma(t)) ** 2
    assert sde.log_snr(t).exp().item() == pytest.approx(ratio.item(), rel=1e-9)
    if t - s > 1e-9 * sde.t_max:
        assert sde.log_snr(t) < sde.log_snr(s)


@pytest.mark.parametrize("sde", [*NAMED, FromRates(), sd.as_linear(TwoFunctions())], ids=name)
def test_time_inverts_log_snr(sde):
    t = torch.linspace(0.003, 0.997, 41, dtype=F64) * sde.t_max
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    with pytest.raises(sd.TimeError, match="they fall from"):
        sde.time(sde.log_snr(sde.t_max) - 50)


def test_perturb_is_the_kernel_with_per_row_times():
    sde = sd.VP()
    t = torch.tensor([0.1, 0.5, 0.9, 0.2])
    x0, z = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    xt = sde.perturb(t, x0, z)
    for i in range(4):
        torch.testing.assert_close(xt[i], sde.alpha(t[i]) * x0[i] + sde.sigma(t[i]) * z[i])
    assert xt.dtype == torch.float32


def test_simulate_is_exact_for_linear_sdes_whatever_the_grid():
    """Mean and covariance of (x_s, x_t) from two giant steps, within 5 standard errors of the closed form."""
    sde, n = sd.VP(), 40000
    path = sde.simulate(torch.full((n, 1), 2.0, dtype=F64), torch.tensor([0.0, 0.3, 0.8], dtype=F64), seed=0)[..., 0]
    alpha, sigma = sde.alpha(torch.tensor([0.3, 0.8])), sde.sigma(torch.tensor([0.3, 0.8]))
    scale, _ = sde.transition(0.3, 0.8)
    for k in (0, 1):
        assert abs(path[k + 1].mean() - 2 * alpha[k]) < 5 * sigma[k] / n**0.5
        assert abs(path[k + 1].var() / sigma[k] ** 2 - 1) < 5 * (2 / n) ** 0.5
    covariance = torch.cov(path[1:])[0, 1]
    assert abs(covariance - scale * sigma[0] ** 2) < 5 * sigma[0] * sigma[1] * 1.5 / n**0.5


def test_simulate_of_a_general_sde_is_euler_maruyama_and_seeded_per_row():
    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 0.5

    sde, times = Cubic(), torch.tensor([0.0, 0.1, 0.25], dtype=F64)
    x0 = torch.linspace(-1, 1, 7, dtype=F64)[:, None]
    path = sde.simulate(x0, times, seed=3)
    stream = sd.RowNoise(3).open()
    x = x0
    for k in (0, 1):
        h = times[k + 1] - times[k]
        x = x - x**3 * h + 0.5 * h.sqrt() * stream.normal(x)
        torch.testing.assert_close(path[k + 1], x, rtol=1e-12, atol=1e-14)
    assert torch.equal(sde.simulate(x0[:2], times, seed=3), path[:, :2])


def test_prior_is_the_noise_of_the_kernel_at_t_max():
    prior = sd.VE().prior((3, 2), dtype=F64)
    x = torch.randn(5, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 50
    expected = -(x / 50).square().sum((1, 2)) / 2 - 6 * math.log(50 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(prior.log_prob(x), expected)
    assert prior.sample((2,)).shape == (2, 3, 2)


@pytest.mark.parametrize("n", [4, 50])
def test_discretize_keeps_the_marginals_of_a_variance_preserving_process(n):
    sde = sd.VP()
    chain = sde.discretize(n)
    grid = torch.arange(1, n + 1, dtype=F64) / n
    torch.testing.assert_close(chain.alpha(grid), sde.alpha(grid), rtol=1e-10, atol=0)
    torch.testing.assert_close(chain.sigma(grid), sde.sigma(grid), rtol=1e-10, atol=0)


def test_the_textbook_chain_tends_to_the_vp_sde_at_rate_one_over_n():
    """beta_i = beta(i / N) / N leads to the VP SDE; the error of its log alpha^2 falls like 1 / N."""
    errors = []
    for n in (400, 800, 1600):
        i = torch.arange(1, n + 1, dtype=F64) / n
        chain = sd.DiscreteVP((0.1 + 19.9 * i) / n)
        errors.append((chain.alpha(1.0).log() - sd.VP().alpha(1.0).log()).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def test_as_linear_returns_linear_sdes_unchanged_and_refuses_others():
    sde = sd.VP()
    assert sd.as_linear(sde) is sde

    class Affine(sd.SDE):
        def drift(self, t, x):
            return 1 - x

        def diffusion(self, t, x):
            return 1.0

    class Elementwise(sd.SDE):
        def drift(self, t, x):
            return -x

        def diffusion(self, t, x):
            return torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)

    for wrong, word in ((Affine(), "drift"), (Elementwise(), "diffusion")):
        with pytest.raises(sd.SDEError, match=f"not linear.*{word}"):
            sd.as_linear(wrong)


def test_learned_scales_keep_their_gradient():
    class Learned(sd.LinearSDE):
        def __init__(self):
            self.rate = torch.tensor(1.5, dtype=F64, requires_grad=True)

        def scales(self, t):
            return (-self.rate * t).exp(), (-torch.expm1(-2 * self.rate * t)).sqrt()

    sde = Learned()
    a, g = sde.rates(torch.tensor([0.3, 0.6], dtype=F64))
    a_grad = torch.autograd.grad(a.sum(), sde.rate, retain_graph=True)[0]
    g_grad = torch.autograd.grad(g.sum(), sde.rate)[0]
    assert a_grad.item() == pytest.approx(-2)  # a = -rate
    assert g_grad.item() == pytest.approx(2 / math.sqrt(3))  # g = sqrt(2 rate)
    with torch.no_grad():
        assert not sde.rates(torch.tensor(0.3, dtype=F64))[1].requires_grad


class ForOneTime(sd.SDE):
    """Written for a scalar t, without a thought for rows; the other version cannot be vectorised."""

    t_min = 1e-3

    def drift(self, t, x):
        return -(1 + t) * x

    def diffusion(self, t, x):
        return (1 + t) * torch.ones_like(x)


class WithFloats(ForOneTime):
    def drift(self, t, x):
        return -(1 + float(t)) * x

    def diffusion(self, t, x):
        return 1 + float(t)


@pytest.mark.parametrize("sde", [ForOneTime(), WithFloats()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("event", [(), (3,), (4, 4)])
def test_coefficients_serve_rows_with_times_of_their_own(sde, event):
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=F64)
    x = torch.randn(4, *event, dtype=F64, generator=torch.Generator().manual_seed(0))
    drift, diffusion = sde.coefficients(t, x)
    factor = sd.over(1 + t, x)
    torch.testing.assert_close(drift, -factor * x)
    torch.testing.assert_close(sd.over(diffusion, x).expand(x.shape), factor.expand(x.shape))
    sd.testing.check_sde(sde)


def test_scales_that_torch_cannot_differentiate_are_refused():
    class Table(sd.LinearSDE):
        t_min = 1e-3

        def scales(self, t):
            b = torch.from_numpy(np.interp(t.detach().numpy(), [0, 1], [0, 10]))
            return (-b / 2).exp(), (-torch.expm1(-b)).sqrt()

    with pytest.raises(sd.SDEError, match="changes with t, but its derivative by torch is 0"):
        sd.as_linear(Table())


@pytest.mark.parametrize("sde", [sd.VP(), sd.SigmoidVP(), sd.CosineVP(), sd.VP().discretize(20)], ids=name)
def test_rates_are_finite_at_the_data(sde):
    a, g = sde.rates(torch.tensor([0.0, 1e-6], dtype=F64))
    assert (g > 0).all()
    torch.testing.assert_close(a[0], a[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(g[0], g[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(g**2, -2 * a)
