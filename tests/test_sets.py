"""Sample sets: what is taken, and sums over pairs that come in parts."""

import math

import pytest
import torch

from sdediff import OptionError, ShapeError, sets

F64 = torch.float64


def drawn(n, *event, seed=0):
    return torch.randn(n, *event, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 70, 1 << 22])
@pytest.mark.parametrize("exact", [True, False])
def test_distances_come_in_parts_and_in_order(monkeypatch, entries, exact):
    monkeypatch.setattr(sets, "_ENTRIES", entries)
    a, b = drawn(33, 5), drawn(35, 5, seed=1)
    parts = list(sets.distances(a, b, exact=exact))
    assert len(parts) == {1: 33, 70: 17, 1 << 22: 1}[entries]
    expected = (a[:, None] - b).square().sum(-1).sqrt()
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=0)


def test_exact_distances_of_equal_points_are_zero_and_symmetric():
    a = drawn(40, 300)
    far = torch.cat(list(sets.distances(a, a, exact=True)))
    assert torch.equal(far, far.T)
    assert (far.diagonal() == 0).all()


@pytest.mark.parametrize("entries", [1, 70, 1 << 22])
def test_means_over_pairs(monkeypatch, entries):
    """Within a set no point is paired with itself, whatever the function is at 0."""
    monkeypatch.setattr(sets, "_ENTRIES", entries)
    a, b = drawn(33, 2), drawn(20, 2, seed=1)

    def function(distance):
        return distance**2 + 5

    far = (a[:, None] - a).square().sum(-1) + 5
    others = ~torch.eye(33, dtype=torch.bool)
    assert sets.mean_within(a, function) == pytest.approx(far[others].mean().item(), rel=1e-12)
    expected = ((a[:, None] - b).square().sum(-1) + 5).mean().item()
    assert sets.mean_between(a, b, function) == pytest.approx(expected, rel=1e-12)


def test_a_pair_is_flat_double_and_about_its_mean():
    a, b = drawn(4, 2, 3).float(), 5 + drawn(6, 2, 3, seed=1).float()
    first, second = sets.pair(a, b)
    assert first.dtype == second.dtype == F64
    assert first.shape == (4, 6)
    torch.testing.assert_close(first.mean(0) + second.mean(0), torch.zeros(6, dtype=F64))
    torch.testing.assert_close(second[0] - first[0], (b[0].double() - a[0].double()).flatten())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_no_numbers_are_named(bad):
    a, b = drawn(12, 2), drawn(12, 2)
    b[3, 1] = bad
    with pytest.raises(OptionError, match=r"The second set has 1 of 12 samples with NaN or infinite .*\(rows 3\)"):
        sets.pair(a, b)
    with pytest.raises(OptionError, match=r"The first set has 12 of 12 .*rows 0, 1, 2, 3, 4, 5, 6, 7, "):
        sets.pair(a / 0 * bad, a)


def test_sets_of_too_few_samples_are_refused():
    with pytest.raises(ShapeError, match=r"at least four samples of one event shape.*\(3, 2\) and \(9, 2\)"):
        sets.pair(drawn(3, 2), drawn(9, 2), least=4)
    with pytest.raises(ShapeError, match=r"at least two samples.*\(\) and \(9,\)"):
        sets.pair(torch.tensor(1.0), drawn(9))


class Sums:
    def features(self, x):
        return x.sum((1, 2))[:, None]


def test_features_come_from_a_function_or_a_method():
    x = drawn(5, 2, 3).requires_grad_()
    for features in (Sums(), Sums().features):
        got = sets.extract(features, x)
        assert torch.equal(got, x.sum((1, 2))[:, None])
        assert not got.requires_grad


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: x.sum((1, 2)), lambda x: x[:2, 0]])
def test_features_must_be_one_vector_a_sample(wrong):
    with pytest.raises(ShapeError, match=r"one vector a sample, \(5, d\); got \("):
        sets.extract(wrong, drawn(5, 2, 3))


def test_what_is_no_set_of_real_samples_is_refused():
    x = torch.randn(4, 2)
    for bad, words in (([[0.0, 1.0]] * 4, "got list. Arrays become tensors"), (x.numpy(), "torch.from_numpy")):
        with pytest.raises(ShapeError, match=words):
            sets.pair(x, bad)
    with pytest.raises(ShapeError, match="complex"):
        sets.pair(torch.complex(x, x), torch.complex(x, x))
    with pytest.raises(ShapeError, match="one event shape"):
        sets.pair(torch.empty(4, 0), torch.empty(4, 0))


def test_what_gives_no_features_is_refused():
    with pytest.raises(OptionError, match="features is a function from samples to vectors"):
        sets.extract("inception", torch.randn(4, 2))
    with pytest.raises(ShapeError, match=r"one vector a sample, .* got list"):
        sets.extract(lambda x: x.tolist(), torch.randn(4, 2))
