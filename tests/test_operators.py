"""Linear maps: each against its matrix written out by hand, its adjoint against the transpose."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sdediff as sd
from sdediff.operators import Convolution, Downsample, LinearOperator, Mask, Matrix, as_operator, check_adjoint

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def convolution_by_hand(kernel, event, boundary):
    """`M[i, n] = sum_j k[j]` over j with i - (j - centre) = n, where indices outside wrap round or are dropped."""
    lead, sizes = event[: len(event) - kernel.ndim], event[len(event) - kernel.ndim :]
    inner = torch.zeros(*sizes, *sizes, dtype=F64)
    for i in itertools.product(*map(range, sizes)):
        for j in itertools.product(*map(range, kernel.shape)):
            n = [a - (b - k // 2) for a, b, k in zip(i, j, kernel.shape, strict=True)]
            if boundary == "zero" and any(not 0 <= a < s for a, s in zip(n, sizes, strict=True)):
                continue
            n = tuple(a % s for a, s in zip(n, sizes, strict=True))
            inner[(*i, *n)] += kernel[j]
    size = math.prod(sizes)
    return torch.kron(torch.eye(math.prod(lead), dtype=F64), inner.reshape(size, size))


def downsample_by_hand(factors, event):
    lead, sizes = event[: len(event) - len(factors)], event[len(event) - len(factors) :]
    matrix = torch.eye(math.prod(lead), dtype=F64)
    for n, f in zip(sizes, factors, strict=True):
        block = torch.zeros(n // f, n, dtype=F64)
        for i in range(n):
            block[i // f, i] = 1 / f
        matrix = torch.kron(matrix, block)
    return matrix


@st.composite
def operators(draw):
    """An operator and its matrix."""
    event = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    seed = draw(st.integers(0, 1000))
    size = math.prod(event)
    kind = draw(st.sampled_from(["matrix", "mask", "circular", "zero", "downsample", "function"]))
    if kind in ("matrix", "function"):
        matrix = drawn(draw(st.integers(1, 5)), size, seed=seed)
        if kind == "matrix":
            return Matrix(matrix, event), matrix
        return LinearOperator(lambda x: (x.flatten(1) @ matrix.T)[:, None], event=event), matrix
    if kind == "mask":
        seen = drawn(*event, seed=seed) > 0
        seen.reshape(-1)[draw(st.integers(0, size - 1))] = True
        return Mask(seen), torch.eye(size, dtype=F64)[seen.reshape(-1)]
    if kind == "downsample":
        axes = draw(st.integers(1, len(event)))
        factors = tuple(draw(st.sampled_from([f for f in (1, 2, 3, 4) if n % f == 0])) for n in event[-axes:])
        return Downsample(factors, event), downsample_by_hand(factors, event)
    axes = draw(st.integers(1, min(2, len(event))))
    odd = (1, 3, 5, 7) if kind == "zero" else (1, 3)
    shape = tuple(draw(st.sampled_from([k for k in odd if kind == "zero" or k <= n])) for n in event[-axes:])
    kernel = drawn(*shape, seed=seed)
    return Convolution(kernel, event, kind), convolution_by_hand(kernel, event, kind)


@given(operators(), st.integers(0, 1000))
def test_every_operator_is_its_matrix_and_its_adjoint_the_transpose(pair, seed):
    operator, matrix = pair
    assert operator.event == tuple(operator.event)
    x, z = drawn(3, *operator.event, seed=seed), drawn(3, *operator.measured, seed=seed + 1)
    torch.testing.assert_close(operator(x).flatten(1), x.flatten(1) @ matrix.T)
    torch.testing.assert_close(operator.adjoint(z).flatten(1), z.flatten(1) @ matrix)
    assert operator(x).shape == (3, *operator.measured)
    assert operator.adjoint(z).shape == x.shape
    torch.testing.assert_close(operator.dense(), matrix)
    check_adjoint(operator)


@given(operators(), st.integers(0, 1000))
def test_composition_is_the_product_of_matrices(pair, seed):
    first, matrix = pair
    outer = drawn(2, math.prod(first.measured), seed=seed)
    both = Matrix(outer, first.measured) @ first
    assert both.event == first.event
    torch.testing.assert_close(both.dense(), outer @ matrix)
    check_adjoint(both)


def test_a_row_does_not_know_its_batch_and_keeps_its_dtype():
    event = (2, 4, 6)
    for operator in (
        Matrix(drawn(5, 48), event),
        Mask(drawn(*event) > 0),
        Convolution(drawn(3, 3), event),
        Downsample((2, 3), event),
    ):
        for dtype in (torch.float32, F64):
            x = drawn(5, *event).to(dtype)
            z = operator(x)
            assert z.dtype == operator.adjoint(z).dtype == dtype
            assert torch.equal(operator(x[2:3]), z[2:3])
            assert torch.equal(operator.adjoint(z[2:3]), operator.adjoint(z)[2:3])
            assert operator(x[:0]).shape == (0, *operator.measured)


def test_a_mask_gives_the_seen_entries_in_order_and_puts_them_back():
    seen = torch.tensor([[True, False, True], [False, False, True]])
    mask = Mask(seen)
    picture = torch.arange(6.0).reshape(1, 2, 3)
    assert mask(picture).tolist() == [[0, 2, 5]]
    assert mask.adjoint(mask(picture)).tolist() == [[[0, 0, 2], [0, 0, 5]]]


def test_a_shifted_spike_shows_which_way_a_kernel_points():
    spike = torch.tensor([[0.0, 0, 1, 0, 0]])
    assert Convolution(torch.tensor([1.0, 2, 3]), (5,))(spike).tolist() == [[0, 1, 2, 3, 0]]
    ends = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert Convolution(torch.tensor([1.0, 2, 3]), (5,))(ends).tolist() == [[2, 3, 0, 0, 1]]
    assert Convolution(torch.tensor([1.0, 2, 3]), (5,), "zero")(ends).tolist() == [[2, 3, 0, 0, 0]]


def test_a_derived_adjoint_works_in_every_mode_and_can_be_differentiated():
    matrix = drawn(3, 4)
    operator = LinearOperator(lambda x: x @ matrix.T, event=(4,))
    assert operator.measured == (3,)
    z = drawn(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(operator.adjoint(z), z @ matrix)
    with torch.inference_mode():
        torch.testing.assert_close(operator.adjoint(drawn(2, 3)), z @ matrix)
    with torch.inference_mode():
        made = drawn(2, 3)
    torch.testing.assert_close(operator.adjoint(made), z @ matrix)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(operator.adjoint(z).square().sum(), z)
    torch.testing.assert_close(slope, 2 * z @ matrix @ matrix.T)
    assert LinearOperator(lambda x: x[:, :2], event=(4,), measured=(2,)).measured == (2,)


def test_anything_meant_becomes_an_operator():
    operator = Downsample(2, (4,))
    assert as_operator(operator) is operator
    assert isinstance(as_operator(drawn(2, 4)), Matrix)
    assert isinstance(as_operator(torch.tensor([True, False])), Mask)
    assert repr(operator) == "Downsample from (4,) to (2,)"


def test_a_number_is_an_event_of_one_axis():
    for operator in (Downsample(2, 4), Convolution(torch.ones(3), 4), LinearOperator(lambda x: x, event=4)):
        assert operator.event == (4,)
    assert Matrix(drawn(2, 4), 4).event == (4,)


SPIKED = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
MATRIX = drawn(4, 4)


@pytest.mark.parametrize(
    ("forward", "adjoint"),
    [
        (lambda x: 2 * x, lambda z: 2.001 * z),
        (lambda x: x.cumsum(1), lambda z: z.cumsum(1)),
        (lambda x: x @ MATRIX.T, lambda z: z @ MATRIX.T),
        (lambda x: x @ MATRIX.T, lambda z: -z @ MATRIX),
        (Convolution(SPIKED, (4,)), Convolution(SPIKED, (4,))),
        (lambda x: x.roll(1, 1), lambda z: z.roll(1, 1)),
    ],
)
def test_wrong_adjoints_are_refused_with_both_numbers(forward, adjoint):
    with pytest.raises(sd.OptionError, match=r"<A x, z> is -?[\d.]+ but <x, A\^T z> is -?[\d.]+.*transposes") as caught:
        check_adjoint(LinearOperator(forward, adjoint, event=(4,)))
    numbers = [float(n) for n in re.findall(r" is (-?\d+(?:\.\d+)?)", str(caught.value))]
    assert len(set(numbers)) == 2


@pytest.mark.parametrize("forward", [lambda x: x + 1, torch.sin, torch.relu, lambda x: x * x.abs().mean(1)[:, None]])
def test_maps_that_are_not_linear_are_refused(forward):
    with pytest.raises(sd.OptionError, match=r"not linear: .*<A\(2 x - 3 y\), z> is .* but .* is .*offset"):
        check_adjoint(LinearOperator(forward, event=(4,)))


def test_float32_operators_pass_in_their_own_precision():
    matrix = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    operator = LinearOperator(lambda x: x @ matrix.T, lambda z: z @ matrix, event=(40,))
    check_adjoint(operator, torch.empty(0))
    wrong = LinearOperator(lambda x: x @ matrix.T, lambda z: 1.01 * z @ matrix, event=(40,))
    with pytest.raises(sd.OptionError, match="not that of A"):
        check_adjoint(wrong, torch.empty(0))


def x(*shape):
    return torch.zeros(shape, dtype=F64)


BAD = [
    (lambda: Matrix(x(3)), sd.ShapeError, r"\(m, n\).*\(3,\)"),
    (lambda: Matrix(torch.ones(2, 2, dtype=torch.int64)), sd.ShapeError, r"floating-point.*int64"),
    (lambda: Matrix(x(2, 6), (2, 2)), sd.ShapeError, r"6 entries.*\(2, 2\) has 4"),
    (lambda: Mask(x(3)), sd.ShapeError, r"float64.*mask\.bool\(\)"),
    (lambda: Mask([True]), sd.ShapeError, r"got list"),
    (lambda: Mask(torch.zeros(3, dtype=torch.bool)), sd.OptionError, r"shows no entry"),
    (lambda: Convolution(x(4), (8,)), sd.OptionError, r"odd sizes.*\(4,\)"),
    (lambda: Convolution(x(3), (8,), "reflect"), sd.OptionError, r"'reflect'.*'circular' or 'zero'"),
    (lambda: Convolution(x(9), (8,)), sd.ShapeError, r"\(9,\) is larger than.*\(8,\)"),
    (lambda: Convolution(x(3, 3), (8,)), sd.ShapeError, r"\(3, 3\).*no more than.*\(8,\)"),
    (lambda: Downsample(3, (8,)), sd.ShapeError, r"\(3,\) do not tile.*\(8,\)"),
    (lambda: Downsample((2, 2), (8,)), sd.ShapeError, r"trailing axes of \(8,\).*\(2, 2\)"),
    (lambda: Downsample(0, (8,)), sd.ShapeError, r"factor >= 1.*\(0,\)"),
    (lambda: Downsample(2, (8,)) @ Downsample(2, (8,)), sd.ShapeError, r"B gives .*\(4,\).*A takes .*\(8,\)"),
    (lambda: LinearOperator(3, event=(2,)), sd.OptionError, r"forward must be a function.*int"),
    (lambda: LinearOperator(lambda x: x, x(2), event=(2,)), sd.OptionError, r"adjoint must be a function.*Tensor"),
    (lambda: LinearOperator(lambda x: x.sum(), event=(2,)), sd.ShapeError, r"\(batch, 2\).*batch of 2 gave \(\)"),
    (lambda: LinearOperator(lambda x: 1, event=(2,)), sd.ShapeError, r"gave int"),
    (lambda: Mask(torch.ones(3, dtype=torch.bool))(x(2, 4)), sd.ShapeError, r"takes x of .*\(batch, 3\).*\(2, 4\)"),
    (lambda: Downsample(2, (4,)).adjoint(x(2, 4)), sd.ShapeError, r"takes z of .*\(batch, 2\).*\(2, 4\)"),
    (lambda: LinearOperator(lambda x: x.detach(), event=(2,)).adjoint(x(1, 2)), sd.OptionError, r"cannot follow.*give"),
    (lambda: check_adjoint(LinearOperator(lambda x: x, lambda z: z[:, :1], event=(2,))), sd.ShapeError, r"\(3, 2\)"),
    (lambda: as_operator(lambda x: x), sd.OptionError, r"LinearOperator\(A, event=\(\.\.\.\)\)"),
    (lambda: Downsample(2.0, (4,)), sd.ShapeError, r"factors must be whole numbers.*got 2\.0"),
    (lambda: Convolution(x(3), "8"), sd.ShapeError, r"event must be whole numbers.*got '8'"),
    (lambda: LinearOperator(lambda x: x @ x, event=3), sd.OptionError, r"\(batch, 3\).*float64, made it fail: mat1"),
    (lambda: as_operator("blur"), sd.OptionError, r"bool mask, .*; got str"),
]


@pytest.mark.parametrize(("call", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input_gets_a_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call()
