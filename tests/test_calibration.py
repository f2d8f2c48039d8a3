import math
import pickle

import numpy as np
import pytest
import torch
from helpers import NAMED, name
from tqdm import tqdm

import sdediff as sd
from sdediff.calibration import _search

F64 = torch.float64
ANGLES = 2 * math.pi * torch.arange(8, dtype=F64) / 8
RING = sd.exact.GaussianMixture(
    torch.tensor([1.0, 3.0, 1.5, 2.0, 1.0, 2.5, 1.2, 2.8]),
    torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1),
    torch.tensor([0.05, 0.18, 0.08, 0.3, 0.06, 0.23, 0.14, 0.11]) ** 2,
)
SDE = sd.VP(t_min=1e-3)
MODEL = RING.model(SDE)


def run(x, solver, n):
    return sd.sample(MODEL, x.shape, x_init=x, solver=solver, steps=n, seed=0, final="none").x


def rms(e):
    return e.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def found():
    return sd.calibrate(MODEL, (64, 2), (8, 20))


def test_the_deviation_is_that_of_the_data(found):
    assert found.sigma_data == pytest.approx((RING.cov.trace() / 2).sqrt().item(), rel=0.1)
    assert sd.Exponential(calibration=found)._deviation(MODEL) == found.sigma_data
    assert sd.Exponential(calibration=found, sigma_data=0.2)._deviation(MODEL) == 0.2


def test_errors_of_the_pilot_are_what_they_say(found):
    """Before and after, of the pilot's own rows, against their fine solution."""
    x = SDE.sigma(1.0) * sd.RowNoise(0).open().normal(torch.zeros(64, 2, dtype=F64))
    truth = run(x, sd.Exponential(4), 200)
    assert found.sigma_data == pytest.approx((truth - truth.mean(0)).square().mean().sqrt().item(), rel=1e-9)
    for n, fit in found.fits.items():
        assert fit.error == pytest.approx(rms(run(x, sd.Exponential(calibration=found), n) - truth), rel=1e-6)
        plain = sd.Exponential(sigma_data=found.sigma_data)
        times = sd.Exponential().grid(MODEL, n)
        before = sd.sample(MODEL, x.shape, x_init=x, solver=plain, times=times, final="none").x
        assert fit.error_before == pytest.approx(rms(before - truth), rel=1e-6)
        assert fit.error < fit.error_before / 2


def test_rows_that_were_held_out_gain_too(found):
    x = RING.marginal(SDE, 1.0).sample(200, seed=9)
    truth = run(x, sd.Exponential(4), 200)
    for n in (8, 20):
        default, tuned = (run(x, solver, n) - truth for solver in (sd.Exponential(), sd.Exponential(calibration=found)))
        assert rms(tuned) < 0.8 * rms(default)  # ruled by a few rows between two modes
        rows = [e.square().mean(1).sqrt().median() for e in (tuned, default)]
        assert rows[0] < rows[1] / 2


def test_calls_are_counted():
    calls = []
    model = sd.ScoreModel(lambda x, t: calls.append(len(x)) or MODEL.network(x, t), SDE, "v")
    found = sd.calibrate(model, (4, 2), [3, 5], trials=2)
    assert found.nfe == len(calls)
    assert 200 < found.nfe <= 200 + (2 + 4) * (3 + 5)
    assert set(calls) == {4}
    calls.clear()
    assert sd.calibrate(model, (4, 2), [3, 5], trials=2, batch_size=3).nfe == found.nfe
    assert set(calls) == {3, 1}


def test_a_number_of_steps_that_was_not_asked_for_takes_the_nearest_in_ratio(found):
    nearest = {1: 8, 8: 8, 12: 8, 13: 20, 20: 20, 500: 20}
    solver = sd.Exponential(calibration=found)
    for n, known in nearest.items():
        assert found.order(n) == solver.order_for(n) == found.fits[known].order
        times = solver.grid(MODEL, n)
        assert torch.equal(times, found.grid(MODEL, n))
        assert len(times) == n + 1
        assert (times[0], times[-1]) == (1.0, 1e-3)
        assert (times.diff() < 0).all()
    shape = torch.tensor(found.fits[20].shape)
    assert len(shape) == 7
    assert shape.any()
    assert sd.Exponential(2, calibration=found).order_for(20) == 2
    assert sd.Exponential(calibration=found, noise_level=0.5).order_for(20) == 2


@pytest.mark.parametrize("sde", [*NAMED, sd.RectifiedFlow(t_max=1.0)], ids=name)
def test_the_density_of_steps_is_the_tapered_one_times_the_shape(sde):
    """A shape that is e on the noisy half and 1 / e on the clean: the steps' sizes are in that ratio."""
    low, high = max(sde.t_min, 1e-3 * sde.t_max), 0.999 * sde.t_max
    span = tuple((-sde.log_snr(torch.tensor([high, low], dtype=F64)) / 2).tolist())
    flat, up = (
        sd.Calibration(0.7, span, {30: sd.calibration.Fit(3, shape, 0.0, 0.0)}, 0)
        for shape in ((0.3,) * 7, (-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0))
    )
    n = 30
    plain = sd.grids.tapered(sde, n, sigma_data=0.7, t_min=low)
    model = RING.model(sde)
    times = flat.grid(model, n, low)
    torch.testing.assert_close(times[1:-1], plain[1:-1], rtol=2e-3, atol=1e-4 * sde.t_max)
    fine = up.grid(model, 40 * n, low)
    inside = (fine < high) & (fine > low)
    log_s = -sde.log_snr(fine[inside]) / 2
    default = -sde.log_snr(sd.grids.tapered(sde, 40 * n, sigma_data=0.7, t_min=low)[1:-1]) / 2

    def density(levels, share):  # steps per unit around a place in the span
        place = span[1] + share * (span[0] - span[1])
        return ((levels - place).abs() < 0.05 * (span[0] - span[1])).sum()

    ratio = lambda levels: (density(levels, 0.85) / density(levels, 0.15)).item()  # noqa: E731
    assert ratio(log_s) / ratio(default) == pytest.approx(math.e**2, rel=0.25)


def test_it_is_determined_by_its_seed():
    one, same, other = (sd.calibrate(MODEL, (8, 2), 5, trials=6, seed=seed) for seed in (3, 3, 4))
    assert one.fits == same.fits
    assert one.sigma_data == same.sigma_data
    assert one.fits != other.fits
    x = RING.marginal(SDE, 1.0).sample(8, seed=0)
    given = sd.calibrate(MODEL, (8, 2), 5, trials=0, x_init=x)
    truth = run(x, sd.Exponential(4), 200)
    assert given.sigma_data == pytest.approx((truth - truth.mean(0)).square().mean().sqrt().item())
    assert given.fits[5].shape == (0.0,) * 7


def test_it_ends_where_it_is_told_and_works_from_pure_noise_to_clean_data():
    flow = sd.RectifiedFlow(t_max=1.0)
    found = sd.calibrate(RING.model(flow), (16, 2), 8, trials=6, t_min=0.0)
    assert found.fits[8].error < found.fits[8].error_before
    assert all(math.isfinite(end) for end in found.span)
    times = sd.Exponential(calibration=found).grid(RING.model(flow), 8, 0.0)
    assert (times[0], times[-1]) == (1, 0)


def test_a_calibration_can_be_kept(found):
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert torch.equal(again.grid(MODEL, 8), found.grid(MODEL, 8))
    solver = sd.Exponential(calibration=found)
    hash(solver)
    x = RING.marginal(SDE, 1.0).sample(3, seed=1)
    assert torch.equal(run(x, solver, 8), run(x, sd.Exponential(calibration=again), 8))


def test_the_search_keeps_the_best_and_both_measures_count():
    """On a bowl: found by steps that only ever go down; a candidate that is not finite is passed over."""
    seen = []

    def errors(order, shape):
        value = np.exp(np.square(shape - 1).sum() + abs(order - 4))
        seen.append((value, order, shape))
        return (value, 1.0) if len(seen) != 9 else (math.inf, math.inf)

    with tqdm(disable=True) as bar:
        order, shape, error = _search(errors, 3, 300, np.random.default_rng(0), bar)
    best = min(value for k, (value, _, _) in enumerate(seen, start=1) if k != 9)
    assert error == best
    assert order == 4
    assert np.abs(shape - 1).max() < 0.4
    assert {order for _, order, _ in seen} == {2, 3, 4}
    for trade in (lambda o, s: (1.0, float(np.exp(s.sum()))), lambda o, s: (float(np.exp(s.sum())), 1.0)):
        with tqdm(disable=True) as bar:
            assert _search(trade, 2, 50, np.random.default_rng(0), bar)[1].sum() < -2


def test_grids_on_which_a_solve_diverges_are_passed_over(monkeypatch):
    calls = []

    def sample(*args, **options):
        calls.append(None)
        if len(calls) % 3 == 0:
            raise sd.DivergenceError("The state", "None.", step=0, time=0.0, rows=[0])
        return sd.sample(*args, **options)

    monkeypatch.setattr("sdediff.calibration.sample", sample)
    fit = sd.calibrate(MODEL, (4, 2), 5, trials=6).fits[5]
    assert 0 < fit.error < math.inf
    assert len(calls) > 10


def test_options_are_checked():
    for steps, trials in ((0, 1), ([], 1), ([4, 2.5], 1), (4, -1)):
        with pytest.raises(sd.OptionError, match="calibrate needs steps >= 1 and trials >= 0"):
            sd.calibrate(MODEL, (2, 2), steps, trials=trials)
    broken = sd.ScoreModel(lambda x, t: x * math.nan, SDE)
    with pytest.raises(sd.DivergenceError):
        sd.calibrate(broken, (2, 2), 3)
