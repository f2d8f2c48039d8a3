r"""What must be true of an SDE, as functions of the SDE.

Each check takes an SDE (general ones are first turned into linear ones by `as_linear`), compares two independent
computations of the same thing, and raises `CheckFailure` with the identity that broke, where, and by how much. The
drift and diffusion are always those the user wrote; what they are compared with is what the library derives.

Numbers are compared to a relative tolerance that is far above rounding and far below any wrong formula. The one check
that draws random numbers, `simulated_moments`, compares with the exact moments of the very recursion that it simulates,
so that only sampling error remains, and fails beyond 5 standard errors: for a correct SDE about once in 10^6 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sdediff.adapters import TorchDiffEq
from sdediff.errors import CheckFailure
from sdediff.exact import Gaussian
from sdediff.grids import natural
from sdediff.likelihood import log_prob
from sdediff.linear import LinearSDE, as_linear
from sdediff.noise import RowNoise
from sdediff.reverse import Reverse
from sdediff.sampling import encode, sample
from sdediff.sde import SDE
from sdediff.shapes import over

Check = Callable[[SDE], None]

_NOISE_LEVELS = (0.0, 0.5, 1.0, 1.5)


def _compare(what: str, t: float | Tensor, got: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    """Raise when two numbers, or two rows of them at the times t, differ by more than the relative tolerance."""
    found = torch.as_tensor(got, dtype=torch.float64).reshape(-1).detach()
    wanted = torch.as_tensor(expected, dtype=torch.float64).reshape(-1).detach().expand(found.shape)
    off = (found - wanted).abs() / (wanted.abs() + 1e-12)
    off = torch.where(off.isnan(), math.inf, off)
    worst = int(off.argmax())
    if off[worst] > tolerance:
        times = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(off.shape)
        raise CheckFailure(
            f"{what} at t = {times[worst]:.6g}: {found[worst]:.10g} against {wanted[worst]:.10g}, "
            f"off by {off[worst]:.2g} (relative; {tolerance:.1g} allowed)."
        )


def _times(sde: SDE, n: int) -> Tensor:
    """`n` increasing times from t_min to t_max, even in the natural clock, ends included."""
    return natural(as_linear(sde), n - 1).flip(0)


def _inside(sde: SDE, n: int) -> Tensor:
    """The same without the ends."""
    return _times(sde, n + 2)[1:-1]


def _written_rates(sde: SDE, t: float) -> tuple[float, float]:
    """`(a, g)` read off the drift and diffusion that the user wrote, at one time."""
    drift, diffusion = sde.coefficients(torch.tensor(t, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    return drift.item(), torch.as_tensor(diffusion, dtype=torch.float64).reshape(-1)[0].item()


def starts_at_the_data(sde: SDE) -> None:
    """`alpha(0) = 1` and `sigma(0) = initial_std`: t = 0 is the data, up to the blur that the SDE declares."""
    linear = as_linear(sde)
    _compare("alpha(0) is not 1", 0.0, linear.alpha(0.0), 1.0, 1e-6)
    off = abs(linear.sigma(0.0).item() - sde.initial_std)
    if off > 1e-6 * linear.sigma(sde.t_max).item():
        raise CheckFailure(
            f"sigma(0) = {linear.sigma(0.0).item():.6g}, but initial_std = {sde.initial_std:.6g} is declared: state "
            "the blur that the data has at t = 0 as the attribute initial_std."
        )


def snr_falls(sde: SDE) -> None:
    """The SNR falls strictly, alpha and sigma are positive."""
    linear = as_linear(sde)
    times = _times(linear, 401)
    log_snr = linear.log_snr(times)
    wrong = (~(log_snr.diff() < 0)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise CheckFailure(
            f"The SNR does not fall: log SNR is {log_snr[i]:.10g} at t = {times[i]:.6g} and {log_snr[i + 1]:.10g} at "
            f"t = {times[i + 1]:.6g}."
        )


def scales_solve_the_moment_equations(sde: SDE) -> None:
    """`alpha' = a alpha` and `(sigma^2)' = 2 a sigma^2 + g^2`, solved by an independent integrator."""
    linear = as_linear(sde)
    times = _times(linear, 9)
    times = times[linear.alpha(times) > 0]
    alpha, sigma = linear.alpha(times), linear.sigma(times)

    def moments(t: float, y: np.ndarray) -> list[float]:
        drift_rate, diffusion = _written_rates(sde, t)
        return [drift_rate, 2 * drift_rate * y[1] + diffusion**2]

    start = [alpha[0].log().item(), sigma[0].item() ** 2]
    solved = solve_ivp(
        moments, (times[0].item(), times[-1].item()), start, "DOP853", times.numpy(), rtol=1e-8, atol=1e-12
    )
    if not solved.success:
        raise CheckFailure(f"The moment equations of {sde} could not be integrated: {solved.message}")
    _compare("alpha is not the solution of alpha' = a alpha", times, alpha, np.exp(solved.y[0]), 1e-5)
    _compare("sigma^2 is not the solution of its moment equation", times, sigma**2, solved.y[1], 1e-5)


def chapman_kolmogorov(sde: SDE) -> None:
    """The transition u -> t is u -> s followed by s -> t; from 0 it is the kernel."""
    linear = as_linear(sde)
    times = _inside(linear, 7)
    u, s, t = (times[list(picks)] for picks in ((0, 0, 1, 2, 3), (1, 3, 4, 3, 5), (2, 6, 5, 6, 6)))
    (scale_ut, std_ut), (scale_us, std_us), (scale_st, std_st) = (
        linear.transition(*pair) for pair in ((u, t), (u, s), (s, t))
    )
    _compare("The scales of transitions do not compose", t, scale_ut, scale_us * scale_st, 1e-9)
    _compare("The variances of transitions do not compose", t, std_ut**2, scale_st**2 * std_us**2 + std_st**2, 1e-8)
    one = torch.ones(5, 1, dtype=torch.float64)
    _compare(
        "A step of simulate is not its transition", t, linear.advance(s, t, one, one)[:, 0], scale_st + std_st, 1e-9
    )
    scale, std = linear.transition(torch.zeros_like(times), times)
    alpha, sigma = linear.alpha(times), linear.sigma(times)
    blur = linear.sigma(0.0) * alpha
    _compare("transition(0, t) does not scale by alpha", times, scale * linear.alpha(0.0), alpha, 1e-9)
    _compare("transition(0, t) does not lead to sigma", times, std**2 + blur**2, sigma**2, 1e-8)


def posterior_is_bayes(sde: SDE) -> None:
    """`q(x_s | x_t, x_0) q(x_t | x_0)` has the marginal `q(x_s | x_0)` and the covariance of the forward process."""
    linear = as_linear(sde)
    times = _inside(linear, 6)
    s, t = times[[0, 0, 1, 2, 4]], times[[1, 5, 3, 4, 5]]
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    from_x, std = linear.posterior(s, t, zero, one)
    from_x0, _ = linear.posterior(s, t, one, zero)
    alpha_s, alpha_t, sigma_s, sigma_t = linear.alpha(s), linear.alpha(t), linear.sigma(s), linear.sigma(t)
    scale, _ = linear.transition(s, t)
    _compare("The posterior mean misses alpha_s x_0", t, from_x * alpha_t + from_x0, alpha_s, 1e-9)
    _compare("The posterior variance misses sigma_s^2", t, from_x**2 * sigma_t**2 + std**2, sigma_s**2, 1e-9)
    _compare("The posterior misses cov(x_s, x_t | x_0)", t, from_x * sigma_t**2, scale * sigma_s**2, 1e-9)


def time_inverts_log_snr(sde: SDE) -> None:
    """`time(log_snr(t)) = t`."""
    linear = as_linear(sde)
    times = _inside(linear, 33)
    _compare("time(log_snr(t)) is not t", times, linear.time(linear.log_snr(times)), times, 1e-7)


def rows_are_independent(sde: SDE) -> None:
    """A row with its own time gets what it would get alone, for drift, diffusion, kernels and the reverse drift."""
    linear = as_linear(sde)
    times = _inside(linear, 4)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=generator)
    flow = Reverse(Gaussian(torch.zeros(4, 4), 0.5).model(linear), 1.0)
    drift, diffusion = sde.coefficients(times, x)
    together = {
        "drift": drift,
        "diffusion": over(diffusion, x).expand(x.shape),
        "perturb": linear.perturb(times, x, z),
        "the reverse drift": flow.drift(times, x),
    }
    for row, t in enumerate(times):
        own, z_own = x[row : row + 1], z[row : row + 1]
        drift, diffusion = sde.coefficients(t, own)
        alone = {
            "drift": drift,
            "diffusion": over(diffusion, own).expand(own.shape),
            "perturb": linear.perturb(t, own, z_own),
            "the reverse drift": flow.drift(t, own),
        }
        for name, value in alone.items():
            if together[name].shape != x.shape:
                raise CheckFailure(
                    f"{name} has shape {tuple(together[name].shape)} for times of shape {tuple(times.shape)} and "
                    f"states of shape {tuple(x.shape)}: lay functions of t over x with sdediff.over(c, x)."
                )
            _compare(
                f"{name} of row {row} depends on its batch (lay functions of t over x with sdediff.over(c, x))",
                t, together[name][row].flatten(), value.flatten(), 1e-9,
            )  # fmt: skip


def float32_agrees_with_float64(sde: SDE) -> None:
    """Scales, kernels and drifts of float32 states and times are those of float64, also at t_min."""
    linear = as_linear(sde)
    times = _times(linear, 17)[:-1].float()
    for name, function in (("alpha", linear.alpha), ("sigma", linear.sigma)):
        _compare(f"{name} in float32", times, function(times), function(times.double()), 1e-6)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, len(times), 3, generator=generator)
    single, double = linear.perturb(times, x, z), linear.perturb(times.double(), x.double(), z.double())
    spread = (linear.alpha(times) + linear.sigma(times))[:, None]
    _compare("perturb in float32", times, 1 + ((single - double) / spread).abs().amax(1), 1.0, 1e-5)
    (drift, _), (wide, _) = sde.coefficients(times.double(), x), sde.coefficients(times.double(), x.double())
    size = wide.abs().amax(1) + 1e-12
    _compare("The drift in float32", times, 1 + ((drift - wide).abs().amax(1) / size), 1.0, 1e-5)


def simulated_moments(sde: SDE) -> None:
    """Euler-Maruyama on the written drift and diffusion: its moments tend to the derived ones, its paths have them."""
    linear = as_linear(sde)
    x0, rows = 1.5, 4096
    first, last = _times(linear, 21)[1].item(), _times(linear, 21)[-3].item()
    derived = torch.stack([linear.alpha(last) * x0, linear.sigma(last) ** 2])

    def recursion(n: int) -> Tensor:
        times = _between(linear, first, last, n)
        mean, variance = linear.alpha(first).item() * x0, linear.sigma(first).item() ** 2
        for t, s in pairwise(times.tolist()):
            drift_rate, diffusion = _written_rates(sde, t)
            factor = 1 + drift_rate * (s - t)
            mean, variance = factor * mean, factor**2 * variance + diffusion**2 * (s - t)
        return torch.tensor([mean, variance], dtype=torch.float64)

    coarse, fine = recursion(400), recursion(800)
    limit = 2 * fine - coarse  # Richardson: the recursion is first order
    # Richardson assumes smooth coefficients; where they jump, the last refinement says how far to trust it.
    size = (derived[0].abs() + derived[1].sqrt()).item()
    off = (fine - coarse).abs()
    what = "The simulated mean does not tend to alpha x_0 (both over its size with the noise, plus 1)"
    _compare(what, last, 1 + limit[0] / size, 1 + derived[0] / size, 2e-3 + off[0].item() / size)
    trust = 2e-3 + (off[1] / derived[1]).item()
    _compare("The simulated variance does not tend to sigma^2", last, limit[1], derived[1], trust)

    times = _between(linear, first, last, 400)
    stream = RowNoise(0).open()
    x = torch.full((rows, 1), x0, dtype=torch.float64)
    x = linear.perturb(first, x, stream.normal(x))
    for t, s in pairwise(times):
        x = SDE.advance(sde, t, s, x, stream.unit(x, t, s))
    for name, value, expected, error in (
        ("mean", x.mean(), coarse[0], (coarse[1] / rows).sqrt()),
        ("variance", x.var(), coarse[1], coarse[1] * math.sqrt(2 / rows)),
    ):
        if not abs(value - expected) <= 5 * error:
            raise CheckFailure(
                f"The {name} of {rows} simulated paths at t = {last:.6g} is {value:.6g}, but the recursion has "
                f"{expected:.6g}: off by {abs(value - expected) / error:.1f} standard errors (5 allowed)."
            )


def _between(linear: LinearSDE, first: float, last: float, n: int) -> Tensor:
    """`n + 1` increasing times from first to last, even in the natural clock."""
    ends = linear.clock(torch.tensor([first, last], dtype=torch.float64))
    times = linear.unclock(ends[0] + torch.linspace(0, 1, n + 1, dtype=torch.float64) * (ends[1] - ends[0]))
    times[0], times[-1] = first, last
    return times


def marginals_do_not_depend_on_the_noise_level(sde: SDE) -> None:
    """The equal-marginal processes of levels 0, 0.5, 1, 1.5 carry Gaussian data through its exact moments."""
    linear = as_linear(sde)
    mean, variance = 0.7, 0.3
    target = Gaussian(torch.tensor([mean], dtype=torch.float64), variance)
    model = target.model(linear)
    times = _inside(linear, 9).flip(0)
    alpha, sigma = linear.alpha(times), linear.sigma(times)
    start = [alpha[0].item() * mean, (alpha[0] ** 2 * variance + sigma[0] ** 2).item()]
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for level in _NOISE_LEVELS:
        process = Reverse(model, level)

        def moments(t: float, y: np.ndarray, process: Reverse = process) -> list[float]:
            at = torch.tensor(t, dtype=torch.float64)
            drift, diffusion = process.coefficients(at, points)
            slope = (drift[1] - drift[0]).item()
            # time falls, so the noise adds variance as t decreases
            return [drift[0].item() + slope * y[0], 2 * slope * y[1] - torch.as_tensor(diffusion).item() ** 2]

        ends = (times[0].item(), times[-1].item())
        solved = solve_ivp(moments, ends, start, "RK45", times.numpy(), rtol=1e-7, atol=1e-10)
        if not solved.success:
            raise CheckFailure(f"The reverse process of {sde} could not be integrated: {solved.message}")
        what = f"The process of noise level {level:g} does not keep the"
        _compare(f"{what} marginal mean", times, solved.y[0], alpha * mean, 1e-4)
        _compare(f"{what} marginal variance", times, solved.y[1], alpha**2 * variance + sigma**2, 1e-4)


def _flow_target() -> Gaussian:
    return Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([[0.8, 0.3], [0.3, 0.4]]))


def flow_is_invertible(sde: SDE) -> None:
    """encode follows the exact flow of Gaussian data, and sample leads back."""
    linear = as_linear(sde)
    target = _flow_target()
    model = target.model(linear)
    solver = TorchDiffEq(rtol=1e-8, atol=1e-8)
    x = target.marginal(linear, linear.t_min).sample(16, seed=0)
    latent = encode(model, x, solver=solver).x
    scale = target.marginal(linear, linear.t_max).cov.diagonal().sqrt()
    exact = target.flow(linear, x, linear.t_min, linear.t_max)
    _compare("encode leaves the exact flow", linear.t_max, 1 + ((latent - exact) / scale).abs().max(), 1.0, 1e-4)
    back = sample(model, x.shape, x_init=latent, solver=solver, final="none", seed=0).x
    _compare("sample does not lead encode back", linear.t_min, 1 + (back - x).abs().max(), 1.0, 1e-4)


def likelihood_is_exact(sde: SDE) -> None:
    """log_prob of Gaussian data, with its exact terminal density, is the closed form, also by a solver of the flow."""
    linear = as_linear(sde)
    target = _flow_target()
    x = target.sample(16, seed=1)
    model, end, exact = target.model(linear), target.marginal(linear, linear.t_max), target.log_prob(x)
    rows = log_prob(model, x, atol_nats=1e-4, prior=end)
    together = log_prob(model, x, solver=TorchDiffEq(rtol=1e-7, atol=1e-7), prior=end)
    for what, result in (("log_prob", rows), ("log_prob by a solver", together)):
        _compare(f"{what} (1 plus its error in nats)", 0.0, 1 + (result.value - exact).abs().max(), 1.0, 1e-3)


SDE_CHECKS: tuple[Check, ...] = (
    starts_at_the_data,
    snr_falls,
    scales_solve_the_moment_equations,
    chapman_kolmogorov,
    posterior_is_bayes,
    time_inverts_log_snr,
    rows_are_independent,
    float32_agrees_with_float64,
    simulated_moments,
    marginals_do_not_depend_on_the_noise_level,
    flow_is_invertible,
    likelihood_is_exact,
)
"""Every check, cheapest first."""


def check_sde(sde: SDE, checks: tuple[Check, ...] = SDE_CHECKS) -> None:
    """Run the checks on an SDE; returns if all hold.

    Raises:
        CheckFailure: the first identity that broke, where, and by how much.
        SDEError: the SDE is not linear, or its scales break a basic rule.
    """
    for check in checks:
        try:
            check(sde)
        except CheckFailure as failure:
            raise CheckFailure(f"{sde} fails {check.__name__}: {failure}") from failure
