"""Who may say what this device should run (SPEC section 8.4): what comes as a wish, and whether it is one. Pure.

A wish that a known key of the director has signed goes to the update at once. Any other may come from a director who was appointed since: it
waits until newer metadata was looked at, and until then it stops nothing and nothing of it is written down. A device that has never looked
at the metadata begins with the first wish that comes, if nothing else is under way. A wish on which an update rests is looked at again with the
metadata that the update itself brings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from device.desk import Desk
from device.fetching import Fetching
from device.retrying import retry_wait_ms
from device.sync import MetadataUnavailableError
from protocol.constants import DESIRED_LEAP_MAX
from protocol.director import ForgedDesiredError, received_statement
from protocol.errors import ExpiredMetadataError, WhimbrelError
from protocol.messages import Desired, ReceivedDesired

LOOK_PERIOD_MS: Final = 600_000
"""Between two looks at the metadata for the sake of wishes that nobody known has signed: whoever forges them can cost a device no more than that.

A look that was cut short does not count, and one that nobody answered is repeated sooner, after waits that grow to about this.
"""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A wish of somebody who may wish.

    Attributes:
        desired: What it says.
        signer: Key that signed it; empty in a fleet without a director.
        expires_ms: Until when it may be acted upon; `None` for ever.
    """

    desired: Desired
    signer: bytes = b""
    expires_ms: int | None = None


def signer_of(received: ReceivedDesired, desk: Desk) -> bytes | None:
    """Who has signed a wish, of those that are known to be the director; `None` if none of them has."""
    director = desk.ledger.record.director
    if director is None:
        return None
    if not director.is_named:
        return None if received.signature else b""
    statement = received_statement(desk.topics.desired(desk.config.device), received)
    signers = (
        each.key for each in director.keys if desk.trust.is_signed(each.key, statement, received.signature)
    )
    return next(signers, None)


def is_news(desk: Desk, assignment: Assignment) -> bool:
    """Whether a wish asks for something new: older ones change nothing, and neither do leaps (`DESIRED_LEAP_MAX`).

    One for the update that is under way may have been signed anew, perhaps with another key; that is noted.
    """
    desired, signer, expires_ms = assignment.desired, assignment.signer, assignment.expires_ms
    ledger = desk.ledger
    update = ledger.record.update
    if not ledger.may_wish(signer):
        return False
    if update is not None and update.finished_ms is None and update.desired == desired:
        if signer == update.signer and expires_ms is not None and update.expires_ms is not None:
            expires_ms = max(expires_ms, update.expires_ms)  # an older copy takes nothing away
        ledger.note(signer=signer, expires_ms=expires_ms)
        ledger.count(signer, max(desired.sequence, ledger.record.desired_sequence))  # so it is no news
    return 0 < desired.sequence - ledger.record.desired_sequence <= DESIRED_LEAP_MAX


def check_wish(desk: Desk, time_ms: int) -> None:
    """Newer metadata was verified: whoever wished may have lost the right to, and the wish may have come late (SPEC 8.4).

    Args:
        desk: Holds the update that rests on the wish.
        time_ms: What signed documents are judged by.

    Raises:
        ForgedDesiredError: Nobody has signed the wish who may.
        ExpiredMetadataError: It has ended; it may come again, signed anew.
    """
    ledger = desk.ledger
    if (received := ledger.update.unproven) is not None and not _prove(received, desk):
        raise ForgedDesiredError("nobody has signed this wish whom the metadata names director")
    update = ledger.update
    if not ledger.may_wish(update.signer):
        raise ForgedDesiredError("the metadata names another director than the one that signed this wish")
    if update.expires_ms is not None and time_ms >= update.expires_ms:
        ledger.count(update.signer, update.desired.sequence - 1)
        raise ExpiredMetadataError("the wish has expired and was not signed anew")


def _prove(received: ReceivedDesired, desk: Desk) -> bool:
    """It is known by now who may wish: whether they did."""
    signer = signer_of(received, desk)
    if signer is None:
        return False
    ledger = desk.ledger
    ledger.note(unproven=None, signer=signer, expires_ms=received.expires_ms if signer else None)
    ledger.count(signer, max(received.desired.sequence, ledger.record.desired_sequence))
    desk.persist()
    return True


class Assignments:
    """Takes wishes, and passes on those that count.

    Args:
        desk: Shared with the other parts.
        fetching: Looks at the metadata.
        request: Told of a wish that counts.
        try_unproven: Told of a wish on a device that does not know who may wish; whether it begins with it.
    """

    def __init__(
        self,
        desk: Desk,
        fetching: Fetching,
        request: Callable[[Assignment], None],
        try_unproven: Callable[[ReceivedDesired], bool],
    ) -> None:
        self._desk = desk
        self._ledger = desk.ledger
        self._fetching = fetching
        self._request = request
        self._try_unproven = try_unproven
        self._suspect: ReceivedDesired | None = None  # signed by nobody who is known
        self._refused: ReceivedDesired | None = None  # as the newest metadata said
        self._look_ms = 0  # not before that
        self._unanswered = 0  # looks in a row

    def deadline(self) -> int | None:
        """When to call `look`."""
        if self._suspect is None or self._fetching.is_looking or not self._desk.may_fetch:
            return None
        return self._look_ms

    def heard(self, received: ReceivedDesired) -> None:
        """A wish arrived; nothing about it is believed."""
        if received == self._refused:
            return
        signer = signer_of(received, self._desk)
        if signer is not None:
            self._take(received, signer)
        elif self._ledger.record.director is not None or not self._try_unproven(received):
            self._suspect = received
            self.look()

    def look(self) -> None:
        """Look at the metadata for the sake of a wish that waits, if it is time and the network is there."""
        deadline_ms = self.deadline()
        if deadline_ms is not None and self._desk.now_ms >= deadline_ms:
            self._look_ms = self._desk.now_ms + LOOK_PERIOD_MS
            self._fetching.look(self)

    def interrupted(self) -> None:
        """A look was cut short; it begins anew as soon as it can."""
        self._look_ms = self._desk.now_ms

    def looked(self) -> None:
        """Newer metadata was verified."""
        self._unanswered = 0
        received, self._suspect = self._suspect, None
        if received is None:
            return
        signer = signer_of(received, self._desk)
        if signer is not None:
            self._look_ms = self._desk.now_ms  # only looks in vain have to wait for each other
            self._take(received, signer)
            return
        self._refused = received
        self._alarm(ForgedDesiredError.code)

    def failed(self, error: WhimbrelError) -> None:
        """There is no metadata by which the wish could be judged; it is looked for again, sooner where nobody has answered."""
        if isinstance(error, MetadataUnavailableError):
            self._unanswered += 1
            self._look_ms = self._desk.now_ms + retry_wait_ms(self._desk.rng, self._unanswered)
        else:
            self._unanswered = 0
        self._alarm(error.code)

    def _take(self, received: ReceivedDesired, signer: bytes) -> None:
        expires_ms = received.expires_ms if signer else None
        if received.desired.sequence > self._ledger.record.desired_sequence:
            self._ledger.alarm = ""
        self._request(Assignment(received.desired, signer, expires_ms))

    def _alarm(self, code: str) -> None:
        if self._ledger.alarm != code:
            self._ledger.alarm = code
            self._desk.report()
