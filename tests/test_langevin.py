import math

import pytest
import torch
from helpers import NAMED, VARIANCE, BasisStream, TwoFunctions, final_moments, name, scalar_target

import sdediff as sd
from sdediff.langevin import AnnealedLangevin, Corrector, LangevinByNorm

F64 = torch.float64


def corrected(corrector, model, t, x, stream):
    """One correction at the time t, which is the second of a grid."""
    times = torch.stack([torch.as_tensor(model.linear.t_max, dtype=F64), torch.as_tensor(t, dtype=F64)])
    return corrector.start(model, times, stream)(1, x)


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
    out = corrected(sd.Langevin(snr=0.3, steps=2), model, t, x, BasisStream())[:, 0]
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
        out = corrected(sd.Langevin(snr=snr, steps=600), model, t, torch.tensor([[5.0]], dtype=F64), BasisStream())
        assert out.item() == pytest.approx(0.7 * sd.VP().alpha(t).item(), abs=1e-3)  # the far start is forgotten
        stationary = 2 * h / (1 - (1 - h / total) ** 2)
        assert stationary / total - 1 == pytest.approx(h / (2 * total), rel=0.15)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.RectifiedFlow()], ids=name)
def test_a_move_by_norm_is_songs_rule_row_by_row(sde):
    target = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0, 0.5, 0.0], [1.5, 0.0, 0.2]], dtype=F64), torch.tensor([0.2, 0.3])
    )
    model = target.model(sde)
    t = torch.tensor(0.3, dtype=F64)
    x = target.marginal(sde, t).sample(4, seed=0)
    got = corrected(LangevinByNorm(0.2, steps=2), model, t, x, sd.RowNoise(1).open())
    stream = sd.RowNoise(1).open()
    for _ in range(2):
        z, score = stream.normal(x), model.score(t, x)
        rows = []
        for row, push, normal in zip(x, score, z, strict=True):
            h = 2 * (0.2 * normal.norm() / push.norm()) ** 2
            rows.append(row + h * push + (2 * h).sqrt() * normal)
        x = torch.stack(rows)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-10)


def test_both_rules_are_of_the_same_size_on_typical_states_of_many_entries():
    """|score| is |z| / sigma on noise: the two sizes differ by 1 / sqrt(entries)."""
    sde = sd.VE()
    model = sd.ScoreModel(lambda x, t: x / sd.over(sde.sigma(t), x), sde)  # all data at 0
    x = sde.sigma(0.5) * torch.randn(3, 4000, dtype=F64, generator=torch.Generator().manual_seed(0))
    fixed, normed = (
        corrected(c, model, 0.5, x, sd.RowNoise(1).open()) for c in (sd.Langevin(0.2), LangevinByNorm(0.2))
    )
    assert ((fixed - normed).norm() / (fixed - x).norm()).item() < 0.05


@pytest.mark.parametrize("corrector", [sd.Langevin(), LangevinByNorm()], ids=name)
def test_a_row_does_not_know_its_batch(corrector):
    model = sd.exact.Gaussian(torch.tensor([0.7, 0.1], dtype=F64), 0.3).model(sd.VP())
    x = torch.tensor([[1.0, 0.3], [-2.0, 0.1]], dtype=F64)
    both = corrected(corrector, model, 0.4, x, sd.RowNoise(1).open())
    for i in (0, 1):
        alone = corrected(corrector, model, 0.4, x[i : i + 1], sd.RowNoise(1).open(first_row=i))
        assert torch.equal(alone, both[i : i + 1])


@pytest.mark.parametrize("corrector", [sd.Langevin(steps=3), LangevinByNorm(steps=3)], ids=name)
def test_nothing_moves_where_sigma_is_zero(corrector):
    calls = []
    model = sd.ScoreModel(lambda x, t: calls.append(t) or x, sd.EDM(), "data")
    x = torch.ones(2, 1, dtype=F64)
    assert torch.equal(corrected(corrector, model, 0.0, x, sd.RowNoise(1).open()), x)
    assert not calls
    assert not torch.equal(corrected(corrector, model, 0.5, x, sd.RowNoise(1).open()), x)
    assert len(calls) == 3


PREDICTORS = [
    sd.DDPM(), sd.EulerMaruyama(), sd.DDIM(), sd.Heun(), sd.TorchSDE("euler"), sd.TorchSDE("srk"),
    sd.TorchSDE("reversible_heun"),
]  # fmt: skip


@pytest.mark.parametrize("corrector", [sd.Langevin(0.2, steps=2), LangevinByNorm(0.2)], ids=name)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=name)
def test_predictor_corrector_is_the_predictor_then_the_moves(predictor, corrector):
    """Memory that a predictor has of the state it returned (reversible Heun) is not used for the moved one."""
    model = scalar_target().model(sd.VP())
    times = torch.tensor([0.8, 0.5, 0.3], dtype=F64)
    x = torch.tensor([[1.0], [-2.0]], dtype=F64)
    solver = sd.PredictorCorrector(predictor, corrector)
    assert solver.noise_level == predictor.noise_level
    assert solver.process(model).noise_level == predictor.noise_level
    assert not solver.deterministic
    states = list(solver.solve(solver.process(model), x, times, sd.RowNoise(1).open()))
    stream, y = sd.RowNoise(1).open(), x
    for i in (0, 1):
        (y,) = predictor.solve(predictor.process(model), y, times[i : i + 2], stream)
        y = corrected(corrector, model, times[i + 1], y, stream)
        torch.testing.assert_close(states[i], y, rtol=1e-12, atol=1e-12)


def test_a_corrector_of_ones_own_will_do():
    class Shift(Corrector):
        def start(self, model, times, noise):
            return lambda k, x: x + times[k]

    model = scalar_target().model(sd.VP())
    times = torch.tensor([0.8, 0.5, 0.3], dtype=F64)
    still = sd.PredictorCorrector(sd.DDIM(), Shift())
    x = torch.tensor([[1.0], [-2.0]], dtype=F64)
    (plain,) = sd.DDIM().solve(sd.DDIM().process(model), x, times[:2], None)
    moved, _ = still.solve(still.process(model), x, times, None)
    torch.testing.assert_close(moved, plain + 0.5)


@pytest.mark.parametrize("predictor", [sd.DDPM(), sd.EulerMaruyama()], ids=name)
def test_a_gentle_corrector_does_not_move_the_limit(predictor):
    sde = sd.VP()
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    exact = (sde.alpha(low) ** 2 * VARIANCE + sde.sigma(low) ** 2).item()

    def error(solver, n, draws):
        return abs(final_moments(solver, sde, sd.grids.log_snr(sde, n, t_min=low), draws)[1].item() - exact)

    mended = [error(sd.PredictorCorrector(predictor, sd.Langevin(0.05)), n, 2 * n) for n in (100, 200)]
    assert 1.6 < mended[0] / mended[1] < 2.6  # first order, like the predictor
    assert mended[0] < error(predictor, 100, 100)  # and nearer: the moves mend the predictor's error


# Annealed Langevin dynamics


def ncsn(score, x, sigmas, moves, epsilon, normal):
    """Song and Ermon 2019, algorithm 1."""
    for sigma in sigmas:
        step = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(moves):
            x = x + step / 2 * score(x, sigma) + step**0.5 * normal(x)
        yield x


@pytest.mark.parametrize("sde", [sd.VE(), sd.EDM(), sd.VP(), sd.CosineVP(), TwoFunctions()], ids=name)
def test_annealed_langevin_is_ncsns_algorithm_in_x_over_alpha(sde):
    target = sd.exact.GaussianMixture(
        torch.ones(2), torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=F64), torch.tensor([0.2, 0.3])
    )
    model, sde = target.model(sde), sd.as_linear(sde)
    still = target.model(sd.EDM(sigma_min=1e-6, sigma_max=1e6))
    times = sd.grids.log_snr(sde, 4, t_min=sde.time(torch.tensor(2.0, dtype=F64)).item())
    alpha, sigmas = sde.alpha(times), (-sde.log_snr(times) / 2).exp()
    epsilon = 0.03
    solver = AnnealedLangevin(steps=3, snr=math.sqrt(epsilon) / (2 * sigmas[-1].item()))
    x = target.marginal(sde, times[0]).sample(5, seed=0)
    got = list(solver.solve(solver.process(model), x, times, sd.RowNoise(1).open()))
    _, *expected = ncsn(lambda y, s: still.score(s, y), x / alpha[0], sigmas, 3, epsilon, sd.RowNoise(1).open().normal)
    for state, y, a in zip(got, expected, alpha[1:], strict=True):
        torch.testing.assert_close(state, a * y, rtol=1e-7, atol=1e-8)


def test_annealed_langevin_samples():
    """From a start that is not the prior at all, on any grid; it is not a solver of the reverse process."""
    sde, target = sd.VP(), scalar_target()
    solver = AnnealedLangevin(steps=100, snr=0.2)
    times = sd.grids.log_snr(sde, 10, t_min=sde.time(torch.tensor(1.0, dtype=F64)).item())
    x = torch.full((4000, 1), 3.0, dtype=F64)
    calls = []
    watched = sd.ScoreModel(lambda x, t: calls.append(t) or target.model(sde).network(x, t), sde, "v")
    solution = sd.sample(watched, x.shape, x_init=x, solver=solver, times=times, final="none", seed=0)
    assert solution.nfe == len(calls) == 100 * 11
    end = target.marginal(sde, times[-1])
    assert solution.x.mean().item() == pytest.approx(end.mean.item(), abs=0.05)
    assert solution.x.var().item() == pytest.approx(end.cov.item(), rel=0.1)
    assert sd.sample(watched, (3, 1), solver=AnnealedLangevin(steps=2), seed=0).nfe == 2 * 11 + 1
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(watched, x, solver=solver)


def test_annealed_langevin_is_refused_where_alpha_is_zero():
    model = scalar_target().model(sd.RectifiedFlow(t_max=1.0))
    with pytest.raises(sd.CapabilityError, match="at t = 1 alpha is 0"):
        sd.sample(model, (2, 1), solver=AnnealedLangevin(steps=1), steps=3, seed=0)


def test_options_are_checked():
    for kind in (sd.Langevin, LangevinByNorm, AnnealedLangevin):
        for wrong in ({"snr": 0.0}, {"steps": 0}):
            with pytest.raises(sd.OptionError, match=f"^{kind.__name__} needs snr > 0 and steps >= 1"):
                kind(**wrong)
    with pytest.raises(sd.OptionError, match="must be a Solver"):
        sd.PredictorCorrector("ddpm")
    with pytest.raises(sd.OptionError, match=r"must be a Corrector such as Langevin\(...\); got 0.1"):
        sd.PredictorCorrector(sd.DDPM(), 0.1)
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="by itself"):
        sd.sample(model, (2, 1), solver=sd.PredictorCorrector(sd.TorchDiffEq()), seed=0)
    with pytest.raises(sd.CapabilityError, match="got VP"):
        sd.PredictorCorrector(sd.EulerMaruyama()).start(sd.VP(), torch.zeros(1, 1), torch.tensor([0.5, 0.4]), None)
