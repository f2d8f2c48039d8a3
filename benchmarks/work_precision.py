"""Error against network calls, of other libraries' samplers and ours, over all targets.

Every sampler starts from the same 512 exact draws at t = 1 and is compared with the exact flow at t = 1e-3, in float64.
Writes `work_precision.csv` (every run), `work_precision.md` (tables) and two figures to `benchmarks/results`.

    python -m benchmarks.work_precision [--quick] [--targets ring2d ...] [--only zEAB Exponential ...]
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sdediff as sd
from benchmarks import ours, peers, reference, targets
from benchmarks.common import RESULTS, error_at, geo_mean, measure, short, table, versions, write_csv, write_text

NFE = (5, 8, 10, 15, 20, 30, 50, 100)
TOLERANCES = tuple(10 ** (-k / 2) for k in range(2, 20))
MOST_CALLS = 400
"""An adaptive method's curve ends here."""

ON_OUR_GRID = (
    "diffusers DPM++2M lu",
    "diffusers UniPC-2 exp",
    "diffusers UniPC-3 exp",
    "diffusers UniPC-2 exp, full order",
    "diffusers UniPC-3 exp, full order",
    "diffusers DEIS-3 exp",
    "azula xEAB3 log-SNR",
    "azula xEAB4 log-SNR",
    "azula zEAB3 log-SNR",
    "azula zEAB4 log-SNR",
)
"""The strongest peers, which also run on the grid of `ours.grid`."""

Row = dict[str, Any]
Solve = Callable[[sd.ScoreModel], Tensor]


def samplers(
    model: sd.ScoreModel, x: Tensor, only: Sequence[str]
) -> Iterator[tuple[str, str, float | None, int | None, Solve]]:
    """`(group, name, tolerance, nfe, solve)` of every run; groups are "peer", "peer, our grid" and "ours"."""

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    for name, peer in peers.FIXED.items():
        if wanted(name) and peers.available(peer.package):
            for nfe in NFE:
                yield "peer", name, None, nfe, lambda m, p=peer, n=nfe: p.run(m, x, n, None)
            if name in ON_OUR_GRID:
                grids = {nfe: ours.grid(model, nfe) for nfe in NFE}
                for nfe in NFE:
                    yield "peer, our grid", name, None, nfe, lambda m, p=peer, n=nfe, g=grids: p.run(m, x, n, g[n])
    for name, adaptive in peers.ADAPTIVE.items():
        if wanted(name) and peers.available(adaptive.package):
            for tol in TOLERANCES:
                yield "peer", name, tol, None, lambda m, p=adaptive, t=tol: p.run(m, x, t)
    for name, entry in ours.FIXED.items():
        if wanted(name):
            for nfe in NFE:
                yield "ours", name, None, nfe, lambda m, e=entry, n=nfe: ours.run(e, model, m, x, n)
    for name, entry in ours.ADAPTIVE.items():
        if wanted(name):
            for tol in TOLERANCES:
                yield "ours", name, tol, None, lambda m, e=entry, t=tol: ours.run_adaptive(e, model, m, x, t)


def measure_all(names: Sequence[str], only: Sequence[str], rows: int) -> list[Row]:
    """Run everything."""
    found: list[Row] = []
    for name in names:
        target = targets.get(name)
        x, exact = reference.pairs(target)
        x, exact = x[:rows], exact[:rows]
        model = target.mixture.model(targets.process())
        finished = None
        for group, sampler, tolerance, nfe, solve in samplers(model, x, only):
            if tolerance is not None and finished == sampler:
                continue
            try:
                errors = measure(model, x, exact, solve)
            except (AssertionError, sd.DivergenceError) as error:  # a tolerance that a method cannot meet
                print(f"{name}, {sampler}, tolerance {tolerance}: {error}")
                continue
            if tolerance is not None and errors.calls > MOST_CALLS:
                finished = sampler
            found.append(
                {"target": name, "group": group, "sampler": sampler, "nfe": nfe or "", "tolerance": tolerance or "",
                 "calls": errors.calls, "rms": errors.rms, "median": errors.median}
            )  # fmt: skip
        print(f"{name}: done", flush=True)
    return found


def curves(rows: Sequence[Row], target: str, metric: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points `(calls, error)` of every `(group, sampler)`."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["target"] == target:
            lines.setdefault((row["group"], row["sampler"]), []).append((row["calls"], row[metric]))
    return lines


def at_nfe(rows: Sequence[Row], target: str, metric: str) -> dict[tuple[str, str], list[float]]:
    """The errors at every NFE of every `(group, sampler)` on a grid."""
    lines: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["target"] == target and row["nfe"]:
            line = lines.setdefault((row["group"], row["sampler"]), [math.nan] * len(NFE))
            line[NFE.index(row["nfe"])] = row[metric]
    return lines


def adaptive_at_nfe(rows: Sequence[Row], target: str, metric: str) -> dict[tuple[str, str], list[float]]:
    """The same for methods with a tolerance, interpolated."""
    kinds = {(row["group"], row["sampler"]) for row in rows if row["tolerance"]}
    return {
        kind: [error_at(line, nfe) for nfe in NFE]
        for kind, line in curves(rows, target, metric).items()
        if kind in kinds
    }


def _best(lines: dict[tuple[str, str], list[float]], groups: Sequence[str]) -> list[tuple[float, str]]:
    """The least error of every column, and whose it is."""
    best = []
    for i in range(len(NFE)):
        options = [
            (line[i], sampler if group != "peer, our grid" else f"{sampler} @ our grid")
            for (group, sampler), line in lines.items()
            if group in groups and math.isfinite(line[i])
        ]
        best.append(min(options, default=(math.nan, "-")))
    return best


def summary(lines: dict[tuple[str, str], list[float]]) -> list[list[str]]:
    """Rows for the best of every column."""
    alone, given, own = (_best(lines, groups) for groups in (["peer"], ["peer", "peer, our grid"], ["ours"]))
    rows = [["**best peer**", *(short(value) for value, _ in alone)], ["whose", *(name for _, name in alone)]]
    if any(group == "peer, our grid" for group, _ in lines):
        rows += [["**best peer, our grid allowed**", *(short(value) for value, _ in given)]]
        rows += [["whose", *(name for _, name in given)]]
    rows += [["**best of ours**", *(short(value) for value, _ in own)], ["whose", *(name for _, name in own)]]
    rows += [["**best peer / best of ours**", *(_ratio(p[0], o[0]) for p, o in zip(alone, own, strict=True))]]
    return rows


def _ratio(peer: float, own: float) -> str:
    return f"{peer / own:.2g}" if math.isfinite(peer) and math.isfinite(own) and own > 0 else "-"


def _label(group: str, sampler: str) -> str:
    return {"peer": sampler, "peer, our grid": f"{sampler} @ our grid", "ours": f"**{sampler}** (ours)"}[group]


def report(rows: Sequence[Row], starts: int) -> str:
    """The tables as markdown."""
    names = list(dict.fromkeys(row["target"] for row in rows))
    parts = [
        "# Error against network calls\n\n"
        f"{starts} exact draws at t = 1, VP(0.1, 20), end at t = 1e-3, float64; error against the exact flow. Columns "
        'are network calls (NFE). "@ our grid": the peer\'s method on our grid. Rows with ~ are adaptive methods, '
        f"interpolated in their tolerance; they do not take part in the best of a column.\n\n{versions()}\n"
    ]
    heads = {"rms": "RMS over rows and components", "median": "median over rows of the RMS per row"}
    for metric, words in heads.items():
        for name in names:
            lines = at_nfe(rows, name, metric)
            body = [[_label(*kind), *map(short, line)] for kind, line in lines.items()]
            body += [
                [f"~ {_label(*kind)}", *map(short, line)] for kind, line in adaptive_at_nfe(rows, name, metric).items()
            ]
            body += summary(lines)
            parts.append(f"\n## {name}: {words}\n\n" + table(["sampler", *map(str, NFE)], body))
    for title, group in (("main", targets.MAIN), ("held-out", targets.HELD_OUT)):
        chosen = [name for name in names if name in group]
        if len(chosen) < 2:
            continue
        for metric, words in heads.items():
            each = [at_nfe(rows, name, metric) for name in chosen]
            kinds = [kind for kind in each[0] if all(kind in lines for lines in each)]
            lines = {kind: [_geo([e[kind][i] for e in each]) for i in range(len(NFE))] for kind in kinds}
            body = [[_label(*kind), *map(short, line)] for kind, line in lines.items()] + summary(lines)
            parts.append(
                f"\n## Geometric mean over {', '.join(chosen)} ({title}): {words}\n\n"
                + table(["sampler", *map(str, NFE)], body)
            )
    return "".join(parts)


def _geo(values: Sequence[float]) -> float:
    return geo_mean(values) if all(math.isfinite(value) and value > 0 for value in values) else math.nan


# Okabe and Ito's colours, which colour-blind readers tell apart; ours are the thick lines.
SHOWN_PEERS: dict[str, tuple[str, str, str]] = {
    "diffusers DDIM trailing": ("#999999", "v", "-"),
    "diffusers Heun karras": ("#999999", "^", "--"),
    "diffusers DPM++2M lu": ("#E69F00", "s", "-"),
    "diffusers UniPC-3 exp": ("#009E73", "D", "-"),
    "azula zEAB3 log-SNR": ("#CC79A7", "P", "-"),
    "azula xEAB4 log-SNR": ("#56B4E9", "X", "-"),
    "torchdiffeq dopri5 t": ("#D55E00", "", ":"),
    "k-diffusion dpm_adaptive-3": ("#E69F00", "", ":"),
}
SHOWN_OURS = {
    "Exponential": ("#000000", "o"),
    "Exponential, calibrated": ("#0072B2", "o"),
    "Adaptive": ("#D55E00", "o"),
    "Heun": ("#009E73", "o"),
}


def figure(rows: Sequence[Row], names: Sequence[str], file: str) -> None:
    """One panel for every target: RMS against calls, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    columns = min(3, len(names))
    lines_of_panels = math.ceil((len(names) + (len(names) > 3)) / columns)
    fig, axes = plt.subplots(
        lines_of_panels, columns, figsize=(4.4 * columns, 3.9 * lines_of_panels), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for panel, name in zip(axes.flat, names, strict=False):
        for (group, sampler), line in curves(rows, name, "rms").items():
            points = [(calls, error) for calls, error in sorted(line) if math.isfinite(error) and 4 <= calls <= 130]
            if not points or (group, sampler in SHOWN_OURS) == ("ours", False):
                continue
            if group != "ours" and (group != "peer" or sampler not in SHOWN_PEERS):
                continue
            if group == "ours":
                colour, marker = SHOWN_OURS[sampler]
                look = {"color": colour, "marker": marker, "linewidth": 2.4, "markersize": 5, "zorder": 3}
                label = f"sdediff {sampler}"
            else:
                colour, marker, dash = SHOWN_PEERS[sampler]
                look = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.3, "markersize": 4.5}
                label = sampler
            (handles[label],) = panel.loglog(*zip(*points, strict=True), label=label, **look)
        panel.set_title(name)
        panel.set_xlim(4.5, 120)
        panel.set_ylim(1e-7, 3)
        panel.set_xticks(NFE, [str(nfe) for nfe in NFE])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
    shown = list(axes.flat)
    for i, panel in enumerate(shown[: len(names)]):
        if i % columns == 0:
            panel.set_ylabel("RMS error of x at t = 1e-3")
        if i + columns >= len(names):
            panel.set_xlabel("network calls")
            panel.tick_params(labelbottom=True)
    for panel in shown[len(names) :]:
        panel.axis("off")
    if len(shown) > len(names):
        shown[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=9, frameon=False)
    else:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    RESULTS.mkdir(exist_ok=True)
    fig.savefig(RESULTS / file, dpi=150)
    plt.close(fig)


def last_rows(file: str) -> list[Row]:
    """The rows of the last results."""
    with open(RESULTS / file, newline="") as stream:
        return [
            {
                **row,
                "nfe": int(row["nfe"]) if row["nfe"] else "",
                "tolerance": float(row["tolerance"]) if row["tolerance"] else "",
                **{column: float(row[column]) for column in ("calls", "rms", "median")},
            }
            for row in csv.DictReader(stream)
        ]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows, with those of samplers that were run again replaced in their places."""

    def kind(row: Row) -> tuple[str, str, str]:
        return row["target"], row["group"], row["sampler"]

    fresh: dict[tuple[str, str, str], list[Row]] = {}
    for row in new:
        fresh.setdefault(kind(row), []).append(row)
    found: list[Row] = []
    for row in old:
        if kind(row) not in {kind(r) for r in new}:
            found.append(row)
        else:
            found += fresh.pop(kind(row), [])
    return found + [row for rows in fresh.values() for row in rows]


def main() -> None:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="main targets, 64 rows; writes files that start with quick_"
    )
    parser.add_argument("--targets", nargs="*", default=None, help="names of targets; all if not given")
    parser.add_argument("--only", nargs="*", default=(), help="samplers whose name contains one of these")
    parser.add_argument(
        "--keep", action="store_true", help="take the samplers that are not run from the last results of the same files"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.targets or [*targets.MAIN, *(() if args.quick else targets.HELD_OUT)]
    starts = 64 if args.quick else reference.STARTS
    prefix = "quick_" if args.quick else ""
    rows = measure_all(names, args.only, starts)
    if args.keep:
        rows = merged(last_rows(f"{prefix}work_precision.csv"), rows)
    write_csv(f"{prefix}work_precision.csv", rows)
    print(write_text(f"{prefix}work_precision.md", report(rows, starts)).read_text())
    for group, ending in ((targets.MAIN, ""), (targets.HELD_OUT, "_held_out")):
        chosen = [name for name in names if name in group]
        if chosen:
            figure(rows, chosen, f"{prefix}work_precision{ending}.png")


if __name__ == "__main__":
    main()
