"""What a device says about itself, built from its record and what it measured. Pure."""

from typing import Final

from msgspec import UNSET

from device.config import AgentConfig
from device.download import Tally
from device.journal import Counters, Record, UpdateRecord
from device.policy import Hold
from device.states import State
from protocol.messages import Report, UpdateReport

_REPORTS_PER_BOOT_BITS: Final = 32
"""A report's number grows over restarts, with one durable write per boot and none per report."""


def build_report(
    config: AgentConfig,
    record: Record,
    state: State,
    count: int,
    *,
    files: dict[str, str],
    runtimes: dict[str, str],
    disk_free_bytes: int,
    memory_bytes: int,
    held: Hold | None = None,
    alarm: str = "",
) -> Report:
    """The report of this instant.

    Args:
        config: Who reports.
        record: What is known durably.
        state: Where the update is.
        count: Reports since the start, this one included.
        files: Digests of the active files as last measured.
        runtimes: Installed runtimes.
        disk_free_bytes: As last measured.
        memory_bytes: Memory of the device.
        held: Why the update does not go on; told as its code while it runs.
        alarm: Why a wish was not taken.
    """
    return Report(
        device=config.device,
        sequence=(record.boots << _REPORTS_PER_BOOT_BITS) | count,
        state=state.value,
        family=config.family,
        version=record.active_slot.version,
        files=files,
        tier=config.tier,
        runtimes=runtimes,
        disk_free_bytes=disk_free_bytes,
        memory_bytes=memory_bytes,
        capacity=config.capacity,
        root=record.floors.root,
        desired_sequence=record.desired_sequence,
        update=None if record.update is None else update_report(record.update, held),
        alarm=alarm or UNSET,
    )


def update_report(update: UpdateRecord, held: Hold | None = None) -> UpdateReport:
    """How the last update is going or went."""
    if held is None or update.outcome != "running":
        held = Hold(update.code, update.detail)
    return UpdateReport(
        rollout=update.desired.rollout,
        sequence=update.desired.sequence,
        version=update.desired.version,
        outcome=update.outcome,
        code=held.code,
        detail=held.text[:512],
        started_ms=update.started_ms,
        finished_ms=update.finished_ms,
        transfer_bytes_total=sum(link.blob_length for item in update.items for link in item.links),
        full_bytes_total=0 if update.release is None else update.release.bytes_total,
        received_bytes=update.counters.received_bytes,
        received_chunks=update.counters.received_chunks,
        redundant_chunks=update.counters.redundant_chunks,
        invalid_chunks=update.counters.invalid_chunks,
        resumes=update.counters.resumes,
        tries=update.tries,
        states_ms=update.states_ms,
        evidence=update.evidence,
    )


def counters_of(tally: Tally) -> Counters:
    """The durable form of a tally."""
    return Counters(
        received_bytes=tally.received_bytes,
        received_chunks=tally.received_chunks,
        redundant_chunks=tally.redundant_chunks,
        invalid_chunks=tally.invalid_chunks,
        resumes=tally.resumes,
    )


def tally_of(counters: Counters) -> Tally:
    """Go on counting where the record stands."""
    tally = Tally()
    tally.received_bytes = counters.received_bytes
    tally.received_chunks = counters.received_chunks
    tally.redundant_chunks = counters.redundant_chunks
    tally.invalid_chunks = counters.invalid_chunks
    tally.resumes = counters.resumes
    return tally
