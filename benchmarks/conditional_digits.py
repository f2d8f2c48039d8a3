"""Digits by class: accuracy, diversity and distance at every scale of two kinds of guidance.

The full run of `sdediff demo --conditional`, whose module `sdediff.conditional_demo` says what is measured. Writes
`conditional_digits.md`, and the two figures of the run into `docs/_static`.

    python -m benchmarks.conditional_digits
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.common import table, versions, write_text
from sdediff import conditional_demo

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "_static"


def main() -> None:
    settings = conditional_demo.FULL
    with tempfile.TemporaryDirectory() as folder:
        result = conditional_demo.run(folder, settings)
        for name in ("digits_by_class", "guidance_tradeoff"):
            shutil.copy(result.folder / f"{name}.png", PICTURES)
    head, *rows = conditional_demo.table_of(result)
    best, seconds = result.best, ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    number = conditional_demo.CLASSES * settings.images
    text = (
        "# Digits by class\n\n"
        f"`sdediff demo --conditional`, seed {settings.model.seed}: {number} samples at every scale, {settings.steps} "
        f"steps; label dropout {settings.label_dropout:g}. The judge is a classifier of clean digits that guides "
        "nothing. Best scale of classifier-free guidance (the highest accuracy, then the smallest distance): w = "
        f"{best.scale:g}, accuracy {100 * best.accuracy[0]:.1f} +- {100 * best.accuracy[1]:.1f} %.\n\n"
        f"{table(head, rows)}\n"
        "Diversity: mean distance of two samples of a class in the features of the judge, over that of test digits. "
        "Energy distance: to the test digits of the class, in pixels, averaged over classes; of the training digits, "
        "mean and standard deviation over 20 draws of as many.\n\n"
        f"One thread: {seconds}.\n\n{versions()}\n"
    )
    write_text("conditional_digits.md", text)


if __name__ == "__main__":
    main()
