r"""Linear SDEs, whose kernels, marginals and schedules are known in closed form.

A linear SDE has `f = a(t) x` and `g = g(t)`, and its kernel is `p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)` with

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

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from sdediff.errors import OptionError, SDEError, ShapeError, TimeError
from sdediff.moments import Moments
from sdediff.sde import SDE, SLACK, Along, Frame
from sdediff.shapes import Grid, State, Time, as_float64, as_time, check_state, over

if TYPE_CHECKING:
    from sdediff.model import ScoreModel


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
        with torch.inference_mode(False), torch.enable_grad():
            at = t if learned and t.requires_grad else t.detach().clone().requires_grad_()
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

    @property
    def chain_times(self) -> Grid | None:
        """The times of the discrete chain that this process is, falling; None for a process in continuous time."""
        return None

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
        slack = SLACK * self.t_max
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
        ends = self.log_snr(torch.tensor([0.0, self.t_max], dtype=torch.float64)).to(log_snr.device)
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
            raise TimeError(
                "transition(s, t) and posterior(s, t, ...) run from data to noise and need s <= t; got "
                f"s = {early.max():g} and t = {late.min():g}."
            )
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
        std = self.scales_at(as_time(self.t_max))[1].to(dtype).detach().expand(shape)
        normal = Normal(torch.zeros(shape, dtype=dtype), std, validate_args=False)
        return Independent(normal, len(shape), validate_args=False)

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
        return self.drift(t, x), self.diffusion(t, x)

    def along(self, times: Grid) -> Along:
        drift_rates, diffusions = (as_float64(rate).expand(times.shape).tolist() for rate in self.rates(times))
        return Along(lambda k, x: drift_rates[k] * x, lambda k, x: diffusions[k])

    def advance(self, s: Tensor, t: Tensor, x: State, normal: State) -> State:
        scale, std = self.transition(s, t)
        return over(scale, x) * x + over(std, x) * normal

    def reverse_drift(self, t: Tensor, x: State, model: ScoreModel, noise_level: float) -> State:
        t = as_time(t)
        return model.combine(t, x, *self._reverse_pair(t, noise_level))

    def reverse_along(self, times: Grid, model: ScoreModel, noise_level: float) -> Callable[[int, State], State]:
        return model.combined(times, *self._reverse_pair(times, noise_level))

    def reverse_frame(self, times: Grid, model: ScoreModel, noise_level: float) -> Frame:
        """EDM's variables, `y = x / alpha` and `s = sigma / alpha`: `dy = (1 + noise_level^2) E[eps | x] ds`."""
        alpha, sigma = self.scales_at(times)
        noise = model.combined(times, torch.zeros_like(times), torch.full_like(times, 1 + noise_level**2))
        return Frame(alpha, sigma / alpha, sigma > 0, noise)

    def _reverse_pair(self, t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        """`(m, n)` with reverse drift `m E[x_0 | x] + n E[eps | x]`."""
        d_alpha, d_sigma = self.scale_rates(t)
        if noise_level:  # g^2 / (2 sigma) = sigma' - sigma alpha' / alpha
            alpha, sigma = self.scales_at(t)
            d_sigma = d_sigma + noise_level**2 * (d_sigma - sigma * d_alpha / alpha)
        return d_alpha, d_sigma

    def clock(self, t: Tensor) -> Tensor:
        alpha, sigma = self.scales_at(t)
        return 2 * (sigma.log() - alpha.log())

    def unclock(self, u: Tensor) -> Tensor:
        return self.time(-u)

    def linear(self) -> LinearSDE:
        _ = self._valid
        return self

    @cached_property
    def _valid(self) -> bool:
        self.validate()
        return True

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
            fine = (values > 0) & values.isfinite()
            if name == "alpha":
                fine[-1] |= values[-1] == 0  # pure noise at t_max is allowed
            if name == "sigma" and self.t_min == 0:
                fine[0] |= values[0] == 0
            if not bool(fine.all()):
                i = int((~fine).nonzero()[0])
                raise SDEError(f"{name} must be positive and finite; {self} has {name}({times[i]:g}) = {values[i]:g}.")
        self._check_differentiable()
        log_snr = 2 * (alpha.log() - sigma.log())
        rising = ~(log_snr.diff() < 0)
        if bool(rising.any()):
            i = int(rising.nonzero()[0])
            raise SDEError(
                f"The signal-to-noise ratio alpha^2 / sigma^2 must fall strictly; for {self} its logarithm goes from "
                f"{log_snr[i]:.6g} at t = {times[i]:g} to {log_snr[i + 1]:.6g} at t = {times[i + 1]:g}."
            )

    def _check_differentiable(self) -> None:
        """Refuse scales that move although automatic differentiation sees them stand still."""
        inside = torch.tensor([0.17, 0.39, 0.61, 0.83], dtype=torch.float64)
        times = self.t_min + inside * (self.t_max - self.t_min)
        step = 1e-4 * (self.t_max - self.t_min)
        with torch.no_grad():
            seen = self.scale_rates(times)
            moved = [a - b for a, b in zip(self.scales_at(times + step), self.scales_at(times - step), strict=True)]
        for name, slope, change in zip(("alpha", "sigma"), seen, moved, strict=True):
            if bool((slope == 0).all()) and bool((change != 0).any()):
                raise SDEError(
                    f"{name} of {self} changes with t, but its derivative by torch is 0: write scales(t) in torch "
                    "operations on t (no numpy, no detach, no float(t)), or write rates(t) instead."
                )


def like(value: Tensor, t: Time) -> Tensor:
    """A float64 coefficient in the dtype and on the device of the time it was asked with."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return value.to(dtype=t.dtype, device=t.device)
    return value


class Linearized(LinearSDE):
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
        times = t.detach().cpu().reshape(-1)
        with torch.no_grad():
            drift, diffusion = self._at(times, torch.ones(len(times), 1, dtype=torch.float64))
        drift_rate = drift.reshape(t.shape).to(t.device)
        return drift_rate, diffusion.expand(len(times)).reshape(t.shape).to(t.device)

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
        OptionError: it is no SDE.
    """
    if not isinstance(sde, SDE):
        raise OptionError(f"The sde must be an SDE, such as VP(), with its brackets; got {sde!r}.")
    return sde.linear()
