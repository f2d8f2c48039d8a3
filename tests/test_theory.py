"""The tables of docs/theory: each equation stands beside a function that exists and a test that exists.

A page holds tables with the columns equation, function and test. The list "All equations" of index.md names the
equations of the pages, and a row of a page that is listed begins with its name in bold, so that no row can be lost.
A test counts as proof of a row if mutants of the function's module are registered for it (see mutants.py).
"""

import ast
import fnmatch
import inspect
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import pytest
from mutants import MUTANTS, ROOT

import sdediff as sd
from sdediff.model import PREDICTIONS

HEADER = ["equation", "function", "test"]
PROVEN = {(mutant.module, test) for mutant in MUTANTS for test in mutant.tests}
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "theory").glob("*.md"))}


@dataclass(frozen=True)
class Row:
    """A row of a table, and where it stands."""

    page: str
    line: int
    cells: tuple[str, ...]

    def __str__(self):
        return f"{self.page}.md, line {self.line}"

    @property
    def key(self):
        found = re.match(r"\*\*(.+?)\*\*", self.cells[0])
        return found[1] if found else None

    def names(self, column):
        """What stands in backticks in a cell, if it holds nothing else than such names and commas."""
        cell = self.cells[column]
        return re.findall(r"`([^`]+)`", cell) if re.fullmatch(r"`[^`]+`(, *`[^`]+`)*", cell) else None


def cells(line):
    """The cells of a row as Markdown splits it: at every bar that is not escaped, inside of code and formulas too."""
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")))


def rows(page, text):
    """The rows of all tables of a page that have the header."""
    out, inside = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("|"):
            inside = False
        elif inside:
            out.append(Row(page, number, cells(line)))
        elif [cell.lower() for cell in cells(line)] == HEADER:
            inside = True
    return [row for row in out if not re.fullmatch(r"[-: ]+", "".join(row.cells))]


def module_and_object(name):
    """The module of a dotted name, and what it names; `name["entry"]` is an entry of a dictionary."""
    found = re.fullmatch(r"(sdediff(?:\.\w+)+)(?:\[\"([^\"]+)\"\])?", name)
    if not found:
        raise LookupError
    module, attributes = sd, found[1].split(".")[1:]
    while attributes:
        try:
            module = import_module(f"{module.__name__}.{attributes[0]}")
        except ModuleNotFoundError:
            break
        del attributes[0]
    thing = module
    for attribute in attributes:
        thing = getattr(thing, attribute)
    return module.__name__, thing if found[2] is None else thing[found[2]]


@cache
def proofs_in(path):
    """The tests of a file by name, `Class::test` for those of classes."""
    if not re.fullmatch(r"tests/test_\w+\.py", path) or not (ROOT / path).exists():
        return {}
    out = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for part in inner:
            if isinstance(part, ast.FunctionDef) and part.name.startswith("test"):
                out[prefix + part.name] = part
    return out


def missing_function(name):
    try:
        _, thing = module_and_object(name)
    except (LookupError, AttributeError):
        return f"`{name}` is not importable"
    return None if callable(thing) or isinstance(thing, property) else f"`{name}` is not a function or a class"


def missing_test(name):
    path, _, test = name.partition("::")
    if test not in proofs_in(path):
        return f"`{name}` is not a test"
    marks = [ast.unparse(mark) for mark in proofs_in(path)[test].decorator_list]
    return f"`{name}` is skipped" if any(re.search("skip|xfail", mark) for mark in marks) else None


def unproven(row):
    modules = {module_and_object(name)[0].removeprefix("sdediff.").replace(".", "/") for name in row.names(1)}
    files = {name.partition("::")[0].removeprefix("tests/") for name in row.names(2)}
    if PROVEN & {(module, file) for module in modules for file in files}:
        return None
    return f"tests/mutants.py has no mutant of {' or '.join(sorted(modules))} for {' or '.join(sorted(files))}"


def problems_of(row):
    """Sentences on what is wrong with a row."""
    if len(row.cells) != 3:
        return [f"{row}: {len(row.cells)} cells, not 3; write \\lvert or \\mid for a bar in a formula"]
    if not all(row.cells):
        return [f"{row}: the cell '{HEADER[row.cells.index('')]}' is empty"]
    if row.cells[0].count("$") % 2 or "$" not in row.cells[0]:
        return [f"{row}: the equation has no formula in $...$"]
    for column in (1, 2):
        if row.names(column) is None:
            return [f"{row}: the cell '{HEADER[column]}' must hold names in backticks and commas, nothing else"]
    wrong = [*map(missing_function, row.names(1)), *map(missing_test, row.names(2))]
    wrong = [problem for problem in wrong if problem] or [unproven(row)]
    return [f"{row}: {problem}" for problem in wrong if problem]


def listed(index):
    """The names of equations that the index lists, by page: lines `- [title](page.md): name; name; ...`."""
    lines = re.findall(r"^- \[[^\]]+\]\((\w+)\.md\): (.+?)\.?$", index, re.MULTILINE)
    return {page: [name.strip() for name in names.split(";")] for page, names in lines}


def entries(index):
    """The entries of the toctrees of a page."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    return [line.strip() for tree in trees for line in tree.splitlines() if line.strip() and line[0] != ":"]


def problems(pages):
    """Sentences on what is wrong with the pages, given by name."""
    index, out = pages["index"], []
    tables = {page: rows(page, text) for page, text in pages.items()}
    for page, table in tables.items():
        if page != "index":
            if not table:
                out.append(f"{page}.md: no table with the header | equation | function | test |")
            if not any(fnmatch.fnmatchcase(page, entry) for entry in entries(index)):
                out.append(f"{page}.md: not in the toctree of index.md")
        out += [problem for row in table for problem in problems_of(row)]
    claims = listed(index)
    for page, names in claims.items():
        table = tables.get(page, [])
        found = [row.key for row in table]
        out += [f"index.md lists '{name}', which is the name of no row of {page}.md" for name in {*names} - {*found}]
        out += [f"{row}: its name is not in the list of index.md" for row in table if row.key not in names]
    keys = [row.key for table in tables.values() for row in table if row.key]
    out += [f"'{key}' is the name of {keys.count(key)} rows" for key in sorted(set(keys)) if keys.count(key) > 1]
    names = [name for page in claims.values() for name in page]
    out += [f"index.md lists '{name}' twice" for name in sorted(set(names)) if names.count(name) > 1]
    return out


def test_every_equation_has_its_function_and_its_proof():
    assert problems(PAGES) == []


def test_the_index_lists_the_pages_written_for_it():
    assert {"processes", "family", "models", "samplers", "likelihood", "metrics"} <= set(listed(PAGES["index"]))
    assert all(len(names) > 1 for names in listed(PAGES["index"]).values())


def stand_for_equations():
    """What users are offered that is a formula: classes of these kinds, all metrics and grids, all predictions."""
    kinds = sd.LinearSDE, sd.Solver, sd.Corrector, sd.Divergence, sd.Dequantizer
    classes = [thing for module in (sd, sd.dequantize) for thing in vars(module).values() if inspect.isclass(thing)]
    out = [c for c in classes if issubclass(c, kinds) and not inspect.isabstract(c) and c not in kinds]
    for module in (sd.metrics, sd.grids):
        modules = {module.__name__, "sdediff.neighbours", "sdediff.two_sample", "sdediff.bootstrap"}
        own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ in modules]
        out += [f for f in own if f.__name__[0] != "_"]
    return [*out, *PREDICTIONS.values()]


def test_everything_that_stands_for_an_equation_has_a_row():
    """Whoever adds a process, solver, corrector, divergence, dequantiser, metric, grid or prediction adds its row."""
    said = [module_and_object(name)[1] for text in PAGES.values() for row in rows("", text) for name in row.names(1)]
    things = stand_for_equations()
    assert {sd.VP, sd.DDIM, sd.Langevin, sd.Hutchinson, sd.dequantize.Uniform, sd.grids.karras} <= set(things)
    assert not [thing for thing in things if thing not in said]


# The checks themselves, on planted pages.

GOOD = "| **kernel** $x$ | `sdediff.linear.LinearSDE.perturb` | `tests/test_sde.py::test_kernels_at_the_ends_of_time` |"


def planted(row=GOOD, index="- [A](a.md): kernel.", tree="a", header="| equation | function | test |"):
    pages = {"index": f"# T\n\n{index}\n\n```{{toctree}}\n:glob:\n\n{tree}\n```\n"}
    return pages | {"a": f"# A\n\n{header}\n|---|---|---|\n{row}\n\ntext | with | bars\n"}


def test_good_pages_have_no_problems():
    assert problems(planted()) == []
    assert problems(planted(tree="*")) == []
    proofs = "test_any_two_kinds_convert_exactly", "test_views_are_their_definitions"
    two = f'{GOOD}\n| **v** $v \\| x$ | `sdediff.model.PREDICTIONS["v"]`, `sdediff.model.ScoreModel.linear` |'
    two += ",".join(f" `tests/test_model.py::{name}`" for name in proofs) + " |"
    assert problems(planted(two, "- [A](a.md): kernel; v")) == []
    assert problems(planted(GOOD.replace("**kernel** ", ""), "nothing")) == [], "an unlisted page needs no names"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row": GOOD.replace("perturb", "purturb")}, "`sdediff.linear.LinearSDE.purturb` is not importable"),
        ({"row": GOOD.replace("sdediff.linear", "torch.linear")}, "`torch.linear.LinearSDE.perturb` is not importable"),
        ({"row": GOOD.replace("LinearSDE.perturb", "SLACK")}, "`sdediff.linear.SLACK` is not a function or a class"),
        ({"row": GOOD.replace("linear.LinearSDE.perturb", 'model.PREDICTIONS["w"]')}, "is not importable"),
        ({"row": GOOD.replace("test_kernels", "test_colonels")}, "test_colonels_at_the_ends_of_time` is not a test"),
        ({"row": GOOD.replace("test_sde.py", "test_ode.py")}, "`tests/test_ode.py::test_kernels"),
        ({"row": GOOD.replace("::test_kernels_at_the_ends_of_time", "::FromRates")}, "::FromRates` is not a test"),
        ({"row": GOOD.replace("::test_kernels_at_the_ends_of_time", "")}, "`tests/test_sde.py` is not a test"),
        ({"row": GOOD.replace("linear.LinearSDE.perturb", "cli.main")}, "no mutant of cli for test_sde.py"),
        ({"row": GOOD.replace("$x$", "$|x|$")}, "a.md, line 5: 5 cells, not 3; write \\lvert"),
        ({"row": GOOD.replace("**kernel** $x$", "")}, "a.md, line 5: the cell 'equation' is empty"),
        ({"row": GOOD.replace("`sdediff.linear.LinearSDE.perturb`", " ")}, "line 5: the cell 'function' is empty"),
        ({"row": GOOD.replace("$x$", "x")}, "a.md, line 5: the equation has no formula"),
        ({"row": GOOD.replace("$x$", "$x")}, "a.md, line 5: the equation has no formula"),
        ({"row": GOOD.replace("`sdediff.", "see `sdediff.")}, "the cell 'function' must hold names in backticks"),
        ({"row": GOOD.replace("_time`", "_time` and others")}, "the cell 'test' must hold names in backticks"),
        ({"row": GOOD + "\n" + GOOD}, "'kernel' is the name of 2 rows"),
        (
            {"row": GOOD.replace("kernel**", "colonel**")},
            "lists 'kernel', which is the name of no row of a.md",
        ),
        ({"row": GOOD.replace("**kernel** ", "")}, "a.md, line 5: its name is not in the list of index.md"),
        (
            {"index": "- [A](a.md): kernel; transition."},
            "lists 'transition', which is the name of no row of a.md",
        ),
        ({"index": "- [A](a.md): kernel; kernel."}, "index.md lists 'kernel' twice"),
        ({"index": "- [A](a.md): kernel.\n- [B](b.md): x."}, "index.md lists 'x', which is the name of no row of b.md"),
        ({"tree": "b"}, "a.md: not in the toctree of index.md"),
        ({"header": "| equation | function | proof |"}, "a.md: no table with the header"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_each_mistake_is_found_and_named(change, said):
    found = problems(planted(**change))
    assert any(said in problem for problem in found), found


def test_a_test_that_is_skipped_is_no_proof(monkeypatch):
    fake = ast.parse("@pytest.mark.skipif(True)\ndef test_it(): ...\n").body[0]
    monkeypatch.setitem(globals(), "proofs_in", lambda path: {"test_it": fake})
    assert missing_test("tests/test_x.py::test_it") == "`tests/test_x.py::test_it` is skipped"
    fake.decorator_list.clear()
    assert missing_test("tests/test_x.py::test_it") is None
