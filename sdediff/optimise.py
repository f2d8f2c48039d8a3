r"""The training loop: `train(module, loss, data)` for any module and any loss.

One step draws a batch (without replacement within an epoch), takes the gradient of the mean loss, clips it, and moves
the weights and their exponential moving average. All that is random in step k comes from a seed made of the run's seed
and k: batches, times, noise and dropout. A run that stops and resumes from its checkpoint is therefore, number for
number, the run that never stopped.

The module holds all that learns: a network, or several in an `nn.ModuleList`, with a schedule or the history of a
sampler of times among them. The loss is a function of a batch, and may use the module in any way. The buffers of a
submodule with the attribute `unaveraged = True` are kept as they are, like whole numbers in all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, TensorDataset, default_collate
from tqdm import tqdm

from sdediff.checkpoints import (
    load_weights,
    optimizer_tensors,
    read_json,
    read_tensors,
    restore_optimizer,
    write_json,
    write_tensors,
)
from sdediff.draws import mix
from sdediff.errors import CheckpointError, DivergenceError, OptionError, ShapeError
from sdediff.sde import fresh_seed
from sdediff.shapes import PerRow

Loss = Callable[[Tensor, Any], PerRow]
"""From a batch `(batch, *event)` and its condition (None if there is none) to one value a row."""


class Options(TypedDict, total=False):
    """The options of `train` by name, for functions that pass them on."""

    steps: int
    batch_size: int
    lr: float
    condition: Tensor | None
    ema: float
    clip: float | None
    warmup: int
    decay: bool
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None
    seed: int | None
    device: torch.device | str | None
    checkpoint: str | Path | None
    checkpoint_every: int
    progress: bool


def train(
    module: nn.Module,
    loss: Loss,
    data: Tensor | Dataset[Any],
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 2e-3,
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
    identity: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Tensor:
    """Minimise the mean of a loss over data by the parameters of a module, in place; the loss of every step.

    At the end the module holds the exponential moving average of its weights, in evaluation mode.

    Args:
        module: what is trained.
        loss: `loss(batch, condition) -> (batch,)`, one value a row.
        data: a tensor `(n, *event)`, or a map-style dataset whose items are events or pairs `(event, condition)`;
            floating-point events are cast to the dtype of the first parameter, others are left as they are.
        steps: optimisation steps in all, those before a resume included.
        batch_size: rows a step.
        lr: learning rate. It rises along a line from 0 to 1 times this over `warmup` steps; with `decay` this is times
            a cosine that falls from 1 to 0 over all steps, so that lr is then not quite reached.
        condition: one entry for every row of a data tensor, given to the loss.
        ema: decay of the moving average per step, in [0, 1); held below `(1 + k) / (10 + k)` at step k.
        clip: largest norm of the gradient; None for no clipping.
        optimizer: from parameters to an optimizer; Adam if None.
        seed: of the whole run; None draws one from torch's global generator.
        device: where to train; where the module is if None.
        checkpoint: a folder; the run resumes from it if it is there, and writes to it every `checkpoint_every` steps
            and at the end.
        progress: whether to show a bar with the loss and the rate.
        identity: what else must be the same for a checkpoint to be of this run; numbers and words. If None, the
            module's own attribute `identity`, such as `VDM.identity`, or the name of its class.
        beside: writes more into the checkpoint; called with the folder while the module holds its averaged weights.

    Returns:
        float64 `(steps,)`.

    Raises:
        OptionError, ShapeError: an argument does not fit.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        DivergenceError: the loss became NaN or infinite; names the step and the rows of its batch. Or its gradient did;
            names the step.
    """
    if not isinstance(module, nn.Module):
        raise OptionError(f"Training needs a torch.nn.Module; got {type(module).__name__}.")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(f"The network, a {type(module).__name__}, has no parameters to train.")
    if clip is not None and not clip > 0:
        raise OptionError(f"clip is the largest norm of the gradient, a number > 0 or None; got {clip}.")
    if steps < 1 or batch_size < 1 or not 0 <= ema < 1 or checkpoint_every < 1:
        raise OptionError(
            f"Training needs steps, batch_size, checkpoint_every >= 1 and 0 <= ema < 1; got steps = {steps}, "
            f"batch_size = {batch_size}, checkpoint_every = {checkpoint_every}, ema = {ema}."
        )
    items = _dataset(data, condition)
    if len(items) == 0:
        raise OptionError("data has 0 rows; there is nothing to learn from.")
    if device is not None:
        module.to(device)
    home, dtype = parameters[0].device, parameters[0].dtype
    averaged = AveragedModel(module, multi_avg_fn=_ema(ema), use_buffers=True)
    adapt = torch.optim.Adam(parameters, lr=lr) if optimizer is None else optimizer(parameters)
    peaks = [group["lr"] for group in adapt.param_groups]
    losses: list[float] = []
    settings = {
        "batch_size": batch_size, "lr": lr, "ema": ema, "clip": clip, "warmup": warmup, "decay": decay,
        "rows": len(items), "data": digest(data), "optimizer": type(adapt).__name__,
        "condition": digest(condition),
    } | dict(identity or getattr(module, "identity", None) or {"module": type(module).__name__})  # fmt: skip
    if decay:
        settings["steps"] = steps
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and (folder / "training.json").exists():
        seed, losses = _resume(folder, module, averaged, adapt, settings, seed)
        if len(losses) > steps:
            raise CheckpointError(f"{folder} holds a run of {len(losses)} steps; steps = {steps} asks for fewer.")
    seed = fresh_seed() if seed is None else seed
    order = _Order(len(items), batch_size, seed)
    module.train()
    bar = tqdm(total=steps, initial=len(losses), unit="step", disable=not progress)
    devices = [home] if home.type == "cuda" else []
    with bar, torch.random.fork_rng(devices):
        for k in range(len(losses), steps):
            factor = _rate(k, steps, warmup, decay)
            for group, peak in zip(adapt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            torch.manual_seed(mix(seed, 11, k) >> 2)
            batch, labels = _collate(items, order.rows(k), home, dtype)
            try:
                values = loss(batch, labels)
            except DivergenceError as error:
                if error.step is not None:
                    raise
                raise DivergenceError(error.problem, error.advice, step=k, time=error.time, rows=error.rows) from error
            if not isinstance(values, Tensor) or values.shape != batch.shape[:1]:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ShapeError(f"The loss must return one value a row, shape ({len(batch)},); it returned {got}.")
            mean = values.mean()
            adapt.zero_grad(set_to_none=True)
            mean.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
            losses.append(mean.item())
            if not torch.isfinite(values).all():
                rows = (~values.isfinite()).nonzero()[:, 0].tolist()
                raise DivergenceError(
                    "The training loss is NaN or infinite",
                    "(Rows of the batch.) Lower lr, clip the gradient, or raise the t_min of the SDE.",
                    step=k,
                    time=None,
                    rows=rows,
                )
            if not torch.isfinite(norm):
                raise DivergenceError(
                    "The gradient of a finite training loss is NaN or infinite",
                    "The loss has no slope there, as a square root at 0: add a small number inside.",
                    step=k,
                    time=None,
                    rows=[],
                )
            adapt.step()
            _average(averaged, module, ema, k)
            bar.update()
            if k % 20 == 19 or k == steps - 1:
                bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
            if folder is not None and (k + 1) % checkpoint_every == 0 and k + 1 < steps:
                _write(folder, module, averaged, adapt, settings, seed, losses, beside)
    if folder is not None:
        _write(folder, module, averaged, adapt, settings, seed, losses, beside)
    module.load_state_dict(averaged.module.state_dict())
    module.eval()
    return torch.tensor(losses, dtype=torch.float64)


def digest(data: object) -> str | None:
    """A digest of a tensor; None for all else, such as a dataset, which may change from access to access."""
    if not isinstance(data, Tensor):
        return None
    whole = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy lacks some dtypes
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]


def _rate(k: int, steps: int, warmup: int, decay: bool) -> float:
    rise = min(1.0, (k + 1) / max(warmup, 1))
    if not decay:
        return rise
    return rise * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * k / steps, dtype=torch.float64))))


def _ema(decay: float) -> Callable[..., None]:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _average(averaged: AveragedModel, module: nn.Module, ema: float, k: int) -> None:
    """Move the average; early on by a decay that grows, so that the random start is forgotten soon."""
    averaged.multi_avg_fn = _ema(min(ema, (1 + k) / (10 + k)))
    averaged.update_parameters(module)
    for part, current in zip(averaged.module.modules(), module.modules(), strict=True):
        for buffer, value in zip(part.buffers(recurse=False), current.buffers(recurse=False), strict=True):
            if getattr(current, "unaveraged", False) or not value.is_floating_point():
                buffer.copy_(value)  # counts, tables and histories have no average


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
        if data.ndim == 0:
            raise ShapeError("data must have shape (n, *event); got a tensor with no dimensions.")
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


def _collate(items: Any, rows: list[int], home: torch.device, dtype: torch.dtype) -> tuple[Tensor, Any]:
    batch = items[rows] if isinstance(items, TensorDataset) else default_collate([items[row] for row in rows])
    x0, labels = (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, (tuple, list)) else (batch, None)
    x0 = x0.to(home, dtype) if x0.is_floating_point() else x0.to(home)
    return x0, labels.to(home) if isinstance(labels, Tensor) else labels


def _write(
    folder: Path,
    module: nn.Module,
    averaged: AveragedModel,
    adapt: torch.optim.Optimizer,
    settings: dict[str, Any],
    seed: int,
    losses: list[float],
    beside: Callable[[Path], None] | None,
) -> None:
    """Write all that a resume needs, and what the caller wants beside it of the averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {name: value.clone() for name, value in module.state_dict().items()}
    if beside is not None:
        module.load_state_dict(averaged.module.state_dict())
        try:
            beside(folder)
        finally:
            module.load_state_dict(raw)
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
    module: nn.Module,
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
    load_weights(module, part("raw."), file)
    load_weights(averaged.module, part("averaged."), file)
    averaged.n_averaged.copy_(tensors["n_averaged"])
    restore_optimizer(adapt, part("optimizer."), file)
    return state["seed"], tensors["losses"].tolist()
