r"""Distances between two sets of samples, in the space of the samples themselves.

- `sliced_wasserstein`: the root mean square over random directions of the 2-Wasserstein distance between projections.
- `energy_distance`: `2 E|a - b| - E|a - a'| - E|b - b'|`, zero if and only if the distributions agree; the unbiased
  estimate, which may come out slightly negative.

References: Rabin et al. 2012; Szekely and Rizzo 2013.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.errors import ShapeError


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[1:] != b.shape[1:] or len(a) < 2 or len(b) < 2:
        raise ShapeError(
            "Two sets of at least two samples of one event shape are needed; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return a.reshape(len(a), -1).double(), b.reshape(len(b), -1).double()


def energy_distance(a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"]) -> float:
    """Energy distance between the distributions of two sample sets (unbiased)."""
    a, b = _pair(a, b)
    within = sum(torch.cdist(c, c).sum().item() / (len(c) * (len(c) - 1)) for c in (a, b))
    return 2 * torch.cdist(a, b).mean().item() - within


def sliced_wasserstein(
    a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], *, directions: int = 256, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance between two sample sets (set sizes may differ)."""
    a, b = _pair(a, b)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=generator).to(a.device)
    axes = axes / axes.norm(dim=0)
    levels = (torch.arange(max(len(a), len(b)), dtype=torch.float64, device=a.device) + 0.5) / max(len(a), len(b))
    quantiles = [_sorted_at((c @ axes).sort(dim=0).values, levels) for c in (a, b)]
    return (quantiles[0] - quantiles[1]).square().mean().sqrt().item()


def _sorted_at(ranked: Tensor, levels: Tensor) -> Tensor:
    """The empirical quantile function at levels in (0, 1)."""
    return ranked[(levels * len(ranked)).long().clamp(max=len(ranked) - 1)]
