r"""Rows that follow the probability-flow ODE by exponential Adams pairs, each with steps and an order of its own.

A row has a time, a step, an order k and a history of values of Q (see `sdediff.exponential`). A step predicts with the
last k values, evaluates Q once at what was predicted, and corrects with the new value as well. Steps are taken in the
variable u of the splitting, which is finite at both ends of time. What differs is how the error of a step is measured,
`errors`, in units of what is allowed; a step whose error is above 1 is taken again, shorter. The next step is

    h_next = 0.9 h err^(-0.7 / (k + 1)) err_before^(0.4 / (k + 1))

(a PI controller, Gustafsson 1991); the order k rises by one after an accepted step unless order k - 1 would have
allowed a longer one. Where they are not adaptive, rows take the steps of a grid instead, and none is refused; the order
still follows the error. A row that has arrived leaves the batch, and nothing about a row depends on the others.

Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, 1993, chapters II.4 and III.7.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdediff.errors import DivergenceError
from sdediff.exponential import Array, Points, Split, Steps, interpolated
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.shapes import Grid, State, over
from sdediff.wrapped import Count, evaluations

Rows: TypeAlias = NDArray[np.integer[Any]]
Mask: TypeAlias = NDArray[np.bool_]

QUADRATURE = 12
_FIRST = 0.25
_SHORTEST = 1e-9


@dataclass(frozen=True)
class Pair:
    """One step of some rows, predicted and corrected.

    Attributes:
        rows: their numbers, and `index`, the same as a tensor.
        start, end: the SDE at both ends of the step.
        x: the states before.
        predicted, below: predictions of order k and k - 1.
        new: the corrected states.
        value: Q where it was predicted.
        weights, fewer, corrected: the weights of past values (of the new one and those) in the three.
    """

    rows: Rows
    index: Tensor
    start: Points
    end: Points
    x: State
    predicted: State
    below: State
    new: State
    value: State
    weights: Array
    fewer: Array
    corrected: Array


class AdamsRows(ABC):
    """The state of all rows of a batch, at `times[0]` first.

    Args:
        model: the model, linear.
        x: the states.
        times: what `run` stops at, in either direction.
        splitting: the form of Q.
        max_order: 1 to 5, of the predictor.
        max_nfe: network evaluations a row may take; one that runs out stays where it is.
        adaptive: whether rows choose their steps; else they take those of `times`.
    """

    def __init__(
        self,
        model: ScoreModel,
        x: State,
        times: Grid,
        splitting: Split,
        *,
        max_order: int,
        max_nfe: int | None,
        adaptive: bool = True,
    ) -> None:
        batch = x.shape[0]
        self.model, self.times, self.splitting = model, times, splitting
        self.max_order, self.max_nfe, self.adaptive = max_order, max_nfe, adaptive
        self.sde: LinearSDE = model.linear
        self.ends = splitting.node(Points.at(self.sde, times))
        self.sign = math.copysign(1.0, self.ends[-1] - self.ends[0])
        self.x = x.clone()
        self.t = times[:1].expand(batch).clone()
        self.u = np.full(batch, self.ends[0])
        self.step = np.full(batch, _FIRST if adaptive else np.inf)
        self.order = np.ones(batch, dtype=int)
        self.known = np.ones(batch, dtype=int)
        self.error = np.ones(batch)
        self.failed = np.zeros(batch, dtype=bool)
        self.nodes = np.zeros((batch, max_order))
        self.nodes[:, 0] = self.u
        self.values = torch.zeros(max_order, *x.shape, dtype=x.dtype, device=x.device)
        self.accepted, self.rejected = (torch.zeros(batch, dtype=torch.long) for _ in range(2))
        self.nfe = torch.zeros(batch, dtype=torch.long) + evaluations(model.network, self.t)

    @abstractmethod
    def evaluate(self, model: ScoreModel, rows: Rows, t: Tensor, x: State) -> State:
        """Q at the states of some rows, from one network call."""

    @abstractmethod
    def errors(self, pair: Pair) -> tuple[Array, Array]:
        """Error of a step at order k and at order k - 1, `(rows,)` each, in units of what is allowed."""

    def keep(self, pair: Pair, error: Array, good: Mask) -> None:  # noqa: B027  # an optional hook
        """Told of every step, its error, and which rows take it, before histories move on."""

    def run(self, target: int) -> None:
        """Bring all rows to `times[target]`, or as far as they may go."""
        going = np.flatnonzero(self.t.numpy() != self.times[target].item())
        while len(going):
            if self.max_nfe is not None:
                going = going[self._affordable(going, target, self.max_nfe)]
                if not len(going):
                    return
            going = going[~self._advance(going, target)]

    def _advance(self, rows: Rows, target: int) -> Mask:
        """One step of some rows; says which have arrived."""
        index = torch.from_numpy(rows)
        length, last, after, t = self._proposed(rows, target)
        pair = self._pair(rows, index, t, after)
        error, error_below = self.errors(pair)
        if self.adaptive:
            good = error <= 1
            self._check(rows, length, good)
            self._adapt(rows, length, error, error_below, good)
        else:
            good = np.ones(len(rows), dtype=bool)
            self._choose_order(rows, (self.order[rows] > 1) & (error_below < error), good)

        self.keep(pair, error, good)
        kept, moved = index[torch.from_numpy(good)], torch.from_numpy(good)
        self.nfe[index] += self._cost(index, t)
        self.accepted[kept] += 1
        self.rejected[index[~moved]] += 1
        self.x[kept], self.t[kept], self.u[rows[good]] = pair.new[moved], t[moved], after[good]
        self.values[1:, kept] = self.values[:-1, kept]
        self.values[0, kept] = pair.value[moved]
        self.nodes[rows[good]] = np.concatenate([after[good, None], self.nodes[rows[good], :-1]], axis=1)
        return last & good

    def _proposed(self, rows: Rows, target: int) -> tuple[Array, Mask, Array, Tensor]:
        """The next step of some rows: its length, whether it ends on the target, and where it ends, in u and in t."""
        u, length = self.u[rows], self.step[rows]
        left = self.sign * (self.ends[target] - u)
        last = length >= 0.999 * left
        length = np.where(last, left, np.where(length > left / 2, left / 2, length))
        after = np.where(last, self.ends[target], u + self.sign * length)
        t = self.times[target].repeat(len(rows))
        inside = torch.from_numpy(np.flatnonzero(~last))
        t[inside] = self.sde.time(torch.from_numpy(-2 * self.splitting.log_s(after[~last])))
        return length, last, after, t

    def _cost(self, index: Tensor, t: Tensor) -> Count:
        """Network evaluations of a call for some rows."""
        return evaluations(self.model.rows(index, len(self.x)).network, t)

    def _affordable(self, rows: Rows, target: int, budget: int) -> Mask:
        """Which of some rows have network evaluations left for their next step."""
        index = torch.from_numpy(rows)
        after = self.nfe[index] + self._cost(index, self._proposed(rows, target)[-1])
        affordable: Mask = (after <= budget).numpy()
        return affordable

    def _pair(self, rows: Rows, index: Tensor, t: Tensor, after: Array) -> Pair:
        start, end = Points.at(self.sde, self.t[index]), Points.at(self.sde, t)
        with np.errstate(all="ignore"):
            steps = self.splitting.steps(start, end, np.zeros(len(rows)))
        x, values = self.x[index], self.values[:, index]
        linear = over(torch.from_numpy(steps.keep), x) * x
        weights, fewer, corrected = self._weights(rows, steps, after)
        predicted = linear + total(weights, values)
        value = self.evaluate(self.model.rows(index, len(self.x)), rows, t, predicted)
        new = linear + over(torch.from_numpy(corrected[:, 0]), x) * value + total(corrected[:, 1:], values)
        below = linear + total(fewer, values)
        return Pair(rows, index, start, end, x, predicted, below, new, value, weights, fewer, corrected)

    def _weights(self, rows: Rows, steps: Steps, after: Array) -> tuple[Array, Array, Array]:
        """Weights of the past values for orders k and k - 1, and those of the corrector, each padded with zeros."""
        weights, fewer, corrected = (np.zeros((len(rows), self.max_order + extra)) for extra in (0, 0, 1))
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
        self._choose_order(rows, lower, good)
        self.error[rows] = np.where(good, np.maximum(error, 1e-4), self.error[rows])
        self.failed[rows] = ~good

    def _choose_order(self, rows: Rows, lower: Mask, good: Mask) -> None:
        """One less, or after a step that is taken one more, as far as values are known."""
        order = self.order[rows]
        wanted = np.where(lower, order - 1, np.where(good, order + 1, order))
        self.known[rows] = np.minimum(self.known[rows] + good, self.max_order)
        self.order[rows] = np.minimum(wanted, self.known[rows])

    def _check(self, rows: Rows, length: Array, good: Mask) -> None:
        stuck = ~good & (length < _SHORTEST)
        if stuck.any():
            which = rows[stuck]
            raise DivergenceError(
                f"The step of {len(which)} row(s) has shrunk below {_SHORTEST:g}",
                "The network's output may be discontinuous or not finite there, or the tolerance finer than the dtype: "
                "loosen the tolerance, use float64, or end at a later t_min.",
                step=None,
                time=self.t[int(which[0])].item(),
                rows=which.tolist(),
            )


def total(weights: Array, values: Tensor) -> State:
    """`sum_j weights_(row, j) values_(j, row)`; entry by entry, so that a row's bits are its own."""
    out = torch.zeros_like(values[0])
    for j in range(weights.shape[1]):
        if weights[:, j].any():
            out = out + over(torch.from_numpy(weights[:, j]), out) * values[j]
    return out
