"""Dequantisers: points lie in their bins, log q is their density, and a fit climbs the bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, ReshapeTransform, SigmoidTransform

import sdediff as sd
from sdediff import dequantize as deq
from sdediff.errors import CapabilityError, OptionError, ShapeError

F64 = torch.float64
TARGET = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 0.3)
MODEL = TARGET.model(sd.VP())


def logit(levels):
    return ComposeTransform([AffineTransform(0.0, 1 / levels), SigmoidTransform().inv])


class Fixed(nn.Module):
    """m and log s that do not depend on the codes."""

    def __init__(self, m, log_s):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([m, log_s], dtype=F64))

    def forward(self, codes):
        return self.values.reshape(1, 2, *[1] * (codes.ndim - 1)).expand(len(codes), 2, *codes.shape[1:])


RANDOM = [deq.Uniform(), deq.TruncatedNormal(), deq.Variational(Fixed(-1.0, -0.4)), deq.Variational(Fixed(0.3, 0.5))]


def time_of(sde, sigma):
    """Where sigma / alpha is this."""
    return sde.time(torch.tensor(-2 * math.log(sigma), dtype=F64)).item()


def at_quantiles(monkeypatch, n):
    """One bin, whose n rows get the quantiles of a uniform number in place of random ones."""
    v = (torch.arange(n, dtype=F64) + 0.5) / n
    monkeypatch.setattr(deq, "_normals", lambda bins, seed, sample: torch.special.ndtri(v)[:, None])
    return v


@pytest.mark.parametrize("levels", [3, 64])
@pytest.mark.parametrize("dequantizer", RANDOM, ids=lambda d: d.name)
@pytest.mark.parametrize("transform", [None, logit, lambda levels: AffineTransform(2.0, -0.5)])
def test_log_q_is_the_density_of_the_draws_and_integrates_to_one(dequantizer, levels, transform, monkeypatch):
    """Of a draw x(v) with v uniform the density is dv / dx."""
    v = at_quantiles(monkeypatch, 4001)
    codes = torch.ones(len(v), 1, dtype=torch.long)
    place = None if transform is None else transform(levels)
    bins = deq.Bins.of(MODEL, codes, levels=levels, transform=place, t_min=time_of(MODEL.sde, 0.05))
    x, log_q = dequantizer.draw(bins, seed=0, sample=0)
    alpha = bins.start[0] if dequantizer.tail == "none" else 1.0
    low, high = (alpha * edge[0].item() for edge in bins.edges())
    x = x[:, 0]
    assert ((x > low) & (x < high)).all()
    slope = (v[2:] - v[:-2]) / (x[2:] - x[:-2]).abs()
    inside = slice(200, -200)
    torch.testing.assert_close(log_q[1:-1][inside], slope.log()[inside], rtol=0, atol=1e-3)
    steps = (x[1:] - x[:-1]).abs()
    mass = ((log_q[1:].exp() + log_q[:-1].exp()) / 2 * steps).sum().item()
    assert mass == pytest.approx(1, abs=4e-3), "nearly all quantiles lie between the first and the last"


@given(
    ratio=st.sampled_from([0.01, 1.0, 5.0, 20.0, 1e3]) | st.floats(1e-2, 1e3),
    levels=st.integers(2, 1000),
    low=st.floats(-3, 3),
    code=st.integers(0, 1),
)
def test_truncated_normal_agrees_with_that_of_scipy_at_every_ratio_of_width_and_noise(ratio, levels, low, code):
    """The map from v and the density; `ratio` is that of the bin's width to the noise of t_min."""
    bins, v, z, log_q = truncated(ratio, levels, low, code)
    sigma = bins.start[1]
    oracle = stats.truncnorm(-ratio / 2, ratio / 2)
    assert np.abs(z).max() <= ratio / 2 * (1 + 1e-9)
    np.testing.assert_allclose(z, oracle.ppf(v), rtol=0, atol=1e-9 * ratio + 1e-9)
    np.testing.assert_allclose(log_q, oracle.logpdf(z) - math.log(sigma), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("ratio", [1e-3, 1e-6, 1e-10])
def test_a_truncated_normal_in_a_narrow_bin_is_uniform(ratio):
    """The oracle of scipy loses its digits here; the noise is nearly constant over the bin."""
    _, v, z, log_q = truncated(ratio, 8, -0.04, 4)
    np.testing.assert_allclose(z, ratio * (v - 0.5), rtol=1e-6, atol=0)
    np.testing.assert_allclose(log_q, -math.log(WIDTH), rtol=0, atol=1e-6)


WIDTH = 0.01


def truncated(ratio, levels, low, code):
    """The bins, the uniform numbers, the draws on the scale of the noise, and log q."""
    sde = sd.VE(sigma_min=1e-6, sigma_max=1e12)
    codes = torch.full((50, 1), code)
    t_min = time_of(sde, WIDTH / ratio)
    model = sd.ScoreModel(lambda x, t: x, sde)
    bins = deq.Bins.of(model, codes, levels=levels, interval=(low, low + levels * WIDTH), t_min=t_min)
    x, log_q = deq.TruncatedNormal().draw(bins, seed=3, sample=1)
    v = torch.special.ndtr(deq._normals(bins, 3, 1))[:, 0].numpy()
    centre = low + (code + 0.5) * WIDTH
    return bins, v, (x[:, 0].numpy() - centre) / bins.start[1], log_q.numpy()


@pytest.mark.parametrize("ratio", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_for_networks_of_any_dtype_stay_in_their_bins(dtype, ratio):
    sde = sd.VE(sigma_min=1e-6, sigma_max=1e5)
    model = sd.ScoreModel(sd.networks.MLP((3, 2), width=4, depth=1).to(dtype), sde)
    codes = torch.randint(0, 256, (500, 3, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    bins = deq.Bins.of(model, codes, levels=256, t_min=time_of(sde, 2 / 256 / ratio))
    assert bins.dtype == dtype
    low, high = bins.edges()
    for dequantizer in RANDOM:
        x, log_q = dequantizer.draw(bins, seed=1, sample=0)
        assert x.dtype == log_q.dtype == F64
        assert x.shape == codes.shape
        assert log_q.shape == (500,)
        rounded = x.to(dtype).double()
        slack = torch.finfo(dtype).eps
        assert ((rounded >= low - slack) & (rounded <= high + slack)).all()


def test_states_are_float32_at_least():
    network = sd.networks.MLP((2,), width=4, depth=1).to(torch.bfloat16)
    codes = torch.zeros(1, 2, dtype=torch.long)
    assert deq.Bins.of(sd.ScoreModel(network, sd.VP()), codes, levels=256).dtype == torch.float32
    with pytest.raises(OptionError, match=r"4194304 levels in \[-1, 1\] are finer than torch.float32 resolves"):
        deq.Bins.of(sd.ScoreModel(network, sd.VP()), codes, levels=2**22)
    assert deq.Bins.of(sd.ScoreModel(network.double(), sd.VP()), codes, levels=2**22).dtype == F64


def test_centres_give_the_width_of_the_bin():
    codes = torch.tensor([[0, 3], [1, 2]])
    bins = deq.Bins.of(MODEL, codes, levels=4, interval=(0.0, 2.0))
    x, log_q = deq.Centres().draw(bins, 0, 0)
    torch.testing.assert_close(x, torch.tensor([[0.25, 1.75], [0.75, 1.25]], dtype=F64))
    torch.testing.assert_close(log_q, torch.full((2,), -2 * math.log(0.5), dtype=F64))


@pytest.mark.parametrize("dequantizer", RANDOM, ids=lambda d: d.name)
def test_a_row_depends_on_the_seed_and_its_number_only(dequantizer):
    codes = torch.randint(0, 16, (150, 3), generator=torch.Generator().manual_seed(0))

    def draw(codes, seed, sample):
        return dequantizer.draw(deq.Bins.of(MODEL, codes, levels=16), seed, sample)

    (x, log_q), (few, log_q_few) = draw(codes, 5, 2), draw(codes[:70], 5, 2)
    torch.testing.assert_close(few, x[:70], rtol=0, atol=1e-12)
    torch.testing.assert_close(log_q_few, log_q[:70], rtol=0, atol=1e-12)
    same_codes = codes[:1].expand(150, -1)
    x, _ = draw(same_codes, 5, 2)
    assert len(x.unique(dim=0)) == 150
    for other in (draw(same_codes, 6, 2)[0], draw(same_codes, 5, 3)[0]):
        assert np.abs(np.corrcoef(x[:, 0], other[:, 0])[0, 1]) < 0.3


def test_a_logistic_with_standard_parameters_is_uniform():
    """Without rounding: it is the same point for the same random number; so a fit starts at the uniform bound."""
    codes = torch.randint(0, 16, (20, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    for events in (codes, codes[:, 0], codes[:, 0, 0], codes[:, 0, 0, 0]):
        bins = deq.Bins.of(MODEL, events, levels=16)
        network = deq._small_network(bins, torch.Generator().manual_seed(0))
        for k in range(2):
            drawn, expected = deq.Variational(network).draw(bins, 1, k), deq.Uniform().draw(bins, 1, k)
            torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-12)


def test_small_networks_read_the_codes_of_their_own_row_and_of_neighbouring_pixels():
    codes = torch.randint(0, 16, (5, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    for events in (codes, codes[:, 0, 0]):
        bins = deq.Bins.of(MODEL, events, levels=16)
        network = deq._small_network(bins, torch.Generator().manual_seed(0))
        for parameter in network.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        whole, part = network(events.double()), network(events[2:3].double())
        assert whole.shape == (5, 2, *events.shape[1:])
        torch.testing.assert_close(part, whole[2:3], rtol=1e-10, atol=1e-10)
        assert (whole[1] - whole[0]).abs().min() > 0


@pytest.mark.parametrize("transform", [None, logit])
def test_the_gradient_of_a_fit_is_that_of_the_bound(transform):
    """With the density of t_min known, the bound can be differentiated itself."""
    target = sd.exact.GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-0.5, 0.1], [0.4, 0.0]], dtype=F64), torch.tensor([0.1, 0.05])
    )
    sde, t = sd.VP(), 0.02
    codes = torch.tensor([[0, 3], [1, 2], [2, 2]])
    place = None if transform is None else transform(4)
    bins = deq.Bins.of(target.model(sde), codes, levels=4, transform=place, t_min=t)
    network = Fixed(0.4, -0.3)
    (found,) = torch.autograd.grad(deq._climbing(network, bins, 3, None), network.values)
    x, log_q = deq._logistic(network, bins, deq._normals(bins, 3, 0))
    bound = (target.marginal(sde, t).log_prob(sde.alpha(torch.tensor(t, dtype=F64)) * x) - log_q).mean() / 2
    (exact,) = torch.autograd.grad(bound, network.values)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_a_fit_is_reproducible_and_leaves_everything_else_alone():
    network = sd.networks.MLP((2,), width=8, depth=1)
    model = sd.ScoreModel(network, sd.VP())
    codes = torch.randint(0, 4, (30, 2), generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    raw = deq.Variational()
    first, again, other = (raw.fit(model, codes, levels=4, steps=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert raw.network is None
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    bins = deq.Bins.of(model, codes, levels=4)
    assert torch.equal(first.draw(bins, 0, 0)[0], again.draw(bins, 0, 0)[0])
    assert not torch.equal(first.draw(bins, 0, 0)[0], other.draw(bins, 0, 0)[0])
    mine = Fixed(0.0, 0.0)
    fitted = deq.Variational(mine).fit(model, codes, levels=4, steps=5, seed=0)
    assert torch.equal(mine.values, torch.zeros(2, dtype=F64))
    assert not torch.equal(fitted.network.values, mine.values)
    assert not fitted.network.training
    assert repr(fitted) == "Variational(Fixed)"


def test_a_fit_finds_the_edge_where_the_density_is():
    """A narrow Gaussian at the upper edge of a bin draws the points there; its neighbour's go to the lower edge."""
    target = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 0.05**2)
    codes = torch.tensor([0, 1]).repeat(32)[:, None]
    fitted = deq.Variational(Tilt()).fit(target.model(sd.VP()), codes, levels=2, steps=150, lr=0.1, seed=0)
    bins = deq.Bins.of(target.model(sd.VP()), codes, levels=2)
    x, _ = fitted.draw(bins, 0, 0)
    assert x[::2].median().item() == pytest.approx(-0.6745 * 0.05, abs=0.02)
    assert x[1::2].median().item() == pytest.approx(0.6745 * 0.05, abs=0.02)


class Tilt(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, codes):
        return torch.stack([self.values[0] * codes, self.values[1].expand_as(codes)], dim=1)


def test_a_fit_passes_the_condition_of_each_row_on():
    """The network returns NaN for rows whose label is not the one of their code."""

    def network(x, t, condition):
        label = condition[:, None]
        return torch.where((x > 0) == (label > 0), x, math.nan)

    codes = torch.tensor([0, 1]).repeat(20)[:, None]
    model = sd.ScoreModel(network, sd.VP())
    given_later = deq.Variational(Fixed(0.0, 0.0)).fit(
        model, codes, levels=2, steps=3, batch_size=7, condition=codes[:, 0], seed=0
    )
    assert given_later.network.values.isfinite().all()
    bound = deq.Variational(Fixed(0.0, 0.0)).fit(
        model.given(codes[:, 0]), codes, levels=2, steps=3, batch_size=7, seed=0
    )
    assert torch.equal(bound.network.values, given_later.network.values)


# Bad input

CODES = torch.ones(2, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "act", "words"),
    [
        (OptionError, lambda: deq.Bins.of(None, CODES, levels=4), ["ScoreModel", "NoneType"]),
        (ShapeError, lambda: deq.Bins.of(MODEL, [1], levels=4), ["integers", "list"]),
        (ShapeError, lambda: deq.Bins.of(MODEL, CODES == 1, levels=4), ["integers", "torch.bool"]),
        (ShapeError, lambda: deq.Bins.of(MODEL, CODES[:0], levels=4), ["at least one row", "(0, 1)"]),
        (OptionError, lambda: deq.Bins.of(MODEL, CODES, levels=1), ["at least 2", "1"]),
        (OptionError, lambda: deq.Bins.of(MODEL, CODES, levels=4.0), ["whole number", "4.0"]),
        (
            OptionError,
            lambda: deq.Bins.of(MODEL, CODES, levels=4, interval=(0.0, 1.0), transform=AffineTransform(0, 1)),
            ["transform=", "(0.0, 1.0)"],
        ),
        (OptionError, lambda: deq.Bins.of(MODEL, CODES, levels=4, interval=(0.0, math.inf)), ["finite", "inf"]),
        (
            CapabilityError,
            lambda: deq.Bins.of(MODEL, CODES, levels=4, transform=ReshapeTransform((1,), (1,))).edges(),
            ["several entries", "ReshapeTransform"],
        ),
        (
            CapabilityError,
            lambda: deq.Variational().draw(deq.Bins.of(MODEL, CODES, levels=4), 0, 0),
            ["no network", ".fit("],
        ),
        (
            ShapeError,
            lambda: deq.Variational(nn.Identity()).draw(deq.Bins.of(MODEL, CODES, levels=4), 0, 0),
            ["m and log s", "(2, 2, 1)", "(2, 1)"],
        ),
        (
            OptionError,
            lambda: deq.TruncatedNormal().draw(deq.Bins.of(MODEL, CODES, levels=4, t_min=0.0), 0, 0),
            ["noise at t_min = 0", "raise t_min"],
        ),
        (OptionError, lambda: deq.Variational().fit(MODEL, CODES, levels=4, steps=0), ["steps >= 1", "steps = 0"]),
        (OptionError, lambda: deq.Variational().fit(MODEL, CODES, levels=4, lr=0.0), ["lr > 0", "lr = 0.0"]),
    ],
)
def test_bad_input_gets_a_sentence(error, act, words):
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert message.endswith(".")
    for word in words:
        assert word in message
