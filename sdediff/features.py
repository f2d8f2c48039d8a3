r"""Features: the spaces in which images are compared, and the classifiers that they come from.

A distance between pixels is not one between pictures. The metrics of `sdediff.metrics` therefore take `features=`: a
function from samples to vectors, or an object with such a function as its method `features`. Here are two.

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

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdediff import digits as data
from sdediff.draws import mix
from sdediff.errors import ShapeError
from sdediff.optimise import train
from sdediff.sets import Features as Features
from sdediff.sets import Rows
from sdediff.shapes import PerRow, State


class DigitsClassifier(nn.Module):
    """A convolutional classifier of digits `(n, 1, 8, 8)` in [-1, 1]; `digits` returns a trained one.

    Attributes:
        accuracy: the share of its test digits that it labels right; NaN before training.
    """

    def __init__(self, channels: int = 32, width: int = 64) -> None:
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
    steps: int = 800,
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
