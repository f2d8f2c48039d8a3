"""Formula breaks that the tests must notice.

Each mutant changes one line of a copy of the package; the named test files must then fail. Run

    python tests/mutants.py            # all of them, two at a time
    python tests/mutants.py sde noise  # those of some modules

`test_mutants.py` keeps the list true: every original text occurs exactly once in its module.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    module: str
    original: str
    changed: str
    tests: tuple[str, ...]


def _of(module: str, tests: str, *pairs: tuple[str, str]) -> list[Mutant]:
    files = tuple(f"test_{name}.py" for name in tests.split())
    return [Mutant(module, original, changed, files) for original, changed in pairs]


MUTANTS = [
    *_of(
        "linear",
        "sde processes model testing",
        ("drift_rate = d_alpha / alpha", "drift_rate = d_alpha"),
        ("(2 * sigma * (d_sigma - drift_rate * sigma)).sqrt()", "(2 * sigma * (d_sigma + drift_rate * sigma)).sqrt()"),
        ("drift_rate * sigma + diffusion**2 / (2 * sigma)", "drift_rate * sigma + diffusion**2 / sigma"),
        ("like(2 * (alpha.log() - sigma.log()), t)", "like(alpha.log() - sigma.log(), t)"),
        ("gap = 2 * (", "gap = ("),
        ("like(sigma_t * (-torch.expm1(gap)).sqrt(), t)", "like(sigma_s * (-torch.expm1(gap)).sqrt(), t)"),
        ("from_x = sigma_s / sigma_t * (gap / 2).exp()", "from_x = sigma_s / sigma_t * gap.exp()"),
        ("from_x0 = -alpha_s * torch.expm1(gap)", "from_x0 = -alpha_s * torch.expm1(gap / 2)"),
        (
            "return mean, like(sigma_s * (-torch.expm1(gap)).sqrt(), t)",
            "return mean, like(sigma_s * -torch.expm1(gap), t)",
        ),
        ("d_sigma = d_sigma + noise_level**2 * (", "d_sigma = d_sigma + noise_level * ("),
        ("d_sigma - sigma * d_alpha / alpha)", "d_sigma + sigma * d_alpha / alpha)"),
        ("return over(scale, x) * x + over(std, x) * normal", "return over(scale, x) * x + over(std**2, x) * normal"),
        ("times = torch.linspace(0, self.t_max, n + 1", "times = torch.linspace(0, self.t_max / 2, n + 1"),
    ),
    *_of(
        "sde",
        "sde reverse",
        ("(1 + noise_level**2) / 2 * as_float64(diffusion) ** 2", "(1 + noise_level**2) / 2 * as_float64(diffusion)"),
        ("over((t - s).abs().sqrt(), x) * normal", "over((t - s).abs(), x) * normal"),
    ),
    *_of(
        "shapes",
        "shapes",
        ("reshape(-1, *[1] * (x.ndim - 1))", "reshape(*[1] * (x.ndim - 1), -1)"),
        ("return x.reshape(x.shape[0], -1).sum(-1)", "return x.reshape(-1, x.shape[0]).sum(0)"),
    ),
    *_of(
        "processes",
        "processes model testing",
        ("t * (beta_min + (beta_max - beta_min) / 2 * t)", "t * (beta_min + (beta_max - beta_min) * t)"),
        (
            "return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()",
            "return (-integral / 2).exp(), (1 - torch.exp(-integral)).sqrt()",
        ),
        (
            "return (-integral / 2).exp(), -torch.expm1(-integral)",
            "return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()",
        ),
        ("(turned + 2 * start).sin()", "(turned + start).sin()"),
        ("n * np.concatenate([steps[:1], inner, steps[-1:]])", "np.concatenate([steps[:1], inner, steps[-1:]])"),
        ("self.beta_max / (2 * self.ramp) * grown.log1p()", "self.beta_max / self.ramp * grown.log1p()"),
        (".round().long().sub(1)", ".long().sub(1)"),
    ),
    *_of(
        "model",
        "model reverse tables",
        ("return -at.sigma, at.alpha", "return at.sigma, at.alpha"),
        ("return torch.zeros_like(at.alpha), -1 / at.sigma", "return torch.zeros_like(at.alpha), -1 / at.sigma**2"),
        ("(m * q - n * p) / determinant", "(m * q + n * p) / determinant"),
        ("(at.alpha * n - at.sigma * m) / determinant", "(at.alpha * n + at.sigma * m) / determinant"),
        ("k = (at.sigma**2 + (at.alpha * at.sigma_data) ** 2).sqrt()", "k = (at.sigma**2 + at.sigma_data**2).sqrt()"),
        ("seen = (sigma / alpha).log() / 4", "seen = (sigma / alpha).log() / 2"),
    ),
    *_of(
        "reverse",
        "reverse runge_kutta",
        ("return self.noise_level * as_float64", "return self.noise_level**2 * as_float64"),
        (
            "return self.sde.reverse_drift(t, x, self.model, self.noise_level)",
            "return self.sde.reverse_drift(t, x, self.model, 1.0)",
        ),
    ),
    *_of(
        "exact",
        "exact",
        ("alpha * (1 - eigen) / (alpha**2 * eigen + sigma**2)", "alpha * (1 - eigen) / (eigen + sigma**2)"),
        ("v = v - _product(gamma", "v = v + _product(gamma"),
        ("(size - rank) * spread.log()", "size * spread.log()"),
        ("moved._eigen = alpha**2 * self._eigen + sigma**2", "moved._eigen = alpha * self._eigen + sigma**2"),
        ("ratio = (end._eigen / start._eigen).sqrt().to(x)", "ratio = (end._eigen / start._eigen).to(x)"),
    ),
    *_of(
        "grids",
        "grids",
        ("(-linear.log_snr(t) / (2 * rho)).exp()", "(-linear.log_snr(t) / rho).exp()"),
        (
            "return _even(sde, n, t_min, torch.sqrt, torch.square)",
            "return _even(sde, n, t_min, torch.square, torch.sqrt)",
        ),
        ("times[0], times[-1] = ends", "times[0] = ends[0]"),
    ),
    *_of(
        "tables",
        "tables",
        ("-torch.expm1(log_snr[:-1] - log_snr[1:])", "-torch.expm1((log_snr[:-1] - log_snr[1:]) / 2)"),
        ("kept = 1 - eta**2 * fresh", "kept = 1 - eta * fresh"),
        ("sigma_s * kept.sqrt(), eta * sigma_s * fresh.sqrt()", "sigma_s * kept.sqrt(), eta * sigma_s * fresh"),
        ("added = sigma_t * fresh.sqrt()", "added = sigma_t * fresh"),
        ("alpha_s = model.linear.alpha(times)[1:]", "alpha_s = model.linear.alpha(times)[:-1]"),
        ("model.predict(times[i], x)", "model.predict(times[i + 1], x)"),
    ),
    *_of(
        "solvers",
        "runge_kutta adapters",
        ("alpha=lengths[i])", "alpha=-lengths[i])"),
        ("noise.increment(x, times[i], times[i + 1])", "noise.unit(x, times[i], times[i + 1])"),
    ),
    *_of(
        "runge_kutta",
        "runge_kutta",
        ("second = process.drift(s, x + length * first)", "second = process.drift(t, x + length * first)"),
        ("return x + length / 2 * (first + second)", "return x + length * second"),
        ("- 2 * math.log1p(gamma)", "- math.log1p(gamma)"),
        ("scales[i] * x + jitters[i]", "scales[i] * x + jitters[i] ** 2"),
        ("math.sqrt(2) - 1)", "math.sqrt(2))"),
    ),
    *_of(
        "langevin",
        "langevin",
        ("size = 2 * (self.snr * model.linear.sigma(t)) ** 2", "size = (self.snr * model.linear.sigma(t)) ** 2"),
        ("over((2 * size).sqrt(), x)", "over(size.sqrt(), x)"),
        ("self.corrector.correct(model, times[i + 1]", "self.corrector.correct(model, times[i]"),
    ),
    *_of(
        "adapters",
        "adapters",
        ("drift = self._sign * self._process.drift(self._sign * r", "drift = self._process.drift(self._sign * r"),
        ("return self.g(r, y) * v", "return self.g(r, y) * v * 2"),
        ("self._process.diffusion(self._sign * r, x)", "self._process.diffusion(0.5 - 0 * r, x)"),
        ("if time == clock and (state is y or torch.equal(state, y)):", "if state is y or torch.equal(state, y):"),
        ('options.setdefault("step_t", times[1:].to(x.device))', "pass"),
        ("self.process.drift(t.clamp(self.first, self.last), x)", "self.process.drift(t, x)"),
    ),
    *_of(
        "sampling",
        "sampling",
        ("return loc + std * stream.normal", "return loc + std**2 * stream.normal"),
        ("bound.denoised(grid[-1], x)", "bound.denoised(grid[0], x)"),
        ("stream = noise.open(rows.start)", "stream = noise.open(0)"),
        ("falling if direction < 0 else falling.flip(0)", "falling"),
        ("raise error.shifted(rows.start) from error", "raise"),
        ("nfe = max(nfe, counter.calls)", "nfe += counter.calls"),
    ),
    *_of(
        "likelihood",
        "likelihood",
        ("torch.cat([_flat(velocity.detach()), trace], dim=1)", "torch.cat([_flat(velocity.detach()), -trace], dim=1)"),
        ("integrals.std(1) / math.sqrt(integrals.shape[1])", "integrals.std(1)"),
        ("integrals.mean(1))", "integrals.sum(1))"),
        ("model.linear.log_snr(model.sde.t_max).exp() / 2", "model.linear.log_snr(model.sde.t_max).exp()"),
        ("torch.where(normal < 0, -1.0, 1.0)", "torch.where(normal < 0, -1.0, 2.0)"),
    ),
    *_of(
        "noise",
        "noise",
        (
            "generator.manual_seed((start + number) & 0xFFFFFFFF)",
            "generator.manual_seed((start + number - blocks.numbers[0]) & 0xFFFFFFFF)",
        ),
        (
            "generator.manual_seed((start + number) & 0xFFFFFFFF)",
            "generator.manual_seed((start + number // 2) & 0xFFFFFFFF)",
        ),
        ("[self.skip : self.skip + len(x)]", "[: len(x)]"),
        (
            "return over((s - t).abs().sqrt(), x) * self.unit(x, t, s)",
            "return over((s - t).abs(), x) * self.unit(x, t, s)",
        ),
        ("step / 2 * increment + step * (step / 12).sqrt()", "step / 2 * increment + step * (step / 3).sqrt()"),
        ("step / 2 * increment + step * (step / 12).sqrt()", "step * increment + step * (step / 12).sqrt()"),
        ("((path.t1 - path.t0) * width / 2) ** 0.5", "((path.t1 - path.t0) * width) ** 0.5"),
        ("middle = (left + right) / 2 +", "middle = (left + right) / 3 +"),
        ("mix(self._path.seed, 2, level, number)", "mix(self._path.seed, 2, level)"),
        ("np.random.Philox(key=[key, n])", "np.random.Philox(key=[key, 0])"),
        ("return self.value(x, s) - self.value(x, t)", "return self.value(x, t) - self.value(x, s)"),
        ("(self._path.t1 - self._path.t0) ** 0.5 if level == 0", "(self._path.t1 - self._path.t0) if level == 0"),
        (
            "state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK",
            "state = (state ^ (part & 0xFF)) + 0x9E3779B97F4A7C15 & _MASK",
        ),
    ),
    *_of(
        "bits",
        "bits",
        ("width = (high - low) / levels", "width = (high - low) / (levels - 1)"),
        ("result.value.double() / size + math.log(width)", "result.value.double() / size - math.log(width)"),
    ),
    *_of(
        "losses",
        "losses",
        ("** 2 / (2 * sde.sigma(t) ** 2)", "** 2 / (sde.sigma(t) ** 2)"),
        ("return 1 + (-sde.log_snr(t)).exp()", "return 1 + sde.log_snr(t).exp()"),
        ("(5 * (-sde.log_snr(t)).exp()).clamp(max=1)", "(5 * (-sde.log_snr(t)).exp()).clamp(max=5)"),
        (
            "((-sde.log_snr(t)).exp() + sigma_data**2) / sigma_data**2",
            "((-sde.log_snr(t)).exp() + sigma_data) / sigma_data**2",
        ),
        (
            "return (u + torch.arange(n, dtype=torch.float64) / n) % 1",
            "return (u + torch.arange(n, dtype=torch.float64)) % 1",
        ),
        ("_EDM_MEAN, _EDM_STD = -1.2, 1.2", "_EDM_MEAN, _EDM_STD = 1.2, 1.2"),
        ("return sde.time(-2 * log_s.clamp", "return sde.time(-log_s.clamp"),
        (
            "over((1 - from_x * sigma) / from_output, x0) * noise - over(",
            "over((1 - from_x * sigma) / from_output, x0) * noise + over(",
        ),
        (
            "scale = weight(sde, clock, model.sigma_data) * from_output**2",
            "scale = weight(sde, clock, model.sigma_data) * from_output.abs()",
        ),
        ("math.prod(x0.shape[1:])", "x0.shape[-1]"),
        ("return sde.t_min + u * (sde.t_max - sde.t_min)", "return u * (sde.t_max - sde.t_min)"),
    ),
    *_of(
        "training",
        "training",
        ("min(ema, (1 + k) / (10 + k))", "min(ema, k / (10 + k))"),
        ("return rise * 0.5 * (1 + float(", "return rise * 0.5 * (2 + float("),
        ("rise = min(1.0, (k + 1) / max(warmup, 1))", "rise = min(1.0, k / max(warmup, 1))"),
        ("torch.manual_seed(mix(seed, 11, k) >> 2)", "torch.manual_seed(mix(seed, 11) >> 2)"),
        ("for k in range(len(losses), steps):", "for k in range(steps):"),
        ("range(k * self._size, (k + 1) * self._size)", "range(k * self._size + 1, (k + 1) * self._size + 1)"),
        ("mix(self._seed, 12, epoch) >> 2", "mix(self._seed, 12) >> 2"),
        ("nn.utils.clip_grad_norm_(parameters, clip)", "nn.utils.clip_grad_value_(parameters, clip)"),
        ("adapt.zero_grad(set_to_none=True)", "pass"),
        ("use_buffers=True", "use_buffers=False"),
        ('restore_optimizer(adapt, part("optimizer."), file)', "pass"),
        ('averaged.n_averaged.copy_(tensors["n_averaged"])', "pass"),
        ('load_weights(averaged.module, part("averaged."), file)', 'load_weights(averaged.module, part("raw."), file)'),
        ("if not current.is_floating_point():", "if False:"),
        ("network.load_state_dict(averaged.module.state_dict())\n    network.eval()", "network.eval()"),
    ),
    *_of(
        "checkpoints",
        "checkpoints",
        ('"sigma_data": model.sigma_data,', '"sigma_data": 0.5,'),
        ("if getattr(processes, kind, None) is not type(sde):", "if getattr(processes, kind, None) is None:"),
        ('"own_time": model.time is not None', '"own_time": False'),
        ("process = sde if sde is not None else", "process = sde if sde is None else"),
        ("state.setdefault(int(index), {})[name] = value", "state.setdefault(int(index) + 1, {})[name] = value"),
    ),
    *_of(
        "networks",
        "networks",
        ("torch.cat([angle.cos(), angle.sin()], dim=1)", "torch.cat([angle.sin(), angle.cos()], dim=1)"),
        ("(t + self.offset).log()", "t.log()"),
        ("* (1 + scale) + shift", "* scale + shift"),
        ("time = time + self.label(condition)", "time = time * self.label(condition)"),
        ("nn.init.zeros_(self.second.weight)", "pass"),
        (
            "return self.unet(x, t * self.time_scale, class_labels=condition)",
            "return self.unet(x, t, class_labels=condition)",
        ),
    ),
    *_of(
        "metrics",
        "metrics",
        ("(len(c) * (len(c) - 1))", "(len(c) * len(c))"),
        ("return 2 * torch.cdist(a, b).mean()", "return torch.cdist(a, b).mean()"),
        ("axes = axes / axes.norm(dim=0)", "axes = axes / axes.norm(dim=1, keepdim=True)"),
        (".square().mean().sqrt().item()", ".square().mean().item()"),
        ("(levels * len(ranked)).long()", "(levels * (len(ranked) - 1)).long()"),
        ("torch.arange(max(len(a), len(b))", "torch.arange(min(len(a), len(b))"),
    ),
    *_of(
        "moments",
        "moments sde",
        ("np.exp(np.where(long[:, None], 0, -2 * log_alpha))", "np.exp(np.where(long[:, None], 0, -log_alpha))"),
        ("var = np.exp(2 * step) * (var_0", "var = np.exp(step) * (var_0"),
        ("starts = [(0.0, initial_std**2)]", "starts = [(0.0, initial_std)]"),
        (
            "return log_alpha_0 + step, (2 * step).exp() * (var_0 +",
            "return log_alpha_0 + step, (2 * step).exp() * var_0 + (",
        ),
        ("right=True) - 1", "right=True) - 2"),
        ("_MEAN = _INTEGRATE / (1 + _X)[:, None]", "_MEAN = _INTEGRATE / (2 + _X)[:, None]"),
        (
            "low, high = series[..., k] + 2 * x * low - high, low",
            "low, high = series[..., k] + 2 * x * low + high, low",
        ),
        ("_ROUNDING = 2e-14", "_ROUNDING = 2e-4"),
        ("_DEEPEST = 48", "_DEEPEST = 4"),
    ),
    *_of("processes", "processes", ("return -beta / 2, beta.sqrt()", "return -beta, beta.sqrt()")),
    *_of("sampling", "sampling", ("    network.eval()\n    try:", "    try:")),
    *_of(
        "sampling", "likelihood", ("return abs(t.item() - model.sde.t_max) <= SLACK * model.sde.t_max", "return True")
    ),
    *_of("linear", "sampling", ("with torch.inference_mode(False), torch.enable_grad():", "with torch.enable_grad():")),
    *_of(
        "sde",
        "sde",
        ("diffusion.reshape(() if diffusion.numel() == 1", "2 * diffusion.reshape(() if diffusion.numel() == 1"),
    ),
]


def killed(mutant: Mutant) -> bool:
    """Whether the tests fail on a copy of the package with the change."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "sdediff", copy / "sdediff", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "sdediff" / f"{mutant.module}.py"
        text = file.read_text()
        assert text.count(mutant.original) == 1, mutant
        changed = text.replace(mutant.original, mutant.changed)
        compile(changed, str(file), "exec")
        file.write_text(changed)
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-n", "0"]
        command += [f"tests/{name}" for name in mutant.tests]
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_PROFILE": "mutants",
        }
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        return done.returncode in (1, 2)  # a test failed, or its module could not even be imported


def main(modules: list[str]) -> int:
    """Run the mutants of these modules (all if none are named); the number that survive."""
    chosen = [m for m in MUTANTS if not modules or m.module in modules]
    survivors = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for mutant, dead in zip(chosen, pool.map(killed, chosen), strict=True):
            survivors += not dead
            print(
                f"{'killed  ' if dead else 'SURVIVED'} {mutant.module}: {mutant.original} -> {mutant.changed}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
