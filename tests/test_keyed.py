import numpy as np
import pytest
from scipy import stats

from sdediff import keyed
from sdediff.keyed import keyed_normals, philox


def words(*values):
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_known_answers_of_random123(counter, key, answer):
    assert tuple(int(word[0]) for word in philox(words(*counter), words(*key))) == answer


KEYS = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)


def test_the_numbers_are_standard_normal_and_independent():
    table = keyed_normals(KEYS, np.arange(500), 1, 40)
    assert stats.kstest(table.ravel(), "norm").pvalue > 0.01
    assert stats.kstest((table**2).sum(1), stats.chi2(40).cdf).pvalue > 0.01
    for columns in (table, table**2):
        assert np.abs(np.corrcoef(columns.T) - np.eye(40)).max() < 5.5 / 500**0.5


@pytest.mark.parametrize("change", ["key", "place", "high place", "table"])
def test_key_place_and_table_each_give_other_numbers(change):
    one = keyed_normals(KEYS, np.full(500, 9), 1, 40)
    other = keyed_normals(
        KEYS + np.uint64(change == "key"),
        np.full(500, 9 + (change == "place") + (2**40 if change == "high place" else 0)),
        1 + (change == "table"),
        40,
    )
    assert abs((one * other).mean()) < 4 / 20000**0.5


def test_a_number_depends_on_its_key_place_and_column_only():
    places = np.arange(500) ** 2
    table = keyed_normals(KEYS, places, 3, 40)
    for rows, count in [(np.arange(3), 40), (np.array([499, 7, 8, 100, 0]), 9), (np.array([13]), 1)]:
        assert np.array_equal(keyed_normals(KEYS[rows], places[rows], 3, count), table[rows, :count])


# Words, signs and normals of a seed, a row, a place and a table


def lattice(count):
    """`count` rows and places, all different pairs, so that no call repeats another."""
    n = np.arange(count)
    return n % 50, n // 50 + 3


@pytest.mark.parametrize("function", [keyed.words, keyed.signs, keyed.normals])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 31, 32, 33, 65])
def test_fewer_numbers_are_the_start_of_more(function, count):
    rows, places = lattice(12)
    many = function(7, rows, places, 2, 100)
    assert many.shape == (12, 100)
    assert np.array_equal(function(7, rows, places, 2, count), many[:, :count])


@pytest.mark.parametrize("function", [keyed.words, keyed.signs, keyed.normals])
def test_a_row_alone_has_the_numbers_of_its_batch(function):
    rows, places = lattice(40)
    whole = function(7, rows, places, 2, 9)
    picked = np.array([39, 0, 17])
    assert np.array_equal(function(7, rows[picked], places[picked], 2, 9), whole[picked])


def test_words_are_those_of_philox_under_the_seed():
    """Counter (call, row, place, table), key (low, high word of the seed)."""
    seed = 0x0123456789ABCDEF
    got = keyed.words(seed, np.array([5, 6]), np.array([11, 12]), 3, 7)
    for i, (row, place) in enumerate([(5, 11), (6, 12)]):
        calls = [philox(words(call, row, place, 3), words(0x89ABCDEF, 0x01234567)) for call in range(2)]
        assert [int(w) for w in got[i]] == [int(word[0]) for call in calls for word in call][:7]


def test_signs_are_the_bits_of_the_words():
    rows, places = lattice(3)
    drawn = keyed.words(9, rows, places, 1, 2)
    bits = [[(int(word) >> k) & 1 for word in row for k in range(32)] for row in drawn]
    assert np.array_equal(keyed.signs(9, rows, places, 1, 64), 1.0 - 2.0 * np.array(bits))


def test_words_are_uniform_signs_fair_and_normals_normal():
    """Each bound is passed by chance with probability below 1e-5 on either side (4.5 standard errors); the tests of
    Kolmogorov and Smirnov at 1 %, with a fixed seed."""
    rows, places = lattice(2000)
    uniform = keyed.words(1, rows, places, 0, 20) / 2.0**32
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 0.01
    signs = keyed.signs(1, rows, places, 0, 100)
    assert np.array_equal(np.abs(signs), np.ones((2000, 100)))
    assert np.abs(signs.mean(0)).max() < 4.5 / 2000**0.5
    normal = keyed.normals(1, rows, places, 0, 21)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    assert stats.kstest((normal**2).sum(1), stats.chi2(21).cdf).pvalue > 0.01
    for k, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):
        moment = [0, 0, 1, 0, 3][k]
        assert abs((normal**k).mean() - moment) < 4.5 * (variance / normal.size) ** 0.5
    for table in (signs[:, :40], normal, normal**2, np.abs(signs[:, :20] + 2 * signs[:, 20:40])):
        assert np.abs(np.corrcoef(table.T) - np.eye(table.shape[1])).max() < 5.5 / 2000**0.5


@pytest.mark.parametrize("function", [keyed.signs, keyed.normals])
@pytest.mark.parametrize("change", ["seed", "high seed", "row", "place", "table"])
def test_seed_row_place_and_table_each_give_other_numbers(function, change):
    rows, places = lattice(1000)
    one = function(4, rows, places, 1, 40)
    seed = 4 + (change == "seed") + (2**32 if change == "high seed" else 0)
    other = function(seed, rows + 50 * (change == "row"), places + 20 * (change == "place"), 1 + (change == "table"), 40)
    assert abs((one * other).mean()) < 4.5 / 40000**0.5
    assert not np.array_equal(one[0], other[0])
