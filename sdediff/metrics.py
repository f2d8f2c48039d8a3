r"""Metrics: how far two sets of samples are from having one distribution.

All take sets `(n, *event)` of any event shape and compute in float64. For independent a, a' ~ P and b, b' ~ Q:

| metric | what it is | zero if and only if | bias |
|---|---|---|---|
| `energy_distance` | 2 E d(a, b) - E d(a, a') - E d(b, b') | P = Q | none |
| `mmd` | E k(a, a') + E k(b, b') - 2 E k(a, b), k a Gaussian of the distance | P = Q | none |
| `sliced_wasserstein` | root mean square of W_2 over projections on random lines | P = Q | up |
| `wasserstein` | W_p: the least (E d(a, b)^p)^(1/p) over all couplings | P = Q | up, as n^(-1/d) in many dimensions d |
| `frechet_distance` | W_2^2 of the normals with the moments of P and Q | moments agree | up, as 1/n |
| `precision_recall`, `density_coverage` | shares of balls of neighbours | (no distance) | see `sdediff.neighbours` |
| `classifier_two_sample` | accuracy of a classifier of P against Q | 1/2 where P = Q | see `sdediff.two_sample` |

`inception_score` sees only samples, through the probabilities of a classifier. `bootstrap(metric, a, b)` adds a
standard error to any of them (`sdediff.bootstrap`).

The Frechet distance is

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

With factors `S = R^T R`, the trace of the root is the sum of the singular values of `R1 R2^T`. No root of a matrix is
taken and no imaginary part dropped, and a singular covariance, of fewer samples than features, costs no accuracy: a
set of 30 samples of 120 features is 1e-13 from itself. Roots of the product's eigenvalues, as torchmetrics takes them,
make that -6e-6, and -1.5e-4 for 500 samples of 2,048 features, in 20 times the time.

References: Szekely and Rizzo 2013, energy; Gretton et al. 2012, MMD; Rabin et al. 2012, sliced Wasserstein; Peyre and
Cuturi 2019 (arXiv:1803.00567), Wasserstein; Dowson and Landau 1982, Heusel et al. 2017 (arXiv:1706.08500), Frechet;
Salimans et al. 2016 (arXiv:1606.03498), inception score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.bootstrap import Estimate as Estimate
from sdediff.bootstrap import bootstrap as bootstrap
from sdediff.errors import OptionError, ShapeError, optional_import
from sdediff.neighbours import DensityCoverage as DensityCoverage
from sdediff.neighbours import PrecisionRecall as PrecisionRecall
from sdediff.neighbours import density_coverage as density_coverage
from sdediff.neighbours import precision_recall as precision_recall
from sdediff.sets import Features, Rows, distances, extract, mean_between, mean_within, pair, vectors
from sdediff.shapes import State, as_float64
from sdediff.two_sample import TwoSample as TwoSample
from sdediff.two_sample import classifier_two_sample as classifier_two_sample

_MEDIAN_ROWS = 1000
_EPS = torch.finfo(torch.float64).eps


def energy_distance(a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"]) -> float:
    """Energy distance between the distributions of two sets, in units of the samples (unbiased, may be negative).

    Raises:
        ShapeError: the sets do not compare.
        OptionError: a sample is not finite.
    """
    a, b = pair(a, b)
    itself = torch.clone
    return 2 * mean_between(a, b, itself) - mean_within(a, itself) - mean_within(b, itself)


def mmd(
    a: Float[Tensor, " m *event"],
    b: Float[Tensor, " n *event"],
    bandwidth: float | Sequence[float] | None = None,
) -> float:
    """Square of the maximum mean discrepancy between two sets (unbiased, may be negative; at most 2).

    Args:
        bandwidth: h of the kernel `exp(-|x - y|^2 / (2 h^2))`; of several, the mean of their kernels is taken. If None,
            the median distance over pairs of the pooled sets (of 1,000 rows of each, where there are more).

    Raises:
        ShapeError: the sets do not compare.
        OptionError: a bandwidth is not a number > 0, or a sample is not finite.
    """
    a, b = pair(a, b)
    if bandwidth is None:
        widths = [_median_distance(a, b)]
    else:
        given: Sequence[Any] = bandwidth if isinstance(bandwidth, Sequence) else [bandwidth]
        widths = [h.item() if isinstance(h, Tensor) and h.ndim == 0 else h for h in given]
        if not widths or not all(isinstance(h, float | Real) and 0 < h < math.inf for h in widths):
            raise OptionError(f"bandwidth is a number > 0, several, or None for the median; got {bandwidth!r}.")

    def kernel(distance: Tensor) -> Tensor:
        return sum((-(distance**2) / (2 * h**2)).exp() for h in widths) / len(widths)  # type: ignore[return-value]  # widths is not empty

    return mean_within(a, kernel) + mean_within(b, kernel) - 2 * mean_between(a, b, kernel)


def _median_distance(a: Rows, b: Rows) -> float:
    """The median over all pairs of two different members of the pooled set, which a set in one place does not have."""
    generator = torch.Generator().manual_seed(0)
    some = [c[torch.randperm(len(c), generator=generator)[:_MEDIAN_ROWS].to(c.device)] for c in (a, b)]
    pooled = torch.cat(some)
    below = torch.ones(len(pooled), len(pooled), dtype=torch.bool, device=pooled.device).tril(-1)
    median = torch.cat(list(distances(pooled, pooled)))[below].median().item()
    if median == 0:
        raise OptionError("Half of all pairs are equal points, so that their median distance is 0: give bandwidth=.")
    return median


def sliced_wasserstein(
    a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], *, directions: int = 256, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance between two sets, in units of the samples (set sizes may differ).

    Args:
        directions: how many lines to project on.
        seed: of their directions.

    Raises:
        ShapeError: the sets do not compare.
        OptionError: directions < 1, or a sample is not finite.
    """
    a, b = pair(a, b)
    if not isinstance(directions, int | Integral) or directions < 1:
        raise OptionError(f"directions is how many lines to project on, a whole number >= 1; got {directions!r}.")
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=generator).to(a.device)
    axes = axes / axes.norm(dim=0)
    # both quantile functions are constant between these levels, in units of 1 / (m n)
    m, n = len(a), len(b)
    steps = torch.unique(torch.cat([torch.arange(m + 1) * n, torch.arange(n + 1) * m])).to(a.device)
    ranked = [(c @ axes).sort(dim=0).values for c in (a, b)]
    apart = ranked[0][steps[:-1] // n] - ranked[1][steps[:-1] // m]
    return (steps.diff().double() @ apart.square() / (m * n)).mean().sqrt().item()


def wasserstein(a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], p: float = 2.0) -> float:
    """Wasserstein distance `W_p` between two sets with equal weights, exactly, by the network simplex of POT.

    It is for sets of up to some 2,000 samples: time grows as the cube of the size (a second for 2,000), and all m n
    distances are held. The sizes may differ.

    Args:
        p: the power of the distance that is the cost, >= 1.

    Raises:
        ShapeError: the sets do not compare.
        OptionError: p is not a number >= 1, or a sample is not finite.
        MissingExtraError: POT is not installed.
    """
    a, b = pair(a, b)
    if not isinstance(p, float | Real) or not 1 <= p < math.inf:
        raise OptionError(f"p is the power of the distance, a finite number >= 1; got {p!r}.")
    far = torch.cat(list(distances(a, b, exact=True))).cpu()
    unit = far.max().item() or 1.0  # the simplex rounds costs below 1e-15 to 0
    cost = (far / unit) ** p
    weights = [torch.full((n,), 1 / n, dtype=torch.float64).numpy() for n in cost.shape]
    ot = optional_import("ot", "metrics")
    return unit * max(float(ot.emd2(*weights, cost.numpy(), numItermax=10**9)), 0.0) ** (1 / p)


def frechet_distance(
    a: Float[Tensor, " m *event"],
    b: Float[Tensor, " n *event"],
    features: Features | Callable[[State], Rows] | None = None,
) -> float:
    """Frechet distance between two sets: the squared 2-Wasserstein distance of the normals of their moments.

    With `features=sdediff.features.Inception()` it is the FID. It needs no more samples than features, but is biased
    upwards by about 1/n times a constant: compare sets of one size, or see the bias in `bootstrap`.

    Args:
        features: a function from samples to `(n, d)`, or an object with the method `features`; the entries of the
            samples themselves if None.

    Raises:
        ShapeError: the sets do not compare, or features are not one vector a sample.
        OptionError: a sample or a feature is not finite.
    """
    if features is not None:
        pair(a, b)
        a, b = extract(features, a), extract(features, b)
    a, b = pair(a, b)
    moments = [(c.mean(0), torch.linalg.qr((c - c.mean(0)) / math.sqrt(len(c) - 1), mode="r").R) for c in (a, b)]
    return _frechet(*moments[0], *moments[1])


def frechet_distance_of(
    mean1: Float[Tensor, " d"], cov1: Float[Tensor, "d d"], mean2: Float[Tensor, " d"], cov2: Float[Tensor, "d d"]
) -> float:
    """The squared 2-Wasserstein distance between two normal distributions, whose covariances may be singular.

    Raises:
        ShapeError: means and covariances are not of one dimension.
        OptionError: a moment is not finite, a covariance is not symmetric, or has a negative eigenvalue beyond
            rounding.
    """
    shapes = [tuple(value.shape) for value in (mean1, cov1, mean2, cov2)]
    d = mean1.numel()
    if shapes != [(d,), (d, d)] * 2:
        raise ShapeError(f"Means (d,) and covariances (d, d) of one d are needed; got {shapes}.")
    if not all(bool(value.isfinite().all()) for value in (mean1, cov1, mean2, cov2)):
        raise OptionError("The moments have NaN or infinite entries: a distance between them has no meaning.")
    return _frechet(as_float64(mean1), _factor(cov1), as_float64(mean2), _factor(cov2))


def _factor(cov: Tensor) -> Tensor:
    """R with `cov = R^T R`; eigenvalues that are rounding are 0."""
    cov = as_float64(cov)
    values, basis = torch.linalg.eigh(cov)
    noise = len(cov) * values.abs().max().item() * _EPS
    if (cov - cov.T).abs().max().item() > 8 * noise or values.min().item() < -8 * noise:
        raise OptionError(
            "A covariance must be symmetric and have no negative eigenvalue; got an asymmetry of "
            f"{(cov - cov.T).abs().max().item():.3g} and the least eigenvalue {values.min().item():.3g}."
        )
    return torch.where(values > noise, values, 0).sqrt()[:, None] * basis.T


def _frechet(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> float:
    """From means and factors; the trace of the root of the product is the nuclear norm of the factors' product."""
    apart = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum()
    return (apart - 2 * torch.linalg.svdvals(factor1 @ factor2.T).sum()).item()


def inception_score(probs: Float[Tensor, "n classes"], splits: int = 1) -> float:
    """Inception score `exp(E KL(p(y|x) || p(y)))`, from 1 (the classifier says nothing) to the number of classes.

    Args:
        probs: the probabilities that a classifier gives to the classes of every sample.
        splits: the rows are cut into so many parts of one length, within one row, and the scores averaged. Published
            numbers have 10; a part has its own p(y), of fewer samples, which biases the score down. Rows must be in
            random order: of samples sorted by class, each part knows one class only.

    Raises:
        ShapeError: probs is not `(n, classes)`.
        OptionError: a row is no distribution, or splits is not in 1 to n.
    """
    if probs.ndim != 2 or 0 in probs.shape:
        raise ShapeError(f"probs must be (n, classes), one distribution a sample; got {tuple(probs.shape)}.")
    if not isinstance(splits, int | Integral) or not 1 <= splits <= len(probs):
        raise OptionError(f"splits is a whole number, 1 to the number of rows, {len(probs)}; got {splits!r}.")
    probs = vectors(probs, "probs")
    off = (probs.sum(1) - 1).abs().max().item()
    if off > 1e-3 or probs.min().item() < 0:
        raise OptionError(
            "Each row of probs must be a distribution: numbers >= 0 that add up to 1. The least is "
            f"{probs.min().item():.3g} and a sum is off by {off:.3g}; logits want softmax(-1) first."
        )
    scores = []
    for part in probs.tensor_split(splits):
        marginal = part.mean(0)
        scores.append(math.exp((torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1).mean().item()))
    return sum(scores) / splits
