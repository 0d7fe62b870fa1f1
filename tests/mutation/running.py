"""Tries mutants: each in a process of its own, forked once all tests are loaded, with the tests that run the changed line."""

import gc
import os
import resource
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Final

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.measuring import Measured, pytest_arguments
from tests.mutation.mutants import Mutant
from tests.mutation.targets import ROOT, Group

CPU_FACTOR: Final = 10
"""A test that takes that many times its usual time of the processor, and a second, hangs."""

WALL_S_MAX: Final = 60.0
"""A mutant may make a test wait for ever without any work."""

MEMORY_BYTES_MAX: Final = 2 << 30
"""On top of what the process has when it is forked: a mutant may take away a limit."""

_SURVIVED, _KILLED, _BROKEN = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant.

    Attributes:
        outcome: `killed` by a test that failed, `hung`, `crashed`; or `survived`, or `uncovered`: no test runs the line.
        test: Which one failed.
    """

    mutant: Mutant
    outcome: str
    test: str = ""

    @property
    def is_killed(self) -> bool:
        """Whether somebody noticed."""
        return self.outcome in {"killed", "hung", "crashed"}


@dataclass(slots=True)
class _Trial:
    mutant: Mutant
    pid: int
    pipe: int
    until: float
    said: bytes = b""


@dataclass(slots=True)
class _Trials:
    """A pytest plugin: in place of running the tests it tries the mutants."""

    mutants: Sequence[Mutant]
    measured: Measured
    workers: int
    on_result: Callable[[Result], None]
    functions: "dict[tuple[str, str, int], list[FunctionType]]" = field(default_factory=dict)
    last_killer: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        # Whoever asks for it first empties it: that must not be one of several children.
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        self.functions = _functions_by_place({str(ROOT / mutant.module) for mutant in self.mutants})
        running: dict[int, _Trial] = {}
        with selectors.DefaultSelector() as selector:
            for mutant in self.mutants:
                names = self._tests_of(mutant, items)
                if not names:
                    self.on_result(Result(mutant, "uncovered"))
                    continue
                while len(running) >= self.workers:
                    self._wait(selector, running)
                trial = self._start(mutant, [items[name] for name in names])
                running[trial.pipe] = trial
                selector.register(trial.pipe, selectors.EVENT_READ)
            while running:
                self._wait(selector, running)
        return True

    def _tests_of(self, mutant: Mutant, items: dict[str, pytest.Item]) -> list[str]:
        lines = self.measured.lines[mutant.module]
        first, last = mutant.lines
        names = {name for line in range(first, last + 1) for name in lines.get(line, ()) if name in items}
        recent = self.last_killer.get((mutant.module, mutant.function), [])[-5:]
        return sorted(names, key=lambda name: (name not in recent, self.measured.seconds[name], name))

    def _start(self, mutant: Mutant, items: list[pytest.Item]) -> _Trial:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                status = self._try(mutant, items, writing)
            except BaseException as error:  # noqa: BLE001  # a child must never go on in the parent's place
                os.write(writing, repr(error).encode()[:2000])
                status = _BROKEN
            os._exit(status)
        os.close(writing)
        return _Trial(mutant, pid, reading, time.monotonic() + WALL_S_MAX)

    def _try(self, mutant: Mutant, items: list[pytest.Item], writing: int) -> int:
        os.setsid()  # so that whatever a test starts ends with it
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES_MAX, used + MEMORY_BYTES_MAX))
        self._plant(mutant)
        for item, following in zip(items, [*items[1:], None], strict=True):
            signal.setitimer(signal.ITIMER_PROF, 1 + CPU_FACTOR * self.measured.seconds[item.nodeid])
            reports = runtestprotocol(item, log=False, nextitem=following)
            if any(report.failed for report in reports):
                os.write(writing, item.nodeid.encode())
                return _KILLED
        return _SURVIVED

    def _plant(self, mutant: Mutant) -> None:
        path = ROOT / mutant.module
        changed = compile(mutant.apply(path.read_text()), str(path), "exec")
        place = (str(path), mutant.function, mutant.function_line)
        code = next(code for code in _codes(changed) if _place(code) == place)
        for function in self.functions[place]:
            function.__code__ = code

    def _wait(self, selector: selectors.BaseSelector, running: dict[int, _Trial]) -> None:
        for key, _ in selector.select(timeout=1):
            trial = running[key.fd]
            data = os.read(key.fd, 4096)
            trial.said += data
            if not data:
                self._end(selector, running, trial)
        now = time.monotonic()
        for trial in [trial for trial in running.values() if now > trial.until]:
            os.killpg(trial.pid, signal.SIGKILL)
            self._end(selector, running, trial)

    def _end(self, selector: selectors.BaseSelector, running: dict[int, _Trial], trial: _Trial) -> None:
        _, status = os.waitpid(trial.pid, 0)
        selector.unregister(trial.pipe)
        os.close(trial.pipe)
        del running[trial.pipe]
        code, said = os.waitstatus_to_exitcode(status), trial.said.decode()
        if code == _BROKEN:
            raise RuntimeError(f"{trial.mutant.module}:{trial.mutant.lines[0]} {trial.mutant.change}: {said}")
        if code == _KILLED:
            self.last_killer.setdefault((trial.mutant.module, trial.mutant.function), []).append(said)
        hung = {-signal.SIGPROF, -signal.SIGKILL}
        outcomes = {_SURVIVED: "survived", _KILLED: "killed"}
        self.on_result(Result(trial.mutant, outcomes.get(code, "hung" if code in hung else "crashed"), said))


def try_mutants(
    group: Group,
    mutants: Sequence[Mutant],
    measured: Measured,
    workers: int,
    on_result: Callable[[Result], None],
) -> None:
    """Try mutants of one group; each result is told as it comes.

    Raises:
        RuntimeError: The tests cannot be loaded, or a mutant could not be planted.
    """
    with tempfile.TemporaryDirectory() as folder:
        trials = _Trials(mutants, measured, workers, on_result)
        status = pytest.main(pytest_arguments(group, f"{folder}/tests"), plugins=[trials])
    if status != 0:
        raise RuntimeError(f"pytest ended with {status}")


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _functions_by_place(files: set[str]) -> dict[tuple[str, str, int], list[FunctionType]]:
    """Every function of these files that exists, whoever holds it: modules that imported it, decorators, properties."""
    found: dict[tuple[str, str, int], list[FunctionType]] = {}
    for value in gc.get_objects():
        if type(value) is FunctionType and value.__code__.co_filename in files:
            found.setdefault(_place(value.__code__), []).append(value)
    return found


def _codes(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
