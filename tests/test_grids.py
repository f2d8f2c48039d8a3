import pytest
import torch
from helpers import NAMED, name
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.testing import linear_sdes, time_grids

F64 = torch.float64
GRIDS = [sd.grids.uniform, sd.grids.quadratic, sd.grids.log_snr, sd.grids.karras, sd.grids.tapered, sd.grids.natural]


@given(linear_sdes(), st.integers(1, 60), st.sampled_from(GRIDS))
def test_every_grid_has_exact_ends_and_falls(sde, n, grid):
    times = grid(sde, n)
    assert times.dtype == F64
    assert times.shape == (n + 1,)
    assert (times[0], times[-1]) == (sde.t_max, sde.t_min)
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_each_grid_is_even_in_its_own_variable(sde):
    low = max(sde.t_min, 1e-3 * sde.t_max)
    for grid, of_t in (
        (sd.grids.uniform, lambda t: t),
        (sd.grids.quadratic, torch.sqrt),
        (sd.grids.log_snr, sde.log_snr),
        (sd.grids.natural, sde.log_snr),
        (sd.grids.karras, lambda t: (sde.sigma(t) / sde.alpha(t)) ** (1 / 7)),
    ):
        gaps = of_t(grid(sde, 9, t_min=low)).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-6, atol=1e-12)


def tapered_clock(sde, t, sigma_data):
    level = torch.log(sde.sigma(t) / (sde.alpha(t) * sigma_data)) - 1.35
    return 0.55 * level - 0.45 * (level**2 + 0.81).sqrt()


@given(linear_sdes(), st.integers(2, 40), st.floats(0.05, 20.0), st.floats(0.0, 0.3))
def test_tapered_is_even_in_its_stated_clock(sde, n, sigma_data, share):
    end = sde.t_min + share * (sde.t_max - sde.t_min)
    times = sd.grids.tapered(sde, n, sigma_data=sigma_data, t_min=end)
    assert (times[0], times[-1]) == (sde.t_max, end)
    gaps = tapered_clock(sde, times, sigma_data).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(n), rtol=1e-5, atol=1e-7)


def test_tapered_is_even_in_log_snr_below_its_knee_and_sparse_above():
    sde = sd.EDM(sigma_min=1e-4, sigma_max=1e5)
    levels = -sde.log_snr(sd.grids.tapered(sde, 400, sigma_data=3.0)) / 2
    gaps, middles = -levels.diff(), (levels[1:] + levels[:-1]) / 2
    knee = 1.35 + torch.tensor(3.0).log()
    below, above = gaps[middles < knee - 6], gaps[middles > knee + 6]
    torch.testing.assert_close(below, below.mean().expand(len(below)), rtol=1e-2, atol=0)
    assert (above.mean() / below.mean()).item() == pytest.approx(10, rel=0.05)
    moved = sd.grids.tapered(
        sd.EDM(sigma_min=2e-4, sigma_max=2e5), 400, sigma_data=6.0
    )  # data twice as large: the same, twice as large
    torch.testing.assert_close(moved, 2 * sd.grids.tapered(sde, 400, sigma_data=3.0), rtol=1e-9, atol=0)


def test_karras_is_the_published_formula():
    sde, n, rho = sd.EDM(), 12, 5.0
    i = torch.arange(n + 1, dtype=F64) / n
    low, high = 0.002 ** (1 / rho), 80 ** (1 / rho)
    torch.testing.assert_close(sd.grids.karras(sde, n, rho), (high + i * (low - high)) ** rho, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", [sd.RectifiedFlow(t_max=1.0), sd.CosineVP(t_max=1.0)], ids=name)
@pytest.mark.parametrize("grid", GRIDS)
def test_infinite_ends_are_stepped_to(grid, sde):
    assert sde.alpha(1.0) == sde.sigma(0.0) == 0
    times = grid(sde, 8, t_min=0.0)
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()
    assert sde.log_snr(times[1]) > -20
    assert sde.log_snr(times[-2]) < 20


def test_a_general_sde_has_the_uniform_grid():
    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 1.0

    torch.testing.assert_close(sd.grids.natural(Cubic(), 5), sd.grids.uniform(Cubic(), 5))


@given(time_grids())
def test_drawn_grids_fall_from_end_to_end(times):
    assert (times.diff() < 0).all()
    assert (times[0], times[-1]) == (1.0, 1e-5)


def test_bad_grids_are_refused():
    for n in (0, -3, 2.5, True):
        with pytest.raises(sd.OptionError, match="whole number of steps"):
            sd.grids.uniform(sd.VP(), n)
    with pytest.raises(sd.TimeError, match="t_min"):
        sd.grids.uniform(sd.VP(), 3, t_min=1.0)
    with pytest.raises(sd.OptionError, match="tapered needs sigma_data > 0"):
        sd.grids.tapered(sd.VP(), 3, sigma_data=0.0)
    with pytest.raises(sd.OptionError, match="rho"):
        sd.grids.karras(sd.VP(), 3, rho=0.0)
