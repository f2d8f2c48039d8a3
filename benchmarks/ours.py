"""This library's samplers for the benchmarks. To add one, add one line to `FIXED`, `ADAPTIVE` or `NOISY`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

import sdediff as sd


@dataclass(frozen=True)
class Ours:
    """A sampler on a grid.

    Attributes:
        make: the solver, from the model and the number of network calls it may take. Calls made here, to calibrate
            say, are not counted; keep them (`functools.cache`) if they are slow.
        calls: network calls of one step.
        times: the grid, from the model and the number of steps; None for the one that `sd.sample` takes.
        options: further arguments of `sd.sample`.
    """

    make: Callable[[sd.ScoreModel, int], sd.Solver]
    calls: int = 1
    times: Callable[[sd.ScoreModel, int], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OursAdaptive:
    """A method with a tolerance.

    Attributes:
        make: the solver, from the model and the tolerance.
        options: further arguments of `sd.sample`.
    """

    make: Callable[[sd.ScoreModel, float], sd.Solver]
    options: Mapping[str, Any] = field(default_factory=dict)


def run(entry: Ours, exact: sd.ScoreModel, model: sd.ScoreModel, x: Tensor, nfe: int, seed: int = 0) -> Tensor:
    """The state at the end of the process from `x` at its start; the solver is made from `exact`, uncounted."""
    steps = nfe // entry.calls
    grid = {"steps": steps} if entry.times is None else {"times": entry.times(exact, steps)}
    return sd.sample(
        model, x.shape, solver=entry.make(exact, nfe), x_init=x, final="none", seed=seed, **grid, **entry.options
    ).x


def run_adaptive(
    entry: OursAdaptive, exact: sd.ScoreModel, model: sd.ScoreModel, x: Tensor, tolerance: float
) -> Tensor:
    """The same for a method with a tolerance."""
    return sd.sample(
        model, x.shape, solver=entry.make(exact, tolerance), x_init=x, final="none", seed=0, **entry.options
    ).x


def grid(model: sd.ScoreModel, steps: int) -> Tensor:
    """The grid that peers are given when they run on ours."""
    return sd.Exponential().grid(model, steps)


@cache
def calibration(model: sd.ScoreModel, nfe: int) -> sd.Calibration:
    """A pilot run of 128 rows, drawn with a seed of its own, for one number of steps."""
    size = model.network.target.event[0]
    return sd.calibrate(model, (128, size), nfe, seed=1)


FIXED: dict[str, Ours] = {
    "Exponential": Ours(lambda model, nfe: sd.Exponential()),
    "Exponential, calibrated": Ours(lambda model, nfe: sd.Exponential(calibration=calibration(model, nfe))),
    "DPM-Solver++(2M)": Ours(lambda model, nfe: sd.Exponential(2, predict="data", corrector=False)),
    "UniPC": Ours(lambda model, nfe: sd.UniPC(), times=grid),
    "ExponentialRungeKutta": Ours(lambda model, nfe: sd.ExponentialRungeKutta(2), calls=2),
    "DDIM": Ours(lambda model, nfe: sd.DDIM()),
    "Heun": Ours(lambda model, nfe: sd.Heun(), calls=2),
}
"""Deterministic samplers on a grid."""

ADAPTIVE: dict[str, OursAdaptive] = {
    "Adaptive": OursAdaptive(lambda model, tol: sd.Adaptive(rtol=tol, atol=tol)),
    "TorchDiffEq dopri5": OursAdaptive(lambda model, tol: sd.TorchDiffEq("dopri5", rtol=tol, atol=tol)),
}
"""Deterministic methods with a tolerance."""

NOISY: dict[str, Ours] = {
    "Exponential, level 1": Ours(lambda model, nfe: sd.Exponential(noise_level=1.0)),
    "Exponential, level 0.5": Ours(lambda model, nfe: sd.Exponential(noise_level=0.5)),
    "DDPM": Ours(lambda model, nfe: sd.DDPM()),
    "EulerMaruyama": Ours(lambda model, nfe: sd.EulerMaruyama()),
    "TorchSDE srk": Ours(lambda model, nfe: sd.TorchSDE("srk"), calls=2),
}
"""Samplers of the reverse SDE."""
