"""The probability-flow ODE and the integral of its divergence as one process, which any solver of drifts can take.

A row is the state, flat, followed by one integral for each estimate of the divergence. The probes are fixed for the
whole solve, so that the right-hand side is smooth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdediff.divergence import Divergence
from sdediff.model import ScoreModel
from sdediff.sde import SDE
from sdediff.shapes import State
from sdediff.wrapped import Count, evaluations


def flat(x: State) -> State:
    """Rows of entries, `(batch, size)`."""
    return x.reshape(x.shape[0], -1)


class WithLogDensity(SDE):
    """The probability-flow ODE with the integrals of its divergence as extra entries of every row."""

    def __init__(self, model: ScoreModel, divergence: Divergence, vectors: Tensor, event: tuple[int, ...]) -> None:
        self.model = model
        self.divergence = divergence
        self.vectors = vectors
        self.event = event
        self.t_min, self.t_max = model.sde.t_min, model.sde.t_max

    @property
    def noisy(self) -> bool:
        return False

    def rows(self, index: Tensor, batch: int) -> WithLogDensity:
        vectors = self.vectors[:, index.to(self.vectors.device)] if self.divergence.random else self.vectors
        return WithLogDensity(self.model.rows(index, batch), self.divergence, vectors[:, : len(index)], self.event)

    def evaluations(self, t: Tensor) -> Count:
        return evaluations(self.model.network, t)

    def coefficients(self, t: Tensor, y: State) -> tuple[State, float]:
        return self.drift(t, y), 0.0

    def drift(self, t: Tensor, y: State) -> State:
        size = math.prod(self.event)

        def field(x: State) -> tuple[State, Tensor]:
            return self.model.velocity(t, x), x

        with torch.no_grad():
            expansion = self.divergence.expand(field, y[:, :size].reshape(-1, *self.event))
            estimates = self.divergence.estimate(expansion, self.vectors)
        return torch.cat([flat(expansion.value), estimates.T], dim=1)

    def diffusion(self, t: Tensor, y: State) -> float:
        return 0.0
