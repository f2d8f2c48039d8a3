r"""Shapes: what a state and a time look like, and the one place where a time meets a state.

A state `x` is `(batch, *event)` with any event shape. A time `t` is `()`, one time for all rows, or `(batch,)`, one
time for each row. Nothing else broadcasts: `over` is the only function that lays a coefficient over a state, so a
`(8,)` coefficient on an `(8, 3, 8, 8)` state can never fall on the columns by luck.

Schedule coefficients are computed in float64 on the clock that `as_time` returns, and cast once, by `over`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdediff.errors import DivergenceError, ShapeError

State: TypeAlias = Float[Tensor, " batch *event"]
Trajectory: TypeAlias = Float[Tensor, " times batch *event"]
PerRow: TypeAlias = Float[Tensor, " batch"]
Codes: TypeAlias = Int[Tensor, " batch *event"]
Grid: TypeAlias = Float[Tensor, " steps+1"]
Time: TypeAlias = Tensor | float
"""A time: a float, a tensor `()`, or a tensor `(batch,)`."""


def as_float64(c: Tensor | float | Sequence[float]) -> Tensor:
    """A time or a coefficient as a float64 tensor.

    A device without float64 (Apple's MPS) hands it to the CPU; `over` brings coefficients back.
    """
    if not isinstance(c, Tensor):
        return torch.tensor(c, dtype=torch.float64)
    if c.device.type == "mps":
        c = c.cpu()
    return c.to(torch.float64)


def as_time(t: Time | Sequence[float]) -> Tensor:
    """The time as a float64 tensor, the clock in which all schedule coefficients are computed."""
    return as_float64(t)


def over(c: Tensor | float, x: State) -> Tensor:
    """Lay a coefficient over a state: cast to the state's dtype and device, reshaped so that `c * x` is per row.

    Args:
        c: coefficient, a number, `()`, `(batch,)`, or already of the state's shape (elementwise).
        x: state `(batch, *event)`.

    Raises:
        ShapeError: the coefficient has any other shape.
    """
    if not isinstance(c, Tensor):
        return torch.tensor(c, dtype=x.dtype, device=x.device)
    if c.ndim == 0:
        return c.to(dtype=x.dtype, device=x.device)
    if c.shape == x.shape[:1]:
        return c.to(dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    if c.shape == x.shape:
        return c.to(dtype=x.dtype, device=x.device)
    raise ShapeError(
        f"A time or coefficient of shape {tuple(c.shape)} cannot be laid over a state of shape {tuple(x.shape)}: "
        f"give shape () for one value, ({x.shape[0]},) for one value per row, or {tuple(x.shape)} for one per entry."
    )


def per_row(t: Tensor, x: State) -> Tensor:
    """The time of every row, `(batch,)`, from a time `()` or `(batch,)`."""
    if t.ndim == 0:
        return t.expand(x.shape[0])
    if t.shape == x.shape[:1]:
        return t
    raise ShapeError(
        f"A time of shape {tuple(t.shape)} does not fit a state of shape {tuple(x.shape)}: "
        f"give shape () or ({x.shape[0]},)."
    )


def sum_rows(x: Float[Tensor, " batch *event"]) -> PerRow:
    """Sum over everything but the batch."""
    return x.reshape(x.shape[0], -1).sum(-1)


def check_state(x: object, name: str = "x") -> None:
    """Refuse what is not a floating-point state `(batch, *event)` with a sentence."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} must be a tensor of shape (batch, *event); got {type(x).__name__}.")
    if x.ndim == 0:
        raise ShapeError(
            f"{name} must have shape (batch, *event); got a tensor with no dimensions. Write {name}[None]."
        )
    if not x.is_floating_point():
        raise ShapeError(
            f"{name} must have a floating-point dtype; got {x.dtype}. Write {name}.float() or {name}.double()."
        )


def finite_or_raise(x: State, what: str, *, step: int | None, time: float) -> None:
    """Refuse a state with NaN or infinite entries.

    Raises:
        DivergenceError: naming the step, the time and the rows.
    """
    fine = x.isfinite().reshape(x.shape[0], -1).all(1)
    if not bool(fine.all()):
        raise DivergenceError(
            f"{what} is NaN or infinite",
            "Check the network's output and the drift of the SDE there, or take more steps.",
            step=step,
            time=time,
            rows=(~fine).nonzero()[:, 0].tolist(),
        )
