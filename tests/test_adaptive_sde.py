import numpy as np
import pytest
import torch
from helpers import NAMED, name

import sdediff as sd
from sdediff import adaptive_sde
from sdediff.adaptive_sde import AdaptiveStochastic
from sdediff.embedded import norm
from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.exponential import Points, Split
from sdediff.solvers import Tally

F64 = torch.float64
VP = sd.VP(t_min=1e-3)
ANGLES = torch.arange(8, dtype=F64) * torch.pi / 4
RING = sd.exact.GaussianMixture(
    torch.linspace(1, 2, 8), torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.linspace(0.05, 0.3, 8) ** 2
)


def solve(model, solver, rows=64, size=2, **options):
    options = {"seed": 0, "final": "none", "dtype": F64} | options
    return sd.sample(model, (rows, size), solver=solver, **options)


@pytest.fixture
def at_random(monkeypatch):
    """Rejections and steps drawn at random for every row; what was accepted is recorded."""
    generator, taken = np.random.default_rng(0), []

    def adapt(self, rows, length, error, good):
        longer = np.maximum(length * 10 ** generator.uniform(-1, 1, len(rows)), 0.1)
        self.step[rows] = np.where(good, longer, length / 2)

    turn = adaptive_sde._Rows._turn

    def recorded(self, rows):
        if len(rows):
            taken.append((rows, self.level[rows].copy(), self.place[rows].copy(), self.unit[torch.from_numpy(rows)]))
        turn(self, rows)

    monkeypatch.setattr(adaptive_sde, "norm", lambda e: 10 ** generator.uniform(-1.2, 0.3, len(e)))
    monkeypatch.setattr(adaptive_sde._Rows, "_turn", recorded)
    monkeypatch.setattr(adaptive_sde._Rows, "_adapt", adapt)
    return taken


# A step


@pytest.mark.parametrize("noise_level", [0.7, 1.0])
def test_halves_have_the_variance_of_the_time_changed_brownian_motion(noise_level):
    """`cos(theta)^(2 lambda^2)` itself, where it can be computed."""
    model = RING.model(VP)
    solver = AdaptiveStochastic(noise_level=noise_level, sigma_data=0.8)
    times = torch.tensor([0.9, 0.6, 0.2], dtype=F64)
    rows = adaptive_sde._Rows(solver, model, noise_level, torch.zeros(1, 2, dtype=F64), times, sd.RowNoise(0).open())
    alpha, sigma = VP.scales(times)
    v = (0.8 * alpha / torch.hypot(0.8 * alpha, sigma)) ** (2 * noise_level**2)
    points = Points.at(VP, times)
    part = rows._first_part(points[:1], points[1:2], points[2:])
    assert part.item() == pytest.approx(((v[1] - v[0]) / (v[2] - v[0])).item(), rel=1e-12)


def test_a_step_is_the_corrector_of_the_split_form(monkeypatch):
    """Two steps written out, from `Split.steps`, with the error that decides them."""
    model, c = RING.model(VP), 0.8
    times = torch.tensor([0.5, 0.45, 0.42], dtype=F64)
    x = RING.marginal(VP, 0.5).sample(5, seed=0)
    errors = []
    monkeypatch.setattr(adaptive_sde, "norm", lambda e: errors.append(e) or 0 * norm(e))
    monkeypatch.setattr(adaptive_sde, "_FIRST", 10.0)
    solver = AdaptiveStochastic(rtol=0.1, atol=0.02, sigma_data=c)
    states = list(solver.solve(sd.Reverse(model), x, times, sd.RowNoise(0).open()))
    numbers = adaptive_sde._Numbers.of(sd.RowNoise(0).open(), x)
    split, points = Split(c), Points.at(VP, times)

    def value(i, x):
        return model.combine(times[i], x, *split.value(*VP.scales(times[i])))

    before = value(0, x)
    for i in range(2):
        step = split.steps(points[i : i + 1], points[i + 1 : i + 2], np.ones(1))
        ends = split.node(points)[i : i + 2]
        late = (step.weights * (step.u - ends[0]) / (ends[1] - ends[0])).sum()
        eta = numbers(np.arange(5), i + 1, np.zeros(5, dtype=int), x)
        moved = step.keep.item() * x + step.spread.item() * eta
        predicted = moved + step.weights.sum() * before
        after = value(i + 1, predicted)
        new = moved + late * after + (step.weights.sum() - late) * before
        torch.testing.assert_close(states[i], new, rtol=1e-10, atol=1e-12)
        alpha, sigma = VP.scales(times[i + 1])
        unit = c / torch.hypot(c * alpha, sigma)
        allowed = 0.02 + 0.1 * unit * torch.maximum(x.abs(), new.abs())
        torch.testing.assert_close(errors[i], unit * (new - predicted) / allowed, rtol=1e-8, atol=1e-12)
        x, before = new, after


def test_the_step_wanted_is_that_of_the_average_error():
    times = torch.tensor([1.0, 0.5], dtype=F64)
    x = torch.zeros(5, 2, dtype=F64)
    rows = adaptive_sde._Rows(AdaptiveStochastic(), RING.model(VP), 1.0, x, times, sd.RowNoise(0).open())
    every, length = np.arange(5), np.full(5, 0.5)
    first, second = np.array([0.4, 0.8, 3.0, 1e-5, 0.01]), np.array([0.9, 0.1, 0.5, 100.0, 1.2])
    rows._adapt(every, length, first, first <= 1)
    rough = first**2 / length**3
    np.testing.assert_allclose(rows.step[:2], (0.5 / rough[:2]) ** (1 / 3))
    np.testing.assert_allclose(rows.step[2:4], [(0.5 / 72) ** (1 / 3), 2.0])  # at most 4 times as long
    rows._adapt(every, length / 2, second, second <= 1)
    rough += 0.3 * (second**2 / (length / 2) ** 3 - rough)
    expected = (0.5 / rough) ** (1 / 3)
    assert expected[4] > 0.125
    np.testing.assert_allclose(rows.step, [*expected[:3], 0.025, 0.125])  # a rejected step is halved at least


# One path


@pytest.mark.parametrize(
    ("sde", "noise_level"),
    [*((sde, 1.0) for sde in NAMED), *((sd.RectifiedFlow(t_max=1.0), level) for level in (0.5, 1.0, 3.0))],
    ids=name,
)
def test_whatever_is_rejected_the_noise_of_the_parts_adds_up_to_that_of_the_whole(sde, noise_level, at_random):
    """On data of deviation c nothing but linear part and noise is left, both exact: any steps lead to one state."""
    model = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 0.7**2).model(sde)
    x, end = torch.randn(16, 2, dtype=F64), sde.t_min or 1e-3
    times = torch.tensor([sde.t_max, end], dtype=F64)
    process = sd.Reverse(model, noise_level)
    solver = AdaptiveStochastic(noise_level=noise_level, sigma_data=0.7)
    tally = Tally()
    (state,) = solver.solve(process, x, times, sd.RowNoise(1).open(), tally)
    assert tally.rejected.min() > 0
    assert tally.accepted.min() > 3

    points = Points.at(sde, times)
    with np.errstate(divide="ignore"):
        step = Split(0.7).steps(points[:1], points[1:], np.array([noise_level]))
    root = adaptive_sde._Numbers.of(sd.RowNoise(1).open(), x)(np.arange(16), 1, np.zeros(16, dtype=int), x)
    expected = step.keep.item() * x + step.spread.item() * root
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-11 * sde.scales(times[1])[1].add(1).item())


def test_the_noise_of_accepted_intervals_is_standard_normal_and_independent(at_random, monkeypatch):
    """Read off by linearity: with the numbers of the tree as unit vectors, the noise of the accepted intervals is an
    orthonormal system, and the intervals are a partition of the span."""
    places = {}

    def unit_vectors(key, place, table, count):
        out = np.zeros((len(place), count))
        for row, at in enumerate(place):
            out[row, places.setdefault((table, int(at)), len(places))] = 1
        return out

    monkeypatch.setattr(adaptive_sde, "keyed_normals", unit_vectors)
    batch, size = 6, 4000
    model = sd.ScoreModel(lambda x, t: torch.zeros_like(x), VP, prediction="v")
    times = torch.tensor([1.0, 0.3, 1e-3], dtype=F64)
    list(AdaptiveStochastic().solve(sd.Reverse(model), torch.zeros(batch, size, dtype=F64), times, Signless()))
    for row in range(batch):
        steps = [(rows == row, *rest) for rows, *rest in at_random if (rows == row).any()]
        ends = [((place[at][0] / 2.0 ** level[at][0]), 2.0 ** -level[at][0]) for at, level, place, _ in steps]
        walked = np.cumsum([0] + [length for _, length in ends])
        assert walked[-1] == 2
        assert np.array_equal(walked[:-1] % 1, [start for start, _ in ends])
        units = torch.stack([unit[torch.from_numpy(at)][0] for at, _, _, unit in steps])
        assert len(units) > 8
        torch.testing.assert_close(units @ units.T, torch.eye(len(units), dtype=F64), rtol=0, atol=1e-12)


class Signless(type(sd.RowNoise(0).open())):
    """Every key is 1 and every sign positive."""

    def __init__(self):
        super().__init__(0, 0)

    def normal(self, x):
        return torch.ones_like(x)


# Convergence


def test_one_seed_is_one_path_whatever_the_tolerance():
    """Strong convergence, row by row, at least of order 1 in the number of calls."""
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([0.05, 1.5], dtype=F64))
    tight = solve(target.model(VP), AdaptiveStochastic(1e-3, 1e-3), 32)
    calls, errors = [], []
    for tolerance in (0.2, 0.1, 0.05, 0.02, 0.01):
        coarse = solve(target.model(VP), AdaptiveStochastic(tolerance, tolerance), 32)
        calls.append(coarse.row_nfe.double().mean().item())
        errors.append((coarse.x - tight.x).square().mean().sqrt().item())
    order = -np.polyfit(np.log(calls), np.log(errors), 1)[0]
    assert 0.8 < order < 2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_moments_tend_to_those_of_the_data():
    """An Ornstein-Uhlenbeck process: at a tight tolerance mean and variance are within 4 standard errors of 10000 rows;
    at a loose one they differ from those of the same paths by the stated weak error."""
    target = sd.exact.Gaussian(torch.tensor([0.5], dtype=F64), 0.2**2)
    sde, rows = sd.VP(t_min=1e-2), 10000
    alpha, sigma = sde.scales(torch.tensor(1e-2, dtype=F64))
    x_init = target.marginal(sde, 1.0).sample(rows, seed=4)
    mean, variance = alpha * 0.5, alpha**2 * 0.2**2 + sigma**2
    tight, middle, loose = (
        solve(target.model(sde), AdaptiveStochastic(tol, tol), rows, 1, x_init=x_init).x for tol in (0.005, 0.03, 0.2)
    )
    assert (tight.mean() - mean).abs() < 4 * (variance / rows).sqrt()
    assert (tight.var() / variance - 1).abs() < 4 * (2 / rows) ** 0.5
    assert (middle.std() / tight.std()).log().abs() < 0.01
    assert (loose.std() / tight.std()).log().abs() < 0.06
    assert (loose.mean() - tight.mean()).abs() < 0.01


def test_the_law_of_a_mixture():
    """Modes keep their weights: 4 standard errors."""
    x = solve(RING.model(VP), AdaptiveStochastic(0.05, 0.05), 4000).x
    nearest = torch.cdist(x, torch.stack([ANGLES.cos(), ANGLES.sin()], 1)).argmin(1)
    exact = torch.cdist(RING.sample(100000, seed=1), torch.stack([ANGLES.cos(), ANGLES.sin()], 1)).argmin(1)
    share, expected = (torch.bincount(which, minlength=8) / len(which) for which in (nearest, exact))
    assert ((share - expected).abs() < 4.2 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_steps_do_not_grow_because_their_noise_was_small():
    """Weak errors stay near those of equal steps: with steps chosen from the last error alone they are 0.004 here."""
    deviations = torch.logspace(-1.3, 0.3, 8, dtype=F64)
    model = sd.exact.Gaussian(torch.zeros(8, dtype=F64), deviations**2).model(VP)
    tight = solve(model, AdaptiveStochastic(2e-3, 2e-3), 600, 8)
    result = solve(model, AdaptiveStochastic(1e-2, 1e-2), 600, 8)
    assert result.row_nfe.double().mean() < 65
    assert (result.x.std(0) / tight.x.std(0)).log().square().mean().sqrt() < 0.002


def test_data_of_the_assumed_deviation_takes_few_steps():
    model = sd.exact.Gaussian(torch.zeros(3, dtype=F64), 4.0).model(VP)
    result = solve(model, AdaptiveStochastic(sigma_data=2.0), 8, 3)
    assert result.accepted.tolist() == [6] * 8  # the first is a short one, and the others double
    assert result.rejected.sum() == 0


# Rows


@pytest.mark.parametrize("sde", [VP, sd.EDM(), sd.CosineVP(), NAMED[-1]], ids=name)
def test_a_row_is_bitwise_the_same_in_any_batch(sde):
    solver, model = AdaptiveStochastic(0.1, 0.1), RING.model(sde)
    together = solve(model, solver, 23)
    alone = solve(model, solver, 23, batch_size=9)
    assert torch.equal(together.x, alone.x)
    assert torch.equal(together.row_nfe, alone.row_nfe)
    assert torch.equal(solve(model, solver, 5).x, together.x[:5])
    assert len(set(together.row_nfe.tolist())) > 2


def test_rows_keep_their_conditions():
    """A condition per row: the mean of the data."""

    def network(x, t, mean):
        alpha, sigma = (c[:, None] for c in VP.scales(t))
        return sigma * (x - alpha * mean) / (alpha**2 * 0.1 + sigma**2)

    model = sd.ScoreModel(network, VP, prediction="noise")
    means = torch.linspace(-3, 3, 12, dtype=F64)[:, None].expand(12, 2)
    result = solve(model, AdaptiveStochastic(0.05, 0.05), 12, condition=means)
    assert len(set(result.row_nfe.tolist())) > 1
    assert ((result.x - means).abs() < 4 * 0.1**0.5).all()
    for row in (0, 7):
        moved = solve(model, AdaptiveStochastic(0.05, 0.05), 12, condition=means[row].expand(12, 2).clone())
        assert torch.equal(moved.x[row], result.x[row])


def test_calls_are_counted_and_accepted_and_rejected_add_up():
    rows_seen = []
    exact = RING.model(VP)

    def network(x, t):
        rows_seen.append(len(x))
        return exact.network(x, t)

    result = solve(sd.ScoreModel(network, VP, prediction="v"), AdaptiveStochastic(0.02, 0.02), 50)
    assert result.rejected.sum() > 0
    assert torch.equal(result.row_nfe, 1 + result.accepted + result.rejected)
    assert sum(rows_seen) == result.row_nfe.sum()
    assert result.complete


def test_a_budget_gives_a_partial_result():
    model = RING.model(VP)
    free, held = (solve(model, AdaptiveStochastic(0.02, 0.02, max_nfe=most), 50) for most in (None, 30))
    done = free.row_nfe <= 30
    assert 0 < done.sum() < 50
    assert torch.equal(held.x[done], free.x[done])
    assert torch.equal(held.reached == 1e-3, done)
    assert (held.row_nfe[~done] == 30).all()
    assert not held.complete


def test_every_grid_time_is_stepped_on():
    times = torch.tensor([1.0, 0.7, 0.5, 1e-3], dtype=F64)
    whole = solve(RING.model(VP), AdaptiveStochastic(0.05, 0.05), times=times, trajectory=True)
    first = solve(RING.model(VP), AdaptiveStochastic(0.05, 0.05), times=times[:3], trajectory=True)
    assert torch.equal(whole.trajectory[:3], first.trajectory)
    assert (whole.reached == 1e-3).all()


# Sources of noise


def test_opposite_numbers_give_opposite_paths():
    model = sd.exact.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.1, 2.0], dtype=F64)).model(VP)
    x = solve(model, AdaptiveStochastic(0.05, 0.05), 20, noise=sd.Antithetic(sd.RowNoise(3)), seed=None).x
    torch.testing.assert_close(x[::2], -x[1::2], rtol=0, atol=1e-12)


def test_a_recorded_solve_is_replayed():
    recorder = sd.Recorder(sd.RowNoise(3))
    solver = AdaptiveStochastic(0.05, 0.05)
    x = solve(RING.model(VP), solver, 20, noise=recorder, seed=None).x
    assert recorder.numbers.shape[0] == 2  # the start, and the key of the path
    assert torch.equal(x, solve(RING.model(VP), solver, 20, noise=sd.Recorded(recorder.numbers), seed=None).x)


def test_keys_use_every_entry_and_no_sign():
    x = torch.randn(40, 3, dtype=F64)

    class Given(Signless):
        def __init__(self, numbers):
            super().__init__()
            self.numbers = numbers

        def normal(self, x):
            return self.numbers

    one, opposite = (adaptive_sde._Numbers.of(Given(draw), x) for draw in (x, -x))
    assert np.array_equal(one.keys, opposite.keys)
    assert np.array_equal(one.signs, -opposite.signs)
    for entry in range(3):
        changed = x.clone()
        changed[:, entry] *= 1.5
        assert not (adaptive_sde._Numbers.of(Given(changed), x).keys == one.keys).any()
    swapped = adaptive_sde._Numbers.of(Given(x[:, [0, 2, 1]]), x)
    assert not (swapped.keys == one.keys).any()


def test_other_dtypes_and_events():
    images = sd.exact.Gaussian(torch.zeros(3, 4, 4), 0.3).model(sd.EDM())
    x = sd.sample(images, (5, 3, 4, 4), solver=AdaptiveStochastic(0.1, 0.1), seed=0).x
    assert x.dtype == torch.float32
    assert x.shape == (5, 3, 4, 4)
    assert x.std().item() == pytest.approx(0.3**0.5, rel=0.2)


# Refusals


def test_bad_arguments_get_a_sentence():
    with pytest.raises(OptionError, match="atol > 0"):
        AdaptiveStochastic(atol=0)
    with pytest.raises(OptionError, match="Adaptive\\(\\) is for"):
        AdaptiveStochastic(noise_level=0)
    with pytest.raises(OptionError, match="at least 2"):
        AdaptiveStochastic(max_nfe=1)
    with pytest.raises(OptionError, match="sigma_data must be positive"):
        AdaptiveStochastic(sigma_data=-1.0)
    solver, x, noise = AdaptiveStochastic(), torch.zeros(2, 2, dtype=F64), sd.RowNoise(0).open()
    falling = torch.tensor([1.0, 0.5], dtype=F64)
    model = RING.model(VP)
    with pytest.raises(CapabilityError, match="no single steps"):
        solver.start(sd.Reverse(model), x, falling, noise)
    with pytest.raises(CapabilityError, match="has none"):
        next(solver.solve(sd.Reverse(model, 0.0), x, falling, noise))
    with pytest.raises(CapabilityError, match="times that fall"):
        next(solver.solve(sd.Reverse(model), x, falling.flip(0), noise))
    with pytest.raises(CapabilityError, match="Reverse"):
        next(solver.solve(VP, x, falling, noise))
    with pytest.raises(CapabilityError, match="adds noise"):
        sd.encode(model, x, solver=solver)


def test_a_broken_network_is_named():
    def network(x, t):
        return torch.where((t < 0.4)[:, None] & (x[:, :1] > 0), torch.nan, torch.zeros_like(x))

    with pytest.raises(DivergenceError, match="shrunk") as caught:
        solve(sd.ScoreModel(network, VP, prediction="v"), AdaptiveStochastic(), 20, batch_size=5)
    assert 1e-3 < caught.value.time <= 0.401
    assert caught.value.rows
