r"""The noise end: what stands for p_T, and by how much it misses.

The SDE's own prior is `N(0, sigma_T^2 I)`, from which `sample` starts. p_T is `alpha_T x_0 + sigma_T eps`, with mean
and covariance `alpha_T m` and `alpha_T^2 C + sigma_T^2 I`, which `matched_prior` has. For `q = N(x_T; mean, std^2 I)`
and a Gaussian prior with precision matrix P,

    E_q log prior = log prior(mean) - std^2 tr(P) / 2,        KL(q || prior) = -D / 2 log(2 pi e std^2) - E_q log prior.

With q the kernel `p(x_T | x_0)`, the mean of this divergence over data is that of p_T from the prior plus what x_T
still knows of x_0, and so bounds the former.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from sdediff.errors import OptionError, ShapeError
from sdediff.exact import Gaussian
from sdediff.sde import SDE
from sdediff.shapes import PerRow, State, check_state, sum_rows

Prior: TypeAlias = Gaussian | Distribution


def matched_prior(sde: SDE, data: State, *, covariance: str = "full") -> Gaussian:
    """`N(alpha m, alpha^2 C + sigma^2 I)` at t_max, with m and C the mean and covariance of data.

    In place of the SDE's own prior it takes off what `prior_gap` sizes, but for third and higher moments. It is one
    distribution for all rows: give it training data, not the rows that are scored.

    Args:
        data: `(batch, *event)`, of the model's space.
        covariance: "full", or "diagonal" where there are few rows or many entries.

    Raises:
        OptionError: unknown covariance.
        ShapeError: fewer than two rows.
    """
    check_state(data, "data")
    if covariance not in ("full", "diagonal"):
        raise OptionError(f"Unknown covariance {covariance!r}: write 'full' or 'diagonal'.")
    if len(data) < 2:
        raise ShapeError(f"matched_prior needs at least two rows of data; got {len(data)}.")
    alpha, sigma = sde.linear().scales_at(torch.tensor(sde.t_max, dtype=torch.float64))
    flat = data.detach().cpu().double().reshape(len(data), -1)
    mean = (alpha * flat.mean(0)).reshape(data.shape[1:])
    if covariance == "diagonal":
        return Gaussian(mean, alpha**2 * flat.var(0) + sigma**2)
    centred = flat - flat.mean(0)
    cov = alpha**2 * centred.T @ centred / (len(data) - 1) + sigma**2 * torch.eye(flat.shape[1], dtype=torch.float64)
    return Gaussian(mean, (cov + cov.T) / 2)


def is_gaussian(prior: object) -> bool:
    """Whether it is an `exact.Gaussian`, or a Normal with independent entries."""
    return isinstance(prior, Gaussian) or _normal(prior) is not None


def mean_log_prob(prior: Prior, mean: State, std: float) -> PerRow:
    """`E log prior(mean + std eps)` for a Gaussian prior, float64 on the CPU."""
    mean = mean.detach().cpu().double()
    if isinstance(prior, Gaussian):
        return prior.log_prob(mean) - std**2 / 2 * (1 / prior.variances).sum()
    normal = _normal(prior)
    assert normal is not None
    loc, spread = (value.detach().double().cpu().expand(mean.shape[1:]) for value in (normal.mean, normal.stddev))
    exponent = ((mean - loc) / spread) ** 2 + (std / spread) ** 2 + 2 * spread.log() + math.log(2 * math.pi)
    return -sum_rows(exponent) / 2


def kl_to_prior(prior: Prior, mean: State, std: float) -> PerRow:
    """`KL(N(mean, std^2 I) || prior)` in nats for a Gaussian prior, float64 on the CPU."""
    size = math.prod(mean.shape[1:])
    return -size / 2 * (math.log(2 * math.pi) + 1 + 2 * math.log(std)) - mean_log_prob(prior, mean, std)


def _normal(prior: object) -> Normal | None:
    """The Normal with independent entries that a distribution is, if it is one."""
    base: Tensor | object = prior.base_dist if isinstance(prior, Independent) else prior
    return base if isinstance(base, Normal) else None
