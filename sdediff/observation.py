r"""Observation models p(x | z_1) of a VAE: a density of continuous data, or probabilities of integer codes.

A decoder returns parameters, of any kind, and an observation model reads them:

| model | the decoder returns | `log_prob` |
|---|---|---|
| `GaussianLikelihood` | `(mean, std)` | `sum log N(x; mean, std^2)` |
| `CategoricalLikelihood` | logits, `(batch, *event, levels)` | `sum log softmax(logits)[code of x]` |

A log-probability of codes is at most 0 and compares with bits per dimension of other models of codes; a log-density
of the same numbers does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.gaussians import gaussian_of
from sdediff.shapes import PerRow, State, sum_rows


class Likelihood(Protocol):
    """p(x | z_1), for whatever the last decoder returns."""

    def log_prob(self, params: Any, x: State) -> PerRow:
        """Log-density or log-probability of x in nats, `(batch,)`."""

    def mean(self, params: Any) -> State:
        """`E[x | z_1]`, `(batch, *event)`."""

    def draw(self, params: Any, normal: State) -> State:
        """A draw of x from standard normal numbers shaped as its mean."""


@dataclass(frozen=True)
class GaussianLikelihood:
    """A density of continuous data, for a decoder that returns `(mean, std)` as all others."""

    def log_prob(self, params: Any, x: State) -> PerRow:
        return gaussian_of(params, "decoder[0]", x).log_prob(x)

    def mean(self, params: Any) -> State:
        return gaussian_of(params, "decoder[0]").mean

    def draw(self, params: Any, normal: State) -> State:
        return gaussian_of(params, "decoder[0]", normal).draw(normal)


@dataclass(frozen=True)
class CategoricalLikelihood:
    """Probabilities of integer codes, for a decoder that returns logits `(batch, *event, levels)`.

    A code c is any point of its bin `[-1 + 2 c / levels, -1 + 2 (c + 1) / levels)`, so that data may be the bins'
    centres `-1 + (2 c + 1) / levels` as well as points spread over them. Means and draws are centres.

    Raises:
        OptionError: fewer than 2 levels, or data outside [-1, 1].
        ShapeError: logits of another shape.
    """

    levels: int

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or self.levels < 2:
            raise OptionError(f"CategoricalLikelihood needs a whole number of levels >= 2; got {self.levels!r}.")

    def log_prob(self, params: Any, x: State) -> PerRow:
        if self._logits(params).shape[:-1] != x.shape:
            raise ShapeError(
                f"decoder[0] must return logits of shape {(*x.shape, self.levels)}; got {tuple(params.shape)}."
            )
        if not bool((x.abs() <= 1).all()):
            raise OptionError(
                f"Codes lie in [-1, 1], at -1 + (2 c + 1) / {self.levels}; got {x.min().item():g} to "
                f"{x.max().item():g}."
            )
        place = (x.double() + 1) / 2 * self.levels
        near = place.round()
        rounding = 2 * self.levels * torch.finfo(x.dtype).eps
        codes = torch.where((place - near).abs() < rounding, near, place.floor()).long().clamp(max=self.levels - 1)
        return sum_rows(params.log_softmax(-1).gather(-1, codes[..., None])[..., 0])

    def mean(self, params: Any) -> State:
        return (self._logits(params).softmax(-1) * self._centres(params)).sum(-1)

    def draw(self, params: Any, normal: State) -> State:
        below = self._logits(params).softmax(-1).cumsum(-1)[..., :-1]
        return self._centres(params)[(torch.special.ndtr(normal)[..., None] >= below).sum(-1)]

    def _logits(self, params: Any) -> Tensor:
        if not isinstance(params, Tensor) or params.ndim < 2 or params.shape[-1] != self.levels:
            got = tuple(params.shape) if isinstance(params, Tensor) else type(params).__name__
            raise ShapeError(f"decoder[0] must return logits of shape (batch, *event, {self.levels}); got {got}.")
        return params

    def _centres(self, like: Tensor) -> Tensor:
        codes = torch.arange(self.levels, dtype=like.dtype, device=like.device)
        return -1 + (2 * codes + 1) / self.levels
