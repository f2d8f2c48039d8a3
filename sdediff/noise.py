r"""Where randomness comes from: noise sources that give row i the same numbers in any batch.

A source is a recipe (`Noise`); `open(first_row)` starts a stream (`NoiseStream`) from it for a batch whose first row
has the index `first_row`. Opening the same source twice gives the same numbers, so a solve can be replayed. A stream
answers for a step from `t` to `s`:

- `unit(x, t, s)`, standard normal, shaped as x;
- `increment(x, t, s) = W(s) - W(t)`, normal with variance `|s - t|`.

`RowNoise(seed)` draws fresh numbers for every step. `BrownianPath(seed, t0, t1)` is one fixed path per row that may be
asked at any times and in any order: a coarse and a fine grid then see the same path, which is what strong orders and
step-size studies need. It is a dyadic bridge: given `W(l)` and `W(r)`, the value in the middle is
`(W(l) + W(r)) / 2 + sqrt(r - l) / 2 * z`, with z drawn from a seed of its own for every node of the tree.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdediff.errors import CapabilityError, OptionError, TimeError
from sdediff.shapes import State, over

_ENTRIES_PER_GENERATOR = 4096
_MASK = (1 << 64) - 1


def _check_seed(seed: object) -> None:
    try:
        operator.index(seed)  # type: ignore[arg-type]  # whatever is no number raises
    except TypeError as error:
        raise OptionError(f"A seed must be a whole number; got {seed!r}.") from error


class NoiseStream(ABC):
    """The noise of one solve over one batch."""

    @abstractmethod
    def normal(self, x: State) -> State:
        """Standard normal numbers shaped as x, independent of all that the stream gives elsewhere."""

    @abstractmethod
    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        """`(W(s) - W(t)) / sqrt(|s - t|)`, shaped as x."""

    def increment(self, x: State, t: Tensor, s: Tensor) -> State:
        """`W(s) - W(t)`, shaped as x; t and s are `()` or `(batch,)`."""
        return over((s - t).abs().sqrt(), x) * self.unit(x, t, s)

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        r"""`W(s) - W(t)` and its integral over the step, `int_t^s (W(u) - W(t)) |du|`, with their joint law."""
        raise CapabilityError(
            f"{type(self).__name__} gives increments of the path but not their time integral, which this method "
            "needs. Use the default noise (seed=...) or a method that needs increments only, such as 'euler'."
        )


class Noise(ABC):
    """A recipe for noise; solves open a stream from it."""

    @abstractmethod
    def open(self, first_row: int = 0) -> NoiseStream:
        """A new stream for a batch whose first row has this index. The same arguments give the same numbers."""


def mix(*parts: int) -> int:
    """Hash integers to 64 bits (the splitmix64 finaliser, folded): unrelated seeds from related numbers."""
    state = 0
    for part in map(operator.index, parts):
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class _Blocks:
    """The blocks of rows that a batch lies in.

    Rows are drawn in blocks of a size that depends on the event only; a block is always drawn whole, from a generator
    of its own, so batch size and chunking change nothing.
    """

    numbers: range
    entries: int
    skip: int

    @classmethod
    def of(cls, x: State, first_row: int) -> _Blocks:
        size = max(x[0].numel(), 1)
        rows = max(1, _ENTRIES_PER_GENERATOR // size)
        first, skip = divmod(first_row, rows)
        return cls(range(first, (first_row + len(x) - 1) // rows + 1), rows * size, skip)

    def rows_of(self, draws: Tensor, x: State) -> State:
        """The rows of the batch, shaped as x, from the draws of all blocks."""
        return draws.view(-1, x[0].numel())[self.skip : self.skip + len(x)].reshape(x.shape)


class RowDraws:
    """Standard normal draws in which row i depends on the seed and i alone.

    Block seeds are consecutive 32-bit numbers from a hashed start (torch's CPU generators keep 32 bits), so that two
    blocks of one solve never share a seed.
    """

    def __init__(self, seed: int, first_row: int) -> None:
        self._seed = seed
        self._first_row = first_row
        self._generators: list[torch.Generator] = []

    def __call__(self, x: State) -> State:
        """The next standard normal numbers of every row, shaped as x."""
        blocks = _Blocks.of(x, self._first_row)
        if not self._generators:
            start = mix(self._seed)
            for number in blocks.numbers:
                generator = torch.Generator(device=x.device)
                generator.manual_seed((start + number) & 0xFFFFFFFF)
                self._generators.append(generator)
        draws = torch.empty(len(self._generators), blocks.entries, dtype=x.dtype, device=x.device)
        for target, generator in zip(draws, self._generators, strict=True):
            target.normal_(generator=generator)
        return blocks.rows_of(draws, x)


def keyed_normal(x: State, key: int, first_row: int) -> State:
    """Standard normal numbers shaped as x that depend on a 64-bit key and the row only, from a counter-based generator.

    They are drawn in float64 and cast, so that a path is the same in any dtype.
    """
    blocks = _Blocks.of(x, first_row)
    draws = [
        np.random.Generator(np.random.Philox(key=[key, n])).standard_normal(blocks.entries) for n in blocks.numbers
    ]
    return blocks.rows_of(torch.from_numpy(np.stack(draws)), x).to(x)


class _FreshStream(NoiseStream):
    def __init__(self, seed: int, first_row: int) -> None:
        self._draw = RowDraws(seed, first_row)

    def normal(self, x: State) -> State:
        return self._draw(x)

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        return self._draw(x)

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        step = over((s - t).abs(), x)
        increment = step.sqrt() * self._draw(x)
        return increment, step / 2 * increment + step * (step / 12).sqrt() * self._draw(x)


@dataclass(frozen=True)
class RowNoise(Noise):
    """Fresh normal numbers at every step; row i depends on `seed` and i only, not on the batch around it."""

    seed: int

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def open(self, first_row: int = 0) -> NoiseStream:
        return _FreshStream(self.seed, first_row)


class _PathStream(NoiseStream):
    """Keeps the nodes between the root and the last leaf asked for; all others can be drawn again from their seeds."""

    def __init__(self, path: BrownianPath, first_row: int) -> None:
        self._path = path
        self._first_row = first_row
        self._start = RowDraws(mix(path.seed, 1), first_row)
        self._branch: dict[tuple[int, int], Tensor] = {}
        self._latest: list[tuple[float, Tensor]] = []

    def normal(self, x: State) -> State:
        return self._start(x)

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        return self.increment(x, t, s) / over((s - t).abs().sqrt(), x)

    def increment(self, x: State, t: Tensor, s: Tensor) -> State:
        return self.value(x, s) - self.value(x, t)

    def value(self, x: State, t: Tensor) -> State:
        """`W(t)` for one time `t`, shaped as x, with `W(t0) = 0`."""
        if t.ndim:
            raise CapabilityError("A BrownianPath answers for one time at a time; per-row times need RowNoise.")
        path = self._path
        for time, known in self._latest:
            if time == float(t):
                return known
        where = (float(t) - path.t0) / (path.t1 - path.t0)
        if not -1e-12 <= where <= 1 + 1e-12:
            raise TimeError(f"The Brownian path spans [{path.t0:g}, {path.t1:g}]; t = {float(t):g} lies outside.")
        left, right = torch.zeros_like(x), self._node(x, 0, 0)
        visited = {(0, 0)}
        low, width = 0.0, 1.0
        for level in range(1, path.depth + 1):
            if where in (low, low + width):
                break
            width /= 2
            number = int(low / width) + 1
            visited.add((level, number))
            middle = (left + right) / 2 + ((path.t1 - path.t0) * width / 2) ** 0.5 * self._node(x, level, number)
            if where < low + width:
                right = middle
            else:
                left, low = middle, low + width
        self._branch = {key: node for key, node in self._branch.items() if key in visited}
        here = left + (right - left) * min(max((where - low) / width, 0.0), 1.0)
        self._latest = [*self._latest[-1:], (float(t), here)]
        return here

    def _node(self, x: State, level: int, number: int) -> Tensor:
        key = (level, number)
        if key not in self._branch:
            draw = keyed_normal(x, mix(self._path.seed, 2, level, number), self._first_row)
            self._branch[key] = draw * (self._path.t1 - self._path.t0) ** 0.5 if level == 0 else draw
        return self._branch[key]


@dataclass(frozen=True)
class BrownianPath(Noise):
    """One Brownian path per row on `[t0, t1]`, the same whatever grid asks: coarse and fine solves are coupled.

    Args:
        seed: row i of the path depends on it and on i only.
        t0, t1: the span; `t0 < t1`.
        depth: number of halvings; below `(t1 - t0) / 2**depth` the path is interpolated linearly, so steps should
            be much longer than that.
    """

    seed: int
    t0: float
    t1: float
    depth: int = 24

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if not self.t0 < self.t1:
            raise TimeError(f"A Brownian path needs t0 < t1; got t0 = {self.t0:g} and t1 = {self.t1:g}.")

    def open(self, first_row: int = 0) -> _PathStream:
        return _PathStream(self, first_row)
