r"""Laws of training times: which noise levels a loss looks at, and how often.

A loss is a mean of some f over even times of the span, `1 / (t_max - t_min) int f(t) dt`. A law draws times of another
density q and gives each the weight `1 / ((t_max - t_min) q(t))`, so that

    E[weight f(t)] = mean of f over even times,

whatever the law: it changes the variance of the estimate and nothing else. The variance is least for q proportional
to `sqrt(E f^2)`.

| law | q(t) | for |
|---|---|---|
| `Even` | 1 | all |
| `LogSNR` | g^2 / sigma^2, even in log SNR | the weighting "likelihood", whose own factor it cancels |
| `LogSNR(scale=c)` | the same times c^2 snr / (1 + c^2 snr) | the same if the noise error is that of data of scale c |
| `LogNormal` | log(sigma / alpha) is normal | "edm" |
| `Steps` | the ends of the steps of a grid | "vlb", chains |
| `Levels` | some times, equally often | NCSN's noise levels |
| `LossAware` | of another law, times sqrt(E L^2) of the losses seen in each of its bins | losses of unknown size |

Times on a grid have no density. `Steps` takes the Riemann sum for the integral: it draws each of its n steps (s, t]
equally often, with the weight `n (t - s) / (last - first)`, so that its mean is that over the span of its grid, which
may be part of that of the SDE. `Levels` has the mean over its levels in place of that over
even times. In `LossAware`, losses are those per number of the other law, which its weight is part of.

A law is a rising map from numbers u in [0, 1) to times, and those numbers may be drawn in three ways: "independent",
"low_discrepancy" (one number shifted by i / n, so that every batch covers all levels), or "antithetic" (in pairs u,
1 - u). Each of them is uniform in all three.

References: Song et al. 2021 (arXiv:2101.09258), even log SNR; Kingma et al. 2021 (arXiv:2107.00630), shifted numbers;
Karras et al. 2022 (arXiv:2206.00364), log-normal levels; Nichol and Dhariwal 2021 (arXiv:2102.09672), loss-aware times;
Song and Ermon 2019 (arXiv:1907.05600), levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdediff.errors import CapabilityError, DivergenceError, OptionError, TimeError
from sdediff.linear import LinearSDE
from sdediff.sde import SLACK
from sdediff.shapes import Grid, PerRow, as_float64, as_time

Generator = torch.Generator | None

_DEFAULT_STEPS = 1000


# Numbers in [0, 1).


def independent(n: int, *, generator: Generator = None) -> PerRow:
    """`n` independent uniform numbers in [0, 1), float64 `(n,)`."""
    return torch.rand(n, dtype=torch.float64, generator=generator)


def low_discrepancy(n: int, *, generator: Generator = None) -> PerRow:
    """`n` numbers in [0, 1), each uniform, jointly even: `(u + i / n) mod 1` for one uniform u; float64 `(n,)`."""
    u = torch.rand((), dtype=torch.float64, generator=generator)
    return (u + torch.arange(n, dtype=torch.float64) / n) % 1


def antithetic(n: int, *, generator: Generator = None) -> PerRow:
    """`n` numbers in [0, 1) in pairs u and 1 - u, each uniform; float64 `(n,)`."""
    u = torch.rand((n + 1) // 2, dtype=torch.float64, generator=generator)
    return torch.stack([u, -u % 1], dim=1).flatten()[:n]


NUMBERS: dict[str, Callable[..., PerRow]] = {
    "low_discrepancy": low_discrepancy,
    "independent": independent,
    "antithetic": antithetic,
}
"""Ways to draw uniform numbers, by name."""


# Laws.


class Law(ABC):
    """A law of times in the span of a linear SDE.

    Attributes:
        numbers: how uniform numbers are drawn, one of `NUMBERS`.
    """

    numbers: str = "low_discrepancy"

    def __post_init__(self) -> None:
        if self.numbers not in NUMBERS:
            raise OptionError(f"Unknown numbers {self.numbers!r}: write one of {', '.join(map(repr, NUMBERS))}.")

    @abstractmethod
    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        """The times of numbers in [0, 1), rising with them; float64, of their shape."""

    @abstractmethod
    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """What makes the mean of `weight f(t)` over this law that over even times; float64, of the shape of t.

        (For `Steps` over even times of the span of its grid, for `Levels` over its levels.)
        """

    def draw(self, sde: LinearSDE, n: int, *, generator: Generator = None) -> tuple[PerRow, PerRow]:
        """Times and their weights, float64 `(n,)` each."""
        t = self.time(sde, NUMBERS[self.numbers](n, generator=generator))
        return t, self.weight(sde, t)

    def observe(self, sde: LinearSDE, t: PerRow, losses: PerRow) -> None:  # noqa: B027  # most laws learn nothing
        """Learn from the losses f(t) of some rows, without their weights."""

    def points(self, sde: LinearSDE) -> Tensor | None:
        """The times of a law that draws some times equally often, float64, rising; None for laws with a density."""
        return None

    def starts(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """Where the steps begin that end at these times, for laws on the steps of a grid."""
        raise CapabilityError(f"Steps that end at a time are those of a grid: write times=Steps(grid); got {self}.")


@dataclass(frozen=True)
class Even(Law):
    """Even times over the span."""

    numbers: str = "low_discrepancy"

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        return sde.t_min + u * (sde.t_max - sde.t_min)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogSNR(Law):
    """Times even in `log(1 / c^2 + snr)`; for the scale c infinite, in log SNR.

    Args:
        scale: rough standard deviation of the data; infinite where the error of the noise does not depend on the level.
    """

    scale: float = math.inf
    numbers: str = "low_discrepancy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise OptionError(f"LogSNR needs scale > 0; got {self.scale}.")

    @property
    def _floor(self) -> Tensor:
        return -2 * as_float64(self.scale).log()

    def _ends(self, sde: LinearSDE) -> Tensor:
        ends = torch.logaddexp(sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)), self._floor)
        if not bool(ends.isfinite().all()):
            end = "t_min" if not bool(ends[0].isfinite()) else "t_max"
            advice = (
                "give the SDE a larger t_min" if end == "t_min" else "write LogSNR(scale=...), with that of the data"
            )
            raise TimeError(
                f"The log-SNR of {sde} is infinite at its {end} = {getattr(sde, end):g}: {advice}, or Even()."
            )
        return ends

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        first, last = self._ends(sde)
        level = first + u * (last - first)
        return sde.time(level + (-torch.expm1(self._floor - level)).log()).clamp(sde.t_min, sde.t_max)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        first, last = self._ends(sde)
        rate = _rate(sde, t) * (sde.log_snr(t) - self._floor).sigmoid()
        return (first - last) / ((sde.t_max - sde.t_min) * rate)


@dataclass(frozen=True)
class LogNormal(Law):
    """Times of normal `log(sigma / alpha)`, given that they lie in the span."""

    mean: float = -1.2
    std: float = 1.2
    numbers: str = "low_discrepancy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.std > 0:
            raise OptionError(f"LogNormal needs std > 0; got {self.std}.")

    def _shares(self, sde: LinearSDE) -> tuple[Tensor, Tensor]:
        """`log(sigma / alpha)` at the ends of the span, and what is below them of the distribution."""
        ends = -sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)) / 2
        below = torch.special.ndtr((ends - self.mean) / self.std)
        if not below[1] - below[0] > 1e-9:
            raise TimeError(
                f"{self} has none of its levels in the span of {sde}, where log(sigma / alpha) runs from {ends[0]:g} "
                f"to {ends[1]:g}: give another mean."
            )
        return ends, below

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        ends, below = self._shares(sde)
        level = self.mean + self.std * torch.special.ndtri(below[0] + u * (below[1] - below[0]))
        return sde.time(-2 * level.clamp(*ends)).clamp(sde.t_min, sde.t_max)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        _, below = self._shares(sde)
        z = (-sde.log_snr(t) / 2 - self.mean) / self.std
        density = (-(z**2) / 2).exp() / (math.sqrt(2 * math.pi) * self.std * (below[1] - below[0]))
        return 2 / ((sde.t_max - sde.t_min) * density * _rate(sde, t))


@dataclass(frozen=True, eq=False, repr=False)
class Steps(Law):
    """The ends of the steps (s, t] of a grid, each equally often, with the lengths of the steps as weights.

    Args:
        grid: times, all falling (as grids of samplers are) or all rising, at least two; None for the SDE's own `times`
            where it has them, as a chain does, and else 1000 even steps.
    """

    grid: Tensor | Sequence[float] | None = None
    numbers: str = "low_discrepancy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None:
            object.__setattr__(self, "grid", _rising(self.grid, "Steps", 2))

    def of(self, sde: LinearSDE) -> Grid:
        """The grid, rising."""
        grid = getattr(sde, "times", None) if self.grid is None else self.grid
        if grid is None:
            return torch.linspace(sde.t_min, sde.t_max, _DEFAULT_STEPS + 1, dtype=torch.float64)
        rising = _rising(grid, "Steps", 2)
        sde.check_span(rising, "times")
        return rising

    def points(self, sde: LinearSDE) -> Tensor:
        return self.of(sde)[1:]

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        return _nth(self.points(sde), u)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        grid = self.of(sde)
        return (len(grid) - 1) * (t - self.starts(sde, t)) / (grid[-1] - grid[0])

    def starts(self, sde: LinearSDE, t: Tensor) -> Tensor:
        grid = self.of(sde)
        starts = grid.to(t.device)[_index(grid[1:], t, "the end of a step", SLACK * sde.t_max)]
        empty = t <= starts  # the start of the first step, if that is shorter than the slack
        if bool(empty.any()):
            raise TimeError(f"t = {t[empty].reshape(-1)[0]:g} is the start of {self}, and not the end of a step.")
        return starts

    def __repr__(self) -> str:
        grid = "None" if self.grid is None else f"{_ends(self.grid, -1)} steps"
        return f"Steps({grid}, {self.numbers!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Levels(Law):
    """Some times, equally often; all weights are 1.

    Args:
        levels: times, all falling or all rising.
    """

    levels: Tensor | Sequence[float]
    numbers: str = "low_discrepancy"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "levels", _rising(self.levels, "Levels", 1))

    def points(self, sde: LinearSDE) -> Tensor:
        levels = as_time(self.levels)
        sde.check_span(levels, "levels")
        return levels

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        return _nth(self.points(sde), u)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        _index(as_time(self.levels), t, "one of the levels", SLACK * sde.t_max)
        return torch.ones_like(t)

    def __repr__(self) -> str:
        return f"Levels({_ends(self.levels)} levels, {self.numbers!r})"


class LossAware(nn.Module, Law):
    """Another law, whose numbers are drawn more often where losses have been large.

    The numbers of the other law lie in equal bins. With L the losses seen last in a bin, it is drawn with probability

        p = (1 - floor) sqrt(mean L^2) / (sum of these over bins) + floor / bins,

    and the weights are divided by `bins p`. All bins are equally likely until each has seen `history` losses. What it
    has seen is the state of a module, in buffers: use one object for one training run.

    Args:
        base: the other law, `Even()` if None.
        bins: their number; with `Levels` or `Steps`, as many as there are of these, or a divisor of that (a chain of
            1000 betas has 999 steps: 999, 333, 111, 37, 27, 9, 3).
        history: losses remembered of every bin.
        floor: part of the numbers drawn evenly, in (0, 1].
    """

    unaveraged = True
    """The buffers are a history, of which `train` must not make a moving average."""

    def __init__(self, base: Law | None = None, *, bins: int = 100, history: int = 10, floor: float = 0.001) -> None:
        super().__init__()
        self.base = Even() if base is None else base
        if not isinstance(self.base, Law):
            raise OptionError(f"LossAware changes another law of times, such as Even(); got {base!r}.")
        if bins < 1 or history < 1 or not 0 < floor <= 1:
            raise OptionError(
                f"LossAware needs bins, history >= 1 and 0 < floor <= 1; got bins = {bins}, history = {history}, "
                f"floor = {floor}."
            )
        self.numbers, self.bins, self.floor = self.base.numbers, bins, floor
        self.seen: Tensor
        self.count: Tensor
        self.register_buffer("seen", torch.zeros(bins, history, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.long))

    @property
    def probabilities(self) -> Tensor:
        """Of the bins, float64 `(bins,)`, on the CPU."""
        seen = as_float64(self.seen).cpu()
        even = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        size = seen.square().mean(1).sqrt()
        if bool((self.count < seen.shape[1]).any()) or not size.sum() > 0:
            return even
        return (1 - self.floor) * size / size.sum() + self.floor * even

    def time(self, sde: LinearSDE, u: Tensor) -> Tensor:
        p = self.probabilities
        ends = p.cumsum(0)
        chosen = torch.searchsorted(ends, u, right=True).clamp(max=self.bins - 1)
        part = ((u - (ends - p)[chosen]) / p[chosen]).clamp(0, 1 - 2**-30)  # rounding must not leave the bin
        points = self.base.points(sde)
        if points is None:
            return self.base.time(sde, (chosen + part) / self.bins)
        each = self._points_in_a_bin(points)
        return points[chosen * each + (part * each).long()]

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return self.base.weight(sde, t) / (self.bins * self.probabilities[self.bin(sde, t)]).to(t.device)

    def starts(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return self.base.starts(sde, t)

    def bin(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """The bins of times, whole numbers of their shape, on the CPU."""
        points, t = self.base.points(sde), t.detach().cpu()
        if points is not None:
            each = self._points_in_a_bin(points)
            return _index(points, t, "one of the times", SLACK * sde.t_max) // each
        borders = self.base.time(sde, torch.arange(1, self.bins, dtype=torch.float64) / self.bins)
        return torch.searchsorted(borders, t.contiguous(), right=True)

    def _points_in_a_bin(self, points: Tensor) -> int:
        n = len(points)
        if n % self.bins:
            nearest = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - self.bins))
            raise OptionError(
                f"The bins of LossAware must hold equally many of the {n} times of {self.base}; got bins = "
                f"{self.bins}: write bins={nearest} or bins={n}."
            )
        return n // self.bins

    def observe(self, sde: LinearSDE, t: PerRow, losses: PerRow) -> None:
        losses = as_float64(losses.detach()).cpu() * self.base.weight(sde, t).cpu()
        if not bool(losses.isfinite().all()):
            rows = (~losses.isfinite()).nonzero()[:, 0].tolist()
            raise DivergenceError(
                "A training loss is NaN or infinite",
                "Lower the learning rate, clip the gradient, or raise the t_min of the SDE.",
                step=None,
                time=t[rows[0]].item(),
                rows=rows,
            )
        bins = self.bin(sde, t)
        order = bins.argsort(stable=True)
        bins, losses = bins[order], losses[order]
        found = torch.bincount(bins, minlength=self.bins)
        rank = torch.arange(len(bins)) - (found.cumsum(0) - found)[bins]
        length = self.seen.shape[1]
        kept = rank >= found[bins] - length  # a bin may see more in one batch than it remembers
        place = (self.count.cpu()[bins] + rank) % length
        self.seen[bins[kept], place[kept]] = losses[kept].to(self.seen)
        self.count += found.to(self.count)

    def extra_repr(self) -> str:
        return f"{self.base}, bins={self.bins}, history={self.seen.shape[1]}, floor={self.floor}"


# Parts.


def check_law(times: object) -> None:
    """Refuse what is not a law of times with a sentence."""
    if not isinstance(times, Law):
        raise OptionError(f"times must be a law of times such as times.Even() or times.LogSNR(); got {times!r}.")


def _rate(sde: LinearSDE, t: Tensor) -> Tensor:
    """How fast the log-SNR falls, `g^2 / sigma^2`."""
    return (as_float64(sde.rates(t)[1]).expand(t.shape) / sde.sigma(t)) ** 2


def _rising(times: Tensor | Sequence[float], owner: str, least: int) -> Grid:
    grid = as_time(times).detach().cpu()
    steps = grid.diff() if grid.ndim == 1 else grid
    if grid.ndim != 1 or len(grid) < least or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise TimeError(
            f"{owner} needs at least {least} time{'s' * (least > 1)} in a row, all falling or all rising; "
            f"got {grid.tolist() if grid.numel() <= 8 else f'{grid.numel()} numbers of shape {tuple(grid.shape)}'}."
        )
    return grid if len(grid) == 1 or steps[0] > 0 else grid.flip(0)


def _nth(points: Tensor, u: Tensor) -> Tensor:
    """The points in turn, as u goes from 0 to 1."""
    return points[(u * len(points)).long().clamp(max=len(points) - 1)]


def _index(points: Tensor, t: Tensor, what: str, slack: float) -> Tensor:
    """Which of the points the times are."""
    points = points.to(t.device)
    above = torch.searchsorted(points, t.detach().contiguous()).clamp(max=len(points) - 1)
    below = (above - 1).clamp(min=0)
    nearest = torch.where((points[below] - t).abs() < (points[above] - t).abs(), below, above)
    off = (points[nearest] - t).abs() > slack
    if bool(off.any()):
        raise TimeError(f"t = {t[off].reshape(-1)[0]:g} is not {what} of the law of times.")
    return nearest


def _ends(points: Tensor | Sequence[float], more: int = 0) -> str:
    return f"{as_time(points)[0]:g} to {as_time(points)[-1]:g} in {len(points) + more}"
