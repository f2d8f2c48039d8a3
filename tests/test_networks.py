"""The networks that come with the library."""

import math
import sys

import pytest
import torch
from torch.nn.functional import layer_norm, silu

import sdediff as sd
from sdediff.networks import MLP, FourierTime, UNet

F64 = torch.float64


def drawn(network, seed=0):
    """The network in float64 with every weight drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) / 2)
    return network


def states(n=4, *event):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *event, dtype=F64, generator=generator), torch.linspace(1e-5, 2, n, dtype=F64)


# Time


def test_time_features_are_the_cosines_and_sines_of_the_log_time():
    t = torch.tensor([0.0, 1e-5, 0.3, 1.0, 80.0], dtype=F64)
    got = FourierTime(12).double()(t)
    for row, time in enumerate(t.tolist()):
        u = math.log(time + 1e-3)
        for k in range(6):
            frequency = 2 ** (-5 + 6 * k / 5)  # geometric, from 1/32 to 2
            assert got[row, k].item() == pytest.approx(math.cos(2 * math.pi * frequency * u), abs=2e-5)
            assert got[row, 6 + k].item() == pytest.approx(math.sin(2 * math.pi * frequency * u), abs=2e-5)


# MLP


@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_the_mlp_is_its_formula(event):
    network = drawn(MLP(event, width=6, depth=2, classes=5))
    x, t = states(4, *event)
    labels = torch.tensor([4, 0, 2, 2])
    w = network.state_dict()

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    time = silu(linear("time.3", silu(linear("time.1", network.time[0](t))))) + w["label.weight"][labels]
    h = linear("read", x.reshape(4, -1))
    for k in range(2):
        scale, shift = linear(f"blocks.{k}.modulation", time).split(6, dim=1)
        inner = layer_norm(h, (6,)) * (1 + scale) + shift
        h = h + linear(f"blocks.{k}.second", silu(linear(f"blocks.{k}.first", inner)))
    expected = linear("write", silu(h)).reshape(x.shape)
    torch.testing.assert_close(network(x, t, labels), expected, rtol=1e-10, atol=1e-10)


def test_the_blocks_of_a_new_mlp_are_the_identity():
    network = MLP((3,), width=8, depth=3).double()
    x, t = states(4, 3)
    torch.testing.assert_close(network(x, t), network.write(silu(network.read(x))), rtol=1e-12, atol=1e-12)


def test_the_mlp_is_deterministic():
    network, (x, t) = drawn(MLP((3,))), states(4, 3)
    assert torch.equal(network(x, t), network(x, t))
    torch.manual_seed(0)
    first = MLP((3,))
    torch.manual_seed(0)
    for p, q in zip(first.parameters(), MLP((3,)).parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_row_of_the_mlp_depends_on_its_own_state_time_and_label_only_and_on_all_of_them():
    network = drawn(MLP((2, 2), width=16, depth=2, classes=3))
    x, t = states(5, 2, 2)
    labels = torch.tensor([0, 1, 2, 0, 1])
    before = network(x, t, labels)
    x_other, t_other, labels_other = x.clone(), t.clone(), labels.clone()
    x_other[1, 0, 1] += 1
    t_other[2] += 0.5
    labels_other[3] = 1
    for changed, row in (((x_other, t, labels), 1), ((x, t_other, labels), 2), ((x, t, labels_other), 3)):
        off = (network(*changed) - before).abs().flatten(1).amax(1)
        assert off[row] > 1e-3
        assert off[torch.arange(5) != row].max() < 1e-12
    for row in range(5):
        alone = network(x[row : row + 1], t[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone[0], before[row], rtol=1e-10, atol=1e-10)


def test_an_mlp_without_a_label_has_the_null_label():
    network, (x, t) = drawn(MLP((2,), classes=3)), states(4, 2)
    assert network.null == 3
    assert network.label.num_embeddings == 4
    null = torch.full((4,), 3)
    assert torch.equal(network(x, t), network(x, t, null))
    for label in range(3):
        assert (network(x, t) - network(x, t, null - 3 + label)).abs().amax(1).min() > 1e-3
    assert MLP((2,)).null is None


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            torch.tensor([0, 4, 1]),
            sd.OptionError,
            r"This MLP knows the labels 0 to 2, and 3 for no label; got 4 in row 1",
        ),
        (torch.tensor([0, 1, -1]), sd.OptionError, r"got -1 in row 2"),
        (
            torch.tensor([0.0, 1.0, 2.0]),
            sd.ShapeError,
            r"whole numbers as labels; got torch\.float32\. Write",
        ),
        (torch.tensor([0, 1]), sd.ShapeError, r"shape \(3,\); got \(2,\)"),
    ],
)
def test_labels_that_an_mlp_does_not_know_are_refused(labels, error, message):
    x, t = states(3, 2)
    with pytest.raises(error, match=message):
        MLP((2,), classes=3).double()(x, t, labels)


def test_a_network_of_no_classes_is_refused():
    with pytest.raises(sd.OptionError, match=r"MLP needs classes >= 1, or None .*got 0"):
        MLP((2,), classes=0)


def test_the_mlp_refuses_another_event_and_a_condition_it_was_not_built_for():
    network, (x, t) = MLP((3,)).double(), states(4, 2)
    with pytest.raises(sd.ShapeError, match=r"events of shape \(3,\); got \(2,\)"):
        network(x, t)
    with pytest.raises(sd.ShapeError, match=r"MLP\(\.\.\., classes=\.\.\.\)"):
        network(states(4, 3)[0], t, torch.zeros(4, dtype=torch.long))


def test_the_config_builds_the_same_network_again():
    network = MLP((2, 3), width=12, depth=1, classes=4)
    again = MLP(**network.config)
    again.load_state_dict(network.state_dict())
    x, t = states(4, 2, 3)
    assert torch.equal(again(x.float(), t.float()), network(x.float(), t.float()))


# UNet

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


@pytest.fixture
def tiny():
    pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(time_scale=500.0, num_class_embeds=3, **TINY).eval()


@torch.no_grad()
def test_the_unet_is_diffusers_own_at_scaled_times_and_labels(tiny):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.2, 0.9]), torch.tensor([1, 2])
    out = tiny(x, t, labels)
    assert torch.equal(out, tiny.unet(x, torch.tensor([100.0, 450.0]), class_labels=labels).sample)
    assert not torch.equal(out, tiny(x, t, torch.tensor([1, 1])))
    assert not torch.equal(out, tiny(x, t[:1].expand(2), labels))
    assert out.shape == x.shape
    assert tiny.config == {"time_scale": 500.0, "classes": None, "num_class_embeds": 3, **TINY}


@torch.no_grad()
def test_a_unet_with_classes_has_a_null_label():
    pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(classes=3, **TINY).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.2, 0.9]), torch.tensor([1, 2], dtype=torch.int32)
    assert network.null == 3
    assert network.unet.class_embedding.num_embeddings == 4
    assert torch.equal(network(x, t, labels), network.unet(x, 1000 * t, class_labels=labels.long()).sample)
    null = network.unet(x, 1000 * t, class_labels=torch.tensor([3, 3])).sample
    assert torch.equal(network(x, t), null)
    assert torch.equal(network(x, t, torch.tensor([3, 3])), null)
    assert not torch.equal(network(x, t, labels), null)
    again = UNet(**network.config).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t, labels), network(x, t, labels))
    with pytest.raises(sd.OptionError, match=r"This UNet knows the labels 0 to 2, and 3 for no label; got 5 in row 0"):
        network(x, t, torch.tensor([5, 0]))
    with pytest.raises(sd.OptionError, match=r"classes=3 makes num_class_embeds=4.*num_class_embeds=7 out"):
        UNet(classes=3, num_class_embeds=7, **TINY)


@torch.no_grad()
def test_the_unet_takes_times_up_to_1000_by_default_and_no_label():
    pytest.importorskip("diffusers")
    network = UNet(**TINY).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x, torch.tensor([0.25, 1.0])), network.unet(x, torch.tensor([250.0, 1000.0])).sample)


def test_the_unet_without_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(sd.MissingExtraError, match=r"'diffusers', which is not installed.*sdediff\[diffusers\]"):
        UNet(**TINY)


def test_a_negative_time_is_refused_with_what_to_write_and_that_works():
    sde = sd.VP()
    model = sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), sde, "edm")
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1e-3, 0.5, 1.0])
    says = r"must not be negative; got -1\.\d+.*ScoreModel\(\.\.\., time=sde\.sigma\)"
    with pytest.raises(sd.OptionError, match=says):
        model.denoised(t, x)
    assert sd.ScoreModel(model.network, sde, "edm", time=sde.sigma).denoised(t, x).isfinite().all()


def test_a_gaussian_mlp_takes_the_size_of_a_vector_for_its_shape():
    one, other = sd.networks.GaussianMLP(3, (2,), width=8), sd.networks.GaussianMLP((3,), 2, width=8)
    assert one.config == other.config == {"inputs": [3], "outputs": [2], "width": 8, "depth": 1}
    assert one(torch.zeros(4, 3))[0].shape == (4, 2)
