"""States of a rollout, their triggers and transitions, as data; nothing else. The diagram is generated from here."""

from enum import StrEnum
from typing import Final, NamedTuple


class RolloutState(StrEnum):
    """Where a rollout stands."""

    CREATED = "created"
    PREPARING = "preparing"
    CANARY = "canary"
    REST = "rest"
    FINISHED = "finished"
    STOPPED = "stopped"


class RolloutTrigger(StrEnum):
    """What moves a rollout on."""

    PREPARE = "prepare"
    BEGIN = "begin"
    WIDEN = "widen"
    FINISH = "finish"
    STOP = "stop"


class Transition(NamedTuple):
    """One row of the table."""

    source: RolloutState
    trigger: RolloutTrigger
    target: RolloutState
    condition: str


_S, _T = RolloutState, RolloutTrigger

TRANSITIONS: Final = (
    Transition(_S.CREATED, _T.PREPARE, _S.PREPARING, "the server took it up"),
    Transition(_S.CREATED, _T.STOP, _S.STOPPED, "its release is unknown, or the family is busy"),
    Transition(_S.PREPARING, _T.BEGIN, _S.CANARY, "every delta is built and signed, a device is there"),
    Transition(_S.PREPARING, _T.STOP, _S.STOPPED, "its release is no longer signed"),
    Transition(_S.CANARY, _T.WIDEN, _S.REST, "every canary is decided, at least one committed"),
    Transition(_S.CANARY, _T.FINISH, _S.FINISHED, "every device was a canary and is decided"),
    Transition(
        _S.CANARY, _T.STOP, _S.STOPPED, "more failures than allowed, or its release is no longer signed"
    ),
    Transition(_S.REST, _T.FINISH, _S.FINISHED, "every device is decided"),
    Transition(
        _S.REST, _T.STOP, _S.STOPPED, "more failures than allowed, or its release is no longer signed"
    ),
)

ACTIVE: Final = frozenset({_S.PREPARING, _S.CANARY, _S.REST})
"""States in which a rollout has its model family for itself."""

FINAL: Final = frozenset({_S.FINISHED, _S.STOPPED})

_NEXT: Final = {(row.source, row.trigger): row.target for row in TRANSITIONS}


def next_state(state: RolloutState, trigger: RolloutTrigger) -> RolloutState:
    """The state that `trigger` leads to; an unlisted pair is a bug and raises `RuntimeError`."""
    target = _NEXT.get((state, trigger))
    if target is None:
        raise RuntimeError(f"rollout in state {state.value} cannot {trigger.value}")
    return target


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    rows = [f"    {row.source} --> {row.target}: {row.trigger} ({row.condition})" for row in TRANSITIONS]
    ends = [f"    {state} --> [*]" for state in sorted(FINAL)]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {_S.CREATED}", *rows, *ends])
