"""A user's SDE, written as two functions, goes through everything with no other code."""

import pytest
import torch
from helpers import TwoFunctions, name
from test_sampling import STEPPERS

import sdediff as sd
from sdediff.testing import check_sde

F64 = torch.float64
TARGET = sd.exact.GaussianMixture(
    torch.tensor([1.0, 1.0, 2.0]),
    torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]], dtype=F64),
    torch.tensor([0.05, 0.1, 0.2]),
)


def test_it_passes_every_check():
    check_sde(TwoFunctions())


FREE = [
    sd.TorchDiffEq(),
    sd.TorchSDE("milstein"),
    sd.Adaptive(),
    sd.AdaptiveRungeKutta("bosh3", 1e-3, 1e-3),
    sd.AdaptiveStochastic(0.05, 0.05),
]


@pytest.mark.parametrize("solver", [*STEPPERS, *FREE], ids=name)
def test_every_solver_samples_from_it(solver):
    model = TARGET.model(TwoFunctions())
    steps = None if solver.default_steps == 1 else 150
    x = sd.sample(model, (4000, 2), solver=solver, steps=steps, seed=0, dtype=F64).x
    floor = sd.metrics.energy_distance(TARGET.sample(4000, seed=1), TARGET.sample(4000, seed=2))
    assert sd.metrics.energy_distance(x, TARGET.sample(4000, seed=2)) < abs(floor) + 6e-3


def test_its_likelihood_is_exact():
    sde = TwoFunctions()
    x = TARGET.sample(16, seed=0)
    end = TARGET.marginal(sde, sde.t_max)
    result = sd.log_prob(TARGET.model(sde), x, prior=end)
    torch.testing.assert_close(result.value, TARGET.log_prob(x), rtol=0, atol=1e-3)
    solver = sd.TorchDiffEq(rtol=1e-7, atol=1e-7)
    state = sd.log_prob(TARGET.model(sde), x, solver=solver, prior=end, tail="none")
    torch.testing.assert_close(state.value, TARGET.marginal(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-3)


def test_a_network_is_trained_on_it():
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.networks.MLP((2,), width=64, depth=2), TwoFunctions(), "v")
    trained = sd.fit(model, TARGET.sample(4000, seed=3).float(), steps=400, lr=5e-3, seed=0, progress=False)
    x = sd.sample(trained, (1000, 2), steps=40, seed=0).x
    assert sd.metrics.energy_distance(x, TARGET.sample(4000, seed=2)) < 0.03
