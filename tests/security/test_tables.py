"""The tables of attacks in docs/security.md and docs/security: each test that they name exists, no row is without one, and no attack test is left out."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "security"
ENTRY = ROOT / "docs" / "security.md"
TABLES = sorted(FOLDER.glob("*.md"))
ROWS_MAX = 71
ROWS = {
    "metadata.md": {*range(1, 21), *range(25, 30)},
    "transport.md": set(range(30, 47)),
    "input.md": {*range(21, 25), *range(58, 72)},
}
"""Of the project's list of faults and attacks; those between are storage and power, in docs/durability.md."""

NAME = re.compile(r"(?<![/\w])(test_\w+)(?!\w*\.py)(…?)")


@cache
def functions_of(path: Path) -> frozenset[str]:
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    )


@cache
def functions() -> frozenset[str]:
    return frozenset().union(*(functions_of(path) for path in (ROOT / "tests").rglob("test_*.py")))


@pytest.mark.parametrize("table", [ENTRY, *TABLES], ids=lambda path: path.name)
def test_every_test_that_a_table_names_is_there(table: Path) -> None:
    text = table.read_text("utf-8")
    names = set(NAME.findall(text))
    assert names
    for name, more in names:
        found = any(each.startswith(name) for each in functions()) if more else name in functions()
        assert found, f"{table.name} names {name}{more}"
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).exists(), f"{table.name} names {path}"
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text):
        assert name in functions_of(ROOT / path), f"{table.name}: {path} has no {name}"


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_every_row_is_there_and_names_a_test(table: Path) -> None:
    rows: dict[int, list[str]] = {}
    for line in table.read_text("utf-8").splitlines():
        if found := re.match(r"\| (\d+) \|", line):
            rows.setdefault(int(found[1]), []).append(line)
    assert set(rows) == ROWS[table.name]
    for number, lines in rows.items():
        assert all(NAME.search(line) for line in lines), f"{table.name}: row {number} names no test"


def test_the_entry_page_has_every_row_in_order_with_a_page_and_a_test_or_a_reason() -> None:
    section = ENTRY.read_text("utf-8").partition("## Every row of the list")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, ROWS_MAX + 1))
    pages = {number: page for page, numbers in ROWS.items() for number in numbers}
    for line in rows:
        _, number, attack, page, shown, _ = (cell.strip() for cell in line.split("|"))
        assert attack
        where = pages.get(int(number))
        assert f"({'durability.md' if where is None else f'security/{where}'})" in page, line
        names = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown)
        assert names or re.match(r"cannot happen here: \w", shown), line
        for path, name in names:
            assert name in functions_of(ROOT / path), f"row {number}: {path} has no {name}"


@pytest.mark.parametrize(
    ("table", "paths", "pattern"),
    [
        (
            "metadata.md",
            ["protocol/test_trust_attacks.py", "device/test_trust_agent.py", "device/test_director.py"],
            r"test_\d+_",
        ),
        ("metadata.md", ["security/test_key_rotation.py", "server/test_ceremony.py"], r"test_\d+_"),
        ("metadata.md", ["security/test_transfer_attacks.py"], r"test_1\d_"),
        ("transport.md", ["security/test_transfer_attacks.py"], r"test_3\d_"),
        ("transport.md", ["server/test_broker_attacks.py"], r"test_\d+_"),
        ("input.md", ["security/test_hostile_models.py", "security/test_hostile_deltas.py"], r"test_row_"),
    ],
)
def test_no_attack_test_is_left_out(table: str, paths: list[str], pattern: str) -> None:
    text = (FOLDER / table).read_text("utf-8")
    named = NAME.findall(text)
    for path in paths:
        for name in functions_of(ROOT / "tests" / path):
            if re.match(pattern, name):
                assert any(name == each or (more and name.startswith(each)) for each, more in named), (
                    f"{path}::{name}"
                )
