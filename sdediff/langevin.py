r"""Langevin moves at fixed time: between the steps of any solver, or alone from level to level.

At a fixed time, `x <- x + h score(t, x) + sqrt(2 h) z` pulls a state that has drifted from `p_t` back to it. Song et
al. choose

    h = 2 (snr |z| / |score|)^2

with norms averaged over the batch, so that rows depend on each other. Here no row knows its batch. `LangevinByNorm` is
the rule with the norms of each row. `Langevin` puts in what the norms are for a typical state, where the score is
`-z / sigma`:

    h = 2 (snr sigma(t))^2,

a function of the time only, so that the effect on Gaussian data is an exact linear recursion. A row's own score may
be small by chance, near a mode, and its step then very large: of the two rules, the first is for events of many
entries.

Annealed Langevin dynamics (NCSN) has no other steps: at every noise level s it moves `y = x / alpha` some times with
`h = epsilon s^2 / (2 s_L^2)`, s_L being the last and `s = sigma / alpha`. In x that is the rule above with the
constant `snr = sqrt(epsilon) / (2 s_L)`.

References: Song and Ermon 2019 (arXiv:1907.05600), algorithm 1; Song et al. 2021 (arXiv:2011.13456), algorithms 4, 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sdediff.errors import CapabilityError, OptionError
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.reverse import Reverse
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over, sum_rows
from sdediff.solvers import Solver, Step, model_of

Move = Callable[[int, State], State]
"""`(k, state at times[k]) -> another state at times[k]`."""


class Corrector(ABC):
    """A recipe for moves at fixed time that leave `p_t` as it is, or nearly so."""

    @abstractmethod
    def start(self, model: ScoreModel, times: Grid, noise: NoiseStream) -> Move:
        """Prepare for the times of a grid; return the move."""


def _check(corrector: object, snr: float, steps: int) -> None:
    if not snr > 0 or steps < 1:
        name = type(corrector).__name__
        raise OptionError(f"{name} needs snr > 0 and steps >= 1; got snr = {snr}, steps = {steps}.")


@dataclass(frozen=True)
class Langevin(Corrector):
    """`steps` Langevin moves of size `h = 2 (snr sigma(t))^2`, one network call each; none where sigma is 0.

    Args:
        snr: Song's signal-to-noise ratio of a move, > 0; 0.16 is his choice for VE and VP.
        steps: moves at every time, >= 1.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        _check(self, self.snr, self.steps)

    def start(self, model: ScoreModel, times: Grid, noise: NoiseStream) -> Move:
        sigma = model.linear.sigma(times)
        # h score = -h E[eps | x] / sigma
        pull = model.combined(times, torch.zeros_like(sigma), -2 * self.snr**2 * sigma)
        jitter = (2 * self.snr * sigma).tolist()

        def move(k: int, x: State) -> State:
            for _ in range(self.steps if jitter[k] else 0):
                x = (x + pull(k, x)).add(noise.normal(x), alpha=jitter[k])
            return x

        return move


@dataclass(frozen=True)
class LangevinByNorm(Corrector):
    """`steps` Langevin moves of Song's size, `h = 2 (snr |z| / |score|)^2` with the norms of each row by itself.

    Args:
        snr: Song's signal-to-noise ratio of a move, > 0; 0.16 is his choice for VE and VP.
        steps: moves at every time, >= 1.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        _check(self, self.snr, self.steps)

    def start(self, model: ScoreModel, times: Grid, noise: NoiseStream) -> Move:
        sigma = model.linear.sigma(times)
        score = model.combined(times, torch.zeros_like(sigma), -1 / sigma)
        noisy = (sigma > 0).tolist()

        def move(k: int, x: State) -> State:
            for _ in range(self.steps if noisy[k] else 0):
                slope, z = score(k, x), noise.normal(x)
                ratio = self.snr * (sum_rows(z**2) / sum_rows(slope**2)).sqrt()
                x = x + over(2 * ratio**2, x) * slope + over(2 * ratio, x) * z
            return x

        return move


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A step of any solver, then moves at the time it arrived at.

    Args:
        predictor: the solver that moves in time (not an adaptive one, whose steps are not the grid's).
        corrector: the moves at fixed time.
    """

    predictor: Solver
    corrector: Corrector = Langevin()

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise OptionError(f"The predictor must be a Solver such as EulerMaruyama(); got {self.predictor!r}.")
        if not isinstance(self.corrector, Corrector):
            raise OptionError(f"The corrector must be a Corrector such as Langevin(...); got {self.corrector!r}.")

    @property
    def noise_level(self) -> float:  # type: ignore[override]  # the predictor's
        return self.predictor.noise_level

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def default_steps(self) -> int:  # type: ignore[override]  # the predictor's
        return self.predictor.default_steps

    def grid(self, model: ScoreModel, steps: int, t_min: float | None = None) -> Grid:
        return self.predictor.grid(model, steps, t_min)

    def process(self, model: ScoreModel) -> Reverse:
        return self.predictor.process(model)

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        correct = self.corrector.start(model_of(process, self), times, noise)
        predict = self.predictor.start(process, x, times, noise)
        return lambda i, x: correct(i + 1, predict(i, x))


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics: Langevin moves at every noise level of the grid, the first and the last included.

    From one level to the next `x / alpha` stays as it is. With n steps it makes `(n + 1) steps` network calls.

    Args:
        steps: moves at every level, >= 1; NCSN has 100, on 10 levels.
        snr: as of `Langevin`, > 0; NCSN's step size is `epsilon = (2 snr sigma / alpha)^2` at the last level.
    """

    steps: int = 100
    snr: float = 0.16
    noise_level: float = field(default=1.0, init=False, repr=False)
    default_steps: ClassVar[int] = 10

    def __post_init__(self) -> None:
        _check(self, self.snr, self.steps)

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        model = model_of(process, self)
        move = Langevin(self.snr, self.steps).start(model, times, noise)
        alpha = model.linear.alpha(times)
        if not bool((alpha[:-1] > 0).all()):
            raise CapabilityError(
                f"AnnealedLangevin keeps x / alpha from level to level, but at t = {times[0]:g} alpha is 0: give "
                "times= that start below."
            )
        scale = (alpha[1:] / alpha[:-1]).tolist()

        def step(i: int, x: State) -> State:
            return move(i + 1, scale[i] * (x if i else move(0, x)))

        return step
