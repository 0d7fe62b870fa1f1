import random
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from protocol.constants import METADATA_BYTES_MAX
from protocol.errors import ExpiredMetadataError, RollbackAttackError, TrustError
from protocol.trust import Documents, Floors, check_root, verify
from tests.device.harness import START_MS, Cache, model_bytes

DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", model_bytes(1, 1000))
    cache.publish("v2", model_bytes(2, 1000))
    return cache


def documents(cache: Cache) -> Documents:
    return cache.repository.documents


def test_signed_targets_are_believed_and_floors_follow(cache: Cache) -> None:
    verified = verify(cache.root, documents(cache), Floors(), START_MS)
    assert "releases/digits/v2.json" in verified.targets
    versions = {floor.role: floor.version for floor in verified.floors.delegated}
    assert versions == {"artifacts": 3, "director": 1, "releases.digits": 2}
    assert verified.floors.time_ms == START_MS
    top = replace(verified.floors, delegated=(), time_ms=0)
    assert top == Floors(root=1, timestamp=3, snapshot=3, targets=2)
    assert verify(cache.root, documents(cache), verified.floors, START_MS) == verified


def test_flipping_any_byte_of_any_document_never_changes_what_is_believed(cache: Cache) -> None:
    """Every byte of every document, one random flip each: refused, or (white space and the like) the same targets."""
    rng = random.Random(11)
    good = verify(cache.root, documents(cache), Floors(), START_MS)
    changed = 0
    for role, at in _positions(documents(cache)):
        data = bytearray(getattr(documents(cache), role))
        data[at] ^= rng.randrange(1, 256)
        try:
            verified = verify(
                cache.root, replace(documents(cache), **{role: bytes(data)}), Floors(), START_MS
            )
        except TrustError:
            changed += 1
            continue
        assert verified.targets == good.targets, f"{role} byte {at}"
        assert verified.floors == good.floors
    assert changed > 1000


def test_flipping_any_byte_of_the_root_never_lets_another_key_in(cache: Cache) -> None:
    rng = random.Random(12)
    stranger = Cache()
    stranger.publish("v1", model_bytes(9, 1000))
    for at in range(len(cache.root)):
        data = bytearray(cache.root)
        data[at] ^= rng.randrange(1, 256)
        with pytest.raises(TrustError):
            verify(bytes(data), documents(stranger), Floors(), START_MS)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_version_below_its_floor_is_refused(cache: Cache, role: str) -> None:
    floors = replace(Floors(), **{role: 4})
    with pytest.raises(RollbackAttackError):
        verify(cache.root, documents(cache), floors, START_MS)


def test_an_expired_document_is_refused_and_says_so(cache: Cache) -> None:
    with pytest.raises(ExpiredMetadataError):
        verify(cache.root, documents(cache), Floors(), START_MS + 8 * DAY_MS)


def test_documents_of_two_publications_do_not_mix(cache: Cache) -> None:
    old = documents(cache)
    cache.publish("v3", model_bytes(3, 1000))
    new = documents(cache)
    for role in ("snapshot", "delegated"):
        with pytest.raises(TrustError):
            verify(cache.root, replace(new, **{role: getattr(old, role)}), Floors(), START_MS)


def test_documents_of_a_stranger_are_refused(cache: Cache) -> None:
    stranger = Cache()
    stranger.publish("v9", model_bytes(9, 1000))
    with pytest.raises(TrustError):
        verify(cache.root, documents(stranger), Floors(), START_MS)
    with pytest.raises(TrustError):
        verify(cache.root, replace(documents(cache), roots=(stranger.root,)), Floors(), START_MS)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_document_over_its_limit_is_refused_before_it_is_parsed(cache: Cache, role: str) -> None:
    data = getattr(documents(cache), role) + b" " * METADATA_BYTES_MAX[role]
    with pytest.raises(TrustError, match="allowed are"):
        verify(cache.root, replace(documents(cache), **{role: data}), Floors(), START_MS)


def test_the_start_of_trust_must_prove_itself(cache: Cache) -> None:
    assert check_root(cache.root) == 1
    for bad in (b"", b"{}", cache.root[:-1], documents(cache).timestamp):
        with pytest.raises(TrustError):
            check_root(bad)


def _positions(good: Documents) -> Iterator[tuple[str, int]]:
    for role in ("timestamp", "snapshot", "targets"):
        for at in range(len(getattr(good, role))):
            yield role, at
