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

The methods are in `sdediff.inverse_methods`. `NormalisedDPS` is DPS with the step that its paper takes in practice.
`NullSpace` with s = 0 replaces the part of xhat that y determines, `xhat + A^+ (y - A xhat)`, and leaves the rest;
replacing that part of the *state*, with fresh noise at every step, is no change of the model but a move of the solver,
`sd.Replacement`.

References: Chung et al. 2023 (arXiv:2209.14687), DPS; Song, Vahdat, Mardani and Kautz 2023, pseudoinverse-guided
diffusion models; Rozet et al. 2024 (arXiv:2405.13712), moment matching; Wang, Yu and Zhang 2023 (arXiv:2212.00490),
range and null space; Hestenes and Stiefel 1952, conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sdediff.divergence import Exact
from sdediff.errors import CapabilityError, OptionError
from sdediff.inverse_methods import Method, Tweedie, method_of
from sdediff.measurement import Map, Measurement, Pending, measurement
from sdediff.model import ScoreModel
from sdediff.operators import Shape
from sdediff.shapes import PerRow, State, Time, as_time, check_state, over, per_row
from sdediff.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class _Posterior(Wrapped):
    """The model given y, by a method: `v - (alpha^2 + sigma^2) / sigma (xhat_y - xhat)`.

    v is what changes without a difference of large numbers, near data as near noise.
    """

    known: Measurement | Pending
    method: Method

    @property
    def no_density(self) -> str | None:
        return (
            f"{self.method} approximates grad log p(y | x_t), so that this is the score of the noised data of no "
            "density. (The density of y given clean data is sd.measurement.Measurement(A, y, noise_std).log_prob.)"
        )

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        def guided(known: Measurement, at: Tweedie, v: State) -> State:
            scale = torch.where(at.sigma > 0, (at.alpha**2 + at.sigma**2) / at.sigma, 0.0)
            return v - over(scale, v) * self.method.shift(known, at)

        return self._around(x, t, condition, guided)

    def log_prob(self, x: State, t: Tensor, condition: Any = None) -> PerRow:
        return self._around(x, t, condition, lambda known, at, _: self.method.log_prob(known, at))

    def rows(self, index: slice | Tensor, batch: int) -> Self:
        return replace(self, model=self.model.rows(index, batch), known=self.known.rows(index, batch))

    def _around(
        self, x: State, t: Tensor, condition: Any, result: Callable[[Measurement, Tweedie, State], Tensor]
    ) -> Tensor:
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            return result(self.known.at(x), *self._expanded(_usable(x), _usable(t), _usable(condition)))

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
    A: Map,
    y: Tensor,
    noise_std: Tensor | float,
    method: str | Method = "mmps",
    **options: Any,
) -> ScoreModel:
    """The model of x_0 given a measurement `y = A x_0 + n`, `n ~ N(0, noise_std^2 I)`; every solver takes it.

    A call costs one evaluation of the network and its backward passes: one for "dps", "dps-normalised" and "pigdm",
    at most one more than iterations for "mmps", none for "replacement". It has no `log_prob`; sampling it is as exact
    as the method's Gaussian.

    Args:
        model: of a linear SDE.
        A: a function of a batch, `lambda x: x[..., ::2]`, whose adjoint is derived; a pair of functions
            `(forward, adjoint)`; a matrix `(m, n)` for events of n entries, flattened; a bool mask shaped as an event;
            or a `LinearOperator` of `sd.operators`. Functions are looked at (are they linear, is the adjoint the right
            one) where the shape of an event is first known: here, if the network names it as its `event`, as those of
            `sd.networks` and `sd.exact` do, else in the first call, once.
        y: `(batch, *m)`, one for every row (cut as the rows of a condition are), or `(*m)` or `(1, *m)` for all.
        noise_std: a number, or a tensor `(*m)`, >= 0. 0 needs a y that is A x of some x, and another method than "dps".
        method: "mmps", "mmps-dense", "pigdm", "dps", "dps-normalised", "replacement", or a `Method`.
        options: of the method, as `iterations=10` for "mmps", `deviation=0.5` for "pigdm", `scale=0.3` for "dps".

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
    A: Map,
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


def _posterior(
    model: ScoreModel,
    A: Map,
    y: Tensor,
    noise_std: Tensor | float,
    method: str | Method,
    options: dict[str, Any],
) -> _Posterior:
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    chosen, _ = method_of(method, options), model.linear
    explained = chosen.inverts and not chosen.needs_noise
    known = measurement(A, y, noise_std, event=_event_of(model), explained=explained)
    if known.exact and chosen.needs_noise:
        raise OptionError(f"{chosen} divides by the noise: give noise_std > 0, or method='mmps'.")
    return _Posterior(model, known, chosen)


def _event_of(model: ScoreModel) -> Shape | None:
    """The shape of an event, if the innermost network names it."""
    network = model.network
    while isinstance(network, Wrapped):
        network = network.model.network
    event = getattr(network, "event", None)
    return event if isinstance(event, tuple) and all(isinstance(n, int) for n in event) else None


def _usable(value: Any) -> Any:
    """A tensor that gradients can be taken through, also if it was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
