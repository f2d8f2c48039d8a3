r"""A family of smooth signals in one dimension: random sums of sinusoids, whose low moments are known exactly.

    x(u) = sum_{k=1..K} a_k sin(2 pi f_k u + phi_k),        u = 0, 1 / (D - 1), ..., 1,

with independent amplitudes and frequencies, uniform on intervals, and phases, uniform on the circle. The random phase
makes it stationary with mean zero. With `r(d) = E cos(2 pi f d)`, which for frequencies in [f_0, f_1] is
`cos(pi (f_0 + f_1) d) sinc((f_1 - f_0) d)`, and `d = u - v`,

    E x(u) x(v)         = K E[a^2] r(d) / 2,
    E x(u)^2 x(v)^2     = K E[a^4] (2 + r(2 d)) / 8 + K (K - 1) E[a^2]^2 (1 + 2 r(d)^2) / 4.

The first is a covariance of low rank for all that matters, as the signals are smooth. A Gaussian with this covariance
has `E[x(u)^2] E[x(v)^2] + 2 E[x(u) x(v)]^2` for the second; it is larger, as few sinusoids are far from Gaussian: their
excess kurtosis at a point, -3/2 for one sinusoid of fixed amplitude, falls like 1 / K. So a model that has learnt no
more than the covariance can be told from one that has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.draws import RowDraws
from sdediff.errors import OptionError
from sdediff.sde import fresh_seed
from sdediff.shapes import State


@dataclass(frozen=True)
class Sinusoids:
    """Sums of `count` sinusoids with random amplitudes, frequencies and phases, at `points` even places of [0, 1].

    Args:
        count: sinusoids in a signal, K.
        frequency: interval of the frequencies, in periods per unit of u.
        amplitude: interval of the amplitudes.
        points: entries of a signal, D.

    Raises:
        OptionError: an interval that is not `0 <= low <= high`, no sinusoid, amplitudes that are all zero, or fewer
            than two points in the shortest period, which cannot show it.
    """

    count: int = 2
    frequency: tuple[float, float] = (1.0, 3.0)
    amplitude: tuple[float, float] = (0.8, 1.2)
    points: int = 50

    def __post_init__(self) -> None:
        if self.count < 1 or self.points < 2:
            raise OptionError(f"Sinusoids needs count >= 1 and points >= 2; got {self.count} and {self.points}.")
        for name, (low, high) in (("frequency", self.frequency), ("amplitude", self.amplitude)):
            if not 0 <= low <= high < math.inf:
                raise OptionError(f"{name} must be an interval (low, high) with 0 <= low <= high; got ({low}, {high}).")
        if self.amplitude[1] == 0:
            raise OptionError("amplitude is zero, and so would be every signal; give (low, high) with high > 0.")
        if 2 * self.frequency[1] > self.points - 1:
            raise OptionError(
                f"{self.points} points show frequencies up to {(self.points - 1) / 2:g}; got {self.frequency[1]:g}. "
                "Take more points or lower frequencies."
            )

    @property
    def places(self) -> Float[Tensor, " points"]:
        """u, float64."""
        return torch.linspace(0, 1, self.points, dtype=torch.float64)

    def sample(self, n: int, seed: int | None = None, *, dtype: torch.dtype | None = None) -> State:
        """`n` signals `(n, points)`; row i depends on the seed and i alone, computed in float64.

        Args:
            seed: None draws one from torch's global generator.
            dtype: of the signals; torch's default if None.
        """
        if n < 1:
            raise OptionError(f"sample needs n >= 1 signals; got {n}.")
        draws = RowDraws(fresh_seed() if seed is None else seed, 0)
        uniform = torch.special.ndtr(draws(torch.empty(n, 3, self.count, 1, dtype=torch.float64)))
        amplitude, frequency = (
            low + (high - low) * uniform[:, i] for i, (low, high) in enumerate((self.amplitude, self.frequency))
        )
        signals = amplitude * torch.sin(2 * math.pi * (frequency * self.places + uniform[:, 2]))
        return signals.sum(1).to(dtype or torch.get_default_dtype())

    @property
    def cov(self) -> Float[Tensor, "points points"]:
        """The exact covariance `E x(u) x(v)`, float64."""
        return self.count * self._moment(2) / 2 * self._coherence(self._lags)

    @property
    def squares(self) -> Float[Tensor, "points points"]:
        """The exact fourth moments `E x(u)^2 x(v)^2`, float64."""
        alone = self._moment(4) * (2 + self._coherence(2 * self._lags)) / 8
        pairs = self._moment(2) ** 2 * (1 + 2 * self._coherence(self._lags) ** 2) / 4
        return self.count * alone + self.count * (self.count - 1) * pairs

    @property
    def kurtosis(self) -> float:
        """The excess kurtosis of a signal's value at any point; 0 for a Gaussian."""
        return (self.squares[0, 0] / self.cov[0, 0] ** 2).item() - 3

    @property
    def _lags(self) -> Tensor:
        return self.places[:, None] - self.places

    def _coherence(self, lag: Tensor) -> Tensor:
        """`E cos(2 pi f lag)`."""
        low, high = self.frequency
        return torch.cos(math.pi * (low + high) * lag) * torch.sinc((high - low) * lag)

    def _moment(self, power: int) -> float:
        """`E a^power` of an amplitude, uniform on its interval: the mean of `low^i high^(power - i)`."""
        low, high = self.amplitude
        return sum(low**i * high ** (power - i) for i in range(power + 1)) / (power + 1)
