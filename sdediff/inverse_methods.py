r"""What stands for the covariances of x_0 and of y, given x_t: the methods of `sdediff.inverse`.

A method is a matrix S, for the covariance of y, by its products and its solutions, and a matrix U, for that of x_0, by
its products; it moves the denoised data by `U A^T S^-1 (y - A xhat)`. Those that solve `S v = r` do so by conjugate
gradients, every row by itself.

References: as in `sdediff.inverse`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from sdediff.conjugate import Product, conjugate_gradients
from sdediff.errors import CapabilityError, OptionError
from sdediff.linear import LinearSDE
from sdediff.measurement import Measurement, lengths
from sdediff.shapes import PerRow, State, as_float64, over

_MOST = 64
"""Backward passes of a call of `MMPS`, if nobody says how many."""


@dataclass(frozen=True, eq=False)
class Tweedie:
    """A model around a batch of states: the mean of x_0 and products with its covariance.

    Attributes:
        mean: `E[x_0 | x]`, `(batch, *event)`.
        sde: the forward process.
        t, alpha, sigma: float64 `(batch,)`.
        pulled: from vectors `(k, batch, *event)` to `w^T dxhat/dx`, of that shape.
    """

    mean: State
    sde: LinearSDE
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    pulled: Product = field(repr=False)

    def covariance(self, w: State) -> State:
        """`V w = gamma (dxhat/dx)^T w`, `(batch, *event)`."""
        return over(self.sigma**2 / self.alpha, w) * self.pulled(w[None])[0]


class Method(ABC):
    """What stands for the covariances of x_0 and of y, given x_t."""

    needs_noise: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True
    inverts: ClassVar[bool] = True

    @abstractmethod
    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        """`S^-1 r`, `(batch, *m)`."""

    @abstractmethod
    def log_prob(self, known: Measurement, at: Tweedie) -> PerRow:
        """What stands for `log p(y | x_t)`, in nats, `(batch,)`."""

    def prior(self, at: Tweedie, w: State) -> State:
        """`U w`, `(batch, *event)`."""
        return at.covariance(w)

    def shift(self, known: Measurement, at: Tweedie) -> State:
        """`xhat_y - xhat = U A^T S^-1 (y - A xhat)`, `(batch, *event)`."""
        return self.prior(at, known.A.adjoint(self.solve(known, at, known.residual(at.mean))))


class _Gaussian(Method):
    """A method with a Gaussian for y given x_t, `N(A xhat, S)`."""

    @abstractmethod
    def product(self, known: Measurement, at: Tweedie, z: Tensor) -> Tensor:
        """`S z`, `(batch, *m)`."""

    def log_prob(self, known: Measurement, at: Tweedie) -> PerRow:
        """`log N(y; A xhat, S)` in nats, `(batch,)`, from the whole matrix S.

        Raises:
            CapabilityError: S is not positive definite, as the Jacobian of a network may be.
        """
        r = known.residual(at.mean)
        S = _matrix(lambda z: self.product(known, at, z), r)
        factor, failed = torch.linalg.cholesky_ex((S + S.mT) / 2)
        if r.is_cpu and bool((failed > 0).any()):  # elsewhere there is no waiting for an answer, and NaN will say so
            raise CapabilityError(
                f"The covariance of y given x_t is not positive definite in rows {failed.nonzero()[:8, 0].tolist()}; "
                "no Gaussian has it. Give noise_std > 0, or a method whose S is, such as 'pigdm'."
            )
        factor = torch.where((failed > 0)[:, None, None], torch.nan, factor)
        white = torch.linalg.solve_triangular(factor, r.reshape(len(r), -1, 1), upper=False)
        half_log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return -white.square().sum((1, 2)) / 2 - half_log_det - white.shape[1] * math.log(2 * math.pi) / 2


@dataclass(frozen=True)
class DPS(_Gaussian):
    """Diffusion posterior sampling: `S = s^2 I / scale`.

    The gradient is that of `-scale |y - A xhat|^2 / (2 s^2)`. It is right where xhat is certain, near the data, and too
    large elsewhere, by `(A V A^T + s^2) / s^2`, so that small noise makes it stiff.

    Args:
        scale: > 0; 1 is the likelihood.
    """

    scale: float = 1.0
    needs_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(self, scale=self.scale)

    def product(self, known: Measurement, at: Tweedie, z: Tensor) -> Tensor:
        return known.variance(z) * z / self.scale

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        return self.scale * r / known.variance(r)


@dataclass(frozen=True)
class NormalisedDPS(Method):
    """DPS with its paper's step: after every step of a chain, `x <- x - step grad_x |y - A xhat|^2 / |y - A xhat|`.

    A step of length h of the reverse SDE moves x by `g^2 h` times the score. So for a chain of n steps from T to 0 this
    is the gradient of `-2 step n / (T g^2) |y - A xhat|`, to first order in 1 / n, as a part of the score, which any
    solver may take with steps of its own. noise_std plays no part in it.

    Args:
        step: > 0; the paper has 0.3 to 1, by task, for a chain of 1000.
        chain: n >= 1.
    """

    step: float = 1.0
    chain: int = 1000
    inverts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive(self, step=self.step, chain=self.chain)

    def weight(self, at: Tweedie) -> Tensor:
        """`2 step n / (T g^2)`, float64 `(batch,)`."""
        diffusion = as_float64(at.sde.rates(at.t)[1])
        return 2 * self.step * self.chain / (at.sde.t_max * diffusion**2)

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        length = lengths(r)
        return over(self.weight(at), r) * r / over(torch.where(length > 0, length, 1.0), r)

    def log_prob(self, known: Measurement, at: Tweedie) -> PerRow:
        """`-2 step n / (T g^2) |y - A xhat|`, which is no normalised density of y."""
        length = lengths(known.residual(at.mean))
        return -self.weight(at).to(length) * length


@dataclass(frozen=True)
class _Isotropic(_Gaussian):
    """`S = rho^2 A A^T + s^2 I`, solved by conjugate gradients; no product calls the network.

    Args:
        deviation: standard deviation d of an entry of data, from which `rho^2 = d^2 sigma^2 / (alpha^2 d^2 + sigma^2)`;
            or a function of t, float64 `(batch,)` to the same, that returns rho.
        iterations: of conjugate gradients, at most; they end where nothing is left.
    """

    deviation: float | Callable[[Tensor], Tensor] = 1.0
    iterations: int = 200

    def __post_init__(self) -> None:
        _check_positive(self, iterations=self.iterations)
        if not callable(self.deviation):
            _check_positive(self, deviation=self.deviation)

    def spread(self, at: Tweedie) -> Tensor:
        """`rho^2`, float64 `(batch,)`."""
        if callable(self.deviation):
            return as_float64(self.deviation(at.t)) ** 2
        return (self.deviation * at.sigma) ** 2 / ((at.alpha * self.deviation) ** 2 + at.sigma**2)

    def product(self, known: Measurement, at: Tweedie, z: Tensor) -> Tensor:
        return over(self.spread(at), z) * known.A(known.A.adjoint(z)) + known.variance(z) * z

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        return conjugate_gradients(lambda z: self.product(known, at, z), r, self.iterations, known.floor)


@dataclass(frozen=True)
class PiGDM(_Isotropic):
    """Pseudoinverse guidance: given x_t, data is taken to be N(xhat, rho^2 I).

    Exact for data N(m, d^2 I). This is the score; the paper's sampler multiplies the gradient by rho^2 on top.
    """


@dataclass(frozen=True)
class NullSpace(_Isotropic):
    """The part of xhat that y determines is drawn to y, the rest is left alone: `xhat + rho^2 A^T S^-1 (y - A xhat)`.

    With s = 0 that is `xhat + A^+ (y - A xhat)`, whatever rho, which for a mask puts y in place of what is seen. It
    needs no derivative of the network. What is not seen learns of y only through the state, as in replacement.
    """

    differentiates: ClassVar[bool] = False

    def prior(self, at: Tweedie, w: State) -> State:
        return over(self.spread(at), w) * w


@dataclass(frozen=True)
class MMPS(_Gaussian):
    """Moment matching: the covariance of x_0 given x_t by Tweedie's formula, `S = A V A^T + s^2 I`.

    Its `log_prob` is that of this Gaussian, whose gradient has a term more than the score of the method: it also moves
    V, which is held fixed there.

    Args:
        iterations: of conjugate gradients, at most, one backward pass of the network each; None for as many as y has
            entries, which solve the system up to rounding, but no more than 64. A few serve where the network's own
            error is larger. A row ends early where nothing is left, or where the network's V is not positive; on a CPU
            the passes end with the last row.
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None:
            _check_positive(self, iterations=self.iterations)

    def product(self, known: Measurement, at: Tweedie, z: Tensor) -> Tensor:
        return known.A(at.covariance(known.A.adjoint(z))) + known.variance(z) * z

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        iterations = min(r[0].numel(), _MOST) if self.iterations is None else self.iterations
        return conjugate_gradients(lambda z: self.product(known, at, z), r, iterations, known.floor, iterations)


@dataclass(frozen=True)
class DenseMMPS(MMPS):
    """`MMPS` with the whole matrix S, by one backward pass for every entry of y, and an exact solution.

    S need not be symmetric here, as the Jacobian of a network is not.
    """

    iterations: None = field(default=None, init=False, repr=False)
    needs_noise: ClassVar[bool] = True

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        S = _matrix(lambda z: self.product(known, at, z), r)
        return torch.linalg.solve_ex(S, r.reshape(len(r), -1, 1))[0].reshape(r.shape)


METHODS: dict[str, type[Method]] = {
    "mmps": MMPS,
    "mmps-dense": DenseMMPS,
    "pigdm": PiGDM,
    "dps": DPS,
    "dps-normalised": NormalisedDPS,
    "replacement": NullSpace,
}
"""Methods by name."""


def method_of(method: str | Method, options: dict[str, Any]) -> Method:
    """The method of a name with its options, or the one that is given.

    Raises:
        OptionError: unknown name or option.
    """
    if isinstance(method, Method):
        if options:
            raise OptionError(f"{method} has its options already; got {', '.join(options)} besides.")
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(f"Unknown method {method!r}: write one of {', '.join(map(repr, METHODS))}, or a Method.")
    known = [f.name for f in fields(METHODS[method]) if f.init]  # type: ignore[arg-type]  # all of them are dataclasses
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(
            f"method={method!r} has no option {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}."
        )
    return METHODS[method](**options)


def _check_positive(method: object, **values: object) -> None:
    for name, value in values.items():
        whole = name in ("iterations", "chain")
        number = float(value) if isinstance(value, int | float) or _is_number(value) else math.nan
        if not 0 < number < math.inf or (whole and number != int(number)):
            needed = "a whole number >= 1" if whole else "a finite number > 0"
            raise OptionError(f"{type(method).__name__} needs {needed} for {name}; got {value!r}.")


def _is_number(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.ndim


def _matrix(product: Product, like: Tensor) -> Tensor:
    """The matrices of a product on rows shaped as `like`, `(batch, m, m)`."""
    basis = torch.eye(like[0].numel(), dtype=like.dtype, device=like.device)
    columns = [product(e.reshape(like.shape[1:]).expand(like.shape)).reshape(len(like), -1) for e in basis]
    return torch.stack(columns, dim=2)
