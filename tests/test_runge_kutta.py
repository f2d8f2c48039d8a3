import pytest
import torch
from helpers import NAMED, VARIANCE, TwoFunctions, final_moments, fitted_order, moment_error, name, scalar_target

import sdediff as sd

F64 = torch.float64


@pytest.mark.parametrize("steps", [[40, 80, 160, 320], [41, 79, 161, 319]], ids=["even", "odd"])
@pytest.mark.parametrize("grid", [sd.grids.log_snr, sd.grids.karras, sd.grids.uniform], ids=lambda g: g.__name__)
@pytest.mark.parametrize(
    ("solver", "order"), [*((sd.EulerMaruyama(level), 1) for level in (0.0, 0.5, 1.0, 1.5)), (sd.Heun(), 2)], ids=name
)
def test_order_on_exact_moments(solver, order, grid, steps):
    sde = sd.VP()
    errors = [moment_error(solver, sde, grid(sde, n, t_min=0.1), draws=n * bool(solver.noise_level)) for n in steps]
    assert solver.order == order
    assert fitted_order(errors, steps) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_euler_maruyama_keeps_the_marginals_for_every_noise_level(sde, level):
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    coarse, fine = (
        final_moments(sd.EulerMaruyama(level), sde, sd.grids.log_snr(sde, n, t_min=low), n * bool(level))
        for n in (150, 300)
    )
    mean, variance = 2 * fine[0] - coarse[0], 2 * fine[1] - coarse[1]
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=5e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=1e-2)


def test_a_step_of_each_is_its_formula():
    sde, x = sd.VP(), torch.tensor([[0.3], [-1.2]], dtype=F64)
    model = scalar_target().model(sde)
    times = torch.tensor([0.8, 0.6], dtype=F64)
    h = times[1] - times[0]
    process = sd.Reverse(model, 1.0)
    z = sd.RowNoise(4).open().normal(x)
    (got,) = sd.EulerMaruyama().solve(process, x, times, sd.RowNoise(4).open())
    expected = x + h * process.drift(times[0], x) + process.diffusion(times[0], x) * h.abs().sqrt() * z
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    flow = sd.Reverse(model, 0.0)
    (got,) = sd.Heun().solve(flow, x, times, sd.RowNoise(4).open())
    first = flow.drift(times[0], x)
    torch.testing.assert_close(got, x + h / 2 * (first + flow.drift(times[1], x + h * first)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("churn", [1.2, 10.0])
def test_heun_in_edm_time_is_algorithm_2_with_churn(churn):
    """Karras et al. 2022, algorithm 2, in their own variables; the larger churn is held at sqrt(2) - 1 a step."""
    sde, n = sd.EDM(), 6
    target = scalar_target()
    model = target.model(sde)
    times = sd.grids.karras(sde, n)
    x = torch.tensor([[30.0], [-100.0]], dtype=F64)
    got = list(sd.Heun(churn=churn).solve(sd.Heun().process(model), x, times, sd.RowNoise(0).open()))
    stream = sd.RowNoise(0).open()
    gamma = min(churn / n, 2**0.5 - 1)
    for i in range(n):
        t, s = times[i], times[i + 1]
        raised = min(t * (1 + gamma), torch.tensor(80.0, dtype=F64))
        x_hat = x + (raised**2 - t**2).sqrt() * stream.normal(x)
        d = (x_hat - model.denoised(raised, x_hat)) / raised
        after = x_hat + (s - raised) * d
        d_after = (after - model.denoised(s, after)) / s
        x = x_hat + (s - raised) * (d + d_after) / 2
        torch.testing.assert_close(got[i], x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.RectifiedFlow(), TwoFunctions()], ids=name)
def test_churn_keeps_the_marginal(sde):
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    mean, variance = final_moments(sd.Heun(churn=10.0), sde, sd.grids.log_snr(sde, 300, t_min=low), 300)
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=2e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=2e-3)


def test_euler_maruyama_converges_strongly_on_one_brownian_path():
    """Additive noise: strong order 1, coarse and fine grids coupled through the same BrownianPath."""
    sde = sd.VP()
    model = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0], [1.5]], dtype=F64), torch.tensor([0.2, 0.3])
    ).model(sde)
    path = sd.BrownianPath(0, 0.1, 1.0)
    x = torch.linspace(-2, 2, 64, dtype=F64)[:, None]

    def end(n):
        times = sd.grids.uniform(sde, n, t_min=0.1)
        return sd.sample(model, x.shape, x_init=x, times=times, solver=sd.EulerMaruyama(), noise=path, final="none").x

    reference = end(1024)
    errors = [(end(n) - reference).square().mean().sqrt().item() for n in (16, 32, 64)]
    assert fitted_order(errors, [16, 32, 64]) == pytest.approx(1, abs=0.2)


def test_options_are_checked():
    with pytest.raises(sd.OptionError, match="churn >= 0"):
        sd.Heun(churn=-1.0)
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="would drop the noise"):
        list(sd.Heun().solve(sd.Reverse(model, 1.0), torch.zeros(1, 1), torch.tensor([0.5, 0.4]), None))


@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.TorchSDE("srk")], ids=name)
def test_a_start_at_pure_noise_is_refused_where_the_diffusion_is_infinite(solver):
    model = scalar_target().model(sd.RectifiedFlow(t_max=1.0))
    with pytest.raises(sd.CapabilityError, match="infinite at t = 1, where alpha is 0"):
        sd.sample(model, (2, 1), solver=solver, steps=4, seed=0)
    assert sd.sample(model, (2, 1), solver=sd.DDPM(), steps=4, seed=0).x.isfinite().all()
    assert sd.sample(model, (2, 1), solver=sd.EulerMaruyama(0.0), steps=4, seed=0).x.isfinite().all()


def test_churn_does_not_encode():
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(scalar_target().model(sd.VP()), torch.zeros(1, 1), solver=sd.Heun(churn=5.0))
