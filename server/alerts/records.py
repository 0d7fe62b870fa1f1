"""What is told, and to whom it is on its way. Pure data."""

import hashlib
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
from msgspec import Struct

from server.audit import Act, Details

Kind = Literal[
    "rollout.started",
    "rollout.wave_passed",
    "rollout.paused",
    "rollout.resumed",
    "rollout.promoted",
    "rollout.stopped",
    "rollout.completed",
    "device.unrecoverable",
    "device.stuck",
    "device.alarm",
    "scorecard.failed",
    "metadata.expiring",
    "keys.changed",
    "keys.waiting",
    "webhook.test",
]
KINDS: Final[tuple[Kind, ...]] = Kind.__args__  # type: ignore[attr-defined]  # typing keeps them there
"""What a webhook can ask for; `webhook.test` comes by `whimbrel webhooks test` only."""

ABOUT_CHARS_MAX: Final = 128
DEVICES_NAMED_MAX: Final = 10
"""Devices that an alert names; of more it says how many."""


class Alert(Struct, frozen=True, kw_only=True):
    """Something that people or programs want to be told.

    Attributes:
        id: Unique; sent as `webhook-id`.
        kind: Of what.
        about: What it concerns, for example a rollout.
        at_ms: When it was noticed first; server clock.
        due_ms: When it is told: at once, or once others of the same kind had time to join it.
        text: In words, with the evidence.
        count: Devices that it is about; 0 where it is not about devices.
        devices: The first of them, by name.
        details: Facts for programs.
    """

    v: int = 1
    id: str
    kind: Kind
    about: str
    at_ms: int
    due_ms: int
    text: str
    count: int = 0
    devices: tuple[str, ...] = ()
    details: Details = msgspec.field(default_factory=dict)


Trace = Act | Alert
"""What is saved beside a change, in its transaction."""

DeliveryState = Literal["waiting", "delivered", "dropped"]


class Delivery(Struct, frozen=True, kw_only=True):
    """An alert on its way to one webhook.

    Attributes:
        webhook: Name of the webhook.
        alert: Id of the alert.
        state: Where it stands.
        since_ms: When the alert was due.
        next_ms: When it is tried next.
        attempts: Times that it was tried.
        tried_ms: When it was tried last.
        status: HTTP status that was answered last; 0 for none.
        error: Why it has not got there; empty once it has.
    """

    v: int = 1
    webhook: str
    alert: str
    state: DeliveryState = "waiting"
    since_ms: int
    next_ms: int
    attempts: int = 0
    tried_ms: int = 0
    status: int = 0
    error: str = ""


class Sent(Struct, frozen=True, kw_only=True):
    """An alert with what became of it."""

    alert: Alert
    deliveries: list[Delivery]


class WebhookStanding(Struct, frozen=True, kw_only=True):
    """How it goes with one webhook.

    Attributes:
        name: Its name.
        waiting: Deliveries that wait.
        delivered: That are known to have arrived, as far back as they are kept.
        dropped: That were given up, likewise.
        next_ms: When the next one is tried.
        failed: The last one that failed, waiting or dropped.
    """

    name: str
    waiting: int = 0
    delivered: int = 0
    dropped: int = 0
    next_ms: int | None = None
    failed: Delivery | None = None


def new_alert(
    kind: Kind,
    about: str,
    at_ms: int,
    text: str,
    *,
    key: str = "",
    due_ms: int | None = None,
    details: Mapping[str, str | int | float] | None = None,
) -> Alert:
    """An alert; one of the same kind about the same thing, with the same `key` (by default: in the same millisecond), is the same alert."""
    named = "\n".join((kind, about, key or str(at_ms)))
    return Alert(
        id=f"msg_{hashlib.sha256(named.encode()).hexdigest()[:32]}",
        kind=kind,
        about=about,
        at_ms=at_ms,
        due_ms=at_ms if due_ms is None else due_ms,
        text=text,
        details=dict(details or {}),
    )
