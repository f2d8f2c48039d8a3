"""Noise sources: rows that do not know their batch, Brownian increments, antithetic and recorded numbers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import sdediff as sd
from sdediff.draws import Blocks, RowDraws, mix
from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.noise import Antithetic, BrownianPath, Recorded, Recorder, RowNoise
from sdediff.testing import time_grids

F64 = torch.float64
EVENTS = [(), (1,), (2, 5), (4, 8, 8)]
PATH = BrownianPath(11, 0.0, 2.0, depth=6)
WITH_INTEGRALS = BrownianPath(11, 0.0, 2.0, depth=6, integrals=True)
NUMBERS = torch.randn(40, 64, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
SOURCES = [RowNoise(11), PATH, WITH_INTEGRALS, Antithetic(RowNoise(11)), Antithetic(WITH_INTEGRALS)]
KNOW_INTEGRALS = [source for source in SOURCES if source is not PATH]


def at(t):
    return torch.tensor(t, dtype=F64)


def empty(rows, *event, dtype=F64):
    return torch.zeros(rows, *event, dtype=dtype)


def record(source, x, first_row=0):
    """Everything that a solve may ask of a stream, three steps of it."""
    stream, integrals = source.open(first_row), source in KNOW_INTEGRALS
    answers = [stream.normal(x)]
    for t, s in ((2.0, 1.3), (1.3, 0.4), (0.4, 0.1)):
        answers += [stream.unit(x, at(t), at(s)), stream.increment(x, at(t), at(s)), stream.normal(x)]
        if integrals:
            answers += stream.increment_and_integral(x, at(t), at(s))
    return torch.stack(answers)


# Rows

CHUNKS = ((0, 1), (0, 7), (0, 64), (1, 1), (5, 7), (37, 27), (63, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_bitwise_the_same_in_batches_of_1_7_and_64_and_at_any_offset(source, event, dtype):
    whole = record(source, empty(64, *event, dtype=dtype))
    assert whole.dtype == dtype
    assert bool(whole.isfinite().all())
    for first, rows in CHUNKS:
        part = record(source, empty(rows, *event, dtype=dtype), first)
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


@pytest.mark.parametrize("size", [2, 300, 20000])
def test_rows_are_the_same_however_many_draws_are_made_ahead(size):
    """60 draws: several refills, one row a block at 20000, blocks that a chunk cuts at 2 and 300."""
    whole, part = RowNoise(1).open(), RowNoise(1).open(9)
    for _ in range(60):
        assert torch.equal(whole.normal(empty(15, size))[9:13], part.normal(empty(4, size)))


def test_no_number_comes_twice_in_a_long_solve():
    stream = RowNoise(2).open()
    draws = torch.stack([stream.normal(empty(70, 3)) for _ in range(100)])
    assert len(draws.unique()) == draws.numel()
    columns = draws.reshape(100, -1)
    correlation = columns @ columns.T / columns.shape[1]
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 5.5 / columns.shape[1] ** 0.5


def test_states_of_another_shape_or_dtype_get_independent_numbers_of_their_own():
    """The numbers of the first shape are those that it gets alone."""
    alone, mixed = RowNoise(3).open(), RowNoise(3).open()
    seen = []
    for _ in range(20):
        seen += mixed.normal(empty(4, 6)).flatten().tolist()
        assert seen[-24:] == alone.normal(empty(4, 6)).flatten().tolist()
        seen += mixed.normal(empty(4, 2, 3)).flatten().tolist() + mixed.normal(empty(4)).flatten().tolist()
        assert mixed.normal(empty(4, 6, dtype=torch.float32)).dtype == torch.float32
    assert len(set(seen)) == len(seen)


def test_a_stream_serves_one_batch():
    stream = RowNoise(3).open()
    stream.normal(empty(4, 6))
    with pytest.raises(ShapeError, match=r"4 rows first, now for 3\. Open a stream for each batch"):
        stream.normal(empty(3, 6))


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_drawn_in_inference_mode_can_be_used_where_gradients_are_taken(source):
    stream, x = source.open(), empty(70, 2)
    with torch.inference_mode():
        stream.normal(x), stream.unit(x, at(2.0), at(1.5))
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    z = stream.normal(x)
    (weight * z + weight * stream.unit(x, at(1.5), at(1.2))).sum().backward()
    assert bool(weight.grad.isfinite().all())


@settings(max_examples=30)
@given(
    first=st.integers(0, 500), batch=st.integers(1, 200), event=st.sampled_from([(), (1,), (3,), (7, 11), (3, 40, 40)])
)
def test_blocks_cover_the_rows_of_a_batch(first, batch, event):
    blocks = Blocks.of(torch.Size((batch, *event)), first)
    size = math.prod(event)
    rows = torch.tensor([n * blocks.rows + k for n in blocks.numbers for k in range(blocks.rows)])
    draws = rows.reshape(len(blocks.numbers), 1, blocks.rows, 1).expand(-1, 2, -1, size)
    assert blocks.entries == blocks.rows * size
    got = blocks.rows_of(draws.reshape(len(blocks.numbers), 2, -1))
    assert got.shape == (2, batch, *event)
    assert torch.equal(got.reshape(2, batch, -1)[:, :, 0], torch.arange(first, first + batch).expand(2, -1))


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_replays_and_its_stream_moves_on(source):
    x = empty(5, 3)
    assert torch.equal(record(source, x), record(source, x))
    stream = source.open()
    assert not torch.equal(stream.normal(x), stream.normal(x))


@pytest.mark.parametrize("size", [1, 7, 20000])
@pytest.mark.parametrize("make", [RowNoise, lambda seed: BrownianPath(seed, 0.0, 1.0)])
def test_no_two_rows_seeds_or_entries_share_numbers(make, size):
    """An event of 20000 entries has a block for every row."""
    t, s = at(0.93), at(0.41)
    draws = torch.cat([make(seed).open().unit(empty(20, size), t, s) for seed in (0, 1, -1, 2**40, 2**63)])
    assert len(draws.flatten().unique()) == draws.numel()
    far = make(0).open(2**31).unit(empty(2, size), t, s)
    assert not set(far.flatten().tolist()) & set(draws.flatten().tolist())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**62), first=st.integers(0, 2**20), rows=st.integers(2, 50))
def test_blocks_of_one_solve_have_distinct_generators(seed, first, rows):
    draw = RowDraws(seed, first)
    draw(empty(rows, 16384))
    (stream,) = draw._streams.values()
    seeds = [generator.initial_seed() for generator in stream._generators]
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
@pytest.mark.parametrize("source", [RowNoise(3), BrownianPath(3, -1.0, 2.0, depth=8), Antithetic(RowNoise(3))])
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


# Antithetic rows


@pytest.mark.parametrize("inner", [RowNoise(5), WITH_INTEGRALS])
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 8), (1, 1), (1, 7), (2, 5), (7, 6)])
def test_antithetic_rows_are_those_of_the_other_source_with_both_signs(inner, first, rows):
    x, pairs = empty(rows, 3), empty(8, 3)
    mirrored, plain = Antithetic(inner).open(first), inner.open()
    t, s = at(1.7), at(0.6)

    def check(got, numbers):
        expected = torch.stack([(1 if row % 2 == 0 else -1) * numbers[row // 2] for row in range(first, first + rows)])
        assert torch.equal(got, expected)

    check(mirrored.normal(x), plain.normal(pairs))
    check(mirrored.unit(x, t, s), plain.unit(pairs, t, s))
    check(mirrored.increment(x, t, s), (s - t).abs().sqrt() * plain.unit(pairs, t, s))
    for got, numbers in zip(
        mirrored.increment_and_integral(x, t, s), plain.increment_and_integral(pairs, t, s), strict=True
    ):
        check(got, numbers)


def test_antithetic_samples_of_a_symmetric_target_are_opposite():
    """A centred Gaussian: the sampler is odd in its noise, start included, in any chunks."""
    model = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 0.3).model(sd.VP())
    options = {"steps": 6, "solver": sd.EulerMaruyama(), "noise": Antithetic(RowNoise(0))}
    whole = sd.sample(model, (10, 2), **options).x
    torch.testing.assert_close(whole[::2], -whole[1::2], rtol=1e-12, atol=1e-12)
    assert len(whole.abs().unique()) >= 10
    torch.testing.assert_close(sd.sample(model, (10, 2), batch_size=3, **options).x, whole, rtol=1e-12, atol=1e-12)


def test_antithetic_increments_take_times_per_row_but_its_integrals_do_not():
    t, s, x = at([0.1, 0.5, 2.0]), at([0.3, 0.1, 2.0]), empty(3, 2)
    unit = Antithetic(RowNoise(6)).open().unit(x, t, s)
    got = Antithetic(RowNoise(6)).open().increment(x, t, s)
    torch.testing.assert_close(got, (s - t).abs().sqrt()[:, None] * unit)
    with pytest.raises(CapabilityError, match="not for a time per row"):
        Antithetic(RowNoise(6)).open().increment_and_integral(x, t, s)


# Some rows


@pytest.mark.parametrize("source", SOURCES)
def test_remaining_rows_get_the_numbers_that_they_get_in_the_whole_batch(source):
    whole, parts, x = source.open(), source.open(), empty(70, 3)
    grid = (1.9, 1.4, 1.1, 0.6)
    for count, (t, s) in zip((70, 40, 1), pairwise(grid), strict=True):
        index = torch.arange(69, -1, -70 // count)
        some, t, s = parts.rows(index, 70), at(t), at(s)
        assert torch.equal(some.normal(x[index]), whole.normal(x)[index])
        assert torch.equal(some.unit(x[index], t, s), whole.unit(x, t, s)[index])
        torch.testing.assert_close(some.increment(x[index], t, s), (whole.increment(x, t, s)[index]))
        if source in KNOW_INTEGRALS:
            for a, b in zip(
                some.increment_and_integral(x[index], t, s), whole.increment_and_integral(x, t, s), strict=True
            ):
                assert torch.equal(a, b[index])


def test_remaining_rows_may_have_a_time_each():
    index, t, s = torch.tensor([5, 2]), at([0.1, 0.5]), at([0.3, 0.1])
    got = RowNoise(6).open().rows(index, 8).increment(empty(2, 3), t, s)
    unit = RowNoise(6).open().normal(empty(8, 3))[index]
    torch.testing.assert_close(got, (s - t).abs().sqrt()[:, None] * unit)


# Recorded numbers


def test_recorded_numbers_come_in_their_order_and_by_row():
    t, s, x = at(0.9), at(0.4), empty(5, 4)
    stream = Recorded(NUMBERS).open(7)
    assert torch.equal(stream.normal(x), NUMBERS[0, 7:12])
    assert torch.equal(stream.unit(x, t, s), NUMBERS[1, 7:12])
    torch.testing.assert_close(stream.increment(x, t, s), math.sqrt(0.5) * NUMBERS[2, 7:12])
    increment, integral = stream.increment_and_integral(x, t, s)
    torch.testing.assert_close(increment, math.sqrt(0.5) * NUMBERS[3, 7:12])
    torch.testing.assert_close(integral, 0.25 * increment + math.sqrt(0.5**3 / 12) * NUMBERS[4, 7:12])
    assert stream.normal(x.float()).dtype == torch.float32


@pytest.mark.parametrize("inner", [RowNoise(5), BrownianPath(5, 0.0, 1.0, integrals=True), Antithetic(RowNoise(1))])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("solver", [sd.EulerMaruyama(), sd.DDPM(), sd.TorchSDE("srk")])
def test_a_recorded_solve_replays_bitwise(inner, batch_size, solver):
    model = sd.exact.Gaussian(torch.ones(2), 0.3).model(sd.VP())
    recorder = Recorder(inner)
    options = {"steps": 4, "solver": solver, "batch_size": batch_size}
    sd.sample(model, (4, 2), noise=recorder, **options)
    solved = sd.sample(model, (8, 2), noise=recorder, **options).x
    draws = 1 + 4 * (2 if isinstance(solver, sd.TorchSDE) else 1)
    assert recorder.numbers.shape == (draws, 8, 2)
    assert torch.equal(sd.sample(model, (8, 2), noise=Recorded(recorder.numbers), **options).x, solved)
    plain = sd.sample(model, (8, 2), noise=inner, **options).x
    torch.testing.assert_close(solved, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match=f"hold {draws - 1} draws and the solve needs at least {draws}:"):
        sd.sample(model, (8, 2), noise=Recorded(recorder.numbers[:-1]), **options)


def test_recorded_integrals_are_standard_normal_numbers():
    """What a path of another construction gives is brought to two independent normal numbers a step."""
    recorder = Recorder(BrownianPath(8, 0.0, 1.0, integrals=True))
    stream, x = recorder.open(), empty(20_000)
    for t, s in ((0.9, 0.4), (0.4, 0.35)):
        stream.increment_and_integral(x, at(t), at(s))
    correlation = recorder.numbers @ recorder.numbers.T / 20_000
    assert (correlation - torch.eye(4)).abs().max() < 5 * math.sqrt(2 / 20_000)


def test_a_recorder_keeps_draws_that_are_changed_in_place():
    recorder = Recorder(RowNoise(0))
    stream, x = recorder.open(), empty(3, 2)
    draw = stream.normal(x)
    kept = draw.clone()
    draw.zero_()
    assert torch.equal(recorder.numbers[0], kept)


def test_the_wrong_recorded_numbers_are_refused():
    for numbers in (torch.zeros(3), torch.zeros(3, 4, 2, dtype=torch.int64), [0.0]):
        with pytest.raises(ShapeError, match=r"floating-point tensor of shape \(draws, batch, \*event\)"):
            Recorded(numbers)
    with pytest.raises(ShapeError, match=r"rows 62 to 65 of a state \(4, 4\) need \(draws, 66 or more, 4\)"):
        Recorded(NUMBERS).open(62).normal(empty(4, 4))
    with pytest.raises(ShapeError, match=r"\(40, 64, 4\)"):
        Recorded(NUMBERS).open().normal(empty(4, 5))


def test_a_recorder_without_a_whole_record_says_so():
    recorder = Recorder(RowNoise(0))
    with pytest.raises(OptionError, match="Nothing is recorded yet"):
        _ = recorder.numbers
    first, second, x = recorder.open(0), recorder.open(2), empty(2, 1)
    with pytest.raises(OptionError, match="Nothing is recorded yet"):
        _ = recorder.numbers
    first.normal(x), second.normal(x), second.normal(x)
    with pytest.raises(OptionError, match=r"different numbers of times \(1, 2\)"):
        _ = recorder.numbers
