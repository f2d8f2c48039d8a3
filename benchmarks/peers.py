"""Samplers of other libraries behind one call: `run(model, x, nfe, times) -> x_end`.

`model` is an exact `sd.ScoreModel` of the process of `targets.process()`, `x` are states at t = 1 and the result is the
state at t = 1e-3 after at most `nfe` network calls. Nothing is imported before it is used; `available` says in one line
which package is missing. To add a peer, add one line to `FIXED`, `ADAPTIVE` or `NOISY` at the end.

How the libraries' times are matched to ours:

- diffusers has 1000 integer time steps; step i is `t = 1e-3 + (1 - 1e-3) i / 999`, given through `trained_betas`. Its
  grids with both ends given repeat the smallest sigma; that last step of length zero is not run. Schedulers that keep
  a table of sigmas are "sigma fed": the model is asked at the exact noise level that the update assumes. That is
  kinder than the library, which rounds to an integer time step ("int t" in a name: as shipped). By default the last
  steps fall to lower order; "full order" in a name: switched off by its option.
- k-diffusion works on `x / alpha` with sigma / alpha; it ends at the smallest sigma, not at 0.
- azula takes any schedule and any grid; ours is even in log-SNR, its own is even in t.
- torchdiffeq, scipy and torchsde integrate in t.

With `times`, a peer runs on that grid instead of its own (only those with `takes_times`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import sdediff as sd
from benchmarks.targets import T_END

TRAIN_STEPS = 1000

Run = Callable[[sd.ScoreModel, Tensor, int, Tensor | None], Tensor]
"""`(model, x, nfe, times) -> x_end`."""
RunTolerance = Callable[[sd.ScoreModel, Tensor, float], Tensor]
"""`(model, x, tolerance) -> x_end`."""


@dataclass(frozen=True)
class Peer:
    """A sampler of another library.

    Attributes:
        package: what must be installed.
        run: the sampler.
        takes_times: whether it can run on a grid that is given.
        calls: network calls of one step.
    """

    package: str
    run: Run
    takes_times: bool = False
    calls: int = 1


@dataclass(frozen=True)
class AdaptivePeer:
    """An adaptive method of another library."""

    package: str
    run: RunTolerance


@cache
def available(package: str) -> bool:
    """Whether a package can be imported; says so once if not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"skipped: {package} is not installed (benchmarks/README.md says how)", file=sys.stderr)
    return found


# Scales and times.


def _ratio(model: sd.ScoreModel, times: Tensor) -> Tensor:
    """sigma / alpha at times, float64."""
    return (-model.linear.log_snr(times) / 2).exp()


def _time_at(model: sd.ScoreModel, ratio: Tensor) -> Tensor:
    """The time at which sigma / alpha has this value; what float32 rounding adds at the ends is cut off."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    ends = _ratio(model, torch.tensor([T_END, 1.0], dtype=torch.float64))
    return model.linear.time(-2 * ratio.clamp(ends[0], ends[1]).log()).clamp(T_END, 1.0)


def _index_time(index: Tensor) -> Tensor:
    """The time of diffusers' integer time step."""
    return T_END + (1 - T_END) * index.to(torch.float64) / (TRAIN_STEPS - 1)


def _ends(model: sd.ScoreModel) -> tuple[float, float]:
    """sigma / alpha at the end and at the start."""
    low, high = _ratio(model, torch.tensor([T_END, 1.0], dtype=torch.float64)).tolist()
    return low, high


def _even_log_snr(model: sd.ScoreModel, steps: int) -> Tensor:
    return sd.grids.log_snr(model.sde, steps)


def _even_t(steps: int) -> Tensor:
    return torch.linspace(1.0, T_END, steps + 1, dtype=torch.float64)


# diffusers.


def _scheduler(model: sd.ScoreModel, name: str, config: dict[str, Any]) -> Any:
    import diffusers

    alpha_bar = model.linear.alpha(_index_time(torch.arange(TRAIN_STEPS))) ** 2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(
            num_train_timesteps=TRAIN_STEPS, trained_betas=betas.numpy(), prediction_type="v_prediction", **config
        )


def diffusers_ddim(name: str = "DDIMScheduler", **config: Any) -> Run:
    """DDIM or DDPM: integer time steps, spaced "trailing", ending at time step 0."""

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        scheduler = _scheduler(model, name, {"timestep_spacing": "trailing", "clip_sample": False, **config})
        for last in ("final_alpha_cumprod", "one"):  # DDIM's and DDPM's names of alpha^2 at the end: t = 1e-3, not 0
            if hasattr(scheduler, last):
                setattr(scheduler, last, scheduler.alphas_cumprod[0])
        scheduler.set_timesteps(nfe)
        for index in scheduler.timesteps:
            x = scheduler.step(model.view("v", _index_time(index), x), index, x).prev_sample
        return x

    return run


def diffusers_multistep(name: str, *, int_t: bool = False, **config: Any) -> Run:
    """DPM++, UniPC and DEIS: one call a step, a table of sigmas.

    A grid that is given is put in the place of the table, in float64.
    """

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        grid = {key: value for key, value in config.items() if not (key.startswith("use_") and times is not None)}
        scheduler = _scheduler(model, name, grid)
        if times is None:
            scheduler.set_timesteps(nfe + 1)  # the last step has length zero and is not run
            scheduler.timesteps = scheduler.timesteps[:nfe]
            scheduler.sigmas = scheduler.sigmas[: nfe + 1]
        else:
            scheduler.set_timesteps(nfe)
            scheduler.sigmas = _ratio(model, times)
            scheduler.timesteps = (times[:-1] - T_END) / (1 - T_END) * (TRAIN_STEPS - 1)
        scheduler.num_inference_steps = nfe
        for i, index in enumerate(scheduler.timesteps):
            t = _index_time(index) if int_t else _time_at(model, scheduler.sigmas[i])
            x = scheduler.step(model.view("v", t, x), index, x).prev_sample
        return x

    return run


def diffusers_heun(**config: Any) -> Run:
    """Heun on `x / alpha`, two calls a step; the last Euler step to sigma 0 is not run."""

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        scheduler = _scheduler(model, "HeunDiscreteScheduler", config)
        steps = nfe // 2
        scheduler.set_timesteps(steps + 1)
        x = x / model.linear.alpha(1.0)
        for i in range(2 * steps):
            sigma = scheduler.sigmas[i + 1 if i % 2 else i]
            alpha = (1 + sigma.double() ** 2).rsqrt()
            output = model.view("v", _time_at(model, sigma), alpha * x)
            x = scheduler.step(output, scheduler.timesteps[i], x).prev_sample
        return x * model.linear.alpha(T_END)

    return run


# k-diffusion.


@cache
def k_sampling() -> ModuleType:
    """`k_diffusion.sampling` alone: the package's own import pulls in training, evaluation and CLIP."""
    import scipy.integrate  # noqa: F401  # what it needs must stay imported after the patch
    import torchdiffeq  # noqa: F401
    import torchsde  # noqa: F401
    import tqdm.auto  # noqa: F401

    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package, vision, transforms = (ModuleType(n) for n in ("k_diffusion", "torchvision", "torchvision.transforms"))
    package.__path__ = list(spec.submodule_search_locations)
    transforms.functional = None  # type: ignore[attr-defined]  # imported by its utilities, unused by its samplers
    stand_in = {"k_diffusion": package, "torchvision": vision, "torchvision.transforms": transforms}
    with mock.patch.dict(sys.modules, stand_in):
        return importlib.import_module("k_diffusion.sampling")


def _k_model(model: sd.ScoreModel) -> Callable[..., Tensor]:
    """The denoiser as k-diffusion calls it: `(x / alpha, sigma / alpha per row)`."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1)[0].double()
        return model.denoised(_time_at(model, sigma), (1 + sigma**2).rsqrt() * x)

    return denoise


def k_diffusion(sampler: str, *, grid: str = "karras", calls: int = 1, fresh: bool = False, **options: Any) -> Run:
    """Any of its samplers over a row of sigmas.

    `fresh` draws plain normal noise in place of its Brownian tree; the law is the same and it is far faster.
    """

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        sampling = k_sampling()
        steps = nfe // calls
        low, high = _ends(model)
        if times is None:
            sigmas = getattr(sampling, f"get_sigmas_{grid}")(steps + 1, low, high)[:-1].double()
        else:
            sigmas = _ratio(model, times)
        noise = {"noise_sampler": lambda sigma, sigma_next: torch.randn_like(x)} if fresh else {}
        start = x / model.linear.alpha(1.0)
        end = getattr(sampling, f"sample_{sampler}")(_k_model(model), start, sigmas, disable=True, **noise, **options)
        return end * model.linear.alpha(T_END)

    return run


def k_adaptive(order: int) -> RunTolerance:
    """DPM-Solver-12 or -23 with its error control."""

    def run(model: sd.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
        low, high = _ends(model)
        end = k_sampling().sample_dpm_adaptive(
            _k_model(model), x / model.linear.alpha(1.0), low, high, disable=True, order=order,
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip
        return end * model.linear.alpha(T_END)

    return run


# azula.


def azula(sampler: str, *, grid: str = "log_snr", calls: int = 1, **options: Any) -> Run:
    """Any of its samplers, with our schedule; grid "log_snr" or "t"."""

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        from azula.denoise import Denoiser, DiracPosterior
        from azula.noise import Schedule
        from azula.sample import __dict__ as samplers

        class Scales(Schedule):
            def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
                return model.linear.scales(t)

        class Exact(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = Scales()

            def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
                return DiracPosterior(mean=model.denoised(t, x_t))

        steps = nfe // calls
        nodes = times
        if nodes is None:
            nodes = _even_log_snr(model, steps) if grid == "log_snr" else _even_t(steps)
        on_grid = type(sampler, (samplers[sampler],), {"timesteps": property(lambda self: nodes)})
        return on_grid(Exact(), steps=steps, silent=True, **options)(x)

    return run


# torchdiffeq, scipy, torchsde.


def _velocity(model: sd.ScoreModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: model.velocity(t.clamp(T_END, 1.0), x)


def torchdiffeq_fixed(method: str, calls: int) -> Run:
    """A fixed-step method, even in t."""

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        from torchdiffeq import odeint

        return odeint(_velocity(model), x, _even_t(nfe // calls), method=method)[-1]

    return run


def torchdiffeq_adaptive(method: str) -> RunTolerance:
    """An adaptive method in t, made to step on the end time."""

    def run(model: sd.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
        from torchdiffeq import odeint

        span = torch.tensor([1.0, T_END], dtype=torch.float64)
        return odeint(
            _velocity(model), x, span, method=method, rtol=tolerance, atol=tolerance, options={"step_t": span[1:]}
        )[-1]

    return run


def scipy_rk45() -> RunTolerance:
    """The probability-flow sampler of score_sde: scipy's RK45 on the flattened batch, in t."""

    def run(model: sd.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
        from scipy.integrate import solve_ivp

        def rhs(t: float, y: np.ndarray) -> np.ndarray:
            return model.velocity(t, torch.from_numpy(y).reshape(x.shape)).reshape(-1).numpy()

        result = solve_ivp(rhs, (1.0, T_END), x.reshape(-1).numpy(), rtol=tolerance, atol=tolerance, method="RK45")
        return torch.from_numpy(result.y[:, -1].copy()).reshape(x.shape)

    return run


def torchsde_reverse(method: str, calls: int) -> Run:
    """A method of torchsde on the reverse SDE with the clock -t, even in t."""

    def run(model: sd.ScoreModel, x: Tensor, nfe: int, times: Tensor | None = None) -> Tensor:
        import torchsde

        reverse = sd.Reverse(model, 1.0)

        class Backward:
            noise_type, sde_type = "diagonal", "ito"

            def f(self, r: Tensor, y: Tensor) -> Tensor:
                return -reverse.drift((-r).clamp(T_END, 1.0), y)

            def g(self, r: Tensor, y: Tensor) -> Tensor:
                return reverse.diffusion((-r).clamp(T_END, 1.0), y).expand(y.shape)

        steps = max(nfe // calls, 1)
        span = torch.tensor([-1.0, -T_END], dtype=torch.float64)
        return torchsde.sdeint(Backward(), x, span, method=method, dt=(1 - T_END) / steps * (1 + 1e-12))[-1]

    return run


DPM = "DPMSolverMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"
DEIS = "DEISMultistepScheduler"

FIXED: dict[str, Peer] = {
    "diffusers DDIM trailing": Peer("diffusers", diffusers_ddim()),
    "diffusers DPM++2M lu": Peer(
        "diffusers", diffusers_multistep(DPM, use_lu_lambdas=True, final_sigmas_type="sigma_min"), True
    ),
    "diffusers DPM++2M lu, int t": Peer(
        "diffusers", diffusers_multistep(DPM, int_t=True, use_lu_lambdas=True, final_sigmas_type="sigma_min")
    ),
    "diffusers DPM++2M karras": Peer(
        "diffusers", diffusers_multistep(DPM, use_karras_sigmas=True, final_sigmas_type="sigma_min")
    ),
    "diffusers DPM++3M lu": Peer(
        "diffusers",
        diffusers_multistep(DPM, solver_order=3, use_lu_lambdas=True, final_sigmas_type="sigma_min"),
        True,
    ),
    "diffusers UniPC-2 exp": Peer(
        "diffusers", diffusers_multistep(UNIPC, use_exponential_sigmas=True, final_sigmas_type="sigma_min"), True
    ),
    "diffusers UniPC-2 exp, int t": Peer(
        "diffusers",
        diffusers_multistep(UNIPC, int_t=True, use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
    ),
    "diffusers UniPC-3 exp": Peer(
        "diffusers",
        diffusers_multistep(UNIPC, solver_order=3, use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
        True,
    ),
    "diffusers DPM++2M lu, full order": Peer(
        "diffusers",
        diffusers_multistep(DPM, lower_order_final=False, use_lu_lambdas=True, final_sigmas_type="sigma_min"),
    ),
    "diffusers UniPC-2 exp, full order": Peer(
        "diffusers",
        diffusers_multistep(UNIPC, lower_order_final=False, use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
        True,
    ),
    "diffusers UniPC-3 exp, full order": Peer(
        "diffusers",
        diffusers_multistep(
            UNIPC, lower_order_final=False, solver_order=3, use_exponential_sigmas=True, final_sigmas_type="sigma_min"
        ),
        True,
    ),
    "diffusers DEIS-3 exp": Peer(
        "diffusers", diffusers_multistep(DEIS, solver_order=3, use_exponential_sigmas=True), True
    ),
    "diffusers Heun karras": Peer("diffusers", diffusers_heun(use_karras_sigmas=True), calls=2),
    "k-diffusion dpmpp_2m karras": Peer("k_diffusion", k_diffusion("dpmpp_2m"), True),
    "k-diffusion lms4 karras": Peer("k_diffusion", k_diffusion("lms", order=4), True),
    "k-diffusion heun karras": Peer("k_diffusion", k_diffusion("heun", calls=2), calls=2),
    "azula DDIM t": Peer("azula", azula("DDIMSampler", grid="t")),
    "azula xEAB3 log-SNR": Peer("azula", azula("xEABSampler", order=3), True),
    "azula xEAB4 log-SNR": Peer("azula", azula("xEABSampler", order=4), True),
    "azula zEAB3 log-SNR": Peer("azula", azula("zEABSampler", order=3), True),
    "azula zEAB4 log-SNR": Peer("azula", azula("zEABSampler", order=4), True),
    "azula REAB3 log-SNR": Peer("azula", azula("REABSampler", order=3)),
    "torchdiffeq euler t": Peer("torchdiffeq", torchdiffeq_fixed("euler", 1)),
    "torchdiffeq rk4 t": Peer("torchdiffeq", torchdiffeq_fixed("rk4", 4), calls=4),
}
"""Deterministic samplers on a grid."""

ADAPTIVE: dict[str, AdaptivePeer] = {
    "torchdiffeq dopri5 t": AdaptivePeer("torchdiffeq", torchdiffeq_adaptive("dopri5")),
    "torchdiffeq bosh3 t": AdaptivePeer("torchdiffeq", torchdiffeq_adaptive("bosh3")),
    "torchdiffeq dopri8 t": AdaptivePeer("torchdiffeq", torchdiffeq_adaptive("dopri8")),
    "scipy RK45 t (score_sde)": AdaptivePeer("scipy", scipy_rk45()),
    "k-diffusion dpm_adaptive-2": AdaptivePeer("k_diffusion", k_adaptive(2)),
    "k-diffusion dpm_adaptive-3": AdaptivePeer("k_diffusion", k_adaptive(3)),
}
"""Deterministic methods with a tolerance."""

NOISY: dict[str, Peer] = {
    "diffusers DDPM trailing": Peer("diffusers", diffusers_ddim("DDPMScheduler")),
    "diffusers SDE-DPM++2M lu": Peer(
        "diffusers",
        diffusers_multistep(DPM, algorithm_type="sde-dpmsolver++", use_lu_lambdas=True, final_sigmas_type="sigma_min"),
        True,
    ),
    "diffusers SDE-DPM++2M lu, full order": Peer(
        "diffusers",
        diffusers_multistep(
            DPM,
            lower_order_final=False,
            algorithm_type="sde-dpmsolver++",
            use_lu_lambdas=True,
            final_sigmas_type="sigma_min",
        ),
        True,
    ),
    "diffusers SDE-DPM++3M lu": Peer(
        "diffusers",
        diffusers_multistep(
            DPM, algorithm_type="sde-dpmsolver++", solver_order=3, use_lu_lambdas=True, final_sigmas_type="sigma_min"
        ),
    ),
    "k-diffusion 2m_sde exponential": Peer(
        "k_diffusion", k_diffusion("dpmpp_2m_sde", grid="exponential", fresh=True), True
    ),
    "k-diffusion 3m_sde exponential": Peer(
        "k_diffusion", k_diffusion("dpmpp_3m_sde", grid="exponential", fresh=True), True
    ),
    "azula DDPM t": Peer("azula", azula("DDPMSampler", grid="t")),
    "azula DDPM log-SNR": Peer("azula", azula("DDPMSampler"), True),
    "torchsde euler t": Peer("torchsde", torchsde_reverse("euler", 1)),
    "torchsde srk t": Peer("torchsde", torchsde_reverse("srk", 10), calls=10),
}
"""Samplers of the reverse SDE."""
