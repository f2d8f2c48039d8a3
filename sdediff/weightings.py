r"""How much each noise level counts in a loss, and the levels of a batch.

With `x_t = alpha x_0 + sigma eps`, every loss of this library that looks at all noise levels is a mean over even times
of `w(t)` times the squared error of the implied noise, over the D entries of an event (or equals it up to a constant),

    loss = 1 / (t_max - t_min) int w(t) E |epshat(t, x_t) - eps|^2 / D dt.

| weighting | w(t) | what it is |
|---|---|---|
| "simple", "noise" | 1 | DDPM's simple loss; sigma^2 on the score, as in NCSN |
| "likelihood" | g^2 / (2 sigma^2) | the variational bound in continuous time |
| "vlb" | (snr(s) / snr(t) - 1) / (2 (t - s)) | the bound of the steps (s, t] of a grid |
| "snr" | 1 + 1 / snr | SNR + 1 on the data; for variance-preserving processes, the error of v |
| "min_snr" | min(snr, 5) / snr | min-SNR-5 on the data |
| "edm" | q(t) (s^2 + s_d^2) / s_d^2, s = sigma / alpha | Karras's; q is the density at which log s is normal(-1.2, 1.2) |

`D (t_max - t_min)` times the loss is the diffusion term of the bound in nats with "likelihood", and with "vlb" that of
its discrete form, in which a step has `1/2 (snr(s) - snr(t)) E|x_0 - xhat|^2`. On a chain of betas the weight of a step
is DDPM's `beta^2 / (2 v a (1 - abar))` with the posterior variance v.

Each weighting has a law of times of its own (`sdediff.times`), which says how the integral is estimated: even times,
"likelihood" those even in log SNR, "edm" its log-normal, "vlb" the steps of a grid. Any other law may take its place;
only that of "vlb" must be one on steps, which are then those meant.

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

from sdediff.errors import OptionError, ShapeError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.shapes import PerRow, State, as_float64, as_time
from sdediff.times import Even, Law, LogNormal, LogSNR, Steps


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


_EDM_TIMES = LogNormal(-1.2, 1.2)


def _edm(model: ScoreModel, t: Tensor, law: Law) -> Tensor:
    # lambda(s) |xhat - x_0|^2 with lambda = (s^2 + s_d^2) / (s s_d)^2, and |xhat - x_0| = s |epshat - eps|
    at_level = ((-model.linear.log_snr(t)).exp() + model.sigma_data**2) / model.sigma_data**2
    return at_level / _EDM_TIMES.weight(model.linear, t)


Weighting = tuple[Callable[[ScoreModel, Tensor, Law], Tensor], Law]

WEIGHTINGS: dict[str, Weighting] = {
    "simple": (_simple, Even()),
    "noise": (_simple, Even()),
    "likelihood": (_likelihood, LogSNR()),
    "vlb": (_vlb, Steps()),
    "snr": (_snr, Even()),
    "min_snr": (_min_snr, Even()),
    "edm": (_edm, _EDM_TIMES),
}
"""Weight of the noise error at a time (of a model, and the law of times in use), and the law of its own, by name."""


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
    _share: PerRow | None

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
        weight, law = WEIGHTINGS[weighting]
        if times is not None:
            law = times
        if not isinstance(law, Law):
            raise OptionError(f"times must be a law of times such as times.Even() or times.LogSNR(); got {times!r}.")
        sde, share = model.linear, None
        if t is None:
            clock, share = law.draw(sde, len(x0), generator=generator)
        else:
            clock = as_time(t)
            clock = clock.expand(x0.shape[:1]) if clock.ndim == 0 else clock
        if clock.shape != x0.shape[:1]:
            raise ShapeError(f"t must have one time per row, shape ({x0.shape[0]},); got {tuple(clock.shape)}.")
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)
        return cls(clock, weight(model, clock, law), noise, sde, law, share)

    def shared(self, losses: PerRow) -> PerRow:
        """The losses times the weights of the law that drew their times, which first learns of them."""
        if self._share is None:
            return losses
        if torch.is_grad_enabled():
            self._law.observe(self._sde, self.t, losses)
        return losses * self._share.to(losses)
