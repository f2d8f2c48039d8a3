"""Decoders: probabilities that sum to one, Bayes' rule, both tails, limits, gradients, and what is refused."""

import math

import mpmath
import pytest
import torch
from helpers import fitted_order
from hypothesis import given
from hypothesis import strategies as st
from test_bounds import NODES, WEIGHTS

import sdediff as sd
from sdediff.decoders import Decoder, DiscretizedGaussian, Softmax, around
from sdediff.dequantize import Bins
from sdediff.errors import DivergenceError, OptionError, ShapeError

F64 = torch.float64
SDE = sd.VP()
KINDS = [Softmax, DiscretizedGaussian]


def constant(mean, sde=SDE):
    """A model whose denoised data are `mean`, whatever it sees."""
    return sd.ScoreModel(lambda x, t: torch.full_like(x, mean), sde, prediction="data")


class Lattice:
    """Codes of known probabilities, `(D, levels)`, entries independent, and their exact denoiser."""

    def __init__(self, weights, decoder):
        self.weights, self.decoder = weights / weights.sum(-1, keepdim=True), decoder

    def model(self, sde):
        def network(x, t):
            logits = self.decoder.logits(sd.ScoreModel(network, sde, "data"), t, x) + self.weights.log()
            return torch.softmax(logits, -1) @ self.decoder.centres

        return sd.ScoreModel(network, sde, prediction="data")

    def log_prob(self, codes):
        return self.weights.log().expand(len(codes), *self.weights.shape).gather(-1, codes[..., None])[..., 0].sum(1)

    def sample(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.weights, n, replacement=True, generator=generator).T.contiguous()


def normal(mean, std):
    return torch.distributions.Normal(torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64))


# Probabilities


@given(
    st.sampled_from(KINDS),
    st.integers(2, 40),
    st.floats(-3, 3),
    st.floats(0.05, 5),
    st.floats(-8, 8),
    st.floats(-4, 4),
    st.floats(0.01, 0.9),
)
def test_probabilities_sum_to_one(kind, levels, low, length, z, mean, t):
    decoder = kind(levels, (low, low + length))
    x = decoder.points(torch.arange(levels)[:, None], F64)
    log_p = decoder.log_prob(constant(mean), t, x, torch.full_like(x, z))
    assert log_p.shape == (levels,)
    assert abs(log_p.exp().sum().item() - 1) < 1e-12
    logits = decoder.logits(constant(mean), t, torch.full((1, 1), z, dtype=F64))
    torch.testing.assert_close(torch.log_softmax(logits[0, 0], -1), log_p, rtol=1e-9, atol=1e-9)


def test_softmax_is_bayes_rule_for_equal_odds():
    decoder, t = Softmax(5, (-2.0, 1.0)), torch.tensor([0.05, 0.4], dtype=F64)
    z = torch.tensor([[0.3, -1.4, 2.0], [-0.1, 0.4, 0.0]], dtype=F64)
    alpha, sigma = (value[:, None, None] for value in SDE.scales_at(t))
    kernel = torch.distributions.Normal(alpha * decoder.centres, sigma).log_prob(z[..., None])
    expected = kernel - kernel.logsumexp(-1, keepdim=True)
    codes = torch.tensor([[0, 1, 4], [2, 3, 3]])
    found = decoder.log_prob(constant(0.0), t, decoder.points(codes, F64), z)
    torch.testing.assert_close(found, expected.gather(-1, codes[..., None])[..., 0].sum(1), rtol=1e-12, atol=1e-12)


@given(st.floats(-60, 60), st.floats(1e-3, 3), st.integers(0, 6))
def test_masses_of_the_gaussian_are_right_in_both_tails(mean, std, code):
    """Against fifty digits."""
    decoder = DiscretizedGaussian(7, (-1.0, 1.0))
    found = decoder.log_mass(torch.tensor(code), torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64)).item()
    with mpmath.workdps(50):
        centre = mpmath.mpf(decoder.centres[code].item())
        half = mpmath.mpf(decoder.width) / 2
        ends = [(centre + sign * half - mpmath.mpf(mean)) / mpmath.mpf(std) for sign in (-1, 1)]
        if ends[0] + ends[1] > 0:
            ends, open_ends = [-ends[1], -ends[0]], (6, 0)
        else:
            open_ends = (0, 6)
        tails = [mpmath.erfc(-end / mpmath.sqrt(2)) / 2 for end in ends]
        lower = mpmath.mpf(0) if code == open_ends[0] else tails[0]
        upper = mpmath.mpf(1) if code == open_ends[1] else tails[1]
        expected = float(mpmath.log(upper - lower))
    assert abs(found - expected) <= 1e-11 * (1 + abs(expected))


def test_narrow_bins_tend_to_the_density_times_the_width():
    t = torch.tensor(0.1, dtype=F64)
    alpha, sigma = (value.item() for value in SDE.scales_at(t))
    spread, mean, z = sigma / alpha, 0.13, 0.21
    for kind, centre in ((Softmax, z / alpha), (DiscretizedGaussian, mean)):
        errors, counts = [], [81, 243, 729]
        for levels in counts:
            decoder = kind(levels, (-4.0, 4.0))
            x = decoder.points(torch.tensor([[(levels * 5) // 9]]), F64)
            density = normal(centre, spread).log_prob(x).item() + math.log(decoder.width)
            found = decoder.log_prob(constant(mean), t, x, torch.full_like(x, z)).item()
            errors.append(max(abs(found - density), 1e-15))
        if kind is Softmax:  # a sum over equally spaced points is the integral, to rounding
            assert errors[0] < 1e-9
        else:
            assert 1.9 < fitted_order(errors, counts) < 2.1
    fine = DiscretizedGaussian(10**7, (-1.0, 1.0))
    mean, std = torch.tensor(0.2, dtype=F64), torch.tensor(0.7, dtype=F64)
    code = torch.tensor(7_000_000)
    density = torch.distributions.Normal(mean, std).log_prob(fine.centres[code]) + math.log(fine.width)
    assert abs(fine.log_mass(code, mean, std) - density) < 1e-8


def test_without_noise_the_nearest_centre_is_certain():
    decoder = Softmax(9)
    codes = torch.arange(9)[:, None]
    x = decoder.points(codes, F64)
    alpha, sigma = SDE.scales_at(torch.tensor(1e-9, dtype=F64))
    assert decoder.log_prob(constant(0.0), 1e-9, x, alpha * x + 3 * sigma).abs().max() < 1e-12
    assert (decoder.sample(constant(0.0), 1e-9, alpha * x, seed=0) == codes).all()


def test_samples_follow_the_probabilities():
    decoder, t, n = DiscretizedGaussian(5), 0.1, 20_000
    z = torch.zeros(n, 1, dtype=F64)
    counts = torch.bincount(decoder.sample(constant(0.13), t, z, seed=0)[:, 0], minlength=5)
    p = torch.softmax(decoder.logits(constant(0.13), t, z[:1])[0, 0], -1)
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    assert not torch.equal(
        decoder.sample(constant(0.13), t, z, seed=1)[:, 0], decoder.sample(constant(0.13), t, z, seed=0)[:, 0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    decoder = kind(6, (-1.0, 2.0))
    x = decoder.points(torch.tensor([[0, 3], [5, 2], [1, 4]]), F64)
    z = (x + torch.linspace(-0.4, 0.5, 6, dtype=F64).reshape(3, 2)).requires_grad_()
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def value(z, weight):
        return decoder.log_prob(sd.ScoreModel(lambda x, t: weight * x, SDE, "data"), 0.2, x, z)

    assert torch.autograd.gradcheck(value, (z, weight))
    far = torch.tensor([[300.0, -300.0]], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(far.expand(3, 2), weight).sum(), far)
    assert slope.isfinite().all()


# Where data lie


@given(st.integers(2, 300), st.floats(-5, 5), st.floats(0.1, 10), st.sampled_from([torch.float32, F64]))
def test_points_and_codes_are_inverse_and_those_of_the_bins(levels, low, length, dtype):
    interval = (low, low + length)
    decoder = Softmax(levels, interval)
    codes = torch.arange(levels).reshape(1, -1)
    x = decoder.points(codes, dtype)
    assert x.dtype == dtype
    assert torch.equal(decoder.codes(x), codes)
    bins = Bins.of(constant(0.0), codes, levels=levels, interval=interval)
    torch.testing.assert_close(x.double(), bins.at(torch.full(codes.shape, 0.5, dtype=F64))[0], rtol=1e-6, atol=1e-6)


def test_images_scaled_to_the_ends_of_an_interval_have_an_interval_too():
    codes = torch.arange(256)[None]
    decoder = Softmax(256, around(256))
    torch.testing.assert_close(decoder.points(codes, F64), codes / torch.tensor(127.5, dtype=F64) - 1)
    assert torch.equal(decoder.codes(codes.float() / 127.5 - 1), codes)
    torch.testing.assert_close(torch.tensor(around(3, 0.0, 1.0)), torch.tensor([-0.25, 1.25]))


# In the bound


def test_the_reconstruction_is_the_mean_over_noise():
    """By Gauss and Hermite's quadrature: every row has a node for its noise."""
    decoder = Softmax(3)
    x = decoder.points(torch.tensor([0, 1, 2]), F64)
    rows = x.repeat_interleave(len(NODES))[:, None]
    noise = sd.Recorded(NODES.repeat(3).expand(20, len(rows))[..., None])
    found = sd.elbo(constant(0.0), rows, steps=2, samples=2, t_min=0.1, noise=noise, decoder=decoder, seed=0)
    alpha, sigma = SDE.scales_at(torch.tensor(0.1, dtype=F64))
    values = [
        decoder.log_prob(constant(0.0), 0.1, rows, alpha * rows + s * sigma * NODES.repeat(3)[:, None]) for s in (1, -1)
    ]
    torch.testing.assert_close(found.reconstruction, (values[0] + values[1]) / 2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.total, found.reconstruction - found.prior - found.diffusion)
    assert found.settings["decoder"] == decoder
    assert WEIGHTS.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_the_exact_model_is_the_probability(kind):
    decoder, count = kind(4), 500
    data = Lattice(torch.tensor([[1.0, 5.0, 2.0, 2.0]], dtype=F64), Softmax(4))
    codes = torch.arange(4).repeat_interleave(count)[:, None]
    t_min = SDE.time(torch.tensor(-2 * math.log(0.04), dtype=F64)).item()  # noise of a twelfth of a bin
    x = decoder.points(codes, F64)
    found = sd.elbo(data.model(SDE), x, samples=32, t_min=t_min, decoder=decoder, seed=0)
    off = (found.total - data.log_prob(codes)).reshape(4, count)
    stderr = off.std(1) / math.sqrt(count)
    assert (off.mean(1).abs() < 4 * stderr).all()
    assert stderr.max() < 0.04
    stated = found.stderr.reshape(4, count).square().mean(1).sqrt() / math.sqrt(count)
    assert ((stated / stderr - 1).abs() < 0.2).all()


def test_bits_per_dimension_from_the_bound_stay_above_the_entropy():
    """Data of a mixture in bins, whose probabilities are known; the model is that of the density, by both routes."""
    levels, target = (
        8,
        sd.exact.GaussianMixture(
            torch.tensor([0.3, 0.7]), torch.tensor([[-0.5], [0.4]], dtype=F64), torch.tensor([0.02, 0.04])
        ),
    )
    edges = torch.linspace(-1, 1, levels + 1, dtype=F64)
    edges[0], edges[-1] = -math.inf, math.inf
    means, deviations = torch.tensor([-0.5, 0.4], dtype=F64), torch.tensor([0.02, 0.04], dtype=F64).sqrt()
    p = torch.special.ndtr((edges[:, None] - means) / deviations).diff(dim=0) @ torch.tensor([0.3, 0.7], dtype=F64)
    entropy = -(p * p.log2()).sum().item()
    codes = torch.arange(levels)[:, None]
    model = target.model(SDE)
    t_min = SDE.time(torch.tensor(-2 * math.log(0.08), dtype=F64)).item()  # noise of a third of a bin
    for kind in KINDS:
        decoder = kind(levels)
        result = sd.elbo(model, decoder.points(codes, F64), samples=256, t_min=t_min, decoder=decoder, seed=0)
        bits, error = -result.total / math.log(2), result.stderr / math.log(2)
        mean, stderr = (p * bits).sum().item(), (p * error).norm().item()
        assert entropy - 4 * stderr < mean < entropy + 0.15
        assert (2.0**-bits).sum() < 1, "no more than the probability there is"
    many = codes.repeat(40, 1)
    value = sd.bits_per_dim(model, many, levels=levels, seed=0, divergence="exact").value.reshape(40, levels)
    mean, stderr = (p * value.mean(0)).sum().item(), (p * value.std(0)).norm().item() / math.sqrt(40)
    assert entropy - 4 * stderr < mean < entropy + 0.15


# What is refused


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: Softmax(1), OptionError, ["at least 2", "got 1"]),
        (lambda: Softmax(2.0), OptionError, ["at least 2", "2.0"]),
        (lambda: DiscretizedGaussian(4, (1.0, 1.0)), OptionError, ["low < high", "(1.0, 1.0)"]),
        (lambda: DiscretizedGaussian(4, (0.0, math.inf)), OptionError, ["finite", "inf"]),
        (lambda: around(1), OptionError, ["at least 2"]),
        (lambda: around(4, 1.0, -1.0), OptionError, ["first < last", "1.0, -1.0"]),
        (lambda: Softmax(4).points(torch.tensor([4])), OptionError, ["0..3", "4..4"]),
        (lambda: Softmax(4).points(torch.tensor([0.5])), ShapeError, ["integers", "float32"]),
        (lambda: Softmax(17).codes(torch.tensor([[0.05]])), OptionError, ["17 bins", "0.05", "levels=", "points"]),
        (lambda: Softmax(4).codes(torch.tensor([[1.25]])), OptionError, ["4 bins", "1.25"]),
        (lambda: Softmax(4).codes(torch.tensor([[math.nan]])), OptionError, ["nan"]),
        (lambda: Softmax(4).codes(torch.tensor([[1]])), ShapeError, ["floating-point"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(call, error, said):
    with pytest.raises(error) as caught:
        call()
    for word in said:
        assert word in str(caught.value)


def test_data_of_other_levels_and_states_of_another_shape_are_refused():
    decoder = Softmax(256)
    x = Softmax(17).points(torch.arange(17)[:, None], F64)
    with pytest.raises(OptionError, match=r"centres of 256 bins of \[-1, 1\].*levels="):
        sd.elbo(constant(0.0), x, decoder=decoder)
    with pytest.raises(ShapeError, match="must be equal"):
        Softmax(17).log_prob(constant(0.0), 0.1, x, x[:3])


def test_a_decoder_of_ones_own_serves_in_the_bound():
    class Coin(Decoder):
        def log_prob(self, model, t, x, z):
            return torch.full(x.shape[:1], math.log(1 / self.levels), dtype=F64)

        def logits(self, model, t, z):
            return torch.zeros(*z.shape, self.levels)

    class Column(Coin):
        def log_prob(self, model, t, x, z):
            return super().log_prob(model, t, x, z)[:, None]

    class Lost(Coin):
        def log_prob(self, model, t, x, z):
            return super().log_prob(model, t, x, z) * torch.tensor([1.0, 1.0, math.nan, 1.0])

    x = Coin(4).points(torch.arange(4)[:, None], F64)
    for bound in (sd.elbo, sd.variational):
        with pytest.raises(ShapeError, match=r"Column must return one value a row, shape \(4,\).*it returned \(4, 1\)"):
            bound(constant(0.0), x, decoder=Column(4))
        with pytest.raises(OptionError, match=r"Softmax\(levels=256\), or None; got 'softmax'"):
            bound(constant(0.0), x, decoder="softmax")
    for options in ({}, {"steps": 2}):
        with pytest.raises(DivergenceError, match="what its decoder says, is NaN") as caught:
            sd.elbo(constant(0.0), x, samples=2, decoder=Lost(4), **options)
        assert caught.value.rows == [2]
        assert caught.value.time == SDE.t_min
    found = sd.elbo(constant(0.0), x, samples=2, decoder=Coin(4), seed=0)
    torch.testing.assert_close(found.reconstruction, torch.full((4,), -math.log(4), dtype=F64))
