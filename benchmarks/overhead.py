"""Microseconds per step of whole sampling calls, with a model that costs next to nothing: `0.5 * x`.

Compared with hand-written loops that make the same network call with precomputed coefficients and draw their start:

- DDIM: `x = a x + b F`;  2M: `x = a x + b F + c F_old`;  SDE: `x = a x + b F + c randn`;
- Adams: `x = a x + sum_j b_j F_(i-j)` over six values, which is what order 5 with its corrector takes.

float32, one thread, processor time; the best of interleaved rounds, so that all meet the same machine, which should be
otherwise idle. A whole call is timed (tables,
set-up and the draw of the start included) and divided by its steps. A second table has torchsde's solvers: Euler at
(256, 2) and 100 steps over one time unit, and network calls of a step of srk. Writes `overhead.csv` and `overhead.md`.

    python -m benchmarks.overhead [--quick] [--only DDIM ...] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sdediff as sd
from benchmarks import peers
from benchmarks.common import Counter, table, versions, write_csv, write_text

CASES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((64, 2), 50), ((64, 2), 1000), ((16, 3, 32, 32), 50), ((16, 3, 32, 32), 1000),
)  # fmt: skip
SLOWEST = 5.0
"""Seconds that one call may take; slower ones are shown with a dash."""

Call = Callable[[], Tensor]


def network(x: Tensor, t: Tensor) -> Tensor:
    """A network that costs next to nothing."""
    return 0.5 * x


MODEL = sd.ScoreModel(network, sd.VP(t_min=1e-3))


@dataclass(frozen=True)
class Timed:
    """A sampler to time: `make(shape, steps)` gives the call; `kind` is the loop that it is compared with."""

    kind: str
    make: Callable[[tuple[int, ...], int], Call]
    package: str = "torch"


def _ours(solver: sd.Solver, **options: Any) -> Callable[[tuple[int, ...], int], Call]:
    return lambda shape, steps: lambda: sd.sample(MODEL, shape, solver=solver, steps=steps, final="none", **options).x


OURS: dict[str, Timed] = {
    "DDIM": Timed("DDIM", _ours(sd.DDIM())),
    "DDPM": Timed("SDE", _ours(sd.DDPM())),
    "EulerMaruyama": Timed("SDE", _ours(sd.EulerMaruyama())),
    "Exponential, 2M": Timed("2M", _ours(sd.Exponential(2, predict="data", corrector=False))),
    "Exponential": Timed("Adams", _ours(sd.Exponential())),
    "Exponential, level 1": Timed("SDE", _ours(sd.Exponential(noise_level=1.0))),
    "TorchDiffEq euler": Timed("DDIM", _ours(sd.TorchDiffEq("euler"))),
    "TorchSDE euler": Timed("SDE", _ours(sd.TorchSDE("euler"))),
}
"""This library's samplers; one line adds one."""


# Hand-written loops.


def _coefficients(steps: int, columns: int) -> list[list[float]]:
    """Columns of harmless coefficients."""
    return [[0.9 + 0.01 * k] * steps for k in range(columns)]


def _loop_ddim(shape: tuple[int, ...], steps: int) -> Call:
    (a, b), times = _coefficients(steps, 2), list(torch.linspace(1, 0, steps))

    def run() -> Tensor:
        x = torch.randn(shape)
        for i in range(steps):
            x = a[i] * x + b[i] * network(x, times[i])
        return x

    return run


def _loop_2m(shape: tuple[int, ...], steps: int) -> Call:
    (a, b, c), times = _coefficients(steps, 3), list(torch.linspace(1, 0, steps))

    def run() -> Tensor:
        x = torch.randn(shape)
        old = torch.zeros(shape)
        for i in range(steps):
            output = network(x, times[i])
            x = a[i] * x + b[i] * output + c[i] * old
            old = output
        return x

    return run


def _loop_sde(shape: tuple[int, ...], steps: int) -> Call:
    (a, b, c), times = _coefficients(steps, 3), list(torch.linspace(1, 0, steps))

    def run() -> Tensor:
        x = torch.randn(shape)
        for i in range(steps):
            x = a[i] * x + b[i] * network(x, times[i]) + c[i] * torch.randn(shape)
        return x

    return run


def _loop_adams(shape: tuple[int, ...], steps: int) -> Call:
    columns, times = _coefficients(steps, 7), list(torch.linspace(1, 0, steps))

    def run() -> Tensor:
        x = torch.randn(shape)
        past = [torch.zeros(shape) for _ in range(5)]
        for i in range(steps):
            past = [network(x, times[i]), *past[:5]]
            x = columns[0][i] * x
            for column, value in zip(columns[1:], past, strict=True):
                x = x + column[i] * value
        return x

    return run


LOOPS: dict[str, Timed] = {
    "DDIM": Timed("DDIM", _loop_ddim),
    "2M": Timed("2M", _loop_2m),
    "SDE": Timed("SDE", _loop_sde),
    "Adams": Timed("Adams", _loop_adams),
}


# Other libraries.


def _diffusers(name: str, **config: Any) -> Callable[[tuple[int, ...], int], Call]:
    def make(shape: tuple[int, ...], steps: int) -> Call:
        import diffusers

        scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **config)

        def run() -> Tensor:
            x = torch.randn(shape)
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x).prev_sample
            return x

        return run

    return make


def _k_diffusion(sampler: str, *, fresh: bool = False) -> Callable[[tuple[int, ...], int], Call]:
    def make(shape: tuple[int, ...], steps: int) -> Call:
        sampling = peers.k_sampling()

        def run() -> Tensor:
            sigmas = sampling.get_sigmas_karras(steps, 0.01, 150.0)
            x = torch.randn(shape) * sigmas[0]
            noise = {"noise_sampler": lambda sigma, sigma_next: torch.randn_like(x)} if fresh else {}
            return getattr(sampling, f"sample_{sampler}")(network, x, sigmas, disable=True, **noise)

        return run

    return make


def _azula(sampler: str, **options: Any) -> Callable[[tuple[int, ...], int], Call]:
    def make(shape: tuple[int, ...], steps: int) -> Call:
        from azula.denoise import Denoiser, DiracPosterior
        from azula.noise import VPSchedule
        from azula.sample import __dict__ as samplers

        class Half(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = VPSchedule()

            def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
                return DiracPosterior(mean=network(x_t, t))

        solver = samplers[sampler](Half(), steps=steps, silent=True, **options)
        return lambda: solver(torch.randn(shape))

    return make


def _torchdiffeq(shape: tuple[int, ...], steps: int) -> Call:
    from torchdiffeq import odeint

    def run() -> Tensor:
        span = torch.tensor([0.0, 1.0])
        options = {"step_size": 1 / steps}
        return odeint(lambda t, x: network(x, t), torch.randn(shape), span, method="euler", options=options)[-1]

    return run


class _Half:
    """`dx = 0.5 x dt + dw` for torchsde."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return network(x, t)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def _torchsde(method: str) -> Callable[[tuple[int, ...], int], Call]:
    def make(shape: tuple[int, ...], steps: int) -> Call:
        import torchsde

        def run() -> Tensor:
            x = torch.randn(shape).flatten(1)
            return torchsde.sdeint(_Half(), x, torch.tensor([0.0, 1.0]), method=method, dt=1 / steps)[-1]

        return run

    return make


PEERS: dict[str, Timed] = {
    "diffusers DDIM": Timed("DDIM", _diffusers("DDIMScheduler"), "diffusers"),
    "diffusers DPM++2M": Timed("2M", _diffusers("DPMSolverMultistepScheduler"), "diffusers"),
    "diffusers UniPC-2": Timed("2M", _diffusers("UniPCMultistepScheduler"), "diffusers"),
    "diffusers DDPM": Timed("SDE", _diffusers("DDPMScheduler"), "diffusers"),
    "diffusers SDE-DPM++2M": Timed(
        "SDE", _diffusers("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), "diffusers"
    ),
    "k-diffusion euler": Timed("DDIM", _k_diffusion("euler"), "k_diffusion"),
    "k-diffusion dpmpp_2m": Timed("2M", _k_diffusion("dpmpp_2m"), "k_diffusion"),
    "k-diffusion 2m_sde (Brownian tree)": Timed("SDE", _k_diffusion("dpmpp_2m_sde"), "k_diffusion"),
    "k-diffusion 2m_sde (randn)": Timed("SDE", _k_diffusion("dpmpp_2m_sde", fresh=True), "k_diffusion"),
    "azula DDIM": Timed("DDIM", _azula("DDIMSampler"), "azula"),
    "azula xEAB2": Timed("2M", _azula("xEABSampler", order=2), "azula"),
    "torchdiffeq euler": Timed("DDIM", _torchdiffeq, "torchdiffeq"),
    "torchsde euler": Timed("SDE", _torchsde("euler"), "torchsde"),
}


def _seconds(call: Call) -> float:
    """Processor time of one call: what other programs take meanwhile does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Best seconds of every call over rounds that take all in turn; NaN for one that is too slow."""
    best, repeats = {}, {}
    for name, call in calls.items():
        first = _seconds(call)
        if first > SLOWEST:
            continue
        best[name] = first
        repeats[name] = max(2, min(20, int(0.05 / max(first, 1e-5))))
    for _ in range(rounds):
        for name in best:
            for _ in range(repeats[name]):
                best[name] = min(best[name], _seconds(calls[name]))
    return {name: best.get(name, float("nan")) for name in calls}


def samplers_table(only: list[str], rounds: int, quick: bool) -> tuple[str, list[dict[str, Any]]]:
    """The main table and its rows."""
    entries = {("loop", name): timed for name, timed in LOOPS.items()}
    entries |= {("ours", name): timed for name, timed in OURS.items() if not only or any(p in name for p in only)}
    entries |= {
        ("peer", name): timed
        for name, timed in PEERS.items()
        if (not only or any(p in name for p in only)) and peers.available(timed.package)
    }
    cases = CASES[::2] if quick else CASES
    rows: list[dict[str, Any]] = []
    for shape, steps in cases:
        calls = {f"{group}/{name}": timed.make(shape, steps) for (group, name), timed in entries.items()}
        best = interleaved(calls, rounds)
        for (group, name), timed in entries.items():
            per_step = 1e6 * best[f"{group}/{name}"] / steps
            loop = 1e6 * best[f"loop/{timed.kind}"] / steps
            rows.append(
                {"group": group, "sampler": name, "shape": "x".join(map(str, shape)), "steps": steps,
                 "us_per_step": per_step, "loop": timed.kind, "loop_us_per_step": loop, "ratio": per_step / loop}
            )  # fmt: skip
        print(f"{shape} x {steps}: done", flush=True)
    body = []
    for group, name in entries:
        cells = [row for row in rows if row["group"] == group and row["sampler"] == name]
        label = {"loop": f"loop {name}", "ours": f"**{name}** (ours)", "peer": name}[group]
        body.append([label, entries[group, name].kind, *(_cell(row) for row in cells)])
    head = ["sampler", "loop", *(f"({', '.join(map(str, shape))}) x {steps}" for shape, steps in cases)]
    return table(head, body), rows


def _cell(row: dict[str, Any]) -> str:
    if row["us_per_step"] != row["us_per_step"]:
        return "-"
    return f"{row['us_per_step']:.1f} ({row['ratio']:.2f}x)"


def torchsde_table(rounds: int) -> str:
    """torchsde's methods through this library and by `torchsde.sdeint`."""
    shape, steps = (256, 2), 100
    calls: dict[str, Call] = {
        "bare loop": _loop_sde(shape, steps),
        "TorchSDE euler (ours)": _ours(sd.TorchSDE("euler"))(shape, steps),
        "TorchSDE srk (ours)": _ours(sd.TorchSDE("srk"))(shape, steps),
    }
    if peers.available("torchsde"):
        calls["torchsde.sdeint euler, default Brownian motion"] = _torchsde("euler")(shape, steps)
        calls["torchsde.sdeint srk, default Brownian motion"] = _torchsde("srk")(shape, steps)
    best = interleaved(calls, rounds)
    counts = {"bare loop": 1.0}
    for method in ("euler", "srk"):
        counter = Counter(network)
        bound = sd.ScoreModel(counter, MODEL.sde)
        sd.sample(bound, shape, solver=sd.TorchSDE(method), steps=steps, final="none")
        counts[f"TorchSDE {method} (ours)"] = counter.rows / shape[0] / steps
        if peers.available("torchsde"):
            counts[f"torchsde.sdeint {method}, default Brownian motion"] = _torchsde_calls(method, shape, steps)
    body = [
        [name, f"{1e3 * seconds:.2f}", f"{seconds / best['bare loop']:.1f}x", f"{counts[name]:.2f}"]
        for name, seconds in best.items()
    ]
    return table(["(256, 2), 100 steps", "ms", "to the bare loop", "drift calls a step"], body)


def _torchsde_calls(method: str, shape: tuple[int, ...], steps: int) -> float:
    import torchsde

    class Counting(_Half):
        calls = 0

        def f(self, t: Tensor, x: Tensor) -> Tensor:
            self.calls += 1
            return super().f(t, x)

    process = Counting()
    torchsde.sdeint(process, torch.randn(shape), torch.tensor([0.0, 1.0]), method=method, dt=1 / steps)
    return process.calls / steps


def main() -> None:
    """Time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 steps only; writes files that start with quick_")
    parser.add_argument("--only", nargs="*", default=[], help="samplers whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        text, rows = samplers_table(args.only, args.rounds, args.quick)
        adapter = torchsde_table(args.rounds)
    prefix = "quick_" if args.quick else ""
    write_csv(f"{prefix}overhead.csv", rows)
    report = (
        "# Microseconds per step (ratio to the hand-written loop of the same kind)\n\n"
        f"Model `0.5 * x`, float32, one thread, processor time of whole calls, best of {args.rounds} interleaved "
        f'rounds. "-": one call takes more than {SLOWEST} s.\n\n{versions()}\n\n{text}\n'
        f"## torchsde\n\n{adapter}"
    )
    print(write_text(f"{prefix}overhead.md", report).read_text())


if __name__ == "__main__":
    main()
