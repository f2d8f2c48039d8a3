"""Recolouring, the covariance along the forward process, and the error of a sample covariance."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

import sdediff as sd
from sdediff.testing import gaussian_targets, linear_sdes, time_grids

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(size, seed=0, floor=0.1):
    root = normal(size, size, seed=seed)
    return root @ root.T + floor * torch.eye(size, dtype=F64)


def sample_cov(x):
    return torch.cov(x.reshape(len(x), -1).T).reshape(x[0].numel(), -1)


# Recolouring.


@given(gaussian_targets(), gaussian_targets(), st.integers(0, 10))
def test_the_sample_covariance_becomes_the_one_asked_for(source, target, seed):
    size = len(target.mean)
    x = 3 + normal(size + 5, size, seed=seed) @ source.cov[:1, :1].expand(size, size).tril()
    y = sd.recolor(x, target.cov)
    torch.testing.assert_close(sample_cov(y), target.cov, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y.mean(0), x.mean(0), rtol=1e-10, atol=1e-10)


def test_nearly_singular_data_is_recoloured_as_exactly():
    """Standard deviations over 8 orders of magnitude: C itself, of condition 1e16, could not be inverted."""
    turn, cov = torch.linalg.qr(normal(6, 6)).Q, spd(6, seed=2)
    x = normal(50, 6, seed=1) * torch.logspace(0, -8, 6, dtype=F64) @ turn
    torch.testing.assert_close(sample_cov(sd.recolor(x, cov)), cov, rtol=1e-10, atol=1e-10)


def test_the_roots_are_the_symmetric_ones():
    """Against scipy's matrix square root; any other root leaves the covariance right and the rows wrong."""
    x, cov = normal(40, 5) @ spd(5, seed=1) + 2, spd(5, seed=2)
    inverse = torch.linalg.inv(torch.from_numpy(sqrtm(sample_cov(x).numpy()).real))
    root = torch.from_numpy(sqrtm(cov.numpy()).real)
    want = x.mean(0) + (x - x.mean(0)) @ inverse @ root
    torch.testing.assert_close(sd.recolor(x, cov), want, rtol=1e-9, atol=1e-9)


def test_a_known_law_moves_every_row_by_itself():
    x_cov, cov, mean = spd(4, seed=1), spd(4, seed=2), normal(4, seed=3)
    x = normal(7, 4, seed=4)
    inverse, root = torch.linalg.inv(torch.from_numpy(sqrtm(x_cov.numpy()).real)), torch.from_numpy(sqrtm(cov.numpy()))
    moved = sd.recolor(x, cov, mean=mean, x_cov=x_cov)
    torch.testing.assert_close(moved, mean + (x - mean) @ inverse @ root, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sd.recolor(x[2:3], cov, mean=mean, x_cov=x_cov), moved[2:3])


def test_recoloured_noise_is_the_gaussian():
    """Mean and covariance of 100 000 draws within 5 standard errors each."""
    n, cov = 100_000, spd(3, seed=5)
    y = sd.recolor(normal(n, 3), cov, mean=0, x_cov=1.0)
    assert (y.mean(0) / (cov.diagonal() / n).sqrt()).abs().max() < 5
    error = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / n).sqrt()
    assert ((sample_cov(y) - cov) / error).abs().max() < 5


@pytest.mark.parametrize("event", [(), (6,), (2, 3), (1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_events_of_any_shape(event, dtype):
    size = math.prod(event)
    x = normal(30, *event).to(dtype)
    cov = spd(size)
    y = sd.recolor(x, cov)
    assert y.shape == x.shape
    assert y.dtype == dtype
    tight = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sample_cov(y.double()), cov, **tight)
    torch.testing.assert_close(y.reshape(30, -1), sd.recolor(x.reshape(30, -1), cov))


def test_covariances_in_short():
    x = normal(20, 3)
    torch.testing.assert_close(sample_cov(sd.recolor(x, 2.0)), 2 * torch.eye(3, dtype=F64))
    torch.testing.assert_close(
        sample_cov(sd.recolor(x, [1.0, 2.0, 0.0])), torch.diag(torch.tensor([1.0, 2, 0])).double()
    )
    with_matrix = sd.recolor(x, spd(3), mean=torch.zeros(3), x_cov=torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    torch.testing.assert_close(sd.recolor(x, spd(3), mean=0.0, x_cov=[1.0, 2.0, 3.0]), with_matrix)


def test_a_singular_covariance_is_inverted_on_its_range():
    """Data in a plane of 5 dimensions, or of few rows, may be recoloured within what it spans."""
    plane = torch.linalg.qr(normal(5, 2)).Q
    cov = plane @ torch.diag(torch.tensor([4.0, 0.5], dtype=F64)) @ plane.T
    for rows in (3, 30):
        x = normal(rows, 2, seed=1) @ plane.T + 1
        torch.testing.assert_close(sample_cov(sd.recolor(x, cov)), cov, rtol=1e-10, atol=1e-10)
    x = normal(9, 2, seed=2) @ plane.T
    known = sd.recolor(x, cov, mean=0, x_cov=plane @ plane.T)
    torch.testing.assert_close(known, x @ plane @ torch.diag(torch.tensor([2.0, 0.5**0.5], dtype=F64)) @ plane.T)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_x_does_not_span_is_not_made_up(dtype):
    plane = torch.linalg.qr(normal(5, 2)).Q
    in_plane = (normal(30, 2, seed=1) @ plane.T + 100).to(dtype)
    with pytest.raises(sd.OptionError, match=r"2 of 5 directions \(of 30 rows\).* 3 outside.*at least 6 rows"):
        sd.recolor(in_plane, 1.0)
    with pytest.raises(sd.OptionError, match=r"3 of 5 directions \(of 4 rows\).* 2 outside.*known mean="):
        sd.recolor(normal(4, 5).to(dtype), 1.0)
    with pytest.raises(sd.OptionError, match=r"x_cov has variance in 2 of 5 directions.*range lies in that of x_cov"):
        sd.recolor(in_plane, 1.0, mean=100, x_cov=plane @ plane.T)
    same = sd.recolor(torch.ones(4, 5, dtype=dtype), 0.0)
    assert torch.equal(same, torch.ones(4, 5, dtype=dtype))


def test_rows_outside_of_a_singular_known_covariance_are_not_dropped():
    plane = torch.linalg.qr(normal(5, 2)).Q
    with pytest.raises(sd.OptionError, match=r"in 2 of 5 directions, but rows of x leave them by up to .*Leave both"):
        sd.recolor(normal(9, 5), plane @ plane.T, mean=0, x_cov=plane @ plane.T)
    x = (normal(9, 2, seed=1) @ plane.T).float()  # float32 leaves a plane by its rounding
    torch.testing.assert_close(sd.recolor(x, plane @ plane.T, mean=0, x_cov=plane @ plane.T), x)


def test_covariances_in_single_precision_are_positive_to_their_rounding():
    """The covariance of smooth signals, of rank 12, has negative eigenvalues in float32."""
    cov = sd.signals.Sinusoids().cov
    single = cov.float()
    assert torch.linalg.eigvalsh(single.double())[0] < -1e-8 * cov.max()
    y = sd.recolor(normal(100, 50), single)
    torch.testing.assert_close(sample_cov(y), cov, rtol=1e-5, atol=1e-5)
    with pytest.raises(sd.OptionError, match="positive semi-definite"):
        sd.recolor(normal(100, 50), single.double())


def test_a_known_singular_covariance_in_single_precision_is_inverted_on_its_range():
    """Its rounding is no variance: what comes out has the covariance asked for, or the demand is refused."""
    plane = torch.linalg.qr(normal(5, 2)).Q
    x = normal(9, 2, seed=1) @ plane.T
    single = (plane @ plane.T).float()
    known = sd.recolor(x, 4 * plane @ plane.T, mean=0, x_cov=single)
    torch.testing.assert_close(known, 2 * x, rtol=1e-5, atol=1e-5)
    with pytest.raises(sd.OptionError, match=r"x_cov has variance in 2 of 5 directions.* 3 outside"):
        sd.recolor(x, 1.0, mean=0, x_cov=single)


X = torch.zeros(4, 2)
LOPSIDED = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
BAD = {
    "rows": (lambda: sd.recolor(torch.zeros(1, 2), 1.0), sd.ShapeError, ["at least two rows", "got 1"]),
    "shape": (lambda: sd.recolor(X, torch.eye(3)), sd.ShapeError, ["cov must have shape (2, 2)", "(3, 3)"]),
    "x_cov": (lambda: sd.recolor(X, 1.0, mean=0, x_cov=torch.ones(3)), sd.ShapeError, ["x_cov", "(2, 2)", "(3,)"]),
    "mean": (lambda: sd.recolor(X, 1.0, mean=torch.ones(3), x_cov=1.0), sd.ShapeError, ["mean", "(2,)", "(3,)"]),
    "symmetry": (lambda: sd.recolor(X, LOPSIDED), sd.OptionError, ["symmetric", "up to 0.5", "(cov + cov.T) / 2"]),
    "definite": (lambda: sd.recolor(X, [1.0, -0.25]), sd.OptionError, ["positive semi-definite", "-0.25"]),
    "NaN": (lambda: sd.recolor(X, [1.0, math.nan]), sd.OptionError, ["cov", "NaN"]),
    "rows of NaN": (lambda: sd.recolor(X.log() - X.log(), 1.0), sd.OptionError, ["rows [0, 1, 2, 3]", "Drop them"]),
    "only mean": (lambda: sd.recolor(X, 1.0, mean=0), sd.OptionError, ["x_cov is missing", "mean=..., x_cov=..."]),
    "only x_cov": (lambda: sd.recolor(X, 1.0, x_cov=1.0), sd.OptionError, ["mean is missing", "neither"]),
    "integers": (lambda: sd.recolor(X.long(), 1.0), sd.ShapeError, ["torch.int64", "x.float()"]),
    "error, rows": (lambda: sd.covariance_error(X[:1], 1.0), sd.ShapeError, ["at least two rows", "got 1"]),
    "error, zero": (lambda: sd.covariance_error(X, 0.0), sd.OptionError, ["cov is zero"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name):
    call, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# Recolouring is the flow of a Gaussian model.


@given(linear_sdes(), gaussian_targets())
def test_the_flow_of_centred_gaussian_data_is_a_recolouring(sde, target):
    target = sd.exact.Gaussian(torch.zeros_like(target.mean), target.cov)
    x = target.marginal(sde, sde.t_max).sample(5, seed=0)
    for t in (sde.t_min, 0.3 * sde.t_max):
        wanted, given_cov = (target.marginal(sde, at).cov for at in (t, sde.t_max))
        there = sd.recolor(x, wanted, mean=0, x_cov=given_cov)
        torch.testing.assert_close(there, target.flow(sde, x, sde.t_max, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(sigma_max=10.0), sd.CosineVP(), sd.SigmoidVP()], ids=repr)
def test_the_solved_flow_is_a_recolouring(sde):
    """One linear map gives what the solver of the probability flow comes to, to its tolerance."""
    target = sd.exact.Gaussian(torch.zeros(2, 3, dtype=F64), spd(6))
    x = target.marginal(sde, sde.t_max).sample(4, seed=0)
    solved = sd.sample(target.model(sde), x.shape, x_init=x, solver=sd.Adaptive(1e-9, 1e-9), final="none").x
    cov_t, cov_0 = (target.marginal(sde, t).cov for t in (sde.t_max, sde.t_min))
    torch.testing.assert_close(solved, sd.recolor(x, cov_0, mean=0, x_cov=cov_t), rtol=1e-6, atol=1e-6)


# The covariance along the forward process.


@given(linear_sdes(), gaussian_targets(), st.data())
def test_the_marginal_covariance_obeys_the_recursion_of_the_process(sde, target, data):
    """From t_i to t_(i + 1), S becomes scale^2 S + std^2 I, by the transition that `simulate` takes."""
    times = data.draw(time_grids(sde, max_steps=6)).flip(0)
    eye = torch.eye(len(target.mean), dtype=F64)
    sigma_0 = sde.sigma(times[0])
    cov = sde.alpha(times[0]) ** 2 * target.cov + sigma_0**2 * eye
    torch.testing.assert_close(cov, target.marginal(sde, times[0]).cov, rtol=1e-9, atol=1e-12)
    for s, t in pairwise(times):
        scale, std = sde.transition(s, t)
        cov = scale**2 * cov + std**2 * eye
        want = sde.alpha(t) ** 2 * target.cov + sde.sigma(t) ** 2 * eye
        torch.testing.assert_close(cov, want, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(target.marginal(sde, t).cov, want, rtol=1e-9, atol=1e-10)


@given(linear_sdes(), gaussian_targets())
def test_perturb_has_the_marginal_covariance_exactly(sde, target):
    """Data and noise whose joint sample covariance is that of independent ones, without any sampling error."""
    size = len(target.mean)
    joint = torch.zeros(2 * size, 2 * size, dtype=F64)
    joint[:size, :size], joint[size:, size:] = target.cov, torch.eye(size)
    both = sd.recolor(normal(4 * size + 3, 2 * size), joint)
    for t in (sde.t_min, 0.4 * sde.t_max, sde.t_max):
        x_t = sde.perturb(t, both[:, :size], both[:, size:])
        torch.testing.assert_close(sample_cov(x_t), target.marginal(sde, t).cov, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", [sd.VP(), sd.SubVP(), sd.VE(), sd.EDM(), sd.CosineVP(), sd.SigmoidVP(),
                                 sd.RectifiedFlow(), sd.DiscreteVP(torch.linspace(1e-3, 0.1, 40, dtype=F64))],
                         ids=lambda sde: type(sde).__name__)  # fmt: skip
def test_simulated_paths_have_the_marginal_covariance(sde):
    """20 000 paths from data at `times[0]`: every entry of three covariances within 4.5 standard errors.

    (30 independent entries in all of 8 processes and 3 times: a false alarm has probability below 1e-3.)
    """
    n, target = 20_000, sd.exact.Gaussian(torch.zeros(2, 2, dtype=F64), spd(4, seed=3))
    times = torch.tensor([sde.t_min, 0.1 * sde.t_max, 0.5 * sde.t_max, sde.t_max], dtype=F64)
    path = sde.simulate(target.marginal(sde, times[0]).sample(n, seed=1), times, seed=2)
    for t, x in zip(times, path, strict=True):
        cov = target.marginal(sde, t).cov
        error = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / (n - 1)).sqrt()
        assert ((sample_cov(x) - cov) / error).abs().max() < 4.5


# The error of a sample covariance.


def test_covariance_error_is_the_relative_frobenius_distance():
    x, cov = normal(50, 2, 2), spd(4)
    error, floor = sd.covariance_error(x, cov)
    assert error == pytest.approx(((sample_cov(x) - cov).norm() / cov.norm()).item(), rel=1e-12)
    assert floor > 0
    assert sd.covariance_error(sd.recolor(x, cov), cov)[0] < 1e-12


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_the_floor_is_the_error_of_true_samples(law):
    """The root mean square error over 3000 sets of 10 rows; the exact floor, from exact moments, in closed form."""
    n, size, sets = 10, 3, 3000
    if law == "normal":
        x, variance, fourth = normal(sets, n, size), 1.0, size * 3 + size * (size - 1)
    else:
        x = 2 * torch.rand(sets, n, size, dtype=F64, generator=torch.Generator().manual_seed(0)) - 1
        variance, fourth = 1 / 3, size / 5 + size * (size - 1) / 9
    square, trace = size * variance**2, size * variance
    exact = (fourth - square) / n + (trace**2 + square) / (n * (n - 1))
    squares = torch.tensor([sd.covariance_error(row, variance)[0] ** 2 for row in x], dtype=F64)
    assert abs(squares.mean() - exact / square) < 4 * squares.std() / math.sqrt(sets)
    many = x.reshape(-1, size)  # enough rows for the moments in the floor to be exact to a few per cent
    rows = len(many)
    at_many = (fourth - square) / rows + (trace**2 + square) / (rows * (rows - 1))
    assert sd.covariance_error(many, variance)[1] == pytest.approx(math.sqrt(at_many / square), rel=0.03)
    few = x[0] - x[0].mean(0)  # of few rows, from their own moments
    cov, fourth = sample_cov(few), few.norm(dim=1).pow(4).mean()
    chance = (fourth - cov.norm() ** 2) / n + (cov.trace() ** 2 + cov.norm() ** 2) / (n * (n - 1))
    assert sd.covariance_error(x[0], 2.0)[1] == pytest.approx((chance.sqrt() / (2 * size**0.5)).item(), rel=1e-12)
