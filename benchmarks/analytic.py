"""Variances of the reverse kernel: negative ELBO and sample error of DDPM with fixed, analytic and learned variances.

Exact scores of a planar mixture with thin and wide axes, of deviation .5 (as images in [-1, 1]), half of it, and twice
of it, where the total variance is about 1, for which "beta" is made. The networks of the learned
variances are trained here, a few seconds each. Writes `results/analytic.md`.

    python -m benchmarks.analytic [--quick]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import sdediff as sd
from benchmarks.common import table, versions, write_text
from sdediff.subsequences import StepCosts
from sdediff.variance import EntryVariance, ReverseSteps, ReverseVariance, variance_of

SDE = sd.VP()
DATA, HELD_OUT = 8000, 4000
GRIDS = {"even in t": sd.grids.uniform, "even in log SNR": sd.grids.log_snr}


def mixture(scale: float) -> sd.exact.GaussianMixture:
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.25]], dtype=torch.float64)
    variances = torch.tensor([[0.005, 0.075], [0.075, 0.0025]], dtype=torch.float64)
    return sd.exact.GaussianMixture([0.5, 0.5], scale * means, scale**2 * variances)


def exact_network(model: sd.ScoreModel) -> Callable[[Tensor, Tensor], Tensor]:
    """`Var[eps | x] = alpha d xhat / dx`, entry by entry."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            xhat = model.denoised(t, at)
            slopes = [torch.autograd.grad(xhat[:, j].sum(), at, retain_graph=True)[0][:, j] for j in range(x.shape[1])]
        return SDE.alpha(t)[:, None].to(x) * torch.stack(slopes, 1)

    return network


def trained(model: sd.ScoreModel, loss: Callable[..., Tensor], data: Tensor, steps: int) -> sd.networks.MLP:
    torch.manual_seed(0)
    network = sd.networks.MLP((2,), width=64, depth=2)
    sd.train(
        network, lambda batch, _: loss(network, model, batch), data.float(), steps=steps, batch_size=256, lr=3e-3,
        ema=0.99, seed=0, progress=False,
    )  # fmt: skip
    return network


def divergences(model: sd.ScoreModel, x: Tensor, times: Tensor, variance: ReverseVariance, seed: int = 0) -> Tensor:
    """Sum over the steps of `KL(q(x_s | x_t, x_0) || p(x_s | x_t))`, one noise for each, `(batch,)`, nats."""
    steps = ReverseSteps.of(model.point(times))
    at, stream, total = steps.at, sd.RowNoise(seed).open(), torch.zeros(len(x), dtype=torch.float64)
    if isinstance(variance, EntryVariance):
        watched, spread = variance.along(model, steps)
    else:
        fixed = variance.table(steps)
        watched, spread = model, lambda i, x: fixed[i].expand(x.shape)
    for i in range(len(times) - 1):
        xt = at.alpha[i] * x + at.sigma[i] * stream.normal(x)
        off = steps.gain[i] * (x - watched.denoised(times[i], xt))
        rho = steps.nu[i] ** 2 / spread(i, xt)
        total += (rho * (1 + (off / steps.nu[i]) ** 2) - 1 - rho.log()).sum(1) / 2
    return total


def ends(model: sd.ScoreModel, x: Tensor, known: sd.AnalyticVariance, t_min: Tensor) -> Tensor:
    """Prior and decoder terms, the same for all variances: `N(x_0; xhat, sbar^2)` at t_min."""
    alpha, sigma = SDE.alpha(SDE.t_max), SDE.sigma(SDE.t_max)
    prior = 0.5 * (sigma**2 + alpha**2 * x**2 - 1).sum(1) - 2 * math.log(sigma)
    spread = known.data_variance(model.point(t_min[None]))[0]
    xt = SDE.perturb(t_min, x, sd.RowNoise(7).open().normal(x))
    error = (x - model.denoised(t_min, xt)).square().sum(1)
    return prior + error / spread / 2 + (2 * math.pi * spread).log()


def mean_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def pm(pair: tuple[float, float], digits: int = 4) -> str:
    mean, error = pair
    return f"{mean:.4g} ± {error:.1g}" if abs(mean) > 100 else f"{mean:.{digits}f} ± {error:.{digits}f}"


def sample_errors(model: sd.ScoreModel, target: sd.exact.GaussianMixture, times: Tensor, variance: ReverseVariance,
                  seeds: int, rows: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    sliced, energy = [], []
    for seed in range(seeds):
        found = sd.sample(model, (rows, 2), solver=sd.DDPM(variance), times=times, seed=seed).x
        exact = target.sample(rows, 1000 + seed)
        sliced.append(sd.metrics.sliced_wasserstein(found, exact, directions=64))
        energy.append(sd.metrics.energy_distance(found, exact))
    return torch.tensor(sliced), torch.tensor(energy)


def variances(scale: float, quick: bool) -> str:
    target = mixture(scale)
    model, data, x = target.model(SDE), target.sample(DATA, 1), target.sample(HELD_OUT, 2)
    reach = (-1.5 * scale, 1.5 * scale)
    seeds, rows, training = (3, 500, 300) if quick else (6, 1500, 1500)
    known = sd.AnalyticVariance.estimate(model, data, seed=0)
    chosen = {
        "posterior": variance_of("posterior", ""), "beta": variance_of("beta", ""), "analytic": known,
        "analytic, score form": sd.AnalyticVariance.estimate(model, data, form="score", seed=0),
        "NPR, trained": sd.NoiseResidual(trained(model, sd.losses.noise_residual, data, training), reach),
        "SN, trained": sd.SquaredNoise(trained(model, sd.losses.squared_noise, data, training), reach),
        "diagonal, exact": sd.NoiseResidual(exact_network(model)),
    }  # fmt: skip
    text = f"Estimate: `{known}`\n\n"
    entropy = mean_error(-target.log_prob(x))
    for grid, make in GRIDS.items():
        lines = []
        for steps in (10, 25) if quick else (5, 10, 25, 50):
            times = make(SDE, steps)
            base = ends(model, x, known, times[-1])
            found = {}
            for name, variance in chosen.items():
                with torch.no_grad():
                    bound = base + divergences(model, x, times, variance)
                found[name] = (bound, *sample_errors(model, target, times, variance, seeds, rows))
            bound, sliced, energy = found["analytic"]
            for name, (other, wide, far) in found.items():
                # how much better analytic is, in standard errors
                gains = [(a - b) for a, b in ((other, bound), (wide, sliced), (far, energy))]
                scores = [m / e if e else 0.0 for m, e in map(mean_error, gains)]
                lines.append([
                    str(steps), name, pm(mean_error(other)), pm(mean_error(wide)), pm(mean_error(far), 5),
                    " / ".join("-" if name == "analytic" else f"{score:+.1f}" for score in scores),
                ])  # fmt: skip
        head = ["steps", "variance", "-ELBO (nats)", "sliced W2", "energy distance", "analytic better by (SE)"]
        text += f"\n### {grid}; entropy of the data {pm(entropy)} nats\n\n" + table(head, lines)
    for name in ("NPR, trained", "SN, trained"):
        text += f"\n{name}: {100 * chosen[name].clipped.fraction:.0f} % of the entries were held at their bounds.\n"
    return text


def paths(scale: float, quick: bool) -> str:
    target, chain = mixture(scale), SDE.discretize(200 if quick else 1000)
    model, data, x = target.model(chain), target.sample(2000, 1), target.sample(HELD_OUT, 2)
    known = sd.AnalyticVariance.estimate(model, data, sd.subsequences.linear(chain.times, 100), seed=0)
    costs = StepCosts.of(chain, chain.times, known)
    lines = []
    for steps in (5, 10, 25, 50):
        rules = {
            "linear": sd.subsequences.linear(chain.times, steps),
            "quadratic": sd.subsequences.quadratic(chain.times, steps),
            "optimal": costs.best(steps),
        }
        for name, times in rules.items():
            bound = divergences(model, x, times, known)
            sliced, energy = sample_errors(model, target, times, known, 3 if quick else 6, 500 if quick else 1500)
            decoder = 2 * costs.decoder[-1].item()
            lines.append([
                str(steps), name, f"{2 * costs.total(times) - decoder:.4f}", pm(mean_error(bound)),
                pm(mean_error(sliced)), pm(mean_error(energy), 5),
            ])  # fmt: skip
    head = ["steps", "sub-sequence", "table", "sum of KL (nats)", "sliced W2", "energy distance"]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples, seeds and training steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    start = time.perf_counter()
    text = "# Variances of the reverse kernel\n\n"
    text += (
        "DDPM with exact means. -ELBO: prior, sum of the steps' KL divergences and the decoder N(x_0; xhat, sbar^2) at "
        f"t_min, which is the same for all; {HELD_OUT} held-out points. Sample errors against as many exact samples "
        f"({3 if quick else 6} seeds). ± is one standard error; the last column says by how many standard errors of "
        "the paired difference the analytic variance is better, in the order of the three numbers.\n"
    )
    for scale in (0.5, 1.0, 2.0):
        text += f"\n## Deviation {scale / 2:g}\n\n" + variances(scale, quick)
    text += "\n## Sub-sequences of a chain, analytic variance, deviation .5\n\n" + paths(1.0, quick)
    text += f"\n{versions().split(', diffusers')[0]}; {time.perf_counter() - start:.0f} s on one core.\n"
    print(write_text("analytic_quick.md" if quick else "analytic.md", text).read_text())


if __name__ == "__main__":
    main()
