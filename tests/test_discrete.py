"""Discrete chains: integer time steps, re-spaced chains, named betas, and the limit of many steps."""

import pytest
import torch
from helpers import MEAN, VARIANCE, final_moments, fitted_order
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd

F64 = torch.float64
CHAIN = sd.DiscreteVP.linear_betas(50, 1e-3, 0.2)


def network(x, t):
    """Any network of integer time steps."""
    assert t.dtype == torch.int64
    return (x + 0.02 * t.reshape(-1, 1)).sin()


@st.composite
def kept_steps(draw, n=50):
    return sorted(draw(st.sets(st.integers(0, n - 1), min_size=2, max_size=12)))


# Time steps


def test_a_time_that_is_not_on_the_chain_is_refused_or_rounded_knowingly():
    assert CHAIN.timestep(torch.tensor([1.0, 0.5, 0.02])).tolist() == [49, 24, 0]
    with pytest.raises(sd.TimeError, match=r"t = 0\.513 is not one of the 50 times of .*write time=chain\.nearest_tim"):
        CHAIN.timestep(torch.tensor([0.5, 0.513]))
    assert CHAIN.nearest_timestep(torch.tensor([0.513, 0.5, 0.011, 1.0])).tolist() == [25, 24, 0, 49]


@pytest.mark.parametrize("method", [CHAIN.timestep, CHAIN.nearest_timestep])
@pytest.mark.parametrize("t", [0.0, -0.3, 1.02, float("nan")])
def test_a_time_outside_the_table_is_refused(method, t):
    with pytest.raises(sd.TimeError, match=r"has no time step: those of .* are 0\.\.49, at t = 0\.02 to 1"):
        method(torch.tensor([0.5, t]))


def test_a_solver_that_asks_between_the_steps_is_told_what_to_write():
    strict = sd.ScoreModel(network, CHAIN, time=CHAIN.timestep)
    with pytest.raises(sd.TimeError, match=r"times=chain\.times or rows of it"):
        sd.sample(strict, (2, 3), steps=7, seed=0, solver=sd.RungeKutta("midpoint"))
    free = sd.ScoreModel(network, CHAIN, time=CHAIN.nearest_timestep)
    assert sd.sample(free, (2, 3), steps=7, seed=0, solver=sd.RungeKutta("midpoint")).x.isfinite().all()
    assert sd.sample(strict, (2, 3), times=CHAIN.times, solver=sd.DDPM(), seed=0).x.isfinite().all()


@pytest.mark.parametrize("loss", ["denoising", "squared_noise", "noise_residual"])
def test_losses_at_the_steps_of_the_chain_call_a_network_of_integer_steps(loss):
    seen = []

    def watched(x, t):
        seen.extend(t.tolist())
        return network(x, t)

    model = sd.ScoreModel(watched, CHAIN, time=CHAIN.timestep)
    x0, steps = torch.zeros(500, 2), sd.times.Levels(CHAIN.times)
    if loss == "denoising":
        values = sd.losses.denoising(model, x0, times=steps)
    else:
        values = getattr(sd.losses, loss)(watched, model, x0, times=steps)
    assert values.shape == (500,)
    assert set(seen) == set(range(50))


# Re-spaced chains


@given(kept=kept_steps())
def test_the_respaced_betas_are_ratios_of_the_kept_products(kept):
    found = CHAIN.respace(kept)
    products = (1 - CHAIN.betas).cumprod(0)[kept]
    before = torch.cat([torch.ones(1, dtype=F64), products[:-1]])
    torch.testing.assert_close(found.betas, 1 - products / before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        found.alpha(found.times), CHAIN.alpha((torch.tensor(kept).flip(0) + 1) / 50).double(), rtol=1e-6, atol=0
    )
    assert found.timestep(found.times).tolist() == kept[::-1]
    assert found.nearest_timestep(found.times - 0.3 / len(kept)).tolist() == kept[::-1]


@given(kept=kept_steps(), data=st.data())
def test_a_respaced_chain_can_be_respaced(kept, data):
    places = sorted(data.draw(st.sets(st.integers(0, len(kept) - 1), min_size=2)))
    twice, once = CHAIN.respace(kept).respace(places), CHAIN.respace([kept[i] for i in places])
    assert twice.steps == once.steps
    torch.testing.assert_close(twice.betas, once.betas, rtol=1e-10, atol=1e-14)


@given(kept=kept_steps(), eta=st.sampled_from([None, 0.0, 0.5]))
def test_sampling_the_respaced_chain_is_sampling_the_sub_sequence(kept, eta):
    solver = sd.DDPM("beta") if eta is None else sd.DDIM(eta)
    short = CHAIN.respace(kept)
    x = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)
    rows = [49 - i for i in reversed(kept)]
    one = sd.sample(
        sd.ScoreModel(network, short, time=short.timestep), (3, 2), solver=solver, times=short.times, x_init=x, seed=3
    )
    other = sd.sample(
        sd.ScoreModel(network, CHAIN, time=CHAIN.timestep), (3, 2), solver=solver, times=CHAIN.times[rows], x_init=x,
        seed=3,
    )  # fmt: skip
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-11)


def test_a_chain_respaced_to_all_of_its_steps_is_itself():
    whole = CHAIN.respace(range(50))
    torch.testing.assert_close(whole.betas, CHAIN.betas, rtol=1e-13, atol=0)
    assert repr(CHAIN.respace([3, 20])).endswith("time steps 3 to 20)")


def test_a_respaced_chain_survives_a_checkpoint(tmp_path):
    chain = CHAIN.respace([1, 7, 30])
    sd.save(sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), chain), tmp_path)
    again = sd.load(tmp_path).sde
    assert again.steps == (1, 7, 30)
    assert torch.equal(again.betas, chain.betas)


# Named betas


@pytest.mark.parametrize(
    ("chain", "name", "ends"),
    [
        (sd.DiscreteVP.linear_betas(), "linear", (1e-4, 0.02)),
        (sd.DiscreteVP.linear_betas(100, 1e-3, 0.2), "linear", (1e-3, 0.2)),
        (sd.DiscreteVP.cosine_betas(), "squaredcos_cap_v2", (1e-4, 0.02)),
        (sd.DiscreteVP.cosine_betas(40), "squaredcos_cap_v2", (1e-4, 0.02)),
        (sd.DiscreteVP.sigmoid_betas(100, 1e-3, 0.2), "sigmoid", (1e-3, 0.2)),
    ],
)
def test_named_betas_are_those_of_diffusers(chain, name, ends):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(len(chain.betas), *ends, name).betas.double()
    torch.testing.assert_close(chain.betas, theirs, rtol=2e-5, atol=1e-7)


def test_cosine_betas_are_those_of_the_process_below_their_cap():
    chain, sde = sd.DiscreteVP.cosine_betas(100), sd.CosineVP()
    times = torch.arange(1, 100, dtype=F64) / 100
    torch.testing.assert_close(chain.alpha(times), sde.alpha(times), rtol=1e-10, atol=0)
    assert chain.betas[-1] == 0.999
    assert chain.betas[-2] < 0.999


# The limit


def textbook(n):
    """`beta_i = beta(i / N) / N`, with the linear beta of VP()."""
    return sd.DiscreteVP.linear_betas(n, (0.1 + 19.9 / n) / n, 20.0 / n)


def test_marginals_tend_to_those_of_the_vp_sde_at_order_one():
    sde, sizes = sd.VP(), [250, 500, 1000, 2000]
    times = torch.arange(1, 126, dtype=F64) / 125  # on every chain
    for scale in ("alpha", "sigma"):
        exact = getattr(sde, scale)(times)
        errors = [(getattr(textbook(n), scale)(times) - exact).abs().max().item() for n in sizes]
        assert fitted_order(errors, sizes) == pytest.approx(1, abs=0.05)
    twice = [2 * a - b for a, b in zip([textbook(500).alpha(times)], [textbook(250).alpha(times)], strict=True)]
    assert (twice[0] - sde.alpha(times)).abs().max() < 0.02 * errors[1]


def test_sampled_moments_tend_to_the_data_at_order_one():
    """Ancestral sampling of the whole chain from t = 1 to 0.1, against the marginal of the SDE."""
    sde, sizes, errors = sd.VP(), [50, 100, 200, 400], []
    alpha, sigma = sde.alpha(0.1), sde.sigma(0.1)
    std = (alpha**2 * VARIANCE + sigma**2) ** 0.5
    for n in sizes:
        chain = textbook(n)
        times = chain.times[: n - n // 10 + 1]
        assert times[-1] == pytest.approx(0.1)
        mean, variance = final_moments(sd.DDPM(), chain, times, n)
        errors.append(max(abs(mean - alpha * MEAN) / std, abs(variance.sqrt() / std - 1)).item())
    assert fitted_order(errors, sizes) == pytest.approx(1, abs=0.1)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.DiscreteVP([0.1, 0.0]), r"at least two betas in \(0, 1\); got \[0\.1, 0\.0\]"),
        (lambda: sd.DiscreteVP([0.1]), "at least two betas"),
        (lambda: sd.DiscreteVP([0.1, 0.2], (3,)), r"rising row of at least two integers; got \[3\]"),
        (lambda: sd.DiscreteVP([0.1, 0.2], (3, 4, 5)), r"steps must name each of the 2 states; got \(3, 4, 5\)"),
        (lambda: sd.DiscreteVP.linear_betas(1), "A chain needs a whole number of steps, at least 2; got 1"),
        (lambda: sd.DiscreteVP.cosine_betas(2.5), r"at least 2; got 2\.5"),
        (lambda: sd.DiscreteVP.linear_betas(10, 1e-4, 1.5), "betas in \\(0, 1\\)"),
        (lambda: CHAIN.respace([3]), r"at least two integers, in 0\.\.49; got \[3\]"),
        (lambda: CHAIN.respace([3, 50]), r"in 0\.\.49; got \[3, 50\]"),
        (lambda: CHAIN.respace([-1, 3]), r"got \[-1, 3\]"),
        (lambda: CHAIN.respace([3, 3]), r"a rising row .* got \[3, 3\]"),
        (lambda: CHAIN.respace([0.5, 3]), r"got \[0\.5, 3\]"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(sd.OptionError, match=message):
        make()


# A network that counts the steps of a chain works with no more said.


class Counting(torch.nn.Module):
    """Whole steps in, and a record of those that it saw."""

    def __init__(self, steps):
        super().__init__()
        self.table = torch.nn.Embedding(steps, 2)
        self.seen = []

    def forward(self, x, step):
        self.seen.append(step)
        return x + self.table(step)


@pytest.mark.parametrize("weighting", ["simple", "vlb", "likelihood", "min_snr", "edm"])
def test_training_shows_a_counting_network_the_steps_of_its_chain_equally_often(weighting):
    chain = sd.DiscreteVP.linear_betas(20, 1e-3, 0.3)
    network = Counting(20)
    model = sd.ScoreModel(network, chain, time=chain.timestep)
    losses = sd.losses.denoising(model, torch.randn(4000, 2), weighting=weighting)
    assert losses.isfinite().all()
    counts = torch.bincount(torch.cat(network.seen), minlength=20)
    shown = counts[1:] if weighting == "vlb" else counts  # the step to the data is the decoder's
    assert (shown - 4000 / len(shown)).abs().max() <= 1


def test_the_default_grid_of_a_counting_network_is_a_sub_sequence_of_its_chain():
    chain = sd.DiscreteVP.linear_betas(50, 1e-3, 0.2)
    network = Counting(50)
    model = sd.ScoreModel(network, chain, time=chain.timestep)
    for solver in (None, sd.DDPM(), sd.DDIM(), sd.UniPC()):
        solution = sd.sample(model, (3, 2), solver=solver, steps=12, seed=0)
        assert set(solution.times.tolist()) <= set(chain.times.tolist())
        assert solution.times[0] == 1
        assert solution.times[-1] == chain.t_min
        assert 10 <= len(solution.times) <= 13
        assert (solution.times.diff() < 0).all()
    assert sd.encode(model, solution.x, steps=12).times.tolist() == sorted(sd.encode(model, solution.x, steps=12).times)
    rounded = sd.ScoreModel(network, chain, time=chain.nearest_timestep)
    for choice in (model, rounded):
        assert torch.equal(sd.sample(choice, (3, 2), steps=12, seed=0).x, sd.sample(model, (3, 2), steps=12, seed=0).x)


def test_a_network_of_continuous_time_is_left_alone():
    chain = sd.DiscreteVP.linear_betas(50, 1e-3, 0.2)
    model = sd.ScoreModel(lambda x, t: x, chain, time=lambda t: 999 * t)
    assert model.known_times is None
    assert sd.ScoreModel(lambda x, t: x, sd.VP(), time=lambda t: (t * 10).long()).known_times is None
    times = sd.sample(model, (3, 2), steps=12, seed=0).times
    assert torch.equal(times, sd.Exponential().grid(model, 12))


def test_fit_trains_a_counting_network_as_it_is():
    chain = sd.DiscreteVP.linear_betas(20, 1e-3, 0.3)
    model = sd.ScoreModel(Counting(20), chain, time=chain.timestep)
    trained = sd.fit(model, torch.randn(64, 2), steps=3, batch_size=16, progress=False, seed=0)
    assert trained.losses.isfinite().all()


@pytest.mark.parametrize("clock", ["timestep", "nearest_timestep"])
def test_a_counting_network_is_loaded_with_its_clock(tmp_path, clock):
    chain = sd.DiscreteVP.linear_betas(20, 1e-3, 0.3).respace([0, 5, 9, 19])
    model = sd.ScoreModel(Counting(20), chain, time=getattr(chain, clock))
    sd.save(model, tmp_path)
    again = sd.load(tmp_path, network=Counting(20))
    assert again.time(chain.times).tolist() == [19, 9, 5, 0]
    assert again.time.__name__ == clock


@pytest.mark.parametrize("loss", [sd.losses.squared_noise, sd.losses.noise_residual])
def test_variance_networks_of_a_counting_model_see_the_steps_of_its_chain(loss):
    chain = sd.DiscreteVP.linear_betas(20, 1e-3, 0.3)
    model, beside = sd.ScoreModel(Counting(20), chain, time=chain.timestep), Counting(20)
    assert loss(beside, model, torch.randn(4000, 2)).isfinite().all()
    assert (torch.bincount(torch.cat(beside.seen), minlength=20) - 200).abs().max() <= 1


@pytest.mark.parametrize("loss", [sd.losses.squared_noise, sd.losses.noise_residual])
def test_a_variance_loss_is_weighted_by_the_law_that_drew_its_times(loss):
    model = sd.exact.Gaussian(torch.zeros(1, dtype=torch.float64), 0.3).model(sd.VP(t_min=0.01))
    x0, law = torch.ones(50, 1, dtype=torch.float64), sd.times.LogSNR()
    drawn = loss(lambda x, t: 0 * x, model, x0, times=law, generator=torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    t, weight = law.draw(model.linear, 50, generator=again)
    noise = torch.randn(x0.shape, dtype=x0.dtype, generator=again)
    torch.testing.assert_close(drawn, weight * loss(lambda x, t: 0 * x, model, x0, t=t, noise=noise))
    assert weight.std() > 0.1
