"""Densities that come with samples, and paths there and back."""

import pytest
import torch
from helpers import NAMED, name

import sdediff as sd

F64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]], dtype=F64)
MIXTURE = sd.exact.GaussianMixture(torch.tensor([1.0, 2.0, 3.0]), MEANS, torch.tensor([0.02, 0.1, 0.3]))


@pytest.mark.parametrize("sde", NAMED[:-1], ids=name)
def test_samples_carry_their_density(sde):
    """That of the model whose latents have the SDE's own prior, which is what log_prob says of the same states."""
    model = MIXTURE.model(sde)
    drawn = sd.sample(model, (12, 2), final="none", with_log_prob=True, seed=1, atol_nats=1e-4)
    again = sd.log_prob(model, drawn.x, tail="none", atol_nats=1e-4)
    torch.testing.assert_close(drawn.log_prob, again.value, rtol=0, atol=1e-3)
    assert torch.equal(drawn.log_prob_stderr, torch.zeros(12, dtype=F64))
    assert drawn.nfe == drawn.row_nfe.max()
    assert torch.equal(drawn.row_nfe, 1 + drawn.accepted + drawn.rejected)


def test_the_density_of_gaussian_samples_has_the_closed_form():
    target, sde = sd.exact.Gaussian(torch.tensor([0.5, -0.3], dtype=F64), 0.3), sd.VP()
    drawn = sd.sample(target.model(sde), (20, 2), final="none", with_log_prob=True, seed=2, atol_nats=1e-4)
    latent = target.flow(sde, drawn.x, sde.t_min, 1.0)
    mismatch = sde.prior((2,), dtype=F64).log_prob(latent) - target.marginal(sde, 1.0).log_prob(latent)
    exact = target.marginal(sde, sde.t_min).log_prob(drawn.x) + mismatch
    torch.testing.assert_close(drawn.log_prob, exact, rtol=0, atol=1e-3)


def test_rows_do_not_depend_on_chunks_and_states_are_those_of_the_seed():
    model = MIXTURE.model(sd.VP())
    for options in ({}, {"steps": 15}, {"steps": 15, "divergence": sd.Hutchinson(1, "gaussian")}):
        options = {"final": "none", "with_log_prob": True, "seed": 3, **options}
        whole = sd.sample(model, (9, 2), **options)
        for part in (sd.sample(model, (9, 2), batch_size=4, **options), sd.sample(model, (3, 2), **options)):
            n = len(part.x)
            torch.testing.assert_close(part.x, whole.x[:n], rtol=0, atol=1e-10)
            torch.testing.assert_close(part.log_prob, whole.log_prob[:n], rtol=0, atol=1e-10)
    plain = sd.sample(model, (9, 2), final="none", seed=3, solver=sd.Adaptive(1e-6, 1e-6)).x
    torch.testing.assert_close(sd.sample(model, (9, 2), **(options | {"steps": 300})).x, plain, rtol=0, atol=1e-3)


def test_gradients_flow_through_samples_and_their_density():
    model = MIXTURE.model(sd.VP())
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def total(x, **options):
        drawn = sd.sample(model, (3, 2), x_init=x, final="none", with_log_prob=True, steps=10, **options)
        return drawn.log_prob.sum() + (drawn.x**2).sum()

    (slope,) = torch.autograd.grad(total(x, differentiable=True), x)
    with torch.no_grad():
        step = 1e-6 * torch.eye(6, dtype=F64).reshape(6, 3, 2)
        numeric = torch.stack([(total(x + h) - total(x - h)) / 2e-6 for h in step]).reshape(3, 2)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, sd.OptionError, r'density of the states at the last time, not of denoised ones: write final="none"'),
        ({"final": "none", "solver": sd.DDIM()}, sd.CapabilityError, r"takes no solver; got DDIM"),
        ({"final": "none", "trajectory": True}, sd.OptionError, r"keeps no trajectory"),
        ({"final": "none", "divergence": "hutch"}, sd.OptionError, r"Unknown divergence 'hutch'"),
    ],
)
def test_what_does_not_go_with_a_density_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        sd.sample(MIXTURE.model(sd.VP()), (2, 2), with_log_prob=True, **options)


def test_decode_inverts_encode_and_the_round_trip_says_how_well():
    model, x = MIXTURE.model(sd.VP()), MIXTURE.sample(8, seed=0)
    for solver, steps in ((None, 60), (sd.Heun(), 200), (sd.Adaptive(1e-6, 1e-6), None)):
        there = sd.encode(model, x, solver=solver, steps=steps)
        back = sd.decode(model, there.x, solver=solver, steps=steps)
        trip = sd.round_trip(model, x, solver=solver, steps=steps)
        torch.testing.assert_close(trip.latent, there.x)
        torch.testing.assert_close(trip.x, back.x)
        torch.testing.assert_close(trip.error, (back.x - x).square().mean(1).sqrt())
        assert trip.nfe == there.nfe + back.nfe
        assert trip.error.max() < 0.02
    assert sd.round_trip(model, x, solver=sd.Adaptive(1e-6, 1e-6)).error.max() < 1e-4
    with pytest.raises(sd.CapabilityError, match="decode follows the probability-flow ODE, but DDPM"):
        sd.decode(model, x, solver=sd.DDPM())


def test_densities_that_are_not_known_are_refused_and_inference_mode_is_left():
    model, sde = MIXTURE.model(sd.VP()), sd.VP()
    states = MIXTURE.marginal(sde, 0.1).sample(4, seed=0)
    times = torch.linspace(0.1, 1e-4, 20, dtype=F64)
    with pytest.raises(sd.TimeError, match="the log-density there is known at t_max"):
        sd.sample(model, (4, 2), times=times, x_init=states, final="none", with_log_prob=True)
    options = {"final": "none", "with_log_prob": True, "seed": 1, "steps": 10}
    with torch.inference_mode():
        inside = sd.sample(model, (3, 2), **options).log_prob
    assert torch.equal(inside, sd.sample(model, (3, 2), **options).log_prob)
