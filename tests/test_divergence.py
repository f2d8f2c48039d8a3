"""Traces of Jacobians that are known, and the laws of the probes."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sdediff as sd
from sdediff import divergence as module
from sdediff.divergence import Exact, Expansion, Hutchinson, divergence_for, vector_jacobian
from sdediff.errors import CapabilityError, OptionError

F64 = torch.float64
DISTRIBUTIONS = ["rademacher", "gaussian", "sphere", "orthogonal"]


def variance_of(distribution, matrix):
    """Of one form `e^T M e`."""
    S, size = (matrix + matrix.T) / 2, len(matrix)
    squares = S.square().sum()
    if distribution == "sphere":
        return 2 * size / (size + 2) * (squares - S.trace() ** 2 / size)
    return 2 * squares - (2 * S.diagonal().square().sum() if distribution != "gaussian" else 0)


def drawn(distribution, seed, rows, places, k, size):
    return Hutchinson(k, distribution).draw(torch.empty(len(rows), size, dtype=F64), seed, rows, places).numpy()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def field_of(matrix):
    """`sin(M x)` of flattened events, with the state itself as the extra; its Jacobian is `diag(cos(M x)) M`."""

    def field(x):
        flat = x.reshape(len(x), -1)
        return (flat @ matrix.T).sin().reshape(x.shape), 3 * x

    return field


def jacobian_of(matrix, x):
    flat = x.reshape(len(x), -1)
    return (flat @ matrix.T).cos()[:, :, None] * matrix


def estimates(divergence, field, x, seed=0, first=0):
    expansion = divergence.expand(field, x)
    rows = first + np.arange(len(x))
    return divergence.estimate(expansion, divergence.draw(x, seed, rows, np.zeros_like(rows)))


# Exact


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("event", [(), (1,), (5,), (2, 3), (3, 2, 2)])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_the_trace_is_exact_in_both_modes_for_any_event_and_chunk(mode, event, chunk):
    size = math.prod(event)
    matrix, x = normal(size, size), normal(4, *event, seed=1)
    divergence = Exact(chunk, mode)
    jacobian = jacobian_of(matrix, x)
    expansion = divergence.expand(field_of(matrix), x)
    vectors = divergence.draw(x, 0, np.arange(4), np.zeros(4, dtype=int))
    assert vectors.shape == (size, 4, *event)
    found = divergence.estimate(expansion, vectors)
    assert found.shape == (1, 4)
    torch.testing.assert_close(found[0], jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expansion.value, field_of(matrix)(x)[0])
    torch.testing.assert_close(expansion.extra, 3 * x)
    assert (divergence.count, divergence.random, divergence.part_of_variance(size)) == (1, False, 1.0)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_products_are_vectors_times_the_jacobian_or_the_jacobian_times_vectors(mode):
    matrix, x, vectors = normal(6, 6), normal(4, 2, 3, seed=1), normal(5, 4, 2, 3, seed=2)
    jacobian = jacobian_of(matrix, x)
    wanted = "bij,kbi->kbj" if mode == "reverse" else "bij,kbj->kbi"
    products = Exact(mode=mode).expand(field_of(matrix), x).products(vectors)
    torch.testing.assert_close(products.flatten(2), torch.einsum(wanted, jacobian, vectors.flatten(2)))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_probes_are_the_same_forms_for_every_chunk(mode):
    matrix, x = normal(12, 12), normal(4, 3, 4, seed=1)
    whole = estimates(Hutchinson(7, "gaussian", mode=mode), field_of(matrix), x)
    assert whole.shape == (7, 4)
    for chunk in (1, 3):
        part = estimates(Hutchinson(7, "gaussian", mode=mode, chunk=chunk), field_of(matrix), x)
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)


def test_chunks_have_the_size_asked_for_and_else_bounded_entries():
    vectors = torch.zeros(10, 4, 5)
    assert [len(part) for part in Exact(3).chunks(vectors)] == [3, 3, 3, 1]
    assert [len(part) for part in Exact().chunks(vectors)] == [10]
    large = torch.zeros(10, 1000, 1).expand(10, 1000, 6)
    assert [len(part) for part in Exact().chunks(large)] == [2] * 5  # 16384 // 6000
    assert [len(part) for part in Exact().chunks(torch.zeros(3, 1, 1).expand(3, 100, 1000))] == [1] * 3


def test_what_is_automatic():
    assert divergence_for("auto", 128) == divergence_for("exact", 129) == Exact()
    assert divergence_for("auto", 129) == Hutchinson(8, "orthogonal")


# The laws of the forms


def drawn_forms(matrix, distribution, count, probes=1, seed=0):
    """Forms `e^T M e` of many rows, `(probes, count)`."""
    vectors = drawn(distribution, seed, np.arange(count), np.zeros(count, dtype=int), probes, len(matrix))
    return np.einsum("kri,ij,krj->kr", vectors, matrix.numpy(), vectors)


MATRICES = {"symmetric": normal(6, 6, seed=3) + normal(6, 6, seed=3).T, "not symmetric": normal(6, 6, seed=4)}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_forms_are_unbiased_with_the_variance_that_the_table_states(distribution, matrix):
    """20,000 rows; both bounds are 4.5 standard errors."""
    variance = variance_of(distribution, matrix)
    forms = drawn_forms(matrix, distribution, 20_000)[0]
    assert abs(forms.mean() - matrix.trace()) < 4.5 * (variance / 20_000) ** 0.5
    kurtosis = ((forms - forms.mean()) ** 4).mean() / forms.var() ** 2
    assert abs(forms.var() / variance.item() - 1) < 4.5 * ((kurtosis - 1) / 20_000) ** 0.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [2, 4])
def test_the_mean_of_k_forms_has_the_stated_part_of_the_variance(distribution, k):
    """20,000 rows; 4.5 standard errors, also for the covariance that a sample without replacement has."""
    matrix = MATRICES["not symmetric"]
    one = variance_of(distribution, matrix)
    means = drawn_forms(matrix, distribution, 20_000, k).mean(0)
    wanted = one.item() / k * Hutchinson(k, distribution).part_of_variance(6)
    if (
        distribution == "orthogonal"
    ):  # the variance of a population of 8 that (1 - k / 8) / k goes with has the divisor 7
        wanted *= 8 / 7
    kurtosis = ((means - means.mean()) ** 4).mean() / means.var() ** 2
    assert abs(means.var() / wanted - 1) < 4.5 * ((kurtosis - 1) / 20_000) ** 0.5
    assert abs(means.mean() - matrix.trace()) < 4.5 * (wanted / 20_000) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_all_hadamard_vectors_average_to_the_trace(size):
    order = module._order(size)
    assert order >= size > order / 2
    matrix = normal(size, size, seed=size)
    vectors = drawn("orthogonal", 5, np.arange(20), np.arange(20), order, size)
    assert np.array_equal(np.abs(vectors), np.ones((order, 20, size)))
    forms = np.einsum("kri,ij,krj->kr", vectors, matrix.numpy(), vectors)
    np.testing.assert_allclose(forms.mean(0), matrix.trace().item(), rtol=1e-10, atol=1e-10)
    # Columns are orthogonal always, rows where the size is the order.
    np.testing.assert_allclose(np.einsum("kri,krj->rij", vectors, vectors), np.tile(order * np.eye(size), (20, 1, 1)))


@pytest.mark.parametrize("size", [4, 16, 64])
def test_hadamard_vectors_of_a_row_are_orthogonal(size):
    k = min(size, 8)
    vectors = drawn("orthogonal", 5, np.arange(30), np.arange(30), k, size)
    np.testing.assert_allclose(np.einsum("kri,lri->rkl", vectors, vectors), np.tile(size * np.eye(k), (30, 1, 1)))


def test_hadamard_vectors_of_large_sizes_are_rows_of_hadamards_matrix():
    """Row r times row s is row r xor s; products of vectors are free of the shared signs. Size 70,000 needs 17 bits."""
    size = 70_000
    vectors = drawn("orthogonal", 5, np.arange(2), np.arange(2), 3, size)
    for row in range(2):
        character = vectors[0, row] * vectors[1, row]
        r = sum(1 << bit for bit in range(17) if character[0] * character[1 << bit] < 0)
        parity = np.array([bin(r & c).count("1") % 2 for c in range(0, size, 97)])
        assert r > 0
        assert np.array_equal(character[::97], 1.0 - 2 * parity)


def test_k_of_the_hadamard_forms_are_a_simple_random_sample():
    """Each of the m rows is chosen equally often, and each pair; chi-squared tests at 1e-4."""
    size, k, count = 8, 3, 8000
    vectors = drawn("orthogonal", 2, np.arange(count), np.zeros(count, dtype=int), size, size)
    # The place of each row of the matrix among those drawn, from products with the first: what is drawn k at a time.
    hadamard = np.array([[(-1) ** bin(r & c).count("1") for c in range(size)] for r in range(size)])
    signs = np.sign(vectors[:, :, :1])  # column 0 of Hadamard's matrix is 1: the shared sign of entry 0
    assert np.array_equal(signs, np.broadcast_to(signs[:1], signs.shape))
    relative = vectors[:k] * vectors[:1]
    chosen = np.argmax(np.einsum("krc,hc->krh", relative, hadamard), axis=2)  # r_0 xor r_i
    assert (chosen[0] == 0).all()
    pairs = chosen[1] * size + chosen[2]
    table = np.bincount(pairs, minlength=size * size).reshape(size, size)
    possible = [(a, b) for a in range(1, size) for b in range(1, size) if a != b]
    assert table.sum() == sum(table[a, b] for a, b in possible)
    assert stats.chisquare([table[a, b] for a, b in possible]).pvalue > 1e-4


def test_the_signs_that_the_vectors_share_are_fair_and_independent():
    vectors = drawn("orthogonal", 2, np.arange(4000), np.zeros(4000, dtype=int), 2, 6)
    for part in vectors:
        assert np.abs(part.T @ part / 4000 - np.eye(6)).max() < 4.5 / 4000**0.5
        assert np.abs(part.mean(0)).max() < 4.5 / 4000**0.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes_depend_on_seed_row_and_place_only(distribution):
    hutchinson, x = Hutchinson(3, distribution), torch.zeros(6, 4, 10, dtype=F64)
    rows, place = np.arange(6) + 4, np.array([0, 3, 1, 1, 0, 2])
    whole = hutchinson.draw(x, 9, rows, place)
    assert whole.shape == (3, 6, 4, 10)
    for row in range(6):
        alone = hutchinson.draw(x[:1], 9, rows[row : row + 1], place[row : row + 1])
        assert torch.equal(alone[:, 0], whole[:, row])
    for other in (hutchinson.draw(x, 8, rows, place), hutchinson.draw(x, 9, rows + 6, place),
                  hutchinson.draw(x, 9, rows, place + 4)):  # fmt: skip
        for k in range(3):
            for row in range(6):
                assert not torch.equal(other[k, row], whole[k, row])
    flat = whole.transpose(0, 1).reshape(18, 40)
    assert len({tuple(v.tolist()) for v in flat}) == 18


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_of_a_row_are_independent(distribution):
    vectors = drawn(distribution, 2, np.arange(4000), np.zeros(4000, dtype=int), 4, 5)
    table = vectors.transpose(1, 0, 2).reshape(4000, 20)
    assert np.abs(table.T @ table / 4000 - np.eye(20)).max() < 5 * 2**0.5 / 4000**0.5
    assert len(np.unique(vectors[:, :, 0] if distribution == "gaussian" else np.abs(vectors))) == (
        16000 if distribution == "gaussian" else 1
    )


def test_as_many_probes_as_entries_are_the_exact_trace():
    assert Hutchinson(6, chunk=2, mode="forward").resolve(6) == Exact(2, "forward")
    assert Hutchinson(7).resolve(6) == Exact()
    few = Hutchinson(5)
    assert few.resolve(6) is few
    assert Exact(3).resolve(2) == Exact(3)


def test_the_part_of_the_variance():
    assert Hutchinson(3, "orthogonal").part_of_variance(6) == pytest.approx(1 - 3 / 8)
    assert Hutchinson(3, "orthogonal").part_of_variance(8) == pytest.approx(1 - 3 / 8)
    assert Hutchinson(3, "orthogonal").part_of_variance(9) == pytest.approx(1 - 3 / 16)
    assert Hutchinson(3).part_of_variance(6) == Hutchinson(3, "gaussian").part_of_variance(6) == 1


# Networks


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 12)

    def forward(self, x, t):
        q, k, v = (part[:, None] for part in self.inner(x).chunk(3, dim=-1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0] + t[:, None, None] * x


def attention():
    torch.manual_seed(0)
    return Attention().double()


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_attention_is_differentiated_in_both_modes(mode):
    network, x = attention(), normal(3, 5, 4)
    field = lambda x: (network(x, torch.ones(len(x), dtype=F64)), x)  # noqa: E731
    with torch.no_grad():
        found = estimates(Exact(mode=mode), field, x)[0]
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda one: field(one[None])[0][0], x[row])
        assert found[row].item() == pytest.approx(jacobian.reshape(20, 20).trace().item(), rel=1e-9)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_likelihoods_through_attention_have_gradients(mode):
    model = sd.ScoreModel(attention(), sd.VP(), "edm", sigma_data=1.0)
    x = (0.3 * normal(2, 5, 4)).requires_grad_()
    options = {"steps": 4, "divergence": Hutchinson(2, mode=mode), "seed": 0, "differentiable": True}
    value = sd.log_prob(model, x, **options).value
    (slope,) = torch.autograd.grad(value.sum(), x)
    direction = normal(2, 5, 4, seed=5)
    with torch.no_grad():
        plus, minus = (sd.log_prob(model, x + h * direction, **options).value.sum() for h in (1e-5, -1e-5))
    assert (slope * direction).sum().item() == pytest.approx((plus - minus).item() / 2e-5, rel=1e-6)


class Backward(torch.autograd.Function):
    """A sine without forward mode, whose backward pass cannot be batched or differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(x.detach().numpy().copy()).cos()


def test_networks_without_batched_backward_fall_back_to_a_loop():
    x = normal(3, 4).requires_grad_()
    basis = Exact().draw(x.detach(), 0, np.arange(3), np.arange(3))
    products = vector_jacobian(Backward.apply(x), x, basis)
    torch.testing.assert_close((products * basis).sum((0, 2)), x.cos().sum(1))


def test_forward_mode_refuses_networks_without_it():
    x = normal(3, 4)
    with torch.no_grad(), pytest.raises(CapabilityError, match=r"no derivative in forward mode.*mode='reverse'"):
        estimates(Exact(mode="forward"), lambda x: (Backward.apply(x), x), x)
    with pytest.raises(CapabilityError, match="mode='reverse'"):
        sd.log_prob(
            sd.ScoreModel(lambda x, t: Backward.apply(x), sd.VP(), "v"), x, divergence=Exact(mode="forward"), steps=3
        )


class NoSecond(Backward):
    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("derivative for no_second is not implemented")
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_a_second_derivative_that_is_missing_is_named():
    model, x = sd.ScoreModel(lambda x, t: NoSecond.apply(x), sd.VP(), "v"), normal(3, 4)
    assert sd.log_prob(model, x, steps=3).value.isfinite().all()
    with pytest.raises(CapabilityError, match=r"no_second is not implemented.*drop differentiable=True"):
        sd.log_prob(model, x, steps=3, differentiable=True)


def test_gradients_through_a_function_that_is_differentiable_once_are_refused():
    model, x = sd.ScoreModel(lambda x, t: Backward.apply(x), sd.VP(), "v"), normal(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sd.log_prob(model, x, steps=3, differentiable=True).value.sum().backward()


def test_the_graph_is_kept_only_where_gradients_are_enabled():
    matrix, x = normal(4, 4), normal(3, 4, seed=1).requires_grad_()
    with torch.no_grad():
        expansion = Exact().expand(field_of(matrix), x)
        assert not expansion.value.requires_grad
        assert not expansion.extra.requires_grad
        assert not expansion.products(torch.ones(1, 3, 4, dtype=F64)).requires_grad
    for mode in ("reverse", "forward"):
        divergence = Exact(mode=mode)
        (slope,) = torch.autograd.grad(estimates(divergence, field_of(matrix), x).sum(), x)
        h = 1e-6 * normal(3, 4, seed=2)
        with torch.no_grad():
            change = estimates(divergence, field_of(matrix), x + h) - estimates(divergence, field_of(matrix), x - h)
        torch.testing.assert_close((slope * h).sum(), change.sum() / 2, rtol=1e-5, atol=1e-12)


def test_a_field_that_does_not_depend_on_x_has_no_divergence():
    x = normal(3, 4)
    constant = lambda x: (torch.ones_like(x) + 0 * x, x)  # noqa: E731
    assert torch.equal(estimates(Exact(), constant, x), torch.zeros(1, 3, dtype=F64))
    flat = torch.zeros(3, 4, dtype=F64, requires_grad=True)
    value = torch.zeros(3, 4, dtype=F64, requires_grad=True) + 1
    assert not vector_jacobian(value, flat, torch.ones(2, 3, 4, dtype=F64)).any()


def test_probes_of_float32_states_are_float32():
    x = torch.zeros(2, 3)
    for divergence in (Exact(), *(Hutchinson(2, name) for name in DISTRIBUTIONS)):
        vectors = divergence.draw(x, 0, np.arange(2), np.arange(2))
        assert vectors.dtype == torch.float32
        assert isinstance(Expansion(x, x, lambda v: v), Expansion)


# Refusals


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Hutchinson(0), "a whole number of probes, at least one; got 0"),
        (
            lambda: Hutchinson(2, "cube"),
            r"Unknown distribution 'cube': write 'rademacher', 'gaussian', 'sphere', 'orthog",
        ),
        (lambda: Hutchinson(2, mode="both"), "Unknown mode 'both': write 'reverse' or 'forward'"),
        (lambda: Exact(mode="backward"), "Unknown mode 'backward'"),
        (lambda: Exact(0), "chunk must be at least 1, or None; got 0"),
        (lambda: Hutchinson(2, chunk=-1), "chunk must be at least 1"),
    ],
)
def test_bad_arguments_get_a_sentence(make, sentence):
    with pytest.raises(OptionError, match=sentence):
        make()


def test_they_say_what_they_are():
    assert repr(Hutchinson(3, "gaussian", chunk=2)) == "Hutchinson(3, 'gaussian')"
    assert repr(Exact()).startswith("Exact(")


def test_single_orthogonal_probes_of_successive_places_are_orthogonal():
    """Rows of one Hadamard matrix in turn, times the same signs; each by itself is a vector of fair signs."""
    places = np.arange(64)
    vectors = drawn("orthogonal", 3, np.full(64, 5), places, 1, 64)[0]
    assert np.array_equal(vectors @ vectors.T, 64 * np.eye(64))
    again = drawn("orthogonal", 3, np.full(2, 5), np.array([64, 3]), 1, 64)[0]
    assert np.array_equal(again, vectors[[0, 3]])
    many = drawn("orthogonal", 3, np.arange(4000), np.full(4000, 7), 1, 16)[0]
    assert np.abs(many.mean(0)).max() < 4.5 / 4000**0.5
    off = (many.T @ many / 4000)[~np.eye(16, dtype=bool)]
    assert np.abs(off).max() < 4.5 / 4000**0.5
