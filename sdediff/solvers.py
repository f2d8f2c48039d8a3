r"""What a solver is, and the one loop.

A solver is a frozen recipe. `start(process, x, times, noise)` prepares whatever depends on the process and the grid
only (coefficient tables, a backend's own objects) and returns the step: a function of the index i and the state at
`times[i]` that gives the state at `times[i + 1]`. `solve` is the loop over it. Memory of a multistep method lives in
the step, never in the solver, so that a solver may be reused, pickled and shared.

The process is any SDE: a `Reverse` (times fall), an augmented process such as the likelihood's (times rise), or a
forward SDE. A solver that needs more than drift and diffusion says so in a sentence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdediff.errors import CapabilityError
from sdediff.grids import natural
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.reverse import Reverse
from sdediff.sde import SDE, is_fixed
from sdediff.shapes import Grid, State, over

Step = Callable[[int, State], State]
"""`(i, state at times[i]) -> state at times[i + 1]`."""


@dataclass
class Tally:
    """What an adaptive solver did; None for a solver that takes the grid's steps.

    Attributes:
        accepted, rejected: steps, `(batch,)` of a solver with steps for every row, or one number for all rows.
        nfe: network evaluations of every row, `(batch,)`.
        reached: the time that every row has come to, `(batch,)`.
    """

    accepted: Tensor | int | None = None
    rejected: Tensor | int | None = None
    nfe: Tensor | None = None
    reached: Tensor | None = None


def merged(tallies: list[Tally]) -> Tally:
    """The tally of a batch from those of its chunks: numbers are summed, rows are joined."""

    def join(parts: list[Any]) -> Any:
        if parts[0] is None:
            return None
        return torch.cat(parts) if isinstance(parts[0], Tensor) else sum(parts)

    return Tally(*(join([getattr(tally, f.name) for tally in tallies]) for f in fields(Tally)))


class Solver(ABC):
    """A numerical method for `Reverse` processes (and, where it can, for any SDE).

    Attributes:
        noise_level: the lambda of the process it solves when it is given a model.
        default_steps: number of steps that `sample` takes when told nothing.
        order: the rate at which the error of deterministic solutions falls with the step, or of moments, if noisy.
    """

    noise_level: float
    default_steps: ClassVar[int] = 100
    order: ClassVar[int] = 1

    @property
    def deterministic(self) -> bool:
        """Whether it draws no noise, so that its path can be followed back."""
        return self.noise_level == 0

    def process(self, model: ScoreModel) -> Reverse:
        """The process that this solver solves for a model."""
        return Reverse(model, self.noise_level)

    def grid(self, model: ScoreModel, steps: int, t_min: float | None = None) -> Grid:
        """The grid that `sample` gives this solver when it is told a number of steps, falling."""
        return natural(model.sde, steps, t_min=t_min)

    @property
    def fixed(self) -> bool:
        """Whether equal solvers make equal grids and tables, so that they may be kept; said as `SDE.fixed` is."""
        return is_fixed(self)

    @abstractmethod
    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        """Prepare for the grid `times` and states like `x`; return the step."""

    def solve(
        self, process: SDE, x: State, times: Grid, noise: NoiseStream, tally: Tally | None = None
    ) -> Iterator[State]:
        """The states at `times[1:]`, one after the other, from the state `x` at `times[0]`.

        An adaptive solver adds its accepted and rejected steps to the tally.
        """
        step = self.start(process, x, times, noise)
        for i in range(len(times) - 1):
            x = step(i, x)
            yield x


def model_of(process: SDE, solver: Solver) -> ScoreModel:
    """The model behind a process.

    Raises:
        CapabilityError: the process is not the reverse of a model's SDE.
    """
    if not isinstance(process, Reverse):
        raise CapabilityError(
            f"{type(solver).__name__} works from a model's prediction and solves Reverse(model, ...) only; got "
            f"{type(process).__name__}. For other processes use EulerMaruyama, Heun, TorchDiffEq or TorchSDE."
        )
    return process.model


def refuse_noise(process: SDE, solver: Solver) -> None:
    """Refuse a noisy process.

    Raises:
        CapabilityError: the process has noise.
    """
    if process.noisy:
        raise CapabilityError(
            f"{type(solver).__name__} solves ordinary differential equations and would drop the noise of this process: "
            "use Reverse(model, noise_level=0), or a stochastic solver such as EulerMaruyama or TorchSDE."
        )


def refuse_singular_start(process: SDE, x: State, times: Grid, solver: Solver) -> None:
    """Refuse a noisy reverse process that starts from pure noise, where alpha = 0 and g is infinite.

    Raises:
        CapabilityError: it does.
    """
    if isinstance(process, Reverse) and process.noisy and not process.diffusion(times[0], x[:1]).isfinite().all():
        raise CapabilityError(
            f"The diffusion of {process.sde} is infinite at t = {times[0]:g}, where alpha is 0. {solver} "
            "cannot start there: give times= that start below, or use DDPM() or DDIM(eta), which are exact there."
        )


def euler_steps(process: SDE, times: Grid, noise: NoiseStream) -> Step:
    """`x + f(t, x) (s - t) + g(t, x) (W(s) - W(t))` for every step from t to s of a grid."""
    along = process.along(times)
    lengths = times.diff().tolist()

    def step(i: int, x: State) -> State:
        after = x.add(along.drift(i, x), alpha=lengths[i])
        if process.noisy:
            after = after + over(along.diffusion(i, x), x) * noise.increment(x, times[i], times[i + 1])
        return after

    return step
