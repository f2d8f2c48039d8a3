"""IDDPM: the interpolated variance, the hybrid loss and who is trained by which part of it, and training for real."""

import math

import pytest
import torch
from helpers import NAMED, TwoFunctions, name
from hypothesis import given, settings
from hypothesis import strategies as st

import sdediff as sd
from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.losses import denoising, hybrid
from sdediff.model import PREDICTIONS
from sdediff.networks import MLP
from sdediff.testing import strategies
from sdediff.variance import Beta, Posterior, ReverseSteps

F64 = torch.float64
ALL = [*NAMED, TwoFunctions()]
LEARNED = sd.LearnedVariance()


def mixture():
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64)
    return sd.exact.GaussianMixture(torch.tensor([1.0, 2.0]), means, torch.tensor([[0.02, 0.3], [0.2, 0.01]]))


def with_second(model, second):
    """The model with a second output, `second(x, t)` shaped as x."""

    def network(x, t, *condition):
        return torch.cat([model.network(x, t, *condition), second(x, t)], 1)

    return sd.ScoreModel(sd.TwoHeads(network), model.sde, model.prediction, model.time, model.sigma_data)


def retold(model, kind):
    """The same model through a network that predicts another kind."""
    sde, scale = model.linear, model.sigma_data

    def network(x, t):
        if kind == "edm":
            x = sd.over((sde.sigma(t) ** 2 + (sde.alpha(t) * scale) ** 2).sqrt(), x) * x
        return model.view(kind, t, x)

    return sd.ScoreModel(network, sde, kind, time=lambda t: t, sigma_data=scale)


def wavy(x, t):
    """Some second output."""
    return (3 * x + 5 * t[:, None].to(x)).sin()


class Counted:
    """A network that counts its calls."""

    def __init__(self, network):
        self.network, self.calls = network, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.network(x, t)


# The variance


@given(sde=strategies.linear_sdes(), v=st.floats(-0.5, 1.5), data=st.data())
def test_the_variance_lies_between_the_fixed_choices_on_a_log_scale(sde, v, data):
    """On any grid: "posterior" at v = 0, "beta" at v = 1, and the geometric interpolation between and beyond."""
    times = data.draw(strategies.time_grids(sde, max_steps=6))
    model = with_second(mixture().model(sde), lambda x, t: torch.full_like(x, 2 * v - 1))
    steps = ReverseSteps.of(model.point(times))
    listening, variance = LEARNED.along(model, steps)
    x = torch.zeros(3, 2, dtype=F64)
    posterior, beta = Posterior().table(steps), Beta().table(steps)
    for i in range(len(posterior)):
        listening.predict(times[i], x)
        expected = beta[i] ** v * posterior[i] ** (1 - v)
        torch.testing.assert_close(variance(i, x), expected.expand(3, 2), rtol=1e-11, atol=0)


@pytest.mark.parametrize("sde", ALL, ids=name)
@pytest.mark.parametrize(("output", "fixed"), [(-1.0, "posterior"), (1.0, "beta")])
def test_at_its_ends_it_samples_and_bounds_as_the_fixed_choices(sde, output, fixed):
    """On a ragged part of a chain; a variance of every entry meets the same numbers as one of every step."""
    exact = mixture().model(sde)
    model = with_second(exact, lambda x, t: torch.full_like(x, output))
    times = sd.grids.natural(sde, 8)[[0, 1, 3, 4, 7, 8]]
    one, other = (
        sd.sample(m, (5, 2), solver=sd.DDPM(v), times=times, seed=0, dtype=F64)
        for m, v in ((exact, fixed), (model, LEARNED))
    )
    torch.testing.assert_close(other.x, one.x, rtol=1e-9, atol=1e-11)
    assert one.nfe == other.nfe == 6
    x, options = mixture().sample(4, seed=0), {"times": times, "samples": 3, "seed": 0}
    bounds = [sd.consistency_elbo(m, x, variance=v, **options) for m, v in ((exact, fixed), (model, LEARNED))]
    torch.testing.assert_close(bounds[1].terms, bounds[0].terms, rtol=1e-8, atol=1e-8)
    assert bounds[0].nfe == bounds[1].nfe


def test_the_step_to_the_data_has_the_posterior_variance_of_the_step_before():
    """As betas: between `beta_2 (1 - abar_1) / (1 - abar_2)` and beta_1, which is the paper's choice."""
    betas = torch.tensor([0.01, 0.04, 0.1], dtype=F64)
    chain = sd.DiscreteVP(betas)
    abar = (1 - betas).cumprod(0)
    for output, expected in ((-1.0, betas[1] * (1 - abar[0]) / (1 - abar[1])), (1.0, betas[0])):
        model = with_second(mixture().model(chain), lambda x, t, o=output: torch.full_like(x, o))
        steps = ReverseSteps.to_data(model.point(chain.times))
        listening, variance = LEARNED.along(model, steps)
        x = torch.zeros(1, 2, dtype=F64)
        listening.predict(chain.times[-1], x)
        torch.testing.assert_close(variance(2, x), expected.expand(1, 2), rtol=1e-11, atol=0)
    blunt = ReverseSteps.to_data(model.point(chain.times[-1:]))
    listening, variance = LEARNED.along(model, blunt)
    listening.predict(chain.times[-1], x)
    torch.testing.assert_close(variance(0, x), betas[0].expand(1, 2)), "a single step has beta"


def test_mean_and_variance_come_from_one_call_a_step():
    inner = Counted(lambda x, t: torch.cat([0.1 * x, x.sin()], 1))
    model = sd.ScoreModel(sd.TwoHeads(inner), sd.VP(), time=lambda t: t)
    assert sd.sample(model, (4, 2), solver=sd.DDPM(LEARNED), steps=7, seed=0).nfe == inner.calls == 8
    inner.calls = 0
    assert sd.elbo(model, torch.zeros(2, 2), steps=5, samples=3, variance=LEARNED).nfe == inner.calls == 36
    inner.calls = 0
    hybrid(model, torch.zeros(2, 2))
    assert inner.calls == 1


def test_the_noise_added_has_the_variance_of_each_entry():
    """One step of DDPM from x, with known noise, against the formula."""
    sde, times = sd.VP(), torch.tensor([0.6, 0.3], dtype=F64)
    exact = mixture().model(sde)
    model = with_second(exact, wavy)
    x, z = torch.randn(2, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    after = sd.sample(
        model, (5, 2), solver=sd.DDPM(LEARNED), times=times, x_init=x, noise=sd.Recorded(z[None]), final="none"
    ).x
    mean, std = sde.posterior(times[1], times[0], exact.denoised(times[0], x), x)
    v = (wavy(x, times[0].expand(5)) + 1) / 2
    log_beta, log_tilde = 2 * sde.transition(times[1], times[0])[1].log(), 2 * std.log()
    torch.testing.assert_close(after, mean + ((v * log_beta + (1 - v) * log_tilde) / 2).exp() * z)


def test_other_calls_of_the_network_are_not_heard():
    model = with_second(mixture().model(sd.VP()), wavy)
    listening, variance = LEARNED.along(model, ReverseSteps.of(model.point(torch.tensor([0.6, 0.3], dtype=F64))))
    x = torch.ones(2, 2, dtype=F64)
    listening.predict(0.6, x)
    before = variance(0, x)
    model.predict(0.1, -x)
    assert torch.equal(variance(0, x), before)
    listening.predict(0.6, -x)
    assert not torch.equal(variance(0, x), before)


def test_a_change_of_the_denoised_data_keeps_the_variance():
    model = with_second(mixture().model(sd.VP()), wavy)
    calm = sd.clamp_denoised(model, -100.0, 100.0)
    runs = [sd.sample(m, (5, 2), solver=sd.DDPM(LEARNED), steps=4, seed=0) for m in (model, calm)]
    torch.testing.assert_close(runs[0].x, runs[1].x)
    assert runs[0].nfe == runs[1].nfe == 5


def test_float64_states_may_use_a_float32_network():
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.TwoHeads(MLP((2,), width=8, depth=1, heads=2)), sd.VP(), "v")
    wide, single = (
        sd.sample(model, (3, 2), solver=sd.DDPM(LEARNED), steps=3, x_init=torch.ones(3, 2, dtype=d), seed=0).x
        for d in (F64, torch.float32)
    )
    assert wide.dtype == F64
    assert single.dtype == torch.float32
    assert sd.elbo(model, torch.ones(3, 2, dtype=F64), steps=2, variance=LEARNED).total.isfinite().all()


def test_images_have_their_channels_halved_and_conditions_pass():
    def network(x, t, label):
        shift = label[:, None, None, None].to(x)
        return torch.cat([0 * x + shift, 0 * x - 1], 1)

    model = sd.ScoreModel(sd.TwoHeads(network), sd.VP(), time=lambda t: t)
    x, label = torch.zeros(2, 3, 4, 4, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    assert (model.predict(0.5, x, condition=label)[:, 0, 0, 0] == label).all()
    plain = sd.ScoreModel(lambda x, t, label: 0 * x + label[:, None, None, None], sd.VP(), time=lambda t: t)
    one = sd.sample(plain, (2, 3, 4, 4), solver=sd.DDPM(), steps=3, seed=0, condition=label, dtype=F64)
    other = sd.sample(model, (2, 3, 4, 4), solver=sd.DDPM(LEARNED), steps=3, seed=0, condition=label, dtype=F64)
    torch.testing.assert_close(one.x, other.x)
    assert hybrid(model, x, condition=label).shape == (2,)


# The hybrid loss


@settings(max_examples=25)
@given(
    sde=strategies.linear_sdes(),
    kind=st.sampled_from([*PREDICTIONS]),
    lam=st.floats(0, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_loss_is_its_definition(sde, kind, lam, seed, data):
    """The simple loss, and torch's own divergences and density, for every kind of prediction at every step."""
    times = data.draw(strategies.time_grids(sde, max_steps=5))
    exact = mixture().model(sde)
    model = with_second(retold(exact, kind), wavy)
    n = len(times)
    x, eps = torch.randn(2, n, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
    loss = hybrid(model, x, chain=times, lam=lam, t=times, noise=eps)
    simple = denoising(exact, x, t=times, noise=eps)
    z = sde.perturb(times, x, eps)
    told = exact.denoised(times, z)
    steps = ReverseSteps.to_data(exact.point(times))
    _, variance = LEARNED.along(model, steps)
    listening, variance = LEARNED.along(model, steps)
    for i in range(n):
        listening.predict(times[i], z)
        p_std = variance(i, z)[i].sqrt()
        difference = steps.gain[i] * (x - told)[i]
        p = torch.distributions.Normal(difference, p_std)
        if i < n - 1:
            q = torch.distributions.Normal(torch.zeros(2, dtype=F64), steps.nu[i])
            term = torch.distributions.kl_divergence(q, p).mean()
        else:
            term = -p.log_prob(torch.zeros(2, dtype=F64)).mean()
        torch.testing.assert_close(loss[i], simple[i] + lam * n * term, rtol=1e-6, atol=1e-8)


def test_the_mean_of_l_vlb_over_the_steps_is_minus_the_elbo():
    """In nats for an entry, but for the prior's term: with the same noise at every step."""
    sde, target = sd.VP(), mixture()
    model, times = with_second(target.model(sde), wavy), sd.grids.natural(sd.VP(), 6)
    x, n = target.sample(1, seed=0), 7
    noise = torch.randn(n, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    vlb = torch.zeros((), dtype=F64)
    for sign in (1, -1):
        rows = {"chain": times, "t": times, "noise": sign * noise[:, 0]}
        both, simple = (hybrid(model, x.expand(n, 2), lam=lam, **rows) for lam in (1.0, 0.0))
        vlb = vlb + (both - simple).mean() / 2
    # the decoder's noise is drawn first
    numbers = sd.Recorded(noise[[n - 1, *range(n - 1)]])
    bound = sd.elbo(model, x, times=times, samples=1, variance=LEARNED, noise=numbers, scale=1e-9, seed=0)
    torch.testing.assert_close(2 * vlb, (bound.diffusion - bound.reconstruction)[0], rtol=1e-8, atol=1e-8)


class Trunk(torch.nn.Module):
    """A mean and a variance of weights of their own, or of one set of weights."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)

    def forward(self, x, t):
        seen = torch.stack([x, x * t[:, None], x.sin()], -1)
        return torch.cat([seen @ self.first, (seen @ self.second).tanh()], 1)


def loss_of(first, second, lam=0.3):
    model = sd.ScoreModel(sd.TwoHeads(Trunk(first, second)), sd.VP(), "v", time=lambda t: t)
    times = torch.tensor([1.0, 0.5, 0.2, 0.01], dtype=F64)
    x, noise = torch.randn(2, 8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    value = hybrid(model, x, chain=times, lam=lam, t=times.repeat(2), noise=noise).mean()
    return value, model.network.network


def slope(function, weights):
    step, out = 1e-6, torch.zeros_like(weights)
    for i in range(len(weights)):
        moved = torch.zeros_like(weights)
        moved[i] = step
        out[i] = (function(weights + moved) - function(weights - moved)) / (2 * step)
    return out


def test_gradients_are_those_of_the_surrogate_with_a_constant_mean():
    weights = torch.tensor([0.3, -0.4, 0.2], dtype=F64)
    value, network = loss_of(weights, weights.clone())
    value.backward()
    of_simple = slope(lambda w: loss_of(w, weights, lam=0.0)[0].detach(), weights)
    of_vlb = slope(lambda w: loss_of(weights, w)[0].detach(), weights)
    torch.testing.assert_close(network.first.grad, of_simple, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(network.second.grad, of_vlb, rtol=1e-6, atol=1e-8)
    through = slope(lambda w: loss_of(w, weights)[0].detach(), weights)
    assert (through - of_simple).abs().max() > 0.01, "without the stop the mean would feel L_vlb"


def test_the_mean_is_trained_by_l_simple_alone_and_the_variance_by_l_vlb_alone():
    weights = torch.tensor([0.3, -0.4, 0.2], dtype=F64)
    grads = {}
    for lam in (0.0, 0.3, 0.6):
        value, network = loss_of(weights, weights.clone(), lam)
        value.backward()
        grads[lam] = network.first.grad, network.second.grad
    assert torch.equal(grads[0.0][0], grads[0.3][0])
    assert torch.equal(grads[0.0][1], torch.zeros(3, dtype=F64))
    torch.testing.assert_close(grads[0.6][1], 2 * grads[0.3][1], rtol=1e-14, atol=0)
    assert grads[0.3][1].abs().min() > 0


@pytest.mark.parametrize("sde", [sd.RectifiedFlow(t_max=1.0), sd.CosineVP(t_max=1.0)], ids=name)
@pytest.mark.parametrize("kind", ["v", "flow", "data"])
def test_where_alpha_is_zero_the_loss_is_that_of_the_kernel_from_noise(sde, kind):
    """L_simple is 0 there, as x is the noise; L_vlb is the divergence with x_s made of x_0 and new noise."""
    target, chain = mixture(), torch.tensor([1.0, 0.5, 0.1], dtype=F64)
    model = with_second(retold(sd.ScoreModel(lambda x, t: 0.3 * x, sde, "v"), kind), wavy)
    x0 = target.sample(4, seed=0)
    noise = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.ones(4, dtype=F64)
    assert sde.alpha(t[0]).abs() < 1e-15
    alpha, sigma = sde.scales_at(chain[1])
    xhat = model.denoised(t, noise)
    variance = (2 * sigma.log() + (wavy(noise, t) + 1) / 2 * -2 * sigma.log()).exp()
    kl = ((sigma**2 + alpha**2 * (x0 - xhat) ** 2) / variance + (variance / sigma**2).log() - 1).sum(1) / 2
    for lam in (0.0, 0.1):
        found = hybrid(model, x0, chain=chain, lam=lam, t=t, noise=noise)
        torch.testing.assert_close(found, lam * 3 * kl / 2, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_a_learned_schedule_has_the_gradient_of_l_simple(kind):
    sde = sd.LearnedVP()
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.TwoHeads(lambda x, t: torch.cat([0.5 * x, torch.zeros_like(x)], 1)), sde, kind)
    x0 = mixture().sample(16, seed=0)

    def slope(lam, **options):
        loss = hybrid(model, x0, lam=lam, generator=torch.Generator().manual_seed(1), **options).mean()
        return torch.autograd.grad(loss, sde.ends)[0]

    for options in ({}, {"chain": [1.0, 0.7, 0.4, 0.1]}):
        assert slope(1.0, **options).isfinite().all()
        assert slope(0.0, **options).abs().min() > 0
        torch.testing.assert_close(slope(1.0, **options), slope(0.0, **options))


def test_times_are_drawn_evenly_from_the_chain():
    seen = []

    def network(x, t):
        seen.append(t)
        return torch.cat([x, x], 1)

    model = sd.ScoreModel(sd.TwoHeads(network), sd.VP(), time=lambda t: t)
    times, n = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=F64), 20_000
    generator = torch.Generator().manual_seed(0)
    losses = [hybrid(model, torch.zeros(n, 1, dtype=F64), chain=times, generator=generator)]
    counts = (seen[0][:, None] == times).double().sum(0)
    assert counts.sum() == n
    assert ((counts - n / 4).abs() < 4 * (n * 3 / 16) ** 0.5).all()
    losses += [hybrid(model, torch.zeros(n, 1, dtype=F64), chain=times, generator=generator)]
    assert not torch.equal(losses[0], losses[1])
    again = hybrid(model, torch.zeros(n, 1, dtype=F64), chain=times, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, losses[0])
    hybrid(model, torch.zeros(3000, 1, dtype=F64))
    assert seen[-1].min() < 0.002 < 0.998 < seen[-1].max()
    steps = (seen[-1] - 1e-5) / (1 - 1e-5) * 999
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    betas = torch.linspace(0.01, 0.2, 12, dtype=F64)
    chain = sd.ScoreModel(sd.TwoHeads(network), sd.DiscreteVP(betas), time=lambda t: t)
    hybrid(chain, torch.zeros(500, 1, dtype=F64))
    assert torch.equal(seen[-1].unique(), chain.sde.times.flip(0))


def test_times_may_come_from_a_law_that_learns_from_the_losses():
    """Weighted, the mean is the same as over even steps, 4 standard errors; the times are not even."""
    sde = sd.VP()
    model, chain = with_second(mixture().model(sde), wavy), sd.grids.log_snr(sde, 9, t_min=0.01)
    law = sd.times.LossAware(sd.times.Levels(chain, numbers="independent"), bins=10, history=4)
    x = mixture().sample(4000, seed=0)
    generator = torch.Generator().manual_seed(0)
    even = hybrid(model, x, chain=chain, lam=1.0, generator=generator)
    for _ in range(2):  # evenly at first, until every time has been seen
        t, weight = law.draw(sde, len(x), generator=generator)
        losses = hybrid(model, x, chain=chain, lam=1.0, t=t, generator=generator)
        law.observe(sde, t, losses)
    found = weight.to(losses) * losses
    error = ((found.var() + even.var()) / len(x)).sqrt()
    assert (found.mean() - even.mean()).abs() < 4 * error
    assert law.probabilities.max() > 2 * law.probabilities.min()


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.CosineVP()], ids=name)
def test_float32_has_the_loss_of_float64(sde):
    x, noise = torch.randn(2, 9, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    model, times = with_second(mixture().model(sde), wavy), sd.grids.uniform(sde, 8)
    wide = hybrid(model, x, chain=times, lam=1.0, t=times, noise=noise)
    single = hybrid(model, x.float(), chain=times.float(), lam=1.0, t=times.float(), noise=noise.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wide, rtol=2e-3, atol=2e-3)


# What it learns


def test_the_learned_variance_of_gaussian_data_is_the_best_one():
    """A small network for v alone, beside the exact mean, finds `log(V* / beta_tilde) / log(beta / beta_tilde)`."""
    sde, variance = sd.VP(), 0.2
    target = sd.exact.Gaussian(torch.zeros(2, dtype=F64), variance)
    times = sd.grids.log_snr(sde, 6, t_min=0.01)
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)).double()
    clock = times.log() * 2

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.exact = head, target.model(sde)

        def forward(self, x, t):
            place = (t[:, None].log() * 2 - clock.mean()) / clock.std()
            return torch.cat([self.exact.network(x, t), self.head(place)], 1)

    model = sd.ScoreModel(sd.TwoHeads(Network()), sde, "v", time=lambda t: t)
    sd.train(
        head,
        lambda x, condition: hybrid(model, x, chain=times, lam=1.0),
        target.sample(4096, seed=0),
        steps=500,
        batch_size=512,
        lr=2e-2,
        seed=0,
        ema=0.98,
        progress=False,
    )
    steps = ReverseSteps.to_data(model.point(times))
    listening, learned = LEARNED.along(model, steps)
    at = steps.at[:-1]
    best = steps.nu**2 + steps.gain**2 * variance * at.sigma**2 / (at.alpha**2 * variance + at.sigma**2)
    x = torch.zeros(1, 2, dtype=F64)
    found = []
    for i in range(len(times)):
        listening.predict(times[i], x)
        found.append(learned(i, x)[0])
    torch.testing.assert_close(torch.stack(found), best[:, None].expand(-1, 2), rtol=0.05, atol=0)
    fixed = Posterior().table(steps)[:-1], Beta().table(steps)[:-1]
    assert all((best[:-1] / table - 1).abs().max() > 0.3 for table in fixed)


def test_trained_for_real_it_has_the_better_bound_at_few_steps():
    """On an anisotropic mixture, with one network for both: 10 and 25 steps of a chain of 200, 3 standard errors."""
    sde, target = sd.CosineVP(), mixture()
    chain = sd.grids.log_snr(sde, 200, t_min=0.01)
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.TwoHeads(MLP((2,), width=48, depth=2, heads=2)), sde, "v")
    data = target.sample(8000, seed=0).float()
    model = sd.fit(
        model,
        data,
        loss=lambda model, x, condition=None: hybrid(model, x, chain=chain, lam=0.001, condition=condition),
        steps=600,
        batch_size=256,
        lr=4e-3,
        seed=0,
        progress=False,
    )
    x = target.sample(300, seed=1)
    for steps in (10, 25):
        times = chain[torch.linspace(0, 200, steps + 1).round().long()]
        bounds = {
            v: sd.elbo(model, x, times=times, samples=4, variance=v, seed=0).total
            for v in ("posterior", "beta", LEARNED)
        }
        for fixed in ("posterior", "beta"):
            gain = bounds[LEARNED] - bounds[fixed]
            assert gain.mean() > 3 * gain.std() / len(x) ** 0.5
            assert gain.mean() > 0.05


def test_it_is_a_loss_for_fit_and_the_model_is_kept(tmp_path):
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.TwoHeads(MLP((2,), width=8, depth=1, heads=2)), sd.VP(), "v")
    fitted = sd.fit(
        model, mixture().sample(64, seed=0).float(), loss=hybrid, steps=3, batch_size=8, seed=0, progress=False
    )
    sd.save(fitted, tmp_path)
    again = sd.load(tmp_path)
    runs = [sd.sample(m, (3, 2), solver=sd.DDPM(LEARNED), steps=3, seed=0).x for m in (fitted, again)]
    assert torch.equal(runs[0], runs[1])
    assert sd.losses.hybrid is hybrid


# Inputs


@pytest.mark.parametrize(
    ("kind", "message", "bad"),
    [
        (OptionError, "lam is the weight of L_vlb, a number >= 0; got -1", {"lam": -1.0}),
        (OptionError, "lam is the weight of L_vlb, a number >= 0; got nan", {"lam": math.nan}),
        (ShapeError, r"one time per row, shape \(2,\); got \(3,\)", {"t": torch.ones(3)}),
        (
            TimeError,
            r"t = 0\.7 is not a time of the chain, .*: draw t from those, or leave it away",
            {"t": torch.tensor([0.7, 1.0])},
        ),
        (TimeError, "strictly decreasing", {"chain": [0.1, 1.0]}),
        (TimeError, r"chain = 2 lies outside the span \[0, 1\]", {"chain": [2.0, 1.0]}),
        (TimeError, "at least two times", {"chain": [1.0]}),
        (ShapeError, "x0 must have a floating-point dtype", {"x0": torch.zeros(2, 2, dtype=torch.long)}),
    ],
    ids=str,
)
def test_bad_input_gets_a_sentence(kind, message, bad):
    model = with_second(mixture().model(sd.VP()), wavy)
    arguments = {"x0": torch.zeros(2, 2, dtype=F64), "chain": [1.0, 0.5]} | bad
    with pytest.raises(kind, match=message):
        hybrid(model, **arguments)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.1])
def test_it_is_a_variance_of_ddpm_alone(eta):
    with pytest.raises(OptionError, match=rf"DDIM\({eta:g}\) has no LearnedVariance.*write DDPM\(LearnedVariance"):
        sd.DDIM(eta, LEARNED)
    model = with_second(mixture().model(sd.VP()), wavy)
    runs = [sd.sample(model, (3, 2), solver=s, steps=3, seed=0).x for s in (sd.DDIM(1.0, LEARNED), sd.DDPM(LEARNED))]
    assert torch.equal(*runs)


def test_what_the_loss_is_not_made_for_is_refused():
    x0 = torch.zeros(2, 2, dtype=F64)
    with pytest.raises(OptionError, match="hybrid needs a ScoreModel, whose network is a TwoHeads; got function"):
        hybrid(lambda x, t: x, x0)
    flow = sd.RectifiedFlow(t_max=1.0)
    for kind in ("noise", "score"):
        model = with_second(sd.ScoreModel(lambda x, t: x, flow, kind), wavy)
        with pytest.raises(CapabilityError, match=rf"At t = 1 alpha is 0, .*{kind}.* predicts 'v', .*give a chain="):
            hybrid(model, x0)
        assert hybrid(model, x0, chain=[0.9, 0.1]).isfinite().all()


def test_a_network_without_a_second_output_is_refused():
    one = sd.ScoreModel(sd.TwoHeads(lambda x, t: x), sd.VP())
    with pytest.raises(ShapeError, match=r"two outputs stacked on axis 1.*\(3, 4\) for x of shape \(3, 2\).*\(3, 2\)"):
        one.predict(0.5, torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="returned str"):
        sd.TwoHeads(lambda x, t: "no")(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ShapeError, match="events of shape"):
        sd.TwoHeads(lambda x, t: x)(torch.zeros(3), torch.zeros(3))
    plain = mixture().model(sd.VP())
    x = torch.zeros(2, 2, dtype=F64)
    for call in (
        lambda: sd.sample(plain, (2, 2), solver=sd.DDPM(LEARNED), steps=2),
        lambda: sd.elbo(plain, x, steps=2, variance=LEARNED),
        lambda: hybrid(plain, x),
    ):
        with pytest.raises(CapabilityError, match=r"whose network is TwoHeads\(network\), called once a step"):
            call()
    with pytest.raises(ShapeError, match=r"heads = 0, event = \(2,\)"):
        MLP((2,), heads=0)
    with pytest.raises(ShapeError, match=r"heads = 2, event = \(\)"):
        MLP((), heads=2)


def test_a_perceptron_stacks_its_heads_on_the_first_axis_of_the_event():
    assert MLP((2,), heads=2)(torch.zeros(5, 2), torch.zeros(5)).shape == (5, 4)
    assert MLP((3, 4), heads=2)(torch.zeros(5, 3, 4), torch.zeros(5)).shape == (5, 6, 4)
    assert MLP((), heads=1)(torch.zeros(5), torch.zeros(5)).shape == (5,)
