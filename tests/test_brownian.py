"""Brownian paths: a fixed function of time with the law of Brownian motion and of its integral, on any grid."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdediff.brownian import Area, Increments, Paths, Tree
from sdediff.draws import Blocks, mix
from sdediff.errors import CapabilityError, OptionError, TimeError
from sdediff.noise import BrownianPath
from sdediff.testing import time_grids

F64 = torch.float64
BASES = [Increments(), Area()]


def at(t):
    return torch.tensor(t, dtype=F64)


def empty(rows, *event, dtype=F64):
    return torch.zeros(rows, *event, dtype=dtype)


# The law, exactly


def covariance(tree, places):
    """Of all outputs at all places, `(outputs, places, outputs, places)`, from the weights of independent numbers."""
    table = []
    for x in places:
        groups, weights = tree.at(x)
        weights = weights.reshape(tree.basis.size, -1, tree.basis.size).numpy()
        row = {"root": weights[:, 0]}
        for k in range(weights.shape[1] - 1):
            depth, node = divmod(k, tree.nodes)
            row[depth, groups[depth], node] = weights[:, 1 + k]
        table.append(row)
    names = sorted({name for row in table for name in row}, key=str)
    nothing = np.zeros((tree.basis.size, tree.basis.size))
    matrix = np.array([[row.get(name, nothing) for name in names] for row in table])
    return np.einsum("inak,jnbk->aibj", matrix, matrix)


@st.composite
def one_place_a_leaf(draw, depth):
    """Places of which no two lie inside one leaf, some of them at its ends."""
    leaves = draw(st.lists(st.integers(0, 2**depth - 1), min_size=1, max_size=10, unique=True))
    inside = st.one_of(st.sampled_from([0.0, 0.5]), st.floats(1e-6, 1 - 1e-6))
    return [(leaf + draw(inside)) / 2**depth for leaf in leaves] + [1.0]


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("depth", [0, 1, 5, 12])
@pytest.mark.parametrize("basis", BASES)
@settings(max_examples=10)
@given(data=st.data(), length=st.floats(0.01, 50))
def test_the_law_is_exact_at_places_in_different_leaves(basis, depth, together, data, length):
    """Cov(W_s, W_t) = min; Cov(W_s, I_t) = int_0^t min(s, u) du; Cov(I_s, I_t) is the integral of that over s."""
    places = data.draw(one_place_a_leaf(depth))
    got = covariance(Tree(basis, length, depth, together), places)
    t = length * np.array(places)
    s, u = t[:, None], t[None]
    low, high = np.minimum(s, u), np.maximum(s, u)
    np.testing.assert_allclose(got[0, :, 0], low, rtol=1e-9, atol=1e-12 * length)
    if basis.size == 2:
        cross = np.where(u <= s, u**2 / 2, s**2 / 2 + s * (u - s))
        np.testing.assert_allclose(got[0, :, 1], cross, rtol=1e-9, atol=1e-12 * length**2)
        both = low**3 / 3 + (high - low) * low**2 / 2
        np.testing.assert_allclose(got[1, :, 1], both, rtol=1e-9, atol=1e-12 * length**3)


@pytest.mark.parametrize("basis", BASES)
def test_at_every_single_time_the_law_is_exact_at_any_depth(basis):
    for depth in (0, 3):
        for x in np.linspace(0, 1, 41):
            got = covariance(Tree(basis, 1.0, depth, 1), [x])
            expected = np.array([[x, x**2 / 2], [x**2 / 2, x**3 / 3]])[: basis.size, : basis.size]
            np.testing.assert_allclose(got[:, 0, :, 0], expected, atol=1e-14)


@pytest.mark.parametrize("basis", BASES)
def test_the_integral_is_the_integral_of_the_path(basis):
    """The functions of I are the primitives of those of W; those of an interval with known ends vanish there."""
    x = np.linspace(0, 1, 2001)
    middle = (x[1:] + x[:-1]) / 2
    if basis.size == 2:
        for functions in (basis.root, basis.node):
            primitive = np.cumsum(functions(middle)[0], axis=1) / 2000
            np.testing.assert_allclose(functions(x)[1][:, 1:], primitive, atol=1e-6)
    assert np.abs(basis.node(np.array([0.0, 1.0]))).max() == 0
    assert np.abs(basis.leaf(np.array([0.0, 1.0]))).max() == 0


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("basis", BASES)
def test_levels_without_weight_are_left_out(basis, together):
    """At the ends of the intervals of level k, the first k levels decide."""
    tree = Tree(basis, 1.0, 9, together)
    for k in range(10):
        groups, weights = tree.at(3 / 2**k if k > 1 else 1.0 - k / 2)
        assert len(groups) == -(-k // together)
        assert weights.shape == (basis.size, basis.size * (1 + len(groups) * tree.nodes))
    assert len(tree.at(0.3)[0]) == tree.groups == -(-10 // together)


# The numbers


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("event", [(), (9,), (700,), (3, 40, 40)])
def test_a_path_is_the_weighted_sum_of_the_numbers_of_its_groups(basis, event):
    """Each group drawn again by itself, the place asked in the middle of others."""
    shape, depth, seed = torch.Size((3, *event)), 6, 5
    paths = Paths(basis, 2.0, depth, seed=seed, shape=shape, first_row=0)
    asked = [0.3, 0.31, 0.9, 0.0, 1.0, 0.305, 0.5]
    values = {x: paths.at(x) for x in asked}
    blocks, tree = Blocks.of(shape, 0), paths._tree
    offsets = [1]
    for depth in range(tree.groups):
        offsets.append(offsets[-1] + 2 ** (depth * tree.together))

    def numbers(block, number, count):
        generator = torch.Generator().manual_seed((mix(seed, block) + number) % 2**32)
        drawn = torch.empty(count * basis.size, blocks.entries).normal_(generator=generator)
        return drawn.double()

    for x in asked:
        groups, weights = tree.at(x)
        stacks = []
        for block in blocks.numbers:
            parts = [numbers(block, 0, 1)]
            parts += [numbers(block, offsets[depth] + group, tree.nodes) for depth, group in enumerate(groups)]
            stacks.append(weights @ torch.cat(parts))
        torch.testing.assert_close(blocks.rows_of(torch.stack(stacks)), values[x], rtol=1e-12, atol=1e-12)


def test_small_events_are_drawn_several_levels_at_a_time_and_large_ones_level_by_level():
    together = {
        size: Paths(Increments(), 1.0, 6, seed=0, shape=torch.Size((2, size)), first_row=0)._tree.together
        for size in (1, 2, 5, 16, 3072)
    }
    assert together == {1: 4, 2: 3, 5: 2, 16: 1, 3072: 1}


def test_a_path_is_the_same_in_float32_up_to_rounding():
    for path in (BrownianPath(4, 0.0, 1.0), BrownianPath(4, 0.0, 1.0, integrals=True)):
        double, single = path.open(), path.open()
        for t, s in ((0.9, 0.4), (0.4, 0.399), (0.1, 0.7)):
            wide = double.increment(empty(5, 3), at(t), at(s))
            assert torch.equal(single.increment(empty(5, 3).float(), at(t), at(s)), wide.float())


def test_a_stream_of_a_path_goes_on_with_other_rows_and_shapes():
    """A path is a function of the row and the time; what was asked for other shapes does not matter."""
    path = BrownianPath(4, 0.0, 1.0)
    stream = path.open(3)
    for x in (empty(5, 3), empty(2, 3), empty(4), empty(5, 3)):
        assert torch.equal(stream.value(x, at(0.3)), path.open(3).value(x, at(0.3)))


# Values and increments


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


@settings(max_examples=25)
@given(grid=time_grids(max_steps=20), seed=st.integers(0, 2**40), rising=st.booleans())
def test_the_integrals_of_a_fine_grid_add_up_to_those_of_a_coarse_one(grid, seed, rising):
    """int_t^u (W - W(t)) = int_t^s (W - W(t)) + int_s^u (W - W(s)) + (W(s) - W(t)) |u - s|, in either direction."""
    grid = grid.flip(0) if rising else grid
    path, x = BrownianPath(seed, 0.0, 1.0, depth=30, integrals=True), empty(3, 2)
    stream, moved, total = path.open(), empty(3, 2), empty(3, 2)
    for t, s in pairwise(grid):
        increment, integral = stream.increment_and_integral(x, t, s)
        total = total + integral + moved * abs(s - t)
        moved = moved + increment
    increment, integral = path.open().increment_and_integral(x, grid[0], grid[-1])
    torch.testing.assert_close(moved, increment, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(total, integral, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(increment, path.open().increment(x, grid[0], grid[-1]))


def test_an_integral_is_the_limit_of_riemann_sums_of_the_path():
    """Their gap has variance |s - t|^3 / (12 n^2); 6 standard deviations, both directions."""
    stream, x = BrownianPath(1, 0.0, 1.0, integrals=True).open(), empty(4)
    n = 1000
    for t, s in ((0.2, 0.71), (0.71, 0.2)):
        edges = torch.linspace(t, s, n + 1, dtype=F64)
        w = torch.stack([stream.value(x, u) for u in edges])
        riemann = ((w[1:] + w[:-1]) / 2 - w[0]).sum(0) * abs(s - t) / n
        _, integral = stream.increment_and_integral(x, at(t), at(s))
        assert (integral - riemann).abs().max() < 6 * math.sqrt(abs(s - t) ** 3 / 12) / n


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.4), (0.31, 0.33), (1e-3, 0.0)])
def test_increment_and_integral_have_their_joint_law(t, s):
    """Through the generators: 20000 rows, covariance [[h, h^2/2], [h^2/2, h^3/3]] within 5 standard errors."""
    rows, h = 20_000, abs(t - s)
    stream = BrownianPath(2, 0.0, 1.0, integrals=True).open()
    pair = torch.stack(stream.increment_and_integral(empty(rows), at(t), at(s)))
    scaled = pair / torch.tensor([[h**0.5], [h**1.5]], dtype=F64)
    expected = torch.tensor([[1, 1 / 2], [1 / 2, 1 / 3]], dtype=F64)
    error = ((expected.diagonal()[:, None] * expected.diagonal()[None] + expected**2) / rows).sqrt()
    assert bool(((scaled @ scaled.T / rows - expected).abs() < 5 * error).all())


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
    stream, x = BrownianPath(3, 0.0, 1.0, depth=20).open(), empty(4, 2)
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


def test_a_scheme_with_integrals_on_one_path_agrees_to_a_higher_order():
    """dx = -x dt + dw: with the integral, the gap between n and 2n steps on the same paths falls as 1 / n^2."""
    path, x0 = BrownianPath(5, 0.0, 1.0, integrals=True), torch.ones(500, 1, dtype=F64)

    def end(n):
        stream, x = path.open(), x0
        for t, s in pairwise(torch.linspace(0, 1, n + 1, dtype=F64)):
            h = s - t
            increment, integral = stream.increment_and_integral(x, t, s)
            x = x - x * (h - h**2 / 2) + increment - integral
        return x

    gaps = [(end(n) - end(2 * n)).square().mean().sqrt().item() for n in (8, 16, 32)]
    assert 3.6 < gaps[0] / gaps[1] < 4.6
    assert 3.6 < gaps[1] / gaps[2] < 4.6


# Refusals


def test_a_path_refuses_times_outside_its_span_and_accepts_its_ends():
    stream, x = BrownianPath(0, 0.25, 0.5).open(), empty(1, 1)
    stream.value(x, at(0.25)), stream.value(x, at(0.5))
    for t in (0.2499, 0.5001):
        with pytest.raises(TimeError, match=rf"\[0.25, 0.5\].*t = {t}"):
            stream.value(x, at(t))


def test_a_path_gives_no_time_integral_unless_asked_and_no_times_per_row():
    stream, x = BrownianPath(0, 0.0, 1.0).open(), empty(2, 1)
    with pytest.raises(CapabilityError, match=r"BrownianPath\(..., integrals=True\).*seed=\.\.\."):
        stream.increment_and_integral(x, at(0.0), at(1.0))
    with pytest.raises(CapabilityError, match="per-row times need RowNoise"):
        stream.value(x, at([0.0, 1.0]))


@pytest.mark.parametrize("ask", ["unit", "increment", "increment_and_integral"])
def test_a_path_refuses_steps_shorter_than_a_leaf(ask):
    stream, x = BrownianPath(0, 0.0, 2.0, depth=4, integrals=True).open(), empty(2, 1)
    for t in (0.0, 0.3, 1.875):
        getattr(stream, ask)(x, at(t), at(t + 0.125))
        with pytest.raises(OptionError, match=r"shorter than 0.125, .*a depth above 4"):
            getattr(stream, ask)(x, at(t + 0.12), at(t))
    assert torch.equal(stream.increment(x, at(0.3), at(0.3)), x)


@pytest.mark.parametrize("depth", [-1, 31, 2.5, None])
def test_a_path_refuses_a_depth_that_is_none(depth):
    with pytest.raises(OptionError, match="whole depth from 0 to 30"):
        BrownianPath(0, 0.0, 1.0, depth=depth)
