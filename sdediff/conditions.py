r"""Conditions of rows: labels, the null label that stands for none, and dropout of labels in training.

A network with K classes knows the labels 0, ..., K - 1 and a further one, `null = K`. Where training replaces the label
y of a row by the null label with probability p, whatever else the row is, the denoising loss has the minimiser

    E[eps | x_t, y]  at a label y,        E[eps | x_t]  at the null label,

because a row whose label is null tells nothing of y. So one network is the model of every class and of all data, which
is what classifier-free guidance combines. p shares the rows out between the two and moves neither minimiser.

Any tensor with one entry a row may be the condition; its null is then a value of the caller's that no row has, such as
zeros for embedding vectors.

Reference: Ho and Salimans 2022 (arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError


def labels_of(labels: object, rows: int, classes: int, owner: str, *, null: bool = False) -> Tensor:
    """Labels as int64 `(rows,)`, refused if they are anything else.

    Args:
        labels: what was given.
        rows: of the batch.
        classes: K; labels are 0, ..., K - 1.
        owner: who asks, for the message.
        null: whether K, the null label, is legal too.

    Raises:
        ShapeError: not one whole number a row.
        OptionError: a label out of range (told on the CPU only, where it costs nothing to look).
    """
    if not isinstance(labels, Tensor) or labels.shape != (rows,):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else repr(labels)
        raise ShapeError(f"{owner} takes one label a row as its condition, shape ({rows},); got {got}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ShapeError(f"{owner} takes whole numbers as labels; got {labels.dtype}. Write labels.long().")
    if labels.is_cpu:
        wrong = (labels < 0) | (labels >= classes + null)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            none = f", and {classes} for no label" if null else ""
            raise OptionError(
                f"{owner} knows the labels 0 to {classes - 1}{none}; got {int(labels[row])} in row {row}."
            )
    return labels.long()


@dataclass(frozen=True, eq=False)
class LabelDropout:
    """Conditions of which every row is replaced by the null with some probability, independently of all else.

    Args:
        probability: in (0, 1).
        null: a number, or a tensor shaped as the condition of one row.

    Raises:
        OptionError: the probability is out of range, or there is no null.
    """

    probability: float
    null: Any

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise OptionError(
                "label_dropout is the probability that a row is trained without its condition, in [0, 1); got "
                f"{self.probability}."
            )
        if self.null is None:
            raise OptionError(
                f"label_dropout={self.probability} needs the null that takes the place of a condition: build the "
                "network with classes=..., which has one, or write null=..., a value shaped as one row's condition."
            )

    def __call__(self, condition: object) -> Tensor:
        """The condition `(batch, ...)` with some rows replaced, drawn from torch's generator on the CPU.

        Raises:
            OptionError: there is no condition, or its dtype cannot hold the null.
            ShapeError: it is not a tensor with one entry a row, or the null is not shaped as an entry.
        """
        if condition is None:
            raise OptionError(
                f"label_dropout={self.probability} replaces conditions, and the data has none: write condition=..., "
                "one entry for every row, or give a dataset of pairs (event, condition)."
            )
        if not isinstance(condition, Tensor) or condition.ndim == 0:
            raise ShapeError(
                "label_dropout replaces rows of a condition that is a tensor (batch, ...); got "
                f"{type(condition).__name__}. Drop the parts of others in the dataset."
            )
        null = null_like(self.null, condition)
        dropped = (torch.rand(len(condition)) < self.probability).to(condition.device)
        return torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null, condition)


def null_like(null: Any, condition: Tensor) -> Tensor:
    """A condition shaped as this one, `(batch, ...)`, in which every row is the null.

    Raises:
        OptionError: the dtype of the condition cannot hold the null.
        ShapeError: the null is neither a number nor shaped as an entry.
    """
    given = torch.as_tensor(null)
    if given.ndim and given.shape != condition.shape[1:]:
        raise ShapeError(
            f"null must be a number or shaped as one row's condition, {tuple(condition.shape[1:])}; got "
            f"{tuple(given.shape)}."
        )
    if not condition.is_floating_point() and not torch.equal(given.to(condition.dtype).to(given), given):
        raise OptionError(f"The condition is {condition.dtype}, which cannot hold null = {null}.")
    return given.to(condition).expand(condition.shape)
