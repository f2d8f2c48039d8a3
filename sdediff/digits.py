"""Real data that needs no download: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of integer codes 0..16.

A code c is spread over its bin, `x = -1 + 2 (c + u) / 17` with u uniform on (0, 1), so that the data has a density.
A seed splits the digits into training and test rows; the same seed and number of rows give the same split everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdediff.draws import mix
from sdediff.errors import OptionError, optional_import
from sdediff.shapes import Codes, State

LEVELS = 17
EVENT = (1, 8, 8)


class Dequantized(Dataset[Tensor]):
    """Integer codes as points of `[-1, 1]`, uniformly spread over their bins anew at every access."""

    def __init__(self, codes: Codes, levels: int) -> None:
        self.codes = codes
        self.levels = levels

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Tensor:
        return spread(self.codes[index], self.levels)

    def all(self, seed: int) -> State:
        """Every item once, with the spread fixed by a seed."""
        return spread(self.codes, self.levels, torch.Generator().manual_seed(seed))


def spread(codes: Tensor, levels: int = LEVELS, generator: torch.Generator | None = None) -> Tensor:
    """Codes as points of `[-1, 1]`, uniformly spread over their bins by a generator (torch's global one if None)."""
    return -1 + 2 * (codes + torch.rand(codes.shape, generator=generator)) / levels


def digits(train_rows: int, seed: int) -> tuple[Codes, Codes]:
    """Training and test codes `(n, 1, 8, 8)`, shuffled by the seed.

    Raises:
        OptionError: no digits would be left on one side of the split.
        MissingExtraError: scikit-learn is not installed.
    """
    return _split(_bunch().images, train_rows, seed, channel=True)


def labels(train_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The digits 0 to 9 that the rows of `digits` with the same arguments show, int64 `(n,)` each."""
    return _split(_bunch().target, train_rows, seed, channel=False)


def _bunch() -> Any:
    return optional_import("sklearn.datasets", "demo").load_digits()


def _split(values: Any, train_rows: int, seed: int, *, channel: bool) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(values).long()
    if not 1 <= train_rows < len(rows):
        raise OptionError(
            f"There are {len(rows)} digits: train_rows must leave some on both sides, 1 to {len(rows) - 1}; "
            f"got {train_rows}."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix(seed, 21) >> 2))
    rows = rows[:, None] if channel else rows
    return rows[order[:train_rows]], rows[order[train_rows:]]
