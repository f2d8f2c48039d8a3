r"""Energy models: a network gives E, and the score is its negative gradient.

A density is written as `p(x) = exp(-E(x)) / Z` with a network of one output a row. Z is not known, and not needed:

    grad log p(x) = -grad E(x),        log p(x) - log p(y) = E(y) - E(x).

A score that is a gradient has no rotation, as every true score has none; a free vector field may have some. The price
is one more derivative everywhere. With a time, `p_t(x) = exp(-E(x, t)) / Z_t`, and differences hold at one time each.

`Energy(network)` is the field `-grad E` as a network itself: `ScoreModel(Energy(network), sde, prediction="score")` is
a score model, which every loss trains and every sampler takes. The score near the data end is of the size 1 / sigma, so
that a network does well to divide its output by sigma(t), or to be a distance `|x - f(x, t)|^2 / (2 sigma^2)`.

References: LeCun et al. 2006; Song and Kingma 2021 (arXiv:2101.03288), how to train energy models; Salimans and Ho
2021, Should EBMs model the energy or the score?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdediff.errors import OptionError, ShapeError
from sdediff.model import trackable
from sdediff.shapes import PerRow, State, Time, as_time, check_state, per_row


class Energy(nn.Module):
    """The field `-grad E` of a network E.

    Args:
        network: an `nn.Module`, `E(x)`, `E(x, t)` or `E(x, t, condition)`, of shape `(batch,)`. A row's energy must not
            depend on other rows.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise OptionError(f"Energy needs a torch.nn.Module; got {type(network).__name__}.")
        self.network = network

    def forward(self, x: State, *rest: Any) -> State:
        """`-grad E(x, ...)`, shaped as x; differentiable where gradients are enabled, and computed where not."""
        return -value_and_gradient(self.network, x, *rest)[1]

    def energy(self, t: Time | None, x: State, *, condition: Any = None) -> PerRow:
        """E at a time, `(batch,)`, in nats: `-log p_t(x)` up to a number that depends on t only.

        Args:
            t: `()` or `(batch,)`, as the network sees it; None for an energy without a time.
            x: `(batch, *event)`.
            condition: passed to the network, if not None.
        """
        check_state(x)
        clock = () if t is None else (per_row(as_time(t), x).to(x),)
        return one_a_row(self.network(x, *clock, *(() if condition is None else (condition,))), x)


def value_and_gradient(function: Callable[..., PerRow], x: State, *rest: Any) -> tuple[PerRow, State]:
    """`function(x, ...)`, one number a row, and its gradient in x; differentiable where gradients are enabled.

    Raises:
        ShapeError: the function is not `(batch,)`.
    """
    value, slope = value_and_slope(function, x, *rest)
    with torch.inference_mode(False):
        return value, x.new_zeros(x.shape) if slope is None else slope


def value_and_slope(function: Callable[..., PerRow], x: State, *rest: Any) -> tuple[PerRow, State | None]:
    """The same; None for the gradient of a value that was not computed from x, or not by differentiable operations."""
    check_state(x)
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        at = x if graph and x.requires_grad else x.detach().clone().requires_grad_()
        value = one_a_row(function(at, *trackable(rest)), at)
        if not value.requires_grad:
            return value, None
        slope = torch.autograd.grad(value.sum(), at, create_graph=graph, allow_unused=True)[0]
    return (value if graph else value.detach()), slope


def one_a_row(value: object, x: State) -> PerRow:
    """The value, refused if it is not one number a row."""
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"An energy or a log-density is one number for every row, shape ({len(x)},); got {got}. "
            "A last layer of shape (batch, 1) becomes that by nn.Flatten(0)."
        )
    return value
