r"""A grid and a scale fitted to one model: `calibrate` once, sample many times.

What the default solver assumes is that data has deviation 1, and that its detail is spread evenly over
log(sigma / alpha). A pilot run of a few rows knows better. `calibrate` solves the probability-flow ODE for them finely
once, takes the deviation of the data off the result, and then, for each number of steps asked for, looks for the grid
(and the order) with which `Exponential` comes closest to the fine solution from the same starts.

A grid is described by its density of steps in `l = log(sigma / alpha)`: that of the usual grid times
`exp(spline(l))`, with the spline through seven numbers at even places. They are found by random search: a normal
perturbation of a random half of them, kept if it helps, its size growing on success and shrinking on failure. What is
lowered is the mean of the logarithms of the root mean square and the median error of the rows: the first is ruled by
rows near a watershed between modes, the second is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from tqdm import tqdm

from sdediff.errors import DivergenceError, OptionError
from sdediff.exponential import Array, Exponential, grid_for
from sdediff.sampling import sample
from sdediff.shapes import Grid, State

if TYPE_CHECKING:
    from sdediff.model import ScoreModel

_KNOTS = 7
_PILOT_STEPS = 200
_FAR = 20.0


@dataclass(frozen=True)
class Fit:
    """What was found for one number of steps.

    Attributes:
        order: of the solver.
        shape: logarithms of the change of density at even places between the ends of `span`.
        error: root mean square error of the pilot's rows, with this grid.
        error_before: the same with the default grid and order.
    """

    order: int
    shape: tuple[float, ...]
    error: float
    error_before: float


class Fits(dict[int, Fit]):
    """The fits by their numbers of steps; a mapping that cannot change."""

    _fixed = True
    __dataclass_fields__: ClassVar[dict[str, Any]] = {}

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("The fits of a Calibration cannot change: calibrate again, or make a new Calibration.")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]  # it cannot change
        return hash(tuple(sorted(self.items(), key=lambda item: item[0])))

    def __reduce__(self) -> tuple[Any, ...]:
        return Fits, (dict(self),)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found; pass it on as `Exponential(calibration=...)`.

    A number of steps that was not asked for takes the shape found for the nearest one (in ratio).

    Attributes:
        sigma_data: the deviation of the data.
        span: `log(sigma / alpha)` at both ends of the pilot's grid.
        fits: a `Fit` for each number of steps.
        nfe: network calls that calibration took, each for all rows of the pilot.
    """

    sigma_data: float
    span: tuple[float, float]
    fits: Fits
    nfe: int

    _fixed: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"Calibration(steps={sorted(self.fits)}, sigma_data={self.sigma_data:.3g})"

    def grid(self, model: ScoreModel, steps: int, t_min: float | None = None) -> Grid:
        """The tuned grid, falling."""
        return _shaped(model, steps, t_min, self.sigma_data, self.span, self._nearest(steps).shape)

    def order(self, steps: int) -> int:
        """The order to use with it."""
        return self._nearest(steps).order

    def _nearest(self, steps: int) -> Fit:
        return self.fits[min(self.fits, key=lambda known: abs(math.log(known / steps)))]


def _shaped(
    model: ScoreModel,
    n: int,
    t_min: float | None,
    sigma_data: float,
    span: tuple[float, float],
    shape: tuple[float, ...],
) -> Grid:
    """The usual grid with its density of steps multiplied by `exp(spline)`."""
    fine = grid_for(model, 40 * max(n, 25), sigma_data, t_min)
    log_s = (-model.linear.log_snr(fine) / 2).clamp(min(span), max(span)).numpy()
    spline = PchipInterpolator(np.linspace(min(span), max(span), _KNOTS), shape)
    density = np.exp(spline(log_s))
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    clock = fine.numpy()
    times = torch.from_numpy(np.interp(np.linspace(0, mass[-1], n + 1), mass, clock))
    times[0], times[-1] = fine[0], fine[-1]
    return times


def calibrate(
    model: ScoreModel,
    shape: Sequence[int],
    steps: int | Sequence[int],
    *,
    seed: int = 0,
    trials: int = 100,
    x_init: State | None = None,
    t_min: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Calibration:
    """Fit a grid, an order and the deviation of the data to a model by a pilot run.

    Costs 200 network calls, and `(trials + 3) n` at most for each number of steps n, all on the rows of the pilot.

    Args:
        model: a model of a linear SDE.
        shape: `(rows, *event)` of the pilot; 128 rows will do.
        steps: numbers of steps to fit.
        seed: of the pilot's starts and of the search.
        trials: grids to try for each number of steps.
        x_init: starts of the pilot at `t_max`, in place of draws from the prior.
        t_min: where sampling will stop; None for the SDE's own.
        batch_size: rows solved at a time; all if None.
        progress: whether to show a bar.

    Raises:
        OptionError: steps or trials that are not positive whole numbers.
        DivergenceError: the pilot is not finite.
    """
    wanted = [steps] if isinstance(steps, int | np.integer) else list(steps)
    if not wanted or any(not isinstance(n, int | np.integer) or n < 1 for n in wanted) or trials < 0:
        raise OptionError(f"calibrate needs steps >= 1 and trials >= 0; got steps = {steps!r}, trials = {trials}.")
    sde, calls = model.linear, 0

    def solve(solver: Exponential, times: Grid) -> State:
        nonlocal calls
        calls += len(times) - 1
        return sample(
            model, shape, solver=solver, times=times, x_init=x_init, seed=seed, final="none", batch_size=batch_size
        ).x

    fine = Exponential(order=4)
    truth = solve(fine, fine.grid(model, _PILOT_STEPS, t_min))
    sigma_data = (truth - truth.mean(0)).double().square().mean().sqrt().item()
    ends = fine.grid(model, 2 * _KNOTS, t_min)[[1, -1]]
    high, low = (-sde.log_snr(ends) / 2).clamp(-_FAR, _FAR).tolist()
    if not sigma_data > 0:
        raise OptionError(
            f"calibrate reads the deviation of data off the rows of the pilot, and these {shape[0]} end at one point: "
            "give at least 2 rows, of data that varies."
        )
    plain = Exponential(sigma_data=sigma_data)

    def errors(order: int, times: Grid) -> tuple[float, float]:
        """Root mean square and median error of the rows."""
        try:
            off = (solve(replace(plain, order=order), times) - truth).double()
        except DivergenceError:
            return math.inf, math.inf
        rows = off.reshape(len(off), -1).square().mean(1)
        return rows.mean().sqrt().item(), rows.sqrt().median().item()

    fits = {}
    with tqdm(total=len(wanted) * trials, unit="grid", disable=not progress, leave=False) as bar:
        for n in map(int, wanted):

            def at(order: int, shape: Array, n: int = n) -> tuple[float, float]:
                return errors(order, _shaped(model, n, t_min, sigma_data, (low, high), tuple(shape)))

            usual = plain.order_for(n)
            before = errors(usual, Exponential().grid(model, n, t_min))[0]
            order, found, error = _search(at, usual, trials, np.random.default_rng([seed, n]), bar)
            fits[n] = Fit(order, tuple(found.tolist()), error, before)
    return Calibration(sigma_data, (low, high), Fits(fits), calls)


def _search(
    errors: Callable[[int, Array], tuple[float, float]],
    usual: int,
    trials: int,
    rng: np.random.Generator,
    bar: tqdm[Any],
) -> tuple[int, Array, float]:
    """The order and the shape with the least error, and that error."""

    def cost(pair: tuple[float, float]) -> float:
        return sum(math.log(max(error, 1e-300)) for error in pair)

    orders = [order for order in (usual, usual - 1, usual + 1) if 1 <= order <= 5]
    flat = np.zeros(_KNOTS)
    tried = {order: errors(order, flat) for order in orders}
    order = min(tried, key=lambda order: cost(tried[order]))
    shape, best, size = flat, tried[order], 0.5
    for _ in range(trials):
        candidate = shape + size * rng.normal(size=_KNOTS) * (rng.random(_KNOTS) < 0.5)
        other = int(rng.choice(orders)) if rng.random() < 0.2 else order
        found = errors(other, candidate)
        if cost(found) < cost(best):
            order, shape, best, size = other, candidate, found, min(1.5 * size, 0.8)
        else:
            size = max(0.93 * size, 0.05)
        bar.update()
    return order, shape, best[0]
