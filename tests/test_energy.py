"""Energy models: the field is minus the gradient, wherever it is used, and trains."""

import pytest
import torch
from torch import nn

import sdediff as sd
from sdediff.energy import Energy, value_and_gradient
from sdediff.errors import OptionError, ShapeError

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0], dtype=F64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
TARGET = sd.exact.Gaussian(MEAN, COV)
VP = sd.VP()


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Quadratic(nn.Module):
    """The exact energy of a noised Gaussian, times a learnable factor; events of any shape are flattened."""

    def __init__(self, sde=VP):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=F64))
        self.sde = sde

    def forward(self, x, t=None, condition=None):
        alpha, sigma = (torch.ones(1), torch.zeros(1)) if t is None else self.sde.scales_at(t.to(F64))
        moved = x.flatten(1) - alpha[:, None] * MEAN
        total = alpha[:, None, None] ** 2 * COV + sigma[:, None, None] ** 2 * torch.eye(2, dtype=F64)
        energy = (moved * torch.linalg.solve(total.expand(len(x), 2, 2), moved)).sum(1) / 2
        return self.factor * energy * (1 if condition is None else condition)


@pytest.mark.parametrize("event", [(2,), (1, 2), (2, 1, 1)])
def test_the_field_is_minus_the_gradient(event):
    x = normal(5, 2)
    score = Energy(Quadratic())(x.reshape(5, *event))
    assert score.shape == (5, *event)
    torch.testing.assert_close(score.reshape(5, 2), -(x - MEAN) @ COV.inverse())


def test_the_model_of_an_exact_energy_is_the_exact_model():
    model, t, x = sd.ScoreModel(Energy(Quadratic()), VP, "score"), torch.rand(5, dtype=F64), normal(5, 2)
    torch.testing.assert_close(model.score(t, x), TARGET.model(VP).score(t, x))
    torch.testing.assert_close(model.denoised(t, x), TARGET.model(VP).denoised(t, x))


def test_samplers_and_likelihoods_take_it():
    model, x = sd.ScoreModel(Energy(Quadratic()), VP, "score"), TARGET.sample(4, seed=0)
    exact = TARGET.model(VP)
    for solver in (sd.DDIM(), sd.DDPM(), sd.AnnealedLangevin(steps=3)):
        options = {"solver": solver, "steps": 12, "seed": 0, "dtype": F64}
        torch.testing.assert_close(sd.sample(model, (4, 2), **options).x, sd.sample(exact, (4, 2), **options).x)
    got, wanted = (sd.log_prob(m, x, atol_nats=1e-7).value for m in (model, exact))
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_differences_of_energies_are_those_of_log_densities():
    energy, x, y = Energy(Quadratic()), normal(6, 2), normal(6, 2, seed=1)
    for t in (0.3, torch.tensor(0.8), torch.linspace(0.1, 1, 6)):
        for i, at in enumerate(torch.as_tensor(t, dtype=F64).expand(6)):
            marginal = TARGET.marginal(VP, at)
            got = energy.energy(t, y) - energy.energy(t, x)
            torch.testing.assert_close(got[i], (marginal.log_prob(x) - marginal.log_prob(y))[i], rtol=1e-5, atol=1e-5)
    got = energy.energy(None, y) - energy.energy(None, x)
    torch.testing.assert_close(got, TARGET.log_prob(x) - TARGET.log_prob(y))


def test_the_condition_reaches_the_network():
    energy, x, factor = Energy(Quadratic()), normal(3, 2), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    torch.testing.assert_close(energy.energy(0.4, x, condition=factor), factor * energy.energy(0.4, x))
    model = sd.ScoreModel(energy, VP, "score")
    torch.testing.assert_close(model.score(0.4, x, condition=factor), factor[:, None] * model.score(0.4, x))


def test_a_graph_is_made_where_gradients_are_enabled_and_only_there():
    energy, x = Energy(Quadratic()), normal(3, 2)
    assert energy(x).requires_grad
    with torch.no_grad():
        silent = energy(x)
    with torch.inference_mode():
        inferred = energy(normal(3, 2), torch.full((3,), 0.5))
    assert not silent.requires_grad
    assert not inferred.requires_grad
    torch.testing.assert_close(silent, energy(x).detach())
    torch.testing.assert_close(inferred, energy(x, torch.full((3,), 0.5)).detach())
    assert not x.requires_grad
    at = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(energy(at)[:, 0].sum(), at)
    torch.testing.assert_close(second, -COV.inverse()[:1].expand(3, 2))
    with torch.no_grad():
        assert not any(part.requires_grad for part in value_and_gradient(energy.network, x))
    value, slope = value_and_gradient(energy.network, x)
    torch.testing.assert_close(value, energy.energy(None, x))
    torch.testing.assert_close(slope, -energy(x))


def test_an_energy_that_does_not_see_x_has_no_gradient():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), dtype=x.dtype)

    class Bound(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), dtype=x.dtype, requires_grad=True)

    for network in (Flat(), Bound()):
        score = Energy(network)(normal(3, 2))
        assert torch.equal(score, torch.zeros(3, 2, dtype=F64))


@pytest.mark.parametrize("loss", ["denoising", "implicit", "sliced", "finite_difference"])
def test_every_loss_trains_it(loss):
    """From half the energy to the whole one, the only parameter; the true value is within 0.1 after 150 steps."""
    network = Quadratic()
    network.factor.data.fill_(0.5)
    model = sd.ScoreModel(Energy(network), VP, "score")
    sd.fit(
        model, TARGET.sample(2000, seed=0), steps=150, lr=0.05, warmup=1, ema=0.9, seed=1, progress=False,
        loss=getattr(sd.losses, loss),
    )  # fmt: skip
    assert network.factor.item() == pytest.approx(1, abs=0.1)


def test_a_checkpoint_holds_it(tmp_path):
    network = Quadratic()
    network.factor.data.fill_(0.7)
    sd.save(sd.ScoreModel(Energy(network), VP, "score"), tmp_path)
    again = sd.load(tmp_path, network=Energy(Quadratic()))
    assert again.network.network.factor.item() == 0.7


def test_bad_input_gets_a_sentence():
    with pytest.raises(OptionError, match=r"needs a torch.nn.Module; got function"):
        Energy(lambda x: x.sum(1))
    with pytest.raises(ShapeError, match=r"shape \(3,\); got \(3, 1\)\. .*nn.Flatten\(0\)"):
        Energy(nn.Linear(2, 1, dtype=F64))(normal(3, 2))
    with pytest.raises(ShapeError, match=r"shape \(3,\); got \(3, 1\)"):
        Energy(nn.Linear(2, 1, dtype=F64)).energy(None, normal(3, 2))
    with pytest.raises(ShapeError, match=r"torch.int64. Write x.float\(\)"):
        Energy(Quadratic())(normal(3, 2).long())
