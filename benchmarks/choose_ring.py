"""How the numbers of the target ring2d were chosen: by other libraries' errors only, none of ours.

An earlier measurement on a ring of 8 unequal modes, whose numbers were not kept, found the best peers' RMS errors and
the calls of torchdiffeq's dopri5 that are `GOAL` and `GOAL_CALLS` here. This script measures the same peers on rings
of several radii and seeds; the ring with the least distance (RMS of the log-ratios, both lists together) was taken.
Writes `choose_ring.md`.

    python -m benchmarks.choose_ring
"""

from __future__ import annotations

import itertools
import math

import torch

from benchmarks import peers, reference, targets
from benchmarks.common import calls_needed, measure, short, table, whole, write_text

NFE = (5, 8, 10, 15, 20, 30, 50, 100)
GOAL = (1.0e-1, 5.7e-2, 3.8e-2, 1.8e-2, 7e-3, 2.1e-3, 3.8e-4, 2.5e-5)
GOAL_CALLS = {1e-2: 41, 1e-3: 79, 1e-4: 121}
PEERS = (
    "diffusers DPM++2M lu",
    "diffusers UniPC-2 exp, int t",
    "diffusers UniPC-3 exp",
    "azula zEAB3 log-SNR",
    "azula xEAB4 log-SNR",
)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    reference.ROWS_AT_A_TIME = reference.STARTS
    dopri5 = peers.ADAPTIVE["torchdiffeq dopri5 t"].run
    lines = []
    for radius, seed in itertools.product((0.8, 1.0, 1.2, 1.5, 2.0), (0, 1, 2)):
        target = targets.ring2d(radius=radius, seed=seed)
        x = target.start(reference.STARTS, reference.SEED)
        exact = reference.solve(target, x, 1e-10)
        model = target.mixture.model(targets.process())
        best = [
            min(measure(model, x, exact, lambda m, p=p, n=n, y=x: peers.FIXED[p].run(m, y, n, None)).rms for p in PEERS)
            for n in NFE
        ]
        runs = [measure(model, x, exact, lambda m, k=k, y=x: dopri5(m, y, 10 ** (-k / 2))) for k in range(2, 16)]
        calls = [calls_needed([(run.calls, run.rms) for run in runs], goal) for goal in GOAL_CALLS]
        got, wanted = [*best, *calls], [*GOAL, *GOAL_CALLS.values()]
        off = math.sqrt(sum(math.log(a / b) ** 2 for a, b in zip(got, wanted, strict=True)) / len(got))
        lines.append((off, [f"{radius}", f"{seed}", f"{off:.2f}", *map(short, best), " / ".join(map(whole, calls))]))
    lines.sort(key=lambda line: line[0])
    head = ["radius", "seed", "distance", *(f"best RMS, {n}" for n in NFE), "dopri5 calls for 1e-2 / 1e-3 / 1e-4"]
    goal = ["", "", "0", *map(short, GOAL), " / ".join(map(str, GOAL_CALLS.values()))]
    print(write_text("choose_ring.md", table(head, [goal, *(line for _, line in lines)])).read_text())


if __name__ == "__main__":
    main()
