"""How the constants of `grids.tapered`, and the orders of `Exponential`, were chosen: a scan on the three main targets.

Prints, for each number of steps, the settings whose worst ratio to the best peer of `results/work_precision.csv` over
the three targets is lowest (root mean square error). The held-out targets take no part.

    python -m benchmarks.choose_grid [--steps 8 20 50]
"""

from __future__ import annotations

import argparse
import csv
from itertools import product

import sdediff as sd
from benchmarks import reference, targets
from benchmarks.common import RESULTS
from sdediff import exponential, grids, runs, tables

MAIN = ("ring2d", "gauss64", "lowrank64")
KNEES, CORNERS, SPARSE = (1.2, 1.35, 1.5, 1.65), (0.3, 0.6, 0.9), (0.1, 0.15, 0.2)


def best_peer(target: str, nfe: int) -> float:
    """The lowest error of any peer on its own grid."""
    with open(RESULTS / "work_precision.csv", newline="") as file:
        return min(
            float(row["rms"])
            for row in csv.DictReader(file)
            if row["target"] == target and row["nfe"] == str(nfe) and row["group"] == "peer"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 30, 50])
    arguments = parser.parse_args()
    problems = {}
    for name in MAIN:
        target = targets.get(name)
        problems[name] = (target.mixture.model(targets.process()), *reference.pairs(target))
    for steps in arguments.steps:
        found = []
        for constants in product(KNEES, CORNERS, SPARSE):
            grids._KNEE, grids._CORNER, grids._SPARSE = constants
            for cache in (exponential._table, runs._kept_grid, tables._kept_rows):
                cache.cache_clear()
            for order in range(1, 6):
                ratios = []
                for name, (model, x, exact) in problems.items():
                    solver = sd.Exponential(order)
                    end = sd.sample(model, x.shape, solver=solver, steps=steps, x_init=x, final="none").x
                    ratios.append((end - exact).square().mean().sqrt().item() / best_peer(name, steps))
                found.append((max(ratios), order, constants, ratios))
        print(f"{steps} steps: order, (knee, corner, sparse), error / best peer on {', '.join(MAIN)}")
        for _, order, constants, ratios in sorted(found)[:5]:
            print(f"    {order}  {constants}  {' '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)


if __name__ == "__main__":
    main()
