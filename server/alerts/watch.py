"""What of everything that a server saves is to be told, and noted in its audit trail: records in, alerts and acts out. Pure.

Whoever saves the records saves what comes out with them, in the same transaction. Devices in the same trouble are one alert with a
count: it waits a little for others to join it, and after it was told the next one of its kind waits longer.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from server.alerts.records import DEVICES_NAMED_MAX, Alert, Kind, new_alert
from server.audit import SERVER, Act, new_act
from server.fleet.registry import DeviceRecord
from server.rollouts.campaign import is_lost
from server.rollouts.records import Decision, MemberRecord, RolloutRecord

GROUP_WAIT_MS: Final = 30_000
"""That the first device in trouble waits for others."""

GROUP_INTERVAL_MS: Final = 900_000
"""Between two alerts of one kind about one rollout: who was told of ten devices need not hear of the eleventh at once."""

AMEND_MS: Final = 5_000
"""An alert that is due this soon is left alone: it may be on its way already."""

FLEET: Final = "fleet"
"""What an alert is about that is about no rollout."""

SEEN_MAX: Final = 200_000
"""Devices of which is remembered that they were told of."""

_KINDS: Final[dict[str, Kind]] = {
    "begin": "rollout.started",
    "widen": "rollout.wave_passed",
    "pause": "rollout.paused",
    "resume": "rollout.resumed",
    "promote": "rollout.promoted",
    "stop": "rollout.stopped",
    "abort": "rollout.stopped",
    "finish": "rollout.completed",
}
"""Alerts by the action of a decision; of the others only the audit trail knows."""

_TROUBLES: Final[dict[Kind, str]] = {
    "device.unrecoverable": "did not come back by itself: last heard of while it started the new version, without any to run, or unable to serve the old one",
    "device.stuck": "was asked, and has not said within its time what became of it",
    "device.alarm": "ignores what it is asked, since nobody signed it who may: somebody else may speak for this server",
}
_VERBS: Final[dict[Kind, str]] = {
    "rollout.started": "has begun",
    "rollout.wave_passed": "goes on",
    "rollout.paused": "is paused",
    "rollout.resumed": "goes on",
    "rollout.promoted": "goes on",
    "rollout.stopped": "has stopped",
    "rollout.completed": "is complete",
}


class _Group(Struct):
    """Devices in the same trouble."""

    alert: Alert
    total: int  # that this was said of, or will be


class Watch:
    """Looks at what is saved.

    Args:
        members: That the store has: what they are in already is not told again.
        devices: Likewise.
        alerts: The latest ones, so that a restart neither repeats them nor forgets those that wait.
    """

    def __init__(
        self,
        members: Iterable[MemberRecord] = (),
        devices: Iterable[DeviceRecord] = (),
        alerts: Iterable[Alert] = (),
    ) -> None:
        self._seen: dict[tuple[Kind, str, str], None] = {}
        self._groups: dict[tuple[Kind, str], _Group] = {}
        totals: dict[tuple[Kind, str], int] = {}
        records: list[MemberRecord | DeviceRecord] = [*members, *devices]
        for record in records:
            for kind, about, device in _troubles(record):
                self._see(kind, about, device)
                totals[kind, about] = totals.get((kind, about), 0) + 1
        for alert in sorted(alerts, key=lambda alert: alert.due_ms):
            if alert.kind in _TROUBLES:
                key = alert.kind, alert.about
                self._groups[key] = _Group(
                    alert, max(totals.get(key, 0), int(alert.details.get("devices_total", 0)))
                )

    def look(self, records: Sequence[object], now_ms: int) -> list[Alert | Act]:
        """Look at a batch of records that are about to be saved.

        Returns:
            What is to be saved with them. An alert that was returned before may come again with more devices.
        """
        rollouts = {record.id: record for record in records if isinstance(record, RolloutRecord)}
        found: list[Alert | Act] = []
        troubles: dict[tuple[Kind, str], list[str]] = {}
        for record in records:
            if isinstance(record, Decision):
                found += _decided(record, rollouts.get(record.rollout))
            elif isinstance(record, MemberRecord | DeviceRecord):
                if isinstance(record, DeviceRecord) and not (record.report and record.report.alarm):
                    self._seen.pop(("device.alarm", FLEET, record.device), None)
                for kind, about, device in _troubles(record):
                    if self._see(kind, about, device):
                        troubles.setdefault((kind, about), []).append(device)
        for (kind, about), devices in troubles.items():
            found.append(self._join(kind, about, devices, now_ms))
        return found

    def _see(self, kind: Kind, about: str, device: str) -> bool:
        """Whether this is news."""
        key = kind, about, device
        if key in self._seen:
            return False
        if len(self._seen) >= SEEN_MAX:
            self._seen.pop(next(iter(self._seen)))
        self._seen[key] = None
        return True

    def _join(self, kind: Kind, about: str, devices: list[str], now_ms: int) -> Alert:
        before = self._groups.get((kind, about))
        if before is not None and before.alert.due_ms > now_ms + AMEND_MS:
            alert, total = before.alert, before.total + len(devices)
        else:
            due_ms = now_ms + GROUP_WAIT_MS
            if before is not None:
                due_ms = max(due_ms, before.alert.due_ms + GROUP_INTERVAL_MS)
            alert = new_alert(kind, about, now_ms, "", due_ms=due_ms)
            total = len(devices) + (0 if before is None else before.total)
        count = alert.count + len(devices)
        alert = msgspec.structs.replace(
            alert,
            count=count,
            devices=(*alert.devices, *devices)[:DEVICES_NAMED_MAX],
            text=_trouble_text(kind, about, count, total, devices[0]),
            details={"devices_total": total},
        )
        self._groups[kind, about] = _Group(alert, total)
        return alert


def _troubles(record: MemberRecord | DeviceRecord) -> Iterable[tuple[Kind, str, str]]:
    if isinstance(record, DeviceRecord):
        if record.report is not None and record.report.alarm:
            yield "device.alarm", FLEET, record.device
    elif is_lost(record):
        yield "device.unrecoverable", record.rollout, record.device
    elif record.status == "silent":
        yield "device.stuck", record.rollout, record.device


def _trouble_text(kind: Kind, about: str, count: int, total: int, device: str) -> str:
    where = "" if about == FLEET else f" of rollout {about}"
    more = f" ({total} so far)" if total > count else ""
    who = device if count == 1 else f"{count} devices"
    return f"{who}{where}{more}{'' if count == 1 else ': each'} {_TROUBLES[kind]}"


def _decided(decision: Decision, rollout: RolloutRecord | None) -> list[Alert | Act]:
    """What a decision about a rollout is to others."""
    name = "" if rollout is None else f"{rollout.family} {rollout.version}"
    numbers = dict(decision.numbers)
    act = new_act(
        SERVER,
        decision.at_ms,
        f"rollout.{decision.action}",
        decision.rollout,
        decision.text,
        release=name,
        number=decision.number,
    )
    kind = _KINDS.get(decision.action)
    if kind is None:
        return [act]
    alert = new_alert(
        kind,
        decision.rollout,
        decision.at_ms,
        f"Rollout {decision.rollout} of {name} {_VERBS[kind]}: {decision.text}",
        key=str(decision.number),
        details={
            "release": name,
            "wave": decision.wave,
            "by": decision.by,
            "reason": decision.reason,
            **numbers,
        },
    )
    return [act, alert]
