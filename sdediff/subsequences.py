r"""Sub-sequences of a chain: which n of its steps to take.

Any falling rows of a chain's times are a legal grid of `sample(times=...)`. `linear` and `quadratic` are DDIM's; the
best one for a model follows from what its steps cost. A step from t to s with reverse variance V loses, per entry of
the event and in nats,

    J(s, t) = 1/2 [ rho (1 + (snr_s - snr_t) sbar^2(t)) - 1 - log rho ],    rho = nu^2 / V,

the mean of `KL(q(x_s | x_t, x_0) || p(x_s | x_t)) / D`, with nu^2 the posterior's variance and
`sbar^2(t) = E|x_0 - xhat|^2 / D` the error of the denoiser. At the best variance `V = nu^2 + gain^2 sbar^2` that is
`1/2 log(V / nu^2) = 1/2 log(1 + (snr_s - snr_t) sbar^2(t))`; at `V = nu^2` it is `1/2 (snr_s - snr_t) sbar^2(t)`.
The data, decoded from the last state z_t by `N(x_0; xhat, V I)`, costs `1/2 [log(2 pi V) + sbar^2(t) / V]` more, with
the V of the step to the data (see `sdediff.variance`): `V = sbar^2` at best, `sigma^2` for "beta" and, as the
posterior has none, `sigma^2 / alpha^2` for it, as in `sdediff.bounds.elbo`.
The negative ELBO is the sum over the path and the divergence of the prior, so the path of least cost, found by dynamic
programming over the table of all pairs, has the highest ELBO of all sub-sequences with as many steps.

References: Watson et al. 2021 (arXiv:2106.03802); Bao et al. 2022 (arXiv:2201.06503), section 4; Song, Meng and Ermon
2021 (arXiv:2010.02502), appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.analytic import AnalyticVariance
from sdediff.errors import OptionError
from sdediff.linear import as_linear
from sdediff.model import Point
from sdediff.sde import SDE, SLACK, check_grid
from sdediff.shapes import Grid, as_time
from sdediff.variance import ReverseSteps, StepVariance, table_of, variance_of

Pairs: TypeAlias = Float[Tensor, " times times"]


def linear(times: Tensor | Sequence[float], n: int) -> Grid:
    """`n` steps between every (N - 1) / n-th of N falling times, both ends included, `(n + 1,)`."""
    return _spread(times, n, lambda u: u)


def quadratic(times: Tensor | Sequence[float], n: int) -> Grid:
    """`n` steps whose places in the row, counted from the data, grow as squares; both ends included, `(n + 1,)`."""
    return _spread(times, n, lambda u: u**2)


def _spread(times: Tensor | Sequence[float], n: int, rule: Callable[[Tensor], Tensor]) -> Grid:
    grid = _falling(times)
    _check_steps(n, len(grid))
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    count = torch.arange(n + 1)
    # places from the data; where the rule asks for one twice, the next that is free
    places = ((len(grid) - 1) * rule(u)).round().long() - count
    places = places.cummax(0).values + count
    return grid.flip(0)[places].flip(0)


def _falling(times: Tensor | Sequence[float]) -> Grid:
    grid = as_time(times)
    check_grid(grid, direction=-1)
    return grid


def _check_steps(n: int, rows: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n < rows:
        raise OptionError(
            f"A sub-sequence of {rows} times has a whole number of steps from 1 to {rows - 1}; got {n!r}."
        )


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What the steps between the times of a chain cost, in nats per entry of the event.

    Attributes:
        times: the chain, falling, `(N,)`.
        steps: `steps[i, j]` is J from `times[i]` to `times[j]`, j > i; infinite elsewhere.
        decoder: what the data costs, decoded at each time, `(N,)`.
    """

    times: Grid
    steps: Pairs
    decoder: Float[Tensor, " times"]

    @classmethod
    def of(
        cls,
        sde: SDE,
        times: Tensor | Sequence[float],
        errors: AnalyticVariance,
        variance: str | StepVariance | None = None,
    ) -> StepCosts:
        """The table of all pairs of times.

        Args:
            sde: a linear SDE, of which times is a grid, such as a `DiscreteVP` and its `times`.
            times: falling, `(N,)`.
            errors: what the model's denoiser errs by; its log SNR must reach over the grid.
            variance: of the reverse steps; the best one, that of errors, if None.
        """
        grid = _falling(times)
        process = as_linear(sde)
        process.check_span(grid, "times")
        chosen = errors if variance is None else variance_of(variance, "StepCosts")
        if not isinstance(chosen, StepVariance):
            raise OptionError(f"StepCosts needs a variance that is one number a step; got {type(chosen).__name__}.")
        early, late = torch.triu_indices(len(grid), len(grid), 1)
        at = Point(process, grid, *process.scales_at(grid), 1.0)
        both = torch.stack([grid[early], grid[late]])
        steps = ReverseSteps.of(Point(process, both, *process.scales_at(both), 1.0))
        error, spread = errors.data_variance(at), table_of(chosen, steps)[0]
        rho = steps.nu[0] ** 2 / spread
        snr = (at.alpha / at.sigma) ** 2
        costs = torch.full((len(grid), len(grid)), math.inf, dtype=torch.float64)
        costs[early, late] = (rho * (1 + (snr[late] - snr[early]) * error[early]) - 1 - rho.log()) / 2
        zero, one = torch.zeros_like(grid), torch.ones_like(grid)
        t, alpha, sigma = (torch.stack(p) for p in ((grid, zero), (at.alpha, one), (at.sigma, zero)))
        last = table_of(chosen, ReverseSteps.of(Point(process, t, alpha, sigma, 1.0)))[0]
        last = torch.where(last == 0, 1 / snr, last)
        return cls(grid, costs, (math.log(2 * math.pi) + last.log() + error / last) / 2)

    def total(self, times: Tensor | Sequence[float]) -> float:
        """The cost of a sub-sequence, the decoder's included.

        Raises:
            OptionError: one of the times is not in the chain.
        """
        path = _falling(times)
        places = (self.times[:, None] - path).abs().argmin(0)
        off = (self.times[places] - path).abs() > SLACK * self.times[0]
        if bool(off.any()):
            raise OptionError(f"t = {path[off][0]:g} is not one of the {len(self.times)} times of these StepCosts.")
        return (self.steps[places[:-1], places[1:]].sum() + self.decoder[places[-1]]).item()

    def best(self, n: int, *, free_end: bool = False) -> Grid:
        """The sub-sequence of n steps that costs least, from the first time to the last, `(n + 1,)`.

        Args:
            n: steps, from 1 to N - 1.
            free_end: whether the data may be decoded from any time, whichever is best for the bound.
        """
        _check_steps(n, len(self.times))
        least = torch.full_like(self.decoder, math.inf)
        least[0] = 0
        came_from = []
        for _ in range(n):
            least, before = (least[:, None] + self.steps).min(0)
            came_from.append(before)
        place = int((least + self.decoder).argmin()) if free_end else len(self.times) - 1
        path = [place]
        for before in reversed(came_from):
            path.append(int(before[path[-1]]))
        return self.times[path[::-1]]
