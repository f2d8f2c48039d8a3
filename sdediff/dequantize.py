r"""Dequantisation: random points in the bins of discrete data, with their log-density.

Of integer codes `0..levels-1`, a code c stands for the bin `[c, c + 1]` of code space, and a transform T carries code
space to the space of the model. A model with density p gives the codes the probability `P(c) = int_bin p(x) dx`, and
for any density q on the bin

    P(c) = E_q[p(x) / q(x | c)],    E_q[log p(x) - log q(x | c)] <= log P(c),

with equality where q is the density of the model within the bin. With `x = T(c + u)`, `u` in `(0, 1)^D`,

    log q(x | c) = log q(u | c) - log |det dT / du|.

| | u | |
|---|---|---|
| `Uniform` | uniform on (0, 1) | log q(u) = 0 |
| `TruncatedNormal` | the normal noise of t_min around the centre, cut off at the bin | nothing to train |
| `Variational` | sigmoid(m + s l), l logistic, with m and s from a network of the codes | m = 0, s = 1 is uniform |
| `Centres` | 1/2 | a density times a width: not a bound |

`TruncatedNormal` draws states at t_min, `alpha T(c + 1/2) + sigma z`, whose bins are alpha times those of data. With
a and b the ends of the bin on the scale of z, `a < 0 < b`, and e = erf, the inverse of its distribution function is

    z = sqrt(2) e^-1(e_a + v (e_b - e_a)),    e_a = e(a / sqrt 2),    e_b = e(b / sqrt 2),    v uniform on (0, 1),

and no small difference of large numbers occurs in it, neither for narrow bins nor for wide ones, as 0 is always inside.

`Variational.fit` climbs the bound. By `x = x(m, s, l)` its gradient needs of the model the score at the data alone,

    d log p(x) = score(x) . dx,    score(x) ~ alpha grad log p_{t_min}(alpha x),

one network call a step. That the score of t_min stands for the one of the data costs tightness, not validity.

References: Theis et al. 2016 (arXiv:1511.01844), uniform; Ho et al. 2019 (arXiv:1902.00275), variational; Zheng et al.
2023 (arXiv:2305.03935), truncated normal; Burda et al. 2016 (arXiv:1509.00519), several samples.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

from sdediff.density import wide
from sdediff.draws import RowDraws, mix
from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.model import ScoreModel, rows_of
from sdediff.runs import evaluating, like_state
from sdediff.sde import fresh_seed
from sdediff.shapes import Codes, PerRow, State, sum_rows

INTERVAL = (-1.0, 1.0)
_RESOLVED = 16
"""Numbers of the working dtype that a bin must at least hold."""


@dataclass(frozen=True, eq=False)
class Bins:
    """Codes, and where their bins lie. Made by `Bins.of`, which refuses what does not fit.

    Attributes:
        codes: integers `(batch, *event)` in `0..levels-1`.
        levels: number of codes.
        transform: of code space, `[0, levels]` in every entry, to the space of the model.
        place: that space in words.
        model: whose space it is.
        t_min: where its path begins.
    """

    codes: Codes
    levels: int
    transform: Transform
    place: str
    model: ScoreModel
    t_min: float

    @classmethod
    def of(
        cls,
        model: ScoreModel,
        codes: Codes,
        *,
        levels: int,
        interval: tuple[float, float] = INTERVAL,
        transform: Transform | None = None,
        t_min: float | None = None,
    ) -> Bins:
        """The bins of some codes, equal ones in an interval or those of a transform.

        Raises:
            OptionError, ShapeError: something does not fit.
        """
        if not isinstance(model, ScoreModel):
            raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
        _check_codes(codes, levels)
        low, high = interval
        if transform is not None and tuple(interval) != INTERVAL:
            raise OptionError(f"transform= stands in place of interval=, but got both: leave interval {interval} away.")
        if not (low < high and math.isfinite(high - low)):
            raise OptionError(f"interval must be (low, high), finite, with low < high; got {interval}.")
        place = f"[{low:g}, {high:g}]" if transform is None else " ".join(repr(transform).split())
        map_of = AffineTransform(low, (high - low) / levels) if transform is None else transform
        bins = cls(codes.long(), levels, map_of, place, model, model.sde.t_min if t_min is None else t_min)
        bins._check_resolved()
        return bins

    @property
    def dtype(self) -> torch.dtype:
        """That of the states: the model's own, but at least float32."""
        own = like_state(self.model, None, tuple(self.codes.shape), None, None).dtype
        return torch.promote_types(own, torch.float32)

    @property
    def start(self) -> tuple[float, float]:
        """alpha and sigma at t_min."""
        alpha, sigma = self.model.linear.scales_at(torch.tensor(self.t_min, dtype=torch.float64))
        return alpha.item(), sigma.item()

    def at(self, u: Tensor) -> tuple[State, PerRow]:
        """`x = T(codes + u)` and `log |det dT / du|`, wide."""
        y = wide(self.codes) + u
        x = self.transform(y)
        log_det: Tensor = self.transform.log_abs_det_jacobian(y, x)  # type: ignore[no-untyped-call]  # torch's own has no types
        return x, sum_rows(log_det)

    def edges(self) -> tuple[State, State]:
        """The lower and upper end of every entry's bin.

        Raises:
            CapabilityError: the transform mixes entries, so that bins are no boxes.
        """
        if self.transform.domain.event_dim or self.transform.codomain.event_dim:
            raise CapabilityError(
                f"The bins have no edges, as {self.place} acts on several entries at once: use a transform that acts "
                "on every entry by itself, or dequantize='uniform'."
            )
        first, last = self.transform(wide(self.codes)), self.transform(wide(self.codes) + 1)
        return torch.minimum(first, last), torch.maximum(first, last)

    def rows(self, index: Tensor) -> Bins:
        """The bins of some rows."""
        return replace(self, codes=self.codes[index], model=self.model.rows(index, len(self.codes)))

    def _check_resolved(self) -> None:
        """Refuse bins that the states' dtype cannot tell apart."""
        if self.transform.domain.event_dim or self.transform.codomain.event_dim:
            return
        low, high = self.edges()
        around = torch.maximum(low.abs(), high.abs())
        if bool((high - low < _RESOLVED * torch.finfo(self.dtype).eps * around).any()):
            raise OptionError(
                f"{self.levels} levels in {self.place} are finer than {self.dtype} resolves: use fewer levels, or a "
                "model in float64."
            )


class Dequantizer(ABC):
    """A density q on the bins of codes, from which points can be drawn.

    A dequantiser of your own needs `draw`. Row i of what it draws must depend on the seed and i only, and `log q` must
    be the density of exactly these points: any such q gives a valid bound.

    Attributes:
        tail: "gaussian" where the points are data, "none" where they are states at t_min (see `log_prob`).
        random: whether there is anything to draw.
        bound: whether bits per dimension from it are an upper bound in expectation.
    """

    tail: ClassVar[str] = "gaussian"
    random: ClassVar[bool] = True
    bound: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """For the protocol."""
        return f"{self!r} dequantisation"

    @abstractmethod
    def draw(self, bins: Bins, seed: int, sample: int) -> tuple[State, PerRow]:
        """Points of the model's space `(batch, *event)` and their `log q(x | codes)` in nats, `(batch,)`; float64.

        Args:
            bins: the codes, and where their bins lie.
            seed, sample: of the random numbers; samples are independent.
        """


@dataclass(frozen=True)
class Uniform(Dequantizer):
    """Points uniform in the bins of code space."""

    @property
    def name(self) -> str:
        return "uniform dequantisation"

    def draw(self, bins: Bins, seed: int, sample: int) -> tuple[State, PerRow]:
        x, log_det = bins.at(torch.special.ndtr(_normals(bins, seed, sample)))
        return x, -log_det


@dataclass(frozen=True)
class Centres(Dequantizer):
    """The centres of the bins: no dequantisation.

    The density there times the size of the bin approximates P(c) from either side.
    """

    random: ClassVar[bool] = False
    bound: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "no dequantisation (the density at the bin centres times the bin width, which is not a bound)"

    def draw(self, bins: Bins, seed: int, sample: int) -> tuple[State, PerRow]:
        x, log_det = bins.at(torch.full_like(wide(bins.codes), 0.5))
        return x, -log_det


@dataclass(frozen=True)
class TruncatedNormal(Dequantizer):
    """States at t_min: the normal noise of t_min around the bin's centre, cut off at the edges of the bin.

    For a model that was trained on the centres it is what the network has seen at t_min. Of codes with few levels it
    fills a small part of a bin only, and then the bound is loose.
    """

    tail: ClassVar[str] = "none"

    @property
    def name(self) -> str:
        return "truncated normal dequantisation at t_min"

    def draw(self, bins: Bins, seed: int, sample: int) -> tuple[State, PerRow]:
        alpha, sigma = bins.start
        if not sigma > 0:
            raise OptionError(f"TruncatedNormal needs noise at t_min = {bins.t_min:g}, where sigma is 0: raise t_min.")
        low, high = bins.edges()
        centre, _ = bins.at(torch.full_like(low, 0.5))
        e_low, e_high = (torch.erf(alpha * (edge - centre) / (sigma * math.sqrt(2))) for edge in (low, high))
        v = torch.special.ndtr(_normals(bins, seed, sample))
        z = math.sqrt(2) * torch.erfinv(e_low + v * (e_high - e_low))
        log_q = -(z**2) / 2 - math.log(sigma * math.sqrt(2 * math.pi)) - ((e_high - e_low) / 2).log()
        return alpha * centre + sigma * z, sum_rows(log_q)


class Variational(Dequantizer):
    """Points `u = sigmoid(m + s l)`, l logistic, with m and s of every entry from a network of the codes.

    Args:
        network: of codes scaled to [-1, 1], `(batch, *event)` in float64, to m and log s, `(batch, 2, *event)`. None
            for a small one that `fit` makes: convolutions for events `(channels, height, width)`, a perceptron for
            others; it starts as the uniform density.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network = network

    def __repr__(self) -> str:
        return f"Variational({'' if self.network is None else type(self.network).__name__})"

    @property
    def name(self) -> str:
        return "variational dequantisation"

    def draw(self, bins: Bins, seed: int, sample: int) -> tuple[State, PerRow]:
        if self.network is None:
            raise CapabilityError(
                "This Variational has no network yet: dequantize = Variational().fit(model, codes, levels=...)."
            )
        with torch.no_grad(), evaluating(self.network):
            x, log_q = _logistic(self.network, bins, _normals(bins, seed, sample))
        return x, log_q

    def fit(
        self,
        model: ScoreModel,
        codes: Codes,
        *,
        levels: int = 256,
        interval: tuple[float, float] = INTERVAL,
        transform: Transform | None = None,
        t_min: float | None = None,
        steps: int = 1000,
        batch_size: int = 128,
        lr: float = 1e-2,
        seed: int | None = None,
        condition: Any = None,
    ) -> Variational:
        """A dequantiser fitted to the model on some codes, training data or the very ones to be scored.

        Args:
            model: whose score it follows, one network call a step.
            codes, levels, interval, transform: as in `bits_per_dim`.
            t_min: where the score is taken, if not at the SDE's own.
            steps, batch_size, lr: of Adam, with lr falling to zero along a cosine.
            seed: of the start, the batches and the draws.
            condition: of the codes, as in `log_prob`.

        Raises:
            OptionError, ShapeError: an argument does not fit.
        """
        if steps < 1 or batch_size < 1 or not lr > 0:
            raise OptionError(
                f"fit needs steps >= 1, batch_size >= 1 and lr > 0; got steps = {steps}, batch_size = {batch_size} and "
                f"lr = {lr}."
            )
        bins = Bins.of(model, codes, levels=levels, interval=interval, transform=transform, t_min=t_min)
        seed = fresh_seed() if seed is None else seed
        generator = torch.Generator().manual_seed(mix(seed, 20) >> 2)
        with torch.inference_mode(False), evaluating(model.network), torch.enable_grad():
            network = _small_network(bins, generator) if self.network is None else copy.deepcopy(self.network)
            adapt = torch.optim.Adam(network.parameters(), lr=lr)
            for k in range(steps):
                for group in adapt.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * k / steps)) / 2
                rows = torch.randperm(len(codes), generator=generator)[:batch_size].to(codes.device)
                loss = -_climbing(network, bins.rows(rows), mix(seed, 21, k), rows_of(condition, rows, len(codes)))
                adapt.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                adapt.step()
        return Variational(network.eval())


def _check_codes(codes: object, levels: object) -> None:
    if not isinstance(levels, int) or levels < 2:
        raise OptionError(f"levels must be a whole number of at least 2, such as 256; got {levels!r}.")
    if not isinstance(codes, Tensor):
        raise ShapeError(f"Codes must be a tensor of integers (batch, *event); got {type(codes).__name__}.")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool or codes.ndim < 1:
        raise ShapeError(
            "bits_per_dim needs codes that are integers of shape (batch, *event), which declare the bins; "
            f"got {codes.dtype}, {tuple(codes.shape)}."
        )
    if codes.numel() == 0:
        raise ShapeError(
            f"bits_per_dim needs at least one row with one entry; got codes of shape {tuple(codes.shape)}."
        )
    least, most = (int(code) for code in codes.long().aminmax())
    if least < 0 or most >= levels:
        raise OptionError(f"Codes must lie in 0..{levels - 1}; got {least}..{most}.")


def _normals(bins: Bins, seed: int, sample: int) -> State:
    """Standard normal numbers, shaped as the codes; made on the CPU, so that they are the same everywhere."""
    numbers = RowDraws(mix(seed, 5, sample), 0)(bins.codes.cpu().to(torch.float64))
    return numbers.to(wide(bins.codes[:0]).dtype).to(bins.codes.device)


def _logistic(network: nn.Module, bins: Bins, normals: State) -> tuple[State, PerRow]:
    """Points `T(codes + sigmoid(m + s l))` and their log-density, with gradients to the network."""
    codes = wide(bins.codes)
    output = network(2 * codes / (bins.levels - 1) - 1)
    expected = (len(codes), 2, *codes.shape[1:])
    if not isinstance(output, Tensor) or output.shape != expected:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeError(f"The network of Variational must return m and log s, {expected}; it returned {got}.")
    m, log_s = wide(output).unbind(1)
    log_v, log_rest = torch.special.log_ndtr(normals), torch.special.log_ndtr(-normals)
    y = m + log_s.exp() * (log_v - log_rest)
    inside = nn.functional.logsigmoid(y) + nn.functional.logsigmoid(-y)
    x, log_det = bins.at(torch.sigmoid(y))
    return x, sum_rows(log_v + log_rest - log_s - inside) - log_det


def _climbing(network: nn.Module, bins: Bins, seed: int, condition: Any) -> Tensor:
    """A number whose gradient is that of the mean bound per entry, one draw a row."""
    x, log_q = _logistic(network, bins, _normals(bins, seed, 0))
    alpha = bins.start[0] if bins.model.is_linear else 1.0
    with torch.no_grad():
        score = alpha * bins.model.score(bins.t_min, (alpha * x).to(bins.dtype), condition=condition)
    return (sum_rows(wide(score) * x) - log_q).mean() / math.prod(x.shape[1:])


class _Parts(nn.Module):
    """m and log s from the two halves of a network's output."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, codes: State) -> Tensor:
        flat = self.body(codes if codes.ndim == 4 else codes.reshape(len(codes), -1))
        return flat.reshape(len(codes), 2, *codes.shape[1:])


def _small_network(bins: Bins, generator: torch.Generator) -> nn.Module:
    """Convolutions or a perceptron, whose last layer is zero at the start."""
    event = tuple(bins.codes.shape[1:])
    with torch.random.fork_rng([]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if len(event) == 3:
            channels, width = event[0], 32
            layers: list[nn.Module] = [
                nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
                nn.Conv2d(width, 2 * channels, 3, padding=1),
            ]  # fmt: skip
        else:
            size, width = math.prod(event), 128
            layers = [
                nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * size),
            ]  # fmt: skip
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return _Parts(nn.Sequential(*layers)).to(bins.codes.device, wide(bins.codes[:0]).dtype)
