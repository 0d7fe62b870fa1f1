"""Who did what, when and from where: records in a chain of digests, so that one that was altered or removed is found. Pure.

A record carries the digest of the one before it. Records that are older than they are kept are removed from the front, and the act
of removing them, a record of the chain itself, carries the digest of the last one that went: the chain goes on being one.

Whoever may write the database could compute a whole new chain. What shows that is the digest of a record that was noted somewhere else.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from protocol.errors import RequestError

Details = dict[str, str | int | float]

DONE: Final = "done"
WAITING: Final = "waiting"
NOTED: Final = (DONE, WAITING)
"""Outcomes that are noted however often they come; refusals are bounded."""

PRUNE: Final = "audit.prune"
"""What removes the oldest records is called."""

START: Final = ""
"""Stands in the first record for the digest of the one before."""

NAME_CHARS_MAX: Final = 128
ON_CHARS_MAX: Final = 200
TEXT_CHARS_MAX: Final = 600
DETAILS_MAX: Final = 16
REFUSED_PER_HOUR_MAX: Final = 60
"""Of one kind, so that somebody who guesses passwords does not fill the disk."""

_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HEAD: Final = re.compile(r"(\d{1,12}):([0-9a-f]{64})")


class Actor(Struct, frozen=True, kw_only=True):
    """Who acts.

    Attributes:
        kind: By which way: the page, a token of the API, a command, the server itself, or a device.
        name: Of the user, of the operating system's user for commands, or of the device.
        role: Of a user.
        address: From which a browser or a program came.
    """

    kind: Literal["page", "token", "command", "server", "device"]
    name: str = ""
    role: str = ""
    address: str = ""


SERVER: Final = Actor(kind="server")


class Act(Struct, frozen=True, kw_only=True):
    """Something that was done, or was tried and refused.

    Attributes:
        at_ms: Server clock.
        by: Who.
        what: Kind of act, for example `release.publish`.
        on: What it was done to, for example `digits v2`.
        outcome: `done`, `waiting` for the signatures of others, or the stable code of why it was refused.
        text: In words: the reason that was given, or why it was refused. No secret stands here, nor in `details`.
        details: Further facts.
    """

    v: int = 1
    at_ms: int
    by: Actor
    what: str
    on: str
    outcome: str = DONE
    text: str = ""
    details: Details = msgspec.field(default_factory=dict)


class AuditRecord(Act, frozen=True, kw_only=True):
    """An act in its place in the chain.

    Attributes:
        number: From 1, without gaps.
        before: SHA-256 of the record before, as it was stored.
    """

    number: int
    before: str


class Head(NamedTuple):
    """The newest record of a chain; number 0 before there is one."""

    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"


class Verified(NamedTuple):
    """What came of looking at a chain.

    Attributes:
        records: How many were read.
        first: Number of the oldest one that is kept; 0 if there is none.
        head: The newest one, as the database has noted it.
        faults: What is wrong, in words; nothing if the chain is whole.
    """

    records: int
    first: int
    head: Head
    faults: list[str]


def new_act(
    by: Actor, at_ms: int, what: str, on: str, text: str = "", *, outcome: str = DONE, **details: str | float
) -> Act:
    """An act whose texts are short and printable, whatever they were."""
    kept = {name: _detail(value) for name, value in details.items()}
    return Act(
        at_ms=at_ms,
        by=Actor(
            kind=by.kind,
            name=_clean(by.name, NAME_CHARS_MAX),
            role=by.role,
            address=_clean(by.address, NAME_CHARS_MAX),
        ),
        what=what,
        on=_clean(on, ON_CHARS_MAX),
        outcome=outcome,
        text=_clean(text, TEXT_CHARS_MAX),
        details=dict(list(kept.items())[:DETAILS_MAX]),
    )


def linked(act: Act, head: Head) -> tuple[AuditRecord, bytes, Head]:
    """The next record of a chain: itself, its bytes, and the head that it becomes."""
    fields = {name: getattr(act, name) for name in Act.__struct_fields__}
    record = AuditRecord(number=head.number + 1, before=head.digest, **fields)
    body = msgspec.json.encode(record)
    return record, body, Head(record.number, _digest(body))


def verify(rows: Iterable[tuple[int, bytes]], head: Head, expected: Head | None = None) -> Verified:
    """Look at every record of a chain.

    Args:
        rows: Numbers and bytes of the records as they are stored, in order.
        head: The newest one, as the store has noted it.
        expected: One that was noted elsewhere, and has to be there still.
    """
    faults: list[str] = []
    before: Head | None = None
    first: AuditRecord | None = None
    pruned: set[tuple[int, str]] = set()
    is_found = expected is None
    count = 0
    for number, body in rows:
        count += 1
        try:
            record = msgspec.json.decode(body, type=AuditRecord)
        except msgspec.MsgspecError as error:
            faults.append(f"record {number} cannot be read: {error}")
            before = Head(number, _digest(body))
            continue
        first = first or record
        faults += _faults(record, number, before)
        if record.what == PRUNE and record.by.kind == "server":
            pruned.add((int(record.details.get("through", 0)), str(record.details.get("digest", ""))))
        before = Head(number, _digest(body))
        is_found = is_found or before == expected or (record.number - 1, record.before) == expected
    if first is not None and first.before != START and (first.number - 1, first.before) not in pruned:
        faults.append(f"records before {first.number} are missing, and no record tells that they were pruned")
    if first is not None and first.before == START and first.number != 1:
        faults.append(f"record {first.number} says that it is the first")
    if (before or Head(0, START)) != head:
        faults.append(
            f"the newest record should be number {head.number}: records are missing, or it was altered"
        )
    if not is_found and expected is not None:
        faults.append(f"record {expected.number} is not the one that you noted, or is not there any more")
    return Verified(count, 0 if first is None else first.number, head, faults)


def parse_head(text: str) -> Head:
    """A head as it is printed, NUMBER:DIGEST.

    Raises:
        RequestError: It is none.
    """
    found = _HEAD.fullmatch(text)
    if found is None:
        raise RequestError(f"{text[:80]!r} is no NUMBER:DIGEST", hint="as `whimbrel audit verify` prints it")
    return Head(int(found[1]), found[2])


def actor_text(actor: Actor) -> str:
    """Who acted, for people."""
    if actor.kind == "server":
        return "the server"
    role = f" ({actor.role})" if actor.role else ""
    where = {"page": "", "token": ", by token", "command": ", by command", "device": ", the device"}[
        actor.kind
    ]
    return f"{actor.name or 'somebody'}{role}{where}"


def _faults(record: AuditRecord, number: int, before: Head | None) -> list[str]:
    if record.number != number:
        return [f"record {number} says that it is number {record.number}"]
    if before is None:
        return []
    if number != before.number + 1:
        return [f"records {before.number + 1} to {number - 1} are missing"]
    if record.before != before.digest:
        return [
            f"record {before.number} was altered after record {number} was written, or record {number} was"
        ]
    return []


def _detail(value: str | float) -> str | int | float:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _clean(value, ON_CHARS_MAX) if isinstance(value, str) else value


def _clean(text: str, chars_max: int) -> str:
    cleaned = _UNPRINTABLE.sub(" ", text)
    return cleaned if len(cleaned) <= chars_max else cleaned[: chars_max - 1] + "…"


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
