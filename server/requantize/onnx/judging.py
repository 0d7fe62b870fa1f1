"""From a new ONNX model to a file that may be published: chosen, measured beside everything else that could be sent, and written only if it is no worse than plain.

As `server/requantize/judging.py`, with sets of samples in the place of texts: *calibration* says which weights matter, *development* decides settings,
and *held-out* sets, on which nothing was decided, judge. No two of them share a sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from protocol.errors import EngineError, RequestError
from protocol.ids import digest_of
from server.requantize.bench import BUDGET_SHARE_MIN
from server.requantize.fewest import Trial, fewest_bytes
from server.requantize.guards import TEXTS_MIN, Margins, check_suite, is_passed
from server.requantize.judging import publish
from server.requantize.onnx.calibration import Calibration
from server.requantize.onnx.choice import Chosen, MetricName, Settings, choose
from server.requantize.onnx.controls import write_plain
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.inputs import SAMPLES_MIN, Samples, check_unseen
from server.requantize.onnx.orders import Answer, Asked, carry_out, read_answers, write_samples
from server.requantize.onnx.verdict import (
    NAMES,
    Reading,
    Row,
    check_sets,
    figures,
    reading,
    share_of_gain,
)
from server.requantize.rows import CHOSEN, NOTHING, PLAIN, REPAIR, TRAP
from server.requantize.search import SmallBudgetError
from server.requantize.weighing import delta_bytes
from server.scorecard.card import Check
from server.scorecard.items import Reply, Suite
from server.scorecard.journal import journal
from server.scorecard.runner import Runner
from server.scorecard.work import Model

_CONTEXT_TOKENS: Final = 1  # of a text model; these have none

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Models:
    """What is chosen from.

    Attributes:
        new: The new model in floats.
        installed: The quantized file that devices have.
        before: The installed version in floats; None where nobody kept it.
        plain: The new model as it was quantized elsewhere; None to have it made.
    """

    new: Graph
    installed: Graph
    before: Graph | None = None
    plain: Path | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """What files are judged on.

    Attributes:
        calibration: Says which weights matter.
        held_out: At least two sets that nothing was decided on.
        development: Decides settings; needed to keep a share of the gain.
        suites: Prompts and tasks whose answers plain and chosen file are asked for.
    """

    calibration: Samples
    held_out: tuple[Samples, ...]
    development: Samples | None = None
    suites: tuple[Suite, ...] = ()


@dataclass(frozen=True, slots=True)
class Aim:
    """What is wanted; exactly one of `budget_bytes` and `keep_share`.

    Attributes:
        budget_bytes: What the delta may weigh.
        keep_share: Of the distortion that plain takes away on the development set, with as few bytes as that takes.
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
        chosen: How it was chosen.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    is_written: bool
    chosen: Chosen


def check_request(models: Models, questions: Questions, aim: Aim, asked: Asked) -> None:
    """Refuse what can be refused before the work.

    Raises:
        RequestError: Sets overlap, are too few or too small, or have other inputs than the model.
    """
    if (aim.budget_bytes is None) == (aim.keep_share is None):
        raise RequestError("a budget or a share of the gain is needed, and not both")
    if aim.keep_share is not None and questions.development is None:
        raise RequestError(
            "keeping a share of the gain needs samples on which settings are tried", hint="give --development"
        )
    if models.before is None and any(aim.extrapolations):
        raise RequestError("extrapolation needs the installed version in floats", hint="give --before")
    if len(questions.held_out) < TEXTS_MIN:
        raise RequestError(
            f"{len(questions.held_out)} held-out set(s), {TEXTS_MIN} are needed",
            hint="give --held-out once more, with samples of another kind",
        )
    seen = [questions.calibration, *([questions.development] if questions.development else [])]
    for each in (*seen, *questions.held_out):
        check_inputs(models.new, each, asked)
        if each is not questions.calibration and len(each) < SAMPLES_MIN:
            raise RequestError(f"{each.name} has {len(each)} samples, {SAMPLES_MIN} are needed")
    check_unseen(seen[1:], seen[:1])
    check_unseen(questions.held_out, seen)


def check_inputs(model: Graph, samples: Samples, asked: Asked) -> None:
    """That samples have what a model takes.

    Raises:
        RequestError: They have not.
    """
    names = set(samples.arrays)
    if names == {""} and len(model.inputs) == 1:
        return
    if names != set(model.inputs):
        raise RequestError(
            f"{samples.name} has {', '.join(sorted(names)) or 'no inputs'}; the inputs of {model.path} are {', '.join(model.inputs)}",
            hint="give an .npz with an array for each of them",
        )
    if asked.mask and asked.mask not in names:
        raise RequestError(f"{samples.name} has no {asked.mask}, which --mask names")
    if asked.output and asked.output not in model.outputs:
        raise RequestError(
            f"{model.path} has no output {asked.output}", hint=f"there are {', '.join(model.outputs)}"
        )


def judge(
    models: Models,
    questions: Questions,
    aim: Aim,
    asked: Asked,
    calibration: Calibration,
    settings: Settings,
    folder: Path,
    out: Path,
    report: Report,
) -> Judged:
    """Choose a file, measure all rows, and write it if it passes.

    Args:
        models: What is chosen from.
        questions: What it is judged on.
        aim: What is wanted.
        asked: How answers are drawn.
        calibration: Of the new model, on those samples.
        settings: Of the choice, but for budget and extrapolation.
        folder: For files on the way.
        out: The chosen file; not touched unless every guard passed.
        report: Takes lines about the progress.

    Raises:
        RequestError: Nothing within the budget keeps what is wanted.
        WhimbrelError: As `choose` and `carry_out`.
    """
    bench = Bench(models, asked, calibration, settings, folder, report)
    trial, chosen = bench.chosen(aim, questions.development)
    rows = bench.rows(trial, questions.held_out)
    checks = bench.checks(questions, aim.margins)
    if is_passed(checks):
        publish(bench.file(CHOSEN), out)
    return Judged(rows=rows, checks=checks, is_written=is_passed(checks), chosen=chosen)


class Bench:
    """The files of one choice, made and measured when they are asked for."""

    def __init__(
        self,
        models: Models,
        asked: Asked,
        calibration: Calibration,
        settings: Settings,
        folder: Path,
        report: Report,
    ) -> None:
        self._models = models
        self._asked = asked
        self._calibration = calibration
        self._settings = settings
        self._folder = folder
        self._report = report
        self._readings: dict[str, dict[str, Reading]] = {}
        self._last_price = settings.first_price
        report("plain: " + ("as given" if models.plain else "onnxruntime's own quantizer"))
        write_plain(models.new, models.installed, models.plain, self.file(PLAIN))
        self._plain_bytes = delta_bytes(models.installed.path, self.file(PLAIN), settings.workers)
        self._sizes = {NOTHING: 0, PLAIN: self._plain_bytes}

    def file(self, name: str) -> Path:
        """Where a row's file lies."""
        if name == NOTHING:
            return self._models.installed.path
        return self._folder / f"{name.replace(' ', '-')}.onnx"

    def chosen(self, aim: Aim, development: Samples | None) -> tuple[Trial, Chosen]:
        """Make the chosen file."""
        if aim.budget_bytes is not None:
            made = self.choose(CHOSEN, aim.budget_bytes, aim.extrapolations[0])
            return Trial(aim.budget_bytes, aim.extrapolations[0], made.delta_bytes, is_enough=True), made
        assert aim.keep_share is not None
        assert development is not None
        low = max(1, int(BUDGET_SHARE_MIN * self._models.installed.length))
        attempt = self._attempt(aim.keep_share, development)
        trial = fewest_bytes(attempt, low, max(low, self._plain_bytes), aim.extrapolations)
        if trial is None:
            raise RequestError(
                f"no file with a delta of up to {self._plain_bytes:,} bytes keeps {100 * aim.keep_share:g} % of plain's gain",
                hint="send the plain file, or keep less",
            )
        return trial, self.choose(CHOSEN, trial.budget_bytes, trial.extrapolation)

    def choose(
        self,
        name: str,
        budget: int,
        extrapolation: float,
        target: Graph | None = None,
        metric: MetricName = "outputs",
    ) -> Chosen:
        """Make the file of a row."""
        self._report(f"{name}: {budget:,} bytes, extrapolation {extrapolation:g}")
        made = choose(
            target or self._models.new,
            self._models.installed,
            self._calibration,
            msgspec.structs.replace(
                self._settings,
                budget_bytes=budget,
                extrapolation=extrapolation,
                metric=metric,
                first_price=self._last_price if metric == "outputs" else None,
            ),
            self.file(name),
            self._report,
            before=self._models.before if extrapolation else None,
        )
        self._sizes[name] = made.delta_bytes
        if metric == "outputs":
            self._last_price = made.price  # the next one lies near
        return made

    def rows(self, trial: Trial, held_out: tuple[Samples, ...]) -> tuple[Row, ...]:
        """Make and measure all files of the table."""
        notes = {CHOSEN: f"a budget of {trial.budget_bytes:,} bytes, extrapolation {trial.extrapolation:g}"}
        absent = {}
        try:
            self.choose(TRAP, trial.delta_bytes, trial.extrapolation, metric="weights")
            notes[TRAP] = "at most as many bytes as chosen"
        except SmallBudgetError as error:
            absent[TRAP] = str(error)
        if self._models.before is None:
            absent[REPAIR] = "the installed version in floats was not given (--before)"
        else:
            try:
                self.choose(REPAIR, trial.delta_bytes, 0.0, target=self._models.before)
                notes[REPAIR] = "at most as many bytes as chosen, near the installed version in floats"
            except SmallBudgetError as error:
                absent[REPAIR] = str(error)
        self._readings = self.measure([name for name in NAMES if name not in absent], held_out)
        return tuple(
            Row(name=name, note=absent[name]) if name in absent else self._row(name, notes.get(name, ""))
            for name in NAMES
        )

    def checks(self, questions: Questions, margins: Margins) -> tuple[Check, ...]:
        """The guards, all of them, after `rows`."""
        names = [each.name for each in questions.held_out]
        found = list(check_sets(self._readings[CHOSEN], self._readings[PLAIN], names, margins))
        for suite in questions.suites:
            before, now = (self._ask(self.file(name), suite) for name in (PLAIN, CHOSEN))
            found.append(check_suite(suite, before, now, margins))
        return tuple(found)

    def measure(self, names: Sequence[str], sets: Sequence[Samples]) -> dict[str, dict[str, Reading]]:
        """Files' answers to sets of samples beside those of the model in floats: readings by row and set."""
        orders = []
        for number, samples in enumerate(sets):
            place = self._folder / f"samples-{number}.npz"
            write_samples(samples, place)
            models = [self._models.new.path, *(self.file(name) for name in names)]
            orders += [
                Answer(
                    model=str(path),
                    samples=str(place),
                    out=str(self._folder / f"answers-{number}-{column}.npz"),
                    asked=self._asked,
                )
                for column, path in enumerate(models)
            ]
        self._report(f"answers of {', '.join(names)} to {', '.join(each.name for each in sets)}")
        carry_out(orders, f"{self._models.new.path} and its quantized files")
        found: dict[str, dict[str, Reading]] = {name: {} for name in names}
        for number, samples in enumerate(sets):
            reference, *others = (
                read_answers(self._folder / f"answers-{number}-{column}.npz")
                for column in range(len(names) + 1)
            )
            for name, answers in zip(names, others, strict=True):
                found[name][samples.name] = reading(self._asked.kind, reference, answers)
        return found

    def _row(self, name: str, note: str) -> Row:
        installed, plain = self._readings[NOTHING], self._readings[PLAIN]
        sets = {
            each: figures(found, installed[each], plain[each]) for each, found in self._readings[name].items()
        }
        size = self._sizes[name]
        share = size / self.file(name).stat().st_size
        return Row(name=name, delta_bytes=size, share=share, sets=sets, note=note)

    def _ask(self, path: Path, suite: Suite) -> list[Reply]:
        """All questions of a suite, as a scorecard asks them."""
        identity: dict[str, object] = {"file": Graph(path).sha256}
        model = Model(
            path=str(path.absolute()),
            runtime="onnx",
            threads=self._asked.threads,
            context_tokens=_CONTEXT_TOKENS,
        )
        with journal(self._folder, digest_of(msgspec.json.encode(identity)), identity) as kept:
            runner = Runner(kept, lambda: model, lambda _done, _total, _what: None)
            try:
                replies = runner.ask_all(suite.items, f"{path.name}: {suite.name}")
            finally:
                runner.close()
        if runner.missing:
            raise EngineError(f"{runner.missing[0].what}: {runner.missing[0].reason}")
        return [reply for reply in replies if reply is not None]

    def _attempt(self, keep_share: float, development: Samples) -> Callable[[int, float], Trial]:
        """A trial of the search: a file of some budget, on the development set."""
        name = development.name
        known = self.measure([NOTHING, PLAIN], [development])
        installed, plain = known[NOTHING][name], known[PLAIN][name]
        if share_of_gain(plain, installed, plain) is None:
            raise RequestError(
                f"on {name} the plain file is not nearer to the new model than the installed one: there is no gain to keep a share of",
                hint="give other development samples, or a budget instead",
            )

        def attempt(budget: int, extrapolation: float) -> Trial:
            try:
                made = self.choose(CHOSEN, budget, extrapolation)
            except SmallBudgetError as error:
                self._report(str(error))
                return Trial(budget, extrapolation, budget, is_enough=False)
            found = self.measure([CHOSEN], [development])[CHOSEN][name]
            gain = share_of_gain(found, installed, plain)
            assert gain is not None
            self._report(f"{made.delta_bytes:,} bytes keep {100 * gain.value:.1f} % of the gain on {name}")
            return Trial(budget, extrapolation, made.delta_bytes, gain.value >= keep_share)

        return attempt
