r"""Variational autoencoders: one Gaussian latent, or a Markov chain of T of them.

An encoder climbs from the data, a decoder descends from a prior, both one layer at a time:

    q(z | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_T | z_(T-1)),
    p(x, z)  = p(x | z_1) p(z_1 | z_2) ... p(z_(T-1) | z_T) p(z_T),        p(z_T) = N(0, prior_std^2 I).

All conditionals of latents are Gaussians with independent entries. The evidence lower bound (ELBO) falls short of
log p by the divergence of the encoder from the posterior,

    log p(x) = E_q log p(x, z) / q(z | x) + KL(q(z | x) || p(z | x)),

and there are two ways to take it apart, both `E log p(x | z_1)` less one term a layer. The consistency form holds for
any encoder and compares the two ways into a layer, from below and from above (`z_0 = x`):

    term_t = E log q(z_t | z_(t-1)) / p(z_t | z_(t+1))    for t < T,        term_T = E KL(q(z_T | z_(T-1)) || p(z_T)).

The entropy of q is in closed form in it, log p at the drawn state. (A divergence KL(q(z_t | z_(t-1)) || p(z_t |
z_(t+1))), as often written, is not it: there z_t would have to be independent of the z_(t+1) that was drawn from it.)
The denoising form needs q(z_t | z_(t+1), x), which a linear Gaussian encoder has in closed form:

    term_t = E KL(q(z_t | z_(t+1), x) || p(z_t | z_(t+1)))    for t < T,    term_T = KL(q(z_T | x) || p(z_T)).

It averages over one state a term, not three, and so spreads less (`chains` has the posterior).

A diffusion model on a grid is such a chain (`HierarchicalVAE.from_diffusion`): the encoder is the forward process,
`p(z_t | z_(t+1))` that same posterior with the denoised state in place of x, and the denoising form is `sd.elbo`.

Weights `w_i = p(x, z_i) / q(z_i | x)` of k draws average to p(x); the mean of `log 1/k sum w_i` is a bound that rises
to log p with k. `log_prob` is that estimate.

References: Kingma and Welling 2014 (arXiv:1312.6114); Rezende, Mohamed and Wierstra 2014 (arXiv:1401.4082); Sonderby
et al. 2016 (arXiv:1602.02282), chains; Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), k draws; Sohl-Dickstein
et al. 2015 (arXiv:1503.03585) and Kingma et al. 2021 (arXiv:2107.00630), diffusion.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdediff.chains import DenoisedPosterior, Denoiser, LinearGaussian, posteriors
from sdediff.draws import mix
from sdediff.errors import CapabilityError, OptionError, ShapeError, TimeError
from sdediff.gaussians import DiagonalGaussian, gaussian_of
from sdediff.model import ScoreModel
from sdediff.noise import Noise, NoiseStream, RowNoise
from sdediff.observation import GaussianLikelihood, Likelihood
from sdediff.runs import evaluating
from sdediff.sde import check_grid, fresh_seed
from sdediff.shapes import PerRow, State, as_time, check_state, over, sum_rows

_CAST = {torch.float32: "float()", torch.float64: "double()"}

Path: TypeAlias = Callable[[State, State, float], State]
"""From two states and a number in [0, 1] to a state between them."""


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """A lower bound on log p(x) in its parts, in nats: `total = reconstruction - kl.sum(0)`.

    Attributes:
        reconstruction: `E log p(x | z_1)`, `(batch,)`.
        kl: the terms of the layers, z_1 first, `(T, batch)`. Those of the consistency form below T are estimates of
            the log-ratio and may be negative.
        total: the bound, `(batch,)`.
        stderr: standard error of total over the draws, `(batch,)`; NaN for a single one.
    """

    reconstruction: PerRow
    kl: Float[Tensor, "layers batch"]
    total: PerRow
    stderr: PerRow


@dataclass(frozen=True, eq=False)
class ImportanceLogProb:
    """An importance-sampled log p(x).

    Attributes:
        value: `log 1/k sum w_i` in nats, `(batch,)`; its mean is below log p, by about `stderr^2 / 2`.
        stderr: `std(w) / (sqrt(k) mean(w))`, `(batch,)`; as unreliable as the weights are uneven.
        effective: `(sum w)^2 / sum w^2`, how many draws carry the value, from 1 to k, `(batch,)`.
    """

    value: PerRow
    stderr: PerRow
    effective: PerRow


class HierarchicalVAE(nn.Module):
    """A Markov chain of T Gaussian latents between data and prior.

    Args:
        encoder: T modules; `encoder[0](x)` is `(mean, std)` of z_1, and `encoder[t](z_t)` that of z_(t+1).
        decoder: T modules; `decoder[0](z_1)` is what `likelihood` takes, and `decoder[t](z_(t+1))` is `(mean, std)`
            of z_t. A std must be positive: end a network with `exp` or `softplus`, as `networks.GaussianMLP` does.
        latent: shape of z_T, `(8,)` or 8; only `sample` asks for it.
        likelihood: p(x | z_1): `GaussianLikelihood()`, `CategoricalLikelihood(levels)`, or any object with their
            methods (`log_prob` will do for bounds).
        prior_std: of z_T.

    Raises:
        OptionError: no layers, as many of one side as not of the other, what is not a module, a bad number.
    """

    def __init__(
        self,
        encoder: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        *,
        latent: int | Sequence[int] | None = None,
        likelihood: Likelihood | None = None,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "__len__"):
            raise OptionError(
                f"A hierarchical VAE takes lists of modules, one a layer; got a {type(encoder).__name__}. Write "
                "HierarchicalVAE([encoder], [decoder]) or VAE(encoder, decoder)."
            )
        if len(encoder) < 1 or len(encoder) != len(decoder):
            raise OptionError(
                "A hierarchical VAE of T >= 1 latents needs T encoders, from x to z_T, and T decoders, from z_1 -> x "
                f"to z_T -> z_(T-1); got {len(encoder)} and {len(decoder)}."
            )
        for side, modules in (("encoder", encoder), ("decoder", decoder)):
            for t, module in enumerate(modules):
                if not isinstance(module, nn.Module):
                    raise OptionError(f"{side}[{t}] must be an nn.Module; got {type(module).__name__}.")
        shape = None if latent is None else (latent,) if isinstance(latent, int) else tuple(latent)
        if shape is not None and min(shape, default=1) < 1:
            raise OptionError(f"latent is the shape of z_T, of numbers >= 1; got {latent}.")
        if not 0 < prior_std < math.inf:
            raise OptionError(f"prior_std must be positive; got {prior_std}.")
        self.likelihood: Likelihood = GaussianLikelihood() if likelihood is None else likelihood
        if not hasattr(self.likelihood, "log_prob"):
            raise OptionError(
                f"likelihood needs a method log_prob(params, x); {type(likelihood).__name__} has none. Write "
                "GaussianLikelihood() for continuous data or CategoricalLikelihood(levels) for codes."
            )
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.latent = shape
        self.prior_std = float(prior_std)

    @classmethod
    def from_diffusion(
        cls, model: ScoreModel, times: Tensor | Sequence[float], event: Sequence[int] | None = None
    ) -> HierarchicalVAE:
        """The hierarchical VAE that a diffusion model on a grid is: T = len(times) latents, z_1 at `times[-1]`.

        Its `denoising_elbo` is `sd.elbo(model, x, times=times)`, term for term (the first of `elbo.terms`, at the
        noise end, is that of z_(T-1)). A network that is an `nn.Module` becomes part of it.

        Args:
            model: any model of a linear SDE.
            times: falling; the prior has the SDE's sigma at the first, where `sd.elbo` has t_max.
            event: shape of an event; only `sample` asks for it.

        Raises:
            TimeError, CapabilityError: times that do not fall or lie outside the span, a last time without noise, an
                SDE that is not linear or that still learns, a model that is blind at an alpha of 0.
        """
        sde, grid = model.linear, as_time(times).detach().cpu()
        if isinstance(sde, nn.Module) and any(p.requires_grad for p in sde.parameters()):
            raise CapabilityError(
                f"The chain is fixed when it is made, but {sde} still learns: write sde.requires_grad_(False) first, "
                "or train its schedule by sd.VDM."
            )
        check_grid(grid, direction=-1)
        sde.check_span(grid, "times")
        alpha, sigma = sde.scales_at(grid.flip(0))
        if not float(sigma[0]) > 0:
            raise TimeError(f"{sde} has no noise at t = {grid[-1]:g}, where no bound is finite: end the times later.")
        if model.blind_in_noise and float(alpha[-1]) == 0:
            raise CapabilityError(
                f"At t = {grid[0]:g} alpha is 0, where a model that predicts {model.prediction!r} says nothing of the "
                "data: start the times later, or use a model that predicts 'data' or 'v'."
            )
        rising = grid.flip(0).tolist()
        scales, stds = sde.transition(grid.flip(0)[:-1], grid.flip(0)[1:])
        forward = zip([alpha[0].item(), *scales.tolist()], [sigma[0].item(), *stds.tolist()], strict=True)
        return cls(
            [LinearGaussian(scale, std) for scale, std in forward],
            [
                Denoiser(model, rising[0]),
                *(DenoisedPosterior(model, s, t) for s, t in itertools.pairwise(rising)),
            ],
            latent=event,
            prior_std=sigma[-1].item(),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of `sd.train` to be of this run."""
        stated = is_dataclass(self.likelihood)  # any other repr may be an address
        return {
            "module": type(self).__name__, "layers": len(self.encoder), "prior_std": self.prior_std,
            "likelihood": repr(self.likelihood) if stated else type(self.likelihood).__name__,
        }  # fmt: skip

    # Bounds.

    def elbo(
        self, x: State, *, samples: int = 1, seed: int | None = None, noise: Noise | None = None
    ) -> VariationalBound:
        """The evidence lower bound in its consistency form, differentiable in x and in all weights.

        Args:
            x: data `(batch, *event)`.
            samples: draws of the chain for every row.
            seed: row i depends on it and on i only, whatever the batch size.
            noise: a source of the noise in place of `RowNoise(seed)`; a layer is one draw, z_1 first.

        Raises:
            ShapeError, OptionError: x is no state, a network's output does not fit, a std is not positive.
        """

        def terms(chain: _Chain) -> list[PerRow]:
            below = zip(chain.ways_up[:-1], chain.ways_down[:-1], chain.states[:-1], strict=True)
            return [*(-q.entropy() - p.log_prob(z) for q, p, z in below), chain.ways_up[-1].kl(chain.ways_down[-1])]

        return self._bound(x, terms, samples, seed, noise)

    def denoising_elbo(
        self, x: State, *, samples: int = 1, seed: int | None = None, noise: Noise | None = None
    ) -> VariationalBound:
        """The same in its denoising form, for encoders that are `LinearGaussian`.

        Args:
            x, samples, seed, noise: as in `elbo`.

        Raises:
            CapabilityError: an encoder is not a `LinearGaussian`.
            ShapeError, OptionError: as in `elbo`.
        """
        steps = self._linear()

        def terms(chain: _Chain) -> list[PerRow]:
            return [q.kl(p) for q, p in zip(posteriors(steps, x, chain.states), chain.ways_down, strict=True)]

        return self._bound(x, terms, samples, seed, noise)

    def loss(self, x: State, condition: None = None) -> PerRow:
        """The negative bound with one fresh draw, `(batch,)`: what `sd.train(vae, vae.loss, data)` takes.

        Raises:
            OptionError: a condition is given.
        """
        if condition is not None:
            raise OptionError(f"A VAE takes no condition; got {type(condition).__name__}. Train it on data alone.")
        return -self.elbo(x).total

    @torch.no_grad()
    def log_prob(
        self, x: State, *, samples: int = 100, seed: int | None = None, noise: Noise | None = None
    ) -> ImportanceLogProb:
        """log p(x) from the weights of draws of the encoder, in evaluation mode as all that takes no gradient.

        Args:
            x, samples, seed, noise: as in `elbo`.
        """
        with evaluating(self):
            weights = torch.stack([chain.log_weight for chain in self._chains(x, samples, seed, noise)])
        total = weights.logsumexp(0)
        effective = (2 * total - (2 * weights).logsumexp(0)).exp()
        spread = (1 / effective - 1 / samples) * samples / (samples - 1) if samples > 1 else torch.nan * total
        return ImportanceLogProb(total - math.log(samples), spread.clamp(min=0).sqrt(), effective)

    # States.

    @torch.no_grad()
    def encode(self, x: State, *, temperature: float = 1.0, seed: int | None = None) -> list[State]:
        """Latents z_1 to z_T of data x, each drawn given the one below; temperature multiplies every std."""
        self._check(x)
        _check_temperature(temperature)
        with evaluating(self):
            return self._climb(x, _stream(seed, 31), temperature)[1]

    @torch.no_grad()
    def decode(self, z: State, *, layer: int | None = None, temperature: float = 1.0, seed: int | None = None) -> State:
        """`E[x | z_1]`, with z_1 drawn down the chain from a state z of a layer (1 to T; None is T)."""
        with evaluating(self):
            return self.likelihood.mean(self._descend(z, self._layer(layer), _stream(seed, 32), temperature))

    def reconstruct(self, x: State, *, layer: int = 1, temperature: float = 0.0, seed: int | None = None) -> State:
        """Data from their own latents of a layer: what that layer knows of them. Without noise, unless it is given."""
        z = self.encode(x, temperature=temperature, seed=seed)[self._layer(layer) - 1]
        return self.decode(z, layer=layer, temperature=temperature, seed=seed)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        seed: int | None = None,
        final: str = "mean",
        dtype: torch.dtype | None = None,
    ) -> State:
        """`n` draws of the model, `(n, *event)`.

        Args:
            n: how many, at least 1.
            temperature: multiplies every std of the latents.
            seed: row i depends on it and on i only.
            final: "mean" for `E[x | z_1]`, which looks best, or "draw" for x itself.
            dtype: of the latents; that of the weights if None.

        Raises:
            OptionError: a bad argument, or the VAE was made without `latent`.
        """
        if self.latent is None:
            raise OptionError("sample needs the shape of z_T: make the VAE with latent=..., such as latent=(8,).")
        if not isinstance(n, int) or n < 1:
            raise OptionError(f"sample needs a whole number of rows n >= 1; got {n!r}.")
        if final not in ("mean", "draw"):
            raise OptionError(f"Unknown final {final!r}: write 'mean' or 'draw'.")
        stream, like = _stream(seed), next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0))
        top = stream.normal(torch.empty(n, *self.latent, dtype=dtype or like.dtype, device=like.device))
        with evaluating(self):
            params = self._descend(temperature * self.prior_std * top, len(self.encoder), stream, temperature)
        mean = self.likelihood.mean(params)
        return mean if final == "mean" else self.likelihood.draw(params, stream.normal(mean))

    def interpolate(self, a: State, b: State, n: int, *, layer: int | None = None, path: Path | None = None) -> State:
        """`n` states from a to b, `(n, batch, *event)`, along a path between their latents of a layer.

        Args:
            a, b: data `(batch, *event)`.
            n: at least 2; the first is the reconstruction of a, the last that of b.
            layer: 1 to T; None is T, the top.
            path: `slerp` if None, or `lerp`, or a function of your own.
        """
        if not isinstance(n, int) or n < 2:
            raise OptionError(f"interpolate needs a whole number of states n >= 2, with both ends; got {n!r}.")
        if a.shape != b.shape:
            raise ShapeError(f"a and b must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
        index = self._layer(layer) - 1
        start, end = (self.encode(x, temperature=0.0)[index] for x in (a, b))
        between = [(path or slerp)(start, end, k / (n - 1)) for k in range(n)]
        return torch.stack([self.decode(z, layer=layer, temperature=0.0) for z in between])

    # What they are made of.

    def _layer(self, layer: int | None) -> int:
        top = len(self.encoder)
        if layer is not None and (not isinstance(layer, int) or not 1 <= layer <= top):
            raise OptionError(f"layer must be a whole number from 1 (next to the data) to {top}; got {layer!r}.")
        return top if layer is None else layer

    def _check(self, x: State, name: str = "x") -> None:
        """Refuse what the networks cannot take."""
        check_state(x, name)
        if len(x) == 0:
            raise ShapeError(f"A VAE needs at least one row; got {name} with 0 rows.")
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)
        if own != x.dtype:
            raise ShapeError(
                f"{name} is {x.dtype}, but the weights are {own}: write {name}.{_CAST.get(own, f'to({own})')}, or "
                f"vae.{_CAST.get(x.dtype, f'to({x.dtype})')}."
            )

    def _climb(
        self, x: State, stream: NoiseStream, temperature: float = 1.0
    ) -> tuple[list[DiagonalGaussian], list[State]]:
        ways: list[DiagonalGaussian] = []
        states = [x]
        for t, conditional in enumerate(self.encoder):
            ways.append(gaussian_of(conditional(states[-1]), f"encoder[{t}]", rows=len(x)))
            states.append(ways[-1].draw(temperature * stream.normal(ways[-1].mean)))
        return ways, states[1:]

    def _descend(self, z: State, layer: int, stream: NoiseStream, temperature: float) -> Any:
        """What the likelihood takes, from a state of a layer."""
        self._check(z, "z")
        _check_temperature(temperature)
        for t in range(layer - 1, 0, -1):
            way = gaussian_of(self.decoder[t](z), f"decoder[{t}]", rows=len(z))
            z = way.draw(temperature * stream.normal(way.mean))
        return self.decoder[0](z)

    def _chains(self, x: State, samples: int, seed: int | None, noise: Noise | None) -> Iterator[_Chain]:
        self._check(x)
        if not isinstance(samples, int) or samples < 1:
            raise OptionError(f"samples must be a whole number >= 1; got {samples!r}.")
        stream = _stream(seed) if noise is None else noise.open()
        return (self._chain(x, stream) for _ in range(samples))

    def _chain(self, x: State, stream: NoiseStream) -> _Chain:
        ways_up, states = self._climb(x, stream)
        ways_down = [
            gaussian_of(self.decoder[t](states[t]), f"decoder[{t}]", states[t - 1]) for t in range(1, len(states))
        ]
        zeros = torch.zeros_like(states[-1])
        ways_down.append(DiagonalGaussian(zeros, zeros + self.prior_std))
        return _Chain(ways_up, ways_down, states, self.likelihood.log_prob(self.decoder[0](states[0]), x))

    def _bound(
        self, x: State, terms: Callable[[_Chain], list[PerRow]], samples: int, seed: int | None, noise: Noise | None
    ) -> VariationalBound:
        draws = [(chain.reconstruction, torch.stack(terms(chain))) for chain in self._chains(x, samples, seed, noise)]
        reconstruction, kl = (torch.stack(values) for values in zip(*draws, strict=True))
        totals = reconstruction - kl.sum(1)
        stderr = (totals.var(0) / samples).sqrt() if samples > 1 else torch.full_like(totals[0], torch.nan)
        return VariationalBound(reconstruction.mean(0), kl.mean(0), totals.mean(0), stderr.detach())

    def _linear(self) -> list[tuple[float, float]]:
        """`(scale, std)` of every encoder."""
        steps = []
        for t, module in enumerate(self.encoder):
            if not isinstance(module, LinearGaussian):
                raise CapabilityError(
                    "The denoising form needs q(z_t | z_(t+1), x), which is known where every encoder is a "
                    f"LinearGaussian; encoder[{t}] is {type(module).__name__}. Use elbo(x), which is right for any."
                )
            steps.append((module.scale, module.std))
        return steps


class VAE(HierarchicalVAE):
    """A variational autoencoder: the hierarchical one with T = 1.

    Args:
        encoder: a module, `encoder(x)` is `(mean, std)` of z.
        decoder: a module, `decoder(z)` is what `likelihood` takes.
        latent, likelihood, prior_std: as in `HierarchicalVAE`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent: int | Sequence[int] | None = None,
        likelihood: Likelihood | None = None,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__([encoder], [decoder], latent=latent, likelihood=likelihood, prior_std=prior_std)


def lerp(a: State, b: State, u: float) -> State:
    """The straight way from a to b."""
    return a + u * (b - a)


def slerp(a: State, b: State, u: float) -> State:
    """Along the arc from a to b, `sin((1 - u) w) / sin(w) a + sin(u w) / sin(w) b`, w the angle between the rows.

    Between draws of the prior it stays at their typical distance from 0, which the straight way leaves. Rows that
    point the same way are joined by the straight line; opposite ones have no arc and get that too.

    Reference: Shoemake 1985, Animating rotation with quaternion curves.
    """
    squares = sum_rows(a * a) * sum_rows(b * b)
    empty = squares == 0
    cosine = sum_rows(a * b) / torch.where(empty, 1, squares).sqrt()
    straight = empty | ~(cosine.abs() < math.sqrt(1 - 1e-8))
    safe = torch.where(straight, torch.zeros_like(cosine), cosine).acos()
    first = torch.where(straight, torch.full_like(safe, 1 - u), ((1 - u) * safe).sin() / safe.sin())
    second = torch.where(straight, torch.full_like(safe, u), (u * safe).sin() / safe.sin())
    return over(first, a) * a + over(second, b) * b


@dataclass(frozen=True, eq=False)
class _Chain:
    """One draw of all latents, with the Gaussians that lead to each from below and from above."""

    ways_up: list[DiagonalGaussian]
    ways_down: list[DiagonalGaussian]
    states: list[State]
    reconstruction: PerRow

    @property
    def log_weight(self) -> PerRow:
        """`log p(x, z) / q(z | x)`."""
        total = self.reconstruction
        for q, p, z in zip(self.ways_up, self.ways_down, self.states, strict=True):
            total = total + p.log_prob(z) - q.log_prob(z)
        return total


def _stream(seed: int | None, *purpose: int) -> NoiseStream:
    """Noise from the seed; for a purpose, independent of that for any other."""
    seed = fresh_seed() if seed is None else seed
    return RowNoise(mix(seed, *purpose) >> 2 if purpose else seed).open()


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise OptionError(f"temperature multiplies a standard deviation and must be >= 0; got {temperature}.")
