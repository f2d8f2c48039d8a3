"""Classifiers of noised data against posteriors that are known exactly."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdediff as sd
from sdediff.networks import ClassifierCNN, ClassifierMLP
from sdediff.testing.strategies import linear_sdes

F64 = torch.float64
SDE = sd.CosineVP()
MEANS = torch.tensor([[-1.0, 0.4], [0.8, 0.9], [0.3, -1.1]], dtype=F64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
VARIANCES = torch.tensor([0.3, 0.15, 0.4], dtype=F64)
MIXTURE = sd.exact.GaussianMixture(SHARES, MEANS, VARIANCES)
PARTS = [sd.exact.Gaussian(mean, variance.item()) for mean, variance in zip(MEANS, VARIANCES, strict=True)]


def posterior(sde, t, x):
    """`log p(k | x_t = x)`, `(batch, K)`, by Bayes' rule."""
    joint = [p.marginal(sde, t).log_prob(x) + w.log() for p, w in zip(PARTS, SHARES, strict=True)]
    return torch.stack(joint, 1).log_softmax(1)


class Logistic(nn.Module):
    """The exact logits of Gaussian classes `N(m_k, S)`: linear in x at every time."""

    def __init__(self, sde, means, cov, shares):
        super().__init__()
        self.sde, self.cov = sde, cov
        self.means = nn.Parameter(means.clone())
        self.bias = nn.Parameter(shares.log())

    def forward(self, x, t):
        alpha, sigma = self.sde.scales_at(t)
        cov = alpha[:, None, None] ** 2 * self.cov + sigma[:, None, None] ** 2 * torch.eye(2, dtype=F64)
        slopes = torch.linalg.solve(cov, alpha[:, None, None] * self.means.T)  # (batch, 2, K)
        square = (slopes * (alpha[:, None] * self.means.T.flatten()).reshape(-1, *self.means.T.shape)).sum(1)
        return (x[:, None] @ slopes)[:, 0] - square / 2 + self.bias


class Bayes(nn.Module):
    """The exact posterior of the mixture as a network, with a weight that does nothing."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde
        self.shift = nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x, t):
        return torch.stack([posterior(self.sde, time, row[None])[0] for time, row in zip(t, x, strict=True)])


def states(n=6, seed=0, dtype=F64):
    return torch.randn(n, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def drawn(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    noise = torch.randn(n, 2, dtype=F64, generator=generator)
    return MEANS[labels] + VARIANCES[labels].sqrt()[:, None] * noise, labels


def untrained(network=ClassifierMLP, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sd.Classifier(network((2,), 3, width=24, depth=2), SDE, **options)


# What it computes


@settings(deadline=None, max_examples=30)
@given(linear_sdes(), st.floats(0.02, 0.98), st.integers(0, 2**31))
def test_logistic_regression_is_the_posterior_of_gaussian_classes_of_one_covariance(sde, part, seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, 2, dtype=F64, generator=generator)
    root = torch.randn(2, 2, dtype=F64, generator=generator)
    cov, shares = root @ root.T + 0.2 * torch.eye(2, dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    t = torch.tensor(sde.t_min + part * (sde.t_max - sde.t_min), dtype=F64)
    alpha, sigma = sde.scales_at(t)
    x = torch.randn(5, 2, dtype=F64, generator=generator) * (alpha**2 + sigma**2).sqrt()
    classifier = sd.Classifier(Logistic(sde, means, cov, shares), sde)
    joint = [
        sd.exact.Gaussian(m, cov).marginal(sde, t).log_prob(x) + w.log() for m, w in zip(means, shares, strict=True)
    ]
    expected = torch.stack(joint, 1).log_softmax(1)
    torch.testing.assert_close(classifier.log_probs(t, x), expected, rtol=1e-8, atol=1e-8)
    noised = alpha**2 * cov + sigma**2 * torch.eye(2, dtype=F64)
    slope = alpha * torch.linalg.solve(noised, means[1] - means[0])
    odds = (shares[1] / shares[0]).log() + (x - alpha * means.mean(0)) @ slope
    got = classifier.log_prob(t, x, 1) - classifier.log_prob(t, x, 0)
    torch.testing.assert_close(got, odds, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sde", [SDE, sd.VP(), sd.VE(), sd.RectifiedFlow()], ids=repr)
def test_the_gradient_is_the_difference_of_two_scores(sde):
    classifier = sd.Classifier(Bayes(sde), sde)
    x = states()
    for t in (0.1, 0.5, 0.9):
        for k in range(3):
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(classifier.log_prob(t, at, k).sum(), at)
            expected = PARTS[k].model(sde).score(t, x) - MIXTURE.model(sde).score(t, x)
            torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-9)


def test_log_probs_are_normalised_and_one_of_them_is_that_of_a_label():
    classifier, x = untrained(), states(dtype=torch.float32)
    t, labels = torch.linspace(0.05, 0.9, 6, dtype=F64), torch.tensor([0, 2, 1, 1, 0, 2])
    log_probs = classifier.log_probs(t, x)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(6))
    for row, label in enumerate(labels.tolist()):
        assert classifier.log_prob(t, x, labels)[row] == log_probs[row, label]
        alone = classifier.log_prob(t[row], x[row : row + 1], label)
        torch.testing.assert_close(alone[0], log_probs[row, label])
    assert torch.equal(classifier.log_prob(t, x, 1), log_probs[:, 1])
    assert torch.equal(classifier.log_prob(t, x, torch.tensor(1)), log_probs[:, 1])
    torch.testing.assert_close(classifier.log_probs(0.3, x), classifier.log_probs(torch.full((6,), 0.3), x))


def test_the_gradient_is_that_of_differences():
    classifier = untrained().double()
    x = states().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classifier.log_prob(0.4, x, torch.tensor([0, 1, 2, 2, 1, 0])), x)


def test_the_state_keeps_its_dtype_and_the_network_sees_its_own():
    classifier = untrained()
    assert classifier.log_prob(0.4, states(), 1).dtype == F64
    torch.testing.assert_close(
        classifier.log_probs(0.4, states()).float(), classifier.log_probs(0.4, states().float()), rtol=1e-5, atol=1e-5
    )


def test_the_network_sees_the_clock_that_was_asked_for():
    seen = []

    class Seeing(ClassifierMLP):
        def forward(self, x, t):
            seen.append(t)
            return super().forward(x, t)

    classifier = untrained(Seeing, time=SDE.sigma)
    classifier.log_probs(0.4, states())
    torch.testing.assert_close(seen[0].double(), SDE.sigma(torch.full((6,), 0.4, dtype=F64)), rtol=1e-6, atol=0)


# What it learns


def test_the_loss_is_the_cross_entropy_at_noised_data():
    classifier = sd.Classifier(Bayes(SDE), SDE)
    x0, labels = drawn(8)
    t, noise = torch.linspace(0.1, 0.9, 8, dtype=F64), states(8, 1)
    xt = SDE.alpha(t)[:, None] * x0 + SDE.sigma(t)[:, None] * noise
    expected = -torch.stack([posterior(SDE, t[i], xt[i : i + 1])[0, labels[i]] for i in range(8)])
    torch.testing.assert_close(classifier.loss(x0, labels, t=t, noise=noise), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        classifier.loss(x0, labels, t=0.3, noise=noise),
        classifier.loss(x0, labels, t=torch.full((8,), 0.3, dtype=F64), noise=noise),
    )


def losses_of(classifier, seed, n=4000, **options):
    x0, labels = drawn(n)
    with torch.no_grad():
        return classifier.loss(x0, labels, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("times", [None, sd.times.Even("independent"), sd.times.Levels([0.2, 0.6, 0.9])])
def test_noise_levels_are_those_of_the_law_and_their_noise_is_normal(times):
    seen = {}

    class Spy(sd.CosineVP):
        def perturb(self, t, x0, noise):
            seen.update(t=t, noise=noise)
            return super().perturb(t, x0, noise)

    sde = Spy()
    classifier = sd.Classifier(Logistic(sde, MEANS, torch.eye(2, dtype=F64), SHARES), sde, times=times)
    losses_of(classifier, 3)
    law = sd.times.LogSNR() if times is None else times
    assert torch.equal(seen["t"], law.draw(sde, 4000, generator=torch.Generator().manual_seed(3))[0])
    assert abs(seen["noise"].mean().item()) < 4 / math.sqrt(8000)
    assert abs(seen["noise"].square().mean().item() - 1) < 4 * math.sqrt(2 / 8000)
    assert torch.equal(losses_of(classifier, 3), losses_of(classifier, 3))
    assert not torch.equal(losses_of(classifier, 3), losses_of(classifier, 4))


def test_the_mean_loss_is_least_at_the_posterior():
    """Cross-entropy is the entropy of the posterior plus a divergence: any shift of the logits raises its mean."""
    x0, labels = drawn(3000)
    sde = SDE
    noise, t = states(3000, 5), 0.35
    xt = sde.perturb(torch.tensor(t), x0, noise)
    right = posterior(sde, torch.tensor(t, dtype=F64), xt)

    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(shift, dtype=F64))

        def forward(self, x, t):
            return right + self.shift

    def mean(shift):
        return sd.Classifier(Shifted(shift), sde).loss(x0, labels, t=t, noise=noise).detach()

    entropy = -(right.exp() * right).sum(1)
    gap = mean([0.0, 0.0, 0.0]) - entropy  # its mean is 0
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(3000)
    for shift in ([0.8, 0.0, 0.0], [0.0, -0.8, 0.0], [0.0, 0.0, 0.8]):
        more = mean(shift) - mean([0.0, 0.0, 0.0])
        wrong = (right + torch.tensor(shift, dtype=F64)).log_softmax(1)
        divergence = (right.exp() * (right - wrong)).sum(1)
        assert abs((more - divergence).mean()) < 4 * (more - divergence).std() / math.sqrt(3000)
        assert divergence.mean() > 0.01


def test_a_trained_classifier_approaches_the_posterior_at_all_times():
    x0, labels = drawn(6000)
    classifier = untrained(partial(Wider))
    losses = sd.train(
        classifier, classifier.loss, x0.float(), condition=labels, steps=700, batch_size=256, lr=4e-3, ema=0.98,
        warmup=20, seed=0, progress=False,
    )  # fmt: skip
    assert not classifier.training
    assert losses[-50:].mean() < losses[:5].mean() - 0.1
    fresh, _ = drawn(2000, seed=1)
    for t in (0.02, 0.2, 0.4, 0.6, 0.8):
        xt = SDE.perturb(torch.tensor(t), fresh, states(2000, 7))
        exact = posterior(SDE, torch.tensor(t, dtype=F64), xt)
        with torch.no_grad():
            learned = classifier.log_probs(t, xt)
        divergence = (exact.exp() * (exact - learned)).sum(1).mean().item()
        prior = (exact.exp() * (exact - SHARES.log())).sum(1).mean().item()  # of one who has not looked
        assert 0 <= divergence < 0.012, t
        assert divergence < 0.1 * prior + 1e-3, t


class Wider(ClassifierMLP):
    def __init__(self, event, classes, **options):
        super().__init__(event, classes, width=64, depth=2)


def test_a_chain_is_learned_on_its_own_steps():
    chain = sd.DiscreteVP.linear_betas(50)
    seen = []

    class Steps(ClassifierMLP):
        def forward(self, x, t):
            seen.append(t)
            return super().forward(x, t.float())

    classifier = sd.Classifier(Steps((2,), 3, width=8, depth=1), chain, chain.timestep)
    x0, labels = drawn(200)
    classifier.loss(x0.float(), labels, generator=torch.Generator().manual_seed(0))
    assert not seen[0].is_floating_point()
    assert len(seen[0].unique()) == len(sd.ScoreModel(lambda x, t: x, chain, time=chain.timestep).known_times)


def test_a_law_that_learns_sees_the_losses():
    law = sd.times.LossAware(bins=4, history=2)
    classifier = untrained(times=law)
    x0, labels = drawn(64)
    classifier.loss(x0.float(), labels, t=0.3)
    assert law.count.sum() == 0
    with torch.no_grad():
        classifier.loss(x0.float(), labels)
    assert law.count.sum() == 0
    losses = classifier.loss(x0.float(), labels)
    assert law.count.sum() == 64
    assert torch.isin(law.seen.float(), losses.detach()).all()
    assert law.probabilities.std() > 0


def test_a_schedule_that_learns_does_not_learn_from_a_classifier():
    x0, labels = drawn(16)
    sde = sd.LearnedVP()
    classifier = sd.Classifier(ClassifierMLP((2,), 3, width=8, depth=1), sde)
    classifier.loss(x0.float(), labels).sum().backward()
    assert all(p.grad is None for p in sde.parameters())
    assert classifier.network.write.weight.grad is not None


def test_a_checkpoint_of_another_classifier_is_refused_and_the_same_one_resumes(tmp_path):
    x0, labels = drawn(64)

    def run(classifier, steps=4, folder=tmp_path):
        return sd.train(
            classifier, classifier.loss, x0.float(), condition=labels, steps=steps, batch_size=16, decay=False, seed=0,
            progress=False, checkpoint=folder,
        )  # fmt: skip

    run(untrained())
    resumed = untrained(seed=1)
    losses = run(resumed, steps=8)
    whole = untrained()
    assert torch.equal(losses, run(whole, steps=8, folder=tmp_path / "whole"))
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))
    x = states(dtype=torch.float32)
    assert torch.equal(resumed.log_probs(0.3, x), whole.log_probs(0.3, x))
    with pytest.raises(sd.CheckpointError, match=r"times was .LogSNR\(.*now .Even\("):
        run(untrained(times=sd.times.Even()), steps=8)
    with pytest.raises(sd.CheckpointError, match=r"sde was 'CosineVP\(.*now 'VP\("):
        run(sd.Classifier(resumed.network, sd.VP()), steps=8)
    with pytest.raises(sd.CheckpointError, match=r"time was False, now True"):
        run(untrained(time=SDE.sigma), steps=8)


# What it refuses


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: sd.Classifier(lambda x, t: x, SDE), sd.OptionError, r"torch\.nn\.Module; got function"),
        (lambda c: sd.Classifier(c.network, SDE, times="even"), sd.OptionError, r"law of times .*got 'even'"),
        (lambda c: c.log_prob(0.3, states(4), 3), sd.OptionError, r"labels 0 to 2; got 3 in row 0"),
        (lambda c: c.log_prob(0.3, states(2), torch.tensor([0, -1])), sd.OptionError, r"got -1 in row 1"),
        (lambda c: c.log_prob(0.3, states(2), torch.tensor([0, 1, 2])), sd.ShapeError, r"shape \(2,\); got \(3,\)"),
        (lambda c: c.log_prob(0.3, states(2), 1.0), sd.ShapeError, r"whole numbers as labels; got torch\.float32"),
        (lambda c: c.log_prob(0.3, states(2)), sd.OptionError, r"needs the label .*label=labels"),
        (lambda c: c.log_prob(0.3, states(2), "cat"), sd.ShapeError, r"one label a row .*got 'cat'"),
        (lambda c: c.log_prob(0.3, states(2), [0, 1]), sd.ShapeError, r"one label a row .*got \[0, 1\]"),
        (lambda c: sd.Classifier(c.network, "vp"), sd.OptionError, r"must be an SDE, such as VP\(\).*got 'vp'"),
        (lambda c: sd.Classifier(c.network, sd.VP), sd.OptionError, r"with its brackets; got <class"),
        (lambda c: c.log_prob(7.0, states(2), 1), sd.TimeError, r"t = 7"),
        (lambda c: c.log_prob(0.3, states(2)[:, :1], 1), sd.ShapeError, r"events of shape \(2,\); got \(1,\)"),
        (lambda c: c.loss(states(2), None), sd.OptionError, r"learns from labels: sd\.train\(c, c\.loss, data, cond"),
        (lambda c: c.loss(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2)), sd.ShapeError, r"x0 must have a float"),
        (lambda c: ClassifierCNN((1, 8, 6), 10, (8, 8, 8)), sd.ShapeError, r"got event = \(1, 8, 6\), channels = \(8"),
        (lambda c: ClassifierCNN((8, 8), 10), sd.ShapeError, r"\(colours, height, width\)"),
        (lambda c: ClassifierCNN((1, 4, 4), 2)(states(3), torch.ones(3)), sd.ShapeError, r"\(1, 4, 4\); got \(2,\)"),
    ],
)
def test_misuse_is_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call(untrained())


@pytest.mark.parametrize("output", [lambda x: x[:, 0], lambda x: x[:, :1], lambda x: x[:1], lambda x: (x, x)])
def test_a_network_that_gives_no_logits_is_refused(output):
    class Other(nn.Linear):
        def forward(self, x, t):
            return output(x)

    with pytest.raises(sd.ShapeError, match=r"logits \(batch, K\), K >= 2: \(3, K\); got"):
        sd.Classifier(Other(2, 2), SDE).log_probs(0.3, states(3))


# Networks


def test_a_row_of_a_convolutional_classifier_depends_on_its_own_image_and_time_only():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ClassifierCNN((2, 8, 4), 5, (8, 12, 16)).double()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(4, 2, 8, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.01, 0.9, 4, dtype=F64)
    before = network(x, t)
    assert before.shape == (4, 5)
    x_other, t_other = x.clone(), t.clone()
    x_other[1, 1, 7, 3] += 1
    t_other[2] += 0.1
    for changed, row in (((x_other, t), 1), ((x, t_other), 2)):
        off = (network(*changed) - before).abs().amax(1)
        assert off[row] > 1e-4
        assert off[torch.arange(4) != row].max() < 1e-12


@pytest.mark.parametrize("network", [ClassifierMLP((3,), 4, width=8), ClassifierCNN((1, 4, 4), 4, (8, 8))])
def test_a_classifier_s_network_is_built_again_from_its_config(network):
    again = type(network)(**network.config)
    again.load_state_dict(network.state_dict())
    x, t = torch.ones(2, *network.event), torch.tensor([0.1, 0.7])
    assert torch.equal(network(x, t), again(x, t))
