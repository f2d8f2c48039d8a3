r"""Bits per dimension: the code length of discrete data under a model with a density.

Integer codes c have bins in the space of the model, and the model gives them the probability `P(c) = int_bin p(x) dx`.
From k points `x_i` of a dequantiser with density `q(x | c)` on the bins (see `sdediff.dequantize`),

    L_k = log (1/k) sum_i w_i,    w_i = p(x_i) / q(x_i | c),    E[L_1] <= E[L_2] <= ... <= log P(c),

and the bits per dimension of D entries are `-L_k / (D log 2)`: in expectation an upper bound, which falls to
`-log2 P(c) / D` as k grows. Samples cost what they say: k likelihoods. The bins are declared, never guessed: a density
by itself has no bits per dimension.

The standard error is that of the mean of `w_i` by the delta method: `sd(w) / (mean(w) sqrt k)` nats. It includes the
probes of the divergence, which are fresh for every sample. Noise of variance `s_i^2` in `log p(x_i)` makes the mean of
`w_i` too large on average, by `s_i^2 / 2` nats if it is normal; for one sample it does not. `probe_bias` says how much.

References: Theis et al. 2016 (arXiv:1511.01844); Burda et al. 2016 (arXiv:1509.00519), importance weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from sdediff.density import wide
from sdediff.dequantize import INTERVAL, Bins, Centres, Dequantizer, TruncatedNormal, Uniform, Variational
from sdediff.draws import mix
from sdediff.errors import OptionError, ShapeError
from sdediff.likelihood import log_prob
from sdediff.model import ScoreModel
from sdediff.sde import fresh_seed
from sdediff.shapes import Codes, PerRow, State


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """Bits per dimension of discrete data. Numbers are float64 where the device has it.

    Attributes:
        value: `(batch,)`; its expectation over the dequantisation is an upper bound on the model's true code length
            (unless the protocol says that it is none).
        stderr: standard error over the dequantisation samples and probes, `(batch,)`. NaN for a single sample, whose
            spread nothing tells; `mean_stderr` needs no more than one.
        probe_bias: what noise of the probes takes off the value in expectation, at most, `(batch,)`: 0 for exact
            divergences and for a single sample.
        log_weights: `log p(x_i) - log q(x_i | codes)` in nats, `(samples, batch)`.
        error, prior_gap, tail_gap: those of `LogProb` in nats, at the first sample, `(batch,)`.
        entries: the number D of entries in a row.
        nfe: network evaluations for every row, of all samples.
        protocol: the bins, the dequantisation and the settings of the likelihood, in words.
    """

    value: PerRow
    stderr: PerRow
    probe_bias: PerRow
    log_weights: Tensor
    error: PerRow
    prior_gap: PerRow
    tail_gap: PerRow
    entries: int
    nfe: int
    protocol: str

    @property
    def nats(self) -> PerRow:
        """`log P(codes)` in nats, of which it is a lower bound in expectation, `(batch,)`."""
        return -self.value * self.entries * math.log(2)

    @property
    def mean(self) -> float:
        """Bits per dimension of the rows together."""
        return self.value.mean().item()

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` over the rows, if they are independent draws; NaN for a single row."""
        return self.value.std().item() / math.sqrt(len(self.value)) if len(self.value) > 1 else math.nan


def bits_per_dim(
    model: ScoreModel,
    x: Codes,
    *,
    levels: int = 256,
    dequantize: str | Dequantizer | None = "uniform",
    samples: int = 1,
    interval: tuple[float, float] = INTERVAL,
    transform: Transform | None = None,
    seed: int | None = None,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of data with integer codes `0..levels-1`, by dequantisation.

    Args:
        x: integer codes `(batch, *event)`; a density has bits per dimension only through its bins, so states of
            floating-point dtype are refused.
        levels: number of codes, 256 for 8-bit images.
        dequantize: "uniform", "truncated_normal", "variational" (which fits one on these very codes: any q is a bound),
            or a `Dequantizer`. None takes the density at the bin centres instead, which is not a bound.
        samples: points in the bin of each row; the bound is the tighter the more there are.
        interval: `(low, high)` of the model's space, cut into `levels` bins.
        transform: of code space, `[0, levels]` in every entry, to the model's space, in place of `interval`: one of
            `torch.distributions`, such as an AffineTransform with a logit behind it.
        seed: of the points and the probes; row i depends on it and on i only.
        options: passed to `log_prob`.

    Raises:
        CapabilityError: the dequantiser needs edges of bins, or alpha and sigma, and there are none.
        OptionError: unknown dequantize, codes out of range.
        ShapeError: x is not of integers.
    """
    if "differentiable" in options:
        raise OptionError("bits_per_dim has no gradients: leave differentiable away, or write log_prob(...).")
    seed = fresh_seed() if seed is None else seed
    bins = Bins.of(model, x, levels=levels, interval=interval, transform=transform, t_min=_first_time(options))
    chosen, remark = _dequantizer(dequantize, bins, seed, options)
    if not isinstance(samples, int) or samples < 1 or (samples > 1 and not chosen.random):
        needed = "samples >= 1" if chosen.random else "samples = 1 without dequantisation, as nothing is drawn"
        raise OptionError(f"bits_per_dim needs {needed}; got samples = {samples}.")
    options = {**options, "tail": _tail(chosen, model, options)}
    rows, noise, results, nfe = [], [], [], 0
    for k in range(samples):
        points, log_q = _checked(chosen.draw(bins, seed, k), bins, chosen)
        result = log_prob(model, points.to(bins.dtype), seed=mix(seed, 6, k) >> 2, **options)
        rows.append(result.value.detach() - log_q)
        noise.append(result.stderr)
        results.append(result)
        nfe += result.nfe
    value, stderr, bias = _combined(torch.stack(rows), torch.stack(noise), chosen.random)
    size = math.prod(x.shape[1:])
    unit = size * math.log(2)
    first = results[0]
    settings = {name: setting for name, setting in first.settings.items() if name not in ("seed", "transform")}
    said = ", ".join(f"{name} {setting}" for name, setting in settings.items())
    uncorrected = int(first.tail_gap.isinf().sum())
    if uncorrected:
        said += f", the blur of t_min left in {uncorrected} of {len(x)} rows, which no smooth density explains"
    return BitsPerDim(
        value=-value / unit,
        stderr=stderr / unit,
        probe_bias=bias / unit,
        log_weights=torch.stack(rows),
        error=first.error,
        prior_gap=first.prior_gap,
        tail_gap=first.tail_gap,
        entries=size,
        nfe=nfe,
        protocol=f"{levels} levels in {bins.place}, {chosen.name}{remark}, {samples} sample(s); {said}",
    )


def _first_time(options: dict[str, Any]) -> float | None:
    times = options.get("times")
    return options.get("t_min") if times is None or len(times) == 0 else float(times[0])


def _dequantizer(
    dequantize: str | Dequantizer | None, bins: Bins, seed: int, options: dict[str, Any]
) -> tuple[Dequantizer, str]:
    """The dequantiser, and what the protocol says beside its name."""
    if isinstance(dequantize, Dequantizer):
        return dequantize, "" if dequantize.bound or isinstance(dequantize, Centres) else " (not a bound)"
    if dequantize is None:
        return Centres(), ""
    if dequantize == "uniform":
        return Uniform(), ""
    if dequantize == "truncated_normal":
        return TruncatedNormal(), ""
    if dequantize == "variational":
        fitted = Variational().fit(
            bins.model, bins.codes, levels=bins.levels, transform=bins.transform, t_min=bins.t_min,
            seed=mix(seed, 7) >> 2, condition=options.get("condition"),
        )  # fmt: skip
        return fitted, " fitted on these codes"
    raise OptionError(
        f"Unknown dequantize {dequantize!r}: write 'uniform', 'truncated_normal', 'variational', a Dequantizer, or "
        "None for the density at the bin centres."
    )


def _tail(chosen: Dequantizer, model: ScoreModel, options: dict[str, Any]) -> str | None:
    """How log_prob is to take the points; the caller may have data taken for states, but not states for data."""
    given: str | None = options.get("tail")
    if chosen.tail == "none":
        if given not in (None, "none"):
            raise OptionError(f"The points of {chosen!r} are states at t_min: leave tail {given!r} away.")
        return "none"
    return given


def _checked(drawn: tuple[State, PerRow], bins: Bins, chosen: Dequantizer) -> tuple[State, PerRow]:
    points, log_q = drawn
    if len(points) != len(bins.codes) or log_q.shape != points.shape[:1]:
        raise ShapeError(
            f"{chosen!r} must draw one point a row, with log q of shape ({len(bins.codes)},); it drew "
            f"{tuple(points.shape)} and {tuple(log_q.shape)}."
        )
    return points, wide(log_q)


def _combined(log_weights: Tensor, noise: Tensor, random: bool) -> tuple[PerRow, PerRow, PerRow]:
    """`L_k`, its standard error, and how much of it the noise of the probes may have made, in nats."""
    count = len(log_weights)
    value = log_weights.logsumexp(0) - math.log(count)
    if count == 1:
        return value, torch.full_like(value, math.nan) if random else noise[0], torch.zeros_like(value)
    relative = (log_weights - value).exp()
    return value, relative.std(0) / math.sqrt(count), (relative * noise**2).mean(0) / 2
