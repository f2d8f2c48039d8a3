r"""The reverse SDE to a tolerance: step sizes chosen row by row, on one Brownian path whatever they are.

With `c = sigma_data`, `k = sqrt(c^2 alpha^2 + sigma^2)` and `cos(theta) = c alpha / k`, the linear part and the noise
of the "split" form (see `sdediff.exponential`) are those of an Ornstein-Uhlenbeck process: `z = x / k` has

    z_e = r z_s + ... + sqrt(1 - r^2) eta,    r = (cos(theta_s) / cos(theta_e))^(lambda^2),

so that `cos(theta)^(lambda^2) z` moves by a Brownian motion at the time `V = cos(theta)^(2 lambda^2)`, which rises from
noise to data. Variances add in V: if a step is halved at m, with the part `f = (V_m - V_s) / (V_e - V_s)` of V in its
first half, then the normal numbers of the halves, given the eta of the whole, are by the Brownian bridge

    eta_1 = sqrt(f) eta + sqrt(1 - f) xi,    eta_2 = sqrt(1 - f) eta - sqrt(f) xi,

a rotation of `(eta, xi)`: they are independent and standard normal, and their noise adds up to that of the whole.

The span between two times of the grid is halved again and again, evenly in the variable u of the splitting. The
number xi of an interval is a function of the row's key and of the interval (see `sdediff.keyed`), so the path of a row
is fixed before the first step. A row walks the tree from its start: an interval longer than the step it wants is
halved, and so is one whose step is rejected; the second half keeps its eta until its turn comes. Nothing is drawn
anew, so that rejection cannot favour one noise over another.

A step holds Q at its value at the start (the predictor, strong order 1), evaluates it at the state arrived at, and
corrects by the straight line between the two (weak order 2). The difference of the two estimates the error, in units
of data as in `sdediff.adaptive`, and is of order 3/2 in the length h of the step, as Q follows the noise. The error of
one step says as much about its noise as about its length: if steps grew whenever their noise happened to be small,
moments would be off by several times as much. So the step wanted next is

    (1 / (2 c))^(1/3),    c <- c + 0.3 (err^2 / h^3 - c),

from an average over all steps tried, taken or not; the longest interval below it that starts here is the next step.

References: Gaines and Lyons 1997, variable steps on a tree of halvings; Rackauckas and Nie 2017, rejection sampling
with memory; Jolicoeur-Martineau et al. 2021 (arXiv:2105.14080), adaptive steps for the reverse SDE; Levy 1948.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sdediff.embedded import Array, Mask, Rows, add_rows, norm, shrunk
from sdediff.errors import CapabilityError, OptionError
from sdediff.exponential import Points, interpolated, split_for
from sdediff.keyed import Words, keyed_normals
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.reverse import Reverse
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, Tally, model_of
from sdediff.wrapped import Count, evaluations

_FIRST = 0.25
_NEWEST = 0.3
_ALLOWED = 0.5
_DEEPEST = 40
_QUADRATURE = 12


@dataclass(frozen=True)
class AdaptiveStochastic(Solver):
    """The reverse SDE of a linear model to a tolerance, every row with steps of its own on a Brownian path of its own.

    The path of a row is fixed by its noise and the grid, not by the tolerance: with one seed, solves at falling
    tolerances converge, row by row, to one solution. The source of noise is asked for one number per entry, from
    which the whole path is made; opposite numbers (`Antithetic`) give opposite paths.

    For the law alone it pays where no grid is known that suits. On Gaussian data `Exponential` at the same noise level
    needs half to two thirds of its calls for equal errors of deviations where `sigma_data` is right, and about twice
    its calls where that is too small by ten.

    Args:
        rtol, atol: error allowed in a step, in units of data, relative and absolute.
        noise_level: lambda > 0 of the process.
        max_nfe: network evaluations a row may take; one that runs out stays where it is; `Solution.reached` says where.
        sigma_data: the deviation c of the data; None takes that of an "edm" model, and 1 for others.
    """

    _fixed: ClassVar[bool] = True
    rtol: float = 1e-2
    atol: float = 1e-2
    noise_level: float = 1.0
    max_nfe: int | None = None
    sigma_data: float | None = None
    default_steps: ClassVar[int] = 1
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise OptionError(
                f"AdaptiveStochastic needs rtol >= 0 and atol > 0; got rtol = {self.rtol}, atol = {self.atol}."
            )
        if not self.noise_level > 0:
            raise OptionError(
                f"AdaptiveStochastic needs noise_level > 0; got {self.noise_level}. Adaptive() is for the "
                "probability-flow ODE."
            )
        if self.max_nfe is not None and self.max_nfe < 2:
            raise OptionError(f"max_nfe must be at least 2, the calls of the first step, or None; got {self.max_nfe}.")
        if self.sigma_data is not None and not self.sigma_data > 0:
            raise OptionError(f"sigma_data must be positive; got {self.sigma_data}.")

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        raise CapabilityError(
            f"{self} takes steps of its own for every row and has no single steps to correct or wrap: use it by itself."
        )

    def solve(
        self, process: SDE, x: State, times: Grid, noise: NoiseStream, tally: Tally | None = None
    ) -> Iterator[State]:
        """The states at `times[1:]`, falling; every row steps exactly on them.

        Raises:
            CapabilityError: the process is not the noisy reverse of a linear model, or times rise.
            DivergenceError: the step of a row has shrunk to nothing.
        """
        model = model_of(process, self)
        assert isinstance(process, Reverse)
        if not process.noisy:
            raise CapabilityError(
                "AdaptiveStochastic makes its steps of noise and this process has none: use Adaptive() for the "
                "probability-flow ODE."
            )
        if times[-1] > times[0]:
            raise CapabilityError("AdaptiveStochastic runs from noise to data only: give times that fall.")
        rows = _Rows(self, model, process.noise_level, x, times, noise)
        for target in range(1, len(times)):
            rows.run(target)
            yield rows.x.clone()
        if tally is not None:
            add_rows(tally, Tally(rows.accepted, rows.rejected, rows.nfe, rows.t))


class _Rows:
    """The state of all rows.

    A row stands at the start of the interval number `place` of the `2^level` of its span, whose noise is `unit`; the
    second halves that it has yet to come to lie in `later`, at most one for each level.
    """

    def __init__(
        self, solver: AdaptiveStochastic, model: ScoreModel, level: float, x: State, times: Grid, noise: NoiseStream
    ) -> None:
        batch = x.shape[0]
        self.solver, self.model, self.times, self.noise_level = solver, model, times, level
        self.sde: LinearSDE = model.linear
        self.splitting = split_for(model, solver.sigma_data or model.deviation, _QUADRATURE)
        self.ends = self.splitting.node(Points.at(self.sde, times))
        self.numbers = _Numbers.of(noise, x)
        self.x = x.clone()
        self.t = times[:1].repeat(batch)
        self.value = self._value(model, self.t, x)
        self.step = np.full(batch, _FIRST)
        self.level, self.place = np.zeros(batch, dtype=int), np.zeros(batch, dtype=int)
        self.rough = np.zeros(batch)
        self.unit = torch.zeros_like(x)
        self.later = torch.zeros_like(x)[None]
        self.accepted, self.rejected = (torch.zeros(batch, dtype=torch.long) for _ in range(2))
        self.nfe = torch.zeros(batch, dtype=torch.long) + evaluations(model.network, self.t)

    def run(self, target: int) -> None:
        """Bring all rows to `times[target]`, or as far as they may go."""
        going = np.flatnonzero(self.t.numpy() == self.times[target - 1].item())
        self.level[going], self.place[going] = 0, 0
        self.unit[torch.from_numpy(going)] = self.numbers(going, target, self.place[going], self.x)
        while len(going):
            long = going
            while len(long := long[self._length(long, target) > self.step[long]]):
                self._halve(long, target)
            if self.solver.max_nfe is not None:
                index = torch.from_numpy(going)
                after = self.nfe[index] + self._cost(index, self._times(going, target, 1.0))
                going = going[(after <= self.solver.max_nfe).numpy()]
                if not len(going):
                    return
            going = going[~self._advance(going, target)]

    def _advance(self, rows: Rows, target: int) -> Mask:
        """One step of some rows, the interval that each stands at; says which have arrived."""
        index = torch.from_numpy(rows)
        x, value, t = self.x[index], self.value[index], self._times(rows, target, 1.0)
        start, end = Points.at(self.sde, self.t[index]), Points.at(self.sde, t)
        nodes = np.stack([self.splitting.node(end), self.splitting.node(start)], axis=1)
        with np.errstate(all="ignore"):
            steps = self.splitting.steps(start, end, np.full(len(rows), self.noise_level))
        weights = interpolated(steps, nodes)

        moved = _times(steps.keep, x) + _times(steps.spread, self.unit[index])
        predicted = moved + _times(weights.sum(1), value)
        arrived = self._value(self.model.rows(index, len(self.x)), t, predicted)
        new = moved + _times(weights[:, 0], arrived) + _times(weights[:, 1], value)

        scale = self.splitting.sigma_data / np.hypot(self.splitting.sigma_data * end.alpha, end.sigma)
        allowed = self.solver.atol + self.solver.rtol * _times(scale, torch.maximum(x.abs(), new.abs()))
        error = norm(_times(scale, new - predicted) / allowed)
        good = error <= 1
        stuck = rows[~good & (self.level[rows] >= _DEEPEST)]
        if len(stuck):
            shortest = self._length(stuck, target).min()
            raise shrunk(stuck, shortest, self.t[int(stuck[0])].item())

        kept, taken = index[torch.from_numpy(good)], torch.from_numpy(good)
        self.nfe[index] += self._cost(index, t)
        self.accepted[kept] += 1
        self.rejected[index[~taken]] += 1
        self.x[kept], self.t[kept], self.value[kept] = new[taken], t[taken], arrived[taken]
        self._adapt(rows, self._length(rows, target), error, good)
        self._turn(rows[good])
        return good & (self.level[rows] == 0) & (self.place[rows] == 1)

    def _cost(self, index: Tensor, t: Tensor) -> Count:
        """Network evaluations of a call for some rows."""
        return evaluations(self.model.rows(index, len(self.x)).network, t)

    def _adapt(self, rows: Rows, length: Array, error: Array, good: Mask) -> None:
        """The step that some rows want next."""
        seen = np.clip(error, 1e-10, 1e3) ** 2 / length**3
        before = self.rough[rows]
        self.rough[rows] = np.where(before == 0, seen, before + _NEWEST * (seen - before))
        wanted = np.cbrt(_ALLOWED / self.rough[rows])
        self.step[rows] = np.clip(wanted, 0.1 * length, np.where(good, 4.0, 0.5) * length)

    def _length(self, rows: Rows, target: int) -> Array:
        """The lengths in u of the intervals that some rows stand at."""
        return np.ldexp(self.ends[target - 1] - self.ends[target], -self.level[rows])

    def _times(self, rows: Rows, target: int, part: float) -> Tensor:
        """The time at a part of the interval that each of some rows stands at."""
        place = np.ldexp(self.place[rows] + part, -self.level[rows])
        t = self.times[target].repeat(len(rows))
        inside = np.flatnonzero(place < 1)
        if len(inside):
            u = self.ends[target - 1] + place[inside] * (self.ends[target] - self.ends[target - 1])
            t[torch.from_numpy(inside)] = self.sde.time(torch.from_numpy(-2 * self.splitting.log_s(u)))
        return t

    def _halve(self, rows: Rows, target: int) -> None:
        """Make the interval of some rows its first half, and keep the noise of the second."""
        index = torch.from_numpy(rows)
        times = self.t[index], self._times(rows, target, 0.5), self._times(rows, target, 1.0)
        first = self._first_part(*(Points.at(self.sde, t) for t in times))
        fresh = self.numbers(rows, target, (1 << self.level[rows]) + self.place[rows], self.x)
        f, g = np.sqrt(first), np.sqrt(1 - first)
        unit = self.unit[index]
        self.level[rows] += 1
        self.place[rows] *= 2
        missing = int(self.level[rows].max()) + 1 - len(self.later)
        if missing > 0:
            self.later = torch.cat([self.later, self.later.new_zeros(missing, *self.x.shape)])
        self.unit[index] = _times(f, unit) + _times(g, fresh)
        self.later[torch.from_numpy(self.level[rows]), index] = _times(g, unit) - _times(f, fresh)

    def _first_part(self, start: Points, middle: Points, end: Points) -> Array:
        """`(V_m - V_s) / (V_e - V_s)`, the part of the variance that is in the first half."""
        s, m, e = (self._log_v(at) for at in (start, middle, end))
        return np.exp(m - e) * np.expm1(s - m) / np.expm1(s - e)

    def _log_v(self, at: Points) -> Array:
        with np.errstate(divide="ignore", over="ignore"):
            return -(self.noise_level**2) * np.log1p((at.sigma / (self.splitting.sigma_data * at.alpha)) ** 2)

    def _turn(self, rows: Rows) -> None:
        """Move some rows to the interval that comes next, the longest that has not been halved."""
        after = self.place[rows] + 1
        up = np.frexp((after & -after).astype(float))[1] - 1
        self.level[rows] -= up
        self.place[rows] = after >> up
        index = torch.from_numpy(rows)
        self.unit[index] = self.later[torch.from_numpy(self.level[rows]), index]

    def _value(self, model: ScoreModel, t: Tensor, x: State) -> State:
        return model.combine(t, x, *self.splitting.value(*self.sde.scales_at(t)))


@dataclass(frozen=True)
class _Numbers:
    """The normal numbers of every row: a key, and a sign, so that they are an odd function of what they are made of."""

    keys: Words
    signs: Array

    @classmethod
    def of(cls, noise: NoiseStream, x: State) -> _Numbers:
        draw = noise.normal(torch.empty(x.shape, dtype=torch.float64)).reshape(len(x), -1).numpy()
        bits = np.abs(draw).view(np.uint64)
        odd = 2 * np.arange(bits.shape[1], dtype=np.uint64) + 1
        return cls((bits * odd).sum(1), np.copysign(1.0, draw[:, 0]))

    def __call__(self, rows: Rows, target: int, place: Rows, x: State) -> State:
        """Numbers for some rows of x, each at a place of its own in the table of a target."""
        shape = x.shape[1:]
        numbers = keyed_normals(self.keys[rows], place, target, shape.numel())
        return torch.from_numpy(self.signs[rows, None] * numbers).reshape(len(rows), *shape).to(x)


def _times(c: Array, x: State) -> State:
    return over(torch.from_numpy(c), x) * x
