"""The demo by class at a tiny size, and its measures against what they must be."""

import math
import re
from dataclasses import replace

import pytest
import torch

import sdediff as sd
from sdediff import conditional_demo as by_class
from sdediff import demo, digits, features

F64 = torch.float64
TINY = by_class.ConditionalSettings(
    model=replace(demo.QUICK, channels=(8, 8), train_steps=12, batch_size=16), scales=(-1.0, 0.0, 2.0),
    classifier_scales=(3.0,), classifier_steps=40, judge_steps=60, images=4, steps=3, shown=(0.0, 2.0), shown_images=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    lines = []
    return by_class.run(tmp_path_factory.mktemp("first"), TINY, say=lines.append), lines


def test_every_file_is_there_and_every_stage_says_so(first):
    result, lines = first
    for name in ("digits_by_class", "guidance_tradeoff"):
        assert (result.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    stages = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in stages] == [f"[{k}/{by_class.STAGES}]" for k in range(1, by_class.STAGES + 1)]
    assert set(result.seconds) == {"judge", "training", "classifier", "sampling", "figures", "report"}


def test_the_report_has_a_row_for_every_scale(first):
    result, _ = first
    text = (result.folder / "report.md").read_text(encoding="utf-8")
    row = r"^\| (classifier-free|classifier) \| (\S+) \| ([\d.]+) ± [\d.]+ % \| ([\d.]+) ± [\d.]+ \| \S+ \| (\d+) \|"
    found = re.findall(row, text, re.MULTILINE)
    assert [(kind, float(w)) for kind, w, *_ in found] == [
        ("classifier-free", -1), ("classifier-free", 0), ("classifier-free", 2), ("classifier", 3),
    ]  # fmt: skip
    for printed, measured in zip(found, result.rows, strict=True):
        assert printed[2] == f"{100 * measured.accuracy[0]:.1f}"
        assert printed[3] == f"{measured.diversity[0]:.3f}"
    assert [int(nfe) for *_, nfe in found] == [4, 4, 8, 4]  # of the U-Net, two with and without a label
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'src="([^"]{10})', page)) == {"data:image"}
    assert len(re.findall("<img", page)) == 2


def test_the_same_seed_gives_the_same_numbers(first, tmp_path):
    result, _ = first
    again = by_class.run(tmp_path / "again", TINY, say=lambda line: None)
    assert [replace(row, seconds=0.0) for row in again.rows] == [replace(row, seconds=0.0) for row in result.rows]
    assert (again.judge, again.floor) == (result.judge, result.floor)


def test_samples_are_those_of_the_saved_model_and_the_judge_sees_what_is_reported(first):
    result, _ = first
    model = sd.load(result.folder / "model")
    wanted = torch.tensor([k for k in range(10) for _ in range(4)])
    settings = TINY.model
    judge = features.digits(settings.train_rows, settings.seed, steps=TINY.judge_steps)
    for row in result.rows[:3]:
        guided = sd.ClassifierFree(model, row.scale)
        x = sd.sample(guided, (40, 1, 8, 8), steps=3, seed=settings.seed, condition=wanted).x
        torch.testing.assert_close(x, result.samples["classifier-free", row.scale], rtol=1e-4, atol=1e-4)
        assert row.accuracy[0] == pytest.approx((judge.probs(x).argmax(1) == wanted).double().mean().item())


def test_the_best_scale_is_the_most_accurate_and_of_equals_the_nearest(first):
    result, _ = first
    rows = [
        by_class.GuidanceResult("classifier-free", w, (accuracy, 0.1), (1.0, 0.1), distance, 4, 1.0)
        for w, accuracy, distance in ((0.0, 0.9, 0.1), (1.0, 0.97, 0.3), (2.0, 0.97, 0.2), (4.0, 0.96, 0.0))
    ]
    rows.append(by_class.GuidanceResult("classifier", 3.0, (1.0, 0.1), (1.0, 0.1), 0.0, 4, 1.0))
    assert replace(result, rows=rows).best.scale == 2.0


# Measures


@pytest.mark.parametrize(("right", "n"), [(10, 10), (0, 7), (30, 100)])
def test_a_share_has_the_deviation_of_its_beta_posterior(right, n):
    hits = torch.arange(n) < right
    value, error = by_class.share(hits)
    posterior = torch.distributions.Beta(torch.tensor(right + 1.0, dtype=F64), torch.tensor(n - right + 1.0, dtype=F64))
    assert value == right / n
    assert error == pytest.approx(posterior.stddev.item(), rel=1e-12)
    assert error > 0


def test_the_spread_is_the_mean_over_pairs_of_one_class():
    points = torch.tensor([[0.0], [3.0], [10.0], [11.0], [13.0]])
    label = torch.tensor([4, 4, 7, 7, 7])
    value, error = by_class.spread_within(points, label)
    assert value == pytest.approx((3 + (1 + 3 + 2) / 3) / 2)
    to_others = torch.tensor([2.0, 1.5, 2.5], dtype=F64)  # the class of two has no variance: each is 3 from the other
    assert error == pytest.approx(math.sqrt(4 * to_others.var().item() / 3) / 2)


def test_the_error_of_the_spread_is_that_of_many_draws():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(3).repeat_interleave(30)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=F64)[label][:, None]
    draws = [
        by_class.spread_within(scale * torch.randn(90, 2, dtype=F64, generator=generator), label) for _ in range(400)
    ]
    values, errors = torch.tensor(draws, dtype=F64).T
    # E|a - b| of normal pairs in the plane is sqrt(pi) times their deviation
    assert abs(values.mean() - math.sqrt(math.pi) * 3.5 / 3) < 4 * values.std() / 20
    # mean squares of the errors are the variance of the values: 400 draws know it to 7 %, and 30 points bias it by 7 %
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.2)


def test_distances_are_between_equal_classes():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(10).repeat_interleave(5)
    x = torch.randn(50, 1, 8, 8, generator=generator) + label[:, None, None, None]
    other = torch.randn(50, 1, 8, 8, generator=generator) + label[:, None, None, None]
    each = [sd.metrics.energy_distance(x[label == k], other[label == k]) for k in range(10)]
    order = torch.randperm(50, generator=generator)
    found = by_class.distance_within(x, label, other[order], label[order])
    assert found == pytest.approx(sum(each) / 10, rel=1e-9)
    assert found < by_class.distance_within(x, label, other, 9 - label)


def test_the_judge_measures_test_digits_as_themselves():
    codes, test = digits.digits(1500, 0)
    label, test_label = digits.labels(1500, 0)
    x = digits.Dequantized(test, digits.LEVELS).all(0)
    judge = by_class.Judge(features.digits(1500, 0, steps=60), x, test_label)
    accuracy, diversity, distance = judge(x, test_label)
    assert (accuracy, diversity) == judge.itself
    assert diversity[0] == 1.0
    assert distance < 0.0  # of a set to itself, unbiased for another: less than nothing
    train = digits.Dequantized(codes, digits.LEVELS).all(1)
    mean, deviation = judge.floor(train, label, 20, 0)
    assert abs(mean) < 1.0
    assert 0 < deviation < 1.0
    assert judge.floor(train, label, 20, 0) == (mean, deviation)
    wrong = judge(x, (test_label + 1) % 10)
    assert wrong[0][0] < 0.2
    assert wrong[2] > mean + 5 * deviation


def test_a_classifier_of_noised_digits_sees_more_where_there_is_less_noise():
    codes, test = digits.digits(1500, 0)
    label, test_label = digits.labels(1500, 0)
    classifier = by_class.noised_classifier(replace(TINY, classifier_steps=150), sd.CosineVP(), codes, label)
    x = digits.Dequantized(test, digits.LEVELS).all(0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    right = []
    for t in (0.02, 0.4, 0.98):
        xt = classifier.sde.perturb(torch.tensor(t), x, noise)
        right.append((classifier.log_probs(t, xt).argmax(1) == test_label).double().mean().item())
    assert right[0] > 0.85
    assert right[0] > right[1] > 0.4
    assert right[2] < 0.25


@pytest.mark.parametrize("change", [{"images": 1}, {"steps": 0}, {"shown": (0.3,)}, {"scales": (), "shown": ()}])
def test_settings_that_cannot_be_meant_are_refused(change):
    with pytest.raises(sd.OptionError, match="at least two images of a class, and scales, those shown among them; got"):
        replace(TINY, **change)


def test_a_file_for_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(
        sd.OptionError, match=r"writes into a folder, but .*file is a file: give another one with --out"
    ):
        by_class.run(file, TINY)
