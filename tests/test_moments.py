"""From rates to scales: closed forms, singular and stiff rates, and accuracy relative to the result itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import dawsn

import sdediff as sd
from sdediff.errors import SDEError
from sdediff.moments import Moments as Unbounded

F64 = torch.float64
TIMES = torch.cat([torch.tensor([0.0]).double(), torch.logspace(-12, 0, 61, dtype=F64)])


def close(got, expected, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def Moments(rates, t_max, initial_std):
    """`Moments` with a budget: halving that never ends fills the memory, so it must fail before."""
    asked = 0

    def counted(t):
        nonlocal asked
        asked += t.numel()
        assert asked < 2_000_000, "the panels multiply without end"
        return rates(t)

    return Unbounded(counted, t_max, initial_std)


# Closed forms


@settings(max_examples=25)
@given(a=st.floats(-8, 8), g=st.floats(0.01, 10), blur=st.floats(0, 2), t_max=st.floats(0.01, 20))
def test_constant_rates_give_the_ornstein_uhlenbeck_process(a, g, blur, t_max):
    """`log alpha = a t`, `sigma^2 = e^(2 a t) blur^2 + g^2 (e^(2 a t) - 1) / (2 a)`, relative to themselves."""
    t = t_max * TIMES
    log_alpha, variance = Moments(lambda u: (torch.full_like(u, a), torch.full_like(u, g)), t_max, blur)(t)
    rtol = 1e-12 * (1 + abs(a) * t_max)
    close(log_alpha, a * t, rtol=rtol)
    grown = torch.expm1(2 * a * t) / (2 * a) if abs(a) > 1e-12 else t
    close(variance, (2 * a * t).exp() * blur**2 + g**2 * grown, rtol=2 * rtol)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VP(0.3, 25.0, t_max=2.0), sd.SubVP(), sd.VE(), sd.CosineVP(t_max=0.9)])
def test_the_rates_of_named_processes_give_back_their_scales(sde):
    t = sde.t_max * TIMES[(TIMES == 0) | (TIMES > 1e-5)]
    alpha, sigma = sde.scales(t)
    log_alpha, variance = Moments(sde.rates, sde.t_max, sde.initial_std)(t)
    close(log_alpha.exp(), alpha, rtol=1e-11)
    close(variance, sigma**2, rtol=1e-8)


def test_the_variance_of_vp_is_accurate_relative_to_itself_down_to_zero():
    """Not `1 - alpha^2` of rounded alphas: at t = 1e-9 the variance is 1e-10, and right to 12 digits."""
    t = torch.tensor([1e-12, 1e-9, 1e-6, 1e-3], dtype=F64)
    _, variance = Moments(lambda u: (-0.05 - 9.95 * u, (0.1 + 19.9 * u).sqrt()), 1.0, 0.0)(t)
    close(variance, -torch.expm1(-(0.1 * t + 9.95 * t**2)), rtol=1e-12)


@pytest.mark.parametrize("t_max", [1.0, 80.0])
def test_the_variance_is_accurate_relative_to_itself_where_the_diffusion_starts_at_zero(t_max):
    """`g^2 = 2 t` and `sigma^2 = t^2`, as for EDM, sub-VP and rectified flow."""
    t = torch.tensor([1e-9, 1e-6, 1e-3], dtype=F64)
    _, variance = Moments(lambda u: (0 * u, (2 * u).sqrt()), t_max, 0.0)(t)
    close(variance, t**2, rtol=1e-9)


@settings(max_examples=15)
@given(st.floats(-3, 3), st.floats(-6, 6), st.floats(0.1, 3), st.floats(0, 3))
def test_arbitrary_smooth_rates_match_an_independent_integrator(level, slope, push, wave):
    def rates(t):
        return level + slope * t + (wave * t).sin(), push * (1 + t**2).sqrt() + (3 * t).cos() ** 2

    def moments(t, y):
        a, g = (r.item() for r in rates(torch.tensor(t, dtype=F64)))
        return [a, 2 * a * y[1] + g**2]

    t = torch.linspace(0, 1.5, 7, dtype=F64)
    solved = solve_ivp(moments, (0, 1.5), [0, 0.04], "DOP853", t.numpy(), rtol=1e-12, atol=1e-13)
    log_alpha, variance = Moments(rates, 1.5, 0.2)(t)
    close(log_alpha, torch.from_numpy(solved.y[0]), rtol=1e-9, atol=1e-10)
    close(variance, torch.from_numpy(solved.y[1]), rtol=1e-9, atol=1e-10)


# Hard rates


def test_an_integrable_singularity_of_the_diffusion_is_cornered():
    """g = t^(-1/4): sigma^2 = 2 sqrt(t); and with a = -1 the incomplete gamma function, here Dawson's integral."""
    t = TIMES[1:]
    _, variance = Moments(lambda u: (0 * u, u**-0.25), 1.0, 0.0)(t)
    # the innermost panel, a part 2^-51 of the span, is taken as it comes
    close(variance, 2 * t.sqrt(), rtol=0, atol=1e-8)
    close(variance[t > 1e-4], 2 * t[t > 1e-4].sqrt(), rtol=1e-6)
    _, variance = Moments(lambda u: (-1 + 0 * u, u**-0.25), 1.0, 0.0)(t)
    # int_0^t e^(-2 (t - u)) u^(-1/2) du = sqrt(2) dawsn(sqrt(2 t))
    close(variance, math.sqrt(2) * torch.from_numpy(dawsn((2 * t).sqrt().numpy())), rtol=0, atol=1e-8)


def test_an_integrable_singularity_of_the_drift_is_cornered():
    t = TIMES[1:]
    log_alpha, _ = Moments(lambda u: (-(u**-0.5), 1 + 0 * u), 1.0, 0.0)(t)
    close(log_alpha, -2 * t.sqrt(), rtol=0, atol=1e-8)


def test_a_singularity_at_the_noise_end_is_cornered():
    """a = -1 / (1 - t) up to t = 0.999: alpha = 1 - t."""
    t = 0.999 * TIMES[TIMES > 1e-6]
    log_alpha, variance = Moments(lambda u: (-1 / (1 - u), (2 * u / (1 - u)).sqrt()), 0.999, 0.0)(t)
    close(log_alpha.exp(), 1 - t, rtol=1e-11)
    close(variance, t**2, rtol=1e-7)


@pytest.mark.parametrize("where", [0.3, 0.5, math.pi / 4])
def test_kinks_and_jumps_are_cornered(where):
    t = torch.linspace(0, 1, 101, dtype=F64)
    late = (t - where).clamp(min=0)
    log_alpha, _ = Moments(lambda u: (-(u - where).abs(), 1 + 0 * u), 1.0, 0.0)(t)
    close(log_alpha, -(where * t - t**2 / 2) - late**2, rtol=0, atol=1e-12)
    log_alpha, variance = Moments(lambda u: (0 * u, torch.where(u < where, 1.0, 3.0).to(u)), 1.0, 0.0)(t)
    assert not log_alpha.any()
    close(variance, t + 8 * late, rtol=1e-11)


@pytest.mark.parametrize("rate", [-500.0, -20000.0])
def test_a_stiff_contraction_neither_over_nor_underflows_nor_loses_its_balance(rate):
    """alpha falls to e^rate, far out of float64, and sigma^2 settles at g^2 / (-2 rate)."""
    t = torch.linspace(0, 1, 201, dtype=F64)
    log_alpha, variance = Moments(lambda u: (rate + 0 * u, 2 + 0 * u), 1.0, 0.3)(t)
    close(log_alpha, rate * t, rtol=1e-12)
    settled = 4 / (-2 * rate)
    close(variance, settled + (0.09 - settled) * (2 * rate * t).exp(), rtol=1e-9)


def test_a_stiff_expansion_keeps_its_relative_accuracy():
    t = torch.linspace(0, 1, 101, dtype=F64)
    log_alpha, variance = Moments(lambda u: (300 + 0 * u, 1 + 0 * u), 1.0, 0.0)(t)
    close(log_alpha, 300 * t, rtol=1e-12)
    close(variance[1:].log(), (torch.expm1(600 * t[1:]) / 600).log(), rtol=1e-12)


def test_fast_oscillation_is_resolved():
    t = torch.linspace(0, 1, 301, dtype=F64)
    log_alpha, variance = Moments(lambda u: (400 * (400 * u).cos(), 0 * u), 1.0, 1.0)(t)
    close(log_alpha, (400 * t).sin(), rtol=0, atol=1e-10)
    close(variance, (2 * (400 * t).sin()).exp(), rtol=1e-9)


@pytest.mark.parametrize("noise", [1e-13, 1e-10, 1e-7])
def test_rates_that_are_rough_at_rounding_level_end_with_that_accuracy(noise):
    """Rates worked out in float32 (a learned schedule) never look smooth to 14 digits; they must not halve for ever."""
    t = torch.linspace(0, 1, 11, dtype=F64)
    rough = lambda u: 1 + noise * (1e15 * u).sin()  # noqa: E731
    log_alpha, variance = Moments(lambda u: (-rough(u), rough(u)), 1.0, 0.0)(t)
    close(log_alpha, -t, rtol=0, atol=10 * noise)
    close(variance, -torch.expm1(-2 * t) / 2, rtol=0, atol=10 * noise)


# Refusals


@pytest.mark.parametrize(("bad", "name"), [(0, "drift rate"), (1, "diffusion")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_rate_that_is_not_finite_is_named_with_its_time(bad, name, value):
    def rates(t):
        fine = -torch.ones_like(t), torch.ones_like(t)
        wrong = torch.where(t > 0.5, value, fine[bad])
        return (wrong, fine[1]) if bad == 0 else (fine[0], wrong)

    with pytest.raises(SDEError, match=rf"The {name} is not finite at t = (0\.5\d*).*t_max = 1\).*write scales\(t\)"):
        Moments(rates, 1.0, 0.0)


def test_a_square_root_of_a_negative_number_in_a_user_s_rates_is_named():
    class Wrong(sd.LinearSDE):
        def rates(self, t):
            return -torch.ones_like(t), (0.5 - t).sqrt()

    with pytest.raises(SDEError, match=r"The diffusion is not finite at t = 0\.5"):
        Wrong().alpha(0.1)


# As a function of t


def test_the_derivative_by_autograd_is_the_right_hand_side_of_the_moment_equations():
    """`(log alpha)' = a`, `(sigma^2)' = 2 a sigma^2 + g^2`, also inside panels and at their edges."""

    def rates(t):
        return -1 - 5 * t + (7 * t).sin(), 1 + t

    solved = Moments(rates, 2.0, 0.4)
    t = torch.cat([torch.linspace(0, 2, 41), torch.tensor([1e-9, 0.123456, 1.999])]).double().requires_grad_()
    log_alpha, variance = solved(t)
    (d_log_alpha,) = torch.autograd.grad(log_alpha.sum(), t, retain_graph=True)
    (d_variance,) = torch.autograd.grad(variance.sum(), t)
    a, g = rates(t.detach())
    close(d_log_alpha, a, rtol=1e-9, atol=1e-9)
    close(d_variance, 2 * a * variance.detach() + g**2, rtol=1e-9, atol=1e-9)


def test_times_of_any_shape_and_layout_get_their_own_values():
    solved = Moments(lambda u: (-u, 1 + u), 1.0, 0.0)
    t = torch.linspace(0, 1, 6, dtype=F64)
    flat = torch.stack(solved(t))
    for shaped in (t.reshape(2, 3), t.reshape(2, 3).T, t[:0], t[3], t.flip(0)):
        log_alpha, variance = solved(shaped)
        assert log_alpha.shape == variance.shape == shaped.shape
        for time, one, other in zip(shaped.flatten(), log_alpha.flatten(), variance.flatten(), strict=True):
            index = (t == time).nonzero()[0, 0]
            assert (one, other) == (flat[0, index], flat[1, index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_scales_come_in_the_dtype_of_the_time_from_float64_inside(dtype):
    class FromRates(sd.LinearSDE):
        def rates(self, t):
            assert t.dtype == F64
            return -(t + 0.5), (2 * t + 1).sqrt()

    t = torch.tensor([[0.25], [0.75]], dtype=dtype)
    sde = FromRates()
    assert sde.alpha(t).dtype == sde.sigma(t).dtype == dtype
    exact = (-(t.double() ** 2 + t.double()) / 2).exp()
    close(sde.alpha(t), exact.to(dtype))
    close(sde.sigma(t), (1 - exact**2).sqrt().to(dtype), rtol=1e-6 if dtype != torch.float16 else 1e-3)


def test_numbers_for_rates_will_do():
    class Constant(sd.LinearSDE):
        def rates(self, t):
            return -1.0, 2.0

    t = torch.tensor([0.1, 0.9], dtype=F64)
    close(Constant().alpha(t), (-t).exp())
    close(Constant().sigma(t) ** 2, -2 * torch.expm1(-2 * t))
