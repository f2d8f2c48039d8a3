r"""The front door: `sample` runs a model from noise to data, `encode` from data to noise.

`sample` draws `x_T` from the SDE's prior (or takes `x_init`), hands the process of the solver and a grid to the one
loop, and ends, unless told otherwise, with one evaluation of the denoised mean at `t_min` (Tweedie), which is counted.
Nobody types a direction of time: times fall in `sample` and rise in `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdediff.adapters import TorchDiffEq
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.grids import natural
from sdediff.model import ScoreModel
from sdediff.noise import Noise, NoiseStream, RowNoise
from sdediff.reverse import Reverse
from sdediff.sde import SDE, SLACK, check_grid, fresh_seed
from sdediff.shapes import Grid, State, Trajectory, as_time, check_state, finite_or_raise
from sdediff.solvers import Solver, Tally
from sdediff.tables import DDIM

__all__ = ["Solution", "encode", "sample"]


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back, and what it cost.

    Attributes:
        x: final states `(batch, *event)`.
        nfe: network evaluations for every row, the final denoising included.
        times: the grid, `(steps + 1,)`.
        trajectory: states at `times`, `(steps + 1, batch, *event)`, if asked for (before the final denoising).
        accepted, rejected: numbers of steps of an adaptive solver, summed over chunks; None for others.
    """

    x: State
    nfe: int
    times: Grid
    trajectory: Trajectory | None = None
    accepted: int | None = None
    rejected: int | None = None


def chunks_of(batch: int, batch_size: int | None) -> list[slice]:
    """The rows of a batch, at most `batch_size` at a time."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}.")
    size = batch_size or max(batch, 1)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


class _Counter:
    """A network that counts its calls."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.calls = 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.network(*args)


@dataclass(frozen=True)
class _Run:
    """Everything about a solve but the rows."""

    solver: Solver
    process: Reverse
    times: Grid
    keep: bool
    bar: tqdm[Any] | None
    counter: _Counter


def counted(model: ScoreModel) -> tuple[ScoreModel, _Counter]:
    """The model with a network that counts its calls."""
    counter = _Counter(model.network)
    return replace(model, network=counter), counter


def check_arguments(model: object, solver: object) -> None:
    """Refuse anything but a ScoreModel and a Solver."""
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    if not isinstance(solver, Solver):
        raise OptionError(f"solver must be a Solver such as DDIM() or TorchDiffEq(); got {solver!r}.")


def grid_for(
    model: ScoreModel,
    solver: Solver,
    steps: int | None,
    times: Tensor | Sequence[float] | None,
    t_min: float | None,
    direction: int,
) -> Grid:
    """The grid that the caller gave, checked, or the process's natural one; rising if direction > 0."""
    if times is None:
        falling = natural(model.sde, solver.default_steps if steps is None else steps, t_min=t_min)
        return falling if direction < 0 else falling.flip(0)
    if steps is not None or t_min is not None:
        raise OptionError("Give either times=..., a whole grid, or steps=... and t_min=..., from which one is made.")
    grid = as_time(times)
    check_grid(grid, direction=direction)
    model.sde.check_span(grid, "times")
    return grid


def starts_at_prior(model: ScoreModel, t: Tensor) -> bool:
    """Whether t is the noise end of the SDE."""
    return abs(t.item() - model.sde.t_max) <= SLACK * model.sde.t_max


@contextmanager
def evaluating(network: Callable[..., Tensor]) -> Iterator[None]:
    """Evaluation mode for a network that is an `nn.Module`, and its own modes again afterwards."""
    if not isinstance(network, torch.nn.Module):
        yield
        return
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def rows_of(condition: Any, rows: slice, batch: int) -> Any:
    """The rows of tensors with one entry per row, also inside dicts, lists and tuples; all else passes untouched."""
    if isinstance(condition, Tensor) and condition.ndim and condition.shape[0] == batch:
        return condition[rows]
    if isinstance(condition, dict):
        return {name: rows_of(value, rows, batch) for name, value in condition.items()}
    if type(condition) in (list, tuple):
        return type(condition)(rows_of(value, rows, batch) for value in condition)
    return condition


def bound_rows(model: ScoreModel, condition: Any, rows: slice, batch: int) -> tuple[ScoreModel, _Counter]:
    """The model for some rows of a batch: counting its calls, with its condition cut to them."""
    bound, counter = counted(model)
    condition = model.condition if condition is None else condition
    return (bound if condition is None else bound.given(rows_of(condition, rows, batch))), counter


def _solve(run: _Run, x: State, stream: NoiseStream, tally: Tally) -> tuple[State, Trajectory | None]:
    path = [x]
    for state in run.solver.solve(run.process, x, run.times, stream, tally):
        x = state
        if run.keep:
            path.append(x)
        if run.bar is not None:
            run.bar.set_postfix(nfe=run.counter.calls, refresh=False)
            run.bar.update()
    return x, torch.stack(path) if run.keep else None


def explain(
    solver: Solver, process: SDE, x: State, final: State, times: Grid, restart: Callable[[], NoiseStream]
) -> None:
    """Replay a solve that went wrong, step by step, to say where; costs nothing when nothing is wrong."""
    if bool(final.isfinite().all()):
        return
    finite_or_raise(x, "The initial state", step=None, time=times[0].item())
    for i, state in enumerate(solver.solve(process, x, times, restart())):
        finite_or_raise(state, "The state", step=i, time=times[i + 1].item())
    finite_or_raise(final, "The result", step=None, time=times[-1].item())


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
    trajectory: bool = False,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Solution:
    """Draw samples by solving the reverse process from `t_max` to `t_min`, with the network in evaluation mode.

    Args:
        model: the score and the SDE.
        shape: `(batch, *event)`.
        solver: DDIM() if None.
        steps: number of steps of the SDE's natural grid (even in log-SNR for a linear SDE).
        times: a grid instead, strictly decreasing within the span of the SDE.
        x_init: states at the first time, in place of draws from the prior.
        t_min: where to stop, in place of the SDE's own `t_min`.
        final: "denoise" to end with the denoised mean at the last time (one more evaluation), "none" for the state.
        seed: row i depends on it and on i only, whatever the batch or chunk size; None draws one from torch's global
            generator.
        noise: a source of noise in place of `RowNoise(seed)`, such as a `BrownianPath`.
        condition: passed to the network; tensors with one entry per row are cut with the rows.
        batch_size: rows solved at a time; all if None.
        trajectory: whether to keep the states at all times.
        progress: whether to show a bar.
        dtype, device: of the states; if None, those of x_init, or of the network's parameters, or its own `dtype`.

    Raises:
        OptionError, ShapeError, TimeError, CapabilityError: an argument does not fit; the message says how.
        DivergenceError: a state became NaN or infinite; names step, time and rows.
    """
    solver = DDIM() if solver is None else solver
    check_arguments(model, solver)
    if final not in ("denoise", "none"):
        raise OptionError(f"Unknown final {final!r}: write 'denoise' or 'none'.")
    if not isinstance(shape, Sequence) or not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ShapeError(f"shape must be (batch, *event) with positive whole numbers; got {shape}.")
    shape = tuple(shape)
    grid = grid_for(model, solver, steps, times, t_min, direction=-1)
    if x_init is None and not starts_at_prior(model, grid[0]):
        raise TimeError(
            f"times starts at {grid[0]:g}, but the prior is that of t_max = {model.sde.t_max:g}: start there, or pass "
            "x_init, states at the first time."
        )
    if x_init is not None:
        check_state(x_init, "x_init")
        if tuple(x_init.shape) != shape:
            raise ShapeError(f"x_init has shape {tuple(x_init.shape)}, but shape = {shape} was asked for.")
    like = like_state(model, x_init, shape, dtype, device)
    prior = None if x_init is not None else model.sde.prior(shape[1:], dtype=like.dtype)
    if final == "denoise" and prior is None:
        _ = model.linear  # a model without a denoised mean is refused before anything is computed
    if seed is not None and noise is not None:
        raise OptionError("Give either seed=... or noise=..., not both.")
    noise = RowNoise(fresh_seed() if seed is None else seed) if noise is None else noise

    def begin(rows: slice, stream: NoiseStream) -> State:
        if prior is None:
            assert x_init is not None
            return x_init[rows].to(like)
        loc, std = prior.mean.to(like), prior.stddev.to(like)
        return loc + std * stream.normal(like[:1].expand(rows.stop - rows.start, *shape[1:]))

    def end(bound: ScoreModel, x: State) -> State:
        return bound.denoised(grid[-1], x) if final == "denoise" else x

    return _run(model, solver, grid, noise, condition, shape[0], batch_size, trajectory, progress, begin, end)


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
    trajectory: bool = False,
    progress: bool = False,
) -> Solution:
    """Carry data at `t_min` to its latent at `t_max` along the probability-flow ODE.

    The inverse of `sample(..., x_init=latent, final="none")` with the same solver, to the solver's accuracy.

    Args:
        x: data `(batch, *event)`.
        solver: a deterministic one; TorchDiffEq() if None.
        times: a grid, strictly increasing, in place of steps and t_min.
        steps, t_min, condition, batch_size, trajectory, progress: as in `sample`.

    Raises:
        CapabilityError: the solver is noisy, so that there is no path to follow back.
    """
    solver = TorchDiffEq() if solver is None else solver
    check_arguments(model, solver)
    check_state(x)
    if x.shape[0] == 0:
        raise ShapeError("encode needs at least one row; got x with 0 rows.")
    if not solver.deterministic:
        raise CapabilityError(
            f"encode follows the probability-flow ODE, but {solver} adds noise: use a deterministic solver such as "
            "TorchDiffEq(), Heun() or DDIM()."
        )
    grid = grid_for(model, solver, steps, times, t_min, direction=1)
    return _run(
        model, solver, grid, RowNoise(0), condition, x.shape[0], batch_size, trajectory, progress,
        lambda rows, stream: x[rows], lambda bound, x: x,
    )  # fmt: skip


def like_state(
    model: ScoreModel,
    x_init: State | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """An empty state of the dtype and device to work in."""
    source: Tensor | None = x_init
    if source is None and isinstance(model.network, torch.nn.Module):
        source = next((p for p in model.network.parameters() if p.is_floating_point()), None)
    if source is None:
        own = getattr(model.network, "dtype", None)
        source = torch.empty(0, dtype=own if isinstance(own, torch.dtype) else torch.get_default_dtype())
    like = torch.empty(1, *shape[1:], dtype=dtype or source.dtype, device=device or source.device)
    check_state(like, "the sample")
    return like


@torch.no_grad()
def _run(
    model: ScoreModel,
    solver: Solver,
    grid: Grid,
    noise: Noise,
    condition: Any,
    batch: int,
    batch_size: int | None,
    keep: bool,
    progress: bool,
    begin: Callable[[slice, NoiseStream], State],
    end: Callable[[ScoreModel, State], State],
) -> Solution:
    """Solve chunk by chunk."""
    chunks = chunks_of(batch, batch_size)
    outputs, paths, nfe = [], [], 0
    tally = Tally()
    bar = tqdm(total=len(chunks) * (len(grid) - 1), unit="step", disable=not progress, leave=False)
    with bar, evaluating(model.network):
        for rows in chunks:
            bound, counter = bound_rows(model, condition, rows, batch)
            run = _Run(solver, solver.process(bound), grid, keep, bar if progress else None, counter)
            stream = noise.open(rows.start)
            start = begin(rows, stream)

            def restart(rows: slice = rows) -> NoiseStream:
                again = noise.open(rows.start)
                begin(rows, again)
                return again

            try:
                x, path = _solve(run, start, stream, tally)
                x = end(bound, x)
                nfe = max(nfe, counter.calls)
                explain(solver, run.process, start, x, grid, restart)
            except DivergenceError as error:
                raise error.shifted(rows.start) from error
            outputs.append(x)
            if path is not None:
                paths.append(path)
    return Solution(
        x=torch.cat(outputs),
        nfe=nfe,
        times=grid,
        trajectory=torch.cat(paths, dim=1) if keep else None,
        accepted=tally.accepted,
        rejected=tally.rejected,
    )
