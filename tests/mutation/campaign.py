"""One run over groups: measure, try, remember, report."""

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import msgspec

from tests.mutation.measuring import Measured, load, measure
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.running import Result, try_mutants
from tests.mutation.survivors import Survivor, load_survivors, stale
from tests.mutation.targets import GROUPS, KILLED_MIN, ROOT, Group

CACHE: Final = ROOT / ".cache" / "mutation"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is to do.

    Attributes:
        groups: Names of groups.
        workers: Processes side by side.
        sample: That many mutants of these groups, 0 for all.
        is_incremental: What was killed before by other tests is not tried again; for work on tests.
    """

    groups: Sequence[str]
    workers: int
    sample: int = 0
    is_incremental: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found."""

    results: list[Result]
    measured: dict[str, Measured]
    survivors: list[Survivor]
    is_sample: bool

    def unexplained(self) -> list[Result]:
        """Mutants that nobody noticed, and that are not listed."""
        return [
            result
            for result in self.results
            if not result.is_killed and not any(entry.matches(result.mutant) for entry in self.survivors)
        ]

    def wrong_entries(self) -> list[Survivor]:
        """Entries of the list about mutants that somebody notices, or that do not exist."""
        tried = {result.mutant.module for result in self.results}
        mutants = [mutant for module in tried for mutant in read_mutants(module)]
        left = [result.mutant for result in self.results if not result.is_killed]
        entries = [entry for entry in self.survivors if entry.module in tried]
        return stale(entries, mutants if self.is_sample else left)

    def unrun(self) -> list[str]:
        """Lines and branches that no test runs."""
        found: list[str] = []
        for measured in self.measured.values():
            for module, missing in measured.missing.items():
                found += [f"{module}:{line}: no test runs it" for line in missing.lines]
                found += [f"{module}:{start}: no test goes on to {end}" for start, end in missing.branches]
        return found


def read_mutants(module: str) -> list[Mutant]:
    """All mutants of a module as it is."""
    return mutants_of(module, (ROOT / module).read_text())


def run(options: Options, groups: Mapping[str, Group] = GROUPS, cache: Path = CACHE) -> Outcome:
    """Measure the tests of each group and try its mutants; goes on where an earlier run was stopped.

    Args:
        options: What to do.
        groups: By name.
        cache: Folder for what was found.

    Raises:
        RuntimeError: Tests fail without a mutant.
        ValueError: The list of survivors is malformed.
    """
    survivors = load_survivors()
    results: list[Result] = []
    measured: dict[str, Measured] = {}
    cache.mkdir(parents=True, exist_ok=True)
    for name in options.groups:
        group = groups[name]
        mutants = [
            mutant
            for module in group.modules
            for mutant in read_mutants(module)
            if group.counts(module, mutant.function)
        ]
        if options.sample:
            mutants = _sample(mutants, options.sample // len(options.groups))
        measured[name] = _measured(cache, name, group)
        results += _tried(cache / f"{name}.jsonl", group, mutants, measured[name], options)
    return Outcome(results, measured, survivors, bool(options.sample))


def report(outcome: Outcome, out: TextIO) -> bool:
    """Print what was found; whether all is well."""
    lines = [f"\n{_diff(result)}" for result in outcome.unexplained()]
    lines += [
        f"survivors.toml: no such survivor: {entry.module} {entry.function}: {entry.change}"
        for entry in outcome.wrong_entries()
    ]
    out.writelines(f"{line}\n" for line in [*lines, *outcome.unrun()])
    out.write(f"\n{'module':34} {'mutants':>8} {'killed':>8} {'':>8} {'listed':>8} {'branches':>9}\n")
    for module in dict.fromkeys(result.mutant.module for result in outcome.results):
        _row(out, module, [result for result in outcome.results if result.mutant.module == module], outcome)
    _row(out, "all", outcome.results, outcome)
    killed = sum(result.is_killed for result in outcome.results)
    # A few mutants are no measure: what survives of a sample has to be listed, and that is all.
    is_enough = outcome.is_sample or killed >= KILLED_MIN * len(outcome.results)
    return is_enough and not outcome.unexplained() and not outcome.wrong_entries() and not outcome.unrun()


def _row(out: TextIO, name: str, results: Sequence[Result], outcome: Outcome) -> None:
    killed = sum(result.is_killed for result in results)
    listed = len(results) - killed - sum(result in results for result in outcome.unexplained())
    missing = [
        each
        for measured in outcome.measured.values()
        for module, each in measured.missing.items()
        if name in {module, "all"}
    ]
    total = sum(each.branches_total for each in missing)
    run = total - sum(len(each.branches) for each in missing)
    share = f"{100 * killed / len(results):.1f} %"
    out.write(f"{name:34} {len(results):8} {killed:8} {share:>8} {listed:8} {run:>5}/{total}\n")


def _diff(result: Result) -> str:
    mutant = result.mutant
    source = (ROOT / mutant.module).read_text()
    line, _, end_line, _ = mutant.span
    before = source.splitlines()[line - 1 : end_line]
    changed = mutant.apply(source).splitlines()
    after = changed[line - 1 : end_line + len(changed) - len(source.splitlines())]
    head = f"{mutant.module}:{line}: {result.outcome} in {mutant.function}: {mutant.change}"
    return "\n".join([head, *(f"-{text}" for text in before), *(f"+{text}" for text in after)])


def _sample(mutants: Sequence[Mutant], count: int) -> list[Mutant]:
    """Always the same ones of the same sources."""
    chosen = {mutant.key for mutant in sorted(mutants, key=lambda mutant: mutant.key)[:count]}
    return [mutant for mutant in mutants if mutant.key in chosen]


# --- what is remembered -----------------------------------------------------------------------------------------

_OURS: Final = tuple(f"tests/mutation/{name}.py" for name in ("mutants", "measuring", "running"))
"""What changes mutants and how they are tried."""


def _digest(paths: Iterable[str], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for path in sorted(paths):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _measured(cache: Path, name: str, group: Group) -> Measured:
    path = cache / f"{name}-{_digest((*group.modules, *group.tests, *_OURS), repr(group))}.json"
    known = load(path)
    if known is None:
        _in_another_process(_measure_into, group, path)
        known = load(path)
    assert known is not None
    return known


def _measure_into(group: Group, path: Path) -> None:
    path.write_bytes(msgspec.json.encode(measure(group)))


def _tried(
    path: Path, group: Group, mutants: Sequence[Mutant], measured: Measured, options: Options
) -> list[Result]:
    tests = _digest((*group.tests, *_OURS), repr(group))
    modules = {module: _digest([module]) for module in group.modules}
    known: dict[str, Result] = {}
    by_key = {mutant.key: mutant for mutant in mutants}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        mutant = by_key.get(record["key"])
        if mutant is None or record["module"] != modules[mutant.module]:
            continue
        result = Result(mutant, record["outcome"], record["test"])
        if record["tests"] == tests or (options.is_incremental and result.is_killed):
            known[mutant.key] = result
    left = [mutant for mutant in mutants if mutant.key not in known]
    if left:
        _in_another_process(_try_into, group, left, measured, options.workers, path, tests, modules)
        return _tried(path, group, mutants, measured, options)
    return [known[mutant.key] for mutant in mutants]


def _try_into(
    group: Group,
    mutants: Sequence[Mutant],
    measured: Measured,
    workers: int,
    path: Path,
    tests: str,
    modules: dict[str, str],
) -> None:
    with path.open("a", buffering=1) as file:
        count = 0

        def store(result: Result) -> None:
            nonlocal count
            count += 1
            record = {
                "key": result.mutant.key,
                "module": modules[result.mutant.module],
                "tests": tests,
                "outcome": result.outcome,
                "test": result.test,
            }
            file.write(json.dumps(record) + "\n")
            if count % 50 == 0 or count == len(mutants):
                sys.stderr.write(f"{count} of {len(mutants)} mutants tried\n")

        try_mutants(group, mutants, measured, workers, store)


def _in_another_process(function: object, *arguments: object) -> None:
    """The modules of a group are imported where they are measured or changed, and nowhere else.

    Raises:
        RuntimeError: It failed; what failed is on the error output.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError("the tests could not be run, see above")
