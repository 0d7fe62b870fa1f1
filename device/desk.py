"""What the parts of an agent share: the state, the ledger, the effects that are being put together, open questions."""

import random
from collections.abc import Iterable
from typing import Final

from device.config import AgentConfig
from device.effects import Effect, Publish, Trace
from device.ledger import Ledger
from device.policy import OPERATOR, Guard, Hold, Step
from device.ports import Trust
from device.states import RESTING, REWRITING, State, Trigger, fire
from device.timekeeping import Timekeeping
from protocol.messages import encode_message
from protocol.topics import Topics

JOB_TIMEOUT_MS: Final = 3_600_000
"""A worker that has not answered for an hour never will: hashing the largest file takes minutes."""


class Desk:
    """Shared by the parts of one agent, see `agent.py`.

    Args:
        config: Identity and limits.
        rng: Source of jitter.
        trust: Verifies signed metadata.
    """

    def __init__(self, config: AgentConfig, rng: random.Random, trust: Trust) -> None:
        self.config = config
        self.rng = rng
        self.trust = trust
        self.topics = Topics(config.fleet)
        self.ledger = Ledger(config)
        self.guard = Guard(config.policy)
        self.time = Timekeeping(is_clock_set=True)  # until the agent boots
        self.state = State.IDLE
        self.now_ms = 0
        self.is_connected = False
        self.is_fetched = False  # all of it, of an update in place whose installation may not begin yet
        self.job_deadline_ms: int | None = None
        self._entered_ms = 0
        self._out: list[Effect] = []
        self._serial = 0
        self._job = 0  # serial that the update waits for

    def begin(self, state: State) -> None:
        """Start in the state that the disk knows."""
        self.state = state
        self._entered_ms = self.now_ms

    def emit(self, *effects: Effect) -> None:
        """Order something."""
        self._out.extend(effects)

    def extend(self, effects: Iterable[Effect]) -> None:
        """Order what a part hands over one by one."""
        self._out.extend(effects)

    def take(self) -> tuple[Effect, ...]:
        """Everything ordered since the last call."""
        effects, self._out = tuple(self._out), []
        return effects

    def serial(self) -> int:
        """A new number for an effect that answers with an event."""
        self._serial += 1
        return self._serial

    def ask(self) -> int:
        """A serial for an effect that the update waits for; answers to earlier ones no longer count."""
        self._job = self.serial()
        self.job_deadline_ms = self.now_ms + JOB_TIMEOUT_MS
        return self._job

    def answers(self, serial: int) -> bool:
        """Whether this is the answer that the update waits for; it is then no longer waited for."""
        if serial != self._job:
            return False
        self.drop_question()
        return True

    @property
    def is_clock_right(self) -> bool:
        """Whether signed documents may be judged by the device's own clock."""
        return self.time.is_clock_right(self.now_ms, self.ledger.record.floors.time_ms)

    @property
    def time_ms(self) -> int | None:
        """What signed documents are judged by; `None` where the time is not known."""
        return self.time.time_ms(self.now_ms, self.ledger.record.floors.time_ms)

    @property
    def is_rewriting(self) -> bool:
        """Whether files of the active slot are being rewritten, or wait as new ones for a verdict: there is nothing to serve."""
        update = self.ledger.record.update
        return self.state in REWRITING and update is not None and update.is_in_place

    @property
    def is_waiting(self) -> bool:
        """Whether the update waits for a worker."""
        return self.job_deadline_ms is not None

    @property
    def is_paused(self) -> bool:
        """Whether the operator wants nothing new to begin. An update in place is completed: nothing answers meanwhile."""
        return self.ledger.record.paused_ms is not None and not self.is_rewriting

    def hold(self, step: Step) -> Hold | None:
        """Why a step of an update may not begin now, by the operator's pause or the owner's policy; `None` where it may.

        This is the only place that decides it. An update in place is completed: nothing answers meanwhile.
        """
        if self.is_rewriting:
            return None
        if self.is_paused:
            return OPERATOR
        return self.guard.hold(step, self._fetch_bytes() if step is Step.FETCH else 0)

    def holds(self) -> tuple[str, ...]:
        """The code of what holds each step, empty where nothing does."""
        found = (self.hold(step) for step in Step)
        return tuple(hold.code if hold is not None else "" for hold in found)

    @property
    def held(self) -> Hold | None:
        """What holds the update under way, or would hold the next one."""
        if self.state in RESTING:
            steps: tuple[Step, ...] = tuple(Step)
        elif self.state in {State.INSTALLING, State.VERIFYING}:
            steps = (Step.INSTALL,)
        elif self.state is State.TRIAL:
            steps = () if self.is_waiting else (Step.TRIAL,)
        elif self.state in {State.COMMITTING, State.ROLLING_BACK}:
            steps = ()
        else:
            steps = (Step.FETCH, Step.INSTALL) if self.is_fetched else (Step.FETCH,)
        return next((hold for step in steps if (hold := self.hold(step)) is not None), None)

    @property
    def may_fetch(self) -> bool:
        """Whether an update may use the network."""
        return self.is_connected and self.hold(Step.FETCH) is None

    def _fetch_bytes(self) -> int:
        """What the update has to fetch in all, once that is planned."""
        update = self.ledger.record.update
        state = self.ledger.record.state if self.state is State.SUSPENDED else self.state
        if update is None or state is not State.DOWNLOADING:
            return 0
        return sum(link.blob_length for item in update.items for link in item.links)

    def drop_question(self) -> None:
        """No longer wait for an answer."""
        self._job = 0
        self.job_deadline_ms = None

    def move(self, trigger: Trigger, code: str = "") -> None:
        """Take a transition of the table."""
        row = fire(self, trigger)
        self.ledger.spend(row.source, self.now_ms - self._entered_ms)
        self._entered_ms = self.now_ms
        self.emit(Trace(row, self.ledger.update.desired.version, code))

    def persist(self) -> None:
        """Write the state down before acting on it."""
        self.emit(self.ledger.persist(self.state))

    def report(self) -> None:
        """Tell the server how things stand; not before it was measured which files are there: it plans by them."""
        if self.is_connected and self.ledger.files is not None:
            payload = encode_message(self.ledger.report(self.state, self.held))
            topic = self.topics.report(self.config.device)
            self.emit(Publish(topic, payload, 1, retain=True, is_signed=True))
