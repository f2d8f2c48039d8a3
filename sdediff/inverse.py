r"""Linear inverse problems: sampling x_0 from a measurement `y = A x_0 + n`, `n ~ N(0, s^2 I)`.

By Bayes' rule `score(x | y) = score(x) + grad_x log p(y | x_t = x)`. The second term is an average over all x_0 that x
may come from, which no one knows; the methods differ in the Gaussian that stands for it. With the denoised data
`xhat = E[x_0 | x]`, the gain `gamma = sigma^2 / alpha` and the Jacobian of the denoiser,

    V = gamma dxhat/dx = Cov[x_0 | x],        r = y - A xhat,

the first of which is Tweedie's formula of second order. In denoised data every method here is the same update,

    xhat_y = xhat + U A^T S^-1 r,

with what it takes for the covariances U of x_0 and S of y, both given x:

| method | U | S | |
|---|---|---|---|
| `DPS` | V | s^2 I | x_0 is taken to be certain |
| `PiGDM` | V | rho^2 A A^T + s^2 I | x_0 is taken to be isotropic around xhat |
| `MMPS` | V | A V A^T + s^2 I | exact for Gaussian data, at every t |
| `NullSpace` | rho^2 I | rho^2 A A^T + s^2 I | no Jacobian |

with `rho^2 = d^2 sigma^2 / (alpha^2 d^2 + sigma^2)`, the variance of one entry given x if data is N(0, d^2 I). For the
first three, `U A^T v / gamma = (dxhat/dx)^T A^T v` is the gradient of `log N(y; A xhat, S)` with S held fixed, and so
the score of the guided model is the score of the model plus that gradient. V is never formed: its products are
vector-Jacobian products, one backward pass of the network each (the Jacobian of a true denoiser is symmetric, that of a
network nearly), and `S v = r` is solved by conjugate gradients, every row by itself.

`NormalisedDPS` is DPS with the step that its paper takes in practice. `NullSpace` with s = 0 replaces the part of xhat
that y determines, `xhat + A^+ (y - A xhat)`, and leaves the rest; replacing that part of the *state*, with fresh noise
at every step, is no change of the model but a move of the solver, `sd.Replacement`.

References: Chung et al. 2023 (arXiv:2209.14687), DPS; Song, Vahdat, Mardani and Kautz 2023, pseudoinverse-guided
diffusion models; Rozet et al. 2024 (arXiv:2405.13712), moment matching; Wang, Yu and Zhang 2023 (arXiv:2212.00490),
range and null space; Hestenes and Stiefel 1952, conjugate gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sdediff.divergence import Exact
from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel, rows_of
from sdediff.operators import LinearOperator, as_operator, check_adjoint
from sdediff.shapes import PerRow, State, Time, as_float64, as_time, check_state, over, per_row, sum_rows
from sdediff.wrapped import Wrapped

Product = Callable[[Tensor], Tensor]
"""`v -> M v` for rows of vectors."""

_UNEXPLAINED = 1e-3
"""The part of a y without noise that may be rounding, of the y or of the search for its x."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is known: `y = A x_0 + n`, `n ~ N(0, noise_std^2 I)`.

    Args:
        A: a `LinearOperator`, a matrix `(m, n)` or a bool mask; see `sd.operators`.
        y: `(batch, *m)`, or `(*m)` for all rows.
        noise_std: a number >= 0, or a tensor `(*m)` of them.

    Raises:
        ShapeError: y or noise_std does not fit A.
        OptionError: negative noise, or an A that is not linear or does not match its adjoint.
    """

    A: LinearOperator
    y: Tensor
    noise_std: Tensor

    def __init__(self, A: LinearOperator | Tensor, y: Tensor, noise_std: Tensor | float) -> None:
        operator, std = as_operator(A), as_float64(noise_std)
        check_state(y, "y")
        m = operator.measured
        if y.shape != m and y.shape[1:] != m:
            raise ShapeError(
                f"y must have shape {m}, for all rows, or (batch{''.join(f', {n}' for n in m)}), one for each, as A "
                f"gives ({operator}); got {tuple(y.shape)}."
            )
        if std.ndim and std.shape != m:
            raise ShapeError(f"noise_std must be a number or have the shape {m} of y; got {tuple(std.shape)}.")
        if not bool(((std >= 0) & std.isfinite()).all()):
            raise OptionError(f"noise_std must be finite and >= 0; got {std.min().item():g}.")
        check_adjoint(operator, y)
        for name, value in (("A", operator), ("y", y), ("noise_std", std)):
            object.__setattr__(self, name, value)

    @property
    def exact(self) -> bool:
        """Whether some entry has no noise."""
        return bool((self.noise_std == 0).any())

    @property
    def floor(self) -> float:
        """The smallest variance of the noise."""
        return (self.noise_std**2).min().item()

    def seen(self, x: State) -> Tensor:
        """y for the rows of x, in their dtype; `(batch, *m)` or `(*m)`."""
        if self.y.ndim > len(self.A.measured) and len(self.y) != len(x):
            raise ShapeError(
                f"y has {len(self.y)} rows but x has {len(x)}: give y of shape {self.A.measured}, for all "
                "rows, or one for each row."
            )
        return self.y.to(x)

    def residual(self, x0: State) -> Tensor:
        """`y - A x_0`, `(batch, *m)`."""
        return self.seen(x0) - self.A(x0)

    def variance(self, z: Tensor) -> Tensor:
        """`s^2` laid over z."""
        square = self.noise_std**2
        return square.to(z) if square.ndim else over(square, z)

    def log_prob(self, x0: State) -> PerRow:
        """`log p(y | x_0)` in nats, `(batch,)`; differentiable in x_0.

        Raises:
            CapabilityError: there is no noise, and so no density.
        """
        if self.exact:
            raise CapabilityError("Without noise y has no density given x_0: give noise_std > 0.")
        r = self.residual(x0)
        variance = self.variance(r).expand_as(r)
        return -sum_rows(r**2 / variance + (2 * math.pi * variance).log()) / 2

    def rows(self, index: slice | Tensor, batch: int) -> Measurement:
        """The measurement for some rows of a batch."""
        if self.y.ndim == len(self.A.measured) or len(self.y) != batch:
            return self
        part = copy(self)
        object.__setattr__(part, "y", rows_of(self.y, index, batch))
        return part

    def check_explained(self) -> None:
        """Refuse a y that is `A x` of no x.

        Raises:
            OptionError: it says by how much.
        """
        with torch.no_grad():
            y = self.y.reshape(-1, *self.A.measured)
            x = conjugate_gradients(lambda x: self.A.adjoint(self.A(x)), self.A.adjoint(y), min(4 * y[0].numel(), 500))
            part = (_norm(y - self.A(x)) / _norm(y).clamp(min=torch.finfo(y.dtype).tiny)).max().item()
        if not part <= _UNEXPLAINED:
            raise OptionError(
                f"Without noise y must be A x of some x, but {part:.2g} of its length is not: A has rows that depend "
                "on each other, and y contradicts itself. Give noise_std > 0, or take such rows out."
            )


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
        if bool((failed > 0).any()):
            raise CapabilityError(
                f"The covariance of y given x_t is not positive definite in rows {failed.nonzero()[:8, 0].tolist()}; "
                "no Gaussian has it. Give noise_std > 0, or a method whose S is, such as 'pigdm'."
            )
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
        length = _norm(r)
        return over(self.weight(at), r) * r / over(torch.where(length > 0, length, 1.0), r)

    def log_prob(self, known: Measurement, at: Tweedie) -> PerRow:
        """`-2 step n / (T g^2) |y - A xhat|`, which is no normalised density of y."""
        length = _norm(known.residual(at.mean))
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
        iterations: of conjugate gradients, at most, one backward pass of the network each. As many as y has entries
            solve the system up to rounding; a few serve where the network's own error is larger. A row ends early where
            nothing is left, or where the network's V is not positive.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        _check_positive(self, iterations=self.iterations)

    def product(self, known: Measurement, at: Tweedie, z: Tensor) -> Tensor:
        return known.A(at.covariance(known.A.adjoint(z))) + known.variance(z) * z

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        return conjugate_gradients(lambda z: self.product(known, at, z), r, self.iterations, known.floor)


@dataclass(frozen=True)
class DenseMMPS(MMPS):
    """`MMPS` with the whole matrix S, by one backward pass for every entry of y, and an exact solution.

    S need not be symmetric here, as the Jacobian of a network is not.
    """

    iterations: int = field(default=1, init=False, repr=False)
    needs_noise: ClassVar[bool] = True

    def solve(self, known: Measurement, at: Tweedie, r: Tensor) -> Tensor:
        S = _matrix(lambda z: self.product(known, at, z), r)
        return torch.linalg.solve(S, r.reshape(len(r), -1, 1)).reshape(r.shape)


METHODS: dict[str, type[Method]] = {
    "mmps": MMPS,
    "mmps-dense": DenseMMPS,
    "pigdm": PiGDM,
    "dps": DPS,
    "dps-normalised": NormalisedDPS,
    "replacement": NullSpace,
}
"""Methods by name."""


@dataclass(frozen=True, eq=False)
class _Posterior(Wrapped):
    """The model given y, by a method: `v - (alpha^2 + sigma^2) / sigma (xhat_y - xhat)`.

    v is what changes without a difference of large numbers, near data as near noise.
    """

    known: Measurement
    method: Method

    @property
    def no_density(self) -> str | None:
        return (
            f"{self.method} approximates grad log p(y | x_t), so that this is the score of the noised data of no "
            "density. (The density of y given clean data is Measurement(A, y, noise_std).log_prob.)"
        )

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        def guided(at: Tweedie, v: State) -> State:
            scale = torch.where(at.sigma > 0, (at.alpha**2 + at.sigma**2) / at.sigma, 0.0)
            return v - over(scale, v) * self.method.shift(self.known, at)

        return self._around(x, t, condition, guided)

    def log_prob(self, x: State, t: Tensor, condition: Any = None) -> PerRow:
        return self._around(x, t, condition, lambda at, _: self.method.log_prob(self.known, at))

    def rows(self, index: slice | Tensor, batch: int) -> Self:
        return replace(self, model=self.model.rows(index, batch), known=self.known.rows(index, batch))

    def _around(self, x: State, t: Tensor, condition: Any, result: Callable[[Tweedie, State], Tensor]) -> Tensor:
        if tuple(x.shape[1:]) != self.known.A.event:
            raise ShapeError(f"A takes events of shape {self.known.A.event}; x has shape {tuple(x.shape)}.")
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            return result(*self._expanded(_usable(x), _usable(t), _usable(condition)))

    def _expanded(self, x: State, t: Tensor, condition: Any) -> tuple[Tweedie, State]:
        """The model around x, and its v, from one call."""
        sde = self.model.linear
        alpha, sigma = sde.scales_at(t)
        from_x, from_v = alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)

        def field(at: State) -> tuple[State, State]:
            v = self.model.view("v", t, at, condition=condition)
            return over(from_x, at) * at + over(from_v, at) * v, v

        if not self.method.differentiates:
            data, v = field(x)
            return Tweedie(data, sde, t, alpha, sigma, torch.zeros_like), v
        if not bool((alpha > 0).all()):
            raise CapabilityError(
                f"At t = {t[alpha <= 0].min().item():g} alpha is 0: the state says nothing of the data, and the "
                "denoiser's derivative nothing of their covariance. Give times= that start below, or "
                "method='replacement'."
            )
        around = Exact().expand(field, x)
        return Tweedie(around.value, sde, t, alpha, sigma, around.products), around.extra


def LinearInverse(
    model: ScoreModel,
    A: LinearOperator | Tensor,
    y: Tensor,
    noise_std: Tensor | float,
    method: str | Method = "mmps",
    **options: Any,
) -> ScoreModel:
    """The model of x_0 given a measurement `y = A x_0 + n`, `n ~ N(0, noise_std^2 I)`; every solver takes it.

    A call costs one evaluation of the network and its backward passes: one for "dps", "dps-normalised" and "pigdm",
    one more than iterations for "mmps", none for "replacement". It has no `log_prob`; sampling it is as exact as the
    method's Gaussian.

    Args:
        model: of a linear SDE.
        A: a `LinearOperator` of `sd.operators`, a matrix `(m, n)` for events of n entries, or a bool mask.
        y: `(batch, *m)`, one for every row (cut as the rows of a condition are), or `(*m)` for all.
        noise_std: a number, or a tensor `(*m)`, >= 0. 0 needs a y that is A x of some x, and another method than "dps".
        method: "mmps", "mmps-dense", "pigdm", "dps", "dps-normalised", "replacement", or a `Method`.
        options: of the method, as `iterations=5` for "mmps", `deviation=0.5` for "pigdm", `scale=0.3` for "dps".

    Raises:
        OptionError: unknown method or option, negative noise or none where the method divides by it, a y without noise
            that no x explains, an A that is not linear or not the adjoint of its adjoint.
        ShapeError: y or noise_std does not fit A.
        CapabilityError: the SDE is not linear.
    """
    posterior = _posterior(model, A, y, noise_std, method, options)
    return model.wrapped(posterior, "v")


def log_likelihood(
    model: ScoreModel,
    A: LinearOperator | Tensor,
    y: Tensor,
    noise_std: Tensor | float,
    method: str | Method = "mmps",
    **options: Any,
) -> Callable[[Time, State], PerRow]:
    """What a method takes for `log p(y | x_t)`: a function `(t, x) -> (batch,)` in nats, differentiable in x.

    The arguments are those of `LinearInverse`. The matrix S is built, by as many products as y has entries. As a twist
    it may be any function: where it is wrong, particles have weights that say so.
    """
    posterior = _posterior(model, A, y, noise_std, method, options)

    def log_prob(t: Time, x: State) -> PerRow:
        check_state(x)
        return posterior.log_prob(x, per_row(as_time(t), x))

    return log_prob


def conjugate_gradients(product: Product, b: Tensor, iterations: int, floor: float = 0.0) -> Tensor:
    """The solution v of `S v = b` for symmetric positive semi-definite S, every row by itself.

    Args:
        product: `v -> S v`, `(batch, *m)` to the same.
        b: `(batch, *m)`, in the range of S.
        iterations: at most. A row ends early where nothing is left of its residual, or nothing of S along the next
            direction, `p^T S p / p^T p` being negative or 0, up to rounding.
        floor: what S is known to exceed, such as its `s^2`; a row ends as well where S is below 0.999 of it, and so is
            not what it should be.
    """
    rounding = 4 * torch.finfo(b.dtype).eps
    v, r, p = torch.zeros_like(b), b, b
    square = sum_rows(r * r)
    least, largest = rounding**2 * square, torch.zeros_like(square)
    going = square > least
    for _ in range(iterations):
        if b.is_cpu and not bool(going.any()):
            break
        image = product(p)
        curvature, size = sum_rows(p * image), sum_rows(p * p)
        largest = torch.maximum(largest, torch.where(going, curvature / torch.where(going, size, 1.0), 0.0))
        going = going & (curvature > rounding * largest * size) & (curvature >= 0.999 * floor * size)
        length = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        v, r = v + over(length, p) * p, r - over(length, p) * image
        before, square = square, torch.where(going, sum_rows(r * r), square)
        p = r + over(torch.where(going, square / torch.where(going, before, 1.0), 0.0), p) * p
        going = going & (square > least)
    return v


def _posterior(
    model: ScoreModel,
    A: LinearOperator | Tensor,
    y: Tensor,
    noise_std: Tensor | float,
    method: str | Method,
    options: dict[str, Any],
) -> _Posterior:
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    chosen, known, _ = _method(method, options), Measurement(A, y, noise_std), model.linear
    if known.exact and chosen.needs_noise:
        raise OptionError(f"{chosen} divides by the noise: give noise_std > 0, or method='mmps'.")
    if known.exact and chosen.inverts:
        known.check_explained()
    return _Posterior(model, known, chosen)


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise OptionError(f"{method} has its options already; got {', '.join(options)} besides.")
        return method
    if method not in METHODS:
        raise OptionError(f"Unknown method {method!r}: write one of {', '.join(map(repr, METHODS))}.")
    known = [f.name for f in fields(METHODS[method]) if f.init]  # type: ignore[arg-type]  # all of them are dataclasses
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(
            f"method={method!r} has no option {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}."
        )
    return METHODS[method](**options)


def _check_positive(method: object, **values: float) -> None:
    for name, value in values.items():
        whole = name in ("iterations", "chain")
        if not 0 < value < math.inf or (whole and value != int(value)):
            needed = "a whole number >= 1" if whole else "a finite number > 0"
            raise OptionError(f"{type(method).__name__} needs {needed} for {name}; got {value}.")


def _matrix(product: Product, like: Tensor) -> Tensor:
    """The matrices of a product on rows shaped as `like`, `(batch, m, m)`."""
    basis = torch.eye(like[0].numel(), dtype=like.dtype, device=like.device)
    columns = [product(e.reshape(like.shape[1:]).expand(like.shape)).reshape(len(like), -1) for e in basis]
    return torch.stack(columns, dim=2)


def _norm(r: Tensor) -> PerRow:
    return torch.linalg.vector_norm(r.reshape(len(r), -1), dim=1)


def _usable(value: Any) -> Any:
    """A tensor that gradients can be taken through, also if it was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
