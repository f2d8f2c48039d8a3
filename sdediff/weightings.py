r"""How much each noise level counts in a loss, and the levels of a batch.

With `x_t = alpha x_0 + sigma eps`, every loss of this library that looks at all noise levels is a mean over times of
`w(t)` times the squared error of the implied noise, over the D entries of an event (or equals it up to a constant),

    loss = E_t E_eps [ w(t) |epshat(t, x_t) - eps|^2 ] / D.

The mean is over even times of `[t_min, t_max]`; for "edm", over times at which log(sigma / alpha) is normal(-1.2, 1.2).

| weighting | w(t) | what it is |
|---|---|---|
| "simple", "noise" | 1 | DDPM's simple loss; sigma^2 on the score, as in NCSN |
| "likelihood" | g^2 / (2 sigma^2) | the variational bound in continuous time |
| "vlb" | (snr(s) / snr(t) - 1) / (2 (t - s)) | the bound of the steps (s, t] of a grid |
| "snr" | 1 + 1 / snr | SNR + 1 on the data; for variance-preserving processes, the error of v |
| "min_snr" | min(snr, 5) / snr | min-SNR-5 on the data |
| "edm" | (s^2 + s_d^2) / s_d^2, s = sigma / alpha | Karras's |

`D (t_max - t_min)` times the loss is the diffusion term of the bound in nats with "likelihood", and with "vlb" and the
length of its grid in place of `t_max - t_min` that of its discrete form on that grid, in which a step has
`1/2 (snr(s) - snr(t)) E|x_0 - xhat|^2`. On a chain of betas the weight of a step is DDPM's
`beta^2 / (2 v a (1 - abar))` with the posterior variance v.

Each weighting also has a law by which times are drawn (`sdediff.times`), for "likelihood" those even in log SNR, for
"vlb" the steps of a grid. Any other law with a density on the span may take its place, and the mean stays the same.
With `Steps` of a grid that is part of the span it is that over this part, with `Levels` that over the levels. The law
of "vlb" must be one on steps, which are then those meant. A network that counts the steps of a chain is shown these,
each equally often.

References: Ho et al. 2020 (arXiv:2006.11239); Song and Ermon 2019 (arXiv:1907.05600); Song et al. 2021
(arXiv:2101.09258), likelihood weighting; Kingma et al. 2021 (arXiv:2107.00630), the bound; Salimans and Ho 2022
(arXiv:2202.00512); Hang et al. 2023 (arXiv:2303.09556), min-SNR; Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError, TimeError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.shapes import Grid, PerRow, State, as_float64, as_time, check_state
from sdediff.times import Even, Law, Levels, LogNormal, LogSNR, Steps, check_law

_EVEN = Even()


def _simple(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    return torch.ones_like(t)


def _likelihood(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    _, diffusion = model.linear.rates(t)
    return as_float64(diffusion).expand(t.shape) ** 2 / (2 * model.linear.sigma(t) ** 2)


def _vlb(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    start, log_snr = law.starts(model.linear, t), model.linear.log_snr
    return torch.expm1(log_snr(start) - log_snr(t)) / (2 * (t - start))


def _snr(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    return 1 + (-model.linear.log_snr(t)).exp()


def _min_snr(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    return (5 * (-model.linear.log_snr(t)).exp()).clamp(max=1)


def _edm(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    # lambda(s) |xhat - x_0|^2 with lambda = (s^2 + s_d^2) / (s s_d)^2, and |xhat - x_0| = s |epshat - eps|
    return ((-model.linear.log_snr(t)).exp() + model.sigma_data**2) / model.sigma_data**2


@dataclass(frozen=True)
class Weighting:
    """A weighting of the noise error.

    Attributes:
        weight: w at times, float64, of a model, the times, and the law in use.
        law: the law by which times are drawn if none is given.
        over: the law whose mean is meant.
        chain: the same law for a network that counts the steps of a chain, made from its times.
    """

    weight: Callable[[ScoreModel, Tensor, Law], Tensor]
    law: Law = _EVEN
    over: Law = _EVEN
    chain: Callable[[Grid], Law] = Levels


WEIGHTINGS: dict[str, Weighting] = {
    "simple": Weighting(_simple),
    "noise": Weighting(_simple),
    "likelihood": Weighting(_likelihood, LogSNR()),
    "vlb": Weighting(_vlb, Steps(), chain=Steps),
    "snr": Weighting(_snr),
    "min_snr": Weighting(_min_snr),
    "edm": Weighting(_edm, LogNormal(-1.2, 1.2), LogNormal(-1.2, 1.2)),
}
"""The weightings by name."""


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise levels of the rows of a batch, and what each counts.

    Attributes:
        t: times, float64 `(batch,)`.
        weight: w(t), float64 `(batch,)`.
        noise: standard normal, shaped as the data.
    """

    t: PerRow
    weight: PerRow
    noise: State
    _sde: LinearSDE
    _law: Law
    _over: Law | None

    @classmethod
    def draw(
        cls,
        model: ScoreModel,
        x0: State,
        *,
        weighting: str,
        t: Any = None,
        times: Law | None = None,
        noise: State | None = None,
        generator: torch.Generator | None = None,
    ) -> NoiseLevels:
        """Draw what is not given; the arguments are those of `losses.denoising`."""
        if weighting not in WEIGHTINGS:
            raise OptionError(f"Unknown weighting {weighting!r}: write one of {', '.join(map(repr, WEIGHTINGS))}.")
        check_state(x0, "x0")
        if len(x0) == 0:
            raise ShapeError(f"A loss needs at least one row; got data of shape {tuple(x0.shape)}.")
        chosen = WEIGHTINGS[weighting]
        known = model.known_times if times is None else None
        law = times if times is not None else chosen.law if known is None else chosen.chain(known)
        check_law(law)
        if t is None:
            clock, _ = law.draw(model.linear, len(x0), generator=generator)
        else:
            clock = as_time(t)
            clock = clock.expand(x0.shape[:1]) if clock.ndim == 0 else clock
        if clock.shape != x0.shape[:1]:
            raise ShapeError(f"t must have one time per row, shape ({x0.shape[0]},); got {tuple(clock.shape)}.")
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)
        weight = chosen.weight(model, clock, law)
        if not bool(weight.isfinite().all()):
            raise TimeError(
                f"The weighting {weighting!r} is not finite at t = {clock[~weight.isfinite()][0].item():g} of "
                f"{model.linear}: leave it out by a larger t_min or a smaller t_max, or write weighting='simple'."
            )
        return cls(clock, weight, noise, model.linear, law, chosen.over if t is None else None)

    def shared(self, losses: PerRow) -> PerRow:
        """The losses with the weights of the law that drew the times, which learns of them; unchanged if t is given."""
        if self._over is None:
            return losses
        meant = self._over.weight(self._sde, self.t)
        # times have no graph to a learned schedule, so neither has the density that they were drawn by
        share = self._law.weight(self._sde, self.t).detach() / meant
        if torch.is_grad_enabled():
            self._law.observe(self._sde, self.t, (losses.to(meant) / meant).detach())
        return losses * share.to(losses)
