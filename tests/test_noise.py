"""Noise sources: rows that do not know their batch, Brownian increments, and one path seen through any grid."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sdediff import BrownianPath, RowNoise
from sdediff import noise as noise_module
from sdediff.errors import CapabilityError, TimeError
from sdediff.noise import RowDraws, keyed_normal, mix
from sdediff.testing import time_grids

F64 = torch.float64
EVENTS = [(), (1,), (2, 5), (4, 8, 8)]
SOURCES = [RowNoise(11), BrownianPath(11, 0.0, 2.0, depth=4)]


def at(t):
    return torch.tensor(t, dtype=F64)


def empty(rows, *event, dtype=F64):
    return torch.zeros(rows, *event, dtype=dtype)


def record(stream, x):
    """Everything that a solve may ask of a stream, three steps of it."""
    answers = [stream.normal(x)]
    for t, s in ((2.0, 1.3), (1.3, 0.4), (0.4, 0.1)):
        answers += [stream.unit(x, at(t), at(s)), stream.increment(x, at(t), at(s)), stream.normal(x)]
        if isinstance(stream, noise_module._FreshStream):
            answers += stream.increment_and_integral(x, at(t), at(s))
    return torch.stack(answers)


# Rows

CHUNKS = ((0, 1), (0, 7), (0, 64), (1, 1), (5, 7), (37, 27), (63, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_bitwise_the_same_in_batches_of_1_7_and_64_and_at_any_offset(source, event, dtype):
    whole = record(source.open(), empty(64, *event, dtype=dtype))
    assert whole.dtype == dtype
    assert bool(whole.isfinite().all())
    for first, rows in CHUNKS:
        part = record(source.open(first), empty(rows, *event, dtype=dtype))
        assert torch.equal(part, whole[:, first : first + rows])


@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_an_event_larger_than_a_block_are_bitwise_the_same(source):
    whole = source.open().increment(empty(64, 41, 100), at(1.3), at(0.4))
    for first, rows in CHUNKS:
        part = source.open(first).increment(empty(rows, 41, 100), at(1.3), at(0.4))
        assert torch.equal(part, whole[first : first + rows])


@settings(max_examples=30)
@given(first=st.integers(0, 10_000), rows=st.integers(1, 9), size=st.integers(1, 300), seed=st.integers(0, 2**64 - 1))
def test_chunks_that_straddle_blocks_join_bitwise(first, rows, size, seed):
    together = RowNoise(seed).open(first).normal(empty(2 * rows, size))
    apart = [RowNoise(seed).open(first + k * rows).normal(empty(rows, size)) for k in range(2)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_replays_and_its_stream_moves_on(source):
    x = empty(5, 3)
    assert torch.equal(record(source.open(), x), record(source.open(), x))
    stream = source.open()
    assert not torch.equal(stream.normal(x), stream.normal(x))


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("make", [RowNoise, lambda seed: BrownianPath(seed, 0.0, 1.0)])
def test_no_two_rows_seeds_or_entries_share_numbers(make, size):
    """An event of 5000 entries has a block for every row."""
    draws = torch.cat([make(seed).open().unit(empty(20, size), at(1.0), at(0.0)) for seed in (0, 1, -1, 2**40, 2**63)])
    assert len(draws.flatten().unique()) == draws.numel()
    far = make(0).open(2**31).unit(empty(2, size), at(1.0), at(0.0))
    assert not set(far.flatten().tolist()) & set(draws.flatten().tolist())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**62), first=st.integers(0, 2**20), rows=st.integers(2, 50))
def test_blocks_of_one_solve_have_distinct_generators(seed, first, rows):
    draw = RowDraws(seed, first)
    draw(empty(rows, 4096))
    seeds = [generator.initial_seed() for generator in draw._generators]
    assert len(set(seeds)) == rows
    assert all(0 <= s < 2**32 for s in seeds), "a CPU generator keeps 32 bits of its seed"


def test_seeds_are_hashed_to_64_bits_without_collisions_and_in_order():
    pairs = [mix(a, b) for a in range(60) for b in range(60)]
    assert len(set(pairs)) == 3600
    assert all(0 <= value < 2**64 for value in pairs)
    # the low 32 bits, which generators keep, are evenly spread: 16 cells, chi-square at one in a million
    counts = torch.bincount(torch.tensor([(value & 0xFFFFFFFF) >> 28 for value in pairs]), minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6


# Normality


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize("source", [RowNoise(3), BrownianPath(3, -1.0, 2.0, depth=8)])
def test_unit_and_normal_are_standard_normal(source, size, dtype):
    """Kolmogorov-Smirnov at one in 10^9 and the first four moments within 5 standard errors."""
    n = 100_000
    x = empty(n // size, size, dtype=dtype)
    stream = source.open()
    for z in (stream.normal(x), stream.unit(x, at(1.7), at(0.6))):
        z = z.double().flatten()
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-9
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / n)


@pytest.mark.parametrize("source", [RowNoise(4), BrownianPath(4, 0.0, 1.0, depth=12)])
def test_what_a_stream_gives_is_uncorrelated_over_steps_rows_and_entries(source):
    rows, size = 10_000, 2
    x = empty(rows, size)
    stream = source.open()
    given_out = [stream.normal(x), stream.normal(x)]
    given_out += [stream.unit(x, at(t), at(s)) for t, s in ((1.0, 0.9), (0.9, 0.55), (0.55, 0.3), (0.3, 0.0))]
    given_out += [stream.normal(x)]
    columns = torch.cat(given_out, dim=1)
    correlation = columns.T @ columns / rows
    off = correlation - torch.diag(correlation.diagonal())
    assert off.abs().max() < 5.5 / math.sqrt(rows)
    for z in given_out:
        assert abs((z[1:] * z[:-1]).mean().item()) < 5 / math.sqrt(z[1:].numel())


# Increments


@settings(max_examples=25)
@given(grid=time_grids(), event=st.sampled_from([(), (3,), (2, 2)]))
def test_an_increment_is_the_unit_draw_times_the_root_of_the_step(grid, event):
    x = empty(4, *event)
    steps, units = RowNoise(5).open(), RowNoise(5).open()
    for t, s in pairwise(grid):
        torch.testing.assert_close(steps.increment(x, t, s), abs(s - t).item() ** 0.5 * units.unit(x, t, s))


def test_increments_with_a_time_per_row_have_each_row_s_own_variance():
    t, s = at([0.1, 0.5, 2.0]), at([0.3, 0.1, 2.0])
    x = empty(3, 2, 2)
    got = RowNoise(6).open().increment(x, t, s)
    unit = RowNoise(6).open().normal(x)
    for row, length in enumerate((0.2, 0.4, 0.0)):
        torch.testing.assert_close(got[row], math.sqrt(length) * unit[row])


@pytest.mark.parametrize(("t", "s"), [(0.2, 0.9), (0.9, 0.2), (0.0, 3.0)])
def test_increment_and_integral_have_their_joint_covariance(t, s):
    """Both are linear in the next two normal draws; the matrix is read off and its Gram matrix is the covariance."""
    x = empty(50, 2)
    draws = RowNoise(7).open()
    z = torch.stack([draws.normal(x).flatten(), draws.normal(x).flatten()], dim=1)
    pair = torch.stack([part.flatten() for part in RowNoise(7).open().increment_and_integral(x, at(t), at(s))], dim=1)
    matrix = torch.linalg.lstsq(z, pair).solution
    torch.testing.assert_close(z @ matrix, pair, rtol=1e-10, atol=1e-12)
    h = abs(s - t)
    expected = torch.tensor([[h, h**2 / 2], [h**2 / 2, h**3 / 3]], dtype=F64)
    torch.testing.assert_close(matrix.T @ matrix, expected, rtol=1e-10, atol=1e-12)


def test_increment_and_integral_with_a_time_per_row():
    x = empty(2, 3)
    together = RowNoise(8).open().increment_and_integral(x, at([0.0, 0.5]), at([1.0, 0.25]))
    for row, (t, s) in enumerate(((0.0, 1.0), (0.5, 0.25))):
        alone = RowNoise(8).open().increment_and_integral(x, at(t), at(s))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row], b[row])


def test_the_increment_of_increment_and_integral_is_the_one_a_plain_solve_draws():
    x = empty(4, 3)
    increment, _ = RowNoise(9).open().increment_and_integral(x, at(0.7), at(0.2))
    torch.testing.assert_close(increment, RowNoise(9).open().increment(x, at(0.7), at(0.2)))


# Brownian paths


@settings(max_examples=25)
@given(grid=time_grids(max_steps=20), seed=st.integers(0, 2**40), event=st.sampled_from([(), (3,), (2, 2)]))
def test_the_increments_of_a_fine_grid_sum_to_those_of_a_coarse_one(grid, seed, event):
    path, x = BrownianPath(seed, 0.0, 1.0), empty(3, *event)
    fine = path.open()
    total = sum(fine.increment(x, t, s) for t, s in pairwise(grid))
    torch.testing.assert_close(total, path.open().increment(x, grid[0], grid[-1]), rtol=1e-11, atol=1e-12)


@settings(max_examples=20)
@given(times=st.lists(st.floats(-1.0, 3.0), min_size=1, max_size=12), seed=st.integers(0, 2**40), data=st.data())
def test_the_value_of_a_path_does_not_depend_on_what_was_asked_before(times, seed, data):
    path, x = BrownianPath(seed, -1.0, 3.0), empty(2, 3)
    stream = path.open()
    inquisitive = {t: stream.value(x, at(t)) for t in data.draw(st.permutations(times))}
    stream.normal(x)
    for t in times:
        assert torch.equal(inquisitive[t], path.open().value(x, at(t)))
        assert torch.equal(inquisitive[t], stream.value(x, at(t)))


def test_a_path_starts_at_zero_and_turns_around():
    stream, x = BrownianPath(1, 0.5, 2.0).open(), empty(3, 2)
    assert torch.equal(stream.value(x, at(0.5)), x)
    assert bool((stream.value(x, at(2.0)) != 0).all())
    assert torch.equal(stream.increment(x, at(0.6), at(1.7)), -stream.increment(x, at(1.7), at(0.6)))
    assert torch.equal(stream.increment(x, at(0.5), at(1.7)), stream.value(x, at(1.7)))


class _OneHot:
    """Stands for the generators: every new seed is a new coordinate, and a path its vector of coefficients."""

    def __init__(self, seed, first_row):
        self.seed, self.draws = seed, 0
        assert first_row == 5

    def __call__(self, x):
        coordinate = _OneHot.seen.setdefault((self.seed, self.draws), len(_OneHot.seen))
        self.draws += 1
        out = torch.zeros_like(x)
        out[0, coordinate] = 1.0
        return out


@settings(max_examples=15)
@given(t0=st.floats(-3, 3), length=st.floats(0.01, 50), parts=st.lists(st.integers(0, 64), min_size=2, max_size=8))
def test_the_covariance_of_a_path_is_exactly_the_minimum_of_the_times(t0, length, parts):
    """On the dyadic points of the tree, with the coefficients of every node in place of its random number."""
    _OneHot.seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module, "RowDraws", _OneHot)
        patch.setattr(noise_module, "keyed_normal", lambda x, key, first_row: _OneHot(key, first_row)(x))
        stream, x = BrownianPath(0, t0, t0 + length, depth=12).open(5), empty(1, 200)
        values = torch.cat([stream.value(x, at(t0 + length * k / 64)) for k in parts])
        extra = stream.normal(x)
    elapsed = length * torch.tensor(parts, dtype=F64) / 64
    expected = torch.minimum(elapsed[:, None], elapsed[None])
    torch.testing.assert_close(values @ values.T, expected, rtol=1e-9, atol=1e-9 * length)
    assert float((values @ extra.T).abs().max()) == 0.0, "normal() is independent of the path"


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_between_its_leaves_a_path_is_linear_and_its_covariance_is_short_by_the_bridge(depth):
    """Inside a leaf of width w the bridge variance u (w - u) / w is missing, and nothing else."""
    _OneHot.seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module, "RowDraws", _OneHot)
        patch.setattr(noise_module, "keyed_normal", lambda x, key, first_row: _OneHot(key, first_row)(x))
        stream, x = BrownianPath(0, 0.0, 1.0, depth=depth).open(5), empty(1, 100)
        width = 2.0**-depth
        for leaf in range(2**depth):
            for share in (0.25, 0.5, 0.8):
                w = stream.value(x, at((leaf + share) * width))
                expected = (leaf + share) * width - share * (1 - share) * width
                assert (w @ w.T).item() == pytest.approx(expected, rel=1e-9)


def test_the_values_of_a_path_have_covariance_min_s_t():
    """Through the generators themselves: 20000 rows, every entry within 5 standard errors."""
    rows, t1 = 20_000, 2.0
    stream, x = BrownianPath(2, 0.0, t1).open(), empty(rows, 1)
    times = [0.1, 0.5, 0.7310585786, 1.0, 1.9, 2.0]
    values = torch.cat([stream.value(x, at(t)) for t in times], dim=1)
    for i, s in enumerate(times):
        for j, t in enumerate(times):
            error = math.sqrt((s * t + min(s, t) ** 2) / rows)
            assert abs((values[:, i] * values[:, j]).mean().item() - min(s, t)) < 5 * error


@pytest.mark.parametrize(("t", "s"), [(0.0, 1.0), (0.75, 0.5), (0.3, 0.300001)])
def test_the_unit_of_a_path_is_its_increment_over_the_root_of_the_step(t, s):
    stream, x = BrownianPath(3, 0.0, 1.0).open(), empty(4, 2)
    expected = (stream.value(x, at(s)) - stream.value(x, at(t))) / math.sqrt(abs(s - t))
    torch.testing.assert_close(stream.unit(x, at(t), at(s)), expected, rtol=1e-9, atol=1e-9)


def test_a_path_in_float32_is_normal_in_float32():
    rows = 20_000
    w = BrownianPath(4, 0.0, 1.0).open().increment(empty(rows, 1, dtype=torch.float32), at(0.9), at(0.4))
    assert w.dtype == torch.float32
    assert abs((w.double() ** 2).mean().item() - 0.5) < 5 * 0.5 * math.sqrt(2 / rows)


def test_coarse_and_fine_euler_steps_on_one_path_agree_to_strong_order_one():
    """dx = -x dt + dw: the gap between n and 2n steps on the same paths falls as 1 / n, which fresh noise would not."""
    path, x0 = BrownianPath(5, 0.0, 1.0), torch.ones(2000, 1, dtype=F64)

    def end(n):
        stream, x = path.open(), x0
        times = torch.linspace(0, 1, n + 1, dtype=F64)
        for t, s in pairwise(times):
            x = x - x * (s - t) + stream.increment(x, t, s)
        return x

    gaps = [(end(n) - end(2 * n)).square().mean().sqrt().item() for n in (8, 16, 32)]
    assert 1.8 < gaps[0] / gaps[1] < 2.2
    assert 1.8 < gaps[1] / gaps[2] < 2.2


def test_a_path_keeps_only_the_branch_it_needs():
    stream, x = BrownianPath(6, 0.0, 1.0, depth=24).open(), empty(1, 1)
    for t in torch.linspace(0, 1, 301, dtype=F64):
        stream.value(x, t)
    assert len(stream._branch) <= 25


# Refusals


def test_a_path_refuses_times_outside_its_span_and_accepts_its_ends():
    stream, x = BrownianPath(0, 0.25, 0.5).open(), empty(1, 1)
    stream.value(x, at(0.25)), stream.value(x, at(0.5))
    for t in (0.2499, 0.5001):
        with pytest.raises(TimeError, match=rf"\[0.25, 0.5\].*t = {t}"):
            stream.value(x, at(t))


def test_a_path_gives_no_time_integral_and_no_times_per_row():
    stream, x = BrownianPath(0, 0.0, 1.0).open(), empty(2, 1)
    with pytest.raises(CapabilityError, match=r"_PathStream.*seed=\.\.\."):
        stream.increment_and_integral(x, at(0.0), at(1.0))
    with pytest.raises(CapabilityError, match="per-row times need RowNoise"):
        stream.value(x, at([0.0, 1.0]))


def test_keyed_numbers_depend_on_key_and_row_only_and_not_on_the_dtype():
    x = torch.empty(70, 100, dtype=F64)
    whole = keyed_normal(x, 7, 0)
    assert torch.equal(keyed_normal(x[:9], 7, 35), whole[35:44])
    assert torch.equal(keyed_normal(x.float(), 7, 0), whole.float())
    assert not torch.isclose(keyed_normal(x, 8, 0), whole).any()
    assert len(whole.unique()) == whole.numel()
    assert abs(whole.mean()) < 5 / 7000**0.5
    assert abs(whole.var() - 1) < 5 * (2 / 7000) ** 0.5
