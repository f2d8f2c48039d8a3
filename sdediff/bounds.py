r"""Bounds and estimates of log p(x) from denoising errors alone: no ODE, no divergence.

With `z = alpha x + sigma eps`, `g = alpha^2 / sigma^2` and D entries to an event, all three functions average one
number, D times the ratio of the denoiser's error to its mean for normal data of scale c, and all share one clock:

    E(t, x) = |x - xhat(z)|^2 (1 + c^2 g) / c^2,          u = log(1 + c^2 g).

Equal steps in u carry equal information of such data, for which E = D on average. E is bounded at both ends of time,
also where alpha = 0, so even draws in u are the importance sampling: in log g, even draws would spend as much on
levels where nothing is seen of the data as where all is decided. Any c is right in expectation.

`elbo`: the bound of variational diffusion models. With `s = sigma / alpha` at t_min,

    log p(x) >= E log N(x; xhat(z_0), s^2 I) - KL(q(z_T | x) || prior) - diffusion,
    diffusion = 1/2 sum (g_s - g_t) E|x - xhat(z_t)|^2 = 1/2 sum expm1(u_s - u_t) E(t)    with T steps (s before t),
    diffusion = 1/2 int -g' E|x - xhat(z_t)|^2 dt      = 1/2 int E du                     in continuous time.

Here the reverse kernels have the variance of the posterior. Any other (`sdediff.variance`) has its KL divergences, and
its decoder, instead of s^2, the V of the step to the data. In the limit of small steps the variance is no choice.

`consistency_elbo`: the same bound, with z_i at times t_0 = t_max > ... > t_n = t_min and z_(n+1) = x, as the mean over
paths `q(z_0 ... z_n | x)` of what each state z_1 ... z_n is said to be by the next and by the one before,

    log p(x) >= E log p(x | z_n) - E KL(q(z_0 | z_1) || prior) - sum E log [q(z_i | z_(i+1)) / p(z_i | z_(i-1))].

Often the last terms are printed as `E KL(q(z_i | z_(i+1)) || p(z_i | z_(i-1)))`. That draws z_i anew, apart from the
z_(i-1) that was made of it: a looser bound. With `q(z_i | z_(i+1)) = q(z_i, z_(i-1) | z_(i+1)) / q(z_(i-1) | z_i)` and
Bayes' rule the sum is that of the denoising form, where each term is integrated over z_i given z_(i-1) and x.

`denoising_log_prob`: the same integral as an identity. For the exact denoiser, `E|x - xhat|^2 = mmse(x, g)` and

    log p(x) = -D/2 log(2 pi e c^2) + 1/2 int_0^inf [D c^2 / (1 + c^2 g) - mmse(x, g)] dg.

Above the SNR of t_min, mmse = D / g (a density that is flat at the scale s), and the integral up to there and beyond is
`-D/2 log(2 pi e s^2) - 1/2 int mmse`; below that of t_max it is -KL(q(z_T | x) || prior), exactly so if the prior is
p_T. The mean of mmse over data falls with g, so left and right Riemann sums over any grid bound the mean of log p.

`sde_bound`: x is a state at t_min and the model is that of the reverse SDE from the prior down to t_min. The kernel
from t_min is `z = A x + rho sigma eps`, `rho^2 = 1 - g / g_min`, and with `lambda = log g` Song's theorem 3 reads

    log p_min(x) >= E log prior(z_T) + D log(alpha_T / alpha_min) - 1/2 int E[|epshat|^2 - 2 epshat.eps / rho] dlambda,

an equality for the exact score. Here -|eps|^2 + D is added, whose mean is 0, which leaves

    E log prior(z_T) + D log(sigma_T / sigma_min) - 1/2 int E[|epshat - eps|^2 - 2 (1 / rho - 1) epshat.eps] dlambda;

it is finite where alpha_T = 0. At t_min, 1 / rho is singular but epshat.eps has a mean of order rho.

Noise is used with both signs, which cancels all that is odd in it (near t_min, the singularity: `epshat(z+) -
epshat(z-)` is of order rho), and `w (|eps|^2 - D)`, `w = c^2 g / (1 + c^2 g)`, of mean 0, is subtracted from E: what is
left of E where the noise is invisible to the model. So single values may be negative. Continuous times are two to a
stratum of u, different in every row; the difference of the two gives an unbiased variance.

References: Kingma et al. 2021 (arXiv:2107.00630); Song et al. 2021 (arXiv:2101.09258), theorem 3; Kong, Brekelmans and
Ver Steeg 2023 (arXiv:2302.03792); Guo, Shamai and Verdu 2005 (I-MMSE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.density import wide
from sdediff.draws import RowDraws, mix
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.exponential import deviation_of
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.noise import Noise, NoiseStream, RowNoise
from sdediff.priors import Prior, is_gaussian, kl_to_prior, mean_log_prob
from sdediff.runs import bound_rows, chunks_of, evaluating, starts_at_prior
from sdediff.sde import check_grid, fresh_seed
from sdediff.shapes import Grid, PerRow, State, as_time, check_state, over, sum_rows
from sdediff.variance import (
    VARIANCES,
    EntryVariance,
    Posterior,
    ReverseSteps,
    ReverseVariance,
    StepVariance,
    variance_of,
)

Values: TypeAlias = Float[Tensor, " points batch"]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class ELBO:
    """A lower bound on log p(x), in its parts: `total = reconstruction - prior - diffusion`, all `(batch,)`, nats.

    Attributes:
        reconstruction: `E log N(x; xhat(z), V)` at t_min, for continuous data (its density, not a probability).
        prior: `KL(q(z_T | x) || prior)`, in closed form (its mean over z_1 in the consistency form).
        diffusion: sum of the steps' KL divergences, or its continuous limit.
        total: the bound.
        stderr: standard error of total over the noise (and times); NaN for a single sample.
        nfe: network evaluations for every row.
        times: the grid, falling; its two ends in continuous time.
        terms: KL divergence of every step, `(steps, batch)`, from `times[i]` to `times[i + 1]`; None in continuous
            time. Estimates without bias, so that one of a small divergence may be negative.
        settings: the steps, variance, span, samples, scale, prior and seed that gave the number.
    """

    reconstruction: PerRow
    prior: PerRow
    diffusion: PerRow
    total: PerRow
    stderr: PerRow
    nfe: int
    times: Grid
    terms: Float[Tensor, " steps batch"] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SDEBound:
    """A lower bound on the log-density of the reverse SDE.

    Attributes:
        value: the bound in nats, `(batch,)`.
        stderr: standard error over noise and times, `(batch,)`.
        nfe: network evaluations for every row.
        settings: the span, samples, scale, prior and seed that gave the number.
    """

    value: PerRow
    stderr: PerRow
    nfe: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DenoisingLogProb:
    """The information-theoretic estimate of log p(x).

    Attributes:
        value: log p(x) in nats, `(batch,)`.
        stderr: standard error over noise and times, `(batch,)`.
        lower, upper: Riemann sums, `(batch,)`. For the exact denoiser their means over data (and draws) enclose the
            mean of log p; a single row's need not. The mean of `lower` is below that of the data's log p for any
            denoiser. `upper` leaves out what the prior misses of p_T, and what the density curves at the scale s of
            t_min (about s^2 / 2 times its Fisher information).
        nfe: network evaluations for every row.
        settings: the span, samples, scale, prior and seed that gave the number.
    """

    value: PerRow
    stderr: PerRow
    lower: PerRow
    upper: PerRow
    nfe: int
    settings: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def elbo(
    model: ScoreModel,
    x: State,
    *,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    variance: str | ReverseVariance = "posterior",
    samples: int = 16,
    prior: Prior | None = None,
    scale: float | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> ELBO:
    """The evidence lower bound of a diffusion model, in discrete or continuous time.

    Args:
        model: any model of a linear SDE.
        x: data `(batch, *event)`.
        steps: number of steps, even in `log(1 + scale^2 snr)`; None, without times, for continuous time.
        times: a grid of steps instead, falling from t_max.
        t_min: where the data end is, in place of the SDE's own `t_min`.
        variance: of the reverse kernels of a discrete chain: "posterior", "beta", or a `StepVariance` or
            `EntryVariance` (`sdediff.variance`). The decoder has that of the step to the data, which is
            `sigma^2 / alpha^2` at t_min for "posterior", sigma^2 for "beta", and `Var[x_0 | x_t]` for an analytic one.
        samples: pairs of opposite noise for each row: for every step, or over all of continuous time (an even number,
            two to a stratum); and for the reconstruction.
        prior: of the states at the first time: a Normal (or `Independent` of one), or an `exact.Gaussian`, such as
            `target.marginal(sde, t_max)`; the SDE's own if None.
        scale: rough standard deviation of the data; if None, that of an "edm" model, else 1. Where it is off, the
            standard error grows, and the grid of `steps` is less even.
        seed: row i depends on it and on i only, whatever the batch or chunk size.
        noise: a source of the noise in place of `RowNoise(seed)`.
        condition, batch_size: as in `sample`.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError: an argument does not fit; the message says how.
        DivergenceError: an error of the model is NaN or infinite.
    """
    discrete = steps is not None or times is not None
    kernels = variance_of(variance, "elbo")
    if not discrete and not isinstance(kernels, Posterior):
        raise OptionError(
            f"In continuous time the variance is not a choice: all tend to the posterior's; got variance={variance!r}. "
            "Give steps=... or times=..., or leave variance away."
        )
    scale = _scale(model, scale)
    grid = _grid(model, steps, times, t_min, scale)
    task = _Task.of(model, x, grid, samples, prior, scale, seed, noise, even=not discrete, ends=discrete)
    chain = ReverseSteps.to_data(model.point(grid))

    def evaluate(part: _Rows) -> dict[str, Tensor]:
        prior_kl = part.prior_kl()
        if discrete:
            reconstruction, terms = (
                part.by_step(chain, kernels) if isinstance(kernels, StepVariance) else (part.by_entry(chain, kernels))
            )
            return _sums(reconstruction, prior_kl.expand(samples, -1), terms)
        reconstruction = part.decoded(grid[-1], _variances(chain, Posterior())[-1])
        integral, variance = _integral(part.errors(part.times(part.spread())), task.span)
        stderr = (variance + reconstruction.var(0) / samples).sqrt()
        return {"reconstruction": reconstruction.mean(0), "prior": prior_kl, "diffusion": integral, "stderr": stderr}

    values, nfe = task.run(evaluate, condition, batch_size)
    return _elbo(values, nfe, grid, {"steps": len(grid) - 1 if discrete else None} | task.settings, kernels)


@torch.no_grad()
def consistency_elbo(
    model: ScoreModel,
    x: State,
    *,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    variance: str | ReverseVariance = "posterior",
    samples: int = 16,
    prior: Prior | None = None,
    scale: float | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> ELBO:
    """`elbo` of a discrete chain in its consistency form: the same number in expectation, with a higher variance.

    Args:
        model, x, steps, times, t_min, variance, prior, scale, seed, noise, condition, batch_size: as in `elbo`.
        samples: pairs of paths of opposite noise from x to the noise end, for each row.

    Returns:
        The parts of the consistency form: `terms[i]` is `E log [q(z | after) / p(z | before)]` of the state z at
        `times[i + 1]`, given the state after it, from which it was made, and the one before it.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError, DivergenceError: as `elbo`.
    """
    if steps is None and times is None:
        raise OptionError("The consistency form is that of a discrete chain: give steps=... or times=....")
    kernels = variance_of(variance, "consistency_elbo")
    scale = _scale(model, scale)
    grid = _grid(model, steps, times, t_min, scale)
    task = _Task.of(model, x, grid, samples, prior, scale, seed, noise, even=False, ends=True)
    chain = ReverseSteps.to_data(model.point(grid))

    def evaluate(part: _Rows) -> dict[str, Tensor]:
        return _sums(*part.along_paths(chain, kernels))

    values, nfe = task.run(evaluate, condition, batch_size)
    return _elbo(values, nfe, grid, {"steps": len(grid) - 1} | task.settings, kernels)


def _sums(reconstruction: Values, prior: Values, terms: Tensor) -> dict[str, Tensor]:
    """The parts of a discrete bound from its samples, `(samples, batch)` and `(samples, steps, batch)`."""
    totals = reconstruction - prior - terms.sum(1)
    variance = totals.var(0) / len(totals) if len(totals) > 1 else torch.nan * totals[0]
    return {
        "reconstruction": reconstruction.mean(0),
        "prior": prior.mean(0),
        "diffusion": terms.sum(1).mean(0),
        "terms": terms.mean(0),
        "stderr": variance.sqrt(),
    }


def _elbo(values: dict[str, Tensor], nfe: int, grid: Grid, settings: dict[str, Any], kernels: ReverseVariance) -> ELBO:
    total = values["reconstruction"] - values["prior"] - values["diffusion"]
    named = [name for name, variance in VARIANCES.items() if variance == kernels]
    settings = settings | {"variance": named[0] if named else type(kernels).__name__}
    return ELBO(**values, total=total, nfe=nfe, times=grid, settings=settings)


def sde_bound(
    model: ScoreModel,
    x: State,
    *,
    t_min: float | None = None,
    samples: int = 16,
    prior: Prior | None = None,
    scale: float | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> SDEBound:
    """A lower bound on the log-density, at t_min, of the model that the reverse SDE is; tight for the exact score.

    Args:
        model: any model of a linear SDE.
        x: states at t_min, `(batch, *event)`. (Data, for a t_min at which its noise does not matter.)
        t_min, samples, prior, scale, seed, noise, condition, batch_size: as in `elbo`, in continuous time.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError, DivergenceError: as `elbo`.
    """
    scale = _scale(model, scale)
    grid = _grid(model, None, None, t_min, scale)
    task = _Task.of(model, x, grid, samples, prior, scale, seed, noise, even=True, ends=False)
    sigma = task.sde.scales_at(grid)[1]
    task = task.starting(grid[-1])

    def evaluate(part: _Rows) -> dict[str, Tensor]:
        integral, variance = _integral(part.errors(part.times(part.spread())), task.span)
        value = part.prior_mean() + part.size * math.log(sigma[0] / sigma[1]) - integral
        return {"value": value, "stderr": variance.sqrt()}

    values, nfe = task.run(evaluate, condition, batch_size)
    return SDEBound(**values, nfe=nfe, settings=task.settings)


def denoising_log_prob(
    model: ScoreModel,
    x: State,
    *,
    t_min: float | None = None,
    samples: int = 16,
    prior: Prior | None = None,
    scale: float | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> DenoisingLogProb:
    """Log-density of data from denoising errors at all SNRs, with a bracket from their monotonicity.

    Args:
        model: any model of a linear SDE; the estimate is right for the exact one, and what it is off by otherwise is
            that of `elbo`.
        x: data `(batch, *event)`.
        t_min, samples, prior, scale, seed, noise, condition, batch_size: as in `elbo`, in continuous time.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError, DivergenceError: as `elbo`.
    """
    scale = _scale(model, scale)
    grid = _grid(model, None, None, t_min, scale)
    task = _Task.of(model, x, grid, samples, prior, scale, seed, noise, even=True, ends=True)
    ends = _clock(task.sde, grid, scale)

    def evaluate(part: _Rows) -> dict[str, Tensor]:
        points = part.spread()
        inner, outer = part.errors(part.times(points)), part.errors(grid)
        integral, variance = _integral(inner, task.span)
        base = -part.size / 2 * (_LOG_2PI + 1 - math.log(torch.expm1(ends[1]) / scale**2)) - part.prior_kl()
        points, order = points.sort(0)
        outside = ends.to(points)[:, None].expand(2, points.shape[1])
        steps = torch.cat([outside[:1], points, outside[1:]]).diff(dim=0)
        sums = torch.cat([outer[:1], inner.gather(0, order), outer[1:]])
        return {
            "value": base - integral,
            "stderr": variance.sqrt(),
            "lower": base - (torch.expm1(steps) / 2 * sums[:-1]).sum(0),
            "upper": base + (torch.expm1(-steps) / 2 * sums[1:]).sum(0),
        }

    values, nfe = task.run(evaluate, condition, batch_size)
    return DenoisingLogProb(**values, nfe=nfe, settings=task.settings)


# The clock u = log(1 + scale^2 snr)


def _clock(sde: LinearSDE, t: Tensor, scale: float) -> Tensor:
    alpha, sigma = sde.scales_at(t)
    return torch.log1p((scale * alpha / sigma) ** 2)


def _unclock(sde: LinearSDE, u: Tensor, scale: float, t_min: Tensor, t_max: Tensor) -> Tensor:
    return sde.time(torch.expm1(u).log() - 2 * math.log(scale)).clamp(t_min, t_max)


def _scale(model: ScoreModel, scale: float | None) -> float:
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    scale = deviation_of(model) if scale is None else scale
    if not 0 < scale < math.inf:
        raise OptionError(f"scale must be positive, a rough standard deviation of the data; got {scale}.")
    return scale


def _grid(
    model: ScoreModel, steps: int | None, times: Tensor | Sequence[float] | None, t_min: float | None, scale: float
) -> Grid:
    """The caller's grid, checked, or one even in the clock; the two ends if there are no steps."""
    sde = model.linear
    if times is not None:
        if steps is not None or t_min is not None:
            raise OptionError("Give either times=..., a whole grid, or steps=... and t_min=..., which make one.")
        grid = as_time(times).detach().cpu()
        check_grid(grid, direction=-1)
        sde.check_span(grid, "times")
    else:
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise OptionError(f"elbo needs a whole number of steps >= 1, or None for continuous time; got {steps!r}.")
        end = sde.t_min if t_min is None else float(t_min)
        if not 0 <= end < sde.t_max:
            raise TimeError(f"t_min = {end:g} must lie in [0, {sde.t_max:g}), below the t_max of {sde}.")
        grid = torch.tensor([sde.t_max, end], dtype=torch.float64)
    if not float(sde.scales_at(grid)[1][-1]) > 0:
        raise TimeError(f"{sde} has no noise at t = {grid[-1]:g}, where no bound is finite: end later, with t_min.")
    if steps is None or steps == 1:
        return grid
    first, last = _clock(sde, grid, scale)
    inner = first + (last - first) * torch.arange(1, steps, dtype=torch.float64) / steps
    return torch.cat([grid[:1], _unclock(sde, inner, scale, grid[-1], grid[0]), grid[1:]])


def _integral(values: Values, span: float) -> tuple[PerRow, PerRow]:
    """`1/2 int E du` from two values in each stratum, and the variance of the estimate."""
    pairs = values.reshape(-1, 2, values.shape[1])
    variance = (pairs[:, 0] - pairs[:, 1]).square().sum(0) / len(values) ** 2
    return span / 2 * values.mean(0), (span / 2) ** 2 * variance


# The errors of the rows


@dataclass(frozen=True)
class _Task:
    """Everything about an estimate but the rows."""

    model: ScoreModel
    x: State
    ends: Grid
    samples: int
    prior: Prior | None
    scale: float
    seed: int
    noise: Noise
    start: tuple[float, float] = (1.0, 0.0)
    """alpha and sigma of what x is: data, or states at a time."""

    @classmethod
    def of(
        cls,
        model: ScoreModel,
        x: State,
        grid: Grid,
        samples: int,
        prior: Prior | None,
        scale: float,
        seed: int | None,
        noise: Noise | None,
        *,
        even: bool,
        ends: bool,
    ) -> _Task:
        check_state(x)
        if x.shape[0] == 0:
            raise ShapeError("A bound needs at least one row; got x with 0 rows.")
        if not isinstance(samples, int) or samples < 1 or (even and samples % 2):
            needed = "an even number of samples, two to a stratum of time" if even else "a whole number of samples >= 1"
            raise OptionError(f"This estimate needs {needed}; got {samples!r}.")
        if prior is None and not starts_at_prior(model, grid[0]):
            raise TimeError(
                f"times starts at {grid[0]:g}, but the prior is that of t_max = {model.sde.t_max:g}: start there, or "
                "pass prior=, the distribution of the states at the first time."
            )
        if prior is not None and not is_gaussian(prior):
            raise OptionError(
                "prior must be a Normal, an Independent of one, or an exact.Gaussian, over which the divergence is "
                f"known in closed form; got {type(prior).__name__}."
            )
        if ends and model.blind_in_noise and float(model.linear.scales_at(grid)[0][0]) == 0:
            raise CapabilityError(
                f"At t = {grid[0]:g} alpha is 0, where a model that predicts {model.prediction!r} says nothing of the "
                "data: use elbo in continuous time, or an SDE whose t_max lies before."
            )
        seed = fresh_seed() if seed is None else seed
        return cls(model, x, grid[[0, -1]], samples, prior, scale, seed, RowNoise(seed) if noise is None else noise)

    def starting(self, t: Tensor) -> _Task:
        """The same for rows that are states at this time."""
        alpha, sigma = self.sde.scales_at(t)
        return replace(self, start=(alpha.item(), sigma.item()))

    @property
    def sde(self) -> LinearSDE:
        return self.model.linear

    @property
    def span(self) -> float:
        """The length of the integral in the clock."""
        return _clock(self.sde, self.ends, self.scale).diff().item()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "t_min": self.ends[1].item(),
            "t_max": self.ends[0].item(),
            "scale": self.scale,
            "prior": "the SDE's own" if self.prior is None else type(self.prior).__name__,
            "seed": self.seed,
        }

    def run(
        self, evaluate: Callable[[_Rows], dict[str, Tensor]], condition: Any, batch_size: int | None
    ) -> tuple[dict[str, Tensor], int]:
        """What `evaluate` gives for all rows, as wide as the device has it, and network evaluations for every row."""
        parts, nfe = [], 0
        with torch.no_grad(), evaluating(self.model.network):
            for rows in chunks_of(len(self.x), batch_size):
                bound, counter = bound_rows(self.model, condition, rows, len(self.x))
                uniform = RowDraws(mix(self.seed, 7), rows.start)
                part = _Rows(self, bound, self.x[rows], self.noise.open(rows.start), uniform)
                try:
                    parts.append(evaluate(part))
                except DivergenceError as error:
                    raise error.shifted(rows.start) from error
                nfe = max(nfe, counter.calls)
        like = wide(self.x[:1])
        return {name: torch.cat([part[name] for part in parts], -1).to(like) for name in parts[0]}, nfe


@dataclass(frozen=True)
class _Rows:
    """Some rows of a task, with their model and noise."""

    task: _Task
    model: ScoreModel
    x: State
    stream: NoiseStream
    uniform: RowDraws

    @property
    def size(self) -> int:
        return math.prod(self.x.shape[1:])

    def spread(self) -> Values:
        """Points of the clock, two in each stratum, noise end first; every row has its own."""
        like = torch.empty(len(self.x), dtype=torch.float64)
        u = torch.special.ndtr(torch.stack([self.uniform(like) for _ in range(self.task.samples)]))
        first, last = _clock(self.task.sde, self.task.ends, self.task.scale)
        strata = torch.arange(self.task.samples // 2, dtype=torch.float64).repeat_interleave(2)[:, None]
        return first + (last - first) * (strata + u) / len(u) * 2

    def times(self, u: Values) -> Tensor:
        return _unclock(self.task.sde, u, self.task.scale, self.task.ends[1], self.task.ends[0])

    def errors(self, times: Tensor) -> Values:
        """E at times `(points,)` or `(points, batch)`, each with fresh noise in both signs, float64."""
        return _finite(torch.stack([self._error(t.expand(len(self.x))) for t in times]), times)

    def _error(self, t: Tensor) -> PerRow:
        """E for one draw of noise, in both signs: the integrand in u; for states at t_min, that of `sde_bound`."""
        alpha, sigma = self.task.sde.scales_at(t)
        c, (alpha_0, sigma_0) = self.task.scale, self.task.start
        blur = sigma_0 / alpha_0
        rho = (1 - (blur * alpha / sigma) ** 2).sqrt()
        total = (c * alpha) ** 2 + sigma**2
        seen = (c * alpha) ** 2 / total  # w
        rise = (blur / (c * sigma)) ** 2 * total / (rho * (1 + rho))  # (1 / rho - 1) / w
        unit = total.sqrt() / (c * (alpha**2 + sigma**2))
        positive = self.stream.normal(self.x)
        square = _summed(positive**2)
        value = -seen * (square - self.size)
        for noise in (positive, -positive):
            z = over(alpha / alpha_0, self.x) * self.x + over(sigma * rho, self.x) * noise
            true = over(unit * alpha * (1 + blur**2 / (1 + rho)), z) * noise - over(unit * sigma / alpha_0, z) * self.x
            error = self.model.combine(t, z, -unit * sigma, unit * alpha) - true  # (epshat - eps) / sqrt(w)
            value = value + _summed(error**2) / 2
            if blur:
                value = value - rise * (square + seen.sqrt() * _summed(error * noise))
        return value

    # Discrete chains; samples are `(samples, batch)` of the reconstruction, `(samples, steps, batch)` of the terms.

    def decoded(self, t: Tensor, variance: Tensor) -> Values:
        """Samples of `log N(x; xhat(z), variance)` at t."""
        alpha, sigma = self.task.sde.scales_at(t)
        seen = -torch.expm1(-_clock(self.task.sde, t, self.task.scale))
        levels = seen / 2 * (sigma / alpha) ** 2 / variance * self.errors(t.expand(self.task.samples))
        return -levels - self.size / 2 * (_LOG_2PI + variance.log())

    def by_step(self, chain: ReverseSteps, kernels: StepVariance) -> tuple[Values, Tensor]:
        """For one variance a step: multiples of the errors that `elbo` in continuous time is made of."""
        variances, grid = _variances(chain, kernels), chain.at.t[:-1]
        reconstruction = self.decoded(grid[-1], variances[-1])
        ratio = (chain.nu[:-1] ** 2 / variances[:-1])[:, None]
        weights = ratio * torch.expm1(_clock(self.task.sde, grid, self.task.scale).diff())[:, None] / 2
        spread = self.size / 2 * (ratio - 1 - ratio.log())
        errors = torch.stack([self.errors(grid[:-1]) for _ in range(self.task.samples)])
        return reconstruction, weights * errors + spread

    def by_entry(self, chain: ReverseSteps, kernels: EntryVariance) -> tuple[Values, Tensor]:
        """For a variance of every entry."""
        model, variance = kernels.along(self.model, chain)
        times = chain.at.t[:-1]
        last, inner = len(times) - 1, range(len(times) - 1)

        def costs(i: int) -> PerRow:
            return self._cost(chain, model, variance, i)

        reconstruction = -torch.stack([costs(last) for _ in range(self.task.samples)])
        terms = torch.stack([torch.stack([costs(i) for i in inner]) for _ in range(self.task.samples)])
        for values in terms:
            _finite(values, times[:-1])
        return _finite(reconstruction, times[-1].expand(len(reconstruction))), terms

    def _cost(self, chain: ReverseSteps, model: ScoreModel, variance: Callable[[int, State], State], i: int) -> PerRow:
        """The divergence of step i, or minus the log-likelihood of the data, for one draw of noise in both signs."""
        t, alpha, sigma, nu, gain = (v[i] for v in (chain.at.t, chain.at.alpha, chain.at.sigma, chain.nu, chain.gain))
        draw = self.stream.normal(self.x)
        # what normal data of the scale would vary by has mean 0 and is taken off
        uncertain = (self.task.scale * sigma) ** 2 / ((self.task.scale * alpha) ** 2 + sigma**2)
        seen = (gain * uncertain * alpha / sigma) ** 2 / (2 * (nu**2 + gain**2 * uncertain))
        value = -seen * (_summed(draw**2) - self.size)
        for sign in (1, -1):
            z = over(alpha, self.x) * self.x + over(sign * sigma, self.x) * draw
            error = wide(self.x - model.combine(t, z, torch.ones_like(t), torch.zeros_like(t)))
            spread = wide(variance(i, z))
            value = value + _summed((nu**2 + gain**2 * error**2) / spread + spread.log()) / 4
        return value + self.size / 2 * (_LOG_2PI if i == len(chain.nu) - 1 else -1 - 2 * nu.log())

    def along_paths(self, chain: ReverseSteps, kernels: ReverseVariance) -> tuple[Values, Values, Tensor]:
        """Samples of reconstruction, prior and terms in the consistency form."""
        if isinstance(kernels, EntryVariance):
            model, variance = kernels.along(self.model, chain)
        else:
            table = _variances(chain, kernels)
            model, variance = self.model, lambda i, z: over(table[i], z).expand(z.shape)
        samples = []
        for _ in range(self.task.samples):
            draws = [self.stream.normal(self.x) for _ in chain.nu]
            signs = [self._path(chain, model, variance, [sign * draw for draw in draws]) for sign in (1, -1)]
            samples.append((signs[0] + signs[1]) / 2)
        values = torch.stack(samples)
        for sample in values:
            _finite(sample[:-1], chain.at.t[:-1])
        return -values[:, -2], values[:, -1], values[:, :-2]

    def _path(
        self,
        chain: ReverseSteps,
        model: ScoreModel,
        variance: Callable[[int, State], State],
        draws: list[State],
    ) -> Values:
        """Along one path: the divergences, minus the log-likelihood of the data, and the prior's, `(n + 2, batch)`."""
        at, x = chain.at, self.x
        scale, std = at.alpha[:-1] / at.alpha[1:], at.sigma[:-1] * chain.fresh.sqrt()
        later, path = [x], x
        for i in reversed(range(len(draws))):
            path = over(scale[i], x) * path + over(std[i], x) * draws[i]
            later.append(path)
        states = later[::-1]  # at the times of the chain, and x
        costs = []
        for i in range(len(draws)):
            mean = model.combine(at.t[i], states[i], at.alpha[i + 1], chain.kept[i])
            spread = wide(variance(i, states[i]))
            cost = _summed(wide(states[i + 1] - mean) ** 2 / spread + spread.log()) / 2  # -log p, without 2 pi
            if i == len(draws) - 1:
                costs.append(cost + self.size / 2 * _LOG_2PI)
            else:
                costs.append(cost - _summed(draws[i + 1] ** 2) / 2 - self.size * std[i + 1].log())
        costs.append(kl_to_prior(self._prior, scale[0] * states[1].double().cpu(), std[0].item()))
        return torch.stack(costs)

    def prior_mean(self) -> PerRow:
        """`E log prior(z)` for the kernel at the noise end."""
        scale, std = self._kernel()
        return mean_log_prob(self._prior, scale * self.x.double().cpu(), std)

    def prior_kl(self) -> PerRow:
        """`KL(q(z_T | x) || prior)`."""
        scale, std = self._kernel()
        return kl_to_prior(self._prior, scale * self.x.double().cpu(), std)

    @property
    def _prior(self) -> Prior:
        given = self.task.prior
        return self.task.sde.prior(tuple(self.x.shape[1:]), dtype=torch.float64) if given is None else given

    def _kernel(self) -> tuple[float, float]:
        """`(scale, std)` from x to the noise end."""
        alpha, sigma = (value.item() for value in self.task.sde.scales_at(self.task.ends[0]))
        alpha_0, sigma_0 = self.task.start
        return alpha / alpha_0, math.sqrt(sigma**2 - (alpha * sigma_0 / alpha_0) ** 2)


def _finite(values: Values, times: Tensor) -> Values:
    """The values at times `(points,)` or `(points, batch)`, if they are finite."""
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        k = int(wrong[0, 0])
        raise DivergenceError(
            "The error of the model is NaN or infinite",
            "Check the network's output and x there.",
            step=None,
            time=times[k].item() if times.ndim == 1 else times[k, wrong[0, 1]].item(),
            rows=wrong[wrong[:, 0] == k, 1].tolist(),
        )
    return values


def _variances(chain: ReverseSteps, kernels: StepVariance) -> Tensor:
    """V of every step; of that to the data, where the kernels have none (the posterior's is 0), sigma^2 / alpha^2."""
    table, flat = kernels.table(chain), (chain.at.sigma[-2] / chain.at.alpha[-2]) ** 2
    table = torch.cat([table[:-1], torch.where(table[-1:] == 0, flat, table[-1:])])
    if not bool((table > 0).all()):
        i = int((~(table > 0)).nonzero()[0])
        raise OptionError(
            f"A bound needs variances > 0; {kernels} has {table[i]:g} for the step that starts at "
            f"t = {chain.at.t[i]:g}."
        )
    return table


def _summed(x: State) -> PerRow:
    """The sum over the entries of every row, float64 on the CPU as the coefficients."""
    return sum_rows(x.to(torch.promote_types(x.dtype, torch.float32))).cpu().double()
