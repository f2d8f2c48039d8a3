"""Networks made of models: what a wrapper owes to the model inside it.

Guidance and hooks turn a `ScoreModel` into another one, whose network holds the first. Such a network is shown the time
t itself, float64, gets the condition of its caller, and answers for the model inside: the dtype and the modules, the
times that it knows, the rows that it holds, what a call costs, and why there is no density, if there is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from sdediff.shapes import Grid, State

if TYPE_CHECKING:
    from sdediff.model import ScoreModel

Count: TypeAlias = int | Tensor
"""A number of network evaluations for all rows, or one for every row, `(batch,)`."""


class HoldsRows(ABC):
    """A network that may hold something for every row of a batch."""

    @abstractmethod
    def __call__(self, *args: Any, **more: Any) -> Tensor:
        """The output of the network."""

    @abstractmethod
    def rows(self, index: slice | Tensor, batch: int) -> HoldsRows:
        """The network for some rows of a batch."""

    @abstractmethod
    def evaluations(self, t: Tensor) -> Count:
        """Network evaluations for every row of a call at times `(batch,)`; a tensor `(batch,)` where rows differ."""


@dataclass(frozen=True, eq=False)
class Wrapped(HoldsRows):
    """A network made of a model.

    A subclass that holds tensors with one entry for every row extends `rows`; one that makes several calls of the model
    extends `evaluations`; one whose output is the score of no density overrides `no_density`.
    """

    model: ScoreModel
    keeps_time: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, x: State, t: Tensor, condition: Any = None) -> State:
        """The output, shaped as x; t is float64 `(batch,)`."""

    @property
    def no_density(self) -> str | None:
        """Why this is not the score of the noised data of any density; None if it may be."""
        return self.model.no_density

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of samples, where the model's network names one."""
        return getattr(self.model.network, "dtype", None)

    @property
    def deviation(self) -> float:
        """That of the model inside."""
        return self.model.deviation

    @property
    def known_times(self) -> Grid | None:
        """Those of the model inside."""
        return self.model.known_times

    def rows(self, index: slice | Tensor, batch: int) -> Self:
        return replace(self, model=self.model.rows(index, batch))

    def evaluations(self, t: Tensor) -> Count:
        return evaluations(self.model.network, t)

    def modules(self) -> Iterator[torch.nn.Module]:
        """The modules of the model's network, for those who set their mode."""
        modules = getattr(self.model.network, "modules", None)
        return iter(()) if modules is None else modules()

    def parameters(self) -> Iterator[Tensor]:
        """Likewise its parameters."""
        parameters = getattr(self.model.network, "parameters", None)
        return iter(()) if parameters is None else parameters()


class Counter(HoldsRows):
    """A network that counts its evaluations, also those of its parts for some rows of a batch."""

    def __init__(self, network: Callable[..., Tensor], whole: Counter | None = None) -> None:
        self.network = network
        self.keeps_time = getattr(network, "keeps_time", False)
        self.deviation = getattr(network, "deviation", None)
        self.calls = 0
        self._whole = whole

    def __call__(self, *args: Any) -> Tensor:
        count = self.evaluations(args[1])
        self._count(count if isinstance(count, int) else int(count.max()))
        return self.network(*args)

    def _count(self, calls: int) -> None:
        self.calls += calls
        if self._whole is not None:
            self._whole._count(calls)

    def rows(self, index: slice | Tensor, batch: int) -> Counter:
        if not isinstance(self.network, HoldsRows):
            return self
        return Counter(self.network.rows(index, batch), self)

    def evaluations(self, t: Tensor) -> Count:
        return evaluations(self.network, t)


def evaluations(network: Callable[..., Tensor], t: Tensor) -> Count:
    """Network evaluations for every row of a call at times `(batch,)`: one, if the network is not made of others."""
    return network.evaluations(t) if isinstance(network, HoldsRows) else 1
