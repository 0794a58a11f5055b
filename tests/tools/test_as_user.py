"""What .ci/as_user takes from the pages: all of their commands, as they stand there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = """
# Page

```bash
pip install 'sftjax[x]'    # small
python tools/a.py --text "a # b" \\
  -d '{"a": 1}'            # to the end

# a remark
```

As `python tools/b.py --model
DIR` says, or `b.py`.

```python
import not_a_command
```
"""


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(ROOT / ".ci" / "as_user"))
    try:
        import given
        import pages
    finally:
        sys.path.pop(0)
    return pages, given


def test_commands_are_taken_from_blocks_and_sentences(tmp_path, modules):
    pages, _ = modules
    (tmp_path / "page.md").write_text(PAGE)
    found = pages.commands(tmp_path, tmp_path / "page.md")
    assert [(one.line, one.text) for one in found] == [
        (5, "pip install 'sftjax[x]'"),
        (6, """python tools/a.py --text "a # b" -d '{"a": 1}'"""),
        (12, "python tools/b.py --model DIR"),
    ]


def test_the_list_of_what_is_not_run_is_short_and_each_of_its_lines_is_needed(modules):
    pages, given = modules
    commands = [one.text for page in pages.pages(ROOT) for one in pages.commands(ROOT, page)]
    assert "bash tools/quickstart.sh" in commands and len(commands) > 60
    assert len(given.NOT_RUN) <= 6 and len(given.NIGHTLY) <= 6
    for table in (given.NOT_RUN, given.NIGHTLY):
        for pattern, reason in table.items():
            assert any(given.why(command, {pattern: reason}) for command in commands), reason
    run = [command for command in commands if not given.why(command, given.NOT_RUN | given.NIGHTLY)]
    assert len(run) > 25
    for command in run:  # a reader's own names are in place of the page's capitals
        assert not {"DIR", "RUN", "NAME", "..."} & set(given.filled(command).split()), command
