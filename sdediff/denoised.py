r"""Hooks on the denoised prediction: models whose `E[x_0 | x]` is changed before anything is made of it.

`map_denoised(model, change)` is again a model, one that predicts data; every solver takes it. Two changes are common
for data in a known range: `clamp_denoised` cuts to it, `dynamic_threshold` also shrinks rows that overshoot (Saharia
et al. 2022, arXiv:2205.11487): with q the given quantile of `|x_0|` over the entries of a row and `l` the limit,

    x_0 <- clamp(x_0, -m, m) l / m,   m = max(q, l).

A clamped model is no longer the score of any density, and its likelihood means little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.shapes import State, as_time, over


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A network made of a model: `change` of its denoised data."""

    model: ScoreModel
    change: Callable[[State], State]
    keeps_time: ClassVar[bool] = True

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of samples, where the model's network names one."""
        return getattr(self.model.network, "dtype", None)

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        return self.change(self.model.denoised(t, x, condition=condition))

    def modules(self) -> Iterator[torch.nn.Module]:
        """The modules of the model's network, for those who set their mode."""
        modules = getattr(self.model.network, "modules", None)
        return iter(()) if modules is None else modules()

    def parameters(self) -> Iterator[Tensor]:
        """Likewise its parameters."""
        parameters = getattr(self.model.network, "parameters", None)
        return iter(()) if parameters is None else parameters()


def map_denoised(model: ScoreModel, change: Callable[[State], State]) -> ScoreModel:
    """The model with `change(E[x_0 | x])`, `(batch, *event)` to the same shape, in place of its denoised data."""
    return ScoreModel(
        Wrapped(model, change),
        model.linear,
        "data",
        time=as_time,
        sigma_data=model.sigma_data,
        condition=model.condition,
    )


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
