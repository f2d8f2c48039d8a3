"""How well samplers of the reverse SDE reproduce the distribution, on gauss64 and ring2d.

20 000 samples start from exact draws at t = 1 and are compared with the exact distribution at t = 1e-3:

- SW2: the sliced 2-Wasserstein distance over 128 fixed directions to the exact quantiles of the projections;
- log-sd: the RMS over the principal axes of the logarithm of (standard deviation of the samples / exact one).

The first row, exact samples, is the floor that 20 000 samples cannot go below. Writes `stochastic.csv` and `.md`.

    python -m benchmarks.stochastic [--quick] [--targets gauss64 ...] [--only SDE-DPM ...]
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours, peers, targets
from benchmarks.common import counted, short, table, versions, write_csv, write_text
from benchmarks.targets import Target

NFE = (5, 10, 20, 50)
SAMPLES, DIRECTIONS, START_SEED, SEED = 20_000, 128, 2, 3
FLOOR_SETS = 8
"""The floor is a mean over this many sets of exact samples."""


class Exact:
    """The exact distribution of a target at the end time, ready to be compared with `n` samples."""

    def __init__(self, target: Target, n: int) -> None:
        self.weights = target.weights / target.weights.sum()
        self.means, covs = target.at_end()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(target.size, DIRECTIONS, dtype=torch.float64, generator=generator)
        self.directions = directions / directions.norm(dim=0)
        levels = (np.arange(n) + 0.5) / n
        centres = self.means @ self.directions
        widths = torch.einsum("di,kde,ei->ki", self.directions, covs, self.directions).sqrt()
        self.quantiles = torch.stack(
            [self._quantiles(centres[:, i], widths[:, i], levels) for i in range(DIRECTIONS)], dim=1
        )
        centred = self.means - self.weights @ self.means
        cov = torch.einsum("k,kde->de", self.weights, covs + centred[:, :, None] * centred[:, None, :])
        eigenvalues, self.axes = torch.linalg.eigh(cov)
        self.stds = eigenvalues.sqrt()

    def _quantiles(self, centres: Tensor, widths: Tensor, levels: np.ndarray) -> Tensor:
        """Quantiles of a one-dimensional mixture, from its distribution function on a fine grid."""
        low, high = (centres - 8 * widths).min().item(), (centres + 8 * widths).max().item()
        points = torch.linspace(low, high, 1 << 14, dtype=torch.float64)
        below = self.weights @ torch.special.ndtr((points - centres[:, None]) / widths[:, None])
        return torch.from_numpy(np.interp(levels, below.numpy(), points.numpy()))

    def sliced_w2(self, x: Tensor) -> float:
        """Root mean square over directions and ranks of the difference of quantiles."""
        return ((x @ self.directions).sort(dim=0).values - self.quantiles).square().mean().sqrt().item()

    def log_sd(self, x: Tensor) -> float:
        """RMS log-error of the standard deviations along the principal axes."""
        return ((x @ self.axes).std(dim=0) / self.stds).log().square().mean().sqrt().item()


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2000 samples; writes files that start with quick_")
    parser.add_argument("--targets", nargs="*", default=["gauss64", "ring2d"])
    parser.add_argument("--only", nargs="*", default=(), help="samplers whose name contains one of these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = 2000 if args.quick else SAMPLES
    rows: list[dict[str, Any]] = []
    text = [
        "# Samplers of the reverse SDE\n\n"
        f"{n} samples, VP(0.1, 20), from exact draws at t = 1 to t = 1e-3, float64. SW2: sliced 2-Wasserstein "
        "distance to the exact quantiles; log-sd: RMS log-error of the standard deviations along the principal axes."
        f" Columns are network calls.\n\n{versions()}\n"
    ]
    for target_name in args.targets:
        target = targets.get(target_name)
        exact = Exact(target, n)
        model = target.mixture.model(targets.process())
        x = target.start(n, START_SEED)
        at_end = target.mixture.marginal(targets.process(), targets.T_END)
        sets = [at_end.sample(n, seed) for seed in range(100, 100 + FLOOR_SETS)]
        floor = [sum(map(metric, sets)) / FLOOR_SETS for metric in (exact.sliced_w2, exact.log_sd)]
        rows.append(
            {"target": target_name, "group": "floor", "sampler": "exact samples", "nfe": 0, "calls": 0.0,
             "sw2": floor[0], "log_sd": floor[1]}
        )  # fmt: skip
        lines = [["exact samples (floor)", *[short(floor[0])] * len(NFE), *[short(floor[1])] * len(NFE)]]
        runs = {
            name: ("peer", lambda m, nfe, p=peer, y=x: p.run(m, y, nfe, None), peer.calls)
            for name, peer in peers.NOISY.items()
            if peers.available(peer.package)
        } | {
            f"**{name}** (ours)": (
                "ours",
                lambda m, nfe, e=entry, y=x, base=model: ours.run(e, base, m, y, nfe, SEED),
                entry.calls,
            )
            for name, entry in ours.NOISY.items()
        }
        for name, (group, solve, calls) in runs.items():
            if args.only and not any(part in name for part in args.only):
                continue
            values: dict[str, list[float]] = {"sw2": [], "log_sd": []}
            for nfe in NFE:
                sw2 = log_sd = math.nan
                if nfe >= calls:
                    bound, counter = counted(model)
                    torch.manual_seed(SEED)
                    with torch.no_grad():
                        end = solve(bound, nfe)
                    sw2, log_sd = exact.sliced_w2(end), exact.log_sd(end)
                    rows.append(
                        {"target": target_name, "group": group, "sampler": name.strip("*").replace("** (ours)", ""),
                         "nfe": nfe, "calls": counter.rows / n, "sw2": sw2, "log_sd": log_sd}
                    )  # fmt: skip
                values["sw2"].append(sw2)
                values["log_sd"].append(log_sd)
            lines.append([name, *map(short, values["sw2"]), *map(short, values["log_sd"])])
        head = ["sampler", *(f"SW2, {nfe}" for nfe in NFE), *(f"log-sd, {nfe}" for nfe in NFE)]
        text.append(f"\n## {target_name}\n\n" + table(head, lines))
        print(f"{target_name}: done", flush=True)
    prefix = "quick_" if args.quick else ""
    write_csv(f"{prefix}stochastic.csv", rows)
    print(write_text(f"{prefix}stochastic.md", "".join(text)).read_text())


if __name__ == "__main__":
    main()
