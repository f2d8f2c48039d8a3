r"""Langevin dynamics at a fixed density: unadjusted (ULA) and Metropolis-adjusted (MALA).

The SDE `dx = 1/2 grad log p(x) dt + dw` has p as its stationary density. Its Euler-Maruyama step of length h,

    y = x + h/2 grad log p(x) + sqrt(h) z,

is ULA. It needs the score only, and its stationary density is p up to an error that vanishes with h: on `N(0, s^2)` it
has the variance `s^2 / (1 - h / (4 s^2))`, and none from h = 4 s^2 on. MALA takes y as a proposal, accepts it with the
probability

    min(1, exp(r(x, y))),    r(x, y) = log p(y) - log p(x) + log q(x | y) - log q(y | x),
    q(y | x) = N(y; x + h/2 grad log p(x), h I),

and stays at x otherwise. As r(x, y) = -r(y, x), the flow of probability from x to y is that from y to x, and p is
exactly stationary for every h. It needs log p up to a constant, such as an energy.

Both move by small steps, so that a chain does not pass through regions of low density in any reasonable time, and the
weights of modes far apart stay what they were at the start. `AnnealedLangevin` goes over noise levels for that reason.

References: Roberts and Tweedie 1996; Besag 1994; Song and Ermon 2019 (arXiv:1907.05600).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.energy import Energy, value_and_gradient
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError
from sdediff.model import ScoreModel
from sdediff.noise import Noise, RowNoise
from sdediff.sde import fresh_seed
from sdediff.shapes import PerRow, State, Time, Trajectory, check_state, over, sum_rows


@dataclass(frozen=True, eq=False)
class Chain:
    """Where chains of Langevin dynamics have come to, one a row.

    Attributes:
        x: the last states, `(batch, *event)`.
        accepted: share of the proposals that were accepted, `(batch,)`; 1 for the unadjusted dynamics.
        nfe: evaluations of the score for every row.
        trajectory: all states, the start among them, `(steps + 1, batch, *event)`; None if not asked for.
    """

    x: State
    accepted: PerRow
    nfe: int
    trajectory: Trajectory | None = None


def ula(
    score: ScoreModel | Callable[[State], State],
    x: State,
    *,
    step: Tensor | float,
    steps: int,
    t: Time | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Chain:
    """The unadjusted Langevin algorithm, `x + h/2 score(x) + sqrt(h) z`.

    Args:
        score: a callable `s(x)`; or a model, whose score at the time t is used.
        x: the start, `(batch, *event)`.
        step: h > 0, a number, or one for every row.
        steps: how many, >= 1.
        t: the time, with a model.
        seed: row i depends on it and on i only; None draws one.
        noise: a source of the noise in place of `RowNoise(seed)`.
        trajectory: whether to keep all states.

    Raises:
        OptionError, ShapeError: an argument does not fit.
        DivergenceError: a state became NaN or infinite; names the step and the rows.
    """
    if seed is not None and noise is not None:
        raise OptionError("Give either seed=... or noise=..., not both.")
    field, h = _score_of(score, t), _length(step, steps, x)
    stream = (RowNoise(fresh_seed() if seed is None else seed) if noise is None else noise).open()
    kept = [x]
    with torch.no_grad():
        for i in range(steps):
            x = x + h / 2 * field(x) + h.sqrt() * stream.normal(x)
            _check_finite(x, "The state of the chain", i)
            kept = [*kept, x] if trajectory else kept
    return Chain(x, torch.ones_like(x.reshape(len(x), -1)[:, 0]), steps, torch.stack(kept) if trajectory else None)


def mala(
    target: ScoreModel | Energy | Callable[[State], PerRow],
    x: State,
    *,
    step: Tensor | float,
    steps: int,
    t: Time | None = None,
    seed: int | None = None,
    trajectory: bool = False,
) -> Chain:
    """The Metropolis-adjusted Langevin algorithm, which keeps the density exactly.

    Args:
        target: a callable, the logarithm of the density up to a constant, `(batch, *event)` to `(batch,)`; or an
            `Energy` without a time; or a model made of an `Energy`, at the time t.
        x, step, steps, t, seed, trajectory: as in `ula`.

    Raises:
        OptionError, ShapeError: an argument does not fit.
        CapabilityError: the model has a score but no energy.
        TimeError: t lies outside the span.
        DivergenceError: the log-density is NaN, or it or its gradient is infinite at the start; names the step and the
            rows.
    """
    density, h = _density_of(target, t), _length(step, steps, x)
    stream = RowNoise(fresh_seed() if seed is None else seed).open()
    kept, accepted = [x], torch.zeros_like(x.reshape(len(x), -1)[:, 0])
    with torch.no_grad():
        here = Place(x, *density(x))
        start = "Start where the density is positive, and its logarithm has a gradient."
        _check_finite(here.log_density, "The log-density at the start", None, start)
        _check_finite(here.score, "The gradient of the log-density at the start", None, start)
        for i in range(steps):
            y = here.x + h / 2 * here.score + h.sqrt() * stream.normal(x)
            there = Place(y, *density(y))
            ratio = log_ratio(here, there, h)
            outside = there.log_density == -math.inf
            _check_finite(ratio.where(~outside, 0), "The log-density of a proposal, or its gradient,", i)
            uniform = torch.special.log_ndtr(stream.normal(ratio))  # the logarithm of a uniform number
            taken = uniform < ratio  # not where it is NaN or -inf, outside of the support
            here = there.where(taken, here)
            accepted = accepted + taken
            kept = [*kept, here.x] if trajectory else kept
    return Chain(here.x, accepted / steps, steps + 1, torch.stack(kept) if trajectory else None)


@dataclass(frozen=True, eq=False)
class Place:
    """States, their log-density up to a constant, and its gradient."""

    x: State
    log_density: PerRow
    score: State

    def where(self, rows: Tensor, other: Place) -> Place:
        """These in the rows that are marked, the others elsewhere."""
        mask = over(rows, self.x).bool()
        return Place(
            torch.where(mask, self.x, other.x),
            torch.where(rows, self.log_density, other.log_density),
            torch.where(mask, self.score, other.score),
        )


def log_ratio(here: Place, there: Place, h: Tensor) -> PerRow:
    """`r(x, y)` of a move from here to there, `(batch,)`; h is laid over the states.

    With `a = y - x`, `log q(x | y) - log q(y | x) = -a.(s_x + s_y) / 2 - h (|s_y|^2 - |s_x|^2) / 8`.
    """
    move, pull = there.x - here.x, here.score + there.score
    turned = h * (there.score - here.score) / 8
    return there.log_density - here.log_density - sum_rows((move / 2 + turned) * pull)


def _score_of(score: object, t: Time | None) -> Callable[[State], State]:
    if isinstance(score, ScoreModel):
        if t is None:
            raise OptionError("Langevin dynamics of a model needs a time: ula(model, x, t=...).")
        return lambda x: score.score(t, x)
    if not callable(score) or t is not None:
        raise OptionError(_USAGE.format(what="a score s(x)", got=type(score).__name__, t=t))

    def field(x: State) -> State:
        value = score(x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"The score must be shaped as x, {tuple(x.shape)}; got {got}.")
        return value

    return field


def _density_of(target: object, t: Time | None) -> Callable[[State], tuple[PerRow, State]]:
    """Log-density and score of states."""
    if isinstance(target, ScoreModel):
        if t is None:
            raise OptionError("Langevin dynamics of a model needs a time: mala(model, x, t=...).")
        energy = target.network
        if not isinstance(energy, Energy) or target.prediction != "score":
            raise CapabilityError(
                "MALA compares densities, and this model has a score only: make it of an energy, "
                "ScoreModel(Energy(network), sde, prediction='score'), or use ula."
            )
        return lambda x: _negative(value_and_gradient(energy.network, *target.arguments(t, x)), x)
    if not callable(target) or t is not None:
        raise OptionError(_USAGE.format(what="a log-density", got=type(target).__name__, t=t))
    if isinstance(target, Energy):
        return lambda x: _negative(value_and_gradient(target.network, x), x)
    return lambda x: value_and_gradient(target, x)


_USAGE = (
    "Langevin dynamics needs {what} that is callable, or a ScoreModel and a time t; got an object of type {got} and "
    "t = {t}."
)


def _negative(pair: tuple[PerRow, State], x: State) -> tuple[PerRow, State]:
    return -pair[0].to(x), -pair[1].to(x)


def _length(step: Tensor | float, steps: int, x: State) -> Tensor:
    """h, laid over the states."""
    check_state(x)
    if len(x) == 0:
        raise ShapeError(f"Langevin dynamics needs at least one chain; got x of shape {tuple(x.shape)}.")
    h = over(torch.as_tensor(step, dtype=torch.float64), x)
    if not bool((h > 0).all()) or steps < 1:
        raise OptionError(f"Langevin dynamics needs step > 0 and steps >= 1; got step = {step}, steps = {steps}.")
    return h


def _check_finite(value: Tensor, what: str, step: int | None, advice: str = "Take smaller steps.") -> None:
    fine = value.reshape(len(value), -1).isfinite().all(1)
    if not bool(fine.all()):
        rows = (~fine).nonzero()[:, 0].tolist()
        raise DivergenceError(f"{what} is NaN or infinite", advice, step=step, time=None, rows=rows)
