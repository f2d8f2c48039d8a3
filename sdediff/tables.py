r"""Samplers that are a table: `x_next = A_i x + B_i F + C_i z`.

F is the network's own output, whatever it predicts. The coefficients depend on the SDE and the grid only; they are
computed once, in float64, for the whole grid, and a step is one network call and one fused update.

First order: from t to s, with `epshat = (x_t - alpha_t xhat) / sigma_t` and `1 - r = 1 - snr_t / snr_s`,

    x_s = alpha_s xhat + sqrt(sigma_s^2 - nu^2) epshat + nu z.

DDIM(eta) has `nu = eta sigma_s sqrt(1 - r)`. eta = 0 is the exponential Euler step of the probability-flow ODE,
eta = 1 is DDPM's ancestral sampling with the posterior variance; DDPM may instead add noise of the variance
`sigma_t^2 (1 - r)` of the forward step ("beta").

References: Ho et al. 2020 (arXiv:2006.11239); Song, Meng and Ermon 2021 (arXiv:2010.02502).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.errors import OptionError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State
from sdediff.solvers import Solver, Step, model_of


@dataclass(frozen=True)
class Table:
    """Coefficients of `x_next = A x + B F + C z` for every step of a grid, float64, each `(steps,)`."""

    A: Tensor
    B: Tensor
    C: Tensor


class TableSolver(Solver):
    """A sampler given by its coefficient table."""

    @abstractmethod
    def table(self, model: ScoreModel, times: Grid) -> Table:
        """The coefficients for a grid."""

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        model = model_of(process, self)
        with torch.no_grad():
            table = self.table(model, times)
        keep, add, jitter = (column.tolist() for column in (table.A, table.B, table.C))

        def step(i: int, x: State) -> State:
            after = (keep[i] * x).add(model.predict(times[i], x), alpha=add[i])
            if jitter[i]:
                after = after.add(noise.unit(x, times[i], times[i + 1]), alpha=jitter[i])
            return after

        return step


def _spans(sde: LinearSDE, times: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at the ends of the steps, sigma at their starts, and `1 - snr_t / snr_s`."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    log_snr = sde.log_snr(times)
    return alpha[1:], sigma[1:], sigma[:-1], -torch.expm1(log_snr[:-1] - log_snr[1:])


def _first_order(model: ScoreModel, times: Grid, kept: Tensor, added: Tensor) -> Table:
    """Table of `alpha_s xhat + kept epshat + added z`."""
    alpha_s = model.linear.alpha(times)[1:]
    from_x, from_output = model.weights(times[:-1], alpha_s, kept)
    return Table(from_x, from_output, added)


def _ddim_noise(model: ScoreModel, times: Grid, eta: float) -> tuple[Tensor, Tensor]:
    """`(sqrt(sigma_s^2 - nu^2), nu)`."""
    _, sigma_s, _, fresh = _spans(model.linear, times)
    if not eta:
        return sigma_s, torch.zeros_like(sigma_s)
    kept = 1 - eta**2 * fresh
    if bool((kept < 0).any() | (fresh < 0).any()):
        raise OptionError(
            f"eta = {eta:g} asks for more noise than sigma holds on some step of this grid: "
            "use eta <= 1, or more steps."
        )
    return sigma_s * kept.sqrt(), eta * sigma_s * fresh.sqrt()


@dataclass(frozen=True)
class DDIM(TableSolver):
    """Denoising diffusion implicit models; first order.

    Args:
        eta: 0 for the deterministic sampler (a solver of the probability-flow ODE, in both directions), 1 for DDPM's
            ancestral sampling; between and slightly above are legal.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise OptionError(f"DDIM needs eta >= 0; got {self.eta}.")

    @property
    def noise_level(self) -> float:  # type: ignore[override]  # the lambda that eta tends to with small steps
        return self.eta

    def table(self, model: ScoreModel, times: Grid) -> Table:
        return _first_order(model, times, *_ddim_noise(model, times, self.eta))


@dataclass(frozen=True)
class DDPM(TableSolver):
    """Ancestral sampling of denoising diffusion probabilistic models; first order.

    Args:
        variance: of the noise added, "posterior" for that of `q(x_s | x_t, x_0)` ("small"), "beta" for that of the
            forward step ("large").
    """

    variance: str = "posterior"
    noise_level: float = 1.0

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "beta"):
            raise OptionError(f"Unknown variance {self.variance!r} for DDPM: write 'posterior' or 'beta'.")
        if self.noise_level != 1:
            raise OptionError(f"DDPM has noise level 1; got {self.noise_level}. For other levels use DDIM(eta=...).")

    def table(self, model: ScoreModel, times: Grid) -> Table:
        kept, added = _ddim_noise(model, times, 1.0)
        if self.variance == "beta":
            _, _, sigma_t, fresh = _spans(model.linear, times)
            added = sigma_t * fresh.sqrt()
        return _first_order(model, times, kept, added)
