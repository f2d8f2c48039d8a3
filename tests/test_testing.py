"""The public checks pass on right SDEs, and each of them fails on an SDE with the matching mistake."""

import pytest
import torch
from helpers import NAMED, name
from hypothesis import HealthCheck, given, settings

import sdediff as sd
from sdediff import testing
from sdediff.testing import SDE_CHECKS, check_sde, checks, gaussian_targets, linear_sdes

F64 = torch.float64


@pytest.mark.parametrize("sde", NAMED, ids=name)
@pytest.mark.parametrize("check", SDE_CHECKS, ids=lambda c: c.__name__)
def test_named_sdes_pass(sde, check):
    check(sde)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(linear_sdes())
def test_drawn_sdes_pass_the_cheap_checks(sde):
    slow = (checks.simulated_moments, checks.flow_is_invertible, checks.likelihood_is_exact)
    check_sde(sde, tuple(check for check in SDE_CHECKS if check not in slow))


@given(gaussian_targets())
def test_drawn_targets_are_positive_definite(target):
    assert torch.linalg.eigvalsh(target.cov).min() > 0
    assert target.mean.dtype == F64


class Base(sd.LinearSDE):
    """alpha = exp(-2 t), sigma^2 = 1 - alpha^2: a = -2, g = 2."""

    t_min = 1e-3

    def scales(self, t):
        return (-2 * t).exp(), (-torch.expm1(-4 * t)).sqrt()


class FactorTwoInDrift(Base):
    def drift(self, t, x):
        return -1.0 * x


class WrongDiffusion(Base):
    def diffusion(self, t, x):
        return 2.2


class NotAtData(Base):
    def scales(self, t):
        alpha, sigma = super().scales(t)
        return 0.9 * alpha, sigma


class UndeclaredBlur(Base):
    def scales(self, t):
        return (-2 * t).exp(), (1.01 - (-4 * t).exp()).sqrt()


class BroadcastsByLuck(Base):
    def drift(self, t, x):
        return self.rates(t)[0] * (1 + 0 * t) * x * (1 + t)


class WrongTransition(Base):
    def transition(self, s, t):
        scale, std = super().transition(s, t)
        return scale, 1.1 * std


class WrongPosterior(Base):
    def posterior(self, s, t, x0, xt):
        mean, std = super().posterior(s, t, x0, xt)
        return mean, std**2


class WrongInverse(Base):
    def _time_of(self, log_snr):
        return super()._time_of(log_snr) * 0.999


class SinglePrecision(Base):
    def scales(self, t):
        alpha, sigma = super().scales(t)
        return alpha, (1 - alpha.float() ** 2).sqrt().double() if t.dtype == torch.float64 and t.ndim else sigma

    def perturb(self, t, x0, noise):
        out = super().perturb(t, x0, noise)
        return out * (1 + 1e-3) if x0.dtype == torch.float32 else out


class WrongReverse(Base):
    def reverse_drift(self, t, x, model, noise_level):
        return super().reverse_drift(t, x, model, noise_level * 0.9)


class WrongFlow(Base):
    def reverse_drift(self, t, x, model, noise_level):
        return super().reverse_drift(t, x, model, noise_level) + 0.01 * x


@pytest.mark.parametrize(
    ("sde", "check"),
    [
        (NotAtData(), checks.starts_at_the_data),
        (UndeclaredBlur(), checks.starts_at_the_data),
        (FactorTwoInDrift(), checks.scales_solve_the_moment_equations),
        (WrongDiffusion(), checks.scales_solve_the_moment_equations),
        (FactorTwoInDrift(), checks.simulated_moments),
        (WrongDiffusion(), checks.simulated_moments),
        (WrongTransition(), checks.chapman_kolmogorov),
        (WrongPosterior(), checks.posterior_is_bayes),
        (WrongInverse(), checks.time_inverts_log_snr),
        (BroadcastsByLuck(), checks.rows_are_independent),
        (SinglePrecision(), checks.float32_agrees_with_float64),
        (WrongReverse(), checks.marginals_do_not_depend_on_the_noise_level),
        (WrongFlow(), checks.flow_is_invertible),
        (WrongFlow(), checks.likelihood_is_exact),
    ],
    ids=lambda v: v.__name__ if callable(v) else type(v).__name__,
)
def test_each_check_finds_its_mistake(sde, check):
    with pytest.raises(sd.CheckFailure):
        check(sde)


def test_a_failure_says_which_identity_where_and_by_how_much():
    with pytest.raises(
        sd.CheckFailure, match=r"FactorTwoInDrift.*moment.*alpha' = a alpha at t = .* against .*, off by"
    ):
        check_sde(FactorTwoInDrift())


def test_an_snr_that_does_not_fall_is_found(monkeypatch):
    class Rises(Base):
        def scales(self, t):
            return (-2 * t).exp(), (1 + (3 * t - 1) ** 2).sqrt() * (-2 * t).exp()

    with pytest.raises(sd.SDEError, match="must fall strictly"):
        check_sde(Rises())
    monkeypatch.setattr(sd.LinearSDE, "validate", lambda self: None)
    with pytest.raises(sd.CheckFailure, match="SNR does not fall"):
        checks.snr_falls(Dips())


class Dips(Base):
    """Falls on the whole, with one dip."""

    def log_snr(self, t):
        value = super().log_snr(t)
        return value + torch.where((torch.as_tensor(t) - 0.5).abs() < 0.01, 1.0, 0.0)


def test_every_check_is_tested_for_power():
    """No check may be in the list without a mistake that it finds."""
    import inspect

    source = inspect.getsource(inspect.getmodule(test_each_check_finds_its_mistake))
    for check in SDE_CHECKS:
        assert f"checks.{check.__name__}" in source


def test_checks_do_not_need_hypothesis(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(sd.MissingExtraError, match=r"sdediff\[test\]"):
        testing.__getattr__("linear_sdes")
    check_sde(sd.VP(), (checks.snr_falls,))


class Decays(sd.SDE):
    t_max = 10.0

    def drift(self, t, x):
        return -x

    def diffusion(self, t, x):
        return 2**0.5


class Jumps(sd.LinearSDE):
    t_min = 1e-3

    def rates(self, t):
        return -torch.ones_like(t), torch.where(t < 0.5, 1.0, 3.0)


@pytest.mark.parametrize("sde", [Decays(), sd.VP(beta_max=60.0), Jumps()], ids=name)
def test_unusual_but_right_sdes_pass(sde):
    check_sde(sde)
