"""What is asked of a choice that is judged: the models it is made from, the texts it is judged on, and what is wanted.

The texts have parts: the *calibration* text says which weights matter, the *development* text decides settings, and the *held-out* texts, which nothing was
decided on, judge. No two of them share text.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from protocol.errors import RequestError
from server.requantize.adapter import (
    Wish,
    check_wish,
)
from server.requantize.frontier import (
    Budget,
)
from server.requantize.guards import Margins
from server.requantize.portions import Portion, check_fleet
from server.requantize.texts import Text, check_unseen
from server.scorecard.frontier import Rule
from server.scorecard.items import Suite


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
