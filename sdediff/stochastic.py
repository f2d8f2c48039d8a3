r"""A stochastic Runge-Kutta method for additive noise: strong order 3/2 with two drifts a step.

From t to s, with `h = s - t` (of either sign), `dW = W(s) - W(t)` and `J` the mean of `W(u) - W(t)` over the step,

    k_1 = f(t, x),    k_2 = f(t + 3/4 h, x + 3/4 h k_1 + 3/2 g(s) J),
    x_s = x + h (k_1 + 2 k_2) / 3 + g(t) J + g(s) (dW - J).

The noise part is `int g dW` with g drawn as a straight line through g(t) and g(s); the point of the second drift has
the covariance with dW and J that makes `int f` right to order 3/2. Moments, and solutions without noise, are of order
2. Besides its increment the source of noise gives the integral of the path over a step.

Reference: Roessler 2010, Runge-Kutta methods for the strong approximation of solutions of stochastic differential
equations, SIAM J. Numer. Anal. 48, scheme SRA1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, refuse_singular_start


@dataclass(frozen=True)
class SRA1(Solver):
    """Roessler's SRA1 on any process, two network calls a step; strong order 3/2, weak order 2.

    Args:
        noise_level: lambda of the process; at 0 it is Ralston's second-order method.
    """

    noise_level: float = 1.0
    order: ClassVar[int] = 2

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_singular_start(process, x, times, self)
        n = len(times) - 1
        along = process.along(torch.cat([times, torch.lerp(times[:-1], times[1:], 3 / 4)]))
        lengths = times.diff().tolist()

        def step(i: int, x: State) -> State:
            h = lengths[i]
            first = along.drift(i, x)
            ahead, after = x.add(first, alpha=3 / 4 * h), x.add(first, alpha=h / 3)
            if process.noisy:
                early, late = along.diffusion(i, x), along.diffusion(i + 1, x)
                increment, integral = noise.increment_and_integral(x, times[i], times[i + 1])  # J = integral / |h|
                ahead = _plus(ahead, 3 / 2 / abs(h) * late, integral)
                after = _plus(_plus(after, late, increment), (early - late) / abs(h), integral)
            return after.add(along.drift(n + 1 + i, ahead), alpha=2 / 3 * h)

        return step


def _plus(x: State, weight: Tensor | float, y: State) -> State:
    """`x + weight y`, at once where the weight is a number."""
    return x + over(weight, x) * y if isinstance(weight, Tensor) else x.add(y, alpha=weight)
