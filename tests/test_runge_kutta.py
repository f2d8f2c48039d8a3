"""Tableaus against Butcher's order conditions, fitted orders, EDM's algorithm step by step."""

import pickle
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise
from math import prod

import pytest
import torch
from helpers import NAMED, VARIANCE, TwoFunctions, final_moments, fitted_order, moment_error, name, scalar_target
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.runge_kutta import BOGACKI_SHAMPINE, DORMAND_PRINCE, HEUN, RALSTON, RK4, TABLEAUS, RungeKutta, Tableau
from sdediff.testing import gaussian_targets, linear_sdes, time_grids

F64 = torch.float64
GRIDS = [sd.grids.uniform, sd.grids.log_snr, sd.grids.karras]
METHODS = [RungeKutta(tableau) for tableau in TABLEAUS]


# Tableaus


def forests(vertices, largest):
    """Multisets of rooted trees with this many vertices in all, none with more than `largest`."""
    if vertices == 0:
        yield ()
    for size in range(min(vertices, largest), 0, -1):
        for count in range(1, vertices // size + 1):
            for chosen in combinations_with_replacement(list(trees(size)), count):
                for rest in forests(vertices - size * count, size - 1):
                    yield (*chosen, *rest)


def trees(vertices):
    """All rooted trees with this many vertices; a tree is the tuple of the subtrees of its root."""
    return list(forests(vertices - 1, vertices - 1))


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * prod(map(density, tree))


def weights(tree, a):
    """Butcher's elementary weights of every stage."""
    grown = [[sum(w * v for w, v in zip(row, weights(branch, a), strict=False)) for row in a] for branch in tree]
    return [prod(column) for column in zip(*grown, strict=True)] if tree else [Fraction(1)] * len(a)


def exact(number):
    return Fraction(number).limit_denominator(10**6)


def defects(tableau, b, order):
    """What the order conditions of every tree with so many vertices leave."""
    a = [[exact(w) for w in row] for row in tableau.a]
    return [
        sum(exact(w) * v for w, v in zip(b, weights(tree, a), strict=True)) - Fraction(1, density(tree))
        for tree in trees(order)
    ]


def test_the_rooted_trees_are_as_many_as_cayley_counted():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert all(len(set(trees(n))) == len(trees(n)) for n in range(1, 7))
    assert sorted(density(tree) for tree in trees(4)) == [4, 8, 12, 24]


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=name)
def test_the_order_conditions_hold_up_to_the_order_and_no_further(tableau):
    for order in range(1, tableau.order + 1):
        assert not any(defects(tableau, tableau.b, order))
    assert any(defects(tableau, tableau.b, tableau.order + 1))
    assert all(exact(c) == sum(map(exact, row)) for c, row in zip(tableau.c, tableau.a, strict=True))


@pytest.mark.parametrize("tableau", [BOGACKI_SHAMPINE, DORMAND_PRINCE], ids=name)
def test_the_second_weights_of_a_pair_are_one_order_lower(tableau):
    second = [exact(w) - exact(e) for w, e in zip(tableau.b, tableau.error, strict=True)]
    for order in range(1, tableau.order):
        assert not any(defects(tableau, second, order))
    assert any(defects(tableau, second, tableau.order))


def test_the_pairs_end_where_they_begin():
    assert [tableau.name for tableau in TABLEAUS.values() if tableau.fsal] == ["bosh3", "dopri5"]
    assert [tableau.calls for tableau in TABLEAUS.values()] == [2, 2, 2, 3, 4, 3, 6]
    ends_elsewhere = Tableau("mine", 1, a=((), (0.5,), (0.25, 0.75)), b=(0.5, 0.5, 0.0), c=(0, 0.5, 1))
    assert not ends_elsewhere.fsal
    assert ends_elsewhere.calls == 2


def test_a_tableau_that_does_not_fit_together_is_refused():
    for wrong in (
        {"a": ((), (1, 0))},
        {"a": ((),)},
        {"c": (0,)},
        {"error": (1.0, -0.5, -0.5)},
    ):
        with pytest.raises(sd.OptionError, match="'mine' has 2 weights b, so it needs rows a of 0"):
            Tableau(**{"name": "mine", "order": 2, "a": ((), (1,)), "b": (0.5, 0.5), "c": (0, 1)} | wrong)
    for wrong, sums in (
        ({"c": (0, 0.5)}, "1 in place of 0.5"),
        ({"b": (0.5, 0.4)}, "0.9"),
        ({"error": (1, 0.5)}, "1.5"),
    ):
        with pytest.raises(sd.OptionError, match=rf"sums to {sums}"):
            Tableau(**{"name": "mine", "order": 2, "a": ((), (1,)), "b": (0.5, 0.5), "c": (0, 1)} | wrong)


# Orders


@pytest.mark.parametrize("steps", [[40, 80, 160, 320], [41, 79, 161, 319]], ids=["even", "odd"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize(
    ("solver", "order"), [*((sd.EulerMaruyama(level), 1) for level in (0.0, 0.5, 1.0, 1.5)), (sd.Heun(), 2)], ids=name
)
def test_order_on_exact_moments(solver, order, grid, steps):
    sde = sd.VP()
    errors = [moment_error(solver, sde, grid(sde, n, t_min=0.1), draws=n * bool(solver.noise_level)) for n in steps]
    assert solver.order == order
    assert fitted_order(errors, steps) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("steps", [[20, 40, 80], [21, 39, 81]], ids=["even", "odd"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize("solver", METHODS, ids=name)
def test_runge_kutta_orders_on_exact_moments(solver, grid, steps):
    sde = sd.VP()
    errors = [moment_error(solver, sde, grid(sde, n, t_min=0.1)) for n in steps]
    assert fitted_order(errors, steps) == pytest.approx(solver.order, abs=0.5)


class Pendulum(sd.SDE):
    """A forward process without noise, in which the time has its part."""

    t_min, t_max = 0.0, 4.0

    def drift(self, t, x):
        return torch.stack([x[:, 1], -x[:, 0].sin() + (3 * t).cos()], dim=1)

    def diffusion(self, t, x):
        return 0.0

    noisy = False


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("solver", [*METHODS, sd.Heun()], ids=name)
def test_orders_on_a_forward_process_in_both_directions(solver, direction):
    x = torch.tensor([[[0.3, 0.1]], [[-2.0, 1.0]]], dtype=F64).reshape(2, 2, 1)

    def end(solver, n):
        times = torch.linspace(0, 4, n + 1, dtype=F64)
        *_, last = solver.solve(Pendulum(), x, times if direction > 0 else times.flip(0), None)
        return last

    reference = end(RungeKutta("dopri5"), 2000)
    steps = [41, 80, 161]
    errors = [(end(solver, n) - reference).square().mean().sqrt().item() for n in steps]
    # dopri5 was made for a small leading term of its error, and falls faster here
    assert -0.3 < fitted_order(errors, steps) - solver.order < (1.2 if solver.order == 5 else 0.3)


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=name)
def test_a_step_is_its_formula_and_asks_for_what_it_needs(tableau):
    calls = []
    model = scalar_target().model(sd.VP())
    watched = sd.ScoreModel(lambda x, t: calls.append(t[0].item()) or model.network(x, t), sd.VP(), "v")
    flow = sd.Reverse(watched, 0.0)
    times = torch.tensor([0.8, 0.5, 0.3], dtype=F64)
    x = torch.tensor([[0.3], [-1.2]], dtype=F64)
    got = list(RungeKutta(tableau).solve(flow, x, times, None))
    assert len(calls) == 2 * tableau.calls
    for state, t, s in zip(got, times[:-1], times[1:], strict=True):
        slopes = []
        for row, c in zip(tableau.a, tableau.c, strict=True):
            ahead = x + (s - t) * sum((w * k for w, k in zip(row, slopes, strict=True)), torch.zeros_like(x))
            slopes.append(flow.drift(t + c * (s - t), ahead))
        x = x + (s - t) * sum(w * k for w, k in zip(tableau.b, slopes, strict=True))
        torch.testing.assert_close(state, x, rtol=1e-12, atol=1e-12)


def test_runge_kutta_is_called_by_the_name_of_its_tableau_or_given_one():
    model = scalar_target().model(sd.VP())
    by_name, given = (
        sd.sample(model, (3, 1), solver=RungeKutta(which), steps=5, seed=0, dtype=F64).x
        for which in ("ralston", RALSTON)
    )
    assert torch.equal(by_name, given)
    assert RungeKutta().order == 4
    assert RungeKutta(HEUN).order == 2
    assert RungeKutta(RK4).deterministic
    assert "rk4" in repr(RungeKutta(RK4))
    assert pickle.loads(pickle.dumps(RungeKutta(RK4))) == RungeKutta(RK4)
    hash(RungeKutta(RK4))
    with pytest.raises(sd.OptionError, match=r"Unknown tableau 'rk5': write a Tableau\(...\) or one of 'midpoint', "):
        RungeKutta("rk5")
    with pytest.raises(sd.CapabilityError, match="would drop the noise"):
        RungeKutta().start(sd.Reverse(model, 1.0), torch.zeros(1, 1), torch.tensor([0.5, 0.4]), None)


def test_a_stage_at_the_end_of_a_step_is_at_the_very_next_time():
    seen = []
    model = sd.ScoreModel(lambda x, t: seen.append(t[0].item()) or x, sd.VP())
    times = sd.grids.log_snr(sd.VP(), 9)
    for state in RungeKutta().solve(sd.Reverse(model, 0.0), torch.ones(1, 1, dtype=F64), times, None):
        assert state.isfinite().all()
    assert seen[::4] == times[:-1].tolist()
    assert seen[3::4] == times[1:].tolist()


@pytest.mark.parametrize("solver", [sd.Heun(), RungeKutta("rk4")], ids=name)
def test_likelihoods_are_solved_too(solver):
    """The augmented process of a likelihood is not the reverse of a model; its states are wider."""
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), 0.3)
    sde = sd.VP()
    x = target.sample(4, seed=0)
    times = sd.grids.uniform(sde, 200, t_min=0.02).flip(0)
    got = sd.log_prob(target.model(sde), x, solver=solver, times=times, prior=target.marginal(sde, 1.0))
    torch.testing.assert_close(got.value, target.marginal(sde, 0.02).log_prob(x), rtol=0, atol=2e-2)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_euler_maruyama_keeps_the_marginals_for_every_noise_level(sde, level):
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    coarse, fine = (
        final_moments(sd.EulerMaruyama(level), sde, sd.grids.log_snr(sde, n, t_min=low), n * bool(level))
        for n in (150, 300)
    )
    mean, variance = 2 * fine[0] - coarse[0], 2 * fine[1] - coarse[1]
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=5e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=1e-2)


def test_an_euler_maruyama_step_is_its_formula():
    sde, x = sd.VP(), torch.tensor([[0.3], [-1.2]], dtype=F64)
    times = torch.tensor([0.8, 0.6], dtype=F64)
    h = times[1] - times[0]
    process = sd.Reverse(scalar_target().model(sde), 1.0)
    z = sd.RowNoise(4).open().normal(x)
    (got,) = sd.EulerMaruyama().solve(process, x, times, sd.RowNoise(4).open())
    expected = x + h * process.drift(times[0], x) + process.diffusion(times[0], x) * h.abs().sqrt() * z
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_euler_maruyama_converges_strongly_on_one_brownian_path():
    """Additive noise: strong order 1, coarse and fine grids coupled through the same BrownianPath."""
    sde = sd.VP()
    model = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-0.5], [0.7]], dtype=F64), torch.tensor([0.5, 0.3])
    ).model(sde)
    path = sd.BrownianPath(0, 0.1, 1.0)
    x = torch.linspace(-2, 2, 64, dtype=F64)[:, None]

    def end(n):
        times = sd.grids.uniform(sde, n, t_min=0.1)
        return sd.sample(model, x.shape, x_init=x, times=times, solver=sd.EulerMaruyama(), noise=path, final="none").x

    reference = end(1024)
    errors = [(end(n) - reference).square().mean().sqrt().item() for n in (16, 32, 64)]
    assert fitted_order(errors, [16, 32, 64]) == pytest.approx(1, abs=0.2)


# Heun in EDM's form


def edm(denoiser, y, s, churn=0.0, highest=float("inf"), normal=None):
    """Karras et al. 2022, algorithm 2, for a denoiser D(y, s) of y = x / alpha, on a grid s of sigma / alpha."""
    gamma = min(churn / (len(s) - 1), 2**0.5 - 1)
    for now, after in pairwise(s):
        raised = min(now * (1 + gamma), highest)
        if churn:
            y = y + max(raised**2 - now**2, 0) ** 0.5 * normal(y)
        d = (y - denoiser(y, raised)) / raised
        ahead = y + (after - raised) * d
        if after != 0:
            d_ahead = (ahead - denoiser(ahead, after)) / after
            ahead = y + (after - raised) * (d + d_ahead) / 2
        y = ahead
        yield y


@pytest.mark.parametrize("churn", [0.0, 1.2, 10.0])
@pytest.mark.parametrize("sde", [sd.EDM(), sd.VP(), sd.RectifiedFlow(), TwoFunctions()], ids=name)
def test_heun_is_algorithm_2_of_edm_step_by_step(sde, churn):
    """The larger churn is held at sqrt(2) - 1 a step, and the raised level at that of t_max."""
    target = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0, 0.0], [1.5, 0.5]], dtype=F64), torch.tensor([0.2, 0.3])
    )
    model, sde = target.model(sde), sd.as_linear(sde)
    still = target.model(sd.EDM(sigma_max=1e6))
    times = sd.grids.karras(sde, 6, t_min=sde.time(torch.tensor(6.0, dtype=F64)).item())
    alpha, s = sde.alpha(times), (-sde.log_snr(times) / 2).exp()
    x = target.marginal(sde, times[0]).sample(5, seed=0)
    solver = sd.Heun(churn=churn)
    assert solver.deterministic == (churn == 0)
    got = list(solver.solve(solver.process(model), x, times, sd.RowNoise(0).open()))
    algorithm = edm(
        lambda y, s: still.denoised(s, y), x / alpha[0], s.tolist(), churn, s[0].item(), sd.RowNoise(0).open().normal
    )
    for state, y, a in zip(got, algorithm, alpha[1:], strict=True):
        torch.testing.assert_close(state, a * y, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers, with numpy 2
def test_heun_is_that_of_diffusers():
    """HeunDiscreteScheduler in float32, on its own sigmas, down to sigma 0."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.HeunDiscreteScheduler(1000, 1e-4, 0.02, "linear", use_karras_sigmas=True)
    theirs.set_timesteps(9)
    times = torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]).double()  # the inner ones are there twice
    assert times[-1] == 0
    calls = []

    def network(x, t):
        calls.append(t[0].item())
        return (x / (1 + t.reshape(-1, 1))).sin()

    x = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = sd.ScoreModel(network, sd.EDM(sigma_max=200.0))
    ours = list(sd.Heun().solve(sd.Heun().process(model), x, times, None))
    assert len(calls) == 2 * 9 - 1
    y, states = x, []
    for t in theirs.timesteps:
        first = theirs.state_in_first_order
        theirs.scale_model_input(y, t)
        y = theirs.step(network(y, theirs.sigmas[theirs.step_index].expand(4)), t, y).prev_sample
        if not first or len(states) == 8:
            states.append(y)
    for a, b in zip(ours, states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "edm"])
@pytest.mark.parametrize("sde", [sd.EDM(), sd.RectifiedFlow(t_min=0.0)], ids=name)
def test_the_last_step_to_sigma_zero_is_eulers_and_saves_its_call(sde, prediction):
    calls = []
    model = sd.ScoreModel(lambda x, t: calls.append(t[0].item()) or 0.5 * x.sin(), sde, prediction)
    times = torch.tensor([0.9, 0.4, 0.0], dtype=F64)
    x = torch.tensor([[0.3], [-1.2]], dtype=F64)
    states = list(sd.Heun().solve(sd.Heun().process(model), x, times, None))
    assert len(calls) == 3
    torch.testing.assert_close(states[1], model.denoised(0.4, states[0]), rtol=1e-10, atol=1e-12)


@given(linear_sdes(), gaussian_targets(), st.data())
def test_a_heun_step_is_heuns_method_in_sigma_over_alpha(sde, target, data):
    times = data.draw(time_grids(sde, max_steps=3))
    model = target.model(sde)
    x = target.marginal(sde, times[0]).sample(3, seed=0)
    (got, *_) = sd.Heun().solve(sd.Heun().process(model), x, times, None)
    t, s = times[:2]
    alpha, clock = sde.alpha(times), (-sde.log_snr(times) / 2).exp()
    first = model.noise(t, x)
    ahead = alpha[1] * (x / alpha[0] + (clock[1] - clock[0]) * first)
    second = model.noise(s, ahead)
    expected = alpha[1] * (x / alpha[0] + (clock[1] - clock[0]) * (first + second) / 2)
    size = (alpha[1] / alpha[0] * x).abs().max() + (alpha[1] * clock).abs()[:2].max() * (
        first.abs() + second.abs()
    ).max()
    assert (got - expected).abs().max() <= 1e-9 * size


def test_heun_leads_back_and_forth():
    target = scalar_target()
    model = target.model(sd.VP())
    x = target.marginal(sd.VP(), sd.VP().t_min).sample(5, seed=0)
    latent = sd.encode(model, x, solver=sd.Heun(), steps=400).x
    torch.testing.assert_close(latent, target.flow(sd.VP(), x, sd.VP().t_min, 1.0), rtol=0, atol=1e-3)
    back = sd.sample(model, x.shape, x_init=latent, solver=sd.Heun(), steps=400, final="none", seed=0).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


def test_heun_solves_the_flow_of_a_nonlinear_sde_in_its_own_time():
    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(1 + t) * x**3

        def diffusion(self, t, x):
            return 2**0.5

    model = sd.ScoreModel(lambda x, t: -x, Cubic(), prediction="score")
    flow = sd.Reverse(model, 0.0)
    times = torch.tensor([0.9, 0.7], dtype=F64)
    x = torch.tensor([[0.3], [-1.2]], dtype=F64)
    (got,) = sd.Heun().solve(flow, x, times, None)
    first = flow.drift(times[0], x)
    second = flow.drift(times[1], x - 0.2 * first)
    torch.testing.assert_close(got, x - 0.1 * (first + second), rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_the_frame_of_a_reverse_process_has_the_same_drift(sde, level):
    """dx = alpha' y dt + alpha dy, for every noise level."""
    process = sd.Reverse(scalar_target().model(sde), level)
    sde = process.model.linear
    times = torch.tensor([0.8, 0.4, 0.1], dtype=F64) * sde.t_max
    frame = process.frame(times)
    assert frame.defined.all()
    x = torch.tensor([[0.3], [-1.2]], dtype=F64)
    alpha, sigma = sde.scales_at(times)
    d_alpha, d_sigma = sde.scale_rates(times)
    speed = (d_sigma - sigma * d_alpha / alpha) / alpha
    torch.testing.assert_close(frame.clock, sigma / alpha)
    for k in range(3):
        drift = d_alpha[k] / frame.scale[k] * x + frame.scale[k] * speed[k] * frame.drift(k, x)
        torch.testing.assert_close(drift, process.drift(times[k], x), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.RectifiedFlow(), TwoFunctions()], ids=name)
def test_churn_keeps_the_marginal(sde):
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    mean, variance = final_moments(sd.Heun(churn=10.0), sde, sd.grids.log_snr(sde, 300, t_min=low), 300)
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=2e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=2e-3)


def test_options_are_checked():
    with pytest.raises(sd.OptionError, match="churn >= 0"):
        sd.Heun(churn=-1.0)
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="would drop the noise"):
        list(sd.Heun().solve(sd.Reverse(model, 1.0), torch.zeros(1, 1), torch.tensor([0.5, 0.4]), None))


def test_heun_is_refused_where_its_clock_ends():
    model = scalar_target().model(sd.RectifiedFlow(t_min=0.0, t_max=1.0))
    with pytest.raises(sd.CapabilityError, match=r"infinite at t = 1, where alpha is 0.* RungeKutta\('heun'\)"):
        sd.sample(model, (2, 1), solver=sd.Heun(), steps=4, seed=0)
    assert sd.sample(model, (2, 1), solver=RungeKutta("heun"), steps=4, seed=0, t_min=0.1).x.isfinite().all()
    up = torch.tensor([0.0, 0.5], dtype=F64)
    with pytest.raises(sd.CapabilityError, match="cannot start at t = 0, where sigma is 0"):
        sd.encode(model, torch.zeros(1, 1, dtype=F64), solver=sd.Heun(), times=up)


@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.TorchSDE("srk")], ids=name)
def test_a_start_at_pure_noise_is_refused_where_the_diffusion_is_infinite(solver):
    model = scalar_target().model(sd.RectifiedFlow(t_max=1.0))
    with pytest.raises(sd.CapabilityError, match="infinite at t = 1, where alpha is 0"):
        sd.sample(model, (2, 1), solver=solver, steps=4, seed=0)
    assert sd.sample(model, (2, 1), solver=sd.DDPM(), steps=4, seed=0).x.isfinite().all()
    assert sd.sample(model, (2, 1), solver=sd.EulerMaruyama(0.0), steps=4, seed=0).x.isfinite().all()


def test_churn_does_not_encode():
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(scalar_target().model(sd.VP()), torch.zeros(1, 1), solver=sd.Heun(churn=5.0))
