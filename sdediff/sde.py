r"""Stochastic differential equations.

An SDE is `dx = f(t, x) dt + g(t, x) dw` with data at t = 0 and noise at `t_max`. The noise is additive: g is a number,
one number per row, or one per entry, and does not depend on the state (Ito and Stratonovich then agree). Drift and
diffusion are enough to simulate it; if the drift is linear in x, `sdediff.linear` derives everything else.

References: Song et al., Score-Based Generative Modeling through SDEs, 2021 (arXiv:2011.13456); Sarkka and Solin,
Applied Stochastic Differential Equations, 2019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from sdediff.errors import CapabilityError, TimeError
from sdediff.noise import RowNoise
from sdediff.shapes import Grid, State, Trajectory, as_float64, as_time, check_state, over, per_row

if TYPE_CHECKING:
    from sdediff.linear import LinearSDE
    from sdediff.model import ScoreModel

SLACK = 1e-6
"""How far beyond its span, relative to t_max, a time may lie: the rounding of float32 clocks."""


@dataclass(frozen=True)
class Along:
    """A process at the times of a grid: `drift(k, x)` and `diffusion(k, x)` are those at `times[k]`."""

    drift: Callable[[int, State], State]
    diffusion: Callable[[int, State], Tensor | float]


@dataclass(frozen=True)
class Frame:
    """The drift of a process in variables that suit it: `x = scale y` and `dy = drift(k, x) d clock` at `times[k]`.

    Attributes:
        scale, clock: float64, one for every time.
        defined: whether the drift exists at that time.
        drift: `(k, x) -> dy / d clock` at `times[k]`.
    """

    scale: Grid
    clock: Grid
    defined: Tensor
    drift: Callable[[int, State], State]

    @classmethod
    def plain(cls, times: Grid, drift: Callable[[int, State], State]) -> Frame:
        """The variables x and t themselves."""
        return cls(torch.ones_like(times), times, torch.ones_like(times, dtype=torch.bool), drift)


class SDE(ABC):
    """A forward process `dx = f(t, x) dt + g(t, x) dw` on `[t_min, t_max]`.

    Override `drift` and `diffusion`; set the class attributes below where the defaults do not fit. Both are written
    for one time, `t` of shape `()`, and states `x` of shape `(batch, *event)`: `return -(1 + t) * x` is right for any
    event. Where rows have times of their own, `coefficients` calls them row by row.

    Attributes:
        t_min: where solvers stop on the data side (> 0 where the score is singular at 0).
        t_max: the noise end.
        initial_std: standard deviation of the blur that the state already has at t = 0.
    """

    t_min: float = 1e-5
    t_max: float = 1.0
    initial_std: float = 0.0

    @abstractmethod
    def drift(self, t: Tensor, x: State) -> State:
        """`f(t, x)` at one time `()`, shaped as x."""

    @abstractmethod
    def diffusion(self, t: Tensor, x: State) -> Tensor | float:
        """`g(t, x)` at one time `()`: a number, `(batch,)`, or shaped as x. It must not depend on the value of x."""

    def coefficients(self, t: Tensor, x: State) -> tuple[State, Tensor | float]:
        """Drift and diffusion together, for times `()` or `(batch,)`; override where they share work."""
        if t.ndim == 0:
            return self.drift(t, x), self.diffusion(t, x)
        per_row(t, x)

        def one_row(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            diffusion = as_float64(self.diffusion(t, x[None]))
            return self.drift(t, x[None])[0], diffusion.reshape(() if diffusion.numel() == 1 else x.shape)

        try:
            return torch.vmap(one_row)(t, x)
        except (RuntimeError, TypeError, ValueError):  # code that needs the numbers themselves, such as float(t)
            rows = [one_row(*pair) for pair in zip(t, x, strict=True)]
            return torch.stack([drift for drift, _ in rows]), torch.stack([diffusion for _, diffusion in rows])

    def along(self, times: Grid) -> Along:
        """The process at the times of a grid; override where what depends on time only can be computed at once."""
        return Along(lambda k, x: self.drift(times[k], x), lambda k, x: self.diffusion(times[k], x))

    def frame(self, times: Grid) -> Frame:
        """The drift at the times of a grid in the variables that suit it best."""
        return Frame.plain(times, self.along(times).drift)

    @property
    def fixed(self) -> bool:
        """Whether solvers may keep grids and tables they made for this process and use them for equal ones.

        A class says so by `_fixed = True` of its own, which its subclasses do not inherit: it is a frozen dataclass,
        and equal instances are the same process. It holds where all fields are plain numbers.
        """
        return is_fixed(self)

    def rows(self, index: Tensor, batch: int) -> SDE:
        """This process for some rows of a batch, where rows have something of their own."""
        return self

    def evaluations(self, t: Tensor) -> int | Tensor:
        """Network evaluations of a call of the coefficients at times `(batch,)`, as `sdediff.wrapped` counts them."""
        return 1

    @property
    def noisy(self) -> bool:
        """Whether the process has noise at all; a solver draws none where it has not."""
        return True

    def linear(self) -> LinearSDE:
        """This SDE as a linear one; see `as_linear`."""
        from sdediff.linear import Linearized  # the general SDE does not need it otherwise

        return Linearized(self)

    def reverse_drift(self, t: Tensor, x: State, model: ScoreModel, noise_level: float) -> State:
        """Drift of the equal-marginal process `f - (1 + noise_level^2) / 2 g^2 score`."""
        drift, diffusion = self.coefficients(t, x)
        return drift - over((1 + noise_level**2) / 2 * as_float64(diffusion) ** 2, x) * model.score(t, x)

    def reverse_along(self, times: Grid, model: ScoreModel, noise_level: float) -> Callable[[int, State], State]:
        """`(k, x) -> reverse_drift(times[k], x, model, noise_level)` for the times of a grid."""
        return lambda k, x: self.reverse_drift(times[k], x, model, noise_level)

    def reverse_frame(self, times: Grid, model: ScoreModel, noise_level: float) -> Frame:
        """The same drift in the variables that suit it best."""
        return Frame.plain(times, self.reverse_along(times, model, noise_level))

    def clock(self, t: Tensor) -> Tensor:
        """A rising function of t in which even steps suit the process: t itself, or -log SNR where that is known."""
        return t

    def unclock(self, u: Tensor) -> Tensor:
        """The inverse of `clock`."""
        return u

    def check_span(self, t: Tensor, what: str = "t") -> None:
        """Refuse times outside `[0, t_max]`.

        Raises:
            TimeError: some time lies outside, or is NaN.
        """
        slack = SLACK * self.t_max
        inside = (t >= -slack) & (t <= self.t_max + slack)
        if not bool(inside.all()):
            wrong = t.reshape(-1)[~inside.reshape(-1)][0].item()
            raise TimeError(f"{what} = {wrong:g} lies outside the span [0, {self.t_max:g}] of {self}.")

    def prior(self, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Distribution:
        """The distribution of `x_T` over events of this shape, if the process has one in closed form.

        Raises:
            CapabilityError: a general SDE has none; pass `x_init` instead, for instance from `simulate`.
        """
        raise CapabilityError(
            f"{self} has no closed-form prior: pass x_init, for instance the last state of sde.simulate(data, times)."
        )

    def advance(self, s: Tensor, t: Tensor, x: State, normal: State) -> State:
        """One step of the process from s to t with standard normal numbers: Euler-Maruyama, unless exact is known."""
        drift, diffusion = self.coefficients(s, x)
        return x + over(t - s, x) * drift + over(diffusion, x) * over((t - s).abs().sqrt(), x) * normal

    @torch.no_grad()
    def simulate(self, x0: State, times: Tensor, seed: int | None = None) -> Trajectory:
        """Paths of the process through `times`, started from `x0` at `times[0]`.

        A general SDE moves by Euler-Maruyama, a linear SDE by its exact transition kernel.

        Args:
            x0: states `(batch, *event)` at `times[0]`.
            times: increasing times `(n + 1,)` in `[0, t_max]`.
            seed: row i depends on it and on i only; None draws one from torch's global generator.

        Returns:
            States `(n + 1, batch, *event)`, the first of which is x0.
        """
        check_state(x0, "x0")
        times = as_time(times)
        check_grid(times, direction=1)
        self.check_span(times, "times")
        stream = RowNoise(fresh_seed() if seed is None else seed).open()
        path = [x0]
        for s, t in pairwise(times):
            path.append(self.advance(s, t, path[-1], stream.unit(x0, s, t)))
        return torch.stack(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def is_fixed(thing: object) -> bool:
    """Whether a frozen dataclass that says `_fixed` holds plain values only, or what is fixed itself."""

    def fine(value: object) -> bool:
        if type(value) is tuple:
            return all(map(fine, value))
        return value is None or type(value) in (int, float, bool, str) or is_fixed(value)

    if not type(thing).__dict__.get("_fixed", False):
        return False
    return all(fine(getattr(thing, field)) for field in type(thing).__dataclass_fields__)  # type: ignore[attr-defined]  # a dataclass


def fresh_seed() -> int:
    """A seed from torch's global generator, so that `torch.manual_seed` governs whatever has no seed of its own."""
    return int(torch.randint(2**62, ()).item())


def check_grid(times: Tensor, *, direction: int) -> None:
    """Refuse a grid that is not one strictly monotone row of at least two times.

    Raises:
        TimeError: with the first offending pair.
    """
    word = "increasing" if direction > 0 else "decreasing"
    if times.ndim != 1 or len(times) < 2:
        raise TimeError(f"times must be a {word} row of at least two times; got shape {tuple(times.shape)}.")
    wrong = ~(direction * times.diff() > 0)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise TimeError(
            f"times must be strictly {word}; "
            f"times[{i}] = {times[i]:g} is followed by times[{i + 1}] = {times[i + 1]:g}."
        )
