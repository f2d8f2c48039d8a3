r"""Replacement: what a measurement says of the state is put in its place after every step of a solver.

If `y = A x_0` then `A x_t = alpha y + sigma A eps`. So at every time the part of the state that A sees can be drawn
anew, from y and fresh noise, and the part that it does not see is left to the model:

    x <- x + A^+ (alpha y + sigma A z - A x),        z ~ N(0, I).

For a mask this puts noised pixels of y in place of the seen ones. What is drawn has the right law by itself, but is
independent of the rest of the state given y, which it is not in truth; so the samples are not those of the posterior,
not even with many steps, though moves at fixed time (`Langevin`) bring the two parts together again.

`A^+ = A^T (A A^T)^+` is applied by conjugate gradients, and by nothing more than A^T where `A A^T` is the identity.

Reference: Song et al. 2021 (arXiv:2011.13456), section 5 and appendix I.2, inpainting and colourisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sdediff.conjugate import conjugate_gradients
from sdediff.errors import OptionError
from sdediff.langevin import Corrector, Move
from sdediff.measurement import Map, Measurement, Pending, measurement
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.shapes import Grid, State


@dataclass(frozen=True, eq=False)
class Replacement(Corrector):
    """State replacement as a move at fixed time: `PredictorCorrector(DDPM(), Replacement(A, y))`.

    Args:
        A: as of `LinearInverse`; functions are looked at in the first step.
        y: the measurement without noise, `(*m)`, or `(batch, *m)` for runs that are not cut by `batch_size`.
        iterations: of conjugate gradients, at most.

    Raises:
        ShapeError, OptionError: as `LinearInverse`; a y that is A x of no x.
    """

    A: Map
    y: Tensor
    iterations: int = 200
    _known: Measurement | Pending = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.iterations >= 1:
            raise OptionError(f"Replacement needs iterations >= 1; got {self.iterations}.")
        object.__setattr__(self, "_known", measurement(self.A, self.y, 0.0))

    def start(self, model: ScoreModel, times: Grid, noise: NoiseStream) -> Move:
        alpha, sigma = (scale.tolist() for scale in model.linear.scales_at(times))

        def move(k: int, x: State) -> State:
            known = self._known.at(x)
            A = known.A
            gap = alpha[k] * known.seen(x) - A(x - sigma[k] * noise.normal(x))
            return x + A.adjoint(conjugate_gradients(lambda z: A(A.adjoint(z)), gap, self.iterations))

        return move
