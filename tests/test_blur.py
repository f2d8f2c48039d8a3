"""Functions of matrices by whole Jacobians and by Krylov spaces, against closed forms."""

import math

import pytest
import torch

from sdediff.blur import _log_slope, by_jacobian, by_probes

F64 = torch.float64


def test_spaces_end_row_by_row():
    """The first row is a multiple of the identity, whose spaces have one dimension; signs are exact for diagonals."""
    K = torch.tensor([[0.5] * 6, [0.1, 0.2, 0.3, 0.5, 0.7, 0.9], [0.4, 0.4, 0.4, 0.8, 0.8, 0.8]], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, 3, 6, dtype=F64, generator=generator).sign()
    g, square = torch.randn(3, 6, dtype=F64, generator=generator), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    move, blur = by_probes(lambda v: K * v, probes, g, square)
    torch.testing.assert_close(blur.log_dets, (-K.log().sum(1) / 2).expand(2, 3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(move, -square[:, None] * g / (K.sqrt() + K), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(blur.score, g / K, rtol=1e-9, atol=1e-9)
    whole, other = by_jacobian(torch.diag_embed(K), g, square)
    torch.testing.assert_close(whole, move, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.gap, blur.gap, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("part", [0.0, 1e-9, -1e-5, 4e-4, -9e-4, 1.1e-3, 0.5])
def test_the_divided_difference_of_the_logarithm(part):
    a, b = torch.tensor(0.7 * (1 + part), dtype=F64), torch.tensor(0.7, dtype=F64)
    exact = 1 / 0.7 if part == 0 else math.log1p(part) / (0.7 * part)
    assert _log_slope(a, b).item() == pytest.approx(exact, rel=1e-11)
