r"""Stochastic differential equations, and the linear ones whose marginals are known in closed form.

An SDE is `dx = f(t, x) dt + g(t, x) dw` with data at t = 0 and noise at `t_max`. The noise is additive: g is a number,
one number per row, or one per entry, and does not depend on the state (Ito and Stratonovich then agree).

A *linear* SDE has `f = a(t) x` and `g = g(t)`, and its kernel is `p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)` with

    a = alpha' / alpha,                  g^2 = 2 sigma (sigma' - a sigma),
    alpha = exp(int_0^t a),              sigma^2 = alpha^2 (sigma_0^2 + int_0^t g^2 / alpha^2).

The user writes `scales(t) = (alpha, sigma)` or `rates(t) = (a, g)`, or only `drift` and `diffusion`, and the rest is
derived. Between two times s <= t, with `r = snr(t) / snr(s)` and `snr = alpha^2 / sigma^2`,

    x_t | x_s      ~ N(alpha_t / alpha_s x_s, sigma_t^2 (1 - r)),
    x_s | x_t, x_0 ~ N((sigma_s / sigma_t) sqrt(r) x_t + alpha_s (1 - r) x_0, sigma_s^2 (1 - r)),

where `1 - r` is taken by `expm1`. References: Song et al., Score-Based Generative Modeling through SDEs, 2021
(arXiv:2011.13456); Kingma et al., Variational Diffusion Models, 2021 (arXiv:2107.00630); Sarkka and Solin, Applied
Stochastic Differential Equations, 2019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from sdediff.errors import CapabilityError, SDEError, ShapeError, TimeError
from sdediff.moments import Moments
from sdediff.noise import RowNoise
from sdediff.shapes import State, Time, Trajectory, as_float64, as_time, check_state, over

if TYPE_CHECKING:
    from sdediff.model import ScoreModel

_SLACK = 1e-6


class SDE(ABC):
    """A forward process `dx = f(t, x) dt + g(t, x) dw` on `[t_min, t_max]`.

    Override `drift` and `diffusion`; set the class attributes below where the defaults do not fit. In both methods
    `t` is `()` or `(batch,)` and `x` is `(batch, *event)`: write `sdediff.over(c, x)` to lay a function of t over x.

    Attributes:
        t_min: where solvers stop on the data side (> 0 where the score is singular at 0).
        t_max: the noise end.
        initial_std: standard deviation of the blur that the state already has at t = 0.
    """

    t_min: float = 1e-5
    t_max: float = 1.0
    initial_std: float = 0.0

    @abstractmethod
    def drift(self, t: Tensor, x: State) -> State:
        """`f(t, x)`, shaped as x."""

    @abstractmethod
    def diffusion(self, t: Tensor, x: State) -> Tensor | float:
        """`g(t, x)`: a number, `(batch,)`, or shaped as x. It must not depend on the value of x."""

    def coefficients(self, t: Tensor, x: State) -> tuple[State, Tensor | float]:
        """Drift and diffusion together; override where they share work."""
        return self.drift(t, x), self.diffusion(t, x)

    @property
    def noisy(self) -> bool:
        """Whether the process has noise at all; a solver draws none where it has not."""
        return True

    def linear(self) -> LinearSDE:
        """This SDE as a linear one; see `as_linear`."""
        return _Linearized(self)

    def reverse_drift(self, t: Tensor, x: State, model: ScoreModel, noise_level: float) -> State:
        """Drift of the equal-marginal process `f - (1 + noise_level^2) / 2 g^2 score`."""
        drift, diffusion = self.coefficients(t, x)
        return drift - over((1 + noise_level**2) / 2 * as_float64(diffusion) ** 2, x) * model.score(t, x)

    def clock(self, t: Tensor) -> Tensor:
        """A rising function of t in which even steps suit the process: t itself, or -log SNR where that is known."""
        return t

    def unclock(self, u: Tensor) -> Tensor:
        """The inverse of `clock`."""
        return u

    def check_span(self, t: Tensor, what: str = "t") -> None:
        """Refuse times outside `[0, t_max]`.

        Raises:
            TimeError: some time lies outside, or is NaN.
        """
        slack = _SLACK * self.t_max
        inside = (t >= -slack) & (t <= self.t_max + slack)
        if not bool(inside.all()):
            wrong = t.reshape(-1)[~inside.reshape(-1)][0].item()
            raise TimeError(f"{what} = {wrong:g} lies outside the span [0, {self.t_max:g}] of {self}.")

    def prior(self, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Distribution:
        """The distribution of `x_T` over events of this shape, if the process has one in closed form.

        Raises:
            CapabilityError: a general SDE has none; pass `x_init` instead, for instance from `simulate`.
        """
        raise CapabilityError(
            f"{self} has no closed-form prior: pass x_init, for instance the last state of sde.simulate(data, times)."
        )

    def advance(self, s: Tensor, t: Tensor, x: State, normal: State) -> State:
        """One step of the process from s to t with standard normal numbers: Euler-Maruyama, unless exact is known."""
        drift, diffusion = self.coefficients(s, x)
        return x + over(t - s, x) * drift + over(diffusion, x) * over((t - s).abs().sqrt(), x) * normal

    @torch.no_grad()
    def simulate(self, x0: State, times: Tensor, seed: int | None = None) -> Trajectory:
        """Paths of the process through `times`, started from `x0` at `times[0]`.

        A general SDE moves by Euler-Maruyama, a linear SDE by its exact transition kernel.

        Args:
            x0: states `(batch, *event)` at `times[0]`.
            times: increasing times `(n + 1,)` in `[0, t_max]`.
            seed: row i depends on it and on i only; None draws one from torch's global generator.

        Returns:
            States `(n + 1, batch, *event)`, the first of which is x0.
        """
        check_state(x0, "x0")
        times = as_time(times)
        check_grid(times, direction=1)
        self.check_span(times, "times")
        stream = RowNoise(fresh_seed() if seed is None else seed).open()
        path = [x0]
        for s, t in pairwise(times):
            path.append(self.advance(s, t, path[-1], stream.unit(x0, s, t)))
        return torch.stack(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def fresh_seed() -> int:
    """A seed from torch's global generator, so that `torch.manual_seed` governs whatever has no seed of its own."""
    return int(torch.randint(2**62, ()).item())


def check_grid(times: Tensor, *, direction: int) -> None:
    """Refuse a grid that is not one strictly monotone row of at least two times.

    Raises:
        TimeError: with the first offending pair.
    """
    word = "increasing" if direction > 0 else "decreasing"
    if times.ndim != 1 or len(times) < 2:
        raise TimeError(f"times must be a {word} row of at least two times; got shape {tuple(times.shape)}.")
    wrong = ~(direction * times.diff() > 0)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise TimeError(
            f"times must be strictly {word}; "
            f"times[{i}] = {times[i]:g} is followed by times[{i + 1}] = {times[i + 1]:g}."
        )


class LinearSDE(SDE):
    """An SDE with drift `a(t) x` and diffusion `g(t)`: override `scales(t)` or `rates(t)`.

    Both take float64 times of any shape and return a pair of tensors of that shape (numbers will do).
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.scales is LinearSDE.scales and cls.rates is LinearSDE.rates:
            raise SDEError(
                f"{cls.__name__} overrides neither scales(t) -> (alpha, sigma) nor "
                "rates(t) -> (drift_rate, diffusion): write one of the two."
            )

    # The two descriptions, each derived from the other.

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha, sigma)`: the kernel is `p(x_t | x_0) = N(alpha x_0, sigma^2 I)`."""
        t = as_time(t)
        log_alpha, variance = self._moments(t)
        return log_alpha.exp(), variance.sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(a, g)`: the SDE is `dx = a x dt + g dw`."""
        t = as_time(t)
        alpha, sigma = self.scales_at(t)
        d_alpha, d_sigma = self.scale_rates(t)
        drift_rate = d_alpha / alpha
        return drift_rate, (2 * sigma * (d_sigma - drift_rate * sigma)).sqrt()

    @cached_property
    def _moments(self) -> Moments:
        def rates(t: Tensor) -> tuple[Tensor, Tensor]:
            drift_rate, diffusion = self.rates(t)
            return as_float64(drift_rate).expand(t.shape), as_float64(diffusion).expand(t.shape)

        return Moments(rates, self.t_max, self.initial_std)

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha', sigma')`: from `rates` where those are given, else by automatic differentiation of `scales`."""
        if type(self).scales is LinearSDE.scales:
            t = as_time(t)
            alpha, sigma = self.scales_at(t)
            drift_rate, diffusion = self.rates(t)
            return drift_rate * alpha, drift_rate * sigma + diffusion**2 / (2 * sigma)
        t = as_time(t)
        learned = torch.is_grad_enabled() and (
            t.requires_grad or any(as_float64(v).requires_grad for v in self.scales(t))
        )
        with torch.enable_grad():
            at = t if learned and t.requires_grad else t.detach().requires_grad_()
            values = [as_float64(v).expand(at.shape) for v in self.scales(at)]
            d_alpha, d_sigma = (
                torch.autograd.grad(
                    v.sum(), at, create_graph=learned, retain_graph=True, materialize_grads=True, allow_unused=True
                )[0]
                if v.requires_grad
                else torch.zeros_like(at)
                for v in values
            )
        return d_alpha, d_sigma

    # Scalar functions of time, in the dtype of t.

    def scales_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`scales` at a float64 time, as two tensors of its shape whatever the user's method returns; unchecked."""
        alpha, sigma = self.scales(t)
        return as_float64(alpha).expand(t.shape), as_float64(sigma).expand(t.shape)

    def _scales(self, t: Time) -> tuple[Tensor, Tensor]:
        clock = as_time(t)
        self.check_span(clock)
        return self.scales_at(clock)

    def alpha(self, t: Time) -> Tensor:
        """The signal scale, in `(0, 1]` for named processes; float64 inside, returned in the dtype of t."""
        return like(self._scales(t)[0], t)

    def sigma(self, t: Time) -> Tensor:
        """The noise scale; float64 inside, returned in the dtype of t."""
        return like(self._scales(t)[1], t)

    def log_snr(self, t: Time) -> Tensor:
        """`log(alpha^2 / sigma^2)`, strictly decreasing in t; float64 inside, returned in the dtype of t."""
        alpha, sigma = self._scales(t)
        return like(2 * (alpha.log() - sigma.log()), t)

    def time(self, log_snr: Time) -> Tensor:
        """The time at which the log-SNR has this value, the inverse of `log_snr`, in the dtype of its argument.

        In closed form where `_time_of` has one, else by bisection to float64 accuracy.

        Raises:
            TimeError: no time in `[0, t_max]` has it.
        """
        value = as_time(log_snr)
        t = self._time_of(value)
        slack = _SLACK * self.t_max
        if not bool(((t >= -slack) & (t <= self.t_max + slack)).all()):
            ends = self.log_snr(torch.tensor([0, self.t_max], dtype=torch.float64))
            raise TimeError(
                f"No time in [0, {self.t_max:g}] of {self} has log-SNR {value.reshape(-1)[0]:g}"
                f"{' (the first of several)' if value.numel() > 1 else ''}; they fall from {ends[0]:g} to {ends[1]:g}."
            )
        return like(t.clamp(0, self.t_max), log_snr)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        low = torch.zeros_like(log_snr)
        high = torch.full_like(log_snr, self.t_max)
        ends = self.log_snr(torch.stack([low.flatten()[:1], high.flatten()[:1]]).flatten())
        slack = 1e-9 * (1 + ends.abs())
        outside = (log_snr > ends[0] + slack[0]) | (log_snr < ends[1] - slack[1])
        for _ in range(1075):  # halving from t_max to the smallest float64, as long as anything moves
            middle = (low + high) / 2
            if bool(((middle == low) | (middle == high)).all()):
                break
            early = self.log_snr(middle) > log_snr
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return torch.where(outside, torch.nan, (low + high) / 2)

    # Gaussian kernels.

    def perturb(self, t: Time, x0: State, noise: State) -> State:
        """`x_t = alpha(t) x_0 + sigma(t) noise`, `(batch, *event)`."""
        check_state(x0, "x0")
        if noise.shape != x0.shape:
            raise ShapeError(f"noise has shape {tuple(noise.shape)} but x0 has {tuple(x0.shape)}; they must be equal.")
        alpha, sigma = self._scales(t)
        return over(alpha, x0) * x0 + over(sigma, x0) * noise

    def _snr_ratio(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        early, late = as_time(s), as_time(t)
        if not bool((early <= late).all()):
            raise TimeError("transition(s, t) and posterior(s, t, ...) run from data to noise and need s <= t.")
        alpha_s, sigma_s = self._scales(early)
        alpha_t, sigma_t = self._scales(late)
        gap = 2 * ((alpha_t.log() - sigma_t.log()) - (alpha_s.log() - sigma_s.log()))
        return alpha_s, sigma_s, alpha_t, sigma_t, torch.where(early == late, 0.0, gap)

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """`(scale, std)` of `x_t | x_s ~ N(scale x_s, std^2 I)` for s <= t; `()` or `(batch,)`."""
        alpha_s, _, alpha_t, sigma_t, gap = self._snr_ratio(s, t)
        return like(alpha_t / alpha_s, t), like(sigma_t * (-torch.expm1(gap)).sqrt(), t)

    def posterior(self, s: Time, t: Time, x0: State, xt: State) -> tuple[State, Tensor]:
        """`(mean, std)` of `x_s | x_t, x_0 ~ N(mean, std^2 I)` for s <= t."""
        check_state(x0, "x0")
        alpha_s, sigma_s, _, sigma_t, gap = self._snr_ratio(s, t)
        from_x = sigma_s / sigma_t * (gap / 2).exp()
        from_x0 = -alpha_s * torch.expm1(gap)
        mean = over(from_x, xt) * xt + over(from_x0, xt) * x0
        return mean, like(sigma_s * (-torch.expm1(gap)).sqrt(), t)

    def prior(self, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Distribution:
        """`N(0, sigma(t_max)^2 I)` over events of this shape: the kernel's noise, with what is left of data dropped."""
        dtype = dtype or torch.get_default_dtype()
        std = self.sigma(self.t_max).to(dtype).detach().expand(shape)
        return Independent(Normal(torch.zeros(shape, dtype=dtype), std), len(shape))

    def discretize(self, n: int) -> LinearSDE:
        """The variance-preserving process seen at `n` equal steps, as a `DiscreteVP` chain with the same marginals.

        Raises:
            SDEError: alpha^2 + sigma^2 is not 1, so no chain `x_i = sqrt(1 - beta_i) x_(i-1) + sqrt(beta_i) z` exists.
        """
        from sdediff.processes import DiscreteVP  # a process of its own, one layer up

        times = torch.linspace(0, self.t_max, n + 1, dtype=torch.float64)
        alpha, sigma = self._scales(times)
        off = (alpha**2 + sigma**2 - 1).abs().max().item()
        if off > 1e-6:
            raise SDEError(
                f"discretize needs a variance-preserving process; for {self}, alpha^2 + sigma^2 differs from 1 by up "
                f"to {off:.2g}."
            )
        scale, std = self.transition(times[:-1], times[1:])
        del scale
        return DiscreteVP(std**2)

    # As an SDE.

    def drift(self, t: Tensor, x: State) -> State:
        return over(as_float64(self.rates(as_time(t))[0]), x) * x

    def diffusion(self, t: Tensor, x: State) -> Tensor:
        return as_float64(self.rates(as_time(t))[1])

    def coefficients(self, t: Tensor, x: State) -> tuple[State, Tensor]:
        drift_rate, diffusion = self.rates(as_time(t))
        return over(as_float64(drift_rate), x) * x, as_float64(diffusion)

    def advance(self, s: Tensor, t: Tensor, x: State, normal: State) -> State:
        scale, std = self.transition(s, t)
        return over(scale, x) * x + over(std, x) * normal

    def reverse_drift(self, t: Tensor, x: State, model: ScoreModel, noise_level: float) -> State:
        t = as_time(t)
        d_alpha, d_sigma = self.scale_rates(t)
        if noise_level:  # g^2 / (2 sigma) = sigma' - sigma alpha' / alpha
            alpha, sigma = self.scales_at(t)
            d_sigma = d_sigma + noise_level**2 * (d_sigma - sigma * d_alpha / alpha)
        return model.combine(t, x, d_alpha, d_sigma)

    def clock(self, t: Tensor) -> Tensor:
        return -self.log_snr(t)

    def unclock(self, u: Tensor) -> Tensor:
        return self.time(-u)

    def linear(self) -> LinearSDE:
        self.validate()
        return self

    def validate(self) -> None:
        """Refuse scales that break a rule that all else needs: alpha > 0, sigma > 0, SNR strictly falling.

        Raises:
            SDEError: naming the rule, the time and the values. (alpha may reach 0 at t_max, sigma at t_min = 0.)
        """
        times = torch.from_numpy(
            np.unique(np.concatenate([np.geomspace(max(self.t_min, 1e-12), self.t_max, 65),
                                      np.linspace(self.t_min, self.t_max, 193)]))
        )  # fmt: skip
        with torch.no_grad():
            alpha, sigma = self._scales(times)
        for name, values in (("alpha", alpha), ("sigma", sigma)):
            fine = values > 0
            if name == "alpha":
                fine[-1] |= values[-1] == 0  # pure noise at t_max is allowed
            if name == "sigma" and self.t_min == 0:
                fine[0] |= values[0] == 0
            if not bool(fine.all()):
                i = int((~fine).nonzero()[0])
                raise SDEError(f"{name} must be positive and finite; {self} has {name}({times[i]:g}) = {values[i]:g}.")
        log_snr = 2 * (alpha.log() - sigma.log())
        rising = ~(log_snr.diff() < 0)
        if bool(rising.any()):
            i = int(rising.nonzero()[0])
            raise SDEError(
                f"The signal-to-noise ratio alpha^2 / sigma^2 must fall strictly; for {self} its logarithm goes from "
                f"{log_snr[i]:.6g} at t = {times[i]:g} to {log_snr[i + 1]:.6g} at t = {times[i + 1]:g}."
            )


def like(value: Tensor, t: Time) -> Tensor:
    """A float64 coefficient in the dtype and on the device of the time it was asked with."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return value.to(dtype=t.dtype, device=t.device)
    return value


class _Linearized(LinearSDE):
    """A general SDE that was found to be linear; its rates are read off its drift and diffusion."""

    def __init__(self, sde: SDE) -> None:
        self._sde = sde
        self.t_min, self.t_max, self.initial_std = sde.t_min, sde.t_max, sde.initial_std
        self._check_linear()
        self.validate()

    def __repr__(self) -> str:
        return repr(self._sde)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        one = torch.ones(1, 1, dtype=torch.float64)
        with torch.no_grad():
            pairs = [self._at(time, one) for time in t.detach().cpu().reshape(-1)]
        drift_rate = torch.stack([drift.reshape(()) for drift, _ in pairs]).reshape(t.shape)
        diffusion = torch.stack([g.reshape(-1)[0] for _, g in pairs]).reshape(t.shape)
        return drift_rate.to(t.device), diffusion.to(t.device)

    def _at(self, t: Tensor, x: State) -> tuple[Tensor, Tensor]:
        drift, diffusion = self._sde.coefficients(t, x)
        return drift, as_float64(diffusion)

    def _check_linear(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 3, dtype=torch.float64, generator=generator) * 3
        times = torch.linspace(self.t_min, self.t_max, 9, dtype=torch.float64)[:-1] + (self.t_max - self.t_min) / 23
        for t in times:
            try:
                drift, diffusion = self._at(t, x)
                _, elsewhere = self._at(t, 2 * x + 1)
                rate = self._at(t, torch.ones(1, 1, dtype=torch.float64))[0].reshape(())
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise SDEError(
                    f"{self._sde} is not linear for every event shape: its drift and diffusion failed on states of "
                    f"shape (5, 3) or (1, 1) with: {error}"
                ) from error
            off = (drift - rate * x).abs().max().item() if drift.shape == x.shape else float("inf")
            if not off <= 1e-9 * (1 + abs(rate.item())) * x.abs().max().item():
                raise SDEError(
                    f"{self._sde} is not linear: at t = {t:g} its drift differs from a(t) x by {off:.2g}. "
                    "Only simulate(), and models with prediction='score', work with a general SDE."
                )
            spread = (diffusion - elsewhere).abs().max().item() + (diffusion.max() - diffusion.min()).item()
            if not spread <= 1e-9 * diffusion.abs().max().item():
                raise SDEError(
                    f"{self._sde} is not linear: at t = {t:g} its diffusion is not one number that is the same for "
                    "all states and entries."
                )


def as_linear(sde: SDE) -> LinearSDE:
    """The SDE as a linear one, with scales derived from its drift and diffusion to float64 accuracy.

    A `LinearSDE` comes back as it is. Of any other SDE the linearity is verified at random states and eight times.

    Raises:
        SDEError: the SDE is not linear, alpha is not positive, or the SNR does not fall strictly.
    """
    return sde.linear()
