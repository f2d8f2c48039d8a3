r"""Linear Gaussian chains, and a diffusion model as the way back down one.

A chain `z_t | z_(t-1) ~ N(a_t z_(t-1), s_t^2 I)` that starts at `z_0 = x` is a forward process seen at some times.
With `A_t = a_t A_(t-1)` and `V_t = a_t^2 V_(t-1) + s_t^2`, the marginals are `z_t | x ~ N(A_t x, V_t I)`, and by Bayes'
rule

    z_t | z_(t+1), x ~ N((a_(t+1) V_t z_(t+1) + A_t s_(t+1)^2 x) / V_(t+1),  V_t s_(t+1)^2 / V_(t+1) I).

A diffusion model goes down the chain by that posterior with its denoised state in place of x, and ends, above the
first noise level, with the denoised state and the noise's own uncertainty. As x enters the posterior linearly and the
two have one std,

    KL(q(z_s | z_t, x) || p(z_s | z_t)) = 1/2 (snr_s - snr_t) |x - xhat(z_t)|^2.

References: Sohl-Dickstein et al. 2015 (arXiv:1503.03585); Ho et al. 2020 (arXiv:2006.11239); Kingma et al. 2021
(arXiv:2107.00630).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sdediff.errors import OptionError
from sdediff.gaussians import DiagonalGaussian
from sdediff.model import ScoreModel
from sdediff.shapes import State, as_time, over


class LinearGaussian(nn.Module):
    """The fixed conditional `z -> N(scale z, std^2 I)`: a transition of a linear SDE.

    Raises:
        OptionError: a std that is not positive, or a scale that is not finite.
    """

    def __init__(self, scale: float, std: float) -> None:
        super().__init__()
        if not (0 < std < math.inf and math.isfinite(scale)):
            raise OptionError(f"LinearGaussian needs a finite scale and a positive std; got {scale} and {std}.")
        self.scale, self.std = float(scale), float(std)

    def forward(self, z: State) -> tuple[State, State]:
        """`(mean, std)`, shaped as z."""
        return self.scale * z, torch.full_like(z, self.std)


def posteriors(steps: Sequence[tuple[float, float]], x: State, states: Sequence[State]) -> list[DiagonalGaussian]:
    """q(z_t | z_(t+1), x) for t < T, and q(z_T | x), of the chain with these `(a_t, s_t)`.

    Args:
        steps: `(scale, std)` of every transition, T of them.
        x: data `(batch, *event)`.
        states: z_1 to z_T, shaped as x.
    """
    scale, variance = 1.0, 0.0
    between: list[DiagonalGaussian] = []
    for k, (a, s) in enumerate(steps):
        ahead = a**2 * variance + s**2
        if k:
            mean = a * variance / ahead * states[k] + scale * s**2 / ahead * x
            between.append(DiagonalGaussian(mean, torch.full_like(x, s * math.sqrt(variance / ahead))))
        scale, variance = a * scale, ahead
    return [*between, DiagonalGaussian(scale * x, torch.full_like(x, math.sqrt(variance)))]


class Denoiser(nn.Module):
    """p(x | z_1) of a diffusion model: the denoised state, as uncertain as the noise of z_1 / alpha."""

    def __init__(self, model: ScoreModel, t: float) -> None:
        super().__init__()
        self.model, self.t = model, t
        self.network = model.network if isinstance(model.network, nn.Module) else None
        alpha, sigma = model.linear.scales_at(as_time(t))
        self.std = (sigma / alpha).item()

    def forward(self, z: State) -> tuple[State, State]:
        return self.model.denoised(self.t, z), torch.full_like(z, self.std)


class DenoisedPosterior(nn.Module):
    """p(z_s | z_t) of a diffusion model: the posterior of the forward process, the denoised state in place of x."""

    def __init__(self, model: ScoreModel, s: float, t: float) -> None:
        super().__init__()
        self.model, self.s, self.t = model, s, t
        self.network = model.network if isinstance(model.network, nn.Module) else None

    def forward(self, z: State) -> tuple[State, State]:
        mean, std = self.model.linear.posterior(self.s, self.t, self.model.denoised(self.t, z), z)
        return mean, over(std, z).expand_as(z)
