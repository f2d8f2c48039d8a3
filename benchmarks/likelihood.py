"""Log-likelihoods by the probability-flow ODE: error in nats against network calls, other libraries and ours.

Exact scores, VP(0.1, 20), float64, 1,024 exact draws x of the data of every target; one thread. Two truths:

- "state": the others score x as if it were the state at t = 1e-5. Against the exact log-density of that state
  (`log p_1e-5`) their error is that of the solver, the trace and the prior. The prior N(0, I) that they use is one row
  ("N(0, I)"), the exact density of the states at t = 1 in its place another ("exact").
- "data": the exact log-density of the data, `log p_0(x)`, which is what was asked for.

Ours scores either: x as clean data (`tail="gaussian"`), or as that state (`tail="none"`). Calls and Jacobian-vector
products (traces x probes) are means over rows and include rejected steps. Seconds are processor time scaled to 1,024
rows, the least of three runs, or of one run where it takes long. Exact traces in 64 dimensions, ours and others', are
run on the first 128 rows only. One seed draws the probes; errors are over rows, and so over probes.

Writes `likelihood.csv`, `.md` and `.png`. `--keep` takes from the last results what is not run. `--memory` instead
measures how chunks bound the memory of exact divergences, in fresh processes, and writes `likelihood_memory.md`.

    python -m benchmarks.likelihood [--targets ring2d ...] [--only torchdiffeq ours ...] [--rows 1024] [--keep]
    python -m benchmarks.likelihood --memory
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sdediff as sd
from benchmarks import peers, targets
from benchmarks.common import RESULTS, calls_needed, counted, short, table, versions, whole, write_csv, write_text
from benchmarks.likelihood_peers import BASELINE, PEERS, PROCESS, T_EPS, ZUKO_EXACT
from benchmarks.targets import Target

ROWS, SEED = 1024, 5
SLOW_ROWS = 128
"""Rows of exact traces in many dimensions, ours and others'."""
GOALS = (1e-2, 1e-3, 1e-4)
OURS_EXACT = "ours, exact"

Row = dict[str, Any]


# Ours.

PRIORS: dict[str, Callable[[Target], Any]] = {
    "N(0, I)": lambda target: None,
    "exact": lambda target: target.mixture.marginal(PROCESS, 1.0),
    "matched": lambda target: sd.matched_prior(PROCESS, target.mixture.sample(4096, SEED + 1)),
}
TRUTHS: dict[str, dict[str, Any]] = {"data": {"tail": "gaussian"}, "state": {"tail": "none", "t_min": T_EPS}}

OURS: list[tuple[str, str, dict[str, Any], tuple[tuple[str, str], ...]]] = [
    *(
        (OURS_EXACT, f"{nats:g} nats", {"atol_nats": nats, "divergence": "exact"},
         (("data", "N(0, I)"), ("data", "exact"), ("data", "matched"), ("state", "N(0, I)"), ("state", "exact")))
        for nats in (1e-1, 1e-2, 1e-3, 1e-4)
    ),
    *(
        (f"ours, {kind} probes, {steps} steps", f"{probes} probes",
         {"steps": steps, "divergence": sd.Hutchinson(probes, kind)}, (("data", "matched"), ("state", "exact")))
        for kind in ("rademacher", "orthogonal") for steps in (20, 41) for probes in (1, 2, 4, 8)
    ),
]  # fmt: skip
"""`(method, setting, options, pairs of what x is and the prior)`."""


# Measuring.


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Counts the Jacobian-vector products, rows times vectors, that automatic differentiation is asked for."""
    plain = torch.autograd.grad
    count = [0]

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **options: Any) -> Any:
        rows = len(inputs if isinstance(inputs, Tensor) else inputs[0])
        count[0] += rows * (len(grad_outputs) if options.get("is_grads_batched") else 1)
        return plain(outputs, inputs, grad_outputs, *args, **options)

    with mock.patch.object(torch.autograd, "grad", grad):
        yield count


@dataclass(frozen=True)
class Cost:
    """Calls and products per row, seconds for `ROWS` rows."""

    calls: float
    products: float
    seconds: float


def run(model: sd.ScoreModel, x: Tensor, score: Callable[[sd.ScoreModel, Tensor], Any]) -> tuple[Any, Cost]:
    """The result of a scorer, counted and timed."""
    bound, counter = counted(model)
    torch.manual_seed(SEED)
    began = time.process_time()
    with torch.no_grad(), counted_products() as products:
        result = score(bound, x)
    seconds = [time.process_time() - began]
    while len(seconds) < 3 and seconds[0] < 5:
        began = time.process_time()
        with torch.no_grad():
            score(model, x)
        seconds.append(time.process_time() - began)
    return result, Cost(counter.rows / len(x), products[0] / len(x), min(seconds) * ROWS / len(x))


def off(value: Tensor, truth: Tensor | None, name: str) -> Row:
    """Root mean square, median and worst error of rows; NaN for no truth."""
    error = (value - truth).abs() if truth is not None else torch.full_like(value, math.nan)
    return {
        f"rms_{name}": error.square().mean().sqrt().item(),
        f"median_{name}": error.median().item(),
        f"worst_{name}": error.max().item(),
    }


def measure_target(target: Target, rows: int, only: Sequence[str]) -> list[Row]:
    """Every method on one target."""
    x = target.mixture.sample(rows, SEED)
    model = target.mixture.model(PROCESS)
    data, state = target.mixture.log_prob(x), target.mixture.marginal(PROCESS, T_EPS).log_prob(x)
    terminal = target.mixture.marginal(PROCESS, 1.0)
    found: list[Row] = []

    def add(method: str, setting: str, kind: str, prior: str, value: Tensor, cost: Cost) -> None:
        n = len(value)
        errors = off(value, state[:n] if kind == "state" else None, "state") | off(value, data[:n], "data")
        named = {"target": target.name, "method": method, "setting": setting, "scores": kind, "prior": prior, "rows": n}
        found.append(named | vars(cost) | errors)

    def cut(method: str) -> Tensor:
        slow = target.size > 8 and method in (BASELINE, ZUKO_EXACT, OURS_EXACT)
        return x[:SLOW_ROWS] if slow else x

    def wanted(method: str) -> bool:
        return not only or any(part in method for part in only)

    for method, setting, package, score in PEERS:
        if wanted(method) and peers.available(package):
            scored, cost = run(model, cut(method), score)
            add(method, setting, "state", "N(0, I)", scored.value, cost)
            add(method, setting, "state", "exact", scored.value - scored.prior + terminal.log_prob(scored.latent), cost)
    for method, setting, options, pairs in OURS:
        if wanted(method) and getattr(options["divergence"], "probes", 0) <= target.size:
            for kind, prior in pairs:
                given = {**TRUTHS[kind], **options, "prior": PRIORS[prior](target), "seed": SEED}
                result, cost = run(model, cut(method), partial(sd.log_prob, **given))
                add(method, setting, kind, prior, result.value, cost)
    print(f"{target.name}: done", flush=True)
    return found


def left_out(target: Target) -> list[str]:
    """RMS of what the truths and the priors differ by, over exact draws."""
    x, latent = target.mixture.sample(ROWS, SEED), target.mixture.marginal(PROCESS, 1.0).sample(ROWS, SEED)
    blur = target.mixture.marginal(PROCESS, T_EPS).log_prob(x) - target.mixture.log_prob(x)
    terminal = target.mixture.marginal(PROCESS, 1.0).log_prob(latent)
    gap = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1) - terminal
    return [short(part.square().mean().sqrt().item()) for part in (blur, gap)]


# Writing.


def points(rows: Sequence[Row], method: str, target: str, kind: str, prior: str, axis: str = "calls") -> Any:
    """Pairs `(cost, RMS error)` of a method's settings, by what x is taken for; all on `log p_0` for "data"."""
    own = [row for row in rows if (row["method"], row["target"], row["prior"]) == (method, target, prior)]
    taken = "state" if kind == "state" or not method.startswith("ours") else "data"
    return [(row[axis], row[f"rms_{kind}"]) for row in own if row["scores"] == taken]


def report(rows: Sequence[Row], count: int) -> str:
    """The tables as markdown."""
    names, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("target", "method"))

    def needed(kind: str, priors: Sequence[str]) -> str:
        lines = []
        for method, prior in itertools.product(methods, priors):
            cells = [
                " / ".join(whole(calls_needed(points(rows, method, name, kind, prior), goal)) for goal in GOALS)
                for name in names
            ]
            if any(char.isdigit() for cell in cells for char in cell):
                lines.append([f"**{method}**" if method.startswith("ours") else method, prior, *cells])
        return table(["method", "prior", *names], lines)

    ratio = "not measured"
    seconds = [
        calls_needed(points(rows, method, "lowrank64", "state", "exact", "seconds"), 1e-3)
        for method in (BASELINE, OURS_EXACT)
    ]
    if all(map(math.isfinite, seconds)):
        ratio = f"{seconds[0]:.3g} s against {seconds[1]:.3g} s, {seconds[0] / seconds[1]:.1f} times"
    text = (
        "# Log-likelihood by the probability-flow ODE\n\n"
        f"{count} exact draws of the data, VP(0.1, 20), float64, exact scores, one thread. "
        "Calls and Jacobian-vector products are means over rows, errors in nats, seconds of processor time for "
        f"{ROWS} rows, scaled where fewer were run: exact traces in 64 dimensions are of {SLOW_ROWS} rows. "
        f"How: `benchmarks/likelihood.py`.\n\n{versions()}\n\n"
        "## Network calls for an RMS error of 1e-2 / 1e-3 / 1e-4 nats\n\n"
        "x taken as the state at t = 1e-5, exact prior: error of solver and trace alone, against `log p_1e-5`. "
        "Methods that never reach 1e-2 are left out.\n\n"
        + needed("state", ["exact"])
        + "\nAs returned, against `log p_0`, the density of the data:\n\n"
        + needed("data", ["N(0, I)", "matched"])
        + f"\nSeconds for 1e-3 nats on lowrank64, {BASELINE} against {OURS_EXACT} (state, exact prior): {ratio}.\n\n"
        "What no solver can mend, RMS in nats:\n\n"
        + table(
            ["target", "`log p_1e-5 - log p_0` at data", "N(0, I) in place of p_1 at its draws"],
            [[name, *left_out(targets.get(name))] for name in names],
        )
    )
    head = ["method", "setting", "x is", "prior", "calls", "products", "RMS / median / worst to `log p_1e-5`",
            "RMS / median / worst to `log p_0`", "s"]  # fmt: skip
    for name in names:
        body = [
            [
                *(row[key] for key in ("method", "setting", "scores", "prior")),
                *(whole(row[key]) for key in ("calls", "products")),
                *(
                    " / ".join(short(row[f"{part}_{kind}"]) for part in ("rms", "median", "worst"))
                    for kind in ("state", "data")
                ),
                f"{row['seconds']:.2g}",
            ]
            for row in rows
            if row["target"] == name
        ]
        text += f"\n## {name}\n\n" + table(head, body)
    return text


# Okabe and Ito's colours, which colour-blind readers tell apart; ours are the thick lines.
SHOWN: dict[str, tuple[str, str]] = {
    BASELINE: ("#D55E00", "s"),
    ZUKO_EXACT: ("#CC79A7", "D"),
    "torchdiffeq dopri5, one probe": ("#D55E00", "x"),
    "scipy RK45, one probe (score_sde)": ("#999999", "v"),
    "k-diffusion log_likelihood, one probe": ("#E69F00", "^"),
    "zuko, one Gaussian probe": ("#CC79A7", "+"),
    OURS_EXACT: ("#000000", "o"),
    "ours, orthogonal probes, 20 steps": ("#0072B2", "o"),
    "ours, orthogonal probes, 41 steps": ("#56B4E9", "o"),
}


def figure(rows: Sequence[Row], names: Sequence[str]) -> None:
    """One panel for every target: RMS error of solver and trace (state, exact prior) against calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    fig, axes = plt.subplots(
        1, len(names), figsize=(4.4 * len(names), 4.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(axes.flat, names, strict=True):
        for method, (colour, marker) in SHOWN.items():
            line = sorted(points(rows, method, name, "state", "exact"))
            look = {"linewidth": 2.4, "zorder": 3} if method.startswith("ours") else {"linewidth": 1.3}
            panel.loglog(
                *(zip(*line, strict=True) if line else ([], [])), color=colour, marker=marker, label=method, **look
            )
        line = sorted(points(rows, OURS_EXACT, name, "data", "matched"))
        panel.loglog(
            *(zip(*line, strict=True) if line else ([], [])), "o:", color="#009E73",
            label="ours, exact, as data: against log p_0", linewidth=2.4, zorder=3,
        )  # fmt: skip
        panel.set_title(name)
        panel.set_xlabel("network calls per row")
        panel.set_xticks((10, 20, 50, 100, 200), ["10", "20", "50", "100", "200"])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#dddddd", linewidth=0.6)
    axes[0, 0].set_ylabel("RMS error, nats")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    RESULTS.mkdir(exist_ok=True)
    fig.savefig(RESULTS / "likelihood.png", dpi=150)
    plt.close(fig)


def last_rows(fresh: Sequence[Row]) -> list[Row]:
    """The rows of the last results whose target and method were not run again."""
    words = ("target", "method", "setting", "scores", "prior")
    again = {(row["target"], row["method"]) for row in fresh}
    with (RESULTS / "likelihood.csv").open(newline="") as stream:
        old = [{k: v if k in words else float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    return [row for row in old if (row["target"], row["method"]) not in again]


# Memory.


def convolutions(channels: int) -> torch.nn.Module:
    """Three layers of 32 channels that do not look at the time."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((channels, 32), (32, 32), (32, channels))]
    return torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])


def peak(shape: tuple[int, ...], chunk: int, tail: str) -> tuple[float, float, float]:
    """Peak memory in MB before and after a likelihood in this process, and its seconds."""
    import resource
    import sys

    def megabytes() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    torch.set_num_threads(1)
    network = convolutions(shape[1])
    model = sd.ScoreModel(lambda x, t: network(x), PROCESS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sd.log_prob(model, x, divergence=sd.Hutchinson(1), steps=5, seed=0)
    before, began = megabytes(), time.process_time()
    sd.log_prob(model, x, divergence=sd.Exact(chunk=chunk), steps=5, tail=tail, seed=0)
    return before, megabytes(), time.process_time() - began


def memory() -> str:
    """Exact divergence of a convolutional network, chunk by chunk, each in a process of its own."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    body = []
    for shape in ((64, 1, 8, 8), (8, 3, 16, 16)):
        size = math.prod(shape[1:])
        for chunk, tail in [(chunk, "none") for chunk in sorted({1, 16, 64, size})] + [(64, "gaussian")]:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                before, after, seconds = pool.submit(peak, shape, chunk, tail).result()
            name = f"{chunk} (all)" if chunk == size else str(chunk)
            body.append([str(shape), name, tail, f"{after:.0f}", f"{after - before:.0f}", f"{seconds:.2f}"])
    return (
        "# Memory of exact divergences by chunk\n\nThree convolutions of 32 channels, float32, 5 steps, one thread; "
        'peak resident memory of a fresh process. `tail="gaussian"` needs the whole Jacobian of every row once, '
        f"whatever the chunk.\n\n{versions()}\n\n"
        + table(["batch", "vectors at a time", "tail", "peak, MB", "above one probe, MB", "s"], body)
    )


def main() -> None:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(targets.MAIN))
    parser.add_argument("--only", nargs="*", default=(), help="methods whose name contains one of these")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--keep", action="store_true", help="take what is not run from the last results")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(write_text("likelihood_memory.md", memory()).read_text())
        return
    rows = [row for name in args.targets for row in measure_target(targets.get(name), args.rows, args.only)]
    if args.keep:
        rows = last_rows(rows) + rows
    write_csv("likelihood.csv", rows)
    print(write_text("likelihood.md", report(rows, args.rows)).read_text())
    figure(rows, list(dict.fromkeys(row["target"] for row in rows)))


if __name__ == "__main__":
    main()
