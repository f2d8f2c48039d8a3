r"""Guidance: models of conditional densities, and of what lies beyond them, made of other models.

A conditional density is just another score. By Bayes' rule at every time,

    grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x),

so that a classifier of noised data makes a conditional model of an unconditional one. With a scale w,

    score <- score + w grad log p_t(y | x),                  eps <- eps - sigma w grad log p_t(y | x).

A network that predicts `m E[x_0 | x] + n E[eps | x]` (see `sdediff.model`) moves by `(m sigma^2 / alpha - n sigma) w g`
where the score moves by `w g`. Guidance keeps the kind of the model inside, so that nothing is divided by alpha where
noise or score is predicted; of an "edm" model it makes one of "v". Any differentiable similarity `sim(x, y)` may stand
for the classifier, at x or at the denoised estimate `xhat(t, x)`, whose gradient in x passes through the network.

Without a classifier, the model itself is called with the condition and without it,

    eps <- (1 + w) eps(x, y) - w eps(x),

and as `score(x, y) - score(x) = grad log p_t(y | x)` it is classifier guidance of scale w of the conditional model.
Another condition in place of none is moved away from. Elsewhere `1 + w` is called the scale.

w = 1 of the first form and w = 0 of the second are the conditional model. Other scales are the scores of
`p_t(x) p_t(y | x)^w` at every t, which are not the noised versions of any one density, so that samples do not follow
`p(x) p(y | x)^w`, and there is no likelihood. The scale may depend on time: `interval` guides between two times only.

References: Sohl-Dickstein et al. 2015 (arXiv:1503.03585); Song et al. 2021 (arXiv:2011.13456), appendix I; Dhariwal and
Nichol 2021 (arXiv:2105.05233); Ho and Salimans 2022 (arXiv:2207.12598); Kynkaanniemi et al. 2024 (arXiv:2404.07724);
Bradley and Nakkiran 2024 (arXiv:2408.09000), what the samples of classifier-free guidance follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from sdediff.conditions import null_like
from sdediff.energy import value_and_slope
from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.guidance_scale import Scale as Scale
from sdediff.guidance_scale import always, checked_scale, scale_at, scale_of_rows
from sdediff.guidance_scale import interval as interval
from sdediff.model import PREDICTIONS, ScoreModel, rows_of
from sdediff.networks import HEARD
from sdediff.shapes import PerRow, State, over
from sdediff.wrapped import Count, Wrapped


def ClassifierGuidance(
    model: ScoreModel, log_prob: Callable[..., PerRow], scale: Scale = 1.0, *, label: Any = None
) -> ScoreModel:
    """The model with the score `score + w grad_x log_prob(t, x)`; w = 1 is the conditional model.

    A call costs one evaluation of the network, and `log_prob` forward and backward where w is not 0.

    Args:
        model: the model to guide.
        log_prob: `log_prob(t, x)` or, with a label, `log_prob(t, x, label)`: `log p(y | x_t = x)` in nats, `(batch,)`,
            up to a number that does not depend on x, differentiable in x; t is `(batch,)`, in the dtype and on the
            device of x. A row's value must not depend on other rows.
        scale: w, a number, a tensor `(batch,)`, or a function of t, from float64 `(batch,)` on the CPU to the same.
        label: a number for all rows (shown as `(batch,)`), a tensor or array of one entry for each row, or of one for
            all, `(1, ...)`; anything else is handed over as it is.

    Raises:
        OptionError, ShapeError: a scale that is none of these; when called, a `log_prob` that is not `(batch,)` or that
            has no gradient in x, a label or a scale that is not for this number of rows.
        TimeError: when called where alpha = 0, if the model predicts neither noise nor score.
    """
    return _guided(model, GuidedByClassifier(model, log_prob, checked_scale(scale), _told(label)), "log_prob")


def SimilarityGuidance(
    model: ScoreModel,
    similarity: Callable[..., PerRow],
    scale: Scale = 1.0,
    *,
    target: Any = None,
    at: str = "noisy",
) -> ScoreModel:
    """The model with the score `score + w grad_x sim`, of any differentiable similarity.

    Args:
        model: the model to guide.
        similarity: `similarity(x)` or, with a target, `similarity(x, target)`, `(batch,)`, such as `cosine`.
        scale: w, as in `ClassifierGuidance`.
        target: what x is compared to, with one entry for each row or for all, as the label of `ClassifierGuidance`.
        at: "noisy" to compare the state itself, "denoised" to compare `E[x_0 | x_t]`, whose gradient in the state
            passes through the network; the one call serves for the value too.

    Raises:
        as `ClassifierGuidance`; OptionError for another `at`.
    """
    places = {"noisy": GuidedBySimilarity, "denoised": GuidedByDenoised}
    if at not in places:
        raise OptionError(f"at says where the similarity is taken, {' or '.join(map(repr, places))}; got {at!r}.")
    return _guided(model, places[at](model, similarity, checked_scale(scale), _told(target)), "similarity")


def ClassifierFree(model: ScoreModel, scale: Scale = 1.0, *, null: Any = None, negative: Any = None) -> ScoreModel:
    """The model with `(1 + w) cond - w uncond` in place of its conditional value; w = 0 is the conditional model.

    The condition comes as ever, by `condition=` or `given`. A call costs two evaluations of the network, one of them
    where w = 0, or w = -1, for all rows.

    Args:
        model: a model that takes a condition.
        scale: w, as in `ClassifierGuidance`. Where guidance is printed as `uncond + s (cond - uncond)`, s = 1 + w.
        null: the condition that says nothing, as the network was trained with it (`fit(..., label_dropout=...)`): a
            number, for every entry of the condition, or a tensor shaped as one row's condition; None calls the network
            without a condition, `network(x, t)`.
        negative: a condition in the place of null, which samples are moved away from: a number for all rows, a tensor
            of one entry for each row, or of one for all, `(1, ...)`; anything else is handed over as it is.

    Raises:
        OptionError, ShapeError: a scale that is none of these; when called, no condition, or a scale or negative
            condition that is not for this number of rows.
    """
    return _guided(model, ClassifierFreeGuided(model, checked_scale(scale), null, _told(negative)))


def cosine(x: State, target: State) -> PerRow:
    """The cosine of the angle between the rows of x and of the target, flattened: a similarity.

    With an embedding, `lambda x, y: cosine(embed(x), y)`.

    Raises:
        ShapeError: they are not of one shape.
    """
    if x.shape != target.shape:
        raise ShapeError(f"cosine compares rows of one shape; got {tuple(x.shape)} and {tuple(target.shape)}.")
    return nn.functional.cosine_similarity(x.flatten(1), target.flatten(1), dim=1)


# Networks


@dataclass(frozen=True, eq=False)
class Guided(Wrapped):
    """A model whose score is moved by `w grad_x function`.

    Attributes:
        function: what rises.
        scale: w.
        about: what the function is told beside the state; None if nothing.
    """

    function: Callable[..., PerRow]
    scale: Scale
    about: Any

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        w = scale_at(self.scale, t)
        if not bool(w.any()):
            return _value(self.model, t, x, condition)
        value, slope = self.both(t, x, condition)
        gain = over(w * _gain(self.model, t, w), x)
        return value + torch.where(gain != 0, gain * slope, 0)

    @abstractmethod
    def both(self, t: Tensor, x: State, condition: Any) -> tuple[State, State]:
        """The model's value, of the kind of the guided model, and the gradient of the function in x."""

    def rows(self, index: slice | Tensor, batch: int) -> Self:
        about, scale = _about_rows(self.about, index, batch, self._told_as), scale_of_rows(self.scale, index, batch)
        return replace(super().rows(index, batch), about=about, scale=scale)

    def modules(self) -> Iterator[nn.Module]:
        """Those of the model, and those of a function that is a module or a method of one."""
        yield from super().modules()
        owner = getattr(self.function, "__self__", self.function)
        if isinstance(owner, nn.Module):
            yield from owner.modules()

    @property
    def no_density(self) -> str | None:
        if self._exact():
            return super().no_density
        return super().no_density or (
            f"{self._name} gives at every t the score of p_t(x) exp(w f_t(x)), and these are not the noised versions "
            "of any density. (ClassifierGuidance with scale=1 and the true log p(y | x_t) has one, p(x | y).)"
        )

    _name: ClassVar[str] = "guidance by a similarity"
    _told_as: ClassVar[str] = "target"

    def _exact(self) -> bool:
        """Whether the score may be that of a density."""
        return always(self.scale, 0)


@dataclass(frozen=True, eq=False)
class GuidedByState(Guided):
    """Guidance by a function of the state itself."""

    def both(self, t: Tensor, x: State, condition: Any) -> tuple[State, State]:
        return _value(self.model, t, x, condition), self.slope(t, x)

    @abstractmethod
    def slope(self, t: Tensor, x: State) -> State:
        """The gradient of the function in x."""


class GuidedByClassifier(GuidedByState):
    """log_prob(t, x) or log_prob(t, x, label)."""

    _name = "classifier guidance with a scale that is not the number 1"
    _told_as = "label"

    def slope(self, t: Tensor, x: State) -> State:
        def function(x: State, t: Tensor, *label: Any) -> PerRow:
            return _one_a_row(self.function(t, x, *label), x, "log_prob(t, x)")

        return _slope(function, x, t.to(x), *_laid(self.about, x, self._told_as))

    def _exact(self) -> bool:
        return always(self.scale, 0) or always(self.scale, 1)


class GuidedBySimilarity(GuidedByState):
    """similarity(x) or similarity(x, target)."""

    def slope(self, t: Tensor, x: State) -> State:
        def function(x: State, *target: Any) -> PerRow:
            return _one_a_row(self.function(x, *target), x, "similarity(x)")

        return _slope(function, x, *_laid(self.about, x, self._told_as))


class GuidedByDenoised(Guided):
    """The similarity of `E[x_0 | x]`; the call that gives it gives the value too."""

    def both(self, t: Tensor, x: State, condition: Any) -> tuple[State, State]:
        model, values = self.model, list[State]()
        if model.blind_in_noise:
            _check_signal(model, t, scale_at(self.scale, t) != 0)

        def function(x: State, *target: Any) -> PerRow:
            output = model.predict(t, x, condition=condition)
            values.append(_as_kind(model, t, x, output))
            return _one_a_row(self.function(_view(model, "data", t, x, output), *target), x, "similarity(x)")

        slope = _slope(function, x, *_laid(self.about, x, self._told_as))
        return (values[0] if torch.is_grad_enabled() else values[0].detach()), slope


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuided(Wrapped):
    """`(1 + w) cond - w uncond`, of a model that holds no condition."""

    scale: Scale
    null: Any
    negative: Any

    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        w = scale_at(self.scale, t)
        if bool((w == -1).all()):
            return self._without(x, t, condition)
        if condition is None:
            raise OptionError(
                "ClassifierFree needs a condition: write sample(..., condition=labels), or guided.given(labels)."
            )
        value = _value(self.model, t, x, condition)
        if not bool(w.any()):
            return value
        listening = HEARD.set(None)  # the variance of a step is that of the conditional call
        try:
            other = self._without(x, t, condition)
        finally:
            HEARD.reset(listening)
        return over(1 + w, x) * value - over(w, x) * other

    def _without(self, x: State, t: Tensor, given: Any) -> State:
        condition = self.null
        if self.negative is not None:
            (condition,) = _laid(self.negative, x, "negative")
        elif isinstance(condition, Real) and isinstance(given, Tensor) and given.ndim:
            condition = null_like(condition, given)
        elif isinstance(condition, Real | Tensor):
            null = torch.as_tensor(condition, device=x.device)
            condition = null.expand(len(x), *null.shape)
        return _value(self.model, t, x, condition)

    def rows(self, index: slice | Tensor, batch: int) -> Self:
        negative, scale = (
            _about_rows(self.negative, index, batch, "negative"),
            scale_of_rows(self.scale, index, batch),
        )
        return replace(super().rows(index, batch), negative=negative, scale=scale)

    def evaluations(self, t: Tensor) -> Count:
        w = scale_at(self.scale, t)
        calls = (w != -1).long() + (w != 0).long()
        return super().evaluations(t) * calls

    @property
    def no_density(self) -> str | None:
        if always(self.scale, 0) or always(self.scale, -1):
            return super().no_density
        return super().no_density or (
            "classifier-free guidance with a scale that is not the number 0 gives at every t the score of "
            "p_t(x | y)^(1 + w) / p_t(x)^w, and these are not the noised versions of any density. (scale=0 is the "
            "conditional model.)"
        )


# What they share


def _guided(model: ScoreModel, network: Guided | ClassifierFreeGuided, function: str = "") -> ScoreModel:
    if not isinstance(model, ScoreModel):
        raise OptionError(f"Guidance needs a ScoreModel; got {type(model).__name__}.")
    if isinstance(network, ClassifierFreeGuided):
        network = replace(network, model=_unconditional(model))
    elif not callable(network.function):
        raise OptionError(f"{function} must be a function, {function}(...) -> (batch,); got {network.function!r}.")
    return model.wrapped(network, _kind(model))


def _kind(model: ScoreModel) -> str:
    """What the guided model predicts."""
    return "v" if model.prediction == "edm" else model.prediction


def _value(model: ScoreModel, t: Tensor, x: State, condition: Any) -> State:
    """The model's value of that kind."""
    return _as_kind(model, t, x, model.predict(t, x, condition=condition))


def _as_kind(model: ScoreModel, t: Tensor, x: State, output: State) -> State:
    """The same from an output that is known."""
    return output if _kind(model) == model.prediction else _view(model, _kind(model), t, x, output)


def _view(model: ScoreModel, kind: str, t: Tensor, x: State, output: State) -> State:
    """`model.view(kind, t, x)` from an output that is known."""
    at = model.point(t)
    from_x, from_output = model.weights_at(at, *PREDICTIONS[kind](at))
    return over(from_x, x) * x + over(from_output, x) * output


def _gain(model: ScoreModel, t: Tensor, w: Tensor) -> Tensor:
    """What the value moves by where the score moves by 1, `m sigma^2 / alpha - n sigma`."""
    if model.prediction == "score":
        return torch.ones_like(w)
    at = model.point(t)
    m, n = PREDICTIONS[_kind(model)](at)
    needed = (m != 0) & (w != 0)
    _check_signal(model, t, needed)
    return torch.where(needed, m * at.sigma**2 / at.alpha, 0) - n * at.sigma


def _check_signal(model: ScoreModel, t: Tensor, needed: Tensor) -> None:
    """Refuse rows where the data is needed and alpha = 0.

    Raises:
        TimeError: there are some.
    """
    lost = needed & (model.point(t).alpha == 0)
    if bool(lost.any()):
        raise TimeError(
            f"At t = {t[lost][0]:g} alpha is 0 and the state says nothing of the data, so that guidance by a gradient "
            f"cannot be said in terms of it (prediction={model.prediction!r}): start below, with times=, let the scale "
            "be 0 there (guidance.interval), take the gradient at the noisy state of a model that predicts 'noise' or "
            "'score', or use ClassifierFree."
        )


def _slope(function: Callable[..., PerRow], x: State, *rest: Any) -> State:
    """The gradient of a function of the state, refused if there is none."""
    _, slope = value_and_slope(function, x, *rest)
    if slope is None:
        raise CapabilityError(
            "The function that guides has no gradient in x: its value was computed without x, or by operations that "
            "are not differentiable (under no_grad, after detach(), by argmax or in numpy), and guidance by it would "
            "do nothing. Return log-probabilities or similarities computed from x by differentiable torch operations."
        )
    return slope


def _one_a_row(value: object, x: State, name: str) -> PerRow:
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"{name} must return one number for every row, shape (batch,), here ({len(x)},); got {got}. Of a "
            "classifier's log-probabilities (batch, classes) take those of the labels: log_probs[range(batch), label]."
        )
    return value


def _laid(about: Any, x: State, name: str) -> tuple[Any, ...]:
    """What a function is told beside the state, one entry for each row; nothing if it is None."""
    if about is None:
        return ()
    if not isinstance(about, Real | Tensor):
        return (about,)
    told = torch.as_tensor(about, device=x.device)
    if told.ndim == 0 or (len(told) == 1 and len(x) != 1):
        told = told.reshape(1, *told.shape[1:]).expand(len(x), *told.shape[1:])
    _check_entries(told, len(x), name)
    return (told,)


def _about_rows(about: Any, index: slice | Tensor, batch: int, name: str) -> Any:
    """The same for some rows; refused now if it is not for this batch, as it might happen to fit a part of it."""
    if isinstance(about, Tensor) and about.ndim and len(about) != 1:
        _check_entries(about, batch, name)
    return rows_of(about, index, batch)


def _check_entries(told: Tensor, rows: int, name: str) -> None:
    if len(told) != rows:
        raise ShapeError(
            f"{name} has {len(told)} entries, shape {tuple(told.shape)}, and there are {rows} rows: give one for "
            "each row, or one for all, a number or a tensor of shape (1, ...)."
        )


def _told(about: Any) -> Any:
    """What a function is told, as it is kept: arrays as tensors, which are cut to rows."""
    return torch.as_tensor(about) if isinstance(about, np.ndarray) else about


def _unconditional(model: ScoreModel) -> ScoreModel:
    """The model without the condition that it, or one inside of it, holds."""
    network = model.network
    if isinstance(network, Wrapped):
        network = replace(network, model=_unconditional(network.model))
    return replace(model, network=network, condition=None)
