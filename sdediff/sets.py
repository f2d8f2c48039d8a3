r"""Sets of samples: what the metrics take, the features in which they compare, and distances between all pairs.

A set is `(n, *event)` of any event shape. It is compared as float64 vectors `(n, d)`: the samples laid flat, or their
features. Distances between all pairs of m and n points come a few rows at a time, so that large sets need
no memory for the m n numbers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.modes import evaluating
from sdediff.shapes import State, as_float64

Rows: TypeAlias = Float[Tensor, "n d"]

_ENTRIES = 1 << 22


@runtime_checkable
class Features(Protocol):
    """Anything that maps samples to vectors in which they are compared."""

    def features(self, x: State) -> Rows:
        """`(n, *event)` to `(n, d)`."""


def extract(features: Features | Callable[[State], Rows], x: State) -> Rows:
    """Samples as their features, without gradients; modules are in evaluation mode meanwhile.

    Raises:
        ShapeError: the features are not one vector a sample.
        OptionError: features can not be called.
    """
    if not isinstance(features, Features) and not callable(features):
        raise OptionError(
            "features is a function from samples to vectors (n, d), or an object with the method features, such as "
            f"sdediff.features.Inception(); got {features!r}."
        )
    with torch.no_grad(), evaluating(features):
        out = features.features(x) if isinstance(features, Features) else features(x)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"Features must be one vector a sample, ({len(x)}, d); got {got}.")
    return out


def vectors(x: Tensor, name: str = "The set") -> Rows:
    """A set as float64 vectors `(n, d)`.

    Raises:
        ShapeError: it is complex.
        OptionError: a sample is NaN or infinite.
    """
    if x.is_complex():
        raise ShapeError(f"{name} is complex ({x.dtype}): take its real numbers, torch.view_as_real(x).")
    flat = as_float64(x).detach().reshape(len(x), -1)
    bad = (~flat.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        rows = ", ".join(map(str, bad[:8].tolist())) + (", ..." if len(bad) > 8 else "")
        raise OptionError(
            f"{name} has {len(bad)} of {len(x)} samples with NaN or infinite entries (rows {rows}): a distance to them "
            "has no meaning. Find out where they come from, or leave them out and say so."
        )
    return flat


def pair(a: Tensor, b: Tensor, least: int = 2) -> tuple[Rows, Rows]:
    """Two sets as float64 vectors about their common mean, on which no distance depends.

    Args:
        least: how many samples each must have.

    Raises:
        ShapeError: they are no real tensors, have different or empty events, or too few samples.
        OptionError: a sample is NaN or infinite.
    """
    for x in (a, b):
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"Sets of samples are tensors (n, *event); got {type(x).__name__}. Arrays become tensors by "
                "torch.from_numpy(x), lists by torch.tensor(x)."
            )
    if 0 in (a.ndim, b.ndim, *a.shape[1:]) or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < least:
        count = {2: "two", 3: "three", 4: "four"}.get(least, str(least))
        raise ShapeError(
            f"Two sets of at least {count} samples of one event shape are needed; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    first, second = vectors(a, "The first set"), vectors(b, "The second set").to(a.device)
    centre = (first.mean(0) + second.mean(0)) / 2
    return first - centre, second - centre


def distances(a: Rows, b: Rows, *, exact: bool = False) -> Iterator[Tensor]:
    """The distances from points of a to all points of b, `(rows, len(b))` at a time, in order.

    Args:
        exact: whether each distance is taken from the difference of two points. Otherwise large sets go through a
            matrix product, some ten times faster in many dimensions; the square of a distance then carries an error of
            1e-15 of the squared norms, by which equal points seem 1e-7 apart.
    """
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    for part in torch.split(a, max(1, _ENTRIES // max(len(b), 1))):
        yield torch.cdist(part, b, compute_mode=mode)


def mean_between(a: Rows, b: Rows, function: Callable[[Tensor], Tensor]) -> float:
    """The mean of a function of the distance over all pairs of a point of a and a point of b."""
    return sum(function(part).sum().item() for part in distances(a, b)) / (len(a) * len(b))


def mean_within(a: Rows, function: Callable[[Tensor], Tensor]) -> float:
    """The same over all ordered pairs of two different members of a."""
    total, row = 0.0, 0
    for part in distances(a, a):
        values = function(part)
        values.diagonal(row).zero_()
        total += values.sum().item()
        row += len(part)
    return total / (len(a) * (len(a) - 1))
