"""The exact probability-flow map from t = 1 to t = 1e-3, in float64, cached in `benchmarks/.cache`.

scipy's DOP853 (order 8) runs at tolerance 1e-13 over a few rows at a time. `python -m benchmarks.reference` solves
every target at 1e-12 as well and prints how far the two are apart, and compares gauss64 with its closed form.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import sdediff as sd
from benchmarks import targets
from benchmarks.targets import T_END, Target

CACHE = Path(__file__).parent / ".cache"
TOLERANCE = 1e-13
ROWS_AT_A_TIME = 64
STARTS, SEED = 512, 1
"""Number and seed of the starting points that all error benchmarks use."""


def solve(target: Target, x: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """The flow of `x` at t = 1 to `T_END`, `(n, D)`."""
    model = target.mixture.model(targets.process())
    ends = []
    for rows in x.split(ROWS_AT_A_TIME):

        def rhs(t: float, y: np.ndarray, rows: Tensor = rows) -> np.ndarray:
            return model.velocity(t, torch.from_numpy(y).reshape(rows.shape)).reshape(-1).numpy()

        with torch.no_grad():
            result = solve_ivp(
                rhs, (1.0, T_END), rows.reshape(-1).numpy(), method="DOP853", rtol=tolerance, atol=tolerance
            )
        if not result.success:
            raise RuntimeError(f"The reference for {target.name} failed: {result.message}")
        ends.append(torch.from_numpy(result.y[:, -1].copy()).reshape(rows.shape))
    return torch.cat(ends)


def _digest(target: Target, x: Tensor) -> str:
    """A name for the numbers that the reference depends on."""
    content = b"".join(part.contiguous().numpy().tobytes() for part in (target.weights, target.means, target.covs, x))
    return hashlib.sha256(content).hexdigest()[:12]


def pairs(target: Target, n: int = STARTS, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Exact draws at t = 1 and where the flow takes them at `T_END`, each `(n, D)`."""
    x = target.start(n, seed)
    if isinstance(target.mixture, sd.exact.Gaussian):
        return x, target.mixture.flow(targets.process(), x, 1.0, T_END)
    file = CACHE / f"{target.name}-{n}-{seed}-{_digest(target, x)}.npy"
    if not file.exists():
        CACHE.mkdir(exist_ok=True)
        np.save(file, solve(target, x).numpy())
    return x, torch.from_numpy(np.load(file))


def main() -> None:
    """Check every reference and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=[*targets.MAIN, *targets.HELD_OUT])
    parser.add_argument("--rows", type=int, default=STARTS)
    args = parser.parse_args()
    print("| target | rms difference, tolerance 1e-12 against 1e-13 | largest | against the closed form, largest |")
    print("|---|---|---|---|")
    for name in args.targets:
        target = targets.get(name)
        x, exact = pairs(target, args.rows)
        loose = solve(target, x, 1e-12)
        if isinstance(target.mixture, sd.exact.Gaussian):
            tight = solve(target, x)
            closed = f"{(tight - exact).abs().max():.1e}"
        else:
            tight, closed = exact, "-"
        off = loose - tight
        print(f"| {name} | {off.square().mean().sqrt():.1e} | {off.abs().max():.1e} | {closed} |")


if __name__ == "__main__":
    main()
