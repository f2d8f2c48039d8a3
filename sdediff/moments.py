r"""From rates to scales: the moment equations of a linear SDE, solved once to float64 accuracy.

For `dx = a(t) x dt + g(t) dw` from `x_0` blurred by `sigma_0`, the kernel `N(alpha x_0, sigma^2)` has

    log alpha(t) = int_0^t a,        sigma(t)^2 = alpha(t)^2 [sigma_0^2 + int_0^t g(u)^2 / alpha(u)^2 du].

`[0, t_max]` is cut into panels, halved until Chebyshev series of `a` and of `g^2 / alpha^2` have decayed in each of
them: to rounding; or until what is left is too short to matter for the integrals, which corners kinks, jumps and
integrable singularities; or until halving no longer helps because the rates themselves are rough (float32, say). On a
panel that starts at l the integrals are stored as Chebyshev series of their *means* `int_l^t / (t - l)`, and panels
shrink towards t = 0 where g does, so that sigma is accurate relative to itself down to t = 0; alpha is measured from
the start of the panel, so that no product of many panels over- or underflows.

Reference: L. N. Trefethen, Approximation Theory and Approximation Practice, 2013.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from sdediff.errors import SDEError

_NODES = 20
_DEEPEST = 48
_MOST_PANELS = 20_000
_ROUNDING = 2e-14  # of the panel's own size: resolved
_NEGLIGIBLE = 1e-15  # of the whole integral: too short to matter
_ROUGH = 1e-5  # of the mean size: noise of the rates, if halving does not reduce it and
_CROWD = 256  # so many panels are unresolved (a kink leaves but a few)
_LONGEST = 4.0  # of log alpha on one panel

_X = np.cos(np.pi * (np.arange(_NODES)[::-1] + 0.5) / _NODES)
_TO_SERIES = np.linalg.inv(chebyshev.chebvander(_X, _NODES - 1))
_INTEGRATE = np.stack([chebyshev.chebval(_X, chebyshev.chebint(c, lbnd=-1)) for c in _TO_SERIES.T], axis=1)
_MEAN = _INTEGRATE / (1 + _X)[:, None]


def _refuse_infinite(nodes: np.ndarray, drift_rate: np.ndarray, variance_rate: np.ndarray, t_max: float) -> None:
    for name, values in (("drift rate", drift_rate), ("diffusion", variance_rate)):
        if not np.isfinite(values).all():
            where = nodes[~np.isfinite(values)].min()
            raise SDEError(
                f"The {name} is not finite at t = {where:g}; an SDE needs finite rates inside (0, t_max = {t_max:g}). "
                "End the span before the singularity or write scales(t) instead."
            )


class Moments:
    """`log alpha` and `sigma^2` of the linear SDE with the given rates, as functions of t on `[0, t_max]`.

    Args:
        rates: t of any shape (float64) to `(a(t), g(t))`, both of that shape.
        t_max: end of the span.
        initial_std: the blur sigma_0 at t = 0.

    Raises:
        SDEError: a rate is not finite inside the span, or too rough to be integrated.
    """

    def __init__(self, rates: Callable[[Tensor], tuple[Tensor, Tensor]], t_max: float, initial_std: float) -> None:
        panels: list[tuple[float, float, np.ndarray, np.ndarray]] = []
        edges = np.linspace(0, t_max, 9)
        left, right = edges[:-1], edges[1:]
        total = np.zeros(2)
        parents = np.full((8, 2), np.inf)
        for depth in range(_DEEPEST + 1):
            width = right - left
            nodes = left[:, None] + width[:, None] / 2 * (1 + _X)
            drift_rate, diffusion = (r.detach().cpu().numpy() for r in rates(torch.from_numpy(nodes)))
            variance_rate = diffusion**2
            _refuse_infinite(nodes, drift_rate, variance_rate, t_max)
            log_alpha = width[:, None] / 2 * drift_rate @ _INTEGRATE.T
            long = np.abs(log_alpha).max(1) >= _LONGEST
            scaled = variance_rate * np.exp(np.where(long[:, None], 0, -2 * log_alpha))
            integrands = np.stack([drift_rate, scaled], axis=1)
            total = np.maximum(total, (np.abs(integrands).mean(2) * width[:, None]).sum(0)) if depth == 0 else total
            series = integrands @ _TO_SERIES.T
            tail = np.abs(series[..., -3:]).max(2)
            fine = tail <= _ROUNDING * np.abs(series).max(2)
            fine |= tail * width[:, None] <= _NEGLIGIBLE * total
            if left.size > _CROWD:
                fine |= (tail * t_max <= _ROUGH * total) & (tail > 0.75 * parents)
            vanishing = (left == 0) & (scaled.min(1) < 0.1 * scaled.max(1))
            done = (fine.all(1) & ~long & ~vanishing) | (depth == _DEEPEST)
            means = integrands @ _MEAN.T @ _TO_SERIES.T
            panels += [(left[k], right[k], means[k, 0], means[k, 1]) for k in np.flatnonzero(done)]
            middle, parents = (left + right) / 2, np.concatenate([tail[~done], tail[~done]])
            left, right = np.concatenate([left[~done], middle[~done]]), np.concatenate([middle[~done], right[~done]])
            if not left.size:
                break
            if left.size > _MOST_PANELS:
                raise SDEError(
                    f"The drift rate or the diffusion is too rough near t = {left[0]:g} to be integrated: "
                    "write smoother rates, or scales(t) instead."
                )
        panels.sort(key=lambda panel: panel[0])
        starts = [(0.0, initial_std**2)]
        for low, high, mean_log, mean_var in panels:
            log_alpha_0, var_0 = starts[-1]
            step = (high - low) * mean_log.sum()
            var = np.exp(2 * step) * (var_0 + (high - low) * mean_var.sum())
            starts.append((log_alpha_0 + step, var))
        self._left = torch.tensor([panel[0] for panel in panels], dtype=torch.float64)
        self._right = torch.tensor([panel[1] for panel in panels], dtype=torch.float64)
        self._start = torch.tensor(starts[:-1], dtype=torch.float64)
        self._series = torch.from_numpy(np.stack([np.stack(panel[2:]) for panel in panels]))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(log alpha, sigma^2)` at float64 times of any shape; differentiable in t."""
        panel = torch.searchsorted(self._left, t.detach().cpu().contiguous(), right=True) - 1
        panel = panel.clamp(0, len(self._left) - 1)
        left, right, start, series = (
            table.to(t.device)[panel.to(t.device)] for table in (self._left, self._right, self._start, self._series)
        )
        x = (2 * (t - left) / (right - left) - 1)[..., None]
        low, high = torch.zeros_like(series[..., 0]), torch.zeros_like(series[..., 0])
        for k in range(_NODES - 1, 0, -1):  # Clenshaw's recurrence
            low, high = series[..., k] + 2 * x * low - high, low
        mean_log, mean_var = (series[..., 0] + x * low - high).unbind(-1)
        log_alpha_0, var_0 = start.unbind(-1)
        step = (t - left) * mean_log
        return log_alpha_0 + step, (2 * step).exp() * (var_0 + (t - left) * mean_var)
