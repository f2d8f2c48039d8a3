"""The scale of guidance, w: a number, one for every row, or a function of time.

A guided model adds w times something to a score, row by row. As a function of time w may guide a part of the path only:

    w(t) = w for t_1 <= t <= t_2, else 0,

as guidance far out in the noise costs diversity, and near the data it has nothing left to decide.

Reference: Kynkaanniemi et al. 2024 (arXiv:2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.shapes import as_float64

Scale: TypeAlias = float | Tensor | Callable[[Tensor], Tensor]
"""w: a number, one for every row `(batch,)`, or a function of the times `(batch,)` of the rows, float64."""


def interval(scale: float | Callable[[Tensor], Tensor], low: float, high: float) -> Interval:
    """The scale between the times low and high, both included, and 0 beyond: guidance in the middle of the path.

    Times are those of the SDE; for noise levels write `sde.time(log_snr)`.

    Raises:
        OptionError: not low < high, or a scale of another kind.
    """
    if isinstance(scale, Tensor):
        raise OptionError("The scale of an interval is a number or a function of t; got a tensor.")
    if not low < high:
        raise OptionError(f"interval needs times low < high; got low = {low}, high = {high}.")
    return Interval(checked_scale(scale), low, high)


@dataclass(frozen=True)
class Interval:
    """A scale that is 0 outside of `[low, high]`."""

    scale: Scale
    low: float
    high: float

    def __call__(self, t: Tensor) -> Tensor:
        return scale_at(self.scale, t) * ((t >= self.low) & (t <= self.high))


def checked_scale(scale: Scale) -> Scale:
    """The scale; tensors in float64 on the CPU, where times are.

    Raises:
        OptionError: it is none.
    """
    if isinstance(scale, Tensor) and scale.ndim <= 1 and not scale.is_complex():
        if not bool(scale.isfinite().all()):
            raise OptionError(f"A scale must be finite; got {scale.tolist()}.")
        fixed = scale.ndim == 0 and not scale.requires_grad
        return float(scale) if fixed else scale.to("cpu", torch.float64)
    if isinstance(scale, float | Real):
        if not math.isfinite(number := float(scale)):
            raise OptionError(f"A scale must be finite; got {number}.")
        return number
    if isinstance(scale, Tensor) or not callable(scale):
        got = f"a tensor of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise OptionError(
            f"The scale w is a number, a tensor of one number for each row, (batch,), or a function of t; got {got}."
        )
    return scale


def scale_at(scale: Scale, t: Tensor) -> Tensor:
    """w of every row at times `(batch,)`, float64.

    Raises:
        ShapeError, OptionError: it is not one finite number for each row.
    """
    if isinstance(scale, float):
        return torch.full_like(t, scale)
    if isinstance(scale, Tensor):
        _check_rows(scale, len(t))
        return scale.expand(t.shape)
    w = scale(t)
    if not isinstance(w, Tensor) or w.shape != t.shape:
        got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else repr(w)
        raise ShapeError(
            f"A function of t as the scale must give one w for each of {len(t)} rows, ({len(t)},); got {got}."
        )
    w = as_float64(w)
    if not bool(w.isfinite().all()):
        raise OptionError(f"A scale must be finite; got {w[~w.isfinite()][0]:g} at t = {t[~w.isfinite()][0]:g}.")
    return w


def scale_of_rows(scale: Scale, index: slice | Tensor, batch: int) -> Scale:
    """The scale for some rows of a batch.

    Raises:
        ShapeError: it is not for such a batch.
    """
    if not isinstance(scale, Tensor):
        return scale
    _check_rows(scale, batch)
    return scale[index] if scale.ndim else scale


def _check_rows(scale: Tensor, rows: int) -> None:
    if scale.ndim and len(scale) != rows:
        raise ShapeError(
            f"A tensor as the scale must give one w for each of {rows} rows, ({rows},); got shape {tuple(scale.shape)}."
        )


def always(scale: Scale, number: float) -> bool:
    """Whether the scale is this number."""
    return isinstance(scale, float) and scale == number
