"""The family of smooth signals: its moments, its seeds, its limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import sdediff as sd
from sdediff.signals import Sinusoids

F64 = torch.float64
FAMILIES = [
    Sinusoids(),
    Sinusoids(count=1, frequency=(2.0, 2.0), amplitude=(1.0, 1.0), points=9),
    Sinusoids(count=3, frequency=(0.0, 4.0), amplitude=(0.0, 2.0), points=20),
]


@st.composite
def families(draw):
    frequency = sorted((draw(st.floats(0, 5)), draw(st.floats(0, 5))))
    amplitude = sorted((draw(st.floats(0, 2)), draw(st.floats(0.1, 2))))
    return Sinusoids(draw(st.integers(1, 4)), tuple(frequency), tuple(amplitude), draw(st.integers(12, 20)))


def uniform_mean(f, low, high):
    return quad(f, low, high)[0] / (high - low) if high > low else f(low)


@given(families(), st.data())
def test_moments_are_the_integrals_over_amplitude_frequency_and_phase(family, data):
    """Quadrature of the definition; K independent y sum to E x^2 x'^2 = K E y^2 y'^2 + K (K - 1) (v v' + 2 c^2)."""
    i, j = (data.draw(st.integers(0, family.points - 1)) for _ in range(2))
    u, v = family.places[i].item(), family.places[j].item()
    phases = 2 * math.pi * (torch.arange(8, dtype=F64) / 8)  # exact for trigonometric polynomials of degree up to 7

    def over_law(power, of_signals):
        def at(f):
            x, y = (torch.sin(2 * math.pi * f * place + phases) for place in (u, v))
            return of_signals(x, y).mean().item()

        return uniform_mean(lambda a: a**power, *family.amplitude) * uniform_mean(at, *family.frequency)

    count = family.count
    covariance = over_law(2, lambda x, y: x * y)
    variances = over_law(2, lambda x, y: x * x) * over_law(2, lambda x, y: y * y)
    assert family.cov[i, j].item() == pytest.approx(count * covariance, rel=1e-6, abs=1e-7)
    want = count * over_law(4, lambda x, y: x * x * y * y) + count * (count - 1) * (variances + 2 * covariance**2)
    assert family.squares[i, j].item() == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_samples_have_the_stated_moments(family):
    """Mean, covariance and fourth moments of 20 000 signals, every entry within 5 standard errors."""
    n = 20_000
    x = family.sample(n, seed=0, dtype=F64)
    assert x.shape == (n, family.points)
    assert (x.mean(0) / (x.std(0) / n**0.5)).abs().max() < 5
    for found, exact in ((x, family.cov), (x.square(), family.squares)):
        for k in range(family.points):
            product = found * found[:, k : k + 1]
            error = product.std(0) / n**0.5 + 1e-12
            assert ((product.mean(0) - exact[k]) / error).abs().max() < 5


def test_kurtosis_of_one_sinusoid_and_of_many():
    fixed = {"frequency": (1.0, 3.0), "amplitude": (1.0, 1.0)}
    for count in (1, 2, 10):
        assert Sinusoids(count, **fixed).kurtosis == pytest.approx(-1.5 / count, rel=1e-12)
    x = Sinusoids().sample(40_000, seed=3, dtype=F64)[:, 7]
    batches = (x.reshape(40, 1000) ** 4).mean(1) / (x**2).mean() ** 2 - 3
    assert abs(batches.mean() - Sinusoids().kurtosis) < 4 * batches.std() / 40**0.5


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_signals_are_sums_of_sinusoids_of_the_family(family):
    """One sinusoid of frequency f obeys x(u + h) + x(u - h) = 2 cos(2 pi f h) x(u); amplitudes bound every signal."""
    x = family.sample(200, seed=1, dtype=F64)
    assert x.abs().max() <= family.count * family.amplitude[1]
    if family.count == 1:
        h = (family.places[1] - family.places[0]).item()
        turned = 2 * math.cos(2 * math.pi * family.frequency[0] * h) * x[:, 1:-1]
        torch.testing.assert_close(x[:, 2:] + x[:, :-2], turned, rtol=1e-10, atol=1e-10)


def test_a_row_depends_on_the_seed_and_its_index_alone():
    family = Sinusoids()
    x = family.sample(150, seed=4, dtype=F64)
    for n in (1, 7, 64, 149):
        assert torch.equal(family.sample(n, seed=4, dtype=F64), x[:n])
    assert not torch.equal(family.sample(150, seed=5, dtype=F64), x)
    assert len(x.unique(dim=0)) == 150
    assert torch.equal(family.sample(9, seed=4), x[:9].float())
    torch.manual_seed(0)
    first, second = family.sample(3), family.sample(3)
    torch.manual_seed(0)
    assert torch.equal(family.sample(3), first)
    assert not torch.equal(first, second)


def test_a_trained_network_knows_more_than_the_covariance():
    """Kurtosis of its samples nearer to the truth than that of the optimal linear denoiser, by 6 standard errors."""
    family, n = Sinusoids(points=24), 4000
    sde = sd.DiscreteVP(0.1 * torch.sigmoid(torch.linspace(-6, 6, 100, dtype=F64)))
    gaussian = sd.exact.Gaussian(torch.zeros(24), family.cov + 1e-6 * torch.eye(24))
    torch.manual_seed(0)
    network = sd.networks.MLP((24,), width=64, depth=2)
    model = sd.ScoreModel(network, sde, prediction="data", time=sde.timestep)
    model = sd.fit(model, family.sample(20_000, seed=0), steps=400, weighting="min_snr", seed=0, progress=False)
    start = gaussian.marginal(sde, 1.0).sample(n, seed=1)
    off, errors = [], []
    for denoiser in (model, gaussian.model(sde)):
        x = sd.sample(denoiser, start.shape, solver=sd.DDPM(), times=sde.times, x_init=start, seed=2).x.double()
        assert sd.covariance_error(x, family.cov)[0] < 0.2
        kurtosis = (x.reshape(20, 200, 24) ** 4).mean((1, 2)) / x.square().mean() ** 2 - 3
        off.append(abs(kurtosis.mean() - family.kurtosis))
        errors.append(kurtosis.std() / 20**0.5)
    assert off[1] - off[0] > 6 * math.hypot(*errors)


BAD = {
    "count": (lambda: Sinusoids(count=0), ["count >= 1", "got 0"]),
    "points": (lambda: Sinusoids(points=1), ["points >= 2", "and 1"]),
    "frequency": (lambda: Sinusoids(frequency=(3.0, 1.0)), ["frequency", "low <= high", "(3.0, 1.0)"]),
    "negative": (lambda: Sinusoids(frequency=(-1.0, 1.0)), ["frequency", "0 <= low", "(-1.0, 1.0)"]),
    "infinite": (lambda: Sinusoids(amplitude=(0.0, math.inf)), ["amplitude", "inf"]),
    "amplitude": (lambda: Sinusoids(amplitude=(0.0, 0.0)), ["amplitude is zero", "high > 0"]),
    "too fast": (lambda: Sinusoids(frequency=(1.0, 30.0)), ["up to 24.5", "got 30", "more points"]),
    "sample": (lambda: Sinusoids().sample(0), ["n >= 1", "got 0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name):
    call, words = BAD[name]
    with pytest.raises(sd.OptionError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
