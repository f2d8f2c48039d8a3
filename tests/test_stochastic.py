"""SRA1: its formula, strong order 3/2 on one path, weak order 2 on exact moments, calls."""

import pytest
import torch
from helpers import NAMED, VARIANCE, TwoFunctions, final_moments, fitted_order, moment_error, name, scalar_target
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.noise import NoiseStream
from sdediff.stochastic import SRA1
from sdediff.testing import gaussian_targets, linear_sdes, time_grids

F64 = torch.float64
MIXTURE = sd.exact.GaussianMixture(
    torch.ones(2), torch.tensor([[-0.5, 0.4], [0.7, 0.0]], dtype=F64), torch.tensor([0.5, 0.3])
)


class OnePath(NoiseStream):
    """A path given by its values on fine even steps from `high` down to `low`, and their exact areas."""

    def __init__(self, x, low, high, cells, seed=0):
        normal = torch.randn(2, cells, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        h = (high - low) / cells
        self.high, self.h = high, h
        zero = torch.zeros_like(x)[None]
        # in each cell the mean of the path lies (dW / 2 + sqrt(h / 12) z) above its start
        moves = h**0.5 * normal[0]
        self.path = torch.cat([zero, moves.cumsum(0)])
        areas = h * (self.path[:-1] + moves / 2 + (h / 12) ** 0.5 * normal[1])
        self.areas = torch.cat([zero, areas.cumsum(0)])

    def normal(self, x):
        raise NotImplementedError

    def unit(self, x, t, s):
        return self.increment_and_integral(x, t, s)[0] / (s - t).abs().sqrt()

    def increment_and_integral(self, x, t, s):
        start, end = (round((self.high - time.item()) / self.h) for time in (t, s))
        first, last = sorted((start, end))
        area = self.areas[last] - self.areas[first] - (last - first) * self.h * self.path[start]
        return self.path[end] - self.path[start], area


@given(linear_sdes(), gaussian_targets(), st.data())
def test_a_step_is_roesslers_scheme_in_rising_time(sde, target, data):
    """SRA1's published coefficients, on the clock -t of a reverse process."""
    times = data.draw(time_grids(sde, max_steps=3))
    level = data.draw(st.sampled_from([0.5, 1.0, 1.5]))
    process = sd.Reverse(target.model(sde), level)
    x = target.marginal(sde, times[0]).sample(3, seed=0)
    (got, *_) = SRA1(level).solve(process, x, times, sd.RowNoise(4).open())
    dw, dz = sd.RowNoise(4).open().increment_and_integral(x, times[0], times[1])
    start, h = -times[0], times[0] - times[1]
    f = lambda r, y: -process.drift(-r, y)  # noqa: E731
    g = lambda r: process.diffusion(-r, x)  # noqa: E731
    first = f(start, x)
    second = f(start + 3 / 4 * h, x + 3 / 4 * h * first + 3 / 2 * g(start + h) * dz / h)
    expected = x + h * (first / 3 + 2 / 3 * second) + (dw - dz / h) * g(start + h) + dz / h * g(start)
    size = x.abs().max() + (h * first).abs().max() + (h * second).abs().max() + (got - x).abs().max()
    assert (got - expected).abs().max() <= 1e-9 * size


@pytest.mark.parametrize("steps", [[40, 80, 160], [41, 79, 161]], ids=["even", "odd"])
@pytest.mark.parametrize("grid", [sd.grids.log_snr, sd.grids.karras, sd.grids.uniform], ids=lambda g: g.__name__)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
def test_moments_are_of_second_order(level, grid, steps):
    sde, solver = sd.VP(), SRA1(level)
    errors = [moment_error(solver, sde, grid(sde, n, t_min=0.1), draws=2 * n * bool(level)) for n in steps]
    assert solver.order == 2
    assert fitted_order(errors, steps) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("sde", [*NAMED, TwoFunctions()], ids=name)
def test_it_keeps_the_marginals_for_every_noise_level(sde, level):
    sde = sd.as_linear(sde)
    low = sde.time(torch.tensor(3.0, dtype=F64)).item()
    mean, variance = final_moments(SRA1(level), sde, sd.grids.log_snr(sde, 200, t_min=low), 400 * bool(level))
    alpha, sigma = sde.alpha(low), sde.sigma(low)
    assert mean.item() == pytest.approx((alpha * 0.7).item(), rel=5e-3)
    assert variance.item() == pytest.approx((alpha**2 * VARIANCE + sigma**2).item(), rel=1e-2)


class Wavy(sd.SDE):
    """A drift with much curvature: the terms of order 3/2 rule."""

    def drift(self, t, x):
        return (3 * x).sin()

    def diffusion(self, t, x):
        return 1 + t


def strong_order(solver, process, x, times, noise):
    """Fitted to root-mean-square distances from a very fine solution on the same path."""

    def end(solver, every):
        *_, last = solver.solve(process, x, times[::every], noise)
        return last

    steps = (32, 64, 128)
    reference = end(SRA1(), 1)
    errors = [(end(solver, (len(times) - 1) // n) - reference).square().mean().sqrt().item() for n in steps]
    return fitted_order(errors, steps)


@pytest.mark.parametrize("direction", [1, -1])
def test_strong_order_three_halves_on_one_path(direction):
    x = torch.randn(1000, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    noise = OnePath(x, 0.0, 1.0, 1024)
    times = torch.linspace(0.5 - direction / 2, 0.5 + direction / 2, 1025, dtype=F64)
    assert strong_order(SRA1(), Wavy(), x, times, noise) == pytest.approx(1.5, abs=0.15)
    assert strong_order(sd.EulerMaruyama(), Wavy(), x, times, noise) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5])
def test_strong_order_of_a_reverse_process(level):
    """Its curvature is slight and the terms of order 2 show as well; Euler-Maruyama has order 1."""
    process = sd.Reverse(MIXTURE.model(sd.VP()), level)
    x = MIXTURE.marginal(sd.VP(), 1.0).sample(100, seed=0)
    noise = OnePath(x, 0.1, 1.0, 1024)
    times = torch.linspace(1.0, 0.1, 1025, dtype=F64)
    assert 1.4 < strong_order(SRA1(level), process, x, times, noise) < 2.2
    assert strong_order(sd.EulerMaruyama(level), process, x, times, noise) == pytest.approx(1, abs=0.2)


def test_a_brownian_path_will_do():
    path = sd.BrownianPath(0, 0.1, 1.0, integrals=True)
    process = sd.Reverse(MIXTURE.model(sd.VP()))
    x = MIXTURE.marginal(sd.VP(), 1.0).sample(100, seed=0)
    times = torch.linspace(1.0, 0.1, 513, dtype=F64)
    assert 1.3 < strong_order(SRA1(), process, x, times, path.open()) < 2.4


@pytest.mark.parametrize("direction", [1, -1])
def test_a_pure_noise_of_changing_strength_is_integrated_to_order_three_halves(direction):
    """dx = t^2 dW over coarse steps in either direction of time, against the same path in fine steps."""

    class Growing(sd.SDE):
        def drift(self, t, x):
            return torch.zeros_like(x)

        def diffusion(self, t, x):
            return t**2

    x = torch.zeros(2000, 1, dtype=F64)
    noise = OnePath(x, 0.0, 1.0, 512)

    def end(n):
        times = torch.linspace(1.0, 0.0, n + 1, dtype=F64)
        *_, last = SRA1().solve(Growing(), x, times if direction < 0 else times.flip(0), noise)
        return last

    errors = [(end(n) - end(512)).square().mean().sqrt().item() for n in (8, 16, 32)]
    assert fitted_order(errors, [8, 16, 32]) == pytest.approx(2, abs=0.1)  # g'' h^2 sqrt(h) a step
    *_, linear = SRA1().solve(Growing(), x, torch.tensor([0.0, 1.0], dtype=F64), noise)
    dw, dz = noise.increment_and_integral(x, torch.tensor(0.0), torch.tensor(1.0))
    torch.testing.assert_close(linear, dw - dz)  # int t dW, the straight line through 0 and 1


def test_it_is_torchsdes_srk_on_the_same_path():
    model = MIXTURE.model(sd.VP())
    times = sd.grids.karras(sd.VP(), 13, t_min=0.01)
    x = MIXTURE.sample(5, seed=0)
    ours, theirs = (
        torch.stack(list(s.solve(s.process(model), x, times, sd.RowNoise(3).open())))
        for s in (SRA1(), sd.TorchSDE("srk"))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_it_calls_the_network_twice_a_step_and_only_for_new_points():
    asked = []
    model = scalar_target().model(sd.VP())
    watched = sd.ScoreModel(lambda x, t: asked.append((t[0].item(), x.clone())) or model.network(x, t), sd.VP(), "v")
    solution = sd.sample(watched, (4, 1), solver=SRA1(), steps=10, final="none", seed=0)
    assert solution.nfe == len(asked) == 20
    for i, (t, x) in enumerate(asked):
        assert not any(t == s and torch.equal(x, y) for s, y in asked[:i])


def test_any_event_shape_and_diffusions_by_entry():
    mean = torch.linspace(-1, 1, 12, dtype=F64)
    flat, image = (sd.exact.Gaussian(m, 0.2).model(sd.VP()) for m in (mean, mean.reshape(1, 3, 4)))
    a = sd.sample(flat, (3, 12), solver=SRA1(), steps=8, seed=0, dtype=F64).x
    b = sd.sample(image, (3, 1, 3, 4), solver=SRA1(), steps=8, seed=0, dtype=F64).x
    torch.testing.assert_close(a, b.flatten(1))

    class Coloured(sd.SDE):
        def drift(self, t, x):
            return -x

        def diffusion(self, t, x):
            return torch.linspace(1, 2, x[0].numel(), dtype=x.dtype).expand_as(x)

    x = torch.ones(3, 2, dtype=F64)
    times = torch.tensor([0.0, 0.5], dtype=F64)
    (both,) = SRA1().solve(Coloured(), x, times, sd.RowNoise(0).open())
    (theirs,) = sd.TorchSDE("srk").solve(Coloured(), x, times, sd.RowNoise(0).open())
    torch.testing.assert_close(both, theirs)


def test_a_start_at_pure_noise_and_a_source_without_integrals_are_refused():
    model = scalar_target().model(sd.RectifiedFlow(t_max=1.0))
    with pytest.raises(sd.CapabilityError, match="infinite at t = 1, where alpha is 0"):
        sd.sample(model, (2, 1), solver=SRA1(), steps=4, seed=0)

    class IncrementsOnly(NoiseStream):
        def normal(self, x):
            return torch.zeros_like(x)

        def unit(self, x, t, s):
            return torch.zeros_like(x)

    with pytest.raises(sd.CapabilityError, match="time integral"):
        list(SRA1().solve(sd.Reverse(MIXTURE.model(sd.VP())), MIXTURE.sample(2, seed=0), sd.grids.uniform(sd.VP(), 2),
                          IncrementsOnly()))  # fmt: skip
