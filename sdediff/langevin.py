r"""Langevin corrections between the steps of any solver.

At a fixed time, `x <- x + h score(t, x) + sqrt(2 h) z` pulls a state that has drifted from `p_t` back to it. Song et
al. choose `h = 2 (snr |z| / |score|)^2` with norms averaged over the batch. The norm of the score is that of
`z / sigma` for a typical state, so the step here is

    h = 2 (snr sigma(t))^2,

the same in expectation, but a function of the time only: rows do not interact, no grid is assumed, and the effect on
Gaussian data is an exact linear recursion.

Reference: Song et al. 2021 (arXiv:2011.13456), algorithms 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, model_of


@dataclass(frozen=True)
class Langevin:
    """A corrector: `steps` Langevin moves of size `h = 2 (snr sigma(t))^2`, one network call each.

    Args:
        snr: Song's signal-to-noise ratio of a move, > 0; 0.16 is his choice for VE and VP.
        steps: moves at every time, >= 1.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        if not self.snr > 0 or self.steps < 1:
            raise OptionError(f"Langevin needs snr > 0 and steps >= 1; got snr = {self.snr}, steps = {self.steps}.")

    def correct(self, model: ScoreModel, t: Tensor, x: State, noise: NoiseStream) -> State:
        """The state after the moves at time t, `()` or `(batch,)`."""
        size = 2 * (self.snr * model.linear.sigma(t)) ** 2
        for _ in range(self.steps):
            x = x + over(size, x) * model.score(t, x) + over((2 * size).sqrt(), x) * noise.normal(x)
        return x


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A step of any solver, then Langevin moves at the time it arrived at.

    Args:
        predictor: the solver that moves in time (not an adaptive one, whose steps are not the grid's).
        corrector: the moves at fixed time.
    """

    predictor: Solver
    corrector: Langevin = Langevin()
    default_steps: ClassVar[int] = 100

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise OptionError(f"The predictor must be a Solver such as EulerMaruyama(); got {self.predictor!r}.")
        if not isinstance(self.corrector, Langevin):
            raise OptionError(f"The corrector must be a Langevin(...); got {self.corrector!r}.")

    @property
    def noise_level(self) -> float:  # type: ignore[override]  # the predictor's
        return self.predictor.noise_level

    @property
    def deterministic(self) -> bool:
        return False

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        model = model_of(process, self)
        predict = self.predictor.start(process, x, times, noise)
        return lambda i, x: self.corrector.correct(model, times[i + 1], predict(i, x), noise)
