import pytest
import torch
from helpers import NAMED, VARIANCE, BasisStream, TwoFunctions, final_moments, name, scalar_target

import sdediff as sd

F64 = torch.float64


@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_a_move_is_its_recursion_on_gaussian_data(sde):
    """x + h score + sqrt(2 h) z on N(m, V): factor 1 - h / V, noise 2 h, for h = 2 (snr sigma)^2."""
    model = scalar_target().model(sde)
    sde = model.linear
    t = torch.tensor(0.4 * sde.t_max, dtype=F64)
    total = sde.alpha(t) ** 2 * VARIANCE + sde.sigma(t) ** 2
    h = 2 * (0.3 * sde.sigma(t)) ** 2
    x = torch.zeros(4, 1, dtype=F64)
    x[1] = 1
    out = sd.Langevin(snr=0.3, steps=2).correct(model, t, x, BasisStream())[:, 0]
    factor = 1 - h / total
    assert (out[1] - out[0]).item() == pytest.approx((factor**2).item(), rel=1e-8)
    assert (out[2] - out[0]).item() == pytest.approx((factor * (2 * h).sqrt()).item(), rel=1e-8)
    assert (out[3] - out[0]).item() == pytest.approx((2 * h).sqrt().item(), rel=1e-8)
    mean = sde.alpha(t) * 0.7
    assert out[0].item() == pytest.approx((mean - factor**2 * mean).item(), rel=1e-6)


def test_small_moves_keep_and_restore_the_marginal():
    """The stationary variance of the recursion tends to V as snr falls, with the bias h / (2 V) + O(h^2)."""
    model = scalar_target().model(sd.VP())
    t = torch.tensor(0.4, dtype=F64)
    total = (sd.VP().alpha(t) ** 2 * VARIANCE + sd.VP().sigma(t) ** 2).item()
    for snr in (0.3, 0.2, 0.1):
        h = 2 * (snr * sd.VP().sigma(t).item()) ** 2
        out = sd.Langevin(snr=snr, steps=600).correct(model, t, torch.tensor([[5.0]], dtype=F64), BasisStream())
        assert out.item() == pytest.approx(0.7 * sd.VP().alpha(t).item(), abs=1e-3)  # the far start is forgotten
        stationary = 2 * h / (1 - (1 - h / total) ** 2)
        assert stationary / total - 1 == pytest.approx(h / (2 * total), rel=0.15)


def test_the_step_is_per_row():
    model = scalar_target().model(sd.VP())
    t = torch.tensor([0.2, 0.9], dtype=F64)
    x = torch.tensor([[1.0], [-2.0]], dtype=F64)
    both = sd.Langevin().correct(model, t, x, sd.RowNoise(1).open())
    for i in (0, 1):
        alone = sd.Langevin().correct(model, t[i], x[i : i + 1], sd.RowNoise(1).open(first_row=i))
        assert torch.equal(alone, both[i : i + 1])


def test_predictor_corrector_is_the_predictor_then_the_moves():
    model = scalar_target().model(sd.VP())
    times = torch.tensor([0.8, 0.5, 0.3], dtype=F64)
    x = torch.tensor([[1.0], [-2.0]], dtype=F64)
    for predictor in (sd.DDPM(), sd.EulerMaruyama(), sd.DDIM(), sd.TorchSDE("euler")):
        solver = sd.PredictorCorrector(predictor, sd.Langevin(0.2, steps=2))
        assert solver.noise_level == predictor.noise_level
        states = list(solver.solve(solver.process(model), x, times, sd.RowNoise(1).open()))
        stream, y = sd.RowNoise(1).open(), x
        for i in (0, 1):
            (y,) = predictor.solve(predictor.process(model), y, times[i : i + 2], stream)
            y = sd.Langevin(0.2, steps=2).correct(model, times[i + 1], y, stream)
            torch.testing.assert_close(states[i], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predictor", [sd.DDPM(), sd.EulerMaruyama()], ids=name)
def test_a_gentle_corrector_does_not_move_the_limit(predictor):
    sde = sd.VP()
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    exact = (sde.alpha(low) ** 2 * VARIANCE + sde.sigma(low) ** 2).item()

    def error(solver, n, draws):
        return abs(final_moments(solver, sde, sd.grids.log_snr(sde, n, t_min=low), draws)[1].item() - exact)

    corrected = [error(sd.PredictorCorrector(predictor, sd.Langevin(0.05)), n, 2 * n) for n in (100, 200)]
    assert 1.6 < corrected[0] / corrected[1] < 2.6  # first order, like the predictor
    assert corrected[0] < error(predictor, 100, 100)  # and nearer: the moves mend the predictor's error


def test_options_are_checked():
    for wrong in ({"snr": 0.0}, {"steps": 0}):
        with pytest.raises(sd.OptionError, match="snr > 0 and steps >= 1"):
            sd.Langevin(**wrong)
    with pytest.raises(sd.OptionError, match="must be a Solver"):
        sd.PredictorCorrector("ddpm")
    with pytest.raises(sd.OptionError, match="must be a Langevin"):
        sd.PredictorCorrector(sd.DDPM(), 0.1)
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="by itself"):
        sd.sample(model, (2, 1), solver=sd.PredictorCorrector(sd.TorchDiffEq()), seed=0)
