r"""IDDPM: a learned variance of the reverse kernel, and the hybrid loss that trains it.

A network with two outputs says the mean, as ever, and a number in every entry. With `v = (that number + 1) / 2`, not
bounded, the reverse kernel of a step from t to s has the variance

    V = exp(v log beta + (1 - v) log beta_tilde),    beta = sigma_t^2 (1 - r),    beta_tilde = sigma_s^2 (1 - r),

`r = snr_t / snr_s`: between the two fixed choices of DDPM, those of the steps that are taken, so that a network trained
on a long chain serves on any part of it. The step to the data (and any with sigma_s = 0), where beta_tilde is 0, has
the beta_tilde of the step before, and of a single step, beta.

The hybrid loss of a chain of T steps, the one to the data among them, is `L_simple + lam L_vlb`, in nats for an entry:

    L_simple = E |epshat - eps|^2 / D,
    L_vlb    = T E L_t / D,         L_t = KL(q(x_s | x_t, x_0) || p(x_s | x_t)),    or  -log p(x_0 | x_t) at the last,

over steps drawn evenly. In L_vlb the mean is held constant, and a learned schedule, so that L_simple alone trains them,
and L_vlb alone the variance; its minimum is at `V = nu^2 + gain^2 E[(x_0 - xhat)^2 | x_t]` (see `sdediff.variance`).

Reference: Nichol and Dhariwal 2021 (arXiv:2102.09672), sections 3.1 and 3.4; they count L_vlb in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.grids import uniform
from sdediff.linear import LinearSDE
from sdediff.model import PREDICTIONS, ScoreModel
from sdediff.networks import HEARD
from sdediff.processes import DiscreteVP
from sdediff.sde import SLACK, check_grid
from sdediff.shapes import Grid, PerRow, State, as_time, check_state, over, sum_rows
from sdediff.variance import EntryVariance, ReverseSteps

_STEPS = 1000


class _Listening:
    """A network around `TwoHeads`, perhaps with others between, that keeps the second output of its last call."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.keeps_time = getattr(network, "keeps_time", False)
        self._heard: list[State] = []

    def __call__(self, x: State, t: Tensor, *condition: Any) -> State:
        self._heard = []
        token = HEARD.set(self._heard)
        try:
            return self.network(x, t, *condition)
        finally:
            HEARD.reset(token)

    def second(self, x: State) -> State:
        """The second output of the last call, for states x, in their dtype."""
        if len(self._heard) != 1 or self._heard[0].shape != x.shape:
            raise CapabilityError(
                "A learned variance needs a model whose network is TwoHeads(network), called once a step on the "
                f"states, {tuple(x.shape)}; got {[tuple(output.shape) for output in self._heard]} of variance outputs."
            )
        return self._heard[0].to(x.dtype)


def _log_ends(steps: ReverseSteps) -> tuple[Tensor, Tensor]:
    """`(log beta_tilde, log beta)` of every step, float64 `(steps,)`."""
    high = 2 * steps.at.sigma[:-1].log() + steps.fresh.log()
    low = 2 * steps.nu.log()
    return torch.where(steps.nu > 0, low, torch.cat([high[:1], low[:-1]])), high


@dataclass(frozen=True)
class LearnedVariance(EntryVariance):
    """The variance that the second output of a `TwoHeads` network gives: `DDPM(LearnedVariance())`.

    It lies between the variances of DDPM, so that there is no DDIM with it, unless eta = 1.

    Raises:
        CapabilityError: when used with a model of another network.
    """

    _fixed: ClassVar[bool] = True

    def along(self, model: ScoreModel, steps: ReverseSteps) -> tuple[ScoreModel, Callable[[int, State], State]]:
        network = _Listening(model.network)
        low, high = (ends.tolist() for ends in _log_ends(steps))

        def variance(i: int, x: State) -> State:
            v = (network.second(x) + 1) / 2
            return (v * high[i] + (1 - v) * low[i]).exp()

        return replace(model, network=network), variance


def hybrid(
    model: ScoreModel,
    x0: State,
    *,
    chain: Tensor | Sequence[float] | None = None,
    lam: float = 0.001,
    t: Tensor | None = None,
    noise: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> PerRow:
    """IDDPM's `L_simple + lam L_vlb`, one value a row, `(batch,)`; its mean is the loss, in nats for an entry.

    Args:
        model: what is trained, of any prediction; its network is a `TwoHeads`.
        x0: clean data `(batch, C, *rest)`.
        chain: its times, falling; the betas' own of a `DiscreteVP` if None, else 1000 times even in t.
        lam: weight of L_vlb.
        t: times `(batch,)`, each one of the chain; drawn evenly from it if None.
        noise: standard normal, shaped as x0; drawn if None.
        condition: passed to the network.
        generator: of t and noise, on the CPU.

    Raises:
        OptionError, ShapeError, TimeError: an argument does not fit.
        CapabilityError: the model's network has no second output, or alpha is 0 at the chain's first time and the model
            predicts noise or score.
    """
    if not isinstance(model, ScoreModel):
        raise OptionError(f"hybrid needs a ScoreModel, whose network is a TwoHeads; got {type(model).__name__}.")
    check_state(x0, "x0")
    if not 0 <= lam < math.inf:
        raise OptionError(f"lam is the weight of L_vlb, a number >= 0; got {lam}.")
    sde = model.linear
    grid = _times(sde, chain)
    if model.blind_in_noise and not bool(sde.alpha(grid[0]) > 0):
        raise CapabilityError(
            f"At t = {grid[0]:g} alpha is 0, where a model that predicts {model.prediction!r} says nothing of the data "
            "and L_vlb is infinite: use a network that predicts 'v', 'flow', 'data' or 'edm', or give a chain= that "
            "starts later."
        )
    if t is None:
        index = torch.randint(len(grid), x0.shape[:1], generator=generator)
    else:
        index = _places(grid, as_time(t).cpu(), x0)
    clock = grid[index]
    if noise is None:
        noise = torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)
    heard = _Listening(model.network)
    model = replace(model, network=heard)
    zero, one = torch.zeros_like(clock), torch.ones_like(clock)
    at = model.point(clock)
    of_x0, of_noise = PREDICTIONS[model.prediction](at)
    target = over(of_x0, x0) * x0 + over(of_noise, x0) * noise
    error = model.predict(clock, sde.perturb(clock, x0, noise), condition=condition) - target
    simple = sum_rows((over(model.weights_at(at, zero, one)[1], x0) * error) ** 2)

    with torch.no_grad():  # a learned schedule is trained by L_simple, as the mean is
        steps = ReverseSteps.to_data(model.point(grid))
        low, high = _log_ends(steps)
        of_data = model.weights(clock, one, zero)[1]
    # in units of V at v = 0, which float32 can hold: (nu^2 + gain^2 error^2) / V + log V
    own, moved = (part[index] * (-low[index] / 2).exp() for part in (steps.nu, steps.gain))
    grown = (heard.second(x0) + 1) / 2 * over((high - low)[index], x0)
    constant = torch.where(steps.nu > 0, -1.0, math.log(2 * math.pi) + low)[index]
    squares = over(own**2, x0) + (over(moved * of_data, x0) * error.detach()) ** 2
    vlb = sum_rows(squares * (-grown).exp() + grown + over(constant, x0)) / 2
    return (simple + lam * len(grid) * vlb) / math.prod(x0.shape[1:])


def _times(sde: LinearSDE, chain: Tensor | Sequence[float] | None) -> Grid:
    if chain is None:
        return sde.times if isinstance(sde, DiscreteVP) else uniform(sde, _STEPS - 1)
    grid = as_time(chain).detach().cpu()
    check_grid(grid, direction=-1)
    sde.check_span(grid, "chain")
    return grid


def _places(grid: Grid, t: Tensor, x0: State) -> Tensor:
    """Where in the chain the times of the rows are."""
    if t.shape != x0.shape[:1]:
        raise ShapeError(f"t must have one time per row, shape ({x0.shape[0]},); got {tuple(t.shape)}.")
    distance, index = (grid[:, None] - t).abs().min(0)
    if bool((distance > SLACK * grid[0]).any()):
        raise TimeError(
            f"t = {t[distance.argmax()]:g} is not a time of the chain, in whose steps L_vlb is defined: draw t from "
            "those, or leave it away."
        )
    return index
