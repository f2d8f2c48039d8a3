"""The learned schedule: ends, slopes, monotonicity, an SDE like any other, gradients, checkpoints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdediff as sd
from sdediff.errors import CheckpointError, OptionError, SDEError, ShapeError
from sdediff.learned import MonotoneNetwork

F64 = torch.float64


def shaped(seed=0, hidden=8, size=1.0, **options):
    """A schedule whose parameters are far from those of a fresh one."""
    sde = sd.LearnedVP(hidden=hidden, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sde.curve.parameters():
            p += size * torch.randn(p.shape, dtype=F64, generator=generator)
    return sde


def target():
    return sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=F64))


# The schedule


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 40), st.floats(-20, 0), st.floats(0.5, 20), st.floats(1e-4, 0.4))
def test_it_rises_from_end_to_end_whatever_its_parameters(seed, hidden, low, gap, t_min):
    sde = shaped(seed, hidden, gamma_min=low, gamma_max=low + gap, t_min=t_min, t_max=1.5)
    times = torch.linspace(t_min, 1.5, 101, dtype=F64)
    gamma = sde.gamma(times)
    assert gamma[0] == low
    assert gamma[-1] == low + gap
    assert (gamma.diff() >= 0).all()
    assert (sde.slope(times) >= 0).all()
    inner, step = times[1:-1], 1e-6
    moved = (sde.gamma(inner + step) - sde.gamma(inner - step)) / (2 * step)
    torch.testing.assert_close(sde.slope(inner), moved, rtol=1e-4, atol=1e-4 * gap)


def test_scales_and_rates_are_those_of_gamma():
    sde = shaped()
    t = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=F64)
    alpha, sigma = sde.scales(t)
    torch.testing.assert_close(alpha**2, torch.sigmoid(-sde.gamma(t)))
    torch.testing.assert_close(sigma**2, torch.sigmoid(sde.gamma(t)))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4, dtype=F64))
    torch.testing.assert_close(sde.log_snr(t), -sde.gamma(t))
    drift_rate, diffusion = sde.rates(t)
    torch.testing.assert_close(diffusion**2, sde.slope(t) * sigma**2)
    torch.testing.assert_close(drift_rate, -(diffusion**2) / 2)
    for found, expected in zip(sde.scale_rates(t), sd.LinearSDE.scale_rates(sde, t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_what_lies_before_t_min_leads_to_the_data():
    sde = shaped()
    t = torch.tensor([0.0, 1e-8, 5e-4], dtype=F64)
    torch.testing.assert_close(sde.gamma(t), -13.3 + (t / 1e-3).log())
    torch.testing.assert_close(sde.slope(t[1:]), 1 / t[1:])
    assert [value.item() for value in sde.scales(t[0])] == [1, 0]


def test_checks_of_an_sde_hold():
    sd.testing.check_sde(shaped(size=0.5, gamma_min=-9.0, gamma_max=4.0))


@settings(max_examples=3)
@given(st.integers(0, 1000), st.floats(-14, -6), st.floats(2, 8))
def test_cheap_checks_hold_for_any_shape(seed, low, high):
    sde = shaped(seed, gamma_min=low, gamma_max=high)
    slow = ("scales_solve_the_moment_equations", "simulated_moments", "likelihood_is_exact", "flow_is_invertible")
    slow += ("marginals_do_not_depend_on_the_noise_level", "snr_falls")  # strictly: not in rounding
    sd.testing.check_sde(sde, tuple(c for c in sd.testing.SDE_CHECKS if c.__name__ not in slow))


class Powers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0, dtype=F64))

    def forward(self, t):
        return self.a * t + t**3


def test_a_rising_function_of_ones_own_gives_its_shape_and_by_itself_its_ends():
    t = torch.tensor([0.01, 0.3, 1.0], dtype=F64)
    plain = sd.LearnedVP(lambda t: 4 * t.log(), t_min=0.01)
    torch.testing.assert_close(plain.gamma(t), 4 * t.log())
    assert not list(plain.curve.parameters() if isinstance(plain.curve, nn.Module) else [])
    moved = sd.LearnedVP(Powers(), -5.0, 5.0, t_min=0.01)
    f = 2 * t + t**3
    torch.testing.assert_close(moved.gamma(t), -5 + 10 * (f - f[0]) / (f[2] - f[0]))
    assert {name for name, _ in moved.named_parameters()} == {"ends", "curve.a"}
    vp = sd.VP()
    copied = sd.LearnedVP(lambda t: -vp.log_snr(t), t_min=0.01)
    for found, expected in zip(copied.scales(t) + copied.rates(t), vp.scales(t) + vp.rates(t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# As any other SDE


def all_solvers():
    return [
        sd.DDPM(), sd.DDIM(), sd.Exponential(), sd.Exponential(2, predict="data"), sd.UniPC(), sd.Heun(),
        sd.RungeKutta(), sd.EulerMaruyama(), sd.Adaptive(), sd.AdaptiveStochastic(0.05, 0.05), sd.SRA1(),
        sd.AdaptiveRungeKutta(), sd.PredictorCorrector(sd.DDPM(), sd.Langevin()), sd.TorchDiffEq(),
        sd.TorchSDE("euler"),
    ]  # fmt: skip


@pytest.mark.parametrize("solver", all_solvers(), ids=lambda s: repr(s)[:30])
def test_every_solver_runs_on_it(solver):
    sde = shaped(size=0.3, gamma_min=-9.0)
    x = sd.sample(target().model(sde), (400, 2), solver=solver, seed=0).x
    assert not x.requires_grad
    assert (x.mean(0) - torch.tensor([0.5, -1.0])).abs().max() < 0.2
    assert (x.var(0) / torch.tensor([0.8, 0.4]) - 1).abs().max() < 0.35


def test_likelihood_bounds_grids_and_coding():
    sde = shaped(size=0.3, gamma_min=-9.0)
    model, x = target().model(sde), target().sample(8, seed=1)
    truth = target().log_prob(x)
    end = target().marginal(sde, 1.0)
    torch.testing.assert_close(sd.log_prob(model, x, atol_nats=1e-4, prior=end).value, truth, rtol=0, atol=2e-3)
    for bound in (sd.elbo(model, x, samples=64, prior=end, seed=0), sd.elbo(model, x, steps=40, prior=end, seed=0)):
        assert not bound.total.requires_grad
        assert -0.9 < (bound.total - truth).mean() < 0.1  # finite steps cost something
    assert (sd.denoising_log_prob(model, x, samples=64, prior=end, seed=0).value - truth).abs().mean() < 0.3
    assert sd.sde_bound(model, x, seed=0).value.isfinite().all()
    for grid in (sd.grids.uniform, sd.grids.log_snr, sd.grids.natural, sd.grids.karras, sd.grids.quadratic):
        times = grid(sde, 7)
        assert not times.requires_grad
        assert [times[0].item(), times[-1].item()] == [1.0, 1e-3]
    assert sd.round_trip(model, x).error.max() < 0.05
    assert sde.simulate(x, sd.grids.uniform(sde, 5).flip(0), seed=0).shape == (6, 8, 2)


def test_nothing_is_kept_of_a_schedule_that_moves():
    sde = shaped()
    model = target().model(sde)
    assert not sde.fixed
    options = {"solver": sd.DDIM(), "steps": 5, "seed": 0}
    before = sd.sample(model, (4, 2), **options).x
    with torch.no_grad():
        sde.ends -= 1
    after = sd.sample(model, (4, 2), **options).x
    assert (before - after).abs().max() > 1e-3
    with torch.no_grad():
        sde.ends += 1
    torch.testing.assert_close(sd.sample(model, (4, 2), **options).x, before)


@pytest.mark.parametrize("function", ["gamma", "slope", "alpha", "sigma", "log_snr"])
def test_gradients_reach_all_parameters(function):
    sde = shaped(hidden=3)
    t = torch.tensor([0.2, 0.7], dtype=F64)
    parameters = dict(sde.named_parameters())

    def value(*numbers):
        return torch.func.functional_call(Wrapped(sde, function), dict(zip(names, numbers, strict=True)), (t,))

    names = [f"sde.{name}" for name in parameters]
    assert torch.autograd.gradcheck(value, tuple(p.detach().requires_grad_() for p in parameters.values()))
    at = t.clone().requires_grad_()
    if function != "slope":
        (found,) = torch.autograd.grad(sde.gamma(at).sum(), at)
        torch.testing.assert_close(found, sde.slope(t))
    with torch.no_grad():
        assert not sde.slope(t).requires_grad


class Wrapped(nn.Module):
    def __init__(self, sde, function):
        super().__init__()
        self.sde, self.function = sde, function

    def forward(self, t):
        return getattr(self.sde, self.function)(t)


def test_a_scaled_view_scales_the_curve_row_by_row_and_leaves_the_ends():
    sde, t = shaped(hidden=3), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    factors, parts = torch.tensor([2.0, -1.0, 0.5], dtype=F64), [p for p in sde.parameters() if p is not sde.ends]

    def value(sde):
        return torch.stack([sde.gamma(t).sin(), sde.slope(t).log(), sde.sigma(t)]).sum(0)

    view = sde.scaled(lambda gradient: factors * gradient)
    found = torch.autograd.grad(value(view).sum(), [*parts, sde.ends])
    expected = [*torch.autograd.grad(value(sde) @ factors, parts), *torch.autograd.grad(value(sde).sum(), [sde.ends])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert [a is b for a, b in zip(view.parameters(), sde.parameters(), strict=True)]
    assert sde._hook is None


def test_it_works_in_inference_mode_and_after_a_cast():
    sde = shaped()
    with torch.inference_mode():
        assert sd.sample(target().model(sde), (3, 2), solver=sd.DDPM(), steps=3, seed=0).x.isfinite().all()
        assert sde.slope(torch.tensor([0.3], dtype=F64)) > 0
    t = torch.tensor([0.1, 0.8], dtype=F64)
    exact = sde.gamma(t)
    assert sde.float().gamma(t).dtype == F64
    torch.testing.assert_close(sde.gamma(t), exact, rtol=1e-4, atol=1e-4)


# Checkpoints


def test_a_model_with_a_learned_schedule_is_saved_whole(tmp_path):
    sde = shaped(hidden=5, learn_ends=False, t_min=2e-3)
    with torch.no_grad():
        sde.ends += torch.tensor([0.3, -0.7], dtype=F64)
    model = sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), sde, time=sde.sigma)
    sd.save(model, tmp_path)
    found = sd.load(tmp_path)
    assert found.sde is not sde
    assert repr(found.sde) == repr(sde)
    assert found.sde.t_min == 2e-3
    assert not found.sde.ends.requires_grad
    for a, b in zip(found.sde.state_dict().values(), sde.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.noise(0.3, x), model.noise(0.3, x))


def test_a_schedule_of_ones_own_is_given_to_load(tmp_path):
    sde = sd.LearnedVP(Powers(), -5.0, 5.0)
    with torch.no_grad():
        sde.curve.a += 0.25
    sd.save(sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), sde, time=sde.gamma), tmp_path)
    with pytest.raises(CheckpointError, match=r"sde of your own: pass load\(path, sde="):
        sd.load(tmp_path)
    mine = sd.LearnedVP(Powers(), -1.0, 1.0)
    with pytest.raises(CheckpointError, match=r"pass load\(path, time="):
        sd.load(tmp_path, sde=mine)
    with pytest.raises(CheckpointError, match="has weights; got VP"):
        sd.load(tmp_path, sde=sd.VP(), time=mine.gamma)
    with pytest.raises(CheckpointError, match=r"span \[0\.001, 1\.0\]; got one over \[0\.001, 2\.0\]"):
        sd.load(tmp_path, sde=sd.LearnedVP(Powers(), t_max=2.0), time=mine.gamma)
    with pytest.raises(CheckpointError, match="belongs to another"):
        sd.load(tmp_path, sde=sd.LearnedVP(), time=mine.gamma)
    found = sd.load(tmp_path, sde=mine, time=mine.gamma)
    assert found.sde.curve.a.item() == 2.25
    assert found.sde.ends.tolist() == [-5.0, 5.0]


def test_a_time_made_of_the_schedule_is_made_of_the_loaded_one(tmp_path):
    sde = shaped(hidden=3, gamma_min=-4.0, gamma_max=2.0)
    model = sd.VDM(sd.networks.MLP((2,), width=8, depth=1), sde, time=lambda gamma: gamma.exp()).model
    with torch.no_grad():
        for p in model.network.parameters():
            p += 0.3
    sd.save(model, tmp_path)
    mine = sd.LearnedVP(hidden=3)
    found = sd.load(tmp_path, sde=mine, time=lambda t: (-mine.log_snr(t)).exp())
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.noise(0.3, x), model.noise(0.3, x))


def test_rates_are_finite_at_the_data():
    """`g^2 = e^gamma_min / t_min`, the limit from above."""
    sde = shaped(hidden=3, gamma_min=-4.0, gamma_max=2.0)
    t = torch.tensor([0.0, 1e-12, 5e-4], dtype=F64)
    drift, diffusion = sde.rates(t)
    square = diffusion.detach() ** 2
    torch.testing.assert_close(square[:2], torch.full((2,), math.exp(-4.0) / sde.t_min, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(square, (-2 * drift).detach())
    torch.testing.assert_close(square[2], (sde.slope(t[2:]) * sde.sigma(t[2:]) ** 2)[0].detach())
    d_alpha, d_sigma = sde.scale_rates(t)
    torch.testing.assert_close(d_alpha[0], -square[0] / 2)
    assert d_sigma[0].isinf()


def test_the_time_of_other_processes_is_saved_by_name_too(tmp_path):
    sde = sd.DiscreteVP(torch.linspace(1e-3, 0.1, 10, dtype=F64))
    model = sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), sde, time=sde.timestep)
    sd.save(model, tmp_path)
    assert sd.load(tmp_path).time.__name__ == "timestep"
    file = tmp_path / "model.json"
    file.write_text(file.read_text().replace('"timestep"', '"simulate"'))
    with pytest.raises(CheckpointError, match="names 'simulate' as the network's time"):
        sd.load(tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: sd.LearnedVP(gamma_min=5.0, gamma_max=-13.0), OptionError, ["gamma_min < gamma_max", "5 and -13"]),
        (lambda: sd.LearnedVP(gamma_min=-math.inf), OptionError, ["finite", "-inf"]),
        (lambda: sd.LearnedVP(t_min=0.0), OptionError, ["0 < t_min", "[0, 1]"]),
        (lambda: sd.LearnedVP(t_min=1.0), OptionError, ["t_min < t_max", "[1, 1]"]),
        (lambda: sd.LearnedVP(hidden=0), OptionError, ["hidden >= 1", "got 0"]),
        (lambda: sd.LearnedVP(lambda t: (6 * t).sin()), SDEError, ["rise strictly", "at t = 0.2", "to"]),
        (lambda: sd.LearnedVP(lambda t: -t), SDEError, ["rise strictly", "-0.001 at t = 0.001"]),
        (lambda: sd.LearnedVP(lambda t: t.clamp(max=0.5)), SDEError, ["rise strictly", "0.5 at t = 0.5"]),
        (lambda: sd.LearnedVP(lambda t: t[:, None]), ShapeError, ["(257,)", "(257, 1)"]),
        (lambda: sd.LearnedVP(lambda t: 3.0), ShapeError, ["float"]),
        (lambda: sd.LearnedVP(lambda t: 4 * t.detach()), SDEError, ["derivative by torch is 0"]),
        (lambda: MonotoneNetwork(hidden=1.5), OptionError, ["hidden >= 1", "1.5"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(call, error, said):
    with pytest.raises(error) as caught:
        call()
    for word in said:
        assert word in str(caught.value)


def test_a_schedule_that_turns_while_it_learns_is_refused():
    sde = sd.LearnedVP(Powers(), -5.0, 5.0)
    with torch.no_grad():
        sde.curve.a.fill_(-0.5)
    with pytest.raises(SDEError, match=r"must rise with time; at t = 0.1 its slope is -"):
        sde.slope(torch.tensor([0.9, 0.1], dtype=F64))
    sde = sd.LearnedVP()
    with torch.no_grad():
        sde.ends[0] = 6.0
    with pytest.raises(SDEError, match=r"crossed: gamma_min = 6, gamma_max = 5"):
        sde.gamma(0.5)
