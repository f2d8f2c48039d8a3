import numpy as np
import pytest
from scipy import stats

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
