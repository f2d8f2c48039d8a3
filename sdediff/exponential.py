r"""Exponential integrators: the linear part of the reverse process exactly, the rest by polynomials.

With `y = x / alpha`, `s = sigma / alpha` and the denoiser D, the process of noise level lambda is, on the clock log s,

    dy = p (y - D) dlog s + noise,   p = 1 + lambda^2.

A splitting `D = A(s) y + g(s) Q` leaves a quantity Q that the network knows and that is nearly constant in log s. The
linear part and the noise are then integrated exactly, and Q is replaced by the polynomial through its last values:

| splitting | A | k = exp(int (1 - A) dlog s) | g | Q |
|---|---|---|---|---|
| "data" | 0 | s | 1 | denoised data |
| "noise" | 1 | 1 | -s | noise |
| "split" | c^2 / k^2 | sqrt(c^2 + s^2) | s c / k | what is left of Gaussian data of deviation c: EDM's network output |

    x_e = (alpha_e / alpha_s) (k_e / k_s)^p x_s + alpha_e int_(log s_e)^(log s_s) p (k_e / k)^p g Q dlog s + C z,

with `C^2 = alpha_e^2 lambda^2 int 2 s^2 (k_e / k)^(2 p) dlog s`, in closed form. "data" gives DPM-Solver++ and its
stochastic form (SEEDS), "noise" gives DEIS; "split" is exact for isotropic Gaussian data and finite at both ends of
time.

The integrals are taken by Gauss-Legendre quadrature in the variable in which their weight is flat (the angle
`atan(s / c)` for "split"), so steps may vary freely. The predictor of order k uses k values; the corrector then also
uses the value at the point arrived at, and no new call is made (predict, evaluate, correct). As the corrected state is
the predicted one plus known values, the whole is again a table with one more column.

References: Hochbruck and Ostermann 2010; Lu et al. 2022 (arXiv:2211.01095), DPM-Solver++; Zhang and Chen 2023
(arXiv:2204.13902), DEIS; Zhao et al. 2023 (arXiv:2302.04867), UniPC; Gonzalez et al. 2023 (arXiv:2305.14267), SEEDS;
Karras et al. 2022 (arXiv:2206.00364), the preconditioning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sdediff import grids
from sdediff.errors import CapabilityError, OptionError
from sdediff.linear import LinearSDE
from sdediff.model import Combination, ScoreModel
from sdediff.reverse import Reverse
from sdediff.shapes import Grid, as_float64
from sdediff.tables import Table, TableSolver

if TYPE_CHECKING:
    from sdediff.calibration import Calibration

Array: TypeAlias = NDArray[np.float64]
Which: TypeAlias = NDArray[np.integer[Any]] | NDArray[np.bool_]
"""Some rows: numbers of them, or a mask."""

_QUADRATURE = 40
_FAR = 20.0
"""Where `log s` stands in for infinity among the nodes of a polynomial."""


@dataclass(frozen=True)
class Steps:
    """The steps of a splitting: `x_e = keep x_s + sum_q weights_q Q(u_q) + spread z`.

    Attributes:
        keep, spread: `(steps,)`.
        u: where the integrand is taken, in the splitting's own variable, `(steps, points)`.
        weights: `(steps, points)`.
    """

    keep: Array
    spread: Array
    u: Array
    weights: Array

    def __getitem__(self, rows: Which) -> Steps:
        return Steps(self.keep[rows], self.spread[rows], self.u[rows], self.weights[rows])


@dataclass(frozen=True)
class Points:
    """alpha and sigma at some times, each `(times,)`."""

    alpha: Array
    sigma: Array

    @classmethod
    def at(cls, sde: LinearSDE, times: torch.Tensor) -> Points:
        alpha, sigma = sde.scales_at(times)
        return cls(alpha.detach().cpu().numpy(), sigma.detach().cpu().numpy())

    def __getitem__(self, index: slice | Which) -> Points:
        return Points(self.alpha[index], self.sigma[index])


class Splitting(ABC):
    """One row of the table above."""

    @abstractmethod
    def value(self, alpha: torch.Tensor, sigma: torch.Tensor) -> Combination:
        """Q as `(m, n)` of `m E[x_0 | x] + n E[eps | x]`."""

    @abstractmethod
    def node(self, at: Points) -> Array:
        """The variable in which Q is taken for a polynomial, falling as time falls."""

    @abstractmethod
    def log_s(self, u: Array) -> Array:
        """`log(sigma / alpha)` where that variable is u."""

    @abstractmethod
    def steps(self, start: Points, end: Points, level: Array) -> Steps:
        """Steps, each at a noise level of its own, `(steps,)`."""


def _quadrature(start: Array, end: Array, points: int = _QUADRATURE) -> tuple[Array, Array]:
    """Points and weights of `int_start^end`, `(steps, points)`."""
    at, weights = _gauss(points)
    half = (end - start)[:, None] / 2
    return (start + end)[:, None] / 2 + half * at, half * weights


@lru_cache
def _gauss(points: int) -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(points)


def _fresh(log_ratio: Array, level: Array) -> Array:
    """`1 - ratio^(2 level^2)`, the part of the variance that is new; 0 where the level is."""
    return np.where(level == 0, 0.0, -np.expm1(2 * level**2 * np.where(level == 0, 0.0, log_ratio)))


class _InLogS(Splitting):
    """Polynomials in log s, cut off far out."""

    def node(self, at: Points) -> Array:
        return np.clip(np.log(at.sigma) - np.log(at.alpha), -_FAR, _FAR)

    def log_s(self, u: Array) -> Array:
        return u


@dataclass(frozen=True)
class Data(_InLogS):
    """Q is the denoised data. A step to sigma = 0 is all of it the last value of Q, so that its order is 1."""

    def value(self, alpha: torch.Tensor, sigma: torch.Tensor) -> Combination:
        return torch.ones_like(alpha), torch.zeros_like(alpha)

    def steps(self, start: Points, end: Points, level: Array) -> Steps:
        p = 1 + level**2
        ratio = (end.sigma * start.alpha) / (end.alpha * start.sigma)
        v, weights = _quadrature(ratio**p, np.ones_like(p))
        log_s = np.log(end.sigma / end.alpha)[:, None] - np.log(v) / p[:, None]
        return Steps(
            keep=end.sigma / start.sigma * ratio ** (level**2),
            spread=end.sigma * np.sqrt(_fresh(np.log(ratio), level)),
            u=np.where((end.sigma > 0)[:, None], np.clip(log_s, -_FAR, _FAR), self.node(start)[:, None]),
            weights=end.alpha[:, None] * weights,
        )


@dataclass(frozen=True)
class Noise(_InLogS):
    """Q is the noise."""

    def value(self, alpha: torch.Tensor, sigma: torch.Tensor) -> Combination:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def steps(self, start: Points, end: Points, level: Array) -> Steps:
        s, e = start.sigma / start.alpha, end.sigma / end.alpha
        v, weights = _quadrature(s, e)
        return Steps(
            keep=end.alpha / start.alpha,
            spread=end.alpha * np.sqrt(np.where(level == 0, 0.0, level**2 * (s**2 - e**2))),
            u=np.clip(np.log(v), -_FAR, _FAR),
            weights=((1 + level**2) * end.alpha)[:, None] * weights,
        )


@dataclass(frozen=True)
class Split(Splitting):
    """Q is what a network of EDM's form would predict for data of deviation `c = sigma_data`.

    Polynomials are in `u = log((s / c + 0.003) / (1 + s / 5 c))`: log s in the middle and, since Q is linear in s near
    clean data and in 1 / s near pure noise, level beyond. It is finite at both ends. With `cut = inf` in place of 5,
    it goes on as log s: for networks that predict noise, whose errors make Q grow as s near pure noise.
    """

    sigma_data: float
    cut: float = 5.0
    points: int = _QUADRATURE

    def value(self, alpha: torch.Tensor, sigma: torch.Tensor) -> Combination:
        k = (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
        return sigma / (self.sigma_data * k), -alpha * self.sigma_data / k

    def node(self, at: Points) -> Array:
        return self._node(self.sigma_data * at.alpha, at.sigma)

    def _node(self, signal: Array, sigma: Array) -> Array:
        return np.log((sigma + 0.003 * signal) / (signal + sigma / self.cut))

    def log_s(self, u: Array) -> Array:
        return np.log(self.sigma_data * (np.exp(u) - 0.003) / (1 - np.exp(u) / self.cut))

    def steps(self, start: Points, end: Points, level: Array) -> Steps:
        signal_s, signal_e = self.sigma_data * start.alpha, self.sigma_data * end.alpha
        k_s, k_e = np.hypot(signal_s, start.sigma), np.hypot(signal_e, end.sigma)
        ratio = (signal_s * k_e) / (k_s * signal_e)
        ends = np.arctan2(end.sigma, signal_e), np.arctan2(start.sigma, signal_s)
        angle, weights = _quadrature(*ends, self.points)
        decay = (np.cos(angle) / (signal_e / k_e)[:, None]) ** (level**2)[:, None]
        return Steps(
            keep=k_e / k_s * ratio ** (level**2),
            spread=k_e * np.sqrt(_fresh(np.log(ratio), level)),
            u=self._node(np.cos(angle), np.sin(angle)),
            weights=((1 + level**2) * k_e)[:, None] * decay * weights,
        )


def interpolated(steps: Steps, nodes: Array) -> Array:
    """`sum_q weights_q L_j(u_q)` for the Lagrange polynomials L_j of `nodes`, `(steps, j)`; shaped as nodes."""
    out = np.empty_like(nodes)
    for j in range(nodes.shape[1]):
        basis = steps.weights.copy()
        for other in range(nodes.shape[1]):
            if other != j:
                basis *= (steps.u - nodes[:, other, None]) / (nodes[:, j] - nodes[:, other])[:, None]
        out[:, j] = basis.sum(1)
    return out


def _adams(steps: Steps, nodes: Array, order: int, ahead: int) -> Array:
    """Weights of the last `order` values (fewer in the first steps), and of `ahead` new ones before them.

    Row i multiplies `Q_(i + ahead), ..., Q_(i - order + 1)`.
    """
    count = len(steps.keep)
    out = np.zeros((count, order + ahead))
    for known in range(1, order + 1):
        rows = np.arange(known - 1, known if known < order else count)
        rows = rows[rows < count]
        out[rows, : known + ahead] = interpolated(steps[rows], nodes[rows[:, None] + ahead - np.arange(known + ahead)])
    return out


def _folded(keep: Array, predict: Array, correct: Array) -> Array:
    """`B` of the table that predicts, and corrects each state when its value is known.

    The corrected state is `x_i - sum_j predict_(i-1, j) Q_(i-1-j) + sum_j correct_(i-1, j) Q_(i-j)`.
    """
    out = np.pad(predict, [(0, 0), (0, 1)])
    change = correct.copy()
    change[:, 1:] -= predict
    out[1:] += keep[1:, None] * change[:-1]
    return out


def split_for(model: ScoreModel, sigma_data: float, points: int = _QUADRATURE) -> Split:
    """The "split" form for what a network predicts."""
    return Split(sigma_data, math.inf if model.blind_in_noise else 5.0, points)


def grid_for(model: ScoreModel, steps: int, sigma_data: float, t_min: float | None) -> Grid:
    """The grid for what a network predicts: a tapered one spends few steps where a prediction of noise errs most."""
    if model.blind_in_noise:
        return grids.log_snr(model.linear, steps, t_min=t_min)
    return grids.tapered(model.linear, steps, sigma_data=sigma_data, t_min=t_min)


NoiseLevel: TypeAlias = float | Callable[[torch.Tensor], torch.Tensor | float]
"""lambda >= 0, or a function of the time `()`."""

_SPLITTINGS: dict[str, Callable[[float, ScoreModel], Splitting]] = {
    "split": lambda sigma_data, model: split_for(model, sigma_data),
    "data": lambda sigma_data, model: Data(),
    "noise": lambda sigma_data, model: Noise(),
}


def _table(method: Exponential, splitting: Splitting, order: int, corrector: bool, packed: bytes) -> Table:
    """The table of a grid, from nothing but numbers: times, alpha, sigma and the noise level of every step."""
    n = (len(packed) // 8 + 1) // 4
    times, alpha, sigma, level = np.split(np.frombuffer(packed).copy(), [n, 2 * n, 3 * n])
    at = Points(alpha, sigma)
    with np.errstate(all="ignore"):
        steps = splitting.steps(at[:-1], at[1:], level)
        weights = method.weights(steps, splitting.node(at), order, corrector)
    with torch.inference_mode(False):  # what is kept may be used where gradients are taken
        remembers = splitting.value(torch.from_numpy(alpha[:-1]), torch.from_numpy(sigma[:-1]))
        clock, keep, B, spread = map(torch.from_numpy, (times, steps.keep, weights, steps.spread))
        return Table(clock, keep, B, spread, remembers)


_kept_table = lru_cache(maxsize=256)(_table)


def _check_ends(table: Table, predict: str, times: Grid) -> None:
    if not bool(table.A.isfinite().all() and table.B.isfinite().all()):
        raise CapabilityError(
            f"predict={predict!r} cannot step from {times[0]:g} to {times[-1]:g}: alpha or sigma is 0 at an end. "
            "predict='split' is finite at both."
        )


@dataclass(frozen=True)
class Exponential(TableSolver):
    """Exponential Adams methods of any order and noise level; the default of `sample` and `encode`.

    Args:
        order: number of values the predictor uses, 1 to 5; None chooses 2 below 8 steps, 3 below 25, 4 below 40, else
            5 (2 at most for noisy processes, whose values jump from step to step).
        noise_level: lambda of the process, a number >= 0 or a function of time, taken at the middle of each step (any
            function keeps the marginals).
        predict: the quantity that is taken for a polynomial, "split", "data" or "noise".
        corrector: whether each state is corrected with the value found at it, which raises the order by one and costs
            no network call. None for yes, unless a noisy process is given fewer than `16 (1 + lambda^2)` steps, over
            which corrections would swing.
        sigma_data: the deviation of the data that "split" assumes; None takes that of an "edm" model, and 1 for others.
        calibration: what `calibrate` found for the model: its deviation and, for deterministic solves, its grids and
            orders, where they are not given.

    Its grid is `grids.tapered`, or `grids.log_snr` for networks that predict noise or the score: what is made of their
    output near pure noise has their error times sigma / alpha, and wants steps there.

    `Exponential(2, predict="data", corrector=False)` is DPM-Solver++(2M), with `noise_level=1` its stochastic form;
    order 1 without corrector is DDIM. Without a corrector the first `order - 1` steps are corrected all the same, or
    their low order would be that of the whole. The first step is predicted at order 1 and corrected at order 2, which
    leaves an error of third order in the first step; on this solver's grids, which start where the state is nearly
    noise, it is seen only far below 1e-6. With noise, orders above 2 are legal, but moments converge at about 2.
    """

    _fixed: ClassVar[bool] = True
    order: int | None = None  # type: ignore[assignment, misc]  # the method's, or None
    noise_level: NoiseLevel = 0.0  # type: ignore[assignment]  # or a function of time
    predict: str = "split"
    corrector: bool | None = None
    sigma_data: float | None = None
    calibration: Calibration | None = None
    default_steps: ClassVar[int] = 50

    def __post_init__(self) -> None:
        if self.order is not None and not (isinstance(self.order, int) and 1 <= self.order <= 5):
            raise OptionError(f"order must be 1, 2, 3, 4, 5 or None; got {self.order!r}.")
        if self.predict not in _SPLITTINGS:
            raise OptionError(f"predict must be 'split', 'data' or 'noise'; got {self.predict!r}.")
        if not callable(self.noise_level) and not self.noise_level >= 0:
            raise OptionError(f"noise_level must be a number >= 0 or a function of time; got {self.noise_level!r}.")
        if self.sigma_data is not None and not self.sigma_data > 0:
            raise OptionError(f"sigma_data must be positive; got {self.sigma_data}.")

    @property
    def deterministic(self) -> bool:
        return not callable(self.noise_level) and self.noise_level == 0

    def process(self, model: ScoreModel) -> Reverse:
        return Reverse(model, 1.0 if callable(self.noise_level) else self.noise_level)

    def grid(self, model: ScoreModel, steps: int, t_min: float | None = None) -> Grid:
        if self.calibration is not None and self.deterministic:
            return self.calibration.grid(model, steps, t_min)
        return grid_for(model, steps, self._deviation(model), t_min)

    def table(self, model: ScoreModel, times: Grid) -> Table:
        splitting = _SPLITTINGS[self.predict](self._deviation(model), model)
        levels, count = self._levels(times), len(times) - 1
        columns = [times, *model.linear.scales_at(times), levels]
        packed = b"".join(column.detach().cpu().numpy().tobytes() for column in columns)
        noise_level = levels.max().item()
        many = noise_level == 0 or count >= 16 * (1 + noise_level**2)
        corrector = many if self.corrector is None else self.corrector
        make = _kept_table if self.fixed else _table
        table = make(self, splitting, self.order_for(count), corrector, packed)
        _check_ends(table, self.predict, times)
        return table.clone()

    def weights(self, steps: Steps, nodes: Array, order: int, corrector: bool) -> Array:
        """`B` for the nodes of a grid, `(steps, order + 1)`."""
        predict, correct = _adams(steps, nodes, order, 0), _adams(steps, nodes, order, 1)
        if not corrector:
            correct[order - 1 :] = np.pad(predict, [(0, 0), (1, 0)])[order - 1 :]
        return _folded(steps.keep, predict, correct)

    def order_for(self, steps: int) -> int:
        """The order taken for a grid of so many steps."""
        if self.order is not None:
            return self.order
        if self.calibration is not None and self.deterministic:
            return self.calibration.order(steps)
        order = 2 if steps < 8 else 3 if steps < 25 else 4 if steps < 40 else 5
        return order if self.deterministic else min(order, 2)

    def _deviation(self, model: ScoreModel) -> float:
        if self.sigma_data is not None:
            return self.sigma_data
        return model.deviation if self.calibration is None else self.calibration.sigma_data

    def _levels(self, times: Grid) -> torch.Tensor:
        middles = (times[1:] + times[:-1]) / 2
        if not callable(self.noise_level):
            return torch.full_like(middles, self.noise_level)
        return torch.stack([as_float64(self.noise_level(t)).reshape(()) for t in middles])


@dataclass(frozen=True)
class UniPC(Exponential):
    """UniPC (Zhao et al. 2023): "data" with its corrector, and the authors' short cuts where two values meet.

    Its linear systems for the coefficients have the exponential Adams weights as their solution. Only with two values
    do the authors take 1/2 for the one unknown, which makes their function `B(h)` of the step matter there.

    Args:
        order: 1 to 5; 3 is the authors' choice.
        variant: "bh2", `B = exp(h) - 1`, or "bh1", `B = h`, with h the step in log-SNR / 2.
    """

    _fixed: ClassVar[bool] = True
    order: int = 3  # type: ignore[misc]  # as above
    predict: str = field(default="data", init=False)
    corrector: bool | None = field(default=True, init=False)
    noise_level: NoiseLevel = field(default=0.0, init=False)
    sigma_data: float | None = field(default=None, init=False, repr=False)
    calibration: Calibration | None = field(default=None, init=False, repr=False)
    variant: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order is None:
            raise OptionError("UniPC needs an order, 1 to 5; 3 is the authors' choice.")
        if self.variant not in ("bh1", "bh2"):
            raise OptionError(f"variant must be 'bh1' or 'bh2'; got {self.variant!r}.")

    def weights(self, steps: Steps, nodes: Array, order: int, corrector: bool) -> Array:
        predict, correct = _adams(steps, nodes, order, 0), _adams(steps, nodes, order, 1)
        half = self._half(steps, nodes)
        total = steps.weights.sum(1)
        correct[0, :2] = half[0], total[0] - half[0]
        if order == 1:
            correct = np.stack([half, total - half], axis=1)
        pairs = slice(1, 2) if order > 2 else slice(1, None)
        if order >= 2:
            slope = half[1:] * np.diff(nodes)[1:] / np.diff(nodes)[:-1]
            predict[pairs, 0] = total[pairs] + slope[: len(predict[pairs])]
            predict[pairs, 1] = -slope[: len(predict[pairs])]
        return _folded(steps.keep, predict, correct)

    def _half(self, steps: Steps, nodes: Array) -> Array:
        """`alpha_e B(h) / 2` of every step."""
        h = -np.diff(nodes)
        total = steps.weights.sum(1)
        return total / 2 if self.variant == "bh2" else total / -np.expm1(-h) * h / 2


@dataclass(frozen=True)
class ExponentialRungeKutta(TableSolver):
    """Single-step exponential methods of order 2 and 3, as many calls a step; no memory is carried over a step.

    Order 2 evaluates at the middle of the step, order 3 at one and two thirds (in the variable of the splitting), as
    DPM-Solver-2S and 3S do. As a table they have a row for every stage.

    Args:
        order: 2 or 3.
        predict, sigma_data: as for `Exponential`.
    """

    _fixed: ClassVar[bool] = True
    order: int = 3  # type: ignore[misc]  # as above
    predict: str = "split"
    sigma_data: float | None = None
    noise_level: float = field(default=0.0, init=False)
    default_steps: ClassVar[int] = 25

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and self.order in (2, 3)):
            raise OptionError(f"ExponentialRungeKutta has order 2 or 3; got {self.order!r}.")
        Exponential(predict=self.predict, sigma_data=self.sigma_data)

    def grid(self, model: ScoreModel, steps: int, t_min: float | None = None) -> Grid:
        return Exponential(sigma_data=self.sigma_data).grid(model, steps, t_min)

    def table(self, model: ScoreModel, times: Grid) -> Table:
        splitting = _SPLITTINGS[self.predict](self.sigma_data or model.deviation, model)
        with np.errstate(all="ignore"):
            table = self._stages(model.linear, splitting, times)
        _check_ends(table, self.predict, times)
        return table

    def _stages(self, sde: LinearSDE, splitting: Splitting, times: Grid) -> Table:
        stages, count = self.order, len(times) - 1
        start, ends = Points.at(sde, times[:-1]), splitting.node(Points.at(sde, times))
        inner = ends[:-1, None] + np.arange(1, stages) / stages * np.diff(ends)[:, None]
        inside = sde.time(torch.from_numpy(-2 * splitting.log_s(inner)))
        rows = torch.cat([times[:-1, None], inside], dim=1).flatten()
        points = torch.cat([inside, times[1:, None]], dim=1)
        nodes = np.concatenate([ends[:-1, None], inner], axis=1)

        A = np.empty((count, stages))
        B = np.zeros((count, stages, stages))
        kept, said = np.ones(count), np.zeros((count, stages))
        for k in range(stages):
            steps = splitting.steps(start, Points.at(sde, points[:, k]), np.zeros(count))
            used = [0, k] if k else [0]
            new = np.zeros((count, stages))
            new[:, used] = interpolated(steps, nodes[:, used])
            # x_k = kept x_0 + said Q is known, so x_0 = (x_k - said Q) / kept.
            A[:, k] = steps.keep / kept
            B[:, k, : k + 1] = (new - A[:, k, None] * said)[:, k::-1] if k else new[:, :1]
            kept, said = steps.keep, new
        return Table(
            torch.cat([rows, times[-1:]]), torch.from_numpy(A.flatten()), torch.from_numpy(B.reshape(-1, stages)),
            torch.zeros(len(rows), dtype=torch.float64), splitting.value(*sde.scales_at(rows)),
            tuple(range(0, len(rows) + 1, stages)),
        )  # fmt: skip
