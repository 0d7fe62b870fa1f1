"""Signed repositories of any size for `trust.py`, made by the same ceremony as in docs/keys.md: people first, then releases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from securesystemslib.signer import Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.chunks import tree_levels
from protocol.ids import Digest, Family, Version, digest_of
from protocol.release import (
    ArtifactCustom,
    ChunkTree,
    delta_target,
    file_target,
    release_target,
    releases_role,
)
from protocol.trust import Target
from server.ports import Repository
from server.releases.metadata import Draft, add_signature
from server.releases.publisher import ROLES, Publisher
from server.releases.signers import make_key, signer_of

MODEL_BYTES: Final = 92_000_000
DELTA_BYTES: Final = 6_000_000
DESCRIPTION_BYTES: Final = 6_000
ONLINE: Final = ("snapshot", "timestamp", "artifacts")


@dataclass(frozen=True, slots=True)
class Built:
    """A repository, and what can be said of it.

    Attributes:
        families: Model families.
        releases: Of each family, all of them listed, each with its whole file and a delta from the one before.
        repository: Root 1 has one key for each role, root 2 the thresholds of people.
    """

    families: int
    releases: int
    repository: Repository


def build(families: int, releases: int, now_ms: int) -> Built:
    """Make a repository: root and targets 2 of 3, each family 2 of 2, online roles 1 of 1.

    Raises:
        RequestError: A document would pass its size limit.
    """
    keys = {role: make_key(None)[0] for role in ROLES}
    people = {name: signer_of(name, make_key(None)[0]) for name in ("ana", "ben", "cem")}
    for number in range(families):
        for name in ("builder", "approver"):
            people[f"{name}-{number}"] = signer_of(f"{name}-{number}", make_key(None)[0])

    def assign(draft: Draft) -> None:
        top = [people[name].public_key for name in ("ana", "ben", "cem")]
        draft.assign("root", top, 2)
        draft.assign("targets", top, 2)
        for number in range(families):
            pair = [people[f"{name}-{number}"].public_key for name in ("builder", "approver")]
            draft.assign(releases_role(_family(number)), pair, 2)

    first = Publisher(keys)
    repository = first.create(now_ms).repository
    documents = _signed(repository, first.change(repository, {}, assign, now_ms), people)
    repository = first.submit(repository, documents, (), now_ms).repository
    server = Publisher({role: keys[role] for role in ONLINE})
    targets = [target for number in range(families) for target in _targets(_family(number), releases)]
    documents = server.change(repository, {}, lambda draft: server.list_targets(draft, targets), now_ms)
    repository = server.submit(repository, _signed(repository, documents, people), (), now_ms).repository
    return Built(families, releases, repository)


def _signed(
    repository: Repository, documents: Mapping[str, bytes], people: Mapping[str, Signer]
) -> dict[str, bytes]:
    """Let people sign until nothing lacks a signature, and no more than that."""
    signed = dict(documents)
    for role in documents:
        for person in people.values():
            standing = Draft(repository, signed).standing(role)
            if standing.missing and person.public_key.keyid in {key.keyid for key in standing.unsigned}:
                signed[role] = add_signature(role, signed[role], person)
    return signed


def _targets(family: Family, count: int) -> list[Target]:
    """What is listed for a family whose newest version devices get as a delta."""
    found: list[Target] = []
    before: Digest | None = None
    for number in range(1, count + 1):
        version = Version(f"1.{number}")
        file = _blob(file_target(digest_of(f"{family} {version}".encode())), MODEL_BYTES)
        found += [_blob(release_target(family, version), DESCRIPTION_BYTES), file]
        result = digest_of(f"{family} {version}".encode())
        if before is not None:
            found.append(_blob(delta_target(before, result), DELTA_BYTES))
        before = result
    return found


def _blob(path: str, length: int) -> Target:
    digest = digest_of(path.encode())
    if path.startswith("files/"):
        digest = Digest(path.removeprefix("files/"))
    tree = ChunkTree(root=digest_of(digest.encode()), levels=tree_levels(length))
    return Target(path, length, digest, ArtifactCustom(chunks=tree, memory_bytes=0))


def _family(number: int) -> Family:
    return Family(f"family-{number}")
