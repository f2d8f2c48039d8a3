r"""What must be true of a solver, as functions of the solver.

Each check runs `sample` on data whose answer is known, and raises `CheckFailure` with what was wrong, where, and by how
much. Everything is done through the public interface, so a user's own solver is treated as the library's.

Deterministic solvers are compared with the exact flow of a Gaussian. Noisy ones need no Monte Carlo either: on Gaussian
data with its exact score a solver is affine in its start and its draws, entry by entry, so that one solve over a batch
of `2 + draws` rows reads the map off. Row 0 starts at 0 without noise, row 1 at 1, and row 2 + k has the k-th draw
equal to 1. Mean and variance of the result follow, and must tend to those of the marginal at the claimed weak order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import CheckFailure, OptionError
from sdediff.exact import Gaussian
from sdediff.grids import uniform
from sdediff.model import ScoreModel
from sdediff.noise import Recorded, Recorder, RowNoise
from sdediff.processes import VP
from sdediff.sampling import sample
from sdediff.shapes import Grid, State
from sdediff.solvers import Solver

SolverCheck = Callable[[Solver], None]

_SDE = VP()
_END = 0.1
"""Where the solves for the order stop: drifts in t are smooth down to here."""
_STEPS = (16, 21, 28, 37, 50, 67, 90, 121)
_SLACK = 0.4
_ROUNDING = 1e-11
_NEAR = 0.05
_ENTRIES, _MANY = 4, 16
_MOST_DRAWS = 2000


def _target(*event: int) -> Gaussian:
    """A diagonal Gaussian in which no entry is like another."""
    size = math.prod(event)
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64)
    return Gaussian((0.2 + ramp).reshape(event), 0.6 * (1.5 * ramp).exp())


def _solve(solver: Solver, model: ScoreModel, x: State, times: Grid, **options: Any) -> State:
    """The state at the last time, from x at the first."""
    return sample(model, tuple(x.shape), solver=solver, times=times, x_init=x, final="none", **options).x


def _start(target: Gaussian, rows: int, seed: int = 0) -> State:
    return target.marginal(_SDE, _SDE.t_max).sample(rows, seed=seed)


def _same(what: str, got: State, expected: State, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise CheckFailure(f"{what}: shape {tuple(got.shape)} against {tuple(expected.shape)}.")
    off = ((got - expected).abs() / (1 + expected.abs())).max().item()
    if not off <= tolerance:
        raise CheckFailure(f"{what}: off by {off:.2g} ({tolerance:.1g} allowed).")


def grid_ends_are_exact(solver: Solver) -> None:
    """The solver's own grid has the steps that were asked for, falls, and ends exactly where it should."""
    model = _target(2).model(_SDE)
    for steps in (1, 2, 7, 30):
        for t_min, end in ((None, _SDE.t_min), (_END, _END)):
            times = solver.grid(model, steps, t_min)
            what = f"grid(model, {steps}, t_min={t_min})"
            if times.shape != (steps + 1,):
                raise CheckFailure(f"{what} has shape {tuple(times.shape)} in place of ({steps + 1},).")
            if not bool((times.diff() < 0).all()):
                raise CheckFailure(f"{what} does not fall: {times.tolist()}.")
            if times[0] != _SDE.t_max or times[-1] != end:
                raise CheckFailure(
                    f"{what} runs from {times[0]:.10g} to {times[-1]:.10g} in place of {_SDE.t_max:g} to {end:g}."
                )


def stays_within_the_grid(solver: Solver) -> None:
    """One state for each step, and no question to the network at a time below the end of the grid."""
    target = _target(2)
    model = target.model(_SDE)
    asked: list[float] = []

    class Spy:
        dtype = torch.float64

        def __call__(self, x: State, t: Tensor) -> State:
            asked.extend((t.min().item(), t.max().item()))
            return model.network(x, t)

    spied = ScoreModel(Spy(), _SDE, model.prediction, time=model.time)
    times = torch.tensor([1.0, 0.83, 0.7, 0.52, 0.3, 0.16], dtype=torch.float64)
    x = _start(target, 3)
    states = sample(
        spied, tuple(x.shape), solver=solver, times=times, x_init=x, final="none", seed=0, trajectory=True
    ).trajectory
    assert states is not None
    if len(states) != len(times):
        raise CheckFailure(f"A grid of {len(times) - 1} steps gave {len(states) - 1} states.")
    if not asked:
        raise CheckFailure("The network was never called.")
    if min(asked) < times[-1].item() - 1e-9 or max(asked) > _SDE.t_max + 1e-9:
        raise CheckFailure(
            f"The network was asked at times from {min(asked):.10g} to {max(asked):.10g}, but the solve runs from "
            f"{times[0]:g} to {times[-1]:g}."
        )


def deterministic_is_true(solver: Solver) -> None:
    """`deterministic` says whether the result depends on the seed."""
    target = _target(2)
    model, x, times = target.model(_SDE), _start(target, 3), uniform(_SDE, 9, t_min=_END)
    one, other = (_solve(solver, model, x, times, seed=seed) for seed in (1, 2))
    if solver.deterministic == (not torch.equal(one, other)):
        raise CheckFailure(
            f"It says deterministic = {solver.deterministic}, but another seed gives "
            f"{'other' if solver.deterministic else 'the same'} states."
        )


def _draws(solver: Solver, model: ScoreModel, x: State, times: Grid) -> int:
    recorder = Recorder(RowNoise(0))
    _solve(solver, model, x, times, noise=recorder)
    try:
        return len(recorder.numbers)
    except OptionError:  # nothing was drawn
        return 0


def same_seed_repeats(solver: Solver) -> None:
    """The same seed gives the same states, also after and during other solves: nothing is kept in the solver."""
    target = _target(2)
    model, times = target.model(_SDE), uniform(_SDE, 9, t_min=_END)
    x, other = _start(target, 3), _start(target, 5, seed=1)
    first = _solve(solver, model, x, times, seed=1)
    _solve(solver, model, other, uniform(_SDE, 5, t_min=0.3), seed=2)
    _same("A second solve with the same seed differs from the first", _solve(solver, model, x, times, seed=1), first, 0)
    process = solver.process(model)
    with torch.no_grad():
        one = solver.solve(process, x, times, RowNoise(1).open())
        two = solver.solve(process, other, times, RowNoise(2).open())
        *_, (last, _) = zip(one, two, strict=True)
    _same("Two solves that take turns disturb each other", last, first, 0)


def rows_do_not_know_their_batch(solver: Solver) -> None:
    """A row gets in any batch what it gets alone."""
    target = _target(3)
    model, x, times = target.model(_SDE), _start(target, 5), uniform(_SDE, 13, t_min=_END)
    together = _solve(solver, model, x, times, seed=3)
    for size in (1, 2):
        _same(
            f"A row of 5 differs from the same row in batches of {size}",
            _solve(solver, model, x, times, seed=3, batch_size=size), together, 1e-12,
        )  # fmt: skip


def events_have_any_shape(solver: Solver) -> None:
    """States `(batch,)`, `(batch, 12)` and `(batch, 2, 3, 2)` of the same numbers get the same."""
    times = uniform(_SDE, 9, t_min=_END)
    flat, wide, single = _target(12), _target(2, 3, 2), Gaussian(torch.tensor(0.3, dtype=torch.float64), 0.5)
    x = _start(flat, 3)
    numbers = torch.randn(
        max(1, _draws(solver, flat.model(_SDE), x, times)), 3, 12, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    one = _solve(solver, flat.model(_SDE), x, times, noise=Recorded(numbers))
    shape = (3, 2, 3, 2)
    other = _solve(solver, wide.model(_SDE), x.reshape(shape), times, noise=Recorded(numbers.reshape(-1, *shape)))
    if other.shape != shape:
        raise CheckFailure(f"States of shape {shape} became {tuple(other.shape)}.")
    _same("States of shape (3, 2, 3, 2) differ from those of shape (3, 12)", other.reshape(3, 12), one, 1e-10)
    scalar = _solve(solver, single.model(_SDE), x[:, 0], times, seed=0)
    if scalar.shape != (3,):
        raise CheckFailure(f"States of shape (3,), which have no event axis, became {tuple(scalar.shape)}.")


def dtype_is_kept(solver: Solver) -> None:
    """float32 states stay float32, and are near those of float64 from the same draws."""
    target = _target(3)
    model, x, times = target.model(_SDE), _start(target, 4), uniform(_SDE, 13, t_min=_END)
    numbers = torch.randn(
        max(1, _draws(solver, model, x, times)), *x.shape, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    wide, narrow = (_solve(solver, model, x.to(dtype), times, noise=Recorded(numbers)) for dtype in _DTYPES)
    for state, dtype in ((wide, torch.float64), (narrow, torch.float32)):
        if state.dtype != dtype:
            raise CheckFailure(f"States of {dtype} became {state.dtype}.")
    _same("float32 states differ from float64 states", narrow.double(), wide, 2e-2)


_DTYPES = (torch.float64, torch.float32)


def error_falls_at_its_order(solver: Solver, order: float | None = None) -> None:
    """The error against the exact flow, or of the exact moments if noisy, falls at the claimed order.

    It is measured from t = 1 to 0.1 on grids even in t and on the solver's own, with even and odd numbers of steps.

    Args:
        solver: the solver.
        order: the order claimed; None for `solver.order` (1 where that is None). With 0, and for solvers that choose
            their steps themselves, the error need only be within 5 per cent of the deviation (plus sampling error).
    """
    claimed = (solver.order or 1) if order is None else order
    target = _target(_ENTRIES)
    model = target.model(_SDE)
    x = _start(target, 2)
    trial = sample(model, tuple(x.shape), solver=solver, times=uniform(_SDE, 8, t_min=_END), x_init=x, seed=0)
    even: Callable[[int], Grid] = lambda n: uniform(_SDE, n, t_min=_END)  # noqa: E731  # values
    own: Callable[[int], Grid] = lambda n: solver.grid(model, n, _END)  # noqa: E731  # values
    for name, grid in (("even in t", even), ("of its own", own)):
        if claimed == 0 or trial.accepted is not None:
            _is_near(solver, grid(_STEPS[-1]), name)
        else:
            measure = _flow_error if solver.deterministic else _moment_error
            _falls([measure(solver, target, grid(n)) for n in _STEPS], claimed, name)


def _falls(errors: list[float], claimed: float, grid: str) -> None:
    """Fit log error to log steps over the finest grids, as far as errors are above rounding."""
    kept = [pair for pair in zip(_STEPS, errors, strict=True) if not pair[1] <= _ROUNDING][-5:]
    if len(kept) < 3:
        return
    listed = ", ".join(f"{error:.2g} ({n})" for n, error in kept)
    x, y = torch.tensor(kept, dtype=torch.float64).log().T
    slope = -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    if not slope >= claimed - _SLACK:
        raise CheckFailure(
            f"The error on grids {grid} falls at order {slope:.2f}, but order {claimed:g} is claimed; errors (steps): "
            f"{listed}."
        )


def _scale(target: Gaussian, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the marginal at t, entry by entry."""
    marginal = target.marginal(_SDE, t)
    return marginal.mean, marginal.cov.diagonal().sqrt()


def _flow_error(solver: Solver, target: Gaussian, times: Grid) -> float:
    """Root mean square distance to the exact flow, in deviations."""
    x = _start(target, 16)
    exact = target.flow(_SDE, x, times[0], times[-1])
    off = (_solve(solver, target.model(_SDE), x, times, seed=0) - exact) / _scale(target, times[-1])[1]
    return off.square().mean().sqrt().item()


def _moment_error(solver: Solver, target: Gaussian, times: Grid) -> float:
    """Distance of mean and deviation of the result from those of the marginal, in deviations."""
    model = target.model(_SDE)
    size = target.mean.shape[0]
    draws = _draws(solver, model, torch.zeros(1, size, dtype=torch.float64), times)
    if draws > _MOST_DRAWS:
        raise CheckFailure(
            f"It draws {draws} times in {len(times) - 1} steps, too many to read its moments off ({_MOST_DRAWS} at "
            "most): with order=0 only the moments of samples are looked at."
        )
    numbers = torch.zeros(draws, draws + 3, size, dtype=torch.float64)
    numbers[torch.arange(draws), 2 + torch.arange(draws)] = 1
    x = torch.zeros(draws + 3, size, dtype=torch.float64)
    x[1] = 1
    generator = torch.Generator().manual_seed(0)
    x[-1] = torch.randn(size, dtype=torch.float64, generator=generator)
    numbers[:, -1] = torch.randn(draws, size, dtype=torch.float64, generator=generator)

    end = _solve(solver, model, x, times, noise=Recorded(numbers))
    slope, effects = end[1] - end[0], end[2:-1] - end[0]
    _same(
        "On Gaussian data its result is not affine in start and noise, entry by entry, so that no order can be read "
        "off (with order=0 only the moments of samples are looked at)",
        end[-1], end[0] + slope * x[-1] + (effects * numbers[:, -1]).sum(0), 1e-8,
    )  # fmt: skip
    (mean_start, std_start), (mean, std) = _scale(target, times[0]), _scale(target, times[-1])
    off_mean = (end[0] + slope * mean_start - mean) / std
    off_std = ((slope * std_start).square() + effects.square().sum(0)).sqrt() / std - 1
    return torch.cat([off_mean, off_std]).square().mean().sqrt().item()


def _is_near(solver: Solver, times: Grid, grid: str) -> None:
    """The error is small, whatever its order."""
    steps, target = len(times) - 1, _target(_MANY)
    if solver.deterministic:
        error = _flow_error(solver, target, times)
        if not error <= _NEAR:
            raise CheckFailure(
                f"After {steps} steps on a grid {grid} the distance to the exact flow is {error:.2g} deviations "
                f"({_NEAR:g} allowed)."
            )
        return
    rows = 2000
    x = _solve(solver, target.model(_SDE), _start(target, rows), times, seed=1)
    mean, std = _scale(target, times[-1])
    for name, off, error in (
        ("mean", (x.mean(0) - mean) / std, rows**-0.5),
        ("deviation", x.std(0) / std - 1, (2 * rows) ** -0.5),
    ):
        worst = off.abs().max().item()
        if not worst <= _NEAR + 5 * error:
            raise CheckFailure(
                f"After {steps} steps on a grid {grid} the {name} of {rows} samples is off by {worst:.2g} deviations "
                f"({_NEAR:g} and 5 standard errors of {error:.2g} allowed)."
            )


SOLVER_CHECKS: tuple[SolverCheck, ...] = (
    grid_ends_are_exact,
    stays_within_the_grid,
    deterministic_is_true,
    same_seed_repeats,
    rows_do_not_know_their_batch,
    events_have_any_shape,
    dtype_is_kept,
    error_falls_at_its_order,
)
"""Every check of a solver."""


def check_solver(solver: Solver, order: float | None = None, checks: tuple[SolverCheck, ...] = SOLVER_CHECKS) -> None:
    """Run the checks on a solver; returns if all hold.

    Args:
        solver: the solver.
        order: the order it claims: of the error on the flow if it is deterministic, of moments if it is noisy. None
            for `solver.order`. 0 for a method with a bias that smaller steps do not remove, such as Langevin moves.
        checks: which of them.

    Raises:
        CheckFailure: the first that does not hold, and by how much.
    """
    for check in checks:
        try:
            if check is error_falls_at_its_order:
                error_falls_at_its_order(solver, order)
            else:
                check(solver)
        except CheckFailure as failure:
            raise CheckFailure(f"{solver} fails {check.__name__}: {failure}") from failure
