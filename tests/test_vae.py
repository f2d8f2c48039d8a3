"""Variational autoencoders: exact identities on linear Gaussian models, where the noise is integrated exactly.

The mean of a quadratic over n standard normal numbers is its mean over the 2 n points `+-sqrt(n) e_i`. Every row of a
batch gets one of these points for all the noise of its chain, so that bounds of linear Gaussian models are exact.
"""

import itertools
import math

import pytest
import torch
from helpers import NAMED, name, scalar_target
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal

import sdediff as sd
from sdediff.errors import CapabilityError, CheckpointError, OptionError, ShapeError, TimeError
from sdediff.gaussians import kl_divergence
from sdediff.networks import GaussianMLP
from sdediff.testing import linear_sdes, time_grids
from sdediff.vae import HierarchicalVAE, lerp, slerp

F64 = torch.float64
SEEDS = st.integers(0, 2**32)


class Affine(nn.Module):
    """The conditional `N(weight z + bias, diag(std)^2)`."""

    def __init__(self, seed, inputs, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(outputs, inputs, dtype=F64, generator=generator))
        self.register_buffer("bias", torch.randn(outputs, dtype=F64, generator=generator))
        self.register_buffer("std", (torch.randn(outputs, dtype=F64, generator=generator) / 2).exp())

    def forward(self, z):
        mean = (self.weight @ z[..., None])[..., 0] + self.bias
        return mean, self.std.expand_as(mean)


def affine_vae(seed, sizes):
    """A chain of these sizes, x first."""
    up = [Affine(seed + k, *pair) for k, pair in enumerate(itertools.pairwise(sizes))]
    down = [Affine(seed + 50 + k, *pair[::-1]) for k, pair in enumerate(itertools.pairwise(sizes))]
    return HierarchicalVAE(up, down, latent=sizes[-1])


def affine_joint(mean, cov, conditionals):
    """Mean and covariance of all states of a chain, first one first, that starts at `N(mean, cov)`."""
    last = slice(0, len(mean))
    for step in conditionals:
        gain = cov[:, last] @ step.weight.T
        end = step.weight @ cov[last, last] @ step.weight.T + torch.diag(step.std**2)
        cov = torch.cat([torch.cat([cov, gain], 1), torch.cat([gain.T, end], 1)])
        mean, last = torch.cat([mean, step.weight @ mean[last] + step.bias]), slice(len(mean), len(mean) + len(end))
    return mean, cov


def posterior_gap(vae, x):
    """`(log p(x), KL(q(z | x) || p(z | x)))` of an affine chain for one x."""
    encoder, decoder = list(vae.encoder), list(vae.decoder)
    q_mean, q_cov = affine_joint(x, torch.zeros(len(x), len(x), dtype=F64), encoder)
    q_mean, q_cov = q_mean[len(x) :], q_cov[len(x) :, len(x) :]
    top = torch.zeros(vae.latent[0], dtype=F64)
    mean, cov = affine_joint(top, vae.prior_std**2 * torch.eye(len(top), dtype=F64), decoder[::-1])
    sizes = [len(top), *(len(step.bias) for step in decoder[::-1])]
    parts = torch.arange(len(mean)).split(sizes)
    order = torch.cat(parts[::-1])
    mean, cov = mean[order], cov[order][:, order]
    n = len(x)
    log_p = MultivariateNormal(mean[:n], cov[:n, :n]).log_prob(x)
    gain = cov[n:, :n] @ torch.linalg.inv(cov[:n, :n])
    p_mean = mean[n:] + gain @ (x - mean[:n])
    p_cov = cov[n:, n:] - gain @ cov[:n, n:]
    return log_p, kl_divergence(q_mean, q_cov, p_mean, (p_cov + p_cov.T) / 2)


class Cubature(sd.Noise):
    """For rows of which each data point has 2 n copies: copy i sees the i-th point, cut into the layers' events."""

    def __init__(self, size):
        self.size = size

    def open(self, first_row=0):
        points = torch.eye(self.size, dtype=F64) * self.size**0.5
        points = torch.cat([points, -points])
        taken = 0

        class Stream(sd.noise.NoiseStream):
            def normal(self, x):
                nonlocal taken
                cut = points[:, taken : taken + math.prod(x.shape[1:])]
                taken += cut.shape[1]
                return cut.repeat(len(x) // len(points), 1).reshape(x.shape)

            unit = None

        return Stream()


def exact_mean(bound, x, size):
    """The parts of a bound for rows x, with the noise of `size` numbers integrated exactly."""
    found = bound(x.repeat_interleave(2 * size, 0), noise=Cubature(size))
    return {
        part: getattr(found, part).unflatten(-1, (len(x), 2 * size)).mean(-1)
        for part in ("reconstruction", "kl", "total")
    }


def normal(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixture():
    means = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, -2.0]], dtype=F64)
    return sd.exact.GaussianMixture(torch.tensor([1.0, 2.0, 3.0]), means, torch.tensor([0.02, 0.1, 0.3]))


def grid_of(sde, n, end=0.05):
    """A falling grid from t_max to where the noise is not small."""
    sde = sd.as_linear(sde)
    clock = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=F64))
    first, last = clock[0], torch.minimum(clock[1], torch.tensor(-2 * math.log(end), dtype=F64))
    times = sde.time(first + (last - first) * torch.linspace(0, 1, n, dtype=F64))
    times[0] = sde.t_max
    return times


def within(a, a_err, b, b_err=0.0):
    assert (a - b).abs().max() <= 4.5 * ((a_err**2 + b_err**2) ** 0.5).max()


# The bound


@given(SEEDS, st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_bound_and_gap_add_up_to_log_p(seed, sizes):
    """`log p(x) = ELBO + KL(q(z | x) || p(z | x))` for linear Gaussian chains of one to three latents."""
    vae = affine_vae(seed, sizes)
    vae.prior_std = 1.3
    x = normal(seed, 2, sizes[0])
    found = exact_mean(vae.elbo, x, sum(sizes[1:]))
    for i in range(2):
        log_p, gap = posterior_gap(vae, x[i])
        torch.testing.assert_close(found["total"][i] + gap, log_p, rtol=1e-9, atol=1e-9)
        assert gap > 0
    torch.testing.assert_close(found["total"], found["reconstruction"] - found["kl"].sum(0))


@given(SEEDS, st.integers(1, 3), st.integers(1, 2))
def test_both_forms_are_one_bound_for_any_decoder_of_a_linear_gaussian_encoder(seed, depth, size):
    numbers = normal(seed, 2, depth).exp().tolist()
    up = [sd.LinearGaussian(*pair) for pair in zip(*numbers, strict=True)]
    vae = HierarchicalVAE(up, [Affine(seed + k, size, size) for k in range(depth)], prior_std=1.3)
    x = normal(seed + 9, 2, size)
    one, other = (exact_mean(form, x, size * depth) for form in (vae.denoising_elbo, vae.elbo))
    torch.testing.assert_close(one["total"], other["total"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one["reconstruction"], other["reconstruction"], rtol=1e-9, atol=1e-9)
    assert bool((one["kl"] > 0).all())


def test_the_bound_is_tight_where_the_encoder_is_the_posterior():
    vae = affine_vae(3, (2, 1))
    decoder = vae.decoder[0]
    precision = 1 + decoder.weight.T / decoder.std**2 @ decoder.weight
    encoder = Affine(0, 2, 1)
    encoder.weight = torch.linalg.inv(precision) @ (decoder.weight.T / decoder.std**2)
    encoder.bias = -encoder.weight @ decoder.bias
    encoder.std = precision.diagonal() ** -0.5
    tight = sd.VAE(encoder, decoder, latent=1)
    x = normal(0, 5, 2)
    log_p = torch.stack([posterior_gap(tight, row)[0] for row in x])
    torch.testing.assert_close(exact_mean(tight.elbo, x, 1)["total"], log_p, rtol=1e-10, atol=1e-10)
    for k in (1, 3):  # every weight is p(x)
        found = tight.log_prob(x, samples=k, seed=0)
        torch.testing.assert_close(found.value, log_p, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.effective, torch.full_like(log_p, k), rtol=1e-6, atol=0)
    assert found.stderr.max() < 1e-6


@pytest.mark.parametrize("latent", [1, 4])
def test_a_vae_has_the_bound_of_the_textbook(latent):
    """One draw, `log N(x; mean, std^2) - 1/2 sum (m^2 + s^2 - 1 - log s^2)`, and the same from a chain of one."""
    vae = affine_vae(7, (3, latent))
    single = sd.VAE(vae.encoder[0], vae.decoder[0])
    x = normal(1, 6, 3)
    noise = sd.Recorded(normal(2, 1, 6, latent))
    mean, std = vae.encoder[0](x)
    seen = MultivariateNormal(vae.decoder[0](mean + std * noise.numbers[0])[0], torch.diag(vae.decoder[0].std ** 2))
    kl = (mean**2 + std**2 - 1 - (std**2).log()).sum(1) / 2
    found = single.elbo(x, noise=noise)
    torch.testing.assert_close(found.total, seen.log_prob(x) - kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.kl[0], kl, rtol=1e-12, atol=1e-12)
    again = vae.elbo(x, noise=noise)
    for part in ("reconstruction", "kl", "total"):
        assert torch.equal(getattr(found, part), getattr(again, part))


def test_samples_are_averaged_and_their_spread_is_stated():
    vae, x = affine_vae(0, (2, 3, 1)), normal(0, 4, 2)
    numbers = [normal(k, 4, size) for k, size in enumerate((3, 1) * 5)]

    class Given(sd.Noise):
        def __init__(self, numbers):
            self.numbers = numbers

        def open(self, first_row=0):
            ahead = iter(self.numbers)
            return type("Stream", (), {"normal": lambda self, x: next(ahead)})()

    singles = torch.stack([vae.elbo(x, noise=Given(numbers[2 * k : 2 * k + 2])).total for k in range(5)])
    found = vae.elbo(x, noise=Given(numbers), samples=5)
    torch.testing.assert_close(found.total, singles.mean(0))
    torch.testing.assert_close(found.stderr, singles.std(0) / 5**0.5)
    assert bool(vae.elbo(x, seed=0).stderr.isnan().all())
    assert bool(vae.log_prob(x, samples=1, seed=0).stderr.isnan().all())


def test_a_row_depends_on_the_seed_and_its_index():
    vae, x = affine_vae(0, (2, 3, 1)), normal(0, 4, 2)
    whole, part = vae.elbo(x, samples=3, seed=5), vae.elbo(x[:2], samples=3, seed=5)
    torch.testing.assert_close(whole.total[:2], part.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(vae.sample(6, seed=1)[:2], vae.sample(2, seed=1), rtol=1e-12, atol=0)
    assert not torch.equal(whole.total, vae.elbo(x, samples=3, seed=6).total)
    torch.manual_seed(0)
    first = vae.loss(x)
    torch.manual_seed(0)
    assert torch.equal(first, vae.loss(x))
    assert not torch.equal(first, vae.loss(x))


@pytest.mark.parametrize("form", ["elbo", "denoising_elbo", "categorical"])
def test_gradients_are_those_of_finite_differences(form):
    torch.manual_seed(0)
    if form == "denoising_elbo":
        up = [sd.LinearGaussian(0.8, 0.5), sd.LinearGaussian(0.5, 0.7)]
        down = [GaussianMLP((2,), (2,), 5), GaussianMLP((2,), (2,), 5)]
        vae = HierarchicalVAE(up, down)
    elif form == "elbo":
        up = [GaussianMLP((2,), (2,), 4), GaussianMLP((2,), (1,), 4)]
        vae = HierarchicalVAE(up, [GaussianMLP((2,), (2,), 4), GaussianMLP((1,), (2,), 4)])
    else:
        logits = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 4)))
        vae = sd.VAE(GaussianMLP((2,), (2,), 4), logits, likelihood=sd.CategoricalLikelihood(4))
    vae.double()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = normal(0, 3, 2).clamp(-0.9, 0.9)

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, x):
            return (vae.denoising_elbo if form == "denoising_elbo" else vae.elbo)(x, seed=3).total

    bound = Bound()
    names = [key for key, _ in bound.named_parameters()]

    def total(*values):
        return torch.func.functional_call(bound, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(total, tuple(p.detach().clone().requires_grad_() for p in vae.parameters()))


# Importance weights


def test_the_importance_estimate_is_log_p_within_its_error():
    """Encoders as wide as this cover the posterior, so that the weights have a variance."""
    vae, x = affine_vae(1, (2, 1, 1)), normal(0, 3, 2)
    for step in vae.encoder:
        step.std *= 1.5
    log_p, gap = (torch.stack(values) for values in zip(*(posterior_gap(vae, row) for row in x), strict=True))
    found = vae.log_prob(x, samples=2000, seed=1)
    assert bool((found.stderr < 0.1 * gap).all())  # the bound itself would be seen to be another number
    for row in range(3):
        within(found.value[row], found.stderr[row], log_p[row])
    assert bool(((found.effective > 1) & (found.effective < 2000)).all())


def test_more_draws_raise_the_bound():
    """The mean of the estimate rises from the ELBO at one draw towards log p, which it never passes."""
    vae = affine_vae(4, (2, 2))
    x = normal(0, 1, 2)
    log_p, gap = posterior_gap(vae, x[0])
    rows = x.expand(4000, 2)
    means = {k: vae.log_prob(rows, samples=k, seed=k).value for k in (1, 4, 16, 64)}
    errors = {k: value.std() / 4000**0.5 for k, value in means.items()}
    within(means[1].mean(), errors[1], log_p - gap)
    for a, b in itertools.pairwise(means):
        assert means[b].mean() - means[a].mean() > 4 * (errors[a] ** 2 + errors[b] ** 2) ** 0.5
    assert means[64].mean() < log_p + 4 * errors[64]
    assert log_p - means[64].mean() < 0.3 * gap


def test_the_stated_error_is_that_of_repeated_estimates():
    vae, x = affine_vae(0, (2, 1)), normal(0, 1, 2)
    found = vae.log_prob(x.expand(2000, 2), samples=200, seed=0)
    assert 0.85 < (found.stderr.square().mean().sqrt() / found.value.std()).item() < 1.15


# A diffusion model is a hierarchical VAE


def chain_noise(vae, x, normal):
    """The noise of a chain whose every state is `A_t x + sqrt(V_t) normal`."""
    scale, variance, below, numbers = 1.0, 0.0, x, []
    for step in vae.encoder:
        scale, variance = step.scale * scale, step.scale**2 * variance + step.std**2
        state = scale * x + variance**0.5 * normal
        numbers.append((state - step.scale * below) / step.std)
        below = state
    return sd.Recorded(torch.stack(numbers))


@given(st.data())
def test_the_diffusion_bound_term_for_term_with_the_same_noise(data):
    """`sd.elbo` uses every noise with both signs; `|noise|^2 = D` takes out what it subtracts of mean zero."""
    sde = data.draw(linear_sdes())
    times = data.draw(time_grids(sde, max_steps=5))
    model, x = mixture().model(sde), mixture().sample(3, seed=0)
    noise = normal(data.draw(SEEDS), 3, 2)
    noise = noise / noise.norm(dim=1, keepdim=True) * 2**0.5
    vae = HierarchicalVAE.from_diffusion(model, times)
    both = [vae.denoising_elbo(x, noise=chain_noise(vae, x, sign * noise)) for sign in (1, -1)]
    numbers = noise.expand(len(times) + 2, 3, 2)
    expected = sd.elbo(model, x, times=times, samples=1, noise=sd.Recorded(numbers), seed=0)
    kl, reconstruction, total = (sum(getattr(b, part) for b in both) / 2 for part in ("kl", "reconstruction", "total"))
    scale = 1 + expected.diffusion.abs().max().item()
    torch.testing.assert_close(kl[:-1].flip(0), expected.terms, rtol=1e-7, atol=1e-10 * scale)
    torch.testing.assert_close(kl[-1], expected.prior, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reconstruction, expected.reconstruction, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(total, expected.total, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("sde", NAMED, ids=name)
def test_both_forms_are_the_closed_form_on_gaussian_data(sde):
    """`1/2 (snr_s - snr_t) E|x - xhat|^2` below the top, and `E log N(x; xhat, sigma^2 / alpha^2)`; both forms."""
    target, sde = scalar_target(), sd.as_linear(sde)
    times = grid_of(sde, 6)
    model = target.model(sde)
    vae = HierarchicalVAE.from_diffusion(model, times)
    x = torch.tensor([[-1.5], [0.2], [2.0]], dtype=F64)
    one, other = (exact_mean(form, x, 6) for form in (vae.denoising_elbo, vae.elbo))
    alpha, sigma = sde.scales_at(times)
    spread = alpha**2 * target.variances + sigma**2
    error = ((x - target.mean) * (sigma**2 / spread)) ** 2 + (alpha * target.variances * sigma / spread) ** 2
    snr = (alpha / sigma) ** 2
    terms = (snr.diff() / 2 * error[:, :-1]).T
    torch.testing.assert_close(one["kl"][:-1].flip(0), terms, rtol=1e-8, atol=1e-9)
    decoded = -error[:, -1] * snr[-1] / 2 - (2 * math.pi / snr[-1]).log() / 2
    torch.testing.assert_close(one["reconstruction"], decoded, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other["reconstruction"], decoded, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other["total"], one["total"], rtol=1e-8, atol=1e-8)


def test_the_two_forms_differ_layer_by_layer_but_not_in_sum():
    """Each form moves the encoder's entropies between layers in its own way."""
    vae = HierarchicalVAE.from_diffusion(scalar_target().model(sd.VP()), grid_of(sd.VP(), 4))
    x = torch.tensor([[-1.0]], dtype=F64)
    one, other = exact_mean(vae.denoising_elbo, x, 4), exact_mean(vae.elbo, x, 4)
    torch.testing.assert_close(one["kl"].sum(0), other["kl"].sum(0), rtol=1e-9, atol=1e-9)
    assert (one["kl"] - other["kl"]).abs().max() > 1e-3


def test_the_forms_agree_on_a_mixture_and_the_denoising_form_spreads_less():
    model = mixture().model(sd.VP())
    x = mixture().sample(1, seed=0).expand(3000, 2)
    vae = HierarchicalVAE.from_diffusion(model, grid_of(sd.VP(), 40))
    one, other = vae.denoising_elbo(x, seed=0), vae.elbo(x, seed=1)
    errors = [bound.total.std() / 3000**0.5 for bound in (one, other)]
    within(one.total.mean(), errors[0], other.total.mean(), errors[1])
    quiet, loud = (bound.kl[:-1].sum(0).var() for bound in (one, other))
    assert quiet < 0.5 * loud
    direct = sd.elbo(model, x[:600], times=grid_of(sd.VP(), 40), samples=1, seed=2).total
    within(one.total.mean(), errors[0], direct.mean(), direct.std() / 600**0.5)


def test_the_divergence_of_independent_draws_is_not_a_term_of_the_bound():
    """`E KL(q(z_t | z_(t-1)) || p(z_t | z_(t+1)))`, as notes print the consistency form, is too large."""
    vae = HierarchicalVAE.from_diffusion(scalar_target().model(sd.VP()), grid_of(sd.VP(), 4))
    x = torch.tensor([[-1.0]], dtype=F64)
    chain = vae._chain(x.repeat(8, 1), Cubature(4).open())
    pairs = zip(chain.ways_up[:-1], chain.ways_down[:-1], strict=True)
    printed = sum(q.kl(p).mean() for q, p in pairs) + chain.ways_up[-1].kl(chain.ways_down[-1]).mean()
    assert printed > exact_mean(vae.elbo, x, 4)["kl"].sum() + 0.1


def test_going_down_the_chain_is_ddpm():
    model = mixture().model(sd.VP())
    times = grid_of(sd.VP(), 9)
    vae = HierarchicalVAE.from_diffusion(model, times, (2,))
    expected = sd.sample(model, (5, 2), solver=sd.DDPM(), times=times, seed=4, dtype=F64).x
    torch.testing.assert_close(vae.sample(5, seed=4, dtype=F64), expected, rtol=1e-9, atol=1e-9)


def test_a_network_of_a_diffusion_model_is_trained_by_the_bound():
    torch.manual_seed(0)
    network = sd.networks.MLP((2,), width=16, depth=1)
    vae = HierarchicalVAE.from_diffusion(sd.ScoreModel(network, sd.VP(), prediction="data"), grid_of(sd.VP(), 3), (2,))
    assert {id(p) for p in vae.parameters()} == {id(p) for p in network.parameters()}
    vae.denoising_elbo(torch.randn(4, 2), seed=0).total.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    assert vae.sample(3, seed=0).shape == (3, 2)


# States


def test_samples_have_the_moments_of_the_model():
    vae = affine_vae(2, (2, 2, 1))
    mean, cov = affine_joint(torch.zeros(1, dtype=F64), torch.eye(1, dtype=F64), list(vae.decoder)[::-1])
    n = 20_000
    x = vae.sample(n, seed=0, final="draw")
    within(x.mean(0), (cov[-2:, -2:].diagonal() / n).sqrt(), mean[-2:])
    within(x.T.cov().diagonal(), cov[-2:, -2:].diagonal() * (2 / n) ** 0.5, cov[-2:, -2:].diagonal())
    within(x.T.cov()[0, 1], (cov[-1, -1] * cov[-2, -2] + cov[-1, -2] ** 2).sqrt() / n**0.5, cov[-1, -2])
    decoded = vae.sample(n, seed=0)
    expected = cov[-2:, -2:] - torch.diag(vae.decoder[0].std ** 2)
    within(decoded.T.cov().diagonal(), expected.diagonal() * (2 / n) ** 0.5, expected.diagonal())
    still = vae.sample(3, seed=0, temperature=0.0)
    torch.testing.assert_close(still, mean[-2:].expand(3, 2), rtol=1e-12, atol=1e-12)


def test_encode_draws_from_the_encoder_and_decode_descends_from_any_layer():
    vae, x = affine_vae(2, (2, 3, 1)), normal(0, 1, 2).expand(20_000, 2)
    states = vae.encode(x, seed=0)
    mean, cov = affine_joint(x[0], torch.zeros(2, 2, dtype=F64), list(vae.encoder))
    found = torch.cat(states, 1)
    within(found.mean(0), (cov.diagonal()[2:] / len(x)).sqrt(), mean[2:])
    within(found.var(0), cov.diagonal()[2:] * (2 / len(x)) ** 0.5, cov.diagonal()[2:])
    still = vae.encode(x[:2], temperature=0.0)
    torch.testing.assert_close(torch.cat(still, 1), mean[2:].expand(2, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vae.reconstruct(x[:2]), vae.decoder[0](still[0])[0])
    through = vae.decoder[0](vae.decoder[1](still[1])[0])[0]
    torch.testing.assert_close(vae.reconstruct(x[:2], layer=2), through)
    torch.testing.assert_close(vae.decode(still[1], temperature=0.0), through)
    spread = vae.decode(still[1][:1].expand(20_000, 1), seed=1).var(0)
    expected = vae.decoder[0].weight ** 2 @ vae.decoder[1].std ** 2
    within(spread, expected * (2 / 20_000) ** 0.5, expected)


def test_interpolation_joins_the_reconstructions():
    vae = affine_vae(2, (2, 3, 2))
    a, b = normal(0, 2, 2), normal(1, 2, 2)
    for layer, path in itertools.product((1, 2, None), (lerp, None)):
        between = vae.interpolate(a, b, 5, layer=layer, path=path)
        assert between.shape == (5, 2, 2)
        ends = [vae.reconstruct(x, layer=layer or 2) for x in (a, b)]
        torch.testing.assert_close(between[[0, -1]], torch.stack(ends))
    middle = vae.interpolate(a, b, 3, layer=1, path=lerp)[1]
    torch.testing.assert_close(middle, (vae.reconstruct(a) + vae.reconstruct(b)) / 2)


@given(SEEDS, st.floats(0, 1))
def test_the_arc_keeps_the_length_and_divides_the_angle(seed, u):
    a, b = (normal(seed + k, 3, 2, 2) for k in (0, 1))
    a, b = (v / v.flatten(1).norm(dim=1)[:, None, None] for v in (a, b))
    between = slerp(a, b, u)
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(3, dtype=F64), rtol=1e-6, atol=1e-6)
    angle = (a * b).sum((1, 2)).clamp(-1, 1).acos()
    torch.testing.assert_close((a * between).sum((1, 2)), (u * angle).cos(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slerp(a, b, 1 - u), slerp(b, a, u), rtol=1e-9, atol=1e-9)


def test_rows_on_one_line_are_joined_by_it():
    a = normal(0, 3, 4)
    for b in (2 * a, -a, 0 * a):
        torch.testing.assert_close(slerp(a, b, 0.25), lerp(a, b, 0.25))


def test_gradients_of_the_arc_are_finite_on_one_line_too():
    a = normal(0, 3, 4).requires_grad_()
    b = (torch.tensor([[2.0], [-1.0], [0.0]], dtype=F64) * a.detach()).requires_grad_()
    for gradient in torch.autograd.grad(slerp(a, b, 0.25).sum(), (a, b)):
        assert bool(gradient.isfinite().all())
    c = normal(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, c: slerp(a, c, 0.3), (a, c))


# Likelihoods


def test_probabilities_of_all_codes_add_up_to_one():
    levels = 5
    likelihood = sd.CategoricalLikelihood(levels)
    logits = normal(0, 1, 2, levels)
    centres = [-1 + (2 * c + 1) / levels for c in range(levels)]
    codes = torch.tensor(list(itertools.product(centres, repeat=2)), dtype=F64)
    log_p = likelihood.log_prob(logits.expand(len(codes), 2, levels), codes)
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=F64))
    torch.testing.assert_close(log_p.exp() @ codes, likelihood.mean(logits)[0])
    expected = logits.log_softmax(-1)[0, 0, 3] + logits.log_softmax(-1)[0, 1, 1]
    torch.testing.assert_close(log_p[3 * levels + 1], expected)
    ends = torch.tensor([[-1.0, 1.0], [-1 + 1.99 / levels, 0.999]], dtype=F64)
    expected = logits.log_softmax(-1)[0, 0, 0] + logits.log_softmax(-1)[0, 1, -1]
    torch.testing.assert_close(likelihood.log_prob(logits.expand(2, 2, levels), ends), expected.expand(2))


@pytest.mark.parametrize("levels", [3, 10, 17, 255, 256])
def test_left_edges_fall_into_their_own_bins(levels):
    codes = torch.arange(levels)
    logits = torch.where(torch.eye(levels, dtype=torch.bool), 0.0, -1000.0)[:, None]
    for dtype in (torch.float32, F64):
        for left in (-1 + 2 * codes.to(dtype) / levels, (-1 + 2 * codes.double() / levels).to(dtype)):
            assert bool((sd.CategoricalLikelihood(levels).log_prob(logits.to(dtype), left[:, None]) == 0).all())
        inside = -1 + 2 * (codes.to(dtype) + 0.999) / levels
        assert bool((sd.CategoricalLikelihood(levels).log_prob(logits.to(dtype), inside[:, None]) == 0).all())


def test_draws_of_codes_have_their_probabilities():
    likelihood, n = sd.CategoricalLikelihood(3), 20_000
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=F64)
    draws = likelihood.draw(logits.expand(n, 1, 3), normal(0, n, 1))
    for c, p in enumerate(logits.softmax(0)):
        share = (draws - (-1 + (2 * c + 1) / 3)).abs().lt(1e-9).double().mean()
        within(share, (p * (1 - p) / n).sqrt(), p)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_centres_fall_into_their_own_bins(levels):
    codes = torch.arange(levels)
    for dtype in (torch.float32, F64):
        x = (-1 + (2 * codes.to(dtype) + 1) / levels)[:, None]
        logits = torch.where(torch.eye(levels, dtype=torch.bool), 0.0, -1000.0)[:, None].to(dtype)
        assert bool((sd.CategoricalLikelihood(levels).log_prob(logits, x) == 0).all())


# Learning


def test_a_gaussian_perceptron_starts_as_the_standard_normal():
    network = GaussianMLP((1, 4, 4), (3, 2), width=8, depth=2)
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = network(x)
    assert torch.equal(mean, torch.zeros(5, 3, 2))
    assert torch.equal(std, torch.ones(5, 3, 2))
    nn.init.normal_(network.write.weight)
    mean, std = network(x)
    assert bool((std > 0).all())
    assert mean.std(0).min() > 0  # every entry sees x
    assert std.std(0).min() > 0
    part = network(x[:2])
    torch.testing.assert_close((mean[:2], std[:2]), part)
    for block in network.blocks:
        nn.init.zeros_(block[-1].weight)
    assert network(x)[0].std(0).min() > 0  # around the blocks


def test_a_linear_vae_learns_probabilistic_pca():
    """Its best bound is the likelihood of probabilistic PCA, in closed form (Tipping and Bishop 1999)."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 1, generator=generator) @ torch.tensor([[1.5, -0.8, 0.4]])
    data = data + 0.4 * torch.randn(400, 3, generator=generator)
    data = data - data.mean(0)
    values = torch.linalg.eigvalsh(data.T.double() @ data.double() / 400)
    noise = values[:2].mean()
    best = -(3 * math.log(2 * math.pi) + values[-1].log() + 2 * noise.log() + 3).item() / 2

    class Half(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.map, self.log_std = nn.Linear(inputs, outputs), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            mean = self.map(x)
            return mean, self.log_std.exp().expand_as(mean)

    torch.manual_seed(0)
    vae = sd.VAE(Half(3, 1), Half(1, 3), latent=1)
    losses = sd.train(vae, vae.loss, data, steps=400, lr=3e-2, ema=0.95, warmup=20, seed=0, progress=False)
    assert losses[:20].mean() > -best + 0.3
    bound = vae.elbo(data, samples=200, seed=0).total.double()
    exact = vae.log_prob(data, samples=200, seed=0).value.double()
    assert bound.mean() <= exact.mean() + 1e-3
    assert best - 0.02 < bound.mean().item() < best + 0.002


def test_what_takes_no_gradient_is_in_evaluation_mode():
    def half(inputs, outputs):
        return nn.Sequential(nn.Dropout(0.5), GaussianMLP((inputs,), (outputs,), 4)).double()

    torch.manual_seed(0)
    vae = HierarchicalVAE([half(2, 2), half(2, 1)], [half(2, 2), half(1, 2)], latent=1)
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.3)
    vae.train()
    x = normal(0, 5, 2)
    for call in (
        lambda: vae.log_prob(x, samples=2, seed=0).value,
        lambda: vae.encode(x, seed=0)[1],
        lambda: vae.decode(x[:, :1], seed=0),
        lambda: vae.reconstruct(x, seed=0),
        lambda: vae.interpolate(x, -x, 3),
        lambda: vae.sample(5, seed=0),
    ):
        first = call()
        assert torch.equal(first, call())
        assert vae.training
        assert vae.encoder[0][0].training
    assert not torch.equal(vae.elbo(x, seed=0).total, vae.elbo(x, seed=0).total)


def test_one_seed_is_other_noise_for_every_purpose():
    """A chain of `N(0, 1)` in both directions shows its noise."""
    noise = sd.LinearGaussian(0.0, 1.0)
    vae = HierarchicalVAE([noise, noise], [sd.LinearGaussian(1.0, 1.0), noise], latent=1)
    x = torch.zeros(2000, 1, dtype=F64)
    seen = [*vae.encode(x, seed=0), vae.decode(x, seed=0), vae.sample(2000, seed=0, dtype=F64)]
    seen += [vae.reconstruct(x, layer=2, temperature=1.0, seed=0) + 1e-9 * x]
    assert torch.equal(seen.pop(), vae.decode(seen[1], seed=0))
    correlations = torch.corrcoef(torch.cat(seen, 1).T) - torch.eye(4, dtype=F64)
    assert correlations.abs().max() < 4.5 / 2000**0.5


def test_a_frozen_schedule_makes_a_chain():
    sde = sd.LearnedVP(gamma_min=-4.0, gamma_max=3.0)
    model, x = mixture().model(sde.requires_grad_(False)), mixture().sample(4, seed=0)
    times = torch.linspace(1.0, 1e-3, 5, dtype=F64)
    vae = HierarchicalVAE.from_diffusion(model, times)
    found, expected = vae.denoising_elbo(x, samples=400, seed=0), sd.elbo(model, x, times=times, samples=64, seed=1)
    assert ((found.total - expected.total).abs() < 4 * (found.stderr**2 + expected.stderr**2).sqrt()).all()


def test_a_checkpoint_is_of_one_vae(tmp_path):
    def run(**options):
        vae = sd.VAE(GaussianMLP((2,), (1,), 4), GaussianMLP((1,), (2,), 4), **options)
        sd.train(vae, vae.loss, torch.zeros(4, 2), steps=1, batch_size=4, seed=0, checkpoint=tmp_path, progress=False)

    run()
    run(likelihood=sd.GaussianLikelihood(), prior_std=1)
    with pytest.raises(CheckpointError, match=r"prior_std was 1\.0, now 2\.0"):
        run(prior_std=2.0)
    with pytest.raises(CheckpointError, match=r"likelihood was 'GaussianLikelihood\(\)', now 'CategoricalLikelihood"):
        run(likelihood=sd.CategoricalLikelihood(4))
    assert affine_vae(0, (2, 2, 1)).identity["layers"] == 2


# Bad input

LINE = affine_vae(0, (2, 1))
DEEP = affine_vae(0, (2, 2, 1))
X = torch.zeros(3, 2, dtype=F64)
FLOW = scalar_target().model(sd.RectifiedFlow(t_max=1.0))
LEARNS = sd.ScoreModel(lambda x, t: x, sd.LearnedVP())
BLIND = sd.ScoreModel(lambda x, t: x, sd.RectifiedFlow(t_max=1.0))
STD = nn.Module()
SINGLE = sd.VAE(GaussianMLP((2,), (2,), 4), GaussianMLP((2,), (2,), 4))
SIX = sd.CategoricalLikelihood(6)


class Returns(nn.Module):
    def __init__(self, *output):
        super().__init__()
        self.output = output if len(output) != 1 else output[0]

    def forward(self, x):
        return self.output


def wrong(encoder):
    return HierarchicalVAE([encoder], [Affine(0, 1, 2)])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: HierarchicalVAE([], []), OptionError, ["T >= 1", "0 and 0"]),
        (lambda: HierarchicalVAE([STD], [STD, STD]), OptionError, ["1 and 2", "T decoders"]),
        (lambda: HierarchicalVAE([STD], [len]), OptionError, ["decoder[0]", "nn.Module", "builtin_function"]),
        (lambda: sd.VAE(len, STD), OptionError, ["encoder[0]", "nn.Module"]),
        (lambda: sd.VAE(STD, STD, latent=0), OptionError, ["latent", ">= 1", "got 0"]),
        (lambda: sd.VAE(STD, STD, latent=(3, -2)), OptionError, ["latent", "(3, -2)"]),
        (lambda: sd.VAE(STD, STD, prior_std=0.0), OptionError, ["prior_std", "positive", "0.0"]),
        (lambda: sd.VAE(STD, STD, likelihood=17), OptionError, ["log_prob", "int", "CategoricalLikelihood(levels)"]),
        (lambda: sd.LinearGaussian(1.0, 0.0), OptionError, ["positive std", "0.0"]),
        (lambda: sd.LinearGaussian(math.inf, 1.0), OptionError, ["finite scale", "inf"]),
        (lambda: sd.CategoricalLikelihood(1), OptionError, ["levels >= 2", "got 1"]),
        (lambda: LINE.elbo(X, samples=0), OptionError, ["samples", ">= 1", "got 0"]),
        (lambda: LINE.log_prob(X, samples=2.5), OptionError, ["samples", "2.5"]),
        (lambda: LINE.elbo(X.long()), ShapeError, ["floating-point", "int64", ".float()"]),
        (lambda: LINE.encode([1.0]), ShapeError, ["tensor", "list"]),
        (lambda: LINE.encode(X, temperature=-1.0), OptionError, ["temperature", "-1"]),
        (lambda: LINE.sample(2, temperature=math.nan), OptionError, ["temperature", "nan"]),
        (lambda: LINE.loss(X, torch.zeros(3)), OptionError, ["no condition", "Tensor"]),
        (lambda: LINE.sample(0), OptionError, ["n >= 1", "got 0"]),
        (lambda: LINE.sample(2, final="best"), OptionError, ["'best'", "'mean'", "'draw'"]),
        (lambda: sd.VAE(LINE.encoder[0], LINE.decoder[0]).sample(2), OptionError, ["latent=(8,)"]),
        (lambda: LINE.interpolate(X, X, 1), OptionError, ["n >= 2", "got 1"]),
        (lambda: LINE.interpolate(X, X[:2], 3), ShapeError, ["(3, 2)", "(2, 2)"]),
        (lambda: DEEP.decode(X, layer=3), OptionError, ["from 1", "to 2", "got 3"]),
        (lambda: DEEP.reconstruct(X, layer=0), OptionError, ["from 1", "to 2", "got 0"]),
        (lambda: DEEP.denoising_elbo(X), CapabilityError, ["encoder[0]", "Affine", "LinearGaussian", "elbo(x)"]),
        (lambda: wrong(Returns(X)).elbo(X), ShapeError, ["encoder[0]", "(mean, std)", "Tensor"]),
        (lambda: wrong(Returns(X[:, :1], X)).elbo(X), ShapeError, ["encoder[0]", "(3, 1)", "(3, 2)"]),
        (lambda: wrong(Returns(X[:2, :1], X[:2, :1])).elbo(X), ShapeError, ["(3, *event)", "(2, 1)"]),
        (lambda: wrong(Returns(X[:, :1], X[:, :1])).elbo(X), OptionError, ["positive std", "got 0", "exp"]),
        (lambda: sd.VAE(Affine(0, 2, 1), Affine(0, 1, 3)).elbo(X), ShapeError, ["decoder[0]", "(3, 2)", "(3, 3)"]),
        (
            lambda: HierarchicalVAE([Affine(0, 2, 2), Affine(0, 2, 1)], [Affine(0, 2, 2), Affine(0, 1, 3)]).elbo(X),
            ShapeError,
            ["decoder[1]", "(3, 2)", "(3, 3)"],
        ),
        (lambda: GaussianMLP((2,), (1,))(torch.zeros(3, 4)), ShapeError, ["GaussianMLP", "(2,)", "(4,)"]),
        (lambda: SIX.log_prob(X, X), ShapeError, ["logits", "(batch, *event, 6)", "(3, 2)"]),
        (lambda: SIX.log_prob((X, X), X), ShapeError, ["logits", "tuple"]),
        (lambda: SIX.log_prob(torch.zeros(3, 1, 6), X), ShapeError, ["logits", "(3, 2, 6)", "(3, 1, 6)"]),
        (lambda: SIX.mean((X, X)), ShapeError, ["logits", "(batch, *event, 6)", "tuple"]),
        (lambda: SIX.draw(X, X), ShapeError, ["logits", "(3, 2)"]),
        (lambda: LINE.elbo(X[:0]), ShapeError, ["at least one row", "0 rows"]),
        (lambda: LINE.encode(X[:0]), ShapeError, ["at least one row", "0 rows"]),
        (lambda: SINGLE.elbo(X), ShapeError, ["float64", "float32", "x.float()", "vae.double()"]),
        (lambda: SINGLE.decode(X), ShapeError, ["float64", "float32"]),
        (lambda: HierarchicalVAE(STD, STD), OptionError, ["lists of modules", "Module", "[encoder]", "VAE("]),
        (lambda: SIX.log_prob(torch.zeros(3, 2, 6), X + 4), OptionError, ["[-1, 1]", "4 to 4", "2 c + 1"]),
        (lambda: SIX.log_prob(torch.zeros(3, 2, 6), X + torch.nan), OptionError, ["[-1, 1]", "nan"]),
        (lambda: HierarchicalVAE.from_diffusion(FLOW, [0.5]), TimeError, ["at least two", "(1,)"]),
        (lambda: HierarchicalVAE.from_diffusion(FLOW, [0.1, 0.5]), TimeError, ["decreasing", "0.1", "0.5"]),
        (lambda: HierarchicalVAE.from_diffusion(FLOW, [2.0, 0.5]), TimeError, ["2"]),
        (lambda: HierarchicalVAE.from_diffusion(FLOW, [1.0, 0.0]), TimeError, ["no noise at t = 0", "end the times"]),
        (lambda: HierarchicalVAE.from_diffusion(LEARNS, [1.0, 0.5]), CapabilityError, ["still learns", "sd.VDM"]),
        (lambda: HierarchicalVAE.from_diffusion(BLIND, [1.0, 0.5]), CapabilityError, ["alpha is 0", "'noise'"]),
    ],
)
def test_bad_input_gets_a_sentence(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
