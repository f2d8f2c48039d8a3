"""The command `sdediff`: one subcommand, `demo`, in two kinds.

Errors that this library raises on purpose become one line on stderr and exit code 2, as argparse's own do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import sdediff
from sdediff.errors import SdediffError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdediff", description="Write an SDE, get a diffusion model.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sdediff {sdediff.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train on real handwritten digits, sample with five solvers, evaluate bits/dim, write a report",
        description="Train a small diffusion model on scikit-learn's digits in a few minutes on a CPU, sample from it "
        "with five solvers, evaluate its likelihood, and write figures, a report and the model into a folder. With "
        "--conditional, train it with labels, ask for every digit at several scales of guidance, and show what these "
        "trade between diversity and accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    demo.add_argument("--quick", action="store_true", help="a smaller run, in under a minute")
    demo.add_argument("--conditional", action="store_true", help="digits of a class that is asked for, by guidance")
    demo.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="DIR",
        help="folder to write into (default: sdediff-demo, or sdediff-demo-conditional)",
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same numbers")
    demo.add_argument("--steps", type=int, metavar="N", default=argparse.SUPPRESS, help="training steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 when an error was reported."""
    options = _parser().parse_args(argv)
    try:
        from sdediff import conditional_demo, demo  # the demos' imports are of no use to --help

        settings = replace(demo.QUICK if options.quick else demo.FULL, seed=options.seed)
        if hasattr(options, "steps"):
            settings = replace(settings, train_steps=options.steps)
        show = partial(print, flush=True)
        bar = sys.stderr.isatty()
        if options.conditional:
            by_class = replace(conditional_demo.QUICK if options.quick else conditional_demo.FULL, model=settings)
            out = getattr(options, "out", Path("sdediff-demo-conditional"))
            conditional_demo.run(out, by_class, say=show, progress=bar)
        else:
            demo.run(getattr(options, "out", Path("sdediff-demo")), settings, say=show, progress=bar)
    except SdediffError as error:
        print(f"sdediff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
