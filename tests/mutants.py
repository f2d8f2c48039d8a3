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
        ("added = at.sigma[:-1] * _fresh(at).sqrt()", "added = at.sigma[:-1] * _fresh(at)"),
        ("model.weights_at(at[:-1], at.alpha[1:], kept)", "model.weights_at(at[:-1], at.alpha[:-1], kept)"),
        ("[keep + a * b for keep, a, b in", "[keep + b for keep, a, b in"),
        ("[a * b for a, b in zip(added, rows.in_output, strict=True)]", "added"),
        ("flat = self.flat if x is self.last else x.reshape(1, -1)", "flat = self.flat"),
        ("_Kind(model.linear, model.prediction, model.sigma_data)", "_Kind(model.linear, 'v', model.sigma_data)"),
        ("for k in range(ends[i], ends[i + 1]):", "for k in range(ends[i], ends[i] + 1):"),
        ("(torch.arange(count)[:, None] - torch.arange(depth)) % depth", "torch.arange(depth).expand(count, depth)"),
        ("torch.mul(x, self.in_x[k], out=slot).add_", "torch.mul(x, self.in_x[0], out=slot).add_"),
        ("out=slot).add_(output, alpha=self.in_output[k])", "out=slot).add_(output)"),
        ("self.values, beta=self.kept[k])", "self.values, beta=1.0)"),
        ("self.values.appendleft(", "self.values.append("),
        ("value.add(x, alpha=self.in_x[k])", "value.add(x, alpha=-self.in_x[k])"),
        ("after = self.kept[k] * x", "after = self.kept[0] * x"),
        ("alpha=jitter[k]) if jitter[k]", "alpha=jitter[k] ** 2) if jitter[k]"),
    ),
    *_of(
        "tables",
        "exponential",
        ("torch.mul(output, self.in_output[k], out=slot)", "torch.mul(output, self.in_output[0], out=slot)"),
        ("_NEGLIGIBLE = 1e-13", "_NEGLIGIBLE = 1e-1"),
        (
            "if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):",
            "if torch.is_autocast_enabled(x.device.type):",
        ),
        ('torch.get_float32_matmul_precision() == "highest"', "True"),
    ),
    *_of(
        "tables",
        "sampling",
        ("_Kind(model.linear, model.prediction, model.sigma_data)", "_Kind(model.linear, model.prediction, 0.5)"),
        ("if solver.fixed and model.sde.fixed and times", "if model.sde.fixed and times"),
    ),
    *_of(
        "exponential",
        "exponential",
        ("-np.expm1(2 * level**2 *", "-np.expm1(level**2 *"),
        ("_quadrature(ratio**p, np.ones_like(p))", "_quadrature(ratio, np.ones_like(p))"),
        ("- np.log(v) / p[:, None]", "- np.log(v)"),
        ("keep=end.sigma / start.sigma * ratio ** (level**2)", "keep=end.sigma / start.sigma * ratio**level"),
        ("spread=end.sigma * np.sqrt(_fresh(np.log(ratio), level))", "spread=end.sigma * _fresh(np.log(ratio), level)"),
        ("weights=end.alpha[:, None] * weights", "weights=start.alpha[:, None] * weights"),
        ("v, weights = _quadrature(s, e)", "v, weights = _quadrature(e, s)"),
        ("level**2 * (s**2 - e**2)", "level**2 * (s - e) ** 2"),
        ("weights=((1 + level**2) * end.alpha)", "weights=((1 + level) * end.alpha)"),
        ("k = (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()", "k = (sigma**2 + self.sigma_data**2).sqrt()"),
        (
            "sigma / (self.sigma_data * k), -alpha * self.sigma_data / k",
            "sigma / (self.sigma_data * k), alpha * self.sigma_data / k",
        ),
        (
            "np.log((sigma + 0.003 * signal) / (signal + sigma / self.cut))",
            "np.log((sigma + 0.003) / (signal + sigma / self.cut))",
        ),
        ("self.sigma_data * (np.exp(u) - 0.003)", "(np.exp(u) - 0.003)"),
        ("ratio = (signal_s * k_e) / (k_s * signal_e)", "ratio = k_e / k_s"),
        (
            "(np.cos(angle) / (signal_e / k_e)[:, None]) ** (level**2)",
            "(np.cos(angle) / (signal_e / k_e)[:, None]) ** (level)",
        ),
        ("weights=((1 + level**2) * k_e)", "weights=((1 + level**2) * k_s)"),
        ("if other != j:", "if other > j:"),
        ("np.arange(known - 1, known if known < order else count)", "np.arange(known - 1, known)"),
        ("nodes[rows[:, None] + ahead - np.arange(known + ahead)]", "nodes[rows[:, None] - np.arange(known + ahead)]"),
        ("change[:, 1:] -= predict", "change[:, :-1] -= predict"),
        ("out[1:] += keep[1:, None] * change[:-1]", "out[1:] += keep[:-1, None] * change[:-1]"),
        ("out[1:] += keep[1:, None] * change[:-1]", "out[1:] += change[:-1]"),
        ("correct[order - 1 :] = np.pad", "correct[0:] = np.pad"),
        ("2 if steps < 8 else 3 if steps < 25", "2 if steps < 8 else 3 if steps <= 25"),
        ("order if self.deterministic else min(order, 2)", "order"),
        ('model.sigma_data if model.prediction == "edm" else 1.0', "model.sigma_data"),
        ("middles = (times[1:] + times[:-1]) / 2", "middles = times[:-1]"),
        ("correct[0, :2] = half[0], total[0] - half[0]", "correct[0, :2] = total[0] - half[0], half[0]"),
        ("correct = np.stack([half, total - half], axis=1)", "pass"),
        ("pairs = slice(1, 2) if order > 2 else slice(1, None)", "pairs = slice(1, None)"),
        ("np.diff(nodes)[1:] / np.diff(nodes)[:-1]", "np.diff(nodes)[:-1] / np.diff(nodes)[1:]"),
        ("predict[pairs, 1] = -slope[: len(predict[pairs])]", "predict[pairs, 1] = slope[: len(predict[pairs])]"),
        ("total / -np.expm1(-h) * h / 2", "total / np.expm1(h) * h / 2"),
        ("np.arange(1, stages) / stages * np.diff", "np.arange(1, stages) / (stages + 1) * np.diff"),
        ("A[:, k] = steps.keep / kept", "A[:, k] = steps.keep"),
        ("(new - A[:, k, None] * said)[:, k::-1]", "new[:, k::-1]"),
        ("used = [0, k] if k else [0]", "used = [0]"),
        (
            "grids.tapered(model.linear, steps, sigma_data=sigma_data, t_min=t_min)",
            "grids.tapered(model.linear, steps, t_min=t_min)",
        ),
    ),
    *_of(
        "adaptive",
        "adaptive",
        ("length = np.where(last, left, np.where(length > left / 2, left / 2, length))", "pass"),
        ("np.where(last, self.ends[target], u + self.sign * length)", "np.where(last, self.ends[target], u + length)"),
        ("linear + _total(weights, values)", "linear + 1.1 * _total(weights, values)"),
        (
            "over(torch.from_numpy(corrected[:, 0]), x) * value",
            "over(torch.from_numpy(corrected[:, 0]), x) * values[0]",
        ),
        ("unit = self.splitting.sigma_data / np.hypot(", "unit = 1 / np.hypot("),
        (
            "self.solver.rtol * (scale * torch.maximum(x.abs(), new.abs()))",
            "self.solver.rtol * torch.maximum(x.abs(), new.abs())",
        ),
        ("self.solver.atol + self.solver.rtol *", "self.solver.atol + 0 *"),
        ("norm(scale * (new - predicted) / allowed)", "norm(scale * (new - predicted))"),
        ("good = error <= 1", "good = error <= 100"),
        ("self._value(self.model.rows(index, len(self.x)), t, predicted)", "self._value(self.model, t, predicted)"),
        (
            "self._value(self.model.rows(index, len(self.x)), t, predicted)",
            "self._value(self.model.rows(index, len(self.x)), t, x)",
        ),
        ("self.nfe[index] += 1", "self.nfe[kept] += 1"),
        ("self.rejected[index[~moved]] += 1", "self.rejected[index] += 1"),
        ("self.values[1:, kept] = self.values[:-1, kept]", "pass"),
        (
            "np.concatenate([after[good, None], self.nodes[rows[good], :-1]], axis=1)",
            "np.concatenate([self.nodes[rows[good], :-1], after[good, None]], axis=1)",
        ),
        (
            "fewer[those, : order - 1] = interpolated(part, nodes[:, :-1])",
            "fewer[those, :order] = interpolated(part, nodes)",
        ),
        (
            "part, nodes = steps[those], self.nodes[rows[those], :order]",
            "part, nodes = steps[: len(those)], self.nodes[rows[those], :order]",
        ),
        ("np.where(self.failed[rows], 1.0, 2.0)", "2.0"),
        ("error ** (-0.7 / (order + 1))", "error ** (-0.7 / order)"),
        ("np.clip(strict, 0.2, 0.9)", "np.clip(strict, 0.9, 1.0)"),
        ("below ** (-1 / order) > error ** (-1 / (order + 1))", "below ** (-1 / order) < error ** (-1 / (order + 1))"),
        ("np.where(lower, order - 1, np.where(good, order + 1, order))", "order"),
        ("np.minimum(wanted, self.known[rows])", "np.minimum(wanted, 1)"),
        ("self.nfe.numpy()[going] < self.solver.max_nfe", "self.nfe.numpy()[going] <= self.solver.max_nfe"),
        ("stuck = ~good & (length < _SHORTEST)", "stuck = ~good & (length < 0)"),
        ("rows=which.tolist()", "rows=np.flatnonzero(stuck).tolist()"),
        ("return last & good", "return last"),
        ("math.copysign(1.0, self.ends[-1] - self.ends[0])", "-1.0"),
    ),
    *_of(
        "calibration",
        "calibration",
        ("(truth - truth.mean(0)).double().square().mean()", "truth.double().square().mean()"),
        ("abs(math.log(known / steps))", "abs(known - steps)"),
        (
            "mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])",
            "mass = np.concatenate([[0], np.cumsum(1 / density[1:])])",
        ),
        (
            "grid_for(model, 40 * max(n, 25), sigma_data, t_min)",
            "grid_for(model, 40 * max(n, 25), 1.0, t_min)",
        ),
        ("np.linspace(min(span), max(span), _KNOTS), shape", "np.linspace(min(span), max(span), _KNOTS), shape[::-1]"),
        ("density = np.exp(spline(log_s))", "density = 1 + spline(log_s)"),
        ("if cost(found) < cost(best):", "if cost(found) > cost(best):"),
        ("if cost(found) < cost(best):", "if found[0] < best[0]:"),
        ("return order, shape, best[0]", "return order, shape, best[1]"),
        ("order, shape, best, size = other, candidate, found,", "shape, best, size = candidate, found,"),
        ("return math.inf, math.inf", "return 0.0, 0.0"),
        ("rows.sqrt().median().item()", "rows.sqrt().mean().item()"),
        ("calls += len(times) - 1", "calls += len(times)"),
        ("errors(usual, Exponential().grid(model, n, t_min))[0]", "errors(usual, plain.grid(model, n, t_min))[0]"),
    ),
    *_of(
        "grids",
        "grids",
        (
            "return mean * level - half * (level**2 + _CORNER**2).sqrt()",
            "return mean * level - half * (level**2 + _CORNER).sqrt()",
        ),
        (
            "return mean * level - half * (level**2 + _CORNER**2).sqrt()",
            "return mean * level + half * (level**2 + _CORNER**2).sqrt()",
        ),
        ("knee = _KNEE + math.log(sigma_data)", "knee = _KNEE"),
        ("(u**2 - (half * _CORNER) ** 2)", "(u**2 + (half * _CORNER) ** 2)"),
        ("(mean * u + square.sqrt()) / _SPARSE", "(mean * u - square.sqrt()) / _SPARSE"),
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
        ("3 / 40, 9 / 40", "9 / 40, 3 / 40"),
        ("-2187 / 6784, 11 / 84, 0)", "-2187 / 6784, 11 / 84 + 1e-4, -1e-4)"),
        ("error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8)", "error=(5 / 72, -1 / 12, 1 / 9, -1 / 9)"),
        ("22 / 525, -1 / 40)", "22 / 525 - 1 / 40, 0)"),
        ("(-1, 2)), b=(1 / 6, 2 / 3, 1 / 6)", "(1 / 2, 1 / 2)), b=(1 / 6, 2 / 3, 1 / 6)"),
        ("x.add(slope, alpha=length * weight)", "x.add(slope, alpha=length)"),
        ("parts.to(times.device))", "torch.zeros_like(parts))"),
        ("drift(i * n + j,", "drift(i * n,"),
        ("self.a[-1] == self.b[:-1]", "True"),
        ("- 2 * math.log1p(gamma)", "- math.log1p(gamma)"),
        ("(scales[i] * x).add", "(1.0 * x).add"),
        ("alpha=jitters[i]", "alpha=jitters[i] ** 2"),
        ("math.sqrt(2) - 1)", "math.sqrt(2))"),
        (".clamp(min=sde.log_snr(sde.t_max).item())", ".clamp(min=sde.log_snr(0.9 * sde.t_max).item())"),
        ("keep = (frame.scale[n:] / frame.scale[:n])", "keep = (frame.scale[:n] / frame.scale[n:])"),
        ("(frame.scale[n:] * (frame.clock[n:]", "(frame.scale[:n] * (frame.clock[n:]"),
        ("frame.drift(n + i, ahead)", "frame.drift(i, ahead)"),
        ("alpha=lengths[i] / 2)", "alpha=lengths[i])"),
        ("        if not defined[i]:\n            return ahead\n", ""),
        ("if bool(endless.any()):", "if False:"),
    ),
    *_of(
        "stochastic",
        "stochastic",
        ("times[1:], 3 / 4)", "times[1:], 2 / 3)"),
        ("alpha=3 / 4 * h)", "alpha=2 / 3 * h)"),
        ("alpha=h / 3)", "alpha=h / 4)"),
        ("alpha=2 / 3 * h)", "alpha=3 / 4 * h)"),
        ("3 / 2 / abs(h) * late", "1 / abs(h) * late"),
        ("3 / 2 / abs(h) * late", "3 / 2 / h * late"),
        ("3 / 2 / abs(h) * late", "3 / 2 / abs(h) * early"),
        ("_plus(after, late, increment)", "_plus(after, early, increment)"),
        ("(early - late) / abs(h)", "(late - early) / abs(h)"),
        ("(early - late) / abs(h)", "(early - late) / h"),
        ("return x + over(weight, x) * y if", "return x + y if"),
        ("        refuse_singular_start(process, x, times, self)\n", ""),
    ),
    *_of(
        "langevin",
        "langevin",
        ("-2 * self.snr**2 * sigma)", "-(self.snr**2) * sigma)"),
        ("jitter = (2 * self.snr * sigma).tolist()", "jitter = (self.snr * sigma).tolist()"),
        ("self.steps if jitter[k] else 0", "self.steps"),
        ("self.steps if noisy[k] else 0", "self.steps"),
        ("(sum_rows(z**2) / sum_rows(slope**2)).sqrt()", "(sum_rows(z**2) / sum_rows(slope**2))"),
        ("(sum_rows(z**2) / sum_rows(slope**2)).sqrt()", "((z**2).sum() / (slope**2).sum()).sqrt().expand(len(x))"),
        ("over(2 * ratio**2, x)", "over(ratio**2, x)"),
        ("over(2 * ratio, x) * z", "over(ratio, x) * z"),
        ("correct(i + 1, predict(i, x))", "correct(i, predict(i, x))"),
        ("return self.predictor.process(model)", "return Reverse(model, 1.0)"),
        ("(alpha[1:] / alpha[:-1])", "(alpha[:-1] / alpha[1:])"),
        ("(x if i else move(0, x))", "x"),
    ),
    *_of(
        "adapters",
        "adapters langevin",
        ("(0.0, 3 / 4, 1.0)", "(0.0, 2 / 3, 1.0)"),
        ('"heun3": _Method(3, (0.0, 1 / 3, 2 / 3))', '"heun3": _Method(3, (0.0, 1 / 3, 1.0))'),
        ("asked.to(dtype).tolist()", "asked.tolist()"),
        ("asked.clamp(low, high)", "asked"),
        ("self._process.drift(as_float64(t), x) if k is None", "self._process.drift(as_float64(0.5), x) if k is None"),
        ("self._last[0] != t or self._last[1] is not y", "self._last[1] is not y"),
        ("self._last[0] != t or self._last[1] is not y", "self._last[0] != t"),
        ("self._last[0] != t or self._last[1] is not y", "True"),
        ("return self.g(t, y) * v", "return self.g(t, y) * v * 2"),
        ("* math.copysign(1, tb - ta)", "* 1"),
        ("times.diff().abs().sqrt().tolist()", "times.diff().abs().tolist()"),
        ("if not last or x is not last[0]:", "if not last:"),
        ('options.setdefault("step_t", times[1:].to(x.device))', "pass"),
        ("self.process.drift(t.clamp(self.first, self.last), x)", "self.process.drift(t, x)"),
    ),
    *_of(
        "sampling",
        "sampling",
        ("return loc + std * stream.normal", "return loc + std**2 * stream.normal"),
        ("bound.denoised(t, x) if", "bound.denoised(grid[0], x) if"),
        ("grid[-1] if tally.reached is None else tally.reached, x)", "grid[-1], x)"),
        ("if run.every and (i % run.every == 0 or i == last)", "if run.every and i % run.every == 0"),
        ("grid[sorted({*range(0, last + 1, every), last})]", "grid[sorted({*range(0, last, every)})]"),
        (
            "with torch.set_grad_enabled(differentiable):\n        return _run(model, solver",
            "with torch.no_grad():\n        return _run(model, solver",
        ),
        ("model.is_linear else RungeKutta()", "model.is_linear else Exponential()"),
        ("tally.nfe = tally.nfe + counter.calls - before", "pass"),
        ("total=len(chunks) * last", "total=last"),
        ("if solver.fixed and model.sde.fixed and", "if solver.fixed and"),
        ("model.sigma_data, steps, t_min).clone()", "model.sigma_data, steps, t_min)"),
        ("model.sigma_data, steps, t_min).clone()", "0.5, steps, t_min).clone()"),
        ("stream = noise.open(rows.start)", "stream = noise.open(0)"),
        ("falling if direction < 0 else falling.flip(0)", "falling"),
        ("raise error.shifted(rows.start) from error", "raise"),
        ("nfe = max(nfe, counter.calls if tally.nfe is None else int(tally.nfe.max()))", "nfe += counter.calls"),
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
        "draws",
        "noise",
        ("generator_seed(start, number)", "generator_seed(start, number - self._blocks.numbers[0])"),
        ("generator_seed(start, number)", "generator_seed(start, number // 2)"),
        ("[:, self.skip : self.skip + self.shape[0]]", "[:, : self.shape[0]]"),
        (
            "state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK",
            "state = (state ^ (part & 0xFF)) + 0x9E3779B97F4A7C15 & _MASK",
        ),
        ("mix(self._seed, len(self._streams))", "mix(self._seed, 0)"),
        (".transpose(0, 1).reshape(k, count * self.rows, -1)", ".reshape(k, count * self.rows, -1)"),
        ("return self._ready.pop()", "return self._ready[-1]"),
        ("with torch.inference_mode(False):", "with torch.no_grad():"),
    ),
    *_of(
        "brownian",
        "brownian",
        ("return np.minimum(x, 1 - x)[None, None]", "return np.sqrt(x * (1 - x))[None, None]"),
        ("return np.sqrt(x * (1 - x))[None, None]", "return np.minimum(x, 1 - x)[None, None]"),
        ("root3 * x * (1 - x)]", "root3 * x * (1 - x) / 2]"),
        ("[x**2 / 2, root3 * (x**2 / 2 - x**3 / 3)]", "[x**2, root3 * (x**2 / 2 - x**3 / 3)]"),
        ("[y * (3 * y - 2) / 4,", "[y * (3 * y - 2) / 2,"),
        ("side * root3 / 2 * y * (1 - y)]", "root3 / 2 * y * (1 - y)]"),
        ("[side * y**2 * (y - 1) / 8,", "[y**2 * (y - 1) / 8,"),
        ("root3 / 4 * (y**2 / 2 - y**3 / 3)", "side * root3 / 4 * (y**2 / 2 - y**3 / 3)"),
        ("[np.sqrt(both) * spread, 0 * x]", "[np.sqrt(both), 0 * x]"),
        ("(y - x) / 2 * area", "(x - y) / 2 * area"),
        ("area / math.sqrt(12)", "area / math.sqrt(3)"),
        ("[widths**0.5, widths**1.5]", "[widths**0.5, widths**0.5]"),
        ("widths = length / self._per_width", "widths = 1 / self._per_width"),
        ("phi[..., -1:] = self.basis.leaf(place[-1:])", "phi[..., -1:] = self.basis.node(place[-1:])"),
        ("np.count_nonzero(place % 1.0)", "(self.depth + 1)"),
        ("(index & self._masks)", "0 * index"),
        ("phi.swapaxes(1, 2)", "phi.swapaxes(0, 1).swapaxes(1, 2)"),
        ("generator_seed(self._start, first + group)", "generator_seed(self._start, first)"),
        ("first += 1 << depth * self._together", "first += 1"),
        ("if group != self._latest[depth]:", "if self._latest[depth] < 0:"),
        ("_Branch(self._tree, mix(seed, n), entries)", "_Branch(self._tree, mix(seed, 0), entries)"),
    ),
    *_of(
        "noise",
        "noise brownian",
        (
            "return over((s - t).abs().sqrt(), x) * self.unit(x, t, s)",
            "return over((s - t).abs(), x) * self.unit(x, t, s)",
        ),
        (
            "step / 2 * increment + step * (step / 12).sqrt() * second",
            "step / 2 * increment + step * (step / 3).sqrt() * second",
        ),
        (
            "step / 2 * increment + step * (step / 12).sqrt() * second",
            "step * increment + step * (step / 12).sqrt() * second",
        ),
        ("return (after[0] - before[0]).to(x)", "return (before[0] - after[0]).to(x)"),
        (
            "(after[0] - before[0]) / abs(s.item() - t.item()) ** 0.5",
            "(after[0] - before[0]) / abs(s.item() - t.item())",
        ),
        ("total - area if step > 0 else area - total", "total - area"),
        ("- abs(step) * start", "- step * start"),
        ("first_row=self._first_row,", "first_row=0,"),
        ("seed=mix(path.seed, 2)", "seed=mix(2)"),
        ("if known == time:", "if abs(known - time) < 1e-2:"),
        ("if x.shape != self._shape:", "if self._shape is None:"),
        ("if 0 < step < (1 - 1e-6) * self._path.shortest_step", "if 0 < step < 0.5 * self._path.shortest_step"),
        ("torch.stack([numbers, -numbers], dim=1)", "torch.stack([numbers, numbers], dim=1)"),
        ("[self._odd : self._odd + len(x)]", "[: len(x)]"),
        ("x[: (self._odd + len(x) + 1) // 2]", "x[: (len(x) + 1) // 2]"),
        ("return numbers[self._index]", "return numbers[: len(self._index)]"),
        ("self.noise.open(first_row // 2), first_row % 2", "self.noise.open(first_row), first_row % 2"),
        ("[self._given - 1, self._first_row : last_row]", "[self._given - 1, : len(x)]"),
        ("(integral - step / 2 * increment) / (step * (step / 12).sqrt())", "integral / (step * (step / 12).sqrt())"),
        ("self._draws.append(draw.clone())", "self._draws.append(draw)"),
        ("if row >= first_row]", "if row < first_row]"),
    ),
    *_of(
        "bits",
        "bits",
        ("result.value.detach() - log_q", "result.value.detach() + log_q"),
        ("chosen.draw(bins, seed, k)", "chosen.draw(bins, seed, 0)"),
        ("seed=mix(seed, 6, k) >> 2", "seed=mix(seed, 6, 0) >> 2"),
        ("log_weights.logsumexp(0) - math.log(count)", "log_weights.logsumexp(0)"),
        ("log_weights.logsumexp(0) - math.log(count)", "log_weights.mean(0)"),
        ("relative.std(0) / math.sqrt(count)", "relative.std(0) / count"),
        ("relative.std(0) / math.sqrt(count)", "log_weights.std(0)"),
        ("(relative * noise**2).mean(0) / 2", "(noise**2).mean(0) / 2"),
        ("unit = size * math.log(2)", "unit = math.log(2)"),
        ("-self.value * self.entries * math.log(2)", "-self.value * self.entries"),
        ("self.value.std().item() / math.sqrt(len(self.value))", "self.value.std().item()"),
        ("nfe + result.nfe", "result.nfe"),
        (
            """options.get("t_min") if times is None or len(times) == 0 else float(times[0])""",
            """options.get("t_min")""",
        ),
        ('if given not in (None, "none"):', "if False:"),
    ),
    *_of(
        "dequantize",
        "dequantize bits",
        ("(high - low) / levels) if transform", "(high - low) / (levels - 1)) if transform"),
        ("return torch.minimum(first, last), torch.maximum(first, last)", "return first, last"),
        (
            "torch.special.ndtr(_normals(bins, seed, sample)))\n        return x, -log_det",
            "torch.special.ndtr(_normals(bins, seed, sample)))\n        return x, log_det",
        ),
        ("torch.full_like(wide(bins.codes), 0.5)", "torch.full_like(wide(bins.codes), 0.0)"),
        ("torch.erf(alpha * (edge - centre)", "torch.erf((edge - centre)"),
        ("(sigma * math.sqrt(2))) for edge", "sigma) for edge"),
        ("z = math.sqrt(2) * torch.erfinv", "z = torch.erfinv"),
        ("-(z**2) / 2 - math.log(sigma * math", "-(z**2) - math.log(sigma * math"),
        ("math.log(sigma * math.sqrt(2 * math.pi))", "math.log(math.sqrt(2 * math.pi))"),
        ("- ((e_high - e_low) / 2).log()", "- (e_high - e_low).log()"),
        ("return alpha * centre + sigma * z, sum_rows(log_q)", "return centre + sigma * z, sum_rows(log_q)"),
        ("RowDraws(mix(seed, 5, sample), 0)", "RowDraws(mix(seed, 5), 0)"),
        ("y = m + log_s.exp() * (log_v - log_rest)", "y = m + log_s * (log_v - log_rest)"),
        ("log_v + log_rest - log_s - inside", "log_v + log_rest + log_s - inside"),
        ("log_v + log_rest - log_s - inside", "log_v + log_rest - log_s + inside"),
        ("log_v + log_rest - log_s - inside) - log_det", "log_v + log_rest - log_s - inside)"),
        ("score = alpha * bins.model.score", "score = bins.model.score"),
        ("(sum_rows(wide(score) * x) - log_q)", "(sum_rows(wide(score) * x) + log_q)"),
        ("loss = -_climbing", "loss = _climbing"),
        ("mix(seed, 21, k), rows_of(condition, rows, len(codes))", "mix(seed, 21, k), condition"),
        ("model=self.model.rows(index, len(self.codes))", "model=self.model"),
        ("copy.deepcopy(self.network)", "self.network"),
        ("torch.promote_types(own, torch.float32)", "own"),
        ("2 * codes / (bins.levels - 1) - 1", "codes"),
        ("with torch.random.fork_rng([]):", "if True:"),
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
    *_of(
        "processes",
        "processes",
        ("return -beta / 2, beta.sqrt()", "return -beta, beta.sqrt()"),
        ("return -beta / 2 * alpha, beta / 2 * alpha**2 / sigma", "return -beta / 2 * alpha, beta * alpha**2 / sigma"),
        ("return -beta / 2 * alpha, beta * alpha**2", "return -beta / 2 * alpha, beta * alpha"),
        ("return beta_min + (beta_max - beta_min) * t", "return beta_min + (beta_max - beta_min) / 2 * t"),
        ("_sigmoid(self.ramp * (2 * t - 1))", "_sigmoid(self.ramp * (t - 1))"),
        ("(3 * c3 * offset + 2 * c2) * offset + c1", "(3 * c3 * offset + c2) * offset + c1"),
        ("return d_alpha, -alpha * d_alpha / sigma", "return d_alpha, alpha * d_alpha / sigma"),
        ("2 * quarter / (quarter * (1 - as_time(t))).tan()", "quarter / (quarter * (1 - as_time(t))).tan()"),
    ),
    *_of(
        "linear",
        "runge_kutta",
        ("return Frame(alpha, sigma / alpha, sigma > 0, noise)", "return Frame(alpha, sigma, sigma > 0, noise)"),
        ("torch.full_like(times, 1 + noise_level**2)", "torch.full_like(times, 1 + noise_level)"),
    ),
    *_of("sampling", "sampling", ("        module.training = False\n", "        pass\n")),
    *_of(
        "sampling", "likelihood", ("return abs(t.item() - model.sde.t_max) <= SLACK * model.sde.t_max", "return True")
    ),
    *_of(
        "linear", "processes", ("with torch.inference_mode(False), torch.enable_grad():", "with torch.enable_grad():")
    ),
    *_of(
        "sde",
        "sde",
        ("diffusion.reshape(() if diffusion.numel() == 1", "2 * diffusion.reshape(() if diffusion.numel() == 1"),
    ),
    *_of(
        "embedded",
        "embedded",
        ("self.error[rows] ** (0.4 / order)", "self.error[rows] ** (-0.4 / order)"),
        ("predicted = 0.9 * length / self.before[rows]", "predicted = 0.9 * self.before[rows] / length"),
        ("np.fmin(smooth, predicted)", "smooth"),
        ("np.where(self.failed[rows], 1.0, 5.0)", "5.0"),
        ("np.where(length < wanted, np.maximum(smooth, wanted), smooth)", "smooth"),
        ("0.9 * error ** (-1 / order), 0.1", "0.9 * error ** (-1 / order), 0.5"),
        ("at = after if part == 1 else t + part * signed", "at = after"),
        ("self.solver.rtol * torch.maximum(x.abs(), new.abs())", "self.solver.rtol * x.abs()"),
        (
            "norm(h * _total(self.method.error or (), slopes) / allowed)",
            "norm(h * _total(self.method.b, slopes) / allowed)",
        ),
        ("new = x + h * _total(self.method.b, slopes)", "new = x + h * _total(self.method.a[-1] + (0,), slopes)"),
        ("self.known[rows[good]] = self.method.fsal", "self.known[rows[good]] = True"),
        ("self.nfe[index] += len(slopes) - 1", "self.nfe[index] += len(slopes)"),
        ("+ len(self.method.b) - self.known[going]", "+ len(self.method.b)"),
        (
            "process, x = self.process.rows(index, len(self.x)), self.x[index]",
            "process, x = self.process, self.x[index]",
        ),
        ("those = self.process.rows(index, len(self.x))", "those = self.process"),
        ("0.01 * size / speed)", "0.1 * size / speed)"),
        ("(slope - self.slope) * self.span / allowed) / trial", "(slope - self.slope) * self.span / allowed)"),
        ("np.maximum(speed, change)) ** (1 / self.method.order)", "speed) ** (1 / self.method.order)"),
        ("norm(self.slope * self.span / allowed)", "norm(self.slope / allowed)"),
        ("joined = done if tally.nfe is None else merged([tally, done])", "joined = done"),
        (" / max(e[:1].numel(), 1)).sqrt()", ").sqrt()"),
    ),
    *_of("reverse", "embedded", ("return replace(self, model=self.model.rows(index, batch))", "return self")),
    *_of(
        "likelihood",
        "embedded",
        ("else self.vectors[:, index.to(self.vectors.device)]", "else self.vectors[:, : len(index)]"),
        ("_WithLogDensity(self.model.rows(index, batch), self", "_WithLogDensity(self.model, self"),
    ),
    *_of(
        "adaptive_sde",
        "adaptive_sde",
        ("np.exp(m - e) * np.expm1(s - m)", "np.expm1(s - m)"),
        ("-(self.noise_level**2) * np.log1p", "-self.noise_level * np.log1p"),
        ("_times(f, unit) + _times(g, fresh)", "_times(g, unit) + _times(f, fresh)"),
        ("_times(g, unit) - _times(f, fresh)", "_times(g, unit) + _times(f, fresh)"),
        ("_times(g, unit) - _times(f, fresh)", "0 * unit - fresh"),
        ("(1 << self.level[rows]) + self.place[rows], self.x", "self.place[rows], self.x"),
        ("self.place[rows] = after >> up", "self.place[rows] = after"),
        ("np.cbrt(_ALLOWED", "np.sqrt(_ALLOWED"),
        ("1e3) ** 2 / length**3", "1e3) ** 2 / length**2"),
        ("_NEWEST = 0.3", "_NEWEST = 1.0"),
        ("np.where(good, 4.0, 0.5)", "np.where(good, 4.0, 1.0)"),
        (
            "weights[:, 0], arrived) + _times(weights[:, 1], value)",
            "weights[:, 1], arrived) + _times(weights[:, 0], value)",
        ),
        ("predicted = moved + _times(weights.sum(1), value)", "predicted = moved + _times(weights[:, 1], value)"),
        ("self.value[kept] = new[taken]", "self.value[kept] = predicted[taken]"),
        ("norm(_times(scale, new - predicted) / allowed)", "norm((new - predicted) / allowed)"),
        ("self.solver.rtol * _times(scale, torch", "self.solver.rtol * _times(scale**0, torch"),
        ("self.nfe.numpy()[going] < self.solver.max_nfe", "self.nfe.numpy()[going] <= self.solver.max_nfe"),
        ("self._value(self.model.rows(index, len(self.x)), t, predicted)", "self._value(self.model, t, predicted)"),
        ("self.signs[rows, None] * numbers", "numbers"),
        ("bits = np.abs(draw).view", "bits = draw.view"),
        ("odd = 2 * np.arange(", "odd = 0 * np.arange("),
        (
            "keyed_normals(self.keys[rows], place, target, shape.numel())",
            "keyed_normals(self.keys[rows], place, 0, shape.numel())",
        ),
    ),
    *_of(
        "keyed",
        "keyed",
        ("_ROUNDS = 10", "_ROUNDS = 9"),
        ("np.uint64(0xCD9E8D57)", "np.uint64(0xCD9E8D59)"),
        ("np.sqrt(-2 * np.log(u))", "np.sqrt(-np.log(u))"),
        ("turn, other_turn = 2 * np.pi * v", "turn, other_turn = np.pi * v"),
        ("second * np.cos(other_turn)", "first * np.cos(other_turn)"),
        ("at & _LOW, at >> _HALF", "at & _LOW, at & _LOW"),
        ("np.full_like(at, table)", "np.full_like(at, 0)"),
        ("(key & _LOW, key >> _HALF)", "(key >> _HALF, key >> _HALF)"),
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
