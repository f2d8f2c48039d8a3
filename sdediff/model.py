r"""One model, many names: score, noise, data, velocity.

With `x = alpha x_0 + sigma eps`, every quantity that a network may predict, and every quantity that a solver may want,
is a fixed combination of the denoised data and the noise in x:

    value = m E[x_0 | x] + n E[eps | x],

| kind | m | n |
|---|---|---|
| data | 1 | 0 |
| noise | 0 | 1 |
| score | 0 | -1 / sigma |
| v | -sigma | alpha |
| flow | alpha' | sigma' |
| edm | sigma / (sigma_d k) | -alpha sigma_d / k, k = sqrt(sigma^2 + alpha^2 sigma_d^2) |

A network that predicts F with `(p, q)` therefore gives any other combination `(m, n)` as

    c_x x + c_F F,    c_x = (m q - n p) / D,    c_F = (alpha n - sigma m) / D,    D = alpha q - sigma p,

which is all the conversion there is: solvers ask for the combination they need and no intermediate is formed.

References: Ho et al. 2020 (arXiv:2006.11239), noise; Salimans and Ho 2022 (arXiv:2202.00512), v; Karras et al. 2022
(arXiv:2206.00364), edm; Lipman et al. 2023 (arXiv:2210.02747), flow; Tweedie's formula, Efron 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError, SDEError, ShapeError
from sdediff.linear import LinearSDE, as_linear
from sdediff.modes import evaluating as evaluating
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, Time, as_time, check_state, over, per_row
from sdediff.wrapped import HoldsRows, Wrapped

Combination = tuple[Tensor, Tensor]
"""`(m, n)` of `m E[x_0 | x] + n E[eps | x]`, float64, `()` or `(batch,)` or a grid."""


@dataclass(frozen=True)
class Point:
    """What a combination may depend on: the SDE at some times, float64."""

    sde: LinearSDE
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    sigma_data: float

    def __getitem__(self, index: slice) -> Point:
        return Point(self.sde, self.t[index], self.alpha[index], self.sigma[index], self.sigma_data)


def _data(at: Point) -> Combination:
    return torch.ones_like(at.alpha), torch.zeros_like(at.alpha)


def _noise(at: Point) -> Combination:
    return torch.zeros_like(at.alpha), torch.ones_like(at.alpha)


def _score(at: Point) -> Combination:
    return torch.zeros_like(at.alpha), -1 / at.sigma


def _v(at: Point) -> Combination:
    return -at.sigma, at.alpha


def _flow(at: Point) -> Combination:
    return at.sde.scale_rates(at.t)


def _edm(at: Point) -> Combination:
    k = (at.sigma**2 + (at.alpha * at.sigma_data) ** 2).sqrt()
    return at.sigma / (at.sigma_data * k), -at.alpha * at.sigma_data / k


PREDICTIONS: dict[str, Callable[[Point], Combination]] = {
    "noise": _noise,
    "data": _data,
    "score": _score,
    "v": _v,
    "flow": _flow,
    "edm": _edm,
}
"""What a network may predict, and its combination of data and noise."""


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """A network together with the SDE it was (or will be) trained for and the name of what it predicts.

    Args:
        network: any callable `network(x, t)`, or `network(x, t, condition)` when a condition is given; x is
            `(batch, *event)`, t is `(batch,)`, and the result has the shape of x.
        sde: the forward process. A general `SDE` that is linear is turned into a `LinearSDE`; one that is not works
            with `prediction="score"` only.
        prediction: "noise", "data", "score", "v", "flow" or "edm". An "edm" network is called with
            `x / sqrt(sigma^2 + alpha^2 sigma_data^2)` and, unless `time` says otherwise, `log(sigma / alpha) / 4`.
        time: what the network sees as its time, a function of t (float64, `(batch,)`): `lambda t: 999 * t` for a
            scaled time, `DiscreteVP(...).timestep` for integer time steps. None passes t itself.
        sigma_data: standard deviation of the data that "edm" assumes.
        condition: a condition that every call passes on (see `given`).

    Raises:
        OptionError: unknown prediction.
        SDEError: the SDE breaks a rule, or is not linear and the prediction is not "score".
    """

    network: Callable[..., Tensor]
    sde: SDE
    prediction: str = "noise"
    time: Callable[[Tensor], Tensor] | None = None
    sigma_data: float = 0.5
    condition: Any = field(default=None, repr=False)
    _linear: LinearSDE | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise OptionError(
                f"Unknown prediction {self.prediction!r}: write one of {', '.join(map(repr, PREDICTIONS))}."
            )
        if not callable(self.network):
            raise OptionError(f"The network must be callable as network(x, t); got {type(self.network).__name__}.")
        if not self.sigma_data > 0:
            raise OptionError(f"sigma_data must be positive; got {self.sigma_data}.")
        try:
            linear = as_linear(self.sde)
        except SDEError as error:
            if self.prediction != "score":
                raise SDEError(f"{error} (prediction={self.prediction!r} needs alpha and sigma.)") from error
            object.__setattr__(self, "_linear", None)
        else:
            object.__setattr__(self, "_linear", linear)
            object.__setattr__(self, "sde", linear)

    @property
    def is_linear(self) -> bool:
        """Whether the forward process is linear, so that `linear` answers."""
        return self._linear is not None

    @property
    def blind_in_noise(self) -> bool:
        """Whether the output says nothing of the data where alpha is 0: data made of it errs as sigma / alpha."""
        return self.prediction in ("noise", "score")

    @property
    def deviation(self) -> float:
        """The deviation of the data that it was made for, as far as it, or the model inside, says so.

        That is sigma_data of a model that predicts "edm", and 1 otherwise.
        """
        said = getattr(self.network, "deviation", None)
        if isinstance(said, float):
            return said
        return self.sigma_data if self.prediction == "edm" else 1.0

    @property
    def linear(self) -> LinearSDE:
        """The forward process, when it is linear.

        Raises:
            CapabilityError: it is not, so there are no alpha and sigma.
        """
        if self._linear is None:
            raise CapabilityError(
                f"{self.sde} is not linear, so its model has a score and a velocity only: no alpha and sigma, and "
                "none of what needs them (noise, denoised, DDPM, DDIM, Langevin steps, the final denoising step)."
            )
        return self._linear

    @property
    def known_times(self) -> Grid | None:
        """The only times that the network knows, falling, if it counts the steps of a chain; None if it takes any."""
        if isinstance(self.network, Wrapped):
            return self.network.known_times
        chain = None if self._linear is None or self.time is None else self._linear.chain_times
        if chain is None or self.time is None or self.time(chain[:1]).is_floating_point():
            return None
        return chain

    def given(self, condition: Any) -> ScoreModel:
        """This model with its condition fixed."""
        return replace(self, condition=condition)

    def rows(self, index: slice | Tensor, batch: int) -> ScoreModel:
        """This model for some rows of a batch: tensors of the condition with one entry per row are cut to them."""
        if isinstance(self.network, HoldsRows):
            network = self.network.rows(index, batch)
            return replace(self, network=network, condition=rows_of(self.condition, index, batch))
        return self if self.condition is None else self.given(rows_of(self.condition, index, batch))

    def wrapped(self, network: Wrapped, prediction: str) -> ScoreModel:
        """A model of the same process and condition whose network is made of this one."""
        return ScoreModel(
            network, self.sde, prediction, time=as_time, sigma_data=self.sigma_data, condition=self.condition
        )

    @property
    def no_density(self) -> str | None:
        """Why a wrapped model is not the score of the noised data of any density; None if it may be."""
        return self.network.no_density if isinstance(self.network, Wrapped) else None

    # The four views.

    def score(self, t: Time, x: State, *, condition: Any = None) -> State:
        """`grad log p_t(x)`, `(batch, *event)`."""
        if self.prediction == "score":
            return self.predict(t, x, condition=condition)
        return self.view("score", t, x, condition=condition)

    def noise(self, t: Time, x: State, *, condition: Any = None) -> State:
        """`E[eps | x_t = x] = -sigma score`, `(batch, *event)`."""
        return self.view("noise", t, x, condition=condition)

    def denoised(self, t: Time, x: State, *, condition: Any = None) -> State:
        """`E[x_0 | x_t = x] = (x + sigma^2 score) / alpha` (Tweedie), `(batch, *event)`."""
        return self.view("data", t, x, condition=condition)

    def velocity(self, t: Time, x: State, *, condition: Any = None) -> State:
        """The probability-flow velocity `dx/dt = alpha' E[x_0 | x] + sigma' E[eps | x] = f - g^2 score / 2`."""
        model = self if condition is None else self.given(condition)
        return self.sde.reverse_drift(as_time(t), x, model, 0.0)

    # What they are made of.

    def view(self, kind: str, t: Time, x: State, *, condition: Any = None) -> State:
        """Any of the kinds of `PREDICTIONS`, from whatever the network predicts."""
        if kind not in PREDICTIONS:
            raise OptionError(f"Unknown view {kind!r}: write one of {', '.join(map(repr, PREDICTIONS))}.")
        clock = as_time(t)
        return self.combine(clock, x, *PREDICTIONS[kind](self.point(clock)), condition=condition)

    def combine(self, t: Time, x: State, m: Tensor, n: Tensor, *, condition: Any = None) -> State:
        """`m E[x_0 | x] + n E[eps | x]` from one network call; m and n are `()` or `(batch,)`."""
        from_x, from_output = self.weights(as_time(t), m, n)
        return over(from_x, x) * x + over(from_output, x) * self.predict(t, x, condition=condition)

    def weights(self, t: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """`(c_x, c_F)` with `m E[x_0 | x] + n E[eps | x] = c_x x + c_F F`, float64, for times of any shape."""
        return self.weights_at(self.point(t), m, n)

    def weights_at(self, at: Point, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a point that is known already."""
        p, q = PREDICTIONS[self.prediction](at)
        determinant = at.alpha * q - at.sigma * p
        return (m * q - n * p) / determinant, (at.alpha * n - at.sigma * m) / determinant

    def point(self, t: Tensor) -> Point:
        """The SDE at times of any shape, as combinations are made from it."""
        return Point(self.linear, t, *self.linear.scales_at(t), self.sigma_data)

    def predict(self, t: Time, x: State, *, condition: Any = None) -> State:
        """The network's own output F, `(batch, *event)`, in the dtype of x.

        A network with parameters is called in their dtype: a float64 state may use a float32 network.

        Raises:
            ShapeError: x is not a floating-point state, t fits neither `()` nor `(batch,)`, or the network's output
                is not shaped as x.
        """
        return self._checked(self.network(*self.arguments(t, x, condition=condition)), x)

    def arguments(self, t: Time, x: State, *, condition: Any = None) -> tuple[Any, ...]:
        """What the network is called with: its x, its times `(batch,)`, and the condition if there is one.

        Raises:
            ShapeError, TimeError: as in `predict`; t lies outside the span.
        """
        check_state(x)
        clock = per_row(as_time(t), x)
        self.sde.check_span(clock)
        scale, seen = self._inputs(clock)
        inputs, dtype = x if scale is None else x / over(scale, x), _dtype_of(self.network) or x.dtype
        condition = self.condition if condition is None else condition
        given = self._clock(seen, x, dtype), *(() if condition is None else (condition,))
        return _in(inputs, dtype), *(trackable(given) if torch.is_grad_enabled() else given)

    def along(self, times: Grid) -> Callable[[int, State], State]:
        """`(k, x) -> predict(times[k], x)` for the times of a grid, with all that depends on time computed once."""
        self.sde.check_span(times, "times")
        scale, seen = self._inputs(times)
        scales = None if scale is None else scale.reciprocal().tolist()
        extra = () if self.condition is None else (self.condition,)
        clocks: list[Tensor] = []

        network = self.network
        dtype: torch.dtype | None = None
        rows = -1

        def at(k: int, x: State) -> State:
            nonlocal dtype, rows
            if x.shape[0] != rows:
                rows, dtype = x.shape[0], _dtype_of(self.network) or x.dtype
                cast = self._clock(seen, x, dtype)
                clocks[:] = cast[:, None].expand(-1, rows).unbind()
            inputs = x if scales is None else scales[k] * x
            output = network(inputs if inputs.dtype == dtype else inputs.to(dtype), clocks[k], *extra)
            fine = type(output) is Tensor and output.shape == x.shape and output.dtype == x.dtype
            return output if fine else self._checked(output, x)

        return at

    def combined(self, times: Grid, m: Tensor, n: Tensor) -> Callable[[int, State], State]:
        """`(k, x) -> combine(times[k], x, m[k], n[k])` for the times of a grid, likewise; m and n are as `times`."""
        from_x, from_output = (column.tolist() for column in self.weights(times, m, n))
        output = self.along(times)
        return lambda k, x: (from_x[k] * x).add(output(k, x), alpha=from_output[k])

    def _inputs(self, clock: Tensor) -> tuple[Tensor | None, Tensor]:
        """What x is divided by before the network sees it, if by anything, and the times that it sees."""
        scale, seen = None, clock
        if self.prediction == "edm":
            alpha, sigma = self.linear.scales_at(clock)
            scale = (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
            seen = (sigma / alpha).log() / 4
        return scale, seen if self.time is None else self.time(clock)

    def _clock(self, seen: Tensor, x: State, dtype: torch.dtype) -> Tensor:
        """What the network sees as its time: in its dtype, unless it `keeps_time` in float64, or counts steps."""
        if getattr(self.network, "keeps_time", False):
            return seen
        return seen.to(x.device, dtype) if seen.is_floating_point() else seen.to(x.device)

    @staticmethod
    def _checked(output: object, x: State) -> State:
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"The network must return a tensor shaped as x, {tuple(x.shape)}; it returned {got}.")
        return _in(output, x.dtype)


@dataclass(frozen=True)
class Kind:
    """All of a model that coefficients and grids depend on, which stands for its network where only these are asked."""

    sde: SDE
    prediction: str
    sigma_data: float
    deviation: float

    @classmethod
    def of(cls, model: ScoreModel) -> Kind:
        """The kind of a model."""
        return cls(model.sde, model.prediction, model.sigma_data, model.deviation)

    def __call__(self, x: State, t: Tensor) -> State:
        return x

    def model(self) -> ScoreModel:
        """A model of this kind, with no network to speak of."""
        return ScoreModel(self, self.sde, self.prediction, sigma_data=self.sigma_data)


def rows_of(condition: Any, index: slice | Tensor, batch: int) -> Any:
    """The rows of tensors with one entry per row, also inside dicts, lists and tuples; all else passes untouched."""

    def rows(part: Tensor) -> Tensor:
        if part.ndim and part.shape[0] == batch:
            return part[index.to(part.device) if isinstance(index, Tensor) else index]
        return part

    return _each_tensor(condition, rows)


def trackable(condition: Any) -> Any:
    """Tensors made under inference_mode as such that autograd takes, likewise; to be called outside of that mode."""
    return _each_tensor(condition, lambda part: part.clone() if part.is_inference() else part)


def _each_tensor(condition: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(condition, Tensor):
        return change(condition)
    if isinstance(condition, dict):
        return {name: _each_tensor(value, change) for name, value in condition.items()}
    if type(condition) in (list, tuple):
        return type(condition)(_each_tensor(value, change) for value in condition)
    return condition


def _in(x: State, dtype: torch.dtype) -> State:
    return x if x.dtype == dtype else x.to(dtype)


def _dtype_of(network: Callable[..., Tensor]) -> torch.dtype | None:
    """The dtype of the parameters of an `nn.Module`, itself or wrapped as `.network`, also twice; None if none."""
    module: object = network
    while module is not None and not isinstance(module, torch.nn.Module):
        module = getattr(module, "network", None)
    return None if module is None else next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
