r"""Solvers of torchdiffeq and torchsde behind the same `solve`.

`TorchDiffEq` integrates any deterministic process, in either direction of time, over states of any shape, and lands
exactly on the grid: adaptive methods are made to step on its points and never past its end.

`TorchSDE` integrates any process of this library with torchsde's methods. torchsde wants flat states and a rising
clock: the adapter flattens `(batch, *event)`, runs on the clock -t where times fall, and takes one step of the method
for every step of the grid. The noise is additive, so Ito and Stratonovich methods agree, and the Brownian source is
this library's (a draw a step, the same row whatever the batch) in place of torchsde's interval tree. Methods that
ask for the same drift twice (srk, heun) are answered from memory: one network call for every distinct `(t, x)`.

References: Chen, torchdiffeq, 2018; Li et al. 2020 (arXiv:2001.01328), torchsde; Roessler 2010, SRA methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, finite_or_raise, over
from sdediff.solvers import Solver, Step, Tally, refuse_noise, refuse_singular_start

# Methods and their orders: of the solution for torchdiffeq, weak with additive noise for torchsde.
_ADAPTIVE = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
_FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4, "implicit_adams": 4}
_SDE_METHODS = {
    "euler": 1, "milstein": 1, "srk": 2, "euler_heun": 1, "heun": 2, "midpoint": 2, "reversible_heun": 2,
}  # fmt: skip


class _Field:
    """The drift as torchdiffeq wants it, guarded against NaN.

    Times are held within the grid: the search for a first step tries one that may reach far beyond it.
    """

    def __init__(self, process: SDE, times: Grid) -> None:
        self.process = process
        self.first, self.last = sorted((times[0].item(), times[-1].item()))

    def __call__(self, t: Tensor, x: State) -> State:
        drift = self.process.drift(t.clamp(self.first, self.last), x)
        finite_or_raise(drift, "The drift", step=None, time=t.item())
        return drift


class _CountingField(_Field):
    """The same, counting the steps of an adaptive method."""

    def __init__(self, process: SDE, times: Grid, tally: Tally) -> None:
        super().__init__(process, times)
        self.tally = tally
        tally.accepted, tally.rejected = tally.accepted or 0, tally.rejected or 0

    def callback_accept_step(self, t: Tensor, x: State, dt: Tensor) -> None:
        assert self.tally.accepted is not None
        self.tally.accepted += 1

    def callback_reject_step(self, t: Tensor, x: State, dt: Tensor) -> None:
        assert self.tally.rejected is not None
        self.tally.rejected += 1


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """A method of torchdiffeq; for deterministic processes.

    An adaptive method measures its error over the whole batch, so a row depends (within the tolerance) on its batch
    mates; fixed-step methods do not.

    Args:
        method: "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", or with fixed steps "euler", "midpoint",
            "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams".
        rtol, atol: tolerances of adaptive methods.
        options: passed on to torchdiffeq.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    noise_level: float = field(default=0.0, init=False, repr=False)

    def __init__(self, method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5, **options: Any) -> None:
        options = {**options.pop("options", {}), **options}  # as dataclasses.replace passes them
        if method not in _ADAPTIVE | _FIXED:
            raise OptionError(
                f"Unknown method {method!r} for TorchDiffEq: write one of {', '.join(map(repr, _ADAPTIVE | _FIXED))}."
            )
        if not (rtol > 0 and atol > 0):
            raise OptionError(f"TorchDiffEq needs rtol > 0 and atol > 0; got rtol = {rtol}, atol = {atol}.")
        for name, value in {"method": method, "rtol": rtol, "atol": atol, "options": options}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        extra = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"TorchDiffEq({self.method!r}, rtol={self.rtol:g}, atol={self.atol:g}{extra})"

    @property
    def default_steps(self) -> int:  # type: ignore[override]  # adaptive methods choose their own
        return 1 if self.method in _ADAPTIVE else 100

    @property
    def order(self) -> int:  # type: ignore[override]  # the method's
        return (_ADAPTIVE | _FIXED)[self.method]

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        raise CapabilityError(
            f"{self} integrates the whole grid at once and has no single steps to correct or wrap: use it by itself."
        )

    def solve(
        self, process: SDE, x: State, times: Grid, noise: NoiseStream, tally: Tally | None = None
    ) -> Iterator[State]:
        """The states at `times[1:]`.

        Raises:
            CapabilityError: the process is noisy.
            DivergenceError: the drift is not finite, or the step size has shrunk to nothing.
        """
        from torchdiffeq import odeint

        refuse_noise(process, self)
        tally = Tally() if tally is None else tally
        options: dict[str, Any] = dict(self.options)
        drift = _Field(process, times)
        if self.method in _ADAPTIVE:
            drift = _CountingField(process, times, tally)
            options.setdefault("step_t", times[1:].to(x.device))
        try:
            path = odeint(
                drift, x, times.to(x.device), method=self.method, rtol=self.rtol, atol=self.atol, options=options
            )
        except AssertionError as error:
            raise DivergenceError(
                f"{self.method} gave up ({error}) after {tally.accepted} accepted and {tally.rejected} rejected steps",
                "The drift may be discontinuous or the tolerance finer than the dtype: loosen rtol and atol, use "
                "float64, or end at a later t_min.",
                step=None,
                time=None,
                rows=list(range(x.shape[0])),
            ) from error
        yield from path[1:]


class _Flat:
    """A process as torchsde wants it: states `(batch, D)`, a rising clock, additive noise."""

    noise_type = "additive"

    def __init__(self, process: SDE, x: State, sign: float, sde_type: str) -> None:
        self._process = process
        self._shape = x.shape
        self._sign = sign
        self.sde_type = sde_type
        self._known: list[tuple[float, Tensor, Tensor]] = []

    def f(self, r: Tensor, y: Tensor) -> Tensor:
        clock = r.item()
        for time, state, drift in self._known:
            if time == clock and (state is y or torch.equal(state, y)):
                return drift
        drift = self._sign * self._process.drift(self._sign * r, y.reshape(self._shape)).reshape(y.shape)
        self._known = [*self._known[-3:], (clock, y, drift)]
        return drift

    def g(self, r: Tensor, y: Tensor) -> Tensor:
        x = y.reshape(self._shape)
        return over(self._process.diffusion(self._sign * r, x), x).expand(self._shape).reshape(y.shape)

    def g_prod(self, r: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.g(r, y) * v


class _Source:
    """This library's noise as torchsde's Brownian motion."""

    levy_area_approximation = "space-time"

    def __init__(self, noise: NoiseStream, x: State, sign: float) -> None:
        self._noise = noise
        self._like = x
        self._sign = sign
        self.shape = (x.shape[0], x[0].numel())
        self.dtype = x.dtype
        self.device = x.device

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        t, s = self._sign * ta, self._sign * tb
        if not return_U:
            return self._noise.increment(self._like, t, s).reshape(self.shape)
        increment, integral = self._noise.increment_and_integral(self._like, t, s)
        return increment.reshape(self.shape), integral.reshape(self.shape)


@dataclass(frozen=True)
class TorchSDE(Solver):
    """A method of torchsde, one step of it for every step of the grid.

    Args:
        method: "euler", "milstein", "srk", "euler_heun", "heun", "midpoint" or "reversible_heun"; "srk" has strong
            order 1.5.
        noise_level: lambda of the process; 0 works, and is wasteful.
        options: passed on to the method.
    """

    method: str = "euler"
    noise_level: float = 1.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __init__(self, method: str = "euler", noise_level: float = 1.0, **options: Any) -> None:
        options = {**options.pop("options", {}), **options}  # as dataclasses.replace passes them
        if method not in _SDE_METHODS:
            raise OptionError(
                f"Unknown method {method!r} for TorchSDE: write one of {', '.join(map(repr, _SDE_METHODS))}."
            )
        if options.pop("adaptive", False):
            raise CapabilityError(
                "TorchSDE steps on the grid it is given: torchsde's adaptive stepping picks points of its own and "
                "interpolates between them. Choose steps= or times= instead."
            )
        for name, value in {"method": method, "noise_level": noise_level, "options": options}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        extra = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"TorchSDE({self.method!r}, noise_level={self.noise_level:g}{extra})"

    @property
    def order(self) -> int:  # type: ignore[override]  # the method's
        return _SDE_METHODS[self.method]

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        from torchsde._core import base_sde, methods

        refuse_singular_start(process, x, times, self)
        sign = 1.0 if times[-1] > times[0] else -1.0
        build = methods.select(method=self.method, sde_type="ito")
        flat = base_sde.ForwardSDE(_Flat(process, x, sign, build.sde_type))
        flat.prod = lambda g, v: g * v
        method = build(
            sde=flat, bm=_Source(noise, x, sign), dt=0.0, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0,
            options=dict(self.options),
        )  # fmt: skip
        clock = (sign * times).to(x.device)
        memory: list[Any] = [None]

        def step(i: int, x: State) -> State:
            y = x.reshape(x.shape[0], -1)
            if memory[0] is None:
                memory[0] = method.init_extra_solver_state(clock[0], y)
            y, memory[0] = method.step(clock[i], clock[i + 1], y, memory[0])
            return y.reshape(x.shape)

        return step
