r"""Features: the spaces in which images are compared, and the classifiers that they come from.

A distance between pixels is not one between pictures. Every metric of `sdediff.metrics` compares features as
well: `energy_distance(f(a), f(b))`. `frechet_distance` takes them by `features=` too: a function from samples to
vectors, an `nn.Module` such as torchmetrics takes, or an object with the method `features`. Here are two.

- `digits`: a small convolutional classifier of scikit-learn's digits, trained when it is asked for, in seconds. It sees
  clean digits only, moved by up to a pixel, and is no part of any model: it judges samples. Its `probs` give the
  accuracy of conditional samples and their inception score, its `features`, the layer before the logits, the Frechet
  distance.
- `Inception`: the network of the published FID numbers, with the weights of its TensorFlow original. Nothing is
  downloaded: the file of weights must be there.

References: Salimans et al. 2016 (arXiv:1606.03498), inception score; Heusel et al. 2017 (arXiv:1706.08500), Frechet
distance of its features; Szegedy et al. 2016 (arXiv:1512.00567), Inception-v3.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdediff import digits as data
from sdediff.draws import mix
from sdediff.errors import CheckpointError, ShapeError, optional_import
from sdediff.optimise import train
from sdediff.sets import Features as Features
from sdediff.sets import Rows
from sdediff.shapes import PerRow, State

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_DIGEST = "6726825d"


class DigitsClassifier(nn.Module):
    """A convolutional classifier of digits `(n, 1, 8, 8)` in [-1, 1]; `digits` returns a trained one.

    Attributes:
        accuracy: the share of its test digits that it labels right; NaN before training.
    """

    def __init__(self, channels: int = 16, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * channels), nn.SiLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.GroupNorm(8, 2 * channels), nn.SiLU(),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * channels, width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, 10)
        self.accuracy = float("nan")

    def forward(self, x: State) -> Float[Tensor, "n 10"]:
        """Logits, differentiable in x."""
        return self.head(self.body(x.to(self.head.weight.dtype)))

    @torch.no_grad()
    def features(self, x: State) -> Rows:
        """What the last layer sees, `(n, width)`, without gradients.

        Raises:
            ShapeError: x are no images of one channel and 8 x 8 pixels.
        """
        if x.shape[1:] != data.EVENT:
            raise ShapeError(f"The digits classifier sees images (n, 1, 8, 8) in [-1, 1]; got {tuple(x.shape)}.")
        dtype = self.head.weight.dtype
        return torch.cat([self.body(part.to(dtype)) for part in torch.split(x, 1024)])

    @torch.no_grad()
    def probs(self, x: State) -> Float[Tensor, "n 10"]:
        """The probability of each digit, float64, without gradients."""
        return self.head(self.features(x)).double().softmax(-1)


def digits(
    train_rows: int = 1500,
    seed: int = 0,
    *,
    steps: int = 600,
    folder: str | Path | None = None,
    progress: bool = False,
) -> DigitsClassifier:
    """The digits classifier, trained on the training rows of `sdediff.digits.digits(train_rows, seed)`.

    Args:
        train_rows: digits to train on; the others measure its `accuracy`.
        seed: of the split and of the training: the same classifier every time.
        steps: of the training, 64 digits each.
        folder: where to keep it, as a checkpoint of `sdediff.optimise.train`; a later call with the same arguments
            reads it from there. None keeps nothing.
        progress: whether to show a bar while training.

    Raises:
        OptionError: the split leaves a side empty, or steps < 1.
        CheckpointError: the folder holds a classifier of other arguments.
        MissingExtraError: scikit-learn is not installed.
    """
    codes, test_codes = data.digits(train_rows, seed)
    labels, test_labels = data.labels(train_rows, seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(mix(seed, 31) >> 2)
        classifier = DigitsClassifier()

    def loss(batch: Tensor, label: Tensor) -> PerRow:
        return F.cross_entropy(classifier(_moved(data.spread(batch))), label, reduction="none")

    train(
        classifier, loss, codes, condition=labels, steps=steps, batch_size=64, lr=3e-3, ema=0.99, warmup=50,
        seed=mix(seed, 32) >> 2, checkpoint=folder, checkpoint_every=steps, progress=progress,
    )  # fmt: skip
    test = data.Dequantized(test_codes, data.LEVELS).all(mix(seed, 33) >> 2)
    classifier.accuracy = (classifier.probs(test).argmax(-1) == test_labels).double().mean().item()
    return classifier.requires_grad_(False)


def _moved(x: State) -> State:
    """Each image moved by -1, 0 or 1 pixels along both sides, by torch's global generator; what comes in is empty."""
    n, _, height, width = x.shape
    down, right = torch.randint(0, 3, (2, n, 1))
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    return F.pad(x, (1, 1, 1, 1), value=-1.0)[torch.arange(n)[:, None, None, None], 0, rows, columns]


class Inception(nn.Module):
    """The Inception network of published FID and inception scores, by torch-fidelity (extra `fid`).

    Images `(n, 3, height, width)` in [-1, 1] are rounded to bytes, values beyond clipped as in a file of an image, and
    scaled to 299 x 299 as by the TensorFlow original. `frechet_distance(a, b, Inception())` is the FID, and
    `inception_score(Inception().probs(a), splits=10)` the published score.

    Args:
        weights: the file `weights-inception-2015-12-05-6726825d.pth`; None looks for it where torch.hub keeps files.

    Raises:
        CheckpointError: the file is not there, or not the published one.
        MissingExtraError: torch-fidelity is not installed.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = Path(torch.hub.get_dir(), "checkpoints", _INCEPTION) if weights is None else Path(weights)
        if not path.is_file():
            raise CheckpointError(
                f"There are no weights of the Inception network at {path}. Download "
                f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION} and put it there, or "
                "give its place with Inception(weights=...)."
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(_DIGEST):  # before it is unpickled, which runs what a forged file says
            raise CheckpointError(
                f"{path} is not the published file of weights: its SHA-256 begins with {found[:8]}, not {_DIGEST}. "
                "Download it anew."
            )
        source = optional_import("torch_fidelity.feature_extractor_inceptionv3", "fid")
        self.network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever `mode` says: in the other, features would depend on all images of a batch."""
        return super().train(False)

    def forward(self, x: State) -> tuple[Rows, Rows]:
        """The last pooled layer `(n, 2048)` and the logits without bias `(n, 1008)`, 64 images at a time.

        Raises:
            ShapeError: x are no images of three channels.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ShapeError(
                f"The Inception network sees images (n, 3, height, width) in [-1, 1]; got {tuple(x.shape)}. "
                "Images of one channel want x.expand(-1, 3, -1, -1)."
            )
        images = ((x.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        with torch.no_grad():
            parts = [self.network(part) for part in torch.split(images, 64)]
        pooled, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return pooled, logits

    def features(self, x: State) -> Rows:
        """The last pooled layer, `(n, 2048)`, without gradients."""
        return self(x)[0]

    def probs(self, x: State) -> Float[Tensor, "n 1008"]:
        """The probability of each class, float64, without gradients."""
        return self(x)[1].double().softmax(-1)
