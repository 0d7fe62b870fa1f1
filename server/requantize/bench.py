"""The files of one choice, made, weighed and measured when they are asked for: the chosen one, and everything else that could be sent."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import RequestError
from server.requantize import rows
from server.requantize.adapter import (
    Candidate,
    make_candidates,
)
from server.requantize.alone import with_alone
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen, choose
from server.requantize.controls import write_frozen, write_plain
from server.requantize.evaluation import Evaluator
from server.requantize.fewest import Trial, fewest_bytes
from server.requantize.figures import figures, share_of_gain
from server.requantize.frontier import (
    FrontierBench,
    Made,
    NoPointError,
    draw,
    points_journal,
)
from server.requantize.guards import Margins, check_suite, check_texts
from server.requantize.model import sha256_of
from server.requantize.portions import all_portions, mean_bytes, names_of
from server.requantize.readings import Readings
from server.requantize.request import Aim, Models, Questions
from server.requantize.rows import Row, row
from server.requantize.search import SmallBudgetError
from server.requantize.settings import Settings
from server.requantize.weighing import delta_sizes
from server.requantize.work import MetricName
from server.scorecard.card import Check
from server.scorecard.frontier import Frontier, Share

BUDGET_SHARE_MIN: Final = 0.0003
"""Of the file: the search for the fewest bytes starts here, below what any useful change took."""

Report = Callable[[str], None]


class Bench:
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
            Made(
                name,
                self._sizes[name],
                self._evaluator.measure(self.file(name), [text])[text.name],
                each_bytes=self._each_bytes(name),
            )
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
                self._fleet(),
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

    def _each_bytes(self, name: str) -> tuple[int, ...]:
        """What each of several installed files' devices fetch; nothing where there is one."""
        if not self._models.also:
            return ()
        return (0,) * (1 + len(self._models.also)) if name == rows.NOTHING else self._weighed(name)

    def _fleet(self) -> tuple[Share, ...]:
        """The installed files, where there are several."""
        if not self._models.also:
            return ()
        portions = all_portions(self._models.installed, self._models.also)
        return tuple(Share(installed=sha256_of(each.path), share=each.share) for each in portions)

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
        models, before = self._models, self._models.before if chosen.settings.is_extrapolated else None
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
        if metric == "weights":  # what is shown is that metric alone
            settings = msgspec.structs.replace(settings, distillation=0, learned=0)
        if target is not None:  # nothing lies between it and the installed version
            settings = msgspec.structs.replace(settings, learned=0)
        return self._choose_with(name, settings, target)

    def _choose_with(self, name: str, settings: Settings, target: Path | None = None) -> Chosen:
        made = choose(
            target or self._models.new,
            self._models.installed,
            self._calibration,
            settings,
            self.file(name),
            self._report,
            before=self._models.before if settings.is_extrapolated else None,
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
