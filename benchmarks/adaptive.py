"""Network calls per row that methods with a tolerance need for a given accuracy, on the three main targets.

A method runs at tolerances from 0.1 to 1e-11; the calls at an RMS error of 1e-2 to 1e-5 are interpolated (log-log).
Rejected steps are counted. Writes `adaptive.csv` (every run) and `adaptive.md`.

    python -m benchmarks.adaptive [--targets ring2d ...] [--only dopri5 ...]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import sdediff as sd
from benchmarks import ours, peers, reference, targets
from benchmarks.common import calls_needed, measure, table, versions, whole, write_csv, write_text

GOALS = (1e-2, 1e-3, 1e-4, 1e-5)
TOLERANCES = tuple(10 ** (-k / 4) for k in range(4, 45))
MOST_CALLS = 700
"""No tighter tolerance is tried beyond this many calls."""


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(targets.MAIN))
    parser.add_argument("--only", nargs="*", default=(), help="methods whose name contains one of these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        ("peer", name): peer.run for name, peer in peers.ADAPTIVE.items() if peers.available(peer.package)
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    needed: dict[tuple[str, str], dict[str, list[float]]] = {}
    for target_name in args.targets:
        target = targets.get(target_name)
        x, exact = reference.pairs(target)
        model = target.mixture.model(targets.process())
        own = {
            ("ours", name): lambda m, y, tol, e=entry, base=model: ours.run_adaptive(e, base, m, y, tol)
            for name, entry in ours.ADAPTIVE.items()
        }
        for (group, name), solve in (runs | own).items():
            if args.only and not any(part in name for part in args.only):
                continue
            points = []
            for tolerance in TOLERANCES:
                try:
                    errors = measure(model, x, exact, lambda m, s=solve, t=tolerance, y=x: s(m, y, t))
                except (AssertionError, sd.DivergenceError):  # a tolerance that the method cannot meet
                    continue
                points.append((errors.calls, errors.rms))
                rows.append(
                    {"target": target_name, "group": group, "method": name, "tolerance": tolerance,
                     "calls": errors.calls, "rms": errors.rms, "median": errors.median}
                )  # fmt: skip
                if errors.calls > MOST_CALLS or errors.rms < GOALS[-1] / 30:
                    break
            needed.setdefault((group, name), {})[target_name] = [calls_needed(points, goal) for goal in GOALS]
        print(f"{target_name}: done", flush=True)
    body = [
        [f"**{name}** (ours)" if group == "ours" else name]
        + [" / ".join(map(whole, by_target[target])) for target in args.targets]
        for (group, name), by_target in needed.items()
    ]
    for group, words in (("peer", "**best peer**"), ("ours", "**best of ours**")):
        lines = [by_target for (g, _), by_target in needed.items() if g == group]
        best = [
            [min((line[t][i] for line in lines if line[t][i] == line[t][i]), default=float("nan")) for i in range(4)]
            for t in args.targets
        ]
        body.append([words, *(" / ".join(map(whole, column)) for column in best)])
    text = (
        "# Network calls per row for an RMS error of 1e-2 / 1e-3 / 1e-4 / 1e-5\n\n"
        f"512 exact draws at t = 1, VP(0.1, 20), end at t = 1e-3, float64; rejected steps counted.\n\n{versions()}\n\n"
        + table(["method", *args.targets], body)
    )
    write_csv("adaptive.csv", rows)
    print(write_text("adaptive.md", text).read_text())


if __name__ == "__main__":
    main()
