"""What a wrapped network owes to the model inside: rows, costs, times, modes, and the refusal of densities."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import sdediff as sd
from sdediff.model import rows_of
from sdediff.runs import counted
from sdediff.wrapped import Wrapped, evaluations

F64 = torch.float64
DATA = sd.exact.GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64), torch.tensor([0.1, 0.2])
)


@dataclass(frozen=True, eq=False)
class Shifted(Wrapped):
    """Denoised data plus something for every row, at the price of two calls."""

    shift: Tensor

    def __call__(self, x, t, condition=None):
        once = self.model.denoised(t, x, condition=condition)
        return (once + self.model.denoised(t, x, condition=condition)) / 2 + self.shift

    def rows(self, index, batch):
        return type(self)(self.model.rows(index, batch), rows_of(self.shift, index, batch))

    def evaluations(self, t):
        return 2 * super().evaluations(t)


@dataclass(frozen=True, eq=False)
class Refusing(Wrapped):
    @property
    def no_density(self):
        return "it only refuses."

    def __call__(self, x, t, condition=None):
        return self.model.denoised(t, x, condition=condition)


def shifted(model, rows):
    return model.wrapped(Shifted(model, torch.linspace(0, 1, rows, dtype=F64)[:, None]), "data")


@pytest.mark.parametrize("solver", [sd.Exponential(), sd.Adaptive(), sd.AdaptiveRungeKutta(), sd.AdaptiveStochastic()])
def test_rows_held_by_a_network_follow_chunks_and_solvers_with_steps_for_every_row(solver):
    once = shifted(DATA.model(sd.VP()), 6)
    for wrapped in (once, shifted(once, 6), sd.map_denoised(once, lambda data: data)):
        whole = sd.sample(wrapped, (6, 2), solver=solver, steps=8, seed=0)
        parts = sd.sample(wrapped, (6, 2), solver=solver, steps=8, seed=0, batch_size=4)
        torch.testing.assert_close(whole.x, parts.x, rtol=0, atol=0)
        alone = sd.sample(wrapped.rows(slice(0, 3), 6), (3, 2), solver=solver, steps=8, seed=0)
        torch.testing.assert_close(whole.x[:3], alone.x, rtol=0, atol=0)


def test_nfe_counts_the_calls_of_the_innermost_network():
    model = DATA.model(sd.VP())
    inner, counter = counted(model)
    once, twice = shifted(inner, 4), shifted(shifted(model, 4), 4)
    assert sd.sample(once, (4, 2), solver=sd.DDIM(), steps=5, seed=0).nfe == counter.calls == 12
    assert sd.sample(twice, (4, 2), solver=sd.DDIM(), steps=5, seed=0).nfe == 24
    assert evaluations(twice.network, torch.ones(4)) == 4
    assert evaluations(lambda x, t: x, torch.ones(4)) == 1


def test_parts_of_a_counted_network_count_for_the_whole():
    model, counter = counted(shifted(DATA.model(sd.VP()), 4))
    part = model.rows(torch.tensor([1, 3]), 4)
    part.rows(slice(0, 1), 2).denoised(0.5, torch.zeros(1, 2, dtype=F64))
    assert counter.calls == 2
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.denoised(0.5, x[[1, 3]]), model.denoised(0.5, x)[[1, 3]])


def test_a_model_without_a_density_is_refused_by_name_of_the_reason_however_deep():
    model = DATA.model(sd.VP())
    refusing = model.wrapped(Refusing(model), "data")
    x = torch.zeros(2, 2, dtype=F64)
    for deep in (refusing, sd.clamp_denoised(refusing), shifted(refusing, 2)):
        for call in (
            lambda m: sd.log_prob(m, x),
            lambda m: sd.log_prob(m, x, solver=sd.RungeKutta()),
            lambda m: sd.sample(m, (2, 2), with_log_prob=True, final="none"),
            lambda m: sd.denoising_log_prob(m, x),
            lambda m: sd.as_distribution(m, (2,)).log_prob(x),
        ):
            with pytest.raises(sd.CapabilityError, match=r"no log-density: it only refuses\."):
                call(deep)
    assert sd.log_prob(shifted(model, 2), x).value.isfinite().all()
    assert sd.elbo(refusing, x, steps=5, seed=0).total.isfinite().all()


def test_a_wrapped_model_of_integer_steps_is_sampled_on_its_steps():
    chain = sd.DiscreteVP.linear_betas(50)
    seen = []

    def network(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    model = sd.ScoreModel(network, chain, "noise", time=chain.timestep)
    wrapped = sd.clamp_denoised(model)
    assert torch.equal(wrapped.known_times, model.known_times)
    sd.sample(wrapped, (2, 2), steps=7, seed=0)
    assert len(seen) > 5
    assert all(step == round(step) for step in seen)


def test_a_wrapped_model_keeps_a_condition_and_another_may_take_its_place():
    model = sd.ScoreModel(lambda x, t, c: x + c[:, None], sd.VP(), "data", condition=torch.tensor([1.0, 2.0]))
    wrapped = sd.map_denoised(model, lambda data: 2 * data)
    x = torch.zeros(2, 1)
    assert wrapped.denoised(0.5, x).flatten().tolist() == [2, 4]
    assert wrapped.given(torch.tensor([3.0, 4.0])).denoised(0.5, x).flatten().tolist() == [6, 8]
    assert wrapped.rows(slice(1, 2), 2).denoised(0.5, x[:1]).flatten().tolist() == [4]


@pytest.mark.parametrize("solver", [sd.Exponential(), sd.Adaptive()])
def test_a_wrapped_model_is_solved_with_the_deviation_that_the_model_inside_was_made_for(solver):
    sde, exact = sd.CosineVP(), DATA.model(sd.CosineVP())

    def network(x, t):
        sigma_over_alpha = (4 * t).exp()
        clock = sde.time(-2 * sigma_over_alpha.log())
        alpha, sigma = sde.scales(clock)
        k = (sigma**2 + (0.1 * alpha) ** 2).sqrt()[:, None]
        return exact.view("edm", clock, k * x)

    exact = dataclasses.replace(exact, sigma_data=0.1)
    plain = sd.ScoreModel(network, sde, "edm", sigma_data=0.1)
    for wrapped in (sd.map_denoised(plain, lambda data: data), sd.clamp_denoised(shifted(plain, 8), -9, 9)):
        assert wrapped.deviation == plain.deviation == 0.1
    arguments = {"solver": solver, "steps": 6, "seed": 0, "dtype": F64}
    if isinstance(solver, sd.Adaptive):
        del arguments["steps"]
    one = sd.sample(plain, (8, 2), **arguments).x
    mapped = sd.sample(sd.map_denoised(plain, lambda data: data), (8, 2), **arguments).x
    torch.testing.assert_close(one, mapped, rtol=1e-5, atol=1e-6)
