"""What `whimbrel-device status` and `history` print: the durable record and the running agent, for people and for programs."""

import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from device.adapters.control import Status
from device.config import DeviceConfig
from device.journal import PastUpdate, Record, SlotRecord, UpdateRecord
from device.slots import SlotName

_DIGEST_DIGITS: Final = 16
"""Enough to compare by eye; `--json` has all of it."""

_MB: Final = 1e6


def status_fields(config: DeviceConfig, record: Record, agent: Status | None) -> dict[str, Any]:
    """The status for programs: the record's own fields, `device`, and `agent`, which is null where none runs."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    fields["device"] = config.agent.device
    fields["agent"] = msgspec.to_builtins(agent)
    if fields["update"] is not None:
        fields["update"].pop("release", None)  # long, and to be found in the signed description
    return fields


def status_lines(config: DeviceConfig, record: Record, agent: Status | None) -> Iterator[str]:
    """The status for people, in the manner of `rauc status`."""
    yield "=== Device ==="
    named = config.agent
    yield f"device    {named.device}   fleet {named.fleet}   family {named.family}   tier {named.tier or '-'}"
    yield f"agent     {_agent_line(config, agent)}"
    if config.serving is not None:
        yield f"endpoint  {config.serving.address}"
    yield f"updates   {_updates_line(record, agent)}"
    yield f"state     {agent.state if agent is not None else record.state.value}"
    yield ""
    yield "=== Slots ==="
    for name, slot in record.slots.items():
        yield from _slot_lines(name, slot, record, agent)
    yield "x is active, o is the other slot"
    if record.update is not None:
        yield ""
        yield "=== Last update ==="
        yield from _update_lines(record.update)


def _agent_line(config: DeviceConfig, agent: Status | None) -> str:
    broker = f"{config.broker_host}:{config.broker_port}"
    if agent is None:
        return f"not running   broker {broker}"
    connection = f"connected to {agent.broker}"
    if not agent.is_connected:
        connection = f"not connected to {agent.broker}{f': {agent.trouble}' if agent.trouble else ''}"
    return f"running, process {agent.pid}, {connection}"


def _updates_line(record: Record, agent: Status | None) -> str:
    if record.paused_ms is not None:
        return f"paused since {instant(record.paused_ms)}"
    if agent is not None and agent.held is not None:
        return f"wait, {agent.held.code}: {agent.held.text}"
    return "allowed"


def _slot_lines(name: SlotName, slot: SlotRecord, record: Record, agent: Status | None) -> Iterator[str]:
    mark = "x" if name is record.active else "o"
    says = ""
    if name is record.active and agent is not None:
        says = "answers" if agent.serving == slot.version else "does not answer"
    yield f"{mark} [{name.value}] {slot.version or '-':<12} {slot.health.value:<10} {says}".rstrip()
    for file, sha256 in slot.files.items():
        yield f"        {sha256[:_DIGEST_DIGITS]} {file} ({slot.runtime})"


def _update_lines(update: UpdateRecord) -> Iterator[str]:
    began = instant(update.started_ms)
    ended = f", ended {instant(update.finished_ms)}" if update.finished_ms is not None else ""
    yield f"version   {update.desired.version}   rollout {update.desired.rollout or '-'}"
    yield f"outcome   {update.outcome}{f' {update.code}' if update.code else ''}"
    if update.detail:
        yield f"reason    {update.detail}"
    yield f"time      began {began}{ended}"
    yield f"cost      {update.counters.received_bytes} bytes received, {update.tries} trials"


def history_lines(past: tuple[PastUpdate, ...]) -> Iterator[str]:
    """Past updates for people, newest first."""
    if not past:
        yield "no update has come to its end yet"
        return
    yield f"{'ended':<20} {'version':<12} {'outcome':<12} {'runs since':<12} {'MB':>8} {'trials':>6}  reason"
    for each in reversed(past):
        reason = ": ".join(part for part in (each.code, each.detail) if part)
        yield (
            f"{instant(each.finished_ms):<20} {each.version:<12} {each.outcome:<12} {each.active or '-':<12} "
            f"{each.received_bytes / _MB:>8.2f} {each.tries:>6}  {reason}"
        ).rstrip()


def instant(ms: int) -> str:
    """An instant in the local time of the device."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))
