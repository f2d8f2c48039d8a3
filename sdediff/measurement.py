r"""Measurements: what is known of data, `y = A x_0 + n` with `n ~ N(0, s^2 I)`.

Whoever writes A as a bare function does not say which events it takes. So there are two of them: a `Measurement`, whose
A is an operator that was looked at, and a `Pending` one, which becomes a `Measurement` when it first meets a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sdediff.conjugate import conjugate_gradients
from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.model import rows_of
from sdediff.operators import LinearOperator, Shape, as_operator, check_adjoint, measured_by
from sdediff.shapes import PerRow, State, as_float64, check_state, over, sum_rows

Pair: TypeAlias = tuple[Callable[[State], Tensor], Callable[[Tensor], State]]
"""`(forward, adjoint)`."""

Map: TypeAlias = LinearOperator | Tensor | Callable[[State], Tensor] | Pair
"""What may be given as A: an operator, a matrix, a bool mask, a function of a batch, or that and its adjoint."""

_UNEXPLAINED = 1e-3
"""The part of a y without noise that may be rounding, of the y or of the search for its x."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is known: `y = A x_0 + n`, `n ~ N(0, noise_std^2 I)`.

    Args:
        A: a `LinearOperator`, a matrix `(m, n)` or a bool mask; see `sd.operators`.
        y: `(batch, *m)`, or `(*m)` or `(1, *m)` for all rows.
        noise_std: a number >= 0, or a tensor `(*m)` of them.

    Attributes:
        floor: the smallest variance of the noise.

    Raises:
        ShapeError: y or noise_std does not fit A.
        OptionError: y that is not finite, negative noise, or an A that is not linear or does not match its adjoint.
    """

    A: LinearOperator
    y: Tensor
    noise_std: Tensor
    floor: float = field(repr=False)

    def __init__(self, A: LinearOperator | Tensor, y: Tensor, noise_std: Tensor | float) -> None:
        operator, std = as_operator(A), checked_std(noise_std)
        _check_finite(y)
        event, m = operator.event, operator.measured
        if tuple(y.shape) != m and tuple(y.shape[1:]) != m:
            raise ShapeError(
                f"y must have shape {m}, for all rows, or (batch{''.join(f', {n}' for n in m)}), one for each, as A "
                f"gives ({operator}); got {tuple(y.shape)}."
                + (" That is the shape of an event: write y = A(x0)." if y.shape[-len(event) :] == event else "")
            )
        if std.ndim and tuple(std.shape) != m:
            raise ShapeError(
                f"noise_std must be a number or have the shape {m} of y, for all rows; got {tuple(std.shape)}."
            )
        check_adjoint(operator, y)
        y = y[0] if y.ndim > len(m) and len(y) == 1 else y
        for name, value in (("A", operator), ("y", y), ("noise_std", std), ("floor", (std**2).min().item())):
            object.__setattr__(self, name, value)

    @property
    def exact(self) -> bool:
        """Whether some entry has no noise."""
        return self.floor == 0

    def at(self, x: State) -> Measurement:
        """This measurement, for the events of x.

        Raises:
            ShapeError: A takes other events.
        """
        operator = self.A.on(tuple(x.shape[1:]))
        if operator is None:
            raise ShapeError(f"A takes events of shape {self.A.event}; x has shape {tuple(x.shape)}.")
        return self if operator is self.A else self._with("A", operator)

    def seen(self, x: State) -> Tensor:
        """y for the rows of x, in their dtype; `(batch, *m)` or `(*m)`."""
        if self.y.ndim > len(self.A.measured) and len(self.y) != len(x):
            raise ShapeError(
                f"y has {len(self.y)} rows but x has {len(x)}: give y of shape {self.A.measured}, for all "
                "rows, or one for each row."
            )
        return self.y.to(x)

    def residual(self, x0: State) -> Tensor:
        """`y - A x_0`, `(batch, *m)`."""
        return self.seen(x0) - self.A(x0)

    def variance(self, z: Tensor) -> Tensor:
        """`s^2` laid over z."""
        square = self.noise_std**2
        return square.to(z) if square.ndim else over(square, z)

    def log_prob(self, x0: State) -> PerRow:
        """`log p(y | x_0)` in nats, `(batch,)`; differentiable in x_0.

        Raises:
            CapabilityError: there is no noise, and so no density.
        """
        if self.exact:
            raise CapabilityError("Without noise y has no density given x_0: give noise_std > 0.")
        r = self.residual(x0)
        variance = self.variance(r).expand_as(r)
        return -sum_rows(r**2 / variance + (2 * math.pi * variance).log()) / 2

    def rows(self, index: slice | Tensor, batch: int) -> Measurement:
        """The measurement for some rows of a batch."""
        if self.y.ndim == len(self.A.measured) or len(self.y) != batch:
            return self
        return self._with("y", rows_of(self.y, index, batch))

    def check_explained(self) -> None:
        """Refuse a y that is `A x` of no x.

        Raises:
            OptionError: it says by how much.
        """
        with torch.no_grad():
            y = self.y.reshape(-1, *self.A.measured)
            x = conjugate_gradients(lambda x: self.A.adjoint(self.A(x)), self.A.adjoint(y), min(4 * y[0].numel(), 500))
            part = (lengths(y - self.A(x)) / lengths(y).clamp(min=torch.finfo(y.dtype).tiny)).max().item()
        if not part <= _UNEXPLAINED:
            raise OptionError(
                f"Without noise y must be A x of some x, but {part:.2g} of its length is not: A has rows that depend "
                "on each other, and y contradicts itself. Give noise_std > 0, or take such rows out."
            )

    def _with(self, name: str, value: Any) -> Measurement:
        part = copy(self)
        object.__setattr__(part, name, value)
        return part


@dataclass(frozen=True, eq=False)
class Pending:
    """A measurement by functions that do not say which events they take; `at` makes it, and looks at A, once.

    Attributes:
        forward, adjoint, y, noise_std: as of a `Measurement`; None for an adjoint that is to be derived.
        explained: whether a y without noise must be A x of some x.
    """

    forward: Callable[[State], Tensor]
    adjoint: Callable[[Tensor], State] | None
    y: Tensor
    noise_std: Tensor
    explained: bool
    _cuts: tuple[tuple[slice | Tensor, int], ...] = field(default=(), repr=False)
    _made: dict[Shape, Measurement] = field(default_factory=dict, repr=False)  # shared by all cuts

    @property
    def exact(self) -> bool:
        """Whether some entry has no noise."""
        return bool((self.noise_std**2 == 0).any())

    def rows(self, index: slice | Tensor, batch: int) -> Pending:
        """The measurement for some rows of a batch, which are cut when the shape of one is known."""
        return replace(self, _cuts=(*self._cuts, (index, batch)))

    def at(self, x: State) -> Measurement:
        """The measurement, for the events of x.

        Raises:
            ShapeError, OptionError: as `Measurement`.
        """
        event = tuple(x.shape[1:])
        if event not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[event] = self.of(event, x)
        known = self._made[event]
        for index, batch in self._cuts:
            known = known.rows(index, batch)
        return known

    def of(self, event: Shape, like: Tensor) -> Measurement:
        """The measurement, for such events in the dtype and on the device of a tensor."""
        m = measured_by(self.forward, event, like)
        operator = LinearOperator(self.forward, self.adjoint, event=event, measured=m)
        known = Measurement(operator, self.y.to(like), self.noise_std)
        if self.explained and known.exact:
            known.check_explained()
        return known


def measurement(
    A: Map, y: Tensor, noise_std: Tensor | float, *, event: Shape | None = None, explained: bool = True
) -> Measurement | Pending:
    """The measurement, pending if A is of functions and the shape of an event is not known.

    Args:
        A: an operator, a matrix `(m, n)`, a bool mask, a function of a batch, or a function and its adjoint.
        y, noise_std: as of a `Measurement`.
        event: shape of an event, if it is known.
        explained: whether a y without noise must be A x of some x.

    Raises:
        ShapeError, OptionError: as `Measurement`; a y without noise that no x explains.
    """
    if isinstance(A, tuple) or (callable(A) and not isinstance(A, LinearOperator)):
        forward, adjoint = _pair(A)
        _check_finite(y)
        pending = Pending(forward, adjoint, y, checked_std(noise_std), explained)
        return pending if event is None else pending.of(event, y)
    known = Measurement(A, y, noise_std)
    if explained and known.exact:
        known.check_explained()
    return known


def checked_std(noise_std: Tensor | float) -> Tensor:
    """noise_std as a float64 tensor.

    Raises:
        OptionError: it is no number or tensor of numbers, or one of them is negative or not finite.
    """
    try:
        std = as_float64(noise_std)
    except (TypeError, ValueError):
        raise OptionError(f"noise_std must be a number or a tensor of them; got {noise_std!r}.") from None
    bad = std[~((std >= 0) & std.isfinite())]
    if len(bad):
        raise OptionError(f"noise_std must be finite and >= 0; got {bad[0].item():g}.")
    return std


def _pair(A: Callable[[State], Tensor] | Pair) -> tuple[Callable[[State], Tensor], Callable[[Tensor], State] | None]:
    if not isinstance(A, tuple):
        return A, None
    if len(A) != 2 or not all(map(callable, A)):
        got = ", ".join(type(part).__name__ for part in A)
        raise OptionError(f"A as a pair is two functions of a batch, (forward, adjoint); got ({got}).")
    return A


def lengths(r: Tensor) -> PerRow:
    """The length of every row."""
    return torch.linalg.vector_norm(r.reshape(len(r), -1), dim=1)


def _check_finite(y: Tensor) -> None:
    if not (isinstance(y, Tensor) and y.ndim == 0 and y.is_floating_point()):
        check_state(y, "y")
    if not bool(y.isfinite().all()):
        raise OptionError(
            f"y must be finite; it has {int((~y.isfinite()).sum())} entries that are NaN or infinite. Entries that "
            "were not measured belong to A: compose it with a Mask of those that were."
        )
