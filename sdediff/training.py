r"""Training of score models: `fit(model, data)` is `train` with the denoising loss, and returns a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sdediff.checkpoints import load, save
from sdediff.conditions import LabelDropout
from sdediff.errors import OptionError
from sdediff.losses import WEIGHTINGS, denoising
from sdediff.model import ScoreModel
from sdediff.optimise import Options, digest, train
from sdediff.shapes import PerRow, State, check_state
from sdediff.times import Law, check_law

__all__ = ["TrainedModel", "fit", "load", "save"]


@dataclass(frozen=True, eq=False)
class TrainedModel(ScoreModel):
    """A model and the record of its training.

    Attributes:
        losses: the loss of every step, float64 `(steps,)`.
    """

    losses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False)


def fit(
    model: ScoreModel,
    data: Tensor | Dataset[Any],
    *,
    weighting: str = "simple",
    times: Law | None = None,
    loss: Callable[..., PerRow] | None = None,
    label_dropout: float = 0.0,
    null: Any = None,
    **options: Unpack[Options],
) -> TrainedModel:
    """Train the network of a model by denoising score matching, or by another loss, in place.

    At the end the network holds the exponential moving average of its weights, in evaluation mode.

    Args:
        model: its network must be an `nn.Module`.
        data: a tensor `(n, *event)`, or a map-style dataset whose items are events or pairs `(event, condition)`; cast
            to the dtype of the parameters.
        weighting: of the denoising loss, see `sdediff.weightings`.
        times: the law of its times in place of the weighting's own, see `sdediff.times`. One that learns, such as
            `LossAware`, is kept in checkpoints, which one that a loss was given elsewhere is not.
        loss: in place of the denoising loss, `loss(model, x0, condition=condition) -> (batch,)`; it is also given
            `times=times` where times is not None.
        label_dropout: the probability in [0, 1) with which the condition of a row is replaced by the null, so that the
            network learns the model without a condition too (`sdediff.conditions`); 0.1 is usual.
        null: what replaces it, a number or a tensor shaped as one row's condition; the network's own attribute `null`,
            the label after the last class, if None.
        **options: those of `sdediff.optimise.train`: steps, batch_size, lr, condition, ema, clip, warmup, decay,
            optimizer, seed, device, checkpoint, checkpoint_every, progress.

    Raises:
        OptionError, ShapeError: an argument does not fit.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        DivergenceError: the loss became NaN or infinite; names the step and the rows of its batch.
    """
    network = model.network
    if not isinstance(network, nn.Module):
        raise OptionError(f"fit trains a network that is a torch.nn.Module; got {type(network).__name__}.")
    if weighting not in WEIGHTINGS:
        raise OptionError(f"Unknown weighting {weighting!r}: write one of {', '.join(map(repr, WEIGHTINGS))}.")
    if loss is not None and weighting != "simple":
        raise OptionError(
            f"weighting={weighting!r} belongs to the denoising loss; leave it out when you pass loss=, or give it to "
            "the loss with functools.partial."
        )
    if times is not None:
        check_law(times)
    if not label_dropout and null is not None:
        raise OptionError(f"null={null} takes the place of dropped conditions: write label_dropout=0.1 with it.")
    null = getattr(network, "null", None) if null is None else null
    drop = LabelDropout(label_dropout, null) if label_dropout else None
    given = {} if times is None else {"times": times}
    if isinstance(data, Tensor):
        check_state(data, "data")

    def objective(x0: State, condition: Any) -> PerRow:
        check_state(x0, "data")
        condition = condition if drop is None else drop(condition)
        if loss is None:
            return denoising(model, x0, weighting=weighting, times=times, condition=condition)
        return loss(model, x0, condition=condition, **given)

    identity = {
        "weighting": weighting if loss is None else _words(loss, model),
        "times": _fingerprint_times(times, model), "prediction": model.prediction, "sigma_data": model.sigma_data,
        "sde": _fingerprint(model), "label_dropout": label_dropout or None,
        "null": None if drop is None else _words(null, model),
    }  # fmt: skip
    module = nn.ModuleList([network, times]) if isinstance(times, nn.Module) else network
    losses = train(module, objective, data, identity=identity, beside=lambda folder: save(model, folder), **options)
    return TrainedModel(
        network, model.sde, model.prediction, model.time, model.sigma_data, model.condition, losses=losses
    )


def _fingerprint(model: ScoreModel) -> str:
    """The SDE in words and in numbers: one of the user's own may have no telling name."""
    sde = model.linear
    grid = torch.linspace(sde.t_min, sde.t_max, 9, dtype=torch.float64)
    scales = [f"{value:.9g}" for row in sde.scales_at(grid) for value in row.tolist()]
    return f"{sde}: {sde.t_min:g} to {sde.t_max:g}, scales {' '.join(scales)}"


def _fingerprint_times(law: Law | None, model: ScoreModel) -> str:
    """The law in words, and some of its times, as its words may leave out a grid."""
    if law is None:
        return "the weighting's"
    base: Law = getattr(law, "base", law)  # what a law has learnt belongs to the run, not to its settings
    some = base.time(model.linear, torch.linspace(0.05, 0.95, 9, dtype=torch.float64)).tolist()
    return f"{_plain(law)}: {' '.join(f'{t:.9g}' for t in some)}"


def _words(value: object, model: ScoreModel) -> str:
    """A loss, or what a partial loss holds, in words that are the same in another process."""
    if isinstance(value, partial):
        parts = [_words(part, model) for part in (value.func, *value.args)]
        parts += [f"{name}={_words(part, model)}" for name, part in sorted(value.keywords.items())]
        return f"partial({', '.join(parts)})"
    if isinstance(value, Law):
        return _fingerprint_times(value, model)
    if isinstance(value, Tensor):
        return f"tensor {digest(value)}"
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else _plain(value)


def _plain(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
