"""Inverse problems on Gaussian data, where the posterior is Gaussian and everything has a closed form."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import NAMED, name
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

import sdediff as sd
from sdediff.conjugate import conjugate_gradients
from sdediff.inverse import log_likelihood
from sdediff.inverse_methods import DPS, METHODS, MMPS, PiGDM, Tweedie
from sdediff.measurement import Measurement
from sdediff.noise import RowNoise
from sdediff.operators import Convolution, Downsample, LinearOperator, Mask, Matrix

F64 = torch.float64
D = 6


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


EYE = torch.eye(D, dtype=F64)
MEAN = drawn(D, seed=1)
COV = drawn(D, D, seed=2) @ drawn(D, D, seed=2).T / 4 + 0.1 * EYE
DATA = sd.exact.Gaussian(MEAN, COV)
RANK_TWO = torch.cat([drawn(2, D, seed=4), drawn(2, D, seed=4).sum(0, keepdim=True)])
MAPS = {
    "square": Matrix(drawn(D, D, seed=3)),
    "wide": Matrix(drawn(3, D, seed=4)),
    "rank deficient": Matrix(RANK_TWO),
    "mask": Mask(torch.tensor([True, False, True, True, False, False])),
    "blur": Convolution(torch.tensor([0.25, 0.5, 0.25]), (D,)),
    "means": Downsample(2, (D,)),
    "function": LinearOperator(lambda x: x.cumsum(1)[:, ::2], event=(D,)),
}
S = 0.3
WIDE = MAPS["wide"]
Y = drawn(3, seed=5)


def conditioned(mean, cov, matrix, y, noise):
    """The posterior of N(mean, cov) given `y = matrix x + N(0, noise)`: mean `(*, D)` and covariance."""
    gain = torch.linalg.solve(matrix @ cov @ matrix.T + noise, matrix @ cov).T
    return mean + (y - mean @ matrix.T) @ gain.T, cov - gain @ matrix @ cov


def posterior(A, y, std, data=DATA):
    noise = torch.diag(torch.as_tensor(std, dtype=F64).expand(len(y)) ** 2)
    return sd.exact.Gaussian(*conditioned(data.mean, data.cov, A.dense(), y, noise))


def states(sde, t, rows=4, seed=0):
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return drawn(rows, D, seed=seed) * (alpha**2 + sigma**2).sqrt() + alpha * MEAN


def times_of(sde):
    return [sde.t_min + part * (sde.t_max - sde.t_min) for part in (0.0, 0.1, 0.4, 0.8, 1.0)]


def covariance_given(sde, t):
    """V of the Gaussian data, `(D, D)`."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return sigma**2 * torch.linalg.solve(alpha**2 * COV + sigma**2 * EYE, COV)


def assert_same(found, expected, tolerance=1e-10):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# Exactness.


@pytest.mark.parametrize("method", ["mmps", "mmps-dense"])
@pytest.mark.parametrize("A", MAPS.values(), ids=MAPS)
def test_moment_matching_is_the_posterior_score_of_gaussian_data(A, method):
    y = A(drawn(1, D, seed=6))[0] + S * drawn(*A.measured, seed=7)
    for sde in NAMED:
        exact, guided = posterior(A, y, S).model(sde), sd.LinearInverse(DATA.model(sde), A, y, S, method)
        for t in times_of(sde):
            x = states(sde, t)
            assert_same(guided.score(t, x), exact.score(t, x))
            assert_same(guided.denoised(t, x), exact.denoised(t, x))


@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.05, 2.0), st.floats(0.05, 0.95))
def test_moment_matching_on_drawn_problems(seed, rows, std, part):
    sde, A = sd.VP(), Matrix(drawn(rows, D, seed=seed))
    y, t = drawn(rows, seed=seed + 1), sde.t_min + part * (sde.t_max - sde.t_min)
    x = states(sde, t, seed=seed + 2)
    assert_same(
        sd.LinearInverse(DATA.model(sde), A, y, std).score(t, x), posterior(A, y, std).model(sde).score(t, x), 1e-8
    )


def test_noise_of_every_entry_and_no_noise():
    std, sde = torch.tensor([0.1, 0.5, 2.0]), sd.EDM()
    x, t = states(sde, 0.7), 0.7
    for method in ("mmps", "mmps-dense"):
        found = sd.LinearInverse(DATA.model(sde), WIDE, Y, std, method).score(t, x)
        assert_same(found, posterior(WIDE, Y, std).model(sde).score(t, x))
    mean, _ = conditioned(MEAN, COV, WIDE.dense(), Y, 0 * torch.eye(3, dtype=F64))
    certain = sd.LinearInverse(DATA.model(sde), WIDE, Y, 0.0)
    assert_same(certain.denoised(80.0, 0 * x), mean.expand(4, D), 1e-2)  # pure noise says nothing of the data
    assert_same(certain.denoised(t, x) @ WIDE.dense().T, Y.expand(4, 3))
    double = sd.LinearInverse(DATA.model(sde), RANK_TWO, RANK_TWO @ MEAN, 0.0).denoised(t, x)
    assert_same(double, sd.LinearInverse(DATA.model(sde), RANK_TWO[:2], RANK_TWO[:2] @ MEAN, 0.0).denoised(t, x))


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_pseudoinverse_guidance_is_exact_for_isotropic_data(sde):
    for deviation in (1.0, 0.3):
        data = sd.exact.Gaussian(MEAN, deviation**2)
        for A in (WIDE, MAPS["rank deficient"], MAPS["mask"]):
            y = drawn(*A.measured, seed=8)
            exact = posterior(A, y, S, data).model(sde)
            guided = sd.LinearInverse(data.model(sde), A, y, S, "pigdm", deviation=deviation)
            for t in times_of(sde):
                x = states(sde, t)
                assert_same(guided.score(t, x), exact.score(t, x))

    def rho(t):
        return (0.3**2 * sde.sigma(t) ** 2 / (sde.alpha(t) ** 2 * 0.3**2 + sde.sigma(t) ** 2)).sqrt()

    told = sd.LinearInverse(data.model(sde), A, y, S, "pigdm", deviation=rho)
    assert_same(told.score(t, x), guided.score(t, x))


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_each_method_is_its_formula_with_matrices(sde):
    matrix, eye = WIDE.dense(), torch.eye(3, dtype=F64)
    model = DATA.model(sde)
    for t in times_of(sde)[:-1]:
        x, V = states(sde, t), covariance_given(sde, t)
        xhat = model.denoised(t, x)
        r = Y - xhat @ matrix.T
        rho2 = sde.sigma(t) ** 2 / (sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
        isotropic = torch.linalg.inv(rho2 * matrix @ matrix.T + S**2 * eye)
        expected = {
            "dps": r / S**2 @ matrix @ V,
            "pigdm": r @ isotropic @ matrix @ V,
            "replacement": rho2 * r @ isotropic @ matrix,
        }
        for method, shift in expected.items():
            guided = sd.LinearInverse(model, WIDE, Y, S, method)
            assert_same(guided.denoised(t, x), xhat + shift, 1e-9)
        half = sd.LinearInverse(model, WIDE, Y, S, DPS(scale=0.5)).denoised(t, x)
        assert_same(half, xhat + expected["dps"] / 2, 1e-9)


def test_the_bias_of_dps_is_what_it_leaves_out():
    """DPS has s^2 in place of A V A^T + s^2: for one number, its guidance is (V + s^2) / s^2 times too large."""
    sde, t = sd.VP(), 0.4
    data = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 0.5)
    y, x = torch.ones(1, dtype=F64), drawn(5, 1)
    model, A = data.model(sde), torch.ones(1, 1, dtype=F64)
    right = sd.LinearInverse(model, A, y, S).score(t, x) - model.score(t, x)
    biased = sd.LinearInverse(model, A, y, S, "dps").score(t, x) - model.score(t, x)
    alpha2, sigma2 = sde.alpha(torch.tensor(t)) ** 2, sde.sigma(torch.tensor(t)) ** 2
    V = 0.5 * sigma2 / (alpha2 * 0.5 + sigma2)
    torch.testing.assert_close(biased, right * (V + S**2) / S**2)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.DiscreteVP(torch.linspace(1e-3, 0.1, 40))], ids=name)
def test_a_step_of_normalised_dps_is_that_of_its_paper(sde):
    model, t, step, chain = DATA.model(sde), 0.4 * sde.t_max, 0.7, 500
    guided = sd.LinearInverse(model, WIDE, Y, 0.0, "dps-normalised", step=step, chain=chain)
    x = states(sde, t).requires_grad_()
    distance = (Y - WIDE(model.denoised(t, x))).norm(dim=1)
    (slope,) = torch.autograd.grad((distance**2 / distance.detach()).sum(), x)
    pull = guided.score(t, x.detach()) - model.score(t, x.detach())
    diffusion = sde.rates(torch.tensor(t, dtype=F64))[1]
    torch.testing.assert_close(diffusion**2 * sde.t_max / chain * pull, -step * slope)
    likelihood = log_likelihood(model, WIDE, Y, 0.0, "dps-normalised", step=step, chain=chain)
    x = x.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(likelihood(t, x).sum(), x)[0], pull)
    met = sd.LinearInverse(model, WIDE, WIDE(model.denoised(t, x.detach())), 0.0, "dps-normalised")
    assert (
        torch.equal(met.denoised(t, x.detach()), met.network.model.view("data", t, x.detach()))
        or (met.denoised(t, x.detach()) - model.denoised(t, x.detach())).abs().max() < 1e-9
    )


def test_the_null_space_is_left_alone():
    sde, t = sd.VP(), 0.6
    model, x = DATA.model(sde), states(sde, 0.6)
    data = model.denoised(t, x)
    seen = torch.tensor([True, False, True, True, False, False])
    replaced = sd.LinearInverse(model, seen, Y, 0.0, "replacement").denoised(t, x)
    assert_same(replaced[:, seen], Y.expand(4, 3), 1e-13)
    assert_same(replaced[:, ~seen], data[:, ~seen], 1e-13)
    for A in (WIDE, MAPS["blur"], MAPS["means"], Matrix(RANK_TWO)):
        y = A(drawn(1, D, seed=9))[0]
        found = sd.LinearInverse(model, A, y, 0.0, "replacement").denoised(t, x)
        assert_same(found, data + (y - A(data)) @ torch.linalg.pinv(A.dense()).T, 1e-9)


# Likelihoods.


def test_the_density_of_a_measurement_is_the_normal_one():
    x0 = drawn(4, D, seed=10)
    for std in (S, torch.tensor([0.1, 0.5, 2.0])):
        covariance = torch.diag(torch.as_tensor(std, dtype=F64).expand(3) ** 2)
        exact = MultivariateNormal(WIDE(x0), covariance).log_prob(Y)
        torch.testing.assert_close(Measurement(WIDE, Y, std).log_prob(x0), exact)
    per_row = drawn(4, 3, seed=11)
    exact = MultivariateNormal(WIDE(x0), S**2 * torch.eye(3, dtype=F64)).log_prob(per_row)
    torch.testing.assert_close(Measurement(WIDE, per_row, S).log_prob(x0), exact)


@pytest.mark.parametrize("method", ["mmps", "mmps-dense", "pigdm", "dps", "replacement"])
def test_log_likelihoods_are_gaussian_and_their_gradient_is_the_guidance(method):
    sde, t = sd.VP(), torch.tensor([0.05, 0.3, 0.6, 1.0], dtype=F64)
    model, matrix = DATA.model(sde), WIDE.dense()
    x = drawn(4, D, seed=12).requires_grad_()
    likelihood = log_likelihood(model, WIDE, Y, S, method)
    value = likelihood(t, x)
    xhat = model.denoised(t, x)
    for i in range(4):
        rho2 = sde.sigma(t[i]) ** 2 / (sde.alpha(t[i]) ** 2 + sde.sigma(t[i]) ** 2)
        spread = covariance_given(sde, t[i]) if "mmps" in method else rho2 * EYE
        spread = 0 * EYE if method == "dps" else spread
        exact = MultivariateNormal(xhat[i] @ matrix.T, matrix @ spread @ matrix.T + S**2 * torch.eye(3, dtype=F64))
        torch.testing.assert_close(value[i], exact.log_prob(Y))
    if method != "replacement":
        guided = sd.LinearInverse(model, WIDE, Y, S, method)
        slope = torch.autograd.grad(value.sum(), x)[0]
        assert_same(slope, guided.score(t, x.detach()) - model.score(t, x.detach()), 1e-9)
    if "mmps" in method:  # p(y | x_t) itself
        exact = posterior(WIDE, Y, S).marginal(sde, t[2]).log_prob(x[2:3].detach())
        evidence = MultivariateNormal(MEAN @ matrix.T, matrix @ COV @ matrix.T + S**2 * torch.eye(3, dtype=F64))
        bayes = exact - DATA.marginal(sde, t[2]).log_prob(x[2:3].detach()) + evidence.log_prob(Y)
        torch.testing.assert_close(value[2:3].detach(), bayes)
    if method == "dps":
        wider = MultivariateNormal(xhat[0] @ matrix.T, S**2 / 0.5 * torch.eye(3, dtype=F64)).log_prob(Y)
        torch.testing.assert_close(log_likelihood(model, WIDE, Y, S, DPS(scale=0.5))(t, x)[0], wider)
    with torch.no_grad():
        torch.testing.assert_close(likelihood(t, x.detach()), value.detach())
        assert not likelihood(t, x).requires_grad


# What may be given as A.

MATRIX = WIDE.dense()
NAMELESS = sd.ScoreModel(lambda x, t: DATA.model(sd.VP()).view("v", t, x), sd.VP(), "v")
"""The same model by a network that does not say what its events are."""


def forward(x):
    return (x[..., None, :] @ MATRIX.T.to(x))[..., 0, :]


def adjoint(z):
    return (z[..., None, :] @ MATRIX.to(z))[..., 0, :]


@pytest.mark.parametrize("model", [DATA.model(sd.VP()), NAMELESS], ids=["events known", "not known"])
@pytest.mark.parametrize("method", METHODS)
def test_functions_and_pairs_are_operators(model, method):
    x, t = states(sd.VP(), 0.5), 0.5
    expected = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S, method).score(t, x)
    for A in (forward, (forward, adjoint)):
        assert_same(sd.LinearInverse(model, A, Y, S, method).score(t, x), expected)
        if method != "dps-normalised":
            found = log_likelihood(model, A, Y, S, method)(t, x)
            torch.testing.assert_close(found, log_likelihood(model, WIDE, Y, S, method)(t, x))
    single = sd.LinearInverse(model, (forward, adjoint), Y, S, method).score(t, x.float())
    mixed = sd.LinearInverse(NAMELESS, lambda x: x @ MATRIX.T, Y.float(), S, method).score(t, x)  # looked at as x is
    assert_same(mixed, expected, 1e-5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-3)


def test_a_function_is_looked_at_once_and_its_rows_are_cut_when_their_shape_is_known():
    seen = []

    def counted(x):
        seen.append(len(x))
        return forward(x)

    y = drawn(3, 3, seed=90)  # as many rows as entries: before the first call nothing tells them from each other
    pending = sd.LinearInverse(NAMELESS, (counted, adjoint), y, S)
    assert not seen, "no state was seen yet"
    options = {"steps": 4, "seed": 0, "dtype": F64}
    found = sd.sample(pending, (3, D), batch_size=2, **options).x
    looks = seen.count(2), seen.count(3)
    assert looks[1] == 3, "A(x), A(y), A(2 x - 3 y) on three rows"
    whole = sd.sample(sd.LinearInverse(DATA.model(sd.VP()), WIDE, y, S), (3, D), **options).x
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
    part = pending.rows(slice(0, 2), 3).rows(torch.tensor([1]), 2)
    x = states(sd.VP(), 0.5)
    assert_same(part.score(0.5, x[:1]), sd.LinearInverse(DATA.model(sd.VP()), WIDE, y[1], S).score(0.5, x[:1]))
    shared = sd.LinearInverse(NAMELESS, forward, Y, S)
    whole = sd.sample(shared, (3, D), **options).x
    torch.testing.assert_close(sd.sample(shared, (3, D), batch_size=2, **options).x, whole)
    torch.testing.assert_close(shared.rows(slice(0, 2), 3).score(0.5, x[:2]), shared.score(0.5, x)[:2])


def test_adaptive_solvers_and_wrappers_take_functions():
    y = drawn(4, 3, seed=91)
    for solver in (sd.Adaptive(), sd.AdaptiveStochastic()):
        found = sd.sample(sd.LinearInverse(NAMELESS, forward, y, S), (4, D), solver=solver, seed=0, dtype=F64)
        exact = sd.sample(sd.LinearInverse(DATA.model(sd.VP()), WIDE, y, S), (4, D), solver=solver, seed=0)
        torch.testing.assert_close(found.x, exact.x, rtol=1e-7, atol=1e-7)
        assert found.nfe == exact.nfe
    x = states(sd.VP(), 0.5)
    for model in (NAMELESS, DATA.model(sd.VP())):
        nested = sd.LinearInverse(sd.LinearInverse(model, forward, Y, S), lambda x: x[:, ::3], torch.zeros(2), 0.5)
        rows = torch.cat([MATRIX, EYE[::3]])
        joint = posterior(Matrix(rows), torch.cat([Y, torch.zeros(2)]), torch.tensor([S] * 3 + [0.5] * 2))
        assert_same(nested.score(0.5, x), joint.model(sd.VP()).score(0.5, x), 1e-9)


def test_a_matrix_is_for_any_events_of_its_entries():
    data = sd.exact.Gaussian(MEAN.reshape(1, 2, 3), COV)
    x = states(sd.VP(), 0.5)
    expected = sd.LinearInverse(DATA.model(sd.VP()), MATRIX, Y, S).score(0.5, x)
    pictures = sd.LinearInverse(data.model(sd.VP()), MATRIX, Y, S)
    assert_same(pictures.score(0.5, x.reshape(4, 1, 2, 3)).reshape(4, D), expected)
    with pytest.raises(sd.ShapeError, match=r"A takes events of shape \(6,\); x has shape \(4, 1, 2, 2\)"):
        pictures.score(0.5, torch.zeros(4, 1, 2, 2, dtype=F64))
    fixed = sd.LinearInverse(data.model(sd.VP()), Matrix(MATRIX, (6,)), Y, S)
    with pytest.raises(sd.ShapeError, match=r"A takes events of shape \(6,\)"):
        fixed.score(0.5, x.reshape(4, 1, 2, 3))


def test_one_measurement_for_all_rows_and_measurements_that_are_one_number():
    x = states(sd.VP(), 0.5)
    expected = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S).score(0.5, x)
    assert torch.equal(sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y[None], S).score(0.5, x), expected)
    ones = Matrix(torch.ones(1, D, dtype=F64))
    number = torch.tensor(0.3, dtype=F64)
    exact = sd.LinearInverse(DATA.model(sd.VP()), ones, number[None], S).score(0.5, x)
    for model in (DATA.model(sd.VP()), NAMELESS):
        assert_same(sd.LinearInverse(model, lambda x: x.sum(1), number, S).score(0.5, x), exact)
        each = sd.LinearInverse(model, lambda x: x.sum(1), number.expand(4), torch.tensor(S))
        assert_same(each.score(0.5, x), exact)


def test_tensors_made_in_inference_mode_let_gradients_pass():
    with torch.inference_mode():
        made = MATRIX.clone(), Y.clone(), torch.full((3,), S)
    x = states(sd.VP(), 0.5).requires_grad_()
    sd.LinearInverse(DATA.model(sd.VP()), *made).score(0.5, x).sum().backward()
    assert x.grad.abs().min() > 0


# Sampling.

SOLVERS = [sd.Exponential(), sd.DDIM(), sd.DDPM(), sd.Heun(), sd.EulerMaruyama(), sd.Adaptive(), sd.RungeKutta()]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_samples_are_those_of_the_exact_posterior_model(solver):
    for sde in (sd.VP(), sd.EDM()):
        guided = sd.LinearInverse(DATA.model(sde), WIDE, Y, S)
        options = {"solver": solver, "seed": 0} | ({} if isinstance(solver, sd.Adaptive) else {"steps": 12})
        exact = sd.sample(posterior(WIDE, Y, S).model(sde), (5, D), **options)
        found = sd.sample(guided, (5, D), **options)
        torch.testing.assert_close(found.x, exact.x, rtol=1e-6, atol=1e-7)
        assert found.nfe == exact.nfe


def test_the_flow_carries_the_prior_to_the_posterior_mean_and_covariance():
    """The flow of Gaussian data is affine: rows 0, e_1, ..., e_D show the map, and so its mean and covariance."""
    sde = sd.VP()
    guided = sd.LinearInverse(DATA.model(sde), WIDE, Y, S)
    start = torch.cat([torch.zeros(1, D, dtype=F64), EYE])
    end = sd.sample(guided, start.shape, x_init=start, steps=60, final="none").x
    exact = posterior(WIDE, Y, S)
    first, last = (exact.marginal(sde, t) for t in (sde.t_max, sde.t_min))
    slope = end[1:] - end[0]
    torch.testing.assert_close(end[0] + first.mean @ slope, last.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(slope.T @ first.cov @ slope, last.cov, rtol=0, atol=1e-6)


def test_on_a_mixture_moment_matching_comes_nearest_near_data_and_none_is_exact_far_off():
    means = drawn(4, 2, seed=20)
    data = sd.exact.GaussianMixture(torch.ones(4), means, torch.full((4,), 0.05))
    A, y, std, sde = torch.tensor([[1.0, 0.5]], dtype=F64), torch.tensor([0.3], dtype=F64), 0.3, sd.VP()
    matrix = A
    each = [conditioned(m, 0.05 * torch.eye(2, dtype=F64), matrix, y, std**2 * torch.eye(1, dtype=F64)) for m in means]
    evidence = torch.stack(
        [MultivariateNormal(m @ matrix.T, 0.05 * matrix @ matrix.T + std**2).log_prob(y) for m in means]
    )
    truth = sd.exact.GaussianMixture(
        evidence.softmax(0), torch.stack([m for m, _ in each]), torch.stack([c for _, c in each])
    )
    x0 = truth.sample(400, seed=0)
    errors = {}
    for t in (0.1, 0.4):
        x = sde.perturb(t, x0, drawn(400, 2, seed=21))
        exact = truth.model(sde).denoised(t, x)
        for method in ("mmps", "pigdm", "dps"):
            found = sd.LinearInverse(data.model(sde), A, y, std, method).denoised(t, x)
            errors[t, method] = ((found - exact) ** 2).mean() / x0.var()
    assert 10 * errors[0.1, "mmps"] < errors[0.1, "pigdm"] < errors[0.1, "dps"]
    assert errors[0.1, "mmps"] < 1e-4
    assert min(errors[0.4, method] for method in ("mmps", "pigdm")) > 0.02
    assert errors[0.4, "dps"] > 10


# What a wrapper owes.


def test_two_measurements_one_after_the_other_are_both_at_once():
    """On Gaussian data the inner model is exact, and the outer differentiates through it."""
    sde, t = sd.VP(), 0.5
    first, second = drawn(2, D, seed=30), drawn(2, D, seed=31)
    y1, y2 = drawn(2, seed=32), drawn(2, seed=33)
    x = states(sde, t)
    inner = sd.LinearInverse(DATA.model(sde), first, y1, S)
    nested = sd.LinearInverse(inner, second, y2, 0.5)
    std = torch.tensor([S, S, 0.5, 0.5])
    joint = posterior(Matrix(torch.cat([first, second])), torch.cat([y1, y2]), std).model(sde)
    assert_same(nested.score(t, x), joint.score(t, x), 1e-9)
    with torch.no_grad():
        assert_same(nested.score(t, x), joint.score(t, x), 1e-9)
    each = drawn(4, 2, seed=34)
    rowwise = sd.LinearInverse(sd.LinearInverse(DATA.model(sde), first, each, S), second, y2, 0.5)
    torch.testing.assert_close(rowwise.rows(slice(1, 3), 4).score(t, x[1:3]), rowwise.score(t, x)[1:3])
    assert nested.no_density == inner.no_density.replace(repr(inner.network.method), repr(nested.network.method))


def test_clamped_models_may_stand_inside_and_outside():
    sde, t = sd.VP(), 0.5
    x = states(sde, t)
    outside = sd.clamp_denoised(sd.LinearInverse(DATA.model(sde), WIDE, Y, S), -0.1, 0.1)
    exact = posterior(WIDE, Y, S).model(sde).denoised(t, x)
    assert_same(outside.denoised(t, x), exact.clamp(-0.1, 0.1))
    inside = sd.LinearInverse(sd.clamp_denoised(DATA.model(sde), -0.1, 0.1), WIDE, Y, S)
    kept = DATA.model(sde).denoised(t, x).abs() < 0.1  # the clamp has no derivative elsewhere
    half = torch.where(kept[:, :, None], covariance_given(sde, t), 0.0)
    data, matrix = DATA.model(sde).denoised(t, x).clamp(-0.1, 0.1), WIDE.dense()
    spread = matrix @ half @ matrix.T + S**2 * torch.eye(3, dtype=F64)
    dense = sd.LinearInverse(sd.clamp_denoised(DATA.model(sde), -0.1, 0.1), WIDE, Y, S, "mmps-dense")
    pulled = torch.linalg.solve(spread.mT, (Y - data @ matrix.T)[..., None])
    assert_same(dense.denoised(t, x), data + (half.mT @ (matrix.T @ pulled))[..., 0], 1e-9)
    assert inside.denoised(t, x).isfinite().all()


@pytest.mark.parametrize("kind", ["noise", "data", "score", "v", "flow", "edm"])
def test_whatever_the_network_predicts(kind):
    sde, t = sd.VP(), torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=F64)
    exact = DATA.model(sde)

    def network(x, t):
        time = t
        if kind == "edm":
            sigma = (4 * t).exp()  # sigma / alpha
            time = sde.time(-2 * sigma.log())
            alpha, spread = sde.scales_at(time)
            x = x * (spread**2 + (alpha * 0.5) ** 2).sqrt()[:, None]
        return exact.view(kind, time, x) if kind != "edm" else replace(exact, sigma_data=0.5).view("edm", time, x)

    model = sd.ScoreModel(network, sde, kind)
    x = drawn(4, D, seed=40)
    guided = sd.LinearInverse(model, WIDE, Y, S)
    assert_same(guided.denoised(t, x), posterior(WIDE, Y, S).model(sde).denoised(t, x), 1e-6)


@pytest.mark.parametrize("solver", [sd.Exponential(), sd.Adaptive(), sd.AdaptiveRungeKutta(), sd.AdaptiveStochastic()])
def test_measurements_of_rows_follow_chunks_and_solvers_with_steps_for_every_row(solver):
    y = drawn(6, 3, seed=50)
    model = sd.LinearInverse(DATA.model(sd.VP()), WIDE, y, S)
    options = {"solver": solver, "seed": 0} | ({"steps": 8} if isinstance(solver, sd.Exponential) else {})
    whole = sd.sample(model, (6, D), **options).x
    assert torch.equal(whole, sd.sample(model, (6, D), batch_size=4, **options).x)
    single = sd.sample(sd.LinearInverse(DATA.model(sd.VP()), WIDE, y[2], S), (6, D), **options).x
    torch.testing.assert_close(whole[2], single[2], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole[3], single[3], atol=1e-3)


def test_a_shared_measurement_of_as_many_entries_as_rows_is_not_cut():
    model = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S)
    whole = sd.sample(model, (3, D), steps=5, seed=0).x
    assert torch.equal(whole, sd.sample(model, (3, D), steps=5, seed=0, batch_size=2).x)
    assert model.rows(torch.tensor([0]), 3).network.known.y is Y


@pytest.mark.parametrize("method", METHODS)
def test_float32_rows_images_and_gradient_modes(method):
    sde, event = sd.EDM(), (1, 4, 4)
    data = sd.exact.Gaussian(torch.zeros(event), 0.25)
    A = Downsample((2, 2), event) @ Convolution(torch.full((3, 3), 1 / 9), event)
    y = A(torch.randn(5, *event, generator=torch.Generator().manual_seed(0)))
    guided = sd.LinearInverse(data.model(sde), A, y, 0.1, method)
    x = torch.randn(5, *event, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.1, 2, 5, dtype=F64)
    found = guided.denoised(t, x)
    assert found.dtype == torch.float32
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(guided.denoised(t, x * 1), found, rtol=1e-5, atol=1e-5)
    part = guided.rows(torch.tensor([3, 1]), 5).denoised(t[[3, 1]], x[[3, 1]])
    torch.testing.assert_close(part, found[[3, 1]], rtol=0, atol=0)
    wide = sd.LinearInverse(data.model(sde), A, y.double(), 0.1, method).denoised(t, x.double())
    torch.testing.assert_close(found, wide.float(), rtol=2e-3, atol=2e-3)
    assert sd.sample(guided, (5, *event), steps=4, seed=0).x.dtype == torch.float32


@pytest.mark.parametrize("method", ["mmps", "mmps-dense", "pigdm", "dps", "dps-normalised"])
def test_it_can_be_differentiated_again(method):
    means = drawn(2, 3, seed=60)
    data = sd.exact.GaussianMixture(torch.ones(2), means, torch.full((2,), 0.3))
    guided = sd.LinearInverse(data.model(sd.VP()), drawn(2, 3, seed=61), drawn(2, seed=62), S, method)
    x = drawn(2, 3, seed=63).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: guided.denoised(0.4, x), (x,), atol=1e-6)


def test_gradients_reach_the_parameters_of_the_network():
    class Shrink(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, x, t):
            return self.factor * x

    network = Shrink()
    guided = sd.LinearInverse(sd.ScoreModel(network, sd.VP(), "data"), WIDE, Y, S)
    x = drawn(2, D)

    def total(factor):
        network.factor.data.fill_(factor)
        return guided.denoised(0.5, x).sum()

    total(0.5).backward()
    numeric = (total(0.5 + 1e-5) - total(0.5 - 1e-5)) / 2e-5
    torch.testing.assert_close(network.factor.grad, numeric.detach(), rtol=1e-6, atol=1e-6)
    assert list(guided.network.parameters()) == [network.factor]


def test_conditions_reach_the_network_and_a_constant_network_has_no_covariance():
    model = sd.ScoreModel(lambda x, t, c: (x + c[:, None]) / 2, sd.VP(), "data")
    x, label = drawn(4, D), torch.tensor([0.0, 1, 2, 3], dtype=F64)
    guided = sd.LinearInverse(model, WIDE, Y, S)
    one = guided.denoised(0.5, x, condition=label)
    fixed = sd.LinearInverse(model.given(label), WIDE, Y, S)
    torch.testing.assert_close(one, fixed.denoised(0.5, x))
    torch.testing.assert_close(fixed.rows(slice(1, 3), 4).denoised(0.5, x[1:3]), one[1:3])
    likelihood = log_likelihood(model.given(label), WIDE, Y, S)(0.5, x)
    assert likelihood.unique().numel() == 4
    constant = sd.LinearInverse(sd.ScoreModel(lambda x, t: torch.ones_like(x), sd.VP(), "data"), WIDE, Y, S)
    assert_same(constant.denoised(0.5, x), torch.ones(4, D, dtype=F64))


def test_a_model_that_knows_integer_steps_only_is_asked_at_those():
    chain, seen = sd.DiscreteVP.linear_betas(50), []

    def network(x, t):
        seen.append(t[0].item())
        return 0.1 * x

    model = sd.LinearInverse(sd.ScoreModel(network, chain, "noise", time=chain.timestep), WIDE, Y, S)
    sd.sample(model, (2, D), steps=7, seed=0)
    assert len(seen) > 5
    assert all(step == round(step) for step in seen)


def test_a_density_is_refused_with_the_reason():
    guided = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S, "pigdm")
    with pytest.raises(sd.CapabilityError, match=r"no log-density: PiGDM\(.*approximates grad log p\(y \| x_t\)"):
        sd.log_prob(guided, drawn(2, D))


def test_pure_noise_is_refused_where_a_derivative_is_needed():
    sde = sd.RectifiedFlow(t_max=1.0)
    for method in ("mmps", "dps", "pigdm"):
        with pytest.raises(sd.CapabilityError, match=r"At t = 1 alpha is 0.*below, or method='replacement'"):
            sd.LinearInverse(DATA.model(sde), WIDE, Y, S, method).denoised(1.0, drawn(2, D))
    free = sd.LinearInverse(DATA.model(sde), WIDE, Y, 0.0, "replacement").denoised(1.0, drawn(2, D))
    assert_same(free @ WIDE.dense().T, Y.expand(2, 3))


# Conjugate gradients.


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, 3))
def test_conjugate_gradients_solve_as_a_dense_solver_does(seed, size, missing):
    root = drawn(3, size, size, seed=seed)
    root[:, : min(missing, size - 1)] = 0  # singular, and b in the range
    matrix = root.mT @ root
    b = (matrix @ drawn(3, size, 1, seed=seed + 1))[..., 0]
    v = conjugate_gradients(lambda z: (matrix @ z[..., None])[..., 0], b, 200)
    error = ((matrix @ v[..., None])[..., 0] - b).norm(dim=1)
    assert (error <= 1e-7 * torch.linalg.matrix_norm(matrix, 2) * v.norm(dim=1) + 1e-12).all()


def test_each_iteration_is_the_best_of_its_krylov_space():
    """After k iterations v is the one in span(b, ..., S^(k-1) b) that is nearest in the norm of S."""
    root = drawn(5, 5, seed=70)
    matrix, b = root.T @ root + 0.1 * torch.eye(5, dtype=F64), drawn(1, 5, seed=71)
    exact = torch.linalg.solve(matrix, b[0])
    for k in (1, 2, 3):
        basis = torch.stack([torch.linalg.matrix_power(matrix, j) @ b[0] for j in range(k)], 1)
        best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b[0])
        torch.testing.assert_close(conjugate_gradients(lambda z: z @ matrix, b, k)[0], best)
    torch.testing.assert_close(conjugate_gradients(lambda z: z @ matrix, b, 5)[0], exact)


def test_rows_of_conjugate_gradients_end_by_themselves():
    scales = torch.tensor([[1.0, 1.0], [1.0, 100.0], [-1.0, 2.0], [1.0, 0.0]], dtype=F64)
    b = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=F64)
    calls = []

    def product(z):
        calls.append(1)
        return scales * z

    v = conjugate_gradients(product, b, 50)
    torch.testing.assert_close(v[:2], b[:2] / scales[:2])
    assert v[2:].tolist() == [[0, 0], [0, 0]], "a direction of negative curvature, and nothing to solve"
    assert len(calls) <= 4
    below = conjugate_gradients(lambda z: 0.5 * z, torch.ones(1, 2, dtype=F64), 5, floor=1.0)
    assert below.tolist() == [[0, 0]], "S is less than the noise that it contains"
    flat = torch.tensor([1.0, 1e-25], dtype=F64)
    v = conjugate_gradients(lambda z: flat * z, torch.tensor([[1.0, 1e-12]], dtype=F64), 50)
    assert v.abs().max() <= 1, "what is left along a direction without curvature is rounding"
    few = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S, iterations=1)
    x = states(sd.VP(), 0.5)
    V, matrix = covariance_given(sd.VP(), torch.tensor(0.5, dtype=F64)), WIDE.dense()
    r = Y - DATA.model(sd.VP()).denoised(0.5, x) @ matrix.T
    spread = matrix @ V @ matrix.T + S**2 * torch.eye(3, dtype=F64)
    steepest = (r**2).sum(1) / torch.einsum("bi,ij,bj->b", r, spread, r)
    expected = DATA.model(sd.VP()).denoised(0.5, x) + steepest[:, None] * r @ matrix @ V
    assert_same(few.denoised(0.5, x), expected, 1e-9)


HARD = (
    torch.exp(-((torch.arange(32.0)[:, None] - torch.arange(32.0)) ** 2) / 8).double() + 0.01 * torch.eye(32).double()
)
BELL = torch.exp(-(torch.arange(-3, 4.0) ** 2) / 4)


def test_as_many_iterations_as_entries_solve_systems_of_any_condition():
    """Without residuals that are kept, rounding takes most digits."""
    matrix = Convolution(BELL / BELL.sum(), (32,)).dense()
    system = matrix @ HARD @ matrix.T + 0.05**2 * torch.eye(32, dtype=F64)
    b = drawn(4, 32, seed=72)
    exact = torch.linalg.solve(system, b.T).T

    def error(b, kept):
        v = conjugate_gradients(lambda z: z @ system.to(z), b, 32, kept=kept)
        return ((v - exact).norm() / exact.norm()).item()

    assert error(b, 32) < 1e-12 < 1e-9 < error(b, 0)
    assert error(b, 16) < error(b, 0)
    assert error(b.float(), 32) < error(b.float(), 0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_default_is_exact_for_many_entries_with_little_noise(dtype):
    sde, data = sd.VP(), sd.exact.Gaussian(torch.zeros(32, dtype=F64), HARD)
    A = Convolution(BELL / BELL.sum(), (32,))
    y = A(data.sample(1, seed=0))[0] + 0.05 * drawn(32, seed=73)
    truth = posterior(A, y, 0.05, data)
    guided = sd.LinearInverse(data.model(sde), A, y, 0.05)
    for t in times_of(sde):
        x = sde.perturb(t, truth.sample(8, seed=1), drawn(8, 32, seed=74))
        exact = truth.model(sde).denoised(t, x)
        assert_same(guided.denoised(t, x.to(dtype)).double(), exact, 1e-12 if dtype == F64 else 2e-4)
    few = sd.LinearInverse(data.model(sde), A, y, 0.05, iterations=10).denoised(0.1, x)
    assert not torch.allclose(few, truth.model(sde).denoised(0.1, x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("size", "passes"), [(5, 5), (100, 64)])
def test_the_default_stops_at_as_many_passes_as_entries_or_64(size, passes):
    calls = []

    def counted(x):
        calls.append(1)
        return x * torch.arange(1, size + 1).to(x)

    data = sd.exact.Gaussian(torch.zeros(size, dtype=F64), 1.0)
    A = LinearOperator(counted, counted, event=size)
    guided = sd.LinearInverse(data.model(sd.VP()), A, drawn(size), 1e-3)
    calls.clear()
    guided.denoised(0.5, drawn(2, size))
    assert len(calls) == 2 * passes + 2, "A and its adjoint in every iteration, for the residual and for the shift"


def test_systems_that_are_not_symmetric_get_no_more_passes_than_entries():
    """As of a network: with a skew part of its derivative nothing is solved after so many, and nothing ends early."""
    calls, skew = [], drawn(D, D, seed=75)

    def pulled(w):
        calls.append(1)
        return w + w @ (skew - skew.T)

    one = torch.ones(2, dtype=F64)
    at = Tweedie(drawn(2, D), sd.VP(), one / 2, one, one, pulled)
    known = Measurement(EYE, drawn(D, seed=76), S)
    assert MMPS().solve(known, at, drawn(2, D, seed=77)).isfinite().all()
    assert len(calls) == D


def test_nan_is_not_taken_for_the_end_of_a_search():
    def product(z):
        return torch.where(z[:, :1] == 2, torch.nan, 1.0) * z

    v = conjugate_gradients(product, torch.tensor([[1.0, 1.0], [2.0, 1.0]]), 5)
    assert v[0].tolist() == [1, 1]
    assert v[1].isnan().all()
    b = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    v = conjugate_gradients(lambda z: z, b, 5, kept=2)
    assert v[0].isnan().all()
    assert v[1].tolist() == [1, 1]
    off = sd.LinearInverse(DATA.model(sd.VP()), WIDE, Y, S, "pigdm", deviation=lambda t: math.nan * t)
    with pytest.raises(sd.DivergenceError, match="NaN"):
        sd.sample(off, (2, D), steps=3, seed=0)


# State replacement.


@pytest.mark.parametrize("A", [MAPS["mask"], MAPS["means"], MAPS["rank deficient"]], ids=repr)
def test_replacement_moves_what_is_seen_and_nothing_else(A):
    sde = sd.VP()
    times = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    x, y = drawn(4, D, seed=80), A(drawn(1, D, seed=81))[0]
    move = sd.Replacement(A, y).start(DATA.model(sde), times, RowNoise(3).open())
    moved, normal = move(1, x), RowNoise(3).open().normal(x)
    alpha, sigma = sde.scales_at(times[1])
    torch.testing.assert_close(A(moved), alpha * y + sigma * A(normal))
    seen = torch.linalg.pinv(A.dense()) @ A.dense()
    torch.testing.assert_close((moved - x) @ (EYE - seen), torch.zeros(4, D, dtype=F64), rtol=0, atol=1e-10)


def test_replacement_is_exact_for_entries_that_are_independent():
    """What is not seen then has its prior, which the affine map of the run shows exactly."""
    deviation = torch.linspace(0.4, 1.5, D, dtype=F64)
    data, sde = sd.exact.Gaussian(MEAN, deviation**2), sd.VP()
    seen = MAPS["mask"].dense().sum(0) > 0
    solver = sd.PredictorCorrector(sd.Exponential(), sd.Replacement(seen, Y))
    start = torch.cat([torch.zeros(1, D, dtype=F64), EYE])
    end = sd.sample(data.model(sde), start.shape, solver=solver, x_init=start, steps=60, seed=0).x
    plain = sd.sample(data.model(sde), start.shape, x_init=start, steps=60, seed=0).x
    torch.testing.assert_close(end[:, ~seen], plain[:, ~seen], rtol=0, atol=1e-4)
    assert (end[:, seen] - Y).abs().max() < 0.05
    kept = sd.sample(data.model(sde), (5, D), solver=solver, steps=20, final="none", seed=0).x
    assert (kept[:, seen] - sde.alpha(sde.t_min) * Y).abs().max() < 6 * sde.sigma(sde.t_min)


def test_replacement_takes_rows_and_noisy_predictors():
    y = drawn(5, 3, seed=82)
    for predictor in (sd.DDPM(), sd.EulerMaruyama(), sd.DDIM(), sd.Heun()):
        solver = sd.PredictorCorrector(predictor, sd.Replacement(MAPS["mask"], y))
        x = sd.sample(DATA.model(sd.VP()), (5, D), solver=solver, steps=50, seed=0).x
        assert (MAPS["mask"](x) - y).abs().max() < 0.1
    with pytest.raises(sd.ShapeError, match=r"y has 5 rows but x has 2.*for all rows"):
        sd.sample(DATA.model(sd.VP()), (5, D), solver=solver, steps=5, batch_size=2)
    ends = [
        sd.sample(
            DATA.model(sd.VP()), (5, D), solver=sd.PredictorCorrector(sd.DDPM(), sd.Replacement(A, y)), steps=5, seed=0
        ).x
        for A in (MAPS["mask"], lambda x: x[:, [0, 2, 3]], (MAPS["mask"].__call__, MAPS["mask"].adjoint))
    ]
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


# Bad input.

MODEL = DATA.model(sd.VP())
OPTION, SHAPE = sd.OptionError, sd.ShapeError


def inverse(A=WIDE, y=Y, noise_std=S, method="mmps", model=MODEL, **options):
    return sd.LinearInverse(model, A, y, noise_std, method, **options)


class Nonlinear(sd.SDE):
    def drift(self, t, x):
        return -(x**3)

    def diffusion(self, t, x):
        return 1.0


BAD = [
    (lambda: inverse(model=DATA), OPTION, r"first argument must be a ScoreModel; got Gaussian"),
    (lambda: inverse(method="pgdm"), OPTION, r"'pgdm'.*'mmps'.*'pigdm'"),
    (lambda: inverse(method="dps", iterations=3), OPTION, r"'dps' has no option 'iterations': it takes scale"),
    (lambda: inverse(method="mmps-dense", iterations=3), OPTION, r"no option 'iterations': it takes none"),
    (lambda: inverse(method=MMPS(), iterations=3), OPTION, r"MMPS\(iterations=None\) has its options.*iterations"),
    (lambda: inverse(iterations=0), OPTION, r"whole number >= 1 for iterations; got 0"),
    (lambda: inverse(iterations=2.5), OPTION, r"iterations; got 2\.5"),
    (lambda: inverse(method="pigdm", deviation=-1.0), OPTION, r"PiGDM needs a finite number > 0 for deviation; got -1"),
    (lambda: inverse(method="dps", scale=math.inf), OPTION, r"DPS needs a finite number > 0 for scale; got inf"),
    (lambda: inverse(method="dps-normalised", chain=0), OPTION, r"chain; got 0"),
    (lambda: inverse(noise_std=-0.1), OPTION, r"noise_std must be finite and >= 0; got -0\.1"),
    (lambda: inverse(noise_std=math.nan), OPTION, r"noise_std must be finite and >= 0; got nan"),
    (lambda: inverse(noise_std=torch.ones(2)), SHAPE, r"noise_std must be a number or .*\(3,\).*\(2,\)"),
    (lambda: inverse(noise_std=0.0, method="dps"), OPTION, r"DPS\(scale=1\.0\) divides by the noise.*'mmps'"),
    (lambda: inverse(noise_std=torch.tensor([1.0, 0, 1]), method="dps"), OPTION, r"divides by the noise"),
    (lambda: inverse(noise_std=0.0, method="mmps-dense"), OPTION, r"DenseMMPS\(\) divides by the noise"),
    (lambda: inverse(RANK_TWO, Y, 0.0), OPTION, r"must be A x of some x, but 0\.\d+ of its length.*noise_std > 0"),
    (lambda: inverse(RANK_TWO, Y, 0.0, "replacement"), OPTION, r"depend on each other"),
    (lambda: sd.Replacement(RANK_TWO, Y), OPTION, r"depend on each other"),
    (lambda: sd.Replacement(WIDE, Y, iterations=0), OPTION, r"iterations >= 1; got 0"),
    (lambda: inverse(y=drawn(4)), SHAPE, r"y must have shape \(3,\).*\(batch, 3\).*got \(4,\)"),
    (lambda: inverse(y=drawn(2, 4)), SHAPE, r"got \(2, 4\)"),
    (lambda: inverse(y=torch.tensor([1, 2, 3])), SHAPE, r"y must have a floating-point dtype.*y\.double\(\)"),
    (lambda: inverse(y=drawn(2, 3)).denoised(0.5, drawn(5, D)), SHAPE, r"y has 2 rows but x has 5"),
    (lambda: inverse().denoised(0.5, drawn(5, 4)), SHAPE, r"events of shape \(6,\); x has shape \(5, 4\)"),
    (lambda: Measurement(lambda x: x, Y, S), OPTION, r"LinearOperator\(A, event="),
    (lambda: inverse(lambda x: x), SHAPE, r"y must have shape \(6,\).*got \(3,\)"),
    (lambda: inverse(lambda x: x[:, :3] + 1), OPTION, r"not linear"),
    (lambda: inverse((lambda x: x[:, :3], lambda z: z)), SHAPE, r"adjoint must return \(3, 6\).*returned \(3, 3\)"),
    (lambda: inverse((forward, lambda z: 2 * adjoint(z))), OPTION, r"adjoint is not that of A"),
    (lambda: inverse((forward, adjoint, adjoint)), OPTION, r"pair is .*adjoint\); got \(function, function, "),
    (lambda: inverse((forward, MATRIX)), OPTION, r"pair is .*got \(function, Tensor\)"),
    (lambda: inverse(lambda x: x[:, :, 0]), OPTION, r"A must take a batch \(batch, 6\).*made it fail: .*dimension"),
    (lambda: inverse(lambda x: x.sum()), SHAPE, r"\(batch, 6\).*a batch of 2 gave \(\)"),
    (lambda: inverse(lambda x: x[:, :2].repeat(1, 2)[:, :3], noise_std=0.0), OPTION, r"must be A x of some x"),
    (lambda: inverse(lambda x: x, model=NAMELESS, y=[1.0]), SHAPE, r"y must be a tensor.*list"),
    (lambda: inverse(lambda x: x, model=NAMELESS, noise_std=-1.0), OPTION, r"finite and >= 0; got -1"),
    (lambda: inverse(lambda x: x, model=NAMELESS, noise_std=0.0, method="dps"), OPTION, r"divides by the noise"),
    (lambda: inverse(lambda x: x, model=NAMELESS).denoised(0.5, drawn(2, D)), SHAPE, r"y must have shape \(6,\)"),
    (lambda: inverse(lambda x: x[:, :3] + 1, model=NAMELESS).denoised(0.5, drawn(2, D)), OPTION, r"not linear"),
    (lambda: inverse(lambda x: x[:, :2].repeat(1, 2)[:, :3], model=NAMELESS, noise_std=0.0).denoised(0.5, drawn(2, D)),
     OPTION, r"must be A x of some x"),
    (lambda: inverse(MAPS["mask"], drawn(2, D)), SHAPE, r"That is the shape of an event: write y = A\(x0\)"),
    (lambda: inverse(y=torch.tensor([0.0, math.nan, math.inf])), OPTION, r"y must be finite; it has 2 entries.*Mask"),
    (lambda: inverse(WIDE.dense() * math.nan), OPTION, r"A x is NaN or infinite"),
    (lambda: inverse(noise_std="0.1"), OPTION, r"noise_std must be a number.*'0\.1'"),
    (lambda: inverse(noise_std=None), OPTION, r"noise_std must be a number.*None"),
    (lambda: inverse(noise_std=torch.tensor([1.0, math.inf, 1.0])), OPTION, r"noise_std .*got inf"),
    (lambda: inverse(noise_std=1e-200, method="dps"), OPTION, r"divides by the noise"),
    (lambda: inverse(iterations="3"), OPTION, r"whole number >= 1 for iterations; got '3'"),
    (lambda: inverse(method="pigdm", deviation=torch.ones(6)), OPTION, r"for deviation; got tensor"),
    (lambda: inverse(method=MMPS), OPTION, r"Unknown method <class.*or a Method"),
    (lambda: inverse(LinearOperator(lambda x: x.tanh(), event=(3,))), OPTION, r"not linear"),
    (lambda: inverse(LinearOperator(lambda x: 2 * x, lambda z: z, event=(3,))), OPTION, r"adjoint is not that of A"),
    (lambda: Measurement(WIDE, Y, 0.0).log_prob(drawn(2, D)), sd.CapabilityError, r"noise_std > 0"),
    (lambda: log_likelihood(MODEL, RANK_TWO, RANK_TWO @ MEAN, 0.0, "pigdm")(0.5, drawn(2, D)), sd.CapabilityError,
     r"not positive definite in rows \[0, 1\]"),
    (lambda: log_likelihood(MODEL, WIDE, Y, S)(1.5, drawn(2, D)), sd.TimeError, r"1\.5"),
    (lambda: inverse(model=sd.ScoreModel(lambda x, t: -x, Nonlinear(), "score")), sd.CapabilityError, r"not linear"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input_gets_a_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_methods_are_values():
    assert DPS(scale=2.0) == DPS(scale=2.0) != DPS()
    assert PiGDM().iterations == 200
    assert isinstance(inverse(method="mmps", iterations=3).network.method, MMPS)


def test_a_method_that_solves_nothing_takes_a_measurement_that_contradicts_itself():
    assert inverse(RANK_TWO, Y, 0.0, "dps-normalised").denoised(0.5, drawn(2, D)).isfinite().all()
