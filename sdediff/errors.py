"""Every error that the library raises on purpose.

Each message is a sentence or two: what came, what was needed, what to write instead. All inherit from
`SdediffError`, and each also from the built-in error that a caller who does not know this library would catch.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class SdediffError(Exception):
    """Base of all errors of this library."""


class ShapeError(SdediffError, ValueError):
    """A tensor has a shape or dtype that cannot be meant."""


class TimeError(SdediffError, ValueError):
    """A time lies outside the span of the SDE, or a grid of times does not run in one direction."""


class OptionError(SdediffError, ValueError):
    """An argument has a value that is not one of those allowed."""


class SDEError(SdediffError, ValueError):
    """The coefficients of an SDE break a rule that the mathematics needs (alpha > 0, falling SNR, linearity)."""


class CapabilityError(SdediffError, TypeError):
    """Two things were combined that cannot work together, such as an ODE solver and a noisy process."""


class DivergenceError(SdediffError, ArithmeticError):
    """A numerical solution stopped being finite.

    Attributes:
        problem: what went wrong.
        advice: what to do about it.
        step: index of the step that produced the first bad value (None where a solver has no grid).
        time: time at which it happened (None where it has none).
        rows: indices of the batch rows concerned; empty where it is not known.
    """

    def __init__(self, problem: str, advice: str, *, step: int | None, time: float | None, rows: list[int]) -> None:
        places = [] if step is None else [f"step {step}"]
        places += [] if time is None else [f"t = {time:g}"]
        more = f", ... ({len(rows)} in all)" if len(rows) > 8 else ""
        places += ["rows " + ", ".join(map(str, rows[:8])) + more] if rows else []
        super().__init__(f"{problem} at {', '.join(places)}. {advice}")
        self.problem = problem
        self.advice = advice
        self.step = step
        self.time = time
        self.rows = rows

    def shifted(self, first_row: int) -> DivergenceError:
        """The same in a batch of which these rows start at `first_row`."""
        rows = [first_row + row for row in self.rows]
        return DivergenceError(self.problem, self.advice, step=self.step, time=self.time, rows=rows)


class DegeneracyWarning(UserWarning):
    """Weighted particles go back to so few starts that neither they nor their stated errors are to be trusted."""


class CheckpointError(SdediffError, OSError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class MissingExtraError(SdediffError, ImportError):
    """An optional dependency is not installed."""


class CheckFailure(SdediffError, AssertionError):
    """A property check of `sdediff.testing` failed; says which identity broke, where, and by how much."""


def optional_import(name: str, extra: str) -> ModuleType:
    """Import the optional dependency `name`, or name the extra of this package that installs it.

    Raises:
        MissingExtraError: the dependency is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"This needs the package {name.split('.')[0]!r}, which is not installed. "
            f"Install it with: pip install 'sdediff[{extra}]'"
        ) from error
