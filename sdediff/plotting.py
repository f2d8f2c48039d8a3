r"""Figures of processes and samples, from the tensors that the library returns.

Every function returns a `matplotlib.figure.Figure` and touches no global state: save it with `figure.savefig(path)`,
or let a notebook show it (after `%matplotlib inline`). `forward_process` and `trajectories` look at the event shape:
images become strips, signals curves, points in the plane panels, numbers paths over time. Needs the extra `plot`.

The colours are those of Okabe and Ito, which stay apart for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError, optional_import
from sdediff.sampling import Solution
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY = "#767676"
_DPI = 150


# Figures.


def forward_process(
    sde: SDE, x0: State, times: Tensor | Sequence[float] | None = None, seed: int | None = 0, **options: Any
) -> Figure:
    """Data that turns into noise along one path of the forward process.

    Args:
        sde: the process.
        x0: data `(batch, *event)`: images, signals, points in the plane, or numbers.
        times: increasing times from 0; even ones if None (8, or 200 for paths of numbers).
        seed: of the path.
        options: as in `trajectories`.
    """
    if times is None:
        times = torch.linspace(0, sde.t_max, 200 if _size(x0) == 1 else 8, dtype=torch.float64)
    grid = torch.as_tensor(times, dtype=torch.float64)
    return trajectories(
        sde.simulate(x0, grid, seed=seed),
        grid,
        **{"title": f"Forward process of {str(sde).partition('(')[0]}", **options},
    )


def trajectories(
    solution: Solution | Trajectory,
    times: Tensor | Sequence[float] | None = None,
    *,
    columns: int = 8,
    rows: int = 6,
    title: str | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """States along a solve: strips of images, panels of signals or of points in the plane, or paths of numbers.

    Events `(length,)` and `(1, length)` of more than two entries are signals.

    Args:
        solution: of `sample(..., trajectory=True)`, or states `(times, batch, *event)`.
        times: the times of a tensor of states; those of a solution are known.
        columns: number of times shown, spread evenly over the grid (all of them for paths).
        rows: number of images or signals shown (all rows for points and paths).
        interval: the values that images in one channel show as white and as black (ink on paper); in three channels,
            as no and full colour.

    Raises:
        ShapeError: the solution holds no trajectory, or events are neither images, signals, pairs nor numbers.
    """
    states, clock = _states(solution, times)
    size, event = _size(states[0]), states.shape[2:]
    if size == 1:
        return _paths(states.flatten(1), clock, title)
    if size == 2:
        return _panels(states.flatten(2), clock, columns, title)
    if _is_signal(event):
        frames, chosen = _frames(states, clock, min(columns, 6))
        panels = {f"t = {_short(time)}": frame for frame, time in zip(frames, chosen.tolist(), strict=True)}
        return signals(panels, rows=rows, title=title)
    if len(event) not in (2, 3):
        raise ShapeError(
            f"Only images, signals, points in the plane and numbers can be drawn; events have shape {tuple(event)}."
        )
    return image_frames({title or "States over time": (states, clock)}, columns=columns, rows=rows, interval=interval)


def image_frames(
    strips: Mapping[str, tuple[Trajectory, Tensor | Sequence[float]]],
    *,
    columns: int = 8,
    rows: int = 6,
    interval: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """Blocks of image strips side by side: one row an image, one column a time.

    Args:
        strips: from a title to states `(times, batch, *event)` and their times.
        columns, rows, interval: as in `trajectories`.
    """
    chosen = {title: _frames(*_states(states, times), columns) for title, (states, times) in strips.items()}
    shown = min(rows, *(frames.shape[1] for frames, _ in chosen.values()))
    widths = [len(times) for _, times in chosen.values()]
    figure = _figure(0.75 * sum(widths) + 0.5 * len(chosen), 0.75 * shown + 0.8)
    figure.set_layout_engine("constrained", wspace=0.05 if len(chosen) > 1 else 0.0)
    axes = figure.subplots(1, len(chosen), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    for ax, (title, (frames, times)) in zip(axes, chosen.items(), strict=True):
        tile = _montage(ax, frames[:, :shown].transpose(0, 1), interval)
        ax.set_xticks(_centres(len(times), tile), [_short(time) for time in times.tolist()], fontsize=9)
        ax.set_xlabel("time t")
        ax.set_title(title, fontsize=11)
    return figure


def image_grid(
    x: State, columns: int = 10, *, title: str | None = None, interval: tuple[float, float] = (-1.0, 1.0)
) -> Figure:
    """Images `(batch, *event)` in rows of `columns`; the last row is filled with blanks."""
    figure = _figure(0.6 * columns + 0.2, 0.6 * math.ceil(len(x) / columns) + (0.5 if title else 0.2))
    ax = figure.subplots()
    blanks = x.new_full((-len(x) % columns, *x.shape[1:]), interval[0])
    _montage(ax, _rows_of(torch.cat([x, blanks]), columns), interval)
    ax.set_xticks([])
    if title:
        ax.set_title(title, fontsize=11)
    return figure


def image_rows(
    sets: Mapping[str, State],
    columns: int = 16,
    *,
    rows: int = 2,
    title: str | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """The first images of several sets, `rows` rows a set, with the name of the set beside them."""
    left = 0.15 + 0.078 * max(len(line) for name in sets for line in name.split("\n"))
    width, height = 0.55 * columns + left + 0.1, (0.55 * rows + 0.12) * len(sets) + (0.5 if title else 0.1)
    figure = _figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.subplots(
        len(sets), 1, squeeze=False,
        gridspec_kw={"left": left / width, "right": 1 - 0.1 / width, "bottom": 0.05 / height,
                     "top": 1 - (0.45 if title else 0.05) / height, "hspace": 0.12 / (0.55 * rows)},
    )[:, 0]  # fmt: skip
    for ax, (name, x) in zip(axes, sets.items(), strict=True):
        per_row = min(columns, max(1, len(x) // rows))
        _montage(ax, _rows_of(x[: rows * per_row], per_row), interval)
        ax.set_anchor("W")
        ax.set_xticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def image_panels(
    sets: Mapping[str, State],
    columns: int,
    *,
    rows: Sequence[str] | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """Grids of images side by side, each set in rows of `columns`; a name for every row, if given, at the left."""
    panels = {title: _rows_of(x, columns) for title, x in sets.items()}
    height = max(len(tiles) for tiles in panels.values())
    figure = _figure((0.3 * columns + 0.25) * len(panels) + 0.2, 0.3 * height + 0.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, tiles) in zip(axes, panels.items(), strict=True):
        _, gap = _montage(ax, tiles, interval)
        ax.set_xticks([])
        ax.set_title(title, fontsize=10)
        if rows is not None and ax is axes[0]:
            ax.set_yticks(_centres(len(rows), (tiles.shape[-2] + gap, gap)), rows, fontsize=9)
    return figure


def signals(sets: Mapping[str, State] | State, *, rows: int = 6, title: str | None = None) -> Figure:
    """The first `rows` signals `(batch, length)` of one set, or of several by name, as curves in panels."""
    named = sets if isinstance(sets, Mapping) else {title or "Signals": sets}
    shown = {name: _rows_of_signals(x[:rows]) for name, x in named.items()}
    figure = _figure(1.9 * len(shown) + 0.4, 2.6 if title and isinstance(sets, Mapping) else 2.3)
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for ax, (name, curves) in zip(axes, shown.items(), strict=True):
        for i, curve in enumerate(curves):
            _plain(ax).plot(curve.numpy(), color=COLOURS[i % len(COLOURS)], linewidth=1.0)
        ax.set(title=name, xlabel="entry", xlim=(0, curves.shape[1] - 1))
    axes[0].set_ylabel("value")
    if title and isinstance(sets, Mapping):
        figure.suptitle(title, fontsize=11)
    return figure


def covariances(matrices: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """Covariances `(D, D)` by name as heat maps of one colour scale, in which zero is white."""
    drawn = _square(matrices)
    largest = max(matrix.abs().max().item() for matrix in drawn.values())
    figure = _figure(2.0 * len(drawn) + 0.8, 2.7 if title else 2.4)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, (name, matrix) in zip(axes, drawn.items(), strict=True):
        image = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        ax.set(title=name, xlabel="entry")
    axes[0].set_ylabel("entry")
    figure.colorbar(image, ax=list(axes), label="covariance", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def spectra(matrices: Mapping[str, Tensor], *, smallest: float = 1e-6, title: str = "Eigenvalues") -> Figure:
    """Eigenvalues of covariances `(D, D)` by name, falling, on a logarithmic scale from `smallest` up."""
    figure = _figure(5.4, 3.4)
    ax = _plain(figure.subplots())
    for i, (name, matrix) in enumerate(_square(matrices).items()):
        values = torch.linalg.eigvalsh(matrix).flip(0)
        values = torch.where(values >= smallest, values, torch.nan)
        ax.plot(
            range(1, len(values) + 1), values.numpy(), color=COLOURS[i % len(COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)], markersize=3, linewidth=1.0, label=name,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set(xlabel="number", ylabel="eigenvalue of the covariance", title=title)
    ax.legend(frameon=False, fontsize=8.5)
    return figure


def loss_curve(losses: Tensor | Sequence[float], *, window: int | None = None, title: str = "Training") -> Figure:
    """The loss of every step, and its running mean over the last `window` steps (a fiftieth of all if None).

    The scale is logarithmic if all losses are positive, else linear: those of score matching may be negative.
    """
    values = torch.as_tensor(losses, dtype=torch.float64).detach().cpu()
    window = max(1, len(values) // 50) if window is None else window
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp(min=0)
    mean = (sums[ends] - sums[starts]) / (ends - starts)
    figure = _figure(6.0, 3.6)
    ax = _plain(figure.subplots())
    ax.plot(ends.numpy(), values.numpy(), color=COLOURS[5], linewidth=0.6, alpha=0.6, label="each step")
    ax.plot(ends.numpy(), mean.numpy(), color=COLOURS[0], linewidth=1.8, label=f"mean of the last {window} steps")
    ax.set(xlabel="optimisation step", ylabel="loss", title=title, xlim=(1, max(2, len(values))))
    if not bool((values <= 0).any()):
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis, *ax.get_ylim())
    ax.legend(frameon=False)
    return figure


def quality_against_nfe(
    results: Mapping[str, Sequence[tuple[float, float]]],
    *,
    floor: tuple[float, float] | None = None,
    floor_label: str = "data against data",
    ceiling: float = math.inf,
    ylabel: str = "energy distance to the test set",
    title: str = "Sample quality against cost",
) -> Figure:
    """A distance (lower is better) against network evaluations, one line a solver.

    Args:
        results: from a solver's name to pairs `(nfe, distance)`.
        floor: mean and standard deviation of the distance between two sets of real data; distances within it are
            drawn on a linear scale, above it on a logarithmic one (an unbiased distance may be slightly negative).
        ceiling: the largest distance in view.
    """
    figure = _figure(6.8, 4.2)
    ax = _plain(figure.subplots())
    if floor is not None:
        low, high = floor[0] - floor[1], floor[0] + floor[1]
        ax.axhspan(low, high, color=_GREY, alpha=0.25, linewidth=0, label=f"{floor_label} (mean ± sd)")
    for i, (name, pairs) in enumerate(results.items()):
        nfe, distance = zip(*sorted(pairs), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
        ax.plot(nfe, distance, color=colour, marker=marker, markersize=5, linewidth=1.5, label=name)
    ax.set_xscale("log")
    distances = [y for pairs in results.values() for _, y in pairs]
    threshold = max(1e-12, min(map(abs, distances)) if floor is None else sum(map(abs, floor)))
    ax.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    ax.set_ylim(min(-0.5 * threshold, 1.5 * min(distances)), min(ceiling, 1.6 * max(*distances, 2 * threshold)))
    ax.set(xlabel="network evaluations for each sample (NFE)", ylabel=ylabel, title=title)
    _plain_numbers(ax.xaxis, *ax.get_xlim())
    ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def trade_off(
    curves: Mapping[str, Sequence[tuple[str, tuple[float, float], tuple[float, float]]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    """Two measures against each other, one line through the settings of a method, with a standard error on both.

    Args:
        curves: from a method's name to its settings in order: `(label, (x, stderr), (y, stderr))`.
    """
    figure = _figure(6.8, 4.2)
    ax = _plain(figure.subplots())
    for i, (name, points) in enumerate(curves.items()):
        labels, x, y = zip(*points, strict=True)
        (across, dx), (up, dy) = (zip(*pairs, strict=True) for pairs in (x, y))
        ax.errorbar(
            across, up, xerr=dx, yerr=dy, color=COLOURS[i % len(COLOURS)], marker=_MARKERS[i % len(_MARKERS)],
            markersize=5, linewidth=1.2, elinewidth=1.0, capsize=2, label=name,
        )  # fmt: skip
        for label, place in zip(labels, zip(across, up, strict=True), strict=True):
            ax.annotate(label, place, xytext=(4, -11 if i else 5), textcoords="offset points", fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.legend(frameon=False, fontsize=8.5)
    return figure


def scatter(samples: Mapping[str, State] | State, *, title: str | None = None, size: float = 4.0) -> Figure:
    """Points in the plane, `(batch, 2)`: one set, or several by name, in panels of the same scale."""
    sets = samples if isinstance(samples, Mapping) else {title or "Samples": samples}
    points = {name: _plane(x) for name, x in sets.items()}
    figure = _figure(3.3 * len(points) + 0.3, 3.6)
    axes = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
    for i, (ax, (name, x)) in enumerate(zip(axes, points.items(), strict=True)):
        _plain(ax).scatter(x[:, 0], x[:, 1], s=size, color=COLOURS[i % len(COLOURS)], alpha=0.6, linewidths=0)
        ax.set(xlabel="x₁", title=name, aspect="equal")
    axes[0].set_ylabel("x₂")
    if title and isinstance(samples, Mapping):
        figure.suptitle(title)
    return figure


def density_2d(
    log_density: Callable[[Tensor], Tensor],
    *,
    extent: tuple[float, float, float, float] = (-3.0, 3.0, -3.0, 3.0),
    resolution: int = 100,
    samples: State | None = None,
    title: str = "Density",
) -> Figure:
    """A density in the plane, with samples on top if given.

    Args:
        log_density: from points `(n, 2)` to log-densities `(n,)`, such as `target.log_prob` or
            `lambda x: sd.log_prob(model, x).value`.
        extent: `(left, right, bottom, top)`.
        resolution: points along each side.
    """
    left, right, bottom, top = extent
    across, up = torch.linspace(left, right, resolution), torch.linspace(bottom, top, resolution)
    points = torch.cartesian_prod(up, across).flip(1)
    density = log_density(points).detach().cpu().double().exp().reshape(resolution, resolution)
    figure = _figure(5.0, 4.2)
    ax = _plain(figure.subplots())
    mesh = ax.pcolormesh(across.numpy(), up.numpy(), density.numpy(), cmap="cividis", shading="gouraud", vmin=0.0)
    figure.colorbar(mesh, ax=ax, label="probability density")
    if samples is not None:
        x = _plane(samples)
        ax.scatter(x[:, 0], x[:, 1], s=3, color="white", alpha=0.6, linewidths=0)
    ax.set(xlabel="x₁", ylabel="x₂", title=title, aspect="equal", xlim=(left, right), ylim=(bottom, top))
    return figure


# What they are made of.


def _figure(width: float, height: float) -> Figure:
    figure = optional_import("matplotlib.figure", "plot").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained"
    )
    optional_import("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
    return figure


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    """Write the ticks of a logarithmic axis as 0.2, 50 in place of powers, more of them where it is short."""
    ticker = optional_import("matplotlib.ticker", "plot")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if high > 10 * low else range(1, 10)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, position: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _short(time: float) -> str:
    return f"{time:.3g}".replace("e-0", "e-")


def _size(x: State) -> int:
    return math.prod(x.shape[1:])


def _square(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not matrices:
        raise OptionError("There are no covariances to draw: give at least one, {name: matrix}.")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"Covariances are square matrices (D, D); {name!r} has shape {tuple(matrix.shape)}.")
        if not bool(matrix.isfinite().all()):
            raise OptionError(f"Covariances must be finite to be drawn; {name!r} has NaN or infinite entries.")
    return {name: matrix.detach().cpu().double() for name, matrix in matrices.items()}


def _is_signal(event: Sequence[int]) -> bool:
    return len(event) == 1 or (len(event) == 2 and event[0] == 1)


def _rows_of_signals(x: State) -> Tensor:
    if not _is_signal(x.shape[1:]):
        raise ShapeError(f"Signals have shape (batch, length) or (batch, 1, length); got {tuple(x.shape)}.")
    return x.detach().cpu().flatten(1)


def _rows_of(x: State, columns: int) -> Tensor:
    return x.reshape(-1, columns, *x.shape[1:])


def _plane(x: State) -> Any:
    if _size(x) != 2:
        raise ShapeError(f"Points in the plane have shape (batch, 2); got {tuple(x.shape)}.")
    return x.detach().cpu().flatten(1).numpy()


def _states(solution: Solution | Trajectory, times: Tensor | Sequence[float] | None) -> tuple[Trajectory, Grid]:
    if isinstance(solution, Solution):
        if solution.trajectory is None:
            raise ShapeError("This solution holds no trajectory: call sample(..., trajectory=True).")
        times = solution.kept if times is None else times
        solution = solution.trajectory
    clock = torch.arange(len(solution)).double() if times is None else torch.as_tensor(times, dtype=torch.float64)
    if clock.shape != solution.shape[:1]:
        raise ShapeError(f"There are {len(solution)} states but times of shape {tuple(clock.shape)}.")
    return solution.detach().cpu(), clock.detach().cpu()


def _frames(states: Trajectory, times: Grid, columns: int) -> tuple[Trajectory, Grid]:
    """At most `columns` states, spread evenly over the grid, both ends among them."""
    chosen = torch.linspace(0, len(states) - 1, min(columns, len(states)), dtype=torch.float64).round().long()
    return states[chosen], times[chosen]


def _montage(ax: Axes, tiles: Tensor, interval: tuple[float, float]) -> tuple[float, float]:
    """Draw images `(rows, columns, *event)` with a gap between them; returns the pitch of the columns and the gap."""
    event = tiles.shape[2:]
    if len(event) == 2:
        tiles = tiles.unsqueeze(2)
    elif len(event) != 3 or event[0] not in (1, 3):
        raise ShapeError(f"Images have events (H, W), (1, H, W) or (3, H, W); got {tuple(event)}.")
    rows, columns, channels, height, width = tiles.shape
    gap = max(1, round(width / 5))
    low, high = interval
    shades = ((tiles.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
    if channels == 1:
        shades = 1 - shades  # ink on paper
    canvas = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 1.0)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (height + gap), j * (width + gap)
            canvas[:, top : top + height, left : left + width] = shades[i, j]
    picture = canvas.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    ax.imshow(picture, interpolation="nearest")
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return width + gap, gap


def _centres(count: int, tile: tuple[float, float]) -> list[float]:
    pitch, gap = tile
    return [pitch * i + (pitch - gap - 1) / 2 for i in range(count)]


def _paths(states: Tensor, times: Grid, title: str | None) -> Figure:
    figure = _figure(6.8, 3.6)
    ax, margin = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [5, 1]})
    shown = states[:, :100].numpy()
    _plain(ax).plot(
        times.numpy(), shown, color=COLOURS[0], linewidth=0.6, alpha=max(0.15, min(1.0, 15 / shown.shape[1]))
    )
    ax.set(xlabel="time t", ylabel="state x", xlim=(float(times.min()), float(times.max())))
    if title:
        figure.suptitle(title, fontsize=11)
    low, high = float(states.min()), float(states.max())
    for i, k in enumerate((0, -1)):
        margin.hist(
            states[k].numpy(), bins=40, range=(low, high), density=True, orientation="horizontal", histtype="step",
            color=COLOURS[i], label=f"t = {_short(times[k].item())}",
        )  # fmt: skip
    _plain(margin).set(xlabel="density")
    margin.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def _panels(states: Trajectory, times: Grid, columns: int, title: str | None) -> Figure:
    frames, clock = _frames(states, times, min(columns, 6))
    figure = _figure(1.9 * len(clock) + 0.4, 3.0 if title else 2.7)
    axes = figure.subplots(1, len(clock), squeeze=False, sharex=True, sharey=True)[0]
    for ax, points, time in zip(axes, frames.numpy(), clock.tolist(), strict=True):
        _plain(ax).scatter(points[:, 0], points[:, 1], s=3, color=COLOURS[0], alpha=0.5, linewidths=0)
        ax.set(title=f"t = {_short(time)}", xlabel="x₁", aspect="equal")
    axes[0].set_ylabel("x₂")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure
