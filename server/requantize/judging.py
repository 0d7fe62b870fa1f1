"""From a new model to a file that may be published: chosen, measured beside everything else that could be sent, and written only if it is no worse than plain.

The texts have parts: the *calibration* text says which weights matter, the *development* text decides settings, and the *held-out* texts, which nothing was
decided on, judge. No two of them share text.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from protocol.errors import RequestError
from server.adapters.blobs import storage_errors, sync_folder
from server.requantize import rows
from server.requantize.adapter import (
    Candidate,
    JudgedAdapter,
    Wish,
    adapter_path,
    cheapest,
    check_wish,
    judged,
    make_candidates,
    record_adapter,
)
from server.requantize.alone import with_alone
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen, Settings, choose
from server.requantize.controls import write_frozen, write_plain
from server.requantize.evaluation import Evaluator
from server.requantize.fewest import Trial, fewest_bytes
from server.requantize.figures import figures, share_of_gain
from server.requantize.frontier import (
    Budget,
    FrontierBench,
    Made,
    NoPointError,
    draw,
    points_journal,
    with_verdict,
)
from server.requantize.guards import Margins, check_suite, check_texts, is_passed
from server.requantize.portions import Portion, all_portions, check_fleet, mean_bytes, names_of
from server.requantize.readings import Readings
from server.requantize.rows import Row, row
from server.requantize.search import SmallBudgetError
from server.requantize.sent import Sent, check_sent
from server.requantize.texts import Text, check_unseen
from server.requantize.weighing import delta_sizes
from server.requantize.work import MetricName
from server.scorecard.card import Check
from server.scorecard.frontier import Frontier, Rule
from server.scorecard.items import Suite

BUDGET_SHARE_MIN: Final = 0.0003
"""Of the file: the search for the fewest bytes starts here, below what any useful change took."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Models:
    """What is chosen from.

    Attributes:
        new: The new model in floats, GGUF.
        installed: The quantized file that devices have.
        before: The installed version in floats; None where nobody kept it.
        start: A quantized file whose codes the choice begins with; None for the installed ones.
        also: Further files that a part of the devices has instead of `installed`, none of them more devices than have that.
        adapter: What could be added to the installed file instead; None for nothing.
    """

    new: Path
    installed: Path
    before: Path | None = None
    start: Path | None = None
    also: tuple[Portion, ...] = ()
    adapter: Wish | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """What files are judged on.

    Attributes:
        calibration: Says which weights matter.
        held_out: At least two texts that nothing was decided on.
        development: Decides settings; needed to keep a share of the gain.
        suites: Prompts and tasks whose answers plain and chosen file are asked for.
    """

    calibration: Text
    held_out: tuple[Text, ...]
    development: Text | None = None
    suites: tuple[Suite, ...] = ()


@dataclass(frozen=True, slots=True)
class Aim:
    """What is wanted; exactly one of `budget_bytes` and `keep_share`, or at most one of them with budgets of a frontier.

    Attributes:
        budget_bytes: What the delta may weigh.
        keep_share: Of plain's gain in likelihood on the development text, with as few bytes as that takes.
        extrapolations: Settings of the choice that are tried; with a budget the first one is taken.
        margins: How much worse than plain counts as no worse.
        frontier: Budgets that are measured on the development text, `budget_bytes` among them; the file is one of theirs.
    """

    budget_bytes: int | None = None
    keep_share: float | None = None
    extrapolations: tuple[float, ...] = (0.0,)
    margins: Margins = field(default_factory=Margins)
    frontier: tuple[Budget, ...] = ()

    @property
    def rule(self) -> Rule:
        """How a point of the frontier is chosen."""
        rule = Rule(kind="no worse", kl_share=self.margins.kl_share, flips=self.margins.flips)
        if self.keep_share is not None:
            return msgspec.structs.replace(rule, kind="keep", keep_share=self.keep_share)
        named = [each.name for each in self.frontier if each.bytes == self.budget_bytes]
        return msgspec.structs.replace(rule, kind="budget", budget=named[0]) if named else rule


class Judged(Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        rows: The chosen file beside the others.
        checks: The guards.
        is_written: Whether all guards passed, so that the file is there.
        price: At which it was chosen, in nats per token and bit.
        extrapolation: With which it was chosen.
        changed: Codes that differ from the installed ones.
        codes: How many there are.
        seconds: Of the choice alone.
        calibration_sha256: Of the calibration's tokens.
        frontier: From which the file was chosen; None where it was not.
        sent: What goes to the devices of each of several installed files; empty where all have the same.
        adapters: Adapters that were asked for, with their guards.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    is_written: bool
    price: float
    extrapolation: float
    changed: int
    codes: int
    seconds: float
    calibration_sha256: str
    frontier: Frontier | None = None
    sent: tuple[Sent, ...] = ()
    adapters: tuple[JudgedAdapter, ...] = ()

    @property
    def adapter(self) -> JudgedAdapter | None:
        """The adapter that is written: the cheapest of those that passed."""
        return cheapest(self.adapters)


def judge(
    models: Models,
    questions: Questions,
    aim: Aim,
    calibration: Calibration,
    evaluator: Evaluator,
    settings: Settings,
    folder: Path,
    out: Path,
    report: Report,
) -> tuple[Judged, Chosen]:
    """Choose a file, measure all rows, and write it if it passes; likewise an adapter, if one is asked for.

    Args:
        models: What is chosen from.
        questions: What it is judged on.
        aim: What is wanted.
        calibration: Of the new model, on that text.
        evaluator: On the new model in floats.
        settings: Of the choice, but for budget and extrapolation.
        folder: For files on the way.
        out: The chosen file; not touched unless every guard passed.
        report: Takes lines about the progress.

    Raises:
        NoPointError: No point of the frontier is good enough.
        RequestError: Texts overlap, are too few or too short, or nothing within the budget keeps what is wanted.
        WhimbrelError: As `choose` and `Evaluator.measure`.
    """
    check_request(models, questions, aim)
    bench = _Bench(models, questions, calibration, evaluator, settings, folder, report)
    trial, chosen = bench.chosen(aim)
    found = bench.rows(trial, aim)
    chosen = bench.beside_others(chosen)
    adapted = bench.adapter_rows()
    checks = (*bench.checks(rows.CHOSEN, aim.margins), *check_sent(chosen.sent))
    if is_passed(checks):
        publish(bench.file(rows.CHOSEN), out)
    frontier = bench.frontier
    if frontier is not None:
        frontier = with_verdict(frontier, found, chosen.sources.result if is_passed(checks) else None)
    adapters = tuple(judged(each, bench.checks(each.name, aim.margins)) for each in bench.adapters)
    if models.adapter is not None and (best := cheapest(adapters)) is not None:
        path = next(each.path for each in bench.adapters if each.name == best.name)
        publish(path, adapter_path(out))
        record_adapter(adapter_path(out), models.adapter, models.new, models.installed, calibration)
    verdict = Judged(
        rows=(*found, *adapted),
        checks=checks,
        is_written=is_passed(checks),
        price=chosen.price,
        extrapolation=trial.extrapolation,
        changed=sum(chosen.changed.values()),
        codes=chosen.codes,
        seconds=chosen.seconds,
        calibration_sha256=calibration.tokens_sha256,
        frontier=frontier,
        sent=chosen.sent,
        adapters=adapters,
    )
    return verdict, chosen


def check_request(models: Models, questions: Questions, aim: Aim) -> None:
    """Refuse what can be refused before hours of work.

    Raises:
        RequestError: Texts overlap, are too few or too short, or something that is needed was not given.
        ModelFileError: One of several installed files is of another kind than the first.
    """
    if (aim.budget_bytes is None) == (aim.keep_share is None) and not aim.frontier:
        raise RequestError("a budget or a share of the gain is needed, and not both")
    if aim.frontier and questions.development is None:
        raise RequestError(
            "a frontier needs a text on which it is measured",
            hint="give --development, a text that is neither calibration nor held out",
        )
    if aim.keep_share is not None and questions.development is None:
        raise RequestError(
            "keeping a share of the gain needs a text on which settings are tried",
            hint="give --development, a text that is neither calibration nor held out",
        )
    if models.before is None and any(aim.extrapolations):
        raise RequestError("extrapolation needs the installed version in floats", hint="give --before")
    check_fleet(models.installed, models.also)
    if models.adapter is not None:
        if models.also:
            raise RequestError(
                "an adapter goes with one installed file, and devices have several",
                hint="leave out --adapter, or bring the fleet to one version first",
            )
        check_wish(models.adapter, models.installed)
    used = [questions.calibration]
    if questions.development is not None:
        questions.development.runs()
        check_unseen([questions.development], used)
        used.append(questions.development)
    check_unseen(questions.held_out, used)
    for text in questions.held_out:
        text.runs()


def publish(path: Path, out: Path) -> None:
    """Copy under the wanted name, which it takes when it is whole."""
    partial = out.with_name(f".partial-{out.name}")
    try:
        with storage_errors(out):
            shutil.copyfile(path, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(out)
            sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)


class _Bench:
    """The files of one choice, made and measured when they are asked for."""

    def __init__(
        self,
        models: Models,
        questions: Questions,
        calibration: Calibration,
        evaluator: Evaluator,
        settings: Settings,
        folder: Path,
        report: Report,
    ) -> None:
        self._models = models
        self._questions = questions
        self._calibration = calibration
        self._evaluator = evaluator
        self._folder = folder
        self.adapters: tuple[Candidate, ...] = ()
        self._report = report
        self._settings = settings
        nothing, *others = names_of(models.installed, models.also)
        self._nothing = {rows.NOTHING: models.installed}
        self._nothing |= {
            rows.nothing_to(name): each.path for name, each in zip(others, models.also, strict=True)
        }
        self._notes = {rows.NOTHING: f"{nothing}, which most devices have"} if others else {}
        report("plain: llama.cpp's own quantizer")
        write_plain(models.new, models.installed, self.file(rows.PLAIN), evaluator.threads)
        self._plain_each = self._weighed(rows.PLAIN)
        self._plain_bytes = mean_bytes(self._plain_each, models.also)
        self._sizes = {**dict.fromkeys(self._nothing, 0), rows.PLAIN: self._plain_bytes}
        self._readings: dict[str, Readings] = {}
        self.frontier: Frontier | None = None

    def file(self, name: str) -> Path:
        """Where a row's file lies; that which an adapter is added to is the installed one."""
        if self._adapter(name) is not None:
            return self._models.installed
        return self._nothing.get(name) or self._folder / f"{name.replace(',', '').replace(' ', '-')}.gguf"

    def _weighed(self, name: str) -> tuple[int, ...]:
        """Bytes of the delta from each installed file."""
        bases = [each.path for each in all_portions(self._models.installed, self._models.also)]
        return delta_sizes(bases, self.file(name), self._settings.workers)

    def chosen(self, aim: Aim) -> tuple[Trial, Chosen]:
        """Make the chosen file."""
        if aim.frontier:
            return self._from_frontier(aim)
        if aim.budget_bytes is not None:
            budget, extrapolation = aim.budget_bytes, aim.extrapolations[0]
            made = self._choose(rows.CHOSEN, budget, extrapolation)
            return Trial(budget, extrapolation, made.delta_bytes, is_enough=True), made
        assert aim.keep_share is not None
        low = max(1, int(BUDGET_SHARE_MIN * self.file(rows.NOTHING).stat().st_size))
        attempt = self._attempt(aim.keep_share)
        trial = fewest_bytes(attempt, low, max(low, self._plain_bytes), aim.extrapolations)
        if trial is None:
            raise RequestError(
                f"no file with a delta of up to {self._plain_bytes:,} bytes keeps {100 * aim.keep_share:g} % of plain's gain",
                hint="send the plain file, or keep less",
            )
        return trial, self._choose(rows.CHOSEN, trial.budget_bytes, trial.extrapolation)

    def _from_frontier(self, aim: Aim) -> tuple[Trial, Chosen]:
        """Measure all points on the development text, and make the one that is chosen."""
        text, file = self._questions.development, self.file(rows.CHOSEN)
        assert text is not None
        self._make_frozen()
        names = (rows.NOTHING, rows.PLAIN, rows.FROZEN)
        controls = [
            Made(name, self._sizes[name], self._evaluator.measure(self.file(name), [text])[text.name])
            for name in names
        ]
        settings = msgspec.structs.replace(
            self._settings, budget_bytes=None, extrapolation=aim.extrapolations[0]
        )
        files = {each: getattr(self._models, each) for each in ("new", "installed", "before", "start")}
        files |= {f"also {n}, {each.share!r}": each.path for n, each in enumerate(self._models.also)}
        with points_journal(self._evaluator, files, self._calibration, settings, text) as kept:
            bench = FrontierBench(
                settings,
                kept,
                file,
                lambda each: self._choose_with(rows.CHOSEN, each),
                lambda: self._evaluator.measure(file, [text])[text.name],
                self._report,
            )
            points, notes = bench.measure(aim.frontier)
            self.frontier = draw(
                controls,
                points,
                notes,
                aim.rule,
                text,
                self._models.new,
                self._models.installed,
                settings.extrapolation,
            )
            if not self.frontier.chosen:
                raise NoPointError(self.frontier)
            chosen = next(each.chosen for each in points if each.name == self.frontier.chosen)
            assert chosen is not None
            bench.remake(chosen)
        self._sizes[rows.CHOSEN] = chosen.delta_bytes
        assert chosen.settings.budget_bytes is not None
        trial = Trial(
            chosen.settings.budget_bytes, settings.extrapolation, chosen.delta_bytes, is_enough=True
        )
        return trial, chosen

    def _make_frozen(self) -> None:
        if rows.FROZEN not in self._sizes:
            write_frozen(self.file(rows.PLAIN), self._models.installed, self.file(rows.FROZEN))
            self._sizes[rows.FROZEN] = mean_bytes(self._weighed(rows.FROZEN), self._models.also)

    def rows(self, trial: Trial, aim: Aim) -> tuple[Row, ...]:
        """Make and measure all files of the table."""
        self._make_frozen()
        notes = {**self._notes, rows.CHOSEN: _how(trial, aim)}
        absent = {}
        try:
            self._choose(rows.TRAP, trial.delta_bytes, trial.extrapolation, metric="weights")
            notes[rows.TRAP] = "as many bytes as chosen"
        except SmallBudgetError as error:
            absent[rows.TRAP] = str(error)
        try:
            if self._models.before is None:
                absent[rows.REPAIR] = "the installed version in floats was not given (--before)"
            else:
                self._choose(rows.REPAIR, trial.delta_bytes, 0.0, target=self._models.before)
                notes[rows.REPAIR] = "as many bytes as chosen, near the installed version in floats"
        except SmallBudgetError as error:
            absent[rows.REPAIR] = str(error)
        names = (*self._nothing, *(name for name in rows.NAMES if name != rows.NOTHING))
        for name in names:
            if name not in absent:
                self._readings[name] = self._evaluator.measure(self.file(name), self._questions.held_out)
        return tuple(
            Row(name=name, note=absent[name]) if name in absent else self._row(name, notes.get(name, ""))
            for name in names
        )

    def beside_others(self, chosen: Chosen) -> Chosen:
        """Beside what goes to each installed file's devices: plain's bytes, and those of a file for them alone."""
        models, before = self._models, self._models.before if chosen.settings.extrapolation else None
        found = with_alone(
            chosen,
            models.new,
            models.installed,
            models.also,
            self._calibration,
            self._folder,
            self._report,
            before=before,
        )
        sent = zip(found.sent, self._plain_each, strict=False)  # none, where there is one installed file
        return msgspec.structs.replace(
            found, sent=tuple(msgspec.structs.replace(each, plain_bytes=size) for each, size in sent)
        )

    def adapter_rows(self) -> tuple[Row, ...]:
        """Make and measure the adapters, if any are asked for."""
        models = self._models
        if models.adapter is None:
            return ()
        self.adapters = make_candidates(
            models.adapter,
            models.new,
            models.installed,
            self._calibration,
            self._folder,
            self._report,
            self._settings.workers,
        )
        for each in self.adapters:
            self._sizes[each.name] = each.path.stat().st_size
            self._readings[each.name] = self._evaluator.measure(
                models.installed, self._questions.held_out, each.path
            )
        return tuple(self._row(each.name, each.note) for each in self.adapters)

    def _adapter(self, name: str) -> Path | None:
        return next((each.path for each in self.adapters if each.name == name), None)

    def checks(self, name: str, margins: Margins) -> tuple[Check, ...]:
        """The guards of a row, all of them."""
        texts = [text.name for text in self._questions.held_out]
        found = list(check_texts(self._readings[name], self._readings[rows.PLAIN], texts, margins))
        for suite in self._questions.suites:
            before, now = (
                self._evaluator.ask(self.file(each), suite, self._adapter(each))
                for each in (rows.PLAIN, name)
            )
            found.append(check_suite(suite, before, now, margins))
        return tuple(found)

    def _row(self, name: str, note: str) -> Row:
        installed, plain = self._readings[rows.NOTHING], self._readings[rows.PLAIN]
        texts = {
            text: figures(reading, installed[text], plain[text])
            for text, reading in self._readings[name].items()
        }
        return row(name, self._sizes[name], self.file(name).stat().st_size, texts, note)

    def _choose(
        self,
        name: str,
        budget: int,
        extrapolation: float,
        *,
        target: Path | None = None,
        metric: MetricName = "outputs",
    ) -> Chosen:
        self._report(f"{name}: {budget:,} bytes, extrapolation {extrapolation:g}")
        settings = msgspec.structs.replace(
            self._settings, budget_bytes=budget, extrapolation=extrapolation, metric=metric
        )
        return self._choose_with(name, settings, target)

    def _choose_with(self, name: str, settings: Settings, target: Path | None = None) -> Chosen:
        made = choose(
            target or self._models.new,
            self._models.installed,
            self._calibration,
            settings,
            self.file(name),
            self._report,
            before=self._models.before if settings.extrapolation else None,
            start=self._models.start if name == rows.CHOSEN else None,
            also=self._models.also,
        )
        self._sizes[name] = made.delta_bytes
        return made

    def _attempt(self, keep_share: float) -> Callable[[int, float], Trial]:
        """A trial of the search: a file of some budget, on the development text."""
        text = self._questions.development
        assert text is not None

        def read(path: Path) -> Readings:
            return self._evaluator.measure(path, [text])

        installed, plain = read(self._models.installed)[text.name], read(self.file(rows.PLAIN))[text.name]
        if share_of_gain(plain, installed, plain) is None:
            raise RequestError(
                f"on {text.name} the plain file is not better than the installed one: there is no gain to keep a share of",
                hint="give a development text that the new model was made for, or a budget instead",
            )

        def attempt(budget: int, extrapolation: float) -> Trial:
            try:
                made = self._choose(rows.CHOSEN, budget, extrapolation)
            except SmallBudgetError as error:
                self._report(str(error))
                return Trial(budget, extrapolation, budget, is_enough=False)
            reading = read(self.file(rows.CHOSEN))[text.name]
            gain = share_of_gain(reading, installed, plain)
            assert gain is not None
            is_near = sum(reading.kl) <= sum(plain.kl)
            self._report(
                f"{made.delta_bytes:,} bytes keep {100 * gain.value:.1f} % of the gain on {text.name}, divergence"
                f" {sum(reading.kl) / len(reading.kl):.4f} (plain {sum(plain.kl) / len(plain.kl):.4f})"
            )
            return Trial(budget, extrapolation, made.delta_bytes, gain.value >= keep_share and is_near)

        return attempt


def _how(trial: Trial, aim: Aim) -> str:
    wanted = f"a budget of {trial.budget_bytes:,} bytes"
    if aim.keep_share is not None:
        wanted = f"the fewest bytes that keep {100 * aim.keep_share:g} % on the development text"
    elif aim.budget_bytes is None:
        wanted = "the fewest bytes of the frontier that are no worse than plain on the development text"
    return f"{wanted}, extrapolation {trial.extrapolation:g}"
