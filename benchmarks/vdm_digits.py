"""Variational diffusion models on 8 x 8 digits with 17 codes: bits per dimension of test digits by the bound.

Three runs of the same U-Net, each trained by the bound with a softmax decoder, for as many steps of as many digits:

- "learned": `LearnedVP`, ends learned by the bound, the curve between them by the variance of its estimate;
- "straight": gamma linear in t between fixed ends, where "learned" starts;
- "straight, no features": the same without Fourier features of the input.

The test digits' bound is `elbo(decoder=Softmax(17))`: reconstruction, prior and diffusion in bits per dimension, with
standard errors over the digits. Variances are those of the one-point estimate of the diffusion term on training
digits, times independent and uniform, before training and after it; and, with the network and the ends as "learned"
has them at last, under the straight curve. A histogram for each pixel is the simplest model of the same codes.

Writes `vdm_digits.csv` and `.md`.

    python -m benchmarks.vdm_digits [--steps 800] [--only learned ...]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import sdediff as sd
from benchmarks.common import table, versions, write_csv, write_text
from sdediff.decoders import Softmax
from sdediff.demo import LEVELS, digits, histogram_bits
from sdediff.networks import FourierFeatures, UNet

ENDS = (-8.0, 5.0)
"""-13.3, which suits 256 levels, with the noise scaled to the bins of 17."""
DECODER = Softmax(LEVELS)
LR, SCHEDULE_LR = 3e-3, 3e-2
RUNS = {"learned": (True, True), "straight": (False, True), "straight, no features": (False, False)}
"""Whether the schedule is learned, and whether the network sees Fourier features."""


def unet(features: bool) -> nn.Module:
    """The demo's U-Net, with noise as its output; it sees sigma, in thousandths."""
    frequencies = (LEVELS / 2, float(LEVELS)) if features else ()
    inside = UNet(
        sample_size=8, in_channels=1 + 2 * len(frequencies), out_channels=1, layers_per_block=1,
        block_out_channels=[32, 64], down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
        norm_num_groups=8, add_attention=False,
    )  # fmt: skip
    return FourierFeatures(inside, frequencies) if features else inside


def straight(ends: Iterable[float]) -> sd.LearnedVP:
    """gamma linear in t between these ends, for good."""
    return sd.LearnedVP(lambda t: t, *ends, learn_ends=False)


def build(learned: bool, features: bool, seed: int) -> sd.VDM:
    """A model before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sde = sd.LearnedVP(gamma_min=ENDS[0], gamma_max=ENDS[1]) if learned else straight(ENDS)
        return sd.VDM(unet(features), sde, DECODER)


def train(vdm: sd.VDM, x: Tensor, steps: int, seed: int) -> Tensor:
    """Train the network, and the schedule at a rate of its own; the losses."""
    schedule = [p for p in vdm.sde.parameters() if p.requires_grad] if isinstance(vdm.sde, nn.Module) else []
    groups: list[dict[str, Any]] = [{"params": list(vdm.network.parameters()), "lr": LR}]
    groups += [{"params": schedule, "lr": SCHEDULE_LR}] if schedule else []
    return sd.train(
        vdm, vdm.loss, x, steps=steps, batch_size=64, clip=None, ema=0.99, warmup=50,
        optimizer=lambda _: torch.optim.Adam(groups, betas=(0.9, 0.99)), seed=seed, progress=False,
    )  # fmt: skip


def one_point(vdm: sd.VDM, x: Tensor, sde: sd.LearnedVP | None = None, n: int = 4096) -> Tensor:
    """Independent one-point estimates of the diffusion term, nats; under another schedule, if one is given."""
    generator = torch.Generator().manual_seed(5)
    vdm = vdm if sde is None else sd.VDM(vdm.network, sde, DECODER)
    rows = x[torch.randint(len(x), (n,), generator=generator)]
    t = vdm.sde.t_min + (vdm.sde.t_max - vdm.sde.t_min) * torch.rand(n, dtype=torch.float64, generator=generator)
    vdm.eval()
    with torch.no_grad():
        parts = [
            sd.variational(vdm.model, rows[i : i + 512], t=t[i : i + 512], generator=generator).diffusion
            for i in range(0, n, 512)
        ]
    return torch.cat(parts).double()


def variance(values: Tensor) -> tuple[float, float]:
    """The variance and its standard error."""
    square = (values - values.mean()) ** 2
    return square.mean().item(), square.std().item() / math.sqrt(len(values))


def measure(name: str, steps: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    learned, features = RUNS[name]
    codes, test_codes = digits(1500, 0)
    x, x_test = DECODER.points(codes), DECODER.points(test_codes)
    vdm = build(learned, features, seed)
    begin = time.process_time()
    losses = train(vdm, x, steps, seed)
    seconds = time.process_time() - begin
    bound = sd.elbo(vdm.model, x_test, samples=16, decoder=DECODER, scale=0.7, seed=1, batch_size=128)
    unit = x_test[0].numel() * math.log(2)
    row: dict[str, Any] = {"run": name, "steps": steps, "seconds": seconds}
    for part, value in (
        ("bits", -bound.total), ("reconstruction", -bound.reconstruction), ("prior", bound.prior),
        ("diffusion", bound.diffusion),
    ):  # fmt: skip
        row |= {part: value.mean().item() / unit, f"{part}_se": value.std().item() / math.sqrt(len(value)) / unit}
    assert isinstance(vdm.sde, sd.LearnedVP)
    low, high = vdm.sde.ends.tolist()
    row |= {"gamma_min": low, "gamma_max": high, "last_losses": losses[-100:].mean().item() / unit}
    for when, values in (
        ("after", one_point(vdm, x)), ("straight_after", one_point(vdm, x, straight((low, high)))),
    ):  # fmt: skip
        row[f"variance_{when}"], row[f"variance_{when}_se"] = variance(values)
    return row


def report(rows: list[dict[str, Any]], histogram: float) -> str:
    """The tables in markdown."""

    def pm(row: dict[str, Any], name: str, digits: int = 3) -> str:
        return f"{row[name]:.{digits}f} +- {row[name + '_se']:.{digits}f}"

    bits = table(
        ["run", "bits/dim", "reconstruction", "prior", "diffusion", "gamma", "CPU s"],
        (
            [r["run"], pm(r, "bits"), pm(r, "reconstruction", 4), pm(r, "prior", 4), pm(r, "diffusion"),
             f"{r['gamma_min']:.2f} to {r['gamma_max']:.2f}", f"{r['seconds']:.0f}"]
            for r in rows
        ),
    )  # fmt: skip
    spread = table(
        ["run", "variance, own curve", "variance, straight curve", "ratio"],
        (
            [r["run"], pm(r, "variance_after", 0), pm(r, "variance_straight_after", 0),
             f"{r['variance_straight_after'] / r['variance_after']:.2f}"]
            for r in rows
        ),
    )  # fmt: skip
    return (
        f"# Digits by a variational diffusion model\n\nTest digits, {rows[0]['steps']} training steps of 64; a "
        f"histogram of every pixel has {histogram:.3f} bits/dim. Standard errors are over the test digits."
        f"\n\n{bits}\nOne-point estimates of the diffusion term, nats squared, on training digits, by the "
        f"trained network between its own ends, times uniform.\n\n{spread}\n{versions()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.only:
        rows.append(measure(name, options.steps, options.seed))
        print(rows[-1], flush=True)
    text = report(rows, histogram_bits(*digits(1500, 0)))
    print(text)
    if options.only == list(RUNS):
        write_csv("vdm_digits.csv", rows)
        write_text("vdm_digits.md", text)


if __name__ == "__main__":
    main()
