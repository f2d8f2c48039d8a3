r"""Bounds and estimates of log p(x) from denoising errors alone: no ODE, no divergence.

With `z = alpha x + sigma eps`, `g = alpha^2 / sigma^2` and D entries to an event, the functions average one number, D
times the ratio of the denoiser's error to its mean for normal data of scale c, and share one clock (`sdediff.noised`):

    E(t, x) = |x - xhat(z)|^2 (1 + c^2 g) / c^2,          u = log(1 + c^2 g).

`elbo`: the bound of variational diffusion models. With `s = sigma / alpha` at t_min,

    log p(x) >= E log N(x; xhat(z_0), s^2 I) - KL(q(z_T | x) || prior) - diffusion,
    diffusion = 1/2 sum (g_s - g_t) E|x - xhat(z_t)|^2 = 1/2 sum expm1(u_s - u_t) E(t)    with T steps (s before t),
    diffusion = 1/2 int -g' E|x - xhat(z_t)|^2 dt      = 1/2 int E du                     in continuous time.

Here the reverse kernels have the variance of the posterior. Any other (`sdediff.variance`) has its KL divergences, and
its decoder, instead of s^2, the V of the step to the data. In the limit of small steps those with `V / nu^2 - 1` of the
order of a step have the same bound ("beta", the analytic ones); `sum (V / nu^2 - 1)^2` that does not vanish lowers it.

For discrete data a decoder takes the place of the normal density, `E log P(x | z_0)`: a bound on log P(x). No decoder
has a V of the step to the data: `DiscretizedGaussian` keeps s^2.

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

References: Kingma et al. 2021 (arXiv:2107.00630); Song et al. 2021 (arXiv:2101.09258), theorem 3; Kong, Brekelmans and
Ver Steeg 2023 (arXiv:2302.03792); Guo, Shamai and Verdu 2005 (I-MMSE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.decoders import Decoder
from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.noise import Noise
from sdediff.noised import LOG_2PI, Rows, Task, Values, clock_at, grid_of, integral_of, scale_of
from sdediff.priors import Prior
from sdediff.runs import check_density
from sdediff.shapes import Grid, PerRow, State
from sdediff.terms import along_paths, by_entry, by_step, variances_of
from sdediff.variance import VARIANCES, Posterior, ReverseSteps, ReverseVariance, StepVariance, variance_of


@dataclass(frozen=True, eq=False)
class ELBO:
    """A lower bound on log p(x), in its parts: `total = reconstruction - prior - diffusion`, all `(batch,)`, nats.

    Attributes:
        reconstruction: `E log N(x; xhat(z), V)` at t_min, for continuous data (its density, not a probability);
            `E log P(x | z)` of a decoder, for discrete data.
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
    decoder: Decoder | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> ELBO:
    """The evidence lower bound of a diffusion model, in discrete or continuous time.

    Args:
        model: any model of a linear SDE.
        x: data `(batch, *event)`; at bin centres, if there is a decoder.
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
        decoder: of discrete data (see `sdediff.decoders`), in place of the normal density; the total is then a bound on
            the log-probability of the codes, not on a density. It is a distribution of its own: `variance` is that of
            the other steps only, and `DiscretizedGaussian` keeps `sigma^2 / alpha^2` at t_min.
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
            "In continuous time the variance is not a choice: it is that of the posterior, and of all whose "
            f"V / nu^2 tends to 1 fast enough; got variance={variance!r}. Give steps=... or times=..., or leave "
            "variance away."
        )
    scale = scale_of(model, scale)
    grid = grid_of(model, steps, times, t_min, scale)
    task = Task.of(model, x, grid, samples, prior, scale, seed, noise, even=not discrete, ends=discrete)
    chain = ReverseSteps.to_data(model.point(grid))

    def evaluate(part: Rows) -> dict[str, Tensor]:
        prior_kl = part.prior_kl()
        if discrete:
            if isinstance(kernels, StepVariance):
                reconstruction, terms = by_step(part, chain, kernels, decoder)
            else:
                reconstruction, terms = by_entry(part, chain, kernels, decoder)
            return _sums(reconstruction, prior_kl.expand(samples, -1), terms)
        reconstruction = part.reconstruction(grid[-1], variances_of(chain, Posterior())[-1], decoder)
        integral, variance = integral_of(part.errors(part.times(part.spread())), task.span)
        stderr = (variance + reconstruction.var(0) / samples).sqrt()
        return {"reconstruction": reconstruction.mean(0), "prior": prior_kl, "diffusion": integral, "stderr": stderr}

    values, nfe = task.run(evaluate, condition, batch_size)
    settings = {"steps": len(grid) - 1 if discrete else None, "decoder": decoder} | task.settings
    return _elbo(values, nfe, grid, settings, kernels)


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

    It takes no decoder: its reconstruction is the density of x given the end of a path. For the probability of discrete
    data `elbo` has the decoders, and the reconstruction of both forms is the same.

    Args:
        model, x, steps, times, t_min, variance, prior, scale, seed, noise, condition, batch_size: as in `elbo`.
        samples: pairs of paths of opposite noise from x to the noise end, for each row.

    Returns:
        The parts of the consistency form: `terms[i]` is `E log [q(z | after) / p(z | before)]` of the state z at
        `times[i + 1]`, given the state after it, from which it was made, and the one before it.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError, DivergenceError: as `elbo`.
    """
    if times is None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise OptionError(
            "The consistency form is that of a discrete chain: give steps=..., a whole number of steps >= 1, or "
            f"times=...; got steps={steps!r}."
        )
    kernels = variance_of(variance, "consistency_elbo")
    scale = scale_of(model, scale)
    grid = grid_of(model, steps, times, t_min, scale)
    task = Task.of(model, x, grid, samples, prior, scale, seed, noise, even=False, ends=True)
    chain = ReverseSteps.to_data(model.point(grid))

    def evaluate(part: Rows) -> dict[str, Tensor]:
        return _sums(*along_paths(part, chain, kernels))

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


@torch.no_grad()
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
    scale = scale_of(model, scale)
    grid = grid_of(model, None, None, t_min, scale)
    task = Task.of(model, x, grid, samples, prior, scale, seed, noise, even=True, ends=False)
    sigma = task.sde.scales_at(grid)[1]
    task = task.starting(grid[-1])

    def evaluate(part: Rows) -> dict[str, Tensor]:
        integral, variance = integral_of(part.errors(part.times(part.spread())), task.span)
        value = part.prior_mean() + part.size * math.log(sigma[0] / sigma[1]) - integral
        return {"value": value, "stderr": variance.sqrt()}

    values, nfe = task.run(evaluate, condition, batch_size)
    return SDEBound(**values, nfe=nfe, settings=task.settings)


@torch.no_grad()
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
        OptionError, ShapeError, TimeError, CapabilityError, DivergenceError: as `elbo`; the model has no density.
    """
    scale = scale_of(model, scale)
    check_density(model)
    grid = grid_of(model, None, None, t_min, scale)
    task = Task.of(model, x, grid, samples, prior, scale, seed, noise, even=True, ends=True)
    ends = clock_at(task.sde, grid, scale)

    def evaluate(part: Rows) -> dict[str, Tensor]:
        points = part.spread()
        inner, outer = part.errors(part.times(points)), part.errors(grid)
        integral, variance = integral_of(inner, task.span)
        base = -part.size / 2 * (LOG_2PI + 1 - math.log(torch.expm1(ends[1]) / scale**2)) - part.prior_kl()
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
