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
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen, Settings, choose
from server.requantize.controls import write_frozen, write_plain
from server.requantize.evaluation import Evaluator
from server.requantize.fewest import Trial, fewest_bytes
from server.requantize.figures import figures, share_of_gain
from server.requantize.guards import Margins, check_suite, check_texts, is_passed
from server.requantize.readings import Readings
from server.requantize.rows import Row, row
from server.requantize.search import SmallBudgetError
from server.requantize.texts import Text, check_unseen
from server.requantize.weighing import delta_bytes
from server.requantize.work import MetricName
from server.scorecard.card import Check
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
        adapter: What could be added to the installed file instead; None for nothing.
    """

    new: Path
    installed: Path
    before: Path | None = None
    start: Path | None = None
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
    """What is wanted; exactly one of `budget_bytes` and `keep_share`.

    Attributes:
        budget_bytes: What the delta may weigh.
        keep_share: Of plain's gain in likelihood on the development text, with as few bytes as that takes.
        extrapolations: Settings of the choice that are tried; with a budget the first one is taken.
        margins: How much worse than plain counts as no worse.
    """

    budget_bytes: int | None = None
    keep_share: float | None = None
    extrapolations: tuple[float, ...] = (0.0,)
    margins: Margins = field(default_factory=Margins)


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
        RequestError: Texts overlap, are too few or too short, or nothing within the budget keeps what is wanted.
        WhimbrelError: As `choose` and `Evaluator.measure`.
    """
    check_request(models, questions, aim)
    bench = _Bench(models, questions, calibration, evaluator, settings, folder, report)
    trial, chosen = bench.chosen(aim)
    found = bench.rows(trial, aim)
    adapted = bench.adapter_rows()
    checks = bench.checks(rows.CHOSEN, aim.margins)
    if is_passed(checks):
        _publish(bench.file(rows.CHOSEN), out)
    adapters = tuple(judged(each, bench.checks(each.name, aim.margins)) for each in bench.adapters)
    if models.adapter is not None and (best := cheapest(adapters)) is not None:
        path = next(each.path for each in bench.adapters if each.name == best.name)
        _publish(path, adapter_path(out))
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
        adapters=adapters,
    )
    return verdict, chosen


def check_request(models: Models, questions: Questions, aim: Aim) -> None:
    """Refuse what can be refused before hours of work.

    Raises:
        RequestError: Texts overlap, are too few or too short, or something that is needed was not given.
    """
    if (aim.budget_bytes is None) == (aim.keep_share is None):
        raise RequestError("a budget or a share of the gain is needed, and not both")
    if aim.keep_share is not None and questions.development is None:
        raise RequestError(
            "keeping a share of the gain needs a text on which settings are tried",
            hint="give --development, a text that is neither calibration nor held out",
        )
    if models.before is None and any(aim.extrapolations):
        raise RequestError("extrapolation needs the installed version in floats", hint="give --before")
    if models.adapter is not None:
        check_wish(models.adapter, models.installed)
    used = [questions.calibration]
    if questions.development is not None:
        questions.development.runs()
        check_unseen([questions.development], used)
        used.append(questions.development)
    check_unseen(questions.held_out, used)
    for text in questions.held_out:
        text.runs()


def _publish(path: Path, out: Path) -> None:
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
        report("plain: llama.cpp's own quantizer")
        write_plain(models.new, models.installed, self.file(rows.PLAIN), evaluator.threads)
        self._plain_bytes = self._weighed(rows.PLAIN)
        self._sizes = {rows.NOTHING: 0, rows.PLAIN: self._plain_bytes}
        self._readings: dict[str, Readings] = {}

    def file(self, name: str) -> Path:
        """Where a row's file lies; that which an adapter is added to is the installed one."""
        return (
            self._models.installed
            if name == rows.NOTHING or self._adapter(name) is not None
            else self._folder / f"{name.replace(',', '').replace(' ', '-')}.gguf"
        )

    def _weighed(self, name: str) -> int:
        return delta_bytes(self._models.installed, self.file(name), self._settings.workers)

    def chosen(self, aim: Aim) -> tuple[Trial, Chosen]:
        """Make the chosen file."""
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

    def rows(self, trial: Trial, aim: Aim) -> tuple[Row, ...]:
        """Make and measure all files of the table."""
        write_frozen(self.file(rows.PLAIN), self._models.installed, self.file(rows.FROZEN))
        self._sizes[rows.FROZEN] = self._weighed(rows.FROZEN)
        notes = {rows.CHOSEN: _how(trial, aim)}
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
        for name in rows.NAMES:
            if name not in absent:
                self._readings[name] = self._evaluator.measure(self.file(name), self._questions.held_out)
        return tuple(
            Row(name=name, note=absent[name]) if name in absent else self._row(name, notes.get(name, ""))
            for name in rows.NAMES
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
        made = choose(
            target or self._models.new,
            self._models.installed,
            self._calibration,
            settings,
            self.file(name),
            self._report,
            before=self._models.before if extrapolation else None,
            start=self._models.start if name == rows.CHOSEN else None,
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
    wanted = (
        f"a budget of {trial.budget_bytes:,} bytes"
        if aim.keep_share is None
        else f"the fewest bytes that keep {100 * aim.keep_share:g} % on the development text"
    )
    return f"{wanted}, extrapolation {trial.extrapolation:g}"
