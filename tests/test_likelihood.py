import math

import numpy as np
import pytest
import torch
from helpers import NAMED, TwoFunctions, name
from scipy.special import stdtrit

import sdediff as sd
from sdediff.divergence import Expansion, vector_jacobian

F64 = torch.float64
TIGHT = sd.TorchDiffEq(rtol=1e-7, atol=1e-7)
GENERATOR = torch.Generator().manual_seed(0)


def gaussian(size):
    root = torch.randn(size, size, dtype=F64, generator=GENERATOR) / size**0.5
    mean = torch.randn(size, dtype=F64, generator=GENERATOR)
    return sd.exact.Gaussian(mean, root @ root.T + 0.1 * torch.eye(size, dtype=F64))


@pytest.mark.parametrize("sde", [*NAMED[:-1], TwoFunctions()], ids=name)
@pytest.mark.parametrize("size", [1, 3])
def test_gaussian_data_has_the_closed_form(sde, size):
    """With the exact terminal density the value is log p at t_min, to solver tolerance; with the SDE's own prior it
    is off by exactly log prior(x_T) - log p_T(x_T)."""
    target = gaussian(size)
    start, end = target.marginal(sde, sde.t_min), target.marginal(sde, sde.t_max)
    x = start.sample(8, seed=1)
    exact = start.log_prob(x)
    result = sd.log_prob(target.model(sde), x, solver=TIGHT, prior=end, tail="none")
    torch.testing.assert_close(result.value, exact, rtol=0, atol=2e-5)
    assert torch.equal(result.stderr, torch.zeros(8, dtype=F64))
    latent = target.flow(sde, x, sde.t_min, sde.t_max)
    own = sd.log_prob(target.model(sde), x, solver=TIGHT, tail="none")
    mismatch = sd.as_linear(sde).prior((size,), dtype=F64).log_prob(latent) - end.log_prob(latent)
    torch.testing.assert_close(own.value, exact + mismatch, rtol=0, atol=1e-4)
    torch.testing.assert_close(own.latent, latent, rtol=1e-4, atol=1e-4)


def test_mixtures_have_the_closed_form():
    means = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]], dtype=F64)
    target = sd.exact.GaussianMixture(torch.tensor([1.0, 2.0, 3.0]), means, torch.tensor([0.02, 0.1, 0.3]))
    sde = sd.VP()
    x = target.sample(32, seed=0)
    result = sd.log_prob(target.model(sde), x, solver=TIGHT, prior=target.marginal(sde, 1.0), tail="none")
    assert (result.value - target.marginal(sde, sde.t_min).log_prob(x)).abs().max() < 2e-4
    assert (result.value - target.log_prob(x)).abs().max() < 5e-3  # the blur of t_min = 1e-5


@pytest.mark.parametrize("event", [(1, 4, 4), (3, 2, 2), (2, 3), (5,), ()])
def test_exact_divergence_works_for_any_event_shape(event):
    size = math.prod(event)
    target = sd.exact.Gaussian(torch.linspace(-1, 1, size, dtype=F64).reshape(event), 0.3)
    x = target.sample(3, seed=0)
    sde = sd.VP()
    result = sd.log_prob(target.model(sde), x, solver=TIGHT, prior=target.marginal(sde, 1.0), tail="none")
    torch.testing.assert_close(result.value, target.marginal(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-4)
    assert result.latent.shape == x.shape


def test_the_divergence_is_the_trace_of_the_jacobian():
    matrix = torch.randn(12, 12, dtype=F64, generator=GENERATOR)
    x = torch.randn(4, 3, 2, 2, dtype=F64, generator=GENERATOR).requires_grad_()
    value = (x.flatten(1).sin() @ matrix.T).reshape(x.shape)
    exact = (matrix.diagonal() * x.flatten(1).cos()).sum(1)
    rows = np.arange(4)
    for divergence in (sd.Exact(), sd.Hutchinson(4000), sd.Hutchinson(4000, "gaussian")):
        probes = divergence.draw(x.detach(), 7, rows, 0 * rows)
        expansion = Expansion(value, x, lambda vectors: vector_jacobian(value, x, vectors))
        estimates = divergence.estimate(expansion, probes)
        if len(estimates) == 1:
            torch.testing.assert_close(estimates[0], exact)
        else:
            error = estimates.std(0) / 4000**0.5
            assert ((estimates.mean(0) - exact).abs() < 5 * error).all()
    probes = sd.Hutchinson(3).draw(x.detach(), 7, rows, 0 * rows)
    assert torch.equal(probes.abs(), torch.ones(3, 4, 3, 2, 2, dtype=F64))


def test_hutchinson_is_unbiased_with_an_honest_error_bar_that_falls_as_one_over_k():
    sde, target = sd.VP(), gaussian(20)
    x = target.sample(400, seed=0)
    model, end = target.model(sde), target.marginal(sde, 1.0)
    truth = target.log_prob(x)
    variances = []
    for probes in (4, 16):
        result = sd.log_prob(model, x, solver=sd.TorchDiffEq(), prior=end, divergence=sd.Hutchinson(probes), seed=3)
        off = result.value - truth
        assert abs(off.mean()) < 5 * off.std() / 400**0.5 + 1e-3
        variances.append(off.square().mean().item())
        widened = stdtrit(probes - 1, 0.975) / 2
        assert (result.stderr / widened).square().mean().item() == pytest.approx(variances[-1], rel=0.25)
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.35)
    inside = (off.abs() < 2 * result.stderr + 1e-3).double().mean()
    assert inside == pytest.approx(0.95, abs=0.033)  # 3 standard deviations of the share among 400 rows


def test_a_single_probe_has_no_error_bar():
    target = gaussian(3)
    result = sd.log_prob(target.model(sd.VP()), target.sample(2, seed=0), divergence=sd.Hutchinson(1), seed=0)
    assert result.stderr.isnan().all()


def test_rows_do_not_depend_on_batch_or_chunk_with_fixed_steps():
    target = gaussian(3)
    model, x = target.model(sd.VP()), target.sample(16, seed=0)
    for divergence in ("exact", sd.Hutchinson(3)):
        options = {"solver": sd.Heun(), "steps": 20, "divergence": divergence, "seed": 1}
        whole = sd.log_prob(model, x, **options)
        for part in (sd.log_prob(model, x, batch_size=5, **options), sd.log_prob(model, x[:7], **options)):
            n = len(part.value)
            torch.testing.assert_close(part.value, whole.value[:n], rtol=0, atol=1e-10)
            torch.testing.assert_close(part.stderr, whole.stderr[:n], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [(sd.EulerMaruyama(0.0), 1), (sd.Heun(), 2)], ids=name)
def test_our_own_steppers_give_likelihoods_of_their_order(solver, order):
    target, sde = gaussian(2), sd.VP()
    x = target.sample(16, seed=0)
    exact = target.marginal(sde, 1e-2).log_prob(x)
    end = target.marginal(sde, 1.0)
    errors = [
        (sd.log_prob(target.model(sde), x, solver=solver, steps=n, t_min=1e-2, prior=end, tail="none").value - exact)
        for n in (40, 80, 160)
    ]
    errors = [error.abs().mean() for error in errors]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.3)


def test_the_prior_gap_is_the_kl_divergence_of_the_last_kernel():
    target, sde = gaussian(3), sd.VP()
    x = target.sample(5, seed=0)
    result = sd.log_prob(target.model(sde), x)
    q = torch.distributions.Normal(sde.alpha(1.0) * x, sde.sigma(1.0))
    p = torch.distributions.Normal(torch.zeros_like(x), sde.sigma(1.0))
    torch.testing.assert_close(result.prior_gap, torch.distributions.kl_divergence(q, p).sum(1))
    assert (result.accepted > 5).all()
    assert result.nfe == result.row_nfe.max() > 10


def test_an_affine_change_of_data_shifts_log_p_by_the_log_determinant():
    target, sde = gaussian(2), sd.VP()
    scaled = sd.exact.Gaussian(0.5 * target.mean + 1, 0.25 * target.cov)
    x = target.sample(8, seed=0)
    a = sd.log_prob(target.model(sde), x, solver=TIGHT, prior=target.marginal(sde, 1.0), t_min=1e-6).value
    b = sd.log_prob(scaled.model(sde), 0.5 * x + 1, solver=TIGHT, prior=scaled.marginal(sde, 1.0), t_min=1e-6).value
    torch.testing.assert_close(b, a + 2 * math.log(2), rtol=0, atol=1e-3)


def test_networks_that_hide_their_dependence_on_x_are_refused():
    target = gaussian(2)
    model = target.model(sd.VP())
    x = target.sample(3, seed=0)

    @torch.no_grad()
    def hidden(x, t):
        return model.network(x, t)

    with pytest.raises(sd.CapabilityError, match="create_graph=True"):
        sd.log_prob(sd.ScoreModel(hidden, sd.VP(), "v"), x)

    def energy(x, t):  # the score as the gradient of an energy, differentiable again
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            log_p = target.marginal(sd.VP(), t[0]).log_prob(at).sum()
            return torch.autograd.grad(log_p, at, create_graph=True)[0]

    a = sd.log_prob(sd.ScoreModel(energy, sd.VP(), "score"), x, steps=60).value  # one time for all rows
    torch.testing.assert_close(a, sd.log_prob(model, x).value, rtol=0, atol=1e-3)
    constant = sd.ScoreModel(lambda x, t: torch.ones_like(x), sd.VP(), "data")
    assert sd.log_prob(constant, x).value.isfinite().all()


def test_a_grid_that_ends_elsewhere_needs_its_own_prior():
    target = gaussian(2)
    model, x, times = target.model(sd.VP()), target.sample(3, seed=0), torch.tensor([1e-5, 0.2], dtype=F64)
    with pytest.raises(sd.TimeError, match="pass prior="):
        sd.log_prob(model, x, times=times)
    result = sd.log_prob(model, x, times=times, solver=TIGHT, prior=target.marginal(sd.VP(), 0.2))
    torch.testing.assert_close(result.value, target.log_prob(x), rtol=0, atol=1e-4)


def test_the_prior_gap_is_that_of_the_last_time():
    target, sde = gaussian(2), sd.VP()
    x, end = target.sample(3, seed=0), target.marginal(sde, 0.2)
    result = sd.log_prob(target.model(sde), x, times=[1e-5, 0.1, 0.2], prior=end)
    eye = torch.eye(2, dtype=F64)
    kernel = torch.distributions.MultivariateNormal(sde.alpha(0.2) * x, sde.sigma(0.2) ** 2 * eye)
    gap = torch.distributions.kl_divergence(kernel, torch.distributions.MultivariateNormal(end.mean, end.cov))
    torch.testing.assert_close(result.prior_gap, gap)


def test_a_nonlinear_sde_has_a_likelihood_when_the_prior_is_given():
    """The stationary density of dx = -x^3 dt + sqrt(2) dw, whose flow stands still."""

    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 2**0.5

    class Quartic:
        def log_prob(self, x):
            return -(x**4).sum(1) / 4

    model = sd.ScoreModel(lambda x, t: -(x**3), Cubic(), prediction="score")
    x = torch.tensor([[0.5], [-1.0]], dtype=F64)
    torch.testing.assert_close(
        sd.log_prob(model, x, prior=Quartic()).value, Quartic().log_prob(x), rtol=1e-6, atol=1e-6
    )


def test_likelihoods_in_inference_mode_and_of_networks_of_another_dtype():
    target = gaussian(2)
    model, x = target.model(sd.VP()), target.sample(3, seed=0)
    plain = sd.log_prob(model, x).value
    with torch.inference_mode():
        assert torch.equal(sd.log_prob(model, x.clone()).value, plain)
    network = sd.networks.MLP((2,)).double()
    codes = torch.randint(0, 4, (3, 2))
    assert sd.bits_per_dim(sd.ScoreModel(network, sd.VP()), codes, levels=4, seed=0).value.dtype == F64


def test_a_budget_that_runs_out_is_an_error_and_chunks_are_counted():
    model = sd.exact.Gaussian(torch.zeros(2, dtype=torch.float64), 0.3).model(sd.VP())
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(sd.DivergenceError, match=r"6 row\(s\) ran out of network calls"):
        sd.log_prob(model, x, solver=sd.AdaptiveRungeKutta(max_nfe=12))
    whole = sd.log_prob(model, x, solver=sd.AdaptiveRungeKutta())
    parts = sd.log_prob(model, x, solver=sd.AdaptiveRungeKutta(), batch_size=4)
    torch.testing.assert_close(parts.value, whole.value, rtol=0, atol=1e-10)
    assert torch.equal(parts.accepted, whole.accepted)
    assert len(whole.rejected) == 6
