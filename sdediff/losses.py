r"""Training losses: denoising score matching with named weightings, and score matching without a known target.

With `x_t = alpha x_0 + sigma eps`, every prediction kind is trained by the same regression, of the noise that it
implies on the noise that was added; only the weight of each level differs (`sdediff.weightings`), and which levels are
drawn how often (`sdediff.times`). For every w > 0 the minimum is the same, `E[eps | x_t] = -sigma score`.

`squared_noise` and `noise_residual` (`sdediff.extended`) train the variances of the Extended-Analytic-DPM.

`implicit`, `sliced` and `finite_difference` (`sdediff.score_matching`) need samples of a density only, no noise and no
target.

References: Vincent 2011; Ho et al. 2020 (arXiv:2006.11239); Song et al. 2021 (arXiv:2011.13456).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdediff.extended import noise_residual as noise_residual
from sdediff.extended import squared_noise as squared_noise
from sdediff.iddpm import hybrid as hybrid
from sdediff.model import PREDICTIONS, ScoreModel
from sdediff.score_matching import energy_difference as energy_difference
from sdediff.score_matching import finite_difference as finite_difference
from sdediff.score_matching import implicit as implicit
from sdediff.score_matching import sliced as sliced
from sdediff.shapes import PerRow, State, over, sum_rows
from sdediff.times import Law
from sdediff.weightings import WEIGHTINGS as WEIGHTINGS
from sdediff.weightings import NoiseLevels


def denoising(
    model: ScoreModel,
    x0: State,
    *,
    weighting: str = "simple",
    t: Tensor | float | None = None,
    times: Law | None = None,
    noise: State | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> PerRow:
    """Denoising score matching, one value a row, `(batch,)`; its mean is the loss.

    Args:
        model: what is trained.
        x0: clean data `(batch, *event)`.
        weighting: "simple" (or "noise"), "likelihood", "vlb", "snr", "min_snr" or "edm"; see `sdediff.weightings`.
        t: times `()` or `(batch,)`; drawn if None.
        times: the law they are drawn from, in place of the weighting's own; see `sdediff.times`. For "vlb", `Steps` of
            a grid, which counts also where t is given.
        noise: standard normal, shaped as x0; drawn if None.
        condition: passed to the network.
        generator: of t and noise, on the CPU.

    Raises:
        OptionError: unknown weighting, or times is not a law.
        CapabilityError: "vlb" with a law that has no steps.
        TimeError: the weight is infinite at a time, or the time is not in the span or not one of the law's.
    """
    levels = NoiseLevels.draw(model, x0, weighting=weighting, t=t, times=times, noise=noise, generator=generator)
    sde, clock, noise = model.linear, levels.t, levels.noise
    xt = sde.perturb(clock, x0, noise)
    at = model.point(clock)
    p, q = PREDICTIONS[model.prediction](at)
    error = model.predict(clock, xt, condition=condition) - (over(p, x0) * x0 + over(q, x0) * noise)
    # the error of the noise in that of the output; where p is 0, alpha cancels, and may be 0
    from_output = torch.where(p == 0, 1 / q, at.alpha / (at.alpha * q - at.sigma * p))
    scale = levels.weight * from_output**2
    return levels.shared(sum_rows(error**2) * (scale / math.prod(x0.shape[1:])).to(error))
