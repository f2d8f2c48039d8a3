r"""Log-likelihoods by the probability-flow ODE.

Along `dx/dt = F(t, x)` the density of the moving state changes by `d log p_t(x(t)) / dt = -div F`, so

    log p(x) = log p_T(x(T)) + int_0^T div F(t, x(t)) dt,

integrated from `t_min` to `t_max` together with the path, as one process with `k` extra entries a row that any
deterministic solver for drift and diffusion can take. The divergence is exact (one vector-Jacobian product for every
entry of the event) or Hutchinson's estimate `E[e^T J e]` with k probes e, drawn once for each row and kept for the
whole solve, so that the right-hand side is smooth. The integral is linear in the divergence: the k integrals are k
unbiased estimates, and their spread is the standard error.

What the number leaves out is given beside it. The value is the density of `x` under `p_{t_min}`, data blurred by
`sigma(t_min)`. The prior stands for p_T, and `prior_gap = alpha_T^2 |x|^2 / (2 sigma_T^2)` is the KL divergence of
`p(x_T | x_0 = x)` from it, whose mean over data bounds the KL divergence of the true p_T from the prior.

References: Chen et al. 2018 (arXiv:1806.07366); Grathwohl et al. 2019 (arXiv:1810.01367); Song et al. 2021
(arXiv:2011.13456), appendix D.2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sdediff.adapters import TorchDiffEq
from sdediff.draws import RowDraws, mix
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.model import ScoreModel
from sdediff.noise import RowNoise
from sdediff.sampling import (
    bound_rows,
    check_arguments,
    chunks_of,
    evaluating,
    explain,
    grid_for,
    starts_at_prior,
)
from sdediff.sde import SDE, fresh_seed
from sdediff.shapes import Grid, PerRow, State, check_state, sum_rows
from sdediff.solvers import Solver, Tally, merged


class HasLogProb(Protocol):
    """Anything with a log-density over batches."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """`(batch,)`."""


class Divergence(ABC):
    """A way to take the divergence of a vector field."""

    @abstractmethod
    def draw(self, x: State, seed: int, first_row: int) -> Tensor:
        """Probe vectors `(k, batch, *event)`, one row of which depends on the seed and its index only."""

    @abstractmethod
    def trace(self, products: Tensor, probes: Tensor) -> Tensor:
        """Estimates `(batch, columns)` from the products `e^T J`, `(k, batch, *event)`."""

    @abstractmethod
    def columns(self, x: State) -> int:
        """Number of estimates for each row."""


@dataclass(frozen=True)
class Exact(Divergence):
    """The sum of the diagonal of the Jacobian, one vector-Jacobian product for every entry of an event."""

    def draw(self, x: State, seed: int, first_row: int) -> Tensor:
        size = x[0].numel()
        basis = torch.eye(size, dtype=x.dtype, device=x.device)
        return basis[:, None].expand(size, x.shape[0], size).reshape(size, *x.shape)

    def trace(self, products: Tensor, probes: Tensor) -> Tensor:
        return (products * probes).reshape(*probes.shape[:2], -1).sum((0, 2))[:, None]

    def columns(self, x: State) -> int:
        return 1


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimator, unbiased, with `probes` probes a row and a standard error when there are at least two.

    Args:
        probes: number of probes k >= 1; the variance falls as 1 / k.
        distribution: "rademacher" (signs; exact for diagonal Jacobians) or "gaussian".
    """

    probes: int
    distribution: str

    def __init__(self, probes: int = 8, distribution: str = "rademacher") -> None:
        if probes < 1:
            raise OptionError(f"Hutchinson needs at least one probe; got {probes}.")
        if distribution not in ("rademacher", "gaussian"):
            raise OptionError(f"Unknown distribution {distribution!r}: write 'rademacher' or 'gaussian'.")
        object.__setattr__(self, "probes", probes)
        object.__setattr__(self, "distribution", distribution)

    def draw(self, x: State, seed: int, first_row: int) -> Tensor:
        normals = RowDraws(mix(seed, 3), first_row)
        normal = torch.stack([normals(x) for _ in range(self.probes)])
        return normal if self.distribution == "gaussian" else torch.where(normal < 0, -1.0, 1.0).to(x)

    def trace(self, products: Tensor, probes: Tensor) -> Tensor:
        return (products * probes).reshape(*probes.shape[:2], -1).sum(2).T

    def columns(self, x: State) -> int:
        return self.probes


def vector_jacobian(value: State, x: State, vectors: Tensor) -> Tensor:
    """`v^T dvalue/dx` for vectors `(k, batch, *event)`; all at once where the network allows, else one by one."""
    try:
        return torch.autograd.grad(
            value, x, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )[0]
    except RuntimeError:
        return torch.stack(
            [
                torch.autograd.grad(value, x, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                for v in vectors
            ]
        )


_PRODUCTS_AT_A_TIME = 64


def _flat(x: State) -> Tensor:
    return x.reshape(x.shape[0], -1)


class _WithLogDensity(SDE):
    """The probability-flow ODE with the integrals of its divergence as extra entries of every row."""

    def __init__(self, model: ScoreModel, divergence: Divergence, probes: Tensor, event: tuple[int, ...]) -> None:
        self.model = model
        self.divergence = divergence
        self.vectors = probes
        self.event = event
        self.t_min, self.t_max = model.sde.t_min, model.sde.t_max

    @property
    def noisy(self) -> bool:
        return False

    def rows(self, index: Tensor, batch: int) -> _WithLogDensity:
        shared = self.vectors.stride(1) == 0
        probes = self.vectors[:, : len(index)] if shared else self.vectors[:, index.to(self.vectors.device)]
        return _WithLogDensity(self.model.rows(index, batch), self.divergence, probes, self.event)

    def coefficients(self, t: Tensor, y: State) -> tuple[State, float]:
        return self.drift(t, y), 0.0

    def drift(self, t: Tensor, y: State) -> State:
        size = math.prod(self.event)
        with torch.enable_grad():
            x = y[:, :size].reshape(-1, *self.event).detach().requires_grad_()
            velocity = self.model.velocity(t, x)
            products = [vector_jacobian(velocity, x, part) for part in torch.split(self.vectors, _PRODUCTS_AT_A_TIME)]
        trace = self.divergence.trace(torch.cat(products), self.vectors)
        return torch.cat([_flat(velocity.detach()), trace], dim=1)

    def diffusion(self, t: Tensor, y: State) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class LogProb:
    """A log-likelihood, its error bar and its price.

    Attributes:
        value: `log p(x)` in nats, `(batch,)`.
        stderr: standard error of the divergence estimate, `(batch,)`; 0 for the exact one, NaN for a single probe.
        latent: the state at t_max, `(batch, *event)`.
        nfe: network evaluations for every row.
        prior_gap: KL divergence of `p(x_T | x_0 = x)` from the SDE's own prior in nats, `(batch,)`; its mean over data
            bounds what the prior misses of p_T. NaN with a prior of the caller's.
        accepted, rejected: steps of an adaptive solver, summed over chunks.
        settings: the solver, divergence, span and seed that gave the number.
    """

    value: PerRow
    stderr: PerRow
    latent: State
    nfe: int
    prior_gap: PerRow
    accepted: Tensor | int | None = None
    rejected: Tensor | int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def log_prob(
    model: ScoreModel,
    x: State,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    times: Tensor | None = None,
    t_min: float | None = None,
    divergence: str | Divergence = "exact",
    prior: HasLogProb | None = None,
    seed: int | None = None,
    condition: Any = None,
    batch_size: int | None = None,
) -> LogProb:
    """Log-likelihood of data under the model's probability-flow ODE, in nats.

    Args:
        model: the score and the SDE.
        x: data `(batch, *event)`, any event shape.
        solver: a deterministic solver of drift and diffusion (TorchDiffEq, Heun, EulerMaruyama); TorchDiffEq() if
            None.
        steps, times, t_min: the grid, as in `encode`.
        divergence: "exact", or `Hutchinson(probes=...)`.
        prior: the distribution of the latents, anything with `log_prob(x) -> (batch,)`; the SDE's own if None, which
            misses what `prior_gap` sizes. For an oracle, `target.marginal(sde, t_max)` is the exact one.
        seed: of the probes; row i depends on it and on i only.
        condition, batch_size: as in `sample`.

    Raises:
        CapabilityError: the solver cannot integrate this process, or the SDE has no prior.
    """
    solver = TorchDiffEq() if solver is None else solver
    check_arguments(model, solver)
    check_state(x)
    if x.shape[0] == 0:
        raise ShapeError("log_prob needs at least one row; got x with 0 rows.")
    if divergence == "exact":
        divergence = Exact()
    if not isinstance(divergence, Divergence):
        raise OptionError(f"Unknown divergence {divergence!r}: write 'exact' or Hutchinson(probes=...).")
    if not solver.deterministic:
        solver_hint = "TorchDiffEq(), Heun() or EulerMaruyama(noise_level=0)"
        raise CapabilityError(f"A likelihood needs the deterministic flow, but {solver} adds noise: use {solver_hint}.")
    seed = fresh_seed() if seed is None else seed
    grid = grid_for(model, solver, steps, times, t_min, direction=1)
    if prior is None and not starts_at_prior(model, grid[-1]):
        raise TimeError(
            f"times ends at {grid[-1]:g}, but the prior is that of t_max = {model.sde.t_max:g}: end there, or pass "
            "prior=, the distribution of the states at the last time."
        )
    with torch.inference_mode(False), torch.no_grad(), evaluating(model.network):
        _check_differentiable(model, x, grid[0], condition)
        return _integrate(model, x.clone(), solver, grid, divergence, prior, seed, condition, batch_size)


def _check_differentiable(model: ScoreModel, x: State, t: Tensor, condition: Any) -> None:
    """Refuse a network whose output depends on x in a way that automatic differentiation does not see."""
    bound, _ = bound_rows(model, condition, slice(0, 1), len(x))
    with torch.enable_grad():
        at = x[:1].clone().detach().requires_grad_()
        output = bound.predict(t, at)
    if output.requires_grad:
        return
    elsewhere = bound.predict(t, 1.1 * at.detach() + 0.1)
    if not torch.allclose(output, elsewhere, rtol=0, atol=0, equal_nan=True):
        raise CapabilityError(
            "The network's output depends on x, but not for automatic differentiation, so its divergence would come "
            "out wrong: remove torch.no_grad and detach from it, or pass create_graph=True where it differentiates."
        )


def _check_reached(tally: Tally, grid: Grid) -> None:
    """Refuse rows that a budget stopped short of the noise end: their integral is not a likelihood."""
    if tally.reached is None or bool((tally.reached == grid[-1]).all()):
        return
    rows = (tally.reached != grid[-1]).nonzero()[:, 0].tolist()
    raise DivergenceError(
        f"{len(rows)} row(s) ran out of network calls before t = {grid[-1]:g}",
        "Raise max_nfe, or loosen rtol and atol.",
        step=None,
        time=tally.reached[rows[0]].item(),
        rows=rows,
    )


def _integrate(
    model: ScoreModel,
    x: State,
    solver: Solver,
    grid: Grid,
    divergence: Divergence,
    prior: HasLogProb | None,
    seed: int,
    condition: Any,
    batch_size: int | None,
) -> LogProb:
    event = tuple(x.shape[1:])
    size = math.prod(event)
    terminal: HasLogProb = model.sde.prior(event, dtype=x.dtype) if prior is None else prior
    values, errors, latents, tallies, nfe = [], [], [], [], 0
    for rows in chunks_of(x.shape[0], batch_size):
        bound, counter = bound_rows(model, condition, rows, x.shape[0])
        part = x[rows]
        process = _WithLogDensity(bound, divergence, divergence.draw(part, seed, rows.start), event)
        start = torch.cat([_flat(part), part.new_zeros(len(part), divergence.columns(part))], dim=1)
        silent, tally = RowNoise(0).open, Tally()
        try:
            *_, state = solver.solve(process, start, grid, silent(), tally)
            nfe = max(nfe, counter.calls)
            explain(solver, process, start, state, grid, silent)
            _check_reached(tally, grid)
        except DivergenceError as error:
            raise error.shifted(rows.start) from error
        latent, integrals = state[:, :size].reshape(part.shape), state[:, size:]
        values.append(terminal.log_prob(latent.cpu()).to(latent) + integrals.mean(1))
        errors.append(_standard_error(integrals, divergence))
        latents.append(latent)
        tallies.append(tally)
    tally = merged(tallies)
    return LogProb(
        value=torch.cat(values),
        stderr=torch.cat(errors),
        latent=torch.cat(latents),
        nfe=nfe,
        prior_gap=_prior_gap(model, x) if prior is None else torch.full_like(torch.cat(values), float("nan")),
        accepted=tally.accepted,
        rejected=tally.rejected,
        settings={
            "solver": repr(solver),
            "divergence": repr(divergence),
            "t_min": grid[0].item(),
            "t_max": grid[-1].item(),
            "seed": None if isinstance(divergence, Exact) else seed,
        },
    )


def _standard_error(integrals: Tensor, divergence: Divergence) -> PerRow:
    if isinstance(divergence, Exact):
        return torch.zeros_like(integrals[:, 0])
    if integrals.shape[1] == 1:
        return torch.full_like(integrals[:, 0], float("nan"))
    return integrals.std(1) / math.sqrt(integrals.shape[1])


def _prior_gap(model: ScoreModel, x: State) -> PerRow:
    return sum_rows(x**2) * (model.linear.log_snr(model.sde.t_max).exp() / 2).to(x)
