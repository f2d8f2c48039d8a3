r"""A Brownian path as a fixed function of time, drawn only where it is asked.

The span is halved `depth` times. On an interval of width h, with x in [0, 1] the place within it, the path is its
expectation given what the wider intervals know plus `sqrt(h) phi(x) z`, with a standard normal z of its own:

- the root, which knows only where the path starts: `phi = x`;
- a halved interval, whose ends are known: `phi = min(x, 1 - x)`, as `W(h/2)` is the mean of the ends plus
  `sqrt(h) / 2 z` (Levy's construction);
- a leaf, whose ends are known and which is not halved: `phi = sqrt(x (1 - x))`, the deviation of the whole bridge.

With `phi` of the leaf, `W(t)` has variance `t` at every t, and `W(t)` and `W(s)` have covariance `min(t, s)` unless
they lie inside one leaf. So on every grid whose steps are no shorter than a leaf the law is that of Brownian motion,
without any error of interpolation.

`Area` does the same for the pair of `W(t)` and `I(t) = int_0^t W(u) du`, which is Markov and Gaussian. What an interval
knows is then its increment and its area; each has two numbers, and `sqrt(h) phi`, `h^{3/2} Phi` with `Phi = int phi`
are 2 by 2. An interval that t is not in adds nothing to `I(t)`, as the wider ones know its area.

References: Levy 1948; Foster, Lyons, Oberhauser 2020 (arXiv:1904.06998) for the pair.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdediff.draws import Blocks, generator_seed, mix

Floats = NDArray[np.float64]
_ENTRIES_PER_CALL = 1024


class Basis(ABC):
    """The functions phi on the unit interval: `(outputs, numbers)` of them, `(k,)` places x to the same of each."""

    size: int

    @abstractmethod
    def root(self, x: Floats) -> Floats:
        """Of an interval that knows only where the path starts."""

    @abstractmethod
    def node(self, x: Floats) -> Floats:
        """Of an interval that is halved."""

    @abstractmethod
    def leaf(self, x: Floats) -> Floats:
        """Of an interval that is not."""


class Increments(Basis):
    """W alone."""

    size = 1

    def root(self, x: Floats) -> Floats:
        return x[None, None]

    def node(self, x: Floats) -> Floats:
        return np.minimum(x, 1 - x)[None, None]

    def leaf(self, x: Floats) -> Floats:
        return np.sqrt(x * (1 - x))[None, None]


class Area(Basis):
    r"""W and its running integral.

    The root has `W(1) = z_1` and `int W = z_1 / 2 + z_2 / sqrt(12)`. The halves of an interval have the increments
    `+-z_1 / 4` and the areas (of W above its chord, over the width) `-z_1 / 8 +- z_2 / sqrt(48)`, with the mean of W
    given both a parabola. In a leaf, cut at x into parts of x and y = 1 - x, the deviations are those of the pair at x.
    """

    size = 2

    def root(self, x: Floats) -> Floats:
        root3 = math.sqrt(3)
        return np.array([[x, root3 * x * (1 - x)], [x**2 / 2, root3 * (x**2 / 2 - x**3 / 3)]])

    def node(self, x: Floats) -> Floats:
        side, y = np.where(x < 0.5, 1.0, -1.0), 2 * np.minimum(x, 1 - x)
        root3 = math.sqrt(3)
        return np.array(
            [
                [y * (3 * y - 2) / 4, side * root3 / 2 * y * (1 - y)],
                [side * y**2 * (y - 1) / 8, root3 / 4 * (y**2 / 2 - y**3 / 3)],
            ]
        )

    def leaf(self, x: Floats) -> Floats:
        y = 1 - x
        spread, both = np.sqrt(x**3 + y**3), x * y
        area = both**1.5 / spread
        return np.array([[np.sqrt(both) * spread, 0 * x], [(y - x) / 2 * area, area / math.sqrt(12)]])


class Tree:
    """The tree over a span of time: which numbers decide the path at a place x in [0, 1], and how much each weighs.

    Levels are drawn `together` at a time: a group is the subtree of that many levels below a node, and is drawn by one
    call of a generator. A leaf is the last level.

    Attributes:
        nodes: nodes in a group.
        groups: groups from the root to a leaf.
    """

    def __init__(self, basis: Basis, length: float, depth: int, together: int) -> None:
        self.basis = basis
        self.depth = depth
        self.together = together
        self.nodes = (1 << together) - 1
        self.groups = -(-(depth + 1) // together)
        levels = np.arange(depth + 1)
        within = (1 << levels % together) - 1
        self._shifts = depth - levels
        self._per_width = 2.0**levels
        self._rows = 1 + levels // together * self.nodes + within
        self._masks = within
        widths = length / self._per_width
        self._scales = np.stack([widths**0.5, widths**1.5][: basis.size])[:, None]

    def at(self, x: float) -> tuple[list[int], Tensor]:
        """The number of the group at each depth that matters, and the weights `(outputs, numbers)` up to there.

        Where x is an end of an interval, the levels below have no weight and are left out.
        """
        leaf = min(int(math.ldexp(x, self.depth)), (1 << self.depth) - 1)
        index = leaf >> self._shifts
        place = x * self._per_width - index
        groups = -(-np.count_nonzero(place % 1.0) // self.together)
        phi = self.basis.node(place)
        phi[..., -1:] = self.basis.leaf(place[-1:])
        phi *= self._scales
        weights = np.zeros((self.basis.size, 1 + self.groups * self.nodes, self.basis.size))
        weights[:, 0] = (self.basis.root(np.array([x])) * self._scales[..., :1])[..., 0]
        weights[:, self._rows + (index & self._masks)] = phi.swapaxes(1, 2)
        used = weights[:, : 1 + groups * self.nodes].reshape(self.basis.size, -1)
        return index[:: self.together].tolist()[:groups], torch.from_numpy(used)


class _Branch:
    """The numbers of one block of rows that decide the path where it was asked last; all others can be drawn again.

    The seeds of a block's groups are consecutive 32-bit numbers, so that no two groups share one. Numbers are drawn in
    float32, which is much faster, and added up in float64.
    """

    def __init__(self, tree: Tree, start: int, entries: int) -> None:
        self._together = tree.together
        self._start = start
        self._generator = torch.Generator()
        self._latest = [-1] * tree.groups
        self._numbers = torch.zeros((1 + tree.groups * tree.nodes) * tree.basis.size, entries, dtype=torch.float64)
        self._drawn = torch.empty(tree.nodes * tree.basis.size, entries, dtype=torch.float32)
        root, below = self._numbers.tensor_split([tree.basis.size])
        self._groups = below.view(tree.groups, -1, entries).unbind(0)
        self._generator.manual_seed(generator_seed(self._start, 0))
        root.copy_(torch.empty(root.shape, dtype=torch.float32).normal_(generator=self._generator))

    def value(self, groups: list[int], weights: Tensor) -> Tensor:
        """The outputs, `(outputs, entries)`."""
        first = 1
        for depth, group in enumerate(groups):
            if group != self._latest[depth]:
                self._generator.manual_seed(generator_seed(self._start, first + group))
                self._groups[depth].copy_(self._drawn.normal_(generator=self._generator))
                self._latest[depth] = group
            first += 1 << depth * self._together
        return weights @ self._numbers[: weights.shape[1]]


class Paths:
    """A path for every row of a batch, on the CPU and in float64."""

    def __init__(
        self, basis: Basis, length: float, depth: int, *, seed: int, shape: torch.Size, first_row: int
    ) -> None:
        self._blocks = Blocks.of(shape, first_row)
        entries = self._blocks.entries
        room = _ENTRIES_PER_CALL // max(entries * basis.size, 1)
        self._tree = Tree(basis, length, depth, max(1, (room + 1).bit_length() - 1))
        with torch.inference_mode(False):  # a stream may be asked inside and outside inference mode
            self._branches = [_Branch(self._tree, mix(seed, n), entries) for n in self._blocks.numbers]

    def at(self, x: float) -> Tensor:
        """The path at a place x in [0, 1] of the span, `(outputs, batch, *event)`."""
        groups, weights = self._tree.at(x)
        return self._blocks.rows_of(torch.stack([branch.value(groups, weights) for branch in self._branches]))
