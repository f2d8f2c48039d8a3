r"""Time grids: decreasing float64 tensors of n + 1 times from `t_max` to `t_min`, both exact.

A grid is only a tensor: any strictly decreasing row of times in the span of the SDE will do in its place. Those here
spread the steps evenly in some function of t:

| grid | even in |
|---|---|
| `uniform` | t |
| `quadratic` | sqrt(t) (Song, Meng and Ermon 2021, DDIM) |
| `log_snr` | log(alpha^2 / sigma^2) (Lu et al. 2022, DPM-Solver) |
| `karras` | (sigma / alpha)^(1 / rho) (Karras et al. 2022, EDM) |
| `tapered` | log(sigma / alpha), with steps growing to ten times that where the state is nearly noise |
| `natural` | the process's own clock: log-SNR for a linear SDE, t for any other; what `sample` uses |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdediff.errors import OptionError, TimeError
from sdediff.linear import as_linear
from sdediff.sde import SDE
from sdediff.shapes import Grid

_END = 1e-3


def _even(
    sde: SDE, n: int, t_min: float | None, to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Grid:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise OptionError(f"A grid needs a whole number of steps >= 1; got {n!r}.")
    end = sde.t_min if t_min is None else float(t_min)
    if not 0 <= end < sde.t_max:
        raise TimeError(f"t_min = {end:g} must lie in [0, {sde.t_max:g}), below the t_max of {sde}.")
    ends = torch.tensor([sde.t_max, end], dtype=torch.float64)
    mapped = to(ends)
    if not bool(mapped.isfinite().all()):  # alpha = 0, or sigma = 0: step to it from just inside
        inner = ends + torch.tensor([-_END, _END], dtype=torch.float64) * (sde.t_max - end)
        mapped = torch.where(mapped.isfinite(), mapped, to(inner))
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    times = back(mapped[0] + ramp * (mapped[1] - mapped[0])) if n > 1 else ends.clone()
    times[0], times[-1] = ends
    return times


def uniform(sde: SDE, n: int, *, t_min: float | None = None) -> Grid:
    """`n` equal steps in t, `(n + 1,)`."""
    return _even(sde, n, t_min, lambda t: t, lambda u: u)


def quadratic(sde: SDE, n: int, *, t_min: float | None = None) -> Grid:
    """`n` equal steps in sqrt(t), `(n + 1,)`."""
    return _even(sde, n, t_min, torch.sqrt, torch.square)


def log_snr(sde: SDE, n: int, *, t_min: float | None = None) -> Grid:
    """`n` equal steps in the log signal-to-noise ratio of a linear SDE, `(n + 1,)`."""
    linear = as_linear(sde)
    return _even(linear, n, t_min, linear.log_snr, linear.time)


def karras(sde: SDE, n: int, rho: float = 7.0, *, t_min: float | None = None) -> Grid:
    """`n` equal steps in `(sigma / alpha)^(1 / rho)`, `(n + 1,)`; rho = 7 is EDM's."""
    if not rho > 0:
        raise OptionError(f"karras needs rho > 0; got {rho}.")
    linear = as_linear(sde)
    return _even(
        linear,
        n,
        t_min,
        lambda t: (-linear.log_snr(t) / (2 * rho)).exp(),
        lambda u: linear.time(-2 * rho * u.log()),
    )


def natural(sde: SDE, n: int, *, t_min: float | None = None) -> Grid:
    """`n` equal steps in the process's own clock, `(n + 1,)`."""
    return _even(sde, n, t_min, sde.clock, sde.unclock)


_KNEE, _CORNER, _SPARSE = 1.35, 0.9, 0.1


def tapered(sde: SDE, n: int, *, sigma_data: float = 1.0, t_min: float | None = None) -> Grid:
    r"""`n` steps even in log(sigma / alpha) as long as data can be seen in the state, and longer before, `(n + 1,)`.

    With `l = log(sigma / (alpha sigma_data)) - 1.35`, the steps are even in `0.55 l - 0.45 sqrt(l^2 + 0.81)`: their
    density in l is 1 far below the knee and 0.1 far above it. The three numbers were chosen on the three main targets
    of `benchmarks/`, by `benchmarks.choose_grid`.
    """
    if not sigma_data > 0:
        raise OptionError(f"tapered needs sigma_data > 0; got {sigma_data}.")
    linear = as_linear(sde)
    mean, half = (1 + _SPARSE) / 2, (1 - _SPARSE) / 2
    knee = _KNEE + math.log(sigma_data)

    def to(t: Tensor) -> Tensor:
        level = linear.clock(t) / 2 - knee
        return mean * level - half * (level**2 + _CORNER**2).sqrt()

    def back(u: Tensor) -> Tensor:
        square = (mean * u) ** 2 - _SPARSE * (u**2 - (half * _CORNER) ** 2)
        return linear.time(-2 * (knee + (mean * u + square.sqrt()) / _SPARSE))

    return _even(linear, n, t_min, to, back)
