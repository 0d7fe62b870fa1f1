"""Why a file may run: from its digest to the root that devices start from, each step with who signed it. Pure."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from protocol.errors import TrustError
from protocol.ids import Digest, Family, Version, digest_of
from protocol.release import DeltaName, encode_release, file_target, parse_delta_target, release_target
from protocol.trust import Floors, check_root, verify
from server.ports import ReleaseRecord, Repository
from server.releases.metadata import Draft, Standing, root_standing


class Listing(Struct, frozen=True, kw_only=True):
    """A target that leads to the file."""

    path: str
    role: str  # who lists it
    what: str  # in words


class Step(Struct, frozen=True, kw_only=True):
    """One document on the way, and whose signatures it has."""

    standing: Standing
    delegated_by: str  # empty for root


class Chain(Struct, frozen=True, kw_only=True):
    """Everything that a device relies on for a file.

    Attributes:
        sha256: Of the file.
        length: Bytes.
        listings: Targets that name it; empty if nothing signed does.
        steps: Documents of the roles of those targets, then those above them.
        roots: Every version of root, oldest first.
        start: Version of root that a device starts from.
        refusal: Why such a device would not believe it now; empty if it would.
    """

    sha256: str
    length: int
    listings: list[Listing]
    steps: list[Step]
    roots: list[Standing]
    start: int
    refusal: str

    @property
    def may_run(self) -> bool:
        """Whether a device that starts from that root would run the file now, as part of a release."""
        return not self.refusal


def explain(
    repository: Repository,
    releases: Sequence[ReleaseRecord],
    digest: Digest,
    length: int,
    now_ms: int,
    start: bytes | None = None,
) -> Chain:
    """Follow a file up to the root.

    Args:
        repository: What is signed.
        releases: Of the store; only what is signed of them counts.
        digest: SHA-256 of the file.
        length: Its bytes.
        now_ms: Of the judgement.
        start: The root that devices start from; None takes the first one.

    Raises:
        TrustError: `start` is no root, or none of this repository.
    """
    start = repository.roots[0] if start is None else start
    version = check_root(start)
    if version > len(repository.roots) or repository.roots[version - 1] != start:
        raise TrustError(f"root version {version} is none of this repository", hint="is it of another fleet?")
    draft = Draft(repository, {})
    listings = _listings(draft, releases, digest)
    roles = list(dict.fromkeys(listing.role for listing in listings))
    steps = [
        Step(standing=draft.standing(role), delegated_by="targets") for role in roles if role != "targets"
    ]
    steps.append(Step(standing=draft.standing("targets"), delegated_by="root"))
    for role in ("snapshot", "timestamp"):
        data: bytes = getattr(repository.documents, role)
        steps.append(Step(standing=draft.standing(role, data), delegated_by="root"))
    return Chain(
        sha256=digest,
        length=length,
        listings=listings,
        steps=steps,
        roots=[root_standing(repository.roots, at) for at in range(len(repository.roots))],
        start=version,
        refusal=_refusal(repository, version, listings, now_ms),
    )


def _listings(draft: Draft, releases: Sequence[ReleaseRecord], digest: Digest) -> list[Listing]:
    found: list[Listing] = []
    for role, path, sha256 in draft.files():
        name = parse_delta_target(path)
        if path == file_target(digest) and sha256 == digest:
            found.append(Listing(path=path, role=role, what="the whole file"))
        elif path == file_target(digest, is_encrypted=True):
            found.append(Listing(path=path, role=role, what="the whole file, encrypted"))
        elif sha256 == digest:
            found.append(Listing(path=path, role=role, what="these bytes"))
        elif name is not None and name.result == digest:
            found.append(Listing(path=path, role=role, what=_delta_text(name)))
    signed = {path: (role, sha256) for role, path, sha256 in draft.files()}
    for record in releases:
        release = record.release
        path = release_target(Family(release.family), Version(release.version))
        role, sha256 = signed.get(path, ("", ""))
        if sha256 != digest_of(encode_release(release)):
            continue
        found += [
            Listing(path=path, role=role, what=f"{file.name} of {release.family} {release.version}")
            for file in release.files
            if file.sha256 == digest
        ]
    return sorted(found, key=lambda listing: (not listing.path.startswith("releases/"), listing.path))


def _delta_text(name: DeltaName) -> str:
    return f"a delta to it, from {name.base[:12]}{', encrypted' if name.is_encrypted else ''}"


def _refusal(repository: Repository, version: int, listings: Sequence[Listing], now_ms: int) -> str:
    """Why a device would not believe any release that names the file; empty if it believes one."""
    named = [listing for listing in listings if listing.path.startswith("releases/")]
    if not named:
        return "no signed release names this file"
    documents = msgspec.structs.replace(repository.documents, roots=repository.roots[version:])
    refusals: list[str] = []
    for listing in named:
        try:
            targets = verify(
                repository.roots[version - 1], documents, Floors(), now_ms, [listing.role]
            ).targets
        except TrustError as error:
            refusals.append(error.message)
            continue
        if listing.path in targets:
            return ""
        refusals.append(f"{listing.path} is listed where no device looks for it")
    return refusals[0]
