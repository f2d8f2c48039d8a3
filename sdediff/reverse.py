r"""The family of processes that share the marginals of the forward SDE.

For any `lambda >= 0`, the process that runs from `t_max` down to `t_min` by

    dx = [f - (1 + lambda^2) / 2 g^2 score] dt + lambda g dw

has the marginals `p_t` of `dx = f dt + g dw`. `lambda = 0` is the probability-flow ODE, `lambda = 1` Anderson's
reverse-time SDE; anything between or beyond is legal. For a linear SDE the drift is evaluated as

    alpha' E[x_0 | x] + (sigma' + lambda^2 g^2 / (2 sigma)) E[eps | x],

one network call, finite also where alpha reaches 0 (for lambda = 0).

References: Anderson 1982; Song et al. 2021 (arXiv:2011.13456), appendix D; Karras et al. 2022 (arXiv:2206.00364);
Zhang and Chen 2023 (arXiv:2204.13902), the lambda family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.sde import SDE, Along, Frame
from sdediff.shapes import Grid, State, as_float64
from sdediff.wrapped import Count, evaluations


@dataclass(frozen=True, eq=False)
class Reverse(SDE):
    """The equal-marginal process of a model; an SDE whose time runs from `t_max` to `t_min`.

    Args:
        model: the score, and the forward SDE.
        noise_level: lambda >= 0; 0 is the probability-flow ODE, 1 the reverse SDE.

    Raises:
        OptionError: negative noise level.
    """

    model: ScoreModel
    noise_level: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise_level >= 0:
            raise OptionError(f"noise_level must be a number >= 0; got {self.noise_level}.")

    @property
    def sde(self) -> SDE:
        """The forward process."""
        return self.model.sde

    @property
    def t_min(self) -> float:  # type: ignore[override]  # a read-only view of the forward process
        return self.sde.t_min

    @property
    def t_max(self) -> float:  # type: ignore[override]  # a read-only view of the forward process
        return self.sde.t_max

    def rows(self, index: Tensor, batch: int) -> Reverse:
        return replace(self, model=self.model.rows(index, batch))

    def evaluations(self, t: Tensor) -> Count:
        return evaluations(self.model.network, t)

    @property
    def noisy(self) -> bool:
        return self.noise_level > 0

    def coefficients(self, t: Tensor, x: State) -> tuple[State, Tensor]:
        return self.drift(t, x), self.diffusion(t, x)

    def drift(self, t: Tensor, x: State) -> State:
        return self.sde.reverse_drift(t, x, self.model, self.noise_level)

    def diffusion(self, t: Tensor, x: State) -> Tensor:
        if not self.noisy:
            return torch.zeros((), dtype=torch.float64)
        return self.noise_level * as_float64(self.sde.diffusion(t, x))

    def along(self, times: Grid) -> Along:
        drift = self.sde.reverse_along(times, self.model, self.noise_level)
        if not self.noisy:
            return Along(drift, lambda k, x: 0.0)
        diffusion = self.sde.along(times).diffusion
        return Along(drift, lambda k, x: self.noise_level * diffusion(k, x))

    def frame(self, times: Grid) -> Frame:
        return self.sde.reverse_frame(times, self.model, self.noise_level)
