"""What every run of a solver on a model shares: arguments, grids, chunks of rows, counted calls, errors explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdediff.embedded import AdaptiveRungeKutta
from sdediff.errors import CapabilityError, OptionError
from sdediff.exponential import Exponential, Points, split_for
from sdediff.model import Kind, ScoreModel
from sdediff.model import evaluating as evaluating
from sdediff.noise import NoiseStream
from sdediff.runge_kutta import RungeKutta
from sdediff.sde import SDE, SLACK, check_grid
from sdediff.shapes import Grid, State, as_time, check_state, finite_or_raise
from sdediff.solvers import Solver
from sdediff.wrapped import Counter as Counter


def chunks_of(batch: int, batch_size: int | None) -> list[slice]:
    """The rows of a batch, at most `batch_size` at a time."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}.")
    size = batch_size or max(batch, 1)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def counted(model: ScoreModel) -> tuple[ScoreModel, Counter]:
    """The model with a network that counts its calls."""
    counter = Counter(model.network)
    return replace(model, network=counter), counter


def default_solver(model: object) -> Solver:
    """The solver that suits a model when none is named."""
    return Exponential() if not isinstance(model, ScoreModel) or model.is_linear else RungeKutta()


def check_arguments(model: object, solver: object) -> None:
    """Refuse anything but a ScoreModel and a Solver."""
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    if not isinstance(solver, Solver):
        raise OptionError(f"solver must be a Solver such as Exponential(), DDIM() or TorchDiffEq(); got {solver!r}.")


def check_density(model: ScoreModel) -> None:
    """Refuse a model that is the score of no density."""
    if model.no_density is not None:
        raise CapabilityError(f"This model has no log-density: {model.no_density}")


def grid_for(
    model: ScoreModel,
    solver: Solver,
    steps: int | None,
    times: Tensor | Sequence[float] | None,
    t_min: float | None,
    direction: int,
) -> Grid:
    """The grid that the caller gave, checked, or the solver's own; rising if direction > 0."""
    if times is None:
        falling = _grid(solver, model, solver.default_steps if steps is None else steps, t_min)
        return falling if direction < 0 else falling.flip(0)
    if steps is not None or t_min is not None:
        raise OptionError("Give either times=..., a whole grid, or steps=... and t_min=..., from which one is made.")
    grid = as_time(times).detach().cpu()
    check_grid(grid, direction=direction)
    model.sde.check_span(grid, "times")
    return grid


def density_grid(
    model: ScoreModel,
    steps: int | None,
    times: Tensor | Sequence[float] | None,
    t_min: float | None,
    direction: int,
) -> Grid:
    """The grid of `DensityRows`: the caller's, even steps in its own variable, or the two ends if steps is None."""
    if times is not None:
        return grid_for(model, AdaptiveRungeKutta(), steps, times, t_min, direction)
    ends = grid_for(model, AdaptiveRungeKutta(), 1, None, t_min, direction=1)
    if steps is None:
        return ends if direction > 0 else ends.flip(0)
    if steps < 1:
        raise OptionError(f"steps must be at least 1; got {steps}.")
    split = split_for(model, model.deviation)
    first, last = split.node(Points.at(model.linear, ends))
    inside = split.log_s(np.linspace(first, last, steps + 1)[1:-1])
    grid = torch.cat([ends[:1], model.linear.time(torch.from_numpy(-2 * inside)), ends[1:]])
    return grid if direction > 0 else grid.flip(0)


def _grid(solver: Solver, model: ScoreModel, steps: int, t_min: float | None) -> Grid:
    """The solver's own grid, moved to the nearest times that the network knows if it counts the steps of a chain."""
    grid = _any_grid(solver, model, steps, t_min)
    known = model.known_times
    if known is None:
        return grid
    return torch.unique(known[(grid[:, None] - known).abs().argmin(1)]).flip(0)


def _any_grid(solver: Solver, model: ScoreModel, steps: int, t_min: float | None) -> Grid:
    """The solver's own grid; kept for solvers and processes that cannot change."""
    if solver.fixed and model.sde.fixed and type(steps) is int:
        return _kept_grid(solver, Kind.of(model), steps, t_min).clone()
    return solver.grid(model, steps, t_min)


@lru_cache(maxsize=256)
def _kept_grid(solver: Solver, kind: Kind, steps: int, t_min: float | None) -> Grid:
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used where gradients are taken
        return solver.grid(kind.model(), steps, t_min)


def starts_at_prior(model: ScoreModel, t: Tensor) -> bool:
    """Whether t is the noise end of the SDE."""
    return abs(t.item() - model.sde.t_max) <= SLACK * model.sde.t_max


def bound_rows(model: ScoreModel, condition: Any, rows: slice, batch: int) -> tuple[ScoreModel, Counter]:
    """The model for some rows of a batch: counting its calls, with its condition cut to them."""
    bound, counter = counted(model)
    return (bound if condition is None else bound.given(condition)).rows(rows, batch), counter


def explain(
    solver: Solver, process: SDE, x: State, final: State, times: Grid, restart: Callable[[], NoiseStream]
) -> None:
    """Replay a solve that went wrong, step by step, to say where; costs one sum when nothing is wrong."""
    total = final.detach().sum(dtype=torch.promote_types(final.dtype, torch.float32))
    if bool(total.isfinite()) or bool(final.isfinite().all()):
        return
    finite_or_raise(x, "The initial state", step=None, time=times[0].item())
    for i, state in enumerate(solver.solve(process, x, times, restart())):
        finite_or_raise(state, "The state", step=i, time=times[i + 1].item())
    finite_or_raise(final, "The result", step=None, time=times[-1].item())


def like_state(
    model: ScoreModel,
    x_init: State | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """An empty state of the dtype and device to work in."""
    source: Tensor | None = x_init
    parameters = getattr(model.network, "parameters", None)
    if source is None and parameters is not None:
        source = next((p for p in parameters() if p.is_floating_point()), None)
    if source is None:
        own = getattr(model.network, "dtype", None)
        source = torch.empty(0, dtype=own if isinstance(own, torch.dtype) else torch.get_default_dtype())
    like = torch.empty(1, *shape[1:], dtype=dtype or source.dtype, device=device or source.device)
    check_state(like, "the sample")
    return like
