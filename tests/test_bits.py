"""Bits per dimension against the entropy of known codes and the exact mean log-density in a bin."""

import math

import pytest
import torch

import sdediff as sd

F64 = torch.float64


def test_bits_per_dim_of_uniform_bins_is_the_entropy_of_the_code():
    """Data uniform over the codes, dequantised, is uniform on [-1, 1]; a wide flat mixture models it, so that bits/dim
    approaches log2(levels). The bin width enters exactly: other intervals with scaled models give the same number."""
    levels = 8
    codes = torch.arange(levels).repeat(16)[:, None]
    centres = torch.linspace(-1, 1, 401, dtype=F64)[1::2, None]
    options = {"levels": levels, "dequantize": "uniform", "seed": 0, "solver": sd.TorchDiffEq()}
    flat = sd.exact.GaussianMixture(torch.ones(200), centres, torch.full((200,), 0.006**2))
    sde = sd.VP(t_min=1e-7)
    result = sd.bits_per_dim(flat.model(sde), codes, prior=flat.marginal(sde, 1.0), **options)
    assert result.value.mean().item() == pytest.approx(3, abs=0.03)
    wide = sd.exact.GaussianMixture(torch.ones(200), 2 * centres + 2, torch.full((200,), 0.012**2))
    again = sd.bits_per_dim(wide.model(sde), codes, prior=wide.marginal(sde, 1.0), interval=(0.0, 4.0), **options)
    torch.testing.assert_close(again.value, result.value, rtol=0, atol=5e-3)
    assert "8 levels" in result.protocol
    assert "uniform" in result.protocol


def test_bits_per_dim_is_the_log_density_in_bins_of_the_declared_width():
    target = sd.exact.Gaussian(torch.zeros(2, 3, dtype=F64), 0.2)
    sde = sd.VP()
    codes = torch.randint(0, 16, (6, 2, 3), generator=torch.Generator().manual_seed(0))
    result = sd.bits_per_dim(
        target.model(sde), codes, levels=16, dequantize="uniform", samples=64, seed=1, prior=target.marginal(sde, 1.0)
    )
    edges = torch.linspace(-1, 1, 17, dtype=F64)
    cell = lambda c: torch.linspace(0, 1, 201, dtype=F64) * 0.125 + edges[c][..., None]  # noqa: E731
    density = torch.distributions.Normal(0.0, 0.2**0.5).log_prob(cell(codes)).mean(-1)
    exact = -(density.sum((1, 2)) / 6 + math.log(0.125)) / math.log(2)
    assert ((result.value - exact).abs() < 5 * result.stderr + 2e-3).all()
    assert result.stderr.max() < 0.05
