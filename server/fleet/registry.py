"""Which devices there are and what they last said about themselves. Pure."""

from collections.abc import Iterable, Iterator

from msgspec import Struct

from protocol.ids import DeviceId, Family
from protocol.messages import Desired, Report
from protocol.release import Release


class DeviceRecord(Struct, frozen=True, kw_only=True):
    """One device as the server knows it."""

    v: int = 1
    device: DeviceId
    report: Report | None = None
    desired: Desired | None = None
    desired_sequence: int = 0  # of the last `Desired`, also when that was withdrawn
    is_online: bool = False  # what the broker said last; a hint only
    seen_ms: int = 0  # server clock, of the last message from the device

    @property
    def family(self) -> str:
        """Model family that the device runs, empty before its first report."""
        return self.report.family if self.report else ""

    @property
    def version(self) -> str:
        """Version that the device runs, empty when it runs none."""
        return self.report.version if self.report else ""

    @property
    def tier(self) -> str:
        """Hardware tier by the device's own account, empty before its first report."""
        return self.report.tier if self.report else ""


class Registry:
    """All devices, by identity and by model family.

    Attributes:
        revision: Grows with every change, see `changed_since`.
        changes: Grows when a device appears, or changes its family, tier or labels: who belongs to a wave may have changed.
        version_changes: Likewise, when a device runs another version.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.changes = 0
        self.version_changes = 0
        self._labels: dict[DeviceId, frozenset[str]] = {}
        self._devices: dict[DeviceId, DeviceRecord] = {}
        self._families: dict[str, dict[DeviceId, None]] = {}
        self._revisions: dict[DeviceId, int] = {}  # in the order of their last changes

    def __len__(self) -> int:
        return len(self._devices)

    def __iter__(self) -> Iterator[DeviceRecord]:
        return iter(self._devices.values())

    def get(self, device: DeviceId) -> DeviceRecord:
        """The record of `device`; an empty one when it was never heard of."""
        return self._devices.get(device) or DeviceRecord(device=device)

    def put(self, record: DeviceRecord) -> None:
        """Replace the record of a device."""
        before = self._devices.get(record.device)
        if before is not None and before.family != record.family:
            self._families.get(before.family, {}).pop(record.device, None)
        if before is None or (before.family, before.tier) != (record.family, record.tier):
            self.changes += 1
        if before is None or before.version != record.version:
            self.version_changes += 1
        self._devices[record.device] = record
        self._families.setdefault(record.family, {})[record.device] = None
        self.revision += 1
        self._revisions.pop(record.device, None)
        self._revisions[record.device] = self.revision

    def load(self, records: Iterable[DeviceRecord]) -> None:
        """Take over what the store knows."""
        for record in records:
            self.put(record)

    def changed_since(self, revision: int) -> list[DeviceRecord]:
        """Devices that were put after `revision`, those that changed last first; costs what changed, not the fleet."""
        changed = []
        for device, at in reversed(self._revisions.items()):
            if at <= revision:
                break
            changed.append(self._devices[device])
        return changed

    def label(self, device: DeviceId, labels: Iterable[str]) -> None:
        """Replace the labels of a device."""
        after = frozenset(labels)
        if after != self.labels(device):
            self._labels[device] = after
            self.changes += 1

    def labels(self, device: DeviceId) -> frozenset[str]:
        """What an operator calls a device by."""
        return self._labels.get(device, frozenset())

    def of_family(self, family: Family) -> list[DeviceRecord]:
        """Devices that reported `family`."""
        return [self._devices[device] for device in self._families.get(family, {})]

    def count(self, family: Family) -> int:
        """How many devices reported `family`."""
        return len(self._families.get(family, ()))


def is_news(record: DeviceRecord, report: Report) -> bool:
    """Whether `report` is newer than what is known; repeated and overtaken reports are not (SPEC section 3)."""
    return record.report is None or report.sequence > record.report.sequence


def next_desired_sequence(record: DeviceRecord) -> int:
    """A number above every one that the device has seen, also when this server's store is younger than the device.

    Somebody else may have spoken for this server meanwhile, and told the device to keep what it runs: no update is reported then.
    """
    report = record.report
    if report is None:
        return record.desired_sequence + 1
    reported = max(report.desired_sequence, report.update.sequence if report.update else 0)
    return max(record.desired_sequence, reported) + 1


def is_waited_for(record: DeviceRecord) -> bool:
    """Whether a device was asked for something, and has not said what became of it for good."""
    update = record.report.update if record.report else None
    if record.desired is None:
        return False
    return update is None or update.sequence != record.desired_sequence or update.finished_ms is None


def runs(device: DeviceRecord, release: Release) -> bool:
    """Whether a device reports that it runs `release`, with the files that the release consists of."""
    if device.report is None or (device.version, device.family) != (release.version, release.family):
        return False
    return not device.report.files or {file.sha256 for file in release.files} <= set(
        device.report.files.values()
    )
