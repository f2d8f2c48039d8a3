r"""Methods that step by drift and diffusion: Euler-Maruyama, Runge-Kutta methods and Heun in EDM's form.

Euler-Maruyama, weak order 1 (and strong order 1, the noise being additive):

    x_s = x_t + f(t, x_t) (s - t) + g(t) (W(s) - W(t)).

An explicit Runge-Kutta method, for processes without noise, from t to s = t + h:

    k_i = f(t + c_i h, x + h sum_{j < i} a_ij k_j),        x_s = x_t + h sum_i b_i k_i.

Its order is p if `sum_i b_i Phi_i(tree) = 1 / gamma(tree)` for every rooted tree of at most p vertices (Butcher). A
pair has second weights; the difference `error = b - b_hat` estimates the error of a step.

`Heun` takes the probability-flow ODE in the variables of Karras et al., `y = x / alpha` against `u = sigma / alpha`,
where it is `dy / du = E[eps | x]` for every linear SDE; the schedule has dropped out:

    k_1 = eps(x_t),   k_2 = eps(x_s'),   y_s' = y_t + (u_s - u_t) k_1,   y_s = y_t + (u_s - u_t) (k_1 + k_2) / 2.

Where sigma reaches 0 the step is `y_s'`, a single call. With churn, every step first raises u by the factor
`1 + gamma`, `gamma = min(churn / steps, sqrt(2) - 1)`, by moving back in time along the forward process, and steps
from there. A process that has no such variables is solved in x and t.

References: Kloeden and Platen 1992; Hairer, Norsett and Wanner 1993, II.1-II.5; Bogacki and Shampine 1989; Dormand and
Prince 1980; Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sdediff.errors import CapabilityError, OptionError
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State
from sdediff.solvers import Solver, Step, euler_steps, model_of, refuse_noise, refuse_singular_start


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on any process; at noise level 0, Euler's method on the probability-flow ODE."""

    noise_level: float = 1.0

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_singular_start(process, x, times, self)
        return euler_steps(process, times, noise)


@dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta method.

    Attributes:
        name: what it is called.
        order: the largest p whose order conditions hold.
        a: row i holds the i weights of the earlier slopes in stage i; the first row is empty.
        b: the weights of the slopes in the step.
        c: the times of the stages, as parts of the step; the sums of the rows of a.
        error: `b - b_hat` of an embedded pair.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...] = field(repr=False)
    b: tuple[float, ...] = field(repr=False)
    c: tuple[float, ...] = field(repr=False)
    error: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        stages = len(self.b)
        shapes = [len(row) for row in self.a], len(self.c), len(self.error or self.b)
        if shapes != (list(range(stages)), stages, stages):
            raise OptionError(
                f"The tableau {self.name!r} has {stages} weights b, so it needs rows a of 0, 1, ..., {stages - 1} "
                f"entries and {stages} times c (and as many weights of the error, if any); got {shapes[0]}, "
                f"{shapes[1]} and {shapes[2]}."
            )
        sums = [(c, sum(row)) for c, row in zip(self.c, self.a, strict=True)]
        sums += [(1.0, sum(self.b)), (0.0, sum(self.error or ()))]
        for wanted, got in sums:
            if not abs(wanted - got) < 1e-12:
                raise OptionError(
                    f"In the tableau {self.name!r} every row of a must sum to its c, b to 1 and the error to 0; one of "
                    f"them sums to {got:.12g} in place of {wanted:.12g}."
                )

    @property
    def fsal(self) -> bool:
        """Whether the last slope is the first of the next step."""
        return self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    @property
    def calls(self) -> int:
        """Number of stages that the step itself needs; what comes after them serves the error only."""
        return max(i for i, weight in enumerate(self.b) if weight) + 1


MIDPOINT = Tableau("midpoint", 2, a=((), (1 / 2,)), b=(0, 1), c=(0, 1 / 2))
HEUN = Tableau("heun", 2, a=((), (1,)), b=(1 / 2, 1 / 2), c=(0, 1))
RALSTON = Tableau("ralston", 2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0, 2 / 3))
KUTTA3 = Tableau("kutta3", 3, a=((), (1 / 2,), (-1, 2)), b=(1 / 6, 2 / 3, 1 / 6), c=(0, 1 / 2, 1))
RK4 = Tableau("rk4", 4, a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0, 1 / 2, 1 / 2, 1))
BOGACKI_SHAMPINE = Tableau(
    "bosh3",
    3,
    a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0),
    c=(0, 1 / 2, 3 / 4, 1),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)
DORMAND_PRINCE = Tableau(
    "dopri5",
    5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

TABLEAUS = {
    tableau.name: tableau for tableau in (MIDPOINT, HEUN, RALSTON, KUTTA3, RK4, BOGACKI_SHAMPINE, DORMAND_PRINCE)
}
"""The tableaus that `RungeKutta` knows by name."""


def moved(x: State, length: float, weights: Sequence[float], slopes: Sequence[State]) -> State:
    """`x + length sum_j weights_j slopes_j`."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x.add(slope, alpha=length * weight)
    return x


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit Runge-Kutta method in t, on any process without noise, in either direction of time.

    Args:
        tableau: "midpoint", "heun", "ralston", "kutta3", "rk4", "bosh3" or "dopri5" (both with fixed steps), or a
            `Tableau`.
    """

    tableau: str | Tableau = "rk4"
    noise_level: float = field(default=0.0, init=False, repr=False)
    default_steps: ClassVar[int] = 50

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, Tableau) and self.tableau not in TABLEAUS:
            raise OptionError(
                f"Unknown tableau {self.tableau!r}: write a Tableau(...) or one of {', '.join(map(repr, TABLEAUS))}."
            )

    @property
    def coefficients(self) -> Tableau:
        """The tableau itself."""
        return self.tableau if isinstance(self.tableau, Tableau) else TABLEAUS[self.tableau]

    @property
    def order(self) -> int:  # type: ignore[override]  # the tableau's
        return self.coefficients.order

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_noise(process, self)
        method = self.coefficients
        n, rows, weights = method.calls, method.a[: method.calls], method.b[: method.calls]
        parts = torch.tensor(method.c[:n], dtype=torch.float64)
        # A stage at the end of the step is at the next time itself, not a rounding beyond the end of the grid.
        stages = torch.lerp(times[:-1, None], times[1:, None], parts.to(times.device))
        drift = process.along(stages.flatten()).drift
        lengths = times.diff().tolist()

        def step(i: int, x: State) -> State:
            slopes: list[State] = []
            for j, row in enumerate(rows):
                slopes.append(drift(i * n + j, moved(x, lengths[i], row, slopes)))
            return moved(x, lengths[i], weights, slopes)

        return step


@dataclass(frozen=True)
class Heun(Solver):
    """EDM's sampler: Heun's method in sigma / alpha, two network calls a step, order 2.

    It solves any process without noise; one that is not the flow of a linear SDE, in its own x and t.

    Args:
        churn: EDM's S_churn >= 0; 0 is the deterministic method. A raised noise level is held at that of `t_max`.
    """

    churn: float = 0.0
    noise_level: float = field(default=0.0, init=False)
    default_steps: ClassVar[int] = 50
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.churn >= 0:
            raise OptionError(f"Heun needs churn >= 0; got {self.churn}.")

    @property
    def deterministic(self) -> bool:
        return self.churn == 0

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_noise(process, self)
        if not self.churn:
            return _heun_steps(process, times[:-1], times[1:])
        if times[-1] > times[0]:
            raise CapabilityError("Heun's churn adds noise on the way from noise to data; use Heun() to encode.")
        sde = model_of(process, self).linear
        gamma = min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        noisier = (sde.log_snr(times[:-1]) - 2 * math.log1p(gamma)).clamp(min=sde.log_snr(sde.t_max).item())
        starts = sde.time(noisier).maximum(times[:-1])
        heun = _heun_steps(process, starts, times[1:])
        scales, jitters = (column.tolist() for column in sde.transition(times[:-1], starts))
        return lambda i, x: heun(i, (scales[i] * x).add(noise.normal(x), alpha=jitters[i]))


def _heun_steps(process: SDE, starts: Grid, ends: Grid) -> Step:
    """Heun's method from `starts[i]` to `ends[i]`, in the variables of the process's frame."""
    n = len(starts)
    times = torch.cat([starts, ends])
    frame = process.frame(times)
    endless = ~frame.clock.isfinite()
    if bool(endless.any()):
        raise CapabilityError(
            f"Heun steps in sigma / alpha, which is infinite at t = {times[endless][0]:g}, where alpha is 0: give "
            "times= that stay below, or take DDIM(), or RungeKutta('heun'), which steps in t."
        )
    if not bool(frame.defined[:n].all()):
        raise CapabilityError(
            f"Heun cannot start at t = {starts[~frame.defined[:n]][0]:g}, where sigma is 0 and the state holds no "
            "noise to predict: give times= that start later."
        )
    keep = (frame.scale[n:] / frame.scale[:n]).tolist()
    lengths = (frame.scale[n:] * (frame.clock[n:] - frame.clock[:n])).tolist()
    defined = frame.defined[n:].tolist()

    def step(i: int, x: State) -> State:
        kept = keep[i] * x
        first = frame.drift(i, x)
        ahead = kept.add(first, alpha=lengths[i])
        if not defined[i]:
            return ahead
        return kept.add(first.add(frame.drift(n + i, ahead)), alpha=lengths[i] / 2)

    return step
