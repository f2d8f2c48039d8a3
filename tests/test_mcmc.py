"""Langevin dynamics: the bias of the unadjusted, the exactness of the adjusted, and why both need noise levels."""

import math

import numpy as np
import pytest
import torch
from helpers import BasisStream
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.distributions import Normal

import sdediff as sd
from sdediff.energy import Energy
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError
from sdediff.mcmc import Place, log_ratio
from sdediff.noise import Noise

F64 = torch.float64
MEAN, STD = 0.7, 0.6
PEAKS = sd.exact.GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]], dtype=F64), torch.tensor([0.3, 0.1])
)


def gaussian_score(x):
    return -(x - MEAN) / STD**2


class Basis(Noise):
    """The k-th draw is 1 in row 2 + k and 0 elsewhere."""

    def open(self, first_row=0):
        return BasisStream()


def affine_map(score, h, steps):
    """Mean and variance after the steps of ULA from 0, and the factor of the start, read off a batch."""
    x = torch.zeros(2 + steps, 1, dtype=F64)
    x[1] = 1
    end = sd.ula(score, x, step=h, steps=steps, noise=Basis()).x[:, 0]
    return end[0], (end[2:] - end[0]).square().sum(), end[1] - end[0]


# ULA


@settings(max_examples=20)
@given(part=st.floats(0.05, 3.5), steps=st.integers(1, 30))
def test_unadjusted_dynamics_is_its_recursion_on_gaussian_data(part, steps):
    h = part * STD**2
    factor = 1 - h / (2 * STD**2)
    mean, variance, start = affine_map(gaussian_score, h, steps)
    assert start.item() == pytest.approx(factor**steps, rel=1e-9, abs=1e-12)
    assert mean.item() == pytest.approx(MEAN * (1 - factor**steps), rel=1e-9, abs=1e-12)
    assert variance.item() == pytest.approx(h * (1 - factor ** (2 * steps)) / (1 - factor**2), rel=1e-9)


@pytest.mark.parametrize("part", [0.2, 1.0, 2.0, 3.0])
def test_its_stationary_variance_is_biased_by_the_known_factor(part):
    """`s^2 / (1 - h / (4 s^2))`, and the mean is right."""
    mean, variance, start = affine_map(gaussian_score, part * STD**2, 250)
    assert abs(start) < 1e-5
    assert mean.item() == pytest.approx(MEAN, abs=1e-5)
    assert variance.item() == pytest.approx(STD**2 / (1 - part / 4), rel=1e-8)


def test_from_four_variances_on_it_does_not_settle():
    assert affine_map(gaussian_score, 4 * STD**2, 50)[1] == pytest.approx(50 * 4 * STD**2)
    with pytest.raises(DivergenceError, match=r"at step \d+, rows [01, ]+\. Take smaller steps"):
        sd.ula(gaussian_score, torch.ones(2, 1), step=20 * STD**2, steps=500, seed=0)


def test_a_step_for_every_row_and_a_trajectory():
    x, h = torch.ones(3, 2, dtype=F64), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    chain = sd.ula(lambda x: 0 * x, x, step=h, steps=4, seed=3, trajectory=True)
    assert chain.trajectory.shape == (5, 3, 2)
    assert torch.equal(chain.trajectory[0], x)
    assert torch.equal(chain.trajectory[-1], chain.x)
    assert (chain.nfe, chain.accepted.tolist()) == (4, [1.0] * 3)
    moves = chain.trajectory.diff(dim=0) / h.sqrt()[:, None]
    stream = sd.RowNoise(3).open()
    torch.testing.assert_close(moves, torch.stack([stream.normal(x) for _ in range(4)]))
    assert sd.ula(lambda x: x, x, step=h, steps=2, seed=3).trajectory is None


def test_a_model_gives_its_score_at_the_time():
    model, x = PEAKS.model(sd.VE()), torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    marginal = PEAKS.marginal(sd.VE(), 0.4)
    t = torch.tensor(0.4, dtype=F64)
    direct = sd.ula(lambda x: model.score(t, x), x, step=0.01, steps=3, seed=0)
    assert torch.equal(sd.ula(model, x, step=0.01, steps=3, t=t, seed=0).x, direct.x)
    adjusted = sd.ula(sd.Energy(Minus(marginal.log_prob)), x, step=0.01, steps=3, seed=0)
    torch.testing.assert_close(adjusted.x, direct.x, rtol=1e-9, atol=1e-9)


# MALA


class Minus(nn.Module):
    """An energy of a log-density."""

    def __init__(self, log_density):
        super().__init__()
        self.log_density = log_density

    def forward(self, x, t=None):
        return -self.log_density(x)


def place(x):
    """Points with any log-density: its score need not be its gradient for the move to be reversible."""
    return Place(x, (x**3).sum(1).sin(), torch.stack([x[:, 1] - x[:, 0] ** 2, x.sum(1)], 1))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**30), h=st.floats(0.01, 3))
def test_moves_are_in_detailed_balance(seed, h):
    """`p(x) q(y | x) a(x, y) = p(y) q(x | y) a(y, x)` in logarithms, with q as a product of normal densities."""
    x, y = (place(v) for v in 2 * torch.randn(2, 7, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)))
    h = torch.tensor(h, dtype=F64)

    def log_flow(here, there):
        q = Normal(here.x + h / 2 * here.score, h.sqrt()).log_prob(there.x).sum(1)
        return here.log_density + q + log_ratio(here, there, h).clamp(max=0)

    torch.testing.assert_close(log_flow(x, y), log_flow(y, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_ratio(x, y, h), -log_ratio(y, x, h))
    assert bool((log_ratio(x, x, h) == 0).all())


def test_a_move_is_taken_with_that_probability():
    """Replayed by hand from the same numbers: two kinds of draw a step, normal ones and one for the decision."""
    x = torch.linspace(-2, 2, 40, dtype=F64)[:, None]
    chain = sd.mala(PEAKS.log_prob, x, step=0.3, steps=3, seed=5, trajectory=True)
    stream, h, taken = sd.RowNoise(5).open(), torch.tensor(0.3, dtype=F64), []
    for i in range(3):
        here, z, u = chain.trajectory[i], stream.normal(x), stream.normal(x[:, 0])

        def at(x):
            y = x.clone().requires_grad_()
            return Place(x, PEAKS.log_prob(x), torch.autograd.grad(PEAKS.log_prob(y).sum(), y)[0])

        there = here + h / 2 * at(here).score + h.sqrt() * z
        taken.append(torch.special.ndtr(u) < log_ratio(at(here), at(there), h).exp())
        torch.testing.assert_close(chain.trajectory[i + 1], torch.where(taken[-1][:, None], there, here))
    torch.testing.assert_close(chain.accepted, torch.stack(taken).double().mean(0))
    assert 0 < chain.accepted.mean() < 1
    assert chain.nfe == 4


def two_sided(samples):
    return stats.kstest(samples.numpy(), lambda v: sum(
        w * stats.norm.cdf(v, m, s) for w, m, s in ((0.3, -1.0, math.sqrt(0.3)), (0.7, 0.8, math.sqrt(0.1)))
    )).pvalue  # fmt: skip


def test_the_density_is_exactly_stationary_for_the_adjusted_dynamics_and_not_for_the_unadjusted():
    """20,000 exact draws, moved by large steps: a test of Kolmogorov and Smirnov at 1e-6."""
    x = PEAKS.sample(20_000, seed=0)
    adjusted = sd.mala(PEAKS.log_prob, x, step=0.2, steps=15, seed=1)
    assert 0.3 < adjusted.accepted.mean() < 0.9
    assert two_sided(adjusted.x[:, 0]) > 1e-6
    assert (adjusted.x != x).double().mean() > 0.99
    unadjusted = sd.ula(sd.Energy(Minus(PEAKS.log_prob)), x, step=0.2, steps=15, seed=1)
    assert two_sided(unadjusted.x[:, 0]) < 1e-50


def test_it_comes_to_the_density_from_elsewhere():
    x = torch.randn(10_000, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.1 - 2
    log_density = Normal(MEAN, STD).log_prob
    chain = sd.mala(lambda x: log_density(x)[:, 0], x, step=0.3, steps=60, seed=1)
    assert stats.kstest(chain.x[:, 0].numpy(), "norm", (MEAN, STD)).pvalue > 1e-6


def test_the_rate_of_acceptance_is_its_expectation():
    """`E min(1, e^r)` on a Gaussian by quadrature over state and noise; 4.5 standard errors of 20,000 rows."""
    h = torch.tensor(0.8, dtype=F64)
    u = (torch.arange(600, dtype=F64) + 0.5) / 600
    nodes = torch.special.ndtri(u)
    x, z = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    x = STD * x

    def at(x):
        return Place(x, -(x[:, 0] ** 2) / (2 * STD**2), -x / STD**2)

    wanted = log_ratio(at(x), at(x + h / 2 * at(x).score + h.sqrt() * z), h).exp().clamp(max=1).mean()
    start = STD * torch.randn(20_000, 1, dtype=F64, generator=torch.Generator().manual_seed(2))
    chain = sd.mala(lambda x: -(x[:, 0] ** 2) / (2 * STD**2), start, step=h, steps=1, seed=3)
    assert abs(chain.accepted.mean() - wanted) < 4.5 * chain.accepted.std() / math.sqrt(20_000)
    assert 0.5 < wanted < 0.95


def test_an_energy_a_model_of_it_and_its_log_density_give_the_same_chain():
    class Noised(nn.Module):
        def forward(self, x, t):
            return -torch.stack(
                [PEAKS.marginal(sd.VE(), at).log_prob(row[None])[0] for at, row in zip(t, x, strict=True)]
            )

    x, options = PEAKS.sample(6, seed=0), {"step": 0.05, "steps": 5, "seed": 2}
    t = torch.tensor(0.4, dtype=F64)
    marginal = PEAKS.marginal(sd.VE(), t)
    chains = [
        sd.mala(marginal.log_prob, x, **options),
        sd.mala(Energy(Minus(marginal.log_prob)), x, **options),
        sd.mala(sd.ScoreModel(Energy(Noised()), sd.VE(), "score"), x, t=t, **options),
        sd.mala(sd.ScoreModel(Energy(Noised()), sd.VE(), "score", time=lambda t: t / 2), x, t=2 * t, **options),
    ]
    for chain in chains[1:]:
        torch.testing.assert_close(chain.x, chains[0].x, rtol=1e-9, atol=1e-9)


def test_what_lies_outside_the_support_is_not_taken():
    def log_density(x):
        return torch.where(x[:, 0] > 0, -x[:, 0], -math.inf)

    x = torch.full((2000, 1), 0.05, dtype=F64)
    chain = sd.mala(log_density, x, step=1.0, steps=40, seed=0)
    assert chain.x.min() > 0
    assert chain.x.mean().item() == pytest.approx(1, abs=4.5 / math.sqrt(2000))


@pytest.mark.parametrize("run", [
    lambda x, **options: sd.ula(sd.Energy(Minus(PEAKS.log_prob)), x, **options),
    lambda x, **options: sd.mala(PEAKS.log_prob, x, **options),
], ids=["ula", "mala"])  # fmt: skip
def test_a_row_depends_on_the_seed_and_its_index_only(run):
    x, options = PEAKS.sample(80, seed=0), {"step": 0.2, "steps": 6, "seed": 4}
    whole = run(x, **options)
    assert torch.equal(run(x[:70], **options).x, whole.x[:70])
    assert torch.equal(run(x, **options).x, whole.x)
    assert not torch.equal(run(x, **options | {"seed": 5}).x, whole.x)
    assert not torch.equal(run(x, **options | {"seed": None}).x, run(x, **options | {"seed": None}).x)


# Noise levels


FAR = sd.exact.GaussianMixture(
    torch.tensor([0.2, 0.8]), torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=F64), torch.tensor([1.0, 1.0])
)
LEVELS = sd.VE(sigma_min=0.1, sigma_max=20.0)


def upper(x):
    """The share of the mode of weight 0.8."""
    return (x.sum(1) > 0).double().mean().item()


def test_langevin_dynamics_from_noise_has_the_weights_of_its_start_and_annealed_dynamics_those_of_the_data():
    """Song and Ermon's example (2019, section 3.2): even shares from even noise; 4000 rows, 4.5 standard errors."""
    rows, model = 4000, FAR.model(LEVELS)
    start = 16 * torch.rand(rows, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) - 8
    plain = sd.ula(model, start, t=0.0, step=0.1, steps=600, seed=1).x
    assert abs(upper(plain) - 0.5) < 4.5 * 0.5 / math.sqrt(rows)
    annealed = sd.sample(
        model, (rows, 2), solver=sd.AnnealedLangevin(steps=60, snr=0.25), times=torch.linspace(1, 0, 10), seed=2,
        dtype=F64, final="none",
    ).x  # fmt: skip
    assert abs(upper(annealed) - 0.8) < 0.05  # the bias of ten levels; 0.3 without them
    for x in (plain, annealed):  # within the modes both are right
        near = x[x.sum(1) > 0]
        assert near.mean(0).numpy() == pytest.approx([5, 5], abs=0.15)
        assert near.var(0).numpy() == pytest.approx([1, 1], rel=0.15)


def test_a_noise_conditional_network_trained_at_ten_levels_samples_with_the_right_weights():
    """NCSN end to end: ten geometric levels, lambda = sigma^2 (the simple weighting), annealed Langevin dynamics."""
    levels = torch.linspace(0, 1, 10, dtype=F64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = sd.networks.MLP((2,), width=48, depth=1)
    model = sd.ScoreModel(network, LEVELS, "edm", time=lambda t: t, sigma_data=5.0)
    trained = sd.fit(
        model, FAR.sample(4000, seed=0).float(), times=sd.times.Levels(levels), steps=500, lr=5e-3, batch_size=256,
        seed=0, progress=False,
    )  # fmt: skip
    x = sd.sample(
        trained, (1000, 2), solver=sd.AnnealedLangevin(steps=20, snr=0.25), times=levels.flip(0), seed=1, final="none"
    ).x
    assert upper(x) == pytest.approx(0.8, abs=0.08)
    near = x[x.sum(1) > 0]
    assert near.mean(0).numpy() == pytest.approx(np.array([5, 5]), abs=0.4)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_model_of_an_energy_is_called_as_every_model_is(dtype):
    """In the dtype of the network, with a time for every row, and with whole numbers as those of a chain."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))
            self.calls = []

        def forward(self, x, t):
            self.calls.append((x.dtype, t.dtype, tuple(t.shape), t.tolist()))
            return self.weight * x.square().sum(1)

    sde, network, asked = sd.DiscreteVP(torch.linspace(0.01, 0.3, 8)), Seen(), []

    def time(t):
        asked.append(tuple(t.shape))
        return sde.timestep(t)

    model = sd.ScoreModel(Energy(network), sde, "score", time=time)
    x = torch.randn(3, 2, dtype=dtype)
    chain = sd.mala(model, x, t=0.5, step=0.1, steps=2, seed=0)
    assert chain.x.dtype == dtype
    assert set(asked) == {(3,)}
    called = len(network.calls)
    model.score(0.5, x)
    assert all(call == network.calls[-1] for call in network.calls[:called])
    assert network.calls[0][:2] == (torch.float32, torch.int64)
    plain = sd.mala(lambda x: -0.5 * x.square().sum(1), x, step=0.1, steps=2, seed=0)
    torch.testing.assert_close(chain.x, plain.x, rtol=1e-5, atol=1e-6)
    network.double()
    assert sd.mala(model, x, t=0.5, step=0.1, steps=1, seed=0).x.dtype == dtype


# Bad input


ENERGY = sd.ScoreModel(Energy(Minus(lambda x: -x.square().sum(1))), sd.VP(), "score")
X = torch.zeros(3, 2, dtype=F64)
MODEL = sd.ScoreModel(lambda x, t: -x, sd.VP(), "score")
BAD = {
    "no time, ula": (OptionError, lambda: sd.ula(MODEL, X, step=0.1, steps=2), "needs a time", r"ula\(model, x, t="),
    "no time, mala": (OptionError, lambda: sd.mala(MODEL, X, step=0.1, steps=2), "needs a time", r"mala\(model, x, t="),
    "time of a score": (OptionError, lambda: sd.ula(X.add, X, step=0.1, steps=2, t=0.5), "t = 0.5", "a ScoreModel"),
    "time of a density": (
        OptionError, lambda: sd.mala(lambda x: x[:, 0], X, step=0.1, steps=2, t=0.5), "t = 0.5", "a log-density",
    ),
    "not callable": (OptionError, lambda: sd.ula(3, X, step=0.1, steps=2), "type int", "that is callable"),
    "a score only": (CapabilityError, lambda: sd.mala(MODEL, X, t=0.5, step=0.1, steps=2), "score only", "or use ula"),
    "time outside": (TimeError, lambda: sd.mala(ENERGY, X, t=2.0, step=0.1, steps=2), "t = 2", r"\[0, 1\]"),
    "time NaN": (TimeError, lambda: sd.mala(ENERGY, X, t=math.nan, step=0.1, steps=2), "t = nan", r"\[0, 1\]"),
    "seed and noise": (
        OptionError, lambda: sd.ula(lambda x: x, X, step=0.1, steps=2, seed=1, noise=sd.RowNoise(2)), "seed=",
        "not both",
    ),
    "no chains": (ShapeError, lambda: sd.ula(lambda x: x, X[:0], step=0.1, steps=2), r"\(0, 2\)", "at least one"),
    "gradient at the start": (
        DivergenceError, lambda: sd.mala(lambda x: -x.norm(dim=1).sqrt(), X, step=0.1, steps=2),
        "The gradient of the log-density at the start", "Start where",
    ),
    "step": (OptionError, lambda: sd.ula(lambda x: x, X, step=0.0, steps=2), "step = 0.0", "step > 0"),
    "steps": (OptionError, lambda: sd.mala(lambda x: x[:, 0], X, step=0.1, steps=0), "steps = 0", "steps >= 1"),
    "rows of steps": (ShapeError, lambda: sd.ula(lambda x: x, X, step=torch.ones(2), steps=1), r"\(2,\)", r"\(3,\)"),
    "state": (ShapeError, lambda: sd.ula(lambda x: x, X.long(), step=0.1, steps=1), "torch.int64", r"x.float\(\)"),
    "score": (ShapeError, lambda: sd.ula(lambda x: x[:, 0], X, step=0.1, steps=1), r"got \(3,\)", r"\(3, 2\)"),
    "density": (ShapeError, lambda: sd.mala(lambda x: x, X, step=0.1, steps=1), r"got \(3, 2\)", r"shape \(3,\)"),
    "infinite at the start": (
        DivergenceError, lambda: sd.mala(lambda x: x[:, 0].log(), X, step=0.1, steps=1), "at the start", "rows 0, 1, 2",
    ),
    "NaN": (
        DivergenceError, lambda: sd.mala(lambda x: (1 - x[:, 0] ** 2).sqrt(), X, step=50.0, steps=9, seed=0),
        "of a proposal", r"at step \d",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "act", "value", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(kind, act, value, remedy):
    with pytest.raises(kind, match=value) as info:
        act()
    assert info.match(remedy)
