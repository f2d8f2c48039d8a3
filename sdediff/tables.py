r"""Samplers that are a table of numbers: `x_(i+1) = A_i x_i + sum_j B_ij Q_(i-j) + C_i z`.

Q_i is what the network says about x_i at time t_i: its own output, whatever it predicts, or a fixed combination
`m E[x_0 | x] + n E[eps | x]` of it. The coefficients depend on the SDE and the grid only. They are computed once, in
float64, for the whole grid; a step is one network call and one fused update.

First order: from t to s, with `epshat = (x_t - alpha_t xhat) / sigma_t` and `1 - r = 1 - snr_t / snr_s`,

    x_s = alpha_s xhat + sqrt(sigma_s^2 - nu^2) epshat + nu z.

DDIM(eta) has `nu = eta sigma_s sqrt(1 - r)`. eta = 0 is the exponential Euler step of the probability-flow ODE,
eta = 1 is DDPM's ancestral sampling with the posterior variance; what else the variance of the noise may be is in
`sdediff.variance`. Methods of higher order are in `sdediff.exponential`.

References: Ho et al. 2020 (arXiv:2006.11239); Song, Meng and Ermon 2021 (arXiv:2010.02502).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError
from sdediff.iddpm import LearnedVariance
from sdediff.model import Combination, Kind, Point, ScoreModel
from sdediff.noise import NoiseStream
from sdediff.reverse import Reverse
from sdediff.sde import SDE
from sdediff.shapes import Grid, State
from sdediff.solvers import Solver, Step, model_of
from sdediff.variance import (
    Beta,
    Posterior,
    ReverseSteps,
    ReverseVariance,
    StepVariance,
    entries_of,
    table_of,
    variance_of,
)


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

    def clone(self) -> Table:
        """A table of its own numbers."""
        past = None if self.remembers is None else (self.remembers[0].clone(), self.remembers[1].clone())
        return Table(self.times.clone(), self.A.clone(), self.B.clone(), self.C.clone(), past, self.ends)

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
            rows = _rows_for(self, model, times)
        row = rows.start(model, x, noise)
        ends = rows.table.ends
        if ends is None:
            return row

        def step(i: int, x: State) -> State:
            for k in range(ends[i], ends[i + 1]):
                x = row(k, x)
            return x

        return step


@dataclass(frozen=True, eq=False)
class _Rows:
    """A table made ready for the kind of network that will be called; all lists have an entry for each row.

    Attributes:
        table: what the solver said.
        in_x, in_output: the remembered value in terms of the state (None if it needs none of it) and the output.
    """

    table: Table
    in_x: list[float] | None
    in_output: list[float]

    @classmethod
    def of(cls, solver: TableSolver, model: ScoreModel, times: Grid) -> _Rows:
        table = solver.table(model, times)
        if table.remembers is None:
            from_x, from_output = torch.zeros_like(table.A), torch.ones_like(table.A)
        else:
            from_x, from_output = model.weights(table.times[:-1], *table.remembers)
        refuse_infinite(model, table, torch.cat([torch.stack([table.A, from_x, from_output], 1), table.B], 1))
        negligible = bool((from_x.abs() < _NEGLIGIBLE).all())
        return cls(table, None if negligible else from_x.tolist(), from_output.tolist())

    @cached_property
    def kept(self) -> list[float]:
        return self.table.A.tolist()

    @cached_property
    def added(self) -> list[list[float]]:
        return self.table.B.tolist()

    @cached_property
    def jitter(self) -> list[float]:
        return self.table.C.tolist()

    @cached_property
    def ring(self) -> Tensor:
        """B with its columns in the order of a ring, in which the value of row k lies in place `k mod memory`."""
        count, depth = self.table.B.shape
        places = (torch.arange(count)[:, None] - torch.arange(depth)) % depth
        return torch.zeros_like(self.table.B).scatter_(1, places, self.table.B)

    def start(self, model: ScoreModel, x: State, noise: NoiseStream) -> Step:
        times, jitter = self.table.times, self.jitter
        output = model.along(times[:-1])
        memory = _Memoryless if len(self.table.B[0]) == 1 else _Ring if _may_multiply(x) else _List
        advance = memory(self, x).advance

        def row(k: int, x: State) -> State:
            after = advance(k, x, output(k, x))
            return after.add_(noise.unit(x, times[k], times[k + 1]), alpha=jitter[k]) if jitter[k] else after

        return row


def _rows_for(solver: TableSolver, model: ScoreModel, times: Grid) -> _Rows:
    """The rows for a grid; kept for solvers and processes that cannot change."""
    if solver.fixed and model.sde.fixed and times.device.type == "cpu":
        return _kept_rows(solver, Kind.of(model), times.numpy().tobytes())
    return _Rows.of(solver, model, times)


@lru_cache(maxsize=256)
def _kept_rows(solver: TableSolver, kind: Kind, times: bytes) -> _Rows:
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used where gradients are taken
        return _Rows.of(solver, kind.model(), torch.frombuffer(bytearray(times), dtype=torch.float64))


_NEGLIGIBLE = 1e-13
"""A weight of x below this is rounding: the values are the network's output, scaled."""


def _may_multiply(x: State) -> bool:
    """Whether a matrix product of such states is exact to rounding and needs no gradient."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and _full_precision())


def _full_precision() -> bool:
    """Whether float32 products are float32 products; False where torch will not say."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False


class _Memoryless:
    """No memory; the conversion of the network's output is part of the coefficients."""

    def __init__(self, rows: _Rows, x: State) -> None:
        added = [row[0] for row in rows.added]
        self.added = [a * b for a, b in zip(added, rows.in_output, strict=True)]
        in_x = rows.in_x or [0.0] * len(added)
        self.kept = [keep + a * b for keep, a, b in zip(rows.kept, added, in_x, strict=True)]

    def advance(self, k: int, x: State, output: State) -> State:
        return (self.kept[k] * x).add_(output, alpha=self.added[k])


class _Ring:
    """The last values as rows of one matrix, so that their weighted sum is one product."""

    def __init__(self, rows: _Rows, x: State) -> None:
        self.kept, self.in_x, self.in_output = rows.kept, rows.in_x, rows.in_output
        depth = rows.ring.shape[1]
        self.weights = rows.ring.to(x)[:, None].unbind()
        self.values = torch.zeros(depth, x.numel(), dtype=x.dtype, device=x.device)
        self.slots = self.values.view(depth, *x.shape).unbind()
        self.last, self.flat = x, x.reshape(1, -1)

    def advance(self, k: int, x: State, output: State) -> State:
        slot = self.slots[k % len(self.slots)]
        if self.in_x is None:
            torch.mul(output, self.in_output[k], out=slot)
        else:
            torch.mul(x, self.in_x[k], out=slot).add_(output, alpha=self.in_output[k])
        flat = self.flat if x is self.last else x.reshape(1, -1)
        self.flat = torch.addmm(flat, self.weights[k], self.values, beta=self.kept[k])
        self.last = self.flat.view(x.shape)
        return self.last


class _List:
    """The same by additions, which gradients flow through."""

    def __init__(self, rows: _Rows, x: State) -> None:
        self.kept, self.in_x, self.in_output, self.weights = rows.kept, rows.in_x, rows.in_output, rows.added
        self.values: deque[State] = deque(maxlen=len(self.weights[0]))

    def advance(self, k: int, x: State, output: State) -> State:
        value = self.in_output[k] * output
        self.values.appendleft(value if self.in_x is None else value.add(x, alpha=self.in_x[k]))
        after = self.kept[k] * x
        for weight, value in zip(self.weights[k], self.values, strict=False):
            after = after.add_(value, alpha=weight)
        return after


def refuse_infinite(model: ScoreModel, table: Table, rows: Tensor) -> None:
    if bool(rows.isfinite().all()):
        return
    t = table.times[int((~rows.isfinite()).any(1).nonzero()[0])].item()
    raise CapabilityError(
        f"A network that predicts {model.prediction!r} does not determine the step that starts at t = {t:g} of "
        f"{model.sde}: alpha or sigma is 0 there. Use a network that predicts 'v', 'flow' or 'edm', which is well "
        "posed at both ends, or times= that keep away from this one."
    )


def first_order(model: ScoreModel, at: Point, kept: Tensor, added: Tensor) -> Table:
    """Table of `alpha_s xhat + kept epshat + added z`."""
    from_x, from_output = model.weights_at(at[:-1], at.alpha[1:], kept)
    return Table(at.t, from_x, from_output[:, None], added)


class _Ancestral(TableSolver):
    """Samplers of first order: the mean of `q(x_s | x_t, x_0)` at x_0 = xhat, and noise of a variance."""

    variance: str | ReverseVariance

    @property
    @abstractmethod
    def _eta(self) -> float:
        """The eta of the inference process."""

    @property
    def _variance(self) -> ReverseVariance:
        return variance_of(self.variance, type(self).__name__)

    def table(self, model: ScoreModel, times: Grid) -> Table:
        """The coefficients for a grid; C is 0 where the noise depends on the state."""
        steps = ReverseSteps.of(model.point(times), self._eta)
        variance = self._variance
        added = table_of(variance, steps).sqrt() if isinstance(variance, StepVariance) else torch.zeros_like(steps.nu)
        return first_order(model, steps.at, steps.kept, added)

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        variance = self._variance
        if isinstance(variance, StepVariance):
            return super().start(process, x, times, noise)
        model = model_of(process, self)
        with torch.no_grad():
            steps = ReverseSteps.of(model.point(times), self._eta)
        model, spread = entries_of(variance, model, steps)
        mean = super().start(Reverse(model, self.noise_level), x, times, noise)

        def step(i: int, x: State) -> State:
            after = mean(i, x)
            return after.addcmul(spread(i, x).sqrt(), noise.unit(x, times[i], times[i + 1]))

        return step


@dataclass(frozen=True)
class DDIM(_Ancestral):
    """Denoising diffusion implicit models; first order.

    Args:
        eta: 0 for the deterministic sampler (a solver of the probability-flow ODE, in both directions), 1 for DDPM's
            ancestral sampling; between and slightly above are legal.
        variance: of the noise added, "posterior" for that of the inference process, or a `StepVariance` or
            `EntryVariance`, which adds what the data is uncertain by (Analytic-DDIM); not "beta", and `LearnedVariance`
            for eta = 1 only, as they are variances of DDPM's kernel.
    """

    _fixed: ClassVar[bool] = True
    eta: float = 0.0
    variance: str | ReverseVariance = "posterior"

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise OptionError(f"DDIM needs eta >= 0; got {self.eta}.")
        if isinstance(self._variance, Beta):
            raise OptionError("DDIM has no variance 'beta', which belongs to eta = 1: write DDPM('beta').")
        if isinstance(self._variance, LearnedVariance) and self.eta != 1:
            raise OptionError(
                f"DDIM({self.eta:g}) has no LearnedVariance(), which lies between the fixed choices of eta = 1: write "
                "DDPM(LearnedVariance())."
            )

    @property
    def noise_level(self) -> float:  # type: ignore[override]  # the lambda that eta tends to with small steps
        return self.eta

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and isinstance(self._variance, Posterior)

    @property
    def _eta(self) -> float:
        return self.eta


@dataclass(frozen=True)
class DDPM(_Ancestral):
    """Ancestral sampling of denoising diffusion probabilistic models; first order.

    Args:
        variance: of the noise added, "posterior" for that of `q(x_s | x_t, x_0)` ("small"), "beta" for that of the
            forward step ("large"), or a `StepVariance` or `EntryVariance` (`sdediff.variance`).
    """

    _fixed: ClassVar[bool] = True
    variance: str | ReverseVariance = "posterior"
    noise_level: float = 1.0

    def __post_init__(self) -> None:
        _ = self._variance
        if self.noise_level != 1:
            raise OptionError(f"DDPM has noise level 1; got {self.noise_level}. For other levels use DDIM(eta=...).")

    @property
    def _eta(self) -> float:
        return 1.0
