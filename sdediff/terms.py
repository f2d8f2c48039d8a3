r"""Discrete chains with any variance of the reverse kernels: samples of the parts of their bound.

The chain is a `ReverseSteps` whose last step goes to the data (`ReverseSteps.to_data`), so that the last kernel is the
decoder. For the posterior, whose variance is 0 there, it is `sigma^2 / alpha^2`. Each function returns one value for
each pair of opposite noise: `(samples, batch)` of the reconstruction, `(samples, steps, batch)` of the terms.

- `by_step`: the KL divergences of the denoising form for one variance a step, as multiples of the errors E of
  `sdediff.noised`;
- `by_entry`: the same for a variance of every entry. What normal data of the scale c would vary by with the noise has
  mean 0 and is taken off, as it is of E;
- `along_paths`: the logarithms of the consistency form along paths of the chain.

The mathematics is in `sdediff.bounds` and `sdediff.variance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdediff.decoders import Decoder
from sdediff.density import wide
from sdediff.errors import OptionError
from sdediff.model import ScoreModel
from sdediff.noised import LOG_2PI, Rows, Values, clock_at, finite_values, summed
from sdediff.priors import kl_to_prior
from sdediff.shapes import PerRow, State, over
from sdediff.variance import EntryVariance, ReverseSteps, ReverseVariance, StepVariance, entries_of, table_of


def variances_of(chain: ReverseSteps, kernels: StepVariance) -> Tensor:
    """V of every step; of that to the data, where the kernels have none (the posterior's is 0), sigma^2 / alpha^2."""
    table, flat = table_of(kernels, chain), (chain.at.sigma[-2] / chain.at.alpha[-2]) ** 2
    table = torch.cat([table[:-1], torch.where(table[-1:] == 0, flat, table[-1:])])
    if not bool((table > 0).all()):
        i = int((~(table > 0)).nonzero()[0])
        raise OptionError(
            f"A bound needs variances > 0; {kernels} has {table[i]:g} for the step that starts at "
            f"t = {chain.at.t[i]:g}."
        )
    return table


def _positive(
    kernels: EntryVariance, model: ScoreModel, chain: ReverseSteps
) -> tuple[ScoreModel, Callable[[int, State], State]]:
    model, values = entries_of(kernels, model, chain)

    def positive(i: int, z: State) -> State:
        found = values(i, z)
        wrong = found == 0
        if bool(wrong.any()):
            raise OptionError(
                f"A bound needs variances > 0; {type(kernels).__name__} has 0 for {int(wrong.sum())} of "
                f"{wrong.numel()} entries at t = {chain.at.t[i]:g}. Give its network a positive output, such as a "
                "softplus (of a NoiseResidual), or use variance='posterior' or an AnalyticVariance."
            )
        return found

    return model, positive


def by_step(
    part: Rows, chain: ReverseSteps, kernels: StepVariance, decoder: Decoder | None = None
) -> tuple[Values, Tensor]:
    """For one variance a step: multiples of the errors that `elbo` in continuous time is made of."""
    variances, grid = variances_of(chain, kernels), chain.at.t[:-1]
    reconstruction = part.reconstruction(grid[-1], variances[-1], decoder)
    ratio = (chain.nu[:-1] ** 2 / variances[:-1])[:, None]
    weights = ratio * torch.expm1(clock_at(part.task.sde, grid, part.task.scale).diff())[:, None] / 2
    spread = part.size / 2 * (ratio - 1 - ratio.log())
    errors = torch.stack([part.errors(grid[:-1]) for _ in range(part.task.samples)])
    return reconstruction, weights * errors + spread


def by_entry(
    part: Rows, chain: ReverseSteps, kernels: EntryVariance, decoder: Decoder | None = None
) -> tuple[Values, Tensor]:
    """For a variance of every entry."""
    model, variance = _positive(kernels, part.model, chain)
    times = chain.at.t[:-1]
    last, inner = len(times) - 1, range(len(times) - 1)

    def costs(i: int) -> PerRow:
        return _cost(part, chain, model, variance, i)

    if decoder is None:
        reconstruction = -torch.stack([costs(last) for _ in range(part.task.samples)])
    else:
        reconstruction = part.reconstruction(times[-1], torch.ones(()), decoder)
    terms = torch.stack([torch.stack([costs(i) for i in inner]) for _ in range(part.task.samples)])
    for values in terms:
        finite_values(values, times[:-1])
    return finite_values(reconstruction, times[-1].expand(len(reconstruction))), terms


def _cost(
    part: Rows, chain: ReverseSteps, model: ScoreModel, variance: Callable[[int, State], State], i: int
) -> PerRow:
    """The divergence of step i, or minus the log-likelihood of the data, for one draw of noise in both signs."""
    t, alpha, sigma, nu, gain = (v[i] for v in (chain.at.t, chain.at.alpha, chain.at.sigma, chain.nu, chain.gain))
    draw = part.stream.normal(part.x)
    # what normal data of the scale would vary by has mean 0 and is taken off
    uncertain = (part.task.scale * sigma) ** 2 / ((part.task.scale * alpha) ** 2 + sigma**2)
    seen = (gain * uncertain * alpha / sigma) ** 2 / (2 * (nu**2 + gain**2 * uncertain))
    value = -seen * (summed(draw**2) - part.size)
    for sign in (1, -1):
        z = over(alpha, part.x) * part.x + over(sign * sigma, part.x) * draw
        error = wide(part.x - model.combine(t, z, torch.ones_like(t), torch.zeros_like(t)))
        spread = wide(variance(i, z))
        value = value + summed((nu**2 + gain**2 * error**2) / spread + spread.log()) / 4
    return value + part.size / 2 * (LOG_2PI if i == len(chain.nu) - 1 else -1 - 2 * nu.log())


def along_paths(part: Rows, chain: ReverseSteps, kernels: ReverseVariance) -> tuple[Values, Values, Tensor]:
    """Samples of reconstruction, prior and terms in the consistency form."""
    if isinstance(kernels, EntryVariance):
        model, variance = _positive(kernels, part.model, chain)
    else:
        table = variances_of(chain, kernels)
        model, variance = part.model, lambda i, z: over(table[i], z).expand(z.shape)
    samples = []
    for _ in range(part.task.samples):
        draws = [part.stream.normal(part.x) for _ in chain.nu]
        signs = [_path(part, chain, model, variance, [sign * draw for draw in draws]) for sign in (1, -1)]
        samples.append((signs[0] + signs[1]) / 2)
    values = torch.stack(samples)
    for sample in values:
        finite_values(sample[:-1], chain.at.t[:-1])
    return -values[:, -2], values[:, -1], values[:, :-2]


def _path(
    part: Rows,
    chain: ReverseSteps,
    model: ScoreModel,
    variance: Callable[[int, State], State],
    draws: list[State],
) -> Values:
    """Along one path: the divergences, minus the log-likelihood of the data, and the prior's, `(n + 2, batch)`."""
    at, x = chain.at, part.x
    scale, std = at.alpha[:-1] / at.alpha[1:], at.sigma[:-1] * chain.fresh.sqrt()
    later, path = [x], x
    for i in reversed(range(len(draws))):
        path = over(scale[i], x) * path + over(std[i], x) * draws[i]
        later.append(path)
    states = later[::-1]  # at the times of the chain, and x
    costs = []
    for i in range(len(draws)):
        mean = model.combine(at.t[i], states[i], at.alpha[i + 1], chain.kept[i])
        spread = wide(variance(i, states[i]))
        cost = summed(wide(states[i + 1] - mean) ** 2 / spread + spread.log()) / 2  # -log p, without 2 pi
        if i == len(draws) - 1:
            costs.append(cost + part.size / 2 * LOG_2PI)
        else:
            costs.append(cost - summed(draws[i + 1] ** 2) / 2 - part.size * std[i + 1].log())
    costs.append(kl_to_prior(part.prior, scale[0] * states[1].double().cpu(), std[0].item()))
    return torch.stack(costs)
