r"""Samplers that are a table of numbers: `x_(i+1) = A_i x_i + sum_j B_ij Q_(i-j) + C_i z`.

Q_i is what the network says about x_i at time t_i: its own output, whatever it predicts, or a fixed combination
`m E[x_0 | x] + n E[eps | x]` of it. The coefficients depend on the SDE and the grid only. They are computed once, in
float64, for the whole grid; a step is one network call and one fused update.

First order: from t to s, with `epshat = (x_t - alpha_t xhat) / sigma_t` and `1 - r = 1 - snr_t / snr_s`,

    x_s = alpha_s xhat + sqrt(sigma_s^2 - nu^2) epshat + nu z.

DDIM(eta) has `nu = eta sigma_s sqrt(1 - r)`. eta = 0 is the exponential Euler step of the probability-flow ODE,
eta = 1 is DDPM's ancestral sampling with the posterior variance; DDPM may instead add noise of the variance
`sigma_t^2 (1 - r)` of the forward step ("beta"). Methods of higher order are in `sdediff.exponential`.

References: Ho et al. 2020 (arXiv:2006.11239); Song, Meng and Ermon 2021 (arXiv:2010.02502).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError
from sdediff.linear import LinearSDE
from sdediff.model import Combination, ScoreModel
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State
from sdediff.solvers import Solver, Step, model_of


@dataclass(frozen=True, eq=False)
class Table:
    """Coefficients of `x_(i+1) = A_i x_i + sum_j B_ij Q_(i-j) + C_i z`, one row for every network call, float64.

    Attributes:
        times: the times of the states, `(rows + 1,)`.
        A, C: `(rows,)`.
        B: `(rows, memory)`; column j multiplies the value j calls ago.
        remembers: `(m, n)` of the values `Q = m E[x_0 | x] + n E[eps | x]`, each `(rows,)`; None for the network's own
            output.
        ends: the numbers of the rows where the steps of the grid begin, and of the last row's end; None if every row
            is a step.
    """

    times: Grid
    A: Tensor
    B: Tensor
    C: Tensor
    remembers: Combination | None = None
    ends: tuple[int, ...] | None = None

    def columns(self) -> dict[str, list[float]]:
        """The table by columns, as `pandas.DataFrame` takes it: t, s (the next time), A, B0, B1, ..., C."""
        past = {f"B{j}": column.tolist() for j, column in enumerate(self.B.T)}
        return {
            "t": self.times[:-1].tolist(), "s": self.times[1:].tolist(), "A": self.A.tolist(), **past,
            "C": self.C.tolist(),
        }  # fmt: skip

    def __str__(self) -> str:
        columns = self.columns()
        lines = ["".join(f"{name:>12}" for name in columns)]
        lines += ["".join(f"{number:>12.5g}" for number in row) for row in zip(*columns.values(), strict=True)]
        return "\n".join(lines)


class TableSolver(Solver):
    """A sampler given by its coefficient table."""

    @abstractmethod
    def table(self, model: ScoreModel, times: Grid) -> Table:
        """The coefficients for a grid."""

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        model = model_of(process, self)
        with torch.no_grad():
            table = self.table(model, times)
            row = (_short if table.B.shape[1] == 1 else _long)(model, table, x, noise)
        ends = table.ends
        if ends is None:
            return row

        def step(i: int, x: State) -> State:
            for k in range(ends[i], ends[i + 1]):
                x = row(k, x)
            return x

        return step


def _short(model: ScoreModel, table: Table, x: State, noise: NoiseStream) -> Step:
    """Rows without memory; the conversion of the network's output is part of their coefficients."""
    starts = table.times[:-1]
    keep, add = table.A, table.B[:, 0]
    if table.remembers is not None:
        from_x, from_output = model.weights(starts, *table.remembers)
        keep, add = keep + add * from_x, add * from_output
    _check_finite(model, table, torch.stack([keep, add], 1))
    kept, added, jitter = keep.tolist(), add.tolist(), table.C.tolist()
    output = model.along(starts)

    def row(k: int, x: State) -> State:
        after = (kept[k] * x).add(output(k, x), alpha=added[k])
        return _jittered(after, jitter[k], table.times, k, noise)

    return row


def _long(model: ScoreModel, table: Table, x: State, noise: NoiseStream) -> Step:
    """Rows that remember the values of the last calls."""
    starts = table.times[:-1]
    from_x, from_output = (
        (torch.zeros_like(starts), torch.ones_like(starts))
        if table.remembers is None
        else model.weights(starts, *table.remembers)
    )
    _check_finite(model, table, torch.cat([torch.stack([table.A, from_x, from_output], 1), table.B], 1))
    negligible = bool((from_x.abs() < _NEGLIGIBLE).all())
    in_x = None if negligible else from_x.tolist()
    memory = (_Ring if _may_multiply(x) else _List)(table, in_x, from_output.tolist(), x)
    jitter = table.C.tolist()
    output = model.along(starts)

    def row(k: int, x: State) -> State:
        return _jittered(memory.advance(k, x, output(k, x)), jitter[k], table.times, k, noise)

    return row


_NEGLIGIBLE = 1e-13
"""A weight of x below this is rounding: the values are the network's output, scaled."""


def _jittered(x: State, size: float, times: Grid, k: int, noise: NoiseStream) -> State:
    return x.add(noise.unit(x, times[k], times[k + 1]), alpha=size) if size else x


def _may_multiply(x: State) -> bool:
    """Whether a matrix product of such states is exact to rounding and needs no gradient."""
    full = x.dtype == torch.float64 or (x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")
    return full and not torch.is_grad_enabled()


class _Ring:
    """The last values as rows of one matrix, so that their weighted sum is one product.

    The value of call k lies in row `k mod memory`.
    """

    def __init__(self, table: Table, in_x: list[float] | None, in_output: list[float], x: State) -> None:
        self.kept, self.in_x, self.in_output = table.A.tolist(), in_x, in_output
        count, depth = table.B.shape
        rows = (torch.arange(count)[:, None] - torch.arange(depth)) % depth
        self.weights = torch.zeros_like(table.B).scatter_(1, rows, table.B).to(x)[:, None].unbind()
        self.values = torch.zeros(depth, x.numel(), dtype=x.dtype, device=x.device)
        self.slots = self.values.view(depth, *x.shape).unbind()

    def advance(self, k: int, x: State, output: State) -> State:
        slot = self.slots[k % len(self.slots)]
        if self.in_x is None:
            torch.mul(output, self.in_output[k], out=slot)
        else:
            torch.mul(x, self.in_x[k], out=slot).add_(output, alpha=self.in_output[k])
        return torch.addmm(x.reshape(1, -1), self.weights[k], self.values, beta=self.kept[k]).view(x.shape)


class _List:
    """The same by additions, which gradients flow through."""

    def __init__(self, table: Table, in_x: list[float] | None, in_output: list[float], x: State) -> None:
        self.kept, self.in_x, self.in_output = table.A.tolist(), in_x, in_output
        self.weights = table.B.tolist()
        self.values: deque[State] = deque(maxlen=table.B.shape[1])

    def advance(self, k: int, x: State, output: State) -> State:
        value = self.in_output[k] * output
        self.values.appendleft(value if self.in_x is None else value.add(x, alpha=self.in_x[k]))
        after = self.kept[k] * x
        for weight, value in zip(self.weights[k], self.values, strict=False):
            after = after.add(value, alpha=weight)
        return after


def _check_finite(model: ScoreModel, table: Table, rows: Tensor) -> None:
    if bool(rows.isfinite().all()):
        return
    t = table.times[int((~rows.isfinite()).any(1).nonzero()[0])].item()
    raise CapabilityError(
        f"A network that predicts {model.prediction!r} does not determine the step that starts at t = {t:g} of "
        f"{model.sde}: alpha or sigma is 0 there. Use a network that predicts 'v', 'flow' or 'edm', which is well "
        "posed at both ends, or times= that keep away from this one."
    )


def _spans(sde: LinearSDE, times: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at the ends of the steps, sigma at their starts, and `1 - snr_t / snr_s`."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    log_snr = 2 * (alpha.log() - sigma.log())
    return alpha[1:], sigma[1:], sigma[:-1], -torch.expm1(log_snr[:-1] - log_snr[1:])


def _first_order(model: ScoreModel, times: Grid, kept: Tensor, added: Tensor) -> Table:
    """Table of `alpha_s xhat + kept epshat + added z`."""
    alpha_s = model.linear.alpha(times)[1:]
    from_x, from_output = model.weights(times[:-1], alpha_s, kept)
    return Table(times, from_x, from_output[:, None], added)


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
