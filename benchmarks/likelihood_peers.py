"""Log-likelihoods by other libraries, each as its users would call it: `score(model, x) -> Scored`.

`model` is an exact `sd.ScoreModel` of `PROCESS` and `x` are rows that are taken for states at t = 1e-5. Values are in
nats and belong to x, whatever variable a library works in. torchdiffeq alone is told to step on the end t = 1;
scipy and zuko do so by themselves; k-diffusion steps past it and takes no option, so its denoiser knows times beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import sdediff as sd
from benchmarks import peers

T_EPS = 1e-5
PROCESS = sd.VP(beta_min=0.1, beta_max=20.0, t_min=T_EPS)
BEYOND = sd.VP(beta_min=0.1, beta_max=20.0, t_min=T_EPS / 2, t_max=2.0)
"""The same, continued at both ends, for methods that step past the end."""
BASELINE = "torchdiffeq dopri5, autograd trace"
ZUKO_EXACT = "zuko, exact"


@dataclass(frozen=True)
class Scored:
    """What a peer returns: the value in nats, the part of it that its prior gave, and the state at t = 1."""

    value: Tensor
    prior: Tensor
    latent: Tensor


Score = Callable[[sd.ScoreModel, Tensor], Scored]


def _standard(latent: Tensor, integral: Tensor) -> Scored:
    """With the prior N(0, I)."""
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1)
    return Scored(prior + integral, prior, latent)


def _signs(x: Tensor) -> Tensor:
    return torch.randint_like(x, 2) * 2 - 1


def torchdiffeq_dopri5(tolerance: float, *, probe: bool = False) -> Score:
    """`odeint` on `(x, log p)` in t, stepping on t = 1; the trace in a loop over dimensions, or by one fixed probe."""

    def run(model: sd.ScoreModel, x: Tensor) -> Scored:
        from torchdiffeq import odeint

        signs = _signs(x)

        def rhs(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = state[0].detach().requires_grad_()
                velocity = model.velocity(t.clamp(T_EPS, 1.0), at)
                if probe:
                    trace = (torch.autograd.grad((velocity * signs).sum(), at)[0] * signs).sum(1)
                else:
                    trace = torch.zeros_like(state[1])
                    for i in range(x.shape[1]):
                        trace += torch.autograd.grad(velocity[:, i].sum(), at, retain_graph=True)[0][:, i]
            return velocity.detach(), trace

        span = torch.tensor([T_EPS, 1.0], dtype=torch.float64)
        path, integral = odeint(
            rhs, (x, x.new_zeros(len(x))), span, method="dopri5", rtol=tolerance, atol=tolerance,
            options={"step_t": span[1:]},
        )  # fmt: skip
        return _standard(path[-1], integral[-1])

    return run


def scipy_rk45(tolerance: float) -> Score:
    """The recipe of score_sde: scipy's RK45 over the flat batch, one fixed probe, velocity and trace in a call each."""

    def run(model: sd.ScoreModel, x: Tensor) -> Scored:
        from scipy.integrate import solve_ivp

        signs = _signs(x)

        def rhs(t: float, flat: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(flat[: x.numel()].copy()).reshape(x.shape)
            velocity = model.velocity(t, state)
            with torch.enable_grad():
                at = state.requires_grad_()
                product = torch.autograd.grad((model.velocity(t, at) * signs).sum(), at)[0]
            return torch.cat([velocity.reshape(-1), (product * signs).sum(1)]).numpy()

        start = torch.cat([x.reshape(-1), x.new_zeros(len(x))]).numpy()
        end = solve_ivp(rhs, (T_EPS, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1].copy()
        return _standard(torch.from_numpy(end[: x.numel()]).reshape(x.shape), torch.from_numpy(end[x.numel() :]))

    return run


def k_diffusion(**tolerances: float) -> Score:
    """Its `log_likelihood` of `x / alpha` from sigma / alpha at t = 1e-5 to that at t = 1, one fixed probe.

    Its prior is N(0, sigma^2 I).
    """

    def run(model: sd.ScoreModel, x: Tensor) -> Scored:
        sampling = peers.k_sampling()
        beyond = sd.ScoreModel(model.network, BEYOND, prediction=model.prediction, time=model.time)
        alpha, sigma = PROCESS.scales(torch.tensor([T_EPS, 1.0], dtype=torch.float64))
        first, last = (sigma / alpha).tolist()

        def denoise(scaled: Tensor, ratios: Tensor) -> Tensor:
            ratio = ratios[0]
            return beyond.denoised(BEYOND.time(-2 * ratio.log()), (1 + ratio**2).rsqrt() * scaled)

        ends: list[Tensor] = []

        def odeint(*args: Any, **options: Any) -> Any:
            found = sampling_odeint(*args, **options)
            ends.append(found[0][-1])
            return found

        sampling_odeint = sampling.odeint
        with mock.patch.object(sampling, "odeint", odeint):  # to see the latents, which it does not return
            value, _ = sampling.log_likelihood(denoise, x / alpha[0], first, last, **tolerances)
        prior = torch.distributions.Normal(0.0, last).log_prob(ends[0]).sum(1)
        size = x.shape[1]
        return Scored(value - size * alpha[0].log(), prior - size * alpha[1].log(), ends[0] * alpha[1])

    return run


def zuko(tolerance: float, *, exact: bool) -> Score:
    """`FreeFormJacobianTransform` from t = 1e-5 to t = 1, as sbi uses it; exact trace or one fixed Gaussian probe."""

    def run(model: sd.ScoreModel, x: Tensor) -> Scored:
        from zuko.transforms import FreeFormJacobianTransform

        flow = FreeFormJacobianTransform(
            lambda t, at: model.velocity(t.clamp(T_EPS, 1.0), at), t0=T_EPS, t1=1.0, atol=tolerance, rtol=tolerance,
            exact=exact,
        )  # fmt: skip
        return _standard(*flow.call_and_ladj(x))

    return run


PEERS: list[tuple[str, str, str, Score]] = [
    *((BASELINE, f"{tol:g}", "torchdiffeq", torchdiffeq_dopri5(tol)) for tol in (1e-3, 1e-4, 1e-5, 1e-6)),
    ("torchdiffeq dopri5, one probe", "1e-05", "torchdiffeq", torchdiffeq_dopri5(1e-5, probe=True)),
    ("scipy RK45, one probe (score_sde)", "1e-05", "scipy", scipy_rk45(1e-5)),
    ("k-diffusion log_likelihood, one probe", "defaults", "k_diffusion", k_diffusion()),
    ("k-diffusion log_likelihood, one probe", "1e-05", "k_diffusion", k_diffusion(rtol=1e-5, atol=1e-5)),
    *((ZUKO_EXACT, f"{tol:g}", "zuko", zuko(tol, exact=True)) for tol in (1e-3, 1e-5)),
    ("zuko, one Gaussian probe", "1e-05", "zuko", zuko(1e-5, exact=False)),
]
"""`(method, setting, package, score)`; settings are tolerances, relative and absolute alike."""
