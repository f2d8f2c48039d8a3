r"""Small networks for vectors: residual perceptrons, one that sees the time in Fourier features, one for VAEs.

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
from typing import Any

import torch
from torch import Tensor, nn

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
    """A residual block whose normalised input is scaled and shifted by the time; it starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time).chunk(2, dim=1)
        return h + self.second(nn.functional.silu(self.first(self.norm(h) * (1 + scale) + shift)))


class MLP(nn.Module):
    """Residual perceptron `network(x, t)` for events of any shape, flattened.

    Args:
        event: event shape, such as `(2,)`.
        width: hidden units.
        depth: residual blocks.
        classes: number of classes for a condition of labels `(batch,)`; None for no condition.
        heads: outputs, each shaped as x, stacked on axis 1; see `TwoHeads`.
    """

    def __init__(
        self, event: Sequence[int], width: int = 128, depth: int = 3, classes: int | None = None, heads: int = 1
    ) -> None:
        super().__init__()
        if heads < 1 or (heads > 1 and not len(event)):
            raise ShapeError(f"MLP stacks heads >= 1 outputs on axis 1; got heads = {heads}, event = {tuple(event)}.")
        self.config = {"event": list(event), "width": width, "depth": depth, "classes": classes, "heads": heads}
        self.heads = heads
        size = math.prod(event)
        self.event = tuple(event)
        self.time = nn.Sequential(FourierTime(32), nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.label = nn.Embedding(classes, width) if classes else None
        self.read = nn.Linear(size, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.write = nn.Linear(width, heads * size)

    def forward(self, x: State, t: Tensor, condition: Tensor | None = None) -> State:
        """Shaped as x, but for `heads` times the channels on axis 1."""
        if tuple(x.shape[1:]) != self.event:
            raise ShapeError(f"This MLP was made for events of shape {self.event}; got {tuple(x.shape[1:])}.")
        time = self.time(t)
        if condition is not None:
            if self.label is None:
                raise ShapeError("This MLP has no condition: build it with MLP(..., classes=...).")
            if not isinstance(condition, Tensor) or condition.shape != x.shape[:1]:
                got = tuple(condition.shape) if isinstance(condition, Tensor) else repr(condition)
                raise ShapeError(f"This MLP takes one label a row as its condition, shape ({len(x)},); got {got}.")
            time = time + self.label(condition)
        h = self.read(x.reshape(len(x), -1))
        for block in self.blocks:
            h = block(h, time)
        shape = (len(x), *self.event) if self.heads == 1 else (len(x), self.heads * self.event[0], *self.event[1:])
        return self.write(nn.functional.silu(h)).reshape(shape)


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
    """

    def __init__(self, *, time_scale: float = 1000.0, **config: Any) -> None:
        super().__init__()
        self.config = {"time_scale": time_scale, **config}
        self.time_scale = time_scale
        self.unet = optional_import("diffusers", "diffusers").UNet2DModel(**config)

    def forward(self, x: State, t: Tensor, condition: Tensor | None = None) -> State:
        """Shaped as x."""
        return self.unet(x, t * self.time_scale, class_labels=condition).sample


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
