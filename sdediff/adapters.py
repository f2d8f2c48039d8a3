r"""Solvers of torchdiffeq and torchsde behind the same `solve`.

`TorchDiffEq` integrates any deterministic process, in either direction of time, over states of any shape, and lands
exactly on the grid: adaptive methods are made to step on its points and never past its end.

`TorchSDE` integrates any process of this library with torchsde's methods, one step of the method for every step of the
grid, flattening `(batch, *event)` to torchsde's `(batch, D)`. The noise is additive, so Ito and Stratonovich methods
agree, and the Brownian source is this library's (a draw a step, the same row whatever the batch) in place of torchsde's
interval tree. Methods that ask for the same drift twice (srk) are answered from memory: one network call for every
distinct `(t, x)`.

A method with fixed steps asks for the process at known parts of a step. These times are all known beforehand, and what
depends on time only is computed for all of them at once.

References: Chen, torchdiffeq, 2018; Li et al. 2020 (arXiv:2001.01328), torchsde; Roessler 2010, SRA methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, as_float64, finite_or_raise, over
from sdediff.solvers import Solver, Step, Tally, refuse_noise, refuse_singular_start


class _Method(NamedTuple):
    """A method with fixed steps: its order (of the solution, or weak with additive noise), and its stages."""

    order: int
    stages: tuple[float, ...]


_ADAPTIVE = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
_FIXED = {
    "euler": _Method(1, (0.0,)),
    "midpoint": _Method(2, (0.0, 1 / 2)),
    "heun2": _Method(2, (0.0, 1.0)),
    "heun3": _Method(3, (0.0, 1 / 3, 2 / 3)),
    "rk4": _Method(4, (0.0, 1 / 3, 2 / 3, 1.0)),
    "explicit_adams": _Method(4, (0.0, 1 / 3, 2 / 3, 1.0)),
    "implicit_adams": _Method(4, (0.0, 1 / 3, 2 / 3, 1.0)),
}
_ORDERS = _ADAPTIVE | {name: method.order for name, method in _FIXED.items()}
_SDE_METHODS = {
    "euler": _Method(1, (0.0,)),
    "milstein": _Method(1, (0.0,)),
    "srk": _Method(2, (0.0, 3 / 4, 1.0)),
    "euler_heun": _Method(1, (0.0, 1.0)),
    "heun": _Method(2, (0.0, 1.0)),
    "midpoint": _Method(2, (0.0, 1 / 2)),
    "reversible_heun": _Method(2, (0.0, 1.0)),
}


class _Stages:
    """A process at the stages of a method with fixed steps, by the time that the method will ask with.

    A time that was not foreseen, such as those of a finer grid from a backend's own options, is computed when asked.
    """

    def __init__(self, process: SDE, times: Grid, stages: tuple[float, ...], dtype: torch.dtype) -> None:
        self._process = process
        lengths = times.diff()
        # t + c h as the backends compute it, and the grid itself
        asked = torch.cat([times, *(times[:-1] + part * lengths for part in stages)])
        low, high = times.aminmax()
        self._along = process.along(asked.clamp(low, high))
        self._index = {t: k for k, t in enumerate(asked.to(dtype).tolist())}

    def drift(self, t: float, x: State) -> State:
        k = self._index.get(t)
        return self._process.drift(as_float64(t), x) if k is None else self._along.drift(k, x)

    def diffusion(self, t: float, x: State) -> Tensor | float:
        k = self._index.get(t)
        return self._process.diffusion(as_float64(t), x) if k is None else self._along.diffusion(k, x)


class _Field:
    """The drift as adaptive methods want it: guarded against NaN, their steps counted.

    Times are held within the grid: the search for a first step tries one that may reach far beyond it.
    """

    def __init__(self, process: SDE, times: Grid, tally: Tally) -> None:
        self.process = process
        self.first, self.last = sorted((times[0].item(), times[-1].item()))
        self.tally = tally
        tally.accepted, tally.rejected = tally.accepted or 0, tally.rejected or 0

    def __call__(self, t: Tensor, x: State) -> State:
        drift = self.process.drift(t.clamp(self.first, self.last), x)
        finite_or_raise(drift, "The drift", step=None, time=t.item())
        return drift

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
    mates, as it does in "implicit_adams", whose iteration stops for the whole batch; other fixed-step methods do not
    couple rows. torchdiffeq's Adams methods assume equal steps: their order 4 holds on grids even in t, and is 2 on
    others.

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
        if method not in _ORDERS:
            raise OptionError(
                f"Unknown method {method!r} for TorchDiffEq: write one of {', '.join(map(repr, _ORDERS))}."
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
        return _ORDERS[self.method]

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
        drift: Callable[[Tensor, State], State]
        if self.method in _ADAPTIVE:
            drift = _Field(process, times, tally)
            options.setdefault("step_t", times[1:].to(x.device))
        else:
            fixed = _Stages(process, times, _FIXED[self.method].stages, x.dtype)
            drift = lambda t, x: fixed.drift(t.item(), x)  # noqa: E731  # one of two
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


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in another shape, untouched (which is cheap) where it has it."""
    return x if x.shape == shape else x.reshape(shape)


class _Flat:
    """A process as torchsde wants it: states `(batch, D)`, additive noise.

    torchsde's methods take steps of either sign, so the clock is the process's own.
    """

    noise_type = "additive"

    def __init__(self, stages: _Stages, x: State, sde_type: str) -> None:
        self._stages = stages
        self._shape = x.shape
        self._last: tuple[float, Tensor, Tensor] | None = None
        self.sde_type = sde_type

    def f(self, t: float, y: Tensor) -> Tensor:
        if self._last is None or self._last[0] != t or self._last[1] is not y:
            drift = _shaped(self._stages.drift(t, _shaped(y, self._shape)), y.shape)
            self._last = t, y, drift
        return self._last[2]

    def g(self, t: float, y: Tensor) -> Tensor | float:
        x = _shaped(y, self._shape)
        diffusion = self._stages.diffusion(t, x)
        if not isinstance(diffusion, Tensor):
            return diffusion
        return _shaped(over(diffusion, x).expand(self._shape), y.shape)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        return self.g(t, y) * v


class _Source:
    """This library's noise as torchsde's Brownian motion; it is asked for whole steps of the grid only."""

    levy_area_approximation = "space-time"

    def __init__(self, noise: NoiseStream, x: State, times: Grid) -> None:
        self._noise = noise
        self._like = x
        roots = times.diff().abs().sqrt().tolist()
        self._steps = dict(zip(times[:-1].tolist(), zip(times[:-1], times[1:], roots, strict=True), strict=True))
        self.shape = torch.Size((x.shape[0], x[0].numel()))
        self.dtype = x.dtype
        self.device = x.device

    def __call__(self, ta: float, tb: float, return_U: bool = False, return_A: bool = False) -> Any:
        t, s, root = self._steps[ta]
        if not return_U:
            return root * _shaped(self._noise.unit(self._like, t, s), self.shape)
        increment, integral = self._noise.increment_and_integral(self._like, t, s)
        # torchsde divides by the step, this library's integral is over |du|
        return _shaped(increment, self.shape), _shaped(integral, self.shape) * math.copysign(1, tb - ta)


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
        return _SDE_METHODS[self.method].order

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        from torchsde._core import base_sde, methods

        refuse_singular_start(process, x, times, self)
        build = methods.select(method=self.method, sde_type="ito")
        stages = _Stages(process, times, _SDE_METHODS[self.method].stages, torch.float64)
        flat = base_sde.ForwardSDE(_Flat(stages, x, build.sde_type))
        flat.prod = lambda g, v: g * v
        method = build(
            sde=flat, bm=_Source(noise, x, times), dt=0.0, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0,
            options=dict(self.options),
        )  # fmt: skip
        clock, flat_shape = times.tolist(), torch.Size((x.shape[0], x[0].numel()))
        last: list[State] = []  # the state that the method's own memory belongs to
        memory: list[Any] = [None]

        def step(i: int, x: State) -> State:
            y = _shaped(x, flat_shape)
            if not last or x is not last[0]:
                memory[0] = method.init_extra_solver_state(clock[i], y)
            y, memory[0] = method.step(clock[i], clock[i + 1], y, memory[0])
            last[:] = [_shaped(y, x.shape)]
            return last[0]

        return step
