"""The demo: one SDE, one network, five samplers and a likelihood, on real handwritten digits.

scikit-learn bundles 1,797 digits of 8 x 8 pixels with integer codes 0..16. A code c is spread over its bin,
`x = -1 + 2 (c + u) / 17` with u uniform on (0, 1) and fresh at every access, so that the model has a density and its
log-likelihood is a bound on that of the codes. A small U-Net learns the score; DDPM, DDIM, the reverse SDE, the
probability-flow ODE and a predictor-corrector sample from it; the flow gives bits per dimension of the test digits.

Quality is the energy distance between samples and test digits, in pixels: no network of another origin judges. Its
floor is the same distance for as many training digits. One seed governs everything: the numbers repeat, timings do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdediff import grids, plotting
from sdediff.adapters import TorchDiffEq, TorchSDE
from sdediff.bits import bits_per_dim
from sdediff.digits import EVENT as EVENT
from sdediff.digits import LEVELS as LEVELS
from sdediff.digits import Dequantized as Dequantized
from sdediff.digits import digits as digits
from sdediff.divergence import Hutchinson
from sdediff.draws import mix
from sdediff.errors import OptionError, optional_import
from sdediff.langevin import Langevin, PredictorCorrector
from sdediff.metrics import energy_distance
from sdediff.model import ScoreModel
from sdediff.networks import UNet
from sdediff.processes import CosineVP
from sdediff.report import write_report
from sdediff.sampling import sample
from sdediff.shapes import Codes, State
from sdediff.solvers import Solver
from sdediff.tables import DDIM, DDPM
from sdediff.training import TrainedModel, fit, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = 6


@dataclass(frozen=True)
class DemoSettings:
    """What the demo spends on what. The defaults are the full run; `QUICK` is the short one.

    Attributes:
        channels: of the U-Net at its resolutions 8 x 8 and 4 x 4.
        train_steps, batch_size, lr, ema: of the training.
        train_rows: digits to train on; the rest is the test set.
        images: samples for each solver.
        evaluations: network evaluations for each sample of the table.
        tolerance: rtol and atol of the adaptive flow solver.
        curve: network evaluations in the figure of quality against cost, beside those of the table.
        test_rows: test digits whose bits per dimension are taken; all if None.
        probes, likelihood_tolerance: of the likelihood, the latter in nats.
    """

    channels: tuple[int, ...] = (32, 64)
    train_steps: int = 2000
    batch_size: int = 64
    lr: float = 4e-3
    ema: float = 0.995
    train_rows: int = 1500
    images: int = 256
    evaluations: int = 50
    tolerance: float = 1e-4
    curve: tuple[int, ...] = (6, 12, 25, 100)
    test_rows: int | None = None
    probes: int = 4
    likelihood_tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.train_steps, self.batch_size, self.evaluations, self.probes, *self.curve)
        if min(counts) < 1 or self.images < 2 or not 2 <= self.train_rows <= 1795:
            raise OptionError(
                "The demo needs positive numbers of steps, rows and probes, at least two images, and 2 to 1795 "
                f"training digits; got {self}."
            )


FULL = DemoSettings()
QUICK = DemoSettings(
    train_steps=360, batch_size=32, lr=5e-3, ema=0.99, images=100, curve=(12,), test_rows=64, tolerance=1e-3
)


@dataclass(frozen=True)
class SolverResult:
    """One row of the table."""

    solver: str
    setting: str
    nfe: int
    seconds: float
    distance: float


@dataclass(frozen=True)
class LikelihoodResult:
    """Bits per dimension of the test digits: the mean, its standard error over the digits, and the price."""

    mean: float
    stderr: float
    rows: int
    nfe: int
    seconds: float
    protocol: str
    histogram: float


@dataclass(frozen=True, eq=False)
class DemoResult:
    """All that the demo measured, and the folder with its figures, its report and the model."""

    folder: Path
    solvers: list[SolverResult]
    floor: tuple[float, float]
    bits: LikelihoodResult
    curves: dict[str, list[tuple[float, float]]]
    losses: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    process: str = ""
    levels: int = LEVELS


def network(channels: tuple[int, ...], classes: int | None = None) -> UNet:
    """A convolutional U-Net for 8 x 8 images in one channel, of so many classes if any."""
    depth = len(channels)
    return UNet(
        classes=classes, sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=list(channels), down_block_types=["DownBlock2D"] * depth,
        up_block_types=["UpBlock2D"] * depth, norm_num_groups=8, add_attention=False,
    )  # fmt: skip


def solvers(evaluations: int, tolerance: float) -> dict[str, tuple[Solver, int | None, str]]:
    """The five of the table: name, solver, steps (None where it chooses its own), and its setting in words.

    Args:
        evaluations: network evaluations for each image (the last denoising comes on top).
        tolerance: of the adaptive one, which takes what it needs.
    """
    n, half = evaluations, max(1, evaluations // 2)
    return {
        "DDPM": (DDPM(), n, f"{n} steps"),
        "DDIM": (DDIM(), n, f"{n} steps"),
        "Reverse SDE": (TorchSDE("srk"), half, f"torchsde srk, {half} steps"),
        "Flow ODE": (
            TorchDiffEq("dopri5", rtol=tolerance, atol=tolerance),
            None,
            f"torchdiffeq dopri5, tolerance {tolerance:.2g}",
        ),
        "Predictor-corrector": (PredictorCorrector(DDPM(), Langevin()), half, f"DDPM and Langevin, {half} steps"),
    }


def train(
    settings: DemoSettings,
    data: Dataset[Any],
    *,
    classes: int | None = None,
    label_dropout: float = 0.0,
    progress: bool = False,
) -> TrainedModel:
    """The model of the demo: a U-Net with EDM preconditioning on the cosine process, of so many classes if any."""
    with torch.random.fork_rng():
        torch.manual_seed(mix(settings.seed, 22) >> 2)
        unet = network(settings.channels, classes)
    model = ScoreModel(unet, CosineVP(), prediction="edm", sigma_data=0.7)
    return fit(
        model, data, steps=settings.train_steps, batch_size=settings.batch_size, lr=settings.lr, weighting="edm",
        ema=settings.ema, warmup=min(50, settings.train_steps), label_dropout=label_dropout, seed=settings.seed,
        progress=progress,
    )  # fmt: skip


def histogram_bits(train: Codes, test: Codes, levels: int = LEVELS) -> float:
    """Bits per dimension of a histogram for each pixel, the simplest model of codes (one count added to every bin)."""
    counts = torch.nn.functional.one_hot(train, levels).sum(0).double() + 1
    log_p = (counts / counts.sum(-1, keepdim=True)).log2()
    return -log_p.expand(len(test), *log_p.shape).gather(-1, test[..., None]).mean().item()


def run(
    out: str | Path = "sdediff-demo",
    settings: DemoSettings = FULL,
    *,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> DemoResult:
    """Train, sample, evaluate, and write figures, report and model into the folder `out`.

    It computes in one thread (and gives torch its own number back afterwards): the numbers are then the same for any
    number of cores, and a machine that is busy with other things does not stall it.

    Args:
        out: the folder, made if it is not there; files of an earlier run are overwritten.
        say: where lines about the progress go.
        progress: whether to show a bar while training.

    Raises:
        OptionError: `out` is a file.
        MissingExtraError: the extra `demo` is not installed.
    """
    with prepared(out) as folder:
        return _run(folder, settings, say, progress)


@contextmanager
def prepared(out: str | Path) -> Iterator[Path]:
    """The folder of a demo, made if it is not there, and one thread to compute in."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"The demo writes into a folder, but {folder} is a file: give another one with --out.")
    optional_import("matplotlib.figure", "demo")
    optional_import("diffusers", "demo")
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield folder
    finally:
        torch.set_num_threads(threads)


class Stages:
    """The stages of a demo: each says what it does, and leaves how long it took in `seconds`."""

    def __init__(self, count: int, say: Callable[[str], None]) -> None:
        self.count, self.say = count, say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        self.say(f"[{len(self.seconds) + 1}/{self.count}] {text}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _run(folder: Path, settings: DemoSettings, say: Callable[[str], None], progress: bool) -> DemoResult:
    stage = Stages(STAGES, say)
    with stage("data", "Loading scikit-learn's handwritten digits"):
        codes, test_codes = digits(settings.train_rows, settings.seed)
        data, reference = Dequantized(codes, LEVELS), Dequantized(test_codes, LEVELS).all(mix(settings.seed, 23) >> 2)
        floor = _floor(data.all(mix(settings.seed, 24) >> 2), reference, settings)
    with stage("training", f"Training a U-Net for {settings.train_steps} steps on {len(codes)} digits"):
        model = train(settings, data, progress=progress)
        save(model, folder / "model")
    with stage("sampling", f"Drawing {settings.images} digits with each of five solvers"):
        rows, samples = _table(model, reference, settings)
    for row in rows:
        say(f"      {row.solver:20s} {row.nfe:4d} evaluations {row.seconds:6.1f} s  distance {row.distance:.4f}")
    with stage("cost", "Measuring quality against cost"):
        curves = _curves(model, reference, rows, settings)
    with stage("likelihood", "Evaluating bits per dimension of test digits"):
        bits = _likelihood(model, codes, test_codes, settings)
    say(f"      {bits.mean:.3f} ± {bits.stderr:.3f} bits/dim (a histogram for each pixel: {bits.histogram:.3f})")
    with stage("report", f"Writing figures and report into {folder}"):
        result = DemoResult(folder, rows, floor, bits, curves, model.losses, stage.seconds, process=repr(model.sde))
        for name, figure in _figures(model, reference, samples, result, settings).items():
            figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        write_report(result, settings, len(codes), len(test_codes))
    say(f"Done in {sum(stage.seconds.values()):.0f} s: open {folder / 'report.html'}")
    return result


def _floor(train: State, reference: State, settings: DemoSettings) -> tuple[float, float]:
    """Mean and standard deviation of the distance of as many training digits from the test set."""
    generator = torch.Generator().manual_seed(mix(settings.seed, 25) >> 2)
    n = min(settings.images, len(train))
    draws = [energy_distance(train[torch.randperm(len(train), generator=generator)[:n]], reference) for _ in range(20)]
    values = torch.tensor(draws, dtype=torch.float64)
    return values.mean().item(), values.std().item()


def _draw(model: ScoreModel, solver: Solver, steps: int | None, settings: DemoSettings) -> tuple[State, int, float]:
    start = time.perf_counter()
    solution = sample(model, (settings.images, *EVENT), solver=solver, steps=steps, seed=settings.seed)
    return solution.x, solution.nfe, time.perf_counter() - start


def _table(model: ScoreModel, reference: State, settings: DemoSettings) -> tuple[list[SolverResult], dict[str, State]]:
    rows, samples = [], {}
    for name, (solver, steps, setting) in solvers(settings.evaluations, settings.tolerance).items():
        samples[name], nfe, seconds = _draw(model, solver, steps, settings)
        rows.append(SolverResult(name, setting, nfe, seconds, energy_distance(samples[name], reference)))
    return rows, samples


def _curves(
    model: ScoreModel, reference: State, rows: list[SolverResult], settings: DemoSettings
) -> dict[str, list[tuple[float, float]]]:
    """Distances at other costs than the table's, and those of the table."""
    curves = {row.solver: [(float(row.nfe), row.distance)] for row in rows}
    for i, evaluations in enumerate(settings.curve):
        for name, (solver, steps, _) in solvers(evaluations, 10.0 ** -max(0.5, i)).items():
            x, nfe, _ = _draw(model, solver, steps, settings)
            curves[name].append((float(nfe), energy_distance(x, reference)))
    return {name: sorted(pairs) for name, pairs in curves.items()}


def _likelihood(model: ScoreModel, codes: Codes, test: Codes, settings: DemoSettings) -> LikelihoodResult:
    chosen = test[: settings.test_rows]
    start = time.perf_counter()
    bits = bits_per_dim(
        model, chosen, levels=LEVELS, dequantize="uniform", divergence=Hutchinson(settings.probes, "orthogonal"),
        atol_nats=settings.likelihood_tolerance, seed=settings.seed, batch_size=128,
    )  # fmt: skip
    return LikelihoodResult(
        mean=bits.mean,
        stderr=bits.mean_stderr,
        rows=len(chosen),
        nfe=bits.nfe,
        seconds=time.perf_counter() - start,
        protocol=bits.protocol,
        histogram=histogram_bits(codes, chosen),
    )


def _figures(
    model: TrainedModel, reference: State, samples: Mapping[str, State], result: DemoResult, settings: DemoSettings
) -> dict[str, Figure]:
    sde = model.linear
    times = torch.linspace(0, sde.t_max, 8, dtype=torch.float64)
    shown = reference[:6]
    forward = sde.simulate(shown, times, seed=settings.seed)
    falling = grids.uniform(sde, 70)
    paths = {
        name: sample(model, (6, *EVENT), solver=solver, times=falling, seed=settings.seed, trajectory=True)
        for name, solver in {"DDPM": DDPM(), "DDIM": DDIM()}.items()
    }
    backward = {name: (path.trajectory, path.times) for name, path in paths.items() if path.trajectory is not None}
    return {
        "forward": plotting.forward_process(sde, shown, times, settings.seed),
        "reverse": plotting.image_frames({f"Reverse process, {name}": strip for name, strip in backward.items()}),
        "process": plotting.image_frames(
            {"Forward: data to noise": (forward, times), "Reverse (DDPM): noise to digits": backward["DDPM"]}, rows=4
        ),
        "samples": plotting.image_rows({**samples, "Test digits": reference}),
        "loss": plotting.loss_curve(result.losses),
        "quality": plotting.quality_against_nfe(
            result.curves, floor=result.floor, floor_label="training digits", ceiling=2.0
        ),
    }
