r"""The data end: what lies between p_0 and the density at t_min.

Data x stands at t = 0, paths begin at t_min. With `s = sigma / alpha` there, D and g the denoiser and the score of the
blurred density p_s at x, and K = dD/dx the denoiser's Jacobian (s^2 K is the covariance of `x_0` given x), the flow
from 0 to t_min is, if p_0 is Gaussian within a few s of x, whatever its covariance,

    y = x + (K^(1/2) + K)^-1 (x - D) = x - s^2 (K^(1/2) + K)^-1 g,        log p_0(x) = log p_s(y) - log det K / 2,

and in general wrong by terms of order s^4. It is a change of variables, so that a network whose score is off near t_min
leaves the density normalised. In terms of the score, `log p_0(x) - log p_s(x) = -(s^2 g^T K^-1 g + log det K) / 2`,
to first order `-s^2 (|g|^2 + div g) / 2`, the heat equation; and the score of p_0 is `K^-1 g`.

With the whole Jacobian, functions of K are those of its eigenvalues. With probes e, products with K span Krylov spaces,
started from every e and from g; with an orthonormal basis V of one, `f(K) g = |g| V f(T) e_1`, `T = V^T K V`, and
`e^T log(K) e = |e|^2 log(T)_11` is an unbiased estimate of log det K (stochastic Lanczos quadrature). A space ends
where K leaves it nearly as it is, at `_STEPS` dimensions at the latest.

References: Efron 2011 and Meng et al. 2021 (arXiv:2111.04726) for K; Ubaru, Chen and Saad 2017, Lanczos quadrature;
Daleckii and Krein 1965, derivatives of functions of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdediff.shapes import PerRow, State, over, sum_rows

_STEPS = 10
_ALMOST = 1e-4
"""A part of K v outside of the space that is not worth a dimension more; its square enters."""


@dataclass(frozen=True, eq=False)
class Blur:
    """What lies between data and the states at t_min.

    Attributes:
        log_dets: estimates of `log det dy/dx = -log det K / 2` in nats, `(count, batch)`, 0 where K is not positive
            definite and y = x.
        gap: `log p_0(x) - log p_s(x)` in nats as the score has it, `(batch,)`; infinite where K is not positive
            definite, and no smooth density explains the model.
        score: of p_0, `(batch, *event)`.
    """

    log_dets: Tensor
    gap: PerRow
    score: State


def by_jacobian(K: Tensor, g: State, square: PerRow) -> tuple[State, Blur]:
    """`y - x` and the blur, from symmetric K `(rows, size, size)`, the score g of p_s and s^2."""
    with torch.no_grad():
        values, axes = torch.linalg.eigh(K)
    fine = values[:, 0] > 0
    vector = g.reshape(len(g), -1, 1)
    log, move, inverse = (_function(K, values, axes, name) for name in ("log", "move", "inverse"))
    traces = log.diagonal(dim1=1, dim2=2).sum(1)[None]
    return _where(fine, traces, (move @ vector).reshape(g.shape), (inverse @ vector).reshape(g.shape), g, square)


def by_probes(times_k: Callable[[Tensor], Tensor], probes: Tensor, g: State, square: PerRow) -> tuple[State, Blur]:
    """The same from products `v -> K v` of vectors `(count, rows, *event)`, and probes of that shape."""
    starts = torch.cat([probes, g[None]])
    lengths = _length(starts)
    small, basis = _krylov(times_k, starts / _laid(lengths.clamp(min=torch.finfo(g.dtype).tiny), starts))
    with torch.no_grad():
        values, axes = torch.linalg.eigh(small)
    fine = (values[..., 0] > 0).all(0)
    log, move, inverse = (_function(small, values, axes, name)[..., 0] for name in ("log", "move", "inverse"))
    traces = lengths[:-1] ** 2 * log[:-1, :, 0]
    along = basis[:, -1]
    moved, score = (
        torch.einsum("jb,jb...->b...", (weights[-1] * lengths[-1][:, None]).T, along) for weights in (move, inverse)
    )
    return _where(fine, traces, moved, score, g, square)


def _where(fine: Tensor, traces: Tensor, move: State, score: State, g: State, square: PerRow) -> tuple[State, Blur]:
    """What there is, and no move where there is none; `traces` are of log K."""
    rows = fine.reshape(-1, *[1] * (g.ndim - 1))
    gap = -(square * sum_rows(g * score) + traces.mean(0)) / 2
    return torch.where(rows, -over(square, g) * move, 0.0), Blur(
        log_dets=torch.where(fine, -traces / 2, 0.0),
        gap=torch.where(fine, gap, math.inf),
        score=torch.where(rows, score, g),
    )


def _krylov(times_k: Callable[[Tensor], Tensor], starts: Tensor) -> tuple[Tensor, Tensor]:
    """`T (count, rows, m, m)` and bases `(m, count, rows, *event)` of the spaces of unit vectors.

    Where a space has ended, further basis vectors are 0 and T is the identity.
    """
    basis, images = [starts], []
    size = math.prod(starts.shape[2:])
    for step in range(min(_STEPS, size)):
        images.append(times_k(basis[-1]))
        rest = images[-1]
        for _ in range(2):
            for v in basis:
                rest = rest - _laid(_dot(v, rest), v) * v
        length = _length(rest)
        going = length > _ALMOST
        if step + 1 == min(_STEPS, size) or not bool(going.any()):
            break
        basis.append(torch.where(_laid(going, rest), rest / _laid(torch.where(going, length, 1.0), rest), 0.0))
    T = torch.stack([torch.stack([_dot(v, image) for image in images], -1) for v in basis], -2)
    ended = torch.stack([_length(v) == 0 for v in basis], -1)
    return (T + T.mT) / 2 + torch.diag_embed(ended.to(T)), torch.stack(basis)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(*a.shape[:2], -1).sum(2)


def _length(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.reshape(*a.shape[:2], -1), dim=2)


def _laid(c: Tensor, a: Tensor) -> Tensor:
    return c.reshape(*c.shape, *[1] * (a.ndim - 2))


# Functions of symmetric matrices, and their divided differences (f(a) - f(b)) / (a - b), which the derivative has.


def _log_slope(a: Tensor, b: Tensor) -> Tensor:
    near = (a - b).abs() < 1e-3 * b
    ratio = torch.where(near, (a - b) / b, 1.0)
    series = (1 - ratio / 2 + ratio**2 / 3 - ratio**3 / 4) / b
    return torch.where(near, series, (a / b).log() / torch.where(near, 1.0, a - b))


def _move(a: Tensor) -> Tensor:
    return 1 / (a.sqrt() + a)


def _move_slope(a: Tensor, b: Tensor) -> Tensor:
    return -(1 / (a.sqrt() + b.sqrt()) + 1) * _move(a) * _move(b)


def _inverse_slope(a: Tensor, b: Tensor) -> Tensor:
    return -1 / (a * b)


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "log": (torch.log, _log_slope),
    "move": (_move, _move_slope),
    "inverse": (torch.reciprocal, _inverse_slope),
}


class _Function(torch.autograd.Function):
    """`f(K)` from the eigenvalues and axes of K; its derivative is finite where eigenvalues are equal."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, values: Tensor, axes: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(values, axes)
        ctx.name = name
        return axes @ (_FUNCTIONS[name][0](values)[..., None] * axes.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, axes = ctx.saved_tensors
        slopes = _FUNCTIONS[ctx.name][1](values[..., :, None], values[..., None, :])
        return axes @ (slopes * (axes.mT @ gradients[0] @ axes)) @ axes.mT, None, None, None


def _function(K: Tensor, values: Tensor, axes: Tensor, name: str) -> Tensor:
    """f(K); of the identity where K is not positive definite."""
    positive = torch.where((values[..., :1] > 0), values, 1.0)
    result: Tensor = _Function.apply(K, positive, axes, name)  # type: ignore[no-untyped-call]  # torch's own has no types
    return result
