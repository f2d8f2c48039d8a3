"""The demo at a tiny size, and the command line around it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sdediff as sd
from sdediff import cli, conditional_demo, demo

TINY = demo.DemoSettings(
    channels=(8, 8), train_steps=3, batch_size=8, images=6, evaluations=4, curve=(2, 3), test_rows=3, tolerance=1e-1,
    likelihood_tolerance=1e-1,
)  # fmt: skip
SOLVERS = ["DDPM", "DDIM", "Reverse SDE", "Flow ODE", "Predictor-corrector"]
FIGURES = ["forward", "reverse", "process", "samples", "loss", "quality"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    lines = []
    return demo.run(tmp_path_factory.mktemp("first"), TINY, say=lines.append), lines


def test_every_file_is_there(first):
    result, _ = first
    for name in FIGURES:
        assert (result.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (result.folder / "report.md").exists()
    assert list((result.folder / "model").glob("network-*.safetensors"))


def test_the_report_has_five_solvers_and_the_likelihood(first):
    result, _ = first
    text = (result.folder / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \d+ \| [\d.]+ \| -?[\d.]+ \| [-\d.± ]+ \|$", text, re.MULTILINE)
    assert rows == SOLVERS
    assert f"| this one | {result.bits.mean:.3f} | {result.bits.stderr:.3f} |" in text
    assert "17 levels in [-1, 1], uniform dequantisation" in text
    assert result.bits.nfe > 0
    for name in FIGURES[:2] + FIGURES[3:]:
        assert f"({name}.png)" in text


def test_the_html_report_needs_no_other_file(first):
    result, _ = first
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'src="([^"]{10})', page)) == {"data:image"}
    assert all(f"<td>{name}</td>" in page for name in SOLVERS)


def test_every_stage_says_so(first):
    _, lines = first
    stages = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in stages] == [f"[{k}/{demo.STAGES}]" for k in range(1, demo.STAGES + 1)]


def test_the_same_seed_gives_the_same_numbers(first, tmp_path):
    result, _ = first
    again = demo.run(tmp_path / "again", TINY, say=lambda line: None)
    assert torch.equal(again.losses, result.losses)
    assert [(r.nfe, r.distance) for r in again.solvers] == [(r.nfe, r.distance) for r in result.solvers]
    assert (again.bits.mean, again.bits.stderr, again.floor) == (result.bits.mean, result.bits.stderr, result.floor)
    assert again.curves == result.curves


def test_another_seed_gives_others(first):
    result, _ = first
    settings = replace(TINY, seed=1)
    train, _ = demo.digits(settings.train_rows, settings.seed)
    assert not torch.equal(train, demo.digits(TINY.train_rows, TINY.seed)[0])
    assert not torch.equal(demo.train(settings, demo.Dequantized(train, demo.LEVELS)).losses, result.losses)


def test_the_saved_model_samples_as_the_report_says(first):
    result, _ = first
    samples = sd.sample(
        sd.load(result.folder / "model"), (TINY.images, *demo.EVENT), steps=TINY.evaluations, seed=TINY.seed
    )
    train, test = demo.digits(TINY.train_rows, TINY.seed)
    assert len(train) + len(test) == 1797
    assert samples.nfe == result.solvers[1].nfe
    assert samples.x.isfinite().all()


def test_dequantised_codes_stay_in_their_bins():
    codes = torch.randint(0, 17, (20, 1, 8, 8))
    data = demo.Dequantized(codes, 17)
    for x in (torch.stack([data[i] for i in range(20)]), data.all(seed=3)):
        assert torch.equal(((x.double() + 1) / 2 * 17).floor().long(), codes)
    assert not torch.equal(data[0], data[0])
    assert torch.equal(data.all(seed=3), data.all(seed=3))


def test_histogram_bits_of_known_frequencies():
    train = torch.tensor([0, 0, 1]).reshape(3, 1, 1, 1)
    # one count added to each of two bins: (3, 2) / 5
    assert demo.histogram_bits(train, train[:1], levels=2) == pytest.approx(-torch.tensor(0.6).log2().item())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sdediff {sd.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["demo", "--what"], ["demo", "--steps", "many"], ["nothing"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: sdediff" in capsys.readouterr().err


def test_options_reach_the_demo(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "run", lambda out, settings, **options: calls.append((out, settings)))
    assert cli.main(["demo", "--quick", "--out", str(tmp_path), "--seed", "7", "--steps", "11"]) == 0
    assert cli.main(["demo"]) == 0
    assert calls[0] == (tmp_path, replace(demo.QUICK, seed=7, train_steps=11))
    assert calls[1] == (Path("sdediff-demo"), demo.FULL)


def test_options_reach_the_demo_by_class(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(conditional_demo, "run", lambda out, settings, **options: calls.append((out, settings)))
    monkeypatch.setattr(demo, "run", None)
    assert cli.main(["demo", "--conditional", "--quick", "--out", str(tmp_path), "--seed", "7", "--steps", "11"]) == 0
    assert cli.main(["demo", "--conditional"]) == 0
    quick = replace(conditional_demo.QUICK, model=replace(demo.QUICK, seed=7, train_steps=11))
    assert calls[0] == (tmp_path, quick)
    assert calls[1] == (Path("sdediff-demo-conditional"), conditional_demo.FULL)


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--out", str(file)]) == 2
    assert cli.main(["demo", "--steps", "0", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert message[0].startswith("sdediff: The demo writes into a folder")
    assert message[1].startswith("sdediff: The demo needs positive numbers")
