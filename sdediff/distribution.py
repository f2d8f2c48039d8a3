"""A model as a distribution of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from sdediff.errors import OptionError, ShapeError
from sdediff.likelihood import log_prob
from sdediff.model import ScoreModel
from sdediff.sampling import sample


class ModelDistribution(Distribution):
    """A model as a distribution of torch, with `sample` by `sdediff.sample` and `log_prob` by `sdediff.log_prob`."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own form
    has_rsample = False

    def __init__(
        self,
        model: ScoreModel,
        event_shape: Sequence[int],
        *,
        sample_options: dict[str, Any] | None = None,
        log_prob_options: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.sample_options = {"final": "none", **(sample_options or {})}
        self.log_prob_options = {"tail": "none", **(log_prob_options or {})}
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All real events."""
        return constraints.independent(constraints.real, len(self.event_shape))  # type: ignore[no-untyped-call]  # torch's has none

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples `(*sample_shape, *event_shape)`; a seed is drawn from torch's global generator unless one is set."""
        count = math.prod(sample_shape)
        drawn = sample(self.model, (count, *self.event_shape), **self.sample_options).x
        return drawn.reshape((*sample_shape, *self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, `value.shape` without the event."""
        event = tuple(self.event_shape)
        if tuple(value.shape[value.ndim - len(event) :]) != event:
            raise ShapeError(f"value must have shape (..., {', '.join(map(str, event))}); got {tuple(value.shape)}.")
        batch = value.shape[: value.ndim - len(event)]
        return log_prob(self.model, value.reshape(-1, *event), **self.log_prob_options).value.reshape(batch)


def as_distribution(
    model: ScoreModel,
    event_shape: Sequence[int],
    *,
    sample_options: dict[str, Any] | None = None,
    log_prob_options: dict[str, Any] | None = None,
) -> ModelDistribution:
    """The model as a `torch.distributions.Distribution` with `sample` and `log_prob`.

    Both are of the states at t_min, `sample(..., final="none")` and `log_prob(..., tail="none")`, unless the options
    say otherwise: samples that are denoised have another law.

    Args:
        event_shape: shape of one event.
        sample_options, log_prob_options: passed to `sample` and `log_prob`, for instance `{"steps": 20}` and
            `{"atol_nats": 0.01}`.
    """
    if not isinstance(model, ScoreModel):
        raise OptionError(f"The first argument must be a ScoreModel; got {type(model).__name__}.")
    return ModelDistribution(model, event_shape, sample_options=sample_options, log_prob_options=log_prob_options)
