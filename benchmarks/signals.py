r"""Smooth signals of 50 entries: what a small network learns of them, and what a Gaussian model knows.

The data is `sd.signals.Sinusoids()`, whose covariance and fourth moments are known. Each run has a seed of its own for
training, sampling, and the signals that it is compared with; numbers are means over runs and their standard errors.

- cov: relative Frobenius error of the covariance;
- axes: RMS error of the logarithm of the variance along the 8 leading axes of the true covariance;
- rough: RMS of what lies outside of the 12 leading axes, which true signals hardly have;
- spectrum: relative L1 error of the mean power spectrum;
- kurtosis: excess kurtosis of a value, over all entries; 0 for a Gaussian;
- power sd: standard deviation of a signal's mean square, over signals;
- energy: energy distance to as many true signals.

Writes `signals.csv` and `signals.md`.

    python -m benchmarks.signals [--quick]
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

import sdediff as sd
from benchmarks.common import table, versions, write_csv, write_text
from sdediff.priors import kl_to_prior

FAMILY = sd.signals.Sinusoids()
SIZE = FAMILY.points
BETAS = 0.1 * torch.sigmoid(torch.linspace(-6, 6, 100, dtype=torch.float64))
CHAIN = sd.DiscreteVP(BETAS)
CONTINUOUS = sd.SigmoidVP()
GAUSSIAN = sd.exact.Gaussian(torch.zeros(SIZE), FAMILY.cov + 1e-6 * torch.eye(SIZE, dtype=torch.float64))
"""The Gaussian model: the optimal linear denoiser. (Exactly, the covariance is singular to rounding.)"""

METRICS = ("cov", "axes", "rough", "spectrum", "kurtosis", "power sd", "energy")
EIGENVALUES, AXES = (part.flip(-1) for part in torch.linalg.eigh(FAMILY.cov))


def power_spectrum(cov: Tensor) -> Tensor:
    """`E |X_k|^2` of the discrete Fourier transform of signals with mean zero and this covariance."""
    fourier = torch.fft.rfft(torch.eye(len(cov), dtype=torch.float64), dim=0)
    return (fourier @ cov.to(fourier) @ fourier.mH).diagonal().real


def train(sde: sd.LinearSDE, seed: int, steps: int) -> sd.TrainedModel:
    """A residual perceptron that predicts the data; the chain's has integer time steps."""
    torch.manual_seed(seed)
    network = sd.networks.MLP((SIZE,), width=128, depth=4)
    clock = sde.timestep if isinstance(sde, sd.DiscreteVP) else None
    model = sd.ScoreModel(network, sde, prediction="data", time=clock)
    data = FAMILY.sample(50_000, seed=1000 + seed)
    return sd.fit(model, data, steps=steps, weighting="min_snr", seed=seed, progress=False)


def numbers(x: Tensor, true: Tensor) -> dict[str, float]:
    """The metrics of a set of signals."""
    x = x.double()
    cov = x.T @ x / len(x)
    along = (x @ AXES).square().mean(0)
    spectrum, exact = power_spectrum(cov), power_spectrum(FAMILY.cov)
    return {
        "cov": sd.covariance_error(x, FAMILY.cov)[0],
        "axes": (along / EIGENVALUES)[:8].log().square().mean().sqrt().item(),
        "rough": (along[12:].sum() / SIZE).sqrt().item(),
        "spectrum": ((spectrum - exact).abs().sum() / exact.sum()).item(),
        "kurtosis": (x.pow(4).mean(0) / x.square().mean(0) ** 2 - 3).mean().item(),
        "power sd": x.square().mean(1).std().item(),
        "energy": sd.metrics.energy_distance(x, true),
    }


def exact_numbers(squares: Tensor) -> tuple[float, float]:
    """Kurtosis and power sd of a law with the family's covariance and fourth moments `E x(u)^2 x(v)^2`."""
    power = FAMILY.cov.diagonal().mean()
    return (squares[0, 0] / FAMILY.cov[0, 0] ** 2).item() - 3, (squares.mean() - power**2).sqrt().item()


def samplers(models: dict[str, sd.TrainedModel], n: int, seed: int) -> dict[str, Callable[[], Tensor]]:
    """From the name of a row to the signals that it is about."""
    matched = sd.matched_prior(CHAIN, FAMILY.sample(50_000, seed=1000 + seed)).sample(n, seed=seed).float()
    noise = torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed))
    chain, continuous, shape = models["chain"], models["continuous"], (n, SIZE)

    def ddpm(model: sd.ScoreModel, **start: Tensor) -> Tensor:
        return sd.sample(model, shape, solver=sd.DDPM(), times=CHAIN.times, seed=seed, **start).x

    return {
        "true signals": lambda: FAMILY.sample(n, seed=2000 + seed),
        "Gaussian: noise recoloured, one step": lambda: sd.recolor(noise, FAMILY.cov, mean=0, x_cov=1.0),
        "Gaussian: DDPM, 100 steps": lambda: ddpm(GAUSSIAN.model(CHAIN)),
        "Gaussian: DDPM from p_T": lambda: ddpm(GAUSSIAN.model(CHAIN), x_init=matched),
        "**network: DDPM, 100 steps**": lambda: ddpm(chain),
        "network: DDPM from the matched prior": lambda: ddpm(chain, x_init=matched),
        "network: default solver from the matched prior": lambda: sd.sample(chain, shape, x_init=matched, seed=seed).x,
        "network on SigmoidVP: default solver": lambda: sd.sample(continuous, shape, seed=seed).x,
        "network on SigmoidVP: DDPM, 100 steps": lambda: (
            sd.sample(continuous, shape, solver=sd.DDPM(), steps=100, seed=seed).x
        ),
    }


def prior_rows() -> list[list[str]]:
    """What starting from N(0, sigma_T^2 I) misses, in closed form for the Gaussian model."""
    rows, data = [], FAMILY.sample(20_000, seed=0, dtype=torch.float64)
    processes = {"chain, beta_max 0.1": CHAIN, "SigmoidVP(10)": sd.SigmoidVP(10.0), "SigmoidVP()": CONTINUOUS}
    for name, sde in processes.items():
        alpha, sigma = sde.scales_at(torch.tensor(sde.t_max, dtype=torch.float64))
        ratio = GAUSSIAN.marginal(sde, sde.t_max).variances / sigma**2
        kl = (ratio - 1 - ratio.log()).sum() / 2
        known = kl_to_prior(sde.prior((SIZE,)), alpha * data, sigma.item()).mean()
        matched = kl_to_prior(sd.matched_prior(sde, data), alpha * data, sigma.item()).mean()
        short = GAUSSIAN.variances * (1 / ratio - 1)
        off = short.norm() / GAUSSIAN.variances.norm()
        values = [alpha**2, kl, known, matched, off, 1 - 1 / ratio.max()]
        rows.append([name, *(f"{value.item():.2g}" for value in values)])
    return rows


def shown(values: list[float]) -> str:
    """Mean and standard error over runs."""
    runs = torch.tensor(values, dtype=torch.float64)
    return f"{runs.mean():.4f} ± {runs.std() / math.sqrt(len(runs)):.4f}"


def margin(name: str, exact: float, better: list[float], worse: list[float]) -> str:
    """By how much the first comes closer to the exact value than the second, run by run."""
    gain = torch.tensor([abs(w - exact) - abs(b - exact) for b, w in zip(better, worse, strict=True)])
    error = gain.std().item() / math.sqrt(len(gain))
    return f"- {name}: closer by {gain.mean():.4f} ± {error:.4f}, {gain.mean() / error:.0f} standard errors\n"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short runs; writes files that start with quick_")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, steps, n = (2, 300, 1000) if args.quick else (3, 2000, 4000)
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds = []
    for seed in range(runs):
        start = time.process_time()
        models = {name: train(sde, seed, steps) for name, sde in (("chain", CHAIN), ("continuous", CONTINUOUS))}
        seconds.append((time.process_time() - start) / 2)
        true = FAMILY.sample(n, seed=3000 + seed)
        for name, draw in samplers(models, n, seed).items():
            for metric, value in numbers(draw(), true).items():
                results[name][metric].append(value)
        print(f"run {seed + 1} of {runs}: {seconds[-1]:.0f} s of processor time a training", flush=True)
    exact = exact_numbers(FAMILY.squares)
    gaussian = exact_numbers(FAMILY.cov.diagonal()[:, None] * FAMILY.cov.diagonal() + 2 * FAMILY.cov**2)
    network, linear = results["**network: DDPM, 100 steps**"], results["Gaussian: DDPM from p_T"]
    text = (
        "# Smooth signals\n\n"
        f"{FAMILY}, {runs} runs of {n} signals, mean ± standard error over runs. Exact kurtosis {exact[0]:.4f}, power "
        f"sd {exact[1]:.4f}; of a Gaussian with the same covariance 0 and {gaussian[1]:.4f}. The network is a "
        f"residual perceptron (width 128, depth 4) that predicts the data, {steps} steps of 128 signals, weighting "
        f"min_snr, {sum(seconds) / runs:.0f} s of processor time. The chain has 100 steps, `beta = 0.1 sigmoid(-6 .. "
        f"6)`.\n\n{versions()}\n\n"
        + table(["signals", *METRICS], [[name, *(shown(row[m]) for m in METRICS)] for name, row in results.items()])
        + "\nThe network (DDPM, 100 steps) against the Gaussian model from its exact p_T:\n\n"
        + margin("kurtosis", exact[0], network["kurtosis"], linear["kurtosis"])
        + margin("power sd", exact[1], network["power sd"], linear["power sd"])
        + margin("energy distance", 0.0, network["energy"], linear["energy"])
        + "\n## The prior\n\nKL of p_T from N(0, sigma_T^2 I) for Gaussian data of this covariance; the mean over "
        "signals of the KL of p(x_T | x_0), which bounds it, with this prior and with the matched one (what is left is "
        "what x_T knows of x_0); and what the flow of the Gaussian model makes of the prior: the relative Frobenius "
        "error of the covariance, and the part of the leading variance that is missing.\n\n"
        + table(
            ["process", "alpha_T^2", "KL, nats", "mean KL of rows", "with matched prior", "cov", "leading variance"],
            prior_rows(),
        )
    )
    prefix = "quick_" if args.quick else ""
    write_csv(
        f"{prefix}signals.csv",
        [
            {"signals": name.strip("*"), "run": run, **{metric: row[metric][run] for metric in METRICS}}
            for name, row in results.items()
            for run in range(runs)
        ],
    )
    print(write_text(f"{prefix}signals.md", text).read_text())


if __name__ == "__main__":
    main()
