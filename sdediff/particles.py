r"""Weighted particles: their effective number, sets of equal weight drawn from them, and the errors of their means.

Particles with weights `w_i >= 0`, `sum w_i = 1`, stand for the measure `sum_i w_i delta(x_i)`. Their effective number
is

    ESS = 1 / sum_i w_i^2,

N for equal weights and 1 if one particle has all. A resampling draws how often each particle is taken, `c_i`, with
`sum_i c_i = n` and

    E c_i = n w_i,

so that `1/n sum_i c_i f(x_i)` is unbiased for `sum_i w_i f(x_i)`, whatever f. The schemes differ in the variance:

- "multinomial": n independent choices, `Var c_i = n w_i (1 - w_i)`;
- "residual": `floor(n w_i)` of each for certain, and independent choices for the rest, in proportion to what is left;
- "systematic": one uniform number u shifts a comb of n teeth, `c_i` is the number of `(j + u) / n` in
  `[W_(i-1), W_i)`, `W_i = w_1 + ... + w_i`. It is `floor(n w_i)` or `ceil(n w_i)`, the closest there is.

Weights come as logarithms, float64, and need not sum to one.

Errors. Particles that go back to one particle at the start, a family e, are dependent; families are nearly not. In
several rounds of weighing and resampling, let `W_e` be the weights of the family's particles before a resampling, or at
the end, and `K_e` its share of the particles when the round began. A resampling changes no estimate of the evidence Z,
so that what a family adds to its error are the gains `W_e - K_e` of all rounds; and a mean of f varies by S_e, the sum
of `w_i (f(x_i) - mean)` over the family:

    Var Z_N / Z^2 ~ N / (N - 1) sum_e (sum_rounds (W_e - K_e))^2,        Var mean ~ N / (N - 1) sum_e S_e^2,

consistent for multinomial resampling as N grows; without resampling these are the errors of importance sampling. Both
are made of as many numbers as there are families, effectively

    F = 1 / sum_e W_e^2,

with the weights at the end, and say nothing about starts whose families died out. Where r is too narrow for the twist,
F is a small share of N, and errors are too small by factors, also where F is some dozens: `Particles.family_number`.

References: Kong, Liu and Wong 1994, the effective number; Kitagawa 1996, systematic; Liu and Chen 1998, residual; Douc,
Cappe and Moulines 2005, comparison; Chan and Lai 2013, variances from families; Chopin and
Papaspiliopoulos 2020, An Introduction to Sequential Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdediff.draws import mix
from sdediff.errors import OptionError, ShapeError
from sdediff.sde import fresh_seed
from sdediff.shapes import Grid, PerRow, State


def log_mean(log_weights: PerRow) -> float:
    """`log (1/N sum_i exp(log w_i))`; exactly c if all are c, and -inf if all are."""
    largest = log_weights.max()
    if largest == -math.inf:
        return -math.inf
    return (largest + (log_weights - largest).exp().mean().log()).item()


def normalised(log_weights: PerRow) -> PerRow:
    """The log-weights less the logarithm of their sum."""
    return log_weights - log_mean(log_weights) - math.log(len(log_weights))


def effective_number(log_weights: PerRow) -> float:
    """`(sum w)^2 / sum w^2`, between 1 and N."""
    weights = (log_weights - log_weights.max()).exp()
    return (weights.sum() ** 2 / weights.square().sum()).item()


def systematic(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Counts by a comb of n teeth with one random shift."""
    shift = torch.rand((), dtype=torch.float64, generator=generator)
    cumulative = weights.cumsum(0)
    return (n * (cumulative / cumulative[-1]) - shift).ceil().diff(prepend=torch.zeros_like(shift)[None]).long()


def multinomial(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Counts of n independent choices."""
    levels = torch.rand(n, dtype=torch.float64, generator=generator)
    cumulative = weights.cumsum(0)
    choices = torch.searchsorted(cumulative, levels * cumulative[-1], right=True).clamp(max=len(weights) - 1)
    return torch.bincount(choices, minlength=len(weights))


def residual(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The whole parts of `n w_i`, and the rest by independent choices."""
    expected = n * (weights / weights.sum())
    counts = (expected * (1 + _ROUNDING)).floor()
    left = n - int(counts.sum())
    return counts.long() + (multinomial((expected - counts).clamp(min=0), left, generator) if left else 0)


_ROUNDING = 1e-12
"""N times 1 / N may fall short of 1 by rounding, and still counts as 1."""

RESAMPLINGS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "systematic": systematic,
    "multinomial": multinomial,
    "residual": residual,
}
"""The schemes: from weights `(N,)`, n and a generator to counts, int64 `(N,)`."""


def ancestors(log_weights: PerRow, n: int, method: str, generator: torch.Generator) -> Tensor:
    """The numbers of the particles that are taken, rising, `(n,)`; n w_i times each in expectation.

    Args:
        log_weights: `(N,)`, of any sum; -inf for a weight of 0.
        n: how many to take.
        method: one of `RESAMPLINGS`.
        generator: on the CPU.

    Raises:
        OptionError: unknown method, n < 1, or no weight is positive.
        ShapeError: the weights are not `(N,)`.
    """
    check_resampling(method)
    if log_weights.ndim != 1 or len(log_weights) == 0:
        raise ShapeError(f"Log-weights have shape (particles,); got {tuple(log_weights.shape)}.")
    if n < 1:
        raise OptionError(f"Resampling needs n >= 1 particles; got {n}.")
    largest = log_weights.max()
    if not bool(largest.isfinite()):
        raise OptionError(f"Resampling needs a positive, finite weight; the largest log-weight is {largest:g}.")
    weights = (log_weights - largest).cpu().to(torch.float64).exp()
    counts = RESAMPLINGS[method](weights, n, generator)
    return torch.repeat_interleave(torch.arange(len(weights)), counts)


def check_resampling(method: object) -> None:
    """Refuse a scheme that has no name here."""
    if not isinstance(method, str) or method not in RESAMPLINGS:
        raise OptionError(f"Unknown resampling {method!r}: write one of {', '.join(map(repr, RESAMPLINGS))}.")


def by_family(values: Tensor, families: Tensor) -> Tensor:
    """Sums over the particles of every family, from `(particles, ...)`; what belongs to no particle is 0."""
    return torch.zeros_like(values).index_add_(0, families, values)


def family_gain(log_weights: PerRow, families: Tensor) -> Tensor:
    """`W_e - K_e` of a round, `(particles,)`."""
    return by_family(normalised(log_weights).exp() - 1 / len(families), families)


def family_error(sums: Tensor) -> Tensor:
    """The root of `N / (N - 1) sum_e S_e^2`, from `(particles, ...)`."""
    return (len(sums) / (len(sums) - 1) * sums.square().sum(0)).sqrt()


def family_number(log_weights: PerRow, families: Tensor) -> float:
    """`1 / sum_e W_e^2` with the weights of families: the effective number of them, between 1 and N."""
    return 1 / by_family(normalised(log_weights).exp(), families).square().sum().item()


class Expectation(NamedTuple):
    """An estimate and its standard error."""

    value: Tensor
    stderr: Tensor


@dataclass(frozen=True, eq=False)
class Particles:
    """Weighted samples of `p(x) r(x) / Z`. Numbers of particles are float64 on the CPU.

    Attributes:
        x: `(particles, *event)`.
        log_weights: logarithms of weights that sum to one, `(particles,)`.
        log_evidence: estimate of `log Z = log E_p[r]`, in nats; its exponential is unbiased.
        log_evidence_stderr: its standard error.
        ess: effective number at every time of the grid, before resampling, and of the result, `(steps + 1,)`.
        resampled: the numbers of the steps that resampling came before.
        families: which particle at the start each goes back to, int64 `(particles,)`.
        times: the grid, `(steps + 1,)`.
        nfe: network evaluations for every particle, those of a `twist` of the caller's not counted.
    """

    x: State
    log_weights: PerRow
    log_evidence: float
    log_evidence_stderr: float
    ess: Tensor
    resampled: tuple[int, ...]
    families: Tensor
    times: Grid
    nfe: int

    @property
    def weights(self) -> PerRow:
        """`(particles,)`, of sum one."""
        return self.log_weights.exp()

    @property
    def family_number(self) -> float:
        """The effective number of families, of which stated errors are made; below 100 and N / 20 distrust them."""
        return family_number(self.log_weights, self.families)

    def expectation(self, function: Callable[[State], Tensor]) -> Expectation:
        """The mean of f under `p r / Z` and its standard error, float64, `*shape` for f of shape `(batch, *shape)`.

        What f is at particles of weight 0 does not matter, be it NaN.

        Raises:
            ShapeError: f does not give something for every particle.
        """
        values = function(self.x)
        if not isinstance(values, Tensor) or values.shape[:1] != self.x.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"The function must return a tensor with an entry for every particle, shape ({len(self.x)}, ...); "
                f"got {got}."
            )
        flat = values.detach().cpu().to(torch.float64).reshape(len(values), -1)
        flat = flat.where(self.weights[:, None] > 0, 0)
        mean = self.weights @ flat
        stderr = family_error(by_family(self.weights[:, None] * (flat - mean), self.families))
        return Expectation(mean.reshape(values.shape[1:]), stderr.reshape(values.shape[1:]))

    def mean(self) -> Tensor:
        """The weighted mean, shaped as an event, in the dtype of x."""
        return self.expectation(lambda x: x).value.to(self.x)

    def cov(self) -> Tensor:
        """The weighted covariance over flattened events, `(D, D)`, in the dtype of x."""
        flat = self.x.reshape(len(self.x), -1).cpu().to(torch.float64)
        centred = flat - self.weights @ flat
        return ((self.weights[:, None] * centred).mT @ centred).to(self.x)

    def resample(self, n: int | None = None, seed: int | None = None, method: str = "systematic") -> State:
        """`n` samples of equal weight, `(n, *event)`, as many as there are particles if None; some are repeated.

        Raises:
            OptionError: n < 1, or an unknown method.
        """
        generator = torch.Generator().manual_seed(mix(fresh_seed() if seed is None else seed, 41) >> 2)
        index = ancestors(self.log_weights, len(self.x) if n is None else n, method, generator)
        return self.x[index.to(self.x.device)]
