"""What `log_prob` gives beside the value: error bars, gradients, priors, transforms, comparisons."""

import math

import pytest
import torch
from scipy.special import stdtrit
from test_density import gaussian, low_rank, normal, wrapped
from torch.distributions import MultivariateNormal, kl_divergence, transforms

import sdediff as sd
from sdediff.divergence import Exact, Hutchinson

F64 = torch.float64
VP = sd.VP(t_min=1e-3)
ROWS = 1500
BINOMIAL = 2.6 * (0.95 * 0.05 / ROWS) ** 0.5  # of a share of rows, at 99 %


# Error bars


@pytest.fixture(scope="module")
def spread():
    """Rows of a 32-dimensional Gaussian, and their values on two grids with the exact divergence."""
    target = gaussian(32)
    model, x = target.model(VP), target.sample(ROWS, seed=1)
    own = {"steps": 20, "tail": "none"}
    solver = {"steps": 10, "tail": "none", "solver": sd.RungeKutta("rk4")}
    runs = [(own, sd.log_prob(model, x, **own).value)]
    few = x[:600]
    return model, x, runs, (solver, few, sd.log_prob(model, few, **solver).value)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_error_bars_of_fresh_probes_are_honest(spread, distribution):
    """Unbiased; 95 % of rows within 2 standard errors, to 2 % and the binomial uncertainty of 1500 rows (1.5 %); the
    variance falls as 1 / k, and with orthogonal probes as (1 - k / 32) / k."""
    model, x, [(options, exact)], _ = spread
    reduced = []
    for k in (2, 4, 8, 16):
        result = sd.log_prob(model, x, divergence=Hutchinson(k, distribution), seed=2, **options)
        off = result.value - exact
        assert abs(off.mean()) < 4 * off.std() / ROWS**0.5
        inside = (off.abs() <= 2 * result.stderr).double().mean()
        assert inside.item() == pytest.approx(0.95, abs=0.02 + BINOMIAL)
        part = 1 - k / 32 if distribution == "orthogonal" else 1.0
        reduced.append((off.var() * k / part).item())
        assert result.estimates.shape == (k, ROWS)
        torch.testing.assert_close(result.estimates.mean(0), result.value)
    assert result.stderr.square().mean().item() == pytest.approx(off.var().item(), rel=0.15)
    for part in reduced:
        assert part == pytest.approx(sum(reduced) / 4, rel=4.5 * (2 / ROWS) ** 0.5 + 0.03)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_error_bars_with_a_solver_are_honest(spread, distribution):
    """As above with 600 rows (2.3 %) and probes fixed for the whole solve."""
    model, _, _, (options, x, exact) = spread
    reduced = []
    for k in (2, 8):
        result = sd.log_prob(model, x, divergence=Hutchinson(k, distribution), seed=2, **options)
        off = result.value - exact
        assert abs(off.mean()) < 4 * off.std() / 600**0.5
        inside = (off.abs() <= 2 * result.stderr).double().mean()
        assert inside.item() == pytest.approx(0.95, abs=0.02 + 2.6 * (0.95 * 0.05 / 600) ** 0.5)
        reduced.append((off.var() * k).item())
        bar = result.estimates.std(0) / k**0.5 * stdtrit(k - 1, 0.975) / 2
        torch.testing.assert_close(result.stderr, bar)
        assert result.error.isnan().all()
        assert result.row_nfe is None
    assert reduced[0] == pytest.approx(reduced[1], rel=0.25)


def test_error_bars_of_adaptive_steps_are_honest(spread):
    model, x, _, _ = spread
    x = x[:400]
    result = sd.log_prob(model, x, atol_nats=1e-2, divergence=Hutchinson(4), seed=3, tail="none")
    off = result.value - sd.log_prob(model, x, atol_nats=1e-2, tail="none").value
    assert abs(off.mean()) < 4 * off.std() / 400**0.5
    assert (off.abs() <= 2 * result.stderr).double().mean().item() == pytest.approx(0.95, abs=0.02 + 0.029)
    ratio = result.stderr.square().mean().item() / off.var().item()
    assert 0.9 < ratio < 1.6  # Student's factor squared is 1.3 at 8 degrees of freedom


# Differences


def test_differences_with_common_probes_are_sharp_and_honest():
    one, other = gaussian(32), gaussian(32)
    other = sd.exact.Gaussian(other.mean + 0.02, 1.05 * other.cov)
    x = one.sample(800, seed=1)
    options = {"steps": 16, "seed": 4, "tail": "none"}
    exact = [sd.log_prob(t.model(VP), x, divergence="exact", **options) for t in (one, other)]
    probed = [sd.log_prob(t.model(VP), x, divergence=Hutchinson(6), **options) for t in (one, other)]
    value, stderr = probed[0].minus(probed[1])
    torch.testing.assert_close(value, probed[0].value - probed[1].value)
    assert stderr.mean() < 0.3 * min(p.stderr.mean() for p in probed)
    off = value - (exact[0].value - exact[1].value)
    assert abs(off.mean()) < 4 * off.std() / 800**0.5
    inside = (off.abs() <= 2 * stderr).double().mean().item()
    assert inside == pytest.approx(0.95, abs=0.02 + 2.6 * (0.95 * 0.05 / 800) ** 0.5)
    value, stderr = exact[0].minus(exact[1])
    assert torch.equal(value, exact[0].value - exact[1].value)
    assert not stderr.any()


def test_differences_need_the_same_seed_and_divergence():
    model, x = gaussian(5).model(VP), normal(2, 5)
    run = lambda **options: sd.log_prob(model, x, steps=4, **{"divergence": Hutchinson(2), "seed": 1, **options})  # noqa: E731
    with pytest.raises(sd.OptionError, match="same seed; got 1 and 2"):
        run().minus(run(seed=2))
    with pytest.raises(sd.OptionError, match="same divergence"):
        run().minus(run(divergence=Hutchinson(3)))
    value, stderr = run().minus(run())
    assert not value.any()
    assert not stderr.any()


# Gradients


@pytest.mark.parametrize("options", [{}, {"steps": 8}, {"solver": sd.Heun(), "steps": 8}], ids=str)
def test_the_gradient_of_the_value_is_the_score_of_the_data(options):
    target = gaussian(5)
    x = target.sample(4, seed=1).requires_grad_()
    sd.log_prob(target.model(VP), x, t_min=0.02, **options).value.sum().backward()
    score = -torch.linalg.solve(target.cov, (x.detach() - target.mean).T).T
    torch.testing.assert_close(x.grad, score, rtol=1e-7, atol=1e-7)


def test_the_gradient_at_a_state_is_the_score_of_the_state_and_chunks_have_theirs():
    target = gaussian(5)
    x = target.sample(5, seed=1).requires_grad_()
    weights = torch.arange(1.0, 6.0, dtype=F64)
    (weights * sd.log_prob(target.model(VP), x, batch_size=2, steps=4).value).sum().backward()
    score = -torch.linalg.solve(target.cov, (x.detach() - target.mean).T).T
    torch.testing.assert_close(x.grad, weights[:, None] * score, rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        assert not sd.log_prob(target.model(VP), x, steps=4).value.requires_grad


def test_the_gradient_at_a_state_is_the_score_of_the_state():
    target = gaussian(5)
    moved = target.marginal(VP, 0.05)
    x = moved.sample(4, seed=1).requires_grad_()
    sd.log_prob(target.model(VP), x, t_min=0.05, tail="none", steps=8).value.sum().backward()
    score = -torch.linalg.solve(moved.cov, (x.detach() - moved.mean).T).T
    torch.testing.assert_close(x.grad, score, rtol=1e-7, atol=1e-7)


def test_the_whole_solve_is_differentiated_in_closed_form_for_gaussians():
    target = gaussian(4)
    x = target.sample(3, seed=1).requires_grad_()
    prior = target.marginal(VP, 1.0)
    for options in ({"steps": 40}, {"atol_nats": 1e-4}):
        result = sd.log_prob(target.model(VP), x, prior=prior, differentiable=True, **options)
        (slope,) = torch.autograd.grad(result.value.sum(), x)
        score = -torch.linalg.solve(target.cov, (x.detach() - target.mean).T).T
        torch.testing.assert_close(slope, score, rtol=0, atol=5e-3)


@pytest.mark.parametrize("divergence", [Exact(), Exact(mode="forward"), Hutchinson(2)], ids=repr)
@pytest.mark.parametrize("tail", ["gaussian", "none"])
def test_gradients_through_the_solve_are_finite_differences(divergence, tail):
    """Of x, a parameter and the condition, on a fixed grid."""
    gain = torch.tensor(0.7, dtype=F64, requires_grad=True)
    A = normal(3, 3, seed=5) / 3

    def network(x, t, shift):
        return (gain * (x @ A.T + shift)).tanh() + t[:, None] * x

    model, x, shift = sd.ScoreModel(network, VP, "v"), normal(4, 3), normal(4, 3, seed=1)
    x.requires_grad_()
    shift.requires_grad_()

    def total(**options):
        return sd.log_prob(
            model, x, steps=12, divergence=divergence, tail=tail, seed=1, condition=shift, t_min=0.02, **options
        ).value.sum()

    slopes = torch.autograd.grad(total(differentiable=True), (x, gain, shift))
    with torch.no_grad():
        for of, slope in zip((x, gain, shift), slopes, strict=True):
            direction = torch.randn(of.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
            values = []
            for h in (1e-5, -1e-5):
                of += h * direction
                values.append(total().item())
                of -= h * direction
            assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_solvers_are_not_differentiated():
    with pytest.raises(sd.CapabilityError, match="differentiable=True needs the default method"):
        sd.log_prob(gaussian(2).model(VP), normal(2, 2), solver=sd.Heun(), differentiable=True)


# The noise end


def test_matched_priors_have_the_moments_of_the_noised_data():
    data = gaussian(3).sample(500, seed=1).reshape(500, 3, 1)
    alpha, sigma = VP.scales(torch.tensor(1.0, dtype=F64))
    flat = data.flatten(1)
    full = sd.matched_prior(VP, data)
    torch.testing.assert_close(full.mean, alpha * data.mean(0))
    torch.testing.assert_close(full.cov, alpha**2 * flat.T.cov() + sigma**2 * torch.eye(3, dtype=F64))
    diagonal = sd.matched_prior(VP, data, covariance="diagonal")
    torch.testing.assert_close(diagonal.mean, full.mean)
    torch.testing.assert_close(diagonal.cov, torch.diag(alpha**2 * flat.var(0) + sigma**2))
    for sde in (sd.EDM(), sd.RectifiedFlow()):
        matched, (alpha, sigma) = sd.matched_prior(sde, data), sde.scales(torch.tensor(sde.t_max, dtype=F64))
        torch.testing.assert_close(matched.cov, alpha**2 * flat.T.cov() + sigma**2 * torch.eye(3, dtype=F64))
    with pytest.raises(sd.OptionError, match="Unknown covariance 'low': write 'full' or 'diagonal'"):
        sd.matched_prior(VP, data, covariance="low")
    with pytest.raises(sd.ShapeError, match="at least two rows"):
        sd.matched_prior(VP, data[:1])


def normals_of(target):
    return MultivariateNormal(target.mean.flatten(), target.cov)


def test_a_matched_prior_takes_off_the_bias_of_the_own_prior():
    """Data of mean 1 under a process that does not forget it: the bias is minus the KL divergence of p_T from the
    prior, 0.146 nats."""
    sde = sd.VP(beta_max=5.0, t_min=1e-3)
    target = sd.exact.Gaussian(torch.ones(3, dtype=F64), 0.25)
    x, model = target.sample(4000, seed=1), target.model(sde)
    bias = [
        (sd.log_prob(model, x, prior=prior, steps=20).value - target.log_prob(x)).mean().item()
        for prior in (None, sd.matched_prior(sde, target.sample(4000, seed=2)), target.marginal(sde, 1.0))
    ]
    own = MultivariateNormal(torch.zeros(3, dtype=F64), sde.sigma(1.0) ** 2 * torch.eye(3, dtype=F64))
    divergence = kl_divergence(normals_of(target.marginal(sde, 1.0)), own).item()
    assert divergence == pytest.approx(0.13, abs=0.03)
    assert bias[0] == pytest.approx(-divergence, abs=0.02)  # 1.9 standard errors of the mean over 4000 rows
    assert abs(bias[1]) < 5e-3
    assert abs(bias[2]) < 1e-3


@pytest.mark.parametrize("which", ["own", "full", "diagonal"])
@pytest.mark.parametrize("sde", [sd.VP(beta_max=5.0), sd.RectifiedFlow(), sd.EDM(sigma_max=5.0)], ids=repr)
def test_the_prior_gap_is_the_divergence_of_the_kernel_from_any_gaussian_prior(which, sde):
    target = gaussian(3)
    x = target.sample(5, seed=1)
    (alpha, sigma), eye = sde.scales(torch.tensor(sde.t_max, dtype=F64)), torch.eye(3, dtype=F64)
    prior = None if which == "own" else sd.matched_prior(sde, target.sample(50, seed=2), covariance=which)
    gap = sd.log_prob(target.model(sde), x, prior=prior, steps=2).prior_gap
    reference = MultivariateNormal(torch.zeros(3, dtype=F64), sigma**2 * eye) if prior is None else normals_of(prior)
    torch.testing.assert_close(gap, kl_divergence(MultivariateNormal(alpha * x, sigma**2 * eye), reference))


# As a distribution of torch


def test_a_model_as_a_distribution():
    target = sd.exact.Gaussian(torch.zeros(2, 3, dtype=F64), 0.3)
    p = sd.as_distribution(
        target.model(VP), (2, 3), sample_options={"steps": 8}, log_prob_options={"steps": 40, "seed": 0}
    )
    assert isinstance(p, torch.distributions.Distribution)
    assert (p.event_shape, p.batch_shape) == (torch.Size([2, 3]), torch.Size())
    for shape in ((), (3,), (2, 3), torch.Size([1, 4])):
        drawn = p.sample(shape)
        assert drawn.shape == (*shape, 2, 3)
        value = p.log_prob(drawn)
        assert value.shape == tuple(shape)
        exact = target.log_prob(drawn.double().reshape(-1, 2, 3)).reshape(shape)
        torch.testing.assert_close(value, exact, rtol=0, atol=2e-2)
    assert p.support.event_dim == 2
    assert p.sample((2,)).dtype == F64
    torch.manual_seed(0)
    first = p.sample((2,))
    torch.manual_seed(0)
    assert torch.equal(first, p.sample((2,)))
    assert not torch.equal(first, p.sample((2,)))
    with pytest.raises(sd.ShapeError, match=r"value must have shape \(..., 2, 3\); got \(4, 3\)"):
        p.log_prob(torch.zeros(4, 3, dtype=F64))
    with pytest.raises(sd.OptionError, match="must be a ScoreModel; got int"):
        sd.as_distribution(3, (2,))
    scalar = sd.as_distribution(sd.exact.Gaussian(torch.zeros((), dtype=F64), 1.0).model(VP), ())
    assert scalar.sample().shape == scalar.log_prob(torch.zeros((), dtype=F64)).shape == ()
    assert scalar.log_prob(scalar.sample((5,))).shape == (5,)


# Transforms


@pytest.mark.parametrize(
    "transform",
    [
        transforms.AffineTransform(0.3, 2.0),
        transforms.AffineTransform(torch.zeros(3, dtype=F64), torch.tensor([0.5, -2.0, 3.0], dtype=F64), event_dim=1),
        transforms.SigmoidTransform().inv,
        transforms.ComposeTransform([transforms.SigmoidTransform().inv, transforms.AffineTransform(0.3, 2.0)]),
    ],
    ids=["affine", "affine of events", "logit", "composed"],
)
def test_a_transform_is_a_change_of_variables(transform):
    """Data u with T(u) Gaussian has the density that torch gives it; its gradient too."""
    target = gaussian(3)
    u = transform.inv(target.sample(5, seed=1)).detach().requires_grad_()
    transformed = torch.distributions.TransformedDistribution(normals_of(target), [transform.inv], validate_args=False)
    exact = transformed.log_prob(u)
    result = sd.log_prob(target.model(VP), u, prior=target.marginal(VP, 1.0), transform=transform)
    torch.testing.assert_close(result.value, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.estimates.mean(0), result.value.detach(), rtol=0, atol=1e-12)
    assert result.settings["transform"] == repr(transform)
    (slope,) = torch.autograd.grad(result.value.sum(), u)
    (wanted,) = torch.autograd.grad(transformed.log_prob(u).sum(), u)
    torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-6)


# What is said of it


def test_settings_tell_how_the_value_came_about():
    model, x = gaussian(5).model(VP), normal(2, 5)
    result = sd.log_prob(model, x)
    settings = result.settings
    assert settings["method"] == "exponential Adams, steps for every row, atol_nats=0.001"
    assert settings["divergence"].startswith("Exact(")
    assert settings["divergence"].endswith("of 5 entries")
    assert (settings["t_min"], settings["t_max"]) == (1e-3, 1.0)
    assert (settings["tail"], settings["prior"], settings["seed"]) == ("gaussian", "the SDE's own", None)
    assert settings["transform"] is None
    assert not result.stderr.any()
    assert result.estimates.shape == (1, 2)
    probed = sd.log_prob(model, x, steps=7, divergence=Hutchinson(2), seed=11, prior=gaussian(5), t_min=0.01).settings
    assert probed["method"] == "exponential Adams, 7 steps"
    assert probed["divergence"] == "Hutchinson(2, 'rademacher') of 5 entries"
    assert (probed["seed"], probed["prior"], probed["t_min"]) == (11, "Gaussian", 0.01)
    fresh = sd.log_prob(model, x, steps=2, divergence=Hutchinson(2)).settings["seed"]
    again = sd.log_prob(model, x, steps=2, divergence=Hutchinson(2)).settings["seed"]
    assert fresh != again
    solver = sd.log_prob(model, x, steps=4, solver=sd.Heun(), tail="none").settings
    assert solver["method"] == f"{sd.Heun()!r}, path and divergence together"
    assert solver["tail"] == "none"


def test_large_events_take_orthogonal_probes():
    target = sd.exact.Gaussian(torch.zeros(129, dtype=F64), 0.3)
    result = sd.log_prob(target.model(VP), target.sample(2, seed=0), steps=10, seed=0)
    assert result.settings["divergence"] == "Hutchinson(8, 'orthogonal') of 129 entries"
    assert result.estimates.shape == (8, 2)


def test_a_grid_of_ones_own_and_even_steps_in_the_variable_of_the_method():
    target = gaussian(2)
    x = target.sample(3, seed=0)
    times = sd.grids.tapered(VP, 30, t_min=1e-3).flip(0)
    result = sd.log_prob(target.model(VP), x, times=times, prior=target.marginal(VP, 1.0))
    assert (result.value - target.log_prob(x)).abs().max() < 1e-3
    assert torch.equal(result.row_nfe, torch.full((3,), 32))  # one at the data
    assert torch.equal(sd.log_prob(target.model(VP), x, steps=30).row_nfe, torch.full((3,), 32))
    with pytest.raises(sd.OptionError, match="steps must be at least 1; got 0"):
        sd.log_prob(target.model(VP), x, steps=0)


class Cubic(sd.SDE):
    t_min, t_max = 1e-3, 1.0

    def drift(self, t, x):
        return -(x**3)

    def diffusion(self, t, x):
        return 2**0.5


def test_processes_that_are_not_linear_go_by_a_solver():
    class Quartic:
        def log_prob(self, x):
            return -(x**4).sum(1) / 4

    model = sd.ScoreModel(lambda x, t: -(x**3) + 0.0 * x, Cubic(), "score")
    x = torch.tensor([[0.5, 0.1], [-1.0, 0.3]], dtype=F64)
    result = sd.log_prob(model, x, prior=Quartic())
    torch.testing.assert_close(result.value, Quartic().log_prob(x), rtol=0, atol=1e-5)
    assert result.tail_gap.isnan().all()
    assert result.prior_gap.isnan().all()
    assert result.settings["tail"] == "none"
    assert "AdaptiveRungeKutta" in result.settings["method"]
    with pytest.raises(sd.CapabilityError):
        sd.log_prob(model, x, prior=Quartic(), tail="gaussian")
    with pytest.raises(sd.CapabilityError):
        sd.log_prob(model, x)


def test_nonlinear_flows_have_their_divergence():
    """`dx/dt = -x^3 - x/2 * 2` with the score of a unit normal: F = -x^3 + x, solved by an independent integrator."""
    from scipy.integrate import solve_ivp

    model = sd.ScoreModel(lambda x, t: -x, Cubic(), "score")
    prior = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 1.0)
    x = torch.tensor([[0.5], [-1.3]], dtype=F64)
    result = sd.log_prob(model, x, prior=prior, solver=sd.AdaptiveRungeKutta(rtol=1e-8, atol=1e-8))
    for row in range(2):
        solved = solve_ivp(
            lambda t, y: [-(y[0] ** 3) + y[0], -3 * y[0] ** 2 + 1],
            (1e-3, 1.0),
            [x[row].item(), 0.0],
            rtol=1e-10,
            atol=1e-12,
        )
        end, integral = solved.y[:, -1]
        exact = -(end**2) / 2 - math.log(2 * math.pi) / 2 + integral
        assert result.value[row].item() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"atol_nats": 0.0}, sd.OptionError, "atol_nats must be positive; got 0.0"),
        ({"max_nfe": 0}, sd.OptionError, "max_nfe must be at least 1"),
        ({"tail": "sharp"}, sd.OptionError, "Unknown tail 'sharp': write 'gaussian' or 'none'"),
        ({"divergence": 3}, sd.OptionError, "Unknown divergence 3"),
        ({"solver": sd.EulerMaruyama()}, sd.CapabilityError, "adds noise"),
    ],
)
def test_bad_arguments_get_a_sentence(options, error, sentence):
    with pytest.raises(error, match=sentence):
        sd.log_prob(gaussian(2).model(VP), normal(2, 2), **options)


def test_no_rows_are_refused():
    with pytest.raises(sd.ShapeError, match="at least one row"):
        sd.log_prob(gaussian(2).model(VP), torch.zeros(0, 2, dtype=F64))


def test_low_rank_data_under_edm_networks_of_their_own_deviation():
    """sigma_data is the deviation of the frame, which the value must not feel."""
    target = low_rank(5)
    x = target.sample(8, seed=1)
    for deviation in (0.3, 1.7):
        model = wrapped(target, VP, "edm", deviation)
        result = sd.log_prob(model, x, prior=target.marginal(VP, 1.0), t_min=1e-5)
        assert (result.value - target.log_prob(x)).abs().max() < 2e-3


# From a review


def test_gradients_are_finite_where_eigenvalues_are_equal():
    """K is a multiple of the identity; and with a parameter against finite differences, in a frame that mixes axes."""
    round_ = sd.exact.Gaussian(torch.zeros(4, dtype=F64), 0.25)
    x = round_.sample(3, seed=0).requires_grad_()
    value = sd.log_prob(round_.model(VP), x, prior=round_.marginal(VP, 1.0), steps=60, differentiable=True).value
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, -x.detach() / 0.25, rtol=0, atol=2e-3)

    axes = torch.linalg.qr(normal(4, 4, seed=8))[0]

    def total(gain):
        scale = axes @ torch.diag(torch.stack([gain, gain, gain / 2, gain * gain])) @ axes.T

        def denoised(x, t):
            return x @ scale + 0.1 * (x**2).sum(1, keepdim=True).sin()

        model = sd.ScoreModel(denoised, sd.VP(t_min=0.05), "data")
        states = normal(3, 4, seed=2)
        return sd.log_prob(model, states, steps=6, differentiable=torch.is_grad_enabled()).value.sum()

    gain = torch.tensor(0.8, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(gain), gain)
    with torch.no_grad():
        numeric = (total(gain + 1e-5) - total(gain - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_what_gave_wrong_numbers_is_refused():
    target = gaussian(2)
    model, x = target.model(VP), target.sample(3, seed=0)

    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 1.0

    nonlinear = sd.ScoreModel(lambda x, t: -x, Cubic(), "score")
    with pytest.raises(sd.CapabilityError, match="takes no solver and a linear SDE"):
        sd.log_prob(nonlinear, x, differentiable=True, prior=target)
    with pytest.raises(sd.OptionError, match="atol_nats belongs to the default method"):
        sd.log_prob(nonlinear, x, atol_nats=1e-3, prior=target)
    with pytest.raises(sd.OptionError, match="max_nfe belongs to the default method"):
        sd.log_prob(model, x, max_nfe=50, solver=sd.Heun())
    with pytest.raises(sd.ShapeError, match=r"one number per row, shape \(3,\); it returned \(3, 2\)"):
        sd.log_prob(model, x, prior=torch.distributions.Normal(0.0, 1.0))
    outside = torch.tensor([[0.5, 0.5], [1.5, 0.5]], dtype=F64)
    with pytest.raises(sd.OptionError, match=r"Rows \[1\] of x lie outside of the domain"):
        sd.log_prob(model, outside, transform=torch.distributions.SigmoidTransform().inv)
    with pytest.raises(sd.DivergenceError, match="x is NaN or infinite"):
        sd.log_prob(model, torch.full((1, 2), math.nan, dtype=F64))
    with pytest.raises(sd.TimeError, match="has no noise at t = 0"):
        sd.log_prob(model, x, t_min=0.0)
    flow = sd.RectifiedFlow(t_max=1.0)
    blind = sd.ScoreModel(lambda x, t: target.model(flow).noise(t, x), flow, "noise")
    with pytest.raises(sd.CapabilityError, match="alpha is 0, where a model that predicts 'noise'"):
        sd.log_prob(blind, x)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x, t):
            return self.weight * model.noise(t, x.detach())

    with pytest.raises(sd.CapabilityError, match="not for automatic differentiation"):
        sd.log_prob(sd.ScoreModel(Head(), VP, "noise"), x)
    one, other = (sd.log_prob(model, x[:n], steps=5, divergence=Hutchinson(1), seed=0) for n in (3, 1))
    with pytest.raises(sd.ShapeError, match="same rows are compared"):
        one.minus(other)
    with pytest.raises(sd.OptionError, match="compared with the same tail"):
        one.minus(sd.log_prob(model, x, steps=5, divergence=Hutchinson(1), seed=0, tail="none"))


def test_the_prior_gap_of_states_is_that_of_their_own_kernel():
    target, t_min = gaussian(3), 0.3
    x = target.marginal(VP, t_min).sample(4, seed=0)
    result = sd.log_prob(target.model(VP), x, t_min=t_min, tail="none", steps=5)
    times = torch.tensor([t_min, 1.0], dtype=F64)
    scale, std = VP.transition(times[:1], times[1:])
    q, p = torch.distributions.Normal(scale * x, std), torch.distributions.Normal(torch.zeros_like(x), VP.sigma(1.0))
    torch.testing.assert_close(result.prior_gap, torch.distributions.kl_divergence(q, p).sum(1), rtol=1e-6, atol=1e-9)


def test_a_model_as_a_distribution_scores_what_it_draws():
    target, sde = sd.exact.Gaussian(torch.zeros(16, dtype=F64), 0.02**2), sd.VP(t_min=1e-3)
    law = sd.as_distribution(target.model(sde), (16,), log_prob_options={"steps": 40})
    drawn = law.sample((200,))
    entropy = 8 * (1 + math.log(2 * math.pi * (0.02**2 * sde.alpha(1e-3) ** 2 + sde.sigma(1e-3) ** 2)))
    assert law.log_prob(drawn).mean().item() == pytest.approx(-entropy, abs=4 * (8 / 200) ** 0.5)
