"""What noise costs: microseconds per step, as a multiple of `torch.randn` of the same shape.

Each source is opened and asked for every step of an even grid from t = 1 to t = 0, as a solver asks (the
times of 1024 steps are those of repeated halving, which a path answers faster). The rounds of the
sources are interleaved, and the best of them counts. Run

    python benchmarks/brownian.py                 # with torchsde's BrownianInterval and BrownianTree
    python benchmarks/brownian.py --rounds 20
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torchsde

from sdediff.noise import Antithetic, BrownianPath, Noise, RowNoise

SHAPES = ((64, 2), (16, 3, 32, 32))
STEPS = (50, 1000, 1024)
SOURCES: dict[str, Noise] = {
    "RowNoise": RowNoise(0),
    "Antithetic(RowNoise)": Antithetic(RowNoise(0)),
    "BrownianPath": BrownianPath(0, 0.0, 1.0),
    "BrownianPath, depth=12": BrownianPath(0, 0.0, 1.0, depth=12),
    "BrownianPath, integrals": BrownianPath(0, 0.0, 1.0, integrals=True),
}


def plain(shape: tuple[int, ...], times: list[torch.Tensor]) -> None:
    for _ in pairwise(times):
        torch.randn(shape)


def ours(source: Noise, shape: tuple[int, ...], times: list[torch.Tensor]) -> None:
    stream, x = source.open(), torch.zeros(shape)
    for t, s in pairwise(times):
        stream.unit(x, t, s)


def interval(shape: tuple[int, ...], times: list[torch.Tensor]) -> None:
    flat = (shape[0], torch.Size(shape[1:]).numel())
    brownian = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=flat, entropy=0)
    for t, s in pairwise(times):
        brownian(s, t)


def tree(shape: tuple[int, ...], times: list[torch.Tensor]) -> None:
    brownian = torchsde.BrownianTree(t0=0.0, w0=torch.zeros(shape), t1=1.0, entropy=0)
    for t, s in pairwise(times):
        brownian(s, t)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchsde on ends of its interval that differ by rounding
    for shape in SHAPES:
        for steps in STEPS:
            times = list(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
            runs: dict[str, Callable[[], None]] = {"torch.randn": partial(plain, shape, times)}
            runs |= {name: partial(ours, source, shape, times) for name, source in SOURCES.items()}
            runs["torchsde.BrownianInterval"] = partial(interval, shape, times)
            runs["torchsde.BrownianTree"] = partial(tree, shape, times)
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(rounds):
                for name, run in runs.items():
                    best[name] = min(best[name], seconds(run) / steps * 1e6)
            print(f"\n{shape}, {steps} steps")
            for name, cost in best.items():
                print(f"  {name:28s}{cost:10.1f} us per step {cost / best['torch.randn']:8.2f} x", flush=True)


if __name__ == "__main__":
    main()
