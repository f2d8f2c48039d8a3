"""Log-densities by exponential Adams against closed forms, row by row."""

import math

import numpy as np
import pytest
import torch
from helpers import NAMED, TwoFunctions, fitted_order, name

import sdediff as sd
from sdediff.density import DensityRows, FromData
from sdediff.divergence import Exact, Hutchinson
from sdediff.model import Point

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(size, std=None, seed=0):
    """A random mean, and a random covariance unless a deviation is given."""
    root = normal(size, size, seed=seed) / size**0.5
    cov = root @ root.T + 0.1 * torch.eye(size, dtype=F64) if std is None else std**2
    return sd.exact.Gaussian(normal(size, seed=seed + 1), cov)


def ring():
    angles = torch.arange(8, dtype=F64) * torch.pi / 4
    means = 1.2 * torch.stack([angles.cos(), angles.sin()], 1)
    return sd.exact.GaussianMixture(torch.linspace(1, 3, 8), means, torch.linspace(0.05, 0.3, 8) ** 2)


def low_rank(size=12):
    factors = normal(4, size, 3, seed=3) * 0.5
    return sd.exact.GaussianMixture(
        torch.ones(4), 0.3 * normal(4, size, seed=4), sd.exact.LowRank(factors, torch.tensor(0.05**2))
    )


def value(target, sde, x, **options):
    return sd.log_prob(target.model(sde), x, prior=target.marginal(sde, sd.as_linear(sde).t_max), **options).value


# Closed forms


@pytest.mark.parametrize(("size", "std"), [(1, 0.005), (1, 1.0), (2, None), (8, None), (64, 1.0)])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_gaussian_data_has_its_log_density_to_the_tolerance(sde, size, std):
    target = gaussian(size, std)
    x = target.sample(6, seed=1)
    assert (value(target, sde, x) - target.log_prob(x)).abs().max() <= 1e-3


@pytest.mark.parametrize(("size", "std"), [(1, 0.005), (2, 1.0), (8, 0.005), (8, None), (64, None)])
@pytest.mark.parametrize("atol", [1e-2, 1e-4])
def test_other_tolerances_are_kept_too(size, std, atol):
    target = gaussian(size, std)
    x = target.sample(6, seed=1)
    for sde in (sd.VP(), sd.RectifiedFlow()):
        assert (value(target, sde, x, atol_nats=atol) - target.log_prob(x)).abs().max() <= atol


@pytest.mark.parametrize("sde", [sd.VP(t_min=1e-6), sd.EDM(sigma_min=1e-4)], ids=name)
@pytest.mark.parametrize("make", [ring, low_rank])
def test_mixtures_have_their_log_density_to_the_tolerance(sde, make):
    target = make()
    x = target.sample(60, seed=1)
    exact, before = target.log_prob(x), math.inf
    for atol in (1e-2, 1e-3, 1e-4):
        off = value(target, sde, x, atol_nats=atol) - exact
        rms = off.square().mean().sqrt()
        assert rms <= atol
        assert off.abs().max() <= 10 * rms
        assert rms < before / 2
        before = rms


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("target", [gaussian(2), low_rank(4)], ids=["gaussian", "mixture"])
def test_the_order_of_a_fixed_grid(target, offset):
    """Three values in the predictor, four in the corrector; even and odd numbers of steps."""
    sde = sd.VP(t_min=1e-3)
    x = sd.as_linear(sde).alpha(1e-3) * target.sample(30, seed=1)
    exact = target.marginal(sde, 1e-3).log_prob(x)
    counts = [n + offset for n in (80, 120, 160, 240)]
    errors = [(value(target, sde, x, steps=n, tail="none") - exact).abs().mean() for n in counts]
    assert 3.6 < fitted_order(errors, counts) < 5
    assert errors[-1] < 1e-5


def test_what_error_says():
    """It belongs to the predictor, so that the value is better than it says, but not by orders of magnitude."""
    target, sde = ring(), sd.VP(t_min=1e-6)
    x = target.sample(60, seed=1)
    result = sd.log_prob(target.model(sde), x, prior=target.marginal(sde, 1.0))
    off = (result.value - target.log_prob(x)).abs()
    assert off.mean() < result.error.mean() < 100 * off.mean()
    assert (result.error > 0).all()
    assert (result.error < 1e-3 * result.accepted.sqrt() + 1e-12).all()


# Networks of every kind


def wrapped(target, sde, kind, sigma_data=0.6):
    """The exact model as a network that predicts something else."""
    linear, exact = sd.as_linear(sde), target.model(sde)
    model = sd.ScoreModel(lambda x, t: x, sde, kind, sigma_data=sigma_data)

    def edm(inputs, seen):
        ratio = (4 * seen).exp()
        t = linear.time(-2 * ratio.log())
        alpha, sigma = linear.scales_at(t)
        k = torch.hypot(sigma, alpha * sigma_data)
        x = inputs * k.reshape(-1, *[1] * (inputs.ndim - 1))
        return exact.combine(t, x, sigma / (sigma_data * k), -alpha * sigma_data / k)

    def network(x, t):
        m, n = {
            "data": lambda p: (torch.ones_like(t), torch.zeros_like(t)),
            "noise": lambda p: (torch.zeros_like(t), torch.ones_like(t)),
            "score": lambda p: (torch.zeros_like(t), -1 / p.sigma),
            "v": lambda p: (-p.sigma, p.alpha),
            "flow": lambda p: p.sde.scale_rates(t),
        }[kind](Point(linear, t, *linear.scales_at(t), 1.0))
        return exact.combine(t, x, m, n)

    return sd.ScoreModel(edm if kind == "edm" else network, model.sde, kind, sigma_data=sigma_data)


@pytest.mark.parametrize("kind", ["noise", "data", "score", "v", "flow", "edm"])
@pytest.mark.parametrize("sde", [sd.VP(t_min=1e-3), sd.RectifiedFlow(t_min=1e-3)], ids=name)
def test_every_kind_of_prediction_gives_the_same_value(kind, sde):
    target = gaussian(3)
    x = target.sample(6, seed=1)
    result = sd.log_prob(wrapped(target, sde, kind), x, prior=target.marginal(sde, sde.t_max))
    assert (result.value - target.log_prob(x)).abs().max() <= 1e-3
    torch.testing.assert_close(
        FromData(wrapped(target, sde, kind), *start(sde, x), Exact(), seed=0, first_row=0, atol=1e-3).blur.gap,
        FromData(target.model(sde), *start(sde, x), Exact(), seed=0, first_row=0, atol=1e-3).blur.gap,
        rtol=1e-8, atol=1e-8,
    )  # fmt: skip


def start(sde, x, t_min=None):
    """The states of data at t_min, and a grid."""
    linear = sd.as_linear(sde)
    times = torch.tensor([linear.t_min if t_min is None else t_min, linear.t_max], dtype=F64)
    return linear.alpha(times[0]) * x, times


# Rows


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(3, "orthogonal"), Hutchinson(3, "gaussian")], ids=repr)
@pytest.mark.parametrize("steps", [None, 12])
def test_a_row_has_its_own_value_in_any_batch(divergence, steps):
    target, sde = low_rank(6), sd.VP(t_min=1e-3)
    model, x = target.model(sde), target.sample(256, seed=1)
    options = {"divergence": divergence, "steps": steps, "seed": 5, "atol_nats": 1e-2}
    whole = sd.log_prob(model, x, **options)
    alone = 1 if steps or not divergence.random else 2  # one row of probes: see the next test
    for other, n in (
        (sd.log_prob(model, x[:alone], **options), alone),
        (sd.log_prob(model, x[:7], **options), 7),
        (sd.log_prob(model, x[:60], batch_size=25, **options), 60),
    ):
        for field in ("value", "stderr", "error", "tail_gap", "prior_gap", "latent"):
            torch.testing.assert_close(getattr(other, field), getattr(whole, field)[:n], rtol=0, atol=1e-10)
        torch.testing.assert_close(other.estimates, whole.estimates[:, :n], rtol=0, atol=1e-10)
        assert torch.equal(other.row_nfe, whole.row_nfe[:n])
        assert torch.equal(other.accepted, whole.accepted[:n])
        assert torch.equal(other.rejected, whole.rejected[:n])


def test_a_step_that_every_row_refuses_gives_no_warning():
    target, sde = low_rank(6), sd.VP(t_min=1e-3)
    model, x = target.model(sde), target.sample(256, seed=1)
    options = {"divergence": Hutchinson(3), "seed": 5, "atol_nats": 1e-2}
    whole = sd.log_prob(model, x[:7], **options)
    alone = sd.log_prob(model, x[:1], **options)
    assert alone.rejected.item() > 0
    torch.testing.assert_close(alone.value, whole.value[:1], rtol=0, atol=1e-10)


def test_float32_models():
    target = gaussian(4)
    single = sd.exact.Gaussian(target.mean.float(), target.cov)
    x = single.sample(20, seed=1)
    assert x.dtype == torch.float32
    sde = sd.VP(t_min=1e-3)
    result = sd.log_prob(single.model(sde), x, prior=target.marginal(sde, 1.0), atol_nats=1e-2)
    assert (result.value - target.log_prob(x.double())).abs().max() <= 1e-2
    assert result.value.dtype == F64
    assert result.latent.dtype == torch.float32


def test_conditions_and_counts_belong_to_their_rows():
    """The network of a row sees its own condition, and `row_nfe` is how often it was asked."""
    sde, seen = sd.VP(t_min=1e-3), np.zeros(9, dtype=int)
    spread = torch.linspace(0.05, 1.5, 9, dtype=F64)

    def network(x, t, c):
        seen[:] += np.bincount(c["row"].numpy(), minlength=9)
        alpha, sigma = (s[:, None] for s in sde.scales(t))
        return sigma * (x - alpha * c["mean"]) / (alpha**2 * spread[c["row"]][:, None] ** 2 + sigma**2)

    means = torch.linspace(-3, 3, 9, dtype=F64)[:, None].expand(9, 2)
    x = means + spread[:, None] * normal(9, 2)
    model = sd.ScoreModel(network, sde, "noise")
    for steps in (None, 80):
        seen[:] = 0
        result = sd.log_prob(
            model, x, condition={"mean": means, "row": torch.arange(9)}, batch_size=4, steps=steps, atol_nats=1e-3
        )
        seen[0] -= 1  # asked once more, whether it can be differentiated
        assert np.array_equal(seen, result.row_nfe.numpy())
        assert result.nfe == seen.max()
        assert torch.equal(result.row_nfe, 2 + result.accepted + result.rejected)  # at the data and at t_min
        latent = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 1.0)
        for row in range(9):
            own = sd.exact.Gaussian(means[row], spread[row] ** 2)
            bias = latent.log_prob(result.latent[row : row + 1]) - own.marginal(sde, 1.0).log_prob(
                result.latent[row : row + 1]
            )
            exact = own.log_prob(x[row : row + 1]) + bias
            assert result.value[row].item() == pytest.approx(exact.item(), abs=2e-3)
    assert len(set(sd.log_prob(model, x, condition={"mean": means, "row": torch.arange(9)}).row_nfe.tolist())) > 3


def test_a_budget_is_kept_and_running_out_is_an_error():
    target, sde = ring(), sd.VP()
    model, x = target.model(sde), target.sample(20, seed=1)
    free = sd.log_prob(model, x)
    budget = int(free.row_nfe.median())
    slow = (free.row_nfe > budget).nonzero()[:, 0].tolist()
    assert 0 < len(slow) < 20
    for size in (None, 7):
        with pytest.raises(sd.DivergenceError, match=r"ran out of network calls.*max_nfe") as caught:
            sd.log_prob(model, x, max_nfe=budget, batch_size=size)
        first = slow if size is None else [row for row in slow if row // size == slow[0] // size]
        assert caught.value.rows == first
    enough = sd.log_prob(model, x, max_nfe=int(free.row_nfe.max()))
    assert torch.equal(enough.value, free.value)


@pytest.mark.parametrize("options", [{}, {"steps": 20}, {"steps": 20, "divergence": Hutchinson(1)}], ids=str)
@pytest.mark.parametrize("size", [None, 2])
def test_networks_that_break_are_named_by_row(options, size):
    def network(x, t):
        return torch.where((t > 0.4)[:, None] & (x[:, :1] > 1.0), torch.nan, 0 * x)

    model = sd.ScoreModel(network, sd.VE(), "noise")
    x = torch.tensor([[-1.0, 0, 0], [-2.0, 0, 0], [-1.0, 0, 0], [2.0, 0, 0]], dtype=F64)
    with pytest.raises(sd.DivergenceError) as caught:
        sd.log_prob(model, x, batch_size=size, **options)
    assert caught.value.rows == [3]
    assert caught.value.time > 0.3


# The blur of t_min


@pytest.mark.parametrize("t_min", [1e-4, 0.05, 0.2])
@pytest.mark.parametrize("sde", [sd.VP(), sd.RectifiedFlow(), sd.SubVP()], ids=name)
def test_the_blur_is_taken_off_exactly_for_gaussian_data(t_min, sde):
    target = gaussian(4)
    x = target.sample(8, seed=2)
    result = sd.log_prob(target.model(sde), x, t_min=t_min, prior=target.marginal(sde, sde.t_max), atol_nats=1e-4)
    assert (result.value - target.log_prob(x)).abs().max() <= 2e-4
    states, times = start(sde, x, t_min)
    of_y = target.marginal(sde, t_min).log_prob(states) + 4 * sde.alpha(t_min).log()
    torch.testing.assert_close(result.tail_gap, target.log_prob(x) - of_y, rtol=1e-7, atol=1e-7)
    rows = FromData(target.model(sde), states, times, Exact(), seed=0, first_row=0, atol=1e-3)
    score = -torch.linalg.solve(target.cov, (x - target.mean).T).T
    torch.testing.assert_close(rows.blur.score, score, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(rows.x, target.flow(sde, x, 0.0, t_min), rtol=1e-7, atol=1e-7)
    ratio = target.marginal(sde, t_min).cov.logdet() - 8 * sde.alpha(t_min).log() - target.cov.logdet()
    torch.testing.assert_close(rows.blur.log_dets[0], (ratio / 2).expand(8), rtol=1e-7, atol=1e-7)


def test_data_is_moved_and_states_are_not():
    """`tail="none"` is the density of a state at t_min; "gaussian" that of data, with alpha^D and the move to t_min."""
    target, sde = low_rank(4), sd.VP(t_min=0.02)
    model, x = target.model(sde), target.sample(6, seed=2)
    alpha = sde.alpha(0.02)
    states, times = start(sde, x)
    moved = FromData(model, states, times, Exact(), seed=0, first_row=0, atol=1e-3)
    data, state = sd.log_prob(model, x), sd.log_prob(model, moved.x, tail="none")
    torch.testing.assert_close(data.value, state.value + 4 * alpha.log() + moved.blur.log_dets[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(data.tail_gap, moved.blur.gap, rtol=0, atol=1e-10)
    torch.testing.assert_close(data.latent, state.latent, rtol=0, atol=1e-10)
    assert data.tail_gap.abs().min() > 1e-2
    assert state.tail_gap.isnan().all()
    by_solver = sd.log_prob(model, x, solver=sd.TorchDiffEq(rtol=1e-8, atol=1e-8))
    torch.testing.assert_close(by_solver.value, data.value, rtol=0, atol=1e-3)
    torch.testing.assert_close(by_solver.tail_gap, data.tail_gap, rtol=0, atol=1e-10)


def test_the_gap_is_of_second_order_for_mixtures():
    sde = sd.VP()
    means = torch.tensor([[-0.7, 0.2], [0.7, 0.0], [0.1, 0.9]], dtype=F64)
    target = sd.exact.GaussianMixture(torch.tensor([1.0, 2.0, 1.5]), means, torch.tensor([0.3, 0.2, 0.4]))
    x, errors, moved, spreads = target.sample(40, seed=0), [], [], [0.2, 0.1, 0.05]
    for s in spreads:
        t = sde.time(torch.tensor(-2 * math.log(s), dtype=F64)).item()
        states, times = start(sde, x, t)
        with torch.no_grad():
            rows = FromData(target.model(sde), states, times, Exact(), seed=0, first_row=0, atol=1e-3)
        truth = target.log_prob(x) - target.marginal(sde, t).log_prob(states) - 2 * sde.alpha(t).log()
        errors.append((rows.blur.gap - truth).abs().mean())
        assert truth.abs().mean() > 5 * errors[-1]
        value = target.marginal(sde, t).log_prob(rows.x) + rows.blur.log_dets[0] + 2 * sde.alpha(t).log()
        moved.append((value - target.log_prob(x)).abs().mean())
    assert fitted_order(errors, [1 / s**2 for s in spreads]) == pytest.approx(2, abs=0.25)
    assert fitted_order(moved, [1 / s**2 for s in spreads]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(1), Hutchinson(1, "orthogonal")], ids=repr)
def test_the_density_of_an_inexact_network_is_normalised(divergence):
    """A score that is off near t_min, and everywhere else, is still that of some flow; in one dimension a sign is an
    exact probe."""
    target, sde = sd.exact.Gaussian(torch.tensor([0.3], dtype=F64), 0.09), sd.VP(t_min=1e-2)
    exact = target.model(sde)

    def off(x, t):
        return exact.noise(t, x) + 0.1 * (3 * x).sin()

    x = torch.linspace(-8, 8, 3001, dtype=F64)[:, None]
    result = sd.log_prob(sd.ScoreModel(off, sde, "noise"), x, atol_nats=1e-4, divergence=divergence, seed=0)
    total = torch.trapezoid(result.value.exp(), x[:, 0])
    assert total.item() == pytest.approx(1, abs=2e-4)
    assert (result.value - target.log_prob(x)).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["data", "edm"])
def test_the_gap_of_a_linear_denoiser(kind):
    """Its Jacobian is no symmetric matrix; K is the symmetric part, times alpha."""
    sde, M, shift = sd.VP(t_min=0.03), normal(4, 4) / 4 + torch.eye(4, dtype=F64), normal(4, seed=1)

    class Linear:
        def model(self, sde):
            return sd.ScoreModel(lambda x, t: x @ M.T + shift, sde, "data")

    model = Linear().model(sde) if kind == "data" else wrapped(Linear(), sde, "edm")
    x = normal(5, 4, seed=2)
    states, times = start(sde, x)
    blur = FromData(model, states, times, Exact(), seed=0, first_row=0, atol=1e-3).blur
    alpha, sigma = sde.scales(times[0])
    g = alpha * (alpha * (states @ M.T + shift) - states) / sigma**2
    K = alpha * (M + M.T) / 2
    solved = torch.linalg.solve(K, g.T).T
    gap = -((sigma / alpha) ** 2) / 2 * (g * solved).sum(1) - torch.logdet(K) / 2
    torch.testing.assert_close(blur.gap, gap, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(blur.score, solved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [5, 40])
def test_with_signs_the_blur_of_diagonal_covariances_is_exact(count):
    """Krylov spaces of 10 dimensions suffice for 5 different variances, and nearly for 40."""
    sde, variances = sd.VP(t_min=0.05), torch.logspace(-1.5, 0.5, count, dtype=F64)
    target = sd.exact.Gaussian(normal(count), variances)
    x = target.sample(6, seed=1)
    states, times = start(sde, x)
    s2 = (sde.sigma(0.05) / sde.alpha(0.05)) ** 2
    K, g = variances / (variances + s2), -(x - target.mean) / (variances + s2)
    rows = FromData(target.model(sde), states, times, Hutchinson(2), seed=0, first_row=0, atol=1e-3)
    tight = {"rtol": 1e-8, "atol": 1e-8} if count == 5 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(rows.blur.log_dets, (-K.log().sum() / 2).expand(2, 6), **tight)
    torch.testing.assert_close(rows.blur.gap, -(s2 * (g**2 / K).sum(1) + K.log().sum()) / 2, **tight)
    torch.testing.assert_close(rows.blur.score, g / K, **tight)
    torch.testing.assert_close(rows.x, target.flow(sde, x, 0.0, 0.05), **tight)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_with_probes_the_blur_is_unbiased_and_its_spread_is_in_the_error_bar(distribution):
    """Half of the axes are ten times thinner than the blur, in a rotated frame; against the exact method."""
    sde, size = sd.VP(t_min=1e-3), 32
    axes = torch.linalg.qr(normal(size, size, seed=3))[0]
    variances = torch.cat([torch.full((size // 2,), 1e-3**2), torch.full((size // 2,), 0.25)]).to(F64)
    target = sd.exact.Gaussian(torch.zeros(size, dtype=F64), (axes * variances) @ axes.T)
    x = target.sample(400, seed=1)
    options = {"steps": 12, "seed": 2, "prior": target.marginal(sde, 1.0)}
    exact = sd.log_prob(target.model(sde), x, divergence="exact", **options)
    probed = sd.log_prob(target.model(sde), x, divergence=Hutchinson(4, distribution), **options)
    off = probed.value - exact.value
    assert abs(off.mean()) < 4 * off.std() / 400**0.5
    assert (off.abs() <= 2 * probed.stderr).double().mean().item() == pytest.approx(0.95, abs=0.02 + 0.029)
    torch.testing.assert_close(probed.estimates.mean(0), probed.value)
    part = FromData(target.model(sde), *start(sde, x), Hutchinson(4, distribution), seed=2, first_row=0, atol=1.0)
    alone = part.blur.log_dets.mean(0) + torch.linalg.slogdet(axes).logabsdet
    wide = target.marginal(sde, 1e-3).cov.logdet() - 2 * size * sde.alpha(1e-3).log() - target.cov.logdet()
    away = alone - wide / 2
    assert away.std() > 1
    assert abs(away.mean()) < 4 * away.std() / 400**0.5


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=repr)
def test_where_nothing_smooth_explains_the_model_the_gap_is_infinite_and_left_out(divergence):
    sde, slope = sd.VP(t_min=1e-2), torch.tensor([-0.5, 0.5], dtype=F64)

    def network(x, t):  # a denoiser that falls in the rows that lie left of 0
        return torch.where(x[:, :1] < 0, slope[0], slope[1]) * x

    model = sd.ScoreModel(network, sde, "data")
    x = torch.tensor([[-1.0, 0.5, 0.3], [1.0, 0.5, 0.3]], dtype=F64)
    options = {"steps": 30, "divergence": divergence, "seed": 0}
    result = sd.log_prob(model, x, **options)
    assert result.tail_gap[0] == math.inf
    assert result.tail_gap[1].isfinite()
    state = sd.log_prob(model, sde.alpha(1e-2) * x, tail="none", **options)
    assert result.value[0].item() == pytest.approx((state.value[0] + 3 * sde.alpha(1e-2).log()).item(), abs=1e-10)


def test_probes_are_those_of_the_nodes_a_row_has_taken():
    """A step that is refused leaves the place of the next probes as it was."""
    target, sde = low_rank(6), sd.VP(t_min=1e-3)
    states, times = start(sde, target.sample(40, seed=1))
    rows = DensityRows(target.model(sde), states, times, Hutchinson(3), seed=0, first_row=0, atol=1e-2)
    rows.run(1)
    assert rows.rejected.sum() > 0
    assert np.array_equal(rows.place, 1 + rows.accepted.numpy())
