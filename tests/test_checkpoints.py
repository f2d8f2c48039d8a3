"""Checkpoints: what is loaded is bitwise what was saved, and what cannot be loaded says why."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from helpers import NAMED, name
from torch import nn

import sdediff as sd
from sdediff import CheckpointError, ScoreModel
from sdediff.checkpoints import optimizer_tensors, read_json, read_tensors, restore_optimizer, write_json, write_tensors
from sdediff.model import PREDICTIONS

OTHERS = [
    sd.VP(0.2, 15.0, t_min=1e-4, t_max=0.9),
    sd.SubVP(0.3, 11.0),
    sd.VE(0.02, 30.0),
    sd.EDM(0.003, 40.0),
    sd.CosineVP(0.01),
    sd.SigmoidVP(13.0, 5.0),
    sd.RectifiedFlow(t_min=1e-3, t_max=0.99),
    sd.DiscreteVP(torch.tensor([0.1, 1 / 3, 0.7], dtype=torch.float64)),
]


def mlp(**options):
    """An MLP with all weights drawn, so that every one of them shows in its output."""
    network = sd.networks.MLP((2,), width=8, depth=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def outputs(model, condition=None):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    t = model.linear.unclock(model.linear.clock(torch.tensor(model.sde.t_max * 0.9, dtype=torch.float64)) * 0.8)
    return torch.stack([model.view(kind, t, x, condition=condition) for kind in ("noise", "data", "edm")])


def saved(path, model=None):
    sd.save(ScoreModel(mlp(), sd.VP()) if model is None else model, path)
    return Path(path)


def edited(folder, **changes):
    content = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(content))
    return folder


# Round trips


@pytest.mark.parametrize("sde", NAMED + OTHERS, ids=name)
def test_every_named_sde_comes_back_with_bitwise_equal_outputs(tmp_path, sde):
    model = ScoreModel(mlp(), sde, sigma_data=0.8)
    loaded = sd.load(saved(tmp_path, model))
    assert type(loaded.sde) is type(sde)
    assert repr(loaded.sde) == repr(sde)
    t = torch.linspace(sde.t_min, sde.t_max, 50, dtype=torch.float64)
    for one, other in zip(sde.scales(t), loaded.sde.scales(t), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_comes_back_with_bitwise_equal_outputs(tmp_path, prediction):
    model = ScoreModel(mlp(), sd.CosineVP(), prediction, sigma_data=1 / 3)
    loaded = sd.load(saved(tmp_path, model))
    assert (loaded.prediction, loaded.sigma_data) == (prediction, 1 / 3)
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_conditional_network_comes_back_whole(tmp_path):
    model = ScoreModel(mlp(classes=4), sd.VP())
    loaded = sd.load(str(saved(tmp_path / "new" / "folder", model)))
    labels = torch.tensor([0, 1, 2, 3, 1])
    assert torch.equal(outputs(loaded, labels), outputs(model, labels))
    assert loaded.network.config == model.network.config


def test_a_unet_comes_back_whole(tmp_path):
    pytest.importorskip("diffusers")
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    model = ScoreModel(sd.networks.UNet(time_scale=77.0, **config, **blocks).eval(), sd.VP())
    loaded = sd.load(saved(tmp_path, model))
    loaded.network.eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.noise(0.4, x), model.noise(0.4, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_dtype_layout_and_sharing_come_back_bitwise(tmp_path, dtype):
    base = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"plain": base, "transposed": base.T, "shared": base[1:], "scalar": base[0, 1], "none": base[:0]}
    write_tensors(tmp_path / "file", tensors)
    back = read_tensors(tmp_path / "file")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == dtype
        assert torch.equal(back[key], value)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_the_state_of_an_optimizer_comes_back_so_that_its_next_step_is_bitwise_the_same(make):
    def advance(optimizer, parameters, scale):
        for p in parameters:
            p.grad = scale * torch.ones_like(p) * p
        optimizer.step()

    first = [torch.linspace(1, 2, 3).requires_grad_(), torch.linspace(3, 4, 2).requires_grad_()]
    optimizer = make(first)
    advance(optimizer, first, 1.0)
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    assert tensors
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    second = [p.detach().clone().requires_grad_() for p in first]
    again = make(second)
    restore_optimizer(again, tensors, Path("folder"))
    advance(optimizer, first, -2.0), advance(again, second, -2.0)
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)


# Arguments for what is not the library's


class OwnNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x) * t[:, None]


class OwnSDE(sd.LinearSDE):
    t_min = 1e-3

    def scales(self, t):
        return (-t).exp(), t.sqrt()


class VP(sd.VP):
    """A process of the user's own, with the name of one of the library's."""

    def scales(self, t):
        return super().scales(t / 2)


def test_a_network_of_one_s_own_must_be_passed_and_gets_the_weights(tmp_path):
    model = ScoreModel(OwnNetwork(), sd.VP())
    folder = saved(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"network of your own: pass load\(path, network=\.\.\.\)"):
        sd.load(folder)
    assert torch.equal(outputs(sd.load(folder, network=OwnNetwork())), outputs(model))


@pytest.mark.parametrize("sde", [OwnSDE(), VP()])
def test_an_sde_of_one_s_own_must_be_passed(tmp_path, sde):
    model = ScoreModel(mlp(), sde)
    folder = saved(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"sde of your own: pass load\(path, sde=\.\.\.\)"):
        sd.load(folder)
    loaded = sd.load(folder, sde=sde)
    assert loaded.sde is sde
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_time_of_one_s_own_must_be_passed(tmp_path):
    chain = sd.DiscreteVP(torch.linspace(0.01, 0.3, 10))
    model = ScoreModel(mlp(), chain, time=lambda t: chain.nearest_timestep(t) / 10)
    folder = saved(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"time function of your own: pass load\(path, time=\.\.\.\)"):
        sd.load(folder)
    assert torch.equal(outputs(sd.load(folder, time=model.time)), outputs(model))


def test_an_argument_overrides_what_the_checkpoint_says(tmp_path):
    folder = saved(tmp_path)
    network = mlp()
    nn.init.zeros_(network.write.weight)
    loaded = sd.load(folder, network=network, sde=sd.SubVP())
    assert loaded.network is network
    assert loaded.sde == sd.SubVP()
    assert torch.equal(network.write.weight, mlp().write.weight)


def test_a_network_without_weights_is_not_saved(tmp_path):
    with pytest.raises(sd.OptionError, match=r"torch\.nn\.Module.*got function"):
        sd.save(ScoreModel(lambda x, t: x, sd.VP()), tmp_path)


# Files


def weights(folder):
    """The one file of weights of a checkpoint."""
    (file,) = folder.glob("network-*.safetensors")
    return file


def test_files_hold_numbers_and_json_only(tmp_path):
    """No pickle and no zip archive: a JSON object, and safetensors with its length-prefixed JSON header."""
    model = ScoreModel(mlp(), sd.VP())
    sd.fit(model, torch.randn(20, 2), steps=2, batch_size=4, checkpoint=tmp_path, progress=False, seed=0)
    files = {file.name for file in tmp_path.iterdir()} - {weights(tmp_path).name}
    assert files == {"model.json", "training.json", "training-2.safetensors"}
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
        if file.suffix == ".json":
            assert isinstance(json.loads(content), dict)
        else:
            (length,) = struct.unpack("<Q", content[:8])
            assert isinstance(json.loads(content[8 : 8 + length]), dict)


def test_saving_over_a_checkpoint_replaces_it(tmp_path):
    saved(tmp_path)
    model = ScoreModel(mlp(classes=3), sd.SubVP(), "v")
    assert torch.equal(outputs(sd.load(saved(tmp_path, model))), outputs(model))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fatal", [0, 1])
@pytest.mark.parametrize("where", ["written", "put in place"])
def test_an_interrupted_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, where, fatal):
    """Whether half of a new file is on the disk or all of it, and whichever file it is."""
    old = ScoreModel(mlp(), sd.VP())
    folder = saved(tmp_path, old)
    before = outputs(old)
    new = ScoreModel(mlp(), sd.VP(), "v")
    with torch.no_grad():
        new.network.write.weight.add_(1)
    plain, left = os.replace, [fatal]

    def failing(source, target):
        if left[0] == 0:
            if where == "written":
                content = Path(source).read_bytes()
                Path(source).write_bytes(content[: len(content) // 2])
            raise Interrupted
        left[0] -= 1
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Interrupted):
            sd.save(new, folder)
    assert torch.equal(outputs(sd.load(folder)), before)
    sd.save(new, folder)
    assert torch.equal(outputs(sd.load(folder)), outputs(new))


@pytest.mark.parametrize(
    ("write", "read", "old", "new"),
    [
        (write_json, read_json, {"old": 1}, {"new": 2}),
        (write_tensors, read_tensors, {"old": torch.ones(2)}, {"new": torch.zeros(3)}),
    ],
)
def test_a_file_is_written_beside_and_put_in_place_at_the_end(tmp_path, monkeypatch, write, read, old, new):
    file = tmp_path / "file"
    write(file, old)
    before = file.read_bytes()

    def failing(*paths):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Interrupted):
            write(file, new)
    assert file.read_bytes() == before
    write(file, new)
    assert read(file).keys() == new.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left beside it"


# Damage


def test_a_missing_folder_and_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*nowhere"):
        sd.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model\.json in .*not a checkpoint"):
        sd.load(tmp_path)
    folder = saved(tmp_path)
    weights(folder).unlink()
    with pytest.raises(CheckpointError, match=r"no network-\w+\.safetensors in .*incomplete"):
        sd.load(folder)
    (folder / "file").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*file"):
        sd.load(folder / "file")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    file = weights(saved(tmp_path))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"network-\w+\.safetensors is damaged: it is not a safetensors file"):
        sd.load(tmp_path)


@pytest.mark.parametrize("content", [b"\x80\x04\x95junk", b"PK\x03\x04" + b"0" * 100, b"\xff" * 64])
def test_foreign_weights_are_refused(tmp_path, content):
    weights(saved(tmp_path)).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"network-\w+\.safetensors is damaged"):
        sd.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is not JSON"),
        (b'{"format": "sdediff che', "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[1, 2]", "it holds no JSON object"),
        (b"{}", r"not an sdediff checkpoint \(its format is None\)"),
        (
            b'{"format": "sdediff checkpoint 99"}',
            r"not an sdediff checkpoint \(its format is 'sdediff checkpoint 99'\)",
        ),
        (b'{"_class_name": "DDPMScheduler"}', "not an sdediff checkpoint"),
    ],
)
def test_a_damaged_or_foreign_description_is_refused(tmp_path, content, complaint):
    (saved(tmp_path) / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.json is .*{complaint}|model\.json is {complaint}"):
        sd.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sde": {"kind": "Warp", "arguments": {}}}, "names the SDE 'Warp', which this version"),
        ({"sde": {"kind": "math", "arguments": {}}}, "names the SDE 'math'"),
        ({"sde": {"kind": "LinearSDE", "arguments": {}}}, "names the SDE 'LinearSDE'"),
        ({"sde": {"kind": "OptionError", "arguments": {}}}, "names the SDE 'OptionError'"),
        ({"sde": "VP"}, "names the SDE None"),
        ({"sde": {"kind": ["VP"], "arguments": {}}}, r"names the SDE \['VP'\]"),
        ({"sde": {"kind": "VP", "arguments": {"gamma": 1}}}, "the SDE VP cannot be built.*gamma"),
        ({"sde": {"kind": "VP", "arguments": {"beta_min": -1.0}}}, "the SDE VP cannot be built.*-1"),
        ({"sde": {"kind": "VP", "arguments": {"beta_min": "a"}}}, "the SDE VP cannot be built"),
        ({"sde": {"kind": "VP", "arguments": [1, 2]}}, "the SDE VP cannot be built"),
        ({"network": {"kind": "ViT", "config": {}}}, "names the network 'ViT', which this version"),
        ({"network": {"kind": "nn", "config": {}}}, "names the network 'nn'"),
        ({"network": {"kind": "Tensor", "config": {}}}, "names the network 'Tensor'"),
        (
            {"network": {"kind": "MLP", "config": {"event": [2], "widths": 8}}},
            "the network MLP cannot be built.*widths",
        ),
        ({"network": {"kind": "MLP", "config": {"event": [2], "width": -8}}}, "the network MLP cannot be built"),
        ({"prediction": "scor"}, "is damaged: Unknown prediction 'scor'"),
        ({"prediction": ["v"]}, "is damaged"),
        ({"sigma_data": -1.0}, "is damaged: sigma_data must be positive"),
        ({"sigma_data": "x"}, "is damaged"),
    ],
)
def test_a_description_of_something_that_cannot_be_built_is_refused(tmp_path, change, complaint):
    with pytest.raises(CheckpointError, match=rf"model\.json .*{complaint}"):
        sd.load(edited(saved(tmp_path), **change))


@pytest.mark.parametrize("missing", ["prediction", "sigma_data", "sde", "network"])
def test_a_description_that_lacks_an_entry_is_refused(tmp_path, missing):
    file = saved(tmp_path) / "model.json"
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=missing):
        sd.load(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"network-\w+\.safetensors belongs to another network"):
        sd.load(folder, network=OwnNetwork())
    with pytest.raises(CheckpointError, match=r"(?s)belongs to another network.*size mismatch"):
        sd.load(edited(folder, network={"kind": "MLP", "config": {"event": [2], "width": 4, "depth": 2}}))


def test_a_damaged_training_record_is_refused(tmp_path):
    def resume():
        with torch.random.fork_rng():
            return sd.fit(
                ScoreModel(mlp(), sd.VP()), torch.zeros(9, 2), steps=2, checkpoint=tmp_path, progress=False, seed=0
            )

    resume()
    record, numbers = tmp_path / "training.json", tmp_path / "training-2.safetensors"
    whole, tensors = json.loads(record.read_text()), read_tensors(numbers)
    for missing in ("settings", "step", "seed"):
        record.write_text(json.dumps({key: value for key, value in whole.items() if key != missing}))
        with pytest.raises(CheckpointError, match=r"training\.json is damaged: it lacks settings, step, seed"):
            resume()
    record.write_text(json.dumps(whole)[:-9])
    with pytest.raises(CheckpointError, match=r"training\.json is damaged: it is not JSON"):
        resume()
    record.write_text(json.dumps(whole))
    for part in ("losses", "n_averaged", "raw.write.weight", "averaged.write.weight", "optimizer.0.exp_avg"):
        write_tensors(numbers, {key: value for key, value in tensors.items() if key != part})
        with pytest.raises(CheckpointError, match=r"training-2\.safetensors"):
            resume()
    numbers.write_bytes(numbers.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"training-2\.safetensors is damaged"):
        resume()
    numbers.unlink()
    with pytest.raises(CheckpointError, match=r"no training-2\.safetensors"):
        resume()


def test_a_run_resumed_with_another_optimizer_is_refused(tmp_path):
    def run(steps, optimizer):
        model = ScoreModel(mlp(), sd.VP())
        options = {"decay": False, "checkpoint": tmp_path, "progress": False, "seed": 0, "optimizer": optimizer}
        return sd.fit(model, torch.zeros(9, 2), steps=steps, **options)

    run(2, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    with pytest.raises(CheckpointError, match="optimizer"):
        run(4, torch.optim.Adam)


def test_a_loaded_network_is_in_evaluation_mode(tmp_path):
    assert not sd.load(saved(tmp_path)).network.training


def test_a_network_around_a_function_is_one_of_the_users_own(tmp_path):
    model = ScoreModel(sd.TwoHeads(lambda x, t: torch.cat([x, x], 1)), sd.VP())
    sd.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with a network of your own: pass load\(path, network=\.\.\.\)"):
        sd.load(tmp_path)
