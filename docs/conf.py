"""Sphinx configuration. Build: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import os
import pkgutil
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

import sdediff
import sdediff.shapes

# For the kernels that execute the pages: states are small, and one thread serves them best.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tqdm's advice to install widgets, which no page needs.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

project = "sdediff"
author = "The sdediff authors"
copyright = author
version = release = sdediff.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_nb",
]
exclude_patterns = ["_build", "_templates", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "sdediff"
html_static_path = ["_static"]
html_css_files = ["docs.css"]

# Pages and notebooks: all code runs in every build, and anything on stderr is a warning.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_output_stderr = "warn"
nb_merge_streams = True
nb_number_source_lines = False

# API pages: one for every module that docs/api.md lists, from _templates/module.rst.
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_type_aliases = {
    name: name
    for name in ("State", "Trajectory", "PerRow", "Codes", "Grid", "Time", "Step", "Combination", "Check", "Rows")
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
maximum_signature_line_length = 88
default_role = "code"
python_use_unqualified_type_names = True

_INTERNAL = {"sdediff.moments", "sdediff.report"}
"""Modules without an API page."""


def _cells(row: str) -> list[str]:
    """Cells of a Markdown row; bars inside of code, as in `|x|`, are no borders."""
    inside = re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\0"), row.strip().strip("|"))
    return [cell.strip().replace("\0", "|") for cell in re.split(r"(?<!\\)\|", inside)]


def _bars(line: str) -> str:
    """Bars outside of code escaped: reST takes `|x|` for a substitution."""
    parts = line.split("`")
    return "`".join(part.replace("|", r"\|") if i % 2 == 0 else part for i, part in enumerate(parts))


def _table(rows: list[str]) -> list[str]:
    """A Markdown pipe table as a reST list-table."""
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in [rows[0], *rows[2:]]:
        cells = [rf"\{cell}" if cell.startswith("-") else cell for cell in _cells(row)]  # not an option list
        out += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    return out


def _readable(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read in an editor: turn their pipe tables and indented formulas into reST."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        end = i
        if line.startswith("|") and i + 1 < len(lines) and re.fullmatch(r"\|[-:| ]+\|", lines[i + 1].strip()):
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            out += ["", *_table(lines[i:end]), "", "..", ""]  # the comment ends the table, whatever follows
        elif line.startswith("    ") and out and not out[-1].strip() and not _in_item(out):
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            out += [".. code-block:: text", "", *lines[i:end], ""]
        else:
            end = i + 1
            out.append(_bars(line))
        i = end
    lines[:] = _split_attributes(out)


def _split_attributes(lines: list[str]) -> list[str]:
    """`a, b: text` under "Attributes:" as two entries, which napoleon does for "Args:" only."""
    out: list[str] = []
    inside = False
    for line in lines:
        inside = line.startswith("Attributes:") or (inside and (line.startswith(" ") or not line.strip()))
        pair = re.fullmatch(r"    (\w+), (\w+): (.*)", line) if inside else None
        out += [f"    {name}: {pair[3]}" for name in pair.groups()[:2]] if pair else [line]
    return out


def _short_signature(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show the alias `State`, not the way autodoc stores it inside a union."""
    bare = [text and re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text) for text in (signature, returns)]
    return bare[0], bare[1]


def _in_item(before: list[str]) -> bool:
    """Whether what comes next belongs to a list item or an already indented block."""
    last = next((line for line in reversed(before) if line.strip()), "")
    return last.startswith((" ", "- ", "* "))


def _all_modules_listed(app: Sphinx) -> None:
    listed = set(re.findall(r"^ *(sdediff\.[\w.]+)$", (Path(app.srcdir) / "api.md").read_text(), re.MULTILINE))
    found = {module.name for module in pkgutil.walk_packages(sdediff.__path__, "sdediff.")}
    public = {name for name in found if not any(part.startswith("_") for part in name.split("."))}
    if missing := sorted(public - _INTERNAL - listed):
        raise ConfigError(f"docs/api.md has no entry for {', '.join(missing)}: add a line to one of its lists.")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("builder-inited", _all_modules_listed, priority=100)
    app.connect("autodoc-process-docstring", _readable, priority=100)
    app.connect("autodoc-process-signature", _short_signature)
