import itertools
import math

import pytest
import torch
from helpers import NAMED, fitted_order, name, scalar_target

import sdediff as sd

pytestmark = pytest.mark.timeout(60)  # a step size that is wrong may never arrive

F64 = torch.float64
ANGLES = 2 * math.pi * torch.arange(8, dtype=F64) / 8
RING = sd.exact.GaussianMixture(
    torch.tensor([1.0, 3.0, 1.5, 2.0, 1.0, 2.5, 1.2, 2.8]),
    torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1),
    torch.tensor([0.05, 0.18, 0.08, 0.3, 0.06, 0.23, 0.14, 0.11]) ** 2,
)
AXES = sd.exact.Gaussian(torch.tensor([0.7, -1.0, 0.0, 0.3], dtype=F64), torch.tensor([0.05, 0.3, 1.5, 4.0], dtype=F64))
SDE = sd.VP(t_min=1e-3)
MODEL = RING.model(SDE)


def run(solver, x, model=MODEL, **options):
    return sd.sample(model, x.shape, x_init=x, solver=solver, seed=0, **{"final": "none", **options})


def at(tolerance, **options):
    return sd.Adaptive(rtol=tolerance, atol=tolerance, **options)


@pytest.fixture(scope="module")
def ring():
    """Starts and their ends by another method."""
    x = RING.marginal(SDE, 1.0).sample(128, seed=0)
    return x, run(sd.TorchDiffEq("dopri5", rtol=1e-9, atol=1e-10), x).x


def rms(e):
    return e.square().mean().sqrt().item()


def test_errors_fall_with_the_tolerance_at_the_advertised_cost(ring):
    x, exact = ring
    errors, calls = [], []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        solution = run(at(tolerance), x)
        errors.append(rms(solution.x - exact))
        calls.append(solution.row_nfe.double().mean().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 5 < coarse / fine < 30
    assert errors[0] < 1e-3
    assert errors[4] < 1e-7
    assert calls[0] < 26
    assert calls[4] < 125
    solution = run(at(3e-5), x)
    assert rms(solution.x - exact) < 1e-5
    assert solution.row_nfe.double().mean() < 50


def test_the_ring_to_a_thousandth_and_to_a_hundred_thousandth(ring):
    x, exact = ring
    for tolerance, error, most in ((2.5e-3, 1e-3, 26), (4e-5, 1e-5, 47)):
        solution = run(at(tolerance), x)
        assert rms(solution.x - exact) < error
        assert solution.row_nfe.double().mean() < most


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_the_exact_flow_of_any_process_is_met(sde):
    """Steps are counted too: an estimate that is wrong shows as waste."""
    model, end = AXES.model(sde), max(sde.t_min, 1e-3 * sde.t_max)
    x = AXES.marginal(sde, sde.t_max).sample(5, seed=0)
    exact = AXES.flow(sde, x, sde.t_max, end)
    solution = run(at(1e-6), x, model, t_min=end)
    assert rms(solution.x - exact) < 1e-5
    assert solution.nfe < 90
    there = sd.encode(model, exact, solver=at(1e-6), t_min=end)
    scale = AXES.marginal(sde, sde.t_max).cov.diagonal().sqrt()
    assert rms((there.x - x) / scale) < 1e-4
    assert there.reached.tolist() == [sde.t_max] * 5


def test_one_mean_and_deviation_cost_a_handful_of_calls():
    """For round Gaussian data of the assumed deviation the steps are exact, so they grow as fast as they may."""
    model = sd.exact.Gaussian(torch.zeros(3, dtype=F64), 0.25).model(SDE)
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    solution = run(sd.Adaptive(1e-9, 1e-9, sigma_data=0.5), x, model)
    assert solution.nfe <= 9
    assert not solution.rejected.any()
    exact = sd.exact.Gaussian(torch.zeros(3, dtype=F64), 0.25).flow(SDE, x, 1.0, 1e-3)
    torch.testing.assert_close(solution.x, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_max_order_is_the_order_of_the_error_against_the_steps(most):
    """With steps h, errors of a step are h^(order + 1): calls grow as the tolerance to the power -1 / (order + 1)."""
    x = AXES.marginal(SDE, 1.0).sample(4, seed=0)
    tolerances = {1: [1e-3, 1e-4, 1e-5], 2: [1e-4, 1e-5, 1e-6]}.get(most, [1e-6, 1e-7, 1e-8])
    calls = [run(at(t, max_order=most), x, AXES.model(SDE)).row_nfe.double().mean().item() for t in tolerances]
    assert fitted_order(calls, tolerances) == pytest.approx(1 / (most + 1), abs=0.06 if most > 1 else 0.1)


def test_a_row_is_bitwise_the_same_alone_in_any_batch_order_and_chunk():
    solver = sd.Adaptive()
    x = RING.marginal(SDE, 1.0).sample(24, seed=1)
    whole = run(solver, x)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in (torch.arange(1), torch.arange(7), torch.tensor([20]), shuffled):
        part = run(solver, x[rows])
        for field in ("x", "row_nfe", "accepted", "rejected", "reached"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows]), field
    for chunk in (1, 5, 23):
        part = run(solver, x, batch_size=chunk)
        for field in ("x", "row_nfe", "accepted", "rejected", "reached"):
            assert torch.equal(getattr(part, field), getattr(whole, field)), (chunk, field)
        assert part.nfe == whole.nfe == whole.row_nfe.max()
    drawn = sd.sample(MODEL, (9, 2), solver=solver, seed=5, dtype=F64).x
    assert torch.equal(sd.sample(MODEL, (4, 2), solver=solver, seed=5, dtype=F64).x, drawn[:4])


def test_calls_are_the_steps_tried_and_one():
    x = RING.marginal(SDE, 1.0).sample(20, seed=2)
    calls = torch.zeros(20, dtype=torch.long)

    def network(y, t, numbers):
        calls[numbers] += 1
        return MODEL.network(y, t)

    model = sd.ScoreModel(network, SDE, "v")
    plain = run(at(1e-4), x, model, condition=torch.arange(20))
    assert torch.equal(plain.row_nfe, calls)
    assert torch.equal(plain.accepted + plain.rejected + 1, plain.row_nfe)
    assert len(plain.row_nfe.unique()) > 2
    assert plain.rejected.any()
    assert plain.complete
    assert torch.equal(plain.x, run(at(1e-4), x).x)
    ended = run(at(1e-4), x, model, condition=torch.arange(20), final="denoise")
    assert torch.equal(ended.row_nfe, plain.row_nfe + 1)
    torch.testing.assert_close(ended.x, MODEL.denoised(1e-3, plain.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 8, 17])
def test_a_budget_leaves_partial_results(most):
    x = RING.marginal(SDE, 1.0).sample(30, seed=3)
    part = run(at(1e-3, max_nfe=most), x)
    assert part.row_nfe.max() == part.nfe == most
    assert not part.complete
    assert ((part.reached == 1e-3) | (part.row_nfe == most)).all()
    assert (part.reached < 1).all() == (most > 1)
    ended = run(at(1e-3, max_nfe=most), x, final="denoise")
    assert torch.equal(ended.reached, part.reached)
    torch.testing.assert_close(ended.x, MODEL.denoised(part.reached, part.x), rtol=1e-12, atol=1e-12)
    for row in (0, 11, 29):  # a fine solve that ends there
        end = part.reached[row].item()
        if end < 1:
            fine = run(at(1e-7), x[row : row + 1], times=[1.0, end]).x
            torch.testing.assert_close(part.x[row : row + 1], fine, rtol=0.01, atol=0.01)
    assert run(at(1e-3, max_nfe=500), x).complete


def test_a_budget_over_several_times_stops_on_the_way():
    x = RING.marginal(SDE, 1.0).sample(12, seed=3)
    part = run(at(1e-4, max_nfe=15), x, times=[1.0, 0.5, 0.3, 0.001], trajectory=True)
    assert (part.reached < 0.3).all()
    assert (part.reached > 0.001).any()
    whole = run(at(1e-4), x, times=[1.0, 0.5, 0.3, 0.001], trajectory=True)
    assert torch.equal(part.trajectory[:3], whole.trajectory[:3])


def test_times_of_a_grid_are_stepped_on_exactly():
    times = [1.0, 0.63, 0.6299, 0.2, 0.05, 1e-3]
    x = AXES.marginal(SDE, 1.0).sample(5, seed=0)
    solution = run(at(1e-7), x, AXES.model(SDE), times=times, trajectory=True)
    assert solution.kept.tolist() == times
    for time, state in zip(times, solution.trajectory, strict=True):
        torch.testing.assert_close(state, AXES.flow(SDE, x, 1.0, time), rtol=1e-6, atol=1e-6)
    seen = []
    model = sd.ScoreModel(lambda y, t: seen.extend(t.tolist()) or y, SDE)
    run(at(1e-2), x, model, times=times)
    assert set(times) <= set(seen)
    back = sd.encode(AXES.model(SDE), solution.x, solver=at(1e-7), times=times[::-1], trajectory=True)
    torch.testing.assert_close(back.trajectory.flip(0), solution.trajectory, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde", [sd.RectifiedFlow(t_max=1.0), sd.CosineVP(t_max=1.0)], ids=name)
def test_pure_noise_and_clean_data_are_stepped_to_and_from(sde):
    x = torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    model = AXES.model(sde)
    out = run(at(1e-7), x, model, times=[1.0, 0.0])
    torch.testing.assert_close(out.x, AXES.flow(sde, x, 1.0, 0.0), rtol=1e-6, atol=1e-6)
    assert out.nfe < 130
    back = sd.encode(model, out.x, solver=at(1e-7), times=[0.0, 1.0]).x
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_a_network_that_is_not_finite_is_reported_with_its_rows_and_time():
    def network(x, t):
        return torch.where((x[:, :1] > 0) & (t[:, None] < 0.5), torch.nan, x)

    model = sd.ScoreModel(network, sd.VP())
    x = torch.tensor([[-1.0], [2.0], [-1.0], [2.0]])
    with pytest.raises(sd.DivergenceError, match=r"step of 2 row\(s\) has shrunk .* t = 0\.5, rows 1, 3") as caught:
        run(sd.Adaptive(), x, model)
    assert caught.value.rows == [1, 3]
    assert caught.value.time == pytest.approx(0.5, abs=1e-3)
    assert caught.value.step is None
    with pytest.raises(sd.DivergenceError, match="rows 3") as caught:
        run(sd.Adaptive(), torch.tensor([[-1.0], [-1.0], [-1.0], [2.0]]), model, batch_size=2)
    assert caught.value.rows == [3]


def test_conditions_follow_their_rows():
    """Each row is pulled to a mean of its own, through dicts and with a bystander that is not cut."""
    means = torch.linspace(-2, 2, 9, dtype=F64)
    precision = torch.tensor([0.0, 1.0], dtype=F64)

    def network(x, t, condition):
        assert condition["fixed"] is precision
        mean = condition["mean"][:, None]
        alpha, sigma = (part[:, None] for part in SDE.scales_at(t))
        return sigma * (x - alpha * mean) / (alpha**2 * 0.04 + sigma**2)

    model = sd.ScoreModel(network, SDE)
    x = torch.randn(9, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    condition = {"mean": means, "fixed": precision}
    for options in ({}, {"batch_size": 4}):
        out = run(at(1e-6), x, model, condition=condition, **options)
        assert len(out.row_nfe.unique()) > 1
        for row, mean in enumerate(means.tolist()):
            target = sd.exact.Gaussian(torch.tensor([mean], dtype=F64), 0.04)
            exact = target.flow(SDE, x[row : row + 1], 1.0, 1e-3)
            torch.testing.assert_close(out.x[row : row + 1], exact, rtol=1e-5, atol=1e-5)


def test_single_precision_and_smaller():
    x = RING.marginal(SDE, 1.0).sample(8, seed=0)
    wide = run(sd.Adaptive(), x)
    narrow = run(sd.Adaptive(), x.float())
    assert narrow.x.dtype == torch.float32
    torch.testing.assert_close(narrow.x.double(), wide.x, rtol=1e-3, atol=1e-3)
    half = run(at(3e-2), x.bfloat16())
    assert half.x.dtype == torch.bfloat16
    torch.testing.assert_close(half.x.double(), wide.x, rtol=0.1, atol=0.1)


def test_events_of_any_shape():
    image = sd.exact.Gaussian(torch.zeros(1, 4, 4, dtype=F64), 0.25)
    x = torch.randn(3, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    out = run(at(1e-6), x, image.model(SDE)).x
    torch.testing.assert_close(out, image.flow(SDE, x, 1.0, 1e-3), rtol=1e-5, atol=1e-5)
    scalar = sd.ScoreModel(lambda x, t: 0.5 * x, SDE)
    assert sd.sample(scalar, (3,), solver=sd.Adaptive(), seed=0).x.shape == (3,)


def test_tolerances_are_absolute_and_relative():
    """In units of data: twice as large data allow twice the error, if tolerances are relative."""
    x = AXES.marginal(SDE, 1.0).sample(10, seed=0)
    model = AXES.model(SDE)
    calls = lambda **options: run(sd.Adaptive(**options), x, model).row_nfe.sum()  # noqa: E731
    assert calls(rtol=1e-6, atol=1e-3) < calls(rtol=1e-6, atol=1e-6)
    assert calls(rtol=1e-3, atol=1e-6) < calls(rtol=1e-6, atol=1e-6)
    big = sd.exact.Gaussian(1000 * AXES.mean, 1e6 * AXES.cov.diagonal())
    process = sd.EDM(sigma_min=0.002, sigma_max=80.0)
    scaled = sd.EDM(sigma_min=2.0, sigma_max=8e4)
    start = AXES.marginal(process, 80.0).sample(6, seed=0)
    for rtol, atol in ((1e-5, 1e-12), (0.0, 1e-5)):
        small = run(sd.Adaptive(rtol, atol, sigma_data=1.0), start, AXES.model(process))
        large = run(sd.Adaptive(rtol, 1000 * atol, sigma_data=1000.0), 1000 * start, big.model(scaled))
        assert torch.equal(small.accepted, large.accepted)
        torch.testing.assert_close(1000 * small.x, large.x, rtol=1e-8, atol=1e-6)


class Unscaled(sd.LinearSDE):
    """`x / alpha` of the process."""

    t_min, t_max = SDE.t_min, SDE.t_max

    def scales(self, t):
        alpha, sigma = SDE.scales(t)
        return torch.ones_like(t), sigma / alpha


def test_errors_are_those_of_the_data_whatever_the_scale_of_the_state():
    """The solve of `x / alpha` takes the same steps."""
    x = AXES.marginal(SDE, 1.0).sample(6, seed=0)
    for rtol, atol in ((0.0, 1e-5), (1e-4, 1e-9)):
        solver = sd.Adaptive(rtol, atol, sigma_data=0.6)
        ours, theirs = run(solver, x, AXES.model(SDE)), run(solver, x / SDE.alpha(1.0), AXES.model(Unscaled()))
        if rtol == 0:
            assert torch.equal(ours.accepted, theirs.accepted)
            assert torch.equal(ours.rejected, theirs.rejected)
            torch.testing.assert_close(ours.x / SDE.alpha(1e-3), theirs.x, rtol=1e-7, atol=1e-7)
        else:  # the size of a state is taken over both ends of a step
            assert ours.accepted.sum().item() == pytest.approx(theirs.accepted.sum().item(), rel=0.12)


def test_gradients_are_those_of_the_flow():
    """d x_end / d x_start of a Gaussian's flow, in closed form."""
    x = AXES.marginal(SDE, 1.0).sample(3, seed=0).requires_grad_()
    out = run(at(1e-7), x, AXES.model(SDE), differentiable=True).x
    (gradient,) = torch.autograd.grad(out.sum(), x)
    first, last = AXES.marginal(SDE, 1.0).cov.diagonal(), AXES.marginal(SDE, 1e-3).cov.diagonal()
    torch.testing.assert_close(gradient, (last / first).sqrt().expand(3, 4), rtol=1e-4, atol=1e-4)


def test_it_refuses_noise_and_single_steps():
    model = scalar_target().model(sd.VP())
    x, times, noise = torch.zeros(1, 1), torch.tensor([1.0, 0.1], dtype=F64), sd.RowNoise(0).open()
    with pytest.raises(sd.CapabilityError, match="ordinary differential equations"):
        list(sd.Adaptive().solve(sd.Reverse(model, 1.0), x, times, noise))
    with pytest.raises(sd.CapabilityError, match=r"Reverse\(model"):
        list(sd.Adaptive().solve(sd.VP(), x, times, noise))
    with pytest.raises(sd.CapabilityError, match="use it by itself"):
        sd.sample(model, (1, 1), solver=sd.PredictorCorrector(sd.Adaptive()), seed=0)


def test_options_are_checked():
    for options, match in (
        ({"rtol": -1.0}, "rtol >= 0"), ({"atol": 0.0}, "atol > 0"), ({"max_nfe": 0}, "max_nfe must be at least 1"),
        ({"max_order": 0}, "max_order must be"), ({"max_order": 6}, "max_order must be"),
        ({"sigma_data": 0.0}, "sigma_data must be positive"),
    ):  # fmt: skip
        with pytest.raises(sd.OptionError, match=match):
            sd.Adaptive(**options)
