r"""Hooks on the denoised prediction: models whose `E[x_0 | x]` is changed before anything is made of it.

`map_denoised(model, change)` is again a model, one that predicts data; every solver takes it. Two changes are common
for data in a known range: `clamp_denoised` cuts to it, `dynamic_threshold` also shrinks rows that overshoot (Saharia
et al. 2022, arXiv:2205.11487): with q the given quantile of `|x_0|` over the entries of a row and `l` the limit,

    x_0 <- clamp(x_0, -m, m) l / m,   m = max(q, l).

A clamped model is no longer the score of any density, and its likelihood means little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.shapes import State, over
from sdediff.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class _Mapped(Wrapped):
    """`change` of the model's denoised data."""

    change: Callable[[State], State]

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        return self.change(self.model.denoised(t, x, condition=condition))


def map_denoised(model: ScoreModel, change: Callable[[State], State]) -> ScoreModel:
    """The model with `change(E[x_0 | x])`, `(batch, *event)` to the same shape, in place of its denoised data."""
    return model.wrapped(_Mapped(model, change), "data")


def clamp_denoised(model: ScoreModel, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """The model with its denoised data cut to `[low, high]`."""
    if not low < high:
        raise OptionError(f"clamp_denoised needs low < high; got low = {low}, high = {high}.")
    return map_denoised(model, lambda x: x.clamp(low, high))


def dynamic_threshold(model: ScoreModel, quantile: float = 0.995, limit: float = 1.0) -> ScoreModel:
    """The model with its denoised data thresholded row by row, for data in `[-limit, limit]`."""
    if not (0 < quantile <= 1 and limit > 0):
        raise OptionError(f"dynamic_threshold needs 0 < quantile <= 1 and limit > 0; got {quantile} and {limit}.")

    def change(x: State) -> State:
        size = x.abs().reshape(x.shape[0], -1).to(torch.promote_types(x.dtype, torch.float32))
        most = torch.quantile(size, quantile, dim=1).clamp(min=limit)
        bound = over(most, x)
        return torch.minimum(torch.maximum(x, -bound), bound) * (limit / bound)

    return map_denoised(model, change)
