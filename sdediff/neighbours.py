r"""Fidelity and diversity apart: what share of samples is realistic, what share of the data is covered.

Around each point of a set lies the ball that reaches to its k-th nearest neighbour in the set; the union of the balls
stands for the support of the distribution. With samples a_1 ... a_M, data b_1 ... b_N, and B(.) the balls,

    precision = 1 / M    #{j: a_j in some B(b_i)}           samples that lie where data is,
    recall    = 1 / N    #{i: b_i in some B(a_j)}           data that lies where samples are,
    density   = 1 / (kM) #{(j, i): a_j in B(b_i)}           in how many balls a sample lies, over k; may exceed 1,
    coverage  = 1 / N    #{i: B(b_i) holds some a_j}        data with a sample near by.

An outlier of the data has a wide ball, which lets precision count bad samples as good; density weighs it as one ball of
many. Recall asks balls of the samples, so that outliers among these flatter a model; coverage asks those of the data.
If both sets have one continuous distribution, whichever it is,

    E density = 1,        E coverage = 1 - prod_{i < k} (N - 1 - i) / (M + N - 1 - i).

Precision and recall have no such value: they depend on the distribution and its dimension, and are to be read beside
those of two sets of data.

References: Kynkaanniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).
"""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.errors import OptionError
from sdediff.sets import Rows, distances, pair


class PrecisionRecall(NamedTuple):
    """The share of samples on the support of the data, and of data on the support of the samples."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """In how many balls of the data a sample lies, over k, and the share of these balls that hold a sample."""

    density: float
    coverage: float


def precision_recall(a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], k: int = 3) -> PrecisionRecall:
    """Precision and recall of samples a against data b, in [0, 1].

    Args:
        a, b: sets of samples, best in a space of features where near means alike.
        k: the neighbour that a ball reaches to.

    Raises:
        OptionError: k is not in 1 to the size of a set less one, or a sample is not finite.
        ShapeError: the sets do not compare.
    """
    a, b = _checked(a, b, k)
    return PrecisionRecall(_inside(a, b, k).gt(0).double().mean().item(), _inside(b, a, k).gt(0).double().mean().item())


def density_coverage(a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], k: int = 5) -> DensityCoverage:
    """Density (>= 0, near 1 at best) and coverage (in [0, 1]) of samples a against data b.

    Args:
        a, b, k: as for `precision_recall`.

    Raises:
        OptionError, ShapeError: as for `precision_recall`.
    """
    a, b = _checked(a, b, k)
    reach = _reach(b, k)
    held = torch.cat([part.min(1).values for part in distances(b, a, exact=True)]) <= reach
    return DensityCoverage(_inside(a, b, k).double().mean().item() / k, held.double().mean().item())


def _checked(a: Tensor, b: Tensor, k: int) -> tuple[Rows, Rows]:
    first, second = pair(a, b)
    if not isinstance(k, int | Integral) or not 1 <= k < min(len(a), len(b)):
        raise OptionError(
            f"k is the number of a neighbour, 1 to {min(len(a), len(b)) - 1} for sets of {len(a)} and {len(b)} "
            f"samples; got {k!r}."
        )
    return first, second


def _reach(a: Rows, k: int) -> Tensor:
    """From each point to its k-th nearest neighbour in the set; the nearest of all is the point itself."""
    return torch.cat([part.kthvalue(k + 1, dim=1).values for part in distances(a, a, exact=True)])


def _inside(a: Rows, b: Rows, k: int) -> Tensor:
    """In how many balls of b each point of a lies; the rim belongs to the ball."""
    reach = _reach(b, k)
    return torch.cat([(part <= reach).sum(1) for part in distances(a, b, exact=True)])
