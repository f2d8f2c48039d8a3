r"""Linear maps from events to measurements, with their adjoints and without their matrices.

A measurement is `y = A x + n`. Here A takes a batch `(batch, *event)` to `(batch, *m)`, row by row, and its adjoint
takes measurements back, such that for all x and z

    <A x, z> = <x, A^T z>.

| A | A x | A^T z |
|---|---|---|
| `Matrix` | `M x`, x flattened | `M^T z` |
| `Mask` (inpainting) | the entries that are seen, flattened | put back in their places, 0 elsewhere |
| `Convolution` (blur) | `(A x)_i = sum_j k_j x_(i - j)`, j about the centre of k | the same with k turned round |
| `Downsample` (super-resolution) | means of blocks of f entries | spread over their blocks, divided by f |
| `A @ B` | `A(B x)` | `B^T(A^T z)` |
| `LinearOperator(forward)` | any function | `z^T dA/dx`, by automatic differentiation |

`check_adjoint` asks for the equation above, and for `A(a x + b y) = a A x + b A y`, at random points. Functions that
are no linear map, or an adjoint that belongs to another one, cannot pass but with probability 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.shapes import PerRow, State, sum_rows

Shape = tuple[int, ...]


class LinearOperator:
    """A linear map on batches of events.

    Args:
        forward: `(batch, *event)` to `(batch, *m)`, row by row.
        adjoint: `(batch, *m)` to `(batch, *event)`; None takes it from `forward` by automatic differentiation.
        event: shape of an event; a number is `(n,)`.
        measured: shape of a measurement, `m`; None looks at what `forward` makes of zeros on the CPU, in torch's
            default dtype or in float64.

    Raises:
        OptionError: `forward` or `adjoint` is no function.
        ShapeError: `forward` does not return one measurement for every row.
    """

    def __init__(
        self,
        forward: Callable[[State], Tensor],
        adjoint: Callable[[Tensor], State] | None = None,
        *,
        event: int | Shape,
        measured: Shape | None = None,
    ) -> None:
        for name, function in (("forward", forward), ("adjoint", adjoint)):
            if not (callable(function) or (name == "adjoint" and function is None)):
                raise OptionError(f"{name} must be a function of a batch; got {type(function).__name__}.")
        self._forward, self._adjoint = forward, adjoint
        self.event = _shape(event)
        self.measured: Shape = self._probed() if measured is None else tuple(measured)

    def __call__(self, x: State) -> Tensor:
        """`A x`, `(batch, *measured)`."""
        _check_shape(x, self.event, "x", self)
        return self._forward(x)

    def adjoint(self, z: Tensor) -> State:
        """`A^T z`, `(batch, *event)`, for z `(batch, *measured)`.

        Raises:
            OptionError: no adjoint was given, and automatic differentiation cannot follow `forward`.
        """
        _check_shape(z, self.measured, "z", self)
        return self._transposed(z) if self._adjoint is None else self._adjoint(z)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix of A, `(entries of a measurement, entries of an event)`: one application to a basis."""
        size = math.prod(self.event)
        basis = torch.eye(size, dtype=dtype).reshape(size, *self.event)
        return self(basis).reshape(size, -1).T

    def on(self, event: Shape) -> LinearOperator | None:
        """This map of such events; None if it takes others."""
        return self if event == self.event else None

    def __matmul__(self, first: LinearOperator) -> LinearOperator:
        """`A @ B`: first B, then A."""
        if first.measured != self.event:
            raise ShapeError(
                f"A @ B applies B first: B gives measurements of shape {first.measured}, but A takes events of shape "
                f"{self.event}."
            )
        return LinearOperator(
            lambda x: self(first(x)),
            lambda z: first.adjoint(self.adjoint(z)),
            event=first.event,
            measured=self.measured,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} from {self.event} to {self.measured}"

    def _probed(self) -> Shape:
        try:
            return measured_by(self._forward, self.event, torch.zeros(()))
        except OptionError:  # of a function that holds float64 numbers
            return measured_by(self._forward, self.event, torch.zeros((), dtype=torch.float64))

    def _transposed(self, z: Tensor) -> State:
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(z), *self.event, dtype=z.dtype, device=z.device, requires_grad=True)
            value = self._forward(x)
            if not value.requires_grad:
                raise OptionError(
                    "A returns a tensor that automatic differentiation cannot follow, so that its adjoint is not "
                    "known: write it with torch operations, or give LinearOperator(forward, adjoint, event=...)."
                )
            return torch.autograd.grad(value, x, z, create_graph=graph)[0]


class Matrix(LinearOperator):
    """A matrix `(m, n)` on flattened events of n entries.

    Args:
        matrix: `(m, n)`.
        event: shape of an event; None for `(n,)`, and in `LinearInverse` for whatever its model's events of n entries
            are.
    """

    def __init__(self, matrix: Tensor, event: int | Shape | None = None) -> None:
        with torch.inference_mode(False):  # a matrix made in that mode would keep gradients from passing
            matrix = torch.as_tensor(matrix)
            matrix = matrix.clone() if matrix.is_inference() else matrix
        self._matrix, self._any = matrix, event is None
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ShapeError(
                f"Matrix needs a floating-point matrix (m, n); got {matrix.dtype} of shape {tuple(matrix.shape)}."
            )
        event = _shape(matrix.shape[1] if event is None else event)
        if math.prod(event) != matrix.shape[1]:
            raise ShapeError(
                f"A matrix of shape {tuple(matrix.shape)} takes events of {matrix.shape[1]} entries; an event of shape "
                f"{event} has {math.prod(event)}."
            )
        super().__init__(
            lambda x: _rows_times(x.reshape(len(x), matrix.shape[1]), matrix.T.to(x)),
            lambda z: _rows_times(z, matrix.to(z)).reshape(len(z), *event),
            event=event,
            measured=(matrix.shape[0],),
        )

    def on(self, event: Shape) -> LinearOperator | None:
        if self._any and event != self.event and math.prod(event) == self._matrix.shape[1]:
            return Matrix(self._matrix, event)
        return super().on(event)


class Mask(LinearOperator):
    """The entries of an event that are seen, flattened in their order: `A A^T = I`, and no row of A is zero.

    `mask.adjoint(y)` is the picture with 0 where nothing is seen.

    Args:
        seen: bool, shaped as an event, True where an entry is seen.

    Raises:
        ShapeError: it is not a bool tensor. OptionError: nothing is seen.
    """

    def __init__(self, seen: Tensor) -> None:
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = str(seen.dtype) if isinstance(seen, Tensor) else type(seen).__name__
            raise ShapeError(f"Mask needs a bool tensor shaped as an event; got {got}. Write mask.bool() or mask > 0.")
        if not bool(seen.any()):
            raise OptionError("This mask shows no entry, so that there is no measurement.")
        event, size = tuple(seen.shape), seen.numel()
        places = seen.reshape(-1).nonzero()[:, 0]

        def fill(z: Tensor) -> State:
            empty = torch.zeros(len(z), size, dtype=z.dtype, device=z.device)
            return empty.index_copy(1, places.to(z.device), z).reshape(len(z), *event)

        super().__init__(
            lambda x: x.reshape(len(x), size)[:, places.to(x.device)], fill, event=event, measured=places.shape
        )


class Convolution(LinearOperator):
    """A convolution over the trailing axes of an event, of the same shape; other axes are left alone.

    Args:
        kernel: `(k,)` for the last axis, `(k, l)` for the last two, and so on; odd sizes.
        event: shape of an event.
        boundary: "circular" (an event goes on with its other end) or "zero" (it is 0 outside).

    Raises:
        OptionError: unknown boundary, or a kernel of even size, which has no centre.
        ShapeError: the kernel has more axes than the event, or is larger than a circular one.
    """

    def __init__(self, kernel: Tensor, event: int | Shape, boundary: str = "circular") -> None:
        kernel, event = torch.as_tensor(kernel), _shape(event)
        if boundary not in ("circular", "zero"):
            raise OptionError(f"Unknown boundary {boundary!r}: write 'circular' or 'zero'.")
        if not 0 < kernel.ndim <= len(event):
            raise ShapeError(
                f"A kernel of shape {tuple(kernel.shape)} needs one axis at least, and no more than an event of shape "
                f"{event}."
            )
        if any(size % 2 == 0 for size in kernel.shape):
            raise OptionError(f"The kernel needs odd sizes, so that it has a centre; got {tuple(kernel.shape)}.")
        if boundary == "circular" and any(k > n for k, n in zip(kernel.shape[::-1], event[::-1], strict=False)):
            raise ShapeError(f"A kernel of shape {tuple(kernel.shape)} is larger than an event of shape {event}.")
        turned = kernel.flip(tuple(range(kernel.ndim)))
        super().__init__(
            lambda x: _correlate(x, turned, boundary),
            lambda z: _correlate(z, kernel, boundary),
            event=event,
            measured=event,
        )


class Downsample(LinearOperator):
    """Means over blocks of the trailing axes of an event.

    Args:
        factors: sizes of a block along the last axes: `(4,)` for signals, `(2, 2)` for pictures. A number is `(f,)`.
        event: shape of an event.

    Raises:
        ShapeError: more factors than axes, or axes that are no multiples of their factors.
    """

    def __init__(self, factors: int | Sequence[int], event: int | Shape) -> None:
        factors, event = _shape(factors, "factors"), _shape(event)
        if not 0 < len(factors) <= len(event) or any(f < 1 for f in factors):
            raise ShapeError(
                f"Downsample needs a factor >= 1 for each of some trailing axes of {event}; got {factors}."
            )
        sizes = event[len(event) - len(factors) :]
        if any(n % f for n, f in zip(sizes, factors, strict=True)):
            raise ShapeError(f"Blocks of {factors} do not tile the trailing axes of an event of shape {event}.")
        parts = [part for n, f in zip(sizes, factors, strict=True) for part in (n // f, f)]
        lead, inside = event[: len(event) - len(factors)], tuple(range(-2 * len(factors) + 1, 0, 2))

        def forward(x: State) -> Tensor:
            return x.reshape(len(x), *lead, *parts).mean(inside)

        def adjoint(z: Tensor) -> State:
            for axis, f in zip(range(-len(factors), 0), factors, strict=True):
                z = z.repeat_interleave(f, dim=axis)
            return z / math.prod(factors)

        blocks = tuple(n // f for n, f in zip(sizes, factors, strict=True))
        super().__init__(forward, adjoint, event=event, measured=(*lead, *blocks))


def as_operator(A: object) -> LinearOperator:
    """A as a `LinearOperator`: itself, a matrix `(m, n)` as a `Matrix`, a bool tensor as a `Mask`.

    Raises:
        OptionError: it is something else. A bare function does not say what events it takes.
    """
    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, Tensor):
        return Mask(A) if A.dtype == torch.bool else Matrix(A)
    if callable(A):
        raise OptionError(
            "A function does not say which events it takes: write "
            "sd.operators.LinearOperator(A, event=(...)), or LinearOperator(A, adjoint, event=(...))."
        )
    raise OptionError(
        "A must be a LinearOperator of sd.operators, a tensor that is a matrix (m, n) or a bool mask, a function, or a "
        f"pair (forward, adjoint); got {type(A).__name__}."
    )


def check_adjoint(A: LinearOperator, like: Tensor | None = None, *, seed: int = 0) -> None:
    """Refuse an A that is not linear, or whose adjoint is not its own, at random points.

    Both equations must hold up to the square root of the dtype's rounding, relative to the size of their terms.

    Args:
        A: the map.
        like: a tensor with the dtype and device to look in; None for float64 on the CPU.
        seed: of the points.

    Raises:
        OptionError: A x is not finite, or `<A x, z>` and `<x, A^T z>` differ, or `A(a x + b y)` and `a A x + b A y`;
            both numbers are told.
        ShapeError: the adjoint's result is not shaped as a batch of events.
    """
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Shape) -> Tensor:
        return torch.randn(3, *shape, dtype=torch.float64, generator=generator).to(like)

    with torch.no_grad():
        x, y, z = drawn(A.event), drawn(A.event), drawn(A.measured)
        slack = torch.finfo(like.dtype).eps ** 0.5
        image, other, mixed = A(x), A(y), A(2 * x - 3 * y)
        if not bool(image.isfinite().all()):
            raise OptionError("A x is NaN or infinite at a random point x.")
        _compare(
            _dot(mixed, z),
            _dot(2 * image - 3 * other, z),
            slack * (_norm(image) + _norm(other) + _norm(mixed)) * _norm(z),
            "A is not linear: at a random point <A(2 x - 3 y), z> is {} but <2 A x - 3 A y, z> is {}. An offset "
            "belongs to y: give y - A(0), and A without it.",
        )
        back = A.adjoint(z)
        if back.shape != x.shape:
            raise ShapeError(f"The adjoint must return {tuple(x.shape)}, as A takes; it returned {tuple(back.shape)}.")
        _compare(
            _dot(image, z),
            _dot(x, back),
            slack * (_norm(image) * _norm(z) + _norm(x) * _norm(back)),
            "The adjoint is not that of A: at a random point <A x, z> is {} but <x, A^T z> is {}. Mind transposes, "
            "scales and flips, or leave the adjoint out to have it derived from A.",
        )


def measured_by(forward: Callable[[State], Tensor], event: Shape, like: Tensor) -> Shape:
    """The shape of a measurement: what a function makes of two events of zeros, in the dtype of a tensor.

    Raises:
        OptionError: the function fails. ShapeError: it does not return one measurement for every row.
    """
    asked = f"A must take a batch (batch{''.join(f', {n}' for n in event)}) to one measurement a row, (batch, ...)"
    try:
        with torch.no_grad():
            out: object = forward(torch.zeros(2, *event, dtype=like.dtype, device=like.device))
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise OptionError(f"{asked}; a batch of 2, {like.dtype}, made it fail: {said}") from error
    if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"{asked}; a batch of 2 gave {got}.")
    return tuple(out.shape[1:])


def _shape(sizes: int | Sequence[int], name: str = "event") -> Shape:
    """Sizes as a tuple; a number is one of them."""
    found = (sizes,) if isinstance(sizes, int) else tuple(sizes) if isinstance(sizes, Sequence) else ()
    if not isinstance(sizes, int | Sequence) or not all(isinstance(n, int) for n in found):
        raise ShapeError(f"{name} must be whole numbers, such as (3, 8, 8) or 8; got {sizes!r}.")
    return found


def _compare(one: PerRow, other: PerRow, slack: PerRow, sentence: str) -> None:
    worst = ((one - other).abs() - slack).argmax()
    if not bool((one - other).abs()[worst] <= slack[worst]):
        raise OptionError(sentence.format(f"{one[worst].item():.6g}", f"{other[worst].item():.6g}"))


def _dot(a: Tensor, b: Tensor) -> PerRow:
    return sum_rows(a * b)


def _norm(a: Tensor) -> PerRow:
    return _dot(a, a).sqrt()


def _check_shape(x: Tensor, shape: Shape, name: str, operator: LinearOperator) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ShapeError(
            f"{operator} takes {name} of shape (batch{''.join(f', {n}' for n in shape)}); got {tuple(x.shape)}."
        )


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` with every row by itself, so that its bits do not depend on the batch."""
    return torch.bmm(x[:, None], matrix.expand(len(x), *matrix.shape))[:, 0]


def _with(shape: Sequence[int], axis: int, length: int) -> Shape:
    """The shape with another length along an axis < 0."""
    return (*shape[:axis], length, *shape[len(shape) + axis + 1 :])


def _correlate(x: State, kernel: Tensor, boundary: str) -> State:
    """`sum_j k_j x_(i + j)`, one term after the other; j is counted from the centre of k."""
    for axis, size in zip(range(-kernel.ndim, 0), kernel.shape, strict=True):
        reach, length = size // 2, x.shape[axis]
        if boundary == "circular":
            before, after = x.narrow(axis, length - reach, reach), x.narrow(axis, 0, reach)
        else:
            before = after = torch.zeros_like(x.narrow(axis, 0, 1)).expand(_with(x.shape, axis, reach))
        x = torch.cat([before, x, after], dim=axis)
    weights, total = kernel.to(x), torch.zeros((), dtype=x.dtype, device=x.device)
    places = torch.cartesian_prod(*(torch.arange(n) for n in kernel.shape)).reshape(-1, kernel.ndim)
    for place in places.tolist():
        window = x
        for axis, start, size in zip(range(-kernel.ndim, 0), place, kernel.shape, strict=True):
            window = window.narrow(axis, start, window.shape[axis] - size + 1)
        total = window * weights[tuple(place)] + total
    return total
