"""The deltas of one server from the wish to the end: built, refused, signed, idle, retired. Pure.

`delta_graph.py` says which ones pay, `delta_garbage.py` which ones are needed; this module keeps what is under way, and
orders builds, signatures and removals. A delta that nobody needs is written down as idle; after the time of grace its
target is dropped from the metadata, and once that is signed its blobs go. What was written down goes last, so that a
crash at any point leaves something to go on with.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from protocol.delta.format import Profile
from protocol.ids import Digest
from protocol.release import DeltaName, Release, delta_target, parse_delta_target
from server.effects import BuildDelta, Effect, RemoveBlobs, Save, SignMetadata
from server.events import BlobsRemoved, DeltaBuilt, DeltaFailed, SigningFailed
from server.fleet.registry import DeviceRecord, Registry
from server.ports import DeltaRefusal, IdleDelta, IdleDeltaRemoval, StoredBlob
from server.releases.catalog import Catalog, blob_target, target_blobs
from server.releases.delta_garbage import needed_deltas
from server.releases.delta_graph import FleetGraph
from server.releases.delta_planner import is_worthwhile

if TYPE_CHECKING:
    from protocol.trust import Target

GRACE_MS: Final = 7 * 86_400_000
"""Default time from when nobody needs a delta to its end: a fleet that comes back to a version finds it still there."""

COLLECT_FIRST_MS: Final = 60_000
COLLECT_EVERY_MS: Final = 3_600_000
"""When needs are looked at, after the start and then: it takes a look at every device."""

TARGETS_SOFT_MAX: Final = 400
"""Signed targets above which idle deltas are dropped at once; about two thirds of the size limit of targets."""


class DeltaStock:
    """What is known of deltas, and what is being done about them.

    Args:
        registry: The fleet.
        heads: Gives what devices are on their way to, see `delta_garbage.head_releases`.
        grace_ms: How long an idle delta stays.
    """

    def __init__(
        self, registry: Registry, heads: Callable[[], list[Release]], grace_ms: int = GRACE_MS
    ) -> None:
        self.graph = FleetGraph(Catalog())
        self.idle: dict[str, IdleDelta] = {}
        self._registry = registry
        self._heads = heads
        self._grace_ms = grace_ms
        self._has_deltas = False
        self._collect_ms = 0
        self._refused: set[DeltaName] = set()  # built, and not worth sending
        self._failed: set[DeltaName] = set()  # could not be built or signed; tried again after a restart
        self._building: set[DeltaName] = set()
        self._built: dict[DeltaName, Target] = {}  # wait for a signature
        self._signing: set[DeltaName] = set()

    @property
    def catalog(self) -> Catalog:
        """What is signed."""
        return self.graph.catalog

    def start(
        self, catalog: Catalog, refusals: Iterable[DeltaRefusal], idle: Iterable[IdleDelta], now_ms: int
    ) -> Iterator[Effect]:
        """Take over what the store knows; go on with removals that were cut off."""
        self._refused = {each.name for each in refusals}
        self.idle = {each.path: each for each in idle}
        self._collect_ms = now_ms + COLLECT_FIRST_MS
        yield from self.follow(catalog)

    def deadline(self) -> int | None:
        """When to call `collect`."""
        return self._collect_ms if self.idle or self._has_deltas else None

    # Building

    def ready(
        self, release: Release, devices: list[DeviceRecord], now_ms: int
    ) -> tuple[list[DeviceRecord], list[Effect]]:
        """Devices for which nothing is left to build or sign, and orders that start what is.

        One that rewrites its files can go nowhere without a delta, so it is not asked while they are neither version.
        """
        groups = [self.graph.group(release, device.report) for device in devices]
        planned = self.graph.builds(release, Counter(groups), self._is_closed)
        effects: list[Effect] = []
        for name in planned:
            if name not in self._building and name not in self._built:
                self._building.add(name)
                beside = (self.catalog.files_beside(digest) for digest in (name.base, name.result))
                effects.append(BuildDelta(name, *beside))
        if planned and not any(name in self._building for name in planned):
            effects += self._sign_built(now_ms)
        waiting = {group for users in planned.values() for group in users}
        return [
            device
            for device, group in zip(devices, groups, strict=True)
            if group not in waiting and not _is_between_versions(device)
        ], effects

    def built(self, event: DeltaBuilt) -> Iterator[Effect]:
        """A delta is in the blob store."""
        name = event.name
        assert name.is_encrypted == (event.encryption is not None), "nothing secret is signed as it is"
        self._building.discard(name)
        whole = self.catalog.file(name.result)
        if whole is None:
            self._failed.add(name)  # its release went away while it was built
        elif is_worthwhile(event.blob.length, whole.length):
            self._built[name] = blob_target(
                delta_target(*name), event.blob, event.memory_bytes, event.in_place, event.encryption
            )
            if self.idle.pop(delta_target(*name), None) is not None:
                yield Save(IdleDeltaRemoval(path=delta_target(*name)))
        else:
            self._refused.add(name)
            yield Save(
                DeltaRefusal(
                    base=name.base,
                    result=name.result,
                    profile=name.profile,
                    is_encrypted=name.is_encrypted,
                    length=event.blob.length,
                )
            )

    def build_failed(self, event: DeltaFailed) -> None:
        """A delta could not be built."""
        self._building.discard(event.name)
        self._failed.add(event.name)

    def signing_failed(self, event: SigningFailed) -> None:
        """Deltas could not be signed; whatever else there is goes out."""
        self._signing -= set(event.deltas)
        for name in event.deltas:
            self._built.pop(name, None)
            self._failed.add(name)

    def follow(self, catalog: Catalog) -> Iterator[Effect]:
        """Something was signed: forget what waited for it, and remove the blobs of what was retired."""
        self.graph = FleetGraph(catalog)
        self._has_deltas = bool(catalog.deltas())
        for name in [name for name in self._built if catalog.delta(*name) is not None]:
            del self._built[name]
        self._signing &= set(self._built)
        for idle in self.idle.values():
            was = parse_delta_target(idle.path)
            if idle.path in catalog.targets or was in self._building or was in self._built:
                continue
            blobs = target_blobs(blob_target(idle.path, idle.blob))
            yield RemoveBlobs(
                idle.path, tuple(blob for blob, _ in blobs if catalog.blob_chunks(blob) is None)
            )

    def _is_closed(self, name: DeltaName) -> bool:
        # A delta of profile `fast` is no smaller than the `small` one, which was not worth sending.
        return (
            name in self._failed
            or name in self._refused
            or name._replace(profile=Profile.SMALL) in self._refused
        )

    def _sign_built(self, now_ms: int) -> list[Effect]:
        names = tuple(name for name in self._built if name not in self._signing)
        if not names:
            return []
        self._signing.update(names)
        excess = len(self.catalog.targets) + len(names) - TARGETS_SOFT_MAX
        retired: list[IdleDelta] = []
        if excess > 0:
            longest_idle = sorted(self._unneeded(now_ms), key=lambda idle: (idle.since_ms, idle.path))
            retired = longest_idle[:excess]
        self.idle.update((idle.path, idle) for idle in retired)
        return [
            *(Save(idle) for idle in retired),
            SignMetadata(
                added=tuple(self._built[name] for name in names),
                retired=tuple(idle.path for idle in retired),
                deltas=names,
            ),
        ]

    # Garbage

    def collect(self, now_ms: int) -> Iterator[Effect]:
        """Look at what is needed; note what no longer is, and drop what has not been for long enough."""
        if now_ms < self._collect_ms:
            return
        self._collect_ms = now_ms + COLLECT_EVERY_MS
        unneeded = {idle.path: idle for idle in self._unneeded(now_ms)}
        for path in [path for path in self.idle if path not in unneeded and path in self.catalog.targets]:
            del self.idle[path]
            yield Save(IdleDeltaRemoval(path=path))
        for path, idle in unneeded.items():
            if path not in self.idle:
                self.idle[path] = idle
                yield Save(idle)
        expired = tuple(path for path, idle in unneeded.items() if idle.since_ms + self._grace_ms <= now_ms)
        if expired:
            yield SignMetadata(retired=expired)

    def removed(self, event: BlobsRemoved) -> Iterator[Effect]:
        """The blobs of a retired delta are gone."""
        if self.idle.pop(event.path, None) is not None:
            yield Save(IdleDeltaRemoval(path=event.path))

    def _unneeded(self, now_ms: int) -> Iterator[IdleDelta]:
        """Signed deltas that nobody needs, in order of their paths, with the time since which that is known."""
        needed = needed_deltas(self.graph, self._registry, self._heads(), now_ms)
        for name in sorted(self.catalog.deltas()):
            path = delta_target(*name)
            if path not in needed:
                target = self.catalog.targets[path]
                blob = StoredBlob(
                    digest=Digest(target.digest), length=target.length, tree=target.custom.chunks
                )
                yield self.idle.get(path) or IdleDelta(path=path, since_ms=now_ms, blob=blob)


def _is_between_versions(device: DeviceRecord) -> bool:
    """Whether a device was started in the middle of rewriting its files: it will soon say which it has. Nobody waits for one that is away."""
    report = device.report
    if report is None or report.files or report.capacity is None or report.update is None:
        return False
    return device.is_online and report.capacity.in_place and report.update.outcome == "running"
