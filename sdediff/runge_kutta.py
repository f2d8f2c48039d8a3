r"""Methods that step by drift and diffusion: Euler-Maruyama and Heun.

Euler-Maruyama, weak order 1 (and strong order 1, the noise being additive):

    x_s = x_t + f(t, x_t) (s - t) + g(t) (W(s) - W(t)).

Heun, order 2, for processes without noise:

    k_1 = f(t, x_t),   k_2 = f(s, x_t + (s - t) k_1),   x_s = x_t + (s - t) (k_1 + k_2) / 2.

With churn, every step first raises the noise-to-signal ratio sigma / alpha by the factor `1 + gamma`,
`gamma = min(churn / steps, sqrt(2) - 1)`, by moving back in time along the forward process, and steps from there.

References: Kloeden and Platen 1992; Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from sdediff.errors import CapabilityError, OptionError
from sdediff.noise import NoiseStream
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Solver, Step, euler_steps, model_of, refuse_noise, refuse_singular_start


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on any process; at noise level 0, Euler's method on the probability-flow ODE."""

    noise_level: float = 1.0

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_singular_start(process, x, times, self)
        return euler_steps(process, times, noise)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method, two network calls a step, order 2.

    Args:
        churn: EDM's S_churn >= 0; 0 is the deterministic method.
    """

    churn: float = 0.0
    noise_level: float = field(default=0.0, init=False)
    default_steps: ClassVar[int] = 50
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.churn >= 0:
            raise OptionError(f"Heun needs churn >= 0; got {self.churn}.")

    @property
    def deterministic(self) -> bool:
        return self.churn == 0

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        refuse_noise(process, self)
        starts, scales, jitters = times[:-1], None, None
        if self.churn:
            if times[-1] > times[0]:
                raise CapabilityError("Heun's churn adds noise on the way from noise to data; use Heun() to encode.")
            sde = model_of(process, self).linear
            gamma = min(self.churn / len(starts), math.sqrt(2) - 1)
            noisier = (sde.log_snr(starts) - 2 * math.log1p(gamma)).clamp(min=sde.log_snr(sde.t_max).item())
            starts = sde.time(noisier).maximum(starts)
            scales, jitters = (column.tolist() for column in sde.transition(times[:-1], starts))

        def step(i: int, x: State) -> State:
            if scales is not None and jitters is not None:
                x = scales[i] * x + jitters[i] * noise.normal(x)
            t, s = starts[i], times[i + 1]
            length = over(s - t, x)
            first = process.drift(t, x)
            second = process.drift(s, x + length * first)
            return x + length / 2 * (first + second)

        return step
