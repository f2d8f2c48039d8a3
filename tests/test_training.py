"""`fit`: what it learns, and that every number of a run follows from its seed, interrupted or not."""

import math
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import sdediff as sd
from sdediff import training
from sdediff.checkpoints import read_tensors
from sdediff.optimise import digest

F64 = torch.float64
SDE = sd.VP()


def data(n=64, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.5, 1.5]) + 1


def small(seed=0, **options):
    """A small model, always the same start for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sd.ScoreModel(sd.networks.MLP((2,), width=16, depth=1, **options), SDE)


def quick(model, rows=None, **options):
    settings = {"steps": 12, "batch_size": 8, "warmup": 3, "seed": 5, "progress": False} | options
    return sd.fit(model, data() if rows is None else rows, **settings)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.network.state_dict().values()])


class Scale(nn.Module):
    """A network with one weight per entry of the event and of the time: small enough to follow by hand."""

    def __init__(self, start=0.3):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), start, dtype=F64))
        self.register_buffer("seen", torch.zeros((), dtype=F64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, t, condition=None):
        if self.training:
            self.seen += t.to(F64).mean()
            self.calls += 1
        return self.weight * x


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps what it saw at every step."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.rates, self.gradients, self.after = [], [], []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.rates.append([group["lr"] for group in self.param_groups])
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        super().step()
        self.after.append(torch.cat([p.detach().flatten().clone() for p in parameters]))


def recorded(lr=0.1, **options):
    """A run of `Scale` by `Recorder`: `(recorder, trained model)`."""
    kept = []

    def optimizer(parameters):
        kept.append(Recorder(parameters, lr=lr))
        return kept[0]

    trained = quick(sd.ScoreModel(Scale(), SDE), data().double(), optimizer=optimizer, **options)
    return kept[0], trained


# Learning


def test_fit_learns_a_correlated_gaussian():
    """The loss nears its closed-form minimum, and samples have the mean and covariance of the data."""
    cov = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    target = sd.exact.Gaussian(torch.tensor([1.0, -0.5]), cov)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd.ScoreModel(sd.networks.MLP((2,), width=48, depth=1), SDE)
    trained = sd.fit(
        model,
        target.sample(4000, seed=0),
        steps=400,
        batch_size=256,
        lr=5e-3,
        ema=0.98,
        warmup=20,
        seed=0,
        progress=False,
    )
    t = torch.linspace(SDE.t_min, 1, 1001, dtype=F64)
    signal = SDE.alpha(t)[:, None] ** 2 * torch.linalg.eigvalsh(cov.double())
    minimum = (signal / (signal + SDE.sigma(t)[:, None] ** 2)).mean().item()
    assert trained.losses[:5].mean() > 2 * minimum
    assert trained.losses[-100:].mean().item() == pytest.approx(minimum, rel=0.1)
    x = sd.sample(trained, (4000, 2), steps=25, seed=1).x
    torch.testing.assert_close(x.mean(0), target.mean, rtol=0, atol=0.12)
    torch.testing.assert_close(x.T.cov(), cov, rtol=0, atol=0.15)


def test_fit_learns_a_condition():
    """Two classes at -2 and +2; each label's samples go to its own."""
    labels = torch.arange(512) % 2
    rows = 4.0 * labels[:, None] - 2 + 0.1 * torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd.ScoreModel(sd.networks.MLP((1,), width=32, depth=1, classes=2), SDE)
    sd.fit(model, rows, condition=labels, steps=250, lr=1e-2, ema=0.95, warmup=10, seed=0, progress=False)
    wanted = torch.tensor([0, 1] * 100)
    x = sd.sample(model, (200, 1), steps=15, seed=0, condition=wanted).x
    assert x[wanted == 0].mean().item() == pytest.approx(-2, abs=0.3)
    assert x[wanted == 1].mean().item() == pytest.approx(2, abs=0.3)


# One step, by hand


def test_the_moving_average_is_the_hand_written_recursion_and_the_network_ends_with_it():
    recorder, trained = recorded(steps=40, ema=0.6)
    average = recorder.after[0]
    for k, value in enumerate(recorder.after[1:], start=1):
        keep = min(0.6, (1 + k) / (10 + k))
        average = keep * average + (1 - keep) * value
    torch.testing.assert_close(trained.network.weight.detach(), average, rtol=1e-12, atol=0)
    assert (trained.network.weight - recorder.after[-1]).abs().max() > 1e-4


def test_without_averaging_the_network_ends_with_its_last_weights():
    recorder, trained = recorded(ema=0.0)
    assert torch.equal(trained.network.weight.detach(), recorder.after[-1])


def test_buffers_are_averaged_too(tmp_path):
    """The buffer follows the same recursion as the weights, from the values that checkpoints hold."""
    options, average = {"ema": 0.3, "decay": False}, None
    model = sd.ScoreModel(Scale(), SDE)
    for steps in range(1, 7):
        trained = quick(model, data().double(), steps=steps, **options, checkpoint=tmp_path)
        raw = read_tensors(tmp_path / f"training-{steps}.safetensors")["raw.seen"]
        keep = min(0.3, steps / (9 + steps)) if steps > 1 else 0.0
        average = keep * average + (1 - keep) * raw if steps > 1 else raw
    torch.testing.assert_close(trained.network.seen, average, rtol=1e-12, atol=0)
    assert average < raw - 0.1


def test_integer_buffers_are_copied_not_averaged():
    """An average of equal integers truncates to less than they are; an index table must survive it."""
    model = sd.ScoreModel(Scale(), SDE)
    model.network.register_buffer("table", torch.arange(30))
    quick(model, data().double(), steps=40)
    assert torch.equal(model.network.table, torch.arange(30))
    assert model.network.calls.item() == 40


@pytest.mark.parametrize("clip", [0.05, None])
def test_gradients_are_clipped_to_the_norm_and_keep_their_direction(clip):
    clipped, _ = recorded(steps=1, clip=clip)
    free, _ = recorded(steps=1, clip=1e9)
    norm = free.gradients[0].norm()
    assert norm > 0.1
    expected = free.gradients[0] if clip is None else free.gradients[0] * clip / norm
    torch.testing.assert_close(clipped.gradients[0], expected, rtol=1e-4, atol=0)


def test_a_gradient_within_the_norm_is_left_alone():
    free, _ = recorded(steps=3, clip=None)
    wide, _ = recorded(steps=3, clip=1e9)
    assert torch.equal(torch.stack(free.gradients), torch.stack(wide.gradients))


def test_the_step_is_down_the_gradient_of_the_mean_loss_of_the_batch(monkeypatch):
    seen = []
    plain = training.denoising

    def spy(*args, **options):
        values = plain(*args, **options)
        seen.append((args, options, values.detach().clone()))
        return values

    monkeypatch.setattr(training, "denoising", spy)
    recorder, trained = recorded(lr=0.25, steps=3, warmup=0, decay=False, clip=None, weighting="snr")
    assert [options["weighting"] for _, options, _ in seen] == ["snr"] * 3
    assert torch.equal(trained.losses, torch.stack([values.mean() for _, _, values in seen]))
    torch.testing.assert_close(recorder.after[0], 0.3 - 0.25 * recorder.gradients[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(recorder.after[1] - recorder.after[0], -0.25 * recorder.gradients[1])


def test_gradients_do_not_accumulate_over_steps():
    """With a rate of zero the weights stand still, and so does the size of the gradient."""
    recorder, _ = recorded(lr=0.0, steps=60, clip=None)
    sizes = torch.stack(recorder.gradients).norm(dim=1)
    assert sizes[-20:].mean() < 2 * sizes[:20].mean()


# The rate


def test_the_rate_rises_linearly_and_falls_along_a_cosine_to_zero():
    recorder, _ = recorded(lr=0.2, steps=100, warmup=10)
    rates = torch.tensor(recorder.rates)[:, 0]
    k = torch.arange(100, dtype=F64)
    expected = 0.2 * ((k + 1) / 10).clamp(max=1) * (math.pi * k / 200).cos() ** 2
    torch.testing.assert_close(rates.double(), expected, rtol=1e-6, atol=1e-12)
    assert rates[50].item() == pytest.approx(0.1)
    assert rates[99] < 0.2 * 3e-4


def test_without_decay_and_warmup_the_rate_is_constant():
    recorder, _ = recorded(lr=0.2, steps=7, warmup=0, decay=False)
    assert recorder.rates == [[0.2]] * 7
    recorder, _ = recorded(lr=0.2, steps=7, warmup=4, decay=False)
    assert [rate for (rate,) in recorder.rates] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2])


def test_groups_of_parameters_keep_their_own_peaks():
    kept = []

    def optimizer(parameters):
        first, *rest = parameters
        kept.append(Recorder([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.4}], lr=1.0))
        return kept[0]

    quick(small(), steps=4, warmup=2, decay=False, optimizer=optimizer)
    assert kept[0].rates == [[0.05, 0.2], [0.1, 0.4], [0.1, 0.4], [0.1, 0.4]]


def test_the_default_optimizer_is_adam_with_the_given_rate():
    """Adam's first step moves every weight by its rate, whatever the gradient."""
    model = sd.ScoreModel(Scale(), SDE)
    quick(model, data().double(), steps=1, lr=0.01, warmup=1, ema=0.0)
    torch.testing.assert_close((model.network.weight - 0.3).abs(), torch.full((2,), 0.01, dtype=F64), rtol=1e-5, atol=0)


def test_frozen_parameters_stay():
    model = small()
    model.network.read.weight.requires_grad_(False)
    before = model.network.read.weight.clone(), model.network.write.weight.clone()
    quick(model)
    assert torch.equal(model.network.read.weight, before[0])
    assert not torch.equal(model.network.write.weight, before[1])


# Seeds


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, second, other = (quick(small(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(first.losses, other.losses)


def test_a_run_without_a_seed_follows_torch_s_global_one_and_a_seeded_run_leaves_it_alone():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(quick(small(), seed=None))
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert not torch.equal(runs[0].losses, runs[2].losses)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quick(small(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_steps_of_a_run_do_not_repeat_their_times_and_noise():
    """With one row of data and a rate of zero, only times and noise distinguish the losses."""
    model = sd.ScoreModel(Scale(), SDE)
    trained = quick(model, torch.ones(1, 2, dtype=F64), steps=30, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert len(trained.losses.unique()) == 30


# Data


class Noted(Dataset):
    """Rows whose indices are written down as they are asked for."""

    def __init__(self, n, pairs=False):
        self.n, self.pairs, self.asked = n, pairs, []

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        self.asked.append(row)
        event = torch.full((2,), float(row))
        return (event, torch.tensor(row)) if self.pairs else event


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (10, 10), (3, 8)])
def test_every_epoch_is_a_permutation_of_its_own(rows, batch):
    """Also when batches straddle epochs or are larger than the data."""
    noted = Noted(rows)
    quick(small(), noted, steps=20, batch_size=batch)
    assert len(noted.asked) == 20 * batch
    epochs = [noted.asked[k : k + rows] for k in range(0, 20 * batch - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > min(5, len(epochs) // 2)


class MustMatch(nn.Module):
    """Fails unless every row comes with the label of its data; the noise is small enough to tell."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.called = 0

    def forward(self, x, t, condition):
        assert condition.shape == x.shape[:1]
        assert torch.equal(x[:, 0].round().long(), condition)
        self.called += 1
        return self.weight * x


@pytest.mark.parametrize("make", [lambda: Noted(20, pairs=True), lambda: torch.arange(20.0)[:, None].expand(20, 2)])
def test_every_row_keeps_its_condition(make):
    rows = make()
    model = sd.ScoreModel(MustMatch(), sd.VE(sigma_min=0.01, sigma_max=0.05))
    condition = torch.arange(20) if isinstance(rows, torch.Tensor) else None
    quick(model, rows, condition=condition, ema=0.5)
    assert model.network.called == 12


def test_a_dataset_trains_as_the_tensor_that_it_holds():
    rows = data()

    class Held(Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, row):
            return rows[row]

    assert torch.equal(quick(small(), Held()).losses, quick(small(), rows).losses)


# Resuming


class Interrupted(Exception):
    pass


class Augmented(Dataset):
    """Rows with random augmentation, which stop the run at a given step."""

    def __init__(self, stop_at=None, batch=8):
        self.rows, self.left = data(), None if stop_at is None else stop_at * batch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if self.left is not None:
            if self.left == 0:
                raise Interrupted
            self.left -= 1
        return self.rows[row] + 0.1 * torch.randn(2)


class Dropping(nn.Module):
    """Dropout and batch normalisation: randomness of the network's own, and buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


def dropping():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.ScoreModel(Dropping(), SDE)


def same_run(first, second):
    """The two folders hold bitwise the same run: losses, raw and averaged weights, state of the optimizer."""
    tensors = [read_tensors(folder / "training-10.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert {name.split(".")[0] for name in tensors[0]} == {"raw", "averaged", "optimizer", "losses", "n_averaged"}
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name
    return tensors[0]


SETTINGS = {"steps": 10, "ema": 0.7, "checkpoint_every": 3}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=5e-3)


@pytest.mark.parametrize("stop_at", [3, 5, 9])
@pytest.mark.parametrize("optimizer", [None, adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_a_run_that_stops_and_resumes_is_bitwise_the_run_that_never_stopped(tmp_path, stop_at, optimizer):
    """With dropout, batch normalisation and random augmentation; interrupted between and just after checkpoints."""
    options = SETTINGS | {"optimizer": optimizer}
    whole = quick(dropping(), Augmented(), checkpoint=tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        quick(dropping(), Augmented(stop_at), checkpoint=tmp_path / "parts", **options)
    torch.manual_seed(stop_at)  # whatever else happens in between
    resumed = quick(dropping(), Augmented(), checkpoint=tmp_path / "parts", **options)
    tensors = same_run(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(resumed.losses, whole.losses)
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(tensors["losses"], whole.losses)
    alone = quick(dropping(), Augmented(), **options)
    assert torch.equal(weights(alone), weights(whole)), "checkpoints change nothing"


def test_a_resume_does_not_repeat_the_steps_that_are_done(tmp_path):
    with pytest.raises(Interrupted):
        quick(dropping(), Augmented(7), checkpoint=tmp_path, **SETTINGS)
    counted = Augmented(4)  # steps 6, 7, 8, 9, and not one more
    quick(dropping(), counted, checkpoint=tmp_path, **SETTINGS)
    assert counted.left == 0


def test_a_resume_needs_no_seed_and_a_finished_run_is_only_read(tmp_path):
    first = quick(small(), checkpoint=tmp_path, seed=None)
    again = quick(small(seed=1), checkpoint=tmp_path, seed=None)
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(weights(first), weights(again))


def test_a_run_without_decay_may_be_made_longer(tmp_path):
    longer = quick(small(), steps=10, decay=False)
    quick(small(), steps=4, decay=False, checkpoint=tmp_path)
    resumed = quick(small(), steps=10, decay=False, checkpoint=tmp_path)
    assert torch.equal(resumed.losses, longer.losses)
    assert torch.equal(weights(resumed), weights(longer))


def test_a_checkpoint_of_a_run_loads_as_its_averaged_model(tmp_path):
    trained = quick(small(), checkpoint=tmp_path / "run", checkpoint_every=5)
    loaded = sd.load(tmp_path / "run")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.noise(0.3, x), trained.noise(0.3, x))
    raw = read_tensors(tmp_path / "run" / "training-12.safetensors")["raw.read.weight"]
    assert not torch.equal(raw, loaded.network.read.weight)
    assert [file.name for file in (tmp_path / "run").glob("training-*")] == ["training-12.safetensors"]


@pytest.mark.parametrize("fatal", range(8))
def test_a_checkpoint_interrupted_at_any_file_resumes_bitwise(tmp_path, monkeypatch, fatal):
    """The power goes at the n-th file that is put in place: of the first checkpoint (0-3) or the second (4-7)."""
    whole = quick(dropping(), Augmented(), checkpoint=tmp_path / "whole", **SETTINGS)
    replace, left = os.replace, [fatal]

    def failing(*paths):
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Interrupted):
            quick(dropping(), Augmented(), checkpoint=tmp_path / "parts", **SETTINGS)
    resumed = quick(dropping(), Augmented(), checkpoint=tmp_path / "parts", **SETTINGS)
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("changed", "old", "new"),
    [
        ({"lr": 0.5}, "0.002", "0.5"),
        ({"batch_size": 9}, "8", "9"),
        ({"weighting": "snr"}, "'simple'", "'snr'"),
        ({"ema": 0.5}, "0.999", "0.5"),
        ({"clip": None}, "1.0", "None"),
        ({"warmup": 4}, "3", "4"),
        ({"steps": 13}, "12", "13"),
        ({"seed": 6}, "5", "6"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changed, old, new):
    quick(small(), checkpoint=tmp_path)
    with pytest.raises(sd.CheckpointError, match=f"{next(iter(changed))} was {old}, now {new}"):
        quick(small(), checkpoint=tmp_path, **changed)


def test_a_folder_of_another_model_or_other_data_is_refused(tmp_path):
    quick(small(), checkpoint=tmp_path)
    with pytest.raises(sd.CheckpointError, match=r"rows was 64, now 63"):
        quick(small(), data(63), checkpoint=tmp_path)
    network = small().network
    with pytest.raises(sd.CheckpointError, match=r"prediction was 'noise', now 'v'"):
        quick(sd.ScoreModel(network, SDE, "v"), checkpoint=tmp_path)
    with pytest.raises(sd.CheckpointError, match=r"sde was 'VP\(.*now 'SubVP"):
        quick(sd.ScoreModel(network, sd.SubVP()), checkpoint=tmp_path)
    with pytest.raises(sd.CheckpointError, match="belongs to another network"):
        quick(sd.ScoreModel(sd.networks.MLP((2,), width=17, depth=1), SDE), checkpoint=tmp_path)


# At the end


def test_the_result_is_the_model_in_evaluation_mode_with_the_record_of_its_training():
    network = small().network
    clock = lambda t: 2 * t  # noqa: E731
    model = sd.ScoreModel(network, SDE, "v", time=clock, sigma_data=0.7)
    trained = quick(model)
    assert trained.network is network
    assert not any(module.training for module in network.modules())
    assert (trained.sde, trained.prediction, trained.time, trained.sigma_data) == (SDE, "v", clock, 0.7)
    assert trained.losses.dtype == F64
    assert trained.losses.shape == (12,)
    assert bool((trained.losses > 0).all())
    assert isinstance(trained, sd.ScoreModel)


def test_the_network_trains_in_training_mode():
    model = dropping()
    model.network.eval()
    quick(model, steps=3)
    assert model.network.layers[1].num_batches_tracked.item() == 3


def test_the_model_s_own_condition_is_kept():
    model = sd.ScoreModel(Scale(), SDE).given("fixed")
    assert quick(model, data().double(), steps=2).condition == "fixed"


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_when_asked_and_silent_when_not(capfd, progress):
    quick(small(), steps=20, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("loss=" in err and "20/20" in err and "step" in err) if progress else err == ""


def test_the_device_asked_for_is_where_it_trains():
    assert torch.equal(quick(small(), device="cpu").losses, quick(small()).losses)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows():
    rows = data(8)
    rows[3, 1] = float("nan")
    with pytest.raises(sd.DivergenceError, match=r"step 0, rows \d.*lr") as caught:
        quick(small(), rows)
    assert caught.value.step == 0
    assert len(caught.value.rows) == 1


def test_a_resume_notices_another_sde_other_data_and_fewer_steps(tmp_path):
    class Mine(sd.LinearSDE):
        def __init__(self, b):
            self.b = b

        def scales(self, t):
            return (-self.b * t / 2).exp(), (-torch.expm1(-self.b * t)).sqrt()

    def run(b=10.0, rows=None, steps=6):
        torch.manual_seed(0)
        model = sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), Mine(b))
        rows = torch.linspace(-1, 1, 40).reshape(20, 2) if rows is None else rows
        return sd.fit(model, rows, steps=steps, batch_size=5, decay=False, seed=0, progress=False, checkpoint=tmp_path)

    run()
    for change, word in (({"b": 20.0}, "sde was"), ({"rows": torch.ones(20, 2)}, "data was"), ({"steps": 3}, "fewer")):
        with pytest.raises(sd.CheckpointError, match=word):
            run(**change)
    run(steps=8)


def test_data_of_another_dtype_is_cast_to_the_network():
    model = sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), sd.VP())
    trained = sd.fit(model, torch.zeros(20, 2, dtype=torch.float64), steps=2, batch_size=5, seed=0, progress=False)
    assert trained.losses.isfinite().all()


# Any module and any loss.


class Line(nn.Module):
    """A prior and a slope, one in a submodule, with dropout that must follow the seed."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2, dtype=F64))
        self.head = nn.Linear(2, 1, dtype=F64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def loss(self, x, condition):
        dropped = nn.functional.dropout(self.slope * x, 0.3, self.training)
        return (self.head(x)[:, 0] + dropped.sum(1) - condition) ** 2


def line(steps=12, **options):
    module = Line()
    rows = data().double()
    losses = sd.train(
        module, module.loss, rows, condition=rows.sum(1), steps=steps, batch_size=8, warmup=3, seed=5, progress=False,
        **options,
    )  # fmt: skip
    return module, losses


def test_any_module_is_trained_by_any_loss_and_resumes_bitwise(tmp_path):
    whole, losses = line()
    assert losses.shape == (12,)
    assert losses.dtype == F64
    assert losses[-3:].mean() < losses[:3].mean()
    assert not whole.training
    count = 0

    def interrupted(parameters):
        class Stops(torch.optim.Adam):
            def step(self, closure=None):
                nonlocal count
                count += 1
                if count == 9:
                    raise Interrupted
                return super().step(closure)

        Stops.__name__ = "Adam"
        return Stops(parameters, lr=2e-3)

    with pytest.raises(Interrupted):
        line(checkpoint=tmp_path, checkpoint_every=4, optimizer=interrupted)
    resumed, again = line(checkpoint=tmp_path, checkpoint_every=4)
    assert torch.equal(losses, again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert not (tmp_path / "model.json").exists()


def test_a_run_of_another_module_or_loss_is_refused(tmp_path):
    line(checkpoint=tmp_path / "a")
    with pytest.raises(sd.CheckpointError, match="module was 'Line', now 'Linear'"):
        sd.train(
            nn.Linear(2, 1, dtype=F64), lambda x, c: x.sum(1), data().double(), condition=data().sum(1), steps=12,
            batch_size=8, warmup=3, seed=5, progress=False, checkpoint=tmp_path / "a",
        )  # fmt: skip
    quick(small(), checkpoint=tmp_path / "b")
    with pytest.raises(sd.CheckpointError, match="weighting was 'simple', now 'denoising'"):
        quick(small(), checkpoint=tmp_path / "b", loss=sd.losses.denoising)


@pytest.mark.parametrize(
    ("options", "other", "word"),
    [
        ({"weighting": "snr"}, {"weighting": "edm"}, "weighting was.*'snr'.*now.*'edm'"),
        ({"t": torch.full((8,), 0.5)}, {"t": torch.full((8,), 0.4)}, "weighting was"),
        ({"times": sd.times.Even()}, {"times": sd.times.Even("independent")}, "low_discrepancy.*now.*independent"),
    ],
)
def test_a_partial_loss_is_known_by_what_it_holds(tmp_path, options, other, word):
    quick(small(), checkpoint=tmp_path, loss=partial(sd.losses.denoising, **options))
    quick(small(), checkpoint=tmp_path, loss=partial(sd.losses.denoising, **options))
    with pytest.raises(sd.CheckpointError, match=word):
        quick(small(), checkpoint=tmp_path, loss=partial(sd.losses.denoising, **other))
    with pytest.raises(sd.CheckpointError, match=r"denoising.*now.*sliced"):
        quick(small(), checkpoint=tmp_path, loss=partial(sd.losses.sliced, **options))


def test_a_run_with_other_labels_is_refused(tmp_path):
    def run(labels):
        quick(
            small(),
            checkpoint=tmp_path,
            condition=labels,
            loss=lambda model, x0, condition: sd.losses.denoising(model, x0),
        )

    run(torch.arange(64))
    run(torch.arange(64))
    with pytest.raises(sd.CheckpointError, match="condition was"):
        run(torch.arange(64) % 2)


def test_data_of_every_dtype_is_known_again():
    digests = [digest(torch.arange(6).reshape(3, 2).to(d)) for d in (torch.bfloat16, torch.float16, F64, torch.bool)]
    assert len(set(digests)) == 4
    assert len(quick(small(), data().bfloat16()).losses) == 12


def test_fit_with_the_denoising_loss_written_out_is_fit():
    assert torch.equal(weights(quick(small())), weights(quick(small(), loss=sd.losses.denoising)))


def test_fit_gives_a_loss_the_model_the_rows_and_their_condition():
    rows = data(32)
    labels = torch.arange(32)
    seen = []
    model = small()

    def loss(model_, x0, *, condition):
        assert model_ is model
        seen.append(condition)
        torch.testing.assert_close(x0, rows[condition])
        return sd.losses.denoising(model_, x0)

    quick(model, rows, loss=loss, condition=labels, steps=4)
    assert torch.cat(seen).sort().values.tolist() == list(range(32))


def test_whole_numbers_reach_the_loss_as_they_are():
    codes = torch.arange(32).reshape(16, 2)
    module = nn.Linear(2, 1)

    def loss(x, condition):
        assert x.dtype == torch.int64
        assert condition is None
        return module(x.float())[:, 0]

    sd.train(module, loss, codes, steps=2, batch_size=4, progress=False, seed=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, c: x.sum(), r"one value a row, shape \(8,\); it returned \(\)"),
        (lambda x, c: 1.0, r"one value a row, shape \(8,\); it returned float"),
    ],
)
def test_a_loss_that_is_not_one_value_a_row_is_refused(loss, message):
    with pytest.raises(sd.ShapeError, match=message):
        sd.train(nn.Linear(2, 1), loss, data(), batch_size=8, steps=1, progress=False)


def test_train_wants_a_module_and_fit_one_loss():
    with pytest.raises(sd.OptionError, match=r"needs a torch\.nn\.Module; got function"):
        sd.train(lambda x: x, lambda x, c: x.sum(1), data())
    with pytest.raises(sd.OptionError, match="belongs to the denoising loss; leave it out"):
        quick(small(), loss=sd.losses.denoising, weighting="edm")
    with pytest.raises(sd.ShapeError, match="tensor with no dimensions"):
        sd.train(nn.Linear(2, 1), lambda x, c: x.sum(1), torch.tensor(1.0))


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(clip):
    weights = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(weights.weight)

    def loss(x, condition):
        return weights.weight.square().sum().sqrt().expand(len(x))

    with pytest.raises(sd.DivergenceError, match=r"gradient of a finite training loss is NaN or infinite at step 0\. "):
        sd.train(weights, loss, torch.ones(4, 2), steps=2, clip=clip, progress=False)
    assert bool((weights.weight == 0).all())
