r"""Classifiers of noised data: `log p(y | x_t)`, what classifier guidance needs.

A network that is shown noised data and its time is trained by cross-entropy, with times of some law,

    loss = E_t E_{x_0, y} E_eps [ -log q(y | x_t, t) ],      x_t = alpha x_0 + sigma eps.

At each time this is `E[-log p(y | x_t)] + E KL(p(. | x_t) || q(. | x_t, t))`, least where q is the class posterior

    p(y | x_t) = p(y) p_t(x_t | y) / sum_k p(k) p_t(x_t | k),

whose gradient is the difference of two scores: `grad log p(y | x_t) = grad log p_t(x_t | y) - grad log p_t(x_t)`. So a
model with this gradient added is the model of one class, and p(y) drops out of it. A classifier of clean data would not
do: its input has the density p_0 and not p_t.

The minimiser is the same for every law with a density on the whole span, and there is no error of the noise here that a
weighting could refer to. So the law itself says how much a time counts, without weights; by default `LogSNR()`, in
which every factor of the noise has the same share, whatever the clock of the SDE.

For two Gaussian classes of equal covariance S the posterior is logistic regression: with `S_t = alpha^2 S + sigma^2 I`,

    log p(1 | x) - log p(0 | x) = log p(1) / p(0) + alpha (m_1 - m_0)^T S_t^-1 (x - alpha (m_0 + m_1) / 2).

References: Song et al. 2021 (arXiv:2011.13456), appendix I; Dhariwal and Nichol 2021 (arXiv:2105.05233).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdediff.conditions import labels_of
from sdediff.errors import OptionError, ShapeError
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.sde import SDE
from sdediff.shapes import PerRow, State, Time, as_time, check_state, per_row
from sdediff.times import Law, Levels, LogSNR, check_law


class Classifier(nn.Module):
    """The class posterior of noised data by a network that gives logits.

    Args:
        network: an `nn.Module`, `network(x, t) -> (batch, K)`, such as `networks.ClassifierMLP((2,), K)`; a row's
            logits must not depend on other rows.
        sde: the forward process, which must be linear.
        time: what the network sees as its time, a function of t, as in `ScoreModel`; None passes t itself.
        times: the law of the times of its training; None for `LogSNR()`, or, where `time` counts the steps of a chain,
            for these, each equally often.

    Raises:
        OptionError: the network is not an `nn.Module`, or `times` is not a law.
        CapabilityError: the SDE is not linear.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: SDE,
        time: Callable[[Tensor], Tensor] | None = None,
        *,
        times: Law | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise OptionError(f"Classifier needs a network that is a torch.nn.Module; got {type(network).__name__}.")
        # a score model of the same network knows its dtype, its clock and the span, and refuses what does not fit
        self._inputs = ScoreModel(network, sde, "score", time=time)
        self.network = network
        self.sde: LinearSDE = self._inputs.linear
        known = self._inputs.known_times
        self.times = times if times is not None else LogSNR() if known is None else Levels(known)
        check_law(self.times)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of `sd.train` to be of this run."""
        learned = isinstance(self.sde, nn.Module)  # its words would hold the weights
        return {
            "module": type(self).__name__, "network": type(self.network).__name__, "times": str(self.times),
            "sde": type(self.sde).__name__ if learned else str(self.sde), "time": self._inputs.time is not None,
            "span": [self.sde.t_min, self.sde.t_max],
        }  # fmt: skip

    def forward(self, t: Time, x: State) -> Float[Tensor, " batch K"]:
        """Logits, `(batch, K)`, in the dtype of x; t is `()` or `(batch,)`.

        Raises:
            ShapeError: x is not a floating-point state, or the network does not return `(batch, K)`.
            TimeError: t lies outside the span.
        """
        logits = self.network(*self._inputs.arguments(t, x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != len(x) or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"A classifier's network returns logits (batch, K), K >= 2: ({len(x)}, K); got {got}.")
        return logits.to(x.dtype)

    def log_probs(self, t: Time, x: State) -> Float[Tensor, " batch K"]:
        """`log p(k | x_t = x)` for every class k, `(batch, K)`, in nats; raises as `forward`."""
        return self(t, x).log_softmax(dim=1)

    def log_prob(self, t: Time, x: State, label: Int[Tensor, " batch"] | int | None = None) -> PerRow:
        """`log p(label | x_t = x)`, `(batch,)`, in nats; differentiable in x.

        Args:
            t: `()` or `(batch,)`.
            x: `(batch, *event)`.
            label: one for every row, `(batch,)`, or one for all; it must be given.

        Raises:
            ShapeError: as `forward`; the labels are not whole numbers.
            OptionError: no label, or one out of range (told on the CPU only).
        """
        if label is None:
            raise OptionError(
                "log_prob needs the label whose probability is asked for: log_prob(t, x, label), or for guidance "
                "ClassifierGuidance(model, classifier.log_prob, label=labels). Of all classes, log_probs(t, x)."
            )
        log_probs = self.log_probs(t, x)
        rows, classes = log_probs.shape
        one = torch.as_tensor(label) if isinstance(label, int | Real) else label
        told = one.expand(rows) if isinstance(one, Tensor) and one.ndim == 0 else one
        labels = labels_of(told, rows, classes, "This Classifier")
        return log_probs.gather(1, labels.to(x.device)[:, None])[:, 0]

    def loss(
        self,
        x0: State,
        label: Tensor,
        *,
        t: Time | None = None,
        noise: State | None = None,
        generator: torch.Generator | None = None,
    ) -> PerRow:
        """Cross-entropy at noised data, `(batch,)`, in nats: `sd.train(c, c.loss, data, condition=labels)`.

        Args:
            x0: clean data `(batch, *event)`.
            label: of every row, `(batch,)`.
            t: times `()` or `(batch,)`; drawn by the law if None.
            noise: standard normal, shaped as x0; drawn if None.
            generator: of t and noise, on the CPU.

        Raises:
            ShapeError, OptionError, TimeError: as `log_prob`; there are no labels.
        """
        check_state(x0, "x0")
        if label is None:
            raise OptionError("A classifier learns from labels: sd.train(c, c.loss, data, condition=labels).")
        with torch.no_grad():  # a schedule that learns does not learn from this
            drawn = t is None
            clock = self.times.draw(self.sde, len(x0), generator=generator)[0] if t is None else per_row(as_time(t), x0)
            if noise is None:
                noise = torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)
            xt = self.sde.perturb(clock, x0, noise)
        losses = -self.log_prob(clock, xt, label)
        if drawn and torch.is_grad_enabled():
            self.times.observe(self.sde, clock, losses.detach())
        return losses
