"""Edges of the verification of metadata: what is just allowed, what just not, and mistakes that honest signers can make."""

from typing import Any

import pytest
from msgspec.structs import replace
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    Delegations,
    Metadata,
    SuccinctRoles,
    Targets,
)

from protocol.constants import DELEGATED_MAX, METADATA_BYTES_MAX
from protocol.errors import RollbackAttackError, TrustError
from protocol.release import ARTIFACTS_ROLE
from protocol.trust import DelegatedFloor, Floors, check_root, follow
from tests.protocol.metadata import DIGITS, Author, Believer, key, signed

V1 = "releases/digits/v1.json"


@pytest.fixture
def author() -> Author:
    return Author()


@pytest.fixture
def device(author: Author) -> Believer:
    return Believer(author.roots[0])


def changed_targets(author: Author, role: str, **changes: Any) -> bytes:
    """A document of targets with other fields, signed by those who may."""
    data = author.top_targets(by=[]) if role == "targets" else author.targets(role, by=[])
    document = Metadata[Targets].from_bytes(data).signed
    for name, value in changes.items():
        setattr(document, name, value)
    return signed(document, author.signers[role])


# --- sizes


def test_a_root_of_exactly_the_largest_size_is_a_root_and_one_byte_more_is_none(author: Author) -> None:
    longest = author.roots[0].ljust(METADATA_BYTES_MAX["root"])
    assert check_root(longest) == 1
    with pytest.raises(TrustError, match="allowed are"):
        check_root(longest + b" ")
    with pytest.raises(TrustError, match="allowed are"):
        follow(longest + b" ", author.rotate(), Floors())


def test_exactly_as_many_delegated_documents_as_are_allowed_are_looked_at(
    author: Author, device: Believer
) -> None:
    good = author.documents()
    spare = tuple((f"role-{number}", b"") for number in range(DELEGATED_MAX - len(good.delegated)))
    assert set(device.refresh(replace(good, delegated=(*good.delegated, *spare))).targets) == {V1}


# --- keys and floors


def test_a_key_id_that_no_key_stands_behind_counts_for_nothing(author: Author) -> None:
    root = Metadata.from_bytes(author.roots[0]).signed
    root.roles["root"].keyids.append("f" * 64)
    assert check_root(signed(root, author.signers["root"])) == 1
    root.roles["root"].threshold = 4
    with pytest.raises(TrustError, match="signed by 3/4"):
        check_root(signed(root, author.signers["root"]))


def test_a_rotation_that_leaves_the_online_keys_alone_keeps_their_floors(
    author: Author, device: Believer
) -> None:
    old = author.documents()
    device.refresh(author.documents())
    root = author.rotate(root=[key("dora"), key("emil"), key("fay")])
    with pytest.raises(RollbackAttackError, match="timestamp version 1"):
        device.refresh(old, [root])


def test_floors_of_rotated_keys_are_as_if_nothing_had_been_seen(author: Author) -> None:
    seen = Floors(root=1, timestamp=9, snapshot=8, targets=7, time_ms=6)
    people = [key("dora"), key("emil"), key("fay")]
    online = author.rotate(timestamp=[key("t2")])
    assert follow(author.roots[0], online, seen).floors == Floors(root=2, targets=7)
    everybody = author.rotate(targets=people, root=people)
    floors = follow(online, everybody, replace(seen, root=2)).floors
    assert floors == replace(seen, root=3, targets=0)


def test_a_floor_is_kept_for_keys_under_the_names_that_older_agents_wrote(
    author: Author, device: Believer
) -> None:
    """The record outlives the agent: with other fingerprints the floor would be gone after an update of the agent."""
    device.refresh(author.documents())
    (artifacts,) = (floor for floor in device.floors.delegated if floor.role == ARTIFACTS_ROLE)
    assert artifacts == DelegatedFloor(role=ARTIFACTS_ROLE, version=1, keys=("389e0681751445f0",))


def test_every_floor_has_a_name(author: Author, device: Believer) -> None:
    author.time_ms = 5
    device.refresh(author.documents())
    assert device.floors.numbers() == {
        "root": 1,
        "timestamp": 1,
        "snapshot": 1,
        "targets": 1,
        "time_ms": 5,
        ARTIFACTS_ROLE: 1,
        DIGITS: 1,
    }


# --- delegations and targets


def test_targets_that_delegate_to_nobody_speak_for_themselves_only(author: Author, device: Believer) -> None:
    author.documents()
    author.content["targets"] = ["readme"]
    bins = Delegations({}, None, SuccinctRoles([], 1, 8, "bin"))
    for delegations in (None, bins):  # hash bins are not part of this protocol
        alone = changed_targets(author, "targets", delegations=delegations)
        assert set(device.refresh(author.assembled(targets=alone)).targets) == {"readme"}


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": {"sha512": "0" * 128}},
        {"hashes": {"sha256": "of the file"}},
        {"hashes": {"sha256": "A" * 64}},
        {"unrecognized_fields": {}},
        {"unrecognized_fields": {"custom": {"chunks": {"root": "0" * 64, "levels": 9}}}},
    ],
)
def test_a_signed_target_that_cannot_be_checked_is_refused_by_name(
    author: Author, device: Believer, change: dict[str, Any]
) -> None:
    """Signed by those who may, and yet no device could compare a file with it."""
    author.documents()
    files = Metadata[Targets].from_bytes(author.targets(DIGITS)).signed.targets
    for name, value in change.items():
        setattr(files[V1], name, value)
    with pytest.raises(TrustError, match=f"target {V1}"):
        device.refresh(author.assembled(**{DIGITS: changed_targets(author, DIGITS, targets=files)}))
