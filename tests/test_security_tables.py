"""The tables of attacks in docs/security name tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = sorted((ROOT / "docs/security").glob("*.md"))
ABBREVIATION = re.compile(r"`([A-Z])` stands for\s+`([^`]+)`|`([A-Z])` for\s+`([^`]+)`")
TEST = re.compile(r"`([^`\s]+)::(test_\w+)`")


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_every_test_that_a_table_names_exists(table: Path) -> None:
    text = table.read_text()
    files = {found[0] or found[2]: found[1] or found[3] for found in ABBREVIATION.findall(text)}
    for file, name in TEST.findall(text):
        path = files.get(file, file)
        assert name in functions_of(path), f"{table}: {path} has no {name}"


def test_no_attack_test_on_metadata_is_left_out_of_its_table() -> None:
    text = (ROOT / "docs/security/metadata.md").read_text()
    for path in ("tests/protocol/test_trust_attacks.py", "tests/device/test_trust_agent.py"):
        for name in functions_of(path):
            if re.match(r"test_\d+_", name):
                assert f"::{name}`" in text or name.startswith("test_7_a_record"), f"{path}::{name}"
