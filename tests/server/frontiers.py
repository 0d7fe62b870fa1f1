"""A frontier of made-up readings: each point has a known distance from the float model, and all of them are on the same tokens."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from protocol.ids import digest_of
from server.requantize.frontier import Made, draw
from server.requantize.texts import Text
from server.scorecard.frontier import Frontier, HeldOut, Point, Rule
from tests.server.requantize.readings import reading

RULE: Final = Rule(kind="no worse", kl_share=0.02, flips=0.005)

CONTROLS: Final = (
    ("nothing sent", 0, 3.0, 0.40, 0.30),
    ("plain", 40_000, 2.0, 0.20, 0.20),
    ("plain, embedding frozen", 9_000, 2.1, 0.25, 0.22),
)
"""Name, bytes, mean loss, divergence, flips."""

POINTS: Final = (
    ("0.1%", 1_000, 2.4, 0.30, 0.25),
    ("0.5%", 5_000, 1.9, 0.15, 0.15),
    ("1%", 10_000, 1.8, 0.10, 0.10),
)


def make_frontier(folder: Path, rule: Rule = RULE, **changes: Any) -> Frontier:
    """Six files that could be sent in the place of one of a megabyte, 0.5% and 1% being better than plain.

    Args:
        folder: Takes two files to be named by their digests.
        rule: How a point is chosen.
        changes: Fields that are otherwise.
    """
    new, installed = folder / "new.bin", folder / "installed.bin"
    new.write_bytes(b"new")
    installed.write_bytes(bytes(1_000_000))
    made = [
        Made(name, size, reading(number, nll, kl, flips))
        for number, (name, size, nll, kl, flips) in enumerate(CONTROLS + POINTS)
    ]
    text = Text("notes.txt", np.arange(2000, dtype=np.int32))
    count = len(CONTROLS)
    drawn = draw(made[:count], made[count:], ("0.01%: no room",), rule, text, new, installed, 0.0)
    # As if they had been chosen: what `choose` says of a file takes a model.
    points = tuple(
        replace(each, budget_bytes=each.delta_bytes, price=1e-9) if each.name.endswith("%") else each
        for each in drawn.points
    )
    return replace(drawn, points=points, **changes)


def written(frontier: Frontier, file: bytes, chosen: str = "0.5%") -> Frontier:
    """The same, with one of its points chosen, judged, and written as a file."""
    point, plain = frontier.point(chosen), frontier.point("plain")
    held_out = tuple(
        HeldOut(
            text=name, tokens=4088, kl=point.kl, flips=point.flips, plain_kl=plain.kl, plain_flips=plain.flips
        )
        for name in ("manual.txt", "chats.txt")
    )
    return replace(frontier, chosen=chosen, result=digest_of(file), held_out=held_out)


def point_of(frontier: Frontier, name: str, **changes: Any) -> Frontier:
    """The same with another point of a name."""
    points: tuple[Point, ...] = tuple(
        replace(each, **changes) if each.name == name else each for each in frontier.points
    )
    return replace(frontier, points=points)
