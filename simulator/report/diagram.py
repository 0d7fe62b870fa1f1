"""The state diagram of an update, with how often this run took each transition. Pure."""

from collections import Counter
from typing import Final

from simulator.report.record import Run
from simulator.report.svg import number, picture, text

_BOX: Final = (112.0, 34.0)
_PLACES: Final[dict[str, tuple[float, float]]] = {
    # centre of each state
    "idle": (70, 150),
    "syncing": (210, 150),
    "admitting": (350, 150),
    "downloading": (490, 150),
    "installing": (630, 150),
    "verifying": (770, 150),
    "trial": (910, 150),
    "committing": (910, 40),
    "rolling_back": (910, 260),
    "rolled_back": (70, 260),
    "suspended": (350, 260),
    "rejected": (210, 330),
    "failed": (490, 330),
}

_ARROW_HEAD: Final = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
)


def places() -> frozenset[str]:
    """States that the diagram has room for; a test compares them with the table of states."""
    return frozenset(_PLACES)


def state_diagram(run: Run) -> str:
    """States as boxes, transitions that this run took as arrows with their number."""
    taken = Counter(
        (each.source, each.target)
        for each in run.transitions
        if each.source in _PLACES and each.target in _PLACES
    )
    seen = {state for pair in taken for state in pair}
    parts = [_ARROW_HEAD]
    for (source, target), count in sorted(taken.items()):
        parts += _arrow(source, target, count)
    width, height = _BOX
    for state, (x, y) in _PLACES.items():
        kind = "state" if state in seen else "state unused"
        box = f'x="{number(x - width / 2)}" y="{number(y - height / 2)}" width="{width:.0f}" height="{height:.0f}"'
        parts.append(f'<rect class="{kind}" rx="8" {box}/>')
        parts.append(text(x, y + 5, state.replace("_", " "), kind="statename", anchor="middle"))
    return picture(1000, 380, parts, "States of an update and how often each transition was taken")


def _arrow(source: str, target: str, count: int) -> list[str]:
    (x1, y1), (x2, y2) = _PLACES[source], _PLACES[target]
    half_width, half_height = _BOX[0] / 2, _BOX[1] / 2
    if y1 == y2 and abs(x2 - x1) < 150:  # neighbours
        way = 1 if x2 > x1 else -1
        path = f"M{number(x1 + way * half_width)},{number(y1)} L{number(x2 - way * half_width)},{number(y2)}"
        return _drawn(path, (x1 + x2) / 2, y1 - 7, count)
    if source == "committing":  # home, along the top
        path = f"M{number(x1 - half_width)},{number(y1)} L120,40 Q70,40 70,{number(y2 - half_height)}"
        return _drawn(path, 500, 33, count)
    if source == "rolling_back":
        path = f"M{number(x1)},{number(y1 + half_height)} Q910,366 850,366 L120,366 Q70,366 70,{number(y2 + half_height)}"
        return _drawn(path, 700, 360, count)
    if x1 == x2:
        way = 1 if y2 > y1 else -1
        path = (
            f"M{number(x1)},{number(y1 + way * half_height)} L{number(x2)},{number(y2 - way * half_height)}"
        )
        return _drawn(path, x1 + 16, (y1 + y2) / 2 + 5, count)
    # Two ways between one pair of states run side by side.
    shift = 14 if x2 > x1 else -14
    way = 1 if y2 > y1 else -1
    begin_x, end_x = x1 + shift + (x2 - x1) * 0.12, x2 + shift - (x2 - x1) * 0.12
    begin_y, end_y = y1 + way * half_height, y2 - way * half_height
    path = f"M{number(begin_x)},{number(begin_y)} L{number(end_x)},{number(end_y)}"
    return _drawn(path, (begin_x + end_x) / 2 + shift, (begin_y + end_y) / 2 + 4, count)


def _drawn(path: str, x: float, y: float, count: int) -> list[str]:
    return [
        f'<path class="edge" d="{path}" marker-end="url(#arrow)"/>',
        text(x, y, str(count), kind="count", anchor="middle"),
    ]
