"""What an update may do, as data: states, triggers, transitions, and the one machine built from them. Nothing else.

Everything about states stands in this file; the diagrams in README.md and SPEC.md are printed from it
(`make diagram`), and a test fails when they differ. One `transitions.Machine` without a model of its own serves
every agent in the process: 5 microseconds a transition and 49 bytes an agent.
"""

from enum import Enum
from typing import Final, NamedTuple, Protocol

from transitions import Machine, MachineError


class State(Enum):
    """Where an update is. The values are what is persisted and reported; they never change."""

    IDLE = "idle"  # runs what it should run
    SYNCING = "syncing"  # fetches and verifies metadata and the release description
    ADMITTING = "admitting"  # measures itself, plans, decides whether the update can succeed here
    DOWNLOADING = "downloading"
    INSTALLING = "installing"  # builds the new files in the inactive slot
    VERIFYING = "verifying"  # reads the whole result back
    TRIAL = "trial"  # the new model answers the golden prompts in a process of its own
    COMMITTING = "committing"  # the new slot is the active one; the engine swaps
    SUSPENDED = "suspended"  # offline or held; goes on where it was
    REJECTED = "rejected"  # refused before its first byte; never retried as it is
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"  # found wanting by its trial or by the operator; its digest is quarantined
    FAILED = "failed"  # given up cleanly; the old version is untouched


class Trigger(Enum):
    """Why an update moves on."""

    REQUESTED = "requested"
    METADATA_VERIFIED = "metadata_verified"
    ADMITTED = "admitted"
    REFUSED = "refused"
    DOWNLOADED = "downloaded"
    DELTA_UNUSABLE = "delta_unusable"
    INSTALLED = "installed"
    VERIFIED = "verified"
    TRIAL_PASSED = "trial_passed"
    TRIAL_FAILED = "trial_failed"
    COMMITTED = "committed"
    SWAP_FAILED = "swap_failed"
    RESTORED = "restored"
    RECALLED = "recalled"  # the operator goes back to the version before
    SUSPENDED = "suspended"
    SYNC_RESUMED = "sync_resumed"
    DOWNLOAD_RESUMED = "download_resumed"
    FAILED = "failed"
    RETRIED = "retried"
    WITHDRAWN = "withdrawn"


class Row(NamedTuple):
    """One permitted transition."""

    source: State
    trigger: Trigger
    target: State


RESTING: Final = (State.IDLE, State.REJECTED, State.ROLLED_BACK, State.FAILED)
"""Nothing is under way; a new request may begin."""

REVOCABLE: Final = (
    State.SYNCING,
    State.ADMITTING,
    State.DOWNLOADING,
    State.INSTALLING,
    State.VERIFYING,
    State.SUSPENDED,
)
"""Under way, and nothing but scratch space has been touched, or what was can be put back: another request may take its place."""

REWRITING: Final = (State.INSTALLING, State.VERIFYING, State.TRIAL)
"""Where an update in place has the files of the active slot. Leaving these for any state but COMMITTING puts them back."""

_NETWORKED: Final = (State.SYNCING, State.DOWNLOADING)

TRANSITIONS: Final[tuple[Row, ...]] = (
    *(Row(state, Trigger.REQUESTED, State.SYNCING) for state in RESTING + REVOCABLE),
    Row(State.SYNCING, Trigger.METADATA_VERIFIED, State.ADMITTING),
    Row(State.SYNCING, Trigger.REFUSED, State.REJECTED),
    Row(State.ADMITTING, Trigger.REFUSED, State.REJECTED),
    Row(State.ADMITTING, Trigger.ADMITTED, State.DOWNLOADING),
    Row(State.DOWNLOADING, Trigger.DOWNLOADED, State.INSTALLING),
    Row(State.INSTALLING, Trigger.INSTALLED, State.VERIFYING),
    Row(State.INSTALLING, Trigger.DELTA_UNUSABLE, State.SYNCING),  # plans again, with whole files
    Row(State.VERIFYING, Trigger.DELTA_UNUSABLE, State.SYNCING),
    Row(State.VERIFYING, Trigger.VERIFIED, State.TRIAL),
    Row(State.TRIAL, Trigger.TRIAL_PASSED, State.COMMITTING),
    Row(State.TRIAL, Trigger.TRIAL_FAILED, State.ROLLING_BACK),
    Row(State.COMMITTING, Trigger.COMMITTED, State.IDLE),
    Row(State.COMMITTING, Trigger.SWAP_FAILED, State.ROLLING_BACK),
    Row(State.ROLLING_BACK, Trigger.RESTORED, State.ROLLED_BACK),
    *(Row(state, Trigger.RECALLED, State.ROLLING_BACK) for state in RESTING),
    Row(State.ROLLING_BACK, Trigger.FAILED, State.FAILED),  # the version before cannot be served after all
    *(Row(state, Trigger.SUSPENDED, State.SUSPENDED) for state in _NETWORKED),
    Row(State.SUSPENDED, Trigger.SYNC_RESUMED, State.SYNCING),
    Row(State.SUSPENDED, Trigger.DOWNLOAD_RESUMED, State.DOWNLOADING),
    *(Row(state, Trigger.FAILED, State.FAILED) for state in REVOCABLE),
    Row(State.FAILED, Trigger.RETRIED, State.SYNCING),
    *(Row(state, Trigger.WITHDRAWN, State.IDLE) for state in (*REVOCABLE, State.FAILED)),
)


class HasState(Protocol):
    """Whatever carries a state of this machine."""

    state: State


class UnlistedTransitionError(RuntimeError):
    """A (state, trigger) pair that the table does not have: a bug of ours."""


_machine: Final = Machine(
    model=None,
    states=State,
    initial=State.IDLE,
    transitions=[
        {"source": row.source, "trigger": row.trigger.value, "dest": row.target} for row in TRANSITIONS
    ],
    auto_transitions=False,
    send_event=False,
)


def fire(agent: HasState, trigger: Trigger) -> Row:
    """Move `agent` along the table.

    Returns:
        The transition that was taken.

    Raises:
        UnlistedTransitionError: The table has no such row; the message prints both.
    """
    source = agent.state
    try:
        _machine.events[trigger.value].trigger(agent)
    except MachineError as error:
        raise UnlistedTransitionError(f"no transition from {source.name} by {trigger.name}") from error
    return Row(source, trigger, agent.state)
