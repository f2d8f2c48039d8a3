r"""Linear inverse problems: how far the samples of every method are from a posterior that is known.

Gaussian data has 32 entries with a smooth covariance; the measurements are half of its entries, a blur, and means of
blocks of four. The mixture has 8 entries and 6 components, so that its posterior is a mixture again; the measurements
are 3 of its entries and 3 combinations of all. Scores are exact, so that all errors are the method's and the solver's.

- mean: RMS error of the posterior mean over its entries, in units of the RMS posterior standard deviation;
- cov: relative Frobenius error of the posterior covariance;
- energy: energy distance to as many true samples (mixture only).

The first row of a table is its floor: the errors of as many true posterior samples, which are what chance leaves, and
their standard error over runs with seeds of their own. The rows "exact score" have the model of the posterior itself,
and show what the solver leaves. Rows are run by the flow with the default solver, or by DDPM with more steps where
said. All numbers are means over runs. Bold ones cannot be told from the floor: not more than two standard errors of the
difference above true samples, for the flow, or above the exact score by DDPM, for DDPM. Methods whose states become
infinite, or whose errors pass 1000, "diverge".

With azula installed, the guided denoiser of its MMPS, and the gradient steps of its DPS and PGDM, are compared with
ours on one problem.

Writes `inverse.csv`, with every run, and `inverse.md`. About four minutes.

    python -m benchmarks.inverse [--quick]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sdediff as sd
from benchmarks.common import table, versions, write_csv, write_text
from sdediff.operators import Convolution, Downsample, LinearOperator, Mask, Matrix

F64 = torch.float64
SDE = sd.VP()


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def conditioned(mean: Tensor, cov: Tensor, A: Tensor, y: Tensor, noise_std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance of N(mean, cov) given y, and `log p(y)`."""
    spread = A @ cov @ A.T + noise_std**2 * torch.eye(len(y), dtype=F64)
    gain = torch.linalg.solve(spread, A @ cov).T
    evidence = torch.distributions.MultivariateNormal(A @ mean, spread).log_prob(y)
    after = cov - gain @ A @ cov
    return mean + gain @ (y - A @ mean), (after + after.T) / 2, evidence


@dataclass(frozen=True)
class Problem:
    """Data, a measurement of it, and the posterior."""

    name: str
    data: sd.exact.GaussianMixture
    A: LinearOperator
    y: Tensor
    noise_std: float
    posterior: sd.exact.GaussianMixture

    @property
    def deviation(self) -> float:
        """RMS standard deviation of an entry of the data, which PiGDM is told."""
        return self.data.cov.diagonal().mean().sqrt().item()


def problem(
    name: str, weights: Tensor, means: Tensor, covs: Tensor, A: LinearOperator, noise_std: float, seed: int
) -> Problem:
    """A problem with a measurement of one draw of the data."""
    data = sd.exact.GaussianMixture(weights, means, covs)
    y = A(data.sample(1, seed=seed))[0]
    y = y + noise_std * drawn(*y.shape, seed=seed + 1)
    parts = [conditioned(m, c, A.dense(), y, noise_std) for m, c in zip(means, covs, strict=True)]
    after = (weights.log() + torch.stack([part[2] for part in parts])).softmax(0).clamp(min=1e-300)
    posterior = sd.exact.GaussianMixture(after, *(torch.stack([part[i] for part in parts]) for i in (0, 1)))
    return Problem(f"{name}, s = {noise_std:g}", data, A, y, noise_std, posterior)


def gaussian_problems() -> list[Problem]:
    """Inpainting, deblurring and super-resolution of smooth Gaussian signals, at two noise levels."""
    size = 32
    place = torch.arange(size, dtype=F64)
    cov = torch.exp(-((place[:, None] - place) ** 2) / (2 * 2.0**2)) + 0.01 * torch.eye(size, dtype=F64)
    bell = torch.exp(-(torch.arange(-3, 4, dtype=F64) ** 2) / 4)
    maps = {
        "inpainting": Mask(drawn(size, seed=1) > 0),
        "blur": Convolution(bell / bell.sum(), (size,)),
        "super-resolution": Downsample(4, (size,)),
    }
    one, mean = torch.ones(1, dtype=F64), torch.zeros(1, size, dtype=F64)
    return [problem(name, one, mean, cov[None], A, s, 10) for name, A in maps.items() for s in (0.05, 0.5)]


def mixture_problems() -> list[Problem]:
    """Some entries, and some combinations, of a mixture."""
    size, count = 8, 6
    means = 1.2 * drawn(count, size, seed=2)
    roots = drawn(count, size, size, seed=3) / 6
    covs = roots @ roots.mT + 0.02 * torch.eye(size, dtype=F64)
    maps = {
        "mixture, 3 entries": Mask(torch.arange(size) < 3),
        "mixture, 3 combinations": Matrix(drawn(3, size, seed=4) / math.sqrt(size)),
    }
    weights = torch.ones(count, dtype=F64) / count
    return [problem(name, weights, means, covs, A, s, 20) for name, A in maps.items() for s in (0.1, 0.5)]


Draw = Callable[[Problem, int, int], Tensor]
"""`(problem, n, seed)` to samples."""

FLOW, CHAIN = 20, 50
"""Steps of the flow, and of DDPM."""


def sampled(model: sd.ScoreModel, p: Problem, n: int, seed: int, solver: sd.Solver | None, steps: int) -> Tensor:
    """Samples of a model."""
    return sd.sample(model, (n, *p.data.event), solver=solver, steps=steps, seed=seed).x


def exact(solver: sd.Solver | None = None, steps: int = FLOW) -> Draw:
    """Samples of the model of the posterior itself."""
    return lambda p, n, seed: sampled(p.posterior.model(SDE), p, n, seed, solver, steps)


def guided(method: str, solver: sd.Solver | None = None, steps: int = FLOW, **options: Any) -> Draw:
    """Samples of a guided model."""

    def draw(p: Problem, n: int, seed: int) -> Tensor:
        more = options | ({"deviation": p.deviation} if method in ("pigdm", "replacement") else {})
        model = sd.LinearInverse(p.data.model(SDE), p.A, p.y, p.noise_std, method, **more)
        return sampled(model, p, n, seed, solver, steps)

    return draw


def replaced(p: Problem, n: int, seed: int) -> Tensor:
    """Samples by state replacement, which takes y as it is."""
    solver = sd.PredictorCorrector(sd.DDPM(), sd.Replacement(p.A, p.y))
    return sampled(p.data.model(SDE), p, n, seed, solver, CHAIN)


FLOOR, DDPM = "truth (floor)", "DDPM"

METHODS: dict[str, Draw] = {
    FLOOR: lambda p, n, seed: p.posterior.sample(n, seed=1000 + seed),
    "exact score": exact(),
    "mmps": guided("mmps"),
    "mmps, 10 iterations": guided("mmps", iterations=10),
    "mmps, 3 iterations": guided("mmps", iterations=3),
    "pigdm": guided("pigdm"),
    "dps": guided("dps"),
    "dps, scale 0.1": guided("dps", scale=0.1),
    "replacement (denoised data)": guided("replacement"),
    "exact score, DDPM": exact(sd.DDPM(), CHAIN),
    "mmps, DDPM": guided("mmps", sd.DDPM(), CHAIN),
    "pigdm, DDPM": guided("pigdm", sd.DDPM(), CHAIN),
    "dps-normalised, DDPM": guided("dps-normalised", sd.DDPM(), CHAIN, step=0.3, chain=CHAIN),
    "Replacement (state), DDPM": replaced,
}


def numbers(p: Problem, x: Tensor, seed: int) -> dict[str, float]:
    """The metrics of a set of samples."""
    mean, cov = p.posterior.mean, p.posterior.cov
    out = {
        "mean": ((x.mean(0) - mean).square().mean() / cov.diagonal().mean()).sqrt().item(),
        "cov": ((x.T.cov() - cov).norm() / cov.norm()).item(),
    }
    if p.name.startswith("mixture"):
        out["energy"] = sd.metrics.energy_distance(x, p.posterior.sample(len(x), seed=5000 + seed))
    return out


def run(p: Problem, draw: Draw, n: int, runs: int) -> tuple[list[dict[str, float]], float]:
    """Metrics of every run (none if one diverges), and seconds of processor time a run."""
    out, start = [], time.process_time()
    for seed in range(runs):
        try:
            x = draw(p, n, seed)
        except sd.DivergenceError:
            return [], math.nan
        out.append(numbers(p, x, seed))
    return out, (time.process_time() - start) / runs


Runs = dict[str, list[dict[str, float]]]
"""Method to the metrics of its runs."""


def average(runs: list[dict[str, float]], metric: str) -> tuple[float, float]:
    """Mean and standard error over runs; infinite if they diverged."""
    part = torch.tensor([result[metric] for result in runs], dtype=F64)
    if not len(part) or part.max() > 1e3:
        return math.inf, math.inf
    return part.mean().item(), (part.std() / math.sqrt(len(part))).item()


def shown(results: Runs, method: str, metric: str) -> str:
    """The error of a method, with its standard error for the floor, bold where it is at it."""
    value, error = average(results[method], metric)
    if math.isinf(value):
        return "diverges"
    digits = 3 if value < 10 else 0
    if method == FLOOR:
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    best, around = average(results[f"exact score, {DDPM}" if DDPM in method else FLOOR], metric)
    return f"**{value:.{digits}f}**" if value <= best + 2 * math.hypot(error, around) else f"{value:.{digits}f}"


def overview(everything: dict[str, Runs], metric: str) -> str:
    """Methods against problems."""
    lines = [[method, *(shown(results, method, metric) for results in everything.values())] for method in METHODS]
    return table(["method", *everything], lines)


def azula_differences() -> str:
    """How far azula's guided quantities are from ours, where it is installed."""
    try:
        from azula.denoise import Denoiser, DiracPosterior
        from azula.guidance.dps import DPSSampler
        from azula.guidance.mmps import MMPSDenoiser
        from azula.guidance.pgdm import PGDMSampler
        from azula.linalg.covariance import IsotropicCovariance
        from azula.noise import VPSchedule
    except ImportError:
        return "azula is not installed; not compared.\n"
    schedule = VPSchedule()

    class Process(sd.LinearSDE):
        t_min, t_max = 1e-3, 1.0

        def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return schedule(t)

    p, sde = gaussian_problems()[2], Process()
    model = p.data.model(sde)

    class Exact(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            return DiracPosterior(model.denoised(t, x_t))

    inner, inverse = Exact(), torch.linalg.pinv(p.A.dense())
    worst = dict.fromkeys(("MMPS, 8 iterations", "MMPS, 32 iterations", "DPS", "PGDM"), 0.0)

    def note(name: str, theirs: Tensor, ours: Tensor) -> None:
        worst[name] = max(worst[name], ((theirs - ours).abs().max() / ours.abs().max()).item())

    def moved(sampler: Callable[[float], Any], x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """What the gradient of a sampler adds to its step: two steps with the same noise, with and without it."""
        ends = []
        for strength in (1.0, 0.0):
            torch.manual_seed(0)
            ends.append(sampler(strength).step(x, t, s))
        return ends[0] - ends[1]

    def compare(part: float) -> None:
        t, s = torch.tensor(part, dtype=F64), torch.tensor(part - 0.01, dtype=F64)
        (alpha, sigma), alpha_s, diffusion = schedule(t), schedule(s)[0], sde.rates(t)[1]
        for x in drawn(3, 32, seed=7).split(1):  # one row at a time, as the norm of DPS is over the batch there
            data = model.denoised(t, x)
            for count in (8, 32):
                mmps = MMPSDenoiser(inner, p.y, p.A, IsotropicCovariance(p.noise_std**2), "cg", count)
                ours = sd.LinearInverse(model, p.A, p.y, p.noise_std, iterations=count).denoised(t, x)
                note(f"MMPS, {count} iterations", mmps(x, t).mean, ours)
            # a step of azula is zeta grad |y - A xhat|, of ours step grad |y - A xhat|^2 / |y - A xhat|, twice that
            pull = sd.LinearInverse(model, p.A, p.y, 0.0, "dps-normalised", step=0.5).score(t, x) - model.score(t, x)
            dps = moved(lambda zeta: DPSSampler(inner, p.y, p.A, zeta=zeta), x, t, s)
            note("DPS", dps, diffusion**2 * sde.t_max / 1000 * pull)
            # without noise ours is gamma J^T A^+ r / rho^2, theirs alpha_s alpha_t J^T A^+ r
            shift = sd.LinearInverse(model, p.A, p.y, 0.0, "pigdm").denoised(t, x) - data
            given = {1.0: p.y, 0.0: p.A(data)}
            pgdm = moved(lambda on, given=given: PGDMSampler(inner, given[on], p.A, lambda z: z @ inverse.T), x, t, s)
            note("PGDM", pgdm, alpha_s * alpha**2 / (alpha**2 + sigma**2) * shift)

    for part in (0.2, 0.5, 0.8):
        compare(part)
    return "Largest relative difference from azula on the blur, s = 0.05, at three times: " + (
        "; ".join(f"{name} {value:.1e}" for name, value in worst.items())
        + ". (MMPS: guided denoised data, both by conjugate gradients. DPS: the gradient step of its sampler against "
        "that of `dps-normalised`. PGDM: the gradient step of its sampler "
        "against that of `pigdm` without noise, which is scaled otherwise.)\n"
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small runs; writes files that start with quick_")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    n, runs = (200, 2) if args.quick else (500, 4)
    with torch.enable_grad():
        compared = azula_differences()
    print(compared)
    rows: list[dict[str, Any]] = []
    spent = dict.fromkeys(METHODS, 0.0)
    kinds: dict[str, dict[str, Runs]] = {}
    problems = {"Gaussian": gaussian_problems(), "Mixture": mixture_problems()}
    for kind, these in problems.items():
        kinds[kind] = {}
        for p in these:
            results = kinds[kind][p.name] = {}
            for name, draw in METHODS.items():
                results[name], seconds = run(p, draw, n, runs)
                spent[name] += seconds / sum(map(len, problems.values()))
                rows += [
                    {"problem": p.name, "method": name, "run": i, "seconds": seconds}
                    | {m: result.get(m, math.nan) for m in ("mean", "cov", "energy")}
                    for i, result in enumerate(results[name])
                ]
            print(p.name, flush=True)
    text = (
        "# Linear inverse problems\n\n"
        "Errors of posterior samples against the truth, exact scores; see the docstring of `benchmarks/inverse.py`. "
        f"VP(0.1, 20), {FLOW} steps of `Exponential()`, the flow, or {CHAIN} of `DDPM()`; means over {runs} runs of "
        f"{n} samples. The first row is the sampling error of the truth itself; **bold** cannot be told "
        "from that floor (for rows with DDPM, from that of the exact score by DDPM).\n\n"
        f"{versions()}\n\n{compared}\n"
    )
    titles = {
        "mean": "posterior mean, RMS error in units of the posterior standard deviation",
        "cov": "posterior covariance, relative error in Frobenius norm",
        "energy": "energy distance to true samples",
    }
    for kind, everything in kinds.items():
        for metric, title in titles.items():
            if metric != "energy" or kind == "Mixture":
                text += f"## {kind} data: {title}\n\n{overview(everything, metric)}\n"
    costs = [[name, "-" if math.isnan(seconds) else f"{seconds:.2f}"] for name, seconds in spent.items()]
    text += "## Seconds of processor time a run, mean over problems\n\n" + table(["method", "seconds"], costs) + "\n"
    p, lines = problems["Gaussian"][2], []
    for steps in (5, 10, 20, 40):
        draws = [
            draw
            for solver in (None, sd.DDPM())
            for draw in (exact(solver, steps), guided("mmps", solver, steps), guided("pigdm", solver, steps))
        ]
        errors = [average(run(p, draw, n, runs)[0], "cov")[0] for draw in draws]
        lines.append([str(steps), *(f"{error:.3f}" for error in errors)])
    floor = shown(kinds["Gaussian"][p.name], FLOOR, "cov")
    text += f"## Steps: error of the covariance ({p.name}; floor {floor})\n\n" + table(
        ["steps", "exact score", "mmps", "pigdm", "exact score, DDPM", "mmps, DDPM", "pigdm, DDPM"], lines
    )
    prefix = "quick_" if args.quick else ""
    write_csv(f"{prefix}inverse.csv", rows)
    print(write_text(f"{prefix}inverse.md", text).read_text())


if __name__ == "__main__":
    main()
