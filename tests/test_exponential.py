"""Exponential integrators against the formula of their docstring, evaluated here by brute force."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import NAMED, BasisStream, fitted_order, name
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import sdediff as sd
from sdediff import tables
from sdediff.exponential import Data, Noise, Points, Split, Steps, interpolated
from sdediff.testing import linear_sdes, time_grids

F64 = torch.float64
KINDS = ["split", "data", "noise"]
LEVELS = [0.0, 0.5, 1.0, 1.5]
GENERATOR = torch.Generator().manual_seed(0)
MIXTURE = sd.exact.GaussianMixture(
    torch.tensor([1.0, 2.0, 1.0]), torch.randn(3, 2, dtype=F64, generator=GENERATOR), torch.tensor([0.05, 0.3, 0.1])
)
AXES = sd.exact.Gaussian(torch.tensor([0.7, -1.0, 0.0, 0.3], dtype=F64), torch.tensor([0.05, 0.3, 1.5, 4.0], dtype=F64))
"""Errors in four directions, so that no error is small by a change of its sign."""
SINGULAR = sd.RectifiedFlow(t_max=1.0)


def splitting(kind, c):
    return {"split": Split(c), "data": Data(), "noise": Noise()}[kind]


def formula(kind, c):
    """k and g of the docstring, functions of s."""
    return {
        "split": (lambda s: np.hypot(c, s), lambda s: s * c / np.hypot(c, s)),
        "data": (lambda s: s, lambda s: 1.0 + 0 * s),
        "noise": (lambda s: 1.0 + 0 * s, lambda s: -s),
    }[kind]


def node_of(kind, c, log_s):
    s = np.exp(log_s)
    return np.log((s / c + 0.003) / (1 + s / (5 * c))) if kind == "split" else log_s


def value_of(kind, c, model, t, x):
    """Q from `D = A y + g Q`."""
    alpha, sigma = model.linear.alpha(t), model.linear.sigma(t)
    if kind != "split":
        return model.denoised(t, x) if kind == "data" else model.noise(t, x)
    y, s = x / alpha, sigma / alpha
    k2 = c**2 + s**2
    return (model.denoised(t, x) - c**2 / k2 * y) / (s * c / k2.sqrt())


def brute_force(kind, c, level, alpha, log_s, points=120):
    """keep, spread, and points in log s with the weights of the integral, for a step from entry 0 to entry 1."""
    k, g = formula(kind, c)
    p, s, e = 1 + level**2, *np.exp(log_s)
    x, w = np.polynomial.legendre.leggauss(points)
    at = (log_s[0] + log_s[1]) / 2 + (log_s[0] - log_s[1]) / 2 * x
    w = (log_s[0] - log_s[1]) / 2 * w
    pull = (k(e) / k(np.exp(at))) ** p
    variance = (2 * np.exp(2 * at) * pull**2 * w).sum()
    keep = alpha[1] / alpha[0] * (k(e) / k(s)) ** p
    weights = alpha[1] * p * pull * g(np.exp(at)) * w
    return keep, alpha[1] * level * math.sqrt(max(variance, 0)), at, weights


def lagrange(nodes, at):
    """The Lagrange polynomials of the nodes at some points, `(nodes, points)`, by solving for their coefficients."""
    powers = np.arange(len(nodes))
    middle = np.mean(nodes)
    return np.linalg.solve(((nodes - middle)[:, None] ** powers).T, (at - middle) ** powers[:, None])


def spans():
    """A step in log s of either direction, and alphas at its ends."""
    number = st.floats(0.05, 2.0)
    ends = st.tuples(st.floats(-4, 4), st.floats(-2, 2).filter(lambda d: abs(d) > 0.05))
    return st.tuples(ends.map(lambda pair: np.array([pair[0], pair[0] + pair[1]])), st.tuples(number, number))


# One step


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@given(spans(), st.floats(0.1, 3.0))
def test_steps_are_the_formula(kind, level, span, c):
    """keep, spread and the integrals of powers of the node, in both directions of time if there is no noise."""
    log_s, alpha = span
    log_s[1] = log_s[0] + (log_s[1] - log_s[0]) / (1 + level**2)  # over which the integrand changes likewise
    log_s = np.sort(log_s)[::-1] if level else log_s
    alpha = np.array(alpha)
    ends = Points(alpha, alpha * np.exp(log_s))
    steps = splitting(kind, c).steps(ends[:1], ends[1:], np.array([level]))
    keep, spread, at, weights = brute_force(kind, c, level, alpha, log_s)
    assert steps.keep[0] == pytest.approx(keep, rel=1e-10)
    assert steps.spread[0] == pytest.approx(spread, rel=1e-10, abs=1e-14)
    for power in range(6):
        expected = weights @ node_of(kind, c, at) ** power
        scale = np.abs(weights) @ np.abs(node_of(kind, c, at)) ** power
        assert (steps.weights[0] @ steps.u[0] ** power) == pytest.approx(expected, rel=1e-8, abs=1e-8 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_brute_force_of_these_tests_agrees_with_adaptive_quadrature(kind):
    c, level, alpha, log_s = 0.7, 1.5, np.array([0.4, 0.9]), np.array([1.2, -0.7])
    k, g = formula(kind, c)
    p, e = 1 + level**2, np.exp(log_s[1])
    keep, spread, at, weights = brute_force(kind, c, level, alpha, log_s)
    total, _ = quad(lambda u: p * (k(e) / k(np.exp(u))) ** p * g(np.exp(u)) * np.sin(u), log_s[1], log_s[0])
    variance, _ = quad(lambda u: 2 * np.exp(2 * u) * (k(e) / k(np.exp(u))) ** (2 * p), log_s[1], log_s[0])
    decay, _ = quad(lambda u: np.exp(2 * u) / (c**2 + np.exp(2 * u)), log_s[1], log_s[0])
    exponents = {"split": decay, "data": log_s[0] - log_s[1], "noise": 0.0}  # int (1 - A) dlog s
    assert weights @ np.sin(at) == pytest.approx(alpha[1] * total, rel=1e-9)
    assert spread == pytest.approx(alpha[1] * level * math.sqrt(variance), rel=1e-9)
    assert keep == pytest.approx(alpha[1] / alpha[0] * math.exp(-p * exponents[kind]), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_values_and_nodes_are_those_of_the_splitting(sde, kind):
    c, model = 0.8, MIXTURE.model(sde)
    x = MIXTURE.sample(3, seed=0)
    for t in sde.time(torch.tensor([3.0, 0.0, -3.0] if sde.log_snr(sde.t_max) < -3 else [3.0, 2.0, 1.0], dtype=F64)):
        part = splitting(kind, c)
        got = model.combine(t, x, *part.value(*sde.scales_at(t)))
        torch.testing.assert_close(got, value_of(kind, c, model, t, x), rtol=1e-9, atol=1e-9)
        at = Points.at(sde, t[None])
        u = part.node(at)
        log_s = np.log(at.sigma / at.alpha)
        np.testing.assert_allclose(u, node_of(kind, c, log_s), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(part.log_s(u), log_s, rtol=1e-9, atol=1e-9)


@given(linear_sdes(), st.floats(0.2, 3.0), st.sampled_from([0.0, 0.3, 1.0, 1.7, "wavy"]), st.data())
def test_split_is_exact_for_round_gaussian_data_at_any_noise_level(sde, c, level, data):
    """Mean and variance of the marginal after every step, however long, from the affine map of the solve."""
    times = data.draw(time_grids(sde, max_steps=3))
    order = data.draw(st.sampled_from([None, 1, 2, 3]))
    function = (lambda t: 0.2 + (9 * t).sin() ** 2) if level == "wavy" else level
    solver = sd.Exponential(order, noise_level=function, sigma_data=c)
    model = sd.exact.Gaussian(torch.zeros(1, dtype=F64), c**2).model(sde)
    n = len(times) - 1
    x = torch.zeros(2 + n, 1, dtype=F64)
    x[1] = 1
    states = list(solver.solve(solver.process(model), x, times, BasisStream()))
    for t, state in zip(times[1:], states, strict=True):
        variance = state[1:, 0] ** 2
        variance[0] *= sde.alpha(times[0]) ** 2 * c**2 + sde.sigma(times[0]) ** 2
        assert state[0].abs().item() < 1e-9
        expected = sde.alpha(t) ** 2 * c**2 + sde.sigma(t) ** 2
        assert variance.sum().item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_value_is_integrated_exactly_in_one_step(kind, level):
    """A network that answers with a constant of the splitting: the state is `keep x + integral + spread z`."""
    sde, c = sd.VP(), 0.6
    prediction = {"split": "edm", "data": "data", "noise": "noise"}[kind]
    model = sd.ScoreModel(lambda x, t: torch.full_like(x, 0.7), sde, prediction, sigma_data=c)
    times = torch.tensor([0.9, 0.2], dtype=F64)
    alpha, sigma = (part.numpy() for part in sde.scales_at(times))
    keep, spread, _, weights = brute_force(kind, c, level, alpha, np.log(sigma / alpha), points=400)
    solver = sd.Exponential(noise_level=level, predict=kind)  # takes sigma_data from the model
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
    (out,) = solver.solve(solver.process(model), x, times, BasisStream())
    expected = 0.7 * weights.sum() + np.array([0, keep, spread])
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", range(1, 7))
@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_weights_integrate_polynomials_below_their_order(kind, order, data):
    """On irregular nodes, also ones beyond the step."""
    gaps = data.draw(st.lists(st.floats(0.1, 1.0), min_size=order, max_size=order))
    coefficients = np.array(data.draw(st.lists(st.floats(-2, 2), min_size=order, max_size=order)))
    log_s = 1.0 + np.cumsum([-0.6, *gaps])  # the step is from entry 1 to entry 0
    alpha = np.array([0.7, 0.8])
    ends = Points(alpha[::-1], alpha[::-1] * np.exp(log_s[[1, 0]]))
    steps = splitting(kind, 0.7).steps(ends[:1], ends[1:], np.zeros(1))
    _, _, at, weights = brute_force(kind, 0.7, 0.0, ends.alpha, log_s[[1, 0]])
    for nodes in (log_s[1:], log_s[:-1]):  # predictor, corrector
        nodes = node_of(kind, 0.7, nodes)
        got = interpolated(steps, nodes[None])[0] @ np.polynomial.polynomial.polyval(nodes, coefficients)
        exact = weights @ np.polynomial.polynomial.polyval(node_of(kind, 0.7, at), coefficients)
        assert got == pytest.approx(exact, rel=1e-7, abs=1e-7)


# Whole tables


def predict_evaluate_correct(kind, c, order, corrector, level, model, x, times, stream):
    """What the folded table stands for, spelled out: the state after every step, before its correction."""
    alpha, sigma = (part.numpy() for part in model.linear.scales_at(times))
    log_s = np.log(sigma / alpha)
    nodes, values, states, linear, step = [], [], [], None, None
    for i, t in enumerate(times[:-1]):
        nodes.insert(0, node_of(kind, c, log_s[i]))
        values.insert(0, value_of(kind, c, model, t, x))

        def integral(known, step):
            _, _, at, w = step
            parts = lagrange(np.array(nodes[:known]), node_of(kind, c, at)) @ w
            return sum(part * value for part, value in zip(parts.tolist(), values, strict=False))

        if i and (corrector or i < order):
            x = linear + integral(min(order, i) + 1, step)
        middle = level((t + times[i + 1]) / 2) if callable(level) else level
        step = brute_force(kind, c, float(middle), alpha[i : i + 2], log_s[i : i + 2])
        linear = step[0] * x
        if step[1]:
            linear = linear + step[1] * stream.unit(x, t, times[i + 1])
        x = linear + integral(min(order, i + 1), step)
        states.append(x)
    return states


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_table_is_predict_evaluate_correct(kind, order, corrector):
    sde, c = sd.VP(), 0.7
    model = MIXTURE.model(sde)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    ragged = torch.tensor([1.0, 0.85, 0.8, 0.55, 0.4, 0.33, 0.2, 0.1, 0.06], dtype=F64)
    for times, level in ((ragged, 0.0), (ragged.flip(0), 0.0), (ragged, 0.8), (ragged, lambda t: 0.5 + t)):
        solver = sd.Exponential(order, noise_level=level, predict=kind, corrector=corrector, sigma_data=c)
        noise = sd.RowNoise(3)
        got = list(solver.solve(solver.process(model), x, times, noise.open()))
        expected = predict_evaluate_correct(kind, c, order, corrector, level, model, x, times, noise.open())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * (1 + b.abs().max().item()))


@given(linear_sdes(), st.sampled_from(["data", "noise"]), st.data())
def test_first_order_is_ddim(sde, kind, data):
    times = data.draw(time_grids(sde, max_steps=4))
    model = MIXTURE.model(sde)
    x = MIXTURE.marginal(sde, sde.t_max).sample(3, seed=0)
    run = lambda solver: list(solver.solve(solver.process(model), x, times, sd.RowNoise(1).open()))  # noqa: E731
    first = run(sd.Exponential(1, predict=kind, corrector=False))
    for a, b in zip(first, run(sd.DDIM()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * (1 + b.abs().max().item()))
    if kind == "data":  # SDE-DPM-Solver++(1) is DDPM
        noisy = run(sd.Exponential(1, noise_level=1.0, predict=kind, corrector=False))
        for a, b in zip(noisy, run(sd.DDPM()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * (1 + b.abs().max().item()))


@given(linear_sdes(), st.floats(0, 1.7), st.data())
def test_one_step_of_a_constant_value_is_the_closed_form(sde, level, data):
    """`sigma_s / sigma_t exp(-l^2 h) x + alpha_s (1 - exp(-(1 + l^2) h)) xhat + sigma_s sqrt(1 - exp(-2 l^2 h)) z`, and
    the step of constant noise."""
    times = data.draw(time_grids(sde, max_steps=4))[:2]
    (alpha, alpha_s), (sigma, sigma_s) = sde.scales_at(times)
    h = torch.log(alpha_s / sigma_s) - torch.log(alpha / sigma)
    model, x = MIXTURE.model(sde), MIXTURE.marginal(sde, times[0]).sample(3, seed=0)
    denoised, noise = model.denoised(times[0], x), model.noise(times[0], x)

    def step(level, kind):
        solver = sd.Exponential(1, noise_level=level, predict=kind, corrector=False)
        (out,) = solver.solve(solver.process(model), x, times, sd.RowNoise(1).open())
        return out

    z = sd.RowNoise(1).open().normal(x)
    expected = sigma_s / sigma * (-(level**2) * h).exp() * x - alpha_s * torch.expm1(-(1 + level**2) * h) * denoised
    expected = expected + sigma_s * (-torch.expm1(-2 * level**2 * h)).sqrt() * z
    torch.testing.assert_close(step(level, "data"), expected, rtol=1e-7, atol=1e-8 * (1 + expected.abs().max().item()))
    terms = alpha_s / alpha * x, sigma_s * torch.expm1(h) * noise
    scale = terms[0].abs().max().item() + terms[1].abs().max().item()
    torch.testing.assert_close(step(0.0, "noise"), terms[0] - terms[1], rtol=0, atol=1e-8 * scale)


@given(linear_sdes(), st.data())
def test_second_order_on_data_is_dpm_solver_plus_plus_2m(sde, data):
    """The integral of the line through two values; the authors' short cut has `(1 - exp(-h)) / 2` for
    `(h - 1 + exp(-h)) / h`, the same to first order in h."""
    times = data.draw(time_grids(sde, max_steps=12).filter(lambda grid: len(grid) > 3))
    model, x = MIXTURE.model(sde), MIXTURE.marginal(sde, times[0]).sample(3, seed=0)
    solver = sd.Exponential(2, predict="data", corrector=False)
    states = [x, *solver.solve(solver.process(model), x, times, None)]
    alpha, sigma = sde.scales_at(times)
    h = (alpha / sigma).log().diff()
    for i in range(2, len(times) - 1):  # step 0 is of first order, and corrected by step 1
        if h[i] > 4:
            continue  # the solver's quadrature has 40 points, which is not rounding there
        before, now = (model.denoised(times[k], states[k]) for k in (i - 1, i))
        slope = (now - before) / h[i - 1]
        expected = sigma[i + 1] / sigma[i] * states[i] - alpha[i + 1] * torch.expm1(-h[i]) * now
        expected = expected + alpha[i + 1] * (h[i] - 1 + (-h[i]).exp()) * slope
        size = 1 + states[i].abs().max().item() + slope.abs().max().item()
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-7, atol=1e-8 * size)


def scheduled(make, n=200, sub=14):
    """A scheduler of diffusers, our process and model for it, and its grid."""
    kind = make(n, 1e-4, 0.05, "linear")
    chain = sd.DiscreteVP(kind.betas.double())
    network = lambda x, t: (x + t.reshape(-1, 1) / n).sin()  # noqa: E731
    model = sd.ScoreModel(network, chain, "noise", time=lambda t: chain.timestep(t).float())
    kind.set_timesteps(sub)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return kind, network, model, (kind.timesteps.double() + 1) / n, x


ON_ARRAYS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with torch 2.4


@ON_ARRAYS
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_steps_equal_those_of_diffusers_dpm_solver(level):
    """Second order, from our states: theirs starts with a plain step that ours corrects when the next begins."""
    diffusers = pytest.importorskip("diffusers")
    kind, network, model, times, x = scheduled(
        lambda *args: diffusers.DPMSolverMultistepScheduler(
            *args, solver_order=2, solver_type="heun", lower_order_final=False,
            algorithm_type="sde-dpmsolver++" if level else "dpmsolver++",
        )
    )  # fmt: skip
    solver = sd.Exponential(2, noise_level=level, predict="data", corrector=False)
    ours = list(solver.solve(solver.process(model), x, times, sd.RowNoise(5).open()))
    stream = sd.RowNoise(5).open()
    for k, (t, before, after) in enumerate(zip(kind.timesteps[:-1], [x, *ours], ours, strict=False)):
        z = stream.normal(before) if level else None
        theirs = kind.step(network(before, t.float()), t, before, variance_noise=z).prev_sample
        if k != 1:
            torch.testing.assert_close(after, theirs.double(), rtol=2e-5, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")


@ON_ARRAYS
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_steps_equal_those_of_diffusers_unipc(order, variant):
    """Whole chains, each on its own states."""
    diffusers = pytest.importorskip("diffusers")
    kind, network, model, times, x = scheduled(
        lambda *args: diffusers.UniPCMultistepScheduler(
            *args, solver_order=order, solver_type=variant, predict_x0=True, lower_order_final=False
        )
    )
    solver = sd.UniPC(order, variant=variant)
    ours = list(solver.solve(solver.process(model), x, times, sd.RowNoise(5).open()))
    theirs = x
    for t, state in zip(kind.timesteps[:-1], ours, strict=True):
        theirs = kind.step(network(theirs, t.float()), t, theirs).prev_sample
        torch.testing.assert_close(state, theirs.double(), rtol=2e-4, atol=2e-4)


# Orders


def flow_error(solver, sde, times):
    """Distance from the exact flow of a Gaussian, in its deviations."""
    model = AXES.model(sde)
    start, end = times[0].item(), times[-1].item()
    x = AXES.marginal(sde, start).sample(3, seed=0)
    *_, out = solver.solve(solver.process(model), x, times, sd.RowNoise(0).open())
    scale = AXES.marginal(sde, end).cov.diagonal().sqrt()
    return ((out - AXES.flow(sde, x, start, end)) / scale).square().mean().sqrt().item()


EVEN_AND_ODD = [20, 41, 80, 161]
GRIDS = [sd.grids.log_snr, sd.grids.karras, sd.grids.uniform, sd.grids.tapered]
CASES = [("split", grid) for grid in GRIDS] + [("data", GRIDS[0]), ("noise", GRIDS[0]), ("data", GRIDS[3])]


@pytest.mark.parametrize(("kind", "grid"), CASES, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("corrector", [False, True])
def test_orders_on_the_exact_flow(kind, grid, corrector):
    """Every order towards data; the first steps, which know few values, hold encoding at three."""
    sde = sd.VP()
    smooth = grid in GRIDS[:2]
    for order in (1, 2, 3, 4, 5) if smooth else (1, 2, 3):
        solver = sd.Exponential(order, predict=kind, corrector=corrector)
        errors = [flow_error(solver, sde, grid(sde, n, t_min=0.1)) for n in EVEN_AND_ODD]
        claimed = order + 0.6 if corrector and order <= 3 else order - 0.3
        assert fitted_order(errors, EVEN_AND_ODD) > claimed, order
        if order <= 3:
            steps = [2 * n for n in EVEN_AND_ODD]
            errors = [flow_error(solver, sde, grid(sde, n, t_min=0.1).flip(0)) for n in steps]
            assert fitted_order(errors, steps) > min(order + corrector, 3) - 0.3, order


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
def test_orders_of_the_single_step_methods(order, kind, grid):
    sde, steps = sd.VP(), [10, 21, 40]
    solver = sd.ExponentialRungeKutta(order, predict=kind)
    for turn in (lambda t: t, lambda t: t.flip(0)):
        errors = [flow_error(solver, sde, turn(grid(sde, n, t_min=0.1))) for n in steps]
        assert fitted_order(errors, steps) > order - 0.3
        assert errors[-1] < (1e-3 if order == 2 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
def test_single_steps_are_the_textbook_scheme(order, kind):
    """Stages from the formula: each state from the start of its step, through the values at the start and before it."""
    sde, c = sd.CosineVP(), 0.7
    model = MIXTURE.model(sde)
    times = torch.tensor([0.9, 0.5, 0.4], dtype=F64)
    solver = sd.ExponentialRungeKutta(order, predict=kind, sigma_data=c)
    start = MIXTURE.marginal(sde, 0.9).sample(3, seed=0)
    got = list(solver.solve(solver.process(model), start, times, sd.RowNoise(0).open()))
    x = start
    for t, s, state in zip(times, times[1:], got, strict=False):
        ends = [node_of(kind, c, -sde.log_snr(time).item() / 2) for time in (t, s)]
        nodes = np.linspace(*ends, order + 1)
        stages = [t, *sde.time(torch.from_numpy(-2 * splitting(kind, c).log_s(nodes[1:-1]))), s]
        values, before = [], x
        for k in range(order):
            values.append(value_of(kind, c, model, stages[k], x))
            pair = torch.stack([t, stages[k + 1]])
            alpha, sigma = (part.numpy() for part in sde.scales_at(pair))
            keep, _, at, w = brute_force(kind, c, 0.0, alpha, np.log(sigma / alpha))
            used = [0, k] if k else [0]
            parts = lagrange(nodes[used], node_of(kind, c, at)) @ w
            x = keep * before + sum(part * values[j] for part, j in zip(parts.tolist(), used, strict=True))
        torch.testing.assert_close(state, x, rtol=1e-8, atol=1e-8)
    assert sd.sample(model, (2, 2), solver=solver, steps=4, seed=0).nfe == 4 * order + 1


def moment_errors(solver, sde, times):
    """Distance of the means and deviations of the four directions from those of the marginal, without Monte Carlo."""
    n = len(times) - 1
    x = torch.zeros(2 + n, 4, dtype=F64)
    x[1] = 1
    *_, x = solver.solve(solver.process(AXES.model(sde)), x, times, BasisStream())
    first, last = AXES.marginal(sde, times[0]), AXES.marginal(sde, times[-1])
    slope = x[1] - x[0]
    variance = slope**2 * first.cov.diagonal() + (x[2:] - x[0]).square().sum(0)
    scale = last.cov.diagonal().sqrt()
    off = torch.cat([(x[0] + slope * first.mean - last.mean) / scale, variance.sqrt() / scale - 1])
    return off.square().mean().sqrt().item()


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5, lambda t: 0.3 + t], ids=["half", "one", "more", "function"])
@pytest.mark.parametrize("kind", ["split", "data"])
def test_noisy_moments_tend_to_the_marginal_at_their_order(kind, level):
    sde, steps = sd.VP(), [30, 61, 120]
    for order, corrector, claimed in ((1, False, 0.85), (2, False, 1.7), (1, True, 1.7), (2, True, 1.7)):
        solver = sd.Exponential(order, noise_level=level, predict=kind, corrector=corrector)
        errors = [moment_errors(solver, sde, sd.grids.log_snr(sde, n, t_min=0.1)) for n in steps]
        assert fitted_order(errors, steps) > claimed, (order, corrector)
        assert errors[-1] < (0.05 if claimed < 1 else 0.01)


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5])
def test_noisy_moments_of_the_noise_splitting_tend_to_the_marginal(level):
    sde, steps = sd.VP(), [60, 121, 240]
    solver = sd.Exponential(1, noise_level=level, predict="noise", corrector=False)
    errors = [moment_errors(solver, sde, sd.grids.log_snr(sde, n, t_min=0.1)) for n in steps]
    assert fitted_order(errors, steps) > 0.85
    assert errors[-1] < 0.03


# Ends of time


@pytest.mark.parametrize("solver", [sd.Exponential(1), sd.Exponential(3), sd.ExponentialRungeKutta(3)], ids=name)
@pytest.mark.parametrize("sde", [SINGULAR, sd.CosineVP(t_max=1.0)], ids=name)
def test_pure_noise_and_clean_data_are_stepped_to_and_from(sde, solver):
    assert sde.alpha(1.0) == sde.sigma(0.0) == 0
    for turn in (lambda t: t, lambda t: t.flip(0)):
        errors = [flow_error(solver, sde, turn(sd.grids.tapered(sde, n, t_min=0.0))) for n in (20, 40, 80)]
        assert errors[2] < errors[1] < errors[0] < 0.5
        assert errors[2] < (0.06 if solver.order == 1 and not turn(torch.arange(2))[0] else 0.03)


@pytest.mark.parametrize("level", [0.5, 1.5])
def test_noisy_steps_from_pure_noise_to_clean_data(level):
    solver = sd.Exponential(noise_level=level)
    errors = [moment_errors(solver, SINGULAR, sd.grids.tapered(SINGULAR, n, t_min=0.0)) for n in (20, 80)]
    assert errors[1] < errors[0] / 4 < 0.03
    assert errors[1] < 5e-3


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.2], [0.9, 0.5, 0.0]])
@pytest.mark.parametrize("solver", [sd.Exponential(predict="noise"), sd.ExponentialRungeKutta(3, "noise")], ids=name)
def test_the_noise_splitting_says_that_it_cannot_step_from_pure_noise(solver, times):
    model = AXES.model(SINGULAR)
    if times[0] < 1:  # it can step to clean data
        x = AXES.marginal(SINGULAR, 0.9).sample(2, seed=0)
        assert sd.sample(model, (2, 4), x_init=x, times=times, solver=solver, seed=0, final="none").x.isfinite().all()
        return
    with pytest.raises(sd.CapabilityError, match="alpha or sigma is 0"):
        sd.sample(model, (2, 4), times=times, solver=solver, seed=0)


# The object


def test_the_default_order_rises_with_the_number_of_steps():
    solver = sd.Exponential()
    assert [solver.order_for(n) for n in (1, 7, 8, 24, 25, 39, 40, 500)] == [2, 2, 3, 3, 4, 4, 5, 5]
    noisy = sd.Exponential(noise_level=0.5)
    assert {noisy.order_for(n) for n in (1, 10, 20, 40)} == {2}
    assert sd.Exponential(3, noise_level=0.5).order_for(50) == 3
    model = MIXTURE.model(sd.VP())
    assert [solver.table(model, sd.grids.tapered(sd.VP(), n)).B.shape[1] for n in (7, 8, 25, 40)] == [3, 4, 5, 6]


def test_the_deviation_is_the_solvers_or_that_of_an_edm_model_or_one():
    network = lambda x, t: 0 * x  # noqa: E731
    edm = sd.ScoreModel(network, sd.VP(), "edm", sigma_data=0.3)
    plain = sd.ScoreModel(network, sd.VP(), "v", sigma_data=0.3)
    table = lambda c, model: sd.Exponential(2, sigma_data=c).table(model, sd.grids.uniform(sd.VP(), 5)).B  # noqa: E731
    assert torch.equal(table(None, edm), table(0.3, plain))
    assert torch.equal(table(None, plain), table(1.0, edm))
    assert not torch.allclose(table(0.3, plain), table(1.0, plain))
    for solver in (sd.Exponential(), sd.ExponentialRungeKutta()):
        assert torch.equal(solver.grid(edm, 7), sd.grids.tapered(sd.VP(), 7, sigma_data=0.3))
        assert torch.equal(solver.grid(plain, 7, 0.1), sd.grids.tapered(sd.VP(), 7, t_min=0.1))


def test_a_level_that_is_a_function_is_taken_at_the_middle_of_each_step():
    model, times = MIXTURE.model(sd.VP()), torch.tensor([0.9, 0.5, 0.2], dtype=F64)
    seen = []
    sd.Exponential(noise_level=lambda t: seen.append(t.item()) or 0.5).table(model, times)
    assert seen == pytest.approx([0.7, 0.35])
    wavy = sd.Exponential(2, noise_level=lambda t: t).table(model, times)
    for k, middle in enumerate([0.7, 0.35]):
        constant = sd.Exponential(2, noise_level=middle).table(model, times)
        torch.testing.assert_close(wavy.A[k], constant.A[k])
        torch.testing.assert_close(wavy.C[k], constant.C[k])
    assert not sd.Exponential(noise_level=lambda t: 0.0).deterministic
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(model, torch.zeros(1, 2), solver=sd.Exponential(noise_level=lambda t: 0.0))


class Warped(sd.LinearSDE):
    """A process with a parameter that can be changed in place."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self):
        self.speed = torch.tensor(3.0, dtype=F64)

    def scales(self, t):
        return (-self.speed * t).exp(), (-torch.expm1(-2 * self.speed * t)).sqrt()


def test_tables_follow_the_numbers_they_are_made_of():
    sde = Warped()
    model, times = MIXTURE.model(sde), torch.linspace(1, 0.01, 9, dtype=F64)
    solver = sd.Exponential(3, sigma_data=0.5)
    first, again = solver.table(model, times), solver.table(MIXTURE.model(Warped()), times.clone())
    assert torch.equal(first.B, again.B)
    first.A.mul_(2)
    assert torch.equal(solver.table(model, times).A, again.A), "what is kept is not handed out"
    sde.speed.fill_(2.0)
    moved = solver.table(model, times)
    assert not torch.allclose(moved.A, again.A)
    for change in ({"order": 4}, {"corrector": False}, {"predict": "data"}, {"sigma_data": 0.3}, {"noise_level": 0.3}):
        other = dataclasses.replace(solver, **change).table(model, times)
        assert not torch.equal(other.B[-1, :3], moved.B[-1, :3]), change


def test_only_what_cannot_change_is_kept():
    class Half(sd.Exponential):
        factor = 0.5

    assert sd.VP().fixed
    assert not sd.VP(beta_max=torch.tensor(20.0)).fixed
    assert sd.Exponential(3).fixed
    assert not sd.Exponential(noise_level=lambda t: 0.5).fixed
    assert not Half().fixed


@pytest.mark.parametrize("solver", [sd.Exponential(predict="data"), sd.UniPC(), sd.UniPC(5)], ids=repr)
def test_a_step_to_clean_data_takes_the_last_value(solver):
    sde = sd.VP(t_min=0.0)
    target = sd.exact.Gaussian(torch.tensor([0.7], dtype=F64), 0.36)
    x = target.marginal(sde, 1.0).sample(8, seed=0)
    end = sd.sample(target.model(sde), x.shape, solver=solver, steps=40, x_init=x, final="none").x
    torch.testing.assert_close(end, target.flow(sde, x, 1.0, 0.0), rtol=0, atol=1e-3)


def test_networks_that_err_in_predicting_noise_get_steps_where_it_matters():
    """A network with an error of 0.05 in the noise: its own flow is followed, whatever that does to data."""
    sde = sd.VP(t_min=1e-3)
    exact = sd.exact.Gaussian(torch.tensor([0.5], dtype=F64), 0.3).model(sde)
    wrong = sd.ScoreModel(lambda x, t: exact.noise(t, x) + 0.05 * torch.cos(40 * t)[:, None], sde, "noise")
    assert torch.equal(sd.Exponential().grid(wrong, 9), sd.grids.log_snr(sde, 9))
    assert torch.equal(sd.Exponential().grid(exact, 9), sd.grids.tapered(sde, 9))
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    end = sd.sample(wrong, x.shape, x_init=x, solver=sd.TorchDiffEq("dopri8", 1e-10, 1e-10), final="none").x
    for steps, bound in ((20, 1e-2), (50, 1e-3)):
        got = sd.sample(wrong, x.shape, x_init=x, steps=steps, final="none").x
        assert (got - end).abs().max() < bound


def test_autocast_leaves_the_state_alone():
    model = sd.ScoreModel(lambda x, t: 0.5 * x, sd.VP(), "v")
    plain = sd.sample(model, (4, 3), seed=0).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sd.sample(model, (4, 3), seed=0).x
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain)


def test_solvers_are_values():
    for solver in (sd.Exponential(3, 0.5, "data"), sd.UniPC(2, variant="bh1"), sd.ExponentialRungeKutta(2)):
        assert pickle.loads(pickle.dumps(solver)) == solver
        hash(solver)
    assert sd.UniPC().deterministic
    assert not sd.Exponential(noise_level=0.1).deterministic
    assert sd.Exponential(noise_level=0.1).process(MIXTURE.model(sd.VP())).noise_level == 0.1
    assert "calibration=None" in repr(sd.Exponential())


def test_options_are_checked():
    for wrong in (0, 6, 2.0):
        with pytest.raises(sd.OptionError, match="order must be"):
            sd.Exponential(wrong)
    with pytest.raises(sd.OptionError, match="'split', 'data' or 'noise'"):
        sd.Exponential(predict="v")
    for level in (-0.1, math.nan):
        with pytest.raises(sd.OptionError, match="noise_level must be"):
            sd.Exponential(noise_level=level)
    with pytest.raises(sd.OptionError, match="sigma_data must be positive"):
        sd.Exponential(sigma_data=0.0)
    with pytest.raises(sd.OptionError, match="'bh1' or 'bh2'"):
        sd.UniPC(variant="bh3")
    with pytest.raises(sd.OptionError, match="order 2 or 3"):
        sd.ExponentialRungeKutta(4)
    with pytest.raises(sd.OptionError, match="predict must be"):
        sd.ExponentialRungeKutta(2, "v")


def test_steps_can_be_cut():
    steps = Steps(*(np.arange(3.0) for _ in range(2)), *(np.arange(6.0).reshape(3, 2) for _ in range(2)))
    part = steps[np.array([2, 0])]
    assert part.keep.tolist() == part.spread.tolist() == [2, 0]
    assert part.u.tolist() == part.weights.tolist() == [[4, 5], [0, 1]]


# How the values are held


def test_the_ring_and_the_list_give_the_same_numbers(monkeypatch):
    weight = torch.tensor([1.0, -0.7], dtype=F64, requires_grad=True)
    network = lambda x, t: (weight * x + t[:, None]).sin()  # noqa: E731

    def run(solver, model, **options):
        return sd.sample(model, (5, 2), solver=solver, steps=13, seed=0, dtype=F64, **options).x

    solvers = [sd.Exponential(3), sd.Exponential(2, 0.7, "data"), sd.UniPC(), sd.ExponentialRungeKutta(3)]
    for prediction in ("v", "edm", "data"):  # with sigma_data = 1 and 0.5, values do and do not contain x
        model = sd.ScoreModel(network, sd.VP(), prediction)
        ring = [run(solver, model) for solver in solvers]
        for solver, x in zip(solvers, ring, strict=True):
            listed = run(solver, model, differentiable=True).detach()
            torch.testing.assert_close(x, listed, rtol=1e-11, atol=1e-11)
    model, solver = sd.ScoreModel(network, sd.VP(), "score"), sd.Exponential(2, predict="noise")  # -sigma times it
    torch.testing.assert_close(
        run(solver, model), run(solver, model, differentiable=True).detach(), rtol=1e-11, atol=1e-11
    )
    monkeypatch.setattr(tables, "_Ring", None)
    model = MIXTURE.model(sd.VP())
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    wide = sd.sample(model, (3, 2), x_init=x.double(), steps=9, differentiable=True).x
    for dtype, near in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        narrow = sd.sample(model, (3, 2), x_init=x.to(dtype), steps=9).x
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.to(F64), wide, rtol=near, atol=near)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        single = sd.sample(model, (3, 2), x_init=x, steps=9).x
        torch.set_float32_matmul_precision("highest")
        with pytest.raises(TypeError):  # the ring again, which is not there
            sd.sample(model, (3, 2), x_init=x, steps=9)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(single.double(), wide, rtol=1e-3, atol=1e-3)
