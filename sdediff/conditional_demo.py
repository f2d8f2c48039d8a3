r"""The demo by class: digits of a class that is asked for, and what guidance trades for getting them.

A U-Net of ten classes is trained with label dropout, so that one network is the model of each digit and of all digits.
Classifier-free guidance of scale w combines the two, `(1 + w) cond - w uncond`: w = -1 is the model of all digits, deaf
to the label, w = 0 the conditional model, and more goes beyond. Classifier guidance adds w times the gradient of a
`Classifier`, trained on noised digits, to the score of the same network without a label: w = 0 is the model of all
digits, and w = 1, by Bayes' rule, would be the conditional model if the classifier were the class posterior. It is so
in value at best: cross-entropy does not see the gradient (Chao et al. 2022), and larger scales make up for it.

A judge that guides nothing, the classifier of clean digits of `sdediff.features`, measures at every scale

- accuracy: the share of samples in which it sees the digit that was asked for. The error is the standard deviation of
  the share under a uniform prior, which is not 0 at 100 %;
- diversity: the mean distance between two samples of a class in the features of the judge, in units of that between
  test digits of a class. The mean over pairs is a U-statistic, whose variance for n samples of a class is
  `4 Var(h) / n` with h a sample's mean distance to the others of its class (Hoeffding 1948);
- the energy distance between samples and test digits of a class in pixels, averaged over classes.

All scales start from the same noise.

References: Ho and Salimans 2022 (arXiv:2207.12598); Dhariwal and Nichol 2021 (arXiv:2105.05233); Chao et al. 2022
(arXiv:2203.14206), gradients of noised classifiers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import StackDataset

from sdediff import demo, features, plotting
from sdediff.classifier import Classifier
from sdediff.demo import DemoSettings, Stages, prepared
from sdediff.digits import EVENT, LEVELS, Dequantized, digits, labels, spread
from sdediff.draws import mix
from sdediff.errors import OptionError
from sdediff.guidance import ClassifierFree, ClassifierGuidance
from sdediff.metrics import energy_distance
from sdediff.model import ScoreModel
from sdediff.networks import ClassifierCNN
from sdediff.optimise import train
from sdediff.report import Block, write_blocks
from sdediff.sampling import sample
from sdediff.sde import SDE
from sdediff.shapes import PerRow, State
from sdediff.training import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
STAGES = 6

Measured: TypeAlias = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True)
class ConditionalSettings:
    """What the demo by class spends on what. The defaults are the full run; `QUICK` is the short one.

    Attributes:
        model: the settings of the U-Net's training and the seed of all.
        label_dropout: of its training.
        scales: w of classifier-free guidance.
        classifier_scales: w of classifier guidance.
        classifier_steps: training steps of the noised classifier.
        judge_steps: training steps of the judge.
        images: samples of every class at every scale.
        steps: of the sampler.
        shown: scales of the figure, some of `scales`, and images of every class in it.
    """

    model: DemoSettings = demo.FULL
    label_dropout: float = 0.1
    scales: tuple[float, ...] = (-1.0, -0.75, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
    classifier_scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    classifier_steps: int = 1200
    judge_steps: int = 800
    images: int = 64
    steps: int = 20
    shown: tuple[float, ...] = (-1.0, 0.0, 1.0, 4.0)
    shown_images: int = 8

    def __post_init__(self) -> None:
        counts = (self.classifier_steps, self.judge_steps, self.steps, self.shown_images)
        known = set(self.shown) <= set(self.scales)
        if min(counts) < 1 or self.images < 2 or not known or not self.scales or not self.classifier_scales:
            raise OptionError(
                "The demo by class needs positive numbers of steps and shown images, at least two images of a class, "
                f"and scales, those shown among them; got {self}."
            )


FULL = ConditionalSettings()
QUICK = ConditionalSettings(
    model=demo.QUICK, scales=(-1.0, 0.0, 1.0, 4.0), classifier_scales=(1.0, 4.0), classifier_steps=300,
    judge_steps=300, images=24, steps=10,
)  # fmt: skip


@dataclass(frozen=True)
class GuidanceResult:
    """One row of the table: a kind of guidance, its scale, and what the judge says of the samples."""

    guidance: str
    scale: float
    accuracy: Measured
    diversity: Measured
    distance: float
    nfe: int
    seconds: float


@dataclass(frozen=True, eq=False)
class ConditionalResult:
    """All that the demo by class measured, and the folder with its figures, its report and the model.

    Attributes:
        rows: the table.
        judge: the accuracy of the judge on clean test digits, and the spread of their distances in units of its mean.
        floor: mean and standard deviation of the distance of as many training digits from the test digits.
    """

    folder: Path
    rows: list[GuidanceResult]
    judge: tuple[Measured, Measured]
    floor: Measured
    samples: dict[tuple[str, float], State] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    process: str = ""

    @property
    def best(self) -> GuidanceResult:
        """The scale of classifier-free guidance with the highest accuracy; of equals, that nearest to the test set."""
        free = [row for row in self.rows if row.guidance == "classifier-free"]
        return min(free, key=lambda row: (-row.accuracy[0], row.distance))


# What is trained


def noised_classifier(settings: ConditionalSettings, sde: SDE, codes: Tensor, label: Tensor) -> Classifier:
    """A convolutional classifier of noised digits, of the process of the model."""
    seed = settings.model.seed
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, 27) >> 2)
        classifier = Classifier(ClassifierCNN(EVENT, CLASSES), sde)

    def loss(batch: Tensor, condition: Tensor) -> PerRow:
        return classifier.loss(spread(batch), condition)

    train(
        classifier, loss, codes, condition=label, steps=settings.classifier_steps, batch_size=64, lr=2e-3, ema=0.99,
        warmup=min(50, settings.classifier_steps), seed=mix(seed, 28) >> 2, progress=False,
    )  # fmt: skip
    return classifier


# What is measured


def share(hits: Tensor) -> Measured:
    """The share of true entries, and its standard deviation given them under a uniform prior."""
    right, n = int(hits.sum()), len(hits)
    a, b = right + 1, n - right + 1
    return right / n, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))


def spread_within(points: Tensor, label: Tensor) -> Measured:
    """The mean distance of two points `(n, d)` of one class, averaged over classes, and its standard error."""
    means, variances = [], []
    for k in sorted(set(label.tolist())):
        own = points[label == k].double()
        to_others = torch.cdist(own, own).sum(1) / (len(own) - 1)
        means.append(to_others.mean())
        variances.append(4 * to_others.var() / len(own))
    return torch.stack(means).mean().item(), math.sqrt(torch.stack(variances).sum().item()) / len(means)


def distance_within(a: State, label_a: Tensor, b: State, label_b: Tensor) -> float:
    """The energy distance between the points of one class, averaged over classes."""
    return sum(energy_distance(a[label_a == k], b[label_b == k]) for k in range(CLASSES)) / CLASSES


@dataclass(frozen=True, eq=False)
class Judge:
    """The judge, and the test digits by which it measures."""

    network: features.DigitsClassifier
    test: State
    label: Tensor

    @property
    def itself(self) -> tuple[Measured, Measured]:
        """Its accuracy on the test digits, and their diversity."""
        mean, error = self.spread_of_test
        return share(self.network.probs(self.test).argmax(1) == self.label), (1.0, error / mean)

    @property
    def spread_of_test(self) -> Measured:
        return spread_within(self.network.features(self.test), self.label)

    def __call__(self, x: State, label: Tensor) -> tuple[Measured, Measured, float]:
        """Accuracy, diversity and distance of samples."""
        (mean, error), (unit, _) = spread_within(self.network.features(x), label), self.spread_of_test
        accuracy = share(self.network.probs(x).argmax(1) == label)
        return accuracy, (mean / unit, error / unit), distance_within(x, label, self.test, self.label)

    def floor(self, train: State, label: Tensor, images: int, seed: int) -> Measured:
        """Mean and standard deviation of the distance of as many training digits of every class from the test set."""
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(20):
            order = torch.randperm(len(train), generator=generator)
            chosen = torch.cat([order[label[order] == k][:images] for k in range(CLASSES)])
            values.append(distance_within(train[chosen], label[chosen], self.test, self.label))
        drawn = torch.tensor(values, dtype=torch.float64)
        return drawn.mean().item(), drawn.std().item()


# The run


def run(
    out: str | Path = "sdediff-demo-conditional",
    settings: ConditionalSettings = FULL,
    *,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> ConditionalResult:
    """Train, guide, judge, and write figures, report and model into the folder `out`, as `sdediff.demo.run` does.

    Args:
        out: the folder, made if it is not there; files of an earlier run are overwritten.
        say: where lines about the progress go.
        progress: whether to show a bar while training the U-Net.

    Raises:
        OptionError: `out` is a file.
        MissingExtraError: the extra `demo` is not installed.
    """
    with prepared(out) as folder:
        return _run(folder, settings, say, progress)


def _run(folder: Path, settings: ConditionalSettings, say: Callable[[str], None], progress: bool) -> ConditionalResult:
    stage, spent, seed = Stages(STAGES, say), settings.model, settings.model.seed
    codes, test_codes = digits(spent.train_rows, seed)
    label, test_label = labels(spent.train_rows, seed)
    data, test = Dequantized(codes, LEVELS), Dequantized(test_codes, LEVELS).all(mix(seed, 23) >> 2)
    with stage("judge", "Training the judge, which guides nothing, on clean digits"):
        network = features.digits(spent.train_rows, seed, steps=settings.judge_steps)
        judge = Judge(network, test, test_label)
        itself = judge.itself
        floor = judge.floor(data.all(mix(seed, 24) >> 2), label, settings.images, mix(seed, 25) >> 2)
    say(f"      it sees {100 * itself[0][0]:.1f} % of {len(test)} test digits right")
    with stage("training", f"Training a U-Net of ten classes for {spent.train_steps} steps on {len(codes)} digits"):
        pairs = StackDataset(data, label)  # type: ignore[arg-type]  # a tensor has a length and items, which is enough
        dropout = settings.label_dropout
        model = demo.train(spent, pairs, classes=CLASSES, label_dropout=dropout, progress=progress)
        save(model, folder / "model")
    with stage("classifier", f"Training a classifier of noised digits for {settings.classifier_steps} steps"):
        classifier = noised_classifier(settings, model.sde, codes, label)
    with stage("sampling", f"Drawing {CLASSES * settings.images} digits at every scale of two kinds of guidance"):
        rows, samples = _table(model, classifier, judge, settings, say)
    result = ConditionalResult(folder, rows, itself, floor, samples, stage.seconds, repr(model.sde))
    with stage("figures", "Drawing the digits and the trade-off"):
        for name, figure in _figures(result, settings).items():
            figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    with stage("report", f"Writing the report into {folder}"):
        write_blocks(folder, _blocks(result, settings, len(codes), len(test)))
    say(f"Done in {sum(stage.seconds.values()):.0f} s: open {folder / 'report.html'}")
    return result


def _table(
    model: ScoreModel, classifier: Classifier, judge: Judge, settings: ConditionalSettings, say: Callable[[str], None]
) -> tuple[list[GuidanceResult], dict[tuple[str, float], State]]:
    wanted = torch.arange(CLASSES).repeat_interleave(settings.images)
    guided: dict[tuple[str, float], ScoreModel] = {}
    for w in settings.scales:
        guided["classifier-free", w] = ClassifierFree(model, w).given(wanted)
    for w in settings.classifier_scales:
        guided["classifier", w] = ClassifierGuidance(model, classifier.log_prob, w, label=wanted)
    rows, samples = [], {}
    for (kind, w), one in guided.items():
        start = time.perf_counter()
        solution = sample(one, (len(wanted), *EVENT), steps=settings.steps, seed=settings.model.seed)
        seconds = time.perf_counter() - start
        accuracy, diversity, distance = judge(solution.x, wanted)
        rows.append(GuidanceResult(kind, w, accuracy, diversity, distance, solution.nfe, seconds))
        samples[kind, w] = solution.x
        say(f"      {kind:16s} w = {w:5g}  accuracy {100 * accuracy[0]:5.1f} %  diversity {diversity[0]:.2f}")
    return rows, samples


def _figures(result: ConditionalResult, settings: ConditionalSettings) -> dict[str, Figure]:
    def some(x: State) -> State:
        return x.reshape(CLASSES, -1, *EVENT)[:, : settings.shown_images].reshape(-1, *EVENT)

    shown = {f"w = {w:g}": some(result.samples["classifier-free", w]) for w in settings.shown}
    curves = {
        f"{kind} guidance": [(f"{r.scale:g}", r.diversity, r.accuracy) for r in result.rows if r.guidance == kind]
        for kind in ("classifier-free", "classifier")
    }
    accuracy, diversity = result.judge
    curves["test digits"] = [("", diversity, accuracy)]
    return {
        "digits_by_class": plotting.image_panels(
            shown, min(settings.shown_images, settings.images), rows=list(map(str, range(CLASSES)))
        ),
        "guidance_tradeoff": plotting.trade_off(
            curves, xlabel="diversity within a class (test digits: 1)", ylabel="the judge sees the digit asked for",
            title="Guidance trades diversity for accuracy (numbers: w)",
        ),
    }  # fmt: skip


# The report


def table_of(result: ConditionalResult) -> list[list[str]]:
    """The table of the report, its head first."""
    rows = [["guidance", "w", "accuracy", "diversity", "energy distance", "NFE", "seconds"]]

    def words(accuracy: Measured, diversity: Measured) -> list[str]:
        percent = f"{100 * accuracy[0]:.1f} ± {100 * accuracy[1]:.1f} %"
        return [percent, f"{diversity[0]:.3f} ± {diversity[1]:.3f}"]

    for r in result.rows:
        measured = words(r.accuracy, r.diversity)
        rows.append([r.guidance, f"{r.scale:g}", *measured, f"{r.distance:.4f}", str(r.nfe), f"{r.seconds:.1f}"])
    rows.append(["test digits", "", *words(*result.judge), "", "", ""])
    rows.append(["training digits (floor)", "", "", "", f"{result.floor[0]:.4f} ± {result.floor[1]:.4f}", "", ""])
    return rows


def _blocks(result: ConditionalResult, settings: ConditionalSettings, train_rows: int, test_rows: int) -> list[Block]:
    best, spent, n = result.best, settings.model, CLASSES * settings.images
    timing = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    return [
        ("title", "sdediff demo: handwritten digits by class"),
        (
            "text",
            f"One diffusion model of scikit-learn's digits (8 x 8 pixels, codes 0 to 16) and of each of their ten "
            f"classes: {train_rows} to train on, {test_rows} to test, seed {spent.seed}. The process is "
            f"{result.process}; the network is a U-Net of {' and '.join(map(str, spent.channels))} channels, trained "
            f"for {spent.train_steps} steps of {spent.batch_size} images, of which it did not see the label with "
            f"probability {settings.label_dropout:g}. Another network, trained for {settings.classifier_steps} steps, "
            "classifies noised digits.",
        ),
        (
            "text",
            f"Best scale of classifier-free guidance: w = {best.scale:g}, where the judge sees the digit asked for in "
            f"{100 * best.accuracy[0]:.1f} % of {n} samples. On clean test digits it is right in "
            f"{100 * result.judge[0][0]:.1f} %.",
        ),
        ("heading", "Samples"),
        (
            "figure",
            "digits_by_class.png",
            "Classifier-free guidance from the same noise, a row for each digit asked for. w = -1 is deaf to the "
            "label; w = 0 is the conditional model.",
        ),
        ("heading", "Diversity against accuracy"),
        (
            "figure",
            "guidance_tradeoff.png",
            "Every point is a scale; bars are one standard error. Classifier guidance of scale 1 would be the "
            "conditional model, classifier-free guidance of scale 0, if the gradient of the classifier were that of "
            "the class posterior; training by cross-entropy does not see to that.",
        ),
        ("table", table_of(result)),
        (
            "text",
            f"{settings.images} samples of every class at every scale, {settings.steps} steps. Accuracy: the "
            "share of samples in which the judge, a classifier of clean digits that guides nothing, sees the digit "
            "asked for. Diversity: the mean distance of two samples of a class in the features of the judge, in units "
            "of that of test digits. Energy distance: between samples and test digits of a class, in pixels, averaged "
            f"over classes; the floor is that of {settings.images} training digits of a class (mean and standard "
            "deviation over 20 draws). NFE is evaluations of the U-Net for each image; classifier guidance pays for "
            "its classifier on top.",
        ),
        ("text", f'Time: {timing}. The model is in the folder model: sdediff.load("model") gives it back.'),
    ]
