"""Variational diffusion models: the loss in closed form, its gradients, and a variance that falls."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import MEAN, VARIANCE, fitted_order, scalar_target
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import f as f_distribution
from test_bounds import NODES, WEIGHTS
from test_learned import Powers, shaped
from torch import nn

import sdediff as sd
from sdediff.decoders import DiscretizedGaussian, Softmax
from sdediff.errors import CapabilityError, CheckpointError, OptionError, SDEError, ShapeError, TimeError
from sdediff.networks import MLP, FourierFeatures

F64 = torch.float64
LOW, HIGH = -9.0, 4.0
TIMES, TIME_WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))


class Level:
    """The variance-preserving process in which time is gamma."""

    @staticmethod
    def scales_at(gamma):
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


class ExactV(nn.Module):
    """The exact v of some data at `-log SNR`, whatever the schedule."""

    keeps_time = True

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, z, gamma):
        return self.target._v(Level(), gamma, z)


def exact_vdm(target, sde, **options):
    return sd.VDM(ExactV(target), sde, prediction="v", time=lambda gamma: gamma, **options)


def noise_error(gamma, x):
    """`E |eps - epshat|^2` over the noise, of the exact model of the scalar target."""
    snr = math.exp(-gamma)
    total = snr * VARIANCE + 1
    return snr * (((x - MEAN) / total) ** 2 + snr * (VARIANCE / total) ** 2)


def integrated(sde, x, **options):
    """The diffusion term of the scalar target, noise and times integrated by quadrature."""
    times = sde.t_min + (sde.t_max - sde.t_min) * (TIMES + 1) / 2
    t = times.repeat_interleave(len(NODES))
    noise = NODES.repeat(len(times))[:, None]
    rows = torch.full_like(noise, x)
    value = sd.variational(scalar_target().model(sde), rows, t=t, noise=noise, noise_0=noise, **options).diffusion
    return TIME_WEIGHTS / 2 @ (value.reshape(len(times), -1) @ WEIGHTS)


# The terms


@pytest.mark.parametrize("x", [-1.5, 0.7, 2.0])
def test_the_terms_are_their_closed_forms(x):
    sde = sd.LearnedVP(gamma_min=LOW, gamma_max=HIGH)
    expected = quad(lambda gamma: noise_error(gamma, x) / 2, LOW, HIGH, epsabs=1e-12, epsrel=1e-12)[0]
    assert abs(integrated(sde, x).item() / expected - 1) < 1e-6
    rows = torch.full((len(NODES), 1), x, dtype=F64)
    parts = sd.variational(scalar_target().model(sde), rows, noise=0 * rows, noise_0=NODES[:, None])
    torch.testing.assert_close(parts.prior, math.exp(-HIGH) * rows[:, 0] ** 2 / 2)
    bound = -0.5 * (math.log(2 * math.pi) + LOW + noise_error(LOW, x))
    assert abs((parts.reconstruction @ WEIGHTS).item() - bound) < 1e-9
    torch.testing.assert_close(parts.total, parts.prior - parts.reconstruction + parts.diffusion)


@pytest.mark.parametrize("x", [MEAN, 2.0])
def test_the_ends_are_pulled_where_the_bound_rises(x):
    """At the mean of the data, both the least and the most noise should be more extreme."""
    sde = sd.LearnedVP(gamma_min=-3.0, gamma_max=2.0)
    times = sde.t_min + (sde.t_max - sde.t_min) * (TIMES + 1) / 2
    noise = NODES.repeat(len(times))[:, None]
    rows, t = torch.full_like(noise, x), times.repeat_interleave(len(NODES))
    loss = sd.variational(scalar_target().model(sde), rows, t=t, noise=noise, noise_0=noise).total
    found = torch.autograd.grad(TIME_WEIGHTS / 2 @ (loss.reshape(len(times), -1) @ WEIGHTS), sde.ends)[0].tolist()
    h = 1e-5
    bend = (noise_error(-3.0 + h, x) - noise_error(-3.0 - h, x)) / (2 * h)
    low = (1 + bend - noise_error(-3.0, x)) / 2
    high = (noise_error(2.0, x) - math.exp(-2.0) * x**2) / 2
    assert abs(found[0] - low) < 1e-6
    assert abs(found[1] - high) < 1e-6
    assert (x != MEAN) or found[0] > 0 > found[1]


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(-12, -5), st.floats(1, 6))
def test_the_loss_does_not_depend_on_the_curve_between_the_ends(seed, x, low, high):
    straight = sd.LearnedVP(gamma_min=low, gamma_max=high, hidden=1)
    bent = shaped(seed, hidden=3, size=0.3, gamma_min=low, gamma_max=high)
    own = sd.LearnedVP(Powers(), low, high)
    a, b, c = (integrated(sde, x).item() for sde in (straight, bent, own))
    assert abs(b / a - 1) < 1e-6
    assert abs(c / a - 1) < 1e-6


def test_the_loss_of_steps_is_the_sum_of_divergences_and_tends_to_the_continuous_one():
    sde, x = shaped(hidden=4, size=0.5, gamma_min=LOW, gamma_max=HIGH), 1.3
    limit, errors, counts = integrated(sde, x).item(), [], [50, 100, 200]
    for steps in counts:
        grid = torch.linspace(sde.t_min, sde.t_max, steps + 1, dtype=F64)
        gamma = sde.gamma(grid).tolist()
        snr = [math.exp(-g) for g in gamma]
        expected = sum(
            (snr[i] - snr[i + 1]) / 2 * noise_error(gamma[i + 1], x) / snr[i + 1] for i in range(steps)
        )  # 1/2 (snr_s - snr_t) |x - xhat|^2
        t = grid[1:].repeat_interleave(len(NODES))
        noise = NODES.repeat(steps)[:, None]
        rows = torch.full_like(noise, x)
        parts = sd.variational(scalar_target().model(sde), rows, steps=steps, t=t, noise=noise)
        found = (parts.diffusion.reshape(steps, -1) @ WEIGHTS).mean().item()
        assert abs(found / expected - 1) < 1e-9
        terms = sd.elbo(scalar_target().model(sde), rows[:64], times=grid.flip(0), samples=2, seed=0).terms
        each = (parts.diffusion.detach().reshape(steps, -1) @ WEIGHTS).flip(0) / steps
        assert ((terms.mean(1) - each).abs() < 5 * terms.std(1) / 8).all()
        assert found > limit, "steps cost something"
        errors.append(found - limit)
    assert 0.9 < fitted_order(errors, counts) < 1.1


@pytest.mark.parametrize("prediction", ["data", "v", "flow"])
@pytest.mark.parametrize("steps", [1, 4, None])
def test_it_is_finite_and_right_where_no_signal_is_left(prediction, steps):
    """A process that ends at alpha = 0: the sum over its steps, and the integral, are those of the closed form."""
    sde, x, n = sd.RectifiedFlow(t_min=0.05, t_max=1.0), 1.9, len(NODES)
    target = scalar_target()
    model = sd.ScoreModel(lambda z, t: target.model(sde).view(prediction, t, z), sde, prediction)
    if steps is None:
        times, weights = sde.t_min + 0.95 * (TIMES + 1) / 2, TIME_WEIGHTS / 2
    else:
        times, weights = 0.05 + 0.95 * torch.arange(1, steps + 1, dtype=F64) / steps, torch.full((steps,), 1 / steps)
    rows, noise = torch.full((len(times) * n, 1), x, dtype=F64), NODES.repeat(len(times))[:, None]
    given_ = {"t": times.repeat_interleave(n), "noise": noise, "noise_0": noise, "steps": steps}
    parts = sd.variational(model, rows, **given_)
    found = weights.double() @ (parts.diffusion.reshape(-1, n) @ WEIGHTS)

    def integrand(gamma):
        return noise_error(gamma, x) / 2

    if steps is None:  # what is above gamma = 60 is of order e^-60
        expected = quad(integrand, -sde.log_snr(0.05), 60, epsabs=1e-12, epsrel=1e-10)[0]
    else:
        snr = ((1 - (times - 0.95 / steps)) / (times - 0.95 / steps)) ** 2, ((1 - times) / times) ** 2
        mmse = [((x - MEAN) ** 2 + s * VARIANCE**2) / (s * VARIANCE + 1) ** 2 for s in snr[1].tolist()]
        expected = sum((a - b) / 2 * m for a, b, m in zip(*(v.tolist() for v in snr), mmse, strict=True))
    assert abs(found.item() / expected - 1) < 1e-6
    assert bool((parts.prior == 0).all())
    at_end = sd.variational(model, rows[:1], t=torch.ones(1), steps=steps)
    assert bool(at_end.total.isfinite().all())


def test_a_time_for_all_rows_is_one_for_each():
    """Also for the curve, whose gradient is scaled row by row."""
    sde, x = shaped(hidden=2, gamma_min=-2.0, gamma_max=2.0), torch.ones(3, 2, dtype=F64)
    vdm, noise = sd.VDM(MLP((2,), 8, 1).double(), sde), torch.tensor([[0.1, 2.0], [1.0, -1.0], [0.0, 0.3]], dtype=F64)
    slopes = []
    for t in (0.4, torch.tensor(0.4, dtype=F64), torch.full((3,), 0.4, dtype=F64)):
        loss = vdm.loss(x, t=t, noise=noise, noise_0=noise)
        slopes.append(torch.autograd.grad(loss.mean(), sde.curve.shifts)[0])
        torch.testing.assert_close(slopes[-1], slopes[0], rtol=1e-12, atol=0)
    assert slopes[0].abs().max() > 1e-6


def test_it_is_minus_the_bound_in_expectation():
    target = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64), torch.tensor([0.05, 0.2])
    )
    decoder = Softmax(9, (-2.0, 2.0))
    codes = torch.tensor([[1, 4], [7, 5]])
    for sde in (sd.VP(t_min=0.02), shaped(gamma_min=-6.0, size=0.3)):
        model, count = target.model(sde), 1500
        for kind, steps in ((None, None), (decoder, None), (DiscretizedGaussian(9, (-2.0, 2.0)), 7)):
            x = decoder.points(codes, F64).repeat(count, 1)  # even times in a row see both
            generator = torch.Generator().manual_seed(0)
            values = (
                sd.variational(model, x, decoder=kind, steps=steps, generator=generator)
                .total.detach()
                .reshape(count, 2)
            )
            times = None if steps is None else torch.linspace(sde.t_max, sde.t_min, steps + 1, dtype=F64)
            truth = sd.elbo(model, x[:2], times=times, samples=128, decoder=kind, seed=1)
            off = values.mean(0) + truth.total
            error = (values.var(0) / count + truth.stderr**2).sqrt()
            assert (off.abs() < 4 * error).all(), (sde, kind, off, error)


def test_times_are_even_and_drawn_by_the_generator():
    seen = []
    model = sd.ScoreModel(lambda x, t: seen.append(t) or x, sd.LearnedVP())
    x = torch.zeros(10, 2, dtype=F64)
    for steps, expected in ((None, torch.arange(10)), (5, torch.arange(1, 6).repeat_interleave(2))):
        values = [
            sd.variational(model, x, steps=steps, generator=torch.Generator().manual_seed(3)).total for _ in range(2)
        ]
        assert torch.equal(*values)
        place = (seen[-2].double().sort().values - 1e-3) / (1 - 1e-3)
        torch.testing.assert_close((place * 10).floor() if steps is None else place * 5, expected.double())


# Gradients


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("decoder", [None, Softmax(5), DiscretizedGaussian(5)])
def test_one_backward_pass_gives_the_curve_the_mean_square_and_all_else_the_mean(steps, decoder):
    """The mean square over twice the mean of the diffusion term as it is now."""
    torch.manual_seed(0)
    vdm = sd.VDM(
        MLP((2,), 8, 1).double(), shaped(hidden=2, size=0.3, gamma_min=-4.0, gamma_max=3.0), decoder, steps=steps
    )
    with torch.no_grad():
        for p in vdm.network.parameters():
            p += 0.2 * torch.randn_like(p)
    x = Softmax(5).points(torch.randint(5, (6, 2)), F64)
    noise, noise_0 = torch.randn(2, 6, 2, dtype=F64)
    t = torch.linspace(0.3, 0.97, 6, dtype=F64)
    given = {"t": t, "noise": noise, "noise_0": noise_0}
    vdm.loss(x, **given).mean().backward()
    found = {name: p.grad.clone() for name, p in vdm.named_parameters()}

    def mean():
        return vdm.loss(x, **given).mean().item()

    def diffusion():
        return sd.variational(vdm.model, x, decoder=decoder, steps=steps, **given).diffusion.detach()

    now = diffusion().mean()

    def mean_square():
        return (diffusion().square().mean() / (2 * now)).item()

    step = 1e-5
    for name, p in vdm.named_parameters():
        objective = mean_square if name.startswith("sde.curve") else mean
        flat, slopes = p.data.view(-1), found[name].view(-1)
        for k in range(min(4, flat.numel())):
            original = flat[k].item()
            ends = []
            for sign in (1, -1):
                flat[k] = original + sign * step
                ends.append(objective())
            flat[k] = original
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slopes[k].item() - slope) <= 1e-5 * (1 + abs(slope)), (name, k)
    assert all(found[f"sde.curve.{name}"].abs().max() > 1e-3 for name in ("log_rates", "shifts", "log_heights"))
    assert found["sde.ends"].abs().min() > 1e-3


def test_the_curve_hears_of_the_time_that_the_network_sees_too():
    """A network that is nothing but its time: all of the gradient passes through what it sees."""

    class Seen(nn.Module):
        def forward(self, z, seen):
            return seen[:, None].expand_as(z)

    sde = shaped(hidden=2, gamma_min=-2.0, gamma_max=2.0)
    x, noise = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    for time in (None, lambda gamma: gamma / 3):
        vdm = sd.VDM(Seen(), sde, time=time)
        found = torch.autograd.grad(vdm.loss(x, t=t, noise=noise, noise_0=noise).mean(), sde.curve.shifts)[0]
        values = sd.variational(vdm.model, x, t=t, noise=noise, noise_0=noise).diffusion
        square = values.square().mean() / (2 * values.detach().mean())
        torch.testing.assert_close(found, torch.autograd.grad(square, sde.curve.shifts)[0])


# Learning


def mixture():
    means = torch.tensor([[-1.0, 0.5, 0.0, -0.5, 1.0, 0.0], [1.0, 0.0, -0.5, 0.5, -1.0, 0.5]], dtype=F64)
    return sd.exact.GaussianMixture(torch.tensor([1.0, 2.0]), means, torch.tensor([0.003, 0.01]))


def sampled(vdm, n, seed):
    """Independent one-point estimates of the diffusion term."""
    generator = torch.Generator().manual_seed(seed)
    x = mixture().sample(n, seed=100 + seed)
    t = vdm.sde.t_min + (vdm.sde.t_max - vdm.sde.t_min) * torch.rand(n, dtype=F64, generator=generator)
    with torch.no_grad():
        return sd.variational(vdm.model, x, t=t, generator=generator).diffusion


def moments():
    """`int E|eps - epshat|^2 / 2`, the variance of the straight curve, and the least that any curve has."""
    gamma = torch.linspace(-13.3, 5.0, 61, dtype=F64)
    x = mixture().sample(4000, seed=11)
    noise = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(12))
    network = ExactV(mixture())
    first, second = [], []
    for g in gamma:
        alpha, sigma = Level.scales_at(g)
        error = alpha * network(alpha * x + sigma * noise, g.expand(4000)) + sigma * (alpha * x + sigma * noise) - noise
        square = error.square().sum(1)
        first.append(square.mean())
        second.append(square.square().mean())
    first, second = torch.stack(first), torch.stack(second)
    mean = torch.trapezoid(first, gamma) / 2
    straight = 18.3 * torch.trapezoid(second, gamma) / 4
    best = (torch.trapezoid(second.sqrt(), gamma) / 2) ** 2
    return mean.item(), (straight - mean**2).item(), (best - mean**2).item()


def test_the_best_curve_of_gaussian_data_makes_the_integrand_level():
    """`eps - epshat` is normal of variance w given z, w = sigmoid(log v - gamma): best where gamma' w is constant."""
    size, v, n = 6, 0.02, 20_000
    target = sd.exact.Gaussian(torch.zeros(size, dtype=F64), v)
    first, last = (math.log1p(v * math.exp(-gamma)) for gamma in (-13.3, 5.0))

    def best(t):
        return math.log(v) - torch.expm1(first + (last - first) * (t - 1e-3) / (1 - 1e-3)).log()

    def variance(sde):
        generator = torch.Generator().manual_seed(0)
        t = 1e-3 + (1 - 1e-3) * torch.rand(n, dtype=F64, generator=generator)
        return sd.variational(target.model(sde), target.sample(n, seed=7), t=t, generator=generator).diffusion

    level = variance(sd.LearnedVP(best))
    # L = (U / 2) chi^2 with `size` degrees of freedom, U = first - last
    exact = (first - last) ** 2 * size / 2
    assert abs(level.mean().item() / ((first - last) * size / 2) - 1) < 4 * math.sqrt(2 / size / n)
    assert abs(level.var().item() / exact - 1) < 4 * math.sqrt((2 + 12 / size) / n)
    straight = variance(sd.LearnedVP(lambda t: t, -13.3, 5.0))
    weight = quad(lambda gamma: 1 / (1 + math.exp(gamma) / v) ** 2, -13.3, 5)[0]
    expected = 18.3 * weight * (size**2 + 2 * size) / 4 - ((first - last) * size / 2) ** 2
    assert abs(straight.var().item() / expected - 1) < 0.1
    assert exact < expected / 3


def test_the_variance_falls_to_near_the_least_possible():
    """From the straight curve; both measured on independent draws, compared by an F-like bound of one in 10^4.

    For heavy tails the bound takes as many degrees of freedom as the kurtosis leaves.
    """
    vdm = exact_vdm(mixture(), sd.LearnedVP(learn_ends=False))
    mean, straight, best = moments()
    n = 10_000
    before = sampled(vdm, n, seed=1)
    assert abs(before.var().item() / straight - 1) < 0.1, "a fresh curve is nearly straight"
    sd.train(
        vdm, vdm.loss, mixture().sample(4096, seed=2), steps=400, batch_size=128, lr=0.05, clip=None, ema=0.97,
        warmup=10, seed=0, progress=False,
    )  # fmt: skip
    after = sampled(vdm, n, seed=3)
    assert vdm.sde.ends.tolist() == [-13.3, 5.0]
    for values in (before, after):
        assert abs(values.mean().item() - mean) < 4 * values.std().item() / math.sqrt(n) + 0.01 * mean
    freedom = [2 * n / (((v - v.mean()) ** 4).mean() / v.var() ** 2 - 1).item() for v in (before, after)]
    ratio = (before.var() / after.var()).item()
    assert ratio / f_distribution.ppf(1 - 1e-4, *freedom) > 1.8, "it falls at least by this factor"
    assert after.var().item() < 1.5 * best
    assert best < straight / 3, "and it was far from it"


def test_ends_network_and_curve_are_learned_together():
    torch.manual_seed(0)
    decoder = Softmax(5)
    codes = torch.multinomial(torch.tensor([1.0, 4.0, 0.5, 3.0, 1.0]), 2048 * 2, replacement=True).reshape(-1, 2)
    x = decoder.points(codes)
    p = torch.bincount(codes.flatten(), minlength=5) / codes.numel()
    entropy = -2 * (p * p.log()).sum().item()
    vdm = sd.VDM(
        FourierFeatures(MLP((10,), 64, 2), (2.5, 5.0)), sd.LearnedVP(gamma_min=-6.0, gamma_max=1.0, hidden=8), decoder
    )
    first = -sd.elbo(vdm.model, x[:512], samples=32, decoder=decoder, seed=0).total.mean()
    losses = sd.train(
        vdm, vdm.loss, x, steps=400, batch_size=128, lr=5e-3, clip=None, ema=0.98, warmup=20, seed=0, progress=False
    )
    found = sd.elbo(vdm.model, x, samples=16, decoder=decoder, seed=0)
    last, error = -found.total.mean(), found.total.std() / math.sqrt(len(x))
    assert entropy - 4 * error < last < entropy + 0.4 < first - 2, (entropy, last, first)
    assert losses[-50:].mean() < losses[:50].mean()
    low = vdm.sde.ends[0].item()
    assert low > -6.0, "noise that no code can be told apart by costs, and buys nothing"
    drawn = sd.sample(vdm.model, (64, 2), seed=0).x
    assert decoder.sample(vdm.model, 1e-3, drawn, seed=0).shape == (64, 2)


def test_clipping_leaves_the_network_its_share_of_the_gradient():
    """The curve's gradient is of the size of the rest, so that a norm for both hardly slows the network."""
    moved, x = [], mixture().sample(512, seed=2).float()
    for clip in ({"clip": None}, {}):
        torch.manual_seed(0)
        vdm = sd.VDM(MLP((6,), 16, 1), sd.LearnedVP(hidden=8))
        before = nn.utils.parameters_to_vector(vdm.network.parameters()).detach().clone()
        sd.train(vdm, vdm.loss, x, steps=60, lr=1e-2, ema=0.0, warmup=1, seed=0, progress=False, **clip)
        moved.append(nn.utils.parameters_to_vector(vdm.network.parameters()).detach() - before)
    share = sum(p.grad.square().sum() for p in vdm.network.parameters()).sqrt()
    assert share > 0.1, "of a gradient of norm 1; 0.005 beside the gradient of the mean square itself"
    assert torch.cosine_similarity(*moved, dim=0) > 0.97
    assert 0.9 < moved[1].norm() / moved[0].norm() < 1.1


def test_a_checkpoint_is_of_one_setting(tmp_path):
    def run(*options, **named):
        vdm = sd.VDM(MLP((2,), 8, 1), *options, **named)
        x = Softmax(5).points(torch.zeros(4, 2, dtype=torch.long))
        sd.train(vdm, vdm.loss, x, steps=1, batch_size=4, seed=0, checkpoint=tmp_path, progress=False)

    run(sd.LearnedVP(gamma_max=3.0), Softmax(5))
    run(sd.LearnedVP(gamma_max=4.0), Softmax(5))  # its ends are learned: those of the checkpoint
    for options, named, said in (
        ((sd.LearnedVP(), Softmax(5)), {"prediction": "v"}, "prediction was 'noise', now 'v'"),
        ((sd.LearnedVP(), Softmax(5)), {"steps": 4}, "loss_steps was None, now 4"),
        ((sd.LearnedVP(), DiscretizedGaussian(5)), {}, "decoder was 'Softmax"),
        ((sd.LearnedVP(t_max=2.0), Softmax(5)), {}, "span was"),
        ((sd.VP(), Softmax(5)), {}, "sde was 'LearnedVP', now 'VP"),
        ((sd.LearnedVP(), Softmax(5)), {"sigma_data": 1.0}, "sigma_data was 0.5, now 1.0"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            run(*options, **named)


def test_edm_is_told_the_deviation_of_the_data():
    vdm = sd.VDM(MLP((2,), 8, 1), sd.VP(), prediction="edm", sigma_data=2.0)
    assert vdm.model.sigma_data == 2.0
    with pytest.raises(OptionError, match="sigma_data must be positive"):
        sd.VDM(MLP((2,), 8, 1), sd.VP(), prediction="edm", sigma_data=-1.0)


def test_any_linear_sde_serves_and_stays_as_it_is():
    vdm = sd.VDM(MLP((2,), 8, 1), sd.CosineVP(), Softmax(5))
    assert not [name for name, _ in vdm.named_parameters() if name.startswith("sde")]
    x = Softmax(5).points(torch.zeros(4, 2, dtype=torch.long))
    options = {"t": torch.linspace(0.1, 0.9, 4), "noise": x, "noise_0": x}
    expected = sd.variational(vdm.model, x, decoder=Softmax(5), **options).total
    torch.testing.assert_close(vdm.loss(x, **options), expected)


def test_conditions_reach_the_network():
    vdm = sd.VDM(MLP((2,), 8, 1, classes=3), sd.LearnedVP(), Softmax(5))
    x = Softmax(5).points(torch.zeros(4, 2, dtype=torch.long))
    with torch.no_grad():
        for p in vdm.network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    options = {"t": torch.full((4,), 0.5), "noise": x, "noise_0": x}
    a, b = (vdm.loss(x, torch.full((4,), k), **options) for k in (0, 2))
    assert (a - b).abs().min() > 1e-4


# Fourier features


@pytest.mark.parametrize("event", [(3,), (2, 4, 4)])
def test_fourier_features_are_channels_beside_the_input(event):
    seen = []

    class Inner(nn.Module):
        def forward(self, x, t, condition=None):
            seen.append((x, t, condition))
            return 2 * x

    network = FourierFeatures(Inner(), (0.5, 3.0))
    x = torch.randn(2, *event, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.2])
    torch.testing.assert_close(network(x, t, "c"), 2 * x)
    given, time, condition = seen[0]
    assert time is t
    assert condition == "c"
    parts = given.chunk(5, dim=1)
    expected = [x, (math.pi / 2 * x).sin(), (math.pi / 2 * x).cos(), (3 * math.pi * x).sin(), (3 * math.pi * x).cos()]
    for found, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert network(x, t).shape == x.shape
    assert seen[1][2] is None


def test_fourier_features_are_loaded_with_the_network_inside(tmp_path):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    model = sd.ScoreModel(FourierFeatures(MLP((9,), 8, 1), (2.5,)), sd.VP())
    with torch.no_grad():
        for p in model.network.parameters():
            p += 0.3
    sd.save(model, tmp_path)
    found = sd.load(tmp_path)
    assert found.network.frequencies == (2.5,)
    assert torch.equal(found.noise(0.3, x), model.noise(0.3, x))
    sd.save(sd.ScoreModel(FourierFeatures(nn.Linear(9, 9)), sd.VP()), tmp_path)
    with pytest.raises(CheckpointError, match="network of your own"):
        sd.load(tmp_path)


def test_fourier_features_serve_the_networks_of_the_library():
    x, t = torch.randn(2, 3), torch.tensor([0.1, 0.2])
    assert FourierFeatures(MLP((15,), 8, 1), (8.5, 17.0))(x, t).shape == (2, 3)
    centres = Softmax(17).centres
    for f, period in ((8.5, 2), (17.0, 1)):
        torch.testing.assert_close((math.pi * f * centres[period:]).cos(), (math.pi * f * centres[:-period]).cos())


# What is refused

X = torch.zeros(2, 3)
MODEL = scalar_target().model(sd.VP())
BLIND = sd.ScoreModel(lambda x, t: x, sd.RectifiedFlow(t_max=1.0))
NOISELESS = sd.ScoreModel(lambda x, t: x, sd.RectifiedFlow(t_min=0.0), "data")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: sd.variational(MODEL, X[:, :1], steps=0), OptionError, ["steps >= 1", "got 0"]),
        (lambda: sd.variational(MODEL, X[:, :1], steps=1.5), OptionError, ["whole", "1.5"]),
        (
            lambda: sd.variational(MODEL, X[:, :1], steps=4, t=torch.tensor([0.1, 1.0])),
            TimeError,
            ["at least one step, 0.2", "got 0.1"],
        ),
        (
            lambda: sd.variational(MODEL, X[:, :1], t=torch.tensor([0.1, 1.5])),
            TimeError,
            ["t = 1.5 lies outside"],
        ),
        (lambda: sd.variational(MODEL, X[:, :1], t=torch.ones(3)), ShapeError, ["(2,)", "(3,)"]),
        (lambda: sd.variational(MODEL, X[:, :1], t=0.0), TimeError, ["t = 0 lies outside the span [", "1] of VP"]),
        (lambda: sd.variational(BLIND, X, t=1.0), CapabilityError, ["t = 1 alpha is 0", "'noise'", "'data' or 'v'"]),
        (lambda: sd.variational(NOISELESS, X), TimeError, ["no noise at t_min = 0", "raise its t_min"]),
        (lambda: sd.variational(MODEL, X[:, :1].long()), ShapeError, ["floating-point"]),
        (
            lambda: sd.VDM(MLP((3,), 8, 1), sd.LearnedVP(), Softmax(5)).loss(X + 0.1),
            OptionError,
            ["centres of 5 bins", "0.1", "levels="],
        ),
        (lambda: sd.VDM(lambda x, t: x, sd.LearnedVP()), OptionError, ["torch.nn.Module", "function"]),
        (lambda: sd.VDM(MLP((3,)), sd.LearnedVP(), 256), OptionError, ["Softmax(levels=256)", "got 256"]),
        (lambda: sd.VDM(MLP((3,)), sd.LearnedVP(), steps=0), OptionError, ["steps >= 1", "got 0"]),
        (lambda: sd.VDM(MLP((3,)), sd.LearnedVP(), prediction="x"), OptionError, ["Unknown prediction 'x'"]),
        (lambda: FourierFeatures(MLP(()))(X[:, 0], X[:, 0]), ShapeError, ["axis 1", "x[:, None]"]),
        (lambda: FourierFeatures(MLP((3,)), ()), OptionError, ["positive frequencies"]),
        (lambda: FourierFeatures(MLP((3,)), (1.0, -2.0)), OptionError, ["positive", "-2.0"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(call, error, said):
    with pytest.raises(error) as caught:
        call()
    for word in said:
        assert word in str(caught.value)


def test_a_curve_that_falls_is_refused_in_training():
    sde = sd.LearnedVP(Powers(), -5.0, 5.0)
    with torch.no_grad():
        sde.curve.a.fill_(-0.5)
    with pytest.raises(SDEError, match="must rise with time"):
        sd.VDM(MLP((3,), 8, 1), sde).loss(X)
