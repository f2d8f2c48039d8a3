r"""Training losses: denoising score matching with named weightings.

With `x_t = alpha x_0 + sigma eps`, every prediction kind is trained by the same regression; only the weight of each
noise level differs. In the error of the implied noise, summed over the D entries of an event,

    loss = E_t E_eps [ w(t) |epshat(t, x_t) - eps|^2 ] / D,

| weighting | w(t) | what it is |
|---|---|---|
| "simple", "noise" | 1 | DDPM's simple loss |
| "likelihood" | g^2 / (2 sigma^2) | the variational bound in nats per entry, up to a constant |
| "snr" | 1 + 1 / snr | SNR + 1 on the data; for variance-preserving processes, the error of v |
| "min_snr" | min(snr, 5) / snr | min-SNR-5 on the data |
| "edm" | (s^2 + s_d^2) / s_d^2, s = sigma / alpha | Karras's, with log s normal(-1.2, 1.2) |

Times are drawn evenly over `[t_min, t_max]` (for "edm": normally in log s), one uniform number shared by the batch and
shifted by i / batch, so that every batch covers all noise levels (low discrepancy).

References: Vincent 2011; Ho et al. 2020 (arXiv:2006.11239); Song et al. 2021 (arXiv:2101.09258), likelihood weighting;
Salimans and Ho 2022 (arXiv:2202.00512); Hang et al. 2023 (arXiv:2303.09556), min-SNR; Karras et al. 2022
(arXiv:2206.00364); Kingma et al. 2021 (arXiv:2107.00630), low-discrepancy times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.iddpm import hybrid as hybrid
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.shapes import PerRow, State, as_float64, as_time, check_state, over, sum_rows

_EDM_MEAN, _EDM_STD = -1.2, 1.2


def _simple(sde: LinearSDE, t: Tensor, sigma_data: float) -> Tensor:
    return torch.ones_like(t)


def _likelihood(sde: LinearSDE, t: Tensor, sigma_data: float) -> Tensor:
    _, diffusion = sde.rates(t)
    return as_float64(diffusion).expand(t.shape) ** 2 / (2 * sde.sigma(t) ** 2)


def _snr(sde: LinearSDE, t: Tensor, sigma_data: float) -> Tensor:
    return 1 + (-sde.log_snr(t)).exp()


def _min_snr(sde: LinearSDE, t: Tensor, sigma_data: float) -> Tensor:
    return (5 * (-sde.log_snr(t)).exp()).clamp(max=1)


def _edm(sde: LinearSDE, t: Tensor, sigma_data: float) -> Tensor:
    # lambda(s) |xhat - x_0|^2 with lambda = (s^2 + s_d^2) / (s s_d)^2, and |xhat - x_0| = s |epshat - eps|
    return ((-sde.log_snr(t)).exp() + sigma_data**2) / sigma_data**2


def _even_times(sde: LinearSDE, u: Tensor) -> Tensor:
    return sde.t_min + u * (sde.t_max - sde.t_min)


def _edm_times(sde: LinearSDE, u: Tensor) -> Tensor:
    log_s = _EDM_MEAN + _EDM_STD * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
    ends = -sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)) / 2
    return sde.time(-2 * log_s.clamp(ends[0].item(), ends[1].item()))


Weighting = tuple[Callable[[LinearSDE, Tensor, float], Tensor], Callable[[LinearSDE, Tensor], Tensor]]

WEIGHTINGS: dict[str, Weighting] = {
    "simple": (_simple, _even_times),
    "noise": (_simple, _even_times),
    "likelihood": (_likelihood, _even_times),
    "snr": (_snr, _even_times),
    "min_snr": (_min_snr, _even_times),
    "edm": (_edm, _edm_times),
}
"""Weight of the noise error, and the map from a uniform number to a time, by name."""


def low_discrepancy(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`n` numbers in [0, 1), each uniform, jointly even: `(u + i / n) mod 1` for one uniform u; float64 `(n,)`."""
    u = torch.rand((), dtype=torch.float64, generator=generator)
    return (u + torch.arange(n, dtype=torch.float64) / n) % 1


def denoising(
    model: ScoreModel,
    x0: State,
    *,
    weighting: str = "simple",
    t: Tensor | None = None,
    noise: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> PerRow:
    """Denoising score matching, one value a row, `(batch,)`; its mean is the loss.

    Args:
        model: what is trained.
        x0: clean data `(batch, *event)`.
        weighting: "simple" (or "noise"), "likelihood", "snr", "min_snr" or "edm".
        t: times `(batch,)`; drawn if None.
        noise: standard normal, shaped as x0; drawn if None.
        condition: passed to the network.
        generator: of t and noise, on the CPU.

    Raises:
        OptionError: unknown weighting.
    """
    check_state(x0, "x0")
    if weighting not in WEIGHTINGS:
        raise OptionError(f"Unknown weighting {weighting!r}: write one of {', '.join(map(repr, WEIGHTINGS))}.")
    weight, to_time = WEIGHTINGS[weighting]
    sde = model.linear
    if t is None:
        t = to_time(sde, low_discrepancy(len(x0), generator=generator))
    clock = as_time(t)
    if clock.shape != x0.shape[:1]:
        raise ShapeError(f"t must have one time per row, shape ({x0.shape[0]},); got {tuple(clock.shape)}.")
    if noise is None:
        noise = torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)
    xt = sde.perturb(clock, x0, noise)
    alpha, sigma = sde.alpha(clock), sde.sigma(clock)
    from_x, from_output = model.weights(clock, torch.zeros_like(clock), torch.ones_like(clock))
    target = over((1 - from_x * sigma) / from_output, x0) * noise - over(from_x * alpha / from_output, x0) * x0
    error = model.predict(clock, xt, condition=condition) - target
    scale = weight(sde, clock, model.sigma_data) * from_output**2
    return sum_rows(error**2) * (scale / math.prod(x0.shape[1:])).to(error)
