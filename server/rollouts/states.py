"""States of a rollout, their triggers and transitions, as data; nothing else. The diagram is generated from here."""

from enum import StrEnum
from typing import Final, NamedTuple, Self


class RolloutState(StrEnum):
    """Where a rollout stands; which wave is under way is told by its record."""

    CREATED = "created"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Records from before there were more than two waves."""
        return cls("running") if value in {"canary", "rest"} else None


class RolloutTrigger(StrEnum):
    """What moves a rollout on."""

    PREPARE = "prepare"
    BEGIN = "begin"
    WIDEN = "widen"
    FINISH = "finish"
    STOP = "stop"
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ABORT = "abort"


class Transition(NamedTuple):
    """One row of the table."""

    source: RolloutState
    trigger: RolloutTrigger
    target: RolloutState
    condition: str


_S, _T = RolloutState, RolloutTrigger
_UNSIGNED: Final = "its release is no longer signed"
_FAILING: Final = "too many failures, a second device that is lost, or its release is no longer signed"

TRANSITIONS: Final = (
    Transition(_S.CREATED, _T.PREPARE, _S.PREPARING, "the server took it up"),
    Transition(_S.CREATED, _T.STOP, _S.STOPPED, "its release is unknown, or the family is busy"),
    Transition(_S.CREATED, _T.ABORT, _S.STOPPED, "an operator"),
    Transition(_S.PREPARING, _T.BEGIN, _S.RUNNING, "every delta is built and signed, a device is there"),
    Transition(_S.PREPARING, _T.STOP, _S.STOPPED, _UNSIGNED),
    Transition(_S.PREPARING, _T.ABORT, _S.STOPPED, "an operator"),
    Transition(_S.RUNNING, _T.WIDEN, _S.RUNNING, "the wave has passed and its soak is over: the next one"),
    Transition(_S.RUNNING, _T.PROMOTE, _S.RUNNING, "an operator: the next wave now"),
    Transition(
        _S.RUNNING, _T.PAUSE, _S.PAUSED, "an operator, a lost device, slowness, or too little evidence"
    ),
    Transition(_S.RUNNING, _T.FINISH, _S.FINISHED, "the plan is carried out and every device is decided"),
    Transition(_S.RUNNING, _T.STOP, _S.STOPPED, _FAILING),
    Transition(_S.RUNNING, _T.ABORT, _S.STOPPED, "an operator"),
    Transition(_S.PAUSED, _T.RESUME, _S.RUNNING, "an operator"),
    Transition(_S.PAUSED, _T.PROMOTE, _S.RUNNING, "an operator: the next wave now"),
    Transition(_S.PAUSED, _T.STOP, _S.STOPPED, _FAILING),
    Transition(_S.PAUSED, _T.ABORT, _S.STOPPED, "an operator"),
)

ACTIVE: Final = frozenset({_S.PREPARING, _S.RUNNING, _S.PAUSED})
"""States in which a rollout has its model family for itself."""

FINAL: Final = frozenset({_S.FINISHED, _S.STOPPED})

_NEXT: Final = {(row.source, row.trigger): row.target for row in TRANSITIONS}


def may(state: RolloutState, trigger: RolloutTrigger) -> bool:
    """Whether the table has a row for this pair."""
    return (state, trigger) in _NEXT


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
