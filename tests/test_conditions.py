"""Labels, the null label, and label dropout: what is replaced, how often, and what a network learns by it."""

import math

import pytest
import torch
from torch.utils.data import Dataset, StackDataset

import sdediff as sd
from sdediff.conditions import LabelDropout, labels_of

F64 = torch.float64
SDE = sd.CosineVP()


def small(classes=4, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sd.ScoreModel(sd.networks.MLP((2,), width=16, depth=1, classes=classes, **options), SDE)


def data(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def quick(model, rows=None, **options):
    x, y = data()
    settings = {"steps": 12, "batch_size": 8, "warmup": 3, "seed": 5, "progress": False, "condition": y} | options
    return sd.fit(model, x if rows is None else rows, **settings)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.network.state_dict().values()])


# Labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_whole_dtype_are_themselves(dtype):
    given = torch.tensor([0, 3, 2], dtype=dtype)
    assert labels_of(given, 3, 4, "It").tolist() == [0, 3, 2]
    assert labels_of(given, 3, 4, "It").dtype == torch.int64
    assert labels_of(given, 3, 3, "It", null=True).tolist() == [0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 4, 1]), sd.OptionError, r"It knows the labels 0 to 2, and 3 for no label; got 4 in row 1\."),
        (torch.tensor([0, 1, -1]), sd.OptionError, r"got -1 in row 2\."),
        (torch.tensor([0, 1]), sd.ShapeError, r"one label a row as its condition, shape \(3,\); got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), sd.ShapeError, r"got \(3, 1\)"),
        ([0, 1, 2], sd.ShapeError, r"got \[0, 1, 2\]"),
        (torch.ones(3), sd.ShapeError, r"whole numbers as labels; got torch\.float32\. Write labels\.long\(\)"),
        (torch.ones(3, dtype=torch.bool), sd.ShapeError, r"got torch\.bool"),
        (torch.ones(3, dtype=torch.complex64), sd.ShapeError, r"got torch\.complex64"),
    ],
)
def test_what_are_no_labels_is_refused(labels, error, message):
    with pytest.raises(error, match=message):
        labels_of(labels, 3, 3, "It", null=True)


def test_the_null_label_is_no_class():
    with pytest.raises(sd.OptionError, match=r"It knows the labels 0 to 2; got 3 in row 0\."):
        labels_of(torch.tensor([3, 0]), 2, 3, "It")


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_the_share_dropped_is_binomial_and_other_labels_are_untouched(p):
    n = 40_000
    labels = torch.arange(n) % 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = LabelDropout(p, 10)(labels)
    dropped = kept == 10
    assert abs(dropped.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert kept.dtype == labels.dtype
    # independent of the label, and from row to row: both counts are binomial too
    for k in range(10):
        share = dropped[labels == k].double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / (n / 10))
    pairs = (dropped[1:] & dropped[:-1]).double().mean().item()
    assert abs(pairs - p**2) < 4.5 * math.sqrt((p**2 * (1 - p**2) + 2 * (p**3 - p**4)) / n)


@pytest.mark.parametrize("null", [0.0, torch.tensor([1.0, -2.0, 0.5])])
def test_vectors_are_dropped_whole(null):
    given = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kept = LabelDropout(0.5, null)(given)
    dropped = (kept != given).any(1)
    assert 140 < dropped.sum() < 260
    assert torch.equal(kept[dropped], torch.as_tensor(null).expand(int(dropped.sum()), 3))
    assert torch.equal(kept[~dropped], given[~dropped])


@pytest.mark.parametrize(
    ("null", "condition", "error", "message"),
    [
        (4, None, sd.OptionError, r"label_dropout=0\.5 replaces conditions, and the data has none: write condition="),
        (4, {"a": torch.ones(2)}, sd.ShapeError, r"a tensor \(batch, \.\.\.\); got dict"),
        (4, torch.tensor(1), sd.ShapeError, r"got Tensor"),
        (torch.zeros(2), torch.zeros(4, 3), sd.ShapeError, r"shaped as one row's condition, \(3,\); got \(2,\)"),
        (torch.zeros(1), torch.zeros(4), sd.ShapeError, r"shaped as one row's condition, \(\); got \(1,\)"),
        (0.5, torch.zeros(4, dtype=torch.long), sd.OptionError, r"torch\.int64, which cannot hold null = 0\.5"),
        (300, torch.zeros(4, dtype=torch.uint8), sd.OptionError, r"torch\.uint8, which cannot hold null = 300"),
    ],
)
def test_conditions_that_cannot_be_dropped_are_refused(null, condition, error, message):
    with pytest.raises(error, match=message):
        LabelDropout(0.5, null)(condition)


# fit


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_fit_refuses_a_dropout_that_is_no_probability(p):
    with pytest.raises(sd.OptionError, match=rf"in \[0, 1\); got {p}"):
        quick(small(), label_dropout=p)


def test_fit_refuses_a_dropout_without_a_condition_or_a_null():
    with pytest.raises(sd.OptionError, match=r"the data has none: write condition="):
        quick(small(), label_dropout=0.1, condition=None)
    model = sd.ScoreModel(Vectors(), SDE)
    with pytest.raises(sd.OptionError, match=r"label_dropout=0\.1 needs the null .* classes=.*null="):
        quick(model, label_dropout=0.1, condition=torch.zeros(64, 3))
    with pytest.raises(sd.OptionError, match=r"null=0\.0 takes the place of dropped conditions: write label_dropout"):
        quick(model, null=0.0, condition=torch.zeros(64, 3))


class Vectors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x, t, condition):
        return x + self.linear(condition)


def labels_seen(**options):
    """The labels that the loss gets at every step."""
    seen = []

    def loss(model, x0, *, condition):
        seen.append(condition)
        return sd.losses.denoising(model, x0, condition=condition)

    quick(small(), loss=loss, steps=40, batch_size=32, **options)
    return torch.stack(seen)


def test_a_loss_of_the_caller_gets_labels_of_which_some_are_null():
    plain, dropped = labels_seen(), labels_seen(label_dropout=0.25)
    null = dropped == 4
    assert torch.equal(plain[~null], dropped[~null])
    assert abs(null.double().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1280)
    assert len({tuple(step) for step in null.tolist()}) > 30  # other rows at every step
    assert torch.equal(labels_seen(label_dropout=0.25, null=2) == 2, null | (plain == 2))


def test_the_null_of_a_network_in_a_network_is_known():
    inner = sd.networks.MLP((2,), width=8, depth=1, classes=4, heads=2)
    assert sd.networks.TwoHeads(inner).null == 4
    features = sd.networks.FourierFeatures(sd.networks.MLP((6,), width=8, depth=1, classes=4), [1.0])
    assert quick(sd.ScoreModel(features, SDE), label_dropout=0.5, steps=2).network.null == 4


class Interrupted(Exception):
    pass


class Stopping(Dataset):
    """Pairs of rows and labels, until so many have been read."""

    def __init__(self, left=10**9):
        self.rows, self.left = StackDataset(*data()), left

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return self.rows[index]


def test_a_run_with_dropout_resumes_number_for_number(tmp_path):
    def run(rows, folder):
        return quick(
            small(), rows, condition=None, label_dropout=0.3, checkpoint=folder, checkpoint_every=3, steps=10, ema=0.7
        )

    whole = run(Stopping(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(Stopping(40), tmp_path / "parts")
    torch.manual_seed(99)
    resumed = run(Stopping(), tmp_path / "parts")
    assert torch.equal(whole.losses, resumed.losses)
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_dropout": 0.2}, r"label_dropout was 0\.1, now 0\.2"),
        ({"label_dropout": 0.0}, r"label_dropout was 0\.1, now None; null was '4', now None"),
        ({"label_dropout": 0.1, "null": 2}, r"null was '4', now '2'"),
    ],
)
def test_a_checkpoint_of_another_dropout_is_refused(tmp_path, change, message):
    quick(small(), label_dropout=0.1, checkpoint=tmp_path)
    with pytest.raises(sd.CheckpointError, match=message):
        quick(small(), checkpoint=tmp_path, **change)


def test_a_network_with_classes_is_saved_with_its_null(tmp_path):
    trained = quick(small(), label_dropout=0.2)
    sd.save(trained, tmp_path)
    loaded = sd.load(tmp_path)
    x, y = data(6)
    assert loaded.network.null == 4
    for condition in (None, y, torch.full((6,), 4)):
        assert torch.equal(loaded.noise(0.4, x, condition=condition), trained.noise(0.4, x, condition=condition))


def test_one_network_learns_the_score_of_every_class_and_that_of_all():
    """On two classes of unequal weight with exact scores: each branch ends nearer to its own than to the other."""
    means, std, n = torch.tensor([[-1.5, 0.0], [1.0, 1.0]]), 0.6, 4000
    share = torch.tensor([0.3, 0.7])
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, generator=generator) < share[1]).long()
    rows = means[labels] + std * torch.randn(n, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd.ScoreModel(sd.networks.MLP((2,), width=64, depth=2, classes=2), SDE, "v")
    trained = sd.fit(
        model, rows, condition=labels, label_dropout=0.3, steps=900, batch_size=256, lr=4e-3, ema=0.99, warmup=20,
        seed=0, progress=False,
    )  # fmt: skip
    classes = [sd.exact.Gaussian(mean, std**2).model(SDE) for mean in means]
    everything = sd.exact.GaussianMixture(share, means, torch.full((2,), std**2)).model(SDE)
    for t in (0.2, 0.5, 0.8):
        noise = torch.randn(n, 2, generator=generator)
        xt = SDE.perturb(torch.tensor(t), rows, noise)
        exact = {0: classes[0], 1: classes[1], None: everything}
        for label, truth in exact.items():
            chosen = xt if label is None else xt[labels == label]
            condition = None if label is None else torch.full((len(chosen),), label)
            learned = trained.noise(t, chosen, condition=condition)
            error = (learned - truth.noise(t, chosen)).square().sum(1).mean().sqrt()
            # the exact scores of the other branches are at least three times as far away
            others = [
                (other.noise(t, chosen) - truth.noise(t, chosen)).square().sum(1).mean().sqrt()
                for key, other in exact.items()
                if key != label
            ]
            assert error < 0.08, (t, label)
            assert error < min(others) / 2, (t, label)
