r"""A variance-preserving process whose schedule is learned.

With `gamma(t) = -log SNR(t)`, any rising function gives a process,

    alpha^2 = sigmoid(-gamma),    sigma^2 = sigmoid(gamma),
    a = alpha' / alpha = -gamma' sigma^2 / 2,    sigma' = gamma' alpha^2 sigma / 2,    g^2 = gamma' sigma^2.

`LearnedVP` has gamma from its two ends, which are parameters, and a rising function f, which may have parameters too:

    gamma(t) = gamma_min + (gamma_max - gamma_min) (f(t) - f(t_min)) / (f(t_max) - f(t_min)),    t_min <= t <= t_max,

so that the ends and what lies between are learned apart: the bound depends on the ends alone, the variance of its
estimate on the rest (see `sdediff.vdm`). By default f is a `MonotoneNetwork`, which rises whatever its parameters are,

    f(t) = h + sum_k b_k sigmoid(w_k h + c_k),    h = v t,    v, w_k, b_k > 0, by their logarithms.

The data, t = 0, are reached from t_min by noise of even strength, `gamma(t) = gamma_min + log(t / t_min)`: no solver
goes there, but alpha(0) = 1 and sigma(0) = 0 hold, as for any process.

Reference: Kingma et al., Variational Diffusion Models, 2021 (arXiv:2107.00630), section 4 and appendix I.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdediff.errors import OptionError, SDEError, ShapeError
from sdediff.linear import LinearSDE, like
from sdediff.processes import _sigmoid, _softplus
from sdediff.shapes import Time, as_float64, as_time

_RATES = (2.0, 64.0)
"""Of the widest and the sharpest step of a fresh network, per span."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class MonotoneNetwork(nn.Module):
    """A strictly rising function of time, nearly straight at first; float64.

    Args:
        hidden: number of smooth steps, wide ones and sharp ones, spread over the span.
        span: the times between which it is to be flexible.
    """

    def __init__(self, hidden: int = 16, span: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        if not isinstance(hidden, int) or hidden < 1:
            raise OptionError(f"A MonotoneNetwork needs hidden >= 1, a whole number; got {hidden!r}.")
        self.span = span
        index = torch.arange(hidden, dtype=torch.float64)
        rates = _RATES[0] * (_RATES[1] / _RATES[0]) ** (index / max(hidden - 1, 1))
        centres = (0.5 + _GOLDEN * index) % 1
        self.log_slope = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_rates = nn.Parameter(rates.log())
        self.shifts = nn.Parameter(-rates * centres)
        self.log_heights = nn.Parameter(torch.full_like(rates, -math.log(hidden)))

    def forward(self, t: Tensor) -> Tensor:
        """float64, shaped as t."""
        h = (t - self.span[0]) / (self.span[1] - self.span[0]) * self.log_slope.double().exp()
        steps = _sigmoid(self.log_rates.double().exp() * h[..., None] + self.shifts.double())
        return h + (self.log_heights.double().exp() * steps).sum(-1)


class LearnedVP(nn.Module, LinearSDE):
    """The variance-preserving SDE of a learned `gamma(t) = -log SNR(t)`; a module, whose parameters are the schedule.

    Solvers see the schedule as it is when they start, and keep nothing of it.

    Args:
        gamma: a rising function of float64 times `(n,)`, often an `nn.Module`; differentiable by torch. Its
            values are moved and stretched to run from gamma_min to gamma_max. None for a `MonotoneNetwork`.
        gamma_min, gamma_max: the ends to start with; if None, those of `gamma`, or -13.3 and 5 without one.
        hidden: size of the MonotoneNetwork.
        learn_ends: whether the ends are trained.
        t_min, t_max: the span; `0 < t_min`.

    Attributes:
        ends: the parameter `(gamma_min, gamma_max)`, float64.
        curve: the rising function.

    Raises:
        OptionError: ends or span in the wrong order.
        SDEError: gamma does not rise; names the times. (A gamma with parameters of its own may come to fall in
            training. It is then refused where its slope is next asked for.)
        ShapeError: gamma returns something else than a tensor shaped as its times.
    """

    def __init__(
        self,
        gamma: Callable[[Tensor], Tensor] | None = None,
        gamma_min: float | None = None,
        gamma_max: float | None = None,
        *,
        hidden: int = 16,
        learn_ends: bool = True,
        t_min: float = 1e-3,
        t_max: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < t_min < t_max < math.inf:
            raise OptionError(f"LearnedVP needs a span 0 < t_min < t_max; got [{t_min:g}, {t_max:g}].")
        self.t_min, self.t_max = float(t_min), float(t_max)
        own_curve = {"hidden": hidden, "learn_ends": learn_ends, "t_min": self.t_min, "t_max": self.t_max}
        self.config = own_curve if gamma is None else None
        self.curve = MonotoneNetwork(hidden, (self.t_min, self.t_max)) if gamma is None else gamma
        self._hook: Callable[[Tensor], Tensor] | None = None
        own = (-13.3, 5.0) if gamma is None else self._rising_ends()
        low, high = own[0] if gamma_min is None else gamma_min, own[1] if gamma_max is None else gamma_max
        if not (low < high and math.isfinite(high - low)):
            raise OptionError(
                f"LearnedVP needs finite gamma_min < gamma_max, as gamma = -log SNR rises with time; got {low:g} and "
                f"{high:g}."
            )
        self.ends = nn.Parameter(torch.tensor([low, high], dtype=torch.float64), requires_grad=learn_ends)
        self.validate()

    def __repr__(self) -> str:
        low, high = self.ends.tolist()
        return f"LearnedVP(gamma from {low:.4g} to {high:.4g} by {type(self.curve).__name__})"

    # The schedule.

    def gamma(self, t: Time) -> Tensor:
        """`-log SNR(t)`, float64, shaped as t."""
        clock = as_time(t)
        low, high = self._ends()
        early = clock < self.t_min
        part = self._tracked(self._part(torch.where(early, self.t_min, clock)))
        before = (torch.where(early, clock, self.t_min) / self.t_min).log()
        return (low * (1 - part) + high * part).to(clock.device) + before

    def slope(self, t: Time) -> Tensor:
        """`gamma'(t) > 0`, float64, shaped as t, with a graph to the parameters where gradients are enabled.

        Raises:
            SDEError: gamma does not rise; names the time.
        """
        clock = as_time(t)
        low, high = self._ends()
        with torch.inference_mode(False), torch.enable_grad():
            at = clock.detach().clone().clamp(min=self.t_min).requires_grad_()
            part = self._part(at)
            rise = torch.zeros_like(at)
            if part.requires_grad:
                (rise,) = torch.autograd.grad(
                    part.sum(), at, create_graph=True, allow_unused=True, materialize_grads=True
                )
        rise = rise if torch.is_grad_enabled() else rise.detach()
        falling = ~(rise >= 0)
        if bool(falling.any()):
            raise SDEError(
                f"gamma = -log SNR must rise with time; at t = {at[falling].reshape(-1)[0].item():g} its slope is "
                f"{((high - low) * rise)[falling].reshape(-1)[0].item():.3g}. Make its weights positive, as "
                "MonotoneNetwork does."
            )
        after = ((high - low) * self._tracked(rise)).to(clock.device)
        return torch.where(clock < self.t_min, 1 / clock, after)

    def scaled(self, factor: Callable[[Tensor], Tensor]) -> LearnedVP:
        """The same process, with the same parameters, in which gradients to the curve are scaled row by row.

        Args:
            factor: of the gradient with respect to the curve at times `(batch,)`, to what goes on to its parameters.
                It is called in the backward pass. The ends get their gradients as they are.
        """
        other = copy.copy(self)
        other._hook = factor
        return other

    def _ends(self) -> tuple[Tensor, Tensor]:
        low, high = self.ends.double().unbind()
        if not bool(low < high):
            raise SDEError(f"The learned ends have crossed: gamma_min = {low.item():g}, gamma_max = {high.item():g}.")
        return low, high

    def _part(self, t: Tensor) -> Tensor:
        """The curve, moved and stretched to run from 0 to 1 between t_min and t_max."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        values = self._curve_at(torch.cat([ends.to(self.ends.device), t.reshape(-1).to(self.ends.device)]))
        return (values[2:].reshape(t.shape) - values[0]) / (values[1] - values[0])

    def _curve_at(self, t: Tensor) -> Tensor:
        value = self.curve(t)
        if not isinstance(value, Tensor) or value.shape != t.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"gamma must take times (n,) and return a tensor of the same shape, here {tuple(t.shape)}; it returned "
                f"{got}."
            )
        return as_float64(value)

    def _tracked(self, value: Tensor) -> Tensor:
        """A value made for one use, with the hook on it if there is one."""
        if self._hook is None or not value.requires_grad or value.ndim == 0:
            return value
        value.register_hook(self._hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return value

    def _rising_ends(self) -> tuple[float, float]:
        """The values of the curve at t_min and t_max, after a look at what lies between."""
        times = torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64)
        with torch.no_grad():
            values = self._curve_at(times)
        wrong = ~((values.diff() > 0) & values[1:].isfinite())
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise SDEError(
                f"gamma = -log SNR must rise strictly with time; it goes from {values[i]:.6g} at t = {times[i]:g} to "
                f"{values[i + 1]:.6g} at t = {times[i + 1]:g}."
            )
        return values[0].item(), values[-1].item()

    # As a linear SDE.

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        gamma = self.gamma(t)
        return (-_softplus(gamma) / 2).exp(), (-_softplus(-gamma) / 2).exp()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        square = self._square(t)
        return -square / 2, square.sqrt()

    def scale_rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (alpha, sigma), square = self.scales(t), self._square(t)
        return -square / 2 * alpha, square / (2 * sigma) * alpha**2

    def _square(self, t: Tensor) -> Tensor:
        """`g^2 = gamma' sigma^2`, finite at 0: before t_min, `sigma^2 / t = e^gamma_min alpha^2 / t_min`."""
        clock = as_time(t)
        gamma, early = self.gamma(clock), clock < self.t_min
        slope = self.slope(torch.where(early, self.t_min, clock))
        start = self._ends()[0].exp() / self.t_min * _sigmoid(-gamma)
        return torch.where(early, start.to(clock.device), slope * _sigmoid(gamma))

    def log_snr(self, t: Time) -> Tensor:
        """`-gamma(t)`, in the dtype of t."""
        clock = as_time(t)
        self.check_span(clock)
        return like(-self.gamma(clock), t)

    @torch.no_grad()
    def _time_of(self, log_snr: Tensor) -> Tensor:
        return super()._time_of(log_snr)
