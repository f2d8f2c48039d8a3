r"""Standard normal numbers in which row i depends on a seed and i alone, bitwise, whatever the batch around it.

Rows are drawn in blocks, each from a generator of its own. The size of a block depends on the event only, and a block
is always drawn whole, so neither the batch size nor the row a batch starts at changes a number. A call of a generator
costs as much as some hundred numbers; it pays to draw several steps at a time.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdediff.errors import ShapeError
from sdediff.shapes import State

_ROWS = 64
_ENTRIES_PER_BLOCK = 16384
_STEPS = 16
_ENTRIES_PER_CALL = 16384
_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash integers to 64 bits (the splitmix64 finaliser, folded): unrelated seeds from related numbers."""
    state = 0
    for part in map(operator.index, parts):
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def generator_seed(start: int, number: int) -> int:
    """The number-th seed from a hashed start: CPU generators keep 32 bits, in which consecutive seeds never collide."""
    return (start + number) & 0xFFFFFFFF


@dataclass(frozen=True)
class Blocks:
    """The blocks that the rows of a batch lie in.

    Attributes:
        numbers: the index of each block.
        rows: rows per block.
        skip: rows of the first block that come before the batch.
        shape: `(batch, *event)`.
    """

    numbers: range
    rows: int
    skip: int
    shape: torch.Size

    @classmethod
    def of(cls, shape: torch.Size, first_row: int) -> Blocks:
        fitting = _ENTRIES_PER_BLOCK // max(math.prod(shape[1:]), 1)
        rows = min(_ROWS, 1 << max(fitting.bit_length() - 1, 0))
        first, skip = divmod(first_row, rows)
        return cls(range(first, (first_row + shape[0] - 1) // rows + 1), rows, skip, shape)

    @property
    def entries(self) -> int:
        """Numbers in one draw of a block."""
        return self.rows * math.prod(self.shape[1:])

    def rows_of(self, draws: Tensor) -> Tensor:
        """The draws of the batch's rows, `(k, batch, *event)`, from those of all blocks, `(blocks, k, entries)`.

        No copy is made where the batch lies in one block or a block is one row.
        """
        count, k, entries = draws.shape
        if k == 1:
            return draws.view(count * self.rows, -1)[self.skip : self.skip + self.shape[0]].view(1, *self.shape)
        rows = draws.view(count, k, self.rows, entries // self.rows).transpose(0, 1).reshape(k, count * self.rows, -1)
        return rows[:, self.skip : self.skip + self.shape[0]].reshape(k, *self.shape)


class _Ahead:
    """Draws for one batch, made several at a time: the first alone, as a deterministic solve needs no more."""

    def __init__(self, seed: int, first_row: int, x: State) -> None:
        self._blocks = Blocks.of(x.shape, first_row)
        self._dtype, self._device = x.dtype, x.device
        self._generators = [torch.Generator(device=x.device) for _ in self._blocks.numbers]
        start = mix(seed)
        for number, generator in zip(self._blocks.numbers, self._generators, strict=True):
            generator.manual_seed(generator_seed(start, number))
        self._ready = self._draw(1)

    def next(self) -> State:
        if not self._ready:
            self._ready = self._draw(max(1, min(_STEPS, _ENTRIES_PER_CALL // max(self._blocks.entries, 1))))
        return self._ready.pop()

    def _draw(self, steps: int) -> list[State]:
        if torch.is_inference_mode_enabled():  # what is drawn now may be used where gradients are taken
            with torch.inference_mode(False):
                return self._draw(steps)
        shape = (len(self._generators), steps, self._blocks.entries)
        draws = torch.empty(shape, dtype=self._dtype, device=self._device)
        for target, generator in zip(draws.unbind(), self._generators, strict=True):
            target.normal_(generator=generator)
        return list(self._blocks.rows_of(draws).unbind())[::-1]


class RowDraws:
    """Standard normal draws in which row i depends on the seed and i alone.

    States of another event shape, dtype or device get numbers of their own, independent of those before. The number
    of rows must stay the same, as the rows move on together.
    """

    def __init__(self, seed: int, first_row: int) -> None:
        self._seed = seed
        self._first_row = first_row
        self._streams: dict[tuple[torch.Size, torch.dtype, torch.device], _Ahead] = {}

    def __call__(self, x: State) -> State:
        """The next standard normal numbers of every row, shaped as x."""
        key = (x.shape, x.dtype, x.device)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self._open(x)
        return stream.next()

    def _open(self, x: State) -> _Ahead:
        for shape, _, _ in self._streams:
            if shape[0] != x.shape[0]:
                raise ShapeError(
                    f"A noise stream serves one batch: it was asked for {shape[0]} rows first, now for {x.shape[0]}. "
                    "Open a stream for each batch: noise.open(first_row)."
                )
        return _Ahead(mix(self._seed, len(self._streams)), self._first_row, x)
