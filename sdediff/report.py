"""Reports of the demos: written once as blocks, rendered as Markdown and as a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdediff.demo import DemoResult, DemoSettings

Block = tuple[Any, ...]
"""("title" | "heading" | "text", words), ("table", rows) or ("figure", file, caption)."""


def _blocks(result: DemoResult, settings: DemoSettings, train_rows: int, test_rows: int) -> list[Block]:
    bits, (mean, spread) = result.bits, result.floor
    table = [["solver", "setting", "NFE", "seconds", "energy distance", "bits/dim"]]
    for r in result.solvers:
        likelihood = f"{bits.mean:.3f} ± {bits.stderr:.3f}" if r.solver == "Flow ODE" else "-"
        table += [[r.solver, r.setting, str(r.nfe), f"{r.seconds:.1f}", f"{r.distance:.4f}", likelihood]]
    table += [["training digits (floor)", "", "", "", f"{mean:.4f} ± {spread:.4f}", ""]]
    timing = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    return [
        ("title", "sdediff demo: handwritten digits"),
        (
            "text",
            f"One diffusion model of scikit-learn's digits (8 x 8 pixels, codes 0 to 16): {train_rows} to train on, "
            f"{test_rows} to test, seed {settings.seed}. The process is {result.process}; the network is a U-Net of "
            f"{' and '.join(map(str, settings.channels))} channels, trained for {settings.train_steps} steps of "
            f"{settings.batch_size} images. Every sampler below uses this one network.",
        ),
        ("heading", "Samples"),
        ("table", table),
        (
            "text",
            f"NFE is network evaluations for each image; seconds are for {settings.images} images. The energy "
            "distance, in pixel space, is between those images and the test digits: 0 for equal distributions, lower "
            f"is better. The floor is the same distance for {settings.images} training digits (mean and standard "
            "deviation over 20 draws): differences smaller than its spread mean nothing. The estimates are unbiased, "
            "so a small one may come out negative. Bits/dim of the test digits belong to the flow, which alone has a "
            "density to evaluate.",
        ),
        (
            "figure",
            "samples.png",
            "The first samples of every solver, started from the same noise. DDIM and the flow ODE solve one equation "
            "and give nearly the same digits; the noisy solvers give others.",
        ),
        (
            "figure",
            "quality.png",
            "Sample quality against cost. Lines that leave at the top: too few steps for that solver to be stable.",
        ),
        ("heading", "Likelihood"),
        (
            "table",
            [
                ["model", "bits/dim", "standard error", "NFE", "seconds"],
                ["this one", f"{bits.mean:.3f}", f"{bits.stderr:.3f}", str(bits.nfe), f"{bits.seconds:.1f}"],
                ["a histogram for each pixel", f"{bits.histogram:.3f}", "", "", ""],
                ["all codes alike", f"{math.log2(result.levels):.3f}", "", "", ""],
            ],
        ),
        (
            "text",
            f"The code length of {bits.rows} test digits (an upper bound in expectation over the dequantisation), by "
            "the probability-flow ODE; lower is better. The standard error is over the digits and includes "
            f"dequantisation and probes. Protocol: {bits.protocol}.",
        ),
        ("heading", "The process"),
        ("figure", "forward.png", "Test digits turn into noise."),
        ("figure", "reverse.png", "Noise turns into digits, with fresh noise at every step (DDPM) and without (DDIM)."),
        ("heading", "Training"),
        ("figure", "loss.png", "The loss of every step."),
        ("text", f'Time: {timing}. The model is in the folder model: sdediff.load("model") gives it back.'),
    ]


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for kind, *content in blocks:
        if kind == "table":
            lines = ["| " + " | ".join(row) + " |" for row in content[0]]
            parts.append("\n".join([lines[0], "|" + "---|" * len(content[0][0]), *lines[1:]]))
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0]})\n\n*{content[1]}*")
        else:
            parts.append({"title": "# ", "heading": "## ", "text": ""}[kind] + content[0])
    return "\n\n".join(parts) + "\n"


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:left}"
    "img{max-width:100%}figure{margin:1.5rem 0}figcaption{color:#555}"
)


def _html(blocks: list[Block], folder: Path) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = []
    for kind, *content in blocks:
        if kind == "table":
            body = [row(cells, "th" if i == 0 else "td") for i, cells in enumerate(content[0])]
            parts.append("<table>" + "".join(body) + "</table>")
        elif kind == "figure":
            picture = base64.b64encode((folder / content[0]).read_bytes()).decode()
            caption = html.escape(content[1])
            image = f'<img src="data:image/png;base64,{picture}" alt="{caption}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            tag = {"title": "h1", "heading": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{html.escape(content[0])}</{tag}>")
    head = f'<meta charset="utf-8"><title>{html.escape(blocks[0][1])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(parts) + "</body></html>\n"


def write_blocks(folder: Path, blocks: list[Block]) -> None:
    """Write `report.md` and the self-contained `report.html` into a folder, beside the figures that they show."""
    (folder / "report.md").write_text(_markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(_html(blocks, folder), encoding="utf-8")


def write_report(result: DemoResult, settings: DemoSettings, train_rows: int, test_rows: int) -> None:
    """Write the report of the demo into the result's folder."""
    write_blocks(result.folder, _blocks(result, settings, train_rows, test_rows))
