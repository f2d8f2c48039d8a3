r"""Extended-Analytic-DPM: a reverse variance for every entry of every state, from a network of its own.

The best diagonal variance of a reverse kernel is `V = nu^2 + gain^2 Var[x_0 | x_t]`, entry by entry, and

    Var[x_0 | x_t] = (sigma^2 / alpha^2) Var[eps | x_t].

Two regressions, both entry by entry and on the same states as the model, give it:

| network | is trained on | tends to | Var[eps abs x_t] |
|---|---|---|---|
| SN, `squared_noise` | eps^2 | E[eps^2 abs x_t] | h - epshat^2 |
| NPR, `noise_residual` | (eps - epshat)^2 | E[(eps - epshat)^2 abs x_t] | h |

For the exact mean the two agree. For one with errors, NPR gives the second moment about the mean that is used, which
is the best variance for it; SN gives that about the true mean, if epshat^2 is near enough to that of the true one.

Bounds: a variance is at least 0, and at most `((b - a) / 2)^2` for data in `[a, b]`. (Unlike its mean over data,
`Var[eps | x_t]` itself may exceed 1: between two modes it does.) What is clipped is counted.

Reference: Bao et al. 2022b (arXiv:2206.07309), sections 3 and 4.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.model import Point, ScoreModel, evaluating
from sdediff.shapes import PerRow, State, Time, sum_rows
from sdediff.times import Law
from sdediff.variance import EntryVariance, ReverseSteps, checked_bounds
from sdediff.weightings import NoiseLevels

Network = Callable[..., Tensor]


def squared_noise(
    network: Network,
    model: ScoreModel,
    x0: State,
    *,
    t: Time | None = None,
    times: Law | None = None,
    noise: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> PerRow:
    """Regression of a network on `eps^2`, `|network(x_t, t) - eps^2|^2 / D`, one value a row, `(batch,)`.

    Args:
        network: called as the model's own, `network(x, t)` or `network(x, t, condition)`; shaped as x.
        model: whose SDE and clock (`time=`) it shares; its own network is not called.
        x0: clean data `(batch, *event)`.
        t: times `()` or `(batch,)`; drawn if None.
        times: the law they are drawn from; even over the span of the SDE, or over its chain for a network that counts
            steps, if None. See `sdediff.times`.
        noise: standard normal, shaped as x0; drawn if None.
        condition: passed to the network.
        generator: of t and noise, on the CPU.
    """
    levels = NoiseLevels.draw(model, x0, weighting="simple", t=t, times=times, noise=noise, generator=generator)
    xt = model.linear.perturb(levels.t, x0, levels.noise)
    h = _beside(model, network).predict(levels.t, xt, condition=condition)
    return levels.shared(sum_rows((h - levels.noise**2) ** 2) / x0[0].numel())


def noise_residual(
    network: Network,
    model: ScoreModel,
    x0: State,
    *,
    t: Time | None = None,
    times: Law | None = None,
    noise: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> PerRow:
    """Regression of a network on `(eps - epshat)^2`, one value a row, `(batch,)`; arguments as of `squared_noise`.

    The model gives epshat; no gradient reaches it.
    """
    levels = NoiseLevels.draw(model, x0, weighting="simple", t=t, times=times, noise=noise, generator=generator)
    xt = model.linear.perturb(levels.t, x0, levels.noise)
    with torch.no_grad():
        target = (levels.noise - model.noise(levels.t, xt, condition=condition)) ** 2
    h = _beside(model, network).predict(levels.t, xt, condition=condition)
    return levels.shared(sum_rows((h - target) ** 2) / x0[0].numel())


def _beside(model: ScoreModel, network: Network) -> ScoreModel:
    """A network that is called as the model's own is, except that it sees x and, by default, t themselves."""
    return replace(model, network=network, prediction="noise")


@dataclass(eq=False)
class Clipped:
    """How many entries of the variances were outside their bounds, out of how many."""

    outside: int = 0
    entries: int = 0

    @property
    def fraction(self) -> float:
        """In [0, 1]; NaN before anything was counted."""
        return self.outside / self.entries if self.entries else float("nan")

    def count(self, outside: Tensor) -> None:
        self.outside += int(outside.sum())
        self.entries += outside.numel()


Noise = Callable[[int, State], State]


@dataclass(frozen=True)
class _Learned(EntryVariance):
    """A variance from a network.

    Args:
        network: what was trained, called as the model's own, in evaluation mode.
        bounds: `(a, b)` that the entries of data lie in, or None. Where alpha = 0 the variance is `((b - a) / 2)^2`.

    Raises:
        CapabilityError: used where alpha = 0, without bounds.

    Attributes:
        clipped: counts what lay outside the bounds, over all sampling so far.
    """

    network: Network
    bounds: tuple[float, float] | None = None
    clipped: Clipped = field(default_factory=Clipped, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise OptionError(
                f"The network of {type(self).__name__} must be callable as network(x, t); got "
                f"{type(self.network).__name__}."
            )
        if self.bounds is not None:
            object.__setattr__(self, "bounds", checked_bounds(self.bounds))

    @abstractmethod
    def _noise_variance(self, model: ScoreModel, at: Point, h: Noise) -> tuple[ScoreModel, Noise]:
        """`(model, Var[eps | x])`: the model to step with, and the variance before its bounds, called after it."""

    def along(self, model: ScoreModel, steps: ReverseSteps) -> tuple[ScoreModel, Callable[[int, State], State]]:
        at = steps.at[:-1]
        output = _beside(model, self.network).along(at.t)

        def h(i: int, x: State) -> State:
            with evaluating(self.network):
                return output(i, x)

        model, variance = self._noise_variance(model, at, h)
        ratio = ((at.sigma / at.alpha) ** 2).tolist()
        nu, gain = (steps.nu**2).tolist(), (steps.gain**2).tolist()
        most = None if self.bounds is None else ((self.bounds[1] - self.bounds[0]) / 2) ** 2
        if most is None and math.inf in ratio:
            raise CapabilityError(
                f"At t = {at.t[ratio.index(math.inf)]:g} alpha is 0, where the variance of the noise says nothing of "
                f"the data's: give {type(self).__name__} the bounds= of the data, use an AnalyticVariance, or start "
                "later, with times=."
            )

        def spread(i: int, x: State) -> State:
            found = ratio[i] * variance(i, x) if ratio[i] < math.inf else torch.full_like(x, math.inf)
            held = found.clamp(0, most)
            self.clipped.count(held != found)
            return nu[i] + gain[i] * held

        return model, spread


@dataclass(frozen=True)
class SquaredNoise(_Learned):
    """The variance `h - epshat^2` of the noise, from an SN network (`squared_noise`); for `DDPM(variance=...)`."""

    def _noise_variance(self, model: ScoreModel, at: Point, h: Noise) -> tuple[ScoreModel, Noise]:
        watched = _Watched(model.network)
        zero, one = torch.zeros_like(at.alpha), torch.ones_like(at.alpha)
        from_x, from_output = (column.tolist() for column in model.weights_at(at, zero, one))

        def variance(i: int, x: State) -> State:
            output = watched.output_for(x)
            return h(i, x) - (from_x[i] * x + from_output[i] * output) ** 2

        return replace(model, network=watched), variance


@dataclass(frozen=True)
class NoiseResidual(_Learned):
    """The variance h of the noise, from an NPR network (`noise_residual`); for `DDPM(variance=...)`."""

    def _noise_variance(self, model: ScoreModel, at: Point, h: Noise) -> tuple[ScoreModel, Noise]:
        return model, h


class _Watched:
    """A network whose last output can be read, so that it need not be called twice for one state."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.keeps_time = getattr(network, "keeps_time", False)
        self._output: Tensor | None = None

    def __call__(self, *args: Any) -> Tensor:
        self._output = self.network(*args)
        return self._output

    def output_for(self, x: State) -> State:
        if self._output is None or self._output.shape != x.shape:
            raise ShapeError("The variance of a step is asked for after the model was called at its state.")
        return self._output.to(x)
