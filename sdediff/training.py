r"""Training: `fit(model, data)`.

One step draws a batch without replacement, low-discrepancy times and noise, takes the gradient of the denoising loss,
clips it, and moves the weights and their exponential moving average. All that is random in step k comes from a seed
made of the run's seed and k: batches, times, noise and dropout. A run that stops and resumes from its checkpoint is
therefore, number for number, the run that never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, TensorDataset, default_collate
from tqdm import tqdm

from sdediff.checkpoints import (
    load,
    load_weights,
    optimizer_tensors,
    read_json,
    read_tensors,
    restore_optimizer,
    save,
    write_json,
    write_tensors,
)
from sdediff.draws import mix
from sdediff.errors import CheckpointError, DivergenceError, OptionError, ShapeError
from sdediff.losses import WEIGHTINGS, denoising
from sdediff.model import ScoreModel
from sdediff.sde import fresh_seed
from sdediff.shapes import check_state

__all__ = ["TrainedModel", "fit", "load", "save"]


@dataclass(frozen=True, eq=False)
class TrainedModel(ScoreModel):
    """A model and the record of its training.

    Attributes:
        losses: the loss of every step, float64 `(steps,)`.
    """

    losses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False)


def fit(
    model: ScoreModel,
    data: Tensor | Dataset[Any],
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 2e-3,
    weighting: str = "simple",
    condition: Tensor | None = None,
    ema: float = 0.999,
    clip: float | None = 1.0,
    warmup: int = 100,
    decay: bool = True,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> TrainedModel:
    """Train the network of a model by denoising score matching, in place.

    At the end the network holds the exponential moving average of its weights, in evaluation mode.

    Args:
        model: its network must be an `nn.Module`.
        data: a tensor `(n, *event)`, or a map-style dataset whose items are events or pairs `(event, condition)`; cast
            to the dtype of the parameters.
        steps: optimisation steps in all, those before a resume included.
        batch_size: rows a step.
        lr: peak learning rate, reached after `warmup` steps; with `decay`, it then falls to zero along a cosine.
        weighting: see `sdediff.losses`.
        condition: one entry for every row of a data tensor, given to the network.
        ema: decay of the moving average per step, in [0, 1); held below `(1 + k) / (10 + k)` at step k.
        clip: largest norm of the gradient; None for no clipping.
        optimizer: from parameters to an optimizer; Adam if None.
        seed: of the whole run; None draws one from torch's global generator.
        device: where to train; where the network is if None.
        checkpoint: a folder; the run resumes from it if it is there, and writes to it every `checkpoint_every` steps
            and at the end.
        progress: whether to show a bar with the loss and the rate.

    Raises:
        OptionError, ShapeError: an argument does not fit.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        DivergenceError: the loss became NaN or infinite; names the step and the rows of its batch.
    """
    network = model.network
    if not isinstance(network, nn.Module):
        raise OptionError(f"fit trains a network that is a torch.nn.Module; got {type(network).__name__}.")
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(f"The network, a {type(network).__name__}, has no parameters to train.")
    if clip is not None and not clip > 0:
        raise OptionError(f"clip is the largest norm of the gradient, a number > 0 or None; got {clip}.")
    if steps < 1 or batch_size < 1 or not 0 <= ema < 1 or checkpoint_every < 1:
        raise OptionError(
            f"fit needs steps, batch_size, checkpoint_every >= 1 and 0 <= ema < 1; got steps = {steps}, "
            f"batch_size = {batch_size}, checkpoint_every = {checkpoint_every}, ema = {ema}."
        )
    if weighting not in WEIGHTINGS:
        raise OptionError(f"Unknown weighting {weighting!r}: write one of {', '.join(map(repr, WEIGHTINGS))}.")
    items = _dataset(data, condition)
    if len(items) == 0:
        raise OptionError("data has 0 rows; there is nothing to learn from.")
    if device is not None:
        network.to(device)
    home, dtype = parameters[0].device, parameters[0].dtype
    averaged = AveragedModel(network, multi_avg_fn=_ema(ema), use_buffers=True)
    adapt = torch.optim.Adam(parameters, lr=lr) if optimizer is None else optimizer(parameters)
    peaks = [group["lr"] for group in adapt.param_groups]
    losses: list[float] = []
    settings = {
        "batch_size": batch_size, "lr": lr, "weighting": weighting, "ema": ema, "clip": clip, "warmup": warmup,
        "decay": decay, "prediction": model.prediction, "sigma_data": model.sigma_data, "sde": _fingerprint(model),
        "rows": len(items), "data": _digest(data), "optimizer": type(adapt).__name__,
        "condition": condition is not None,
    }  # fmt: skip
    if decay:
        settings["steps"] = steps
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and (folder / "training.json").exists():
        seed, losses = _resume(folder, network, averaged, adapt, settings, seed)
        if len(losses) > steps:
            raise CheckpointError(f"{folder} holds a run of {len(losses)} steps; steps = {steps} asks for fewer.")
    seed = fresh_seed() if seed is None else seed
    order = _Order(len(items), batch_size, seed)
    network.train()
    bar = tqdm(total=steps, initial=len(losses), unit="step", disable=not progress)
    devices = [home] if home.type == "cuda" else []
    with bar, torch.random.fork_rng(devices):
        for k in range(len(losses), steps):
            factor = _rate(k, steps, warmup, decay)
            for group, peak in zip(adapt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            torch.manual_seed(mix(seed, 11, k) >> 2)
            x0, labels = _collate(items, order.rows(k), home)
            x0 = x0.to(dtype)
            values = denoising(model, x0, weighting=weighting, condition=labels)
            loss = values.mean()
            adapt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            losses.append(loss.item())
            if not torch.isfinite(values).all():
                rows = (~values.isfinite()).nonzero()[:, 0].tolist()
                raise DivergenceError(
                    "The training loss is NaN or infinite",
                    "(Rows of the batch.) Lower lr, clip the gradient, or raise the t_min of the SDE.",
                    step=k,
                    time=None,
                    rows=rows,
                )
            adapt.step()
            _average(averaged, network, ema, k)
            bar.update()
            if k % 20 == 19 or k == steps - 1:
                bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
            if folder is not None and (k + 1) % checkpoint_every == 0 and k + 1 < steps:
                _write(folder, model, network, averaged, adapt, settings, seed, losses)
    if folder is not None:
        _write(folder, model, network, averaged, adapt, settings, seed, losses)
    network.load_state_dict(averaged.module.state_dict())
    network.eval()
    return TrainedModel(
        network, model.sde, model.prediction, model.time, model.sigma_data, model.condition,
        losses=torch.tensor(losses, dtype=torch.float64),
    )  # fmt: skip


def _fingerprint(model: ScoreModel) -> str:
    """The SDE in words and in numbers: one of the user's own may have no telling name."""
    sde = model.linear
    times = torch.linspace(sde.t_min, sde.t_max, 9, dtype=torch.float64)
    scales = [f"{value:.9g}" for row in sde.scales_at(times) for value in row.tolist()]
    return f"{sde}: {sde.t_min:g} to {sde.t_max:g}, scales {' '.join(scales)}"


def _digest(data: object) -> str | None:
    """A digest of a data tensor; None for a dataset, which may change from access to access."""
    if not isinstance(data, Tensor):
        return None
    return hashlib.sha256(data.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _rate(k: int, steps: int, warmup: int, decay: bool) -> float:
    rise = min(1.0, (k + 1) / max(warmup, 1))
    if not decay:
        return rise
    return rise * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * k / steps, dtype=torch.float64))))


def _ema(decay: float) -> Callable[..., None]:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _average(averaged: AveragedModel, network: nn.Module, ema: float, k: int) -> None:
    """Move the average; early on by a decay that grows, so that the random start is forgotten soon."""
    averaged.multi_avg_fn = _ema(min(ema, (1 + k) / (10 + k)))
    averaged.update_parameters(network)
    for kept, current in zip(averaged.module.buffers(), network.buffers(), strict=True):
        if not current.is_floating_point():  # counts and tables have no average
            kept.copy_(current)


class _Order:
    """Which rows step k sees: every epoch is a permutation of its own, drawn from the seed and its number."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._n, self._size, self._seed = rows, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def rows(self, k: int) -> list[int]:
        return [self._at(position) for position in range(k * self._size, (k + 1) * self._size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._n)
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(mix(self._seed, 12, epoch) >> 2)
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.randperm(self._n, generator=generator)
        return int(self._epochs[epoch][place])


def _dataset(data: Tensor | Dataset[Any], condition: Tensor | None) -> Any:
    if isinstance(data, Tensor):
        check_state(data, "data")
        if condition is None:
            return TensorDataset(data)
        if condition.shape[:1] != data.shape[:1]:
            given = len(condition) if condition.ndim else "a single number"
            raise ShapeError(f"condition must have one entry for each of the {len(data)} rows; got {given}.")
        return TensorDataset(data, condition)
    if condition is not None:
        raise OptionError("With a dataset, put the condition into its items: (event, condition).")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise OptionError(f"data must be a tensor (n, *event) or a map-style dataset; got {type(data).__name__}.")
    return data


def _collate(items: Any, rows: list[int], home: torch.device) -> tuple[Tensor, Any]:
    batch = items[rows] if isinstance(items, TensorDataset) else default_collate([items[row] for row in rows])
    x0, labels = (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, (tuple, list)) else (batch, None)
    check_state(x0, "data")
    return x0.to(home), labels.to(home) if isinstance(labels, Tensor) else labels


def _write(
    folder: Path,
    model: ScoreModel,
    network: nn.Module,
    averaged: AveragedModel,
    adapt: torch.optim.Optimizer,
    settings: dict[str, Any],
    seed: int,
    losses: list[float],
) -> None:
    """Write the averaged model, which `load` reads, and beside it all that a resume needs."""
    raw = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(averaged.module.state_dict())
    try:
        save(model, folder)
    finally:
        network.load_state_dict(raw)
    tensors = {f"raw.{name}": value for name, value in raw.items()}
    tensors |= {f"averaged.{name}": value for name, value in averaged.module.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(adapt).items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["n_averaged"] = averaged.n_averaged
    write_tensors(folder / f"training-{len(losses)}.safetensors", tensors)
    record = {"step": len(losses), "seed": seed, "settings": settings, "tensors": sorted(tensors)}
    write_json(folder / "training.json", record)
    for old in folder.glob("training-*.safetensors"):
        if old.name != f"training-{len(losses)}.safetensors":
            old.unlink()


def _resume(
    folder: Path,
    network: nn.Module,
    averaged: AveragedModel,
    adapt: torch.optim.Optimizer,
    settings: dict[str, Any],
    seed: int | None,
) -> tuple[int, list[float]]:
    state = read_json(folder / "training.json")
    found = state.get("settings")
    kinds = {"settings": dict, "step": int, "seed": int, "tensors": list}
    if not isinstance(found, dict) or any(not isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{folder / 'training.json'} is damaged: it lacks {', '.join(kinds)}.")
    changed = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
    if seed is not None and seed != state["seed"]:
        changed["seed"] = (state["seed"], seed)
    if changed:
        listing = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise CheckpointError(f"{folder} holds another run ({listing}). Use the same settings, or another folder.")
    file = folder / f"training-{state['step']}.safetensors"
    tensors = read_tensors(file)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    missing = sorted(set(state["tensors"]) - set(tensors))
    if missing:
        raise CheckpointError(f"{file} is damaged: it lacks {', '.join(missing[:4])}.")
    load_weights(network, part("raw."), file)
    load_weights(averaged.module, part("averaged."), file)
    averaged.n_averaged.copy_(tensors["n_averaged"])
    restore_optimizer(adapt, part("optimizer."), file)
    return state["seed"], tensors["losses"].tolist()
