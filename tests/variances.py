"""Instruments of the tests of reverse variances: exact designs, a target, divergences of steps, z-scores."""

import itertools
import math

import torch

import sdediff as sd
from sdediff.variance import EntryVariance, ReverseSteps

F64 = torch.float64


def anisotropic(scale=1.0):
    """Deviations between .05 and .3 within modes, about .5 in all, as those of images in [-1, 1]."""
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.25]], dtype=F64)
    variances = torch.tensor([[0.005, 0.075], [0.075, 0.0025]], dtype=F64)
    return sd.exact.GaussianMixture([0.5, 0.5], scale * means, scale**2 * variances)


ANISOTROPIC = anisotropic()


def design(target):
    """Data and a noise source whose first and second moments are exactly those of a Gaussian target and of N(0, I)."""
    size = target.mean.numel()
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=2 * size)), dtype=F64)
    root = torch.linalg.cholesky(target.cov)
    data = target.mean + signs[:, :size] @ root.T
    return data, lambda draws: sd.Recorded(signs[:, size:].expand(draws, -1, -1))


def exact_estimate(target, sde, times, **options):
    data, noise = design(target)
    return sd.AnalyticVariance.estimate(target.model(sde), data, times, noise=noise(len(times)), **options)


def gaussian_ratio(target, at):
    """`w`, the mean over the spectrum of `alpha^2 c / (alpha^2 c + sigma^2)`."""
    signal = at.alpha[:, None] ** 2 * target.variances
    return (signal / (signal + at.sigma[:, None] ** 2)).mean(1)


def divergences(model, x, times, variance, seed):
    """Sum over the steps of `KL(q(x_s | x_t, x_0) || p(x_s | x_t))`, one noise for each, `(batch,)`."""
    steps = ReverseSteps.of(model.point(times))
    at, stream, total = steps.at, sd.RowNoise(seed).open(), torch.zeros(len(x), dtype=F64)
    if isinstance(variance, EntryVariance):
        model, spread = variance.along(model, steps)
    else:
        numbers = variance.table(steps)

        def spread(i, x):
            return numbers[i].expand(x.shape)

    for i in range(len(times) - 1):
        xt = at.alpha[i] * x + at.sigma[i] * stream.normal(x)
        off = steps.gain[i] * (x - model.denoised(times[i], xt))
        rho = steps.nu[i] ** 2 / spread(i, xt)
        total += (rho * (1 + off**2 / steps.nu[i] ** 2) - 1 - rho.log()).sum(1) / 2
    return total


def beyond(differences):
    """The mean in standard errors."""
    values = torch.as_tensor(differences, dtype=F64)
    return (values.mean() / values.std() * math.sqrt(len(values))).item()
