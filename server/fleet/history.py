"""What became of each device, as a list of what changed: a page tells its story from that. Pure."""

from typing import Final

from msgspec import Struct

from protocol.ids import DeviceId
from server.fleet.registry import DeviceRecord

HISTORY_DAYS: Final = 30
"""How long events are kept."""


class DeviceEvent(Struct, frozen=True, kw_only=True):
    """Something about a device changed; everything else is as in the event before."""

    v: int = 1
    device: DeviceId
    at_ms: int  # server clock
    is_online: bool
    state: str
    family: str
    version: str
    rollout: str = ""
    target: str = ""  # version that the rollout asks for
    outcome: str = ""
    code: str = ""
    detail: str = ""
    received_bytes: int = 0
    full_bytes_total: int = 0


def event_of(before: DeviceRecord, after: DeviceRecord, now_ms: int) -> DeviceEvent | None:
    """What is worth telling about a new record of a device; None when nothing of it is.

    Progress of a download alone is not: it comes with every report.
    """
    event = _event(after, now_ms)
    return event if _told(event) != _told(_event(before, now_ms)) else None


def _event(record: DeviceRecord, at_ms: int) -> DeviceEvent:
    report = record.report
    update = report.update if report else None
    return DeviceEvent(
        device=record.device,
        at_ms=at_ms,
        is_online=record.is_online,
        state=report.state if report else "",
        family=record.family,
        version=record.version,
        rollout=update.rollout if update else "",
        target=update.version if update else "",
        outcome=update.outcome if update else "",
        code=update.code if update else "",
        detail=update.detail if update else "",
        received_bytes=update.received_bytes if update else 0,
        full_bytes_total=update.full_bytes_total if update else 0,
    )


def _told(event: DeviceEvent) -> tuple[bool | str, ...]:
    return (
        event.is_online,
        event.state,
        event.family,
        event.version,
        event.rollout,
        event.target,
        event.outcome,
        event.code,
    )
