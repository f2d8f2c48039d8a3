r"""Oracles: Gaussians and Gaussian mixtures, whose score under every linear SDE is known exactly.

If data is `sum_k w_k N(m_k, S_k)`, then `p_t = sum_k w_k N(alpha m_k, alpha^2 S_k + sigma^2 I)`. With
`S_k = c_k I + U_k diag(e_k - c_k) U_k^T`, `U_k` orthonormal `(D, r)` (r = D for a full covariance, less for a low-rank
one), its inverse, determinant and products need only `z = U_k^T (x - alpha m_k)` and the rest `x - alpha m_k - U_k z`.
With responsibilities `gamma_k` of the components at x,

    v(x) = alpha E[eps | x] - sigma E[x_0 | x]
         = sigma sum_k gamma_k [ U_k alpha (1 - e_k) / (alpha^2 e_k + sigma^2) z
                                 + alpha (1 - c_k) / (alpha^2 c_k + sigma^2) rest - m_k ].

The models predict v because no difference of large numbers occurs in it at either end of time. Every row is computed
by itself (batched products, no shared reductions), so it is bitwise the same in any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.linear import LinearSDE, as_linear
from sdediff.model import ScoreModel
from sdediff.sde import SDE, fresh_seed
from sdediff.shapes import PerRow, State, Time, as_time, check_state, over


@dataclass(frozen=True, eq=False)
class LowRank:
    """Covariances `F_k F_k^T + c_k I`: factors `(K, D, r)` and floors `c`, `(K,)` or one number."""

    factors: Tensor
    floor: Tensor | float


def _spectrum(covs: Tensor | LowRank, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(U (K, D, r), e (K, r), c (K,))` of the covariances."""
    if isinstance(covs, LowRank):
        factors = torch.as_tensor(covs.factors, dtype=torch.float64)
        if factors.ndim != 3 or factors.shape[:2] != (count, size):
            raise ShapeError(f"LowRank factors must have shape ({count}, {size}, r); got {tuple(factors.shape)}.")
        floor = torch.as_tensor(covs.floor, dtype=torch.float64).expand(count)
        basis, singular, _ = torch.linalg.svd(factors, full_matrices=False)
        return basis, singular**2 + floor[:, None], floor
    covs = torch.as_tensor(covs, dtype=torch.float64)
    if covs.ndim <= 1:
        covs = covs.expand(count)[:, None, None] * torch.eye(size, dtype=torch.float64)
    elif covs.shape == (count, size):
        covs = torch.diag_embed(covs)
    if covs.shape != (count, size, size):
        raise ShapeError(
            f"Covariances must have shape ({count}, {size}, {size}) for {count} components of {size} entries, "
            f"({count}, {size}) for diagonals, ({count},) for multiples of the identity, or be LowRank; "
            f"got {tuple(covs.shape)}."
        )
    if not torch.allclose(covs, covs.mT, rtol=1e-6, atol=1e-12):
        raise OptionError("Covariances must be symmetric.")
    eigenvalues, basis = torch.linalg.eigh(covs)
    return basis, eigenvalues, torch.zeros(count, dtype=torch.float64)


class GaussianMixture:
    """A mixture of Gaussians over events of any shape.

    Args:
        weights: positive numbers `(K,)`; they are normalised.
        means: `(K, *event)`; their dtype is that of the samples.
        covs: `(K, D, D)` with D the number of entries of an event, or `(K, D)` diagonals, or `(K,)` multiples of the
            identity, or a `LowRank`.

    Raises:
        ShapeError, OptionError: shapes that do not fit, weights that are not positive, covariances that are not
            symmetric positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor | LowRank) -> None:
        means = torch.as_tensor(means)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        check_state(means, "means")
        if weights.shape != means.shape[:1]:
            raise ShapeError(f"weights must have shape ({means.shape[0]},), one per mean; got {tuple(weights.shape)}.")
        if not bool((weights > 0).all()):
            raise OptionError(f"weights must be positive; got {weights.tolist()}.")
        self.event = tuple(means.shape[1:])
        self.dtype = means.dtype
        self._weights = weights / weights.sum()
        self._means = means.to(torch.float64).reshape(len(means), -1)
        self._basis, self._eigen, self._floor = _spectrum(covs, *self._means.shape)
        self._low_rank = self._basis.shape[2] < self._basis.shape[1]
        smallest = min(self._eigen.min().item(), self._floor.min().item() if self._low_rank else math.inf)
        if not smallest > 0:
            raise OptionError(f"Covariances must be positive definite; the smallest eigenvalue is {smallest:.3g}.")

    @property
    def mean(self) -> Tensor:
        """The mean of the whole mixture, shaped as an event."""
        return (self._weights @ self._means).reshape(self.event).to(self.dtype)

    @property
    def cov(self) -> Tensor:
        """The covariance of the whole mixture over flattened events, `(D, D)`."""
        centred = self._means - self._weights @ self._means
        eye = torch.eye(self._means.shape[1], dtype=torch.float64)
        within = self._basis * (self._eigen - self._floor[:, None])[:, None, :] @ self._basis.mT
        within = within + self._floor[:, None, None] * eye
        return torch.einsum("k,kij->ij", self._weights, within + centred[:, :, None] * centred[:, None, :]).to(
            self.dtype
        )

    def sample(self, n: int, seed: int | None = None) -> State:
        """`n` exact samples `(n, *event)`."""
        generator = torch.Generator().manual_seed(fresh_seed() if seed is None else seed)
        which = torch.multinomial(self._weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self._means.shape[1], dtype=torch.float64, generator=generator)
        basis, floor = self._basis[which], self._floor[which].sqrt()[:, None]
        along = (basis.mT @ z[:, :, None])[..., 0]
        stretched = (basis @ ((self._eigen[which].sqrt() - floor) * along)[..., None])[..., 0]
        return (self._means[which] + floor * z + stretched).reshape(n, *self.event).to(self.dtype)

    def log_prob(self, x: State) -> PerRow:
        """`log p(x)` in nats, `(batch,)`."""
        one = torch.ones((), dtype=torch.float64)
        return torch.logsumexp(self._parts(x, one, 0 * one).log_density, dim=1)

    def marginal(self, sde: SDE, t: Time) -> GaussianMixture:
        """The distribution of `x_t` when `x_0` follows this mixture and moves by a linear SDE."""
        linear = as_linear(sde)
        alpha, sigma = linear.alpha(as_time(t)), linear.sigma(as_time(t))
        moved = GaussianMixture.__new__(type(self))
        moved.__dict__.update(self.__dict__)
        moved._means = alpha * self._means
        moved._eigen = alpha**2 * self._eigen + sigma**2
        moved._floor = alpha**2 * self._floor + sigma**2
        return moved

    def model(self, sde: SDE) -> ScoreModel:
        """The exact model of this data under the SDE (it must be linear)."""
        linear = as_linear(sde)
        return ScoreModel(_ExactNetwork(self, linear), linear, prediction="v", time=as_time)

    def _v(self, sde: LinearSDE, t: Tensor, x: State) -> State:
        alpha, sigma = sde.scales_at(as_time(t))
        parts = self._parts(x, alpha, sigma)
        gamma = torch.softmax(parts.log_density, dim=1)
        alpha, sigma = over(alpha, parts.along), over(sigma, parts.along)
        eigen = self._eigen.to(x)
        along = alpha * (1 - eigen) / (alpha**2 * eigen + sigma**2) * parts.along * gamma[..., None]
        v = _product(along.flatten(1), self._basis.mT.reshape(-1, self._means.shape[1]).to(x))
        v = v - _product(gamma, self._means.to(x))
        if parts.rest is not None:
            floor = self._floor[:, None].to(x)
            v = v + (gamma[..., None] * alpha * (1 - floor) / (alpha**2 * floor + sigma**2) * parts.rest).sum(1)
        return (sigma[:, 0] * v).reshape(x.shape)

    def _parts(self, x: State, alpha: Tensor, sigma: Tensor) -> _Parts:
        check_state(x)
        if tuple(x.shape[1:]) != self.event:
            raise ShapeError(f"x must have shape (batch, {', '.join(map(str, self.event))}); got {tuple(x.shape)}.")
        flat = x.reshape(x.shape[0], -1)
        count, size, rank = self._basis.shape
        means, basis, eigen = self._means.to(x), self._basis.to(x), self._eigen.to(x)
        alpha_x, sigma_x = over(alpha, flat), over(sigma, flat)
        along = _product(flat, basis.transpose(0, 1).reshape(size, count * rank)).reshape(-1, count, rank)
        at_means = (basis.mT @ means[..., None])[..., 0]
        along = along - alpha_x[..., None] * at_means
        variance = alpha_x[..., None] ** 2 * eigen + sigma_x[..., None] ** 2
        exponent = (along**2 / variance + variance.log()).sum(-1)
        rest = None
        if self._low_rank:
            rest = flat[:, None] - alpha_x[..., None] * means
            for j in range(rank):
                rest = rest - along[..., j, None] * basis[..., j]
            spread = alpha_x**2 * self._floor.to(x) + sigma_x**2
            exponent = exponent + (rest**2).sum(-1) / spread + (size - rank) * spread.log()
        log_density = self._weights.log().to(x) - (exponent + size * math.log(2 * math.pi)) / 2
        return _Parts(log_density, along, rest)


@dataclass(frozen=True)
class _Parts:
    log_density: Tensor
    """`log w_k N(x; ...)`, `(batch, K)`."""
    along: Tensor
    """`U_k^T (x - alpha m_k)`, `(batch, K, r)`."""
    rest: Tensor | None
    """What of `x - alpha m_k` is not in the span of `U_k`, `(batch, K, D)`; None at full rank."""


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` with every row multiplied by itself, so that its bits do not depend on the batch."""
    return torch.bmm(x[:, None], matrix.expand(len(x), *matrix.shape))[:, 0]


@dataclass(frozen=True, eq=False)
class _ExactNetwork:
    """The v-prediction of a mixture under an SDE, as a network; samples from it have the dtype of the means."""

    target: GaussianMixture
    sde: LinearSDE

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def event(self) -> tuple[int, ...]:
        return self.target.event

    def __call__(self, x: State, t: Tensor) -> State:
        return self.target._v(self.sde, t, x)


class Gaussian(GaussianMixture):
    """A Gaussian over events of any shape.

    Args:
        mean: shaped as an event.
        cov: `(D, D)`, or `(D,)` for a diagonal, or a number for a multiple of the identity.
    """

    def __init__(self, mean: Tensor, cov: Tensor | float) -> None:
        mean = torch.as_tensor(mean)
        super().__init__(torch.ones(1), mean[None], torch.as_tensor(cov, dtype=torch.float64)[None])

    @property
    def variances(self) -> Tensor:
        """Variances along the axes of the covariance, float64 `(D,)`."""
        return self._eigen[0]

    def flow(self, sde: SDE, x: State, t: Time, s: Time) -> State:
        """The probability-flow ODE from x at t to time s: `alpha_s m + S_s^(1/2) S_t^(-1/2) (x - alpha_t m)`."""
        start, end = self.marginal(sde, t), self.marginal(sde, s)
        flat = x.reshape(x.shape[0], -1) - start._means.to(x)
        ratio = (end._eigen / start._eigen).sqrt().to(x)
        basis = self._basis[0].to(x)
        return (end._means.to(x) + _product(ratio * _product(flat, basis), basis.mT.contiguous())).reshape(x.shape)
