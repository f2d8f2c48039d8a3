"""The classifier two-sample test: exact under the null, the Bayes accuracy for a known shift."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sdediff import MissingExtraError, OptionError, ShapeError
from sdediff.metrics import classifier_two_sample

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Above(ClassifierMixin, BaseEstimator):
    """Takes a point for one of the first set if its first entry is above a level; it learns only the share of these."""

    def __init__(self, level=0.0):
        self.level = level

    def fit(self, x, y):
        self.classes_ = np.array([0, 1])
        self.share_ = np.mean(y)
        return self

    def predict_proba(self, x):
        one = np.where(x[:, 0] > self.level, 1.0, 0.0)
        return np.stack([1 - one, one], 1)


class Constant(Above):
    def predict_proba(self, x):
        return np.tile([1 - self.share_, self.share_], (len(x), 1))


def test_a_classifier_of_known_rates():
    """Points at 1 and -1, of which the level 0 tells all but known shares: accuracy, error and Fisher's p-value."""
    a = torch.tensor([1.0] * 30 + [-1.0] * 10)[:, None]
    b = torch.tensor([1.0] * 24 + [-1.0] * 36)[:, None]
    accuracy, stderr, p_value = classifier_two_sample(a, b, classifier=Above(), seed=3)
    generator = torch.Generator().manual_seed(3)
    held_a = a[torch.randperm(40, generator=generator)][20:, 0]
    held_b = b[torch.randperm(60, generator=generator)][30:, 0]
    right_a, wrong_b = int((held_a > 0).sum()), int((held_b > 0).sum())
    rates = right_a / 20, 1 - wrong_b / 30
    assert accuracy == pytest.approx(sum(rates) / 2, rel=1e-12)
    assert stderr == pytest.approx(math.sqrt(rates[0] * (1 - rates[0]) / 20 + rates[1] * (1 - rates[1]) / 30) / 2)
    table = [[right_a, 20 - right_a], [wrong_b, 30 - wrong_b]]
    assert p_value == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue, rel=1e-9)


@pytest.mark.parametrize("sizes", [(40, 40), (30, 70)])
def test_a_classifier_that_says_nothing_is_at_chance(sizes):
    result = classifier_two_sample(drawn(sizes[0], 2), drawn(sizes[1], 2, seed=1), classifier=Constant())
    assert result == (0.5, 0, 1)


@pytest.mark.parametrize(
    ("classifier", "sizes", "repeats"),
    [(KNeighborsClassifier(3), (60, 60), 300), (LogisticRegression(), (40, 100), 150), (None, (40, 40), 25)],
    ids=["neighbours", "logistic", "perceptron"],
)
def test_p_values_of_one_distribution_are_no_smaller_than_they_should_be(classifier, sizes, repeats):
    """`P(p <= q) <= q`, for a classifier that overfits and for one that does not; four standard errors."""
    results = [
        classifier_two_sample(
            drawn(sizes[0], 2, seed=2 * i), drawn(sizes[1], 2, seed=2 * i + 1), classifier=classifier, seed=i
        )
        for i in range(repeats)
    ]
    accuracies, _, p_values = np.array(results).T
    for q in (0.05, 0.2, 0.5):
        assert (p_values <= q).mean() < q + 4 * math.sqrt(q * (1 - q) / repeats)
    assert abs(accuracies.mean() - 0.5) < 4 * accuracies.std() / math.sqrt(repeats)
    assert (p_values <= 0.5).mean() > 0.2, "and they are not all large"


def test_the_standard_error_is_the_deviation_over_repetitions():
    results = [
        classifier_two_sample(
            0.7 + drawn(100, 1, seed=2 * i), drawn(60, 1, seed=2 * i + 1), classifier=Above(0.4), seed=i
        )
        for i in range(300)
    ]
    accuracies, errors, _ = np.array(results).T
    # the deviation of 300 repetitions is known to 4 %
    assert accuracies.std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.17)


@pytest.mark.parametrize("delta", [1.0, 2.0])
@pytest.mark.parametrize("sizes", [(2000, 2000), (3000, 1000)])
def test_a_shift_gives_the_bayes_accuracy(delta, sizes):
    """`Phi(delta / 2)`, with a linear classifier, which can be the best one; also where one set is larger."""
    a, b = drawn(sizes[0], 3), drawn(sizes[1], 3, seed=1)
    a[:, 1] += delta
    result = classifier_two_sample(a, b, classifier=LogisticRegression())
    assert abs(result.accuracy - stats.norm.cdf(delta / 2)) < 4 * result.stderr < 0.06
    assert result.p_value < 1e-20


def test_the_perceptron_sees_what_is_not_linear():
    """A normal distribution against one twice as wide: the best accuracy is 1/2 + TV / 2 by a threshold of |x|."""
    a, b = drawn(2000, 1), 2 * drawn(2000, 1, seed=1)
    edge = math.sqrt(8 / 3 * math.log(2))
    best = 0.5 + (stats.norm.cdf(edge) - stats.norm.cdf(edge / 2))
    result = classifier_two_sample(a, b)
    assert abs(result.accuracy - best) < 4 * result.stderr < 0.06


def test_a_memory_is_of_no_use():
    """The nearest neighbour knows all that it has seen; what counts was held out."""
    result = classifier_two_sample(drawn(200, 2), drawn(200, 2, seed=1), classifier=KNeighborsClassifier(1))
    assert abs(result.accuracy - 0.5) < 4 * result.stderr


def test_the_seed_governs_split_and_classifier():
    a, b = drawn(40, 2, 1), 0.5 + drawn(40, 2, 1, seed=1)
    first = classifier_two_sample(a, b, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)  # the global generator is what must not matter
    assert classifier_two_sample(a, b, seed=1) == first
    assert classifier_two_sample(a, b, seed=2) != first
    assert first._fields == ("accuracy", "stderr", "p_value")
    assert all(isinstance(value, float) for value in first)


class Coin(Above):
    """Says what numbers drawn from its `random_state` say; None draws others every time."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def predict_proba(self, x):
        one = np.random.default_rng(self.random_state).random(len(x))
        return np.stack([1 - one, one], 1)


def test_a_classifier_that_draws_is_seeded():
    a, b = drawn(80, 2), drawn(80, 2, seed=1)
    results = [[classifier_two_sample(a, b, classifier=Coin(), seed=seed) for seed in range(4)] for _ in range(2)]
    assert results[0] == results[1]
    assert len(set(results[0])) > 1


def test_the_classifier_given_is_not_trained():
    classifier = KNeighborsClassifier(3)
    classifier_two_sample(drawn(20, 2), drawn(20, 2, seed=1), classifier=classifier)
    assert not hasattr(classifier, "classes_")


def test_bad_input_gets_a_sentence(monkeypatch):
    a, b = drawn(8, 2), drawn(8, 2, seed=1)
    with pytest.raises(ShapeError, match=r"at least four samples.*\(3, 2\) and \(8, 2\)"):
        classifier_two_sample(a[:3], b)
    with pytest.raises(OptionError, match=r"predict_proba, such as KNeighborsClassifier\(\); got str"):
        classifier_two_sample(a, b, classifier="knn")
    with pytest.raises(OptionError, match="The second set has 8 of 8 samples with NaN"):
        classifier_two_sample(a, b * math.nan)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.neural_network", None)
    with pytest.raises(MissingExtraError, match=r"'sklearn'.*sdediff\[metrics\]"):
        classifier_two_sample(a, b)
