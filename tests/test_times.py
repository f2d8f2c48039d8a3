"""Laws of training times: every one is unbiased, and those made for it lower the variance."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import NAMED, name
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import sdediff as sd
from sdediff import times
from sdediff.errors import CapabilityError, DivergenceError, OptionError, TimeError
from sdediff.losses import denoising
from sdediff.testing import linear_sdes
from sdediff.times import Even, Levels, LogNormal, LogSNR, LossAware, Steps

F64 = torch.float64
VP = sd.VP(t_min=1e-3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(base, sde, bins=5, seed=0, history=10):
    """A law that has seen random losses in every bin."""
    law = LossAware(base, bins=bins, history=history)
    u = (torch.arange(bins * history, dtype=F64) + 0.5) / (bins * history)
    t = law.time(sde, u)
    law.observe(sde, t, torch.rand(len(u), dtype=F64, generator=generator(seed)) * 5 / base.weight(sde, t))
    return law


# Numbers


@settings(max_examples=30)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_antithetic_numbers_come_in_pairs_that_add_up_to_one(n, seed):
    u = times.antithetic(n, generator=generator(seed))
    assert u.dtype == F64
    assert u.shape == (n,)
    assert bool(((u >= 0) & (u < 1)).all())
    pairs = u[: n // 2 * 2].reshape(-1, 2)
    torch.testing.assert_close(pairs.sum(1), torch.ones(n // 2, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", times.NUMBERS)
def test_every_number_is_uniform_in_all_three_ways(kind):
    g = generator(3)
    draws = torch.stack([times.NUMBERS[kind](3, generator=g) for _ in range(4000)])
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-6


def test_how_numbers_of_a_batch_depend_on_each_other():
    """The correlation of two: none, -1/2 of a shift by 1/2, and -1."""
    g = generator(4)
    for kind, wanted in (("independent", 0.0), ("low_discrepancy", -0.5), ("antithetic", -1.0)):
        pairs = torch.stack([times.NUMBERS[kind](2, generator=g) for _ in range(20_000)])
        assert torch.corrcoef(pairs.T)[0, 1].item() == pytest.approx(wanted, abs=4.5 / math.sqrt(20_000))


# Every law


CONTINUOUS = [Even(), LogSNR(), LogSNR(scale=0.7), LogNormal(), LogNormal(0.5, 2.0)]


@settings(max_examples=25)
@given(sde=linear_sdes(), law=st.sampled_from(CONTINUOUS))
def test_times_rise_from_one_end_of_the_span_to_the_other(sde, law):
    t = law.time(sde, torch.linspace(0, 1 - 2**-53, 50, dtype=F64))
    assert bool((t.diff() > 0).all())
    assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
    reach = torch.tensor([sde.t_min, sde.t_max], dtype=F64)
    torch.testing.assert_close(sde.log_snr(t[[0, -1]]), sde.log_snr(reach), rtol=1e-6, atol=1e-6)


@settings(max_examples=25)
@given(sde=linear_sdes(), law=st.sampled_from(CONTINUOUS))
def test_the_weight_is_the_slope_of_time_in_the_law_s_number(sde, law):
    """dt/du = 1 / q(t) = (t_max - t_min) weight: by central differences, second order."""
    u = torch.linspace(0.1, 0.9, 9, dtype=F64)
    step = 1e-5
    slope = (law.time(sde, u + step) - law.time(sde, u - step)) / (2 * step)
    t = law.time(sde, u)
    torch.testing.assert_close(slope, (sde.t_max - sde.t_min) * law.weight(sde, t), rtol=2e-4, atol=1e-9)


@settings(max_examples=15)
@given(sde=linear_sdes(), law=st.sampled_from(CONTINUOUS), power=st.integers(0, 3))
def test_every_law_has_the_mean_over_even_times(sde, law, power):
    """Over all but the first and last thousandth of its numbers, whose times may be most of the span."""
    assume(
        not isinstance(sde, sd.DiscreteVP)
    )  # its rate has spikes, which a sum does not resolve; see the slopes above
    cut, s = 1e-3, (torch.arange(2000, dtype=F64) + 0.5) / 2000
    u = cut + (1 - 2 * cut) * (3 * s**2 - 2 * s**3)  # closer at both ends
    first, last = law.time(sde, torch.tensor([cut, 1 - cut], dtype=F64)).tolist()
    t = law.time(sde, u)
    got = (law.weight(sde, t) * (t / sde.t_max) ** power * 6 * s * (1 - s)).mean() * (1 - 2 * cut)
    whole = ((last / sde.t_max) ** (power + 1) - (first / sde.t_max) ** (power + 1)) * sde.t_max / (power + 1)
    assert got.item() == pytest.approx(whole / (sde.t_max - sde.t_min), rel=1e-3)


@pytest.mark.parametrize("base", [Even(), LogSNR(), LogNormal(), Even("antithetic"), Even("independent")], ids=name)
@pytest.mark.parametrize("aware", [False, True], ids=["", "loss-aware"])
def test_drawn_means_are_unbiased(base, aware):
    """Of t^2, over 800 batches of 4, within 4.5 standard errors."""
    law = trained(base, VP) if aware else base
    g = generator(5)
    batches = []
    for _ in range(800):
        t, weight = law.draw(VP, 4, generator=g)
        assert t.shape == weight.shape == (4,)
        batches.append((weight * t**2).mean())
    batches = torch.stack(batches)
    exact = (1 - 1e-9) / 3 / (1 - 1e-3)
    assert abs(batches.mean() - exact) < 4.5 * batches.std() / math.sqrt(800)


# The laws of likelihood weighting


@pytest.mark.parametrize("sde", [s for s in NAMED if s.t_min > 0] + [sd.VE()], ids=name)
def test_even_log_snr_cancels_the_factor_of_likelihood_weighting(sde):
    """weight g^2 / (2 sigma^2) is one constant, half the fall of the log-SNR per unit of time."""
    t = LogSNR().time(sde, torch.linspace(0.01, 0.99, 30, dtype=F64))
    product = LogSNR().weight(sde, t) * (sde.rates(t)[1] / sde.sigma(t)) ** 2 / 2
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=F64))
    constant = (ends[0] - ends[1]) / 2 / (sde.t_max - sde.t_min)
    torch.testing.assert_close(product, constant.expand(30), rtol=1e-7, atol=0)


@settings(max_examples=25)
@given(sde=linear_sdes(), scale=st.floats(0.1, 10))
def test_times_of_a_scale_are_even_in_log_of_one_plus_its_snr(sde, scale):
    u = torch.linspace(0, 1 - 1e-12, 9, dtype=F64)
    clock = (1 + scale**2 * sde.log_snr(LogSNR(scale=scale).time(sde, u)).exp()).log()
    torch.testing.assert_close(clock.diff(), clock.diff().mean().expand(8), rtol=1e-6, atol=1e-9)


def spread(model, law, x0):
    """The variance of a row of the likelihood-weighted loss, independent draws."""
    loss = denoising(model, x0, weighting="likelihood", times=law, generator=generator(7))
    return loss.mean().item(), loss.var().item(), loss.std().item() / math.sqrt(len(x0))


@pytest.mark.parametrize("kind", ["exact", "imperfect"])
def test_even_log_snr_lowers_the_variance_of_the_likelihood_weighted_loss(kind):
    """One mean (4.5 standard errors), and less than a tenth of the variance; with the data's scale less again."""
    sde = sd.VP()
    target = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=F64), torch.tensor([0.2, 0.3])
    )
    model = target.model(sde)
    if kind == "imperfect":
        exact = model
        model = sd.ScoreModel(lambda x, t: exact.noise(t, x) * 0.95 + 0.1, sde, time=lambda t: t)
    x0 = target.sample(60_000, seed=0)
    laws = Even("independent"), LogSNR(numbers="independent"), LogSNR(1.0, "independent")
    even, log_snr, scaled = (spread(model, law, x0) for law in laws)
    assert abs(even[0] - log_snr[0]) < 4.5 * math.hypot(even[2], log_snr[2])
    assert abs(scaled[0] - log_snr[0]) < 4.5 * math.hypot(scaled[2], log_snr[2])
    assert log_snr[1] < 0.1 * even[1]
    if kind == "exact":
        assert scaled[1] < 0.75 * log_snr[1]


@pytest.mark.parametrize("numbers", ["low_discrepancy", "antithetic"])
def test_dependent_numbers_lower_the_variance_of_the_mean_of_a_batch(numbers):
    """Of a function that is monotone in time, over 2000 batches of 8."""
    g = generator(8)
    spread = {
        kind: torch.stack([Even(kind).draw(VP, 8, generator=g)[0].exp().mean() for _ in range(2000)]).var()
        for kind in ("independent", numbers)
    }
    assert spread[numbers] < 0.2 * spread["independent"]


# Log-normal


@settings(max_examples=25)
@given(sde=linear_sdes(), place=st.floats(0, 1), std=st.floats(0.3, 2))
def test_log_normal_levels_have_the_distribution_of_the_normal_in_the_span(sde, place, std):
    ends = -sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=F64)) / 2
    mean = (ends[0] + place * (ends[1] - ends[0])).item()
    u = torch.linspace(0.01, 0.99, 15, dtype=F64)
    log_s = -sde.log_snr(LogNormal(mean, std).time(sde, u)) / 2
    low, high = stats.norm.cdf(ends.numpy(), mean, std)
    wanted = stats.norm.ppf(low + u.numpy() * (high - low), mean, std)
    np.testing.assert_allclose(log_s.numpy(), wanted, rtol=1e-6, atol=1e-6)


# Grids and levels


@settings(max_examples=25)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12), st.booleans())
def test_steps_are_the_riemann_sum_of_their_grid(gaps, falling):
    grid = 0.01 + 0.98 * torch.tensor([0.0, *gaps], dtype=F64).cumsum(0) / sum(gaps)
    law = Steps(grid.flip(0) if falling else grid)
    n = len(gaps)
    t = law.time(VP, (torch.arange(3 * n, dtype=F64) + 0.5) / (3 * n))
    torch.testing.assert_close(t, grid[1:].repeat_interleave(3), rtol=0, atol=0)
    torch.testing.assert_close(law.starts(VP, t), grid[:-1].repeat_interleave(3), rtol=0, atol=0)
    sum_ = (law.weight(VP, t) * t.exp()).mean()
    torch.testing.assert_close(sum_, (grid[1:].exp() * grid.diff()).sum() / (grid[-1] - grid[0]))


def test_steps_of_a_chain_are_its_own_and_of_other_processes_a_thousand():
    chain = sd.DiscreteVP(torch.linspace(0.01, 0.3, 8))
    t = Steps().time(chain, torch.arange(7, dtype=F64) / 7)
    torch.testing.assert_close(t, torch.arange(2, 9, dtype=F64) / 8)
    torch.testing.assert_close(Steps().weight(chain, t), torch.ones(7, dtype=F64))
    assert len(Steps().of(VP)) == 1001
    assert Steps().of(VP)[[0, -1]].tolist() == [VP.t_min, VP.t_max]


def test_levels_are_drawn_equally_often_and_weigh_one():
    levels = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    t, weight = Levels(levels).draw(VP, 300, generator=generator())
    assert [(t == level).sum().item() for level in levels] == [100] * 3
    assert bool((weight == 1).all())
    assert Levels([0.3]).draw(VP, 5)[0].tolist() == [0.3] * 5


# Loss-aware


def test_bins_are_equally_likely_until_each_has_seen_its_history():
    law = LossAware(bins=3, history=2)
    even = torch.full((3,), 1 / 3, dtype=F64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    for rows in ([0, 1, 2], [0, 1], [0, 1, 1]):
        law.observe(VP, t[rows], torch.arange(1.0, len(rows) + 1))
        assert torch.equal(law.probabilities, even)
    law.observe(VP, t[[2]], torch.tensor([1.0]))
    assert not torch.equal(law.probabilities, even)


def test_probabilities_are_the_root_mean_squares_of_the_latest_losses():
    law = LossAware(bins=2, history=3, floor=0.1)
    early, late = torch.full((5,), 0.2, dtype=F64), torch.full((3,), 0.8, dtype=F64)
    law.observe(VP, torch.cat([early, late]), torch.tensor([100.0, 100, 1, 2, 2, 1, 1, 1]))  # two are forgotten
    size = torch.tensor([3.0, 1.0], dtype=F64).sqrt()
    torch.testing.assert_close(law.probabilities, 0.9 * size / size.sum() + 0.05)
    law.observe(VP, late[:2], torch.tensor([5.0, 7.0]))
    law.observe(VP, early[:1], torch.tensor([4.0]))
    size = torch.tensor([(16 + 4 + 4) / 3, (1 + 25 + 49) / 3], dtype=F64).sqrt()
    torch.testing.assert_close(law.probabilities, 0.9 * size / size.sum() + 0.05)


GRIDS = [Levels(torch.linspace(0.1, 1, 10)), Steps(torch.linspace(0, 1, 11))]


@pytest.mark.parametrize("base", [Even(), LogSNR(), *GRIDS], ids=name)
def test_a_bin_is_drawn_as_often_as_it_should_and_weighs_the_inverse(base):
    sde = sd.VE()
    law = trained(base, sde, bins=5)
    t, weight = law.draw(sde, 5000, generator=generator())
    found = torch.bincount(law.bin(sde, t), minlength=5)
    assert (found - 5000 * law.probabilities).abs().max() <= 2  # evenly spread numbers
    torch.testing.assert_close(weight, base.weight(sde, t) / (5 * law.probabilities[law.bin(sde, t)]))
    u = (torch.arange(50, dtype=F64) + 0.5) / 50
    assert bool((law.time(sde, u).diff() >= 0).all())
    assert law.bin(sde, base.time(sde, u)).tolist() == [i // 10 for i in range(50)]


@pytest.mark.parametrize(
    ("base", "sde", "bins", "n"),
    [
        (Levels(torch.linspace(0.01, 1, 100)), VP, 100, 100),
        (Steps(torch.linspace(0.1, 1, 101)), VP, 50, 100),
        (Steps(), sd.DiscreteVP(torch.linspace(1e-4, 0.02, 1000)), 333, 999),
    ],
    ids=["levels", "steps", "chain"],
)
def test_bins_of_points_hold_equally_many_and_their_mean_is_exact(base, sde, bins, n):
    """0.29 * 100 is less than 29: borders between points come from their indices, not from their numbers."""
    law = trained(base, sde, bins=bins)
    assert bool((law.count == 10).all())
    points = base.points(sde)
    assert law.bin(sde, points).tolist() == [i * bins // n for i in range(n)]
    ends = law.probabilities.cumsum(0)
    starts = ends - law.probabilities
    inside = [law.time(sde, starts + part * law.probabilities) for part in (1e-6, 1 - 1e-6)]
    assert torch.equal(inside[0], points[:: n // bins])
    assert torch.equal(law.time(sde, ends[:-1]), points[n // bins :: n // bins])
    assert torch.equal(inside[1], points[n // bins - 1 :: n // bins])
    within = law.probabilities[law.bin(sde, points)] * bins / n
    torch.testing.assert_close(
        (law.weight(sde, points) * within * points).sum(), (base.weight(sde, points) * points).mean()
    )


def test_a_bin_begins_with_its_border():
    borders = Even().time(VP, torch.arange(4, dtype=F64) / 4)
    assert LossAware(bins=4).bin(VP, borders).tolist() == [0, 1, 2, 3]


def test_losses_seen_are_those_per_number_of_the_other_law():
    """So that the law that is best for a product with the weight is found."""
    law, base = LossAware(LogSNR(), bins=2, history=1), LogSNR()
    t = base.time(VP, torch.tensor([0.2, 0.8], dtype=F64))
    law.observe(VP, t, torch.tensor([3.0, 1.0], dtype=F64) / base.weight(VP, t))
    torch.testing.assert_close(law.probabilities, 0.999 * torch.tensor([0.75, 0.25], dtype=F64) + 0.0005)


def test_loss_aware_times_lower_the_variance_and_keep_the_mean_while_they_learn():
    """Losses that fall by e^8 over the span, as those of a bound do; while it learns and after, 4.5 standard errors."""
    law, g = LossAware(Even("independent"), bins=20), generator(9)

    def run(law, steps):
        means = []
        for _ in range(steps):
            t, weight = law.draw(VP, 16, generator=g)
            losses = (-8 * t).exp() * (0.5 + torch.rand(16, dtype=F64, generator=g))
            law.observe(VP, t, losses)
            means.append((weight * losses).mean())
        return torch.stack(means)

    exact = (math.exp(-8e-3) - math.exp(-8)) / 8 / (1 - 1e-3)
    learning, aware, even = run(law, 300), run(law, 1500), run(Even("independent"), 1500)
    for means in (learning, aware, even):
        assert abs(means.mean() - exact) < 4.5 * means.std() / math.sqrt(len(means))
    assert aware.var() < 0.25 * even.var()


def test_a_loss_teaches_the_law_that_drew_its_times_and_only_when_it_is_learnt_from():
    model = sd.ScoreModel(lambda x, t: torch.zeros_like(x), VP)
    law = LossAware(bins=4)
    x0 = torch.zeros(8, 2, dtype=F64)
    with torch.no_grad():
        denoising(model, x0, times=law)
    denoising(model, x0, times=law, t=torch.full((8,), 0.5))
    assert law.count.sum() == 0
    values = denoising(model, x0, times=law, generator=generator())
    assert law.count.tolist() == [2] * 4
    torch.testing.assert_close(law.seen[law.seen != 0].sort().values, values.sort().values)
    sd.losses.sliced(model, x0, times=law, generator=generator())
    assert law.count.tolist() == [4] * 4


@pytest.mark.parametrize("weighting", ["simple", "likelihood", "edm"])
def test_what_a_law_observes_is_the_function_whose_mean_over_even_times_is_the_loss(weighting):
    """For "edm" the error times its weight times the density of its log-normal levels."""
    seen = []

    class Spy(LogSNR):
        def observe(self, sde, t, losses):
            seen.extend([t, losses])

    model = sd.ScoreModel(lambda x, t: x, VP)
    x0, noise = torch.zeros(6, 2, dtype=F64), torch.randn(6, 2, dtype=F64, generator=generator())
    values = denoising(model, x0, weighting=weighting, times=Spy(), noise=noise)
    t, losses = seen
    density = 1 / LogNormal().weight(VP, t) if weighting == "edm" else 1
    torch.testing.assert_close(losses, denoising(model, x0, weighting=weighting, t=t, noise=noise) * density)
    torch.testing.assert_close(values, losses * LogSNR().weight(VP, t))


def test_edm_rows_weigh_what_karras_says_at_the_times_of_its_own_law():
    """As its mean is over these times, nothing is divided out."""
    seen = []
    model = sd.ScoreModel(lambda x, t: seen.append(t) or x, VP)
    x0, noise = torch.zeros(6, 2, dtype=F64), torch.randn(6, 2, dtype=F64, generator=generator())
    values = denoising(model, x0, weighting="edm", noise=noise)
    torch.testing.assert_close(values, denoising(model, x0, weighting="edm", t=seen[0], noise=noise))


@pytest.mark.parametrize("weighting", ["simple", "likelihood", "edm"])
@pytest.mark.parametrize("law", [Even(), LogSNR(), LogSNR(0.5), LogNormal(-0.5, 2.5), "aware"], ids=name)
def test_another_law_leaves_the_mean_of_a_weighting_as_it_is(weighting, law):
    """With data at 0 and noise 1, and an error that fades as noise grows: to 2 percent, by 20,000 even numbers."""
    sde = sd.VP(t_min=0.02)
    if law == "aware":
        law = trained(Even(), sde)
    model = sd.ScoreModel(lambda x, t: x, sde)
    ones = torch.ones(20_000, 1, dtype=F64)
    own, other = (
        denoising(model, 0 * ones, weighting=weighting, times=times, noise=ones, generator=generator()).mean()
        for times in (None, law)
    )
    assert other.item() == pytest.approx(own.item(), rel=0.02)


def test_a_state_is_saved_and_taken_up(tmp_path):
    law = trained(Even(), VP)
    again = LossAware(bins=5)
    again.load_state_dict(law.state_dict())
    assert torch.equal(again.probabilities, law.probabilities)
    law.observe(VP, torch.tensor([0.3]), torch.tensor([2.0]))
    again.observe(VP, torch.tensor([0.3]), torch.tensor([2.0]))
    assert torch.equal(again.seen, law.seen)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LossAware(bins=6).load_state_dict(law.state_dict())


def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), VP)


def test_a_resumed_run_with_loss_aware_times_is_the_uninterrupted_one(tmp_path):
    data = torch.randn(64, 2, generator=generator())
    options = {"batch_size": 16, "warmup": 3, "seed": 5, "progress": False, "decay": False}
    whole_law, first, second = (LossAware(bins=4, history=2) for _ in range(3))
    whole = sd.fit(small(), data, times=whole_law, steps=12, **options)
    sd.fit(small(), data, times=first, steps=5, checkpoint=tmp_path, **options)
    resumed = sd.fit(small(), data, times=second, steps=12, checkpoint=tmp_path, **options)
    assert torch.equal(resumed.losses, whole.losses)
    assert torch.equal(second.seen, whole_law.seen)
    assert torch.equal(second.count, whole_law.count)
    assert whole_law.count.sum() == 12 * 16
    again = sd.load(tmp_path)
    assert isinstance(again.network, nn.Module)
    with pytest.raises(sd.CheckpointError, match='times was "LossAware'):
        sd.fit(small(), data, times=LossAware(bins=4, history=3), steps=12, checkpoint=tmp_path, **options)


def test_after_training_a_law_holds_what_it_has_seen_and_no_average():
    class Recorder(LossAware):
        def observe(self, sde, t, losses):
            super().observe(sde, t, losses)
            after.append(self.seen.clone())

    after, law = [], Recorder(bins=4, history=2)
    sd.fit(small(), torch.randn(64, 2), times=law, steps=6, batch_size=16, progress=False)
    assert torch.equal(law.seen, after[-1])
    assert not torch.equal(after[-1], after[-2])


def test_a_law_given_to_fit_goes_to_its_loss_and_into_the_checkpoint(tmp_path):
    data = torch.randn(64, 2, generator=generator())
    options = {"batch_size": 16, "seed": 5, "progress": False, "decay": False, "loss": partial(sd.losses.sliced)}
    whole, first, second = (LossAware(bins=4, history=2) for _ in range(3))
    sd.fit(small(), data, times=whole, steps=6, **options)
    sd.fit(small(), data, times=first, steps=3, checkpoint=tmp_path, **options)
    sd.fit(small(), data, times=second, steps=6, checkpoint=tmp_path, **options)
    assert whole.count.sum() == 6 * 16
    assert torch.equal(second.seen, whole.seen)


class Late(times.Law):
    """A law of a user's own, without a dataclass and without a representation."""

    def time(self, sde, u):
        return sde.t_min + u.sqrt() * (sde.t_max - sde.t_min)

    def weight(self, sde, t):
        return 0.5 * (sde.t_max - sde.t_min) / (t - sde.t_min)


def test_a_law_of_the_user_s_own_draws_and_resumes(tmp_path):
    data, options = torch.randn(64, 2), {"batch_size": 16, "seed": 5, "progress": False, "decay": False}
    kept = [Late(), Late()]  # at two addresses
    for law, steps in zip(kept, (2, 4), strict=True):
        losses = sd.fit(small(), data, times=law, steps=steps, checkpoint=tmp_path, **options).losses
    assert len(losses) == 4


def test_a_run_with_other_numbers_of_the_same_steps_is_refused(tmp_path):
    data, options = torch.randn(64, 2), {"batch_size": 16, "steps": 2, "seed": 5, "progress": False}
    sd.fit(small(), data, times=Steps(), checkpoint=tmp_path, **options)
    with pytest.raises(sd.CheckpointError, match=r"times was.*low_discrepancy.*now.*independent"):
        sd.fit(small(), data, times=Steps(numbers="independent"), checkpoint=tmp_path, **options)


def test_a_loss_that_is_not_finite_names_its_step_with_loss_aware_times_too():
    rows = torch.randn(8, 2)
    rows[3, 1] = math.nan
    with pytest.raises(DivergenceError, match=r"step 0, t = .*, rows \d") as caught:
        sd.fit(small(), rows, times=LossAware(), batch_size=8, progress=False)
    assert caught.value.step == 0
    assert len(caught.value.rows) == 1


def test_fit_draws_by_the_law_it_is_given():
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            seen.append(t)
            return self.weight * x

    model = sd.ScoreModel(Network(), VP)
    sd.fit(model, torch.randn(9, 2), times=Levels([0.25, 0.75]), steps=2, batch_size=8, progress=False)
    assert set(torch.cat(seen).tolist()) == {0.25, 0.75}


# Bad input


MODEL = sd.ScoreModel(lambda x, t: x, VP)
X = torch.zeros(4, 2, dtype=F64)
BAD = {
    "numbers": (OptionError, lambda: Even("sobol"), "'sobol'", "'antithetic'"),
    "scale": (OptionError, lambda: LogSNR(scale=0.0), "got 0.0", "scale > 0"),
    "std": (OptionError, lambda: LogNormal(std=-1.0), "got -1.0", "std > 0"),
    "infinite log-SNR": (
        TimeError, lambda: LogSNR().draw(sd.RectifiedFlow(t_max=1.0), 3), "t_max = 1", r"LogSNR\(scale=...\)",
    ),
    "no mass": (TimeError, lambda: LogNormal(60.0, 0.1).draw(VP, 3), "mean=60.0", "give another mean"),
    "grid of one": (TimeError, lambda: Steps([0.5]), r"got \[0.5\]", "at least 2 times"),
    "grid back and forth": (TimeError, lambda: Steps([0.1, 0.5, 0.3]), "0.1, 0.5, 0.3", "all falling or all rising"),
    "grid of two dimensions": (TimeError, lambda: Levels(torch.zeros(3, 4)), "12 numbers", "in a row"),
    "grid outside": (TimeError, lambda: Steps([0.5, 2.0]).draw(VP, 3), "2", r"\[0, 1\]"),
    "levels outside": (TimeError, lambda: Levels([0.5, 2.0]).draw(VP, 3), "2", r"\[0, 1\]"),
    "not a step": (TimeError, lambda: Steps([0.2, 0.5]).weight(VP, torch.tensor([0.3])), "t = 0.3", "end of a step"),
    "not a level": (TimeError, lambda: Levels([0.2, 0.5]).weight(VP, torch.tensor([0.3])), "t = 0.3", "the levels"),
    "base": (OptionError, lambda: LossAware("even"), "'even'", r"Even\(\)"),
    "start of a fine grid": (
        TimeError, lambda: denoising(MODEL, X, weighting="vlb", times=Steps([0.5, 0.5 + 1e-8]), t=0.5), "t = 0.5",
        "not the end of a step",
    ),
    "bins of points": (
        OptionError, lambda: LossAware(Steps()).draw(sd.DiscreteVP(torch.full((1000,), 0.01)), 4), "999 times",
        "bins=111 or bins=999",
    ),
    "bins": (OptionError, lambda: LossAware(bins=0), "bins = 0", "bins, history >= 1"),
    "floor": (OptionError, lambda: LossAware(floor=0.0), "floor = 0.0", "0 < floor <= 1"),
    "steps": (CapabilityError, lambda: denoising(MODEL, X, weighting="vlb", times=Even()), "Even", r"Steps\(grid\)"),
    "law": (OptionError, lambda: denoising(MODEL, X, times="even"), "'even'", r"times.Even\(\)"),
    "fit": (OptionError, lambda: sd.fit(small(), X, times="even"), "'even'", r"times.Even\(\)"),
    "losses": (
        DivergenceError,
        lambda: LossAware().observe(VP, torch.tensor([0.2, 0.4]), torch.tensor([1.0, math.nan])),
        "t = 0.4, rows 1", "Lower the learning rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "act", "value", "remedy"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(kind, act, value, remedy):
    with pytest.raises(kind, match=value) as info:
        act()
    assert info.match(remedy)
