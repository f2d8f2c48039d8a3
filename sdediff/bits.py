r"""Bits per dimension: the likelihood of discrete data under a model with a density.

Of integer codes `0..levels-1`, a code c fills the bin `[low + w c, low + w (c + 1)]`, `w = (high - low) / levels`, of
the space in which the model was trained. With u uniform on (0, 1), by Jensen's inequality,

    E_u[log p(low + w (c + u))] + D log w <= log P(c),

so that the mean code length in bits, divided by the number D of entries, is bounded from above. The bins are declared,
never guessed: a density by itself has no bits per dimension.

Reference: Theis et al. 2016 (arXiv:1511.01844).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sdediff.draws import RowDraws, mix
from sdediff.errors import OptionError, ShapeError
from sdediff.likelihood import log_prob
from sdediff.model import ScoreModel
from sdediff.runs import like_state
from sdediff.sde import fresh_seed
from sdediff.shapes import Codes, PerRow


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """Bits per dimension of discrete data.

    Attributes:
        value: `(batch,)`; its expectation over the dequantisation is an upper bound on the model's true code length.
        stderr: standard error over the dequantisation samples and probes, `(batch,)`.
        nfe: network evaluations for every row.
        protocol: the dequantisation and the solver settings, in words.
    """

    value: PerRow
    stderr: PerRow
    nfe: int
    protocol: str


def bits_per_dim(
    model: ScoreModel,
    x: Codes,
    *,
    levels: int = 256,
    dequantize: str = "uniform",
    samples: int = 1,
    interval: tuple[float, float] = (-1.0, 1.0),
    seed: int | None = None,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of data with integer codes `0..levels-1`, by dequantisation.

    Args:
        x: integer codes `(batch, *event)`; a density has bits per dimension only through its bins, so states of
            floating-point dtype are refused.
        levels: number of codes, 256 for 8-bit images.
        dequantize: "uniform".
        samples: draws of u for each row.
        interval: `(low, high)` of the model's space.
        options: passed to `log_prob`.

    Raises:
        OptionError: unknown dequantize, codes out of range.
        ShapeError: x is not of integers.
    """
    if dequantize != "uniform":
        raise OptionError(f"Unknown dequantize {dequantize!r}: write 'uniform'.")
    if x.is_floating_point() or x.ndim < 1:
        raise ShapeError(
            "bits_per_dim needs codes that are integers of shape (batch, *event), which declare the bins; "
            f"got {x.dtype}, {tuple(x.shape)}."
        )
    if x.min() < 0 or x.max() >= levels:
        raise OptionError(f"Codes must lie in 0..{levels - 1}; got {x.min().item()}..{x.max().item()}.")
    low, high = interval
    if samples < 1 or not low < high:
        raise OptionError(
            f"bits_per_dim needs samples >= 1 and an interval (low, high) with low < high; got samples = {samples} and "
            f"interval = {interval}."
        )
    width = (high - low) / levels
    seed = fresh_seed() if seed is None else seed
    size = math.prod(x.shape[1:])
    rows, nfe, probes_var = [], 0, []
    dtype = like_state(model, None, tuple(x.shape), None, None).dtype
    for k in range(samples):
        u = torch.special.ndtr(RowDraws(mix(seed, 5, k), 0)(x.to(torch.float64)))
        result = log_prob(model, (low + width * (x + u)).to(dtype), seed=mix(seed, 6, k) >> 2, **options)
        rows.append(-(result.value.double() / size + math.log(width)) / math.log(2))
        probes_var.append((result.stderr.double() / size / math.log(2)) ** 2)
        nfe += result.nfe
    value = torch.stack(rows)
    spread = value.var(0) / samples if samples > 1 else torch.stack(probes_var).mean(0)
    return BitsPerDim(
        value=value.mean(0).to(dtype),
        stderr=spread.sqrt().to(dtype),
        nfe=nfe,
        protocol=f"{levels} levels in [{low:g}, {high:g}], {dequantize} dequantisation, {samples} sample(s); "
        + ", ".join(f"{name} {setting}" for name, setting in result.settings.items() if name != "seed"),
    )
