r"""Log-densities along the probability-flow ODE, one network call a step.

In the frame `w = x / k`, `k = sqrt(c^2 alpha^2 + sigma^2)`, with the angle `theta = atan2(sigma, c alpha)` as time, the
flow is `dw / dtheta = -Q` (see `sdediff.exponential`) and its density obeys `d log p_w(w(theta)) / dtheta = div_w Q`,
`div_w Q = k tr(dQ / dx)`. Q vanishes for Gaussian data of deviation c, and is bounded at both ends. Between two times,

    log p(x_1) - log p(x_2) = D log(k_2 / k_1) - int_theta_1^theta_2 div_w Q dtheta.

The path is that of `sdediff.adams`. The divergence is taken at the nodes of the path, from the network calls that made
it, and integrated by the weights of the corrector. The path does not depend on the probes, so every node has probes of
its own, and what is wrong at one node is averaged with the others: with node weights `omega_n` and k probes whose forms
have the sample variance `s_n^2` at node n, the variance of the integral is `sum_n omega_n^2 s_n^2 / k` (times
`1 - k / m` for orthogonal probes).

A step is wrong by `e . score` nats, where e is the error of the state: an error moves the end of the path to a point
whose density is known by the score, which comes from the same call. The error of a step is therefore

    max(|(predicted - corrected) . score|, 0.3 |int by the corrector - int by the predictor|) / atol,

the second part for exact divergences only, and atol not below what the rounding of the states is worth. Both estimates
belong to the predictor, and flatter the corrector less than they could.

At the data end, see `sdediff.blur`.

References: Chen et al. 2018 (arXiv:1806.07366); Song et al. 2021 (arXiv:2011.13456), appendix D.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from sdediff.adams import QUADRATURE, AdamsRows, Mask, Pair, Rows
from sdediff.blur import Blur, by_jacobian, by_probes
from sdediff.divergence import Divergence, Exact, Expansion
from sdediff.errors import DivergenceError
from sdediff.exponential import Array, split_for
from sdediff.model import ScoreModel
from sdediff.shapes import Grid, PerRow, State, finite_or_raise, over, sum_rows
from sdediff.wrapped import evaluations

_ENTRIES_OF_JACOBIANS = 1 << 21


class DensityRows(AdamsRows):
    """Rows that carry the integral of their divergence along.

    Args:
        divergence: how it is taken (resolved: exact where there are as many probes as entries).
        seed: of the probes.
        first_row: the number of the first row, for the probes.
        atol: nats allowed in a step; None for the steps of `times`.
    """

    def __init__(
        self,
        model: ScoreModel,
        x: State,
        times: Grid,
        divergence: Divergence,
        *,
        seed: int,
        first_row: int,
        atol: float | None,
        max_nfe: int | None = None,
    ) -> None:
        splitting = split_for(model, model.deviation, QUADRATURE)
        order = 3 if atol is None else 5  # on a grid, high orders lose more where it is too coarse than they win
        super().__init__(model, x, times, splitting, max_order=order, max_nfe=max_nfe, adaptive=atol is not None)
        self.divergence, self.seed, self.first_row, self.atol = divergence, seed, first_row, atol or 1.0
        self.size = x[:1].numel()
        batch, count, like = len(x), divergence.count, wide(x[:1])
        self.forms = like.new_zeros(order, count, batch)
        self.spread, self.taken = like.new_zeros(order, batch), like.new_zeros(order, batch)
        self.integrals = like.new_zeros(count, batch)
        self.variance, self.fourth, self.estimated = (like.new_zeros(batch) for _ in range(3))
        self.place = np.zeros(batch, dtype=np.int64)
        self.begin()

    # What comes out.

    @property
    def change(self) -> Tensor:
        """Estimates of `log p(start) - log p(here)` in nats, `(count, batch)`; their mean is the best."""
        ends = self.splitting.sigma_data, self.sde.scales_at(self.times[:1]), self.sde.scales_at(self.t)
        c, (alpha, sigma), (alpha_t, sigma_t) = ends
        grown = torch.hypot(c * alpha_t, sigma_t).log() - torch.hypot(c * alpha, sigma).log()
        return self.integrals + self.size * grown.to(self.integrals)

    @property
    def stderr(self) -> PerRow:
        """Standard error of the mean of `change` over the probes, with Satterthwaite's degrees of freedom."""
        if not self.divergence.random:
            return torch.zeros_like(self.variance)
        last = self.taken**2 * self.spread
        variance = self.variance + last.sum(0)
        fourth = self.fourth + (last**2).sum(0)
        return _widened(variance, (self.divergence.count - 1) * variance**2 / fourth)

    @property
    def error_estimate(self) -> PerRow:
        """Root of the summed squares of the errors of the steps in nats, those of the predictor; `(batch,)`."""
        return self.estimated.sqrt()

    # How it comes about.

    def evaluate(self, model: ScoreModel, rows: Rows, t: Tensor, x: State) -> State:
        expansion = self._expand(model, t, x)
        vectors = self.divergence.draw(x, self.seed, self.first_row + rows, self.place[rows])
        self.score, self.new_forms = expansion.extra, self._forms(t, self.divergence.estimate(expansion, vectors))
        return expansion.value

    def errors(self, pair: Pair) -> tuple[Array, Array]:
        changes = self._changes(pair)
        missed, missed_below = (self._missed(pair, x) for x in (pair.predicted, pair.below))
        if not self.divergence.random:
            integral, predicted, below = changes
            missed = np.maximum(missed, 0.3 * _numbers(integral - predicted))
            missed_below = np.maximum(missed_below, 0.3 * _numbers(integral - below))
        self.allowed = self.atol + self._rounding(pair)
        return missed / self.allowed, missed_below / self.allowed

    def keep(self, pair: Pair, error: Array, good: Mask) -> None:
        moved = torch.from_numpy(good)
        kept = pair.index[moved]
        weights = self._weight(pair, pair.corrected)[moved].T
        forms = torch.cat([self.new_forms[None], self.forms[:, :, pair.index]])[:, :, moved]
        self.integrals[:, kept] = self.integrals[:, kept] + (weights[:, None] * forms).sum(0)
        self.estimated[kept] = self.estimated[kept] + torch.from_numpy((error * self.allowed)[good] ** 2).to(forms)
        self.place[pair.rows[good]] += 1

        taken = torch.cat([torch.zeros_like(weights[:1]), self.taken[:, kept]]) + weights
        done = taken[-1] ** 2 * self.spread[-1, kept]
        self.variance[kept] = self.variance[kept] + done
        self.fourth[kept] = self.fourth[kept] + done**2
        self.taken[:, kept] = taken[:-1]
        self.spread[1:, kept] = self.spread[:-1, kept]
        self.spread[0, kept] = self._spread(forms[0])
        self.forms[1:, :, kept] = self.forms[:-1, :, kept]
        self.forms[0, :, kept] = forms[0]

    def begin(self) -> None:
        """The evaluation at the first time."""
        self.values[0] = self.evaluate(self.model, np.arange(len(self.x)), self.t.clone(), self.x.clone())
        self.first_score = self.score
        self.forms[0] = self.new_forms
        self.spread[0] = self._spread(self.new_forms)
        self.place += 1

    def _expand(self, model: ScoreModel, t: Tensor, x: State) -> Expansion:
        at = model.point(t)
        of_q = model.weights_at(at, *self.splitting.value(at.alpha, at.sigma))
        of_score = model.weights_at(at, torch.zeros_like(at.alpha), -1 / at.sigma)

        def field(x: State) -> tuple[State, Tensor]:
            output = model.predict(t, x)
            q, score = (over(from_x, x) * x + over(from_output, x) * output for from_x, from_output in (of_q, of_score))
            return q, score

        return self.divergence.expand(field, x)

    def _forms(self, t: Tensor, estimates: Tensor) -> Tensor:
        """Estimates of `k tr(dQ / dx)`, `(count, rows)`."""
        alpha, sigma = self.sde.scales_at(t)
        wider = wide(estimates)
        return torch.hypot(self.splitting.sigma_data * alpha, sigma).to(wider) * wider

    def _weight(self, pair: Pair, weights: Array) -> Tensor:
        """Weights of the values of Q in the state, as those of the forms in the integral, `(rows, values)`."""
        k = np.hypot(self.splitting.sigma_data * pair.end.alpha, pair.end.sigma)
        return torch.from_numpy(weights / k[:, None]).to(self.integrals)

    def _changes(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """The integral over the step by the corrector and by predictors of order k and k - 1, `(rows,)` each."""
        old = self.forms[:, :, pair.index].mean(1).T
        both = torch.cat([self.new_forms.mean(0)[:, None], old], dim=1)
        corrected, predicted, below = (self._weight(pair, w) for w in (pair.corrected, pair.weights, pair.fewer))
        return (corrected * both).sum(1), (predicted * old).sum(1), (below * old).sum(1)

    def _rounding(self, pair: Pair) -> Array:
        """Nats that the rounding of the states is worth, `(rows,)`; finer errors cannot be seen."""
        worth = torch.finfo(pair.new.dtype).eps * _numbers(sum_rows((pair.new * self.score).abs()))
        return np.where(np.isfinite(worth), worth, 0.0)

    def _missed(self, pair: Pair, predicted: State) -> Array:
        return _numbers(sum_rows(wide((predicted - pair.new) * self.score)))

    def _spread(self, forms: Tensor) -> PerRow:
        """Variance of the mean of the forms at one node."""
        count = self.divergence.count
        if not self.divergence.random:
            return torch.zeros_like(forms[0])
        if count == 1:
            return torch.full_like(forms[0], math.nan)
        away = forms.detach() - forms.detach().mean(0)  # torch's own variance warns where no row is left
        return away.square().sum(0) / (count * (count - 1)) * self.divergence.part_of_variance(self.size)


class FromData(DensityRows):
    """Rows that begin at data, `alpha x` when given, and are moved to t_min first.

    Attributes:
        blur: what lies between data and the states at t_min.
    """

    blur: Blur

    def begin(self) -> None:
        """The move, of a few rows at a time where whole Jacobians are wanted, and the evaluation at t_min."""
        exact = isinstance(self.divergence, Exact)
        fitting = max(1, _ENTRIES_OF_JACOBIANS // self.size**2) if exact else len(self.x)
        parts = np.array_split(np.arange(len(self.x)), -(-len(self.x) // fitting))
        moved, blurs = zip(*(self._moved(rows) for rows in parts), strict=True)
        self.x = torch.cat(moved)
        log_dets = torch.cat([blur.log_dets for blur in blurs], dim=1)
        self.blur = Blur(log_dets, torch.cat([blur.gap for blur in blurs]), torch.cat([blur.score for blur in blurs]))
        self.variance = self._spread(log_dets)
        self.fourth = self.variance**2
        self.nfe += evaluations(self.model.network, self.t)
        self.place += 1
        super().begin()

    def _moved(self, rows: Rows) -> tuple[State, Blur]:
        """States at t_min for some rows of data."""
        index = torch.from_numpy(rows)
        x, t = self.x[index], self.t[index]
        expansion = self._expand(self.model.rows(index, len(self.x)), t, x)
        try:
            finite_or_raise(expansion.extra, "The score", step=None, time=t[0].item())
        except DivergenceError as error:
            raise error.shifted(int(rows[0])) from error
        vectors = self.divergence.draw(x, self.seed, self.first_row + rows, self.place[rows])
        alpha, sigma = self.sde.scales_at(t)
        c = self.splitting.sigma_data
        k = torch.hypot(c * alpha, sigma)
        own, slope = (c * alpha / k) ** 2, c * alpha * sigma / k  # K = own I + slope dQ/dx
        g = wide(over(alpha, x) * expansion.extra)
        own, slope, square = (value.to(g) for value in (own, slope, (sigma / alpha) ** 2))
        if isinstance(self.divergence, Exact):
            jacobian = wide(_jacobian(expansion, self.divergence.chunks(vectors)))
            eye = torch.eye(self.size).to(jacobian)
            K = over(slope, jacobian) * (jacobian + jacobian.mT) / 2 + over(own, jacobian) * eye
            move, blur = by_jacobian(K, g, square)
        else:

            def times_k(v: Tensor) -> Tensor:
                products = torch.cat([expansion.products(part) for part in self.divergence.chunks(v.to(x))])
                return over(own, g) * v + over(slope, g) * wide(products)

            move, blur = by_probes(times_k, wide(vectors), g, square)
        return x + (over(alpha, g) * move).to(x), blur


def _jacobian(expansion: Expansion, chunks: Sequence[Tensor]) -> Tensor:
    """`(rows, size, size)`."""
    return torch.cat([expansion.products(part).reshape(*part.shape[:2], -1) for part in chunks]).transpose(0, 1)


def _numbers(x: Tensor) -> Array:
    """Absolute values, NaN counted as infinite."""
    found: Array = np.nan_to_num(x.detach().abs().cpu().double().numpy(), nan=np.inf, posinf=np.inf)
    return found


def wide(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def standard_error_of(estimates: Tensor, random: bool) -> PerRow:
    """Standard error of the mean of independent estimates `(count, batch)`."""
    if not random:
        return torch.zeros_like(estimates[0])
    count = len(estimates)
    if count == 1:
        return torch.full_like(estimates[0], math.nan)
    variance = estimates.detach().var(0) / count
    return _widened(variance, torch.full_like(variance, count - 1))


def _widened(variance: PerRow, freedom: PerRow) -> PerRow:
    """Half of half the width of a 95 % interval: the root of the variance, but for few degrees of freedom."""
    known = np.nan_to_num(freedom.detach().cpu().double().numpy(), nan=1e9, posinf=1e9)
    factor = stdtrit(np.clip(known, 1.0, 1e9), 0.975) / 2
    return variance.detach().sqrt() * torch.from_numpy(factor).to(variance)
