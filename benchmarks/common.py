"""What the benchmarks share: counting calls, error measures, interpolation, tables."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdediff as sd

RESULTS = Path(__file__).parent / "results"


class Counter:
    """A network that counts the rows that it is asked for."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.dtype = getattr(network, "dtype", None)
        self.rows = 0

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        self.rows += len(x)
        return self.network(x, *args)


def counted(model: sd.ScoreModel) -> tuple[sd.ScoreModel, Counter]:
    """The model with a network that counts its rows, and the count."""
    counter = Counter(model.network)
    return replace(model, network=counter), counter


@dataclass(frozen=True)
class Errors:
    """How far end states are from the exact ones, and what they cost."""

    calls: float
    """Network calls per row."""
    rms: float
    """Root mean square over rows and components."""
    median: float
    """Median over rows of the root mean square over components."""


def measure(model: sd.ScoreModel, x: Tensor, exact: Tensor, solve: Callable[[sd.ScoreModel], Tensor]) -> Errors:
    """Run `solve` with a counted model and compare; an error counts as infinite."""
    bound, counter = counted(model)
    with torch.no_grad():
        off = (solve(bound) - exact).square()
    rms, median = off.mean().sqrt().item(), off.mean(1).sqrt().median().item()
    calls = counter.rows / len(x)
    return Errors(calls, rms if math.isfinite(rms) else math.inf, median if math.isfinite(median) else math.inf)


def calls_needed(points: Sequence[tuple[float, float]], goal: float) -> float:
    """Calls at which the error falls to `goal`, by log-log interpolation between `(calls, error)` points; NaN if never.

    The points are sorted by calls; the first crossing counts.
    """
    points = sorted(points)
    if points and points[0][1] <= goal:
        return points[0][0]
    for (few, worse), (many, better) in itertools.pairwise(points):
        if worse > goal >= better:
            part = 1.0 if math.isinf(worse) else math.log(worse / goal) / math.log(worse / better)
            return math.exp(math.log(few) + part * math.log(many / few))
    return math.nan


def error_at(points: Sequence[tuple[float, float]], calls: float) -> float:
    """The error at a number of calls, by log-log interpolation; NaN outside the points."""
    points = sorted(points)
    for (few, worse), (many, better) in itertools.pairwise(points):
        if few <= calls <= many and math.isfinite(worse):
            part = math.log(calls / few) / math.log(many / few) if many > few else 0.0
            return math.exp(math.log(worse) + part * math.log(better / worse))
    return math.nan


def geo_mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def short(value: float) -> str:
    """An error in two digits, or a dash."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+") if math.isfinite(value) else "-"


def whole(value: float) -> str:
    """A number of calls, or a dash."""
    return f"{value:.0f}" if math.isfinite(value) else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_csv(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows with the columns of the first one to the results."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / name
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
    return file


def write_text(name: str, text: str) -> Path:
    """Write a text to the results."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / name
    file.write_text(text)
    return file


def versions() -> str:
    """One line that says what was measured."""
    from importlib.metadata import PackageNotFoundError, version

    parts = []
    for name in ("torch", "numpy", "scipy", "diffusers", "k-diffusion", "azula", "torchdiffeq", "torchsde", "zuko"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} not installed")
    return ", ".join(parts)
