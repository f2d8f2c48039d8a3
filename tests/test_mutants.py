import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}: {m.original[:40]}")
def test_the_original_text_occurs_exactly_once(mutant):
    text = (ROOT / "sdediff" / f"{mutant.module}.py").read_text()
    assert text.count(mutant.original) == 1
    assert mutant.changed != mutant.original
    for name in mutant.tests:
        assert (ROOT / "tests" / name).exists()
