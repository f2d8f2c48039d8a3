r"""The divergence of a vector field: exact, or estimated by probes.

With J the Jacobian of a field of D entries at x, the divergence is its trace. For any vectors e_1, ..., e_k with
`E[e e^T] = I`, the quadratic forms `e_i^T J e_i` are unbiased estimates of it (Hutchinson), and for e_i the D basis
vectors their sum is exact.

| vectors | variance of one form | of the mean of k |
|---|---|---|
| Gaussian | `2 |S|_F^2`, S = (J + J^T) / 2 | / k |
| on the sphere `|e|^2 = D` | `2 D / (D + 2) (|S|_F^2 - tr(S)^2 / D)` | / k |
| Rademacher (signs) | `2 (|S|_F^2 - sum_j S_jj^2)` | / k |
| orthogonal | as Rademacher | (1 - k / m) / k, times m / (m - 1) |

Orthogonal vectors are k different rows of Hadamard's matrix of order m, the power of two not below D, drawn without
replacement, times signs that are shared by the k: the mean of all m forms is the trace itself, so that k of them are a
simple random sample of a population of m whose mean is wanted. Their entries are `(-1)^popcount(r & c)`. A single one
has no error bar to keep honest; there the rows of successive places are drawn without replacement, times the same
signs, so that along a path, where J changes slowly, they make up for each other.

The products `e^T J` are taken in reverse mode from one evaluation of the field, `J e` in forward mode from one
evaluation for every chunk of vectors, which needs no memory for a backward pass.

References: Hutchinson 1989; Grathwohl et al. 2019 (arXiv:1810.01367); Cochran, Sampling Techniques, 1977, chapter 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdediff.errors import CapabilityError, OptionError
from sdediff.keyed import Words, keyed_normals, keyed_signs, keyed_words
from sdediff.shapes import State

Numbers: TypeAlias = NDArray[np.integer[Any]]
Field: TypeAlias = Callable[[State], tuple[State, Tensor]]
"""`x -> (value, extra)`: the field, and whatever else its evaluation gives."""

_MODES = ("reverse", "forward")
_LOW = np.uint64(0xFFFFFFFF)
_EXACT_UP_TO = 128
_ENTRIES_AT_A_TIME = {True: 1 << 14, False: 1 << 22}
"""Of vectors on a CPU (more fall out of its caches), and elsewhere."""


@dataclass(frozen=True, eq=False)
class Expansion:
    """A field around a batch of points.

    Attributes:
        value: the field.
        extra: what came with it.
        products: from vectors `(k, batch, *event)` to `e^T J` (reverse mode) or `J e` (forward mode), of that shape.
    """

    value: State
    extra: Tensor
    products: Callable[[Tensor], Tensor]


class Divergence(ABC):
    """A way to take the divergence of a vector field.

    Attributes:
        mode: "reverse" or "forward".
        chunk: vectors taken at a time, which bounds the memory; None for as many as suit the batch.
    """

    mode: str
    chunk: int | None
    random: ClassVar[bool]

    @abstractmethod
    def draw(self, x: State, seed: int, rows: Numbers, place: Numbers) -> Tensor:
        """Vectors `(k, batch, *event)`, those of a row a function of the seed, the row's number and its place only."""

    @abstractmethod
    def reduce(self, forms: Iterator[Tensor]) -> Tensor:
        """Estimates `(count, batch)` from the forms `e^T J e`, `(part of k, batch)` at a time."""

    @property
    def count(self) -> int:
        """Number of estimates."""
        return 1

    def part_of_variance(self, size: int) -> float:
        """The variance of the mean of the estimates, in units of the variance of one by their number."""
        return 1.0

    def resolve(self, size: int) -> Divergence:
        """What is done for events of so many entries."""
        return self

    def expand(self, field: Field, x: State) -> Expansion:
        """The field around x. Gradients flow through it, and through its products, where they are enabled.

        Raises:
            CapabilityError: the network cannot be differentiated in this way.
        """
        graph = torch.is_grad_enabled()
        with _plain_attention(graph or self.mode == "forward"):
            return _reverse(field, x, graph) if self.mode == "reverse" else _forward(field, x)

    def estimate(self, expansion: Expansion, vectors: Tensor) -> Tensor:
        """Estimates of the divergence, `(count, batch)`."""
        return self.reduce(
            (expansion.products(part) * part).reshape(*part.shape[:2], -1).sum(2) for part in self.chunks(vectors)
        )

    def chunks(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """The vectors, some at a time."""
        fitting = _ENTRIES_AT_A_TIME[vectors.device.type == "cpu"] // max(vectors[:1].numel(), 1)
        parts: tuple[Tensor, ...] = torch.split(vectors, self.chunk or max(1, fitting))
        return parts


def _check(mode: str, chunk: int | None) -> None:
    if mode not in _MODES:
        raise OptionError(f"Unknown mode {mode!r}: write 'reverse' or 'forward'.")
    if chunk is not None and chunk < 1:
        raise OptionError(f"chunk must be at least 1, or None; got {chunk}.")


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian, one product for every entry of an event.

    Args:
        chunk: products taken at a time; memory grows with it. None for as many as suit the batch.
        mode: "reverse" or "forward".
    """

    chunk: int | None = None
    mode: str = "reverse"
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self.mode, self.chunk)

    def draw(self, x: State, seed: int, rows: Numbers, place: Numbers) -> Tensor:
        size = x[0].numel()
        basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
        return basis.expand(size, *x.shape)

    def reduce(self, forms: Iterator[Tensor]) -> Tensor:
        return torch.stack([part.sum(0) for part in forms]).sum(0)[None]


@dataclass(frozen=True, repr=False)
class Hutchinson(Divergence):
    """Hutchinson's estimator: unbiased, with an error bar when there are at least two probes.

    Args:
        probes: number of probes k >= 1. As many as an event has entries, or more, are replaced by the exact trace,
            which costs no more.
        distribution: "rademacher" (signs; exact for diagonal Jacobians), "gaussian", "sphere" (exact for multiples of
            the identity), or "orthogonal" (signs as well, but the k of one point are rows of a Hadamard matrix, which
            takes off a share k / m of the variance).
        mode: "reverse" or "forward".
        chunk: probes taken at a time; None for as many as suit the batch.
    """

    probes: int
    distribution: str
    mode: str
    chunk: int | None
    random: ClassVar[bool] = True

    def __init__(
        self, probes: int = 8, distribution: str = "rademacher", *, mode: str = "reverse", chunk: int | None = None
    ) -> None:
        if not isinstance(probes, int) or probes < 1:
            raise OptionError(f"Hutchinson needs a whole number of probes, at least one; got {probes!r}.")
        if distribution not in _DRAWS:
            raise OptionError(f"Unknown distribution {distribution!r}: write {', '.join(map(repr, _DRAWS))}.")
        _check(mode, chunk)
        for name, value in (("probes", probes), ("distribution", distribution), ("mode", mode), ("chunk", chunk)):
            object.__setattr__(self, name, value)

    @property
    def count(self) -> int:
        return self.probes

    def draw(self, x: State, seed: int, rows: Numbers, place: Numbers) -> Tensor:
        key = np.full(len(rows), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        at = rows.astype(np.uint64) << np.uint64(32) | place.astype(np.uint64)
        drawn = _DRAWS[self.distribution](key, at, self.probes, x[0].numel())
        return torch.from_numpy(drawn).to(x).reshape(self.probes, *x.shape)

    def reduce(self, forms: Iterator[Tensor]) -> Tensor:
        return torch.cat(list(forms))

    def part_of_variance(self, size: int) -> float:
        return 1 - self.probes / _order(size) if self.distribution == "orthogonal" else 1.0

    def resolve(self, size: int) -> Divergence:
        return Exact(self.chunk, self.mode) if self.probes >= size else self

    def __repr__(self) -> str:
        return f"Hutchinson({self.probes}, {self.distribution!r})"


def divergence_for(divergence: str | Divergence, size: int) -> Divergence:
    """What is done for events of so many entries: "auto" takes the exact trace up to 128, else 8 orthogonal probes.

    Raises:
        OptionError: it is neither a `Divergence` nor "auto" nor "exact".
    """
    if isinstance(divergence, Divergence):
        return divergence.resolve(size)
    if divergence == "exact" or (divergence == "auto" and size <= _EXACT_UP_TO):
        return Exact()
    if divergence == "auto":
        return Hutchinson(8, "orthogonal")
    raise OptionError(
        f"Unknown divergence {divergence!r}: write 'auto', 'exact', Exact(...) or Hutchinson(probes=...)."
    )


# Vectors (k, rows, size), functions of a key and a place for every row.


def _rademacher(key: Words, place: Numbers, k: int, size: int) -> NDArray[np.float64]:
    return np.stack([keyed_signs(key, place, table, size) for table in range(k)])


def _gaussian(key: Words, place: Numbers, k: int, size: int) -> NDArray[np.float64]:
    return np.stack([keyed_normals(key, place, table, size) for table in range(k)])


def _sphere(key: Words, place: Numbers, k: int, size: int) -> NDArray[np.float64]:
    normals = _gaussian(key, place, k, size)
    return normals * np.sqrt(size / np.square(normals).sum(-1, keepdims=True))


def _orthogonal(key: Words, place: Numbers, k: int, size: int) -> NDArray[np.float64]:
    if k > _order(size):
        raise OptionError(
            f"Orthogonal vectors of {size} entries are rows of a matrix of {_order(size)}; got {k}: take fewer, or "
            "distribution='rademacher'."
        )
    place, turn = place.astype(np.uint64), np.zeros(len(place), dtype=np.int64)
    if k == 1:  # one probe at a place: places take their rows in turn, times the same signs
        turn = (place & _LOW).astype(np.int64) % _order(size)
        place = place & ~_LOW
    lots = np.argsort(keyed_words(key, place, 1, _order(size)), axis=1, kind="stable")
    chosen = np.take_along_axis(lots, turn[:, None] + np.arange(k), axis=1).T
    odd = (chosen[..., None] & np.arange(size)).astype(np.uint64)
    for shift in (32, 16, 8, 4, 2, 1):
        odd ^= odd >> np.uint64(shift)
    return keyed_signs(key, place, 0, size) * (1 - 2 * (odd & np.uint64(1)).astype(np.float64))


def _order(size: int) -> int:
    """The order of the Hadamard matrix: the power of two that is not below the size."""
    return 1 << max(size - 1, 0).bit_length()


_DRAWS: dict[str, Callable[[Words, Numbers, int, int], NDArray[np.float64]]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sphere": _sphere,
    "orthogonal": _orthogonal,
}


# Products with the Jacobian.


def _plain_attention(needed: bool) -> AbstractContextManager[Any]:
    """Attention by plain products, the only kind whose derivative has a derivative."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def _reverse(field: Field, x: State, graph: bool) -> Expansion:
    with torch.enable_grad():
        at = x if graph and x.requires_grad else x.detach().requires_grad_()
        value, extra = field(at)

        def products(vectors: Tensor) -> Tensor:
            if graph and not vectors.requires_grad:
                # a function that is differentiable once only complains where a vector wants a gradient
                vectors = vectors.detach().clone().requires_grad_()
            return vector_jacobian(value, at, vectors, graph)

    return Expansion(value, extra, products) if graph else Expansion(value.detach(), extra.detach(), products)


def _forward(field: Field, x: State) -> Expansion:
    value, extra = field(x)

    def product(vector: State) -> State:
        return torch.func.jvp(lambda at: field(at)[0], (x,), (vector,))[1]

    def products(vectors: Tensor) -> Tensor:
        try:
            with _plain_attention(True):
                return torch.func.vmap(product, randomness="same")(vectors)
        except RuntimeError as error:
            raise CapabilityError(
                f"The network has no derivative in forward mode ({str(error).splitlines()[0]}): "
                "use mode='reverse', the default."
            ) from error

    return Expansion(value, extra, products)


def vector_jacobian(value: State, x: State, vectors: Tensor, graph: bool = False) -> Tensor:
    """`v^T dvalue/dx` for vectors `(k, batch, *event)`; all at once where the network allows, else one by one.

    Raises:
        CapabilityError: a graph is wanted and the network has no second derivative.
    """
    options: dict[str, Any] = {
        "retain_graph": True, "create_graph": graph, "allow_unused": True, "materialize_grads": True
    }  # fmt: skip
    if len(vectors) > 1 and not graph:  # in a batch, a function that is differentiable once does not complain
        try:
            products = torch.autograd.grad(value, x, vectors, is_grads_batched=True, **options)[0]
            return products.expand(vectors.shape)  # zeros come without the batch where the value does not depend on x
        except RuntimeError:
            pass
    try:
        return torch.stack([torch.autograd.grad(value, x, v, **options)[0] for v in vectors])
    except RuntimeError as error:
        if graph and "derivative" in str(error):
            raise CapabilityError(
                f"The network's derivative has no derivative ({str(error).splitlines()[0]}), so gradients cannot flow "
                "through a likelihood: replace that operation, or drop differentiable=True."
            ) from error
        raise
