r"""Log-likelihoods by the probability-flow ODE, with error bars.

Along `dx/dt = F(t, x)` the density of the moving state changes by `d log p_t(x(t)) / dt = -div F`, so

    log p(x) = log p_T(x(T)) + int_0^T div F(t, x(t)) dt.

By default the path and the integral are those of `sdediff.density`: every row has steps of its own, to a tolerance in
nats, at one network call a step, and probes that are fresh at every step. A `solver` of the caller's integrates the
divergence together with the path instead, as k extra entries of every row with probes that are fixed for the whole
solve, so that the right-hand side is smooth; that is also what a process that is not linear gets.

Four things may stand between the number and the truth, and each is given beside it:

| what | where | how large |
|---|---|---|
| the solver | `error` | the tolerance |
| the probes | `stderr` | falls as the root of their number; 0 for the exact divergence |
| the data end, p_0 against p_{t_min} | `tail_gap` | taken off the value, unless `tail="none"` |
| the noise end, p_T against the prior | `prior_gap` | its mean over data bounds the bias; see `matched_prior` |

`prior_gap` is the KL divergence of `p(x_T | x_0 = x)` from the prior.

References: Chen et al. 2018 (arXiv:1806.07366); Grathwohl et al. 2019 (arXiv:1810.01367); Song et al. 2021
(arXiv:2011.13456), appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from sdediff.augmented import WithLogDensity, flat
from sdediff.density import DensityRows, FromData, standard_error_of, wide
from sdediff.divergence import Divergence, divergence_for
from sdediff.embedded import AdaptiveRungeKutta
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.exact import GaussianMixture
from sdediff.model import ScoreModel
from sdediff.noise import RowNoise
from sdediff.priors import Prior, is_gaussian, kl_to_prior
from sdediff.runs import (
    Counter,
    bound_rows,
    check_arguments,
    check_density,
    chunks_of,
    density_grid,
    evaluating,
    explain,
    grid_for,
    starts_at_prior,
)
from sdediff.sde import fresh_seed
from sdediff.shapes import Grid, PerRow, State, check_state, finite_or_raise, over, sum_rows
from sdediff.solvers import Solver, Tally, merged


class HasLogProb(Protocol):
    """Anything with a log-density over batches."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """`(batch,)`."""


@dataclass(frozen=True, eq=False)
class LogProb:
    """A log-likelihood, its error bars and its price. Numbers of nats are float64 where the device has it.

    Attributes:
        value: `log p(x)` in nats, `(batch,)`.
        stderr: standard error of the divergence estimate in nats, `(batch,)`: `value` +- 2 `stderr` holds the exact
            divergence in 95 % of cases (for few probes it is widened as Student's t asks). 0 for the exact divergence,
            NaN for a single probe.
        error: estimate of the error of the solver in nats, `(batch,)`; usually several times too large. With probes,
            of the path alone, not of the quadrature of the divergence; NaN with a solver of the caller's.
        latent: the state at t_max, `(batch, *event)`.
        nfe: network evaluations, the most that any row took.
        row_nfe: network evaluations of each row, `(batch,)`; None where they are alike.
        accepted, rejected: steps, `(batch,)`, or summed over the batch if its rows step together.
        prior_gap: KL divergence of `p(x_T | x)` from the prior in nats, `(batch,)`; its mean over data bounds
            what the prior misses of p_T. NaN with a prior that is not Gaussian.
        tail_gap: `log p_0 - log p_{t_min}` in nats as the score at t_min has it, `(batch,)`: the size of what is taken
            off the value. Infinite, and not taken off, where no smooth density explains the model near the data; NaN
            with `tail="none"`.
        estimates: one value for each probe, `(probes, batch)`; their mean is `value`. With the same seed and grid, two
            models share their probes: see `minus`.
        settings: the method, divergence, span, ends and seed that gave the number.
    """

    value: PerRow
    stderr: PerRow
    error: PerRow
    latent: State
    nfe: int
    row_nfe: Tensor | None
    accepted: Tensor | int | None
    rejected: Tensor | int | None
    prior_gap: PerRow
    tail_gap: PerRow
    estimates: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def minus(self, other: LogProb) -> tuple[PerRow, PerRow]:
        """`value - other.value` and its standard error, `(batch,)` each, from the differences probe by probe.

        Of two models on the same rows, seed, divergence and grid (`steps=`), whose probes are then common, it is much
        smaller than either standard error.

        Raises:
            OptionError: the two were not computed with the same seed and divergence.
        """
        if self.value.shape != other.value.shape:
            raise ShapeError(
                f"Likelihoods of the same rows are compared; got {len(self.value)} and {len(other.value)}."
            )
        for name in ("divergence", "seed", "tail"):
            if self.settings[name] != other.settings[name]:
                raise OptionError(
                    f"Likelihoods are compared with the same {name}; got {self.settings[name]!r} and "
                    f"{other.settings[name]!r}. Give both the same seed=, divergence= and tail=."
                )
        difference = self.estimates - other.estimates
        return difference.mean(0), standard_error_of(difference, self.settings["seed"] is not None)


def log_prob(
    model: ScoreModel,
    x: State,
    *,
    atol_nats: float | None = None,
    max_nfe: int | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    divergence: str | Divergence = "auto",
    prior: HasLogProb | None = None,
    tail: str | None = None,
    transform: Transform | None = None,
    differentiable: bool = False,
    seed: int | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> LogProb:
    """Log-likelihood of data under the model's probability-flow ODE, in nats.

    Where x requires a gradient, that of the value is the score of the data as the model has it at t_min (as long as
    `differentiable` is not set, and with the default method), which costs nothing.

    Args:
        model: the score and the SDE.
        x: data `(batch, *event)`, any event shape.
        atol_nats: error allowed in a step, in nats; the error of a value is about half of it. None for 1e-3.
        max_nfe: network calls a row may take; one that needs more is an error.
        solver: in place of the default method, a deterministic solver of drift and diffusion (AdaptiveRungeKutta,
            TorchDiffEq, RungeKutta, Heun), which integrates path and divergence together.
        steps, times: the grid, as in `encode`. Without a solver, rows take these steps, the same for all, in place of
            steps of their own: every process of a distributed job then makes as many network calls.
        t_min: where the path begins, in place of the SDE's own `t_min`.
        divergence: "exact", `Exact(...)`, `Hutchinson(probes, distribution)`, or "auto": exact up to 128 entries, else
            8 orthogonal probes. What was done is said in `settings`.
        prior: the distribution of the latents, anything with `log_prob(x) -> (batch,)`; the SDE's own if None, whose
            likelihood is that of the samples of `sample`. See `sdediff.priors`.
        tail: "gaussian" for x that is data, whose density is corrected for the blur of t_min (see `sdediff.density`);
            "none" for x that is a state at t_min, such as `sample(..., final="none")` gives. None for "gaussian" where
            the SDE is linear.
        transform: of data to the space of the model; its log-determinant is added. Any of `torch.distributions`.
        differentiable: whether gradients flow through the solve, to x, the condition and the network's parameters.
        seed: of the probes; row i depends on it and on i only.
        condition, batch_size: as in `sample`.

    Raises:
        CapabilityError: the solver cannot integrate this process, the SDE has no prior, or the model no density.
        DivergenceError: a row diverged, or ran out of network calls.
        OptionError, ShapeError, TimeError: an argument does not fit.
    """
    check_arguments(model, AdaptiveRungeKutta() if solver is None else solver)
    check_density(model)
    check_state(x)
    if x.shape[0] == 0:
        raise ShapeError("log_prob needs at least one row; got x with 0 rows.")
    if atol_nats is not None and not atol_nats > 0:
        raise OptionError(f"atol_nats must be positive; got {atol_nats}.")
    if atol_nats is not None and (solver is not None or not model.is_linear):
        raise OptionError(
            "atol_nats belongs to the default method; a solver has tolerances of its own, as in "
            "solver=AdaptiveRungeKutta(rtol=1e-5, atol=1e-5), and so has an SDE that is not linear."
        )
    if max_nfe is not None and solver is not None:
        raise OptionError(
            f"max_nfe belongs to the default method; got solver={solver}: give the solver a budget of its own."
        )
    if max_nfe is not None and max_nfe < 1:
        raise OptionError(f"max_nfe must be at least 1, or None; got {max_nfe}.")
    y, log_det = _transformed(transform, x)
    way = divergence_for(divergence, math.prod(y.shape[1:]))
    run = _Run(
        solver=_solver(model, solver, differentiable, max_nfe),
        divergence=way,
        atol=(atol_nats or 1e-3) if steps is None and times is None else None,
        max_nfe=max_nfe,
        tail=_tail(model, tail),
        seed=seed if seed is not None else fresh_seed() if way.random else 0,
        differentiable=differentiable,
    )
    grid = (
        grid_for(model, run.solver, steps, times, t_min, direction=1)
        if run.solver is not None
        else density_grid(model, steps, times, t_min, direction=1)
    )
    if prior is None and not starts_at_prior(model, grid[-1]):
        raise TimeError(
            f"times ends at {grid[-1]:g}, but the prior is that of t_max = {model.sde.t_max:g}: end there, or pass "
            "prior=, the distribution of the states at the last time."
        )
    finite_or_raise(y, "x", step=None, time=grid[0].item())
    _check_ends(model, run, grid)
    wanted = differentiable and torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted), evaluating(model.network):
        data = y if wanted else y.detach().clone()
        _check_differentiable(model, data.detach(), grid[0], condition)
        result, score = _integrate(run, model, data, grid, prior, condition, batch_size)
    value = result.value + log_det
    if score is not None and y.requires_grad and torch.is_grad_enabled() and not wanted:
        value = value + sum_rows(wide(score * (y - y.detach())))
    settings = {**result.settings, "transform": None if transform is None else repr(transform)}
    return LogProb(
        **{**vars(result), "value": value, "estimates": (result.estimates + log_det).detach(), "settings": settings}
    )


# What is to be done.


@dataclass(frozen=True)
class _Run:
    """Everything about a likelihood but the model and the rows."""

    solver: Solver | None
    divergence: Divergence
    atol: float | None
    max_nfe: int | None
    tail: str
    seed: int
    differentiable: bool


def _solver(model: ScoreModel, solver: Solver | None, differentiable: bool, max_nfe: int | None) -> Solver | None:
    if solver is None and model.is_linear:
        return None
    if differentiable:
        raise CapabilityError(
            "differentiable=True needs the default method, which takes no solver and a linear SDE; got "
            f"solver={solver} and {model.sde}. Give atol_nats= or steps= instead of a solver."
        )
    if solver is None:
        return AdaptiveRungeKutta(max_nfe=max_nfe)
    if not solver.deterministic:
        hint = "AdaptiveRungeKutta(), TorchDiffEq() or Heun(), or no solver at all"
        raise CapabilityError(f"A likelihood needs the deterministic flow, but {solver} adds noise: use {hint}.")
    return solver


def _tail(model: ScoreModel, tail: str | None) -> str:
    if tail is None:
        return "gaussian" if model.is_linear else "none"
    if tail not in ("gaussian", "none"):
        raise OptionError(f"Unknown tail {tail!r}: write 'gaussian' or 'none'.")
    if tail == "gaussian":
        _ = model.linear  # refuses a model without alpha and sigma
    return tail


def _check_ends(model: ScoreModel, run: _Run, grid: Grid) -> None:
    """Refuse ends at which the default method has no finite numbers."""
    if run.solver is not None and run.tail == "none":
        return
    (_, alpha), (sigma, _) = model.linear.scales_at(grid[[0, -1]])
    if not sigma.item() > 0:
        raise TimeError(
            f"{model.sde} has no noise at t = {grid[0]:g}, where the score of a network has no scale: begin later, "
            "with t_min=1e-5 for instance; what lies before is taken off the value."
        )
    if model.blind_in_noise and not alpha.item() > 0:
        raise CapabilityError(
            f"At t = {grid[-1]:g} alpha is 0, where a model that predicts {model.prediction!r} says nothing of the "
            "data: end before, with times= and prior=, or use an SDE whose t_max lies before."
        )


def _transformed(transform: Transform | None, x: State) -> tuple[State, PerRow]:
    if transform is None:
        return x, wide(x.new_zeros(len(x)))
    domain: constraints.Constraint = transform.domain
    inside = domain.check(x).reshape(len(x), -1).all(1)  # type: ignore[no-untyped-call]  # torch's own has no types
    if not bool(inside.all()):
        raise OptionError(
            f"Rows {(~inside).nonzero()[:, 0].tolist()[:8]} of x lie outside of the domain of {transform}, where there "
            "is no density: leave them out, or move them in."
        )
    y = transform(x)
    check_state(y, "transform(x)")
    log_det: Tensor = transform.log_abs_det_jacobian(x, y)  # type: ignore[no-untyped-call]  # torch's own has no types
    return y, wide(log_det).reshape(len(x), -1).sum(1)


def _check_differentiable(model: ScoreModel, x: State, t: Tensor, condition: Any) -> None:
    """Refuse a network whose output depends on x in a way that automatic differentiation does not see."""
    bound, _ = bound_rows(model, condition, slice(0, 1), len(x))
    with torch.enable_grad():
        at = x[:1].clone().detach().requires_grad_()
        output = bound.predict(t, at)
        if output.requires_grad and torch.autograd.grad(output.sum(), at, allow_unused=True)[0] is not None:
            return
    elsewhere = bound.predict(t, 1.1 * at.detach() + 0.1)
    if not torch.allclose(output.detach(), elsewhere, rtol=0, atol=0, equal_nan=True):
        raise CapabilityError(
            "The network's output depends on x, but not for automatic differentiation, so its divergence would come "
            "out wrong: remove torch.no_grad and detach from it, or pass create_graph=True where it differentiates."
        )


# How it is done.


@dataclass
class _Part:
    """The likelihood of some rows: `estimates` of log p(start) - log p(end), `(count, rows)`, and what they cost."""

    estimates: Tensor
    stderr: PerRow
    error: PerRow
    latent: State
    nfe: int
    row_nfe: Tensor | None
    tally: Tally
    gap: PerRow
    score: State | None


def _integrate(
    run: _Run,
    model: ScoreModel,
    x: State,
    grid: Grid,
    prior: HasLogProb | None,
    condition: Any,
    batch_size: int | None,
) -> tuple[LogProb, State | None]:
    """The likelihood, and its gradient as far as it comes free of charge."""
    event, size = tuple(x.shape[1:]), math.prod(x.shape[1:])
    terminal = _prior(model, event) if prior is None else prior
    parts, ends = [], []
    for rows in chunks_of(x.shape[0], batch_size):
        bound, counter = bound_rows(model, condition, rows, x.shape[0])
        solve = _by_rows if run.solver is None else _together
        try:
            part = solve(run, bound, counter, x[rows], grid, rows.start)
            _check_reached(part.tally, grid)
        except DivergenceError as error:
            raise error.shifted(rows.start) from error
        parts.append(part)
        ends.append(_at_end(terminal, part.latent, prior is None))
    joined = torch.cat([part.estimates for part in parts], dim=1) + torch.cat(ends)
    tally = merged([part.tally for part in parts])
    row_nfe = None if parts[0].row_nfe is None else torch.cat([p.row_nfe for p in parts if p.row_nfe is not None])
    scores = [part.score for part in parts if part.score is not None]
    result = LogProb(
        value=joined.mean(0),
        stderr=torch.cat([part.stderr for part in parts]),
        error=torch.cat([part.error for part in parts]),
        latent=torch.cat([part.latent for part in parts]),
        nfe=max(part.nfe for part in parts),
        row_nfe=row_nfe,
        accepted=tally.accepted,
        rejected=tally.rejected,
        prior_gap=_prior_gap(model, terminal, x.detach(), grid, run.tail),
        tail_gap=torch.cat([part.gap for part in parts]),
        estimates=joined,
        settings=_settings(run, grid, prior, size),
    )
    return result, torch.cat(scores) if scores else None


def _prior(model: ScoreModel, event: tuple[int, ...]) -> HasLogProb:
    """The SDE's own."""
    try:
        prior: HasLogProb = model.sde.prior(event, dtype=torch.float64)
    except CapabilityError as error:
        raise CapabilityError(
            f"{model.sde} has no closed-form prior: pass prior=, the distribution of the states at t_max, anything "
            "with log_prob(x) -> (batch,)."
        ) from error
    return prior


def _settings(run: _Run, grid: Grid, prior: HasLogProb | None, size: int) -> dict[str, Any]:
    if run.solver is not None:
        method = f"{run.solver!r}, path and divergence together"
    elif run.atol is not None:
        method = f"exponential Adams, steps for every row, atol_nats={run.atol:g}"
    else:
        method = f"exponential Adams, {len(grid) - 1} steps"
    return {
        "method": method,
        "divergence": f"{run.divergence!r} of {size} entries",
        "t_min": grid[0].item(),
        "t_max": grid[-1].item(),
        "tail": run.tail,
        "prior": "the SDE's own" if prior is None else type(prior).__name__,
        "seed": run.seed if run.divergence.random else None,
    }


def _from_data(run: _Run, model: ScoreModel, x: State, grid: Grid, first_row: int) -> tuple[FromData, Tensor]:
    """Rows moved from data to t_min, and estimates of `log p_0(x) - log p_{t_min}(where they are)`, `(count, rows)`."""
    alpha = model.linear.alpha(grid[0])
    rows = FromData(
        model, over(alpha, x) * x, grid, run.divergence,
        seed=run.seed, first_row=first_row, atol=run.atol, max_nfe=run.max_nfe,
    )  # fmt: skip
    return rows, rows.blur.log_dets + x[:1].numel() * alpha.log().to(rows.blur.log_dets)


def _by_rows(run: _Run, model: ScoreModel, counter: Counter, x: State, grid: Grid, first_row: int) -> _Part:
    """The likelihood of some rows up to the density of the latents, with steps for every row or those of a grid."""
    rows: DensityRows
    if run.tail == "gaussian":
        data, log_det = _from_data(run, model, x, grid, first_row)
        rows, gap, score = data, data.blur.gap, data.blur.score
    else:
        rows = DensityRows(
            model, x, grid, run.divergence, seed=run.seed, first_row=first_row, atol=run.atol, max_nfe=run.max_nfe
        )
        log_det = torch.zeros_like(rows.variance)
        gap, score = torch.full_like(log_det, math.nan), rows.first_score
    for target in range(1, len(grid)):
        rows.run(target)
        if run.atol is None:
            finite_or_raise(rows.x, "The state", step=target - 1, time=grid[target].item())
    tally = Tally(rows.accepted, rows.rejected, rows.nfe, rows.t)
    nfe = int(rows.nfe.max())
    return _Part(rows.change + log_det, rows.stderr, rows.error_estimate, rows.x, nfe, rows.nfe, tally, gap, score)


def _together(run: _Run, model: ScoreModel, counter: Counter, x: State, grid: Grid, first_row: int) -> _Part:
    """The same with path and divergence as one process, by a solver."""
    assert run.solver is not None
    size, divergence, numbers = x[:1].numel(), run.divergence, np.arange(len(x))
    start, zero = x, wide(x).reshape(len(x), -1)[:, 0] * 0
    gap, score, log_det, variance = zero + math.nan, None, zero, zero
    if run.tail == "gaussian":
        data, log_det = _from_data(run, model, x, grid, first_row)
        start, gap, score, variance = data.x, data.blur.gap, data.blur.score, data.variance
    vectors = divergence.draw(x, run.seed, first_row + numbers, 0 * numbers)
    process = WithLogDensity(model, divergence, vectors, tuple(x.shape[1:]))
    state = torch.cat([flat(start), x.new_zeros(len(x), divergence.count)], dim=1)
    silent, tally = RowNoise(0).open, Tally()
    *_, end = run.solver.solve(process, state, grid, silent(), tally)
    nfe = counter.calls
    explain(run.solver, process, state, end, grid, silent)
    estimates = wide(end[:, size:]).T
    stderr = (standard_error_of(estimates, divergence.random) ** 2 + variance).sqrt()
    latent = end[:, :size].reshape(x.shape)
    return _Part(estimates + log_det, stderr, zero + math.nan, latent, nfe, tally.nfe, tally, gap, score)


def _at_end(prior: HasLogProb, latent: State, own: bool) -> PerRow:
    """The log-density of latents; in float64 for distributions that are made for it."""
    if own:
        value = prior.log_prob(wide(latent).cpu())
    else:
        value = prior.log_prob(wide(latent) if isinstance(prior, GaussianMixture | Distribution) else latent)
    if value.shape != latent.shape[:1]:
        raise ShapeError(
            f"prior.log_prob must return one number per row, shape ({len(latent)},); it returned {tuple(value.shape)}. "
            "Wrap a distribution over entries: torch.distributions.Independent(prior, number of event dimensions)."
        )
    return wide(value).to(latent.device)


def _check_reached(tally: Tally, grid: Grid) -> None:
    """Refuse rows that a budget stopped short of the noise end: their integral is not a likelihood."""
    if tally.reached is None or bool((tally.reached == grid[-1]).all()):
        return
    rows = (tally.reached != grid[-1]).nonzero()[:, 0].tolist()
    raise DivergenceError(
        f"{len(rows)} row(s) ran out of network calls before t = {grid[-1]:g}",
        "Raise max_nfe, or loosen the tolerance.",
        step=None,
        time=tally.reached[rows[0]].item(),
        rows=rows,
    )


def _prior_gap(model: ScoreModel, prior: HasLogProb, x: State, grid: Grid, tail: str) -> PerRow:
    """KL divergence of the kernel from x to the last time from the prior, where that is Gaussian."""
    if not model.is_linear or not is_gaussian(prior):
        return wide(x.new_full((len(x),), math.nan))
    (alpha_0, alpha), (sigma_0, sigma) = model.linear.scales_at(grid[[0, -1]])
    scale, variance = alpha, sigma**2
    if tail == "none":  # x is a state at the first time
        scale, variance = alpha / alpha_0, sigma**2 - (alpha * sigma_0 / alpha_0) ** 2
    gap = kl_to_prior(cast(Prior, prior), scale * x.detach().cpu().double(), variance.sqrt().item())
    return wide(gap.to(x.dtype) if x.device.type == "mps" else gap).to(x.device)
