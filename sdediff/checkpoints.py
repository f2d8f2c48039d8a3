r"""Checkpoints: safetensors for numbers, JSON for the rest, never pickle.

A checkpoint is a folder. `model.json` says what the model is and names the file of its weights,
`network-<digest>.safetensors`; a training checkpoint adds `training.json` and `training-<step>.safetensors`. Files are
written beside and then renamed, the JSON file that names the others last, so that an interrupted write leaves the old
checkpoint whole. Nothing in a checkpoint is code: a network is rebuilt only if it is
one of this library's, and any other is passed in by the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sdediff import learned as learned_module
from sdediff import networks, processes
from sdediff.errors import CheckpointError, OptionError
from sdediff.learned import LearnedVP
from sdediff.linear import LinearSDE
from sdediff.model import ScoreModel
from sdediff.sde import SDE

_FORMAT = "sdediff checkpoint 1"
_TIMES = ("sigma", "log_snr", "timestep", "nearest_timestep")
_SDE = "sde/"
"""Before the names of the weights of an SDE that has some."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    beside = path.with_name(path.name + ".part")
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, beside)
    os.replace(beside, path)


def _require(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"There is no {path.name} in {path.parent}: it is not a checkpoint, or an incomplete one."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    _require(path)
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    _require(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: it is not a safetensors file ({error}).") from error


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a network.

    Raises:
        CheckpointError: they belong to another network.
    """
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another network: {error}") from error


def _describe_sde(sde: SDE) -> dict[str, Any] | None:
    if type(sde) is LearnedVP:
        return None if sde.config is None else {"kind": "LearnedVP", "arguments": sde.config}
    kind = type(sde).__name__
    if getattr(processes, kind, None) is not type(sde):
        return None
    arguments = {f.name: getattr(sde, f.name) for f in fields(sde) if f.init}  # type: ignore[arg-type]  # every named process is a dataclass
    return {
        "kind": kind,
        "arguments": {name: v.tolist() if isinstance(v, Tensor) else v for name, v in arguments.items()},
    }


def _rebuild_sde(described: Any, path: Path) -> Any:
    learned = isinstance(described, dict) and described.get("kind") == "LearnedVP"
    return _rebuild(learned_module if learned else processes, "SDE", described, path, LinearSDE)


def _named_time(model: ScoreModel) -> str | None:
    """The name of the SDE's own function of time that the network sees, if it is one of `_TIMES`."""
    name = getattr(model.time, "__name__", None)
    return name if name in _TIMES and getattr(model.time, "__self__", None) is model.sde else None


def _describe_network(network: nn.Module) -> dict[str, Any] | None:
    kind = type(network).__name__
    config = getattr(network, "config", None)
    if getattr(networks, kind, None) is not type(network) or not isinstance(config, dict):
        return None
    inner = {name: _describe_network(value) for name, value in config.items() if isinstance(value, nn.Module)}
    foreign = any(callable(value) and not isinstance(value, nn.Module) for value in config.values())
    return None if foreign or None in inner.values() else {"kind": kind, "config": config | inner}


def _rebuild(module: Any, what: str, described: Any, path: Path, base: type) -> Any:
    kind = described.get("kind") if isinstance(described, dict) else None
    build = getattr(module, kind, None) if isinstance(kind, str) else None
    if not (isinstance(build, type) and issubclass(build, base) and build.__module__ == module.__name__):
        raise CheckpointError(f"{path} names the {what} {kind!r}, which this version of sdediff does not have.")
    arguments = described.get("arguments", described.get("config", {}))
    try:
        inner = {
            name: _rebuild(module, what, value, path, base)
            for name, value in arguments.items()
            if isinstance(value, dict) and value.keys() == {"kind", "config"}  # a network within a network
        }
        return build(**(arguments | inner))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: the {what} {kind} cannot be built ({error}).") from error


def save(model: ScoreModel, path: str | Path) -> None:
    """Save a model whose network is an `nn.Module` to a folder; also the weights of an SDE that has some.

    Raises:
        OptionError: the network has no weights to save.
    """
    folder = Path(path)
    if not isinstance(model.network, nn.Module):
        raise OptionError(
            f"Only a model whose network is a torch.nn.Module can be saved; got {type(model.network).__name__}. "
            "Of a model made of another one, such as a guided one, save the model inside, and make it again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.network.state_dict())
    if isinstance(model.sde, nn.Module):
        state |= {_SDE + name: value for name, value in model.sde.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    weights = f"network-{hashlib.sha256(to_bytes(tensors)).hexdigest()[:12]}.safetensors"
    write_tensors(folder / weights, tensors)
    write_json(
        folder / "model.json",
        {
            "format": _FORMAT,
            "weights": weights,
            "prediction": model.prediction,
            "sigma_data": model.sigma_data,
            "own_time": model.time is not None and _named_time(model) is None,
            "time": _named_time(model),
            "sde": _describe_sde(model.sde),
            "sde_span": [model.sde.t_min, model.sde.t_max],
            "sde_has_weights": isinstance(model.sde, nn.Module),
            "network": _describe_network(model.network),
        },
    )
    for old in folder.glob("network-*.safetensors"):
        if old.name != weights:
            old.unlink()


def load(path: str | Path, *, network: nn.Module | None = None, sde: SDE | None = None, time: Any = None) -> ScoreModel:
    """Load a model that `save` or `fit` wrote.

    Args:
        path: the folder.
        network: needed when the network is not one of `sdediff.networks`; the weights are put into it.
        sde: needed when the SDE is not one of the named processes.
        time: needed when the model had a time function of its own, other than the SDE's sigma, log_snr, timestep or
            nearest_timestep. One made of the SDE, as that of `VDM(time=f)`, is to be made of the SDE given here:
            `load(path, sde=sde, time=lambda t: f(-sde.log_snr(t)))` with a new `sde = LearnedVP(...)`.

    Raises:
        CheckpointError: missing, damaged, foreign, or in need of an argument that was not given.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.")
    file = folder / "model.json"
    content = read_json(file)
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{file} is not an sdediff checkpoint (its format is {content.get('format')!r}).")
    for name, given, found in (("network", network, content.get("network")), ("sde", sde, content.get("sde"))):
        if given is None and found is None:
            raise CheckpointError(f"{folder} was saved with a {name} of your own: pass load(path, {name}=...).")
    if time is None and content.get("own_time"):
        raise CheckpointError(f"{folder} was saved with a time function of your own: pass load(path, time=...).")
    process = sde if sde is not None else _rebuild_sde(content["sde"], file)
    built = network if network is not None else _rebuild(networks, "network", content["network"], file, nn.Module)
    weights = content.get("weights")
    if not isinstance(weights, str) or Path(weights).name != weights:
        raise CheckpointError(f"{file} is damaged: it names no file of weights.")
    tensors = read_tensors(folder / weights)
    if content.get("sde_has_weights"):
        if not isinstance(process, nn.Module):
            raise CheckpointError(f"{folder} was saved with an SDE that has weights; got {process}, which has none.")
        span, saved = [process.t_min, process.t_max], content.get("sde_span")
        if saved is not None and span != saved:
            raise CheckpointError(
                f"{folder} was saved with a schedule over the span {saved}; got one over {span}, which the same "
                "weights would make another: give sde= the t_min and t_max of the saved one."
            )
        own = {name.removeprefix(_SDE): tensors.pop(name) for name in list(tensors) if name.startswith(_SDE)}
        load_weights(process, own, folder / weights)
    load_weights(built, tensors, folder / weights)
    built.eval()
    named = content.get("time")
    if time is None and named is not None:
        time = getattr(process, named, None) if named in _TIMES else None
        if time is None:
            raise CheckpointError(f"{file} names {named!r} as the network's time, which {process} does not have.")
    try:
        return ScoreModel(built, process, content["prediction"], time, content["sigma_data"])
    except (KeyError, TypeError, OptionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named `index.name`."""
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        CheckpointError: the tensors are not those of this optimizer.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    try:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        kind = type(optimizer).__name__
        raise CheckpointError(f"{path} does not hold the state of this optimizer, {kind} ({error}).") from error
