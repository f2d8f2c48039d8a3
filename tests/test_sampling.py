import dataclasses
import pickle

import pytest
import torch
from helpers import TwoFunctions, name, scalar_target

import sdediff as sd
from sdediff.runge_kutta import RungeKutta
from sdediff.runs import default_solver

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
ROOT = torch.randn(3, 3, dtype=F64, generator=GENERATOR)
GAUSSIAN = sd.exact.Gaussian(torch.tensor([0.5, -1.0, 0.0], dtype=F64), ROOT @ ROOT.T + 0.1 * torch.eye(3))
MIXTURE = sd.exact.GaussianMixture(
    torch.tensor([1.0, 2.0]),
    torch.randn(2, 3, dtype=F64, generator=GENERATOR),
    sd.exact.LowRank(torch.randn(2, 3, 1, dtype=F64, generator=GENERATOR), 0.05),
)
STEPPERS = [
    sd.DDPM(),
    sd.DDPM("beta"),
    sd.DDIM(),
    sd.DDIM(0.5),
    sd.Exponential(),
    sd.Exponential(2, noise_level=1.0, predict="data"),
    sd.ExponentialRungeKutta(3),
    sd.UniPC(),
    sd.EulerMaruyama(),
    sd.EulerMaruyama(0.0),
    sd.Heun(),
    sd.Heun(churn=3.0),
    sd.PredictorCorrector(sd.EulerMaruyama(), sd.Langevin(steps=2)),
    sd.TorchSDE("euler"),
    sd.TorchSDE("srk"),
    sd.TorchDiffEq("rk4"),
]


@pytest.mark.parametrize("solver", STEPPERS, ids=name)
@pytest.mark.parametrize("target", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_a_row_is_bitwise_the_same_in_any_batch_and_chunk(target, solver):
    model = target.model(sd.VP())
    whole = sd.sample(model, (64, 3), solver=solver, steps=6, seed=5, dtype=F64).x
    for rows, chunk in ((1, None), (7, None), (7, 2), (64, 5), (64, 64), (64, 1)):
        part = sd.sample(model, (rows, 3), solver=solver, steps=6, seed=5, dtype=F64, batch_size=chunk).x
        assert torch.equal(part, whole[:rows]), (rows, chunk)
    other = sd.sample(model, (64, 3), solver=solver, steps=6, seed=6, dtype=F64).x
    assert not torch.isclose(other, whole).any()


@pytest.mark.parametrize("event", [(), (5000,), (1, 8, 8)])
def test_rows_are_independent_for_any_event(event):
    """Events so large that a noise block holds one row, images, and scalars."""
    model = sd.ScoreModel(lambda x, t: x * 0.5, sd.VP())
    whole = sd.sample(model, (5, *event), solver=sd.DDPM(), steps=3, seed=1).x
    part = sd.sample(model, (5, *event), solver=sd.DDPM(), steps=3, seed=1, batch_size=2).x
    assert torch.equal(whole, part)


def test_the_global_seed_governs_unseeded_samples():
    model = GAUSSIAN.model(sd.VP())
    torch.manual_seed(3)
    a = sd.sample(model, (4, 3), steps=3).x
    torch.manual_seed(3)
    assert torch.equal(sd.sample(model, (4, 3), steps=3).x, a)
    assert not torch.equal(sd.sample(model, (4, 3), steps=3).x, a)


@pytest.mark.parametrize(
    ("solver", "nfe"),
    [(sd.DDPM(), 10), (sd.DDIM(), 10), (sd.Exponential(), 10), (sd.UniPC(), 10), (sd.ExponentialRungeKutta(2), 20),
     (sd.EulerMaruyama(), 10), (sd.Heun(), 20), (sd.TorchDiffEq("rk4"), 40),
     (sd.PredictorCorrector(sd.DDPM(), sd.Langevin(steps=2)), 30), (sd.TorchSDE("euler"), 10)],
    ids=name,
)  # fmt: skip
def test_network_calls_are_counted(solver, nfe):
    calls = []
    model = sd.ScoreModel(lambda x, t: calls.append(len(x)) or x, sd.VP())
    plain = sd.sample(model, (6, 2), solver=solver, steps=10, final="none", seed=0)
    assert plain.nfe == nfe == len(calls)
    assert sd.sample(model, (6, 2), solver=solver, steps=10, seed=0).nfe == nfe + 1
    assert sd.sample(model, (6, 2), solver=solver, steps=10, seed=0, batch_size=2).nfe == nfe + 1
    assert plain.accepted is None


def test_the_end_is_denoised_unless_told_otherwise():
    model = MIXTURE.model(sd.VP())
    plain = sd.sample(model, (4, 3), steps=5, seed=0, final="none", t_min=0.1, dtype=F64)
    ended = sd.sample(model, (4, 3), steps=5, seed=0, t_min=0.1, dtype=F64)
    assert plain.times[-1] == 0.1
    torch.testing.assert_close(ended.x, model.denoised(0.1, plain.x), rtol=1e-12, atol=1e-12)


def test_the_trajectory_starts_at_the_prior_and_ends_at_the_state():
    model = GAUSSIAN.model(sd.VE())
    solution = sd.sample(model, (5000, 3), steps=4, seed=0, final="none", trajectory=True, dtype=F64, batch_size=777)
    assert solution.trajectory.shape == (5, 5000, 3)
    assert torch.equal(solution.trajectory[-1], solution.x)
    assert solution.trajectory[0].std().item() == pytest.approx(50, rel=5 / (2 * 15000) ** 0.5)
    times = solution.times
    again = sd.sample(model, (5000, 3), times=times, seed=0, final="none", dtype=F64)
    assert torch.equal(again.x, solution.x)


@pytest.mark.parametrize("solver", [sd.TorchDiffEq(rtol=1e-8, atol=1e-8), sd.TorchDiffEq("rk4"), sd.Heun()], ids=name)
def test_encode_follows_the_exact_flow_and_sample_leads_back(solver):
    for sde in (sd.VP(), sd.VE(), sd.RectifiedFlow(), TwoFunctions()):
        model = GAUSSIAN.model(sde)
        x = GAUSSIAN.sample(6, seed=0)
        steps = None if solver.default_steps == 1 else 400 // solver.order
        there = sd.encode(model, x, solver=solver, steps=steps, t_min=1e-3)
        scale = GAUSSIAN.marginal(sde, sde.t_max).cov.diagonal().sqrt()
        exact = GAUSSIAN.flow(sde, x, 1e-3, sde.t_max)
        assert ((there.x - exact) / scale).abs().max() < 2e-3
        back = sd.sample(model, x.shape, x_init=there.x, solver=solver, steps=steps, t_min=1e-3, final="none", seed=0)
        assert (back.x - x).abs().max() < 2e-3
        assert (there.times.diff() > 0).all()


def test_encode_by_ddim_converges_to_the_flow():
    model, x = GAUSSIAN.model(sd.VP()), GAUSSIAN.sample(6, seed=0)
    exact = GAUSSIAN.flow(sd.VP(), x, 1e-3, 1.0)
    errors = [(sd.encode(model, x, solver=sd.DDIM(), steps=n, t_min=1e-3).x - exact).abs().max() for n in (100, 200)]
    assert 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize("solver", STEPPERS, ids=name)
def test_samples_have_the_right_moments(solver):
    """10,000 rows: mean and covariance within 5 standard errors and the discretisation error of 150 steps."""
    steps = 150
    x = sd.sample(GAUSSIAN.model(sd.VP()), (10000, 3), solver=solver, steps=steps, t_min=1e-4, seed=0, dtype=F64).x
    scale = GAUSSIAN.cov.diagonal().sqrt()
    assert ((x.mean(0) - GAUSSIAN.mean) / scale).abs().max() < 5 / 10000**0.5 + 0.01
    bias = 0.15 if solver.order == 1 else 0.02
    assert ((x.T.cov() - GAUSSIAN.cov) / scale / scale[:, None]).abs().max() < 5 * (2 / 10000) ** 0.5 + bias


def test_conditions_are_cut_with_the_rows_and_others_pass_untouched():
    seen = []

    def network(x, t, condition):
        seen.append(condition)
        return x * 0

    model = sd.ScoreModel(network, sd.VP())
    labels = torch.arange(5)
    sd.sample(model, (5, 2), condition=labels, batch_size=2, steps=1, final="none", seed=0)
    assert [c.tolist() for c in seen] == [[0, 1], [2, 3], [4]]
    seen.clear()
    sd.sample(model, (5, 2), condition={"text": "a"}, steps=1, final="none", seed=0)
    assert seen == [{"text": "a"}]


def test_divergence_names_step_time_and_rows_also_across_chunks():
    def network(x, t):
        bad = (x[:, :1] > 0) & (t[:, None] < 0.5)
        return torch.where(bad, torch.nan, x)

    model = sd.ScoreModel(network, sd.VP())
    times = torch.tensor([1.0, 0.6, 0.4, 0.2], dtype=F64)
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    with pytest.raises(sd.DivergenceError, match=r"step 2, t = 0\.2, rows 1, 3") as caught:
        sd.sample(model, (4, 1), x_init=x, times=times, seed=0, final="none")
    assert (caught.value.step, caught.value.time, caught.value.rows) == (2, 0.2, [1, 3])
    x = torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]])
    for solver in (sd.DDIM(), sd.TorchDiffEq()):
        with pytest.raises(sd.DivergenceError, match="rows 3") as caught:
            sd.sample(model, (4, 1), x_init=x, times=times, seed=0, solver=solver, batch_size=2)
        assert caught.value.rows == [3]
    with pytest.raises(sd.DivergenceError, match="initial state"):
        sd.sample(model, (1, 1), x_init=torch.tensor([[torch.nan]]), times=times, seed=0)


def test_the_working_dtype_is_that_of_the_network_or_of_what_is_asked():
    network = sd.networks.MLP((2,)).double()
    assert sd.sample(sd.ScoreModel(network, sd.VP()), (2, 2), steps=2, seed=0).x.dtype == F64
    assert sd.sample(scalar_target().model(sd.VP()), (2, 1), steps=2, seed=0).x.dtype == F64
    assert sd.sample(sd.ScoreModel(lambda x, t: x, sd.VP()), (2, 1), steps=2, seed=0).x.dtype == torch.float32
    x = torch.zeros(2, 1, dtype=F64)
    assert sd.sample(scalar_target().model(sd.VP()), (2, 1), x_init=x, steps=2, seed=0).x.dtype == F64


def test_sampling_builds_no_graph():
    network = sd.networks.MLP((2,))
    assert not sd.sample(sd.ScoreModel(network, sd.VP()), (2, 2), steps=2, seed=0).x.requires_grad


def test_a_solver_is_reusable_and_stateless():
    model, solver = MIXTURE.model(sd.VP()), sd.TorchSDE("reversible_heun")
    a = sd.sample(model, (3, 3), solver=solver, steps=5, seed=0).x
    sd.sample(model, (9, 3), solver=solver, steps=3, seed=1)
    assert torch.equal(sd.sample(model, (3, 3), solver=solver, steps=5, seed=0).x, a)


def test_inference_mode_changes_nothing():
    model = GAUSSIAN.model(sd.VP())
    for solver in (sd.Heun(), sd.DDIM(), sd.TorchSDE("srk")):
        plain = sd.sample(model, (4, 3), solver=solver, steps=6, seed=0).x
        with torch.inference_mode():
            assert torch.equal(sd.sample(model, (4, 3), solver=solver, steps=6, seed=0).x, plain)


def test_a_grid_that_starts_elsewhere_needs_its_own_states():
    model = GAUSSIAN.model(sd.EDM())
    with pytest.raises(sd.TimeError, match="pass x_init"):
        sd.sample(model, (2, 3), times=[10.0, 1.0, 0.01], seed=0)
    x = GAUSSIAN.marginal(sd.EDM(), 10.0).sample(2, seed=0)
    solution = sd.sample(model, (2, 3), times=[10.0, 1.0, 0.01], x_init=x, seed=0)
    assert solution.times.tolist() == [10.0, 1.0, 0.01]  # in float64, as given


def test_noisy_correctors_do_not_encode():
    with pytest.raises(sd.CapabilityError, match="adds noise"):
        sd.encode(GAUSSIAN.model(sd.VP()), torch.zeros(1, 3), solver=sd.PredictorCorrector(sd.DDIM()))


def test_the_network_is_evaluated_in_evaluation_mode_and_left_as_it_was():
    network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    network[1].eval()
    network[2].train()
    wrapped = Wrapped(network)
    model = sd.ScoreModel(wrapped, sd.VP())
    a, b = (sd.sample(model, (3, 2), steps=3, seed=0).x for _ in range(2))
    network[1].train()
    assert torch.equal(sd.sample(model, (3, 2), steps=3, seed=0).x, a)
    assert torch.equal(a, b)
    assert wrapped.training
    assert network[1].training


class Wrapped(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, condition=None):
        return self.network(x)


def test_conditions_fixed_in_the_model_and_inside_containers_are_cut_too():
    seen = []
    model = sd.ScoreModel(lambda x, t, condition: seen.append(condition) or x, sd.VP())
    labels = torch.arange(5)
    sd.sample(model.given(labels), (5, 2), batch_size=2, steps=1, final="none", seed=0)
    assert [c.tolist() for c in seen] == [[0, 1], [2, 3], [4]]
    seen.clear()
    sd.sample(model, (5, 2), condition={"y": labels, "s": (labels, 1.0)}, batch_size=3, steps=1, final="none", seed=0)
    assert [(c["y"].tolist(), c["s"][0].tolist(), c["s"][1]) for c in seen] == [
        ([0, 1, 2], [0, 1, 2], 1.0), ([3, 4], [3, 4], 1.0)
    ]  # fmt: skip


def test_dtypes_of_state_and_network_do_not_leak_into_each_other():
    seen = []
    spread = torch.tensor([1.0, 2.0], dtype=F64)
    model = sd.ScoreModel(lambda x, t: seen.append((x.dtype, t.dtype)) or x * spread, sd.VP())
    assert sd.sample(model, (2, 2), steps=3, seed=0).x.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32)}
    single = sd.ScoreModel(sd.networks.MLP((2,)), sd.VP())
    wide = sd.sample(single, (2, 2), x_init=torch.zeros(2, 2, dtype=F64), steps=3, seed=0).x
    assert wide.dtype == F64
    narrow = sd.sample(single, (2, 2), x_init=torch.zeros(2, 2), steps=3, seed=0).x
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-3)


def test_solvers_and_oracles_can_be_copied_and_pickled():
    for solver in (sd.TorchDiffEq(max_num_steps=99), sd.TorchSDE("srk"), sd.DDIM(0.3), sd.Heun(churn=1.0)):
        assert pickle.loads(pickle.dumps(solver)) == solver
        assert dataclasses.replace(solver) == solver
        hash(solver)
    assert dataclasses.replace(sd.TorchDiffEq(), rtol=1e-8) == sd.TorchDiffEq(rtol=1e-8)
    model = GAUSSIAN.model(sd.VP())
    again = pickle.loads(pickle.dumps(model))
    x = GAUSSIAN.sample(2, seed=0)
    assert torch.equal(again.score(0.3, x), model.score(0.3, x))


# What is kept


@pytest.mark.parametrize("solver", [sd.Exponential(), sd.ExponentialRungeKutta(2), sd.EulerMaruyama()], ids=name)
@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
def test_every_kth_state_is_kept_and_the_last(solver, every):
    model, steps = MIXTURE.model(sd.VP()), 7
    whole = sd.sample(model, (5, 3), solver=solver, steps=steps, seed=0, trajectory=True, final="none")
    assert torch.equal(whole.kept, whole.times)
    part = sd.sample(model, (5, 3), solver=solver, steps=steps, seed=0, trajectory=every, batch_size=2)
    expected = {1: range(8), 2: [0, 2, 4, 6, 7], 3: [0, 3, 6, 7], 7: [0, 7], 50: [0, 7]}[every]
    assert torch.equal(part.kept, whole.times[list(expected)])
    assert torch.equal(part.trajectory, whole.trajectory[list(expected)])
    assert torch.equal(whole.trajectory[-1], whole.x)


def test_nothing_is_kept_unless_asked_for():
    for trajectory in (False, 0):
        solution = sd.sample(MIXTURE.model(sd.VP()), (2, 3), steps=2, seed=0, trajectory=trajectory)
        assert solution.trajectory is solution.kept is None
    with pytest.raises(sd.OptionError, match="trajectory must be True, False or a number"):
        sd.sample(MIXTURE.model(sd.VP()), (2, 3), steps=2, seed=0, trajectory=-1)


def test_the_trajectory_of_an_encoding_rises():
    x = GAUSSIAN.sample(3, seed=0)
    solution = sd.encode(GAUSSIAN.model(sd.VP()), x, steps=5, trajectory=2)
    assert torch.equal(solution.kept, solution.times[[0, 2, 4, 5]])
    assert torch.equal(solution.trajectory[0], x)
    assert torch.equal(solution.trajectory[-1], solution.x)


# Gradients


class Bent(torch.nn.Module):
    """A network that is not linear in anything."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x, t, condition):
        return (self.weight * x + condition[:, None] + t[:, None]).sin()


DIFFERENTIABLE = [
    sd.Exponential(),
    sd.Exponential(2, noise_level=0.7, predict="data"),
    sd.ExponentialRungeKutta(3),
    sd.UniPC(),
    sd.DDIM(),
    sd.DDPM(),
    sd.Heun(),
    sd.EulerMaruyama(),
]


@pytest.mark.parametrize("solver", DIFFERENTIABLE, ids=name)
def test_gradients_flow_to_the_start_the_parameters_and_the_condition(solver):
    """Equal to finite differences; and encoding likewise, where there is no noise."""
    x = torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    network = Bent(torch.tensor([0.5, -1.2], dtype=F64))
    model, condition = sd.ScoreModel(network, sd.VP(), "v"), torch.tensor([0.3, 1.0], dtype=F64)
    options = {"solver": solver, "steps": 4, "t_min": 0.01, "differentiable": True}

    def draw(x, weight, condition):
        with torch.no_grad():
            network.weight.copy_(weight)
        return sd.sample(model, (2, 2), x_init=x, condition=condition, seed=0, **options).x

    x.requires_grad_()
    condition.requires_grad_()
    out = draw(x, network.weight.detach().clone(), condition)
    push = torch.tensor([[1.0, -0.5], [0.2, 2.0]], dtype=F64)
    gradients = torch.autograd.grad((push * out).sum(), (x, network.weight, condition))
    values = [x.detach(), network.weight.detach().clone(), condition.detach()]
    for k, gradient in enumerate(gradients):
        for at in range(gradient.numel()):
            sides = []
            for move in (1e-5, -1e-5):
                moved = [value.clone() for value in values]
                moved[k].view(-1)[at] += move
                sides.append((push * draw(*moved)).sum())
            difference = ((sides[0] - sides[1]) / 2e-5).item()
            assert gradient.view(-1)[at].item() == pytest.approx(difference, rel=1e-6, abs=1e-7)
    if solver.deterministic:
        there = sd.encode(model, x, condition=condition, **options).x
        assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(there.sum(), (x, condition)))


@pytest.mark.parametrize("solver", DIFFERENTIABLE, ids=name)
def test_a_differentiable_solve_has_the_same_numbers(solver):
    model = MIXTURE.model(sd.VP())
    plain, tracked = (
        sd.sample(model, (4, 3), solver=solver, steps=7, seed=0, dtype=F64, differentiable=flag).x
        for flag in (False, True)
    )
    torch.testing.assert_close(plain, tracked, rtol=1e-11, atol=1e-11)
    x = GAUSSIAN.sample(2, seed=0).requires_grad_()
    assert not sd.sample(model, (2, 3), x_init=x, solver=solver, steps=2, seed=0).x.requires_grad
    with torch.no_grad():
        assert sd.sample(model, (2, 3), x_init=x, solver=solver, steps=2, seed=0, differentiable=True).x.requires_grad


# Networks


@pytest.mark.parametrize("solver", [sd.Exponential(), sd.DDIM(), sd.Adaptive(), sd.Heun()], ids=name)
def test_a_compiled_network_is_a_network(solver):
    network = sd.networks.MLP((2,)).double()
    compiled = torch.compile(network, backend="eager")
    options = {"solver": solver, "seed": 0} | ({} if solver.default_steps == 1 else {"steps": 4})
    plain, fast = (sd.sample(sd.ScoreModel(net, sd.VP()), (3, 2), **options) for net in (network, compiled))
    assert fast.x.dtype == F64
    torch.testing.assert_close(plain.x, fast.x, rtol=1e-10, atol=1e-10)
    assert plain.nfe == fast.nfe


def test_a_float64_state_uses_a_float32_network():
    network, seen = sd.networks.MLP((2,)), []
    network.register_forward_hook(lambda module, inputs, output: seen.append([i.dtype for i in inputs]))
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for solver in (sd.Exponential(), sd.DDIM(), sd.Heun(), sd.ExponentialRungeKutta()):
        model = sd.ScoreModel(network, sd.VP())
        wide = sd.sample(model, (3, 2), x_init=x, solver=solver, steps=5, seed=0).x
        assert wide.dtype == F64
        assert {dtype for dtypes in seen for dtype in dtypes} == {torch.float32}
        single = sd.sample(model, (3, 2), x_init=x.float(), solver=solver, steps=5, seed=0).x
        torch.testing.assert_close(wide.float(), single, rtol=1e-3, atol=1e-3)


# Defaults


class Wavy(sd.SDE):
    """Not linear."""

    def drift(self, t, x):
        return -x.sin()

    def diffusion(self, t, x):
        return 1.0


def test_the_default_solver_suits_the_process():
    linear = MIXTURE.model(sd.VP())
    bent = sd.ScoreModel(lambda x, t: -x, Wavy(), "score")
    assert default_solver(linear) == sd.Exponential()
    assert default_solver(bent) == RungeKutta()
    x = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for model, solver in ((linear, sd.Exponential()), (bent, RungeKutta())):
        options = {"x_init": x, "final": "none", "seed": 0}
        assert torch.equal(sd.sample(model, (3, 3), **options).x, sd.sample(model, (3, 3), solver=solver, **options).x)
        assert torch.equal(sd.encode(model, x).x, sd.encode(model, x, solver=solver).x)
    assert sd.sample(linear, (3, 3), seed=0).nfe == 51


def test_the_bar_counts_the_steps_of_all_chunks(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.count, self.nfe = total, 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def update(self):
            self.count += 1

        def set_postfix(self, nfe, **options):
            self.nfe.append(nfe)

    monkeypatch.setattr("sdediff.sampling.tqdm", Bar)
    model = MIXTURE.model(sd.VP())
    sd.sample(model, (5, 3), steps=4, seed=0, batch_size=2, progress=True)
    sd.encode(model, GAUSSIAN.sample(2, seed=0), solver=sd.ExponentialRungeKutta(2), steps=3, progress=True)
    sd.sample(model, (2, 3), solver=sd.Adaptive(), times=[1.0, 0.5, 0.1], seed=0, progress=True)
    assert [(bar.total, bar.count) for bar in bars] == [(12, 12), (3, 3), (2, 2)]
    assert bars[0].nfe == [1, 2, 3, 4] * 3
    assert bars[1].nfe == [2, 4, 6]
    sd.sample(model, (2, 3), steps=2, seed=0)
    assert len(bars) == 3


# What is kept between solves


class Warped(sd.LinearSDE):
    """A process with a parameter that can be changed in place."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self, speed):
        self.speed = torch.tensor(speed, dtype=F64)

    def scales(self, t):
        return (-self.speed * t).exp(), (-torch.expm1(-2 * self.speed * t)).sqrt()


class Mine(sd.VP):
    """The same process, of a class for which nothing is kept."""


KEPT = [sd.Exponential(), sd.Exponential(2, 0.5), sd.DDIM(), sd.ExponentialRungeKutta(2), sd.Heun()]


@pytest.mark.parametrize("solver", KEPT, ids=name)
def test_grids_and_tables_follow_a_process_that_changes(solver):
    network = lambda x, t: (x + t[:, None]).sin()  # noqa: E731
    run = lambda sde: sd.sample(sd.ScoreModel(network, sde), (2, 2), solver=solver, steps=5, seed=0)  # noqa: E731
    sde = Warped(3.0)
    before = run(sde)
    sde.speed.fill_(2.0)
    after, fresh = run(sde), run(Warped(2.0))
    assert torch.equal(after.x, fresh.x)
    assert torch.equal(after.times, fresh.times)
    assert not torch.allclose(after.x, before.x)


@pytest.mark.parametrize("solver", KEPT, ids=name)
def test_grids_and_tables_are_those_of_the_model_at_hand(solver):
    network = lambda x, t: (x + t[:, None]).sin()  # noqa: E731
    for prediction, sigma_data in (("noise", 0.5), ("v", 0.5), ("edm", 0.5), ("edm", 0.2), ("noise", 0.2)):
        for steps in (4, 9):
            kept, mine = (
                sd.sample(
                    sd.ScoreModel(network, sde, prediction, sigma_data=sigma_data), (2, 2), solver=solver, steps=steps,
                    seed=0, t_min=0.01,
                )
                for sde in (sd.VP(), Mine())
            )  # fmt: skip
            assert torch.equal(kept.times, mine.times)
            assert torch.equal(kept.x, mine.x), (prediction, sigma_data)
            kept.times.zero_()  # theirs to change


def test_a_noise_level_that_changes_its_mind_is_asked_again():
    model, level = MIXTURE.model(sd.VP()), [0.2]
    solver = sd.Exponential(noise_level=lambda t: level[0])
    for level[0] in (0.2, 0.9):
        constant = sd.Exponential(noise_level=level[0])
        options = {"steps": 5, "seed": 0}
        x, expected = (sd.sample(model, (2, 3), solver=s, **options).x for s in (solver, constant))
        assert torch.equal(x, expected)


def test_a_solve_in_inference_mode_leaves_nothing_behind():
    """A solve with gradients may come after one in inference mode with the same solver, process and grid."""
    network = torch.nn.Linear(2, 2).double()
    model = sd.ScoreModel(lambda x, t: network(x) * t[:, None], sd.VP(0.123))
    for solver in (sd.Exponential(), sd.DDIM(), sd.Heun()):
        with torch.inference_mode():
            sd.sample(model, (2, 2), solver=solver, steps=4, seed=0, dtype=F64)
        x = torch.zeros(2, 2, dtype=F64)
        sd.sample(model, (2, 2), x_init=x, solver=solver, steps=4, seed=0, differentiable=True).x.sum().backward()


def test_a_kept_grid_cannot_be_changed_from_outside():
    model = sd.exact.Gaussian(torch.zeros(2, dtype=torch.float64), 0.3).model(sd.VP())
    first = sd.sample(model, (2, 2), steps=7, seed=0)
    times = first.times.clone()
    first.times.zero_()
    assert torch.equal(sd.sample(model, (2, 2), steps=7, seed=0).times, times)
