"""Guidance on a mixture whose class posterior and conditional scores are known in closed form at every time."""

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from helpers import name
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

import sdediff as sd
from sdediff.guidance import cosine, interval
from sdediff.model import PREDICTIONS
from sdediff.runs import counted
from sdediff.wrapped import Wrapped, evaluations

F64 = torch.float64
CLASSES = torch.tensor([0, 1, 0, 2, 1])
WEIGHTS = torch.tensor([0.3, 0.2, 0.1, 0.25, 0.15], dtype=F64)
MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.2, -1.4], [1.3, -0.9], [-0.6, 1.6]], dtype=F64)
ROOTS = torch.tensor([[[0.5, 0.2], [0, 0.3]], [[0.4, 0], [0.3, 0.2]], [[0.3, 0.1], [-0.2, 0.4]], [[0.5, 0], [0, 0.2]],
                      [[0.2, -0.3], [0.3, 0.4]]], dtype=F64)  # fmt: skip
COVS = ROOTS @ ROOTS.mT
DATA = sd.exact.GaussianMixture(WEIGHTS, MEANS, COVS)
BY_CLASS = [sd.exact.GaussianMixture(WEIGHTS[k == CLASSES], MEANS[k == CLASSES], COVS[k == CLASSES]) for k in range(3)]
NULL = 3
GENERATOR = torch.Generator().manual_seed(0)
X = 1.5 * torch.randn(9, 2, dtype=F64, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1])


class Custom(sd.LinearSDE):
    t_min, t_max = 1e-3, 1.5

    def rates(self, t):
        return -1 - t.sin() ** 2, (1 + t).sqrt()


SDES = [sd.VP(), sd.VE(), sd.EDM(), sd.CosineVP(), sd.RectifiedFlow(), sd.SubVP(), sd.as_linear(Custom())]
KINDS = sorted(PREDICTIONS)


def log_posteriors(sde, t, x):
    """`log p_t(y | x)` of the classes, `(batch, 3)`, by Bayes' rule."""
    t = torch.as_tensor(t, dtype=F64).expand(len(x))
    alpha, sigma = (sde.alpha(t)[:, None, None], sde.sigma(t)[:, None, None, None])
    joint = MultivariateNormal(
        (alpha * MEANS).to(x), (alpha[..., None] ** 2 * COVS + sigma**2 * torch.eye(2, dtype=F64)).to(x)
    ).log_prob(x[:, None]) + WEIGHTS.log().to(x)
    parts = [torch.logsumexp(joint[:, k == CLASSES], 1) for k in range(3)]
    return torch.stack(parts, 1) - torch.logsumexp(joint, 1)[:, None]


def classifier(sde):
    """`log_prob(t, x, label)`."""
    return lambda t, x, label: log_posteriors(sde, t, x)[torch.arange(len(x)), label]


class Network:
    """The exact network of a kind: of all data without a condition or with the null label, else of classes."""

    dtype = F64

    def __init__(self, sde, kind):
        self.sde, self.kind = sde, kind
        self.models = [target.model(sde) for target in (*BY_CLASS, DATA)]

    def __call__(self, x, t, label=None):
        if self.kind == "edm":
            alpha, sigma = self.sde.scales_at(t)
            x = x * sd.over((sigma**2 + (0.5 * alpha) ** 2).sqrt(), x)
        if label is None:
            return self.models[NULL].view(self.kind, t, x)
        assert label.shape == t.shape
        out = torch.empty_like(x)
        for k in label.unique().tolist():
            out[label == k] = self.models[k].view(self.kind, t[label == k], x[label == k])
        return out


def model_of(sde, kind="noise"):
    """The exact model, conditional and not, of a prediction kind."""
    return sd.ScoreModel(Network(sde, kind), sde, kind, time=lambda t: t)


def kind_of(kind):
    return "v" if kind == "edm" else kind


def times_of(sde):
    """Times of the whole span, even in its clock."""
    t = sd.grids.uniform(sde, 8)
    assert len(t) == len(X)
    return t


def scores(sde, t, x):
    """Scores of the classes and of all data, `(4, batch, 2)`."""
    return torch.stack([target.model(sde).score(t, x) for target in (*BY_CLASS, DATA)])


ROWS = torch.arange(len(X))


def close(sde, t, found, expected):
    """Equal to 1e-10 of the size that scores have there."""
    unit = sd.over(sde.sigma(t), found)
    torch.testing.assert_close(found * unit, expected * unit, rtol=1e-10, atol=1e-10)


# The formulas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_guided_scores_are_their_formulas(sde, kind):
    """The gradient of log p(y | x) is the difference of the exact scores, so nothing here is differentiated."""
    t = times_of(sde)
    exact = scores(sde, t, X)
    cond, none, other = exact[LABELS, ROWS], exact[NULL], exact[(LABELS + 1) % 3, ROWS]
    model = model_of(sde, kind)
    per_row = torch.linspace(-2, 4, len(X), dtype=F64)
    for scale, w in ((1.0, 1.0), (2.5, 2.5), (-0.7, -0.7), (per_row, per_row), (lambda t: 3 * t, 3 * t)):
        w = sd.over(torch.as_tensor(w, dtype=F64), X)
        guided = sd.ClassifierGuidance(model, classifier(sde), scale, label=LABELS)
        assert guided.prediction == kind_of(kind)
        close(sde, t, guided.score(t, X), none + w * (cond - none))
        for null in (None, NULL, torch.tensor(NULL)):
            free = sd.ClassifierFree(model, scale, null=null).given(LABELS)
            assert free.prediction == kind_of(kind)
            close(sde, t, free.score(t, X), (1 + w) * cond - w * none)
        away = sd.ClassifierFree(model, scale, null=NULL, negative=(LABELS + 1) % 3).given(LABELS)
        close(sde, t, away.score(t, X), (1 + w) * cond - w * other)
        towards = torch.tensor([0.3, -1.0], dtype=F64).expand(len(X), 2)
        similar = sd.SimilarityGuidance(model, lambda x, y: -(x - y).square().sum(1) / 0.18, scale, target=towards)
        close(sde, t, similar.score(t, X), none + w * (towards - X) / 0.09)


@given(
    st.sampled_from(SDES),
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.floats(-3, 8),
    st.integers(0, 2),
)
def test_guided_scores_are_their_formulas_anywhere(sde, kind, part, x, w, label):
    t = sde.unclock(
        sde.clock(torch.tensor([sde.t_max, sde.t_min], dtype=F64)) @ torch.tensor([part, 1 - part], dtype=F64)
    )
    t = t.clamp(sde.t_min, sde.t_max)
    x = (sde.alpha(t) + sde.sigma(t)) * torch.tensor([x], dtype=F64)
    exact = scores(sde, t, x)[:, 0]
    model = model_of(sde, kind)
    guided = sd.ClassifierGuidance(model, classifier(sde), w, label=label)
    close(sde, t, guided.score(t, x)[0], exact[NULL] + w * (exact[label] - exact[NULL]))
    free = sd.ClassifierFree(model, w, null=NULL).given(torch.tensor([label]))
    close(sde, t, free.score(t, x)[0], (1 + w) * exact[label] - w * exact[NULL])


def test_the_noise_form_of_classifier_guidance():
    """`eps <- eps - sigma w grad log p(y | x)`, of the network itself and with nothing divided by alpha."""
    sde = sd.RectifiedFlow(t_max=1.0)
    t = torch.tensor(1.0, dtype=F64)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad((x**2).sum(), x)
    model = sd.ScoreModel(lambda x, t: 3 * x, sde, "noise")
    guided = sd.ClassifierGuidance(model, lambda t, x: (x**2).sum(1), 0.5)
    torch.testing.assert_close(guided.predict(t, X), 3 * X - 0.5 * slope)
    half = torch.tensor(0.5, dtype=F64)
    torch.testing.assert_close(guided.predict(half, X), 3 * X - 0.5 * 0.5 * slope)


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_of_the_denoised_estimate_is_closed_form_on_a_gaussian(kind):
    """xhat is affine in x with the symmetric matrix `A = alpha S (alpha^2 S + sigma^2)^-1`."""
    sde, y = sd.VP(), torch.tensor([[0.4, 1.1]], dtype=F64)
    target = sd.exact.Gaussian(MEANS[0], COVS[0])
    plain = target.model(sde)

    def network(x, t):
        if kind == "edm":
            alpha, sigma = sde.scales_at(t)
            x = x * sd.over((sigma**2 + (0.5 * alpha) ** 2).sqrt(), x)
        return plain.view(kind, t, x)

    model = sd.ScoreModel(network, sde, kind, time=lambda t: t)
    guided = sd.SimilarityGuidance(model, lambda x, y: -(x - y).square().sum(1) / 0.5, 1.7, target=y, at="denoised")
    t = times_of(sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    eye = torch.eye(2, dtype=F64)
    A = torch.stack(
        [a * COVS[0] @ torch.linalg.inv(a**2 * COVS[0] + s**2 * eye) for a, s in zip(alpha, sigma, strict=True)]
    )
    away = y - plain.denoised(t, X)
    expected = plain.score(t, X) + 1.7 * (A.mT @ away[..., None])[..., 0] / 0.25
    close(sde, t, guided.score(t, X), expected)
    assert evaluations(guided.network, t) == 1


def test_a_model_of_a_nonlinear_sde_is_guided_by_its_score():
    class Quartic(sd.SDE):
        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 1.0

    model = sd.ScoreModel(lambda x, t, c=None: -x if c is None else -x + c[:, None], Quartic(), "score")
    t = torch.tensor(0.5, dtype=F64)
    guided = sd.ClassifierGuidance(model, lambda t, x: (x**3).sum(1) / 3, 2.0)
    torch.testing.assert_close(guided.score(t, X), -X + 2 * X**2)
    free = sd.ClassifierFree(model, 2.0).given(X[:, 0])
    torch.testing.assert_close(free.score(t, X), -X + 3 * X[:, :1])


# The conditional model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_scale_one_of_a_classifier_and_scale_zero_without_one_are_the_conditional_model(sde, kind):
    t = times_of(sde)
    exact = scores(sde, t, X)
    model = model_of(sde, kind)
    close(sde, t, sd.ClassifierGuidance(model, classifier(sde), label=LABELS).score(t, X), exact[LABELS, ROWS])
    view, plain = kind_of(kind), model.view
    for null in (None, NULL):
        for w, truth in ((0.0, plain(kind_of(kind), t, X, condition=LABELS)), (-1.0, plain(view, t, X))):
            for scale in (w, torch.full((9,), w), lambda t, w=w: torch.full_like(t, w)):
                free = sd.ClassifierFree(model, scale, null=null).given(LABELS)
                assert torch.equal(free.predict(t, X), truth), "bit for bit"
                assert (evaluations(free.network, t) == torch.ones(9)).all()
    mixed = sd.ClassifierFree(model, torch.tensor([0.0, -1.0, 2.0] * 3), null=NULL).given(LABELS)
    both = mixed.predict(t, X)
    assert torch.equal(both[::3], plain(view, t, X, condition=LABELS)[::3])
    assert torch.equal(both[1::3], plain(view, t, X)[1::3])
    assert evaluations(mixed.network, t).tolist() == [1, 1, 2] * 3


# Densities


def test_a_density_remains_where_there_is_one():
    """`log p(x | y) = log p(x) + log p(y | x) - log p(y)`, and that of the classes' own mixtures."""
    sde = sd.VP()
    model = model_of(sde, "v")
    x = torch.cat([target.sample(3, seed=k) for k, target in enumerate(BY_CLASS)])
    labels = torch.arange(9) // 3
    truth = torch.cat([target.log_prob(x[3 * k : 3 * k + 3]) for k, target in enumerate(BY_CLASS)])
    prior = torch.stack([WEIGHTS[k == CLASSES].sum() for k in range(3)]).log()
    bayes = DATA.log_prob(x) + log_posteriors(sde, 0.0, x)[torch.arange(9), labels] - prior[labels]
    torch.testing.assert_close(truth, bayes)
    for k, target in enumerate(BY_CLASS):
        rows, latent = labels == k, target.marginal(sde, sde.t_max)
        guided = sd.ClassifierGuidance(model, classifier(sde), label=k)
        free = sd.ClassifierFree(model, 0.0, null=NULL).given(labels[rows])
        for conditional in (guided, sd.clamp_denoised(guided, -50, 50), free):
            found = sd.log_prob(conditional, x[rows], atol_nats=1e-5, prior=latent).value
            torch.testing.assert_close(found, truth[rows], rtol=0, atol=1e-3)
    latent = DATA.marginal(sde, sde.t_max)
    for same in (sd.ClassifierGuidance(model, classifier(sde), 0.0, label=0), sd.ClassifierFree(model, -1.0)):
        found = sd.log_prob(same, x, atol_nats=1e-5, prior=latent).value
        torch.testing.assert_close(found, DATA.log_prob(x), rtol=0, atol=1e-3)


def test_a_density_is_refused_where_there_is_none_and_bounds_are_not():
    sde = sd.VP()
    model = model_of(sde, "v")
    ones = torch.ones(9, dtype=F64)
    for scale in (2.0, ones, lambda t: torch.ones_like(t), interval(1.0, 0.2, 0.8)):
        by = sd.ClassifierGuidance(model, classifier(sde), scale, label=LABELS)
        free = sd.ClassifierFree(model, scale, null=NULL).given(LABELS)
        for guided, says in ((by, "classifier guidance with a scale that is not the number 1"), (free, "the number 0")):
            for deep in (guided, sd.ClassifierGuidance(guided, classifier(sde), label=LABELS)):
                with pytest.raises(sd.CapabilityError, match=f"no log-density: .*{says}.*not the noised versions"):
                    sd.log_prob(deep, X)
            assert sd.elbo(guided, X, steps=5, seed=0).total.isfinite().all()
    similar = sd.SimilarityGuidance(model, lambda x: -x.square().sum(1), at="denoised")
    with pytest.raises(sd.CapabilityError, match="no log-density: guidance by a similarity gives at every t"):
        sd.log_prob(similar, X)
    assert sd.SimilarityGuidance(model, lambda x: -x.square().sum(1), 0).no_density is None


# Nesting, rows, gradients


def quadratic(x, y):
    return -(x - y).square().sum(1) / 0.5


@pytest.mark.parametrize("kind", ["noise", "v", "edm", "score"])
def test_guidance_nests(kind):
    sde = sd.CosineVP()
    t = times_of(sde)
    exact = scores(sde, t, X)
    cond, other, none = exact[LABELS, ROWS], exact[(LABELS + 1) % 3, ROWS], exact[NULL]
    model, log_prob = model_of(sde, kind), classifier(sde)
    twice = sd.ClassifierGuidance(
        sd.ClassifierGuidance(model, log_prob, 2.0, label=LABELS), log_prob, 0.5, label=(LABELS + 1) % 3
    )
    close(sde, t, twice.score(t, X), none + 2 * (cond - none) + 0.5 * (other - none))
    free = sd.ClassifierFree(model, 1.5, null=NULL).given(LABELS)
    both = sd.ClassifierGuidance(free, log_prob, 0.5, label=(LABELS + 1) % 3)
    close(sde, t, both.score(t, X), 2.5 * cond - 1.5 * none + 0.5 * (other - none))
    assert (evaluations(both.network, t) == 2).all()
    deep = sd.ClassifierFree(sd.ClassifierFree(model, 1.5, null=NULL), 1.0, null=NULL).given(LABELS)
    close(sde, t, deep.score(t, X), 5 * cond - 4 * none)
    assert (evaluations(deep.network, t) == 4).all()
    around = sd.ClassifierFree(sd.ClassifierGuidance(model.given(LABELS), log_prob, 2.0, label=(LABELS + 1) % 3), 3.0)
    close(sde, t, around.score(t, X), 4 * cond - 3 * none + 2 * (other - none))
    clamped = sd.clamp_denoised(both, -0.5, 0.5)
    torch.testing.assert_close(clamped.denoised(t, X), both.denoised(t, X).clamp(-0.5, 0.5))


def test_a_similarity_outside_of_a_classifier_takes_second_derivatives():
    """Against central differences of `sim(xhat(x))`, xhat that of the guided model."""
    sde = sd.VP()
    inner = sd.ClassifierGuidance(model_of(sde, "noise"), classifier(sde), 1.5, label=LABELS)
    y = torch.tensor([[0.5, -0.5]], dtype=F64)
    outer = sd.SimilarityGuidance(inner, quadratic, 0.7, target=y, at="denoised")
    t, h = torch.tensor(0.4, dtype=F64), 1e-5
    slope = torch.empty_like(X)
    for j in range(2):
        shift = h * torch.eye(2, dtype=F64)[j]
        ahead, behind = (quadratic(inner.denoised(t, X + sign * shift), y) for sign in (1, -1))
        slope[:, j] = (ahead - behind) / (2 * h)
    torch.testing.assert_close(outer.score(t, X), inner.score(t, X) + 0.7 * slope, rtol=1e-6, atol=1e-6)


def test_a_row_is_the_same_alone_in_chunks_and_in_any_batch():
    sde = sd.VP()
    model = model_of(sde, "noise")
    per_row, targets = torch.linspace(0.5, 2, 9, dtype=F64), X.flip(0)
    inner = sd.ClassifierGuidance(model, classifier(sde), per_row, label=LABELS)
    models = [
        (inner, None),
        (sd.SimilarityGuidance(inner, quadratic, per_row.flip(0), target=targets, at="denoised"), None),
        (sd.SimilarityGuidance(inner, quadratic, interval(0.3, 0.2, 0.7), target=targets[:1]), None),
        (sd.ClassifierFree(model, per_row, null=NULL, negative=(LABELS + 1) % 3), LABELS),
    ]
    for guided, condition in models:
        for solver in (sd.DDPM(), sd.Adaptive(0.03, 0.03)):
            whole = sd.sample(guided, (9, 2), solver=solver, steps=2, seed=3, condition=condition)
            parts = sd.sample(guided, (9, 2), solver=solver, steps=2, seed=3, condition=condition, batch_size=4)
            torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-11)
            if whole.row_nfe is not None:
                assert torch.equal(whole.row_nfe, parts.row_nfe)
            last = None if condition is None else condition[:2]
            alone = sd.sample(guided.rows(slice(0, 2), 9), (2, 2), solver=solver, steps=2, seed=3, condition=last)
            torch.testing.assert_close(alone.x, whole.x[:2], rtol=0, atol=1e-11)


def test_labels_and_targets_for_all_rows():
    sde = sd.VP()
    model, t = model_of(sde), torch.tensor(0.3, dtype=F64)
    one = sd.ClassifierGuidance(model, classifier(sde), 2.0, label=torch.full((9,), 1)).score(t, X)
    for label in (1, torch.tensor(1), torch.tensor([1])):
        assert torch.equal(sd.ClassifierGuidance(model, classifier(sde), 2.0, label=label).score(t, X), one)
        free = sd.ClassifierFree(model, 2.0, null=NULL, negative=label).given(LABELS).score(t, X)
        expected = sd.ClassifierFree(model, 2.0, negative=torch.full((9,), 1)).given(LABELS).score(t, X)
        assert torch.equal(free, expected)
    seen = []
    sd.ClassifierGuidance(model, lambda t, x, label: seen.append(label) or x[:, 0], label={"a": 1}).score(t, X)
    assert seen == [{"a": 1}]


def test_gradients_flow_through_guided_samples_and_to_what_guides():
    sde = sd.VP()
    strength = torch.tensor(1.3, dtype=F64, requires_grad=True)
    start = X.clone().requires_grad_()
    target = torch.tensor([[0.2, 0.4]], dtype=F64)

    def sample(strength, start):
        free = sd.ClassifierFree(model_of(sde), 0.5, null=NULL).given(LABELS)
        inner = sd.ClassifierGuidance(free, lambda t, x: strength * classifier(sde)(t, x, LABELS), 0.7)
        guided = sd.SimilarityGuidance(inner, quadratic, 0.5, target=target, at="denoised")
        return sd.sample(guided, (9, 2), solver=sd.DDIM(), steps=4, x_init=start, differentiable=True).x.square().sum()

    slopes = torch.autograd.grad(sample(strength, start), (strength, start))
    h = 1e-5
    with torch.no_grad():
        by_strength = (sample(strength + h, X) - sample(strength - h, X)) / (2 * h)
        step = h * torch.eye(9, dtype=F64)[2][:, None] * torch.tensor([1.0, 0.0], dtype=F64)
        by_start = (sample(strength, X + step) - sample(strength, X - step)) / (2 * h)
    torch.testing.assert_close(slopes[0], by_strength, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slopes[1][2, 0], by_start, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        labels = LABELS.clone()
        model = sd.SimilarityGuidance(model_of(sde).given(labels), quadratic, target=X.clone(), at="denoised")
        assert sd.ClassifierGuidance(model, classifier(sde), label=labels).score(0.5, X).isfinite().all()


def test_it_is_a_model_like_any_other():
    sde = sd.VP()
    guided = sd.ClassifierGuidance(model_of(sde), classifier(sde), 2.0, label=LABELS)
    assert "GuidedByClassifier" in repr(guided)
    assert "scale=2.0" in repr(guided)
    assert "ClassifierFreeGuided" in repr(sd.ClassifierFree(guided, 3))
    again = dataclasses.replace(guided, sde=sde)
    assert torch.equal(again.score(0.5, X), guided.score(0.5, X))
    assert sd.sample(guided, (9, 2), steps=5, seed=0).x.dtype == F64
    single = sd.sample(guided, (9, 2), steps=5, seed=0, dtype=torch.float32)
    assert single.x.dtype == torch.float32
    back = sd.round_trip(
        sd.ClassifierFree(model_of(sde), 0.3), 0.3 * X + MEANS[[0, 1, 3, 1, 0, 3, 3, 0, 1]], steps=60, condition=LABELS
    )
    assert back.error.max() < 1e-2


# Costs


def test_interval_guidance_is_off_beyond_its_times_and_free_there():
    sde = sd.VP()
    model = model_of(sde, "v")
    exact = scores(sde, torch.tensor(0.5, dtype=F64), X)
    w = interval(2.0, 0.25, 0.5)
    assert w(torch.tensor([0.2, 0.25, 0.4, 0.5, 0.51], dtype=F64)).tolist() == [0, 2, 2, 2, 0]
    assert interval(lambda t: 3 * t, 0.2, 0.4)(torch.tensor([0.1, 0.3], dtype=F64)).tolist() == pytest.approx([0, 0.9])
    free = sd.ClassifierFree(model, w, null=NULL).given(LABELS)
    close(sde, torch.tensor(0.5), free.score(0.5, X), 3 * exact[LABELS, ROWS] - 2 * exact[NULL])
    assert torch.equal(free.predict(0.6, X), model.predict(0.6, X, condition=LABELS))
    times = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2, 0.01], dtype=F64)
    inner, counter = counted(model)
    counting = sd.ClassifierFree(inner, w, null=NULL)
    solution = sd.sample(counting, (9, 2), solver=sd.DDIM(), times=times, condition=LABELS, seed=0)
    assert solution.nfe == counter.calls == 5 + 2 + 1  # five steps, two of them guided, and the last denoising
    calls = []
    by = sd.ClassifierGuidance(model, lambda t, x: calls.append(t[0].item()) or x.sum(1), w)
    sd.sample(by, (9, 2), solver=sd.DDIM(), times=times, seed=0)
    assert calls == [0.5, pytest.approx(0.3)]


OWN_STEPS = [sd.Adaptive(1e-2, 1e-2), sd.AdaptiveRungeKutta("bosh3", 1e-2, 1e-2), sd.AdaptiveStochastic(0.05, 0.05)]


@pytest.mark.parametrize("solver", OWN_STEPS)
def test_rows_are_charged_for_the_calls_that_they_need(solver):
    """What row 0 is charged in a batch is what a counter finds when it is alone; all rows, whatever the batch."""
    sde = sd.VP()
    for scale in (1.0, interval(1.0, 0.1, 0.4), torch.tensor([0.0, 1.0, 0.0] * 3), torch.tensor([1.0, 0.0, 0.0] * 3)):
        guided = sd.ClassifierFree(model_of(sde), scale, null=NULL)
        whole = sd.sample(guided, (9, 2), solver=solver, seed=0, condition=LABELS)
        chunks = sd.sample(guided, (9, 2), solver=solver, seed=0, condition=LABELS, batch_size=4)
        assert torch.equal(whole.row_nfe, chunks.row_nfe)
        inner, counter = counted(model_of(sde))
        first = sd.ClassifierFree(inner, scale, null=NULL).rows(slice(0, 1), 9)
        sd.sample(first, (1, 2), solver=solver, seed=0, condition=LABELS[:1], dtype=F64)
        assert whole.row_nfe[0] == counter.calls
        assert whole.nfe == whole.row_nfe.max()


@pytest.mark.parametrize("solver", OWN_STEPS)
def test_a_budget_is_one_of_evaluations(solver):
    """No row takes more than it may, to the last evaluation, also where a call becomes dearer on the way."""
    guided = sd.ClassifierFree(model_of(sd.VP()), interval(1.0, 0.3, 0.6), null=NULL)
    free = sd.sample(guided, (9, 2), solver=solver, seed=0, condition=LABELS, final="none")
    for budget in range(9, 33, 3):
        limited = dataclasses.replace(solver, max_nfe=budget)
        part = sd.sample(guided, (9, 2), solver=limited, seed=0, condition=LABELS, final="none")
        assert (part.row_nfe <= budget).all()
        stopped = part.reached > free.reached
        assert (part.row_nfe[stopped] > budget - 8).all()
        assert torch.equal(stopped, free.row_nfe > budget)


def test_likelihoods_count_evaluations_too():
    sde = sd.VP()
    x = DATA.sample(9, seed=0)

    class Twice(Wrapped):
        def __call__(self, x, t, condition=None):
            first = self.model.predict(t, x, condition=condition)
            return (first + self.model.predict(t, x, condition=condition)) / 2

        def evaluations(self, t):
            return 2 * super().evaluations(t)

    for solver in (None, sd.AdaptiveRungeKutta()):
        single = sd.log_prob(model_of(sde, "v"), x, solver=solver)
        double = sd.log_prob(model_of(sde, "v").wrapped(Twice(model_of(sde, "v")), "v"), x, solver=solver)
        torch.testing.assert_close(double.value, single.value)
        assert torch.equal(double.row_nfe, 2 * single.row_nfe)
        assert double.nfe == 2 * single.nfe


@pytest.mark.parametrize("scale", [2.0, 0.0, -1.0])
def test_the_variance_of_a_network_with_two_outputs_is_that_of_the_conditional_call(scale):
    """One step of DDPM by hand: the mean of the combination, and `log V` between those of the two fixed variances."""
    chain = sd.DiscreteVP(torch.linspace(0.01, 0.2, 12, dtype=F64))

    def both(x, t, label=None):
        shift = 0.0 if label is None else label[:, None]
        return torch.cat([0.1 * x + 0.3 * shift, 0.2 * x - 0.5 * shift], 1)

    model = sd.ScoreModel(sd.TwoHeads(both), chain, "noise")
    condition, times = torch.linspace(-1, 1, 9, dtype=F64), chain.times[[4, 6]]
    z = torch.randn(1, 9, 2, dtype=F64, generator=torch.Generator().manual_seed(1))

    def step(solver, model, z):
        return sd.sample(
            model, (9, 2), solver=solver, times=times, x_init=X, condition=condition, final="none", noise=sd.Recorded(z)
        ).x

    free = sd.ClassifierFree(model, scale)
    noise = sd.ScoreModel(lambda x, t, c: 0.1 * x + (1 + scale) * 0.3 * c[:, None], chain, "noise")
    low, high = (
        ((step(solver, noise, z) - step(solver, noise, 0 * z)) / z[0]).square()
        for solver in (sd.DDPM(), sd.DDPM("beta"))
    )
    v = (1 + 0.2 * X - (0.0 if scale == -1 else 0.5 * condition[:, None])) / 2
    expected = step(sd.DDPM(), noise, 0 * z) + high ** (v / 2) * low ** ((1 - v) / 2) * z[0]
    torch.testing.assert_close(step(sd.DDPM(sd.LearnedVariance()), free, z), expected)


def test_what_is_for_another_batch_is_refused_though_it_fits_a_chunk():
    model = model_of(sd.VP())
    short, few = LABELS[:4], torch.ones(4)
    log_prob = classifier(sd.VP())
    guided = [
        (sd.ClassifierGuidance(model, log_prob, label=short), "label has 4 entries.*8 rows"),
        (
            sd.ClassifierGuidance(model, classifier(sd.VP()), few, label=1),
            r"for each of 8 rows, \(8,\); got shape \(4,\)",
        ),
        (sd.SimilarityGuidance(model, quadratic, target=X[:4]), "target has 4 entries.*8 rows"),
        (sd.ClassifierFree(model, negative=short).given(LABELS[:8]), "negative has 4 entries.*8 rows"),
        (sd.ClassifierFree(model, few).given(LABELS[:8]), r"for each of 8 rows, \(8,\); got shape \(4,\)"),
    ]
    for one, says in guided:
        for outer in (one, sd.clamp_denoised(one)):
            with pytest.raises(sd.ShapeError, match=says):
                sd.sample(outer, (8, 2), steps=2, seed=0, batch_size=4)
    shared = sd.ClassifierGuidance(model, log_prob, label=LABELS[:1])
    assert sd.sample(shared, (8, 2), steps=2, seed=0, batch_size=4).x.isfinite().all()


def test_arrays_are_rows_too():
    model, labels = model_of(sd.VP()), LABELS.numpy()
    by_array, by_tensor = (sd.ClassifierGuidance(model, classifier(sd.VP()), label=y) for y in (labels, LABELS))
    found, expected = (sd.sample(m, (9, 2), steps=2, seed=0, batch_size=4).x for m in (by_array, by_tensor))
    assert torch.equal(found, expected)


def test_modules_that_guide_are_in_evaluation_mode_while_sampling():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.modes = torch.nn.BatchNorm1d(2, dtype=F64), set()

        def forward(self, t, x):
            self.modes.add(self.training)
            return self.norm(x).sum(1)

        def sim(self, x):
            return self(None, x)

    model = model_of(sd.VP(), "v")
    for guide in (
        lambda m: sd.ClassifierGuidance(model, m),
        lambda m: sd.SimilarityGuidance(model, m.sim, at="denoised"),
        lambda m: sd.clamp_denoised(sd.ClassifierGuidance(model, m.forward)),
    ):
        module = Normed().train()
        sd.sample(guide(module), (9, 2), steps=3, seed=0)
        assert module.modes == {False}
        assert module.training
        assert module.norm.training
        assert torch.equal(module.norm.running_mean, torch.zeros(2, dtype=F64))
    plain = torch.nn.Linear(2, 2, dtype=F64)
    of_network = sd.ScoreModel(plain, sd.VP())
    assert plain in list(sd.ClassifierGuidance(of_network, Normed()).network.modules())


def test_a_scale_that_learns_keeps_its_gradient():
    model, start = model_of(sd.VP()), X.clone()
    truth = [torch.full((9,), 1.5, dtype=F64, requires_grad=True), torch.tensor(1.5, dtype=F64, requires_grad=True)]
    for make in (
        lambda w: sd.ClassifierGuidance(model, classifier(sd.VP()), w, label=LABELS),
        lambda w: sd.ClassifierFree(model, w, null=NULL).given(LABELS),
    ):
        slopes = []
        for w in truth:
            options = {"solver": sd.DDIM(), "steps": 3, "x_init": start, "differentiable": True}
            (slope,) = torch.autograd.grad(sd.sample(make(w), (9, 2), **options).x.square().sum(), w)
            slopes.append(slope.sum())
        torch.testing.assert_close(slopes[0], slopes[1])
        assert slopes[0].abs() > 1e-3
        assert make(truth[1]).no_density is not None
        parts = sd.sample(make(truth[1]), (9, 2), steps=2, seed=0, batch_size=4)
        assert torch.equal(parts.x, sd.sample(make(1.5), (9, 2), steps=2, seed=0, batch_size=4).x)


def test_tensors_of_inference_mode_guide():
    """Saved for the gradient they are refused by torch: times, conditions, and what stands in dicts."""
    sde = sd.RectifiedFlow()
    network = lambda x, t, c: torch.tanh(x * c["a"]) * t[:, None]  # noqa: E731  # of one line

    def sample():
        condition = {"a": torch.linspace(-1, 1, 9, dtype=F64)[:, None] + 0}
        model = sd.ScoreModel(network, sde, "v")
        inner = sd.SimilarityGuidance(model.given(condition), lambda x: -x.square().sum(1), 0.3, at="denoised")
        guided = sd.ClassifierGuidance(inner, lambda t, x, y: torch.tanh(x * y["a"]).sum(1), label=condition)
        return sd.sample(guided, (9, 2), steps=4, seed=0, dtype=F64).x

    with torch.inference_mode():
        inside = sample()
    assert torch.equal(inside.clone(), sample())


@pytest.mark.parametrize("null", [0.5, torch.full((3,), 0.5, dtype=F64)])
def test_a_number_for_null_fills_vectors_as_in_training(null):
    model = sd.ScoreModel(lambda x, t, c: x + c.sum(1, keepdim=True), sd.VP())
    condition = torch.linspace(-1, 1, 27, dtype=F64).reshape(9, 3)
    free = sd.ClassifierFree(model, 2.0, null=null).given(condition)
    torch.testing.assert_close(free.predict(0.5, X), X + 3 * condition.sum(1, keepdim=True) - 2 * 1.5)
    with refused(sd.OptionError, "torch.int64", "cannot hold null = 0.5"):
        sd.ClassifierFree(model_of(sd.VP()), null=0.5).given(LABELS).score(0.5, X)


# Bad input


@contextmanager
def refused(kind, *said):
    with pytest.raises(kind) as error:
        yield
    for part in said:
        assert part in str(error.value), str(error.value)


def test_scales_that_are_none_are_refused():
    model = model_of(sd.VP())
    for make in (lambda w: sd.ClassifierGuidance(model, classifier(sd.VP()), w, label=LABELS),
                 lambda w: sd.SimilarityGuidance(model, lambda x: x.sum(1), w),
                 lambda w: sd.ClassifierFree(model, w).given(LABELS)):  # fmt: skip
        said = "The scale w is a number", "function of t"
        with refused(sd.OptionError, *said, "'strong'"):
            make("strong")
        with refused(sd.OptionError, *said, "None"):
            make(None)
        with refused(sd.OptionError, *said, "(9, 1)"):
            make(torch.ones(9, 1))
        with refused(sd.OptionError, "must be finite", "inf"):
            make(math.inf)
        with refused(sd.OptionError, "must be finite", "nan"):
            make(torch.tensor([1.0, math.nan]))
        with refused(sd.ShapeError, "A tensor", "9 rows", "(9,)", "(8,)"):
            make(torch.ones(8)).score(0.5, X)
        with refused(sd.ShapeError, "A function of t", "9 rows", "2.0"):
            make(lambda t: 2.0).score(0.5, X)
        with refused(sd.ShapeError, "A function of t", "(2,)"):
            make(lambda t: t[:2]).score(0.5, X)
        with refused(sd.OptionError, "must be finite", "inf at t = 0.5"):
            make(lambda t: t / 0).score(0.5, X)
        assert make(torch.tensor(2)).score(0.5, X).isfinite().all()
        assert make(2).score(0.5, X).isfinite().all()
    with refused(sd.OptionError, "low < high", "low = 0.5"):
        interval(1.0, 0.5, 0.5)
    with refused(sd.OptionError, "a number or a function of t"):
        interval(torch.ones(3), 0.1, 0.5)
    with refused(sd.OptionError, "'w'"):
        interval("w", 0.1, 0.5)


def test_functions_that_cannot_guide_are_refused():
    model = model_of(sd.VP())
    layer = torch.nn.Linear(2, 3, dtype=F64)
    deaf = [
        lambda t, x: x.detach().sum(1),
        lambda t, x: torch.zeros(9, dtype=F64),
        lambda t, x: x.argmax(1),
        lambda t, x: x.argmax(1).double(),
        lambda t, x: layer(x.detach()).log_softmax(1)[:, 0],
        torch.no_grad()(lambda t, x: x.sum(1)),
        torch.inference_mode()(lambda t, x: x.sum(1)),
    ]
    for log_prob in deaf:
        said = "no gradient in x", "no_grad", "argmax", "differentiable torch operations"
        with refused(sd.CapabilityError, *said):
            sd.ClassifierGuidance(model, log_prob).score(0.5, X)
        for at in ("noisy", "denoised"):
            guided = sd.SimilarityGuidance(model, lambda x, log_prob=log_prob: log_prob(0, x), at=at)
            with refused(sd.CapabilityError, *said):
                guided.score(0.5, X)
        with refused(sd.CapabilityError, *said):
            sd.sample(sd.ClassifierGuidance(model, log_prob), (9, 2), steps=3)
    level = sd.ClassifierGuidance(model, lambda t, x: x.sum(1).clamp(min=1e9))
    torch.testing.assert_close(level.score(0.5, X), model.score(0.5, X))

    whole = sd.ClassifierGuidance(model, lambda t, x: log_posteriors(sd.VP(), t, x))
    with refused(sd.ShapeError, "log_prob(t, x)", "(batch,)", "(9, 3)", "label]"):
        whole.score(0.5, X)
    summed = sd.SimilarityGuidance(model, lambda x: x.sum(), at="denoised")
    with refused(sd.ShapeError, "similarity(x)", "(batch,)", "()"):
        summed.score(0.5, X)
    with refused(sd.ShapeError, "float"):
        sd.ClassifierGuidance(model, lambda t, x: 1.0).score(0.5, X)
    with refused(sd.OptionError, "log_prob must be a function", "3.0"):
        sd.ClassifierGuidance(model, 3.0)
    with refused(sd.OptionError, "similarity must be a function", "None"):
        sd.SimilarityGuidance(model, None)
    with refused(sd.OptionError, "'noisy' or 'denoised'", "'clean'"):
        sd.SimilarityGuidance(model, cosine, at="clean")
    for make in (
        lambda m: sd.ClassifierGuidance(m, cosine),
        lambda m: sd.SimilarityGuidance(m, cosine),
        sd.ClassifierFree,
    ):
        with refused(sd.OptionError, "needs a ScoreModel", "function"):
            make(lambda x, t: x)


def test_labels_and_conditions_that_do_not_fit_are_refused():
    model = model_of(sd.VP())
    guided = sd.ClassifierGuidance(model, classifier(sd.VP()), label=LABELS[:8])
    with refused(sd.ShapeError, "label has 8 entries", "9 rows", "(1, ...)"):
        guided.score(0.5, X)
    similar = sd.SimilarityGuidance(model, cosine, target=X[0])
    with refused(sd.ShapeError, "target has 2 entries", "9 rows", "(1, ...)"):
        similar.score(0.5, X)
    away = sd.ClassifierFree(model, negative=LABELS[:4]).given(LABELS)
    with refused(sd.ShapeError, "negative has 4 entries", "9 rows"):
        away.score(0.5, X)
    with refused(sd.OptionError, "needs a condition", "condition=labels"):
        sd.ClassifierFree(model).score(0.5, X)
    assert sd.ClassifierFree(model, -1.0).score(0.5, X).isfinite().all()
    with refused(sd.ShapeError, "one shape", "(9, 2) and (9, 1)"):
        cosine(X, X[:, :1])


def test_what_can_be_saved_is_said(tmp_path):
    with refused(sd.OptionError, "got ClassifierFreeGuided", "save the model inside"):
        sd.save(sd.ClassifierFree(model_of(sd.VP())), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_without_a_signal(kind):
    """Where alpha = 0 a gradient can guide noise and score only; classifier-free guidance has no such end."""
    sde = sd.RectifiedFlow(t_max=1.0)
    one = torch.tensor(1.0, dtype=F64)
    model = sd.ScoreModel(lambda x, t, c=None: 0.5 * x, sde, kind, time=lambda t: t)
    guided = sd.ClassifierGuidance(model, lambda t, x: x.sum(1))
    said = "At t = 1 alpha is 0", "start below", "ClassifierFree", "guidance.interval"
    if kind in ("noise", "score"):
        assert guided.predict(one, X).isfinite().all()
        denoised = sd.SimilarityGuidance(model, lambda x: x.sum(1), at="denoised")
        with refused(sd.TimeError, *said):
            denoised.predict(one, X)
    else:
        with refused(sd.TimeError, *said):
            guided.predict(one, X)
    rows = torch.tensor([1.0, 0.5] * 4 + [1.0], dtype=F64)
    for at in ("noisy", "denoised"):
        off = sd.SimilarityGuidance(model, lambda x: x.sum(1), interval(1.0, 0.1, 0.9), at=at)
        assert torch.equal(off.predict(rows, X)[::2], off.predict(one, X)[::2])
        assert off.predict(rows, X).isfinite().all()
    assert sd.ClassifierFree(model, 2.0).given(LABELS).predict(one, X).isfinite().all()


def test_cosine_is_that_of_the_flattened_rows():
    x, y = X[:4].reshape(2, 2, 2), X[4:8].reshape(2, 2, 2)
    expected = (x * y).sum((1, 2)) / (x.square().sum((1, 2)) * y.square().sum((1, 2))).sqrt()
    torch.testing.assert_close(cosine(x, y), expected)


# Every solver

SOLVERS = [
    (sd.DDIM(), 60),
    (sd.DDIM(0.5), 50),
    (sd.DDPM(), 100),
    (sd.DDPM("beta"), 100),
    (sd.Exponential(), 12),
    (sd.Exponential(1, predict="data"), 30),
    (sd.Exponential(2, predict="data", corrector=False), 20),
    (sd.Exponential(4), 20),
    (sd.Exponential(2, noise_level=1.0), 40),
    (sd.Exponential(2, noise_level=0.5), 40),
    (sd.ExponentialRungeKutta(2), 15),
    (sd.UniPC(3), 15),
    (sd.Heun(), 20),
    (sd.Heun(churn=0.4), 40),
    (sd.RungeKutta(), 20),
    (sd.RungeKutta("heun"), 30),
    (sd.EulerMaruyama(), 120),
    (sd.EulerMaruyama(noise_level=0.5), 120),
    (sd.SRA1(), 30),
    (sd.Adaptive(), None),
    (sd.AdaptiveRungeKutta(rtol=1e-4, atol=1e-4), None),
    (sd.AdaptiveStochastic(), None),
    (sd.PredictorCorrector(sd.Heun(), sd.Langevin(0.05)), 25),
    (sd.PredictorCorrector(sd.Heun(), sd.LangevinByNorm(0.01)), 40),
    (sd.AnnealedLangevin(8, snr=0.3), 60),
    (sd.TorchDiffEq(rtol=1e-4, atol=1e-4), None),
    (sd.TorchSDE("srk"), 40),
]


@pytest.mark.parametrize(("solver", "steps"), SOLVERS, ids=name)
def test_samples_of_every_solver_are_those_of_the_conditional_model(solver, steps):
    """Path by path, with the same noise, to 1e-8; and in law, by z-tests on moments at 4.5 standard errors."""
    sde, n = sd.VP(), 900
    labels = torch.arange(n) % 3
    model = model_of(sde, "v")
    truth = sd.sample(model, (n, 2), solver=solver, steps=steps, seed=0, condition=labels)
    guided = sd.ClassifierGuidance(model, classifier(sde), label=labels)
    few = slice(0, 24)
    part = sd.sample(guided.rows(few, n), (24, 2), solver=solver, steps=steps, seed=0)
    if isinstance(solver, sd.TorchDiffEq):  # its steps depend on the whole batch
        truth_part = sd.sample(model, (24, 2), solver=solver, steps=steps, seed=0, condition=labels[few])
    else:
        truth_part = truth
    torch.testing.assert_close(part.x, truth_part.x[few], rtol=0, atol=1e-8)
    free = sd.ClassifierFree(model, 0.0, null=NULL)
    same = sd.sample(free, (24, 2), solver=solver, steps=steps, seed=0, condition=labels[few])
    assert torch.equal(same.x, truth_part.x[few])
    assert same.nfe == part.nfe

    for k, target in enumerate(BY_CLASS):
        x = truth.x[labels == k]
        centred = x - target.mean
        found = torch.stack([*centred.T, *(centred[:, i] * centred[:, j] for i, j in ((0, 0), (0, 1), (1, 1)))], 1)
        expected = torch.stack([torch.zeros(()), torch.zeros(()), target.cov[0, 0], target.cov[0, 1], target.cov[1, 1]])
        z = (found.mean(0) - expected) / (found.std(0) / math.sqrt(len(x)))
        assert z.abs().max() < 4.5, (k, z)
