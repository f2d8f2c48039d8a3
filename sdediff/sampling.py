r"""The front door: `sample` runs a model from noise to data, `encode` from data to noise.

`sample` draws `x_T` from the SDE's prior (or takes `x_init`), hands the process of the solver and a grid to the one
loop, and ends, unless told otherwise, with one evaluation of the denoised mean at `t_min` (Tweedie), which is counted.
Nobody types a direction of time: times fall in `sample` and rise in `encode`.

`decode` is the inverse of `encode`, and `round_trip` measures how well the two cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdediff.density import DensityRows, wide
from sdediff.divergence import Divergence, divergence_for
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.model import ScoreModel
from sdediff.noise import Noise, NoiseStream, RowNoise
from sdediff.reverse import Reverse
from sdediff.runs import (
    Counter,
    bound_rows,
    check_arguments,
    check_density,
    chunks_of,
    default_solver,
    density_grid,
    evaluating,
    explain,
    grid_for,
    like_state,
    starts_at_prior,
)
from sdediff.sde import fresh_seed
from sdediff.shapes import Grid, PerRow, State, Trajectory, check_state, finite_or_raise, per_row, sum_rows
from sdediff.solvers import Solver, Tally, merged
from sdediff.wrapped import evaluations

__all__ = ["RoundTrip", "Solution", "decode", "encode", "round_trip", "sample"]


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back, and what it cost.

    Attributes:
        x: final states `(batch, *event)`.
        nfe: network evaluations for every row (the most that any row took), the final denoising included.
        times: the grid, `(steps + 1,)`.
        trajectory: states at `kept`, `(len(kept), batch, *event)`, if asked for (before the final denoising).
        kept: the times of the trajectory: every k-th of the grid, and its last.
        accepted, rejected: steps of an adaptive solver, `(batch,)`, or summed over the batch if its rows step together;
            None for others.
        row_nfe: network evaluations of each row, `(batch,)`, where they differ.
        reached: the time that each row has come to, `(batch,)`, of a solver with a budget; rows that stopped short of
            `times[-1]` are partial results.
        log_prob, log_prob_stderr: with `with_log_prob=True`, log-density of x at the last time in nats and the standard
            error of its divergence, `(batch,)`.
    """

    x: State
    nfe: int
    times: Grid
    trajectory: Trajectory | None = None
    kept: Grid | None = None
    accepted: Tensor | int | None = None
    rejected: Tensor | int | None = None
    row_nfe: Tensor | None = None
    reached: Tensor | None = None
    log_prob: PerRow | None = None
    log_prob_stderr: PerRow | None = None

    @property
    def complete(self) -> bool:
        """Whether every row has come to the last time."""
        return self.reached is None or bool((self.reached == self.times[-1]).all())


@dataclass(frozen=True)
class _Run:
    """Everything about a solve but the rows."""

    solver: Solver
    process: Reverse
    times: Grid
    every: int
    bar: tqdm[Any] | None
    counter: Counter


def _solve(run: _Run, x: State, stream: NoiseStream, tally: Tally) -> tuple[State, Trajectory | None]:
    states = run.solver.solve(run.process, x, run.times, stream, tally)
    if not run.every and run.bar is None:
        for state in states:
            x = state
        return x, None
    path, last = [x], len(run.times) - 1
    for i, state in enumerate(states, start=1):
        x = state
        if run.every and (i % run.every == 0 or i == last):
            path.append(x)
        if run.bar is not None:
            run.bar.set_postfix(nfe=run.counter.calls, refresh=False)
            run.bar.update()
    return x, torch.stack(path) if run.every else None


def sample(
    model: ScoreModel,
    shape: Sequence[int],
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    x_init: State | None = None,
    t_min: float | None = None,
    final: str = "denoise",
    seed: int | None = None,
    noise: Noise | None = None,
    condition: Any = None,
    batch_size: int | None = None,
    trajectory: bool | int = False,
    differentiable: bool = False,
    with_log_prob: bool = False,
    divergence: str | Divergence = "auto",
    atol_nats: float = 1e-3,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Solution:
    """Draw samples by solving the reverse process from `t_max` to `t_min`, with the network in evaluation mode.

    Args:
        model: the score and the SDE.
        shape: `(batch, *event)`.
        solver: None for Exponential(), or RungeKutta() where the SDE is not linear.
        steps: number of steps of the solver's own grid; its `default_steps` if None.
        times: a grid instead, strictly decreasing within the span of the SDE.
        x_init: states at the first time, in place of draws from the prior.
        t_min: where to stop, in place of the SDE's own `t_min`.
        final: "denoise" to end with the denoised mean at the last time (one more evaluation), "none" for the state.
        seed: row i depends on it and on i only, whatever the batch or chunk size; None draws one from torch's global
            generator.
        noise: a source of noise in place of `RowNoise(seed)`, such as a `BrownianPath`.
        condition: passed to the network; tensors with one entry per row are cut with the rows.
        batch_size: rows solved at a time; all if None.
        trajectory: whether to keep the states at all times, or a number k to keep every k-th.
        differentiable: whether gradients flow through the solve, to x_init, the condition and the network's parameters
            (not to parameters of the SDE, whose coefficients are numbers).
        with_log_prob: whether to carry the log-density along, in one pass: needs `final="none"`, as the density is
            that of the states at the last time, and no solver, as the method is that of `log_prob`, with steps for
            every row to `atol_nats`, or those of `steps` or `times`.
        divergence, atol_nats: as in `log_prob`, for `with_log_prob`.
        progress: whether to show a bar.
        dtype, device: of the states; if None, those of x_init, or of the network's parameters, or its own `dtype`.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError: an argument does not fit; the message says how.
        DivergenceError: a state became NaN or infinite; names step, time and rows.
    """
    if with_log_prob:
        _check_with_log_prob(model, solver, final, trajectory, noise, progress)
    solver = default_solver(model) if solver is None else solver
    check_arguments(model, solver)
    if final not in ("denoise", "none"):
        raise OptionError(f"Unknown final {final!r}: write 'denoise' or 'none'.")
    if not isinstance(shape, Sequence) or not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ShapeError(f"shape must be (batch, *event) with positive whole numbers; got {shape}.")
    shape = tuple(shape)
    make = partial(density_grid, model) if with_log_prob else partial(grid_for, model, solver)
    grid = make(steps, times, t_min, direction=-1)
    if x_init is None and not starts_at_prior(model, grid[0]):
        raise TimeError(
            f"times starts at {grid[0]:g}, but the prior is that of t_max = {model.sde.t_max:g}: start there, or pass "
            "x_init, states at the first time."
        )
    if with_log_prob and not starts_at_prior(model, grid[0]):
        raise TimeError(
            f"times starts at {grid[0]:g}, but the log-density there is known at t_max = {model.sde.t_max:g} only: "
            "start there, or write log_prob(model, x, tail='none') for the result."
        )
    if x_init is not None:
        check_state(x_init, "x_init")
        if tuple(x_init.shape) != shape:
            raise ShapeError(f"x_init has shape {tuple(x_init.shape)}, but shape = {shape} was asked for.")
    like = like_state(model, x_init, shape, dtype, device)
    prior = None if x_init is not None else model.sde.prior(shape[1:], dtype=like.dtype)
    if final == "denoise" and prior is None:
        _ = model.linear  # a model without a denoised mean is refused before anything is computed
    if seed is not None and noise is not None and not with_log_prob:
        raise OptionError("Give either seed=... or noise=..., not both.")
    seed = fresh_seed() if seed is None and (noise is None or with_log_prob) else seed
    noise = RowNoise(seed or 0) if noise is None else noise

    def begin(rows: slice, stream: NoiseStream) -> State:
        if prior is None:
            assert x_init is not None
            return x_init[rows].to(like)
        loc, std = prior.mean.to(like), prior.stddev.to(like)
        return loc + std * stream.normal(like[:1].expand(rows.stop - rows.start, *shape[1:]))

    def end(bound: ScoreModel, t: Tensor, x: State) -> State:
        return bound.denoised(t, x) if final == "denoise" else x

    with torch.set_grad_enabled(differentiable):
        if with_log_prob:
            atol = atol_nats if steps is None and times is None else None
            way = divergence_for(divergence, like.numel())
            with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
                return _scored(model, grid, noise, condition, shape[0], batch_size, begin, way, seed or 0, atol)
        return _run(model, solver, grid, noise, condition, shape[0], batch_size, trajectory, progress, begin, end)


def _check_with_log_prob(
    model: object, solver: Solver | None, final: str, trajectory: bool | int, noise: Noise | None, progress: bool
) -> None:
    """Refuse what does not go together with a log-density."""
    if solver is not None:
        raise CapabilityError(
            f"with_log_prob=True has a method of its own and takes no solver; got {solver}. Leave solver= away, and "
            "give atol_nats=, steps= or times= instead."
        )
    if final != "none":
        raise OptionError(
            "with_log_prob=True gives the density of the states at the last time, not of denoised ones: write "
            'final="none".'
        )
    if trajectory or progress:
        raise OptionError("with_log_prob=True keeps no trajectory and shows no progress: leave both away.")
    if isinstance(model, ScoreModel):
        check_density(model)
        _ = model.linear


def _scored(
    model: ScoreModel,
    grid: Grid,
    noise: Noise,
    condition: Any,
    batch: int,
    batch_size: int | None,
    begin: Callable[[slice, NoiseStream], State],
    divergence: Divergence,
    seed: int,
    atol: float | None,
) -> Solution:
    """States and their log-density, chunk by chunk."""
    parts: list[DensityRows] = []
    densities = []
    with evaluating(model.network):
        for rows in chunks_of(batch, batch_size):
            bound, _ = bound_rows(model, condition, rows, batch)
            start = begin(rows, noise.open(rows.start))
            prior = model.sde.prior(tuple(start.shape[1:]), dtype=torch.float64)
            try:
                part = DensityRows(bound, start, grid, divergence, seed=seed, first_row=rows.start, atol=atol)
                for target in range(1, len(grid)):
                    part.run(target)
                    finite_or_raise(part.x, "The state", step=target - 1, time=grid[target].item())
            except DivergenceError as error:
                raise error.shifted(rows.start) from error
            parts.append(part)
            densities.append(wide(prior.log_prob(wide(start).cpu())).to(start.device) - part.change.mean(0))
    row_nfe = torch.cat([part.nfe for part in parts])
    return Solution(
        x=torch.cat([part.x for part in parts]),
        nfe=int(row_nfe.max()),
        times=grid,
        accepted=torch.cat([part.accepted for part in parts]),
        rejected=torch.cat([part.rejected for part in parts]),
        row_nfe=row_nfe,
        log_prob=torch.cat(densities),
        log_prob_stderr=torch.cat([part.stderr for part in parts]),
    )


def encode(
    model: ScoreModel,
    x: State,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    condition: Any = None,
    batch_size: int | None = None,
    trajectory: bool | int = False,
    differentiable: bool = False,
    progress: bool = False,
) -> Solution:
    """Carry data at `t_min` to its latent at `t_max` along the probability-flow ODE.

    The inverse of `sample(..., x_init=latent, final="none")` with the same solver, to the solver's accuracy.

    Args:
        x: data `(batch, *event)`.
        solver: a deterministic one; None as in `sample`.
        times: a grid, strictly increasing, in place of steps and t_min.
        steps, t_min, condition, batch_size, trajectory, differentiable, progress: as in `sample`.

    Raises:
        CapabilityError: the solver is noisy, so that there is no path to follow back.
    """
    solver = default_solver(model) if solver is None else solver
    check_arguments(model, solver)
    check_state(x)
    if x.shape[0] == 0:
        raise ShapeError("encode needs at least one row; got x with 0 rows.")
    if not solver.deterministic:
        raise CapabilityError(
            f"encode follows the probability-flow ODE, but {solver} adds noise: use a deterministic solver such as "
            "Exponential(), Heun() or TorchDiffEq()."
        )
    grid = grid_for(model, solver, steps, times, t_min, direction=1)
    with torch.set_grad_enabled(differentiable):
        return _run(
            model, solver, grid, RowNoise(0), condition, x.shape[0], batch_size, trajectory, progress,
            lambda rows, stream: x[rows], lambda bound, t, x: x,
        )  # fmt: skip


def decode(
    model: ScoreModel,
    latent: State,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    t_min: float | None = None,
    condition: Any = None,
    batch_size: int | None = None,
    differentiable: bool = False,
) -> Solution:
    """Carry latents at `t_max` to states at `t_min` along the probability-flow ODE: the inverse of `encode`.

    Args:
        latent: states at the first time, `(batch, *event)`.
        solver: a deterministic one; None as in `sample`.
        times: a grid, strictly decreasing, in place of steps and t_min.
        steps, t_min, condition, batch_size, differentiable: as in `sample`.

    Raises:
        CapabilityError: the solver is noisy.
    """
    solver = default_solver(model) if solver is None else solver
    check_arguments(model, solver)
    check_state(latent, "latent")
    if not solver.deterministic:
        raise CapabilityError(f"decode follows the probability-flow ODE, but {solver} adds noise: use sample.")
    return sample(
        model, tuple(latent.shape), solver=solver, steps=steps, times=times, x_init=latent, t_min=t_min, final="none",
        condition=condition, batch_size=batch_size, differentiable=differentiable,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """Data, its latent, and what came back.

    Attributes:
        latent: `encode(x).x`.
        x: `decode(latent).x`.
        error: root mean square of the difference from the data over the entries of each row, `(batch,)`.
        nfe: network evaluations for every row, there and back.
    """

    latent: State
    x: State
    error: PerRow
    nfe: int


def round_trip(
    model: ScoreModel,
    x: State,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    t_min: float | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> RoundTrip:
    """Encode data and decode it again: how far the solver is from the invertible map that it stands for.

    Arguments and errors are those of `encode`; both ways take the same grid.
    """
    there = encode(model, x, solver=solver, steps=steps, t_min=t_min, condition=condition, batch_size=batch_size)
    back = decode(model, there.x, solver=solver, times=there.times.flip(0), condition=condition, batch_size=batch_size)
    error = (sum_rows((back.x - x) ** 2) / max(x[:1].numel(), 1)).sqrt()
    return RoundTrip(there.x, back.x, error, there.nfe + back.nfe)


def _run(
    model: ScoreModel,
    solver: Solver,
    grid: Grid,
    noise: Noise,
    condition: Any,
    batch: int,
    batch_size: int | None,
    trajectory: bool | int,
    progress: bool,
    begin: Callable[[slice, NoiseStream], State],
    end: Callable[[ScoreModel, Tensor, State], State],
) -> Solution:
    """Solve chunk by chunk."""
    if trajectory < 0:
        raise OptionError(f"trajectory must be True, False or a number of steps between kept states; got {trajectory}.")
    every, last = int(trajectory), len(grid) - 1
    chunks = chunks_of(batch, batch_size)
    outputs, paths, tallies, nfe = [], [], [], 0
    bar = tqdm(total=len(chunks) * last, unit="step", leave=False) if progress else None
    with bar or nullcontext(), evaluating(model.network):
        for rows in chunks:
            bound, counter = bound_rows(model, condition, rows, batch)
            run = _Run(solver, solver.process(bound), grid, every, bar, counter)
            stream = noise.open(rows.start)
            start = begin(rows, stream)
            tally = Tally()

            def restart(rows: slice = rows) -> NoiseStream:
                again = noise.open(rows.start)
                begin(rows, again)
                return again

            try:
                x, path = _solve(run, start, stream, tally)
                before = counter.calls
                last_time = grid[-1] if tally.reached is None else tally.reached
                x = end(bound, last_time, x)
                if tally.nfe is not None and counter.calls > before:
                    tally.nfe = tally.nfe + evaluations(bound.network, per_row(last_time, x))
                nfe = max(nfe, counter.calls if tally.nfe is None else int(tally.nfe.max()))
                explain(solver, run.process, start, x, grid, restart)
            except DivergenceError as error:
                raise error.shifted(rows.start) from error
            outputs.append(x)
            tallies.append(tally)
            if path is not None:
                paths.append(path)
    tally = merged(tallies)
    return Solution(
        x=torch.cat(outputs) if len(outputs) > 1 else outputs[0],
        nfe=nfe,
        times=grid,
        trajectory=torch.cat(paths, dim=1) if every else None,
        kept=grid[sorted({*range(0, last + 1, every), last})] if every else None,
        accepted=tally.accepted,
        rejected=tally.rejected,
        row_nfe=tally.nfe,
        reached=tally.reached,
    )
