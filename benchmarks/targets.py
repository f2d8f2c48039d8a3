"""Exact targets: Gaussian mixtures whose score under every linear SDE is known, in float64.

Three main ones and five held out. The numbers of the main ones were chosen by looking at other libraries' errors only;
the held-out ones are for checking that nothing was tuned to the main ones. All are made from fixed seeds.

| name | what |
|---|---|
| ring2d | 8 unequal modes on a ring in the plane, standard deviations .05 to .3 |
| gauss64 | Gaussian in 64 dimensions, rotated axes, standard deviations .05 to 2 |
| lowrank64 | 8 components of rank 4 and thickness .05 in 64 dimensions |
| spiral | 60 narrow modes on a spiral in the plane |
| ring4 | 8 modes on a ring of radius 4 |
| lowrank64b | 5 components of rank 8 and thickness .02 in 64 dimensions |
| lowrank16 | 6 components of rank 2 and thickness .05 in 16 dimensions |
| power128 | 4 components in 128 dimensions whose standard deviations fall as a power of the axis number |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import sdediff as sd

T_END = 1e-3
"""Where every solve ends; all start at t = 1."""


def process() -> sd.VP:
    """The forward process of all benchmarks."""
    return sd.VP(beta_min=0.1, beta_max=20.0, t_min=T_END)


@dataclass(frozen=True, eq=False)
class Target:
    """A mixture and its plain parameters, all float64.

    Attributes:
        name: its name.
        mixture: the exact distribution.
        weights: `(K,)`, normalised.
        means: `(K, D)`.
        covs: full covariances `(K, D, D)`.
    """

    name: str
    mixture: sd.exact.GaussianMixture
    weights: Tensor
    means: Tensor
    covs: Tensor

    @property
    def size(self) -> int:
        """Number of dimensions."""
        return self.means.shape[1]

    def start(self, n: int, seed: int) -> Tensor:
        """Exact draws of `x_t` at t = 1, `(n, D)`."""
        return self.mixture.marginal(process(), 1.0).sample(n, seed)

    def at_end(self) -> tuple[Tensor, Tensor]:
        """Means and covariances of the components at `T_END`."""
        alpha, sigma = process().scales(torch.tensor(T_END, dtype=torch.float64))
        return alpha * self.means, alpha**2 * self.covs + sigma**2 * torch.eye(self.size, dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator(seed))


def _uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=_generator(seed))


def _rotation(size: int, seed: int) -> Tensor:
    q, r = torch.linalg.qr(_normal(size, size, seed=seed))
    return q * r.diagonal().sign()


def _dots(name: str, weights: Tensor, means: Tensor, stds: Tensor) -> Target:
    """Round modes."""
    weights = weights / weights.sum()
    covs = stds[:, None, None] ** 2 * torch.eye(means.shape[1], dtype=torch.float64)
    return Target(name, sd.exact.GaussianMixture(weights, means, covs), weights, means, covs)


def _low_rank(
    name: str, *, size: int, count: int, rank: int, thickness: float, spread: float, length: float, seed: int
) -> Target:
    """Flat components.

    `spread` is the standard deviation of the entries of the means; the `rank` long axes have lengths between half of
    `length` and `length`.
    """
    weights = 0.5 + _uniform(count, seed)
    weights = weights / weights.sum()
    means = spread * _normal(count, size, seed=seed + 1)
    axes = torch.stack([_rotation(size, seed + 10 + k)[:, :rank] for k in range(count)])
    lengths = length * (0.5 + 0.5 * _uniform(count * rank, seed + 2).reshape(count, 1, rank))
    factors = axes * lengths
    mixture = sd.exact.GaussianMixture(weights, means, sd.exact.LowRank(factors, thickness**2))
    covs = factors @ factors.mT + thickness**2 * torch.eye(size, dtype=torch.float64)
    return Target(name, mixture, weights, means, covs)


def ring2d(radius: float = 1.2, low: float = 0.05, high: float = 0.3, seed: int = 1) -> Target:
    """8 modes on a ring; weights between 1 and 3, standard deviations geometric between `low` and `high`, shuffled."""
    count = 8
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    weights = 1 + 2 * _uniform(count, seed)
    stds = low * (high / low) ** torch.linspace(0, 1, count, dtype=torch.float64)
    return _dots("ring2d", weights, means, stds[torch.randperm(count, generator=_generator(seed + 1))])


def gauss64() -> Target:
    """Gaussian in 64 dimensions."""
    size = 64
    stds = 0.05 * 40 ** torch.linspace(0, 1, size, dtype=torch.float64)
    axes = _rotation(size, 0)
    cov = (axes * stds**2) @ axes.T
    cov = (cov + cov.T) / 2
    mean = torch.zeros(size, dtype=torch.float64)
    return Target("gauss64", sd.exact.Gaussian(mean, cov), torch.ones(1).double(), mean[None], cov[None])


def lowrank64() -> Target:
    """8 flat components in 64 dimensions."""
    return _low_rank("lowrank64", size=64, count=8, rank=4, thickness=0.05, spread=0.25, length=1.5, seed=0)


def spiral() -> Target:
    """60 narrow modes on two turns of a spiral."""
    along = torch.linspace(0, 1, 60, dtype=torch.float64)
    angles, radii = 4 * math.pi * along, 0.3 + 1.4 * along
    means = radii[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    return _dots("spiral", 1 + _uniform(60, 100), means, torch.full((60,), 0.04, dtype=torch.float64))


def ring4() -> Target:
    """8 modes on a ring of radius 4."""
    angles = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    means = 4 * torch.stack([angles.cos(), angles.sin()], dim=1)
    stds = 0.2 + 0.6 * _uniform(8, 201)
    return _dots("ring4", 1 + _uniform(8, 200), means, stds)


def lowrank64b() -> Target:
    """5 flat components in 64 dimensions, thinner and of higher rank."""
    return _low_rank("lowrank64b", size=64, count=5, rank=8, thickness=0.02, spread=0.3, length=1.5, seed=300)


def lowrank16() -> Target:
    """6 flat components in 16 dimensions."""
    return _low_rank("lowrank16", size=16, count=6, rank=2, thickness=0.05, spread=0.5, length=1.0, seed=400)


def power128() -> Target:
    """4 components whose standard deviations are `1.5 i**-0.75` along rotated axes."""
    size, count = 128, 4
    stds = 1.5 * torch.arange(1, size + 1, dtype=torch.float64) ** -0.75
    axes = torch.stack([_rotation(size, 500 + k) for k in range(count)])
    covs = (axes * stds**2) @ axes.mT
    covs = (covs + covs.mT) / 2
    weights = 0.5 + _uniform(count, 510)
    weights = weights / weights.sum()
    means = 0.2 * _normal(count, size, seed=511)
    return Target("power128", sd.exact.GaussianMixture(weights, means, covs), weights, means, covs)


MAIN: dict[str, Callable[[], Target]] = {"ring2d": ring2d, "gauss64": gauss64, "lowrank64": lowrank64}
HELD_OUT: dict[str, Callable[[], Target]] = {
    "spiral": spiral,
    "ring4": ring4,
    "lowrank64b": lowrank64b,
    "lowrank16": lowrank16,
    "power128": power128,
}


@cache
def get(name: str) -> Target:
    """The target of this name."""
    return (MAIN | HELD_OUT)[name]()
