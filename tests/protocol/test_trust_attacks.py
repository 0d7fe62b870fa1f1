"""Attacks on signed metadata, by name; the numbers are rows of docs/security/metadata.md."""

import contextlib
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from msgspec.structs import replace
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]  # public, but without __all__

from protocol.constants import DELEGATED_MAX, METADATA_BYTES_MAX
from protocol.errors import ExpiredMetadataError, RollbackAttackError, TrustError
from protocol.release import ARTIFACTS_ROLE
from protocol.trust import ROOT_ROTATIONS_MAX, DelegatedFloor, Floors, check_root, follow, verify
from tests.protocol.metadata import (
    DAY_MS,
    DIGITS,
    NOW_MS,
    VERSION_MAX,
    Author,
    Believer,
    key,
    renamed,
)

V1 = "releases/digits/v1.json"
ONLINE = ("timestamp", "snapshot", ARTIFACTS_ROLE)


@pytest.fixture
def author() -> Author:
    return Author()


@pytest.fixture
def device(author: Author) -> Believer:
    return Believer(author.roots[0])


def resigned(author: Author, role: str, by: list[Any]) -> dict[str, bytes]:
    """One document of the newest set, signed by others."""
    before = author.assembled()
    if role == "targets":
        return {role: author.top_targets(by)}
    if role == "snapshot":
        return {role: author.snapshot(dict([*before.delegated, ("targets", before.targets)]), by)}
    if role == "timestamp":
        return {role: author.timestamp(before.snapshot, by)}
    return {role: author.targets(role, by)}


def test_the_release_of_a_family_is_believed_when_builder_and_approver_signed(
    author: Author, device: Believer
) -> None:
    verified = device.refresh(author.documents())
    assert set(verified.targets) == {V1}
    assert {(floor.role, floor.version) for floor in verified.floors.delegated} == {
        (DIGITS, 1),
        (ARTIFACTS_ROLE, 1),
    }


# --- 1 to 3: signatures


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", DIGITS, ARTIFACTS_ROLE])
def test_1_arbitrary_model_signed_by_strangers_or_nobody(author: Author, device: Believer, role: str) -> None:
    author.documents()
    for by in ([], [key("mallory"), key("eve")]):
        with pytest.raises(TrustError, match="signed by 0"):
            device.refresh(author.assembled(**resigned(author, role, by)))


@pytest.mark.parametrize("role", ["targets", DIGITS])
def test_2_signatures_below_the_threshold(author: Author, device: Believer, role: str) -> None:
    author.documents()
    for signer in author.signers[role]:
        with pytest.raises(TrustError, match="signed by 1/2"):
            device.refresh(author.assembled(**resigned(author, role, [signer])))
    enough = author.assembled(**resigned(author, role, author.signers[role][:2]))
    assert V1 in device.refresh(enough).targets


def test_2_a_root_below_the_threshold_of_either_side(author: Author) -> None:
    ana, ben, cem = author.signers["root"]
    dora, emil = key("dora"), key("emil")
    first = author.roots[0]
    author.signers["root"] = [cem, dora, emil]
    for by in ([ana, ben], [ana, ben, dora], [cem, dora, emil], [ana, dora, emil]):
        with pytest.raises(TrustError, match="signed by"):
            follow(first, author.root(by), Floors())
    followed = follow(first, author.root([ana, ben, dora, emil]), Floors())
    assert (check_root(followed.root), followed.floors.root) == (2, 2)
    assert check_root(follow(first, author.root([ana, cem, dora]), Floors()).root) == 2


def test_3_one_signature_listed_twice_is_no_document(author: Author, device: Believer) -> None:
    good = author.documents()
    data = json.loads(author.targets(DIGITS, [key("builder")]))
    data["signatures"] *= 2
    with pytest.raises(TrustError):
        device.refresh(replace(good, delegated=((DIGITS, json.dumps(data).encode()), good.delegated[0])))
    with pytest.raises(TrustError):
        device.refresh(author.assembled(**{DIGITS: json.dumps(data).encode()}))


def test_3_a_second_signature_that_claims_the_id_of_another_key_does_not_count(
    author: Author, device: Believer
) -> None:
    author.documents()
    data = json.loads(author.targets(DIGITS, [key("builder")]))
    stolen = dict(data["signatures"][0], keyid=key("approver").public_key.keyid)
    data["signatures"].append(stolen)
    with pytest.raises(TrustError, match="signed by 1/2"):
        device.refresh(author.assembled(**{DIGITS: json.dumps(data).encode()}))


@pytest.mark.parametrize("spelling", [str, str.upper])
def test_3_one_key_under_two_ids_does_not_make_two(author: Author, spelling: Any) -> None:
    builder = key("builder")
    again = renamed(builder, "f" * 64)
    again.public_key.keyval["public"] = spelling(again.public_key.keyval["public"])
    author.signers[DIGITS] = [builder, again]
    with pytest.raises(TrustError, match="one key under two ids"):
        Believer(author.roots[0]).refresh(author.documents())


def test_3_one_key_under_two_schemes_does_not_make_two(author: Author) -> None:
    private = generate_private_key(65_537, 2048)
    schemes = ("rsassa-pss-sha256", "rsassa-pss-sha512")
    author.signers[DIGITS] = [
        CryptoSigner(private, SSlibKey.from_crypto(private.public_key(), None, scheme)) for scheme in schemes
    ]
    with pytest.raises(TrustError, match="one key under two ids"):
        Believer(author.roots[0]).refresh(author.documents())


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_3_a_root_that_lists_one_key_under_two_ids_is_refused(author: Author, role: str) -> None:
    first = author.roots[0]
    author.signers[role] = [key("ana"), renamed(key("ana"), "f" * 64)]
    author.thresholds[role] = 2
    root = author.root(by=[key("ana"), key("ben"), *author.signers["root"]])
    with pytest.raises(TrustError, match="one key under two ids"):
        follow(first, root, Floors())
    with pytest.raises(TrustError, match="one key under two ids"):
        check_root(root)


def test_3_the_same_id_twice_in_a_role_is_no_root(author: Author) -> None:
    data = json.loads(author.roots[0])
    data["signed"]["roles"]["root"]["keyids"].append(data["signed"]["roles"]["root"]["keyids"][0])
    with pytest.raises(TrustError):
        check_root(json.dumps(data).encode())


# --- 4 to 7: versions


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", DIGITS, ARTIFACTS_ROLE])
def test_4_rollback_of_any_role_although_all_keys_signed(author: Author, device: Believer, role: str) -> None:
    author.documents()
    device.refresh(author.documents())
    for other in ("timestamp", "snapshot"):
        author.versions[other] += 1
    author.versions[role] = 1
    with pytest.raises(RollbackAttackError, match=role):
        device.refresh(author.assembled())


def test_5_rollback_after_everything_but_the_durable_record_was_lost(
    author: Author, device: Believer
) -> None:
    old = author.documents()
    device.refresh(author.documents())
    device.root = author.roots[0]
    with pytest.raises(RollbackAttackError):
        device.refresh(old)


def test_5_the_world_before_a_rotation_is_refused_when_the_newer_root_was_lost(
    author: Author, device: Believer
) -> None:
    old = author.documents()
    rotated = author.rotate(timestamp=[key("timestamp 2")])
    device.refresh(author.documents(), [rotated])
    device.root = author.roots[0]
    with pytest.raises(RollbackAttackError, match="root version 1 is older than 2"):
        device.refresh(old)
    device.refresh(author.documents(), [rotated])  # and with the lost root it goes on


def test_6_a_role_that_is_no_longer_listed(author: Author, device: Believer) -> None:
    device.refresh(author.documents())
    for role in (DIGITS, ARTIFACTS_ROLE):
        author.unlisted = {role}
        with pytest.raises(RollbackAttackError, match=f"no longer lists {role}"):
            device.refresh(author.documents())


def test_6_a_role_that_is_not_listed_from_the_start(author: Author, device: Believer) -> None:
    for role in (DIGITS, "targets"):
        author.unlisted = {role}
        with pytest.raises(TrustError):
            device.refresh(author.documents())


def test_6_a_document_that_is_kept_back(author: Author, device: Believer) -> None:
    good = author.documents()
    with pytest.raises(TrustError, match=f"{DIGITS} is missing"):
        device.refresh(replace(good, delegated=good.delegated[:1]))


@pytest.mark.parametrize("rotated", [["timestamp"], ["snapshot"], ["timestamp", "snapshot"]])
def test_7_fast_forward_ends_with_the_keys_that_were_stolen(
    author: Author, device: Believer, rotated: list[str]
) -> None:
    author.documents()
    before = dict(author.versions)
    for role in rotated:
        author.versions[role] = VERSION_MAX
    device.refresh(author.assembled())
    author.versions = before
    with pytest.raises(RollbackAttackError):
        device.refresh(author.documents())
    root = author.rotate(**{role: [key(f"new {role}")] for role in rotated})
    assert V1 in device.refresh(author.documents(), [root]).targets
    assert device.floors.timestamp < VERSION_MAX
    assert device.floors.snapshot < VERSION_MAX


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", DIGITS])
def test_7_a_version_that_no_record_could_hold_is_refused(
    author: Author, device: Believer, role: str
) -> None:
    author.documents()
    author.versions[role] = VERSION_MAX
    device.refresh(author.assembled())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(device.floors), type=Floors) == device.floors
    author.versions[role] = VERSION_MAX + 1
    with pytest.raises(TrustError, match="63 bits"):
        device.refresh(author.assembled())


def test_7_a_rotation_of_online_keys_keeps_the_floor_of_targets(author: Author, device: Believer) -> None:
    author.documents()
    device.refresh(author.documents())
    root = author.rotate(timestamp=[key("t2")], snapshot=[key("s2")])
    author.versions["targets"] = 0
    with pytest.raises(RollbackAttackError, match="targets version 1"):
        device.refresh(author.documents(), [root])


def test_7_fast_forward_of_targets_ends_when_a_threshold_of_its_keys_is_gone(
    author: Author, device: Believer
) -> None:
    author.documents()
    ana = author.signers["targets"][0]
    author.versions["targets"] = VERSION_MAX
    device.refresh(author.assembled())
    author.versions["targets"] = 1
    dora, emil = key("dora"), key("emil")
    roots = [author.rotate(targets=[*author.signers["targets"][:2], dora])]
    with pytest.raises(RollbackAttackError):  # what ana and ben signed before would still be accepted
        device.refresh(author.documents(), roots)
    roots.append(author.rotate(targets=[ana, emil, key("fay")]))  # both that were stolen, in one step
    assert V1 in device.refresh(author.documents(), roots).targets


def test_7_fast_forward_of_a_family_ends_with_its_keys(author: Author, device: Believer) -> None:
    author.documents()
    author.versions[DIGITS] = VERSION_MAX
    device.refresh(author.assembled())
    author.versions[DIGITS] = 1
    with pytest.raises(RollbackAttackError, match=DIGITS):
        device.refresh(author.documents())
    author.signers[DIGITS] = [key("builder"), key("approver 2")]
    assert V1 in device.refresh(author.documents()).targets


def test_7_a_rotation_that_was_followed_before_never_lowers_a_floor_again(
    author: Author, device: Believer
) -> None:
    """The root document of a device can be lost after its record was written; the way to it is then taken twice."""
    first = device.root
    author.documents()
    root = author.rotate(timestamp=[key("t2")])
    old = author.assembled()
    for role in ("timestamp", "snapshot"):
        author.versions[role] += 1
    device.refresh(author.assembled(), [root])
    device.root = first
    with pytest.raises(RollbackAttackError, match="timestamp"):
        device.refresh(old, [root])


def test_7_a_floor_of_a_role_that_is_not_looked_at_stays(author: Author, device: Believer) -> None:
    device.refresh(author.documents())
    old = author.documents()
    device.refresh(author.documents())
    device.roles = (DIGITS,)
    device.refresh(author.documents())
    device.roles = None
    device.floors = replace(device.floors, timestamp=0, snapshot=0, targets=0)
    with pytest.raises(RollbackAttackError):
        device.refresh(old)
    assert {floor.role: floor.version for floor in device.floors.delegated} == {DIGITS: 4, ARTIFACTS_ROLE: 3}


def test_a_record_of_an_older_agent_keeps_its_floors() -> None:
    old = msgspec.msgpack.encode({"root": 3, "timestamp": 7, "snapshot": 6, "targets": 5})
    assert msgspec.msgpack.decode(old, type=Floors) == Floors(root=3, timestamp=7, snapshot=6, targets=5)
    new = Floors(delegated=(DelegatedFloor(role=DIGITS, version=4, keys=("a" * 16,)),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=Floors) == new


# --- 8 to 11: time, sets, sizes


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", DIGITS, ARTIFACTS_ROLE])
def test_8_a_frozen_repository_shows_when_any_role_expires(
    author: Author, device: Believer, role: str
) -> None:
    author.days |= dict.fromkeys(("timestamp", "snapshot"), 300.0)
    author.days[role] = 1
    if role == "root":
        author = Author()
        author.days |= {"root": 1, "timestamp": 300, "snapshot": 300}
        author.roots = []
        device.root = author.rotate()
    documents = author.documents()
    device.now_ms = NOW_MS + DAY_MS - 1000
    device.refresh(documents)
    device.now_ms = NOW_MS + DAY_MS
    with pytest.raises(ExpiredMetadataError) as caught:
        device.refresh(documents)
    assert caught.value.is_retryable


def test_9_expired_roots_on_the_way_never_keep_newer_metadata_out(author: Author, device: Believer) -> None:
    author.days["root"] = -400
    author.roots = []
    device.root = author.rotate()
    second = author.rotate()
    author.days["root"] = 365
    third = author.rotate()
    with pytest.raises(ExpiredMetadataError):
        device.refresh(author.documents(), [second])
    assert V1 in device.refresh(author.documents(), [second, third]).targets


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", DIGITS, ARTIFACTS_ROLE])
def test_9_what_was_verified_holds_until_the_first_document_ends(author: Author, role: str) -> None:
    author.days |= {"timestamp": 300, "snapshot": 300, DIGITS: 300, ARTIFACTS_ROLE: 300, role: 3}
    author.roots = []
    device = Believer(author.rotate())
    assert device.refresh(author.documents()).until_ms == NOW_MS + 3 * DAY_MS


def test_9_an_old_set_that_was_refused_leaves_nothing_behind(author: Author, device: Believer) -> None:
    stale = author.documents()
    device.now_ms = NOW_MS + 30 * DAY_MS
    with pytest.raises(ExpiredMetadataError):
        device.refresh(stale)
    author.days |= dict.fromkeys(("timestamp", "snapshot"), 60.0)
    assert V1 in device.refresh(author.documents()).targets


@pytest.mark.parametrize("role", ["snapshot", "targets", DIGITS, ARTIFACTS_ROLE])
def test_10_mix_and_match_of_two_publications(author: Author, device: Believer, role: str) -> None:
    old, new = author.documents(), author.documents()
    before = dict(old.delegated)
    if role in before:
        mixed = replace(
            new,
            delegated=tuple((name, before[name] if name == role else data) for name, data in new.delegated),
        )
    else:
        mixed = replace(new, **{role: getattr(old, role)})
    with pytest.raises(TrustError):
        device.refresh(mixed)


def test_10_the_online_keys_cannot_list_a_document_under_another_version(
    author: Author, device: Believer
) -> None:
    author.documents()
    targets = author.top_targets()
    author.versions["targets"] = 9
    with pytest.raises(TrustError, match="Expected targets v9, got v1"):
        device.refresh(author.assembled(targets=targets))


@pytest.mark.parametrize("role", ["root", DIGITS, ARTIFACTS_ROLE])
def test_11_endless_metadata_is_refused_before_it_is_parsed(
    author: Author, device: Believer, role: str
) -> None:
    good = author.documents()
    data = b" " * (METADATA_BYTES_MAX[role.partition(".")[0]] + 1)
    roots = [data] if role == "root" else []
    with pytest.raises(TrustError, match="allowed are"):
        device.refresh(replace(good, delegated=((role, data),) if not roots else ()), roots)


def test_11_endless_delegations_are_refused_before_they_are_parsed(author: Author, device: Believer) -> None:
    many = tuple((f"role-{number}", b"") for number in range(DELEGATED_MAX + 1))
    with pytest.raises(TrustError, match=f"allowed are {DELEGATED_MAX}"):
        device.refresh(replace(author.documents(), delegated=many))


@pytest.mark.parametrize("now_ms", [-(1 << 45), 0, 1 << 48, 1 << 62])
def test_28_no_clock_is_too_wrong(author: Author, device: Believer, now_ms: int) -> None:
    device.now_ms = now_ms
    if now_ms > NOW_MS:
        with pytest.raises(ExpiredMetadataError):
            device.refresh(author.documents())
    else:
        assert V1 in device.refresh(author.documents()).targets


def test_28_the_time_that_was_signed_only_grows_and_ends_with_its_document(
    author: Author, device: Believer
) -> None:
    for value, floor in [(5, 5), (3, 5), (NOW_MS, NOW_MS), (1 << 62, NOW_MS + 7 * DAY_MS)]:
        author.time_ms = value
        device.floors = replace(device.floors, time_ms=min(device.floors.time_ms, NOW_MS))
        assert device.refresh(author.documents()).floors.time_ms == floor
    nonsense: list[Any] = ["x", -1, -NOW_MS, True, None, []]
    for value in nonsense:
        author.time_ms = value
        device.floors = replace(device.floors, time_ms=0)
        assert device.refresh(author.documents()).floors.time_ms == 0


# --- 15 to 17: stolen and lost keys


def test_15_all_online_keys_cannot_name_a_release(author: Author, device: Believer) -> None:
    """Timestamp, snapshot and artifacts are stolen: everything that they may sign is tried."""
    author.documents()
    for path in ("releases/digits/evil.json", "releases/other/evil.json", "evil"):
        author.content[ARTIFACTS_ROLE] = [path]
        assert path not in device.refresh(author.documents()).targets
    stolen = [key(role) for role in ONLINE]
    author.content[DIGITS].append("releases/digits/evil.json")
    for role in ("targets", DIGITS):
        with pytest.raises(TrustError, match="signed by 0"):
            device.refresh(author.assembled(**resigned(author, role, stolen)))


def test_16_one_of_two_release_keys_is_stolen_and_replaced(author: Author, device: Believer) -> None:
    author.documents()
    author.content[DIGITS].append("releases/digits/evil.json")
    with pytest.raises(TrustError, match="signed by 1/2"):
        device.refresh(author.assembled(**resigned(author, DIGITS, [key("builder"), key("mallory")])))
    author.content[DIGITS].pop()
    author.signers[DIGITS] = [key("builder 2"), key("approver")]
    assert V1 in device.refresh(author.documents()).targets
    with pytest.raises(TrustError, match="signed by 1/2"):  # the old pair no longer counts
        device.refresh(author.assembled(**resigned(author, DIGITS, [key("builder"), key("approver")])))


def test_17_one_of_three_root_keys_is_lost_and_replaced(author: Author, device: Believer) -> None:
    ana, ben, _ = author.signers["root"]
    author.signers["root"] = [ana, ben, key("dora")]
    second = author.root(by=[ana, ben])
    author.roots.append(second)
    assert V1 in device.refresh(author.documents(), [second]).targets
    third = author.root(by=[key("cem"), ana])  # the lost key, found by somebody
    with pytest.raises(TrustError, match="signed by 1/2"):
        device.refresh(author.documents(), [third])


# --- 18 to 20: chains


@pytest.mark.parametrize("version", [1, 3, VERSION_MAX])
def test_18_a_root_that_is_not_the_next_version(author: Author, device: Believer, version: int) -> None:
    with pytest.raises(TrustError, match="Expected root version 2"):
        device.refresh(author.documents(), [author.root(author.signers["root"], version=version)])


def test_19_fifty_rotations_of_every_key_are_followed(author: Author, device: Believer) -> None:
    for year in range(50):
        people = [key(f"{name} {year}") for name in "abc"]
        author.rotate(root=people, targets=people, timestamp=[key(f"t {year}")], snapshot=[key(f"s {year}")])
    assert V1 in device.refresh(author.documents(), author.roots[1:]).targets
    assert device.floors.root == 51


def test_19_a_chain_without_end_is_not_followed_for_ever(author: Author, device: Believer) -> None:
    one = [key("a")]
    author.thresholds["root"] = 1
    author.rotate(root=one)
    device.root, device.floors = author.roots[-1], Floors(root=2)
    for _ in range(ROOT_ROTATIONS_MAX + 1):
        author.rotate()
    device.refresh(author.documents(), author.roots[2:])
    assert device.floors.root == 2 + ROOT_ROTATIONS_MAX


@pytest.mark.parametrize(
    "path",
    [
        "releases/other/v1.json",
        "releases/digits/../other/v1.json",
        "releases/digits//v1.json",
        "/releases/digits/v1.json",
        "releases\\digits\\v1.json",
        "releases/digits/deeper/v1.json",
        "files/" + "0" * 64,
        "../../etc/passwd",
        "",
    ],
)
def test_20_a_family_cannot_speak_for_another_nor_for_any_other_path(
    author: Author, device: Believer, path: str
) -> None:
    author.content[DIGITS] = [path, V1]
    assert set(device.refresh(author.documents()).targets) == {V1}


def test_20_a_terminating_delegation_ends_the_search(author: Author, device: Believer) -> None:
    second = "releases.later"
    author.paths[second] = author.paths[DIGITS]
    author.signers[second] = [key("later")]
    author.content |= {second: ["releases/digits/v2.json"]}
    assert set(device.refresh(author.documents()).targets) == {V1}
    author.terminating = False
    assert set(device.refresh(author.documents()).targets) == {V1, "releases/digits/v2.json"}
    author.content[second] = [V1]  # listed twice: the first one counts
    assert device.refresh(author.documents()).targets[V1].length == len(DIGITS)
    device.roles = (second,)  # what the first one says is not known then
    assert device.refresh(author.documents()).targets == {}


def test_20_targets_itself_comes_before_its_delegations(author: Author, device: Believer) -> None:
    author.content["targets"] = [V1]
    assert device.refresh(author.documents()).targets[V1].length == len(b"content")


def test_20_other_families_are_neither_needed_nor_believed(author: Author, device: Believer) -> None:
    other = "releases.speech"
    author.paths[other] = ["releases/speech/*"]
    author.signers[other] = [key("other")]
    author.content[other] = ["releases/speech/v1.json"]
    device.roles = (DIGITS, ARTIFACTS_ROLE)
    good = author.documents()
    assert set(device.refresh(good).targets) == {V1}
    without = replace(good, delegated=tuple(pair for pair in good.delegated if pair[0] != other))
    assert set(device.refresh(without).targets) == {V1}


def test_20_a_document_of_a_role_to_which_nobody_delegates_is_ignored(
    author: Author, device: Believer
) -> None:
    good = author.documents()
    extra = ("releases.evil", author.targets(DIGITS))
    assert set(device.refresh(replace(good, delegated=(*good.delegated, extra))).targets) == {V1}


# --- 25: parsers


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 200_000,
        b'{"signed":' * 3_000,
        b'{"signed": {"version": ' + b"9" * 4_000 + b"}}",
        b'{"signed": {"_type": "targets"}, "signatures": 1e999}',
        b"\xff\xfe{}",
        b"null",
        b"\x00" * 100,
    ],
)
@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", DIGITS])
def test_25_parser_bombs_are_refused_and_never_crash(
    author: Author, device: Believer, role: str, bomb: bytes
) -> None:
    good = author.documents()
    if role == "root":
        with pytest.raises(TrustError):
            device.refresh(good, [bomb])
        with pytest.raises(TrustError):
            check_root(bomb)
        return
    with pytest.raises(TrustError):
        device.refresh(
            replace(good, delegated=((role, bomb),)) if role == DIGITS else replace(good, **{role: bomb})
        )
    with pytest.raises(TrustError):  # and if the keys above it vouch for it
        device.refresh(author.assembled(**{role: bomb}))


@pytest.mark.parametrize(
    "field", ["targets", "delegations", "version", "expires", "spec_version", "_type", "extra"]
)
def test_25_signed_nonsense_is_refused_and_never_crashes(
    author: Author, device: Believer, field: str
) -> None:
    author.documents()
    values: list[Any] = [None, -1, 1.5, [], {}, "x", 1 << 70, True]
    for value in values:
        data = json.loads(author.targets(DIGITS))
        data["signed"][field] = value
        with contextlib.suppress(TrustError):
            verified = device.refresh(author.assembled(**{DIGITS: json.dumps(data).encode()}))
            assert value is None, f"{field} = {value!r} was believed"  # python-tuf fills in what was signed
            assert verified.targets.keys() == {V1}


def test_a_set_that_verifies_twice_is_the_same_twice(author: Author, device: Believer) -> None:
    documents = author.documents()
    assert device.refresh(documents) == verify(device.root, documents, device.floors, NOW_MS)
