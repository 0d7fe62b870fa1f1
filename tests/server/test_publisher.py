"""Everything that is signed is judged by what devices judge with."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # public, but without __all__

from protocol.constants import METADATA_BYTES_MAX
from protocol.errors import (
    ExpiredMetadataError,
    MissingKeyError,
    RequestError,
    RollbackAttackError,
    TrustError,
)
from protocol.ids import Digest, Family, Version, digest_of
from protocol.release import delta_target, file_target, release_target
from protocol.trust import Documents, Floors, Target, Verified, verify
from server.ports import Repository
from server.releases.catalog import blob_target
from server.releases.metadata import Draft, expires, sign, snapshot_of, timestamp_of
from server.releases.publisher import ROLES, Publisher
from tests.server.samples import DAY_MS, NOW_MS, stored


def _keys(first: int = 1) -> dict[str, bytes]:
    return {role: _pem(bytes([first + place]) * 32) for place, role in enumerate(ROLES)}


def _pem(secret: bytes) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(secret)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _file(text: str) -> Target:
    blob = stored(text.encode() * 10_000)
    return blob_target(file_target(blob.digest), blob)


def _device(
    repository: Repository, root: bytes | None = None, floors: Floors | None = None, now_ms: int = NOW_MS
) -> Verified:
    """What a device makes of it that trusts the first root, or `root`."""
    documents = msgspec.structs.replace(repository.documents, roots=repository.roots[1:])
    return verify(root or repository.roots[0], documents, floors or Floors(), now_ms)


def _release(family: str, version: str) -> Target:
    return blob_target(
        release_target(Family(family), Version(version)), stored(f"{family} {version}".encode())
    )


def _versions(verified: Verified) -> dict[str, int]:
    floors = verified.floors
    top = {name: getattr(floors, name) for name in ("root", "timestamp", "snapshot", "targets")}
    return top | {floor.role: floor.version for floor in floors.delegated}


@pytest.fixture(scope="module")
def publisher() -> Publisher:
    return Publisher(_keys())


@pytest.fixture(scope="module")
def empty(publisher: Publisher) -> Repository:
    return publisher.create(NOW_MS).repository


def test_a_device_accepts_a_new_repository_without_targets(empty: Repository) -> None:
    verified = _device(empty)
    assert verified.targets == {}
    assert _versions(verified) == {
        "root": 1,
        "timestamp": 1,
        "snapshot": 1,
        "targets": 1,
        "artifacts": 1,
        "director": 1,
    }


def test_a_device_gets_the_targets_that_were_published(publisher: Publisher, empty: Repository) -> None:
    target = _file("one")
    published = publisher.publish(empty, [target], (), NOW_MS)
    verified = _device(published.repository)
    assert verified.targets == {target.path: target} == published.targets
    versions = {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 1, "artifacts": 2, "director": 1}
    assert _versions(verified) == versions


def test_the_first_release_of_a_family_gets_a_role_of_its_own(
    publisher: Publisher, empty: Repository
) -> None:
    release = _release("digits", "v1")
    published = publisher.publish(empty, [release, _file("one")], (), NOW_MS)
    verified = _device(published.repository)
    assert verified.targets[release.path] == release
    assert _versions(verified)["releases.digits"] == 1
    again = publisher.publish(published.repository, [_release("digits", "v2")], (), NOW_MS)
    assert _versions(_device(again.repository))["targets"] == _versions(verified)["targets"]


def test_a_family_without_keys_is_refused_with_advice(empty: Repository) -> None:
    keys = _keys()
    del keys["releases"]
    with pytest.raises(RequestError, match="releases of digits") as caught:
        Publisher(keys).publish(empty, [_release("digits", "v1")], (), NOW_MS)
    assert "keys assign releases.digits" in caught.value.hint


@pytest.fixture
def before() -> tuple[Publisher, Repository]:
    """A repository as it was made before targets delegated anything."""
    keys = {name: pem for name, pem in _keys().items() if name not in {"artifacts", "releases"}}
    publisher = Publisher(keys)
    root = Publisher(_keys()).create(NOW_MS).repository.roots[0]
    signer = publisher._named
    targets = sign("targets", Targets(1, "1.0.31", expires("targets", NOW_MS)), [signer["targets"]])
    snapshot = sign("snapshot", snapshot_of(1, {"targets": targets}, NOW_MS), [signer["snapshot"]])
    timestamp = sign("timestamp", timestamp_of(1, snapshot, NOW_MS), [signer["timestamp"]])
    documents = Documents(timestamp=timestamp, snapshot=snapshot, targets=targets)
    return publisher, Repository(roots=(root,), documents=documents)


def test_a_repository_from_before_delegations_goes_on_as_it_is(before: tuple[Publisher, Repository]) -> None:
    publisher, repository = before
    added = [_release("digits", "v1"), _file("one")]
    published = publisher.publish(repository, added, (), NOW_MS)
    verified = _device(published.repository)
    assert set(verified.targets) == {target.path for target in added}
    assert _versions(verified) == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_a_repository_from_before_delegations_moves_to_them(before: tuple[Publisher, Repository]) -> None:
    publisher, repository = before
    added = [_release("digits", "v1"), _file("one")]
    repository = publisher.publish(repository, added, (), NOW_MS).repository
    seen = _device(repository)
    publisher = Publisher(_keys())

    def change(draft: Draft) -> None:
        draft.assign("artifacts", [publisher._named["artifacts"].public_key], 1)
        draft.assign("releases.digits", [publisher._named["releases"].public_key], 1)

    documents = publisher.change(repository, {}, change, NOW_MS)
    moved = publisher.submit(repository, documents, (), NOW_MS)
    assert moved.targets == seen.targets
    assert _versions(_device(moved.repository, floors=seen.floors)).keys() >= {"artifacts", "releases.digits"}
    targets = Draft(moved.repository, {})
    assert targets.listed("targets") == set()


def test_a_family_whose_document_has_expired_is_left_out_and_stops_no_other(empty: Repository) -> None:
    publisher, keys = Publisher(_keys()), _keys()
    del keys["releases"]
    both = publisher.publish(empty, [_release("digits", "v1")], (), NOW_MS).repository
    later_ms = NOW_MS + 80 * DAY_MS
    both = publisher.publish(both, [_release("speech", "v1")], (), later_ms).repository
    now_ms = NOW_MS + 91 * DAY_MS
    published = Publisher(keys).refresh(Publisher(keys).refresh(both, now_ms).repository, now_ms)
    assert set(published.targets) == {"releases/speech/v1.json"}


def test_a_retired_target_is_gone_and_the_others_stay(publisher: Publisher, empty: Repository) -> None:
    one, two = _file("one"), _file("two")
    both = publisher.publish(empty, [one, two], (), NOW_MS).repository
    left = publisher.publish(both, (), [one.path, "files/unknown"], NOW_MS)
    assert list(left.targets) == [two.path]


def test_an_older_repository_is_refused_by_a_device_that_saw_a_newer_one(
    publisher: Publisher, empty: Repository
) -> None:
    newer = publisher.publish(empty, [_file("one")], (), NOW_MS).repository
    with pytest.raises(RollbackAttackError):
        _device(empty, floors=_device(newer).floors)


def test_a_repository_that_other_keys_signed_is_refused(empty: Repository) -> None:
    stranger = Publisher(_keys(first=100)).create(NOW_MS).repository
    with pytest.raises(TrustError):
        _device(stranger, root=empty.roots[0])


@pytest.mark.parametrize("document", ["timestamp", "snapshot", "delegated"])
def test_a_document_of_another_publication_is_refused(
    publisher: Publisher, empty: Repository, document: str
) -> None:
    newer = publisher.publish(empty, [_file("one")], (), NOW_MS).repository
    mixed = msgspec.structs.replace(newer.documents, **{document: getattr(empty.documents, document)})
    with pytest.raises(TrustError):
        _device(msgspec.structs.replace(newer, documents=mixed), floors=Floors())


def test_a_document_with_any_changed_byte_is_refused_or_means_the_same(
    publisher: Publisher, empty: Repository
) -> None:
    good = publisher.publish(empty, [_file("one")], (), NOW_MS).repository
    expected = _device(good).targets
    for name in ("timestamp", "snapshot", "targets"):
        data = getattr(good.documents, name)
        for at in range(0, len(data), 7):
            flipped = data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]
            documents = msgspec.structs.replace(good.documents, **{name: flipped})
            try:
                verified = _device(msgspec.structs.replace(good, documents=documents))
            except TrustError:
                continue
            assert verified.targets == expected, (name, at)


def test_metadata_expires(empty: Repository) -> None:
    _device(empty, now_ms=NOW_MS + 7 * DAY_MS - 1000)
    with pytest.raises(ExpiredMetadataError):
        _device(empty, now_ms=NOW_MS + 8 * DAY_MS)


def test_nothing_is_signed_again_before_it_is_due(publisher: Publisher, empty: Repository) -> None:
    assert publisher.refresh(empty, NOW_MS + 4 * DAY_MS).repository == empty


def test_each_role_is_signed_again_when_its_time_has_come(publisher: Publisher, empty: Repository) -> None:
    cases = [
        (5, {"timestamp"}),
        (10, {"timestamp", "snapshot"}),
        (61, {"timestamp", "snapshot", "artifacts", "director"}),
        (244, {"timestamp", "snapshot", "artifacts", "director", "targets", "root"}),
    ]
    before = _versions(_device(empty))
    for days, changed in cases:
        now_ms = NOW_MS + days * DAY_MS
        after = publisher.refresh(empty, now_ms)
        versions = _versions(_device(after.repository, now_ms=now_ms))
        assert {role for role, version in versions.items() if version != before[role]} == changed
        assert after.refresh_ms > now_ms


def test_a_root_that_ends_soon_is_followed_by_one_that_old_devices_accept(
    publisher: Publisher, empty: Repository
) -> None:
    now_ms = NOW_MS + 300 * DAY_MS
    after = publisher.refresh(empty, now_ms).repository
    assert len(after.roots) == 2
    much_later = now_ms + 6 * DAY_MS
    assert _device(after, now_ms=much_later).floors.root == 2


def test_the_targets_survive_every_refresh(publisher: Publisher, empty: Repository) -> None:
    target = _file("one")
    repository = publisher.publish(empty, [target], (), NOW_MS).repository
    for days in range(0, 400, 6):
        repository = publisher.refresh(repository, NOW_MS + days * DAY_MS).repository
    assert _device(repository, now_ms=NOW_MS + 396 * DAY_MS).targets == {target.path: target}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "artifacts"])
def test_a_missing_key_is_named(empty: Repository, role: str) -> None:
    keys = _keys()
    del keys[role]
    with pytest.raises(MissingKeyError, match=role):
        Publisher(keys).publish(empty, [_file("one")], (), NOW_MS)


def test_the_root_key_may_be_away(empty: Repository) -> None:
    keys = _keys()
    del keys["root"]
    publisher = Publisher(keys)
    publisher.publish(empty, [_file("one")], (), NOW_MS)
    now_ms = NOW_MS + 300 * DAY_MS
    after = publisher.refresh(empty, now_ms)
    assert len(after.repository.roots) == 1
    assert after.refresh_ms > now_ms  # or it would sign again and again
    assert publisher.refresh(after.repository, now_ms) == after


@pytest.mark.parametrize("pem", [b"", b"no key", _pem(b"k" * 32)[:60]])
def test_a_key_file_that_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(MissingKeyError, match="targets"):
        Publisher(_keys() | {"targets": pem})


def test_a_key_that_the_root_does_not_name_cannot_publish(empty: Repository) -> None:
    keys = _keys() | {"artifacts": _pem(b"x" * 32)}
    with pytest.raises(MissingKeyError, match="artifacts"):
        Publisher(keys).publish(empty, [_file("one")], (), NOW_MS)


def test_metadata_beyond_its_limit_is_refused_with_advice(publisher: Publisher, empty: Repository) -> None:
    many = [
        Target(
            delta_target(digest_of(b"%d" % number), digest_of(b"r")), 1, Digest("0" * 64), _file("x").custom
        )
        for number in range(900)
    ]
    with pytest.raises(RequestError, match=str(METADATA_BYTES_MAX["targets"])) as caught:
        publisher.publish(empty, many, (), NOW_MS)
    assert "retire" in caught.value.hint


def test_a_stored_document_that_is_damaged_is_an_error_and_no_crash(
    publisher: Publisher, empty: Repository
) -> None:
    for broken in (b"", b"{}", empty.documents.snapshot):
        documents = Documents(timestamp=empty.documents.timestamp, snapshot=b"x", targets=broken)
        with pytest.raises(TrustError):
            publisher.publish(msgspec.structs.replace(empty, documents=documents), (), (), NOW_MS)
