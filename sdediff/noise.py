r"""Where randomness comes from: noise sources that give row i the same numbers in any batch.

A source is a recipe (`Noise`); `open(first_row)` starts a stream (`NoiseStream`) from it for a batch whose first row
has the index `first_row`. Opening the same source twice gives the same numbers, so a solve can be replayed. A stream
answers for a step from `t` to `s`:

- `unit(x, t, s)`, standard normal, shaped as x;
- `increment(x, t, s) = W(s) - W(t)`, normal with variance `|s - t|`.

The sources:

- `RowNoise(seed)` draws fresh numbers for every step;
- `BrownianPath(seed, t0, t1)` is one fixed path per row that may be asked at any times and in any order: a coarse and a
  fine grid then see the same path, which is what strong orders and step-size studies need;
- `Antithetic(noise)` gives rows in pairs opposite numbers;
- `Recorded(numbers)` hands out numbers of the user's own, and `Recorder(noise)` keeps those of a solve for it.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sdediff.brownian import Area, Basis, Increments, Paths
from sdediff.draws import RowDraws, mix
from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.shapes import State, over

Draws: TypeAlias = Float[Tensor, " draws batch *event"]


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

    def rows(self, index: Tensor, batch: int) -> NoiseStream:
        """This stream for some rows of its batch, such as those that an adaptive solver has not finished.

        Every call draws for the whole batch, so what a row gets does not depend on the rows that are left.

        Args:
            index: the rows, `(k,)`; states are then `(k, *event)`.
            batch: how many rows there are in all.
        """
        return _RemainingStream(self, index, batch)


class Noise(ABC):
    """A recipe for noise; solves open a stream from it."""

    @abstractmethod
    def open(self, first_row: int = 0) -> NoiseStream:
        """A new stream for a batch whose first row has this index. The same arguments give the same numbers."""


# Fresh numbers


def _pair(x: State, t: Tensor, s: Tensor, first: State, second: State) -> tuple[State, State]:
    """An increment and its integral over the step from two normal draws."""
    step = over((s - t).abs(), x)
    increment = step.sqrt() * first
    return increment, step / 2 * increment + step * (step / 12).sqrt() * second


class _DrawnStream(NoiseStream):
    """The next numbers of a row of draws, whatever is asked."""

    def __init__(self, draw: Callable[[State], State]) -> None:
        self._draw = draw

    def normal(self, x: State) -> State:
        return self._draw(x)

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        return self._draw(x)

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        return _pair(x, t, s, self._draw(x), self._draw(x))


class _FreshStream(_DrawnStream):
    def __init__(self, seed: int, first_row: int) -> None:
        super().__init__(RowDraws(seed, first_row))


@dataclass(frozen=True)
class RowNoise(Noise):
    """Fresh normal numbers at every step; row i depends on `seed` and i only, not on the batch around it."""

    seed: int

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def open(self, first_row: int = 0) -> NoiseStream:
        return _FreshStream(self.seed, first_row)


# One path


class _PathStream(NoiseStream):
    """Keeps the values at the two times asked for last: where a step ends, the next one starts."""

    def __init__(self, path: BrownianPath, first_row: int) -> None:
        self._path = path
        self._first_row = first_row
        self._start = RowDraws(mix(path.seed, 1), first_row)
        self._shape: torch.Size | None = None
        self._latest: list[tuple[float, Tensor]] = []

    def normal(self, x: State) -> State:
        return self._start(x)

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        before, after = self._step(x, t, s)
        return ((after[0] - before[0]) / abs(s.item() - t.item()) ** 0.5).to(x)

    def increment(self, x: State, t: Tensor, s: Tensor) -> State:
        before, after = self._step(x, t, s)
        return (after[0] - before[0]).to(x)

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        if not self._path.integrals:
            raise CapabilityError(
                "This BrownianPath does not know its time integral, which this method needs. Write "
                "BrownianPath(..., integrals=True), or use the default noise (seed=...) or a method that needs "
                "increments only, such as 'euler'."
            )
        (start, area), (end, total) = self._step(x, t, s)
        step = s.item() - t.item()
        integral = (total - area if step > 0 else area - total) - abs(step) * start
        return (end - start).to(x), integral.to(x)

    def value(self, x: State, t: Tensor) -> State:
        """`W(t)` for one time `t`, shaped as x, with `W(t0) = 0`."""
        return self._at(x, t)[0].to(x)

    def _step(self, x: State, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """What is known of the path at both ends of a step."""
        before, after = self._at(x, t), self._at(x, s)
        step = abs(s.item() - t.item())
        if 0 < step < (1 - 1e-6) * self._path.shortest_step:
            raise OptionError(
                f"The step from t = {t.item():g} to {s.item():g} is shorter than {self._path.shortest_step:g}, down to "
                f"which this BrownianPath is one: write BrownianPath(..., depth=...) with a depth above "
                f"{self._path.depth} (each one more halves the shortest step)."
            )
        return before, after

    def _at(self, x: State, t: Tensor) -> Tensor:
        """W and, if the path knows it, its integral from t0 on; in float64 on the CPU, `(1 or 2, batch, *event)`."""
        if t.ndim:
            raise CapabilityError("A BrownianPath answers for one time at a time; per-row times need RowNoise.")
        path, time = self._path, t.item()
        if x.shape != self._shape:
            self._paths = Paths(
                path.basis,
                path.t1 - path.t0,
                path.depth,
                seed=mix(path.seed, 2),
                shape=x.shape,
                first_row=self._first_row,
            )
            self._shape, self._latest = x.shape, []
        for known, value in self._latest:
            if known == time:
                return value
        where = (time - path.t0) / (path.t1 - path.t0)
        if not -1e-12 <= where <= 1 + 1e-12:
            raise TimeError(f"The Brownian path spans [{path.t0:g}, {path.t1:g}]; t = {time:g} lies outside.")
        value = self._paths.at(min(max(where, 0.0), 1.0))
        self._latest = [*self._latest[-1:], (time, value)]
        return value


@dataclass(frozen=True)
class BrownianPath(Noise):
    """One Brownian path per row on `[t0, t1]`, the same whatever grid asks: coarse and fine solves are coupled.

    The path is a fixed function of time; it is computed on the CPU in float64, so that it is the same on any device
    and in any dtype up to rounding. Its law is exact on every grid whose steps are at least `(t1 - t0) / 2**depth`;
    shorter steps are refused. On a grid of n steps, each draws about `depth - log2(n)` numbers per entry, or two where
    the times are those of a repeated halving of the span. Another `depth` or `integrals` is another path.

    Args:
        seed: row i of the path depends on it and on i only.
        t0, t1: the span; `t0 < t1`.
        depth: number of halvings, from 0 to 30.
        integrals: whether the path also gives time integrals, `increment_and_integral`, which methods of strong order
            1.5 need. It then draws twice the numbers.
    """

    seed: int
    t0: float
    t1: float
    depth: int = 24
    integrals: bool = False

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if not self.t0 < self.t1:
            raise TimeError(f"A Brownian path needs t0 < t1; got t0 = {self.t0:g} and t1 = {self.t1:g}.")
        if self.depth not in range(31):
            raise OptionError(f"A Brownian path needs a whole depth from 0 to 30; got {self.depth!r}.")

    @property
    def basis(self) -> Basis:
        return Area() if self.integrals else Increments()

    @property
    def shortest_step(self) -> float:
        """The width of a leaf."""
        return (self.t1 - self.t0) / 2**self.depth

    def open(self, first_row: int = 0) -> _PathStream:
        return _PathStream(self, first_row)


# Sources made of others


class _DerivedStream(NoiseStream):
    """Another stream asked for a batch of its own; the rows of this one are made of what it gives."""

    def __init__(self, stream: NoiseStream) -> None:
        self._stream = stream

    @abstractmethod
    def _asked(self, x: State) -> State:
        """A state shaped as the batch of the other stream."""

    @abstractmethod
    def _arranged(self, numbers: State, x: State) -> State:
        """The rows of x from the numbers of the other stream."""

    def normal(self, x: State) -> State:
        return self._arranged(self._stream.normal(self._asked(x)), x)

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        return self._arranged(self._stream.unit(self._asked(x), t, s), x)

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        if t.ndim or s.ndim:
            raise CapabilityError(
                f"{type(self).__name__} gives time integrals for one time at a time, not for a time per row; RowNoise "
                "does."
            )
        increment, integral = self._stream.increment_and_integral(self._asked(x), t, s)
        return self._arranged(increment, x), self._arranged(integral, x)


class _RemainingStream(_DerivedStream):
    def __init__(self, stream: NoiseStream, index: Tensor, batch: int) -> None:
        super().__init__(stream)
        self._index = index
        self._batch = batch

    def _asked(self, x: State) -> State:
        return x.new_empty(()).expand(self._batch, *x.shape[1:])

    def _arranged(self, numbers: State, x: State) -> State:
        return numbers[self._index]


class _AntitheticStream(_DerivedStream):
    def __init__(self, stream: NoiseStream, odd: int) -> None:
        super().__init__(stream)
        self._odd = odd

    def _asked(self, x: State) -> State:
        """A row for each pair that has a row in x."""
        return x[: (self._odd + len(x) + 1) // 2]

    def _arranged(self, numbers: State, x: State) -> State:
        return torch.stack([numbers, -numbers], dim=1).flatten(0, 1)[self._odd : self._odd + len(x)]


@dataclass(frozen=True)
class Antithetic(Noise):
    """Rows in pairs: row 2k has the numbers of row k of another source, and row 2k + 1 their negatives.

    Each row by itself has the law of the other source. Start states come from the same stream, so the two rows of a
    pair also start at opposite points (about the mean of the prior). The mean over a pair then varies less wherever
    the result is near to odd in the noise.
    """

    noise: Noise

    def open(self, first_row: int = 0) -> NoiseStream:
        return _AntitheticStream(self.noise.open(first_row // 2), first_row % 2)


class _Reader:
    """The next of the recorded draws, for the rows of a batch."""

    def __init__(self, numbers: Draws, first_row: int) -> None:
        self._numbers = numbers
        self._first_row = first_row
        self._given = 0

    def __call__(self, x: State) -> State:
        if self._given == len(self._numbers):
            raise OptionError(
                f"The recorded numbers hold {len(self._numbers)} draws and the solve needs at least "
                f"{self._given + 1}: give numbers of shape (draws, batch, *event) with a draw for everything it asks, "
                "the start state included."
            )
        last_row = self._first_row + len(x)
        if self._numbers.shape[2:] != x.shape[1:] or self._numbers.shape[1] < last_row:
            raise ShapeError(
                f"The recorded numbers have shape {tuple(self._numbers.shape)}; rows {self._first_row} to "
                f"{last_row - 1} of a state {tuple(x.shape)} need (draws, {last_row} or more, "
                f"{', '.join(map(str, x.shape[1:]))})."
            )
        self._given += 1
        return self._numbers[self._given - 1, self._first_row : last_row].to(x)


@dataclass(frozen=True, eq=False)
class Recorded(Noise):
    """Numbers that the user gives: the k-th draw of row i is `numbers[k, i]`.

    A solve draws the start state first (unless it gets `x_init`), then what each step needs: one draw for an increment,
    two for an increment and its time integral.

    Args:
        numbers: standard normal numbers, `(draws, batch, *event)`.
    """

    numbers: Draws

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, Tensor) or self.numbers.ndim < 2 or not self.numbers.is_floating_point():
            got = (
                f"{self.numbers.dtype} of shape {tuple(self.numbers.shape)}"
                if isinstance(self.numbers, Tensor)
                else type(self.numbers).__name__
            )
            raise ShapeError(f"Recorded needs a floating-point tensor of shape (draws, batch, *event); got {got}.")

    def open(self, first_row: int = 0) -> NoiseStream:
        return _DrawnStream(_Reader(self.numbers, first_row))


class _RecorderStream(NoiseStream):
    """Keeps every draw, and gives what `Recorded` will make of it."""

    def __init__(self, stream: NoiseStream, draws: list[State]) -> None:
        self._stream = stream
        self._draws = draws

    def normal(self, x: State) -> State:
        return self._kept(self._stream.normal(x))

    def unit(self, x: State, t: Tensor, s: Tensor) -> State:
        return self._kept(self._stream.unit(x, t, s))

    def increment_and_integral(self, x: State, t: Tensor, s: Tensor) -> tuple[State, State]:
        increment, integral = self._stream.increment_and_integral(x, t, s)
        step = over((s - t).abs(), x)
        first = self._kept(increment / step.sqrt())
        second = self._kept((integral - step / 2 * increment) / (step * (step / 12).sqrt()))
        return _pair(x, t, s, first, second)

    def _kept(self, draw: State) -> State:
        self._draws.append(draw.clone())
        return draw


@dataclass(frozen=True, eq=False)
class Recorder(Noise):
    """Another source, with a memory: after a solve, `Recorded(recorder.numbers)` replays it bitwise.

    It remembers the latest solve; opening a stream drops what was recorded of that row and of later ones.
    """

    noise: Noise
    _draws: dict[int, list[State]] = field(default_factory=dict, init=False, repr=False)

    def open(self, first_row: int = 0) -> NoiseStream:
        for row in [row for row in self._draws if row >= first_row]:
            del self._draws[row]
        self._draws[first_row] = []
        return _RecorderStream(self.noise.open(first_row), self._draws[first_row])

    @property
    def numbers(self) -> Draws:
        """All draws so far, `(draws, batch, *event)`.

        Raises:
            OptionError: nothing was drawn, or chunks of the batch drew different numbers of times.
        """
        counts = sorted({len(draws) for draws in self._draws.values()})
        if not counts or counts == [0]:
            raise OptionError("Nothing is recorded yet: pass the recorder to a solve as noise= first.")
        if len(counts) > 1:
            raise OptionError(
                f"The chunks of the batch drew different numbers of times ({', '.join(map(str, counts))}), which no "
                "single tensor holds. Solve all rows at once (batch_size=None)."
            )
        return torch.cat([torch.stack(self._draws[row]) for row in sorted(self._draws)], dim=1)
