"""The driver itself, and a sample of what it does: removing a check makes a test fail."""

import re
from io import StringIO
from pathlib import Path

import pytest

from tests.mutation.campaign import Options, read_mutants, report, run
from tests.mutation.mutants import mutants_of
from tests.mutation.survivors import load_survivors, stale
from tests.mutation.targets import GROUPS, ROOT, Group

MODULES = [module for group in GROUPS.values() for module in group.modules]
SAMPLE = 36

CHECKS = '''"""Checks to be removed."""

LIMIT = 10


def checked(length: int, names: list[str]) -> int:
    """Whether a length is allowed."""
    assert isinstance(length, int)
    if not 0 <= length < LIMIT or "" in names:
        raise ValueError(f"length {length + 1} is not allowed" if names else "no")
    _check(names)
    return length


def _check(names: list[str]) -> None:
    for name in names:
        if len(name) > 5:
            raise ValueError(name)
'''

TESTS = """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checks_under_mutation import checked


@pytest.mark.parametrize("length", [-1, 10, 11])
def test_length(length: int) -> None:
    with pytest.raises(ValueError):
        checked(length, [])


def test_names() -> None:
    assert checked(0, ["fifth"]) == 0
    assert checked(9, []) == 9
    for names in ([""], ["sixth!"]):
        with pytest.raises(ValueError):
            checked(0, names)
"""


def changes(source: str) -> set[tuple[str, str]]:
    return {(mutant.operator, mutant.change) for mutant in mutants_of("m.py", source)}


def test_every_part_of_a_check_is_changed_and_no_text_is() -> None:
    assert changes(CHECKS) == {
        ("condition", """not 0 <= length < LIMIT or "" in names → True"""),
        ("condition", """not 0 <= length < LIMIT or "" in names → False"""),
        ("operand", """not 0 <= length < LIMIT → (("" in names))"""),
        ("operand", """"" in names → ((not 0 <= length < LIMIT))"""),
        ("sign", "not 0 <= length < LIMIT → 0 <= length < LIMIT"),
        ("comparison", "0 <= length → <"),
        ("comparison", "length < LIMIT → <="),
        ("comparison", '"" in names → not in'),
        ("constant", "0 → 1"),
        ("statement", 'raise ValueError(f"length {length + 1} is not allowed" if names else "no") → pass'),
        ("statement", "_check(names) → pass"),
        ("loop", "names → ()"),
        ("condition", "len(name) > 5 → True"),
        ("condition", "len(name) > 5 → False"),
        ("comparison", "len(name) > 5 → >="),
        ("constant", "5 → 6"),
        ("statement", "raise ValueError(name) → pass"),
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_mutant_is_another_program(module: str) -> None:
    source = (ROOT / module).read_text()
    for mutant in read_mutants(module)[::9]:
        changed = mutant.apply(source)
        assert changed != source
        compile(changed, module, "exec")


def test_a_mutant_is_known_again_wherever_its_function_has_moved() -> None:
    moved = CHECKS.replace("LIMIT = 10\n", "LIMIT = 10\nOTHER = 11\n\n\ndef before() -> None:\n    return\n")
    keys = {mutant.key for mutant in mutants_of("m.py", CHECKS)}
    assert keys == {mutant.key for mutant in mutants_of("m.py", moved)}


def test_the_list_of_survivors_is_about_mutants_that_exist() -> None:
    entries = load_survivors()
    assert {entry.module for entry in entries} <= set(MODULES)
    mutants = [mutant for module in MODULES for mutant in read_mutants(module)]
    assert stale(entries, mutants) == []


def test_what_tests_do_not_run_is_excused_with_a_reason_only() -> None:
    """The exclusions of coverage.py hide lines from the count."""
    for module in MODULES:
        for line in (ROOT / module).read_text().splitlines():
            if "pragma: no" in line:
                assert re.search(r"# pragma: no (cover|branch) {2}# .{10}", line), f"{module}: {line}"


@pytest.mark.slow
def test_a_removed_check_is_found_and_a_test_that_asserts_too_little_too(tmp_path: Path) -> None:
    (tmp_path / "checks_under_mutation.py").write_text(CHECKS)
    careless = TESTS.replace('"sixth!"', '""').replace(", 10", "")
    (tmp_path / "test_careless.py").write_text(careless)
    group = Group((str(tmp_path / "checks_under_mutation.py"),), (str(tmp_path / "test_careless.py"),))
    found = run(Options(["careless"], 1), {"careless": group}, tmp_path / "cache")
    out = StringIO()
    assert not report(found, out)
    assert {result.mutant.change for result in found.unexplained()} == {
        "length < LIMIT → <=",
        "_check(names) → pass",
        "names → ()",
        "len(name) > 5 → False",
        "5 → 6",
        "raise ValueError(name) → pass",
    }
    assert {result.outcome for result in found.results if result.is_killed} == {"killed"}
    assert found.unrun(), "the line that refuses a name is never run"
    assert "-    _check(names)\n+    pass\n" in out.getvalue()


@pytest.mark.slow
def test_a_sample_of_mutants_is_killed(tmp_path: Path) -> None:
    """`make mutation` tries all of them; this always takes the same ones of the same sources."""
    names = [name for name, group in GROUPS.items() if group.is_sampled]
    out = StringIO()
    found = run(Options(names, 2, sample=SAMPLE), cache=tmp_path)
    is_well = report(found, out)
    assert len(found.results) == SAMPLE
    assert is_well, out.getvalue()
