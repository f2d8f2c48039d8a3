r"""Step sizes chosen row by row.

`Adaptive` solves the probability-flow ODE of a model by the predictor-corrector pairs of `sdediff.exponential` with a
time, a step, an order and a history of its own for every row. The corrector minus the predictor, which costs nothing,
is the estimate of the error of a step; a step whose error is above 1 in the norm

    |e| = sqrt(mean_j (e_j / (atol + rtol |x_j|))^2)

is taken again, shorter. Errors and states are measured in units of data, `c x / sqrt(c^2 alpha^2 + sigma^2)`: in this
frame a perturbation keeps its size on Gaussian data, so that a tolerance is about what it does to the sample. Steps are
taken in the variable u of the splitting, which is finite at both ends of time. The next step is

    h_next = 0.9 h err^(-0.7 / (k + 1)) err_before^(0.4 / (k + 1))

(a PI controller, Gustafsson 1991); the order k rises by one after an accepted step unless order k - 1 would have
allowed a longer one. A row that has arrived leaves the batch, and nothing about a row depends on the others.

Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, chapters II.4 and III.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdediff.embedded import norm
from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.exponential import Array, Points, Steps, deviation_of, interpolated, split_for
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, Tally, model_of, refuse_noise

Rows: TypeAlias = NDArray[np.integer[Any]]
Mask: TypeAlias = NDArray[np.bool_]

_FIRST = 0.25
_SHORTEST = 1e-9
_QUADRATURE = 12


@dataclass(frozen=True)
class Adaptive(Solver):
    """The probability-flow ODE to a tolerance, every row with steps of its own.

    Args:
        rtol, atol: error allowed in a step, in units of data, relative and absolute.
        max_nfe: network calls a row may take; one that runs out stays where it is, and `Solution.reached` says where.
        max_order: 1 to 5, of the predictor.
        sigma_data: the deviation c of the data; None takes that of an "edm" model, and 1 for others.
    """

    _fixed: ClassVar[bool] = True
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int | None = None
    max_order: int = 5
    sigma_data: float | None = None
    noise_level: float = field(default=0.0, init=False, repr=False)
    default_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise OptionError(f"Adaptive needs rtol >= 0 and atol > 0; got rtol = {self.rtol}, atol = {self.atol}.")
        if self.max_nfe is not None and self.max_nfe < 1:
            raise OptionError(f"max_nfe must be at least 1, or None; got {self.max_nfe}.")
        if not (isinstance(self.max_order, int) and 1 <= self.max_order <= 5):
            raise OptionError(f"max_order must be 1, 2, 3, 4 or 5; got {self.max_order!r}.")
        if self.sigma_data is not None and not self.sigma_data > 0:
            raise OptionError(f"sigma_data must be positive; got {self.sigma_data}.")

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        raise CapabilityError(
            f"{self} takes steps of its own for every row and has no single steps to correct or wrap: use it by itself."
        )

    def solve(
        self, process: SDE, x: State, times: Grid, noise: NoiseStream, tally: Tally | None = None
    ) -> Iterator[State]:
        """The states at `times[1:]`; every row steps exactly on them.

        Raises:
            CapabilityError: the process is noisy, or not the reverse of a linear model.
            DivergenceError: the step of a row has shrunk to nothing.
        """
        model = model_of(process, self)
        refuse_noise(process, self)
        rows = _Rows(self, model, x, times)
        for target in range(1, len(times)):
            rows.run(target)
            yield rows.x.clone()
        if tally is not None:
            tally.accepted, tally.rejected, tally.nfe, tally.reached = rows.accepted, rows.rejected, rows.nfe, rows.t


class _Rows:
    """The state of all rows."""

    def __init__(self, solver: Adaptive, model: ScoreModel, x: State, times: Grid) -> None:
        batch = x.shape[0]
        self.solver, self.model, self.times = solver, model, times
        self.sde: LinearSDE = model.linear
        self.splitting = split_for(model, solver.sigma_data or deviation_of(model), _QUADRATURE)
        self.ends = self.splitting.node(Points.at(self.sde, times))
        self.sign = math.copysign(1.0, self.ends[-1] - self.ends[0])
        self.x = x.clone()
        self.t = times[:1].expand(batch).clone()
        self.u = np.full(batch, self.ends[0])
        self.step = np.full(batch, _FIRST)
        self.order = np.ones(batch, dtype=int)
        self.known = np.ones(batch, dtype=int)
        self.error = np.ones(batch)
        self.failed = np.zeros(batch, dtype=bool)
        self.nodes = np.zeros((batch, solver.max_order))
        self.nodes[:, 0] = self.u
        self.values = torch.zeros(solver.max_order, *x.shape, dtype=x.dtype, device=x.device)
        self.values[0] = self._value(model, self.t, x)
        self.accepted, self.rejected = (torch.zeros(batch, dtype=torch.long) for _ in range(2))
        self.nfe = torch.ones(batch, dtype=torch.long)

    def run(self, target: int) -> None:
        """Bring all rows to `times[target]`, or as far as they may go."""
        going = np.flatnonzero(self.t.numpy() != self.times[target].item())
        while len(going):
            if self.solver.max_nfe is not None:
                going = going[self.nfe.numpy()[going] < self.solver.max_nfe]
                if not len(going):
                    return
            going = going[~self._advance(going, target)]

    def _advance(self, rows: Rows, target: int) -> Mask:
        """One step of some rows; says which have arrived."""
        index = torch.from_numpy(rows)
        u, length = self.u[rows], self.step[rows]
        left = self.sign * (self.ends[target] - u)
        last = length >= 0.999 * left
        length = np.where(last, left, np.where(length > left / 2, left / 2, length))
        after = np.where(last, self.ends[target], u + self.sign * length)
        t = self.times[target].repeat(len(rows))
        inside = torch.from_numpy(np.flatnonzero(~last))
        t[inside] = self.sde.time(torch.from_numpy(-2 * self.splitting.log_s(after[~last])))

        start, end = Points.at(self.sde, self.t[index]), Points.at(self.sde, t)
        with np.errstate(all="ignore"):
            steps = self.splitting.steps(start, end, np.zeros(len(rows)))
        x, values = self.x[index], self.values[:, index]
        linear = over(torch.from_numpy(steps.keep), x) * x
        weights, fewer, corrected = self._weights(rows, steps, after)
        predicted = linear + _total(weights, values)
        value = self._value(self.model.rows(index, len(self.x)), t, predicted)
        new = linear + over(torch.from_numpy(corrected[:, 0]), x) * value + _total(corrected[:, 1:], values)

        unit = self.splitting.sigma_data / np.hypot(self.splitting.sigma_data * end.alpha, end.sigma)
        scale = over(torch.from_numpy(unit), x)
        allowed = self.solver.atol + self.solver.rtol * (scale * torch.maximum(x.abs(), new.abs()))
        error = norm(scale * (new - predicted) / allowed)
        error_below = norm(scale * (new - linear - _total(fewer, values)) / allowed)
        good = error <= 1
        self._check(rows, length, good)
        self._adapt(rows, length, error, error_below, good)

        kept, moved = index[torch.from_numpy(good)], torch.from_numpy(good)
        self.nfe[index] += 1
        self.accepted[kept] += 1
        self.rejected[index[~moved]] += 1
        self.x[kept], self.t[kept], self.u[rows[good]] = new[moved], t[moved], after[good]
        self.values[1:, kept] = self.values[:-1, kept]
        self.values[0, kept] = value[moved]
        self.nodes[rows[good]] = np.concatenate([after[good, None], self.nodes[rows[good], :-1]], axis=1)
        return last & good

    def _weights(self, rows: Rows, steps: Steps, after: Array) -> tuple[Array, Array, Array]:
        """Weights of the past values for orders k and k - 1, and those of the corrector, each padded with zeros."""
        most = self.solver.max_order
        weights, fewer, corrected = (np.zeros((len(rows), most + extra)) for extra in (0, 0, 1))
        for order in np.unique(self.order[rows]):
            those = np.flatnonzero(self.order[rows] == order)
            part, nodes = steps[those], self.nodes[rows[those], :order]
            weights[those, :order] = interpolated(part, nodes)
            fewer[those, : order - 1] = interpolated(part, nodes[:, :-1])
            corrected[those, : order + 1] = interpolated(part, np.concatenate([after[those, None], nodes], axis=1))
        return weights, fewer, corrected

    def _adapt(self, rows: Rows, length: Array, error: Array, error_below: Array, good: Mask) -> None:
        """The next step and order of some rows."""
        order = self.order[rows]
        error, below = np.clip(error, 1e-10, 1e10), np.clip(error_below, 1e-10, 1e10)
        smooth = 0.9 * error ** (-0.7 / (order + 1)) * self.error[rows] ** (0.4 / (order + 1))
        smooth = np.minimum(smooth, np.where(self.failed[rows], 1.0, 2.0))
        strict = 0.9 * error ** (-1 / (order + 1))
        self.step[rows] = length * np.where(good, np.maximum(smooth, 0.3), np.clip(strict, 0.2, 0.9))
        lower = (order > 1) & (below ** (-1 / order) > error ** (-1 / (order + 1)))
        wanted = np.where(lower, order - 1, np.where(good, order + 1, order))
        self.known[rows] = np.minimum(self.known[rows] + good, self.solver.max_order)
        self.order[rows] = np.minimum(wanted, self.known[rows])
        self.error[rows] = np.where(good, np.maximum(error, 1e-4), self.error[rows])
        self.failed[rows] = ~good

    def _check(self, rows: Rows, length: Array, good: Mask) -> None:
        stuck = ~good & (length < _SHORTEST)
        if stuck.any():
            which = rows[stuck]
            raise DivergenceError(
                f"The step of {len(which)} row(s) has shrunk below {_SHORTEST:g}",
                "The network's output may be discontinuous or not finite there, or the tolerance finer than the dtype: "
                "loosen rtol and atol, use float64, or end at a later t_min.",
                step=None,
                time=self.t[int(which[0])].item(),
                rows=which.tolist(),
            )

    def _value(self, model: ScoreModel, t: Tensor, x: State) -> State:
        return model.combine(t, x, *self.splitting.value(*self.sde.scales_at(t)))


def _total(weights: Array, values: Tensor) -> State:
    """`sum_j weights_(row, j) values_(j, row)`; entry by entry, so that a row's bits are its own."""
    total = torch.zeros_like(values[0])
    for j in range(weights.shape[1]):
        if weights[:, j].any():
            total = total + over(torch.from_numpy(weights[:, j]), total) * values[j]
    return total
