r"""Gaussians as the parts of a bound: densities, entropies, divergences, draws that can be differentiated. In nats.

For two Gaussians over d numbers,

    KL(N(m1, S1) || N(m2, S2)) = 1/2 [log |S2| / |S1| - d + tr(S2^-1 S1) + (m2 - m1)^T S2^-1 (m2 - m1)],

which `kl_divergence` takes by the Cholesky factors `S = L L^T`: the trace is `|L2^-1 L1|^2`, the quadratic form
`|L2^-1 (m2 - m1)|^2`, and the determinants are products of diagonals. For independent entries, with `r = s1 / s2`,

    KL = sum [(r^2 - 1) / 2 - log r + ((m2 - m1) / s2)^2 / 2],        entropy = sum [1/2 + log(2 pi) / 2 + log s].

A draw `mean + std eps` moves with mean and std, so that the gradient of its expectation is the expectation of its
gradient.

References: Kullback and Leibler 1951; Kingma and Welling 2014 (arXiv:1312.6114), the reparametrised draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.errors import DivergenceError, OptionError, ShapeError
from sdediff.shapes import PerRow, State, sum_rows

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """`N(mean, std^2)` with independent entries, one for every row.

    Attributes:
        mean: `(batch, *event)`.
        std: positive, of the shape of mean.
    """

    mean: State
    std: State

    def draw(self, normal: State) -> State:
        """`mean + std normal` for standard normal numbers `(batch, *event)`."""
        return self.mean + self.std * normal

    def log_prob(self, x: State) -> PerRow:
        """The log-density at x, shaped as mean; `(batch,)`."""
        _check_same(x, self.mean, "x")
        return -sum_rows(((x - self.mean) / self.std) ** 2 + 2 * self.std.log() + _LOG_2PI) / 2

    def entropy(self) -> PerRow:
        """`-E log q`, `(batch,)`."""
        return sum_rows(self.std.log() + (1 + _LOG_2PI) / 2)

    def kl(self, other: DiagonalGaussian) -> PerRow:
        """`KL(self || other)`, `(batch,)`."""
        _check_same(other.mean, self.mean, "the other Gaussian")
        log_ratio = self.std.log() - other.std.log()
        return sum_rows(torch.expm1(2 * log_ratio) - 2 * log_ratio + ((self.mean - other.mean) / other.std) ** 2) / 2


def _check_same(x: State, mean: State, name: str) -> None:
    if x.shape != mean.shape:
        raise ShapeError(f"{name} has shape {tuple(x.shape)} but the Gaussian {tuple(mean.shape)}; they must be equal.")


def gaussian_of(output: Any, name: str, like: State | None = None, *, rows: int | None = None) -> DiagonalGaussian:
    """The Gaussian that a conditional returned, checked.

    Raises:
        ShapeError: not a pair of tensors (mean, std) of the shape that is needed.
        DivergenceError: NaN or infinite entries; names the rows.
        OptionError: a std that is not positive.
    """
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(v, Tensor) for v in output)):
        raise ShapeError(f"{name} must return a pair of tensors (mean, std); it returned {type(output).__name__}.")
    mean, std = output
    expected = mean.shape if like is None else like.shape
    if mean.shape != expected or std.shape != expected or (rows is not None and mean.shape[:1] != (rows,)):
        needed = f"({rows}, *event)" if like is None else tuple(expected)
        raise ShapeError(
            f"{name} must return mean and std of one shape, {needed}; got {tuple(mean.shape)} and {tuple(std.shape)}."
        )
    wrong = (~(mean.isfinite() & std.isfinite())).reshape(len(mean), -1).any(1)
    if bool(wrong.any()):
        raise DivergenceError(
            f"What {name} returned is NaN or infinite",
            "Check what it is given there, lower lr, or bound its log-std.",
            step=None,
            time=None,
            rows=wrong.nonzero()[:, 0].tolist(),
        )
    if not bool((std > 0).all()):
        worst = std.detach().min().item()
        raise OptionError(
            f"{name} must return a positive std; got {worst:g}. End the network with exp or softplus: a log-std goes "
            f"through exp first, and must be bounded below where exp underflows, as below -87 in float32."
        )
    return DiagonalGaussian(mean, std)


def kl_divergence(
    mean_q: Float[Tensor, "*batch d"],
    cov_q: Float[Tensor, "*batch d d"],
    mean_p: Float[Tensor, "*batch d"],
    cov_p: Float[Tensor, "*batch d d"],
) -> Float[Tensor, "*batch"]:
    """`KL(N(mean_q, cov_q) || N(mean_p, cov_p))` in nats, for full covariances.

    Args:
        mean_q, mean_p: `(*batch, d)`.
        cov_q, cov_p: symmetric and positive definite, `(*batch, d, d)`.

    Raises:
        ShapeError: shapes that do not fit.
        OptionError: a covariance that is not symmetric positive definite.
    """
    factor_q, factor_p = _factor(mean_q, cov_q, "q"), _factor(mean_p, cov_p, "p")
    if mean_q.shape[-1] != mean_p.shape[-1]:
        raise ShapeError(
            f"A divergence needs two Gaussians over the same numbers; q has {mean_q.shape[-1]} and p "
            f"{mean_p.shape[-1]}: give means of the same last dimension."
        )
    seen = torch.linalg.solve_triangular(factor_p, factor_q, upper=False)
    moved = torch.linalg.solve_triangular(factor_p, (mean_p - mean_q)[..., None], upper=False)
    log_ratio = factor_p.diagonal(dim1=-2, dim2=-1).log().sum(-1) - factor_q.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = seen.square().sum((-2, -1))
    return log_ratio + (trace - mean_q.shape[-1] + moved.square().sum((-2, -1))) / 2


def _factor(mean: Tensor, cov: Tensor, name: str) -> Tensor:
    """The Cholesky factor of a covariance that fits its mean."""
    if mean.ndim == 0 or cov.shape[-2:] != (mean.shape[-1], mean.shape[-1]):
        raise ShapeError(
            f"cov_{name} must have shape (*batch, d, d) for mean_{name} of shape (*batch, d); got {tuple(cov.shape)} "
            f"for {tuple(mean.shape)}. Write torch.diag_embed(variances) for independent entries."
        )
    deviations = cov.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    unit = deviations[..., :, None] * deviations[..., None, :]
    tolerance = max(1e-6, 100 * torch.finfo(cov.dtype).eps)
    if not bool(((cov - cov.mT).abs() <= tolerance * unit).all()):
        raise OptionError(f"cov_{name} must be symmetric; it differs from its transpose: give (cov + cov.mT) / 2.")
    factor, failed = torch.linalg.cholesky_ex(cov)
    if bool((failed > 0).any()):
        smallest = torch.linalg.eigvalsh(cov).min().item()
        raise OptionError(
            f"cov_{name} must be positive definite; its smallest eigenvalue is {smallest:.3g}. Add a multiple of the "
            "identity."
        )
    return factor
