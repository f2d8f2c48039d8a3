r"""A small network for vectors: a residual perceptron with Fourier features of the time.

Images want a U-Net: `UNet` wraps the one of diffusers (extra `diffusers`). Any callable `network(x, t)` serves as well.

References: Tancik et al. 2020 (arXiv:2006.10739), Fourier features; He et al. 2016, residual blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdediff.errors import ShapeError, optional_import
from sdediff.shapes import State


class FourierTime(nn.Module):
    """`[cos(2 pi f t), sin(2 pi f t)]` at fixed frequencies f from 1/4 to `max_frequency`, geometric."""

    def __init__(self, features: int = 32, max_frequency: float = 32.0) -> None:
        super().__init__()
        self.frequencies: Tensor
        frequencies = torch.logspace(math.log10(0.25), math.log10(max_frequency), features // 2)
        self.register_buffer("frequencies", frequencies)

    def forward(self, t: Tensor) -> Tensor:
        """`(batch,)` to `(batch, features)`."""
        angle = 2 * math.pi * t[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.time = nn.Linear(width, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        inner = self.first(self.norm(h)) + self.time(time)
        return h + self.second(nn.functional.silu(inner))


class MLP(nn.Module):
    """Residual perceptron `network(x, t)` for events of any shape, flattened.

    Args:
        event: event shape, such as `(2,)`.
        width: hidden units.
        depth: residual blocks.
        classes: number of classes for a condition of labels `(batch,)`; None for no condition.
    """

    def __init__(self, event: Sequence[int], width: int = 128, depth: int = 3, classes: int | None = None) -> None:
        super().__init__()
        self.config = {"event": list(event), "width": width, "depth": depth, "classes": classes}
        size = math.prod(event)
        self.event = tuple(event)
        self.time = nn.Sequential(FourierTime(32), nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.label = nn.Embedding(classes, width) if classes else None
        self.read = nn.Linear(size, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.write = nn.Linear(width, size)

    def forward(self, x: State, t: Tensor, condition: Tensor | None = None) -> State:
        """Shaped as x."""
        if tuple(x.shape[1:]) != self.event:
            raise ShapeError(f"This MLP was made for events of shape {self.event}; got {tuple(x.shape[1:])}.")
        time = self.time(t)
        if condition is not None:
            if self.label is None:
                raise ShapeError("This MLP has no condition: build it with MLP(..., classes=...).")
            time = time + self.label(condition)
        h = self.read(x.flatten(1))
        for block in self.blocks:
            h = block(h, time)
        return self.write(nn.functional.silu(h)).reshape(x.shape)


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
