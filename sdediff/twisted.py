r"""A model times another density: weighted particles whose law is exactly `p(x) r(x) / Z`.

Guidance, here `Product`, adds `grad log r` to the score. What it samples is not `p r`: the score of the noised product
is `grad log p_t + grad log E[r(x_0) | x_t]`, and r at the denoised estimate, or at x_t, is not that expectation. In
`smc` the same gradient only proposes, and weights make up for what is wrong with it.

The chain is that of `DDPM(variance)`, `p(x_T) prod_k p(x_s | x_t)`, `p(x_s | x_t) = N(m(x_t), V)`, along the times of
a grid, and its outcome is `x_0 = E[x_0 | x_t]` at the last of them, or the last state. With any positive functions
psi_t (twisting functions), of which the last is r itself, particles start from the prior with the weight
`w = psi_T(x_T)` and move by

    x_s ~ q(x_s | x_t) = N(m(x_t) + c V grad log psi_t(x_t), V),
    w <- w p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t)).

The product of all factors telescopes: what the path was proposed with times its weight is `p(path) r(x_0)`, whatever
psi, its gradient and c are. Hence, if rows of small weight are dropped and others doubled in proportion to w
(resampling, `sdediff.particles`), with the mean of the weights kept as a factor,

    E[Z_N] = Z = E_p[r(x_0)],        sum_i w_i f(x_0^i) -> E_p[f r] / E_p[r]        as N grows,

where p is the law of the chain's outcome: that of the model as far as the steps are fine enough and the network right.
What psi decides is the variance of the weights. With `x_s = m + V g + V^(1/2) z`, `g = c grad log psi_t`,

    log p(x_s | x_t) - log q(x_s | x_t) = - V |g|^2 / 2 - V^(1/2) g.z .

Best is `psi_t(x) = E[r(x_0) | x_t = x]`, for which the weights become equal as steps shrink: the logarithm of a factor
is then `V (z^T H z - tr H) / 2 + O(V^(3/2))`, H the Hessian of log psi, and the variance of log w falls like 1 / steps.
By default psi_t(x) = r(E[x_0 | x_t = x]), whose value and gradient cost one call of the network and its gradient, and
the same call gives m (twisted diffusion sampler). psi = 1 is importance sampling of the model's samples; c = 0 with a
psi is the bootstrap particle filter.

References: Wu et al. 2023 (arXiv:2306.17775), twisted diffusion sampler; Trippe et al. 2022 (arXiv:2206.04119); Del
Moral 2004, Feynman-Kac Formulae; Chopin and Papaspiliopoulos 2020, An Introduction to Sequential Monte Carlo.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from sdediff.draws import mix
from sdediff.energy import one_a_row, value_and_slope
from sdediff.errors import CapabilityError, DegeneracyWarning, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.guidance import Scale, SimilarityGuidance
from sdediff.model import ScoreModel
from sdediff.noise import RowNoise
from sdediff.particles import (
    Particles,
    ancestors,
    check_resampling,
    effective_number,
    family_error,
    family_gain,
    family_number,
    log_mean,
    normalised,
)
from sdediff.runs import (
    bound_rows,
    check_arguments,
    chunks_of,
    evaluating,
    grid_for,
    like_state,
    starts_at_prior,
)
from sdediff.sde import fresh_seed
from sdediff.shapes import Grid, PerRow, State, finite_or_raise, over, sum_rows
from sdediff.tables import DDPM, refuse_infinite
from sdediff.variance import EntryVariance, ReverseSteps, ReverseVariance, entries_of, variance_of
from sdediff.wrapped import Wrapped

LogDensity: TypeAlias = Callable[[State], PerRow]
Twist: TypeAlias = Callable[[Tensor, State], PerRow]


def Product(model: ScoreModel, log_r: LogDensity, scale: Scale = 1.0, *, at: str = "denoised") -> ScoreModel:
    """The plain gradient form, `score + w grad_x log r`: `SimilarityGuidance` by log r.

    Cheap, for any solver, and biased: its samples follow `p r` in special cases only, such as a log-linear r on
    Gaussian data with `at="denoised"`. `smc` tells how far off they are.

    Args:
        model: the score of p.
        log_r: `(batch, *event)` to `(batch,)`, differentiable.
        scale: w, a number, one for every row, or a function of the times.
        at: "denoised" for r at `E[x_0 | x_t]`, "noisy" for r at the state.

    Raises:
        as `SimilarityGuidance`.
    """
    return SimilarityGuidance(model, log_r, scale, at=at)


def smc(
    model: ScoreModel,
    log_r: LogDensity,
    particles: Sequence[int],
    *,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    variance: str | ReverseVariance = "posterior",
    twist: Twist | None = None,
    shift: float = 1.0,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    final: str = "denoise",
    seed: int | None = None,
    condition: Any = None,
    batch_size: int | None = None,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Particles:
    """Sample a model times another density by twisted sequential Monte Carlo.

    A step costs a network call and its gradient for every particle. Weights go to the CPU at every step.

    Args:
        model: the score and the SDE; guided models too, whose chain then takes the place of p.
        log_r: `log r`, `(batch, *event)` to `(batch,)`, up to a constant, which moves `log_evidence` alone. A gradient
            that is only near the true one does: it proposes, and weights do not see it. Where r is 0, -inf, give a
            `twist` that is finite: a resampling would drop all particles of psi = 0, also those that would come back,
            and is refused.
        particles: `(particles, *event)`, at least two.
        steps, times, t_min: as in `sample`; times must start at `t_max`.
        variance: of the kernels, as in `DDPM`.
        twist: `log psi_t(x)` as a function of t (float64, `(batch,)`) and x that returns `(batch,)`, differentiable in
            x; None for `log_r` of the denoised estimate. The `log_prob` of a classifier of noised data is one.
        shift: c, by how much of V grad log psi proposals move; with 0 no gradient is taken, so that none need exist.
        ess_threshold: particles are resampled before a step if their effective number is below this share of them: 0
            for never, 1 for always, unless all weights are equal.
        resampling: "systematic", "multinomial" or "residual".
        final: "denoise" if the outcome of the chain is the denoised mean at the last time (one more evaluation), "none"
            if it is the state.
        seed: decides all; None draws one from torch's global generator. `batch_size` does not change the result.
        condition: passed to the network; the same for all particles, which take each other's places, as must be what
            a guided model holds for its rows.
        batch_size: particles that the network sees at a time; all if None.
        progress, dtype, device: as in `sample`.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError: an argument does not fit, such as a `log_r` without a
            gradient; the message says how.
        DivergenceError: a state or a weight became NaN or infinite, all weights are 0, or psi is 0 at particles that
            are resampled; names the step and the time.

    Warns:
        DegeneracyWarning: `Particles.family_number` is below 100 and below a twentieth of the particles.
    """
    shape = _check(model, log_r, particles, twist, shift, ess_threshold, resampling, final)
    _refuse_uneven(model if condition is None else model.given(condition), shape[0])
    solver = DDPM(variance)
    grid = grid_for(model, solver, steps, times, t_min, direction=-1)
    if not starts_at_prior(model, grid[0]):
        raise TimeError(
            f"times starts at {grid[0]:g}, but particles are drawn from the prior, which is that of t_max = "
            f"{model.sde.t_max:g}: start there."
        )
    like, count, last = like_state(model, None, shape, dtype, device), shape[0], len(grid) - 1
    prior = model.sde.prior(shape[1:], dtype=like.dtype)
    seed = fresh_seed() if seed is None else seed
    stream, generator = RowNoise(seed).open(), torch.Generator().manual_seed(mix(seed, 40) >> 2)
    bar = tqdm(total=last, unit="step", leave=False) if progress else nullcontext()
    with torch.no_grad(), evaluating(model.network), bar:
        chunks = chunks_of(count, batch_size)
        parts, counters = zip(*(bound_rows(model, condition, rows, count) for rows in chunks), strict=True)
        chains = [_Chain.of(part, solver, grid, log_r, twist, shift) for part in parts]
        x = prior.mean.to(like) + prior.stddev.to(like) * stream.normal(like.expand(shape))
        families, log_evidence = torch.arange(count), 0.0
        log_factors = torch.zeros(count, dtype=torch.float64)  # log w - log psi: what the path has been reweighted by
        gains, numbers, resampled = torch.zeros_like(log_factors), [], []
        for k in range(last):
            here = _joined([chain.look(k, x[rows]) for chain, rows in zip(chains, chunks, strict=True)])
            log_w = _weights(log_factors, here.log_psi, k, grid[k])
            numbers.append(effective_number(log_w))
            if numbers[-1] < ess_threshold * count:
                _refuse_zeros(here.log_psi, k, grid[k], "log_r at the denoised estimate" if twist is None else "twist")
                index = ancestors(log_w, count, resampling, generator)
                log_evidence += log_mean(log_w)
                gains += family_gain(log_w, families)
                here, families = here.taken(index), families[index]
                log_factors = -_wide(here.log_psi)
                resampled.append(k)
            x, log_ratio = here.moved(stream.unit(x, grid[k], grid[k + 1]))
            finite_or_raise(x, "The proposed state", step=k, time=grid[k + 1].item())
            log_factors = log_factors + _wide(log_ratio)
            if isinstance(bar, tqdm):
                bar.update()
        if final == "denoise":
            x = torch.cat([part.denoised(grid[-1], x[rows]) for part, rows in zip(parts, chunks, strict=True)])
        log_r_x = torch.cat([one_a_row(log_r(x[rows]), x[rows]) for rows in chunks])
        log_w = _weights(log_factors, log_r_x, last, grid[-1])
        gains += family_gain(log_w, families)
    _warn_of_few(family_number(log_w, families), count)
    return Particles(
        x=x,
        log_weights=normalised(log_w),
        log_evidence=log_evidence + log_mean(log_w),
        log_evidence_stderr=family_error(gains).item(),
        ess=torch.tensor([*numbers, effective_number(log_w)], dtype=torch.float64),
        resampled=tuple(resampled),
        families=families,
        times=grid,
        nfe=max(counter.calls for counter in counters),
    )


@dataclass(frozen=True, eq=False)
class _Proposals:
    """What particles at one time move by.

    Attributes:
        log_psi: `(batch,)`.
        slope: `c grad log psi`.
        mean: m.
        std: the root of V, a number or one for every entry.
    """

    log_psi: PerRow
    slope: State
    mean: State
    std: State | float

    def taken(self, index: Tensor) -> _Proposals:
        at = index.to(self.mean.device)
        std = self.std if isinstance(self.std, float) else self.std[at]
        return _Proposals(self.log_psi[at], self.slope[at], self.mean[at], std)

    def moved(self, z: State) -> tuple[State, PerRow]:
        """`m + V g + V^(1/2) z` and `log p - log q` there."""
        push = self.std * self.slope
        start = self.mean + self.std * push
        x = start.add(z, alpha=self.std) if isinstance(self.std, float) else start.addcmul(self.std, z)
        return x, -sum_rows(push * (push / 2 + z))


def _joined(parts: list[_Proposals]) -> _Proposals:
    if len(parts) == 1:
        return parts[0]
    stds = [part.std for part in parts]
    return _Proposals(
        torch.cat([part.log_psi for part in parts]),
        torch.cat([part.slope for part in parts]),
        torch.cat([part.mean for part in parts]),
        stds[0] if isinstance(stds[0], float) else torch.cat([torch.as_tensor(std) for std in stds]),
    )


@dataclass(frozen=True, eq=False)
class _Chain:
    """The kernels of DDPM and the twisting functions along a grid, for some rows.

    Attributes:
        output: the network along the times.
        kept, added: `m(x) = kept x + added output`, a number for every step.
        std: the root of V, likewise.
        spread: V of every entry in place of it, at a state that the network has just seen.
        in_x, in_output: the denoised estimate as a sum like m.
    """

    output: Callable[[int, State], State]
    kept: list[float]
    added: list[float]
    std: list[float]
    spread: Callable[[int, State], State] | None
    in_x: list[float]
    in_output: list[float]
    times: Grid
    log_r: LogDensity
    twist: Twist | None
    shift: float

    @classmethod
    def of(
        cls, model: ScoreModel, solver: DDPM, grid: Grid, log_r: LogDensity, twist: Twist | None, shift: float
    ) -> _Chain:
        starts = grid[:-1]
        table, one = solver.table(model, grid), torch.ones_like(starts)
        in_x, in_output = model.weights(starts, one, 0 * one)
        refuse_infinite(model, table, torch.stack([table.A, table.B[:, 0], in_x, in_output], dim=1))
        variance, spread = variance_of(solver.variance, "smc"), None
        if isinstance(variance, EntryVariance):
            model, spread = entries_of(variance, model, ReverseSteps.of(model.point(grid)))
        kept, added, std = table.A.tolist(), table.B[:, 0].tolist(), table.C.tolist()
        output = model.along(starts)
        return cls(output, kept, added, std, spread, in_x.tolist(), in_output.tolist(), starts, log_r, twist, shift)

    def look(self, k: int, x: State) -> _Proposals:
        """One call of the network, and its gradient if psi needs it."""
        outputs: list[State] = []

        def log_psi(at: State) -> PerRow:
            if self.twist is not None:
                return self.twist(self.times[k].expand(len(at)), at)
            output = self.output(k, at)
            outputs.append(output.detach())
            return self.log_r(self.in_x[k] * at + self.in_output[k] * output)

        if self.shift:
            value, gradient = value_and_slope(log_psi, x)
            if gradient is None:
                raise CapabilityError(
                    f"{'log_r' if self.twist is None else 'twist'} has no gradient in x, by which proposals move: its "
                    "value was computed without x, or by operations that are not differentiable (under no_grad, after "
                    "detach(), by argmax or in numpy). Write it in differentiable torch operations, or shift=0."
                )
            slope = torch.where(over(value == -math.inf, x).bool(), 0, self.shift * gradient)
        else:
            value, slope = one_a_row(log_psi(x), x), torch.zeros_like(x)
        output = outputs[0] if outputs else self.output(k, x)
        std = self.std[k] if self.spread is None else self.spread(k, x).detach().sqrt()
        return _Proposals(value, slope, (self.kept[k] * x).add(output, alpha=self.added[k]), std)


def _wide(values: PerRow) -> PerRow:
    return values.cpu().to(torch.float64)


def _weights(log_factors: PerRow, log_psi: PerRow, step: int, t: Tensor) -> PerRow:
    """The log-weights, of which one at least is positive and none is NaN or infinite."""
    log_w = log_factors + _wide(log_psi)
    wrong = log_w.isnan() | (log_w == math.inf)
    if bool(wrong.any()):
        raise DivergenceError(
            "The weight of particles is NaN or infinite",
            "log_r and the twist must return log-densities, numbers or -inf, at every state that comes up, also early "
            "ones that look like no data.",
            step=step,
            time=t.item(),
            rows=wrong.nonzero()[:, 0].tolist(),
        )
    if bool((log_w == -math.inf).all()):
        raise DivergenceError(
            "The weights of all particles are 0",
            "Take more particles, a log_r that is finite everywhere, or twist= that is -inf nowhere before the end.",
            step=step,
            time=t.item(),
            rows=[],
        )
    return log_w


def _refuse_zeros(log_psi: PerRow, step: int, t: Tensor, what: str) -> None:
    """Refuse psi = 0 before the end, where a resampling would lose what the product may hold."""
    zero = _wide(log_psi) == -math.inf
    if bool(zero.any()):
        raise DivergenceError(
            f"{what} is -inf for particles that are to be resampled",
            "They would be dropped, though the data they lead to may have r > 0, and the result would be biased. Give "
            "twist=, a log psi that is finite at every state, such as a smooth version of log_r, or do not resample: "
            "ess_threshold=0.",
            step=step,
            time=t.item(),
            rows=zero.nonzero()[:, 0].tolist(),
        )


def _warn_of_few(families: float, count: int) -> None:
    if families < min(100, count / 20):
        warnings.warn(
            f"The {count} particles are worth {families:.3g} independent ones (family_number): most were dropped on "
            "the way, and with them perhaps whole modes. Neither the samples nor the stated errors are to be trusted. "
            "Give a twist= that is nearer to E[r(x_0) | x_t], such as a wider one; more particles help slowly.",
            DegeneracyWarning,
            stacklevel=3,
        )


def _refuse_uneven(model: ScoreModel, count: int) -> None:
    if _varies(model, model.rows(slice(0, 1), count), count):
        raise OptionError(
            "Particles take each other's places, so that they must share one condition, and one label, target and "
            "scale of guidance; the rows of the one given differ. Run smc once for each."
        )


def _varies(whole: Any, first: Any, count: int) -> bool:
    """Whether something that `rows` has cut to the first row differs between rows."""
    if whole is first:
        return False
    if isinstance(whole, Tensor):
        return whole.shape[:1] == (count,) and bool((whole != whole[:1]).any())
    if isinstance(whole, dict):
        return any(_varies(whole[name], first[name], count) for name in whole)
    if isinstance(whole, (list, tuple)):
        return any(_varies(*parts, count) for parts in zip(whole, first, strict=True))
    if isinstance(whole, (ScoreModel, Wrapped)):
        return any(_varies(getattr(whole, f.name), getattr(first, f.name), count) for f in fields(whole))
    return False


def _check(
    model: object,
    log_r: object,
    particles: Sequence[int],
    twist: object,
    shift: float,
    ess_threshold: float,
    resampling: str,
    final: str,
) -> tuple[int, ...]:
    """The shape; refuse arguments that do not fit."""
    check_arguments(model, DDPM())
    if not callable(log_r):
        raise OptionError(f"log_r must be a function of states that returns (batch,); got {type(log_r).__name__}.")
    if twist is not None and not callable(twist):
        raise OptionError(f"twist must be a function of t and x that returns (batch,); got {type(twist).__name__}.")
    if not isinstance(particles, Sequence) or any(not isinstance(n, int | Integral) or n < 1 for n in particles):
        raise ShapeError(
            f"particles is a shape, (particles, *event), with positive whole numbers; got {particles!r}. Write "
            "smc(model, log_r, (1000, 2)) for 1000 points of the plane."
        )
    if not particles or particles[0] < 2:
        raise ShapeError(f"smc needs at least two particles, to weigh them; got the shape {tuple(particles)}.")
    if not isinstance(shift, float | Real) or not math.isfinite(shift):
        raise OptionError(f"shift is a finite number, 1 for the full gradient and 0 for none; got {shift!r}.")
    if not isinstance(ess_threshold, float | Real) or not 0 <= ess_threshold <= 1:
        raise OptionError(
            f"ess_threshold is a share of the particles, from 0 (never resample) to 1 (always); got {ess_threshold!r}."
        )
    check_resampling(resampling)
    if final not in ("denoise", "none"):
        raise OptionError(f"Unknown final {final!r}: write 'denoise' or 'none'.")
    return tuple(int(n) for n in particles)
