r"""Small networks for vectors: residual perceptrons, one that sees the time in Fourier features, one for VAEs.

`ClassifierMLP` and `ClassifierCNN` give logits of noised vectors and images (`sdediff.classifier`).
Images want a U-Net: `UNet` wraps the one of diffusers (extra `diffusers`). Any callable `network(x, t)` serves as well.
`FourierFeatures` shows any of them the fine detail of its input, which tells neighbouring codes of discrete data apart.
`TwoHeads` splits the output of one with twice the channels into a prediction and a variance (`sdediff.iddpm`).

References: Tancik et al. 2020 (arXiv:2006.10739), Fourier features; Kingma et al. 2021 (arXiv:2107.00630), of the
input; Peebles and Xie 2023 (arXiv:2212.09748), residual blocks with adaptive normalisation that start as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sdediff.conditions import labels_of
from sdediff.errors import OptionError, ShapeError, optional_import
from sdediff.shapes import State


class FourierTime(nn.Module):
    """`[cos(2 pi f u), sin(2 pi f u)]` with `u = log(t + offset)`, at geometric frequencies from 1/32 to 2.

    The logarithm gives small and large noise levels equal room, for clocks that end at 1 as for those that end at 80.
    """

    def __init__(self, features: int = 32, offset: float = 1e-3) -> None:
        super().__init__()
        self.offset = offset
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(math.log10(1 / 32), math.log10(2), features // 2))

    def forward(self, t: Tensor) -> Tensor:
        """`(batch,)` to `(batch, features)`.

        Raises:
            OptionError: a negative time (told on the CPU only, where it costs nothing to look).
        """
        if t.is_cpu and bool((t < 0).any()):
            raise OptionError(
                f"FourierTime takes the logarithm of the time, which must not be negative; got {t.min():g}. (A model "
                "with prediction='edm' shows its network log(sigma / alpha) / 4. For this one write "
                "ScoreModel(..., time=sde.sigma).)"
            )
        angle = 2 * math.pi * (t + self.offset).log()[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class _Block(nn.Module):
    """A residual block whose normalised input is scaled and shifted by the time; it starts as the identity.

    Args:
        norm: of the input, vectors or images of so many channels as the width.
        layer: makes a layer that keeps the width.
        width: entries of a vector, or channels.
        features: of the time.
    """

    def __init__(self, norm: nn.Module, layer: Callable[[], nn.Linear | nn.Conv2d], width: int, features: int) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = nn.Linear(features, 2 * width)
        self.first, self.second = layer(), layer()
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        laid = self.modulation(time).reshape(len(h), -1, *[1] * (h.ndim - 2))
        scale, shift = laid.chunk(2, dim=1)
        return h + self.second(nn.functional.silu(self.first(self.norm(h) * (1 + scale) + shift)))


class _Perceptron(nn.Module):
    """What a residual perceptron is made of: flat events read, blocks that see the time, outputs written."""

    def __init__(self, event: Sequence[int], outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.event = tuple(event)
        self.time = nn.Sequential(FourierTime(32), nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.read = nn.Linear(math.prod(event), width)
        self.blocks = nn.ModuleList(
            _Block(nn.LayerNorm(width, elementwise_affine=False), partial(nn.Linear, width, width), width, width)
            for _ in range(depth)
        )
        self.write = nn.Linear(width, outputs)

    def outputs(self, x: State, t: Tensor, label: Tensor | None = None) -> Tensor:
        """`(batch, outputs)`; features of a label, if there are some, are added to those of time."""
        if tuple(x.shape[1:]) != self.event:
            kind = type(self).__name__
            raise ShapeError(f"This {kind} was made for events of shape {self.event}; got {tuple(x.shape[1:])}.")
        time = self.time(t) if label is None else self.time(t) + label
        h = self.read(x.reshape(len(x), -1))
        for block in self.blocks:
            h = block(h, time)
        return self.write(nn.functional.silu(h))


class MLP(_Perceptron):
    """Residual perceptron `network(x, t)` for events of any shape, flattened.

    Args:
        event: event shape, such as `(2,)`.
        width: hidden units.
        depth: residual blocks.
        classes: number K of classes for a condition of labels `(batch,)` in 0, ..., K - 1, or the null label K, which
            is also what a call without a condition means; None for no condition.
        heads: outputs, each shaped as x, stacked on axis 1; see `TwoHeads`.

    Attributes:
        null: the null label K; None without classes.
    """

    def __init__(
        self, event: Sequence[int], width: int = 128, depth: int = 3, classes: int | None = None, heads: int = 1
    ) -> None:
        if heads < 1 or (heads > 1 and not len(event)):
            raise ShapeError(f"MLP stacks heads >= 1 outputs on axis 1; got heads = {heads}, event = {tuple(event)}.")
        super().__init__(event, heads * math.prod(event), width, depth)
        self.config = {"event": list(event), "width": width, "depth": depth, "classes": classes, "heads": heads}
        self.heads = heads
        self.null = _null(classes, "MLP")
        self.label = None if self.null is None else nn.Embedding(self.null + 1, width)

    def forward(self, x: State, t: Tensor, condition: Tensor | None = None) -> State:
        """Shaped as x, but for `heads` times the channels on axis 1.

        Raises:
            ShapeError: x is no event of this network, or the condition is not one whole number a row.
            OptionError: a label out of range (told on the CPU only).
        """
        label = None
        if self.label is not None:
            label = self.label(_labels(condition, x, self.label.num_embeddings - 1, "This MLP"))
        elif condition is not None:
            raise ShapeError("This MLP has no condition: build it with MLP(..., classes=...).")
        shape = (len(x), *self.event) if self.heads == 1 else (len(x), self.heads * self.event[0], *self.event[1:])
        return self.outputs(x, t, label).reshape(shape)


class ClassifierMLP(_Perceptron):
    """Residual perceptron `network(x, t) -> (batch, classes)`, the logits of a `Classifier` of vectors.

    Args:
        event: event shape, such as `(2,)`.
        classes: number of classes.
        width: hidden units.
        depth: residual blocks.
    """

    def __init__(self, event: Sequence[int], classes: int, width: int = 128, depth: int = 2) -> None:
        super().__init__(event, classes, width, depth)
        self.config = {"event": list(event), "classes": classes, "width": width, "depth": depth}

    def forward(self, x: State, t: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        return self.outputs(x, t)


class ClassifierCNN(nn.Module):
    """Convolutional network `network(x, t) -> (batch, classes)`, the logits of a `Classifier` of small images.

    Every resolution has a residual block; from one to the next, height and width are halved.

    Args:
        event: event shape `(colours, height, width)`.
        classes: number of classes.
        channels: at each resolution; height and width must be multiples of `2 ** (len(channels) - 1)`.
    """

    def __init__(self, event: Sequence[int], classes: int, channels: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        halvings = len(channels) - 1
        if len(event) != 3 or halvings < 0 or any(side % 2**halvings for side in event[1:]):
            raise ShapeError(
                "ClassifierCNN is for images (colours, height, width) whose sides can be halved between all channels; "
                f"got event = {tuple(event)}, channels = {tuple(channels)}."
            )
        self.config = {"event": list(event), "classes": classes, "channels": list(channels)}
        self.event = tuple(event)
        features = 4 * channels[0]
        self.time = nn.Sequential(FourierTime(32), nn.Linear(32, features), nn.SiLU())
        widths = [event[0], *channels]
        self.reads = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, stride=1 if k == 0 else 2)
            for k, (before, after) in enumerate(pairwise(widths))
        )
        self.blocks = nn.ModuleList(
            _Block(
                nn.GroupNorm(1, width, affine=False), partial(nn.Conv2d, width, width, 3, padding=1), width, features
            )
            for width in channels
        )
        self.write = nn.Linear(channels[-1] * event[1] * event[2] // 4**halvings, classes)

    def forward(self, x: State, t: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        if tuple(x.shape[1:]) != self.event:
            raise ShapeError(f"This ClassifierCNN was made for events of shape {self.event}; got {tuple(x.shape[1:])}.")
        h, time = x, self.time(t)
        for read, block in zip(self.reads, self.blocks, strict=True):
            h = block(read(h), time)
        return self.write(nn.functional.silu(h).flatten(1))


def _null(classes: int | None, owner: str) -> int | None:
    """The null label of so many classes."""
    if classes is not None and classes < 1:
        raise OptionError(f"{owner} needs classes >= 1, or None for a network without a condition; got {classes}.")
    return classes


def _labels(condition: Tensor | None, x: State, null: int, owner: str) -> Tensor:
    """The labels of the rows, the null label if there is no condition."""
    if condition is None:
        return torch.full((len(x),), null, device=x.device)
    return labels_of(condition, len(x), null, owner, null=True)


def _event(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


class GaussianMLP(nn.Module):
    """Residual perceptron `network(x) -> (mean, std)`, a conditional of a VAE; it starts as the standard normal.

    Args:
        inputs: shape of an event of x, `(8,)` or 8.
        outputs: shape of an event of mean and std.
        width: hidden units.
        depth: residual blocks.
    """

    def __init__(
        self, inputs: int | Sequence[int], outputs: int | Sequence[int], width: int = 128, depth: int = 1
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _event(inputs), _event(outputs)
        self.config = {"inputs": list(self.inputs), "outputs": list(self.outputs), "width": width, "depth": depth}
        self.read = nn.Linear(math.prod(self.inputs), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.write = nn.Linear(width, 2 * math.prod(self.outputs))
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, x: State) -> tuple[State, State]:
        """Mean and std, `(batch, *outputs)`."""
        if tuple(x.shape[1:]) != self.inputs:
            raise ShapeError(f"This GaussianMLP was made for events of shape {self.inputs}; got {tuple(x.shape[1:])}.")
        h = self.read(x.reshape(len(x), -1))
        for block in self.blocks:
            h = h + block(h)
        mean, log_std = self.write(nn.functional.silu(h)).reshape(len(x), 2, *self.outputs).unbind(1)
        return mean, log_std.exp()


class UNet(nn.Module):
    """The U-Net of diffusers (`UNet2DModel`) as `network(x, t)`; needs the extra `diffusers`.

    Args:
        config: arguments of `diffusers.UNet2DModel`.
        time_scale: the U-Net's time embedding is made for steps up to 1000; t is multiplied by this.
        classes: number K of classes, as in `MLP`; it stands for `num_class_embeds=K + 1`.

    Attributes:
        null: the null label K; None without classes.
    """

    def __init__(self, *, time_scale: float = 1000.0, classes: int | None = None, **config: Any) -> None:
        super().__init__()
        self.config = {"time_scale": time_scale, "classes": classes, **config}
        self.time_scale = time_scale
        self.null = _null(classes, "UNet")
        if self.null is not None:
            if "num_class_embeds" in config:
                raise OptionError(
                    f"classes={classes} makes num_class_embeds={self.null + 1}, the classes and the null label; leave "
                    f"num_class_embeds={config['num_class_embeds']} out."
                )
            config["num_class_embeds"] = self.null + 1
        self.unet = optional_import("diffusers", "diffusers").UNet2DModel(**config)

    def forward(self, x: State, t: Tensor, condition: Tensor | None = None) -> State:
        """Shaped as x.

        Raises:
            ShapeError, OptionError: as in `MLP`, for a network with classes.
        """
        labels = condition if self.null is None else _labels(condition, x, self.null, "This UNet")
        return self.unet(x, t * self.time_scale, class_labels=labels).sample


class FourierFeatures(nn.Module):
    """A network that sees, beside x, `sin(pi f x)` and `cos(pi f x)` as further channels: `network(x, t)` as before.

    With C channels and F frequencies the network inside is given `C (1 + 2 F)` channels (entries, for vectors), and the
    first C channels of what it returns are the output. For codes at the centres of bins of width w, frequencies
    `1 / w` and `2 / w` repeat after two bins and after one: for 256 levels in [-1, 1], the 2^7 and 2^8 of VDM; for 17
    levels, 8.5 and 17.

    Args:
        network: `network(x, t)` or `network(x, t, condition)` that takes so many channels.
        frequencies: positive, in half-cycles per unit of x.

    Raises:
        OptionError: no frequencies, or one that is not positive.
    """

    def __init__(self, network: nn.Module, frequencies: Sequence[float] = (128.0, 256.0)) -> None:
        super().__init__()
        if not frequencies or not all(0 < f < math.inf for f in frequencies):
            raise OptionError(f"FourierFeatures needs positive frequencies; got {tuple(frequencies)}.")
        self.config = {"network": network, "frequencies": list(map(float, frequencies))}
        self.network = network
        self.null = getattr(network, "null", None)
        self.frequencies = tuple(map(float, frequencies))

    def forward(self, x: State, t: Tensor, *condition: Any) -> State:
        """Shaped as x."""
        if x.ndim < 2:
            raise ShapeError(
                "FourierFeatures adds channels on axis 1, which events of shape () do not have; write x[:, None], "
                "events of shape (1,)."
            )
        waves = [wave(math.pi * f * x) for f in self.frequencies for wave in (torch.sin, torch.cos)]
        return self.network(torch.cat([x, *waves], dim=1), t, *condition)[:, : x.shape[1]]


HEARD: ContextVar[list[State] | None] = ContextVar("variance outputs of the call that is being made", default=None)
"""Where a `TwoHeads` that is called leaves its second output, if somebody listens; of this thread alone."""


class TwoHeads(nn.Module):
    """A network of 2 C channels on axis 1 as one of C: the first half is its prediction, the second sets the variance.

    Args:
        network: `network(x, t)` or `network(x, t, condition)`, from `(batch, C, *rest)` to `(batch, 2 C, *rest)`, such
            as `MLP(event, heads=2)`.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.config = {"network": network}
        self.network = network
        self.keeps_time = getattr(network, "keeps_time", False)
        self.null = getattr(network, "null", None)

    def forward(self, x: State, t: Tensor, *condition: Any) -> State:
        """The prediction, shaped as x.

        Raises:
            ShapeError: the network's output has not twice the channels of x.
        """
        output = self.network(x, t, *condition)
        if x.ndim < 2:
            raise ShapeError(f"TwoHeads stacks its outputs on axis 1, which events of shape () lack; got {x.shape}.")
        needed = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if not isinstance(output, Tensor) or tuple(output.shape) != needed:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(
                f"TwoHeads needs a network with two outputs stacked on axis 1, prediction and variance: {needed} for x "
                f"of shape {tuple(x.shape)}; it returned {got}."
            )
        prediction, variance = output.chunk(2, dim=1)
        heard = HEARD.get()
        if heard is not None:
            heard.append(variance)
        return prediction
