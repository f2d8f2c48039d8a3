r"""Rows of data at noise levels: the errors of a denoiser, on one clock, as all bounds are made of them.

With `z = alpha x + sigma eps`, `g = alpha^2 / sigma^2` and D entries to an event, `sdediff.bounds` averages D times the
ratio of the denoiser's error to its mean for normal data of scale c, on a clock u,

    E(t, x) = |x - xhat(z)|^2 (1 + c^2 g) / c^2,          u = log(1 + c^2 g).

Equal steps in u carry equal information of such data, for which E = D on average. E is bounded at both ends of time,
also where alpha = 0, so even draws in u are the importance sampling: in log g, even draws would spend as much on
levels where nothing is seen of the data as where all is decided. Any c is right in expectation.

Noise is used with both signs, which cancels all that is odd in it (near t_min of `sde_bound`, a singularity:
`epshat(z+) - epshat(z-)` is of order rho), and `w (|eps|^2 - D)`, `w = c^2 g / (1 + c^2 g)`, of mean 0, is subtracted
from E: what is left of E where the noise is invisible to the model. So single values may be negative. Continuous times
are two to a stratum of u, different in every row; the difference of the two gives an unbiased variance.

A `Task` is everything about an estimate but the rows, and `Rows` are some of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.decoders import Decoder, decoded
from sdediff.density import wide
from sdediff.draws import RowDraws, mix
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.noise import Noise, NoiseStream, RowNoise
from sdediff.priors import Prior, is_gaussian, kl_to_prior, mean_log_prob
from sdediff.runs import bound_rows, chunks_of, evaluating, starts_at_prior
from sdediff.sde import check_grid, fresh_seed
from sdediff.shapes import Grid, PerRow, State, as_time, check_state, over, sum_rows

Values: TypeAlias = Float[Tensor, " points batch"]

LOG_2PI = math.log(2 * math.pi)


# The clock u = log(1 + scale^2 snr)


def clock_at(sde: LinearSDE, t: Tensor, scale: float) -> Tensor:
    """u at t."""
    alpha, sigma = sde.scales_at(t)
    return torch.log1p((scale * alpha / sigma) ** 2)


def time_at(sde: LinearSDE, u: Tensor, scale: float, t_min: Tensor, t_max: Tensor) -> Tensor:
    """The time at which the clock is u."""
    return sde.time(torch.expm1(u).log() - 2 * math.log(scale)).clamp(t_min, t_max)


def scale_of(model: ScoreModel, scale: float | None) -> float:
    """The caller's scale of the data, checked, or the model's."""
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    scale = model.deviation if scale is None else scale
    if not 0 < scale < math.inf:
        raise OptionError(f"scale must be positive, a rough standard deviation of the data; got {scale}.")
    return scale


def grid_of(
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
    first, last = clock_at(sde, grid, scale)
    inner = first + (last - first) * torch.arange(1, steps, dtype=torch.float64) / steps
    return torch.cat([grid[:1], time_at(sde, inner, scale, grid[-1], grid[0]), grid[1:]])


def integral_of(values: Values, span: float) -> tuple[PerRow, PerRow]:
    """`1/2 int E du` from two values in each stratum, and the variance of the estimate."""
    pairs = values.reshape(-1, 2, values.shape[1])
    variance = (pairs[:, 0] - pairs[:, 1]).square().sum(0) / len(values) ** 2
    return span / 2 * values.mean(0), (span / 2) ** 2 * variance


# The errors of the rows


@dataclass(frozen=True)
class Task:
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
    ) -> Task:
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

    def starting(self, t: Tensor) -> Task:
        """The same for rows that are states at this time."""
        alpha, sigma = self.sde.scales_at(t)
        return replace(self, start=(alpha.item(), sigma.item()))

    @property
    def sde(self) -> LinearSDE:
        return self.model.linear

    @property
    def span(self) -> float:
        """The length of the integral in the clock."""
        return clock_at(self.sde, self.ends, self.scale).diff().item()

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
        self, evaluate: Callable[[Rows], dict[str, Tensor]], condition: Any, batch_size: int | None
    ) -> tuple[dict[str, Tensor], int]:
        """What `evaluate` gives for all rows, as wide as the device has it, and network evaluations for every row."""
        parts, nfe = [], 0
        with torch.no_grad(), evaluating(self.model.network):
            for rows in chunks_of(len(self.x), batch_size):
                bound, counter = bound_rows(self.model, condition, rows, len(self.x))
                uniform = RowDraws(mix(self.seed, 7), rows.start)
                part = Rows(self, bound, self.x[rows], self.noise.open(rows.start), uniform)
                try:
                    parts.append(evaluate(part))
                except DivergenceError as error:
                    raise error.shifted(rows.start) from error
                nfe = max(nfe, counter.calls)
        like = wide(self.x[:1])
        return {name: torch.cat([part[name] for part in parts], -1).to(like) for name in parts[0]}, nfe


@dataclass(frozen=True)
class Rows:
    """Some rows of a task, with their model and noise."""

    task: Task
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
        first, last = clock_at(self.task.sde, self.task.ends, self.task.scale)
        strata = torch.arange(self.task.samples // 2, dtype=torch.float64).repeat_interleave(2)[:, None]
        return first + (last - first) * (strata + u) / len(u) * 2

    def times(self, u: Values) -> Tensor:
        return time_at(self.task.sde, u, self.task.scale, self.task.ends[1], self.task.ends[0])

    def errors(self, times: Tensor) -> Values:
        """E at times `(points,)` or `(points, batch)`, each with fresh noise in both signs, float64."""
        return finite_values(torch.stack([self._error(t.expand(len(self.x))) for t in times]), times)

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
        square = summed(positive**2)
        value = -seen * (square - self.size)
        for noise in (positive, -positive):
            z = over(alpha / alpha_0, self.x) * self.x + over(sigma * rho, self.x) * noise
            true = over(unit * alpha * (1 + blur**2 / (1 + rho)), z) * noise - over(unit * sigma / alpha_0, z) * self.x
            error = self.model.combine(t, z, -unit * sigma, unit * alpha) - true  # (epshat - eps) / sqrt(w)
            value = value + summed(error**2) / 2
            if blur:
                value = value - rise * (square + seen.sqrt() * summed(error * noise))
        return value

    def reconstruction(self, t: Tensor, variance: Tensor, decoder: Decoder | None) -> Values:
        """`log N(x; xhat(z), variance)` at t, or that of the decoder, `(samples, batch)`."""
        count = self.task.samples
        if decoder is not None:
            return finite_values(torch.stack([self._decoded(t, decoder) for _ in range(count)]), t.expand(count))
        alpha, sigma = self.task.sde.scales_at(t)
        seen = -torch.expm1(-clock_at(self.task.sde, t, self.task.scale))
        levels = seen / 2 * (sigma / alpha) ** 2 / variance * self.errors(t.expand(count))
        return -levels - self.size / 2 * (LOG_2PI + variance.log())

    def _decoded(self, t: Tensor, decoder: Decoder) -> PerRow:
        alpha, sigma = self.task.sde.scales_at(t)
        shift = over(sigma, self.x) * self.stream.normal(self.x)
        signal = over(alpha, self.x) * self.x
        values = [decoded(decoder, self.model, t, self.x, signal + noise) for noise in (shift, -shift)]
        return ((values[0] + values[1]) / 2).cpu().double()

    def prior_mean(self) -> PerRow:
        """`E log prior(z)` for the kernel at the noise end."""
        scale, std = self._kernel()
        return mean_log_prob(self.prior, scale * self.x.double().cpu(), std)

    def prior_kl(self) -> PerRow:
        """`KL(q(z_T | x) || prior)`."""
        scale, std = self._kernel()
        return kl_to_prior(self.prior, scale * self.x.double().cpu(), std)

    @property
    def prior(self) -> Prior:
        given = self.task.prior
        return self.task.sde.prior(tuple(self.x.shape[1:]), dtype=torch.float64) if given is None else given

    def _kernel(self) -> tuple[float, float]:
        """`(scale, std)` from x to the noise end."""
        alpha, sigma = (value.item() for value in self.task.sde.scales_at(self.task.ends[0]))
        alpha_0, sigma_0 = self.task.start
        return alpha / alpha_0, math.sqrt(sigma**2 - (alpha * sigma_0 / alpha_0) ** 2)


def finite_values(values: Values, times: Tensor) -> Values:
    """The values at times `(points,)` or `(points, batch)`, if they are finite."""
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        k = int(wrong[0, 0])
        raise DivergenceError(
            "The error of the model, or what its decoder says, is NaN or infinite",
            "Check the network's output and x there.",
            step=None,
            time=times[k].item() if times.ndim == 1 else times[k, wrong[0, 1]].item(),
            rows=wrong[wrong[:, 0] == k, 1].tolist(),
        )
    return values


def summed(x: State) -> PerRow:
    """The sum over the entries of every row, float64 on the CPU as the coefficients."""
    return sum_rows(x.to(torch.promote_types(x.dtype, torch.float32))).cpu().double()
