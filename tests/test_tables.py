import pytest
import torch
from helpers import (
    NAMED,
    VARIANCE,
    BasisStream,
    TwoFunctions,
    final_moments,
    fitted_order,
    moment_error,
    name,
    scalar_target,
)
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.tables import Table, TableSolver
from sdediff.testing import gaussian_targets, linear_sdes, time_grids

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def one_step(solver, model, x, t, s, z):
    stream = sd.RowNoise(0).open()
    stream.unit = lambda *_: z
    (out,) = solver.solve(solver.process(model), x, torch.stack([t, s]), stream)
    return out


@given(linear_sdes(), gaussian_targets(), st.data())
def test_a_ddim_step_is_the_general_first_order_step(sde, target, data):
    times = data.draw(time_grids(sde, max_steps=4))
    eta = data.draw(st.floats(0, 1))
    t, s = times[:2]
    model = target.model(sde)
    x = target.marginal(sde, t).sample(3, seed=0)
    z = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    data_hat, noise_hat = model.denoised(t, x), model.noise(t, x)
    sigma_s = sde.sigma(s)
    h = (sde.log_snr(s) - sde.log_snr(t)) / 2
    nu = eta * sigma_s * (1 - (-2 * h).exp()).sqrt()
    expected = sde.alpha(s) * data_hat + (sigma_s**2 - nu**2).clamp(min=0).sqrt() * noise_hat + nu * z
    got = one_step(sd.DDIM(eta), model, x, t, s, z)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7 * (1 + expected.abs().max().item()))


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_ddim_is_the_exponential_euler_step_of_the_flow(sde):
    model = scalar_target().model(sde)
    sde = model.linear
    t, s = sde.time(torch.tensor([-3.0, -1.5] if sde.log_snr(sde.t_max) < -3 else [1.0, 2.5], dtype=F64))
    x = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    h = (sde.log_snr(s) - sde.log_snr(t)) / 2
    expected = sde.sigma(s) / sde.sigma(t) * x + sde.alpha(s) * (1 - (-h).exp()) * model.denoised(t, x)
    torch.testing.assert_close(one_step(sd.DDIM(), model, x, t, s, None), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_ddpm_is_ddim_of_eta_one_and_the_posterior_with_the_denoised_mean(sde):
    model = scalar_target().model(sde)
    sde = model.linear
    times = sd.grids.natural(sde, 7)
    table, same = sd.DDPM().table(model, times), sd.DDIM(1.0).table(model, times)
    for a, b in ((table.A, same.A), (table.B, same.B), (table.C, same.C)):
        assert torch.equal(a, b)
    t, s = times[2:4]
    x = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    z = torch.ones_like(x)
    mean, std = sde.posterior(s, t, model.denoised(t, x), x)
    torch.testing.assert_close(one_step(sd.DDPM(), model, x, t, s, z), mean + std * z, rtol=1e-8, atol=1e-9)
    _, forward = sde.transition(s, t)
    torch.testing.assert_close(one_step(sd.DDPM("beta"), model, x, t, s, z), mean + forward * z, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_equal_those_of_diffusers(eta):
    """A whole chain against DDIMScheduler and (with eta = 1, same noise) DDPMScheduler, in float32."""
    diffusers = pytest.importorskip("diffusers")
    n, sub = 200, 20
    kind = diffusers.DDIMScheduler(n, 1e-4, 0.05, "linear", clip_sample=False, set_alpha_to_one=False)
    chain = sd.DiscreteVP(kind.betas.double())
    network = lambda x, t: (x + t.reshape(-1, 1) / n).sin()  # noqa: E731
    model = sd.ScoreModel(network, chain, "noise", time=lambda t: chain.timestep(t).float())
    kind.set_timesteps(sub)
    steps = kind.timesteps  # 190, 180, ..., 0
    times = (steps.double() + 1) / n
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    noise = sd.RowNoise(5)
    stream = noise.open()
    ours = list(sd.DDIM(eta).solve(sd.DDIM(eta).process(model), x, times, noise.open()))
    theirs = x
    for k, t in enumerate(steps[:-1]):
        z = stream.normal(x) if eta else None
        theirs = kind.step(network(theirs, t.float()), int(t), theirs, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(ours[k], theirs, rtol=2e-4, atol=2e-4)


def test_ancestral_steps_equal_the_ddpm_scheduler():
    diffusers = pytest.importorskip("diffusers")
    n = 50
    for ours, theirs in (("posterior", "fixed_small"), ("beta", "fixed_large")):
        kind = diffusers.DDPMScheduler(n, 1e-3, 0.1, "linear", clip_sample=False, variance_type=theirs)
        chain = sd.DiscreteVP(kind.betas.double())
        network = lambda x, t: (x + t.reshape(-1, 1) / n).sin()  # noqa: E731
        model = sd.ScoreModel(network, chain, "noise", time=lambda t, chain=chain: chain.timestep(t).float())
        kind.set_timesteps(n)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        states = list(sd.DDPM(ours).solve(sd.DDPM().process(model), x, chain.times, sd.RowNoise(5).open()))
        stream = sd.RowNoise(5).open()
        for t, state in zip(kind.timesteps[:-1], states, strict=True):
            mean_like = kind.step(network(x, t.float()), int(t), x, generator=torch.Generator().manual_seed(0))
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            deviation = kind._get_variance(int(t)) ** 0.5
            x = mean_like.prev_sample + deviation * (stream.normal(x) - z)
            torch.testing.assert_close(state, x, rtol=5e-4, atol=5e-4)
            x = state


@pytest.mark.parametrize("steps", [[20, 40, 80, 160], [25, 49, 99, 201]], ids=["even", "odd"])
@pytest.mark.parametrize("grid", [sd.grids.log_snr, sd.grids.karras, sd.grids.uniform], ids=lambda g: g.__name__)
@pytest.mark.parametrize("solver", [sd.DDIM(0.0), sd.DDIM(0.5), sd.DDPM(), sd.DDPM("beta"), sd.DDIM(1.2)], ids=name)
def test_first_order_on_exact_moments(solver, grid, steps):
    sde = sd.VP()
    errors = [moment_error(solver, sde, grid(sde, n, t_min=0.1), draws=n * bool(solver.noise_level)) for n in steps]
    assert fitted_order(errors, steps) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
@pytest.mark.parametrize("solver", [sd.DDIM(0.0), sd.DDIM(0.5), sd.DDPM(), sd.DDPM("beta")], ids=name)
def test_moments_tend_to_the_marginal(solver, sde):
    """Richardson extrapolation of the exact final moments reaches the marginal: no sampler is biased in the limit."""
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    coarse, fine = (
        final_moments(solver, sde, sd.grids.log_snr(sde, n, t_min=low), n * bool(solver.noise_level))
        for n in (150, 300)
    )
    mean, variance = 2 * fine[0] - coarse[0], 2 * fine[1] - coarse[1]
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=3e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=5e-3)


@given(linear_sdes(), st.data())
def test_each_variance_of_ddpm_is_exact_for_its_own_data(sde, data):
    """ "posterior" for data at one point, "beta" for data `N(0, I)` of a variance-preserving process, however long the
    steps (Ho et al. 2020, section 3.2)."""
    times = data.draw(time_grids(sde, max_steps=4))
    alpha, sigma = sde.scales_at(times)
    cases = [("posterior", sd.ScoreModel(lambda x, t: torch.full_like(x, 0.7), sde, "data"), 0.7, sigma**2)]
    if ((alpha**2 + sigma**2 - 1).abs() < 1e-9).all():
        unit = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 1.0)
        cases.append(("beta", unit.model(sde), 0.0, torch.ones_like(sigma)))
    for variance, model, mean, exact in cases:
        solver, n = sd.DDPM(variance), len(times) - 1
        x = torch.zeros(2 + n, 1, dtype=F64)
        x[1] = 1
        *_, x = solver.solve(solver.process(model), x, times, BasisStream())
        slope = (x[1] - x[0]).item()
        assert x[0].item() + slope * alpha[0].item() * mean == pytest.approx(
            alpha[-1].item() * mean, rel=1e-7, abs=1e-9
        )
        spread = slope**2 * exact[0] + (x[2:] - x[0]).square().sum()
        assert spread.item() == pytest.approx(exact[-1].item(), rel=1e-6, abs=1e-12)


def test_steps_are_exact_at_pure_noise_and_at_clean_data():
    """alpha = 0 at the start and sigma = 0 at the end: one DDIM step is the denoised mean, DDPM adds nothing there."""
    sde = sd.RectifiedFlow(t_max=1.0)
    model = scalar_target().model(sde)
    x = torch.tensor([[1.0], [-0.5]], dtype=F64)
    for solver in (sd.DDIM(), sd.DDPM(), sd.DDIM(0.5)):
        out = sd.sample(model, (2, 1), x_init=x, times=[1.0, 0.0], solver=solver, final="none", seed=0).x
        torch.testing.assert_close(out, torch.full_like(x, 0.7))
        out = sd.sample(model, (2, 1), x_init=x, times=[1.0, 0.5, 0.0], solver=solver, final="none", seed=0).x
        assert out.isfinite().all()


class Recurrence(TableSolver):
    """Any table, for tests of what is done with it."""

    noise_level = 0.0

    def __init__(self, table):
        self.given = table

    def table(self, model, times):
        return self.given


@pytest.mark.parametrize("memory", [1, 2, 4])
@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_table_is_the_recursion_that_it_stands_for(differentiable, remembers, memory):
    """`x_(i+1) = A_i x_i + sum_j B_ij Q_(i-j) + C_i z`, spelled out, with more steps than memory."""
    draw = lambda *shape: torch.rand(*shape, dtype=F64, generator=GENERATOR)  # noqa: E731
    sde, n = sd.VP(), 9
    times = sd.grids.natural(sde, n)
    B = draw(n, memory).tril()  # nothing is known before the first call
    table = Table(times, draw(n), B, draw(n), (draw(n), draw(n)) if remembers else None)
    model = sd.ScoreModel(lambda x, t: (x * t[:, None, None]).sin(), sde, "flow")
    x = start = draw(3, 2, 2)
    got = sd.sample(
        model, (3, 2, 2), x_init=x, times=times, solver=Recurrence(table), seed=4, final="none", trajectory=True,
        differentiable=differentiable,
    )  # fmt: skip
    noise, values = sd.RowNoise(4).open(), []
    for i, t in enumerate(times[:-1]):
        output = (x * t).sin()
        values.append(model.combine(t, x, *(part[i] for part in table.remembers)) if remembers else output)
        x = table.A[i] * x + table.C[i] * noise.unit(x, t, times[i + 1])
        x = x + sum(B[i, j] * values[i - j] for j in range(min(memory, i + 1)))
        torch.testing.assert_close(got.trajectory[i + 1], x, rtol=1e-11, atol=1e-11)
    assert torch.equal(got.trajectory[0], start)


@pytest.mark.parametrize("gradients", [False, True])
def test_states_may_be_changed_between_the_steps(gradients):
    """As a corrector does: a step starts from the state it is given, not from the one it gave."""
    draw = lambda *shape: torch.rand(*shape, dtype=F64, generator=GENERATOR)  # noqa: E731
    times = sd.grids.natural(sd.VP(), 6)
    table = Table(times, draw(6), draw(6, 3).tril(), torch.zeros(6, dtype=F64))
    model = sd.ScoreModel(lambda x, t: (x * t[:, None]).sin(), sd.VP())
    solver, x, values = Recurrence(table), draw(3, 2), []
    with torch.set_grad_enabled(gradients):
        step = solver.start(solver.process(model), x, times, sd.RowNoise(0).open())
        for i, t in enumerate(times[:-1]):
            values.insert(0, (x * t).sin())
            expected = table.A[i] * x + sum(b * value for b, value in zip(table.B[i], values, strict=False))
            got = step(i, x)
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
            x = got + draw(3, 2) if i % 2 else got


def test_a_table_may_have_several_rows_for_a_step():
    sde, times = sd.VP(), torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2], dtype=F64)
    ones = torch.ones(4, dtype=F64)
    table = Table(times, 2 * ones, torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=F64), 0 * ones, ends=(0, 1, 4))
    seen = []
    model = sd.ScoreModel(lambda x, t: seen.append(t[0].item()) or 0 * x + 1, sde)
    x = torch.zeros(1, 1, dtype=F64)
    solver = Recurrence(table)
    states = list(solver.solve(solver.process(model), x, torch.tensor([1.0, 0.8, 0.2], dtype=F64), None))
    assert [state.item() for state in states] == [1, 2 * (2 * (2 * 1 + 2) + 3) + 4]
    assert seen == times[:-1].tolist()


def test_a_table_is_printed_and_given_by_columns():
    model = scalar_target().model(sd.VP())
    times = torch.tensor([1.0, 0.5, 0.25], dtype=F64)
    table = sd.Exponential(2, noise_level=0.5).table(model, times)
    columns = table.columns()
    assert list(columns) == ["t", "s", "A", "B0", "B1", "B2", "C"]
    assert columns["t"] == [1.0, 0.5]
    assert columns["s"] == [0.5, 0.25]
    for name_, column in (("A", table.A), ("B1", table.B[:, 1]), ("C", table.C)):
        assert columns[name_] == column.tolist()
    head, *lines = str(table).split("\n")
    assert head.split() == list(columns)
    assert len(lines) == 2
    for k, line in enumerate(lines):
        numbers = [float(word) for word in line.split()]
        assert numbers == pytest.approx([column[k] for column in columns.values()], rel=1e-4)
    assert [len(line) for line in lines] == [12 * 7] * 2


def test_a_step_that_a_network_does_not_determine_is_named():
    sde = sd.RectifiedFlow(t_max=1.0)
    for solver in (sd.DDIM(), sd.Exponential(2, noise_level=0.5)):
        for prediction in ("noise", "score"):
            model = sd.ScoreModel(lambda x, t: x, sde, prediction)
            with pytest.raises(sd.CapabilityError, match=f"predicts '{prediction}' does not .* starts at t = 1 of"):
                sd.sample(model, (2, 1), times=[1.0, 0.5], solver=solver, seed=0)


def test_options_are_checked():
    with pytest.raises(sd.OptionError, match="eta >= 0"):
        sd.DDIM(-0.1)
    with pytest.raises(sd.OptionError, match="'posterior' or 'beta'"):
        sd.DDPM("large")
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.OptionError, match="more noise than sigma holds"):
        sd.sample(model, (2, 1), solver=sd.DDIM(3.0), steps=4, seed=0)
