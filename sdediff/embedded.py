r"""Embedded Runge-Kutta pairs with step sizes chosen row by row, on any process without noise.

A pair (see `sdediff.runge_kutta`) moves from t to t + h by slopes k_1, ..., k_n and has a second set of weights, whose
difference from the first estimates the error, `e = h sum_i error_i k_i`. A step is taken again, shorter, if

    |e| = sqrt(mean_j (e_j / (atol + rtol max(|x_j|, |x'_j|)))^2)

is above 1. With weights of order k and k - 1, e is of order k in h. The next step is the shorter one of

    0.9 h err^(-0.7 / k) err_before^(0.4 / k)    and    0.9 h (h / h_before) (err_before / err^2)^(1 / k),

a PI and a predictive controller (Gustafsson 1991, 1994); the second foresees steps that must shrink all along, as for
`EDM`, whose time is sigma. Of a pair whose last slope is the first of the next step ("first same as last"), a
step that is taken costs one call less than it has slopes. The first step is found from the size of the drift and of
its change over a trial step (Hairer, Norsett and Wanner, II.4), which costs one call.

Every row has a time, a step and an error of its own, and leaves the batch when it has arrived. Sums are taken entry by
entry, so the bits of a row do not depend on the rows beside it, as far as those of the drift do not.

Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, chapters II.4 and II.5; Solving
Ordinary Differential Equations II, 1996, chapter IV.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.noise import NoiseStream
from sdediff.runge_kutta import TABLEAUS, Tableau
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over, sum_rows
from sdediff.solvers import Solver, Step, Tally, merged, refuse_noise
from sdediff.wrapped import Count

Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.integer[Any]]
Mask: TypeAlias = NDArray[np.bool_]

_SHORTEST = 1e-13
"""Of the whole span."""


@dataclass(frozen=True)
class AdaptiveRungeKutta(Solver):
    """A process without noise to a tolerance, every row with steps of its own, in either direction of time.

    Args:
        tableau: "dopri5", "bosh3", or a `Tableau` with an error of one order less.
        rtol, atol: error allowed in a step, relative and absolute.
        max_nfe: network evaluations a row may take; one that runs out stays where it is; `Solution.reached` says where.
    """

    _fixed: ClassVar[bool] = True
    tableau: str | Tableau = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int | None = None
    noise_level: float = field(default=0.0, init=False, repr=False)
    default_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        pairs = [name for name, tableau in TABLEAUS.items() if tableau.error is not None]
        if not isinstance(self.tableau, Tableau) and self.tableau not in pairs:
            raise OptionError(
                f"Unknown pair {self.tableau!r}: write a Tableau(..., error=...) or {' or '.join(map(repr, pairs))}."
            )
        method = self.coefficients
        if method.error is None:
            raise OptionError(
                f"The tableau {method.name!r} has no error weights, so its steps cannot be chosen: write "
                f"Tableau(..., error=...), or {' or '.join(map(repr, pairs))}; RungeKutta takes it with fixed steps."
            )
        if not (self.rtol >= 0 and self.atol > 0):
            raise OptionError(
                f"AdaptiveRungeKutta needs rtol >= 0 and atol > 0; got rtol = {self.rtol}, atol = {self.atol}."
            )
        least = len(method.b) + 1
        if self.max_nfe is not None and self.max_nfe < least:
            raise OptionError(
                f"max_nfe must be at least {least}, the calls of the first step of {method.name!r}, or None; got "
                f"{self.max_nfe}."
            )

    @property
    def coefficients(self) -> Tableau:
        """The tableau itself."""
        return self.tableau if isinstance(self.tableau, Tableau) else TABLEAUS[self.tableau]

    @property
    def order(self) -> int:  # type: ignore[override]  # the tableau's
        return self.coefficients.order

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        raise CapabilityError(
            f"{self} takes steps of its own for every row and has no single steps to correct or wrap: use it by itself."
        )

    def solve(
        self, process: SDE, x: State, times: Grid, noise: NoiseStream, tally: Tally | None = None
    ) -> Iterator[State]:
        """The states at `times[1:]`; every row steps exactly on them.

        Raises:
            CapabilityError: the process is noisy.
            DivergenceError: the step of a row has shrunk to nothing.
        """
        refuse_noise(process, self)
        rows = _Rows(self, process, x, times)
        for target in range(1, len(times)):
            rows.run(target)
            yield rows.x.clone()
        if tally is not None:
            add_rows(tally, Tally(rows.accepted, rows.rejected, rows.nfe, rows.t))


class _Rows:
    """The state of all rows."""

    def __init__(self, solver: AdaptiveRungeKutta, process: SDE, x: State, times: Grid) -> None:
        batch = x.shape[0]
        self.solver, self.process, self.times = solver, process, times
        self.method = solver.coefficients
        self.ends = times.numpy()
        self.span = float(self.ends[-1] - self.ends[0])
        self.x = x.clone()
        self.t = times[:1].repeat(batch)
        self.slope = process.coefficients(self.t, x)[0].clone()
        self.known = np.ones(batch, dtype=bool)
        self.nfe = torch.zeros(batch, dtype=torch.long) + process.evaluations(self.t)
        self.step = self._first_steps()
        self.error, self.before = np.ones(batch), np.full(batch, np.nan)
        self.failed = np.zeros(batch, dtype=bool)
        self.accepted, self.rejected = (torch.zeros(batch, dtype=torch.long) for _ in range(2))

    def run(self, target: int) -> None:
        """Bring all rows to `times[target]`, or as far as they may go."""
        going = np.flatnonzero(self.t.numpy() != self.ends[target])
        while len(going):
            if self.solver.max_nfe is not None:
                going = going[self._affordable(going, target, self.solver.max_nfe)]
                if not len(going):
                    return
            going = going[~self._advance(going, target)]

    def _advance(self, rows: Rows, target: int) -> Mask:
        """One step of some rows; says which have arrived."""
        index = torch.from_numpy(rows)
        wanted = self.step[rows]
        length, signed, last, end, stages = self._proposed(rows, target)
        process, x = self.process.rows(index, len(self.x)), self.x[index]
        slopes = [self._first_slopes(rows)]
        h = over(torch.from_numpy(signed), x)
        with np.errstate(all="ignore"):
            for at, weights in zip(stages, self.method.a[1:], strict=True):
                slopes.append(process.coefficients(at, x + h * _total(weights, slopes))[0])
            new = x + h * _total(self.method.b, slopes)
            allowed = self.solver.atol + self.solver.rtol * torch.maximum(x.abs(), new.abs())
            error = norm(h * _total(self.method.error or (), slopes) / allowed)
        good = error <= 1
        self._check(rows, length, good)
        self._adapt(rows, length, wanted, error, good)

        moved = torch.from_numpy(good)
        kept = index[moved]
        self.nfe[index] += self._cost(index, stages)
        self.accepted[kept] += 1
        self.rejected[index[~moved]] += 1
        self.x[kept], self.t[kept] = new[moved], end[moved]
        self.slope[kept] = slopes[-1][moved]
        self.known[rows[good]] = self.method.fsal
        return last & good

    def _proposed(self, rows: Rows, target: int) -> tuple[Array, Array, Mask, Tensor, list[Tensor]]:
        """The next step of some rows: length, with its sign, whether it ends on the target, where, and its stages."""
        t, wanted = self.t.numpy()[rows], self.step[rows]
        left = np.abs(self.ends[target] - t)
        last = wanted >= 0.999 * left
        length = np.where(last, left, np.where(wanted > left / 2, left / 2, wanted))
        signed = math.copysign(1.0, self.span) * length
        end = np.where(last, self.ends[target], t + signed)
        stages = [end if part == 1 else t + part * signed for part in self.method.c[1:]]
        return length, signed, last, torch.from_numpy(end), [torch.from_numpy(at) for at in stages]

    def _cost(self, index: Tensor, stages: list[Tensor]) -> Count:
        """Network evaluations of the stages of some rows, the first left out."""
        process = self.process.rows(index, len(self.x))
        return sum((process.evaluations(at) for at in stages), 0)

    def _affordable(self, rows: Rows, target: int, budget: int) -> Mask:
        """Which of some rows have network evaluations left for their next step."""
        index = torch.from_numpy(rows)
        first = self.process.rows(index, len(self.x)).evaluations(self.t[index])
        stages = self._cost(index, self._proposed(rows, target)[-1])
        after = self.nfe[index] + stages + first * torch.from_numpy(~self.known[rows])
        affordable: Mask = (after <= budget).numpy()
        return affordable

    def _first_slopes(self, rows: Rows) -> State:
        """The drift where some rows are; known, unless a pair that is not FSAL has just made a step."""
        index = torch.from_numpy(rows[~self.known[rows]])
        if len(index):
            those = self.process.rows(index, len(self.x))
            self.slope[index] = those.coefficients(self.t[index], self.x[index])[0]
            self.known[rows] = True
            self.nfe[index] += those.evaluations(self.t[index])
        return self.slope[torch.from_numpy(rows)]

    def _first_steps(self) -> Array:
        """Hairer's guess, in units of the span: the drift changes by little over it, and the state by less."""
        allowed = self.solver.atol + self.solver.rtol * self.x.abs()
        with np.errstate(all="ignore"):
            size, speed = norm(self.x / allowed), norm(self.slope * self.span / allowed)
            trial = np.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
            trial = np.clip(np.nan_to_num(trial, nan=1e-6), 1e-6, 1.0)
            ahead = torch.from_numpy(self.span * trial)
            slope = self.process.coefficients(self.t + ahead, self.x + over(ahead, self.x) * self.slope)[0]
            self.nfe += self.process.evaluations(self.t + ahead)
            change = norm((slope - self.slope) * self.span / allowed) / trial
            guess = (0.01 / np.maximum(speed, change)) ** (1 / self.method.order)
        return abs(self.span) * np.clip(guess, 1e-6, 100 * trial)

    def _adapt(self, rows: Rows, length: Array, wanted: Array, error: Array, good: Mask) -> None:
        """The next step of some rows; one that was cut to end on the grid does not forget how long it was to be."""
        order = self.method.order
        error = np.clip(error, 1e-10, 1e10)
        smooth = 0.9 * error ** (-0.7 / order) * self.error[rows] ** (0.4 / order)
        predicted = 0.9 * length / self.before[rows] * (self.error[rows] / error**2) ** (1 / order)
        smooth = np.clip(np.fmin(smooth, predicted), 0.2, np.where(self.failed[rows], 1.0, 5.0)) * length
        strict = np.clip(0.9 * error ** (-1 / order), 0.1, 0.9) * length
        self.step[rows] = np.where(good, np.where(length < wanted, np.maximum(smooth, wanted), smooth), strict)
        self.error[rows] = np.where(good, np.maximum(error, 1e-4), self.error[rows])
        self.before[rows] = np.where(good, length, self.before[rows])
        self.failed[rows] = ~good

    def _check(self, rows: Rows, length: Array, good: Mask) -> None:
        shortest = _SHORTEST * abs(self.span)
        stuck = rows[~good & (length < shortest)]
        if len(stuck):
            raise shrunk(stuck, shortest, self.t[int(stuck[0])].item())


def shrunk(rows: Rows, shortest: float, time: float) -> DivergenceError:
    """The error to raise when steps have become shorter than they may."""
    return DivergenceError(
        f"The step of {len(rows)} row(s) has shrunk below {shortest:g}",
        "The network's output may be discontinuous or not finite there, or the tolerance finer than the dtype: "
        "loosen rtol and atol, use float64, or end at a later t_min.",
        step=None,
        time=time,
        rows=rows.tolist(),
    )


def add_rows(tally: Tally, done: Tally) -> None:
    """Put the rows of a batch into a tally, after those of the chunks before it."""
    joined = done if tally.nfe is None else merged([tally, done])
    tally.accepted, tally.rejected, tally.nfe, tally.reached = vars(joined).values()


def _total(weights: Sequence[float], slopes: Sequence[State]) -> State:
    """`sum_i weights_i slopes_i`; without fused products, whose bits depend on an entry's place."""
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = total + weight * slope
    return total


def norm(e: State) -> Array:
    """Root mean square of every row, float64; NaN counts as infinite."""
    wide = e.detach().to(torch.promote_types(e.dtype, torch.float32))
    rows = (sum_rows(wide.square()) / max(e[:1].numel(), 1)).sqrt()
    return np.nan_to_num(rows.cpu().double().numpy(), nan=np.inf, posinf=np.inf)
