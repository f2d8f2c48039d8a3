"""Analytic-DPM: the estimate against closed forms and quadrature, its bounds, its interpolation, and what it gains."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import NAMED, Recording, TwoFunctions, moment_error, name, scalar_target
from hypothesis import assume, given
from hypothesis import strategies as st
from variances import ANISOTROPIC, anisotropic, beyond, design, divergences, exact_estimate, gaussian_ratio

import sdediff as sd
from sdediff.analytic import FORMS
from sdediff.testing import strategies
from sdediff.variance import ReverseSteps, variance_of

F64 = torch.float64
VP = sd.VP()


def close(found, expected, **options):
    torch.testing.assert_close(torch.as_tensor(found, dtype=F64), expected, **options)


# The estimate


@pytest.mark.parametrize("form", FORMS)
@given(sde=strategies.linear_sdes(), target=strategies.gaussian_targets(max_dim=3), data=st.data())
def test_on_gaussian_data_the_estimate_is_the_mean_over_the_spectrum(form, sde, target, data):
    times = data.draw(strategies.time_grids(sde, max_steps=5))
    found = exact_estimate(target, sde, times, form=form)
    at = target.model(sde).point(times)
    close(found.estimates, gaussian_ratio(target, at), rtol=1e-6, atol=1e-7)
    close(found.log_snr, 2 * (at.alpha / at.sigma).log(), rtol=1e-9, atol=1e-9)


def posterior_ratio(target, sde, t, reach=7.0, points=281):
    """w of planar data by quadrature of `1 - |sigma score|^2 / D` over x_t."""
    axis = torch.linspace(-reach, reach, points, dtype=F64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    epshat = target.model(sde).noise(t, x)
    density = target.marginal(sde, t).log_prob(x).exp() * (axis[1] - axis[0]) ** 2
    assert density.sum().item() == pytest.approx(1, abs=1e-9)
    return 1 - (density * (epshat**2).sum(1)).sum().item() / 2


@pytest.mark.parametrize("form", FORMS)
def test_on_a_mixture_it_is_the_mean_of_the_posterior_variance(form):
    """Within 4 standard errors of a quadrature at each of five times."""
    times = torch.tensor([0.9, 0.6, 0.4, 0.25, 0.15], dtype=F64)
    data = ANISOTROPIC.sample(20_000, seed=1)
    found = sd.AnalyticVariance.estimate(ANISOTROPIC.model(VP), data, times, form=form, seed=2)
    exact = torch.tensor([posterior_ratio(ANISOTROPIC, VP, t) for t in times], dtype=F64)
    z = (torch.tensor(found.estimates) - exact) / torch.tensor(found.stderr)
    assert z.abs().max() < 4
    assert (torch.tensor(found.stderr) < 0.02 * exact.sqrt()).all()
    assert found.clipped == ()


def test_both_forms_agree_for_the_exact_model_and_the_residual_is_right_for_any():
    data = torch.full((40_000, 1), 0.8, dtype=F64)
    times = torch.tensor([0.7, 0.3], dtype=F64)
    # a network that says 0 has the residual |eps|^2, and by the score form no residual is left of it either
    blank = sd.ScoreModel(lambda x, t: torch.zeros_like(x), VP, "noise")
    # one that says 0.6 eps (data and alpha known) leaves 0.16, not 1 - 0.36
    part = sd.ScoreModel(lambda x, t: 0.6 * (x - 0.8 * VP.alpha(t)[:, None]) / VP.sigma(t)[:, None], VP, "noise")
    for model, form, w in (
        (blank, "residual", 1),
        (blank, "score", 1),
        (part, "residual", 0.16),
        (part, "score", 0.64),
    ):
        found = sd.AnalyticVariance.estimate(model, data, times, form=form, seed=0)
        for estimate, error in zip(found.estimates, found.stderr, strict=True):
            assert abs(estimate - w) < 4 * error < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_what_noise_alone_contributes_is_removed_without_bias(form):
    """At both ends of time the standard error is a small part of the plain average's."""
    times = torch.tensor([1.0, 1e-4], dtype=F64)
    data = ANISOTROPIC.sample(2000, seed=0)
    found = sd.AnalyticVariance.estimate(ANISOTROPIC.model(VP), data, times, form=form, seed=0)
    plain = math.sqrt(2 / 2 / 2000)  # of |eps|^2 / D
    blind_end, sharp_end = found.stderr
    assert max(blind_end, sharp_end) < 0.1 * plain
    # with u = 0 and u = 1 the two published averages
    eps, epshat = torch.randn(2, 5, 3, dtype=F64)
    residual, score = ((eps - epshat) ** 2).mean(1), 1 - (epshat**2).mean(1)
    torch.testing.assert_close(FORMS["residual"](eps, epshat, 0.0), residual)
    torch.testing.assert_close(FORMS["score"](eps, epshat, 1.0), score)
    shift = (eps**2).mean(1) - 1
    torch.testing.assert_close(FORMS["residual"](eps, epshat, 0.3), residual - 0.3 * shift)
    torch.testing.assert_close(FORMS["score"](eps, epshat, 0.3), score + 0.7 * shift)


def test_standard_errors_are_honest():
    times = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    model = ANISOTROPIC.model(VP)
    runs = [sd.AnalyticVariance.estimate(model, ANISOTROPIC.sample(300, seed=k), times, seed=k) for k in range(60)]
    spread = torch.tensor([run.estimates for run in runs]).std(0)
    stated = torch.tensor([run.stderr for run in runs]).mean(0)
    assert ((spread / stated - 1).abs() < 4 / math.sqrt(2 * 59)).all()


def test_a_row_draws_the_same_noise_in_any_batch():
    data = ANISOTROPIC.sample(50, seed=0)
    model = ANISOTROPIC.model(VP)
    times = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    one, other = (sd.AnalyticVariance.estimate(model, data, times, seed=4, batch_size=size) for size in (7, 1024))
    torch.testing.assert_close(torch.tensor(one.estimates), torch.tensor(other.estimates), rtol=1e-13, atol=0)
    assert one != sd.AnalyticVariance.estimate(model, data, times, seed=5)
    assert other == sd.AnalyticVariance.estimate(model, data, times, seed=4)


def test_a_condition_is_cut_with_the_rows():
    labels = torch.arange(10.0, dtype=F64)
    data = labels[:, None].expand(10, 3).clone()

    def network(x, t, mean):
        return (x - VP.alpha(t)[:, None] * mean[:, None]) / VP.sigma(t)[:, None]

    found = sd.AnalyticVariance.estimate(
        sd.ScoreModel(network, VP), data, [0.9, 0.2], condition=labels, seed=0, batch_size=4
    )
    assert all(abs(w) < 4 * e < 1 for w, e in zip(found.estimates, found.stderr, strict=True))


def test_the_network_is_run_in_evaluation_mode_and_left_as_it_was():
    """Dropout would add to the error, and the buffers of a batch norm would move."""
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5)).double()
    seen = []
    model = sd.ScoreModel(Recording(network, seen), VP)
    sd.AnalyticVariance.estimate(model, ANISOTROPIC.sample(8, 0), [0.9, 0.2], seed=0)
    assert seen == [False, False]
    assert network.training
    assert network[1].training
    assert torch.equal(network[0].running_mean, torch.zeros(2, dtype=F64))


def test_states_of_any_shape_and_dtype_are_estimated_alike():
    target = sd.exact.Gaussian(torch.zeros(2, 3), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    found = sd.AnalyticVariance.estimate(target.model(VP), target.sample(4000, seed=0), seed=0)
    at = target.model(VP).point(torch.tensor(found.times, dtype=F64))
    z = (torch.tensor(found.estimates) - gaussian_ratio(target, at)) / torch.tensor(found.stderr)
    assert z[1:-1].abs().max() < 4
    assert len(found.times) == 65


# Bounds


def test_estimates_outside_the_bounds_are_held_there_and_reported():
    made = sd.AnalyticVariance((1.0, 0.5, 0.25, 0.1), (-4.0, -2.0, 0.0, 2.0), (-0.01, 0.2, 0.9, 1.02), (0.1,) * 4)
    assert made.ratio == (0.0, 0.2, 0.9, 1.0)
    assert made.clipped == (1.0, 0.1)
    assert "clipped at 2 (t = 1, 0.1)" in str(made) == repr(made)
    bounded = dataclasses.replace(made, bounds=(-1, 1))
    assert bounded.ratio == (0.0, math.exp(-2), 0.9, 1.0)
    assert bounded.clipped == (1.0, 0.5, 0.1)
    assert "data in [-1, 1]" in str(bounded)
    assert "clipped nowhere" in str(dataclasses.replace(made, estimates=(0.1, 0.2, 0.3, 0.4)))


@given(st.lists(st.floats(-0.2, 1.3), min_size=4, max_size=4), st.floats(0.1, 3), st.floats(-4, 2))
def test_between_the_times_the_bounds_hold_too(estimates, reach, log_snr):
    made = sd.AnalyticVariance((1.0, 0.5, 0.25, 0.1), (-4, -2, 0, 2), estimates, (0.1,) * 4, (-reach, reach))
    w = made.ratio_at(torch.tensor([log_snr], dtype=F64)).item()
    assert 0 <= w <= min(1, math.exp(log_snr) * reach**2) * (1 + 1e-12)
    assert made.data_variance(point_of(log_snr)).item() <= reach**2 * (1 + 1e-12)


def point_of(log_snr):
    model = scalar_target().model(VP)
    return model.point(VP.time(torch.tensor([log_snr], dtype=F64)))


def test_the_exact_variance_of_bounded_data_keeps_its_bound():
    """Data at -1 and 1 has variance 1 = ((b - a) / 2)^2 where nothing is seen of it."""
    target = sd.exact.GaussianMixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]], dtype=F64), [1e-8, 1e-8])
    data = torch.tensor([[-1.0], [1.0]], dtype=F64).repeat(500, 1)
    for seed in range(3):
        found = sd.AnalyticVariance.estimate(target.model(VP), data, bounds=(-1, 1), seed=seed)
        variance = found.data_variance(target.model(VP).point(torch.tensor(found.times, dtype=F64)))
        assert (variance <= 1 + 1e-12).all()
        assert variance[0] > 0.9
        assert (variance.diff() < 0.1).all()


# Between its times


def test_on_its_own_times_it_says_what_was_estimated():
    found = sd.AnalyticVariance.estimate(ANISOTROPIC.model(VP), ANISOTROPIC.sample(200, 0), seed=0)
    at = ANISOTROPIC.model(VP).point(torch.tensor(found.times, dtype=F64))
    close(
        found.ratio_at(torch.tensor(found.log_snr, dtype=F64)), torch.tensor(found.ratio, dtype=F64), rtol=0, atol=1e-11
    )
    close(
        found.data_variance(at) * (at.alpha / at.sigma) ** 2, torch.tensor(found.ratio, dtype=F64), rtol=0, atol=1e-11
    )


@given(sde=strategies.linear_sdes(), other=strategies.linear_sdes(), part=st.floats(0, 1), variance=st.floats(0.05, 4))
def test_isotropic_gaussian_data_is_known_everywhere_and_for_every_process(sde, other, part, variance):
    """logit w is a straight line in log SNR, and w depends on the SNR only."""
    target = sd.exact.Gaussian(torch.zeros(1, dtype=F64), variance)
    ends = [max(s.log_snr(torch.tensor(0.99 * s.t_max, dtype=F64)).item() for s in (sde, other)),
            min(s.log_snr(torch.tensor(s.t_min + 0.01 * s.t_max, dtype=F64)).item() for s in (sde, other))]  # fmt: skip
    assume(ends[1] - ends[0] > 0.5)
    levels = torch.linspace(*ends, 5, dtype=F64)
    found = exact_estimate(target, sde, sde.time(levels))
    t = other.time(torch.tensor([ends[0] + part * (ends[1] - ends[0])], dtype=F64))
    at = target.model(other).point(t)
    exact = variance * at.sigma**2 / (at.alpha**2 * variance + at.sigma**2)
    torch.testing.assert_close(found.data_variance(at), exact, rtol=1e-5, atol=1e-9)


def test_a_table_of_65_times_is_dense_enough():
    """Anisotropic Gaussian data: between the default times w is right to a thousandth."""
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([1e-3, 1.0], dtype=F64))
    grid = sd.grids.log_snr(VP, 64)
    found = exact_estimate(target, VP, grid)
    at = target.model(VP).point(sd.grids.log_snr(VP, 999))
    exact = gaussian_ratio(target, at)
    torch.testing.assert_close(found.ratio_at(2 * (at.alpha / at.sigma).log()), exact, rtol=1e-3, atol=0)


# Sampling


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
@pytest.mark.parametrize("solver", [sd.DDPM, lambda v: sd.DDIM(0.0, v), lambda v: sd.DDIM(0.5, v)])
@pytest.mark.parametrize("steps", [1, 4])
def test_sampled_moments_are_exact_on_gaussian_data(sde, solver, steps):
    linear = sd.as_linear(sde)
    known = exact_estimate(scalar_target(), linear, sd.grids.natural(linear, 7))
    assert moment_error(solver(known), sde, sd.grids.natural(linear, steps), steps) < 1e-6


def test_the_mean_over_axes_is_right_where_each_axis_is_not():
    """Anisotropic Gaussian data: one step from noise has the right total variance about its mean."""
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.04, 1.0], dtype=F64))
    times = torch.tensor([0.8, 0.3], dtype=F64)
    known = exact_estimate(target, VP, times)
    steps = ReverseSteps.of(target.model(VP).point(times))
    axes = [
        exact_estimate(sd.exact.Gaussian(torch.zeros(1, dtype=F64), c), VP, times).table(steps) for c in (0.04, 1.0)
    ]
    torch.testing.assert_close(known.table(steps), (axes[0] + axes[1]) / 2)
    assert axes[1] > 1.2 * axes[0]


def test_its_tables_are_kept_and_it_survives_json():
    from sdediff import tables

    found = sd.AnalyticVariance.estimate(
        scalar_target().model(VP), scalar_target().sample(50, 0), seed=0, bounds=(-9, 9)
    )
    again = sd.AnalyticVariance(**json.loads(json.dumps(dataclasses.asdict(found))))
    assert again == found
    assert hash(again) == hash(found)
    assert sd.DDPM(found).fixed
    model = scalar_target().model(VP)
    before = tables._kept_rows.cache_info().misses
    draws = [sd.sample(model, (3, 1), solver=sd.DDPM(v), steps=5, seed=0).x for v in (found, again)]
    assert tables._kept_rows.cache_info().misses == before + 1
    assert torch.equal(*draws)


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_a_float32_grid_of_the_whole_span_is_within_its_reach(sde):
    known = sd.AnalyticVariance.estimate(scalar_target().model(sde), scalar_target().sample(50, 0), seed=0)
    grid = torch.linspace(sde.t_max, sde.t_min, 9)
    assert sd.sample(scalar_target().model(sde), (3, 1), solver=sd.DDPM(known), times=grid, seed=0).x.isfinite().all()
    held = known.ratio_at(torch.tensor([known.log_snr[-1] + 0.009, known.log_snr[-1]], dtype=F64))
    assert held[0] == held[1]
    with pytest.raises(sd.TimeError, match="as far as the grid"):
        known.ratio_at(torch.tensor([known.log_snr[0] - 0.011], dtype=F64))


FLOW = sd.RectifiedFlow(t_max=1.0)


def test_where_alpha_is_zero_the_variance_is_that_of_the_data():
    """The step from noise is exact on Gaussian data; the default times stop where the next would be."""
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), 0.3)
    data, noise = design(target)
    model = sd.ScoreModel(lambda x, t: target.model(FLOW).view("flow", t, x), FLOW, "flow")
    inside = sd.AnalyticVariance.estimate(model, data, noise=noise(65))
    assert inside.times[0] == pytest.approx(1 - 1e-3 * (1 - FLOW.t_min), abs=1e-12)
    close(torch.tensor(inside.log_snr, dtype=F64).diff().diff(), torch.zeros(63, dtype=F64), rtol=0, atol=1e-9)
    assert inside.spread == pytest.approx(0.3)
    times = torch.tensor([1.0, 0.6, 0.2], dtype=F64)
    steps = ReverseSteps.of(model.point(times))
    at = steps.at[1:]
    exact = target.variances[0] * at.alpha[0] ** 2 + at.sigma[0] ** 2
    torch.testing.assert_close(inside.table(steps)[0], exact)
    close(inside.data_variance(model.point(times[:1])), torch.tensor([0.3], dtype=F64))
    for n in (3, 100):
        assert sd.sample(model, (2, 2), solver=sd.DDPM(inside), steps=n, seed=0).x.isfinite().all()
    again = sd.AnalyticVariance(**json.loads(json.dumps(dataclasses.asdict(inside))))
    assert again == inside
    assert hash(again) == hash(inside)
    with pytest.raises(sd.TimeError, match="is asked at -inf"):
        dataclasses.replace(inside, spread=None).data_variance(model.point(times))


# What it gains


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize(("scale", "grid"), [(1.0, sd.grids.uniform), (0.5, sd.grids.log_snr)], ids=["even", "log SNR"])
def test_it_lowers_the_negative_elbo_and_the_sample_error_against_both_fixed_choices(steps, scale, grid):
    """On anisotropic mixtures, each by more than 3 standard errors (means over data, and over seeds)."""
    target, times = anisotropic(scale), grid(VP, steps)
    model = target.model(VP)
    known = sd.AnalyticVariance.estimate(model, target.sample(4000, seed=1), times, seed=0)
    x = target.sample(2000, seed=2)
    bound = divergences(model, x, times, known, seed=3)

    def errors(solver):
        pairs = [
            (sd.sample(model, (1000, 2), solver=solver, times=times, seed=k).x, target.sample(1000, 100 + k))
            for k in range(6)
        ]
        return torch.tensor([sd.metrics.sliced_wasserstein(*pair, directions=64) for pair in pairs])

    error = errors(sd.DDPM(known))
    for fixed in ("posterior", "beta"):
        assert beyond(divergences(model, x, times, variance_of(fixed, ""), seed=3) - bound) > 3
        assert beyond(errors(sd.DDPM(fixed)) - error) > 3


def test_no_isotropic_variance_has_a_higher_bound():
    """The mean of the divergences over the data of the estimate is least at V: exactly, with the design's moments."""
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.2, 1.5], dtype=F64))
    data, noise = design(target)
    times = torch.tensor([0.9, 0.4], dtype=F64)
    known = exact_estimate(target, VP, times)
    model, eps = target.model(VP), noise(1).numbers[0]
    steps = ReverseSteps.of(model.point(times))
    at = steps.at
    post = (data - model.denoised(times[0], at.alpha[0] * data + at.sigma[0] * eps)).square().sum(1).mean()
    post = post * ((at.alpha / at.sigma) ** 2).diff().item() / 2
    variance = known.table(steps).clone().requires_grad_()
    rho = steps.nu**2 / variance
    (rho * post + rho - 1 - rho.log()).sum().backward()
    assert abs(variance.grad.item() * variance.item()) < 1e-9


# Bad input


def table(**changes):
    numbers = {"times": (0.9, 0.1), "log_snr": (-1.0, 1.0), "estimates": (0.5, 0.5), "stderr": (0.1, 0.1)}
    return sd.AnalyticVariance(**numbers | changes)


def estimate(data=None, times=None, **options):
    data = scalar_target().sample(4, 0) if data is None else data
    return sd.AnalyticVariance.estimate(scalar_target().model(VP), data, times, seed=0, **options)


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (sd.OptionError, lambda: estimate(form="mean"), "Unknown form 'mean': write 'residual' or 'score'"),
        (sd.OptionError, lambda: estimate(form=["score"]), r"Unknown form \['score'\]"),
        (sd.OptionError, lambda: estimate(noise=sd.RowNoise(1)), "Give either seed=... or noise=..., not both"),
        (
            sd.OptionError,
            lambda: sd.AnalyticVariance.estimate(lambda x, t: x, torch.zeros(2, 1)),
            "An estimate needs a ScoreModel; got function",
        ),
        (sd.OptionError, lambda: estimate(bounds=1), r"bounds are \(a, b\) with a < b; got 1"),
        (sd.OptionError, lambda: table(estimates=(math.nan, 0.5)), "must be finite; got .*nan"),
        (sd.OptionError, lambda: table(stderr=(0.1, math.inf)), "must be finite; got .*inf"),
        (sd.OptionError, lambda: table(log_snr=(-math.inf, 0.5)), "must be finite; got .*inf"),
        (sd.OptionError, lambda: table(spread=math.nan), "must be finite; got .*nan"),
        (sd.OptionError, lambda: table(form="nonsense"), "Unknown form 'nonsense': write 'residual' or 'score'"),
        (sd.OptionError, lambda: estimate(batch_size=0), "batch_size must be at least 1; got 0"),
        (sd.OptionError, lambda: estimate(bounds=(1, -1)), r"bounds are \(a, b\) with a < b; got \(1, -1\)"),
        (sd.OptionError, lambda: estimate(bounds=(0, 0.1)), r"outside bounds = \(0, 0\.1\): give bounds that hold it"),
        (sd.OptionError, lambda: estimate(torch.tensor([[0.0], [math.nan]])), "NaN or infinite entries; leave those"),
        (sd.ShapeError, lambda: estimate(torch.zeros(1, 1)), r"at least two rows of data; got shape \(1, 1\)"),
        (sd.ShapeError, lambda: estimate(torch.zeros(3, 1).long()), r"Write data\.float\(\)"),
        (sd.ShapeError, lambda: estimate(torch.zeros(3, 2)), r"x must have shape \(batch, 1\); got \(3, 2\)"),
        (sd.TimeError, lambda: estimate(times=[0.1, 0.5]), "strictly decreasing"),
        (sd.TimeError, lambda: estimate(times=[0.5]), "at least two times"),
        (sd.TimeError, lambda: estimate(times=[1.5, 0.5]), r"times = 1\.5 lies outside the span"),
        (sd.TimeError, lambda: estimate(times=[0.5, 0.0]), "alpha and sigma are positive; got t = 0"),
        (
            sd.TimeError,
            lambda: sd.sample(scalar_target().model(VP), (2, 1), solver=sd.DDPM(estimate(times=[0.9, 0.1])), steps=3),
            r"\(t = 0\.9 to 0\.1\) and is asked at .*: estimate it with times= that reach as far as the grid",
        ),
        (sd.ShapeError, lambda: sd.AnalyticVariance((1.0,), (0.0,), (0.5,), (0.1,)), "at least two; got 1, 1, 1 and 1"),
        (sd.ShapeError, lambda: sd.AnalyticVariance((1, 2), (0, 1), (0.5,), (0.1, 0.1)), "got 2, 2, 1 and 2"),
        (sd.OptionError, lambda: sd.AnalyticVariance((1, 2), (1, 0), (0.5, 0.5), (0.1, 0.1)), "must rise strictly"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(error, make, message):
    with pytest.raises(error, match=message):
        make()


def test_a_model_that_is_not_finite_is_named_with_its_time_and_rows():
    def network(x, t):
        return torch.where((t[:, None] < 0.5) & (x > 0.75), torch.nan, x)

    data = torch.tensor([[0.0], [0.9], [0.0], [0.9]], dtype=F64)
    quiet = sd.Recorded(torch.zeros(2, 4, 1, dtype=F64))
    with pytest.raises(sd.DivergenceError, match=r"at t = 0\.1, rows 1, 3"):
        sd.AnalyticVariance.estimate(sd.ScoreModel(network, VP), data, [0.9, 0.1], noise=quiet)
