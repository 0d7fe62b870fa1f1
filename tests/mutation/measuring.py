"""Which test runs which line, how long each takes, and which lines and branches none runs."""

import json
import tempfile
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import coverage
import msgspec
import pytest
from msgspec import Struct

from tests.mutation.mutants import functions_of
from tests.mutation.targets import ROOT, Group

_NOT_CODE: Final = r"^\s*\.\.\.$"
"""The body of a method that a port only declares."""


class Missing(Struct, frozen=True):
    """What no test runs in a module: lines, and branches from a line to a line (a negative one is the end of a function)."""

    lines: list[int]
    branches: list[tuple[int, int]]
    branches_total: int


class Measured(Struct, frozen=True):
    """What one run of the tests of a group has shown.

    Attributes:
        seconds: How long each test took.
        lines: By module and line, the tests that run it.
        missing: By module.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    missing: dict[str, Missing]


class _Contexts:
    """Tells coverage which test runs."""

    def __init__(self, measuring: coverage.Coverage) -> None:
        self._measuring = measuring
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._measuring.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self._measuring.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration


def pytest_arguments(group: Group, folder: str) -> list[str]:
    """How the tests of a group are run: without chance (Hypothesis calls that `ci`), limits of time are the caller's."""
    fixed = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-o", "timeout=0", f"--basetemp={folder}"]
    fixed.append("--hypothesis-profile=ci")
    fixed += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    left_out = " or ".join(group.without)
    chosen = [f"-k=not ({left_out})"] if left_out else []
    return [*fixed, *chosen, *(str(ROOT / path) for path in group.tests)]


def measure(group: Group) -> Measured:
    """Run the tests of a group once, in this process, which must not have imported the modules before.

    Raises:
        RuntimeError: A test failed.
    """
    measuring = coverage.Coverage(
        data_file=None, branch=True, include=[str(ROOT / path) for path in group.modules], config_file=False
    )
    measuring.exclude(_NOT_CODE)
    contexts = _Contexts(measuring)
    with tempfile.TemporaryDirectory() as folder:
        measuring.start()
        status = pytest.main(pytest_arguments(group, f"{folder}/tests"), plugins=[contexts])
        measuring.stop()
        if status != 0:
            raise RuntimeError("the tests fail without a mutant")
        report = Path(folder, "coverage.json")
        measuring.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    lines: dict[str, dict[int, list[str]]] = {}
    for path in group.modules:
        found = measuring.get_data().contexts_by_lineno(str(ROOT / path))
        lines[path] = {line: sorted({name for name in names if name}) for line, names in found.items()}
    missing = {path: _missing(group, path, files[path]) for path in group.modules}
    return Measured(contexts.seconds, lines, missing)


def _missing(group: Group, path: str, report: dict[str, Any]) -> Missing:
    functions = functions_of((ROOT / path).read_text())
    idle = {line for name, lines in functions.items() if not group.counts(path, name) for line in lines}
    branches = [branch for branch in report["missing_branches"] if branch[0] not in idle]
    run = [branch for branch in report["executed_branches"] if branch[0] not in idle]
    return Missing(
        [line for line in report["missing_lines"] if line not in idle],
        [tuple(branch) for branch in branches],
        len(branches) + len(run),
    )


def load(path: Path) -> Measured | None:
    """What was stored, None if there is nothing, or nothing of use."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    return None
