r"""Step sizes chosen row by row.

`Adaptive` solves the probability-flow ODE of a model by the predictor-corrector pairs of `sdediff.adams`, with a time,
a step, an order and a history of its own for every row. The corrector minus the predictor, which costs nothing, is the
estimate of the error of a step, in the norm

    |e| = sqrt(mean_j (e_j / (atol + rtol |x_j|))^2).

Errors and states are measured in units of data, `c x / sqrt(c^2 alpha^2 + sigma^2)`: in this frame a perturbation keeps
its size on Gaussian data, so that a tolerance is about what it does to the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sdediff.adams import QUADRATURE, AdamsRows, Pair, Rows
from sdediff.embedded import norm
from sdediff.errors import CapabilityError, OptionError
from sdediff.exponential import Array, split_for
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, Tally, model_of, refuse_noise


@dataclass(frozen=True)
class Adaptive(Solver):
    """The probability-flow ODE to a tolerance, every row with steps of its own.

    Args:
        rtol, atol: error allowed in a step, in units of data, relative and absolute.
        max_nfe: network evaluations a row may take; one that runs out stays where it is; `Solution.reached` says where.
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


class _Rows(AdamsRows):
    """Rows whose error is measured in units of data."""

    def __init__(self, solver: Adaptive, model: ScoreModel, x: State, times: Grid) -> None:
        splitting = split_for(model, solver.sigma_data or model.deviation, QUADRATURE)
        super().__init__(model, x, times, splitting, max_order=solver.max_order, max_nfe=solver.max_nfe)
        self.solver = solver
        self.values[0] = self.evaluate(model, np.arange(len(x)), self.t, x)

    def evaluate(self, model: ScoreModel, rows: Rows, t: Tensor, x: State) -> State:
        return model.combine(t, x, *self.splitting.value(*self.sde.scales_at(t)))

    def errors(self, pair: Pair) -> tuple[Array, Array]:
        c, end, new = self.splitting.sigma_data, pair.end, pair.new
        scale = over(torch.from_numpy(c / np.hypot(c * end.alpha, end.sigma)), new)
        allowed = self.solver.atol + self.solver.rtol * (scale * torch.maximum(pair.x.abs(), new.abs()))
        return norm(scale * (new - pair.predicted) / allowed), norm(scale * (new - pair.below) / allowed)
