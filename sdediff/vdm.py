r"""Variational diffusion models: the bound as a training loss, and a schedule that learns to estimate it well.

With `gamma = -log SNR` and `z_t = alpha x + sigma eps`, minus the variational bound of a row is, in nats,

    loss = KL(q(z_T | x) || prior) - E log p(x | z_0) + diffusion,
    diffusion = 1/2 int gamma'(t) E|eps - epshat(z_t)|^2 dt                           in continuous time,
    diffusion = T/2 E_i expm1(gamma(t_i) - gamma(t_(i-1))) |eps - epshat(z_(t_i))|^2   in T equal steps of t,

with one time a row for the expectation over t, drawn evenly over the span (low discrepancy). It is computed as it is in
`sdediff.noised`, by what stays finite where alpha = 0: the error in `v = (alpha eps - sigma x) / sqrt(alpha^2 +
sigma^2)` and the clock `u = log(1 + snr)`,

    |eps - epshat|^2 = |v - vhat|^2 snr / (1 + snr),    gamma' snr / (1 + snr) = -u',
    expm1(gamma(t) - gamma(s)) snr(t) / (1 + snr(t)) = expm1(u(s) - u(t)).

`p(x | z_0)` is a decoder for discrete data, `N(xhat(z_0), s^2 I)` without one. The KL against the SDE's prior
`N(0, sigma_T^2 I)` is `snr(t_max) |x|^2 / 2`.

In continuous time, by the change of variables from t to gamma, the integral depends on the schedule through its ends
only, and its one-point estimate L through all of it. So the ends are learned by the loss like any weight, and the
curve between them by the variance of L. As E L does not depend on the curve, the gradient is that of E L^2,

    d/deta mean_i L_i^2 = mean_i 2 L_i dL_i / deta.

Each row has its own time, so that `dL_i / deta` passes through the values gamma(t_i) and gamma'(t_i) of that row alone:
`VDM.loss` scales what arrives there by L_i over the batch's mean of L, a factor of mean 1, and one backward pass gives
the network and the ends the gradient of the loss, and the curve that of `mean L^2 / (2 mean L)` with the mean below
held fixed: the direction of the mean square's, in nats as all the rest, so that one clipping norm fits both. The best
curve spends on each gamma time in proportion to the root mean square of the error: `1 / gamma' ~ sqrt(E|eps -
epshat|^4)` at gamma.

Reference: Kingma et al., Variational Diffusion Models, 2021 (arXiv:2107.00630), section 4 and appendix I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdediff.decoders import Decoder, check_decoder, decoded
from sdediff.errors import CapabilityError, OptionError, TimeError
from sdediff.learned import LearnedVP
from sdediff.linear import LinearSDE, as_linear
from sdediff.losses import denoising
from sdediff.model import ScoreModel
from sdediff.sde import SDE, SLACK
from sdediff.shapes import PerRow, State, as_time, check_state, over, per_row, sum_rows
from sdediff.times import low_discrepancy


@dataclass(frozen=True, eq=False)
class Variational:
    """One draw of minus the variational bound of every row, in its parts, `(batch,)`, nats.

    Attributes:
        prior: `KL(q(z_T | x) || prior)`, without noise.
        reconstruction: `log p(x | z_0)` at t_min.
        diffusion: one-point estimate of the diffusion term.
    """

    prior: PerRow
    reconstruction: PerRow
    diffusion: PerRow

    @property
    def total(self) -> PerRow:
        """Minus the bound."""
        return self.prior - self.reconstruction + self.diffusion


def variational(
    model: ScoreModel,
    x0: State,
    *,
    decoder: Decoder | None = None,
    steps: int | None = None,
    t: Tensor | None = None,
    noise: State | None = None,
    noise_0: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> Variational:
    """Minus the variational bound as a training loss, differentiable in the network and in the schedule.

    For numbers, rather than gradients, `elbo` is the better estimate: it has control variates and standard errors.

    Args:
        model: any model of a linear SDE.
        x0: data `(batch, *event)`; at bin centres, if there is a decoder.
        decoder: of discrete data; None for continuous data.
        steps: number of equal steps of t; None for continuous time.
        t: times `(batch,)`, late ends of steps if there are any; drawn if None.
        noise, noise_0: standard normal, shaped as x0, at t and at t_min; drawn if None.
        condition: passed to the network.
        generator: of all that is drawn, on the CPU.

    Raises:
        OptionError: steps < 1, or x0 that the decoder refuses.
        TimeError: a time outside [t_min, t_max], or nearer to t_min than a step; an SDE without noise at t_min.
        ShapeError: t without one time per row.
        CapabilityError: alpha is 0 at one of the times, where the model says nothing of the data.
    """
    check_state(x0, "x0")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise OptionError(
            f"variational needs a whole number of steps >= 1, or None for continuous time; got {steps!r}."
        )
    sde = model.linear
    span = sde.t_max - sde.t_min
    if t is None:
        u = low_discrepancy(len(x0), generator=generator)
        t = sde.t_min + span * (u if steps is None else ((u * steps).floor() + 1) / steps)
    clock = per_row(as_time(t), x0)
    _check_times(model, clock)
    noise = _drawn(noise, x0, generator)
    noise_0 = _drawn(noise_0, x0, generator)
    errors = _errors(model, clock, x0, noise, condition)
    fall = span * _slope(sde, clock) if steps is None else steps * _fall(sde, clock, span / steps)
    last = sde.log_snr(torch.tensor(sde.t_max, dtype=torch.float64)).exp()
    prior = (last / 2).to(x0) * sum_rows(x0**2)
    bound = model if condition is None else model.given(condition)
    return Variational(prior, _reconstruction(bound, x0, noise_0, decoder), over(fall / 2, errors) * errors)


def _drawn(noise: State | None, x0: State, generator: torch.Generator | None) -> State:
    return torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device) if noise is None else noise


def _check_times(model: ScoreModel, t: Tensor) -> None:
    sde = model.linear
    slack = SLACK * sde.t_max
    outside = ~((t >= sde.t_min - slack) & (t <= sde.t_max + slack))
    if bool(outside.any()):
        raise TimeError(
            f"t = {t[outside][0].item():g} lies outside the span [{sde.t_min:g}, {sde.t_max:g}] of {sde}, over which "
            "the bound is taken."
        )
    ends = torch.tensor([sde.t_min], dtype=torch.float64)
    if not bool(sde.scales_at(ends)[1] > 0):
        raise TimeError(f"{sde} has no noise at t_min = {sde.t_min:g}, where no bound is finite: raise its t_min.")
    if model.blind_in_noise:
        blind = t[sde.scales_at(t)[0] == 0]
        if len(blind):
            raise CapabilityError(
                f"At t = {blind[0].item():g} alpha is 0, where a model that predicts {model.prediction!r} says nothing "
                "of the data: use a model that predicts 'data' or 'v', or an SDE whose t_max lies before."
            )


def _errors(model: ScoreModel, t: Tensor, x0: State, noise: State, condition: Any) -> PerRow:
    """`|v - vhat|^2` at `z = alpha x0 + sigma noise`."""
    alpha, sigma = model.linear.scales_at(t)
    unit = (alpha**2 + sigma**2).rsqrt()
    z = model.linear.perturb(t, x0, noise)
    true = over(unit * alpha, x0) * noise - over(unit * sigma, x0) * x0
    return sum_rows((model.combine(t, z, -unit * sigma, unit * alpha, condition=condition) - true) ** 2)


def _slope(sde: LinearSDE, t: Tensor) -> Tensor:
    """`-u'(t)`."""
    (alpha, sigma), (d_alpha, d_sigma) = sde.scales_at(t), sde.scale_rates(t)
    return 2 * alpha / sigma * (alpha * d_sigma - sigma * d_alpha) / (alpha**2 + sigma**2)


def _fall(sde: LinearSDE, t: Tensor, step: float) -> Tensor:
    """`expm1(u(t - step) - u(t))`."""
    early = t - step
    if not bool((early >= sde.t_min - SLACK * sde.t_max).all()):
        raise TimeError(f"Times must be at least one step, {step:g}, after t_min = {sde.t_min:g}; got {t.min():g}.")
    before, after = (sde.scales_at(s) for s in (early.clamp(min=sde.t_min), t))
    return torch.expm1(torch.log1p((before[0] / before[1]) ** 2) - torch.log1p((after[0] / after[1]) ** 2))


def _reconstruction(model: ScoreModel, x0: State, noise: State, decoder: Decoder | None) -> PerRow:
    """`log p(x | z)` for one z at t_min."""
    sde = model.linear
    t = per_row(torch.tensor(sde.t_min, dtype=torch.float64), x0)
    if decoder is not None:
        return decoded(decoder, model, t, x0, sde.perturb(t, x0, noise))
    size = math.prod(x0.shape[1:])
    errors = denoising(model, x0, t=t, noise=noise)  # |x - xhat|^2 / s^2 = |eps - epshat|^2
    return -size / 2 * (errors + over(math.log(2 * math.pi) - sde.log_snr(t), errors))


class VDM(nn.Module):
    """A network and the schedule it is learned with: `sd.train(vdm, vdm.loss, data)`, then `vdm.model`.

    Args:
        network: an `nn.Module`, `network(z, seen)` or `network(z, seen, condition)`.
        sde: a `LearnedVP`, or any linear SDE, which then stays as it is.
        decoder: of discrete data; None for continuous data.
        prediction: what the network predicts, as in `ScoreModel`.
        time: what the network sees of the noise level, a function of `gamma = -log SNR` (float64, `(batch,)`); sigma
            if None, or what an "edm" network sees.
        steps: number of equal steps of t that the loss is for; None for continuous time.
        sigma_data: standard deviation of the data that "edm" assumes.

    Raises:
        OptionError: the network is no `nn.Module`, the decoder no `Decoder`, or steps < 1.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: SDE,
        decoder: Decoder | None = None,
        *,
        prediction: str = "noise",
        time: Callable[[Tensor], Tensor] | None = None,
        steps: int | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise OptionError(f"VDM trains a network that is a torch.nn.Module; got {type(network).__name__}.")
        if decoder is not None:
            check_decoder(decoder)
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise OptionError(f"VDM needs a whole number of steps >= 1, or None for continuous time; got {steps!r}.")
        self.network = network
        self.sde = as_linear(sde)
        self.decoder, self.prediction, self.time, self.steps = decoder, prediction, time, steps
        self.sigma_data = sigma_data
        _ = self.model  # refuses an unknown prediction now

    @property
    def model(self) -> ScoreModel:
        """The network and the schedule as they are, as a model for `sample`, `elbo` and all else."""
        return self._on(self.sde)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of `sd.train` to be of this run."""
        return {
            "module": type(self).__name__, "network": type(self.network).__name__, "prediction": self.prediction,
            "loss_steps": self.steps, "decoder": repr(self.decoder), "time": self.time is not None,
            "sigma_data": self.sigma_data,
            "sde": type(self.sde).__name__ if isinstance(self.sde, LearnedVP) else repr(self.sde),
            "span": [self.sde.t_min, self.sde.t_max],
        }  # fmt: skip

    def _on(self, sde: LinearSDE) -> ScoreModel:
        if self.time is not None:
            of_gamma = self.time
            return ScoreModel(self.network, sde, self.prediction, lambda t: of_gamma(-sde.log_snr(t)), self.sigma_data)
        seen = None if self.prediction == "edm" else sde.sigma
        return ScoreModel(self.network, sde, self.prediction, seen, self.sigma_data)

    def loss(self, x0: State, condition: Any = None, **options: Any) -> PerRow:
        """Minus the bound of every row, `(batch,)`, nats; its mean's gradient trains the curve to less variance.

        Gradients of the mean to the network and the ends of a `LearnedVP` are those of the mean; what the curve
        between the ends gets is the gradient of the mean square of the diffusion term, over twice its mean.

        Args:
            options: t, noise, noise_0 and generator of `variational`.
        """
        if not isinstance(self.sde, LearnedVP):
            return variational(
                self.model, x0, decoder=self.decoder, steps=self.steps, condition=condition, **options
            ).total
        square = _Square()
        model = self._on(self.sde.scaled(square))
        parts = variational(model, x0, decoder=self.decoder, steps=self.steps, condition=condition, **options)
        square.value = parts.diffusion.detach()
        return parts.total


class _Square:
    """Makes of the gradient of each row's value that of its square, over twice the mean of all values."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        assert self.value is not None
        share = self.value / self.value.mean().clamp(min=torch.finfo(self.value.dtype).tiny)
        return share.to(gradient) * gradient
