import pytest
import torch
from helpers import NAMED, TwoFunctions, name
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.model import PREDICTIONS
from sdediff.testing import gaussian_targets, linear_sdes

F64 = torch.float64
KINDS = list(PREDICTIONS)


def as_kind(model, kind):
    """The same model, as a network that predicts `kind`."""

    def network(x, t):
        if kind == "edm":  # undo the preconditioning of the input and of the time
            s = (4 * t).exp()
            t = model.sde.time(-2 * s.log())
            alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
            x = x * sd.over((sigma**2 + (alpha * model.sigma_data) ** 2).sqrt(), x)
        return model.view(kind, t, x)

    return sd.ScoreModel(network, model.sde, prediction=kind)


@given(linear_sdes(), gaussian_targets(), st.floats(0.05, 0.95), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_any_two_kinds_convert_exactly(sde, target, part, predicted, asked):
    ends = sde.clock(torch.tensor([sde.t_min, sde.t_max], dtype=F64))
    t = sde.unclock(ends[0] + part * (ends[1] - ends[0]))
    x = target.marginal(sde, t).sample(3, seed=0)
    exact = target.model(sde)
    other = as_kind(exact, predicted)
    value = exact.view(asked, t, x)
    scale = value.abs().max() + 1e-9
    torch.testing.assert_close(other.view(asked, t, x) / scale, value / scale, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_view_is_the_network_itself(kind):
    sde = sd.VP()
    model = sd.ScoreModel(lambda x, t: x.sin() * 3, sde, prediction=kind)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    native = model.predict(0.4, x)
    torch.testing.assert_close(model.view(kind, 0.4, x), native, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_views_are_their_definitions(sde):
    """Against autograd of the log-density: score, Tweedie, noise, v, flow velocity."""
    target = sd.exact.Gaussian(torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([[1.0, 0.4], [0.4, 0.5]]))
    model = target.model(sde)
    linear = model.linear
    for t in torch.linspace(0.1, 0.9, 4, dtype=F64) * linear.t_max:
        x = target.marginal(linear, t).sample(5, seed=1).requires_grad_()
        (score,) = torch.autograd.grad(target.marginal(linear, t).log_prob(x).sum(), x)
        x = x.detach()
        alpha, sigma = linear.alpha(t), linear.sigma(t)
        data, noise = (x + sigma**2 * score) / alpha, -sigma * score
        a, g = linear.rates(t)
        d_alpha, d_sigma = linear.scale_rates(t)
        close = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(model.score(t, x), score, **close)
        torch.testing.assert_close(model.denoised(t, x), data, **close)
        torch.testing.assert_close(model.noise(t, x), noise, **close)
        torch.testing.assert_close(model.view("v", t, x), alpha * noise - sigma * data, **close)
        torch.testing.assert_close(model.velocity(t, x), d_alpha * data + d_sigma * noise, **close)
        torch.testing.assert_close(model.velocity(t, x), a * x - g**2 * score / 2, **close)


def test_edm_preconditioning_is_the_published_one():
    """D(y; s) = c_skip y + c_out F(c_in y, log(s) / 4) in the frame y = x / alpha."""
    seen = {}

    def network(x, t):
        seen["x"], seen["t"] = x, t
        return x.cos()

    sde, sd_data, t = sd.EDM(), 0.7, torch.tensor([0.3, 2.0], dtype=F64)
    model = sd.ScoreModel(network, sde, prediction="edm", sigma_data=sd_data)
    y = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = t[:, None]
    skip = sd_data**2 / (s**2 + sd_data**2)
    out = s * sd_data / (s**2 + sd_data**2).sqrt()
    inside = y / (s**2 + sd_data**2).sqrt()
    torch.testing.assert_close(model.denoised(t, y), skip * y + out * inside.cos())
    torch.testing.assert_close(seen["x"], inside)
    torch.testing.assert_close(seen["t"], t.log() / 4)
    vp = sd.VP()
    time = vp.time(-2 * t.log())  # the same noise-to-signal ratios
    alpha = vp.alpha(time)[:, None]
    again = sd.ScoreModel(network, vp, prediction="edm", sigma_data=sd_data)
    torch.testing.assert_close(again.denoised(time, alpha * y), model.denoised(t, y))


def test_the_network_sees_the_time_it_wants():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    chain = sd.DiscreteVP(torch.full((1000,), 0.01, dtype=F64))
    x = torch.randn(3, 2)
    sd.ScoreModel(network, chain, time=chain.timestep).predict(chain.times[[0, 499, 999]], x)
    sd.ScoreModel(network, sd.VP(), time=lambda t: 999 * t).predict(0.5, x)
    sd.ScoreModel(network, sd.VP()).predict(0.5, x)
    assert seen[0].tolist() == [999, 500, 0]
    assert seen[0].dtype == torch.int64
    assert seen[1].tolist() == [499.5] * 3
    assert seen[1].dtype == torch.float32
    assert seen[2].tolist() == [0.5] * 3


def test_every_integer_time_step_reaches_the_network():
    chain = sd.DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=F64))
    assert chain.timestep(chain.times).tolist() == list(range(999, -1, -1))
    assert chain.timestep(chain.times.float()).tolist() == list(range(999, -1, -1))  # 0.003 in float32 is below 3/1000


def test_a_condition_reaches_the_network_and_only_when_given():
    model = sd.ScoreModel(lambda x, t, *c: x * (c[0] if c else 5.0), sd.VP())
    x = torch.ones(2, 2)
    assert model.noise(0.5, x, condition=3.0)[0, 0] == 3
    assert model.given(2.0).noise(0.5, x)[0, 0] == 2
    assert model.noise(0.5, x)[0, 0] == 5
    assert model.given(2.0).predict(0.5, x, condition=7.0)[0, 0] == 7
    torch.testing.assert_close(model.velocity(0.5, x, condition=3.0), model.given(3.0).velocity(0.5, x))


@pytest.mark.parametrize("kind", ["noise", "v", "flow", "data", "edm", "score"])
def test_per_row_times_are_rows_of_single_calls(kind):
    sde = sd.VP()
    model = sd.ScoreModel(lambda x, t: x.sin() + sd.over(t, x), sde, prediction=kind)
    t = torch.tensor([0.2, 0.9, 0.5, 0.7], dtype=F64)
    x = torch.randn(4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    for view in ("score", "noise", "denoised", "velocity"):
        together = getattr(model, view)(t, x)
        for i in range(4):
            torch.testing.assert_close(together[i : i + 1], getattr(model, view)(t[i], x[i : i + 1]))


def test_conversions_stay_finite_at_pure_noise():
    sde = sd.RectifiedFlow(t_max=1.0)
    model = sd.exact.Gaussian(torch.tensor([0.5]), 0.2).model(sde)
    x = torch.tensor([[1.0], [-2.0]])
    torch.testing.assert_close(model.denoised(1.0, x), torch.full((2, 1), 0.5))
    torch.testing.assert_close(model.noise(1.0, x), x)
    torch.testing.assert_close(model.velocity(1.0, x), x - 0.5)


def test_a_nonlinear_sde_has_a_score_and_a_velocity():
    class Cubic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 2.0

    model = sd.ScoreModel(lambda x, t: -(x**3), Cubic(), prediction="score")
    x = torch.tensor([[0.5], [2.0]], dtype=F64)
    assert torch.equal(model.score(0.5, x), -(x**3))
    torch.testing.assert_close(model.velocity(0.5, x), -(x**3) + 2 * x**3)
