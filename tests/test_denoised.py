import pytest
import torch

import sdediff as sd

F64 = torch.float64


def ring():
    angles = torch.arange(6, dtype=F64)
    return sd.exact.GaussianMixture(torch.ones(6), torch.stack([angles.cos(), angles.sin()], 1), torch.full((6,), 0.01))


def test_a_mapped_model_has_the_changed_data_and_the_noise_that_goes_with_it():
    sde = sd.VP()
    model = ring().model(sde)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    mapped = sd.map_denoised(model, lambda data: 2 * data + 1)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)
    data = 2 * model.denoised(t, x) + 1
    torch.testing.assert_close(mapped.denoised(t, x), data)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    torch.testing.assert_close(mapped.noise(t, x), (x - alpha * data) / sigma)


def test_clamping_holds_for_every_solver():
    model = sd.clamp_denoised(ring().model(sd.VP()), -0.5, 0.25)
    for solver in (sd.Exponential(), sd.DDPM(), sd.Heun(), sd.Adaptive()):
        x = sd.sample(model, (20, 2), solver=solver, seed=0).x
        assert x.max() <= 0.25
        assert x.min() >= -0.5
        assert x.max() > 0.2


def test_dynamic_threshold_by_hand():
    x = torch.tensor([[0.5, -0.25, 1.0], [4.0, -2.0, 1.0], [0.1, 0.2, 8.0]])
    model = sd.ScoreModel(lambda y, t: x, sd.VP(), "data")
    whole = sd.dynamic_threshold(model, quantile=1.0).denoised(0.5, x)
    torch.testing.assert_close(whole, torch.stack([x[0], x[1] / 4, x[2] / 8]))
    half = sd.dynamic_threshold(model, quantile=0.5, limit=2.0).denoised(0.5, x)
    torch.testing.assert_close(half, torch.tensor([[0.5, -0.25, 1.0], [2.0, -2.0, 1.0], [0.1, 0.2, 2.0]]))


def test_conditions_modes_and_dtypes_pass_through():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.seen = []

        def forward(self, x, t, condition):
            self.seen.append((self.training, x.dtype, condition.shape))
            return self.scale * x * condition[:, None]

    net = Net()
    model = sd.clamp_denoised(sd.ScoreModel(net, sd.VP(), "data"))
    x = sd.sample(model, (5, 2), steps=3, condition=torch.ones(5), batch_size=2, seed=0, dtype=F64).x
    assert x.dtype == F64
    assert all(not training and dtype == torch.float32 for training, dtype, _ in net.seen)
    assert {shape[0] for *_, shape in net.seen} == {1, 2}
    assert net.training
    assert sd.sample(model, (5, 2), steps=3, condition=torch.ones(5), seed=0).x.dtype == torch.float32


def test_options_are_checked():
    model = ring().model(sd.VP())
    with pytest.raises(sd.OptionError, match="low < high"):
        sd.clamp_denoised(model, 1.0, -1.0)
    with pytest.raises(sd.OptionError, match="quantile"):
        sd.dynamic_threshold(model, quantile=0.0)
