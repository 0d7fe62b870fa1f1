"""What is signed and published, indexed for the questions that are asked of it. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol.chunks import chunk_count, index_lengths, index_name
from protocol.delta.format import Profile
from protocol.ids import Digest, Family, Version
from protocol.release import (
    ArtifactCustom,
    DeltaName,
    Encryption,
    InPlaceNeeds,
    Release,
    ReleaseFile,
    delta_target,
    file_target,
    parse_delta_target,
    release_target,
)
from protocol.trust import Target
from server.ports import StoredBlob

NEVER_MS: Final = 1 << 52
"""An instant that does not come."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Published releases, their targets, and the blobs that devices may ask for.

    Attributes:
        targets: Signed targets by path.
        releases: Published releases.
        refresh_ms: When metadata has to be signed again, so that it never expires.
        director: Id of the key that signs what devices should run; empty where that is not signed.
    """

    targets: Mapping[str, Target] = field(default_factory=dict)
    releases: Mapping[tuple[Family, Version], Release] = field(default_factory=dict)
    refresh_ms: int = NEVER_MS
    director: str = ""
    _blobs: Mapping[Digest, int] = field(default_factory=dict)

    @staticmethod
    def of(
        targets: Mapping[str, Target], releases: Iterable[Release], refresh_ms: int, director: str = ""
    ) -> "Catalog":
        """Index what is signed. A release whose target is not signed is left out."""
        blobs = {name: length for target in targets.values() for name, length in target_blobs(target)}
        published = {
            (Family(release.family), Version(release.version)): release
            for release in releases
            if release_target(Family(release.family), Version(release.version)) in targets
        }
        return Catalog(targets, published, refresh_ms, director, blobs)

    def release(self, family: Family, version: Version) -> Release | None:
        """A published release."""
        return self.releases.get((family, version))

    def file(self, digest: Digest) -> Target | None:
        """The target of a whole file; the one that everybody can read, if there are two."""
        open_to_all = self.targets.get(file_target(digest))
        return open_to_all or self.targets.get(file_target(digest, is_encrypted=True))

    def is_secret(self, digest: Digest) -> bool:
        """Whether a file is there in encrypted form only, so that nothing may travel that tells about it."""
        target = self.file(digest)
        return target is not None and target.custom.encryption is not None

    def files_beside(self, digest: Digest) -> tuple[ReleaseFile, ...]:
        """Files of a release that holds this file, itself among them; nothing when no published release does."""
        holders = (
            release
            for release in self.releases.values()
            if any(file.sha256 == digest for file in release.files)
        )
        holder = next(holders, None)
        return tuple(holder.files) if holder is not None else ()

    def delta(
        self,
        base: Digest,
        result: Digest,
        profile: Profile = Profile.SMALL,
        is_encrypted: bool = False,  # noqa: FBT001, FBT002 - a `DeltaName`, taken apart
    ) -> Target | None:
        """The target of the delta between two files."""
        return self.targets.get(delta_target(base, result, profile, is_encrypted))

    def description(self, release: Release) -> Target:
        """The target of a published release's description."""
        return self.targets[release_target(Family(release.family), Version(release.version))]

    def blob_chunks(self, name: Digest) -> int | None:
        """Number of chunks of a data or index blob; None when nothing signed has this name."""
        length = self._blobs.get(name)
        return None if length is None else chunk_count(length)

    def deltas(self) -> list[DeltaName]:
        """Every signed delta."""
        return [name for path in self.targets if (name := parse_delta_target(path)) is not None]


def target_blobs(target: Target) -> list[tuple[Digest, int]]:
    """Name and length of the blobs that a target consists of: its data, then its indexes."""
    tree = target.custom.chunks
    lengths = index_lengths(target.length)
    indexes = [(index_name(tree, level), lengths[level - 1]) for level in range(1, tree.levels + 1)]
    return [(target.digest, target.length), *indexes]


def blob_target(
    path: str,
    blob: StoredBlob,
    memory_bytes: int = 0,
    in_place: InPlaceNeeds | None = None,
    encryption: Encryption | None = None,
) -> Target:
    """The target of a blob that is in the blob store; a delta says what it takes, and what is encrypted how."""
    custom = ArtifactCustom(
        chunks=blob.tree, memory_bytes=memory_bytes, in_place=in_place, encryption=encryption
    )
    return Target(path, blob.length, blob.digest, custom)
