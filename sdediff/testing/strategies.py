"""Hypothesis strategies: linear SDEs, time grids, Gaussian targets.

from hypothesis import given
from sdediff.testing import gaussian_targets, linear_sdes

@given(linear_sdes(), gaussian_targets())
def test_my_sampler(sde, target): ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sdediff.exact import Gaussian
from sdediff.linear import LinearSDE, as_linear
from sdediff.processes import EDM, VE, VP, CosineVP, DiscreteVP, RectifiedFlow, SigmoidVP, SubVP
from sdediff.sde import SDE
from sdediff.shapes import Grid, State


@dataclass(frozen=True)
class PowerScales(LinearSDE):
    """A process given by its scales: `alpha = exp(-depth t^power)`, `sigma = height t^(power / 2)`."""

    depth: float
    height: float
    power: float
    t_min: float = 1e-4
    t_max: float = 1.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (-self.depth * t**self.power).exp(), self.height * t ** (self.power / 2)


@dataclass(frozen=True)
class WavyRates(LinearSDE):
    """A process given by its rates, with no closed form of its scales."""

    speed: float
    ripple: float
    t_min: float = 1e-4
    t_max: float = 1.0

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        wave = 1 + self.ripple * (5 * t).sin()
        return -self.speed * wave * (t + 0.1), (2 * self.speed * (t + 0.1)).sqrt() * wave


@dataclass(frozen=True)
class DriftAndDiffusion(SDE):
    """A process given by a drift and a diffusion."""

    pull: float
    push: float
    t_min: float = 1e-4
    t_max: float = 1.0

    def drift(self, t: Tensor, x: State) -> State:
        return -self.pull * (1 + t**2) * x

    def diffusion(self, t: Tensor, x: State) -> Tensor:
        return self.push * (1 + t).log1p()


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def linear_sdes() -> st.SearchStrategy[LinearSDE]:
    """Named processes with drawn parameters, and custom ones given by scales, by rates, and by drift and diffusion."""
    betas = st.lists(_floats(1e-3, 0.3), min_size=4, max_size=30)
    return st.one_of(
        st.builds(VP, _floats(0.05, 1.0), _floats(5.0, 30.0)),
        st.builds(SubVP, _floats(0.1, 1.0), _floats(5.0, 30.0)),
        st.builds(VE, _floats(0.005, 0.1), _floats(5.0, 100.0)),
        st.builds(EDM, _floats(0.001, 0.01), _floats(10.0, 100.0)),
        st.builds(CosineVP, _floats(0.004, 0.05)),
        st.builds(SigmoidVP, _floats(5.0, 30.0), _floats(2.0, 8.0)),
        st.just(RectifiedFlow()),
        betas.map(lambda b: DiscreteVP(torch.tensor(b, dtype=torch.float64))),
        st.builds(PowerScales, _floats(1.0, 5.0), _floats(0.5, 5.0), _floats(1.0, 3.0)),
        st.builds(WavyRates, _floats(1.0, 10.0), _floats(0.0, 0.6)),
        st.builds(DriftAndDiffusion, _floats(1.0, 5.0), _floats(1.0, 5.0)).map(as_linear),
    )


@st.composite
def time_grids(draw: st.DrawFn, sde: SDE | None = None, max_steps: int = 12) -> Grid:
    """Decreasing grids of 1 to `max_steps` steps from t_max to t_min (of VP() if no SDE is given), even or ragged."""
    sde = VP() if sde is None else sde
    gaps = draw(st.lists(_floats(0.02, 1.0), min_size=1, max_size=max_steps))
    ends = sde.clock(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    ends = ends.nan_to_num(neginf=-30.0, posinf=30.0)
    part = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0) / math.fsum(gaps)
    times = sde.unclock(ends[0] + part * (ends[1] - ends[0]))
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


@st.composite
def gaussian_targets(draw: st.DrawFn, max_dim: int = 4) -> Gaussian:
    """Gaussians of 1 to `max_dim` dimensions with full covariances, float64."""
    size = draw(st.integers(1, max_dim))
    mean = torch.tensor(draw(st.lists(_floats(-2, 2), min_size=size, max_size=size)), dtype=torch.float64)
    factor = draw(st.lists(_floats(-1, 1), min_size=size * size, max_size=size * size))
    root = torch.tensor(factor, dtype=torch.float64).reshape(size, size)
    floor = draw(_floats(0.05, 1.0))
    return Gaussian(mean, root @ root.T + floor * torch.eye(size, dtype=torch.float64))
