r"""Analytic-DPM: the reverse variance that is best for a model and its data, estimated once.

The best isotropic variance of a reverse kernel is `V = nu^2 + gain^2 sbar^2(t)` (`sdediff.variance`), where
`sbar^2(t) = E |x_0 - xhat(x_t)|^2 / D` is the denoiser's error per entry. In the noise, whose error is
`epshat - eps = (alpha / sigma) (x_0 - xhat)`, that is

    sbar^2 = (sigma^2 / alpha^2) w,        w = E |eps - epshat|^2 / D = 1 - E |epshat|^2 / D.

The two forms of w are equal for the exact model, where epshat = E[eps | x_t] (law of total variance):

| form | w | is |
|---|---|---|
| "residual" | E abs(eps - epshat)^2 / D | the best for the model as it is, errors included (Bao et al. 2022b) |
| "score" | 1 - E abs(epshat)^2 / D | Analytic-DPM's own (Bao et al. 2022), in terms of the score alone |

Both are means over data and noise. `E |eps|^2 / D = 1` is known, so a multiple of `|eps|^2 / D - 1` is added that
removes what noise alone contributes: `-u` of it to the residual form and `1 - u` of it to the score form, with
`u = c^2 / (c^2 + sigma^2 / alpha^2)`, the w of normal data of the data's mean square deviation c.

Bounds: `0 <= w <= 1`, and `sbar^2 <= ((b - a) / 2)^2` for data in `[a, b]`. They hold for the exact model; an estimate
beyond them is held there and reported. Far beyond, the model says less of the noise than "none" would.

Between the times of the estimate, `logit w` is a monotone cubic (Fritsch and Butland, 1984) of log SNR: a straight
line for isotropic normal data. As w depends on the SNR only, the estimate serves on any grid, and for any linear SDE.
Where alpha = 0, `sbar^2` is the mean square deviation of the data itself.

References: Bao et al. 2022 (arXiv:2201.06503), theorems 1 and 2; Bao et al. 2022b (arXiv:2206.07309), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from sdediff import grids
from sdediff.errors import DivergenceError, OptionError, ShapeError, TimeError
from sdediff.linear import LinearSDE
from sdediff.model import Point, ScoreModel, evaluating
from sdediff.noise import Noise, RowNoise
from sdediff.sde import check_grid, fresh_seed
from sdediff.shapes import Grid, PerRow, State, as_float64, as_time, check_state, over, sum_rows
from sdediff.variance import ReverseSteps, StepVariance, checked_bounds


def _residual(eps: State, epshat: State, blind: float) -> PerRow:
    return (sum_rows((eps - epshat) ** 2) - blind * sum_rows(eps**2)) / eps[0].numel() + blind


def _score(eps: State, epshat: State, blind: float) -> PerRow:
    return ((1 - blind) * sum_rows(eps**2) - sum_rows(epshat**2)) / eps[0].numel() + blind


FORMS: dict[str, Callable[[State, State, float], PerRow]] = {"residual": _residual, "score": _score}
"""`(eps, epshat, u)` to one value a row, whose mean is w."""

_STEPS = 64
_EDGE = 1e-12
_SLACK = 0.01
"""In log SNR: what rounding the ends of a grid to float32 moves them by, and w by at most as much of itself."""


@dataclass(frozen=True)
class AnalyticVariance(StepVariance):
    """The best isotropic variance, `nu^2 + gain^2 sbar^2(t)`, of a model whose error w is known at some times.

    `AnalyticVariance.estimate` makes one; it goes to `DDPM(variance=...)` and `DDIM(eta, variance=...)`. It is plain
    numbers: `json.dumps(dataclasses.asdict(v))` keeps it, and `AnalyticVariance(**json.loads(text))` brings it back.

    Attributes:
        times: falling, `(n,)`.
        log_snr: at these times, rising.
        estimates: w as it was estimated, before its bounds.
        stderr: standard errors of the estimates.
        bounds: `(a, b)` that the data lies in, or None.
        form: "residual" or "score".
        spread: mean square deviation of the data from its mean, which is sbar^2 where alpha = 0; None if not known.

    Raises:
        OptionError, ShapeError: the numbers do not make a table, or one of them is not finite.
    """

    _fixed: ClassVar[bool] = True
    times: tuple[float, ...]
    log_snr: tuple[float, ...]
    estimates: tuple[float, ...]
    stderr: tuple[float, ...]
    bounds: tuple[float, float] | None = None
    form: str = "residual"
    spread: float | None = None

    def __post_init__(self) -> None:
        for name in ("times", "log_snr", "estimates", "stderr"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if self.bounds is not None:
            object.__setattr__(self, "bounds", checked_bounds(self.bounds))
        lengths = {len(self.times), len(self.log_snr), len(self.estimates), len(self.stderr)}
        if len(lengths) > 1 or len(self.times) < 2:
            raise ShapeError(
                "An AnalyticVariance needs as many times as log_snr, estimates and stderr, at least two; got "
                f"{len(self.times)}, {len(self.log_snr)}, {len(self.estimates)} and {len(self.stderr)}."
            )
        if not all(a < b for a, b in zip(self.log_snr, self.log_snr[1:], strict=False)):
            raise OptionError(f"The log_snr of an AnalyticVariance must rise strictly; got {self.log_snr}.")
        numbers = (*self.log_snr, *self.estimates, *self.stderr, 0.0 if self.spread is None else self.spread)
        if not all(map(math.isfinite, numbers)):
            raise OptionError(f"The numbers of an AnalyticVariance must be finite; got {dataclasses.asdict(self)}.")
        _check_form(self.form)

    @classmethod
    @torch.no_grad()
    def estimate(
        cls,
        model: ScoreModel,
        data: State,
        times: Tensor | Sequence[float] | None = None,
        *,
        form: str = "residual",
        bounds: tuple[float, float] | None = None,
        seed: int | None = None,
        noise: Noise | None = None,
        condition: Any = None,
        batch_size: int = 1024,
    ) -> AnalyticVariance:
        """Estimate w by one network call a row at every time, in evaluation mode, with fresh noise.

        Args:
            model: any model of a linear SDE.
            data: `(batch, *event)`, at least two rows; a thousand give w to about one percent.
            times: falling, at least two, with finite SNR; 65 times even in log SNR if None. The variance can be used
                on every grid between the first and the last, and where alpha = 0.
            form: "residual" or "score".
            bounds: `(a, b)` that the entries of data lie in, if they are bounded, such as `(-1, 1)` of images.
            seed: row i depends on it and on i only, whatever the batch size.
            noise: a source of the noise in place of `RowNoise(seed)`; give one of the two.
            condition: passed to the network; tensors with an entry for every row of data are cut with it.
            batch_size: rows of a network call.

        Raises:
            OptionError, ShapeError, TimeError, CapabilityError: an argument does not fit.
            DivergenceError: the model is NaN or infinite.
        """
        if not isinstance(model, ScoreModel):
            raise OptionError(f"An estimate needs a ScoreModel; got {type(model).__name__}.")
        check_state(data, "data")
        if len(data) < 2 or data[0].numel() < 1:
            raise ShapeError(f"An estimate needs at least two rows of data; got shape {tuple(data.shape)}.")
        _check_form(form)
        if seed is not None and noise is not None:
            raise OptionError("Give either seed=... or noise=..., not both.")
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1; got {batch_size}.")
        _check_data(data, bounds)
        grid = _times(model.linear) if times is None else as_time(times)
        check_grid(grid, direction=-1)
        model.linear.check_span(grid, "times")
        alpha, sigma = model.linear.scales_at(grid)
        if not bool(((alpha > 0) & (sigma > 0)).all()):
            raise TimeError(
                "An estimate needs times at which alpha and sigma are positive; got "
                f"t = {grid[~((alpha > 0) & (sigma > 0))][0]:g} of {model.linear}. Give times that keep just inside."
            )
        spread = (data - data.mean(0)).double().square().mean()
        blind = (spread / (spread + (sigma / alpha) ** 2)).tolist()
        source = RowNoise(fresh_seed() if seed is None else seed) if noise is None else noise
        given = model if condition is None else model.given(condition)
        values = torch.empty(len(grid), len(data), dtype=torch.float64)
        with evaluating(model.network):
            for start in range(0, len(data), batch_size):
                rows = slice(start, start + batch_size)
                x, part, stream = data[rows], given.rows(rows, len(data)), source.open(start)
                predicted = part.combined(grid, torch.zeros_like(grid), torch.ones_like(grid))
                for k, share in enumerate(blind):
                    eps = stream.normal(x)
                    epshat = predicted(k, over(alpha[k], x) * x + over(sigma[k], x) * eps)
                    values[k, rows] = FORMS[form](eps.double(), epshat.double(), share)
        _check_finite(values, grid)
        found, errors = values.mean(1), values.std(1) / math.sqrt(len(data))
        log_snr = 2 * (alpha.log() - sigma.log())
        return cls(
            tuple(grid.tolist()),
            tuple(log_snr.tolist()),
            tuple(found.tolist()),
            tuple(errors.tolist()),
            bounds,
            form,
            spread.item(),
        )

    # What was found

    @property
    def ratio(self) -> tuple[float, ...]:
        """w at the times, within its bounds."""
        return tuple(self._bounded(as_float64(self.estimates), as_float64(self.log_snr)).tolist())

    @property
    def clipped(self) -> tuple[float, ...]:
        """The times at which the estimate was outside its bounds."""
        pairs = zip(self.times, self.estimates, self.ratio, strict=True)
        return tuple(t for t, found, held in pairs if found != held)

    def __str__(self) -> str:
        places = ", ".join(f"{t:g}" for t in self.clipped[:6]) + (", ..." if len(self.clipped) > 6 else "")
        clipped = f"clipped at {len(self.clipped)} (t = {places})" if self.clipped else "clipped nowhere"
        inside = "" if self.bounds is None else f", data in [{self.bounds[0]:g}, {self.bounds[1]:g}]"
        return (
            f"AnalyticVariance({len(self.times)} times from t = {self.times[0]:g} to {self.times[-1]:g}, "
            f"{self.form!r}{inside}; {clipped})"
        )

    __repr__ = __str__

    def _bounded(self, w: Tensor, log_snr: Tensor) -> Tensor:
        w = w.clamp(0, 1)
        if self.bounds is None:
            return w
        a, b = self.bounds
        return torch.minimum(w, log_snr.exp() * ((b - a) / 2) ** 2)

    # What it says elsewhere

    def ratio_at(self, log_snr: Tensor) -> Tensor:
        """w at these log SNRs, float64, of their shape.

        Raises:
            TimeError: one lies beyond those of the estimate.
        """
        low, high = self.log_snr[0], self.log_snr[-1]
        outside = ~((log_snr >= low - _SLACK) & (log_snr <= high + _SLACK))
        if bool(outside.any()):
            raise TimeError(
                f"This AnalyticVariance was estimated for log SNR from {low:g} to {high:g} (t = {self.times[0]:g} to "
                f"{self.times[-1]:g}) and is asked at {log_snr[outside].reshape(-1)[0]:g}: estimate it with times= "
                "that reach as far as the grid."
            )
        held = as_float64(self.ratio).clamp(_EDGE, 1 - _EDGE)
        cubic = PchipInterpolator(np.array(self.log_snr), held.logit().numpy())
        at = torch.from_numpy(np.asarray(cubic(log_snr.clamp(low, high).numpy())))
        return self._bounded(at.sigmoid(), log_snr)

    def data_variance(self, at: Point) -> Tensor:
        """`sbar^2(t)`, the mean of `Var[x_0 | x_t]` over entries and data, float64, one for each time of `at`.

        Raises:
            TimeError: a time is beyond those of the estimate, and alpha is not 0 there with the spread known.
        """
        log_snr = 2 * (at.alpha.log() - at.sigma.log())
        if self.spread is None:
            return (-log_snr).exp() * self.ratio_at(log_snr)
        seen = log_snr > -math.inf
        variance = torch.full_like(log_snr, self.spread)
        variance[seen] = (-log_snr[seen]).exp() * self.ratio_at(log_snr[seen])
        return variance

    def table(self, steps: ReverseSteps) -> Tensor:
        return steps.nu**2 + steps.gain**2 * self.data_variance(steps.at[:-1])


def _check_form(form: object) -> None:
    if not isinstance(form, str) or form not in FORMS:
        raise OptionError(f"Unknown form {form!r}: write {' or '.join(map(repr, FORMS))}.")


def _times(sde: LinearSDE) -> Grid:
    """Times even in log SNR; where alpha or sigma is 0 at an end, up to where the next would be."""
    grid = grids.log_snr(sde, _STEPS)
    levels = sde.log_snr(grid[1:-1])
    for end, beyond in ((0, 2 * levels[0] - levels[1]), (-1, 2 * levels[-1] - levels[-2])):
        if not bool(sde.log_snr(grid[end]).isfinite()):
            grid[end] = sde.time(beyond)
    return grid


def _check_data(data: State, bounds: Sequence[float] | None) -> None:
    if not bool(data.isfinite().all()):
        raise OptionError("data has NaN or infinite entries; leave those rows out.")
    if bounds is None:
        return
    low, high = checked_bounds(bounds)
    if data.min() < low or data.max() > high:
        raise OptionError(
            f"data lies in [{data.min():g}, {data.max():g}], outside bounds = ({low:g}, {high:g}): give bounds that "
            "hold it, or none."
        )


def _check_finite(values: Tensor, grid: Tensor) -> None:
    broken = ~values.isfinite()
    if bool(broken.any()):
        k = int(broken.any(1).nonzero()[0])
        raise DivergenceError(
            "The model's noise is NaN or infinite",
            "Check the network, or estimate at times that keep away from this one.",
            step=None,
            time=grid[k].item(),
            rows=broken[k].nonzero()[:, 0].tolist(),
        )
