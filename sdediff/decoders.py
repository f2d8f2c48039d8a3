r"""Decoders: the probability of discrete data, given the state at t_min.

Data of `levels` codes lie at the centres of equal bins of an interval `(low, high)`, the bins of `sdediff.dequantize`,

    c_j = low + (j + 1/2) w,    w = (high - low) / levels,    j = 0 .. levels - 1.

(8-bit images scaled to `c / 127.5 - 1` have their first and last code at -1 and 1: `interval=around(256)` is theirs.)
A decoder is a distribution over the codes, entry by entry, and so turns the variational bound on a log-density into
one on a log-probability: `E_q(z | x) log P(x | z)` is its reconstruction term. With `z = alpha x + sigma eps` at t_min,
s = sigma / alpha, and Phi the normal distribution function,

| | P(c_j given z) |
|---|---|
| `Softmax` | proportional to exp(-(z / alpha - c_j)^2 / 2 s^2): Bayes' rule for codes of equal odds |
| `DiscretizedGaussian` | Phi((c_j + w/2 - m) / s) - Phi((c_j - w/2 - m) / s), m = xhat(z): the mass in the bin |

The first bin of `DiscretizedGaussian` is open to the left and the last to the right, so that both sum to one. Its
masses are `log Phi(b) + log(1 - exp(log Phi(a) - log Phi(b)))` on the side of the mean where `a + b <= 0`: accurate in
both tails, and for narrow bins, where they tend to the density times w. For s far below w both are 1 at the nearest
centre. `Softmax` needs no network; `DiscretizedGaussian` profits from a denoiser that sees more than one entry.

References: Kingma et al. 2021 (arXiv:2107.00630), softmax; Ho et al. 2020 (arXiv:2006.11239), discretised Gaussian.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.model import ScoreModel
from sdediff.shapes import Codes, PerRow, State, Time, as_time, check_state, over, per_row, sum_rows

_OFF = 0.01
"""How far off a centre, in widths, data may lie: the rounding of float32 and of scaled images."""


def around(levels: int = 256, first: float = -1.0, last: float = 1.0) -> tuple[float, float]:
    """The interval whose first and last bin centres are `first` and `last`.

    Raises:
        OptionError: fewer than two levels, or the ends in the wrong order.
    """
    _check_levels(levels)
    if not first < last:
        raise OptionError(f"around needs first < last, the values of the first and the last code; got {first}, {last}.")
    half = (last - first) / (levels - 1) / 2
    return first - half, last + half


def _check_levels(levels: object) -> None:
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 2:
        raise OptionError(f"levels must be a whole number of at least 2, such as 256; got {levels!r}.")


@dataclass(frozen=True)
class Decoder(ABC):
    """A distribution over codes, entry by entry, given the state at t_min.

    A decoder of your own inherits from it and has `log_prob`, which bounds need, and `logits`, which `sample` needs.

    Args:
        levels: number of codes.
        interval: `(low, high)` of the model's space, cut into `levels` bins; data lie at their centres.

    Raises:
        OptionError: fewer than two levels, or an interval that is empty or not finite.
    """

    levels: int = 256
    interval: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        low, high = self.interval
        if not (low < high and math.isfinite(high - low)):
            raise OptionError(f"interval must be (low, high), finite, with low < high; got {self.interval}.")

    @abstractmethod
    def log_prob(self, model: ScoreModel, t: Time, x: State, z: State) -> PerRow:
        """`log P(x | z)` in nats, `(batch,)`, for states z at time t; differentiable.

        Raises:
            OptionError: x is not at bin centres.
            ShapeError: z is not shaped as x.
        """

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.interval[1] - self.interval[0]) / self.levels

    @property
    def centres(self) -> Tensor:
        """Of the bins, float64 `(levels,)`."""
        return self.interval[0] + (torch.arange(self.levels, dtype=torch.float64) + 0.5) * self.width

    def points(self, codes: Codes, dtype: torch.dtype | None = None) -> State:
        """The bin centres of integer codes `(batch, *event)`, in the dtype given or torch's default.

        Raises:
            ShapeError: the codes are not integers.
            OptionError: a code lies outside `0..levels-1`.
        """
        if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.ndim == 0:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise ShapeError(f"Codes must be a tensor of integers (batch, *event); got {got}.")
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.levels):
            raise OptionError(f"Codes must lie in 0..{self.levels - 1}; got {int(codes.min())}..{int(codes.max())}.")
        return self.centres.to(codes.device, dtype or torch.get_default_dtype())[codes.long()]

    def codes(self, x: State) -> Codes:
        """The codes of data at bin centres, the inverse of `points`.

        Raises:
            OptionError: some entry is not at a centre, to 1% of the width: other levels, or another interval.
        """
        check_state(x)
        place = (x.detach().double() - self.interval[0]) / self.width - 0.5
        codes = place.round()
        wrong = ~((place - codes).abs() <= _OFF) | (codes < 0) | (codes >= self.levels)
        if bool(wrong.any()):
            low, high = self.interval
            raise OptionError(
                f"x must lie at the centres of {self.levels} bins of [{low:g}, {high:g}], "
                f"{low:g} + (code + 1/2) {self.width:g}; got {x[wrong].reshape(-1)[0].item():.6g}. Give the decoder "
                "the levels= and interval= of the data, or make x by decoder.points(codes)."
            )
        return codes.long()

    def sample(self, model: ScoreModel, t: Time, z: State, *, seed: int | None = None) -> Codes:
        """Codes drawn from `P(. | z)`, `(batch, *event)`.

        Args:
            seed: of the draws; None for torch's global generator.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        table = torch.softmax(self.logits(model, t, z), -1).cpu().double()
        drawn = torch.multinomial(table.reshape(-1, self.levels), 1, replacement=True, generator=generator)
        return drawn.reshape(z.shape).to(z.device)

    @abstractmethod
    def logits(self, model: ScoreModel, t: Time, z: State) -> Tensor:
        """Log-probabilities of all codes, up to a constant for every entry, `(batch, *event, levels)`."""

    def _both(self, x: State, z: State) -> Codes:
        if z.shape != x.shape:
            raise ShapeError(f"z has shape {tuple(z.shape)} but x has {tuple(x.shape)}; they must be equal.")
        return self.codes(x)


@dataclass(frozen=True)
class Softmax(Decoder):
    """`P(x | z)` proportional to `q(z | x)` over the levels: VDM's decoder, which asks nothing of the network.

    It takes memory for all levels of all entries at once.
    """

    def log_prob(self, model: ScoreModel, t: Time, x: State, z: State) -> PerRow:
        codes = self._both(x, z)
        logits = self.logits(model, t, z)
        return sum_rows(logits.gather(-1, codes[..., None])[..., 0] - logits.logsumexp(-1))

    def logits(self, model: ScoreModel, t: Time, z: State) -> Tensor:
        alpha, sigma, z = _scales(model, t, z)
        distance = (z / over(alpha, z))[..., None] - self.centres.to(z)
        return -(distance**2) / 2 * over((alpha / sigma) ** 2, z)[..., None]


@dataclass(frozen=True)
class DiscretizedGaussian(Decoder):
    """The mass of `N(xhat(z), s^2)`, `s = sigma / alpha`, in the bin of x: DDPM's decoder; one network call.

    The deviation is s whatever the reverse variance of a chain is.
    """

    def log_prob(self, model: ScoreModel, t: Time, x: State, z: State) -> PerRow:
        codes = self._both(x, z)
        mean, std = self._normal(model, t, z)
        return sum_rows(self.log_mass(codes, mean, std))

    def logits(self, model: ScoreModel, t: Time, z: State) -> Tensor:
        mean, std = self._normal(model, t, z)
        codes = torch.arange(self.levels, device=z.device).expand(*z.shape, self.levels)
        return self.log_mass(codes, mean[..., None], std[..., None])

    def log_mass(self, codes: Codes, mean: Tensor, std: Tensor) -> Tensor:
        """`log` of the mass of `N(mean, std^2)` in the bins of the codes, all of shapes that broadcast."""
        centre = self.centres.to(mean)[codes]
        below, above = (centre - mean - self.width / 2) / std, (centre - mean + self.width / 2) / std
        right = below + above > 0  # then mirrored, so that no two numbers near 1 are subtracted
        first = torch.special.log_ndtr(torch.where(right, -above, below))
        last = torch.special.log_ndtr(torch.where(right, -below, above))
        inner = last + (-torch.expm1(first - last)).log()
        open_left, open_right = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
        return torch.where(codes == 0, open_left, torch.where(codes == self.levels - 1, open_right, inner))

    @staticmethod
    def _normal(model: ScoreModel, t: Time, z: State) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 where the device has it."""
        alpha, sigma, wide = _scales(model, t, z)
        mean = model.denoised(t, z).to(torch.float64 if z.device.type != "mps" else wide.dtype)
        return mean, over(sigma / alpha, mean).expand(mean.shape)


def decoded(decoder: object, model: ScoreModel, t: Time, x: State, z: State) -> PerRow:
    """`decoder.log_prob(model, t, x, z)`, `(batch,)`, checked.

    Raises:
        OptionError: what is given is no decoder, or x is not at its bin centres.
        ShapeError: the decoder returns something else than one value a row.
    """
    values = check_decoder(decoder).log_prob(model, t, x, z)
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"log_prob of {type(decoder).__name__} must return one value a row, shape ({len(x)},), the sum over its "
            f"entries; it returned {got}."
        )
    return values


def check_decoder(decoder: object) -> Decoder:
    """Refuse what is no decoder with a sentence."""
    if not isinstance(decoder, Decoder):
        raise OptionError(
            f"decoder must be one of sdediff.decoders, such as Softmax(levels=256), or None; got {decoder!r}."
        )
    return decoder


def _scales(model: ScoreModel, t: Time, z: State) -> tuple[Tensor, Tensor, State]:
    """alpha and sigma of every row, and z in at least float32."""
    alpha, sigma = model.linear.scales_at(per_row(as_time(t), z))
    return alpha, sigma, z.to(torch.promote_types(z.dtype, torch.float32))
