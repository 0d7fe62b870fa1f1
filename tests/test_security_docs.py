"""The tables of attacks name tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted((ROOT / "docs" / "security").glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_table_of_attacks_names_is_there(document: Path) -> None:
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    known = {name for text in sources.values() for name in re.findall(r"def (test_\w+)", text)}
    names = set(re.findall(r"(?<![/\w])(test_\w+)(?!\w*\.py)(…?)", document.read_text()))
    assert names
    for name, more in names:
        found = any(each.startswith(name) for each in known) if more else name in known
        assert found, f"{document.name} names {name}{more}"
    for path in re.findall(r"tests/[\w/]+\.py", document.read_text()):
        assert (ROOT / path).exists(), f"{document.name} names {path}"
