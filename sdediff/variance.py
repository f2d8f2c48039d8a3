r"""Variances of the reverse kernels `p(x_s | x_t)` of discrete chains.

For a step from t to s, let `1 - r = 1 - snr_t / snr_s`, `nu = eta sigma_s sqrt(1 - r)`, `kept^2 = sigma_s^2 - nu^2`
and `epshat = (x_t - alpha_t xhat) / sigma_t`. The kernels of the inference process and of the model are

    q(x_s | x_t, x_0) = N(alpha_s x_0  + kept eps,     nu^2 I),
    p(x_s | x_t)      = N(alpha_s xhat + kept epshat,  V),            mean difference = gain (x_0 - xhat),

with `gain = alpha_s - kept alpha_t / sigma_t`. By the law of total variance the best V is

    V = nu^2 + gain^2 Var[x_0 | x_t],

so the two fixed choices of DDPM are two extremes of data: "posterior", `V = nu^2`, is right for data that is one point,
and "beta", `V = sigma_t^2 (1 - r)`, for data that is N(0, I) (in a variance-preserving process).

A `StepVariance` is one number for every step; an `EntryVariance` is one for every entry of every state.

The KL divergence of a step, for V of one number and for V of every entry, is

    KL(q || p) = D/2 [rho - 1 - log rho] + gain^2 |x_0 - xhat|^2 / (2 V),                       rho = nu^2 / V,
    KL(q || p) = 1/2 sum_i [nu^2 / V_i - 1 - log(nu^2 / V_i) + gain^2 (x_0 - xhat)_i^2 / V_i].

For eta = 1 and V = nu^2 it is `(snr_s - snr_t) / 2 |x_0 - xhat|^2`. A network that predicts `F = p x_0 + q eps` errs by
`(p - q alpha / sigma) (xhat - x_0)`, which puts the same divergence in terms of noise, score or v.

A chain ends with a step from its last time to the data itself, `alpha_s = 1` and `sigma_s = 0`, so that nu = 0 and
gain = 1. Its kernel is the decoder `p(x_0 | x_t) = N(xhat, V)`, with `V = Var[x_0 | x_t]` by the law above and
`V = sigma_t^2` for "beta".

References: Ho et al. 2020 (arXiv:2006.11239), section 3.2; Song, Meng and Ermon 2021 (arXiv:2010.02502); Bao et al.
2022 (arXiv:2201.06503).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.model import PREDICTIONS, Point, ScoreModel
from sdediff.shapes import State


@dataclass(frozen=True, eq=False)
class ReverseSteps:
    """The steps of a falling grid, as variances are made from them; float64.

    Attributes:
        at: the SDE at the `steps + 1` times.
        fresh: `1 - snr_t / snr_s`, `(steps,)`.
        nu: standard deviation of `q(x_s | x_t, x_0)`, `(steps,)`.
        kept: `sqrt(sigma_s^2 - nu^2)`, `(steps,)`.
    """

    at: Point
    fresh: Tensor
    nu: Tensor
    kept: Tensor

    @classmethod
    def of(cls, at: Point, eta: float = 1.0) -> ReverseSteps:
        """The steps of DDIM's inference process with this eta; 1 is DDPM's.

        Raises:
            OptionError: nu would exceed sigma_s.
        """
        sigma_s = at.sigma[1:]
        log_snr = 2 * (at.alpha.log() - at.sigma.log())
        fresh = -torch.expm1(log_snr[:-1] - log_snr[1:])
        if not eta:
            return cls(at, fresh, torch.zeros_like(sigma_s), sigma_s)
        kept = 1 - eta**2 * fresh
        if bool((kept < 0).any() | (fresh < 0).any()):
            raise OptionError(
                f"eta = {eta:g} asks for more noise than sigma holds on some step of this grid: "
                "use eta <= 1, or more steps."
            )
        return cls(at, fresh, eta * sigma_s * fresh.sqrt(), sigma_s * kept.sqrt())

    @classmethod
    def to_data(cls, at: Point) -> ReverseSteps:
        """DDPM's steps along these times, and one more from the last of them to the data."""
        t, alpha, sigma = (
            torch.cat([values, torch.full_like(values[:1], end)])
            for values, end in ((at.t, 0.0), (at.alpha, 1.0), (at.sigma, 0.0))
        )
        return cls.of(Point(at.sde, t, alpha, sigma, at.sigma_data))

    @property
    def gain(self) -> Tensor:
        """What the mean moves by for a unit of the denoised data, `alpha_s - kept alpha_t / sigma_t`, `(steps,)`."""
        return self.at.alpha[1:] - self.kept * self.at.alpha[:-1] / self.at.sigma[:-1]

    def kl_weights(self, prediction: str, variances: Tensor) -> Tensor:
        """w of the part `w |F - Fhat|^2` of a step's KL divergence that depends on the mean, `(steps,)`.

        For "noise", eta = 1 and a variance-preserving chain it is DDPM's `b^2 / (2 V a (1 - abar_t))`, with `a = 1 - b`
        and `abar_t = alpha_t^2`; infinite where alpha = 0.

        Args:
            prediction: what F is, one of the kinds of `sdediff.model.PREDICTIONS`.
            variances: V, `(steps,)`.

        Raises:
            OptionError: unknown prediction.
        """
        if prediction not in PREDICTIONS:
            raise OptionError(f"Unknown prediction {prediction!r}: write one of {', '.join(map(repr, PREDICTIONS))}.")
        at = self.at[:-1]
        p, q = PREDICTIONS[prediction](at)
        return (self.gain / (p - q * at.alpha / at.sigma)) ** 2 / (2 * variances)


class StepVariance(ABC):
    """A variance of the reverse kernel that is one number for every step."""

    @abstractmethod
    def table(self, steps: ReverseSteps) -> Tensor:
        """V, float64 `(steps,)`."""


class EntryVariance(ABC):
    """A variance of the reverse kernel that a network gives for every entry of every state."""

    @abstractmethod
    def along(self, model: ScoreModel, steps: ReverseSteps) -> tuple[ScoreModel, Callable[[int, State], State]]:
        """`(model, V)`: the model to step with, and `V(i, x)`, shaped as x, called after the model at `(t_i, x)`."""


ReverseVariance = StepVariance | EntryVariance


@dataclass(frozen=True)
class Posterior(StepVariance):
    """`V = nu^2`, that of `q(x_s | x_t, x_0)`."""

    _fixed: ClassVar[bool] = True

    def table(self, steps: ReverseSteps) -> Tensor:
        return steps.nu**2


@dataclass(frozen=True)
class Beta(StepVariance):
    """`V = sigma_t^2 (1 - r)`, that of the forward step `q(x_t | x_s)`."""

    _fixed: ClassVar[bool] = True

    def table(self, steps: ReverseSteps) -> Tensor:
        return steps.at.sigma[:-1] ** 2 * steps.fresh


def table_of(variance: StepVariance, steps: ReverseSteps) -> Tensor:
    """`variance.table(steps)`, checked.

    Raises:
        ShapeError: it has not one number for every step.
        OptionError: a number is negative or NaN.
    """
    table = variance.table(steps)
    if table.shape != steps.nu.shape:
        raise ShapeError(
            f"{type(variance).__name__} must give one number for every step, shape {tuple(steps.nu.shape)}; got "
            f"{tuple(table.shape)}."
        )
    wrong = ~(table >= 0) & steps.nu.isfinite()
    if bool(wrong.any()):
        raise OptionError(
            f"A variance must be >= 0; {type(variance).__name__} has {table[wrong][0]:g} for the step that starts at "
            f"t = {steps.at.t[:-1][wrong][0]:g}."
        )
    return table


def entries_of(
    variance: EntryVariance, model: ScoreModel, steps: ReverseSteps
) -> tuple[ScoreModel, Callable[[int, State], State]]:
    """`variance.along(model, steps)`, whose V raises ShapeError for another shape, OptionError for V < 0."""
    model, values = variance.along(model, steps)

    def checked(i: int, x: State) -> State:
        found = values(i, x)
        if found.shape != x.shape:
            raise ShapeError(
                f"{type(variance).__name__} must give one number for every entry of the states, shape "
                f"{tuple(x.shape)}; got {tuple(found.shape)}."
            )
        wrong = found < 0  # NaN is that of a state, and reported with it
        if bool(wrong.any()):
            raise OptionError(
                f"A variance must be >= 0; {type(variance).__name__} has {int(wrong.sum())} of {wrong.numel()} entries "
                f"below, such as {found[wrong][0]:g}, at t = {steps.at.t[i]:g}."
            )
        return found

    return model, checked


def checked_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    """`(a, b)` that the entries of data lie in, as floats.

    Raises:
        OptionError: they are not two numbers, the lower first.
    """
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise OptionError(f"bounds are (a, b) with a < b; got {bounds!r}.")
    return low, high


VARIANCES: dict[str, ReverseVariance] = {"posterior": Posterior(), "beta": Beta()}
"""The variances that have a name."""


def variance_of(variance: str | ReverseVariance, caller: str) -> ReverseVariance:
    """The variance that is meant.

    Raises:
        OptionError: no such name, or no variance.
    """
    if isinstance(variance, (StepVariance, EntryVariance)):
        return variance
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise OptionError(
            f"Unknown variance {variance!r} for {caller}: write {' or '.join(map(repr, VARIANCES))}, or pass a "
            "StepVariance or EntryVariance, such as AnalyticVariance.estimate(model, data, times)."
        )
    return VARIANCES[variance]
