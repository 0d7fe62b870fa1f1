"""The table of attacks names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "security" / "input.md"
ROWS = {*range(21, 25), *range(58, 72)}

_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def _named() -> list[tuple[str, str]]:
    return sorted(set(_NAMED.findall(TABLE.read_text("utf-8"))))


@pytest.mark.parametrize(("path", "name"), _named())
def test_a_test_that_the_table_names_exists(path: str, name: str) -> None:
    assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE)


def test_every_row_has_a_test() -> None:
    rows: dict[int, list[str]] = {}
    for line in TABLE.read_text("utf-8").splitlines():
        if found := re.match(r"\| (\d+) \|", line):
            rows.setdefault(int(found[1]), []).append(line)
    assert set(rows) == ROWS
    assert all(_NAMED.search(line) for lines in rows.values() for line in lines)


def test_every_test_that_is_named_after_a_row_is_in_the_table() -> None:
    named = {name for _, name in _named()}
    for path in (ROOT / "tests" / "security").glob("test_*.py"):
        for name in re.findall(r"^def (test_row_\w+)\(", path.read_text("utf-8"), re.MULTILINE):
            assert name in named, f"{path.name}::{name}"
