r"""Ancestral sampling with a mean that is moved by a gradient: classifier guidance as it was published for chains.

The reverse kernel of a conditional chain is, by Bayes' rule, `p(x_s | x_t, y) ~ p(x_s | x_t) p(y | x_s)`. With
`p(x_s | x_t) = N(mu, V)` and log p(y | x_s) taken as linear over the width of the kernel, its gradient g there,

    p(x_s | x_t, y) = N(mu + V g, V),        and with a scale    mu + w V g.

The expansion is about mu, so g = grad log p(y | x_s) at (s, mu): `at="mean"`. The published algorithm takes it at the
state that the step begins with, (t, x_t), where the denoiser is evaluated too: `at="state"`, the default.

DDPM with the guided score moves the mean by `w (alpha_s / alpha_t) sigma_t^2 (1 - r) g(t, x_t)`, `r = snr_t / snr_s`,
and the variances of DDPM are `V = sigma_s^2 (1 - r)` and `V = sigma_t^2 (1 - r)`. So the two forms are the same at
first order: each step differs by the square of its length, and the limits agree. This one is defined where alpha is 0.

Reference: Dhariwal and Nichol 2021 (arXiv:2105.05233), section 4.1 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from sdediff.errors import CapabilityError, OptionError
from sdediff.guidance import GuidedByState
from sdediff.guidance_scale import scale_at
from sdediff.model import ScoreModel
from sdediff.noise import NoiseStream
from sdediff.reverse import Reverse
from sdediff.sde import SDE
from sdediff.shapes import Grid, State, over
from sdediff.solvers import Step, model_of
from sdediff.tables import Table, TableSolver, first_order
from sdediff.variance import ReverseSteps, ReverseVariance, StepVariance, entries_of, table_of, variance_of
from sdediff.wrapped import Counter


@dataclass(frozen=True)
class GuidedDDPM(TableSolver):
    """DDPM whose mean is moved by `w V grad log p(y | x)`, of a model made by `ClassifierGuidance`.

    Log-probability, scale and labels are those of the model, or of `SimilarityGuidance` at the noisy state; guidance
    inside of it is of the usual form.

    Args:
        variance: V, as in `DDPM`; with `LearnedVariance`, that of the model that is guided.
        at: "state" for the gradient at (t, x_t), the published choice, or "mean" at (s, mu), where the kernel is.
    """

    _fixed: ClassVar[bool] = True
    variance: str | ReverseVariance = "posterior"
    at: str = "state"
    noise_level: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if callable(self.variance):
            raise OptionError(
                "GuidedDDPM takes log_prob and scale from the model: write sample(ClassifierGuidance(model, log_prob, "
                "scale), ..., solver=GuidedDDPM())."
            )
        _ = self._variance
        if self.at not in ("state", "mean"):
            raise OptionError(f"at says where the gradient is taken, 'state' or 'mean'; got {self.at!r}.")

    @property
    def _variance(self) -> ReverseVariance:
        return variance_of(self.variance, type(self).__name__)

    def table(self, model: ScoreModel, times: Grid) -> Table:
        """The coefficients of mu; the noise is added after the mean is moved."""
        steps = ReverseSteps.of(model.point(times))
        return first_order(model, steps.at, steps.kept, torch.zeros_like(steps.nu))

    def start(self, process: SDE, x: State, times: Grid, noise: NoiseStream) -> Step:
        guided, model = _parts(model_of(process, self))
        with torch.no_grad():
            steps = ReverseSteps.of(model.point(times))
        model, spread = _spread(self._variance, model, steps)
        mean = super().start(Reverse(model, self.noise_level), x, times, noise)

        def step(i: int, x: State) -> State:
            mu = mean(i, x)
            variance = spread(i, x)
            t, place = (times[i], x) if self.at == "state" else (times[i + 1], mu)
            rows = t.expand(len(x))
            w = scale_at(guided.scale, rows)
            after = mu + over(w, x) * variance * guided.slope(rows, place) if bool(w.any()) else mu
            return after.addcmul(variance.sqrt(), noise.unit(x, times[i], times[i + 1]))

        return step


def _parts(model: ScoreModel) -> tuple[GuidedByState, ScoreModel]:
    """The guidance of a model and the model inside, whose calls are counted where those of the model are.

    Raises:
        CapabilityError: the model is not guided by a gradient at the noisy state.
    """
    network = model.network
    counter = network if isinstance(network, Counter) else None
    guided = network if counter is None else counter.network
    if not isinstance(guided, GuidedByState):
        raise CapabilityError(
            "GuidedDDPM moves the mean of a model made by ClassifierGuidance, or SimilarityGuidance(at='noisy'), and "
            f"guided last; got a network of type {type(guided).__name__}. For other models, guided or not, use DDPM()."
        )
    inside = guided.model
    network = inside.network if counter is None else Counter(inside.network, counter)
    condition = inside.condition if model.condition is None else model.condition
    return guided, replace(inside, network=network, condition=condition)


def _spread(
    variance: ReverseVariance, model: ScoreModel, steps: ReverseSteps
) -> tuple[ScoreModel, Callable[[int, State], State]]:
    """The model to step with, and V, which lies over the state."""
    if not isinstance(variance, StepVariance):
        return entries_of(variance, model, steps)
    with torch.no_grad():
        table = table_of(variance, steps)
    return model, lambda i, x: over(table[i], x)
