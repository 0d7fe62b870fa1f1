"""A paragraph for somebody who has not seen the tables. Pure.

Whatever is a number or a name in it is taken from the report by its place there, so that nothing can be said which the data do not have;
each part keeps that place.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from server.display import bytes_text
from server.tradeoffs.records import Air, Comparison, Part, Shortfall, TierTable, TradeoffReport

_FORMATS: Final[dict[str, Callable[[Any], str]]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "points": lambda value: f"{100 * value:+.1f}",
    "confidence": lambda value: f"{100 * value:g} %",
    "nats": lambda value: f"{value:.3f}",
    "ms": lambda value: f"{value:.1f} ms",
    "memory": lambda value: f"{value / (1 << 20):.1f} MB",
    "bytes": lambda value: bytes_text(round(value)),
    "money": lambda value: f"{value:,.2f}",
}

_AXIS_WORDS: Final = {
    "accuracy": "right answers",
    "drift": "drift",
    "latency": "latency",
    "memory": "memory",
    "bytes": "bytes over the air",
    "energy": "energy",
    "cost": "cost",
}


def write_paragraph(report: TradeoffReport) -> list[Part]:
    """The paragraph, part by part; without the report's own paragraph being looked at."""
    return list(_Writer(report).parts())


class _Writer:
    def __init__(self, report: TradeoffReport) -> None:
        self._report = report
        self._data = msgspec.to_builtins(report)

    def parts(self) -> Iterator[Part]:
        report = self._report
        yield from self._say("Of {}, ", ("text", "family"))
        others = [index for index, each in enumerate(report.candidates) if not each.is_reference]
        yield from self._listed(
            [f"candidates.{index}.version" for index in others or range(len(report.candidates))]
        )
        yield Part(text=" was" if len(others or report.candidates) == 1 else " were")
        if report.reference and others:
            yield from self._say(" compared with {}; ranges hold the true value", ("text", "reference"))
            yield from self._say(" with {} confidence.", ("confidence", "confidence"))
        else:
            yield Part(text=" looked at, and not compared with another version.")
        yield from self._excluded()
        for index, each in enumerate(report.candidates):
            if each.standing == "scored":
                yield from self._quality(index)
        for index, comparison in enumerate(report.comparisons):
            yield from self._undecided(index, comparison)
        for index, table in enumerate(report.tiers):
            yield from self._tier(index, table)

    def _say(self, words: str, *quoted: tuple[str, str]) -> Iterator[Part]:
        """Words with places of the report in their gaps, each with its format."""
        pieces = words.split("{}")
        for piece, (kind, source) in zip(pieces, [*quoted, ("", "")], strict=True):
            if piece:
                yield Part(text=piece)
            if source:
                yield Part(text=_FORMATS[kind](self._at(source)), source=source)

    def _at(self, source: str) -> Any:
        value = self._data
        for step in source.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
        return value

    def _listed(self, sources: Sequence[str]) -> Iterator[Part]:
        for number, source in enumerate(sources):
            if number:
                yield Part(text=" and " if number == len(sources) - 1 else ", ")
            yield Part(text=str(self._at(source)), source=source)

    def _excluded(self) -> Iterator[Part]:
        """Versions that cannot be chosen, those with the same reason together."""
        by_reason: dict[str, list[int]] = {}
        for index, each in enumerate(self._report.candidates):
            if each.reason:
                by_reason.setdefault(each.reason, []).append(index)
        for indexes in by_reason.values():
            yield Part(text=" ")
            yield from self._listed([f"candidates.{index}.version" for index in indexes])
            words = " is no choice: {}." if len(indexes) == 1 else " are no choices: {}."
            yield from self._say(words, ("text", f"candidates.{indexes[0]}.reason"))

    def _quality(self, index: int) -> Iterator[Part]:
        """What a version answers, and how far it is from the reference."""
        each, place = self._report.candidates[index], f"candidates.{index}"
        said: list[list[Part]] = []
        for number, suite in enumerate(each.suites):
            there = f"{place}.suites.{number}"
            if suite.kind in {"golden", "edge"}:
                words = "passes {} of {} prompts of {}" if not said else "{} of {} of {}"
                quoted = [("count", "right"), ("count", "count"), ("text", "name")]
            else:
                words = "answers {} of {} right ({} to {}, {} questions)"
                quoted = [
                    ("percent", "accuracy.value"),
                    ("text", "name"),
                    ("percent", "accuracy.low"),
                    ("percent", "accuracy.high"),
                    ("count", "count"),
                ]
            said.append(list(self._say(words, *((kind, f"{there}.{name}") for kind, name in quoted))))
        if each.drift is not None and not each.is_reference:
            there = f"{place}.drift"
            words = "diverges from {} by {} nats on average ({} to {}), choosing the same next step in {} of cases"
            quoted = [
                ("text", "reference"),
                ("nats", f"{there}.mean.value"),
                ("nats", f"{there}.mean.low"),
                ("nats", f"{there}.mean.high"),
                ("percent", f"{there}.same_choice"),
            ]
            said.append(list(self._say(words, *quoted)))
        if said:
            yield from self._say(" {} ", ("text", f"{place}.version"))
            yield from _joined(said)
            yield Part(text=".")

    def _undecided(self, index: int, comparison: Comparison) -> Iterator[Part]:
        """Differences of right answers that the questions do not settle."""
        if comparison.accuracy != "undecided" or not comparison.suites:
            return
        standings = {each.version: each.standing for each in self._report.candidates}
        if {standings[comparison.version], standings[comparison.other]} != {"scored"}:
            return
        place = f"comparisons.{index}"
        yield from self._say(
            " Which of {} and {} gives more right answers is not decided: ",
            ("text", f"{place}.version"),
            ("text", f"{place}.other"),
        )
        said = []
        for number in range(len(comparison.suites)):
            there = f"{place}.suites.{number}"
            quoted = [("points", f"{there}.flips.difference.{end}") for end in ("value", "low", "high")]
            said.append(list(self._say("{} points ({} to {}) in {}", *quoted, ("text", f"{there}.name"))))
        yield from _joined(said)
        if comparison.questions_needed is not None:
            yield from self._say(
                "; about {} questions would decide it", ("count", f"{place}.questions_needed")
            )
        yield Part(text=".")

    def _tier(self, index: int, table: TierTable) -> Iterator[Part]:
        place = f"tiers.{index}"
        plural = "device" if table.devices == 1 else "devices"
        heading = f" On {{}} ({{}} {plural})"
        yield from self._say(heading, ("text", f"{place}.name"), ("count", f"{place}.devices"))
        best = [
            f"{place}.options.{number}.version" for number, each in enumerate(table.options) if each.is_best
        ]
        if not best:
            yield Part(text=" there is no version to choose.")
        elif len(best) == 1:
            yield from self._say(" {} is the one to choose.", ("text", best[0]))
        else:
            yield Part(text=" none of ")
            yield from self._listed(best)
            yield Part(
                text=" is surely beaten by another: each is better at something, or the data do not say."
            )
        for number, option in enumerate(table.options):
            there = f"{place}.options.{number}"
            if option.broken:
                if self._report.candidates[number].standing == "scored":
                    yield from self._refused(there, option.broken[0])
            elif option.beaten_by:
                axes = _words(option.beaten_by[0].better)
                yield from self._say(
                    f" {{}} is beaten by {{}} in {axes}.",
                    ("text", f"{there}.version"),
                    ("text", f"{there}.beaten_by.0.version"),
                )
            elif option.is_best:
                yield from self._costs(index, number)
                if option.perhaps_beaten_by:
                    rival = option.perhaps_beaten_by[0]
                    yield from self._say(
                        f" {{}} beats it in {_words(rival.better)}, if it is no worse in {_words(rival.undecided)}.",
                        ("text", f"{there}.perhaps_beaten_by.0.version"),
                    )

    def _refused(self, place: str, broken: Shortfall) -> Iterator[Part]:
        if broken.budget == "runtime":
            yield from self._say(
                " {} does not fit: {}.", ("text", f"{place}.version"), ("text", f"{place}.broken.0.detail")
            )
            return
        kind = "ms" if broken.budget == "latency" else "memory"
        words = {
            "memory": "of memory while it replaces another",
            "disk": "of disk",
            "latency": "for each token",
        }
        yield from self._say(
            f" {{}} does not fit: it needs {{}} {words[broken.budget]}, and there are {{}}.",
            ("text", f"{place}.version"),
            (kind, f"{place}.broken.0.needed"),
            (kind, f"{place}.broken.0.available"),
        )

    def _costs(self, index: int, number: int) -> Iterator[Part]:
        """What a version takes on a tier."""
        table, place = self._report.tiers[index], f"tiers.{index}.options.{number}"
        option = table.options[number]
        said = []
        if option.latency is not None:
            words = "takes {} for each inference ({})"
            said.append(
                list(self._say(words, ("ms", f"{place}.latency.value"), ("text", f"{place}.latency.basis")))
            )
        if option.memory is not None:
            words, quoted = (
                "needs {} of memory ({})",
                [
                    ("memory", f"{place}.memory.value"),
                    ("text", f"{place}.memory.basis"),
                ],
            )
            if option.swap_bytes is not None and option.swap_bytes > option.memory.value:
                words += " and {} while it replaces another"
                quoted.append(("memory", f"{place}.swap_bytes"))
            said.append(list(self._say(words, *quoted)))
        said.append(list(self._air(place, option.air)))
        yield from self._say(" {} ", ("text", f"{place}.version"))
        yield from _joined(said)
        if option.cost is not None and option.air.total_bytes:
            yield from self._say(", which costs {} {}", ("money", f"{place}.cost"), ("text", "currency"))
        yield Part(text=".")

    def _air(self, place: str, air: Air) -> Iterator[Part]:
        if not air.devices:
            yield from self._say("sends {} to a new device", ("bytes", f"{place}.air.mean_bytes"))
        elif not air.total_bytes:
            yield Part(text="is what all devices have")
        else:
            yield from self._say("sends {} to each device on average, ", ("bytes", f"{place}.air.mean_bytes"))
            yield from self._say("{} in all", ("bytes", f"{place}.air.total_bytes"))


def _joined(said: Sequence[Sequence[Part]]) -> Iterator[Part]:
    for number, parts in enumerate(said):
        if number:
            yield Part(text=" and " if number == len(said) - 1 else ", ")
        yield from parts


def _words(axes: Sequence[str]) -> str:
    named = [_AXIS_WORDS[axis] for axis in axes]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
