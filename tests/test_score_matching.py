"""Implicit, sliced and finite-difference score matching: closed forms, known variances, orders, gradients."""

import math

import pytest
import torch
from helpers import fitted_order
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdediff as sd
from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.losses import WEIGHTINGS, denoising, energy_difference, finite_difference, implicit, sliced
from sdediff.model import PREDICTIONS
from sdediff.testing import gaussian_targets, linear_sdes
from sdediff.times import Steps

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


SIZE = 4
MEAN = torch.tensor([0.5, -1.0, 0.2, 0.0], dtype=F64)
ROOT = torch.eye(SIZE, dtype=F64) * 0.6 + 0.3 * normal(SIZE, SIZE, seed=1)
COV = ROOT @ ROOT.T
POINTS = MEAN + math.sqrt(SIZE) * torch.cat([ROOT.T, -ROOT.T])
"""Over these, the mean of any quadratic is its expectation under `N(MEAN, COV)`."""

ALL = {"projections": SIZE, "distribution": "orthogonal"}
"""All four rows of Hadamard's matrix: `sum_k v_k v_k^T / 4` is the identity, so that nothing is left to chance."""

LOSSES = {
    "implicit": implicit,
    "sliced": lambda *args, **options: sliced(*args, **{"variance_reduced": False} | ALL | options),
    "reduced": lambda *args, **options: sliced(*args, **ALL | options),
    "differences": lambda *args, **options: finite_difference(*args, **ALL | options),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@settings(max_examples=15)
@given(entries=st.lists(st.floats(-1, 1), min_size=SIZE * (SIZE + 1), max_size=SIZE * (SIZE + 1)))
def test_the_loss_of_a_linear_score_on_gaussian_data_is_hyvarinens_closed_form(loss, entries):
    """`tr A + (tr A S A^T + |A m + b|^2) / 2` for s = A x + b, symmetric or not; differences are exact there."""
    A, b = torch.tensor(entries, dtype=F64).split([SIZE**2, SIZE])
    A = A.reshape(SIZE, SIZE)
    wanted = A.trace() + ((A @ COV @ A.T).trace() + (A @ MEAN + b).square().sum()) / 2
    value = loss(lambda x: x @ A.T + b, POINTS, generator=generator())
    assert value.shape == (len(POINTS),)
    torch.testing.assert_close(value.mean(), wanted, rtol=1e-9, atol=1e-9)


def energy_of(theta):
    """`x^T A x / 2 + b x`, symmetrised."""
    A, b = theta[: SIZE**2].reshape(SIZE, SIZE), theta[SIZE**2 :]
    return lambda x: ((x @ ((A + A.T) / 2)) * x).sum(1) / 2 + x @ b


def of_score(loss):
    """The loss as a function of A and b."""

    def of_parameters(theta):
        A, b = theta[: SIZE**2].reshape(SIZE, SIZE), theta[SIZE**2 :]
        return loss(lambda x: x @ A.T + b, POINTS, generator=generator()).mean()

    return of_parameters


def of_energy(theta):
    return energy_difference(energy_of(-theta), POINTS, generator=generator(), **ALL).mean()


OF_PARAMETERS = {name: of_score(loss) for name, loss in LOSSES.items()} | {"energy": of_energy}


@pytest.mark.parametrize("loss", OF_PARAMETERS.values(), ids=OF_PARAMETERS)
def test_the_minimiser_over_linear_scores_is_the_true_score(loss):
    """The loss is quadratic in A and b: its gradient vanishes at the true ones, and its curvature is not negative."""
    precision = COV.inverse()
    true = torch.cat([-precision.flatten(), precision @ MEAN]).requires_grad_()
    slope = torch.autograd.grad(loss(true), true)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    curvature = torch.autograd.functional.hessian(loss, torch.zeros_like(true))
    eigen = torch.linalg.eigvalsh(curvature)
    flat = SIZE * (SIZE - 1) // 2 if loss is of_energy else 0  # the antisymmetric part has no say
    assert (eigen.abs() < 1e-8).sum() == flat
    assert eigen.min() > -1e-8


# Projections


def field(x):
    """A score that is no gradient and not linear."""
    return torch.stack([(2 * x[:, 0] + x[:, 1]).sin(), x[:, 0] * x[:, 2] - x[:, 1], (x[:, 1] - x[:, 2]).cos()], dim=1)


def form_variance(distribution, matrix):
    symmetric, size = (matrix + matrix.T) / 2, len(matrix)
    squares = symmetric.square().sum()
    if distribution == "sphere":
        return 2 * size / (size + 2) * (squares - symmetric.trace() ** 2 / size)
    return 2 * squares - (2 * symmetric.diagonal().square().sum() if distribution == "rademacher" else 0)


@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("reduced", [True, False], ids=["reduced", "plain"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_sliced_is_unbiased_for_implicit_and_its_variance_is_the_known_one(distribution, reduced, projections):
    """20,000 rows at one point; 4.5 standard errors."""
    x = torch.tensor([[0.4, -0.7, 1.1]], dtype=F64)
    jacobian = torch.func.jacrev(lambda y: field(y[None])[0])(x[0])
    s = field(x)[0]
    wanted = form_variance(distribution, jacobian if reduced else jacobian + torch.outer(s, s) / 2) / projections
    rows = sliced(
        field, x.expand(20_000, 3), projections=projections, distribution=distribution, variance_reduced=reduced,
        generator=generator(1),
    )  # fmt: skip
    exact = implicit(field, x)[0]
    torch.testing.assert_close(exact, jacobian.trace() + s.square().sum() / 2)
    assert abs(rows.mean() - exact) < 4.5 * (wanted / 20_000).sqrt()
    kurtosis = ((rows - rows.mean()) ** 4).mean() / rows.var() ** 2
    assert abs(rows.var() / wanted - 1) < 4.5 * ((kurtosis - 1) / 20_000) ** 0.5


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere", "orthogonal"])
def test_differences_tend_to_sliced_score_matching_at_second_order(distribution):
    x = normal(6, 3)
    options = {"projections": 2, "distribution": distribution}
    limit = sliced(field, x, variance_reduced=False, generator=generator(2), **options)
    steps = [4, 8, 16, 32]
    errors = [
        (finite_difference(field, x, step=1 / n, generator=generator(2), **options) - limit).abs().max().item()
        for n in steps
    ]
    assert 1.9 < fitted_order(errors, steps) < 2.1


def test_differences_of_an_energy_tend_to_sliced_score_matching_at_second_order():
    def energy(x):
        return (x.sin() + x[:, :1] * x**2 / 3).sum(1)

    x = normal(6, 3)
    score = sd.Energy(Module(energy))
    limit = sliced(score, x, variance_reduced=False, projections=2, generator=generator(2))
    steps = [4, 8, 16, 32]
    errors = [
        (energy_difference(energy, x, step=1 / n, projections=2, generator=generator(2)) - limit).abs().max().item()
        for n in steps
    ]
    assert 1.9 < fitted_order(errors, steps) < 2.1


# At noise levels


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def between(sde, n):
    ends = sde.clock(torch.tensor([sde.t_min, sde.t_max], dtype=F64)).nan_to_num(neginf=-12.0, posinf=12.0)
    return sde.unclock(ends[0] + torch.linspace(0.2, 0.8, n, dtype=F64) * (ends[1] - ends[0]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@settings(max_examples=12)
@given(sde=linear_sdes(), target=gaussian_targets(max_dim=3), kind=st.sampled_from([*PREDICTIONS]))
def test_denoising_is_implicit_score_matching_plus_the_weight_in_expectation(weighting, sde, target, kind):
    """At every level and for any model: affine ones here, whose expectations are sums over 4 D points."""
    size = len(target.mean)
    root = torch.linalg.cholesky(target.cov)
    points = math.sqrt(2 * size) * torch.cat([torch.eye(2 * size, dtype=F64), -torch.eye(2 * size, dtype=F64)])
    grid = between(sde, 4)
    t = grid[1:].repeat_interleave(len(points))
    x0, noise = (target.mean + points[:, :size] @ root.T).repeat(3, 1), points[:, size:].repeat(3, 1)
    exact = target.model(sde)
    tilt = normal(size, size, seed=3) / 3

    def network(x, t):
        if kind == "edm":
            x = sd.over((sde.sigma(t) ** 2 + (0.5 * sde.alpha(t)) ** 2).sqrt(), x) * x
        return exact.view(kind, t, x) + 0.2 + sd.over(sde.sigma(t), x) * 0.1 * (x @ tilt)

    model = sd.ScoreModel(network, sde, kind, time=lambda t: t)
    exact = sd.ScoreModel(exact.network, exact.sde, "v", time=exact.time, sigma_data=0.5)
    options = {"weighting": weighting, "t": t, "noise": noise}
    if weighting == "vlb":
        options["times"] = Steps(grid)
    known, unknown = (loss(model, x0, **options).reshape(3, -1).mean(1) for loss in (denoising, implicit))
    weight = denoising(sd.ScoreModel(lambda x, t: 0 * x, sde), 0 * x0, **options | {"noise": torch.ones_like(x0)})
    torch.testing.assert_close(known, unknown + weight.reshape(3, -1)[:, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_single_level_is_the_static_loss_in_units_of_that_level(loss):
    sde, t = sd.VP(), torch.tensor(0.3, dtype=F64)
    exact = sd.ScoreModel(lambda x, t: (2 * x).sin() + sd.over(t, x), sde, time=lambda t: t)
    x0, noise = normal(5, SIZE, seed=2), normal(5, SIZE, seed=3)
    level = loss(exact, x0, t=t, noise=noise, weighting="snr", generator=generator(4))
    step = {"step": 0.05 * sde.sigma(t).item()} if loss is LOSSES["differences"] else {}
    static = loss(lambda x: exact.score(t, x), sde.perturb(t, x0, noise), generator=generator(4), **step)
    weight = 1 + (-sde.log_snr(t)).exp()
    torch.testing.assert_close(level, 2 * weight * sde.sigma(t) ** 2 / SIZE * static, rtol=1e-9, atol=1e-9)


def test_levels_and_noise_are_those_of_denoising_and_the_condition_arrives():
    seen = []

    def network(x, t, condition):
        seen.append((x, t, condition))
        return x * condition[:, None]

    model, x0 = sd.ScoreModel(network, sd.VP()), normal(7, 2)
    label = torch.arange(7, dtype=F64)
    for loss in (denoising, implicit, sliced):
        loss(model, x0, condition=label, generator=generator(5))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[2][1])
    assert all(condition is label for _, _, condition in seen)


# Gradients


class Small(nn.Module):
    """A network of nine weights, `(batch, 2)` to the same shape; as an energy, `(batch,)`."""

    def __init__(self, scalar=False):
        super().__init__()
        self.first = nn.Parameter(normal(2, 2, seed=5))
        self.second = nn.Parameter(normal(2, 2, seed=6))
        self.time = nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.scalar = scalar

    def forward(self, x, t=None):
        clock = 0 if t is None else t[:, None]
        h = torch.tanh(x @ self.first + self.time * clock) @ self.second
        return (h * x).sum(1) if self.scalar else h


def slope_and_differences(module, loss):
    module.zero_grad()
    loss().backward()
    slopes, differences = [], []
    for parameter in module.parameters():
        if parameter.grad is None:
            continue
        slopes.append(parameter.grad.flatten().clone())
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            values = []
            for move in (1e-5, -2e-5):
                flat[i] += move
                values.append(loss().item())
            flat[i] += 1e-5
            differences.append((values[0] - values[1]) / 2e-5)
    assert differences
    return torch.cat(slopes), torch.tensor(differences, dtype=F64)


AT_LEVELS = {
    "denoising": denoising,
    "implicit": implicit,
    "sliced": lambda *args, **options: sliced(*args, variance_reduced=False, distribution="gaussian", **options),
    "reduced": lambda *args, **options: sliced(*args, distribution="sphere", **options),
    "differences": finite_difference,
}


@pytest.mark.parametrize("network", ["score", "noise", "v", "edm", "energy"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("loss", AT_LEVELS.values(), ids=AT_LEVELS)
def test_gradients_at_levels_are_those_of_central_differences(loss, weighting, network):
    sde = sd.VP(t_min=0.05)
    module = sd.Energy(Small(scalar=True)) if network == "energy" else Small()
    model = sd.ScoreModel(module, sde, "score" if network == "energy" else network)
    options = {"times": Steps(torch.linspace(0.05, 1, 6))} if weighting == "vlb" else {}
    x0 = normal(4, 2)
    slopes, differences = slope_and_differences(
        module, lambda: loss(model, x0, weighting=weighting, generator=generator(1), **options).mean()
    )
    torch.testing.assert_close(slopes, differences, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("network", ["field", "energy"])
def test_gradients_of_static_losses_are_those_of_central_differences(loss, network):
    module = sd.Energy(Small(scalar=True)) if network == "energy" else Small()
    x, few = normal(4, 2), {} if loss is implicit else {"projections": 2}
    slopes, differences = slope_and_differences(module, lambda: loss(module, x, generator=generator(1), **few).mean())
    torch.testing.assert_close(slopes, differences, rtol=1e-6, atol=1e-6)


def test_gradients_of_differences_of_an_energy_are_those_of_central_differences():
    module, x = Small(scalar=True), normal(4, 2)
    slopes, differences = slope_and_differences(
        module, lambda: energy_difference(module, x, step=0.3, generator=generator(1)).mean()
    )
    torch.testing.assert_close(slopes, differences, rtol=1e-6, atol=1e-6)


def test_losses_without_gradients_have_the_same_values():
    module, x = Small(), normal(4, 2)
    for loss in LOSSES.values():
        few = {} if loss is implicit else {"projections": 2}
        with torch.no_grad():
            plain = loss(module, x, generator=generator(1), **few)
        assert not plain.requires_grad
        torch.testing.assert_close(plain, loss(module, x, generator=generator(1), **few).detach(), rtol=0, atol=1e-14)


def test_losses_in_inference_mode_have_the_same_values():
    """Also of data, noise and conditions that were made there."""
    model, score = MODEL, Small()
    for loss in (implicit, sliced, finite_difference, denoising):
        wanted = loss(model, normal(4, 2), t=torch.full((4,), 0.4), noise=normal(4, 2, seed=1), generator=generator(1))
        with torch.inference_mode():
            t, noise = torch.full((4,), 0.4), normal(4, 2, seed=1)
            got = loss(model, normal(4, 2) + 0, t=t, noise=noise + 0, generator=generator(1))
        torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-14)
        if loss is not denoising:
            wanted = loss(score, X, generator=generator(1)).detach()
            with torch.inference_mode():
                torch.testing.assert_close(loss(score, X + 0, generator=generator(1)), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("event", [(), (2,)])
def test_differences_of_an_energy_object_are_those_of_its_network(event):
    """For events of shape () its field has the shape of an energy, and must not be taken for it."""
    network = Small(scalar=True) if event else Parabola()
    x = normal(4, *event)
    values = [
        energy_difference(energy, x, step=0.3, generator=generator(1)) for energy in (network, sd.Energy(network))
    ]
    assert torch.equal(*values)


class Parabola(torch.nn.Module):
    """The energy of N(0, 1), of numbers."""

    def forward(self, x):
        return x**2 / 2


# Bad input


class Once(torch.autograd.Function):
    """A cube without a second derivative."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context, slope):
        if torch.is_grad_enabled():
            raise RuntimeError("derivative for once is not implemented")
        return 3 * context.saved_tensors[0] ** 2 * slope


X = normal(3, 2)
MODEL = sd.ScoreModel(Small(), sd.VP(), "score")
BAD = {
    "not callable": (OptionError, lambda: implicit(3.0, X), "got float", "a ScoreModel"),
    "levels of a score": (OptionError, lambda: implicit(lambda x: x, X, t=0.3), "^t: a score", "give a ScoreModel"),
    "two options": (
        OptionError, lambda: sliced(lambda x: x, X, weighting="snr", condition=1), "weighting, condition", "Leave it",
    ),
    "shape": (ShapeError, lambda: implicit(lambda x: x.sum(1), X), r"got \(3,\)", r"shaped as x, \(3, 2\)"),
    "type": (ShapeError, lambda: implicit(lambda x: None, X), "got NoneType", "shaped as x"),
    "state": (ShapeError, lambda: implicit(lambda x: x, X.long()), "torch.int64", r"x.float\(\)"),
    "projections": (OptionError, lambda: sliced(lambda x: x, X, projections=0), "got 0", "at least one"),
    "orthogonal": (
        OptionError, lambda: sliced(lambda x: x, X, projections=3, distribution="orthogonal"), "got 3", "take fewer",
    ),
    "distribution": (OptionError, lambda: sliced(lambda x: x, X, distribution="cube"), "'cube'", "'sphere'"),
    "option": (OptionError, lambda: implicit(MODEL, X, foo=1), "'foo'", "weighting, t, times, noise, condition"),
    "option of a score": (OptionError, lambda: sliced(lambda x: x, X, foo=1), "'foo'", "weighting"),
    "differences": (
        ShapeError, lambda: finite_difference(lambda x: x.sum(1, keepdim=True), X), r"got \(3, 1\)", "shaped as x",
    ),
    "no rows": (ShapeError, lambda: implicit(MODEL, X[:0]), r"\(0, 2\)", "at least one row"),
    "step": (OptionError, lambda: finite_difference(lambda x: x, X, step=0.0), "got 0.0", "step > 0"),
    "energy": (ShapeError, lambda: energy_difference(lambda x: x, X), r"\(3, 2\)", r"shape \(3,\)"),
    "weighting": (OptionError, lambda: implicit(MODEL, X, weighting="none"), "'none'", "'simple'"),
    "time": (TimeError, lambda: implicit(MODEL, X, t=2.0), "2", r"\[0, 1\]"),
    "times": (ShapeError, lambda: sliced(MODEL, X, t=torch.ones(2)), r"\(2,\)", "one time per row"),
    "once": (CapabilityError, lambda: implicit(Once.apply, X), "second derivative", "use finite_difference"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "act", "value", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(kind, act, value, remedy):
    with pytest.raises(kind, match=value) as info:
        act()
    assert info.match(remedy)
