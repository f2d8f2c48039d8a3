import math

import numpy as np
import pytest
import torch
from helpers import NAMED, TwoFunctions, name

import sdediff as sd
from sdediff import Exact, Hutchinson, embedded
from sdediff.augmented import WithLogDensity
from sdediff.embedded import AdaptiveRungeKutta, add_rows, norm
from sdediff.errors import CapabilityError, DivergenceError, OptionError
from sdediff.solvers import Tally

F64 = torch.float64
VP = sd.VP(t_min=1e-3)
ANGLES = torch.arange(8, dtype=F64) * torch.pi / 4
RING = sd.exact.GaussianMixture(
    torch.linspace(1, 2, 8), 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.linspace(0.05, 0.3, 8) ** 2
)
HEUN_EULER = sd.Tableau("heun-euler", 2, a=((), (1,)), b=(1 / 2, 1 / 2), c=(0, 1), error=(-1 / 2, 1 / 2))
NOISE = sd.RowNoise(0).open()


class Cubic(sd.SDE):
    """`dx = -t x^3 dt`, with `x(t)^-2 = x(s)^-2 + t^2 - s^2`."""

    @property
    def noisy(self):
        return False

    def drift(self, t, x):
        return -t * x * x * x

    def diffusion(self, t, x):
        return 0.0


def solve(process, x, times, solver):
    tally = Tally()
    states = list(solver.solve(process, x, torch.as_tensor(times, dtype=F64), NOISE, tally))
    return torch.stack(states), tally


def starts(model, rows, seed=0):
    sde = model.sde
    return sde.sigma(sde.t_max) * torch.randn(rows, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


# The steps


@pytest.mark.parametrize("pair", ["dopri5", HEUN_EULER], ids=str)
def test_a_step_and_its_error_are_those_of_the_tableau(pair, monkeypatch):
    """One step written out, for two rows with times of their own."""
    method = AdaptiveRungeKutta(pair).coefficients
    rows = embedded._Rows(AdaptiveRungeKutta(pair, rtol=0.1, atol=0.02), Cubic(), torch.tensor([[1.0], [2.0]]).double(),
                          torch.tensor([-0.5, 2.0], dtype=F64))  # fmt: skip
    rows.t[1], rows.step = 0.7, np.array([0.3, 0.2])
    rows.slope[1] = -0.7 * 8
    errors = []
    monkeypatch.setattr(embedded, "norm", lambda e: errors.append(e) or norm(0 * e))
    rows._advance(np.arange(2), 1)
    for row, (t, x, h) in enumerate([(-0.5, 1.0, 0.3), (0.7, 2.0, 0.2)]):
        slopes = []
        for weights, part in zip(method.a, method.c, strict=True):
            at = x + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
            slopes.append(-(t + part * h) * at**3)
        new, error = (x * (w is method.b) + h * np.dot(w, slopes) for w in (method.b, method.error))
        assert rows.x[row].item() == pytest.approx(new, rel=1e-12)
        assert (new > x) == (row == 0)  # the larger of both states counts
        assert rows.t[row].item() == pytest.approx(t + h, rel=1e-15)
        assert errors[0][row].item() == pytest.approx(error / (0.02 + 0.1 * max(x, new)), rel=1e-6)


def test_the_next_step_is_the_shorter_one_of_both_controllers():
    rows = embedded._Rows(AdaptiveRungeKutta("bosh3"), Cubic(), torch.ones(5, 1, dtype=F64),
                          torch.tensor([0.0, 1.0], dtype=F64))  # fmt: skip
    every, long = np.arange(5), np.full(5, 0.2)
    first = np.array([0.5, 0.2, 0.9, 1e-9, 4.0])
    rows._adapt(every, long, long, first, first <= 1)
    expected = 0.2 * 0.9 * first ** (-0.7 / 3)
    expected[3:] = 0.2 * 5, 0.2 * 0.9 * 4 ** (-1 / 3)
    np.testing.assert_allclose(rows.step, expected)
    length, wanted = np.array([0.1, 0.2, 0.2, 0.2, 0.1]), np.array([0.1, 0.2, 0.5, 0.2, 0.1])
    second = np.array([0.6, 0.1, 0.3, 5e4, 1e-3])
    rows._adapt(every, length, wanted, second, second <= 1)
    smooth = 0.9 * second ** (-0.7 / 3) * np.clip(first, 1e-4, None) ** (0.4 / 3)
    predicted = 0.9 * (length / 0.2) * (first / second**2) ** (1 / 3)
    assert predicted[0] < smooth[0]
    assert predicted[1] > smooth[1]
    np.testing.assert_allclose(rows.step[:2], (length * np.minimum(smooth, predicted))[:2])
    assert rows.step[2] == 0.5  # one that was cut by the grid is as long as it was to be
    assert rows.step[3] == pytest.approx(0.1 * 0.2)
    assert rows.step[4] == 0.1  # no growth after a rejection


def test_a_dense_grid_does_not_shorten_the_steps_after_it():
    x, solver = torch.tensor([[1.0]], dtype=F64), AdaptiveRungeKutta(rtol=1e-6, atol=1e-6)
    _, plain = solve(Cubic(), x, [0.0, 3.0], solver)
    _, dense = solve(Cubic(), x, [0.0, *np.linspace(1, 1.01, 6), 3.0], solver)
    assert dense.nfe.item() <= plain.nfe.item() + 6 * 8


def test_steps_that_shrink_all_along_are_foreseen():
    """EDM's time is sigma, so steps fall by orders of magnitude; few are rejected all the same."""
    model = RING.model(sd.EDM())
    x = starts(model, 50)
    result = sd.sample(model, (50, 2), x_init=x, solver=AdaptiveRungeKutta(rtol=1e-7, atol=1e-7), final="none")
    assert result.rejected.double().mean() < 4
    assert result.row_nfe.double().mean() < 240


def test_other_units_of_time_make_the_same_steps():
    calls = []
    for scale in (2.0**-10, 1.0, 2.0**10):

        class Scaled(Cubic):
            unit = scale

            def drift(self, t, x):
                return -(1 + t / self.unit) * x / self.unit

        x = torch.tensor([[1.0], [20.0], [0.0]], dtype=F64)
        states, tally = solve(Scaled(), x, [0.0, 3.0 * scale], AdaptiveRungeKutta(rtol=1e-6, atol=1e-6))
        torch.testing.assert_close(states[-1], x * math.exp(-7.5), rtol=0, atol=1e-5)
        assert tally.rejected.sum() <= 2
        calls.append(tally.nfe.tolist())
    assert calls[0] == calls[1] == calls[2]
    assert calls[0][2] <= 2 + 6 * 10  # nothing moves: a millionth of the span, and growth by 5


def test_first_steps_are_those_of_hairer():
    x = torch.tensor([[2.0], [3.0]], dtype=F64)
    rows = embedded._Rows(AdaptiveRungeKutta("bosh3", rtol=1e-3, atol=1e-2), Cubic(), x,
                          torch.tensor([1.0, 9.0], dtype=F64))  # fmt: skip
    for row, at in enumerate([2.0, 3.0]):
        allowed, slope, span = 1e-2 + 1e-3 * at, -(at**3), 8
        trial = 0.01 * at / abs(slope)
        change = abs(-(1 + trial) * (at + trial * slope) ** 3 - slope) / trial * span**2 / allowed
        expected = (0.01 / max(change, abs(slope) * span / allowed)) ** (1 / 3)
        assert rows.step[row] == pytest.approx(span * expected, rel=1e-12)


# Accuracy


@pytest.mark.parametrize("sde", [*NAMED[:-1], TwoFunctions()], ids=name)
@pytest.mark.parametrize("pair", ["dopri5", "bosh3"])
def test_the_flow_of_gaussian_data_in_both_directions(sde, pair):
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([0.05, 1.5], dtype=F64))
    linear = sd.as_linear(sde)
    model, ends = target.model(sde), (linear.t_min, linear.t_max)
    tolerance = 1e-8 if pair == "dopri5" else 1e-6
    solver = AdaptiveRungeKutta(pair, rtol=tolerance, atol=tolerance)
    data = target.marginal(linear, ends[0]).sample(6, seed=0)
    latent = sd.encode(model, data, solver=solver)
    assert latent.complete
    torch.testing.assert_close(latent.x, target.flow(linear, data, *ends), rtol=300 * tolerance, atol=100 * tolerance)
    back = sd.sample(model, data.shape, x_init=latent.x, solver=solver, final="none")
    torch.testing.assert_close(back.x, data, rtol=0, atol=500 * tolerance)


@pytest.mark.parametrize(
    ("pair", "order", "tolerances"),
    [
        ("dopri5", 5, [1e-7, 1e-9, 1e-11]),
        ("bosh3", 3, [1e-4, 1e-6, 1e-8]),
        (HEUN_EULER, 2, [1e-3, 1e-4, 1e-5]),
    ],
    ids=str,
)
def test_error_follows_the_tolerance_and_calls_its_root(pair, order, tolerances):
    x, times = torch.tensor([[0.5], [1.0], [2.0]], dtype=F64), [0.0, 3.0]
    exact = (x**-2 + 9) ** -0.5
    runs = [solve(Cubic(), x, times, AdaptiveRungeKutta(pair, tol, tol)) for tol in tolerances]
    for tol, (states, _) in zip(tolerances, runs, strict=True):
        assert tol / 300 < (states[-1] - exact).abs().max() < 10 * tol
    calls = [tally.nfe.double().mean() for _, tally in runs]
    ratio = math.log(calls[2] / calls[1]) / math.log(tolerances[1] / tolerances[2])
    assert ratio == pytest.approx(1 / order, rel=0.2)


def test_any_process_in_either_direction_and_every_grid_time_exactly():
    x, times = torch.tensor([[0.5, 1.0], [2.0, -3.0]], dtype=F64), torch.tensor([0.0, 0.1, 1.7, 3.0], dtype=F64)
    solver = AdaptiveRungeKutta(rtol=1e-10, atol=1e-10)
    states, tally = solve(Cubic(), x, times, solver)
    for t, state in zip(times[1:], states, strict=True):
        torch.testing.assert_close(state, x.sign() * (x**-2 + t**2) ** -0.5, rtol=0, atol=1e-8)
    assert tally.reached.tolist() == [3.0, 3.0]
    back, tally = solve(Cubic(), states[-1], times.flip(0), solver)
    torch.testing.assert_close(back[-1], x, rtol=1e-5, atol=0)
    assert tally.reached.tolist() == [0.0, 0.0]


def test_a_nonlinear_sde():
    """The reverse of a process whose drift is not linear, from its score at times of their own."""

    class Nonlinear(sd.SDE):
        def drift(self, t, x):
            return -x - torch.sin(x)

        def diffusion(self, t, x):
            return 1 + t

    model = sd.ScoreModel(lambda x, t: -x / (1 + t[:, None]), Nonlinear(), prediction="score")
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    fine = sd.sample(model, (5, 1), x_init=x, solver=sd.RungeKutta(), steps=400, final="none").x
    result = sd.sample(model, (5, 1), x_init=x, solver=AdaptiveRungeKutta(rtol=1e-9, atol=1e-9), final="none")
    torch.testing.assert_close(result.x, fine, rtol=0, atol=1e-7)
    assert len(set(result.row_nfe.tolist())) > 1


def test_single_precision():
    target = sd.exact.GaussianMixture(torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.1, 0.2]))
    x = torch.randn(20, 2)
    result = sd.sample(target.model(VP), (20, 2), x_init=x, solver=AdaptiveRungeKutta(), final="none")
    tight = AdaptiveRungeKutta(rtol=1e-9, atol=1e-9)
    double = sd.sample(target.model(VP), (20, 2), x_init=x.double(), solver=tight, final="none")
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x.double(), double.x, rtol=0, atol=2e-3)


def test_gradients_flow_through_the_steps():
    model = RING.model(VP)
    x = starts(model, 2).requires_grad_()
    solver = AdaptiveRungeKutta(rtol=1e-10, atol=1e-10)

    def end(x):
        return sd.sample(model, (2, 2), x_init=x, solver=solver, final="none", differentiable=True).x[:, 0].sum()

    (gradient,) = torch.autograd.grad(end(x), x)
    step = 1e-5 * torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    assert gradient[0, 1].item() == pytest.approx(((end(x + step) - end(x - step)) / 2e-5).item(), rel=1e-4)


# Rows


@pytest.mark.parametrize("sde", [VP, sd.EDM(), sd.CosineVP(), sd.RectifiedFlow()], ids=name)
@pytest.mark.parametrize("pair", ["dopri5", HEUN_EULER], ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch(sde, pair):
    model, solver = RING.model(sde), AdaptiveRungeKutta(pair, rtol=1e-3, atol=1e-3)
    x = starts(model, 21)

    def run(rows, **options):
        return sd.sample(model, (len(rows), 2), x_init=rows, solver=solver, final="none", **options)

    together, chunks = run(x), run(x, batch_size=4)
    assert torch.equal(together.x, chunks.x)
    assert torch.equal(together.row_nfe, chunks.row_nfe)
    assert torch.equal(run(x[13:14]).x[0], together.x[13])
    assert len(set(together.row_nfe.tolist())) > 1


@pytest.mark.parametrize("pair", ["dopri5", HEUN_EULER], ids=str)
def test_rows_keep_their_conditions(pair):
    def network(x, t, mean):
        alpha, sigma = (c[:, None] for c in VP.scales(t))
        return sigma * (x - alpha * mean) / (alpha**2 * 0.1 + sigma**2)

    model = sd.ScoreModel(network, VP, prediction="noise")
    means = torch.linspace(-5, 5, 12, dtype=F64)[:, None].expand(12, 2)
    x, tolerance = torch.randn(12, 2, dtype=F64), 1e-7 if pair == "dopri5" else 1e-4
    solver = AdaptiveRungeKutta(pair, rtol=tolerance, atol=tolerance)
    result = sd.sample(model, (12, 2), x_init=x, solver=solver, condition=means, final="none")
    assert len(set(result.row_nfe.tolist())) > 1
    for row in range(12):
        exact = sd.exact.Gaussian(means[row], 0.1).flow(VP, x[row : row + 1], 1.0, 1e-3)
        torch.testing.assert_close(result.x[row : row + 1], exact, rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize(("pair", "again"), [("dopri5", 0), (HEUN_EULER, 1)], ids=["fsal", "not"])
def test_calls_are_counted_and_rejected_steps_keep_their_first_slope(pair, again):
    rows_seen = []
    exact = RING.model(VP)

    def network(x, t):
        rows_seen.append(len(x))
        return exact.network(x, t)

    model = sd.ScoreModel(network, VP, prediction="v")
    result = sd.sample(model, (30, 2), x_init=starts(exact, 30), final="none",
                       solver=AdaptiveRungeKutta(pair, rtol=1e-3, atol=1e-3))  # fmt: skip
    stages = 6 if pair == "dopri5" else 1
    assert result.rejected.sum() > 0
    expected = 2 + stages * (result.accepted + result.rejected) + again * (result.accepted - 1)
    assert torch.equal(result.row_nfe, expected)
    assert sum(rows_seen) == result.row_nfe.sum()


@pytest.mark.parametrize("pair", ["dopri5", HEUN_EULER], ids=str)
def test_a_budget_gives_a_partial_result(pair):
    model = RING.model(VP)
    x = starts(model, 50)

    def run(budget):
        solver = AdaptiveRungeKutta(pair, 1e-2, 1e-2, max_nfe=budget)
        return sd.sample(model, (50, 2), x_init=x, final="none", solver=solver)

    free = run(None)
    budget = int(free.row_nfe.median())
    held = run(budget)
    done = free.row_nfe <= budget
    assert 0 < done.sum() < 50
    assert torch.equal(held.x[done], free.x[done])
    assert torch.equal(held.reached == 1e-3, done)
    assert (held.row_nfe <= budget).all()
    assert (held.row_nfe[~done] > budget - 6).all()
    assert not held.complete


# Likelihoods


@pytest.mark.parametrize("divergence", ["exact", Hutchinson(3)], ids=str)
def test_a_likelihood_is_that_of_torchdiffeq_and_every_row_its_own(divergence):
    model = RING.model(VP)
    x = RING.sample(12, seed=0)
    options = {"divergence": divergence, "seed": 7}
    solver = AdaptiveRungeKutta(rtol=1e-8, atol=1e-8)
    ours = sd.log_prob(model, x, solver=solver, **options)
    theirs = sd.log_prob(model, x, solver=sd.TorchDiffEq(rtol=1e-9, atol=1e-9), **options)
    torch.testing.assert_close(ours.value, theirs.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.latent, theirs.latent, rtol=0, atol=1e-5)
    chunks = sd.log_prob(model, x, solver=solver, batch_size=5, **options)
    torch.testing.assert_close(ours.value, chunks.value, rtol=0, atol=1e-10)
    assert ours.accepted.shape == (12,)
    assert torch.equal(ours.accepted, chunks.accepted)
    assert len(set(ours.accepted.tolist())) > 1


def test_a_likelihood_under_conditions():
    def network(x, t, mean):
        alpha, sigma = (c[:, None] for c in VP.scales(t))
        return sigma * (x - alpha * mean) / (alpha**2 * 0.1 + sigma**2)

    means = torch.linspace(-5, 5, 6, dtype=F64)[:, None].expand(6, 2)
    model = sd.ScoreModel(network, VP, prediction="noise")
    solver = AdaptiveRungeKutta(rtol=1e-8, atol=1e-8)
    result = sd.log_prob(model, means + 0.1, solver=solver, condition=means)
    for row in range(6):
        alone = sd.log_prob(model, means[row : row + 1] + 0.1, solver=solver, condition=means[row : row + 1])
        assert result.value[row].item() == pytest.approx(alone.value.item(), abs=1e-10)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(3)], ids=str)
def test_the_rows_of_the_augmented_process(divergence):
    model, x = RING.model(VP), RING.sample(5, seed=0)
    vectors = divergence.draw(x, 1, np.arange(5), np.zeros(5, dtype=int))
    process = WithLogDensity(model, divergence, vectors, (2,))
    y, t = torch.cat([x, torch.zeros(5, divergence.count, dtype=F64)], 1), torch.linspace(0.1, 0.9, 5, dtype=F64)
    whole, silent = process.coefficients(t, y)
    assert silent == 0
    index = torch.tensor([4, 1])
    part, _ = process.rows(index, 5).coefficients(t[index], y[index])
    torch.testing.assert_close(part, whole[index], rtol=0, atol=1e-12)
    for row in range(5):
        alone = process.rows(torch.tensor([row]), 5).drift(t[row], y[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-12)


def test_rows_of_chunks_are_joined():
    tally = Tally()
    for k in (2, 3):
        count = torch.full((k,), k)
        add_rows(tally, Tally(count, count + 1, count + 2, count / 10))
    assert tally.accepted.tolist() == [2, 2, 3, 3, 3]
    assert tally.rejected.tolist() == [3, 3, 4, 4, 4]
    assert tally.nfe.tolist() == [4, 4, 5, 5, 5]
    torch.testing.assert_close(tally.reached, torch.tensor([0.2, 0.2, 0.3, 0.3, 0.3]))


def test_the_norm_of_a_row():
    e = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[math.nan, 0.0]], [[math.inf, 1.0]]])
    assert norm(e).tolist() == [pytest.approx(12.5**0.5), 0.0, math.inf, math.inf]


# Refusals


def test_bad_arguments_get_a_sentence():
    with pytest.raises(OptionError, match=r"Unknown pair 'rk4'.*'bosh3' or 'dopri5'"):
        AdaptiveRungeKutta("rk4")
    with pytest.raises(OptionError, match="no error weights"):
        AdaptiveRungeKutta(sd.Tableau("euler", 1, a=((),), b=(1,), c=(0,)))
    with pytest.raises(OptionError, match="atol > 0"):
        AdaptiveRungeKutta(atol=0)
    with pytest.raises(OptionError, match="at least 8"):
        AdaptiveRungeKutta(max_nfe=7)
    solver, x, times = AdaptiveRungeKutta(), torch.zeros(2, 2, dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    with pytest.raises(CapabilityError, match="no single steps"):
        solver.start(sd.Reverse(RING.model(VP), 0.0), x, times, NOISE)
    with pytest.raises(CapabilityError, match="drop the noise"):
        next(solver.solve(sd.Reverse(RING.model(VP)), x, times, NOISE))


def test_a_broken_network_is_named():
    def network(x, t):
        return torch.where((t < 0.4)[:, None] & (x[:, :1] > 0), torch.nan, torch.zeros_like(x))

    model = sd.ScoreModel(network, VP, prediction="v")
    x = torch.tensor([[-1.0], [-2.0], [-1.0], [2.0]], dtype=F64)
    with pytest.raises(DivergenceError, match="shrunk below") as caught:
        sd.sample(model, (4, 1), x_init=x, solver=AdaptiveRungeKutta(), batch_size=2)
    assert caught.value.time == pytest.approx(0.4, abs=1e-6)
    assert caught.value.rows == [3]
