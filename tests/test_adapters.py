import pytest
import torch
import torchsde
from helpers import fitted_order, moment_error, name, scalar_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdiffeq import odeint

import sdediff as sd
from sdediff.adapters import _Flat, _Stages
from sdediff.runge_kutta import RungeKutta
from sdediff.sde import Along

F64 = torch.float64
TARGET = sd.exact.GaussianMixture(
    torch.tensor([1.0, 2.0]), torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=F64), torch.tensor([0.2, 0.3])
)


def test_euler_of_both_backends_is_our_euler_maruyama_on_the_same_path_and_grid():
    sde = sd.VP()
    model = TARGET.model(sde)
    x = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for grid in (sd.grids.log_snr, sd.grids.karras, sd.grids.uniform):
        times = grid(sde, 13)
        for noise in (sd.RowNoise(3), sd.BrownianPath(3, 0.0, 1.0)):
            for level in (0.5, 1.0):
                ours, theirs = (
                    torch.stack(list(s.solve(s.process(model), x, times, noise.open())))
                    for s in (sd.EulerMaruyama(level), sd.TorchSDE("euler", noise_level=level))
                )
                torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)
        flow = sd.Reverse(model, 0.0)
        ours, theirs = (
            torch.stack(list(s.solve(flow, x, times, None))) for s in (sd.EulerMaruyama(0.0), sd.TorchDiffEq("euler"))
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)
        for tableau, method in (("heun", "heun2"), ("midpoint", "midpoint")):
            ours, theirs = (
                torch.stack(list(s.solve(flow, x, times, None))) for s in (RungeKutta(tableau), sd.TorchDiffEq(method))
            )
            torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "reversible_heun"])
def test_every_method_is_torchsdes_own_on_an_even_grid(method):
    """Against torchsde.sdeint itself, on the flipped clock, with the same Brownian motion."""
    sde = sd.VP()
    model = TARGET.model(sde)
    process = sd.Reverse(model, 1.0)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    n = 7
    times = torch.linspace(0.9375, 0.0625, n + 1, dtype=F64)  # steps of exactly 1/8

    class Flipped(torch.nn.Module):
        noise_type = "diagonal"
        sde_type = "ito" if method in ("euler", "milstein", "srk") else "stratonovich"

        def f(self, r, y):
            return -process.drift(-r, y)

        def g(self, r, y):
            return process.diffusion(-r, y).to(y).expand_as(y) + 0 * y

    if method == "srk":  # Roessler's scheme for additive noise, which torchsde offers with dense diffusion
        Flipped.noise_type = "additive"
        Flipped.g = lambda self, r, y: torch.diag_embed(process.diffusion(-r, y).to(y).expand_as(y))
    stream = sd.RowNoise(2).open()
    known = {}

    class Brownian(torchsde.BaseBrownian):
        shape, dtype, device, levy_area_approximation = (5, 2), F64, x.device, "space-time"

        def __repr__(self):
            return "recorded"

        def __call__(self, ta, tb, return_U=False, return_A=False):
            key = (round(float(ta), 9), round(float(tb), 9))
            if key not in known:
                known[key] = (
                    stream.increment_and_integral(x, -ta, -tb) if method == "srk" else (stream.increment(x, -ta, -tb),)
                )
            return known[key] if return_U else known[key][0]

    theirs = torchsde.sdeint(Flipped(), x, -times, bm=Brownian(), method=method, dt=0.125)
    solver = sd.TorchSDE(method)
    ours = torch.stack(list(solver.solve(solver.process(model), x, times, sd.RowNoise(2).open())))
    torch.testing.assert_close(ours, theirs[1:], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "reversible_heun"])
def test_weak_orders_of_torchsde_on_exact_moments(method):
    steps = [20, 40, 80, 160]
    solver = sd.TorchSDE(method)
    errors = [moment_error(solver, sd.VP(), sd.grids.log_snr(sd.VP(), n, t_min=0.1), 2 * n) for n in steps]
    assert fitted_order(errors, steps) == pytest.approx(solver.order, abs=0.35)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams"])
def test_fixed_step_orders_of_torchdiffeq(method):
    steps, order = [20, 40, 80], sd.TorchDiffEq(method).order
    errors = [moment_error(sd.TorchDiffEq(method), sd.VP(), sd.grids.uniform(sd.VP(), n, t_min=0.2)) for n in steps]
    assert fitted_order(errors, steps) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_adaptive_methods_reach_their_tolerance_and_land_on_the_grid(method):
    sde, target = sd.VP(), scalar_target()
    model = target.model(sde)
    seen = []

    def network(x, t):
        seen.append(t[0].item())
        return model.network(x, t)

    watched = sd.ScoreModel(network, sde, "v", time=lambda t: t)
    times = torch.tensor([1.0, 0.7, 0.05, 1e-5], dtype=F64)
    x = torch.tensor([[0.3], [-1.0]], dtype=F64)
    solution = sd.sample(
        watched, x.shape, x_init=x, times=times, solver=sd.TorchDiffEq(method, rtol=1e-6, atol=1e-6),
        final="none", trajectory=True, seed=0,
    )  # fmt: skip
    for state, s in zip(solution.trajectory, times, strict=True):
        torch.testing.assert_close(state, target.flow(sde, x, 1.0, s), rtol=0, atol=1e-3 if "2" in method else 1e-4)
    assert min(seen) >= 1e-5 * (1 - 1e-6)
    assert max(seen) <= 1.0
    for s in times.tolist():
        assert min(abs(t - s) for t in seen) < 1e-9
    assert solution.accepted >= 3
    assert solution.rejected is not None
    assert solution.nfe == len(seen)


def test_torchdiffeq_agrees_with_odeint_called_by_hand():
    sde = sd.VP()
    model = TARGET.model(sde)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1.0, 1e-3], dtype=F64)
    by_hand = odeint(lambda t, x: model.velocity(t, x), x, times, rtol=1e-7, atol=1e-7, options={"step_t": times[1:]})
    ours = sd.sample(
        model, x.shape, x_init=x, times=times, solver=sd.TorchDiffEq(rtol=1e-7, atol=1e-7), final="none", seed=0
    ).x
    torch.testing.assert_close(ours, by_hand[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [sd.TorchSDE("srk"), sd.TorchSDE("heun"), sd.TorchDiffEq("rk4")], ids=name)
def test_any_event_shape(solver):
    mean = torch.linspace(-1, 1, 12, dtype=F64)
    flat = sd.exact.Gaussian(mean, 0.2).model(sd.VP())
    image = sd.exact.Gaussian(mean.reshape(1, 3, 4), 0.2).model(sd.VP())
    a = sd.sample(flat, (3, 12), solver=solver, steps=8, seed=0, dtype=F64).x
    b = sd.sample(image, (3, 1, 3, 4), solver=solver, steps=8, seed=0, dtype=F64).x
    torch.testing.assert_close(a, b.flatten(1))


SDE_CALLS = {
    "euler": 1, "milstein": 1, "srk": 2, "euler_heun": 1, "heun": 2, "midpoint": 2, "reversible_heun": 1,
}  # fmt: skip


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize(("method", "calls"), SDE_CALLS.items())
def test_the_network_is_called_once_for_every_distinct_time_and_state(method, calls, level):
    asked = []
    model = scalar_target().model(sd.VP())

    def network(x, t):
        asked.append((t[0].item(), x.clone()))
        return model.network(x, t)

    watched = sd.ScoreModel(network, sd.VP(), "v", time=lambda t: t)
    solution = sd.sample(watched, (4, 1), solver=sd.TorchSDE(method, level), steps=10, final="none", seed=0)
    assert solution.nfe == len(asked) == calls * 10 + (method == "reversible_heun")  # it begins with a call
    for i, (t, x) in enumerate(asked):
        assert not any(t == s and torch.equal(x, y) for s, y in asked[:i])


class Counted(sd.SDE):
    """A forward process that counts what is computed for a whole grid and what for single times."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, noisy):
        self.noise = noisy
        self.foreseen = self.single = 0
        self.times = []

    noisy = property(lambda self: self.noise)

    def drift(self, t, x):
        self.single += 1
        return self.f(t, x)

    def f(self, t, x):
        return (t + x).sin()

    def diffusion(self, t, x):
        return 1 + t if self.noise else 0.0

    def along(self, times):
        self.times += times.tolist()

        def drift(k, x):
            self.foreseen += 1
            return self.f(times[k], x)

        return Along(drift, lambda k, x: self.diffusion(times[k], x))


FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams"]


@settings(max_examples=10)
@given(st.integers(1, 12), st.sampled_from([torch.float32, F64]), st.sampled_from([-1, 1]), st.integers(0, 2**20))
@pytest.mark.parametrize("solver", [*map(sd.TorchSDE, SDE_CALLS), *map(sd.TorchDiffEq, FIXED)], ids=name)
def test_what_a_method_asks_is_foreseen_for_all_steps_at_once(solver, steps, dtype, direction, seed):
    """On any grid, in either direction, whatever the dtype of the states."""
    times = torch.rand(steps + 1, dtype=F64, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    process = Counted(solver.noise_level > 0)
    x = torch.tensor([[0.3], [-1.0]], dtype=dtype)
    list(solver.solve(process, x, times if direction < 0 else times.flip(0), sd.RowNoise(0).open()))
    assert process.single == 0
    assert process.foreseen >= steps


@pytest.mark.parametrize(("t", "s"), [(0.3, 0.82), (0.5, 0.04)])
def test_no_stage_lies_beyond_the_grid_by_rounding(t, s):
    assert t + (s - t) not in (s, t)
    process = Counted(True)
    x = torch.tensor([[0.3], [-1.0]], dtype=F64)
    list(sd.TorchSDE("heun").solve(process, x, torch.tensor([t, s], dtype=F64), sd.RowNoise(0).open()))
    assert {min(process.times), max(process.times)} == {t, s}
    assert process.single == 0


def test_a_grid_of_the_backends_own_is_computed_as_it_is_asked():
    process = Counted(False)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    x = torch.tensor([[0.3], [-1.0]], dtype=F64)
    *_, end = sd.TorchDiffEq("rk4", step_size=0.1).solve(process, x, times, None)
    assert process.single > 0
    *_, same = RungeKutta("rk4").solve(Counted(False), x, torch.linspace(0, 1, 11, dtype=F64), None)
    torch.testing.assert_close(end, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SDE_CALLS)
def test_forward_processes_with_diffusions_by_entry(method):
    """Rising times, a tensor for g, and an event of two axes: as the flat process with torchsde's own diagonal."""

    class Coloured(sd.SDE):
        def drift(self, t, x):
            return -(1 + t) * x

        def diffusion(self, t, x):
            return (1 + t) * torch.linspace(1, 2, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:]).expand_as(x)

    times = torch.tensor([0.0, 0.25, 0.5], dtype=F64)
    x = torch.ones(3, 2, 2, dtype=F64)
    image, flat = (
        torch.stack(list(sd.TorchSDE(method).solve(Coloured(), y, times, sd.RowNoise(0).open())))
        for y in (x, x.flatten(1))
    )
    torch.testing.assert_close(image.flatten(2), flat)
    dw = sd.RowNoise(0).open().increment(x, times[0], times[1])
    if method == "euler":
        torch.testing.assert_close(image[0], 0.75 * x + dw * torch.tensor([[1, 4 / 3], [5 / 3, 2]], dtype=F64))


def test_options_are_checked():
    with pytest.raises(sd.OptionError, match="'dopri5'"):
        sd.TorchDiffEq("rk45")
    with pytest.raises(sd.OptionError, match="rtol > 0"):
        sd.TorchDiffEq(rtol=0.0)
    with pytest.raises(sd.OptionError, match="'srk'"):
        sd.TorchSDE("rk45")
    with pytest.raises(sd.CapabilityError, match="steps= or times="):
        sd.TorchSDE("euler", adaptive=True)
    model = scalar_target().model(sd.VP())
    with pytest.raises(sd.CapabilityError, match="would drop the noise"):
        list(sd.TorchDiffEq().solve(sd.Reverse(model, 1.0), torch.zeros(1, 1), torch.tensor([0.5, 0.4]), None))
    with pytest.raises(sd.CapabilityError, match="time integral"):
        sd.sample(model, (1, 1), solver=sd.TorchSDE("srk"), noise=sd.BrownianPath(0, 0.0, 1.0), steps=2)
    path = sd.BrownianPath(0, 0.0, 1.0, integrals=True)
    assert sd.sample(model, (1, 1), solver=sd.TorchSDE("srk"), noise=path, steps=2).x.isfinite().all()


def test_a_broken_network_is_named_in_adaptive_solves():
    def network(x, t):
        return torch.where(t[:, None] < 0.5, torch.nan, x) * torch.tensor([[1.0], [0.0], [1.0]])

    model = sd.ScoreModel(lambda x, t: network(x, t).nan_to_num(nan=torch.inf), sd.VP())
    with pytest.raises(sd.DivergenceError, match=r"t = 0\.\d+, rows 0") as caught:
        sd.sample(model, (3, 2), solver=sd.TorchDiffEq(), seed=0)
    assert 0 in caught.value.rows
    assert caught.value.time < 0.5


def test_the_memory_of_drifts_tells_times_apart():
    """dx = t dt stands still at t = 0, so the midpoint sees the same state at another time."""

    class Ramp(sd.SDE):
        def drift(self, t, x):
            return t * torch.ones_like(x)

        def diffusion(self, t, x):
            return 0.0

    x = torch.zeros(2, 1, dtype=F64)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    (end,) = sd.TorchSDE("midpoint").solve(Ramp(), x, times, sd.RowNoise(0).open())
    torch.testing.assert_close(end, torch.full_like(x, 0.5))
    flat = _Flat(_Stages(Ramp(), times, (0.0, 0.5), F64), x, "ito")
    assert [flat.f(t, x)[0].item() for t in (0.0, 0.5, 0.5, 1.0)] == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize("sde", [sd.VE(), sd.EDM()], ids=name)
def test_the_search_for_a_first_step_stays_within_the_span(sde):
    """On clocks where the start is nearly at rest, the trial step reaches far beyond the end."""
    target = sd.exact.Gaussian(torch.tensor([0.5, -1.0, 0.0], dtype=F64), 0.4)
    x = target.sample(64, seed=0)
    latent = sd.encode(target.model(sde), x, solver=sd.TorchDiffEq()).x
    exact = target.flow(sde, x, sde.t_min, sde.t_max)
    assert ((latent - exact) / sde.sigma(sde.t_max)).abs().max() < 1e-3
