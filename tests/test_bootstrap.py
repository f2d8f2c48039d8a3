"""Standard errors by halves: exact for a mean, within a stated factor for every metric, and the bias they show."""

import math

import numpy as np
import pytest
import torch

from sdediff import OptionError, ShapeError, metrics
from sdediff.metrics import Estimate, bootstrap

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mean(x):
    return x.mean().item()


def gap(x, y):
    return (x.mean() - y.mean()).item()


def spread(x):
    return x.var(correction=0).item()


@pytest.mark.parametrize("n", [4, 50])
def test_the_error_of_a_mean_is_the_textbook_one(n):
    """`s / sqrt(n)`; 4,000 halves know it to 1.1 %. A mean has no bias."""
    x = drawn(n)
    estimate = bootstrap(mean, x, resamples=4000)
    exact = x.std().item() / math.sqrt(n)
    assert estimate.value == mean(x)
    assert estimate.stderr == pytest.approx(exact, rel=0.045)
    assert abs(estimate.bias) < 4 * exact / math.sqrt(4000)


def test_sets_are_halved_independently():
    """The errors of a difference of means add in squares; of a set and itself too, as they are two arguments."""
    x, y = drawn(40), 3 * drawn(60, seed=1)
    exact = math.hypot(x.std().item() / math.sqrt(40), y.std().item() / math.sqrt(60))
    assert bootstrap(gap, x, y, resamples=4000).stderr == pytest.approx(exact, rel=0.045)
    assert bootstrap(gap, x, x, resamples=4000).stderr == pytest.approx(x.std().item() / math.sqrt(20), rel=0.045)


def test_halves_show_the_bias():
    """The mean square about the own mean is too small by s^2 / n."""
    x = drawn(30)
    estimate = bootstrap(spread, x, resamples=4000)
    assert estimate.bias == pytest.approx(-x.var().item() / 30, abs=4 * estimate.stderr / math.sqrt(4000))
    assert estimate.bias < -2 * estimate.stderr / math.sqrt(4000), "else the test sees nothing"


METRICS = {
    "energy": metrics.energy_distance,
    "mmd": metrics.mmd,
    "sliced": lambda a, b: metrics.sliced_wasserstein(a, b, directions=16),
    "wasserstein": metrics.wasserstein,
    "frechet": metrics.frechet_distance,
    "precision": lambda a, b: metrics.precision_recall(a, b).precision,
    "recall": lambda a, b: metrics.precision_recall(a, b).recall,
    "density": lambda a, b: metrics.density_coverage(a, b).density,
    "coverage": lambda a, b: metrics.density_coverage(a, b).coverage,
    "inception": lambda a, b: metrics.inception_score(a.softmax(-1)),
}


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "equal"])
@pytest.mark.parametrize("name", METRICS)
def test_errors_agree_with_repetitions(name, apart):
    """The root mean square of ten estimates, over the deviation of 120 independent repetitions: 1, at most sqrt(3).

    The deviation is known to 6.5 %, the mean of the estimates to some 10 %, so 0.7 to 2.2 leaves three of both.
    """

    def sets(i):
        a, b = drawn(60, 3, seed=2 * i), drawn(60, 3, seed=2 * i + 1)
        return (0.5 + 1.3 * a, b) if apart else (a, b)

    metric = METRICS[name]
    truth = np.std([metric(*sets(i)) for i in range(120)], ddof=1)
    errors = [bootstrap(metric, *sets(i), resamples=20, seed=i).stderr for i in range(10)]
    ratio = math.sqrt(np.mean(np.square(errors))) / truth
    assert 0.7 < ratio < 2.2


def test_frechet_distance_without_its_bias():
    """Between sets of 100 of one distribution in ten dimensions: its bias is four fifths of it or more."""
    estimates = [
        bootstrap(metrics.frechet_distance, drawn(100, 10, seed=2 * i), drawn(100, 10, seed=2 * i + 1), resamples=30)
        for i in range(10)
    ]
    plain = np.mean([e.value for e in estimates])
    left = np.mean([e.value - e.bias for e in estimates])
    assert abs(left) < 0.2 * plain


def test_tuples_of_numbers_get_an_error_each():
    a, b = drawn(30, 2), drawn(40, 2, seed=1)
    result = bootstrap(metrics.precision_recall, a, b, k=2, resamples=9, seed=4)
    assert isinstance(result, metrics.PrecisionRecall)
    for name in result._fields:
        alone = bootstrap(lambda a, b, n=name: getattr(metrics.precision_recall(a, b, 2), n), a, b, resamples=9, seed=4)
        assert getattr(result, name) == alone
    assert bootstrap(lambda x: (mean(x), spread(x)), a)[0] == bootstrap(mean, a)
    assert isinstance(bootstrap(lambda x: (mean(x), spread(x)), a), tuple)


def test_options_reach_the_metric_for_the_set_and_its_halves():
    def scaled(x, scale=1.0):
        return scale * x.mean().item()

    x = drawn(20)
    one, three = bootstrap(scaled, x), bootstrap(scaled, x, scale=3.0)
    assert three == pytest.approx([3 * number for number in one], rel=1e-9)


def test_halves_are_without_repetition_and_rows_keep_their_shape():
    seen = []

    def record(x, y):
        seen.append((x, y))
        return 0.0

    x, y = torch.arange(7.0)[:, None], torch.arange(10, 18)[:, None, None]
    assert bootstrap(record, x, y, resamples=50) == Estimate(0, 0, 0)
    assert torch.equal(seen[0][0], x)
    assert all(a.shape == (3, 1) and b.shape == (4, 1, 1) for a, b in seen[1:])
    assert all(len(c.unique()) == len(c) for pair in seen[1:] for c in pair)
    chosen = {(tuple(a.flatten().tolist()), tuple(b.flatten().tolist())) for a, b in seen[1:]}
    assert len(chosen) > 40, "of 7 and of 8 rows there are many halves, and each is drawn anew"
    counts = torch.cat([a.flatten() for a, _ in seen[1:]]).long().bincount(minlength=7)
    # binomial: 50 halves hold a row with probability 3/7
    assert (counts - 50 * 3 / 7).abs().max() < 4 * math.sqrt(50 * 12 / 49)


def test_the_seed_governs_the_halves():
    x = drawn(20)
    state = torch.get_rng_state()
    assert bootstrap(mean, x, seed=1) == bootstrap(mean, x, seed=1)
    assert bootstrap(mean, x, seed=1) != bootstrap(mean, x, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_gets_a_sentence():
    x = drawn(8, 2)
    with pytest.raises(OptionError, match="a whole number resamples >= 2; got 1 sets and resamples = 1"):
        bootstrap(mean, x, resamples=1)
    with pytest.raises(OptionError, match=r"a whole number.*resamples = 2\.5"):
        bootstrap(mean, x, resamples=2.5)
    with pytest.raises(OptionError, match=r"needs a set or more.*got 0 sets"):
        bootstrap(mean)
    with pytest.raises(ShapeError, match=r"at least four rows.*\[\(8, 2\), \(3, 2\)\]"):
        bootstrap(gap, x, x[:3])
    with pytest.raises(OptionError, match="1 to 3 for sets of 4 and 4 samples; got 5"):
        bootstrap(metrics.density_coverage, x, x)


def test_what_is_no_metric_or_set_is_refused():
    a = torch.randn(8, 2)
    with pytest.raises(OptionError, match="metric is a function, such as"):
        bootstrap("energy_distance", a, a)
    with pytest.raises(ShapeError, match=r"Sets are tensors .* got function\. Options of the metric go by name"):
        bootstrap(lambda a, f: 0.0, len_of)


def len_of(x):
    return len(x)
