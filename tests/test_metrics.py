"""Distances between sample sets, against closed forms and exact enumerations."""

import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sdediff import MissingExtraError, OptionError, ShapeError, metrics
from sdediff.metrics import energy_distance, sliced_wasserstein

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quantiles(n, mean=0.0, std=1.0):
    """`n` equally likely points of a normal distribution, as a set of samples `(n, 1)`."""
    return torch.from_numpy(stats.norm.ppf((np.arange(n) + 0.5) / n, loc=mean, scale=std))[:, None]


def mean_gap(mean, std):
    """`E |z|` for z ~ N(mean, std^2)."""
    z = mean / std
    return std * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + mean * (1 - 2 * stats.norm.cdf(-z))


# Energy distance


@pytest.mark.parametrize(("shape", "event"), [((4, 3), (2,)), ((2, 5), ()), ((3, 3), (2, 2))])
def test_energy_distance_is_its_double_sums(shape, event):
    """Over all pairs between the sets, and over all pairs of different members within them."""
    a, b = drawn(shape[0], *event), 0.5 + 2 * drawn(shape[1], *event, seed=1)

    def far(x, y):
        return (x - y).square().sum().sqrt().item()

    between = np.mean([far(x, y) for x in a for y in b])
    within = sum(np.mean([far(x, y) for x, y in itertools.permutations(c, 2)]) for c in (a, b))
    assert energy_distance(a, b) == pytest.approx(2 * between - within, rel=1e-12)


@pytest.mark.parametrize("other", [(0.0, 1.0), (0.3, 1.0), (2.0, 1.0), (-1.0, 0.4), (0.0, 3.0)])
def test_energy_distance_of_two_normals_is_the_closed_form(other):
    mean, std = other
    exact = 2 * mean_gap(mean, math.hypot(1, std)) - mean_gap(0, math.sqrt(2)) - mean_gap(0, math.sqrt(2) * std)
    # on quantiles for samples, the error falls as 1 / n: one extrapolation
    coarse, fine = (energy_distance(quantiles(n), quantiles(n, mean, std)) for n in (500, 1000))
    assert 2 * fine - coarse == pytest.approx(exact, abs=3e-4)


@pytest.mark.parametrize("q", [[0.0, 1.0, 3.0], [4.0, 0.5, 1.0]])
def test_energy_distance_is_unbiased(q):
    """Its mean over every possible draw of two and three samples is the distance itself: zero for equal ones."""
    p = [0.0, 1.0, 3.0]
    far = lambda u, v: np.mean([abs(x - y) for x in u for y in v])  # noqa: E731
    expected = 2 * far(p, q) - far(p, p) - far(q, q)
    assert (expected == pytest.approx(0, abs=1e-12)) == (p == q)
    draws = itertools.product(itertools.product(p, repeat=2), itertools.product(q, repeat=3))
    values = [energy_distance(torch.tensor(a)[:, None], torch.tensor(b)[:, None]) for a, b in draws]
    assert np.mean(values) == pytest.approx(expected, abs=1e-12)
    assert min(values) < -0.1, "an unbiased estimate may be negative"


# Sliced Wasserstein


@settings(max_examples=20)
@given(shift=st.floats(-5, 5), n=st.integers(2, 40))
def test_on_a_line_two_shifted_sets_are_as_far_as_the_shift(shift, n):
    a = drawn(n, 1)
    assert sliced_wasserstein(a, (a + shift)[torch.randperm(n)]) == pytest.approx(abs(shift), abs=1e-12)


@pytest.mark.parametrize(("mean", "std"), [(1.5, 1.0), (0.0, 2.0), (-1.0, 0.5)])
def test_on_a_line_two_normals_are_at_their_wasserstein_distance(mean, std):
    """`W_2^2 = (m_1 - m_2)^2 + (s_1 - s_2)^2`."""
    got = sliced_wasserstein(quantiles(4000), quantiles(4000, mean, std))
    assert got == pytest.approx(math.hypot(mean, std - 1), rel=2e-3)


@pytest.mark.parametrize("event", [(3,), (2, 2)])
def test_shifted_sets_are_at_the_root_mean_square_projection_of_the_shift(event):
    """`|shift| / sqrt(D)` over all directions; over 4096 of them within 5 standard errors."""
    a, shift = drawn(50, *event), drawn(*event, seed=7)
    size, k = math.prod(event), 4096
    exact = shift.norm().item() / math.sqrt(size)
    # var of <u, e>^2 on the sphere is 2 (D - 1) / (D^2 (D + 2))
    error = exact * size * math.sqrt(2 * (size - 1) / (size**2 * (size + 2)) / k) / 2
    assert abs(sliced_wasserstein(a, a + shift, directions=k) - exact) < 5 * error


def test_a_scaled_set_is_at_the_root_mean_square_of_its_projections():
    """b = 3 a: every quantile moves by twice itself, so W^2 = 4 mean |a|^2 / D on average over directions."""
    a = drawn(200, 2)
    exact = 2 * math.sqrt(a.square().sum(1).mean().item() / 2)
    assert sliced_wasserstein(a, 3 * a, directions=4096) == pytest.approx(exact, rel=0.02)


def test_sets_of_unequal_sizes_are_compared_by_their_quantile_functions():
    a, b = drawn(30, 2), 1 + drawn(30, 2, seed=1)
    assert sliced_wasserstein(a, a.repeat(4, 1)) == 0
    assert sliced_wasserstein(a, b.repeat(3, 1)) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)
    assert sliced_wasserstein(a.repeat(5, 1), b) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)
    # quantile functions 0, 1 on halves and 0, 0.5, 1 on thirds differ by 0.5 on a third of [0, 1]
    got = sliced_wasserstein(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [1.0], [0.0]]))
    assert got == pytest.approx(math.sqrt(0.25 / 3), rel=1e-12)


def test_directions_follow_the_seed():
    a, b = drawn(20, 3), drawn(20, 3, seed=1)
    assert sliced_wasserstein(a, b, seed=1, directions=4) == sliced_wasserstein(a, b, seed=1, directions=4)
    assert sliced_wasserstein(a, b, seed=1, directions=4) != sliced_wasserstein(a, b, seed=2, directions=4)


# Both


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
def test_distances_are_symmetric_scale_with_the_data_and_ignore_order_and_place(distance):
    a, b = drawn(9, 2), 1 + drawn(7, 2, seed=1)
    value = distance(a, b)
    assert distance(b, a) == pytest.approx(value, rel=1e-12)
    assert distance(3 * a, 3 * b) == pytest.approx(3 * value, rel=1e-10)
    assert distance(a.flip(0) + 5, b.roll(2, 0) + 5) == pytest.approx(value, rel=1e-9)
    assert distance(a.float(), b.float()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 1)), ((1, 2), (3, 2)), ((3, 2), (1, 2)), ((4, 2, 2), (4, 4))])
def test_sets_that_do_not_compare_are_refused_with_their_shapes(distance, a, b):
    with pytest.raises(ShapeError) as caught:
        distance(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)
    assert "at least two samples of one event shape" in str(caught.value)


# Frechet


def covariance(d, seed, rank=None):
    factor = drawn(rank or d, d, seed=seed)
    return factor.T @ factor / d


def with_moments(n, mean, cov, seed=0):
    """A set whose mean and (unbiased) covariance are these, exactly."""
    x = drawn(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + white @ torch.linalg.cholesky(cov).T


def optimal_map(cov1, cov2):
    """The symmetric matrix T with T S1 T = S2, which moves one normal distribution to another at least cost."""
    root = sqrtm(cov1)
    inverse = torch.linalg.inv(root)
    return inverse @ sqrtm(root @ cov2 @ root) @ inverse


def sqrtm(cov):
    values, basis = torch.linalg.eigh(cov)
    return basis * values.clamp(min=0).sqrt() @ basis.T


@given(
    mean=st.floats(-3, 3), one=st.lists(st.floats(0.1, 4), min_size=3, max_size=3),
    two=st.lists(st.floats(0.1, 4), min_size=3, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_frechet_distance_of_commuting_covariances(mean, one, two, seed):
    """`|m|^2 + sum (s_i - t_i)^2` where both have one basis."""
    basis = torch.linalg.qr(drawn(3, 3, seed=seed)).Q
    s, t = torch.tensor(one, dtype=F64), torch.tensor(two, dtype=F64)
    got = metrics.frechet_distance_of(
        torch.zeros(3), basis * s**2 @ basis.T, torch.full((3,), mean, dtype=F64), basis * t**2 @ basis.T
    )
    assert got == pytest.approx(3 * mean**2 + (s - t).square().sum().item(), rel=1e-10, abs=1e-10)


@given(seed=st.integers(0, 999))
def test_frechet_distance_in_the_plane(seed):
    """`tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 S2))` for matrices of two rows, which need not commute."""
    one, two = covariance(2, seed), covariance(2, seed + 1000)
    root = ((one @ two).trace() + 2 * (one.det() * two.det()).sqrt()).sqrt()
    got = metrics.frechet_distance_of(torch.zeros(2), one, torch.ones(2), two)
    assert got == pytest.approx((2 + one.trace() + two.trace() - 2 * root).item(), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("d", [2, 64, 300])
def test_frechet_distance_of_singular_covariances(d):
    """Of rank one, `S1 = u u^T` and `S2 = v v^T`: `|u|^2 + |v|^2 - 2 |u v|`."""
    u, v = drawn(d, seed=1), drawn(d, seed=2)
    exact = (u @ u + v @ v - 2 * (u @ v).abs()).item()
    zero = torch.zeros(d)
    assert metrics.frechet_distance_of(zero, u.outer(u), zero, v.outer(v)) == pytest.approx(exact, rel=1e-10)
    # as sets of two points
    pairs = [torch.stack([w, -w]) / math.sqrt(2) for w in (u, v)]
    assert metrics.frechet_distance(*pairs) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("n", "event"), [(40, (6,)), (8, (2, 5)), (300, (3,))])
def test_frechet_distance_of_sets_is_that_of_their_moments(n, event):
    a, b = drawn(n, *event), 0.5 + 2 * drawn(n + 3, *event, seed=1)
    moments = [(c.flatten(1).mean(0), c.flatten(1).T.cov()) for c in (a, b)]
    exact = metrics.frechet_distance_of(*moments[0], *moments[1])
    assert metrics.frechet_distance(a, b) == pytest.approx(exact, rel=1e-8)
    assert metrics.frechet_distance(a + 1e4, b + 1e4) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("n", [20, 400])
def test_a_set_is_at_no_frechet_distance_from_itself(n):
    a = drawn(n, 100)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-11)
    assert metrics.frechet_distance(a, a.flip(0) + 1) == pytest.approx(100, rel=1e-12)


def test_frechet_distance_of_two_normals_is_the_closed_form():
    """Sets with exactly the moments of two normal distributions."""
    mean, one, two = drawn(4, seed=3), covariance(4, 4) + torch.eye(4), covariance(4, 5) + 0.1 * torch.eye(4)
    root = sqrtm(one)
    exact = (mean @ mean + one.trace() + two.trace() - 2 * sqrtm(root @ two @ root).trace()).item()
    a, b = with_moments(50, mean, one), with_moments(70, torch.zeros(4), two, seed=1)
    assert metrics.frechet_distance(a, b) == pytest.approx(exact, rel=1e-10)
    assert metrics.frechet_distance(b, a) == pytest.approx(exact, rel=1e-10)


class Bare(torch.nn.Module):
    """The features themselves, for torchmetrics."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "d", "off"), [(500, 20, 1e-9), (30, 120, 1e-4)])
def test_torchmetrics_has_the_same_frechet_distance(n, d, off):
    """Its root of a singular matrix is off by some 1e-5: the eigenvalues that should be 0 are 1e-16."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=Bare(d)).set_dtype(F64)
    a, b = drawn(n, d), 0.3 + 1.2 * drawn(n, d, seed=1)
    fid.update(a, real=True)
    fid.update(b, real=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(fid.compute().item(), abs=off)


def test_why_the_frechet_distance_is_no_call_of_torchmetrics():
    """30 samples of 120 features against themselves, where 0 is the truth: its error is a million times larger."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=Bare(120)).set_dtype(F64)
    a = drawn(30, 120)
    fid.update(a, real=True)
    fid.update(a, real=False)
    assert abs(metrics.frechet_distance(a, a)) < 1e-12
    assert abs(fid.compute().item()) > 1e-6


def test_a_module_of_torchmetrics_gives_features():
    """What its `feature=` takes is taken, though in training mode, as modules are made; and is left so."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Network(Bare):
        def __init__(self):
            super().__init__(3)
            self.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))

        def forward(self, x):
            return self.layers(x)

    network = Network().double()
    a, b = drawn(40, 4), 0.5 + 2 * drawn(50, 4, seed=1)
    got = metrics.frechet_distance(a, b, features=network)
    assert network.training
    assert network.layers[0].num_batches_tracked == 0
    assert metrics.frechet_distance(a, b, features=network) == got
    fid = FrechetInceptionDistance(feature=network.eval()).set_dtype(F64)
    fid.update(a, real=True)
    fid.update(b, real=False)
    assert got == pytest.approx(fid.compute().item(), rel=1e-9)
    assert metrics.energy_distance(network(a), network(b)) != metrics.energy_distance(a, b)


def test_frechet_distance_compares_features():
    a, b = drawn(30, 1, 4), 1 + drawn(20, 1, 4, seed=1)

    class Sums:
        def features(self, x):
            return x.sum((1, 2))[:, None]

        def __call__(self, x):
            raise AssertionError("the method features is meant")

    expected = metrics.frechet_distance(a.sum((1, 2))[:, None], b.sum((1, 2))[:, None])
    assert metrics.frechet_distance(a, b, Sums()) == expected
    assert metrics.frechet_distance(a, b, features=Sums().features) == expected
    assert metrics.frechet_distance(a, b) != expected


# Maximum mean discrepancy


@pytest.mark.parametrize(("shape", "event", "h"), [((4, 3), (2,), 0.7), ((2, 5), (), 3.0), ((3, 3), (2, 2), 1.0)])
def test_mmd_is_its_double_sums(shape, event, h):
    a, b = drawn(shape[0], *event), 0.5 + 2 * drawn(shape[1], *event, seed=1)

    def k(x, y):
        return math.exp(-(x - y).square().sum().item() / (2 * h**2))

    between = np.mean([k(x, y) for x in a for y in b])
    within = sum(np.mean([k(x, y) for x, y in itertools.permutations(c, 2)]) for c in (a, b))
    assert metrics.mmd(a, b, h) == pytest.approx(within - 2 * between, rel=1e-12)


def kernel_of_normals(gap, var, h, d=1):
    """`E exp(-|z|^2 / 2 h^2)` for z normal in d dimensions, with independent entries of variance var, |mean| = gap."""
    return (h**2 / (h**2 + var)) ** (d / 2) * math.exp(-(gap**2) / (2 * (h**2 + var)))


@pytest.mark.parametrize("h", [0.5, 2.0])
@pytest.mark.parametrize("other", [(0.0, 1.0), (2.0, 1.0), (-1.0, 0.4)])
def test_mmd_of_two_normals_is_the_closed_form(other, h):
    mean, std = other
    exact = kernel_of_normals(0, 2, h) + kernel_of_normals(0, 2 * std**2, h)
    exact -= 2 * kernel_of_normals(mean, 1 + std**2, h)
    # on quantiles for samples, the error falls as 1 / n: one extrapolation
    coarse, fine = (metrics.mmd(quantiles(n), quantiles(n, mean, std), h) for n in (250, 500))
    assert 2 * fine - coarse == pytest.approx(exact, abs=3e-4)


def test_mmd_is_unbiased_in_several_dimensions():
    """The mean of 200 estimates is within four of its standard errors of the closed form."""
    exact = kernel_of_normals(0, 2, 1.5, 3) + kernel_of_normals(0, 0.5, 1.5, 3)
    exact -= 2 * kernel_of_normals(math.sqrt(3) * 0.4, 1.25, 1.5, 3)
    values = [metrics.mmd(drawn(30, 3, seed=2 * i), 0.4 + 0.5 * drawn(20, 3, seed=2 * i + 1), 1.5) for i in range(200)]
    error = np.std(values) / math.sqrt(200)
    assert abs(np.mean(values) - exact) < 4 * error < 0.1 * exact


def test_the_bandwidth_is_the_median_distance_of_the_pooled_set():
    a, b = drawn(5, 2), 1 + drawn(4, 2, seed=1)
    pooled = torch.cat([a, b])
    far = [(x - y).norm().item() for x, y in itertools.combinations(pooled, 2)]
    median = sorted(far)[(len(far) - 1) // 2]
    assert metrics.mmd(a, b) == pytest.approx(metrics.mmd(a, b, median), rel=1e-12)
    assert metrics.mmd(3 * a, 3 * b) == pytest.approx(metrics.mmd(a, b), rel=1e-12)


def test_kernels_of_several_bandwidths_are_averaged():
    a, b = drawn(30, 2), 1 + drawn(40, 2, seed=1)
    each = [metrics.mmd(a, b, h) for h in (0.5, 1.0, 2.0)]
    assert metrics.mmd(a, b, [0.5, 1.0, 2.0]) == pytest.approx(np.mean(each), rel=1e-12)


def test_sets_far_apart_have_the_largest_mmd():
    a = torch.zeros(5, 2)
    assert metrics.mmd(a, a + 1e3, 1.0) == pytest.approx(2)


# Wasserstein


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_wasserstein_is_the_best_of_all_matchings(p):
    a, b = drawn(5, 2), 0.5 + drawn(5, 2, seed=1)
    costs = [
        sum((x - b[j]).norm().item() ** p for x, j in zip(a, order, strict=True)) / 5
        for order in itertools.permutations(range(5))
    ]
    assert metrics.wasserstein(a, b, p) == pytest.approx(min(costs) ** (1 / p), rel=1e-12)


@settings(max_examples=15)
@given(m=st.integers(2, 30), n=st.integers(2, 30), shift=st.floats(-3, 3))
def test_wasserstein_on_a_line_is_a_distance_of_quantile_functions(m, n, shift):
    a, b = drawn(m, 1), shift + drawn(n, 1, seed=1)
    assert metrics.wasserstein(a, b, 1) == pytest.approx(
        stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy()), rel=1e-9, abs=1e-12
    )


def test_wasserstein_of_two_normals_is_the_frechet_distance():
    """The best map between two normals is linear. It moves any set at least cost: here one with exact moments."""
    one, two = covariance(3, 1) + 0.2 * torch.eye(3), covariance(3, 2) + 0.5 * torch.eye(3)
    mean = drawn(3, seed=3)
    a = with_moments(80, torch.zeros(3, dtype=F64), one)
    b = mean + a @ optimal_map(one, two).T
    # the covariance of a set of n that moves is divided by n - 1, the mean cost by n
    gap = metrics.frechet_distance_of(torch.zeros(3), one, torch.zeros(3), two) * 79 / 80
    exact = math.sqrt((mean @ mean).item() + gap)
    assert metrics.wasserstein(a, b[torch.randperm(80)]) == pytest.approx(exact, rel=1e-10)
    assert metrics.wasserstein(a, b.repeat(2, 1)) == pytest.approx(exact, rel=1e-10)


# Inception score


@pytest.mark.parametrize("classes", [2, 7])
def test_inception_score_from_nothing_said_to_all_classes(classes):
    uniform = torch.full((5, classes), 1 / classes)
    assert metrics.inception_score(uniform) == pytest.approx(1, abs=1e-6)
    sure = torch.eye(classes).repeat(3, 1)
    assert metrics.inception_score(sure) == pytest.approx(classes)
    assert metrics.inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1)


@given(classes=st.integers(2, 12), noise=st.floats(0, 1))
def test_inception_score_of_a_noisy_channel(classes, noise):
    """Right with probability `1 - e + e / K`, else any other: `log IS = log K - H`, the capacity of the channel."""
    probs = (1 - noise) * torch.eye(classes, dtype=F64) + noise / classes
    entropy = stats.entropy(probs[0].numpy())
    assert metrics.inception_score(probs) == pytest.approx(classes * math.exp(-entropy), rel=1e-10)


def test_torchmetrics_has_the_same_inception_score():
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * drawn(200, 10)
    with warnings.catch_warnings():  # its memory, and the deviation of one split
        warnings.simplefilter("ignore")
        score = InceptionScore(feature=Bare(10), splits=1).set_dtype(F64)
        score.update(logits)
        expected = score.compute()[0].item()
    assert metrics.inception_score(logits.softmax(-1)) == pytest.approx(expected, rel=1e-10)


def test_splits_are_scored_apart():
    probs = drawn(7, 4).softmax(-1)
    parts = [metrics.inception_score(probs[rows]) for rows in (slice(0, 3), slice(3, 5), slice(5, 7))]
    assert metrics.inception_score(probs, splits=3) == pytest.approx(np.mean(parts), rel=1e-12)


# All


@pytest.mark.parametrize("metric", [metrics.mmd, metrics.wasserstein, metrics.frechet_distance])
def test_other_metrics_are_symmetric_and_ignore_order_and_place(metric):
    a, b = drawn(40, 2), 1 + drawn(30, 2, seed=1)
    value = metric(a, b)
    assert isinstance(value, float)
    assert metric(b, a) == pytest.approx(value, rel=1e-10)
    assert metric(a.flip(0) + 5, b.roll(2, 0) + 5) == pytest.approx(value, rel=1e-9)
    assert metric(a.float(), b.float()) == pytest.approx(value, rel=1e-5)
    assert metric(a.reshape(40, 1, 2), b.reshape(30, 1, 2)) == value


SETS = drawn(6, 2), drawn(6, 2, seed=1)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: metrics.mmd(*SETS, bandwidth=0.0), OptionError, ["bandwidth is a number > 0", "got 0.0"]),
        (lambda: metrics.mmd(*SETS, bandwidth=[1.0, -2.0]), OptionError, ["bandwidth", "[1.0, -2.0]"]),
        (lambda: metrics.mmd(*SETS, bandwidth=[]), OptionError, ["bandwidth", "got []"]),
        (lambda: metrics.mmd(torch.ones(3, 2), torch.ones(3, 2)), OptionError, ["equal points", "give bandwidth="]),
        (lambda: sliced_wasserstein(*SETS, directions=0), OptionError, ["directions", ">= 1", "got 0"]),
        (lambda: sliced_wasserstein(*SETS, directions=2.5), OptionError, ["a whole number", "got 2.5"]),
        (lambda: metrics.wasserstein(*SETS, p="2"), OptionError, ["p is the power", "got '2'"]),
        (lambda: metrics.mmd(*SETS, bandwidth="median"), OptionError, ["or None for the median", "got 'median'"]),
        (lambda: metrics.mmd(*SETS, bandwidth=torch.ones(2)), OptionError, ["bandwidth", "got tensor([1., 1.])"]),
        (lambda: metrics.inception_score(torch.ones(2, 1), splits=1.5), OptionError, ["whole number", "got 1.5"]),
        (lambda: metrics.wasserstein(*SETS, p=0.5), OptionError, ["p is the power", ">= 1", "got 0.5"]),
        (lambda: metrics.wasserstein(*SETS, p=math.inf), OptionError, ["p is the power", "got inf"]),
        (lambda: metrics.frechet_distance(SETS[0], SETS[1][:, :1]), ShapeError, ["(6, 2)", "(6, 1)"]),
        (lambda: metrics.frechet_distance(SETS[0], SETS[1][:1]), ShapeError, ["at least two", "(1, 2)"]),
        (
            lambda: metrics.frechet_distance(*SETS, features=lambda x: x[:, :, None]),
            ShapeError,
            ["one vector a sample, (6, d)", "got (6, 2, 1)"],
        ),
        (
            lambda: metrics.frechet_distance_of(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)),
            ShapeError,
            ["(d,) and covariances (d, d)", "(3, 3)"],
        ),
        (
            lambda: metrics.frechet_distance_of(torch.zeros(2), -torch.eye(2), torch.zeros(2), torch.eye(2)),
            OptionError,
            ["no negative eigenvalue", "least eigenvalue -1"],
        ),
        (
            lambda: metrics.frechet_distance_of(*[torch.zeros(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]])] * 2),
            OptionError,
            ["must be symmetric", "asymmetry of 1"],
        ),
        (lambda: metrics.inception_score(torch.ones(4)), ShapeError, ["(n, classes)", "got (4,)"]),
        (lambda: metrics.inception_score(torch.ones(4, 2)), OptionError, ["add up to 1", "off by 1", "softmax"]),
        (lambda: metrics.inception_score(torch.tensor([[1.5, -0.5]])), OptionError, [">= 0", "least is -0.5"]),
        (lambda: metrics.inception_score(torch.full((1, 2), math.nan)), OptionError, ["NaN or infinite"]),
        (lambda: metrics.inception_score(torch.ones(2, 1), splits=3), OptionError, ["rows, 2", "got 3"]),
        (
            lambda: metrics.inception_score(torch.ones(2, 1), splits=0),
            OptionError,
            ["splits is a whole number, 1", "got 0"],
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, kind, said):
    with pytest.raises(kind) as caught:
        call()
    for part in said:
        assert part in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingExtraError, match=r"'ot'.*sdediff\[metrics\]"):
        metrics.wasserstein(*SETS)


@pytest.mark.parametrize(("m", "n"), [(7, 7), (7, 5), (3, 8), (2, 9)])
def test_sliced_wasserstein_of_a_line_is_the_wasserstein_distance_for_any_sizes(m, n):
    a, b = torch.randn(m, 1, dtype=torch.float64), 2 * torch.randn(n, 1, dtype=torch.float64) + 1
    exact = metrics.wasserstein(a, b)
    assert sliced_wasserstein(a, b, directions=3) == pytest.approx(exact, rel=1e-9)
    assert sliced_wasserstein(b, a, directions=3) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e8])
def test_wasserstein_knows_no_unit(scale):
    a, b = torch.randn(12, 3, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64) + 0.5
    for p in (1, 2, 3):
        exact = metrics.wasserstein(a, b, p)
        assert metrics.wasserstein(scale * a, scale * b, p) == pytest.approx(scale * exact, rel=1e-9)


def test_moments_that_are_no_numbers_are_refused():
    eye = torch.eye(2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match="moments have NaN or infinite entries"):
            metrics.frechet_distance_of(torch.tensor([bad, 0.0]), eye, torch.zeros(2), eye)
