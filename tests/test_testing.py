"""The public checks pass on right SDEs and solvers, and each fails on one with the matching mistake."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from helpers import NAMED, name
from hypothesis import HealthCheck, given, settings

import sdediff as sd
from sdediff import testing
from sdediff.adaptive_sde import AdaptiveStochastic
from sdediff.embedded import AdaptiveRungeKutta
from sdediff.solvers import euler_steps
from sdediff.testing import (
    SDE_CHECKS,
    SOLVER_CHECKS,
    check_sde,
    check_solver,
    checks,
    gaussian_targets,
    linear_sdes,
    solver_checks,
)

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


# Solvers


@dataclass(frozen=True)
class ThereAndBack(sd.GuidedDDPM):
    """The mean is shifted one way, for a model whose score is guided the other way: plain DDPM to first order."""

    def process(self, model):
        def pull(t, x):
            return -0.1 * (x - 0.3).square().reshape(len(x), -1).sum(1)

        return super().process(sd.ClassifierGuidance(sd.ClassifierGuidance(model, pull, -1.0), pull))


SOLVERS = [
    (sd.DDIM(), 1),
    (sd.DDIM(eta=0.5), 1),
    (sd.DDPM(), 1),
    (sd.DDPM("beta"), 1),
    (ThereAndBack(), 1),
    (ThereAndBack(at="mean"), 1),
    (sd.EulerMaruyama(), 1),
    (sd.EulerMaruyama(0.0), 1),
    (sd.Heun(), 2),
    (sd.Heun(churn=5.0), 2),
    (sd.RungeKutta("midpoint"), 2),
    (sd.RungeKutta("ralston"), 2),
    (sd.RungeKutta("kutta3"), 3),
    (sd.RungeKutta("rk4"), 4),
    (sd.RungeKutta("bosh3"), 3),
    (sd.RungeKutta("dopri5"), 5),
    (sd.SRA1(), 2),
    (sd.SRA1(0.0), 2),
    (sd.Exponential(), 3),
    (sd.Exponential(2), 3),
    (sd.Exponential(5), 3),  # as its first steps have lower order
    (sd.Exponential(1, predict="data"), 2),
    (sd.Exponential(2, predict="data", corrector=False), 2),
    (sd.Exponential(3, predict="noise", corrector=False), 2.9),
    (sd.Exponential(noise_level=1.0), 2),
    (sd.Exponential(noise_level=lambda t: 0.2 + t), 2),
    (sd.Exponential(2, noise_level=1.0, predict="data", corrector=False), 2),
    (sd.UniPC(2), 3),
    (sd.UniPC(3, variant="bh1"), 3),
    (sd.ExponentialRungeKutta(2), 2),
    (sd.ExponentialRungeKutta(3, predict="data"), 3),
    (sd.Adaptive(), None),
    (AdaptiveRungeKutta(), None),
    (AdaptiveStochastic(), None),
    (sd.PredictorCorrector(sd.DDIM()), 0),
    (sd.PredictorCorrector(sd.DDPM(), sd.LangevinByNorm(0.05)), 0),
    (sd.AnnealedLangevin(steps=3, snr=0.3), 0),
    (sd.TorchDiffEq("rk4"), 4),
    (sd.TorchDiffEq("heun3"), 3),
    (sd.TorchSDE("srk"), 2),
    (sd.TorchSDE("heun"), 2),
    (sd.TorchSDE("reversible_heun"), 1.5),  # not yet asymptotic
    (sd.TorchSDE("euler", noise_level=0.0), 1),
]
"""Every solver, and the order that the check must find; a new solver gets a row here."""


@pytest.mark.parametrize(("solver", "order"), SOLVERS, ids=name)
def test_the_solvers_of_the_library_pass(solver, order):
    check_solver(solver, order)


def test_no_solver_is_missing_from_the_list():
    classes = {value for value in vars(sd).values() if isinstance(value, type) and issubclass(value, sd.Solver)}
    listed = {cls for solver, _ in SOLVERS for cls in type(solver).__mro__}
    assert listed >= {cls for cls in classes if not inspect.isabstract(cls)}


def test_adaptive_methods_of_torchdiffeq_couple_the_rows_of_a_batch():
    solver = sd.TorchDiffEq("bosh3")
    with pytest.raises(sd.CheckFailure, match="rows_do_not_know_their_batch"):
        check_solver(solver)
    check_solver(solver, checks=tuple(c for c in SOLVER_CHECKS if c is not solver_checks.rows_do_not_know_their_batch))


@dataclass(frozen=True)
class Euler(sd.Solver):
    """A right solver, in which one thing after the other is made wrong below."""

    noise_level: float = 0.0

    def start(self, process, x, times, noise):
        return euler_steps(process, times, noise)


class WrongSign(Euler):
    def start(self, process, x, times, noise):
        along, lengths = process.along(times), times.diff().tolist()
        return lambda i, x: x.add(along.drift(i, x), alpha=-lengths[i])


class TooMuchNoise(Euler):
    def start(self, process, x, times, noise):
        step, along, lengths = euler_steps(process, times, noise), process.along(times), times.diff().tolist()

        def louder(i, x):
            still = x.add(along.drift(i, x), alpha=lengths[i])
            return still + 1.1 * (step(i, x) - still)

        return louder


class CoupledRows(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x) + 1e-6 * (x - x.mean(0))


class EndsEarly(Euler):
    def grid(self, model, steps, t_min=None):
        return sd.grids.uniform(model.sde, steps, t_min=0.02 if t_min is None else t_min + 1e-6)


class CountsPoints(Euler):
    def grid(self, model, steps, t_min=None):
        return sd.grids.uniform(model.sde, max(steps - 1, 1), t_min=t_min)


class Rises(Euler):
    def grid(self, model, steps, t_min=None):
        return sd.grids.uniform(model.sde, steps, t_min=t_min).flip(0)


class LooksAhead(Euler):
    def start(self, process, x, times, noise):
        along, lengths = process.along(times - 0.05), times.diff().tolist()
        return lambda i, x: x.add(along.drift(i + 1, x), alpha=lengths[i])


class LosesAState(Euler):
    def solve(self, process, x, times, noise, tally=None):
        yield from list(super().solve(process, x, times, noise, tally))[1:]


class NeverAsks(Euler):
    def start(self, process, x, times, noise):
        return lambda i, x: x


class SaysItIsNoisy(Euler):
    @property
    def deterministic(self):
        return False


class SaysItIsNot(Euler):
    @property
    def deterministic(self):
        return True


class Remembers(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        object.__setattr__(self, "last", None)

        def heavy(i, x):
            last = x if self.last is None or self.last.shape != x.shape else self.last
            object.__setattr__(self, "last", x)
            return step(i, x) + 0.1 * (x - last)

        return heavy


class Shared(Euler):
    """As above, with a memory that outlives the solve."""

    memory = []  # noqa: RUF012

    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)

        def heavy(i, x):
            self.memory.append(i)
            return step(i, x) + 1e-9 * len(self.memory)

        return heavy


class Flattens(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x).flatten(1) if i == len(times) - 2 and x.ndim > 1 else step(i, x)


class AddsAnAxis(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x).reshape(len(x), -1) if i == len(times) - 2 and x.ndim == 1 else step(i, x)


class MixesAxes(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x) + (0.1 * x.sum(1, keepdim=True) if x.ndim == 4 else 0)


class Widens(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x).double()


class LosesDigits(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x) + (0.1 if x.dtype == torch.float32 else 0)


class Diverges(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x) * 1e4


class Clips(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)
        return lambda i, x: step(i, x).clamp(-1.5, 1.5)


class DrawsALot(Euler):
    def start(self, process, x, times, noise):
        step = euler_steps(process, times, noise)

        def noisy(i, x):
            for _ in range(300):
                noise.normal(x)
            return step(i, x)

        return noisy


def test_the_solver_that_is_spoilt_below_is_right():
    check_solver(Euler())
    check_solver(Euler(1.0))


@pytest.mark.parametrize(
    ("solver", "check", "message"),
    [
        (EndsEarly(), solver_checks.grid_ends_are_exact, "in place of 1 to"),
        (CountsPoints(), solver_checks.grid_ends_are_exact, r"has shape \(2,\) in place of \(3,\)"),
        (Rises(), solver_checks.grid_ends_are_exact, "does not fall"),
        (LooksAhead(), solver_checks.stays_within_the_grid, "asked at times from 0.11"),
        (LosesAState(), solver_checks.stays_within_the_grid, "5 steps gave 4 states"),
        (NeverAsks(), solver_checks.stays_within_the_grid, "never called"),
        (SaysItIsNoisy(), solver_checks.deterministic_is_true, "deterministic = False, but .* the same states"),
        (SaysItIsNot(1.0), solver_checks.deterministic_is_true, "deterministic = True, but .* other states"),
        (Remembers(), solver_checks.same_seed_repeats, "take turns disturb each other: off by"),
        (Shared(), solver_checks.same_seed_repeats, "differs from the first"),
        (CoupledRows(), solver_checks.rows_do_not_know_their_batch, "batches of 1: off by"),
        (Flattens(), solver_checks.events_have_any_shape, r"became \(3, 12\)"),
        (AddsAnAxis(), solver_checks.events_have_any_shape, "no event axis, became"),
        (MixesAxes(), solver_checks.events_have_any_shape, "differ from those of shape"),
        (Widens(), solver_checks.dtype_is_kept, "float32 became torch.float64"),
        (LosesDigits(), solver_checks.dtype_is_kept, "float32 states differ"),
        (WrongSign(), solver_checks.error_falls_at_its_order, "but order 1 is claimed"),
        (TooMuchNoise(1.0), solver_checks.error_falls_at_its_order, "but order 1 is claimed"),
        (Clips(1.0), solver_checks.error_falls_at_its_order, "not affine in start and noise"),
        (DrawsALot(1.0), solver_checks.error_falls_at_its_order, "draws .* times in .* order=0"),
    ],
    ids=lambda v: v.__name__ if callable(v) else type(v).__name__ if isinstance(v, sd.Solver) else "",
)
def test_each_check_of_a_solver_finds_its_mistake(solver, check, message):
    with pytest.raises(sd.CheckFailure, match=message):
        check(solver)
    with pytest.raises(sd.CheckFailure, match=f"{type(solver).__name__}.* fails"):
        check_solver(solver)


def test_a_first_order_method_that_claims_two_is_refused():
    for solver in (sd.DDIM(), sd.DDPM(), sd.EulerMaruyama()):
        with pytest.raises(
            sd.CheckFailure, match=r"even in t falls at order (0\.9|1\.0).*, but order 2 is claimed; errors"
        ):
            check_solver(solver, order=2)


@pytest.mark.parametrize("solver", [WrongSign(), WrongSign(1.0), TooMuchNoise(3.0)], ids=name)
def test_without_an_order_the_result_must_still_be_near(solver):
    with pytest.raises(sd.CheckFailure, match=r"121 steps on a grid even in t the .* is (off by )?[\d.e+]+ deviations"):
        solver_checks.error_falls_at_its_order(solver, order=0)


def test_states_that_are_not_finite_are_told_by_the_solve():
    with pytest.raises(sd.DivergenceError):
        check_solver(Diverges())


def test_every_check_of_a_solver_is_tested_for_power():
    source = inspect.getsource(inspect.getmodule(test_each_check_of_a_solver_finds_its_mistake))
    for check in SOLVER_CHECKS:
        assert f"solver_checks.{check.__name__}, " in source
