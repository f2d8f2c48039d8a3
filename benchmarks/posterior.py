"""How far samples of a model times another density are from the exact product: gradients alone, and particles.

Data are Gaussian or a mixture of two in the plane, r is a Gaussian likelihood, so that the posterior and the evidence
are known. All methods take 100 steps of DDPM with the exact score of VP(0.1, 20):

- gradient: samples of `Product(model, log_r, at=...)`, w = 1;
- particles: `smc` with N particles, by default with psi = r(E[x_0 | x_t]), or with the twist
  N(y; E[x_0 | x_t], Cov[x_0 | x_t] + s^2 I), whose covariance is sigma^2 / alpha times the Jacobian of the denoiser.

Every number is the root mean square over runs of the distance to the exact value, with its standard error; the slope is
that of the standard deviation over runs against N, which has none of the bias of steps. Writes `posterior.csv`, `.md`.

    python -m benchmarks.posterior [--quick]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import sdediff as sd
from benchmarks.common import table, versions, write_csv, write_text

STEPS, SAMPLES = 100, 4096
COUNTS = (16, 64, 256, 1024, 4096)
SDE = sd.VP()
QUANTITIES = ("mean", "covariance", "right side", "log evidence")


@dataclass(frozen=True)
class Problem:
    """Data of round Gaussians, and a measurement y of a point with noise of standard deviation s."""

    name: str
    weights: Tensor
    means: Tensor
    variances: Tensor
    y: Tensor
    s: float

    @cached_property
    def model(self) -> sd.ScoreModel:
        return sd.exact.GaussianMixture(self.weights, self.means, self.variances).model(SDE)

    def log_r(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(x, self.s).log_prob(self.y.to(x)).sum(1)

    def tweedie(self, t: Tensor, x: Tensor) -> Tensor:
        """`log N(y; xhat, sigma^2 / alpha dxhat/dx + s^2 I)`."""
        with torch.enable_grad():
            at = x if x.requires_grad else x.clone().requires_grad_()
            xhat = self.model.denoised(t, at)
            rows = [torch.autograd.grad(xhat[:, j].sum(), at, create_graph=True)[0] for j in range(2)]
        alpha, sigma = SDE.scales_at(t)
        cov = (sigma**2 / alpha)[:, None, None] * torch.stack(rows, dim=1)
        cov = (cov + cov.mT) / 2 + self.s**2 * torch.eye(2, dtype=x.dtype)
        return torch.distributions.MultivariateNormal(xhat, cov).log_prob(self.y)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, means and variances of the product, and the log-evidence."""
        total = self.variances + self.s**2
        log_w = self.weights.log() + torch.distributions.Normal(self.means, total[:, None].sqrt()).log_prob(self.y).sum(
            1
        )
        gain = (self.variances / total)[:, None]
        return log_w.softmax(0), self.means + gain * (self.y - self.means), self.s**2 * gain[:, 0], log_w.logsumexp(0)

    def right(self, x: Tensor) -> Tensor:
        """Whether points lie right of the middle between the means of the posterior's parts: the weight of a mode."""
        means = self.posterior()[1]
        return (x[:, 0] > means[:, 0].mean()).to(x)

    def exact(self) -> list[Tensor]:
        """Mean, covariance, share on the right and log-evidence."""
        weights, means, variances, log_z = self.posterior()
        mixture = sd.exact.GaussianMixture(weights, means, variances)
        middle = means[:, 0].mean()
        share = (weights * torch.special.ndtr((means[:, 0] - middle) / variances.sqrt())).sum()
        return [mixture.mean, mixture.cov, share, log_z]


def problems() -> list[Problem]:
    def of(name: str, weights: Any, means: Any, variances: Any, y: Any, s: float) -> Problem:
        return Problem(name, *(torch.tensor(v, dtype=torch.float64) for v in (weights, means, variances, y)), s)

    modes = [0.3, 0.7], [[-1.5, 0.0], [1.5, 0.5]], [0.04, 0.36]
    return [
        of("gaussian", [1.0], [[0.5, -0.3]], [0.5], [-0.4, 0.6], 0.5),
        of("two modes, wide r", *modes, [-0.3, 0.2], 0.8),
        of("two modes, narrow r", *modes, [-0.3, 0.2], 0.4),
    ]


def guided(problem: Problem, at: str, seed: int) -> list[Tensor | None]:
    """What plain samples say."""
    model = sd.Product(problem.model, problem.log_r, at=at)
    x = sd.sample(model, (SAMPLES, 2), solver=sd.DDPM(), steps=STEPS, seed=seed).x
    return [x.mean(0), x.mT.cov(), problem.right(x).mean(), None]


def weighted(problem: Problem, count: int, seed: int, twist: Callable[[Tensor, Tensor], Tensor] | None) -> list[Tensor]:
    """What particles say."""
    result = sd.smc(problem.model, problem.log_r, (count, 2), steps=STEPS, twist=twist, seed=seed)
    share = result.expectation(problem.right).value
    return [result.mean(), result.cov(), share, torch.tensor(result.log_evidence, dtype=torch.float64)]


def errors(runs: list[list[Any]], exact: list[Tensor]) -> dict[str, float]:
    """Root mean squares of the distances with their standard errors, and the deviation over runs."""
    row: dict[str, float] = {}
    for k, name in enumerate(QUANTITIES):
        if runs[0][k] is None:
            row |= dict.fromkeys((name, f"{name} stderr", f"{name} spread"), math.nan)
            continue
        found = torch.stack([run[k] for run in runs]).reshape(len(runs), -1)
        squares = (found - exact[k].reshape(1, -1)).square().sum(1)
        rms = squares.mean().sqrt()
        row[name] = rms.item()
        row[f"{name} stderr"] = (squares.std() / len(runs) ** 0.5 / (2 * rms)).item()
        row[f"{name} spread"] = found.var(0).sum().sqrt().item()
    return row


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Least-squares slope of the logarithms of spread against N."""
    x = torch.tensor([row["N"] for row in rows], dtype=torch.float64).log()
    y = torch.tensor([row[f"{name} spread"] for row in rows], dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 runs; writes files that start with quick_")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = 4 if args.quick else 10
    rows: list[dict[str, Any]] = []
    text = [
        f"# Sampling a product\n\n{STEPS} steps of DDPM, exact scores, float64, {runs} runs. Root mean square distance "
        "to the exact value, with its standard error; right side is the share of the posterior that lies right of the "
        f"middle between its modes (of its mean, for a Gaussian). Gradient forms: {SAMPLES} samples a run. Particles: "
        "N of them; the slope is that of the deviation over runs against N, -1/2 in theory; distances also hold what "
        f"{STEPS} steps are off by.\n\n{versions()}\n"
    ]
    for problem in problems():
        exact, lines = problem.exact(), []
        methods: dict[str, list[tuple[int, Callable[[int], list[Any]]]]] = {
            f"gradient, {at}": [(SAMPLES, lambda seed, p=problem, a=at: guided(p, a, seed))]
            for at in ("noisy", "denoised")
        }
        for name, twist in (("particles", None), ("particles, Tweedie twist", problem.tweedie)):
            methods[name] = [
                (n, lambda seed, p=problem, n=n, f=twist: weighted(p, n, seed, f))
                for n in (COUNTS if twist is None else COUNTS[:4])
            ]
        for name, cases in methods.items():
            own = [
                {"problem": problem.name, "method": name, "N": count, "runs": runs}
                | errors([run(1000 * count + seed) for seed in range(runs)], exact)
                for count, run in cases
            ]
            rows += own
            lines += [[name, str(row["N"]), *(cell(row, quantity) for quantity in QUANTITIES)] for row in own]
            if len(own) > 1:
                lines.append(["slope", "", *(f"{slope(own, quantity):.2f}" for quantity in QUANTITIES)])
        text.append(f"\n## {problem.name}\n\n" + table(["method", "N", *QUANTITIES], lines))
        print(text[-1], flush=True)
    prefix = "quick_" if args.quick else ""
    write_csv(f"{prefix}posterior.csv", rows)
    write_text(f"{prefix}posterior.md", "".join(text))


def cell(row: dict[str, Any], name: str) -> str:
    """A value and its standard error."""
    return "-" if math.isnan(row[name]) else f"{row[name]:.4f} ± {row[f'{name} stderr']:.4f}"


if __name__ == "__main__":
    main()
