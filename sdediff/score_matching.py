r"""Score matching from samples of a density alone: implicit, sliced, by finite differences.

The distance `1/2 E|s(x) - grad log p(x)|^2` cannot be computed, as the true score is not known. By parts, and up to a
constant that does not depend on s, it is

    implicit              E[ tr J + |s|^2 / 2 ],                                   J = ds/dx (Hyvarinen),
    sliced                E[ v^T J v + (v.s)^2 / 2 ],                              E[v v^T] = I,
    sliced, reduced       E[ v^T J v + |s|^2 / 2 ]                                 (SSM-VR),
    finite differences    E[ v.(s+ - s-) / (2 h) + (v.(s+ + s-) / 2)^2 / 2 ],      s+- = s(x +- h v),
    of an energy          E[ -(E+ - 2 E + E-) / h^2 + ((E+ - E-) / (2 h))^2 / 2 ], E+- = E(x +- h v), s = -grad E.

The first takes D products with the Jacobian, sliced ones take one for every projection v, and differences none: two
evaluations in place of a second derivative. They differ from sliced score matching by a term of order h^2 (each of the
two terms has an error that is even in h). With S = (J + J^T) / 2, `v^T J v` has the variance `2 |S|_F^2` for normal v,
`2 sum_(i != j) S_ij^2` for signs, and `2 D / (D + 2) (|S|_F^2 - tr(S)^2 / D)` on the sphere `|v|^2 = D`; the form with
`(v.s)^2` has the variance of `v^T (J + s s^T / 2) v`.

All take either

- a score, any callable `s(x)`, and samples x of its density: the value of a row is the expression above; or
- a `ScoreModel` and data x_0: levels are drawn and data is perturbed as in denoising score matching, and the value of a
  row is `2 w(t) sigma(t)^2 / D` times the expression above, for s the score at that level. In expectation it is then
  `losses.denoising` of the same weighting minus w(t): both have the same gradient. A single level is `t=`.

References: Hyvarinen 2005; Vincent 2011; Song, Garg, Shi and Ermon 2019 (arXiv:1905.07088), sliced; Pang et al. 2020
(arXiv:2007.03317), finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from sdediff.divergence import Divergence, Exact, Hutchinson
from sdediff.energy import Energy, one_a_row
from sdediff.errors import CapabilityError, OptionError, ShapeError
from sdediff.model import ScoreModel
from sdediff.shapes import PerRow, State, check_state, over, sum_rows
from sdediff.times import Law
from sdediff.weightings import NoiseLevels

Score = Callable[[State], State]


class Options(TypedDict, total=False):
    """For a `ScoreModel`, as in `losses.denoising`."""

    weighting: str
    t: Tensor | float | None
    times: Law | None
    noise: State | None
    condition: Any


def implicit(
    model: ScoreModel | Score, x: State, *, generator: torch.Generator | None = None, **options: Unpack[Options]
) -> PerRow:
    """Implicit score matching with the exact trace, one value a row, `(batch,)`.

    Args:
        model: a score `s(x)`, or a model.
        x: samples `(batch, *event)`; for a model, of the data.
        generator: of levels and noise, on the CPU.
        **options: for a model: weighting, t, times, noise, condition, as in `losses.denoising`.

    Raises:
        OptionError: an option that needs a model is given with a score.
        CapabilityError: the network has no second derivative.
    """
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        at = _At.of(model, x, generator, options)
        value, forms, _ = at.forms(Exact(), generator)
        return at.shared(forms[0] + sum_rows(value**2) / 2)


def sliced(
    model: ScoreModel | Score,
    x: State,
    *,
    projections: int = 1,
    distribution: str = "rademacher",
    variance_reduced: bool = True,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> PerRow:
    """Sliced score matching, one value a row, `(batch,)`: an unbiased estimate of `implicit`.

    Args:
        projections: vectors v for every row, >= 1.
        distribution: of v: "rademacher", "gaussian", "sphere" or "orthogonal"; see `sdediff.divergence`.
        variance_reduced: whether `|s|^2` is taken as it is (SSM-VR), not by projections.
        model, x, generator, options: as in `implicit`.

    Raises:
        OptionError, CapabilityError: as in `implicit`; or unknown distribution, or projections < 1.
    """
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        at = _At.of(model, x, generator, options)
        value, forms, vectors = at.forms(Hutchinson(projections, distribution), generator)
        size = sum_rows(value**2) if variance_reduced else _along(vectors, value).square().mean(0)
        return at.shared(forms.mean(0) + size / 2)


def finite_difference(
    model: ScoreModel | Score,
    x: State,
    *,
    step: float = 0.05,
    projections: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> PerRow:
    """Score matching by finite differences of the score, one value a row, `(batch,)`; two calls for every projection.

    Args:
        step: h; for a model, in units of sigma(t).
        projections, distribution: as in `sliced`.
        model, x, generator, options: as in `implicit`.

    Raises:
        OptionError: as in `sliced`; or step is not > 0.
    """
    at = _At.of(model, x, generator, options)
    length, sides = _sides(at, step, projections, distribution, generator)
    ahead, behind = (torch.stack([_along(v[None], at.score(x))[0] for v, x in side]) for side in sides)
    return at.shared(((ahead - behind) / (2 * length) + ((ahead + behind) / 2) ** 2 / 2).mean(0))


def energy_difference(
    energy: Energy | Callable[[State], PerRow],
    x: State,
    *,
    step: float = 0.05,
    projections: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> PerRow:
    """Score matching by finite differences of an energy, one value a row, `(batch,)`: no derivative in x at all.

    Args:
        energy: `E(x)`, `(batch,)`, of the density `exp(-E) / Z`; or an `Energy` without a time.
        x: samples of the density.
        step, projections, distribution, generator: as in `finite_difference`.

    Raises:
        OptionError: as in `finite_difference`.
        ShapeError: the energy is not `(batch,)`.
    """
    if isinstance(energy, Energy):
        energy = energy.network
    at = _At(lambda x: x, x, None, torch.ones((), dtype=torch.float64))
    length, sides = _sides(at, step, projections, distribution, generator)
    ahead, behind = (torch.stack([one_a_row(energy(x), x) for _, x in side]) for side in sides)
    curvature = (ahead - 2 * one_a_row(energy(x), x) + behind) / length**2
    return (-curvature + ((ahead - behind) / (2 * length)) ** 2 / 2).mean(0)


@dataclass(frozen=True, eq=False)
class _At:
    """A score around states, and the noise levels that they are at."""

    function: Score
    x: State
    levels: NoiseLevels | None
    unit: Tensor

    @classmethod
    def of(cls, model: ScoreModel | Score, x: State, generator: torch.Generator | None, options: Options) -> _At:
        check_state(x)
        unknown = sorted(set(options) - set(Options.__annotations__))
        if unknown:
            raise OptionError(
                f"Unknown option {', '.join(map(repr, unknown))}: score matching of a model takes "
                f"{', '.join(Options.__annotations__)}."
            )
        x = _usable(x)
        if not isinstance(model, ScoreModel):
            if options:
                raise OptionError(
                    f"{', '.join(options)}: a score s(x) has no noise levels. Leave it out, or give a ScoreModel."
                )
            if not callable(model):
                raise OptionError(f"Score matching needs a score s(x) or a ScoreModel; got {type(model).__name__}.")
            return cls(model, x, None, torch.ones((), dtype=torch.float64))
        rest: dict[str, Any] = {"weighting": "simple"} | {name: _usable(value) for name, value in options.items()}
        condition = rest.pop("condition", None)
        levels = NoiseLevels.draw(model, x, generator=generator, **rest)
        t = levels.t
        return cls(
            lambda x: model.score(t, x, condition=condition),
            model.linear.perturb(t, x, levels.noise),
            levels,
            model.linear.sigma(t),
        )

    def score(self, x: State) -> State:
        """The score at states around x.

        Raises:
            ShapeError: it is not shaped as x.
        """
        value = self.function(x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"The score must be shaped as x, {tuple(x.shape)}; got {got}.")
        return value

    def forms(self, divergence: Divergence, generator: torch.Generator | None) -> tuple[State, Tensor, Tensor]:
        """The score, the forms `v^T J v`, `(k, batch)`, and the vectors v, `(k, batch, *event)`."""

        def field(x: State) -> tuple[State, Tensor]:
            value = self.score(x)
            return value, value

        vectors = _vectors(divergence, self.x, generator)
        try:
            expansion = divergence.expand(field, self.x)
            return expansion.value, divergence.estimate(expansion, vectors), vectors
        except CapabilityError as error:
            raise CapabilityError(
                "Implicit and sliced score matching take the second derivative of the network, which has none: replace "
                "the operation that lacks it, or use finite_difference or denoising."
            ) from error

    def shared(self, losses: PerRow) -> PerRow:
        """The losses in the units of the levels, and in their shares."""
        if self.levels is None:
            return losses
        scale = 2 * self.levels.weight * self.unit**2 / math.prod(self.x.shape[1:])
        return self.levels.shared(losses * scale.to(losses))


def _usable(value: Any) -> Any:
    """The value, copied if it was made in inference mode, where gradients cannot be taken of what is made of it."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _vectors(divergence: Divergence, x: State, generator: torch.Generator | None) -> Tensor:
    """Directions `(k, batch, *event)`."""
    seed = int(torch.randint(1 << 62, (), generator=generator)) if divergence.random else 0
    rows = np.arange(len(x))
    return divergence.draw(x, seed, rows, np.zeros_like(rows))


def _along(vectors: Tensor, value: State) -> Tensor:
    """`v.s`, `(k, batch)`."""
    return (vectors * value).reshape(*vectors.shape[:2], -1).sum(2)


def _sides(
    at: _At, step: float, projections: int, distribution: str, generator: torch.Generator | None
) -> tuple[Tensor, tuple[list[tuple[State, State]], list[tuple[State, State]]]]:
    """The length h of every row, and pairs of v and `x + h v`, then of v and `x - h v`."""
    if not step > 0:
        raise OptionError(f"Finite differences need step > 0; got {step}.")
    length = step * at.unit
    moves = over(length, at.x)
    vectors = _vectors(Hutchinson(projections, distribution), at.x, generator)
    sides = [(v, at.x + moves * v) for v in vectors], [(v, at.x - moves * v) for v in vectors]
    return length.to(at.x), sides
