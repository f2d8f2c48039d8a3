"""Instruments of the tests: named SDEs, exact moments of a whole solve, fitted orders.

On Gaussian data with its exact score every sampler is affine in its start and its noise. One solve over a batch of
`2 + draws` rows reads the affine map off: row 0 starts at 0 without noise, row 1 at 1, and row 2 + k has the k-th
normal number of the solve equal to 1. Mean and variance of the sampler's result follow without any Monte Carlo.
"""

import math

import torch

import sdediff as sd
from sdediff.noise import _FreshStream

NAMED = [
    sd.VP(),
    sd.SubVP(),
    sd.VE(),
    sd.EDM(),
    sd.CosineVP(),
    sd.SigmoidVP(),
    sd.RectifiedFlow(),
    sd.DiscreteVP(torch.linspace(1e-3, 0.1, 40, dtype=torch.float64)),
]
MEAN, VARIANCE = 0.7, 0.3


def name(value):
    return repr(value)[:40]


class TwoFunctions(sd.SDE):
    """A user's SDE: a linear drift with a time schedule that has no closed form."""

    t_min, t_max = 1e-4, 1.0

    def drift(self, t, x):
        return -2 * (1 + torch.sin(3 * t) ** 2 + t.exp()) * x

    def diffusion(self, t, x):
        return torch.sqrt(4 + 3 * torch.cos(5 * t) * torch.exp(-t))


def scalar_target():
    return sd.exact.Gaussian(torch.tensor([MEAN], dtype=torch.float64), VARIANCE)


class BasisStream(_FreshStream):
    """The k-th number asked for is 1 in row 2 + k and 0 elsewhere."""

    def __init__(self):
        self.asked = 0
        super().__init__(0, 0)
        self._draw = self.draw

    def draw(self, x):
        out = torch.zeros_like(x)
        if 2 + self.asked < len(x):
            out[2 + self.asked] = 1
        self.asked += 1
        return out


def final_moments(solver, sde, times, draws=0, process=None):
    """Exact mean and variance of the solver's result, started from the exact marginal at times[0]."""
    sde = sd.as_linear(sde)
    if process is None:
        process = solver.process(scalar_target().model(sde))
    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[1] = 1
    stream = BasisStream()
    *_, x = solver.solve(process, x, times, stream)
    assert stream.asked <= draws, f"{stream.asked} draws"
    x = x[:, 0]
    alpha, sigma = sde.alpha(times[0]), sde.sigma(times[0])
    slope = x[1] - x[0]
    mean = x[0] + slope * alpha * MEAN
    variance = slope**2 * (alpha**2 * VARIANCE + sigma**2) + (x[2:] - x[0]).square().sum()
    return mean, variance


def moment_error(solver, sde, times, draws=0):
    """Distance of the result's mean and standard deviation from those of the marginal at times[-1]."""
    mean, variance = final_moments(solver, sde, times, draws)
    sde = sd.as_linear(sde)
    alpha, sigma = sde.alpha(times[-1]), sde.sigma(times[-1])
    std = (alpha**2 * VARIANCE + sigma**2).sqrt()
    return math.hypot((mean - alpha * MEAN) / std, variance.sqrt() / std - 1)


def fitted_order(errors, steps):
    """Least-squares slope of log error against log step."""
    x = -torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


class Recording(torch.nn.Module):
    """A network of x alone that notes, at every call, whether it is in training mode."""

    def __init__(self, network, seen):
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x, t):
        self.seen.append(self.network.training)
        return self.network(x)
