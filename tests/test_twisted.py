"""Twisted sequential Monte Carlo against closed forms: chains of Gaussians, mixtures, and a sampler written out."""

import itertools
import math

import pytest
import torch
from helpers import fitted_order
from hypothesis import given, settings
from hypothesis import strategies as st

import sdediff as sd
from sdediff import particles
from sdediff.errors import CapabilityError, DivergenceError, OptionError, ShapeError, TimeError

F64 = torch.float64
VP = sd.VP()
MEAN, SPREAD = 0.7, 0.6  # of the data on a line
SEEN, WIDTH = -0.5, 0.4  # r is N(SEEN; x, WIDTH^2)


def normal(x, mean, std):
    """Log-density of independent entries, summed over an event."""
    return torch.distributions.Normal(mean, std).log_prob(x).reshape(len(x), -1).sum(1)


def line():
    return sd.exact.Gaussian(torch.tensor([MEAN], dtype=F64), SPREAD**2)


def log_r(x):
    return normal(x, SEEN, WIDTH)


def no_r(x):
    """r = 1, whose gradient exists and is 0."""
    return 0 * x.reshape(len(x), -1).sum(1)


MODES = [[-1.5, 0.0], [1.5, 0.5]]


def plane():
    """Two modes of weights 0.3 and 0.7, far enough apart that nothing passes between."""
    return sd.exact.GaussianMixture(*(torch.tensor(v, dtype=F64) for v in ([0.3, 0.7], MODES, [0.04, 0.36])))


def product(weights, means, variances, seen, width):
    """Weights, means, variances and evidence of a mixture of round Gaussians times N(seen; x, width^2 I)."""
    total = variances + width**2
    evidence = weights.log() + torch.distributions.Normal(means, total[:, None].sqrt()).log_prob(seen).sum(1)
    gain = (variances / total)[:, None]
    return torch.softmax(evidence, 0), means + gain * (seen - means), width**2 * gain[:, 0], evidence.logsumexp(0)


PLANE = tuple(torch.tensor(v, dtype=F64) for v in ([0.3, 0.7], MODES, [0.04, 0.36]))
POINT, POINT_WIDTH = torch.tensor([-0.3, 0.2], dtype=F64), 0.8


def log_point(x):
    return normal(x, POINT.to(x), POINT_WIDTH)


def exact_twist(t, x, sde=VP):
    """`log E[r(x_0) | x_t = x]` in the plane: by the posteriors of the components."""
    weights, means, variances = PLANE
    alpha, sigma = sde.scales_at(t)
    alpha, sigma = alpha[:, None], sigma[:, None]
    total = alpha**2 * variances + sigma**2
    off = x[:, None] - alpha[..., None] * means
    log_gamma = weights.log() - (off.square().sum(-1) / total + 2 * total.log()) / 2
    inside = means + (alpha * variances / total)[..., None] * off
    spread = (variances * sigma**2 / total + POINT_WIDTH**2)[..., None].sqrt()
    expected = torch.distributions.Normal(inside, spread).log_prob(POINT).sum(-1)
    return torch.logsumexp(torch.log_softmax(log_gamma, 1) + expected, dim=1)


def grid_of(steps, t_min=None):
    return sd.grids.natural(VP, steps, t_min=t_min)


# The gradient form


def test_gradient_form():
    """`score + w grad log r`, at the denoised estimate unless told otherwise; a score, and no density."""
    model = plane().model(VP)
    x, t = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4, dtype=F64)
    at = x.clone().requires_grad_()
    xhat = model.denoised(t, at)
    through = torch.autograd.grad(log_point(xhat).sum(), at)[0]
    for options, slope in (({}, through), ({"at": "noisy"}, (POINT - x) / POINT_WIDTH**2)):
        guided = sd.Product(model, log_point, 1.7, **options)
        torch.testing.assert_close(guided.score(t, x), model.score(t, x) + 1.7 * slope, rtol=0, atol=1e-10)
        with pytest.raises(CapabilityError, match=r"no log-density.*not the noised versions of any density"):
            sd.log_prob(guided, x)
    torch.testing.assert_close(
        sd.Product(model, log_point).score(t, x), model.score(t, x) + through, rtol=0, atol=1e-10
    )


# The chain of DDPM on Gaussian data


class Chain:
    """Its kernels, `x_s = a x_t + b + sqrt(v) z`, from the process and the data alone, and the law of its outcome."""

    def __init__(self, steps):
        times, self.a, self.b, self.v = grid_of(steps), [], [], []
        for t, s in itertools.pairwise(times):
            ends = torch.tensor([[0.0], [1.0]], dtype=F64)
            mean, std = VP.posterior(s, t, self.denoised(t, ends), ends)
            self.a.append((mean[1] - mean[0]).item())
            self.b.append(mean[0].item())
            self.v.append(std.item() ** 2)
        ends = self.denoised(times[-1], torch.tensor([[0.0], [1.0]], dtype=F64))
        self.a.append((ends[1] - ends[0]).item())
        self.b.append(ends[0].item())
        prior = VP.prior((1,), dtype=F64)
        self.mean, self.variance = prior.mean.item(), prior.stddev.item() ** 2
        for a, b, v in zip(self.a, self.b, [*self.v, 0.0], strict=True):
            self.mean, self.variance = a * self.mean + b, a**2 * self.variance + v

    @staticmethod
    def denoised(t, x):
        alpha, sigma = VP.scales_at(t)
        return MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * MEAN)

    def product(self):
        """Mean, variance and log-evidence of the outcome's law times r."""
        total = self.variance + WIDTH**2
        evidence = normal(torch.tensor([[SEEN]], dtype=F64), self.mean, math.sqrt(total)).item()
        gain = self.variance / total
        return self.mean + gain * (SEEN - self.mean), gain * WIDTH**2, evidence


def test_chain_is_that_of_ddpm():
    """The closed form of the outcome's law, against DDPM's own samples."""
    chain = Chain(6)
    x = sd.sample(line().model(VP), (20000, 1), solver=sd.DDPM(), steps=6, seed=0).x
    assert abs(x.mean() - chain.mean) < 4 * x.std() / 20000**0.5
    assert abs(x.var() / chain.variance - 1) < 4 * (2 / 20000) ** 0.5


@pytest.mark.parametrize("method", sorted(particles.RESAMPLINGS))
def test_gaussian_product(method):
    """Mean, variance and evidence of r times the chain's law, to 4 standard errors of many runs; evidence unbiased."""
    mean, variance, evidence = Chain(8).product()
    model, runs = line().model(VP), 150
    results = [
        sd.smc(model, log_r, (200, 1), steps=8, seed=seed, resampling=method, ess_threshold=0.9) for seed in range(runs)
    ]
    assert all(result.resampled for result in results)
    ratios = torch.tensor([result.log_evidence - evidence for result in results], dtype=F64).exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / runs**0.5
    assert ratios.std() < 0.2
    for numbers, exact in (
        (torch.stack([result.mean()[0] for result in results]), mean),
        (torch.stack([result.cov()[0, 0] for result in results]), variance),
    ):
        # an expectation of weighted particles is biased like 1 / N, a fraction of one run's error
        assert abs(numbers.mean() - exact) < 4 * numbers.std() / runs**0.5 + variance / 200


def test_errors_fall_with_the_root_of_the_particles():
    """Errors of mean, variance and log-evidence have the slope -1/2, fitted over a factor 64."""
    exact, model, counts, runs = Chain(6).product(), line().model(VP), (32, 128, 512, 2048), 40
    errors = []
    for count in counts:
        results = [sd.smc(model, log_r, (count, 1), steps=6, seed=1000 * count + i) for i in range(runs)]
        found = torch.tensor([(r.mean().item(), r.cov().item(), r.log_evidence) for r in results], dtype=F64)
        errors.append((found - torch.tensor(exact, dtype=F64)).square().mean(0).sqrt())
    for column in torch.stack(errors).T:
        assert fitted_order(column.tolist(), counts) == pytest.approx(0.5, abs=0.12)


def test_true_posterior_as_steps_grow():
    """The chain's product tends to the posterior at the rate 1 / steps, and particles follow it all the way."""
    total = SPREAD**2 + WIDTH**2
    true = MEAN + SPREAD**2 / total * (SEEN - MEAN), SPREAD**2 * WIDTH**2 / total
    steps = (8, 16, 32, 64, 128)
    bias = [math.hypot(*(a - b for a, b in zip(Chain(n).product()[:2], true, strict=True))) for n in steps]
    assert fitted_order(bias[2:], steps[2:]) == pytest.approx(1, abs=0.2)
    assert bias[-1] < 0.03
    for n in (8, 128):
        result = sd.smc(line().model(VP), log_r, (8000, 1), steps=n, seed=n)
        mean, variance, evidence = Chain(n).product()
        value, stderr = result.expectation(lambda x, mean=mean: torch.cat([x, (x - mean) ** 2], dim=1))
        assert abs(value[0] - mean) < 4 * stderr[0]
        assert abs(value[1] - variance) < 4 * stderr[1]
        assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_stderr


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_standard_errors(threshold):
    """Those of one run, against what many runs vary by: with resampling never, at times, and always."""
    model, runs = line().model(VP), 300
    options = {"steps": 6, "ess_threshold": threshold, "resampling": "multinomial", "shift": 0.5}
    results = [sd.smc(model, log_r, (400, 1), seed=seed, **options) for seed in range(runs)]
    counted = [len(result.resampled) for result in results]
    assert {0.0: max(counted) == 0, 0.7: min(counted) >= 1, 1.0: min(counted) >= 4}[threshold]
    log_evidence = torch.tensor([result.log_evidence for result in results], dtype=F64)
    claimed = torch.tensor([result.log_evidence_stderr for result in results], dtype=F64)
    means = [result.expectation(lambda x: x[:, 0]) for result in results]
    values, stderrs = (torch.stack(list(part)) for part in zip(*means, strict=True))
    for found, said in ((log_evidence, claimed), (values, stderrs)):
        ratio = said.square().mean() / found.var()
        assert abs(ratio - 1) < 4 * (2 / runs) ** 0.5, ratio  # the error of a variance of 300 numbers


# Every factor, written out


class Grown(sd.variance.EntryVariance):
    """V of every entry, which depends on the state."""

    def along(self, model, steps):
        nu = steps.nu.tolist()
        return model, lambda i, x: nu[i] ** 2 * (1 + x.sigmoid())


def written_out(model, log_r, count, event, steps, variance, log_psi, shift, threshold, method, seed):
    """The sampler from its definition: densities of both kernels, and psi before and after, one row of code each."""
    times = grid_of(steps)
    stream = sd.RowNoise(seed).open()
    chance = torch.Generator().manual_seed(sd.noise.mix(seed, 40) >> 2)
    prior = VP.prior(event, dtype=F64)
    x = prior.mean + prior.stddev * stream.normal(torch.empty(count, *event, dtype=F64))
    log_w, log_z = log_psi(times[0], x), 0.0
    for t, s in itertools.pairwise(times):
        probabilities = torch.softmax(log_w, 0)
        if 1 / probabilities.square().sum() < threshold * count:
            log_z += log_w.logsumexp(0) - math.log(count)
            x = x[particles.ancestors(log_w, count, method, chance)]
            log_w = torch.zeros(count, dtype=F64)
        mean, std = VP.posterior(s, t, model.denoised(t, x), x)
        std = VP.transition(s, t)[1] if variance == "beta" else std
        std = std * (1 + x.sigmoid()).sqrt() if isinstance(variance, Grown) else std
        at = x.clone().requires_grad_()
        gradient = torch.autograd.grad(log_psi(t, at).sum(), at)[0]
        moved = mean + shift * std**2 * gradient
        after = moved + std * stream.unit(x, t, s)
        log_w = log_w + normal(after, mean, std) - normal(after, moved, std)
        log_w = log_w + log_psi(s, after) - log_psi(t, x)
        x = after
    x, log_psi_end = model.denoised(times[-1], x), log_psi(times[-1], x)
    log_w = log_w - log_psi_end + log_r(x)
    return x, torch.log_softmax(log_w, 0), (log_z + log_w.logsumexp(0) - math.log(count)).item()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["posterior", "beta", Grown()]),
    st.sampled_from(["denoised", "exact", "arbitrary"]),
    st.sampled_from([0.0, 0.6, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(sorted(particles.RESAMPLINGS)),
    st.integers(0, 2**31),
)
def test_all_factors(variance, kind, shift, threshold, method, seed):
    """States, weights and evidence are those of the definition, whatever psi, with and without resampling."""
    model = plane().model(VP)
    twist = {"denoised": None, "exact": exact_twist, "arbitrary": lambda t, x: t.cos() * torch.sin(x).sum(1)}[kind]

    def log_psi(t, x):
        return log_point(model.denoised(t, x)) if twist is None else twist(t.expand(len(x)), x)

    result = sd.smc(
        model, log_point, (12, 2), steps=5, variance=variance, twist=twist, shift=shift, ess_threshold=threshold,
        resampling=method, seed=seed,
    )  # fmt: skip
    expected = written_out(model, log_point, 12, (2,), 5, variance, log_psi, shift, threshold, method, seed)
    torch.testing.assert_close(result.x, expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(result.log_weights, expected[1], rtol=0, atol=1e-7)
    assert result.log_evidence == pytest.approx(expected[2], abs=1e-7)
    assert result.ess[-1].item() == pytest.approx(1 / expected[1].exp().square().sum().item(), rel=1e-6)


def test_importance_sampling():
    """With psi = 1 particles are DDPM's samples, weighted by r."""
    model = plane().model(VP)
    result = sd.smc(model, log_point, (50, 2), steps=6, twist=lambda t, x: no_r(x), seed=4)
    x = sd.sample(model, (50, 2), solver=sd.DDPM(), steps=6, seed=4).x
    assert torch.equal(result.x, x)
    torch.testing.assert_close(result.log_weights, torch.log_softmax(log_point(x), 0), rtol=0, atol=1e-13)
    assert result.log_evidence == pytest.approx(log_point(x).exp().mean().log().item(), abs=1e-13)
    assert result.resampled == ()


@pytest.mark.parametrize(
    ("prediction", "sde", "variance", "dtype"),
    [
        ("v", VP, "posterior", F64),
        ("noise", VP, "beta", torch.float32),
        ("edm", sd.EDM(), "posterior", torch.float32),
        ("data", VP, sd.LearnedVariance(), F64),
    ],
)
def test_no_r_is_ddpm(prediction, sde, variance, dtype):
    """r = 1 leaves samples as they are, bit for bit, their weights equal and the evidence one; in chunks as well."""
    torch.manual_seed(0)
    network = sd.TwoHeads(sd.networks.MLP((3, 2), width=8, heads=2)).to(dtype)
    model = sd.ScoreModel(network, sde, prediction, time=sde.sigma)
    x = sd.sample(model, (40, 3, 2), solver=sd.DDPM(variance), steps=7, seed=5).x
    result = sd.smc(model, no_r, (40, 3, 2), steps=7, variance=variance, seed=5)
    assert torch.equal(result.x, x)
    assert result.x.dtype == dtype
    assert result.log_evidence == 0
    assert result.log_evidence_stderr == 0
    assert bool((result.log_weights == -math.log(40)).all())
    assert result.ess.tolist() == [40.0] * 8
    assert result.resampled == ()
    assert result.nfe == 8
    chunked = sd.smc(model, no_r, (40, 3, 2), steps=7, variance=variance, seed=5, batch_size=16)
    torch.testing.assert_close(chunked.x, x)


def test_variances_of_entries():
    """A variance of every entry in every state: importance weights over one step are those of the two kernels."""
    model, times = plane().model(VP), torch.tensor([1.0, 0.4], dtype=F64)
    options = {"times": times, "variance": Grown(), "ess_threshold": 0.0, "seed": 3}
    result = sd.smc(model, log_point, (30, 2), final="none", **options)
    stream = sd.RowNoise(3).open()
    x = stream.normal(torch.empty(30, 2, dtype=F64)) * VP.prior((2,), dtype=F64).stddev
    mean, std = VP.posterior(times[1], times[0], model.denoised(times[0], x), x)
    std = std * (1 + x.sigmoid()).sqrt()
    at = x.clone().requires_grad_()
    gradient = torch.autograd.grad(log_point(model.denoised(times[0], at)).sum(), at)[0]
    moved = mean + std**2 * gradient
    after = moved + std * stream.normal(x)
    log_w = log_point(after) + normal(after, mean, std) - normal(after, moved, std)
    torch.testing.assert_close(result.x, after, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.log_weights, torch.log_softmax(log_w, 0), rtol=0, atol=1e-10)
    chunked = sd.smc(model, log_point, (30, 2), final="none", batch_size=7, **options)
    assert torch.equal(chunked.log_weights, result.log_weights)
    assert bool(sd.smc(model, log_point, (30, 2), **{**options, "ess_threshold": 1.0}).resampled)


# Where psi is the best one


def test_best_twist_on_a_tilt():
    """A log-linear r, with psi that of the chain: log w is a sum of Gaussians, known row by row.

    If log psi is linear at both ends of a step, psi_t(x) = E[psi_s | x] and m has the slope a, a factor is
    `b v^(1/2) (1 - a) z - b^2 v (1 - a)^2 / 2`: the shift is a b v, where b v would be best.
    """
    steps, tilt = 5, 0.8
    chain, times = Chain(steps), grid_of(steps)
    slopes, levels = [tilt * chain.a[-1]], [tilt * chain.b[-1]]
    for a, b, v in reversed(list(zip(chain.a, chain.b, chain.v, strict=False))):
        levels.insert(0, levels[0] + slopes[0] * b + slopes[0] ** 2 * v / 2)
        slopes.insert(0, slopes[0] * a)

    def twist(t, x):
        k = int((times - t[0]).abs().argmin())
        return levels[k] + slopes[k] * x[:, 0]

    options = {"steps": steps, "twist": twist, "ess_threshold": 0.0, "seed": 2}
    result = sd.smc(line().model(VP), lambda x: tilt * x[:, 0], (500, 1), **options)
    stream = sd.RowNoise(2).open()
    prior = VP.prior((1,), dtype=F64)
    x = prior.mean + prior.stddev * stream.normal(torch.empty(500, 1, dtype=F64))
    log_w = levels[0] + slopes[0] * x[:, 0]
    for a, v, b in zip(chain.a, chain.v, slopes[1:], strict=False):
        z = stream.normal(x)[:, 0]
        log_w = log_w + b * v**0.5 * (1 - a) * z - b**2 * v * (1 - a) ** 2 / 2
    torch.testing.assert_close(result.log_weights, torch.log_softmax(log_w, 0), rtol=0, atol=1e-9)
    exact = tilt * chain.mean + tilt**2 * chain.variance / 2
    assert abs(result.log_evidence - exact) < 4 * result.log_evidence_stderr


def spread_of_weights(twist, steps, count=1500):
    """Variance of the logarithm of what weights became after the start, without resampling."""
    options = {"ess_threshold": 0.0, "seed": 1, "variance": "posterior"}
    result = sd.smc(plane().model(VP), log_point, (count, 2), steps=steps, twist=twist, **options)
    start = VP.prior((2,), dtype=F64).stddev * sd.RowNoise(1).open().normal(torch.empty(count, 2, dtype=F64))
    t = torch.full((count,), VP.t_max, dtype=F64)
    return (result.log_weights - exact_twist(t, start)).var().item()


def test_weights_become_equal_as_steps_shrink():
    """With psi = E[r | x_t] of the process, the variance of log w falls like 1 / steps; by default it does not."""
    counts = (40, 80, 160, 320)
    best = [spread_of_weights(exact_twist, n) for n in counts]
    assert 0.8 < fitted_order(best, counts) < 1.5, best  # the order of small steps, from above
    assert best[-1] < 0.02
    assert spread_of_weights(None, 320, 300) > 10 * best[-1]


def test_leading_part_of_a_factor():
    """It is `V (z^T H z - tr H) / 2`, up to V^(3/2): one step in the plane, ever shorter."""
    sde = sd.VP(0.1, 2.0)
    model, lengths = plane().model(sde), (0.02, 0.005, 0.00125)
    x = sde.prior((2,), dtype=F64).stddev * sd.RowNoise(5).open().normal(torch.empty(300, 2, dtype=F64))
    t = torch.full((300,), sde.t_max, dtype=F64)
    start = exact_twist(t, x, sde)

    def total(at):
        return exact_twist(sde.t_max * torch.ones(len(at), dtype=F64), at, sde).sum()

    hessian = torch.autograd.functional.hessian(total, x).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    left = []
    for length in lengths:
        end = sde.t_max - length
        result = sd.smc(
            model,
            lambda at, end=end: exact_twist(torch.full((len(at),), end, dtype=F64), at, sde),
            (300, 2), times=[sde.t_max, end], final="none", ess_threshold=0.0, seed=5,
            twist=lambda t, at: exact_twist(t, at, sde),
        )  # fmt: skip
        stream = sd.RowNoise(5).open()
        stream.normal(x)
        z = stream.normal(x)
        variance = sde.posterior(torch.tensor(end), t[0], x, x)[1] ** 2
        found = result.log_weights + result.log_evidence + math.log(300) - start
        squares = torch.einsum("bi,bij,bj->b", z, hessian, z) - hessian.diagonal(dim1=1, dim2=2).sum(1)
        left.append((found - variance * squares / 2).square().mean().sqrt().item())
    assert fitted_order(left, [1 / length for length in lengths]) == pytest.approx(1.5, abs=0.15), left


# Mixtures, where the gradient alone is wrong


def test_weights_of_modes():
    """Particles have the modes' weights of the true product, at which the plain gradient fails by far."""
    weights, means, _, evidence = product(*PLANE, POINT, POINT_WIDTH)
    model, right = plane().model(VP), (lambda x: (x[:, 0] > 0.3).to(F64))
    count = 4000
    result = sd.smc(model, log_point, (count, 2), steps=100, seed=0)
    share, stderr = result.expectation(right)
    exact_sample = sd.exact.GaussianMixture(weights, means, product(*PLANE, POINT, POINT_WIDTH)[2]).sample(400000, 0)
    truth = right(exact_sample).mean()
    assert stderr < 0.03
    assert abs(share - truth) < 4 * stderr
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_stderr
    value, error = result.expectation(lambda x: x)
    assert bool(((value - exact_sample.mean(0)).abs() < 4 * error).all())
    for at in ("noisy", "denoised"):
        x = sd.sample(sd.Product(model, log_point, at=at), (16000, 2), solver=sd.DDPM(), steps=100, seed=1).x
        guided = right(x).mean()
        assert abs(guided - truth) > 5 * (guided * (1 - guided) / 16000).sqrt(), (at, guided, truth)


# Invariants


def test_factor_of_r():
    """A constant factor of r moves the log-evidence by its logarithm, and nothing else."""
    model = plane().model(VP)
    for constant in (3.0, -1e4):
        options = {"steps": 10, "seed": 7, "ess_threshold": 0.9}
        plain = sd.smc(model, log_point, (100, 2), **options)
        moved = sd.smc(model, lambda x, c=constant: log_point(x) + c, (100, 2), **options)
        assert plain.resampled == moved.resampled != ()
        assert moved.log_evidence - plain.log_evidence == pytest.approx(constant, abs=1e-7)
        torch.testing.assert_close(moved.x, plain.x, rtol=0, atol=1e-7)
        torch.testing.assert_close(moved.log_weights, plain.log_weights, rtol=0, atol=1e-7)


def test_events_of_any_shape():
    """An event is its entries: particles of (2, 1) are those of (2,) in another shape."""
    image = sd.exact.GaussianMixture(PLANE[0], PLANE[1].reshape(2, 2, 1), PLANE[2])
    flat = sd.smc(plane().model(VP), log_point, (64, 2), steps=6, seed=8)
    result = sd.smc(image.model(VP), lambda x: log_point(x[..., 0]), (64, 2, 1), steps=6, seed=8)
    torch.testing.assert_close(result.x[..., 0], flat.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.log_weights, flat.log_weights, rtol=0, atol=1e-10)
    numbers = sd.exact.Gaussian(torch.tensor(0.3, dtype=F64), 0.5).model(VP)
    assert sd.smc(numbers, lambda x: -(x**2), (8,), steps=3, seed=0).mean().shape == ()


def test_seeds_and_chunks():
    """A seed decides everything; chunks of the particles nothing; None follows torch's seed."""
    model = plane().model(VP)
    options = {"steps": 8, "ess_threshold": 1.0, "resampling": "multinomial"}
    one = sd.smc(model, log_point, (50, 2), seed=9, **options)
    for again in (
        sd.smc(model, log_point, (50, 2), seed=9, **options),
        sd.smc(model, log_point, (50, 2), seed=9, batch_size=7, **options),
        sd.smc(model, log_point, (50, 2), seed=9, progress=True, **options),
    ):
        assert torch.equal(one.x, again.x)
        assert torch.equal(one.log_weights, again.log_weights)
        assert (one.log_evidence, one.nfe, one.resampled) == (again.log_evidence, again.nfe, again.resampled)
    assert not torch.equal(one.x, sd.smc(model, log_point, (50, 2), seed=10, **options).x)
    torch.manual_seed(3)
    first = sd.smc(model, log_point, (10, 2), steps=3).x
    torch.manual_seed(3)
    assert torch.equal(first, sd.smc(model, log_point, (10, 2), steps=3).x)


@pytest.mark.filterwarnings("ignore::sdediff.DegeneracyWarning")
def test_costs():
    """One call of the network at every time of the grid, the last of which is not needed for the state."""
    network = sd.networks.MLP((2,), width=8)
    calls = []
    network.register_forward_hook(lambda module, inputs, output: calls.append((len(output), module.training)))
    model = sd.ScoreModel(network, VP)
    for final, extra in (("denoise", 1), ("none", 0)):
        for twist in (None, lambda t, x: -x.square().sum(1)):
            calls.clear()
            result = sd.smc(model, log_point, (20, 2), steps=4, twist=twist, final=final, batch_size=12, seed=0)
            assert result.nfe == 4 + extra
            assert [rows for rows, _ in calls] == [12, 8] * (4 + extra)
            assert not any(training for _, training in calls)
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert not result.x.requires_grad
    assert len(result.times) == len(result.ess) == 5


@pytest.mark.filterwarnings("ignore::sdediff.DegeneracyWarning")
def test_support():
    """r that is 0 in half of the plane, and has no gradient: the share of the samples that lie in the rest."""

    def right(x):
        return torch.where(x[:, 0] > 0, 0.0, -math.inf).to(x)

    def twist(t, x):
        return 3 * (x[:, 0].clamp(-1, 1) - 1)

    def jump(t, x):
        return torch.where(x[:, 0] > 0, 0.0, -3.0).to(x)

    model, count = plane().model(VP), 4000
    share = (sd.sample(model, (40000, 2), solver=sd.DDPM(), steps=40, seed=12).x[:, 0] > 0).double().mean()
    for options in ({"twist": twist}, {"twist": jump, "shift": 0.0}, {"twist": lambda t, x: no_r(x), "shift": 0.0}):
        result = sd.smc(model, right, (count, 2), steps=40, seed=11, **options)
        assert bool((result.x[result.log_weights > -math.inf][:, 0] > 0).all())
        assert bool((result.resample(500, 0)[:, 0] > 0).all())
        off = result.log_evidence - share.log()
        assert abs(off) < 4 * math.hypot(result.log_evidence_stderr, ((1 - share) / share / 40000) ** 0.5)


def test_slopes_where_psi_is_zero():
    """A gradient that is NaN where psi is 0 moves no particle that may come back."""

    def log_half(x):
        return torch.where(x[:, 0] > 0, -x[:, 0].sqrt(), -math.inf)

    result = sd.smc(plane().model(VP), log_half, (200, 2), steps=20, seed=0, ess_threshold=0)
    assert bool(result.x.isfinite().all())
    assert bool((result.ess > 0).all())


def test_a_resampling_that_would_drop_particles_of_psi_zero_is_refused():
    """They may lead to data where r > 0; without a resampling nothing is lost, and a finite twist helps."""

    def log_ball(x):
        return torch.where(x.square().sum(1) < 0.5, -x.square().sum(1), -math.inf)

    model = plane().model(VP)
    with pytest.raises(sd.DivergenceError, match=r"denoised estimate is -inf for .* biased\. Give twist=") as caught:
        sd.smc(model, log_ball, (200, 2), steps=20, seed=0)
    assert caught.value.rows
    assert caught.value.step is not None
    with pytest.raises(sd.DivergenceError, match=r"^twist is -inf for particles"):
        sd.smc(model, log_ball, (200, 2), steps=20, seed=0, twist=lambda t, x: log_ball(x))
    finite = sd.smc(model, log_ball, (2000, 2), steps=20, seed=0, twist=lambda t, x: -VP.alpha(t) * x.square().sum(1))
    plain = sd.smc(model, log_ball, (2000, 2), steps=20, seed=1, ess_threshold=0, shift=0.0)
    off = finite.log_evidence - plain.log_evidence
    assert abs(off) < 4 * math.hypot(finite.log_evidence_stderr, plain.log_evidence_stderr)


def test_particles_of_few_families_are_told_of():
    """A narrow r at the denoised estimate leaves few families; a wide one leaves many, and no warning."""

    def log_narrow(x):
        return -(x - torch.tensor([0.6, 0.4])).square().sum(1) / (2 * 0.02**2)

    with pytest.warns(sd.DegeneracyWarning, match=r"2000 particles are worth .* Give a twist="):
        result = sd.smc(plane().model(VP), log_narrow, (2000, 2), steps=40, seed=0)
    assert 1 <= result.family_number < 100
    assert sd.smc(plane().model(VP), log_point, (2000, 2), steps=40, seed=0).family_number > 100


def test_under_inference_mode():
    """Results are the same where gradients are disabled, or inference is on."""
    model = plane().model(VP)
    plain = sd.smc(model, log_point, (30, 2), steps=5, seed=0)
    with torch.inference_mode():
        inside = sd.smc(model, log_point, (30, 2), steps=5, seed=0)
    assert torch.equal(plain.x, inside.x)
    assert plain.log_evidence == inside.log_evidence


def test_condition():
    """It reaches the network, for all particles or in a tensor of equal rows."""

    def network(x, t, condition):
        return x * 0 + condition

    model = sd.ScoreModel(network, VP, "data")
    one = sd.smc(model, log_point, (10, 2), steps=3, seed=0, condition=2.5, dtype=F64)
    assert bool((one.x == 2.5).all())
    rows = torch.full((10, 1), 2.5, dtype=F64)
    assert torch.equal(sd.smc(model, log_point, (10, 2), steps=3, seed=0, condition=rows, dtype=F64).x, one.x)
    with pytest.raises(OptionError, match=r"must share one condition, and one label, .* differ\. Run smc once"):
        sd.smc(model, log_point, (10, 2), steps=3, condition=torch.arange(10.0)[:, None])
    with pytest.raises(OptionError, match="the rows of the one given differ"):
        sd.smc(model.given({"a": [torch.arange(10.0)[:, None]]}), log_point, (10, 2), steps=3)


def test_labels_of_guidance_are_shared_by_all_particles():
    """A guided model that holds a label for each row would give it to whoever takes its place."""

    def log_prob(t, x, label):
        return label * x[:, 0]

    plain = plane().model(VP)
    for labels, scale in ((torch.arange(10.0), 1.0), (1.0, torch.linspace(0, 1, 10, dtype=F64))):
        guided = sd.ClassifierGuidance(plain, log_prob, scale, label=labels)
        with pytest.raises(OptionError, match="label, target and scale of guidance; the rows of the one given differ"):
            sd.smc(guided, log_point, (10, 2), steps=3, seed=0)
        with pytest.raises(OptionError, match="the rows of the one given differ"):
            sd.smc(sd.map_denoised(guided, lambda data: data), log_point, (10, 2), steps=3, seed=0)
    inside = sd.ScoreModel(lambda x, t, c: x * 0 + c["of"][0][:, None], VP, "data")
    for condition in ({"of": [torch.arange(10.0)]}, {"of": (torch.arange(10.0),)}):
        with pytest.raises(OptionError, match="must share one condition"):
            sd.smc(inside, log_point, (10, 2), steps=3, condition=condition)
    even = sd.ClassifierGuidance(plain, log_prob, torch.ones(10), label=torch.ones(10))
    shared = sd.ClassifierGuidance(plain, log_prob, 1.0, label=1.0)
    one, other = (sd.smc(model, log_point, (10, 2), steps=3, seed=0) for model in (even, shared))
    torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)


def test_guided_chains():
    """The chain of a guided model takes the place of p: its own factor is part of the product."""
    model = sd.Product(plane().model(VP), log_point)
    result = sd.smc(model, log_point, (60, 2), steps=6, seed=3, ess_threshold=0.0, twist=lambda t, x: no_r(x))
    assert torch.equal(result.x, sd.sample(model, (60, 2), solver=sd.DDPM(), steps=6, seed=3).x)
    assert sd.smc(model, log_point, (60, 2), steps=6, seed=3).nfe == 7


# Bad input

MODEL = plane().model(VP)


def test_bad_options():
    """What came and what to write."""
    for arguments, options, error, message in (
        ((MODEL, 3.0, (9, 2)), {}, OptionError, "log_r must be a function of states .* got float"),
        ((MODEL, log_point, (9, 2)), {"twist": 1}, OptionError, "twist must be a function of t and x .* got int"),
        ((MODEL, log_point, 9), {}, ShapeError, r"got 9. Write smc\(model, log_r, \(1000, 2\)\)"),
        ((MODEL, log_point, (9, -2)), {}, ShapeError, r"got \(9, -2\)"),
        ((MODEL, log_point, (1, 2)), {}, ShapeError, r"at least two particles, to weigh them; got the shape \(1, 2\)"),
        ((MODEL, log_point, ()), {}, ShapeError, "at least two particles"),
        ((MODEL, log_point, (9, 2)), {"shift": math.nan}, OptionError, "shift is a finite number.*got nan"),
        ((MODEL, log_point, (9, 2)), {"shift": "no"}, OptionError, "shift is a finite number.*got 'no'"),
        ((MODEL, log_point, (9, 2)), {"ess_threshold": "half"}, OptionError, "a share of the particles.*got 'half'"),
        ((MODEL, log_point, (9.0, 2)), {}, ShapeError, r"got \(9.0, 2\)"),
        ((MODEL, log_point, (9, 2)), {"ess_threshold": 50}, OptionError, "a share of the particles.*got 50"),
        ((MODEL, log_point, (9, 2)), {"resampling": "comb"}, OptionError, "Unknown resampling 'comb': write one of"),
        ((MODEL, log_point, (9, 2)), {"final": "mean"}, OptionError, "Unknown final 'mean': write 'denoise' or 'none'"),
        ((MODEL, log_point, (9, 2)), {"variance": "small"}, OptionError, "Unknown variance 'small' for DDPM"),
        ((MODEL, log_point, (9, 2)), {"times": [0.5, 0.1]}, TimeError, "times starts at 0.5.*t_max = 1: start there"),
        ((log_point, MODEL, (9, 2)), {}, OptionError, "The first argument must be a ScoreModel; got function"),
        (
            (MODEL, lambda x: x, (9, 2)),
            {"steps": 3},
            ShapeError,
            r"one number for every row, shape \(9,\); got \(9, 2\)",
        ),
    ):
        with pytest.raises(error, match=message):
            sd.smc(*arguments, **options)


def test_pure_noise():
    """Where alpha is 0 a network that predicts noise says nothing, and is refused before anything is drawn."""
    model = sd.ScoreModel(lambda x, t: x, sd.RectifiedFlow(t_max=1.0), "noise")
    with pytest.raises(CapabilityError, match="does not determine the step that starts at t = 1"):
        sd.smc(model, log_point, (9, 2), steps=3)
    model = plane().model(sd.RectifiedFlow(t_max=1.0))
    assert bool(sd.smc(model, log_point, (9, 2), steps=3).x.isfinite().all())


def broken(at, value):
    """A psi of one at all times but one."""
    times = grid_of(5)
    return lambda t, x: no_r(x) + (value if t[0] == times[at] else 0.0)


def test_weights_that_are_no_numbers():
    """The step and the time of the first weights that are NaN, infinite, or all 0."""
    t = grid_of(5)[3].item()
    for value, message in (
        (math.nan, rf"weight of particles is NaN or infinite at step 3, t = {t:g}, rows 0, 1, .* numbers or -inf"),
        (math.inf, "weight of particles is NaN or infinite at step 3"),
        (-math.inf, rf"weights of all particles are 0 at step 3, t = {t:g}. Take more particles"),
    ):
        with pytest.raises(DivergenceError, match=message):
            sd.smc(MODEL, log_point, (9, 2), steps=5, twist=broken(3, value))
    with pytest.raises(DivergenceError, match="all particles are 0 at step 5"):
        sd.smc(MODEL, lambda x: no_r(x) - math.inf, (9, 2), steps=5, twist=lambda t, x: no_r(x))


def test_states_that_are_no_numbers():
    """The step of a network that fails, even where r does not see it."""

    def network(x, t):
        return torch.where((t[:, None] < 0.3) & (torch.arange(2) == 1), math.nan, x)

    model = sd.ScoreModel(network, VP, "data")
    first = int((grid_of(20)[:-1] < 0.3).nonzero()[0])
    with pytest.raises(DivergenceError, match=f"The proposed state is NaN or infinite at step {first}"):
        sd.smc(model, lambda x: -(x[:, 0] ** 2), (9, 2), steps=20, dtype=F64)
