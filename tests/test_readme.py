"""The code of the README runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_readmes_code_runs_as_one_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert BLOCKS
    exec(compile("\n".join(BLOCKS), "README.md", "exec"), {})
