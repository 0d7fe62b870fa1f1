"""When a wish counts that somebody has signed who may wish: anew, again, late, or by somebody who may no longer (SPEC section 8.4).

Who may wish is for `test_director.py`.
"""

from itertools import pairwise

import pytest

from device.assignments import LOOK_PERIOD_MS
from device.effects import Subscribe
from device.journal import Director, UpdateRecord
from device.states import State
from protocol.constants import DESIRED_LEAP_MAX
from protocol.director import DESIRED_LIFE_MS
from protocol.ids import digest_of
from protocol.messages import encode_message
from server.releases.publisher import Publisher
from server.releases.signers import make_key
from tests.device.harness import DEVICE, START_MS, TOPICS, Cache, Device, model_bytes
from tests.device.test_director import (
    added,
    alarm,
    ask_again,
    forged_by_a_stranger,
    looks,
    online,
    tell,
    wish,
    without_director,
)
from tests.device.test_trust_agent import published_again, reason, rotated

DAY_MS = 86_400_000
V1, V2, V3 = (model_bytes(seed, 70_000) for seed in (1, 2, 3))


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    cache.publish("v2", V2)
    return cache


def downloading(device: Device, payload: bytes) -> None:
    device.deliver(TOPICS.desired(DEVICE), payload)
    device.settle(until=lambda: device.state is State.DOWNLOADING)


def update(device: Device) -> UpdateRecord:
    """As the agent knows it, written down or not."""
    found = device.agent.record.update
    assert found is not None
    return found


def begun(device: Device) -> int:
    return sum("requested syncing" in row for row in device.rows)


def second_key(cache: Cache) -> Publisher:
    """Another key that the metadata names director, beside the first; what it returns signs with nothing else."""
    private, public = make_key(None)
    cache.publisher = Publisher(dict(cache.publisher._named) | {"second": private})
    added(cache, public)
    return Publisher({"second": private})


def sealed_by(signer: Publisher, cache: Cache, version: str, sequence: int, now_ms: int) -> bytes:
    director = signer.director(cache.repository)
    return director.seal(TOPICS.desired(DEVICE), wish(version, sequence), now_ms)


# --- the same wish again


def test_a_wish_that_comes_again_does_not_begin_the_update_again(cache: Cache) -> None:
    device = online(cache)
    payload = cache.desire("v2")
    downloading(device, payload)
    tell(device, payload)
    device.settle()
    assert (device.answer(), begun(device)) == (digest_of(V2), 1)


def test_a_wish_that_comes_again_without_a_signature_does_not_begin_the_update_again() -> None:
    cache = without_director()
    device = online(cache, has_looked=False)
    tell(device, encode_message(wish("v1", 1)))
    device.settle()
    assert device.record.director == Director(is_named=False)
    payload = cache.desire("v2", sequence=2)
    downloading(device, payload)
    tell(device, payload)
    device.settle()
    assert (device.answer(), begun(device), update(device).expires_ms) == (digest_of(V2), 1, None)


def test_a_wish_that_is_signed_anew_may_be_acted_upon_for_longer_and_its_older_copy_takes_nothing_away(
    cache: Cache,
) -> None:
    for topic in [topic for topic in cache.retained if digest_of(V2) in topic]:
        del cache.retained[topic]  # so that the update waits
    device = online(cache)
    older = cache.desire("v2")
    downloading(device, older)
    assert update(device).expires_ms == START_MS + DESIRED_LIFE_MS
    cache.server_ms += 2 * DAY_MS
    tell(device, cache.desire_again())
    assert update(device).expires_ms == cache.server_ms + DESIRED_LIFE_MS
    tell(device, older)
    assert update(device).expires_ms == cache.server_ms + DESIRED_LIFE_MS
    assert device.state is State.DOWNLOADING


def test_a_wish_lives_as_long_as_the_key_says_that_signed_it_last(cache: Cache) -> None:
    """Keys are exchanged: what the one that goes has promised does not prolong what the other one signs."""
    second = second_key(cache)
    device = online(cache)
    downloading(device, cache.desire("v2", sequence=5))
    first = update(device).signer
    tell(device, sealed_by(second, cache, "v2", 5, START_MS - DAY_MS))
    assert update(device).signer not in (first, b"")
    assert update(device).expires_ms == START_MS - DAY_MS + DESIRED_LIFE_MS


def test_a_wish_that_another_key_signs_counts_for_that_key_too(cache: Cache) -> None:
    """Else it would be news again as soon as the first key is gone."""
    second = second_key(cache)
    device = online(cache)
    downloading(device, cache.desire("v2", sequence=5))
    tell(device, sealed_by(second, cache, "v2", 5, START_MS))
    director = device.agent.record.director
    assert director is not None
    assert [key.sequence for key in director.keys] == [5, 5]
    device.settle()
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V2), 5)


def test_a_wish_whose_update_is_over_changes_nothing_whoever_signs_it_anew(cache: Cache) -> None:
    second = second_key(cache)
    device = online(cache)
    downloading(device, cache.desire("v2", sequence=5))
    device.settle()
    assert (device.answer(), update(device).outcome) == (digest_of(V2), "committed")
    before = device.agent.record
    for payload in (cache.desire_again(), sealed_by(second, cache, "v2", 5, START_MS + DAY_MS)):
        tell(device, payload)
        assert device.agent.record == before


# --- late, or signed by somebody who may no longer


def test_a_wish_that_waits_for_a_trial_is_dropped_once_the_metadata_names_another_director(
    cache: Cache,
) -> None:
    cache.publish("v3", V3)
    device = online(cache)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.TRIAL)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v3"))
    rotated(cache, "director")
    device.deliver(TOPICS.desired(DEVICE), forged_by_a_stranger(cache))  # makes the device look
    device.settle()
    assert (device.answer(), begun(device)) == (digest_of(V2), 1)
    assert (device.record.desired_sequence, alarm(device)) == (0, "trust.director")


def test_the_number_of_a_wish_that_has_expired_is_free_for_the_same_wish_signed_anew(cache: Cache) -> None:
    """Also after the device has given up: the server signs the same wish anew, and no other."""
    device = online(cache)
    published_again(cache, START_MS + DESIRED_LIFE_MS)
    device.now_ms = START_MS + DESIRED_LIFE_MS
    cache.server_ms = START_MS
    tell(device, cache.desire("v2", sequence=3))
    device.settle()
    assert (device.state, reason(device), update(device).outcome) == (State.FAILED, "trust.expired", "failed")
    assert device.record.desired_sequence == 2
    cache.server_ms = device.now_ms
    published_again(cache, device.now_ms)
    tell(device, cache.desire_again())
    device.settle()
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V2), 3)


def test_a_wish_that_has_expired_and_is_signed_anew_before_the_device_gives_up_counts_as_before(
    cache: Cache,
) -> None:
    device = online(cache)
    cache.server_ms = START_MS - DESIRED_LIFE_MS
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2", sequence=3))
    device.settle(until=lambda: device.state is State.FAILED)
    assert device.agent.record.desired_sequence == 2
    cache.server_ms = device.now_ms
    tell(device, cache.desire_again())
    assert device.agent.record.desired_sequence == 3
    tell(device, cache.sealed(wish("v1", 3)))  # as old as the one that counts
    device.settle()
    assert (device.answer(), begun(device)) == (digest_of(V2), 1)


@pytest.mark.parametrize(("step", "is_taken"), [(0, False), (1, True), (DESIRED_LEAP_MAX, True)])
def test_a_wish_must_be_higher_than_the_last_one_by_no_more_than_a_leap(
    cache: Cache, step: int, is_taken: bool
) -> None:
    device = online(cache)
    tell(device, cache.sealed(wish("v1", 7)))
    tell(device, cache.sealed(wish("v2", 7 + step)))
    device.settle()
    assert device.answer() == digest_of(V2 if is_taken else V1)
    tell(device, cache.sealed(wish("v1", device.record.desired_sequence + DESIRED_LEAP_MAX + 1)))
    device.settle()
    assert device.record.desired_sequence == 7 + step


# --- a device that has never looked


def test_a_first_wish_is_written_down_as_proven_before_anything_is_fetched_for_it(cache: Cache) -> None:
    """A power cut must not make an older wish of the same director look new."""
    device = online(cache, has_looked=False)
    payload = cache.desire("v2", sequence=5)
    device.deliver(TOPICS.desired(DEVICE), payload)
    device.settle(until=lambda: asks_for_chunks(device))
    written = device.record.update
    assert written is not None
    assert (written.unproven, written.expires_ms) == (None, START_MS + DESIRED_LIFE_MS)
    assert device.record.director is not None
    assert [(key.key, key.sequence) for key in device.record.director.keys] == [(written.signer, 5)]
    assert device.record.desired_sequence == 5


def asks_for_chunks(device: Device) -> bool:
    return any(
        isinstance(effect, Subscribe) and any("/b/" in topic for topic in effect.filters)
        for effect in device.effects
    )


def test_a_first_wish_that_has_expired_is_not_acted_upon(cache: Cache) -> None:
    device = online(cache, has_looked=False)
    cache.server_ms = START_MS - DESIRED_LIFE_MS
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2", sequence=3))
    device.settle(until=lambda: device.state is State.FAILED)
    assert (reason(device), device.record.desired_sequence) == ("trust.expired", 2)
    cache.server_ms = device.now_ms
    tell(device, cache.desire_again())
    device.settle()
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V2), 3)


def test_a_first_wish_that_is_signed_is_refused_where_the_metadata_names_no_director() -> None:
    """Wishes are not signed there (8.4, 4): nobody knows whose signature it is."""
    cache = without_director()
    device = online(cache, has_looked=False)
    tell(device, Cache().sealed(wish("v2", 5)))
    device.settle()
    assert (device.state, reason(device), device.answer()) == (
        State.REJECTED,
        "trust.director",
        digest_of(V1),
    )
    assert device.record.desired_sequence == 0
    cache.desire("v2", sequence=1)
    ask_again(device)
    assert device.answer() == digest_of(V2)


def test_a_first_wish_without_a_signature_never_expires_where_the_metadata_names_no_director() -> None:
    cache = without_director()
    device = online(cache, has_looked=False)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: asks_for_chunks(device))
    assert (update(device).unproven, update(device).expires_ms) == (None, None)
    device.settle()
    assert device.answer() == digest_of(V2)


# --- looks for the sake of a wish


def without_metadata(cache: Cache) -> dict[str, bytes]:
    """Take the documents away from a broker; returns them."""
    taken = {topic: data for topic, data in cache.retained.items() if "/md/" in topic}
    for topic in taken:
        del cache.retained[topic]
    return taken


def silent(cache: Cache) -> Device:
    """A device that looks in vain: no server answers, and the broker has no documents."""
    device = online(cache)
    device.answer_requests = None
    return device


def test_a_look_that_was_cut_short_begins_anew_as_soon_as_it_can(cache: Cache) -> None:
    device = silent(cache)
    rotated(cache, "director")
    payload, documents = cache.desire("v2"), without_metadata(cache)
    begun_ms = device.now_ms
    for _ in range(3):
        tell(device, payload)
        device.disconnect()
        device.connect()
    cache.retained |= documents
    device.settle()
    assert (device.answer(), looks(device) > 3) == (digest_of(V2), True)
    assert device.now_ms - begun_ms < LOOK_PERIOD_MS


def test_a_look_that_nobody_answered_is_repeated_soon(cache: Cache) -> None:
    device = silent(cache)
    rotated(cache, "director")
    payload, documents = cache.desire("v2"), without_metadata(cache)
    tell(device, payload)
    device.settle(until=lambda: alarm(device) == "transport.no_metadata")
    cache.retained |= documents
    back_ms = device.now_ms
    device.settle()
    assert (device.answer(), alarm(device)) == (digest_of(V2), "")
    assert device.now_ms - back_ms < LOOK_PERIOD_MS // 10


def test_looks_that_nobody_answers_become_rare(cache: Cache) -> None:
    """Who keeps the documents back and forges a wish costs a device not much more than who only forges."""
    device = silent(cache)
    without_metadata(cache)
    tell(device, forged_by_a_stranger(cache))
    begun_ms = device.now_ms
    times: list[int] = []

    def is_over() -> bool:
        if looks(device) > len(times):
            times.append(device.now_ms)
        return device.now_ms > begun_ms + DAY_MS

    device.settle(until=is_over, deadlines=10_000)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert min(waits) < LOOK_PERIOD_MS // 2
    assert sum(waits[-20:]) / 20 > LOOK_PERIOD_MS * 2 // 3
