"""The judge of digits, the digits themselves, and the Inception network where it is and where it is not."""

import hashlib
import sys
import types

import pytest
import torch

from sdediff import CheckpointError, MissingExtraError, OptionError, ShapeError, digits, features, metrics

QUICK = {"train_rows": 600, "steps": 40}


def images(n, seed=0):
    return 2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.fixture(scope="module")
def judge():
    return features.digits()


@pytest.fixture(scope="module")
def quick():
    return features.digits(**QUICK)


# The digits


def test_the_digits_split_by_rows_and_seed():
    train, test = digits.digits(1000, 3)
    train_labels, test_labels = digits.labels(1000, 3)
    assert train.shape == (1000, *digits.EVENT)
    assert test.shape == (797, *digits.EVENT)
    assert (train_labels.shape, test_labels.shape) == ((1000,), (797,))
    assert (train.min(), train.max()) == (0, digits.LEVELS - 1)
    assert torch.equal(torch.cat([train_labels, test_labels]).unique(), torch.arange(10))
    assert torch.equal(digits.digits(1000, 3)[1], test)
    assert not torch.equal(digits.digits(1000, 4)[1], test)


def test_labels_belong_to_their_digits():
    """Each image with its label is found among scikit-learn's."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    known = {tuple(image.ravel()): target for image, target in zip(bunch.images, bunch.target, strict=True)}
    for codes, labels in zip(digits.digits(1500, 7), digits.labels(1500, 7), strict=True):
        assert all(known[tuple(c.flatten().tolist())] == y for c, y in zip(codes, labels.tolist(), strict=True))


def test_codes_are_spread_over_their_bins():
    codes = torch.arange(17).repeat(1000)
    x = digits.spread(codes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(((x.double() + 1) * 17 / 2).floor().long(), codes)
    # uniform: mean 1/2 and variance 1/12 of a bin, four standard errors
    place = (x.double() + 1) * 17 / 2 - codes
    assert abs(place.mean() - 0.5) < 4 * (1 / 12 / 17000) ** 0.5
    assert abs(place.var() - 1 / 12) < 4 * (1 / 180 / 17000) ** 0.5


@pytest.mark.parametrize("rows", [0, 1797, -3])
def test_a_split_with_an_empty_side_is_refused(rows):
    for load in (digits.digits, digits.labels, features.digits):
        with pytest.raises(OptionError, match=rf"1797 digits.*1 to 1796; got {rows}"):
            load(rows, 0)


# The judge


def test_the_judge_knows_digits_it_has_not_seen(judge):
    assert judge.accuracy >= 0.97
    codes, labels = digits.digits(1500, 0)[1], digits.labels(1500, 0)[1]
    x = digits.spread(codes, generator=torch.Generator().manual_seed(5))
    right = (judge.probs(x).argmax(-1) == labels).double().mean().item()
    # the same digits with other noise in their bins
    assert right == pytest.approx(judge.accuracy, abs=0.015)


def test_features_see_what_the_digits_are(judge):
    """Digits moved by a pixel are digits, sevens alone are not: both change pixels, and features less and more."""
    codes, labels = digits.digits(1500, 0)[0], digits.labels(1500, 0)[0]
    x = digits.spread(codes, generator=torch.Generator().manual_seed(5))
    moved, sevens = torch.roll(x[750:], 1, dims=2), x[750:][labels[750:] == 7]
    by_features, by_pixels = (
        metrics.frechet_distance(moved, x[:750], space) / metrics.frechet_distance(sevens, x[:750], space)
        for space in (judge, None)
    )
    assert by_features < 0.5 * by_pixels
    assert metrics.inception_score(judge.probs(x)) > 9
    assert metrics.inception_score(judge.probs(sevens)) < 1.5


def test_probabilities_come_from_the_features_by_the_last_layer(quick):
    x = images(2000)
    rows = quick.features(x)
    assert rows.shape == (2000, 64)
    torch.testing.assert_close(quick.probs(x), quick.head(rows).double().softmax(-1))
    torch.testing.assert_close(quick(x[:5]).double().softmax(-1), quick.probs(x[:5]))
    torch.testing.assert_close(quick.probs(x).sum(-1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(quick.features(x[1500:1503]), rows[1500:1503])
    assert quick.features(x[:0]).shape == (0, 64)
    assert quick.probs(x[:5].double()).dtype == torch.float64


def test_the_logits_are_differentiable_in_x_and_the_weights_are_fixed(quick):
    x = images(3).requires_grad_()
    quick(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in quick.parameters())
    assert not quick.training
    assert not quick.features(x).requires_grad


def test_rows_and_seed_make_the_judge(quick):
    state = torch.get_rng_state()
    again, other = features.digits(**QUICK), features.digits(**QUICK, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.accuracy == quick.accuracy
    assert torch.equal(again.features(images(4)), quick.features(images(4)))
    assert not torch.equal(other.features(images(4)), quick.features(images(4)))


def test_a_folder_keeps_the_judge(quick, tmp_path, monkeypatch):
    first = features.digits(**QUICK, folder=tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(features.DigitsClassifier, "forward", None)  # no step is taken again
    again = features.digits(**QUICK, folder=tmp_path)
    for judge in (first, again):
        assert torch.equal(judge.features(images(4)), quick.features(images(4)))
        assert judge.accuracy == quick.accuracy
    with pytest.raises(CheckpointError):
        features.digits(500, steps=40, folder=tmp_path)


def test_training_images_move_by_a_pixel_at_most():
    """Each image is one of the nine it may be, with -1 where nothing was, and all nine come up."""
    x = images(500, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = features._moved(x)
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    nine = torch.stack([wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    which = (nine == moved).flatten(2).all(-1)
    assert (which.sum(0) == 1).all()
    # binomial of 500 with 1/9
    assert (which.sum(1) - 500 / 9).abs().max() < 4 * (500 * 8 / 81) ** 0.5


def test_images_of_another_size_are_refused(quick):
    for call in (quick.features, quick.probs):
        with pytest.raises(ShapeError, match=r"\(n, 1, 8, 8\) in \[-1, 1\]; got \(3, 8, 8\)"):
            call(torch.zeros(3, 8, 8))


def test_the_judge_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"'sklearn'.*sdediff\[demo\]"):
        features.digits(**QUICK)


# Inception


def test_weights_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    said = r"no weights .* at .*{}.* Download https://github.com/toshas/torch-fidelity/.*Inception\(weights=\.\.\.\)"
    with pytest.raises(CheckpointError, match=said.format("nothing.pth")):
        features.Inception(tmp_path / "nothing.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=said.format("checkpoints/weights-inception-2015-12-05-6726825d.pth")):
        features.Inception()


def test_other_weights_are_refused_unread(tmp_path):
    """They would be unpickled, which runs whatever code a file brings."""
    file = tmp_path / "weights.pth"
    file.write_bytes(b"something else")
    begins = hashlib.sha256(b"something else").hexdigest()[:8]
    with pytest.raises(CheckpointError, match=f"not the published file .* begins with {begins}, not 6726825d"):
        features.Inception(file)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"trusted")
    monkeypatch.setattr(features, "_DIGEST", hashlib.sha256(b"trusted").hexdigest()[:8])
    return file


def test_inception_needs_torch_fidelity(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"'torch_fidelity'.*sdediff\[fid\]"):
        features.Inception(weights)


class Standin(torch.nn.Module):
    """In place of torch-fidelity's network: bytes as features, and their means as logits."""

    def __init__(self, name, features_list, path):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.path, self.batches = path, []

    def forward(self, x):
        assert x.dtype == torch.uint8
        self.batches.append(len(x))
        return x.flatten(1).float(), x.float().mean((2, 3)) / 255


@pytest.fixture
def inception(weights, monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Standin
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return features.Inception(weights)


def test_images_become_bytes_and_come_in_batches(inception, weights):
    codes = torch.arange(256).repeat(100)[: 70 * 3 * 16].reshape(70, 3, 4, 4)
    x = codes.double() / 127.5 - 1
    assert torch.equal(inception.features(x).long(), codes.flatten(1))
    assert inception.network.batches == [64, 6]
    assert inception.network.path == str(weights)
    x = torch.tensor([-2.0, -1.0, -0.998, 0.0, 0.9999, 3.0])[:, None, None, None].expand(-1, 3, 2, 2)
    assert inception.features(x)[:, 0].tolist() == [0, 0, 0, 128, 255, 255]
    torch.testing.assert_close(inception.probs(x), torch.full((6, 3), 1 / 3, dtype=torch.float64))
    assert metrics.inception_score(inception.probs(x)) == pytest.approx(1)
    assert metrics.frechet_distance(x, x, inception) == pytest.approx(0, abs=1e-9)


def test_the_inception_network_stays_in_evaluation_mode(inception):
    """Its batch norms would otherwise mix the images of a batch."""
    for moved in (lambda: inception, inception.train, lambda: torch.nn.Sequential(inception).train()[0]):
        module = moved()
        assert not module.training
        assert not module.network.training


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
def test_images_without_three_channels_are_refused(inception, shape):
    with pytest.raises(ShapeError) as caught:
        inception.features(torch.zeros(shape))
    assert str(shape) in str(caught.value)
    assert "x.expand(-1, 3, -1, -1)" in str(caught.value)
