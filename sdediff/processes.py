r"""The named linear SDEs of the literature. Each is its `scales(t)`; drift, diffusion and kernels are derived.

| name | alpha(t) | sigma(t) |
|---|---|---|
| `VP` | exp(-B/2), B = beta_min t + (beta_max - beta_min) t^2 / 2 | sqrt(1 - alpha^2) |
| `SubVP` | as VP | 1 - alpha^2 |
| `VE` | 1 | sigma_min (sigma_max / sigma_min)^t |
| `EDM` | 1 | t |
| `CosineVP` | cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)) | sqrt(1 - alpha^2) |
| `SigmoidVP` | exp(-B/2), beta(t) = beta_max sigmoid(ramp (2t - 1)) | sqrt(1 - alpha^2) |
| `DiscreteVP` | product of sqrt(1 - beta_i), interpolated | sqrt(1 - alpha^2) |
| `RectifiedFlow` | 1 - t | t |

Every one also has its derivatives `(alpha', sigma')` and the inverse of its log-SNR in closed form (`DiscreteVP`
inverts by bisection). `1 - alpha^2` is computed by `expm1` or a product of sines, so sigma is accurate relative to
itself down to t = 0.

References: VP, SubVP, VE: Song et al. 2021 (arXiv:2011.13456); EDM: Karras et al. 2022 (arXiv:2206.00364); cosine:
Nichol and Dhariwal 2021 (arXiv:2102.09672); rectified flow: Liu et al. 2023 (arXiv:2209.03003); discrete chains:
Ho et al. 2020 (arXiv:2006.11239).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from sdediff.errors import OptionError, TimeError
from sdediff.linear import LinearSDE
from sdediff.shapes import as_time


def _require(fine: bool, what: str, got: object) -> None:
    if not fine:
        raise OptionError(f"{what}; got {got}.")


def _check_span(t_min: float, t_max: float, end: float = math.inf) -> None:
    _require(0 <= t_min < t_max <= end, f"A span needs 0 <= t_min < t_max <= {end:g}", f"[{t_min:g}, {t_max:g}]")


def _check_betas(beta_min: float, beta_max: float) -> None:
    _require(0 < beta_min <= beta_max, "A linear beta needs 0 < beta_min <= beta_max", (beta_min, beta_max))


def _preserving(integral: Tensor) -> tuple[Tensor, Tensor]:
    """`(alpha, sigma)` of a variance-preserving process from `B = int_0^t beta`."""
    return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()


def _preserving_rates(beta: Tensor) -> tuple[Tensor, Tensor]:
    """`(a, g) = (-beta / 2, sqrt(beta))` with `beta = B'`, which holds at t = 0 too, where sigma' is infinite."""
    return -beta / 2, beta.sqrt()


def _preserving_scale_rates(scales: tuple[Tensor, Tensor], beta: Tensor) -> tuple[Tensor, Tensor]:
    """`(alpha', sigma') = (-beta alpha / 2, beta alpha^2 / (2 sigma))`."""
    alpha, sigma = scales
    return -beta / 2 * alpha, beta / 2 * alpha**2 / sigma


def _softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`; unlike torch's own, every entry has the same bits wherever it stands in a tensor."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`, likewise."""
    return 1 / (1 + torch.exp(-x))


def _linear_beta(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return beta_min + (beta_max - beta_min) * t


def _linear_integral(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return t * (beta_min + (beta_max - beta_min) / 2 * t)


def _linear_integral_inverse(integral: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return 2 * integral / (beta_min + (beta_min**2 + 2 * (beta_max - beta_min) * integral).sqrt())


@dataclass(frozen=True)
class VP(LinearSDE):
    """Variance-preserving SDE, `dx = -beta/2 x dt + sqrt(beta) dw`, `beta(t) = beta_min + t (beta_max - beta_min)`."""

    _fixed: ClassVar[bool] = True
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        _check_span(self.t_min, self.t_max)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving(_linear_integral(as_time(t), self.beta_min, self.beta_max))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_rates(_linear_beta(as_time(t), self.beta_min, self.beta_max))

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_scale_rates(self.scales(t), _linear_beta(as_time(t), self.beta_min, self.beta_max))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return _linear_integral_inverse(_softplus(-log_snr), self.beta_min, self.beta_max)


@dataclass(frozen=True)
class SubVP(LinearSDE):
    """Sub-variance-preserving SDE: VP's drift, `g^2 = beta (1 - exp(-2 B))`, so that `sigma = 1 - alpha^2`."""

    _fixed: ClassVar[bool] = True
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        _check_span(self.t_min, self.t_max)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = _linear_integral(as_time(t), self.beta_min, self.beta_max)
        return (-integral / 2).exp(), -torch.expm1(-integral)

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.scales(t)[0], _linear_beta(as_time(t), self.beta_min, self.beta_max)
        return -beta / 2 * alpha, beta * alpha**2

    def _time_of(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2) = exp(-log_snr / 2)
        return _linear_integral_inverse(2 * torch.asinh((-log_snr / 2).exp() / 2), self.beta_min, self.beta_max)


@dataclass(frozen=True)
class VE(LinearSDE):
    """Variance-exploding SDE with geometric sigma.

    The published kernel `N(x_0, sigma(t)^2)` has `sigma(0) = sigma_min`: the process starts from data that is already
    blurred by `initial_std = sigma_min`. The SDE `dx = sqrt(d sigma^2 / dt) dw` started from clean data would have
    variance `sigma(t)^2 - sigma_min^2` instead. Here t = 0 is the blurred data, and `t_min = 0`.
    """

    _fixed: ClassVar[bool] = True
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _require(
            0 < self.sigma_min < self.sigma_max, "VE needs 0 < sigma_min < sigma_max", (self.sigma_min, self.sigma_max)
        )
        _check_span(self.t_min, self.t_max)

    @property
    def initial_std(self) -> float:  # type: ignore[override]  # a read-only view of sigma_min
        return self.sigma_min

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.ones_like(t), self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t)
        return torch.zeros_like(alpha), math.log(self.sigma_max / self.sigma_min) * sigma

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(LinearSDE):
    """The SDE of Karras et al. 2022: `alpha = 1`, `sigma = t`, so the time is the noise level itself."""

    _fixed: ClassVar[bool] = True
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _require(
            0 < self.sigma_min < self.sigma_max, "EDM needs 0 < sigma_min < sigma_max", (self.sigma_min, self.sigma_max)
        )

    @property
    def t_min(self) -> float:  # type: ignore[override]  # a read-only view of sigma_min
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]  # a read-only view of sigma_max
        return self.sigma_max

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.ones_like(t), t

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.zeros_like(t), torch.ones_like(t)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()


@dataclass(frozen=True)
class CosineVP(LinearSDE):
    """Variance-preserving process with the cosine schedule; alpha reaches 0 at t = 1, just beyond `t_max`."""

    _fixed: ClassVar[bool] = True
    offset: float = 0.008
    t_min: float = 1e-4
    t_max: float = 0.999

    def __post_init__(self) -> None:
        _require(self.offset > 0, "CosineVP needs offset > 0", self.offset)
        _check_span(self.t_min, self.t_max, 1.0)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2 / (1 + self.offset)
        start, turned = quarter * self.offset, quarter * as_time(t)
        # cos(start + turned) = sin(quarter (1 - t)), which is 0 at t = 1 without rounding, and
        # cos^2(start) - cos^2(start + turned) = sin(turned) sin(2 start + turned)
        alpha = (quarter * (1 - as_time(t))).sin() / math.cos(start)
        return alpha, (turned.sin() * (turned + 2 * start).sin()).sqrt() / math.cos(start)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2 / (1 + self.offset)
        return _preserving_rates(2 * quarter / (quarter * (1 - as_time(t))).tan())

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2 / (1 + self.offset)
        alpha, sigma = self.scales(t)
        d_alpha = -quarter * (quarter * (1 - as_time(t))).cos() / math.cos(quarter * self.offset)
        return d_alpha, -alpha * d_alpha / sigma

    def _time_of(self, log_snr: Tensor) -> Tensor:
        quarter = math.pi / 2 / (1 + self.offset)
        start = quarter * self.offset
        # cos(angle) = alpha cos(start); the half-angle form stays accurate near t = 0
        alpha_cos = (-_softplus(-log_snr) / 2).exp() * math.cos(start)
        sine = (_sigmoid(-log_snr) * math.cos(start) ** 2 + math.sin(start) ** 2).sqrt()
        return torch.atan2(sine * math.cos(start) - alpha_cos * math.sin(start),
                           alpha_cos * math.cos(start) + sine * math.sin(start)) / quarter  # fmt: skip


@dataclass(frozen=True)
class SigmoidVP(LinearSDE):
    """Variance-preserving process with `beta(t) = beta_max sigmoid(ramp (2 t - 1))`."""

    _fixed: ClassVar[bool] = True
    beta_max: float = 20.0
    ramp: float = 6.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _require(self.beta_max > 0 and self.ramp > 0, "SigmoidVP needs beta_max, ramp > 0", (self.beta_max, self.ramp))
        _check_span(self.t_min, self.t_max)

    def _beta_integral(self, t: Tensor) -> Tensor:
        grown = torch.expm1(2 * self.ramp * t) / (1 + math.exp(self.ramp))
        return self.beta_max / (2 * self.ramp) * grown.log1p()

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving(self._beta_integral(as_time(t)))

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_max * _sigmoid(self.ramp * (2 * t - 1))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_rates(self._beta(as_time(t)))

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_scale_rates(self.scales(t), self._beta(as_time(t)))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        grown = torch.expm1(_softplus(-log_snr) * 2 * self.ramp / self.beta_max)
        return (grown * (1 + math.exp(self.ramp))).log1p() / (2 * self.ramp)


@dataclass(frozen=True)
class RectifiedFlow(LinearSDE):
    """Straight-line interpolation `alpha = 1 - t`, `sigma = t`.

    Its SDE is singular at t = 1, where alpha is 0 and `g^2 = 2 t / (1 - t)`; `t_max` stays just below so that every
    solver can start there. `RectifiedFlow(t_max=1.0)` starts from pure noise and suits ODE solvers and tables.
    """

    _fixed: ClassVar[bool] = True
    t_min: float = 1e-4
    t_max: float = 0.999

    def __post_init__(self) -> None:
        _check_span(self.t_min, self.t_max, 1.0)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return 1 - t, t

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return -torch.ones_like(t), torch.ones_like(t)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return _sigmoid(-log_snr / 2)


_OFF_CHAIN = 1e-2
"""How far from a time of its chain, in steps, a time may lie: the rounding of float32 clocks."""


def _length(n: int) -> int:
    _require(isinstance(n, int) and n > 1, "A chain needs a whole number of steps, at least 2", n)
    return n


def _rising_steps(steps: Sequence[int] | Tensor, n: int | None) -> tuple[int, ...]:
    """Time steps as a tuple of integers, rising from 0 or above, below n."""
    row = steps.tolist() if isinstance(steps, Tensor) else list(steps)
    fine = len(row) > 1 and all(type(i) is int or isinstance(i, np.integer) for i in row)
    fine = fine and row[0] >= 0 and (n is None or row[-1] < n) and all(a < b for a, b in pairwise(row))
    end = "" if n is None else f", in 0..{n - 1}"
    _require(fine, f"Time steps are a rising row of at least two integers{end}", row)
    return tuple(int(i) for i in row)


@dataclass(frozen=True, eq=False)
class DiscreteVP(LinearSDE):
    r"""A chain `x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z`, i = 1..N, made continuous with `t = i / N`.

    At the grid points `alpha(i / N)^2 = prod_{j <= i} (1 - beta_j)` exactly; between them `-log alpha^2` is a monotone
    cubic (Fritsch and Butland, 1984). The data is t = 0 and the first noisy state is `t_min = 1 / N`.

    Args:
        betas: N numbers in (0, 1).
        steps: the time steps that a network knows these states by, rising; None for 0..N-1 (see `respace`).
    """

    betas: Tensor
    steps: tuple[int, ...] | None = None
    t_max: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64).detach().cpu()
        fine = betas.ndim == 1 and len(betas) > 1 and bool(((betas > 0) & (betas < 1)).all())
        _require(fine, "DiscreteVP needs a row of at least two betas in (0, 1)", self.betas)
        object.__setattr__(self, "betas", betas)
        if self.steps is not None:
            object.__setattr__(self, "steps", _rising_steps(self.steps, None))
            _require(len(self.steps) == len(betas), f"steps must name each of the {len(betas)} states", self.steps)

    @classmethod
    def linear_betas(cls, n: int = 1000, first: float = 1e-4, last: float = 0.02) -> DiscreteVP:
        """DDPM's chain: betas even from `first` to `last`."""
        return cls(torch.linspace(first, last, _length(n), dtype=torch.float64))

    @classmethod
    def cosine_betas(cls, n: int = 1000, offset: float = 0.008, largest: float = 0.999) -> DiscreteVP:
        """IDDPM's chain: that of `CosineVP(offset)` on `[0, 1]`, with betas of at most `largest`."""
        whole = CosineVP(offset, t_max=1.0)
        times = torch.linspace(0, 1, _length(n) + 1, dtype=torch.float64)
        return cls((whole.transition(times[:-1], times[1:])[1] ** 2).clamp(max=largest))

    @classmethod
    def sigmoid_betas(cls, n: int = 1000, first: float = 1e-4, last: float = 0.02, ramp: float = 6.0) -> DiscreteVP:
        """Betas from `first` to `last` along a sigmoid, `sigmoid(u)` with u even from -ramp to ramp."""
        return cls(first + (last - first) * _sigmoid(torch.linspace(-ramp, ramp, _length(n), dtype=torch.float64)))

    @property
    def t_min(self) -> float:  # type: ignore[override]  # a read-only view of the number of steps
        return 1 / len(self.betas)

    @property
    def times(self) -> Tensor:
        """The grid of the chain, `N/N, ..., 1/N`, decreasing `(N,)`: what `sample(times=...)` takes.

        Any rows of it will do in its place: sampling by a sub-sequence (`sdediff.subsequences`).
        """
        n = len(self.betas)
        return torch.arange(n, 0, -1, dtype=torch.float64) / n

    @property
    def chain_times(self) -> Tensor:
        return self.times

    def timestep(self, t: Tensor) -> Tensor:
        """The integer time step `N t - 1` in 0..N-1 of a network trained on the chain (DDPM's indices).

        Raises:
            TimeError: t is not one of `times`.
        """
        clock = as_time(t)
        place = clock * len(self.betas)
        index = self._index(clock)
        off = (place - place.round()).abs() > _OFF_CHAIN
        if bool(off.any()):
            raise TimeError(
                f"t = {clock[off].reshape(-1)[0]:g} is not one of the {len(self.betas)} times of {self}, and a network "
                "of integer time steps knows no other: give times=chain.times or rows of it (sd.subsequences), laws of "
                "training times on the chain (sd.times.Levels(chain.times)), and for solvers that stop between write "
                "time=chain.nearest_timestep, which rounds."
            )
        return self._known(index)

    def nearest_timestep(self, t: Tensor) -> Tensor:
        """The integer time step nearest to t, for solvers whose times lie between those of the chain.

        Raises:
            TimeError: t is nearer to 0, which is the data and no step, than to `t_min`, or beyond `t_max`.
        """
        return self._known(self._index(as_time(t)))

    def _index(self, clock: Tensor) -> Tensor:
        """The nearest step, counted from 0; refused outside 0..N-1."""
        index = (clock * len(self.betas)).round().sub(1)
        outside = ~((index >= 0) & (index < len(self.betas)))
        if bool(outside.any()):
            raise TimeError(
                f"t = {clock[outside].reshape(-1)[0]:g} has no time step: those of {self} are "
                f"0..{len(self.betas) - 1}, at t = {self.t_min:g} to 1."
            )
        return index.long()

    def _known(self, index: Tensor) -> Tensor:
        return index if self.steps is None else torch.tensor(self.steps, device=index.device)[index]

    def respace(self, indices: Sequence[int] | Tensor) -> DiscreteVP:
        """The chain of some of its states (IDDPM): `beta'_k = 1 - abar_k / abar_(k-1)` over the states that are kept.

        Its `timestep` gives the time steps of this chain, so that a network of this chain serves it as it is. Sampling
        it is sampling this chain by the sub-sequence.

        Args:
            indices: the steps kept, rising, in 0..N-1; at least two.

        Raises:
            OptionError: no such steps.
        """
        kept = _rising_steps(indices, len(self.betas))
        levels = torch.from_numpy(-np.log1p(-self.betas.numpy())).cumsum(0)[list(kept)]
        gaps = torch.cat([levels[:1], levels.diff()])
        return DiscreteVP(-torch.expm1(-gaps), tuple(self._known(torch.tensor(kept)).tolist()))

    @cached_property
    def _integral(self) -> tuple[Tensor, Tensor]:
        steps = -np.log1p(-self.betas.numpy())
        n = len(steps)
        knots = np.arange(n + 1) / n
        # Harmonic means of neighbouring slopes (and the outer slopes at the ends) keep the slope of the cubic positive.
        inner = 2 * steps[1:] * steps[:-1] / (steps[1:] + steps[:-1])
        slopes = n * np.concatenate([steps[:1], inner, steps[-1:]])
        spline = CubicHermiteSpline(knots, np.append(0, steps.cumsum()), slopes)
        return torch.from_numpy(knots), torch.from_numpy(spline.c)

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The cubic that t lies in, its four coefficients from the third power down, and t from its left end."""
        knots, cubic = (table.to(t.device) for table in self._integral)
        piece = (torch.searchsorted(knots, t.detach().contiguous(), right=True) - 1).clamp(0, cubic.shape[1] - 1)
        return cubic[:, piece], t - knots[piece]

    def _beta_integral(self, t: Tensor) -> Tensor:
        (c3, c2, c1, c0), offset = self._piece(t)
        return ((c3 * offset + c2) * offset + c1) * offset + c0

    def _beta(self, t: Tensor) -> Tensor:
        (c3, c2, c1, _), offset = self._piece(t)
        return (3 * c3 * offset + 2 * c2) * offset + c1

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving(self._beta_integral(as_time(t)))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_rates(self._beta(as_time(t)))

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_scale_rates(self.scales(t), self._beta(as_time(t)))

    def __repr__(self) -> str:
        kept = "" if self.steps is None else f", time steps {self.steps[0]} to {self.steps[-1]}"
        return f"DiscreteVP({len(self.betas)} betas from {self.betas[0]:g} to {self.betas[-1]:g}{kept})"
