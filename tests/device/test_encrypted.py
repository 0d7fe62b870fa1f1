"""Encrypted releases on a device: the real agent, real keys, and a server that gives them, does not, or gives others."""

import io
import random
from collections import Counter
from collections.abc import Callable

import pytest

from device import decoding, effects
from device.ports import OpenedKey
from device.states import State
from protocol.chunks import encode_chunk
from protocol.delta import undo_journal
from protocol.delta.needs import in_place_needs
from protocol.delta.writer import make_delta
from protocol.encryption import (
    ContentCipher,
    content_key_name,
    make_content_key,
    unwrap_key,
    wrap_key,
)
from protocol.identity import key_digest, make_key
from protocol.ids import DeviceId, Digest, digest_of
from protocol.messages import ChunkRequest, KeyAnswer, KeyRequest, WrappedKey, decode_request, encode_message
from protocol.release import (
    ArtifactCustom,
    Encryption,
    delta_target,
    file_target,
)
from protocol.tensors import BytesSource
from protocol.trust import Target
from simulator.power import PowerCutError
from tests.device.harness import (
    DEVICE,
    FLEET,
    SEGMENT_BYTES,
    START_MS,
    TOPICS,
    Cache,
    Device,
    fine_tuned,
    model_bytes,
)

V1 = model_bytes(1)
V2 = fine_tuned(V1, 2)
V3 = fine_tuned(V2, 3)
KEY = make_key()  # of the device's certificate
REQUEST = TOPICS.request(DEVICE)
Serve = Callable[[KeyRequest], KeyAnswer | None]


class SecretCache(Cache):
    """As `Cache`, with artifacts that are encrypted, and the keys."""

    def __init__(self) -> None:
        super().__init__(seed=7)
        self.content_keys: dict[Digest, bytes] = {}
        self.publish("v1", V1)

    def publish_secret(self, version: str, model: bytes) -> Digest:
        """A release whose only file is encrypted; gives what the artifact is called."""
        self.publish(version, model)  # a file that all can read, in whose place comes one that they cannot
        for topic in [topic for topic in self.retained if digest_of(model) in topic]:
            del self.retained[topic]
        self.retire(file_target(digest_of(model)))
        return self._add(file_target(digest_of(model), is_encrypted=True), model)

    def publish_secret_delta(self, base: bytes, result: bytes, *, in_place: bool = False) -> Digest:
        """An encrypted delta between two files."""
        old, new, sink = BytesSource(base), BytesSource(result), io.BytesIO()
        stats = make_delta(old, new, sink, segment_bytes=SEGMENT_BYTES, in_place=in_place)
        needs = in_place_needs(old, new, BytesSource(sink.getvalue()))
        path = delta_target(digest_of(base), digest_of(result), is_encrypted=True)
        memory_bytes = stats.header.decoder_memory_bytes
        return self._add(
            path, sink.getvalue(), ArtifactCustom(chunks=_TREE, memory_bytes=memory_bytes, in_place=needs)
        )

    def key_answer(self, request: KeyRequest) -> KeyAnswer:
        """What a server says."""
        return KeyAnswer(keys=tuple(self.wrapped(blob) for blob in request.blobs))

    def wrapped(self, blob: str, device: DeviceId = DEVICE, key: bytes | None = None) -> WrappedKey:
        name = Digest(blob)
        data = wrap_key(key or self.content_keys[name], KEY.public_key(), FLEET, device, name)
        return WrappedKey(blob=blob, recipient=key_digest(KEY.public_key()), wrapped=data)

    def _add(self, path: str, data: bytes, custom: ArtifactCustom | None = None) -> Digest:
        key = make_content_key()
        name, tree = self.add_blob(ContentCipher(key)(0, data))
        self.content_keys[name] = key
        custom = ArtifactCustom(
            chunks=tree,
            memory_bytes=custom.memory_bytes if custom else 0,
            in_place=custom.in_place if custom else None,
            encryption=Encryption(key=content_key_name(key)),
        )
        target = Target(path, len(data), name, custom)
        self.repository = self.publisher.publish(self.repository, [target], (), START_MS).repository
        self.publish_metadata()
        return name


_TREE = Cache(seed=1).add_blob(b"")[1]


def open_key(wrapped: WrappedKey) -> OpenedKey | None:
    """As `Identity.open_key`, with the key at hand."""
    if wrapped.recipient != key_digest(KEY.public_key()):
        return None
    key = unwrap_key(wrapped.wrapped, KEY, FLEET, DEVICE, Digest(wrapped.blob))
    return OpenedKey(content_key_name(key), ContentCipher(key))


@pytest.fixture
def cache() -> SecretCache:
    return SecretCache()


def online(cache: SecretCache, serve: Serve | None = None, **config: object) -> Device:
    """A device that runs v1, and whose requests for keys are answered."""
    device = Device(cache, V1, config={"can_decrypt": True, **config}, open_key=open_key)
    _answer_keys(device, serve or cache.key_answer)
    device.connect()
    device.settle()
    return device


def _answer_keys(device: Device, serve: Serve) -> list[KeyRequest]:
    requests: list[KeyRequest] = []

    def hear(topic: str, payload: bytes) -> None:
        assert topic == REQUEST
        request = decode_request(payload)
        if not isinstance(request, KeyRequest):
            return
        requests.append(request)
        answer = serve(request)
        if answer is not None and TOPICS.keys(DEVICE) in device.subscriptions:
            device.deliver(TOPICS.keys(DEVICE), encode_message(answer))

    device.answer_requests = hear
    return requests


def ask(device: Device, version: str) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version))


def outcome(device: Device) -> tuple[str, str]:
    update = device.reports[-1].update
    assert update is not None
    return update.outcome, update.code


def stored(device: Device) -> Counter[tuple[str, int]]:
    return Counter(
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    )


def topics(device: Device) -> set[str]:
    return {
        name for effect in device.effects if isinstance(effect, effects.Subscribe) for name in effect.filters
    }


# --- the path of an update -------------------------------------------------------------------------------------


def test_an_encrypted_file_is_fetched_decrypted_and_served(cache: SecretCache) -> None:
    device = online(cache)
    name = cache.publish_secret("v2", V2)
    requests = _answer_keys(device, cache.key_answer)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    assert outcome(device) == ("committed", "")
    assert [request.blobs for request in requests] == [(name,)]
    update = device.reports[-1].update
    assert update is not None
    assert (update.redundant_chunks, update.invalid_chunks) == (0, 0)
    # Nobody listens for keys any longer than it takes, and none stays in memory.
    assert TOPICS.keys(DEVICE) not in device.subscriptions
    assert any(isinstance(effect, effects.ForgetKeys) for effect in device.effects)


def test_nothing_of_the_file_is_on_the_air(cache: SecretCache) -> None:
    cache.publish_secret("v2", V2)
    cache.publish_secret_delta(V1, V2)
    changed = V2[len(V2) // 2 : len(V2) // 2 + 1000]
    runs = {changed[at : at + 64] for at in range(len(changed) - 64)}
    for payload in cache.retained.values():
        assert not any(payload[at : at + 64] in runs for at in range(len(payload)))


def test_a_release_that_is_not_encrypted_asks_for_no_keys_and_listens_for_none(cache: SecretCache) -> None:
    device = online(cache)
    requests = _answer_keys(device, cache.key_answer)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    assert not requests
    assert TOPICS.keys(DEVICE) not in topics(device)
    assert not any(isinstance(effect, effects.OpenKeys | effects.ForgetKeys) for effect in device.effects)


def test_an_encrypted_delta_is_applied_to_the_file_that_is_there(cache: SecretCache) -> None:
    device = online(cache)
    cache.publish_secret("v2", V2)
    name = cache.publish_secret_delta(V1, V2)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    assert {blob for blob, _ in stored(device)} >= {name}
    assert sum(blob == name for blob, _ in stored(device)) == 1
    (item,) = device.record.update.items if device.record.update else ()
    assert item.action == "delta"


def test_several_encrypted_deltas_take_one_request_for_all_keys(cache: SecretCache) -> None:
    device = online(cache)
    for before, version, model in ((V1, "v2", V2), (V2, "v3", V3)):
        cache.publish_secret(version, model)
        cache.publish_secret_delta(before, model)
    requests = _answer_keys(device, cache.key_answer)
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)
    assert [len(request.blobs) for request in requests] == [2]


def test_an_encrypted_delta_rewrites_the_file_in_place(
    cache: SecretCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo_journal, "STEP_BYTES", 256 << 10)
    monkeypatch.setattr(decoding, "REWRITE_STEPS", 2)
    device = online(cache, is_in_place=True)
    cache.publish_secret("v2", V2)
    cache.publish_secret_delta(V1, V2, in_place=True)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    update = device.record.update
    assert update is not None
    assert update.is_in_place


def test_a_poisoned_chunk_is_told_without_the_key_and_asked_for_anew(cache: SecretCache) -> None:
    device = online(cache)
    name = cache.publish_secret("v2", V2)
    topic = TOPICS.chunk(name, 3)
    good = cache.retained[topic]
    cache.retained[topic] = encode_chunk(name, 3, V2[: len(good) - 40])

    def hear(_topic: str, payload: bytes) -> None:
        request = decode_request(payload)
        if isinstance(request, KeyRequest):
            device.deliver(TOPICS.keys(DEVICE), encode_message(cache.key_answer(request)))
        elif isinstance(request, ChunkRequest):
            device.deliver(TOPICS.chunk_answer(DEVICE), good)

    device.answer_requests = hear
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    update = device.reports[-1].update
    assert update is not None
    assert update.invalid_chunks == 1


# --- interruptions ---------------------------------------------------------------------------------------------


def test_a_restart_in_the_middle_asks_for_the_keys_again_and_fetches_nothing_again(
    cache: SecretCache,
) -> None:
    device = online(cache)
    cache.publish_secret("v2", V2)
    requests = _answer_keys(device, cache.key_answer)
    ask(device, "v2")
    for count in (3, 9, 15):
        device.settle(until=lambda count=count: len(stored(device)) >= count)  # type: ignore[misc]  # bound now
        assert device.state is State.DOWNLOADING
        device.boot()
        device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(requests) == 4
    assert max(stored(device).values()) == 1


def test_a_lost_connection_asks_for_nothing_again(cache: SecretCache) -> None:
    device = online(cache)
    cache.publish_secret("v2", V2)
    requests = _answer_keys(device, cache.key_answer)
    ask(device, "v2")
    for count in (3, 9, 15):
        device.settle(until=lambda count=count: len(stored(device)) >= count)  # type: ignore[misc]  # bound now
        device.disconnect()
        device.settle()
        device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(requests) == 1  # the keys were in memory all the time
    assert max(stored(device).values()) == 1


def test_a_connection_that_is_lost_while_keys_are_waited_for_asks_again(cache: SecretCache) -> None:
    device = online(cache)
    cache.publish_secret("v2", V2)
    requests = _answer_keys(device, lambda _request: None)
    ask(device, "v2")
    device.settle(until=lambda: bool(requests))
    device.disconnect()
    device.settle()
    assert device.state is State.SUSPENDED
    again = _answer_keys(device, cache.key_answer)
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(again) == 1


@pytest.mark.parametrize("kind", ["whole", "delta"])
def test_power_that_goes_at_any_effect_loses_no_update(cache: SecretCache, kind: str) -> None:
    cache.publish_secret("v2", V2)
    if kind == "delta":
        cache.publish_secret_delta(V1, V2)
    cut_at = cuts = 0
    while True:
        cache.retained.pop(TOPICS.desired(DEVICE), None)
        device = online(cache)
        begun = len(device.effects)
        device.cut_at = begun + cut_at
        ask(device, "v2")
        try:
            device.settle()
        except PowerCutError:
            cuts += 1
        else:
            break
        device.disk.crash(random.Random(cut_at))
        device.cut_at = None
        device.boot()
        device.connect()
        device.settle()
        assert device.answer() == digest_of(V2), cut_at
        cut_at += 4
    assert cuts > 10


# --- keys that do not come, or are not the ones -----------------------------------------------------------------


def test_a_device_without_a_certificate_refuses_before_the_first_byte(cache: SecretCache) -> None:
    device = online(cache, can_decrypt=False)
    requests = _answer_keys(device, cache.key_answer)
    name = cache.publish_secret("v2", V2)
    ask(device, "v2")
    device.settle()
    assert outcome(device) == ("rejected", "admission.encrypted")
    assert device.answer() == digest_of(V1)
    assert not requests
    assert name not in {blob for blob, _ in stored(device)}


def test_a_device_without_a_certificate_takes_what_all_can_read(cache: SecretCache) -> None:
    device = online(cache, can_decrypt=False)
    cache.publish("v2", V2)
    cache.publish_secret_delta(V1, V2)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)


def _foreign(cache: SecretCache, request: KeyRequest) -> KeyAnswer:
    return KeyAnswer(keys=tuple(cache.wrapped(blob, DeviceId("device-2")) for blob in request.blobs))


def _other_recipient(cache: SecretCache, request: KeyRequest) -> KeyAnswer:
    stranger = make_key().public_key()
    keys = (
        WrappedKey(
            blob=blob,
            recipient=key_digest(stranger),
            wrapped=wrap_key(cache.content_keys[Digest(blob)], stranger, FLEET, DEVICE, Digest(blob)),
        )
        for blob in request.blobs
    )
    return KeyAnswer(keys=tuple(keys))


def _wrong(cache: SecretCache, request: KeyRequest) -> KeyAnswer:
    return KeyAnswer(keys=tuple(cache.wrapped(blob, key=make_content_key()) for blob in request.blobs))


def _damaged(cache: SecretCache, request: KeyRequest) -> KeyAnswer:
    keys = (cache.wrapped(blob) for blob in request.blobs)
    return KeyAnswer(
        keys=tuple(
            WrappedKey(blob=key.blob, recipient=key.recipient, wrapped=key.wrapped[:-1]) for key in keys
        )
    )


def _other_artifact(cache: SecretCache, request: KeyRequest) -> KeyAnswer:
    (other,) = cache.content_keys.keys() - set(request.blobs)
    return KeyAnswer(keys=(cache.wrapped(other),))


@pytest.mark.parametrize(
    ("serve", "code"),
    [
        (_foreign, "keys.wrong"),
        (_other_recipient, "keys.wrong"),
        (_wrong, "keys.wrong"),
        (_damaged, "keys.wrong"),
        (_other_artifact, "keys.unanswered"),
        (lambda _cache, _request: None, "keys.unanswered"),
    ],
)
def test_keys_that_are_wrong_or_do_not_come_fail_with_a_code_and_lose_nothing(
    cache: SecretCache, serve: Callable[[SecretCache, KeyRequest], KeyAnswer | None], code: str
) -> None:
    device = online(cache)
    cache.publish_secret("v3", V3)
    name = cache.publish_secret("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: len(stored(device)) >= 9)
    before = stored(device)
    requests = _answer_keys(device, lambda request: serve(cache, request))
    device.boot()  # what was fetched is there, the keys are not
    device.connect()
    device.settle(until=lambda: device.state is State.FAILED)
    device.settle(until=lambda: not device.queue)
    assert outcome(device) == ("running", code)
    assert device.answer() == digest_of(V1)
    assert len(requests) == 8
    _answer_keys(device, cache.key_answer)  # the next attempt finds an honest server
    device.settle()
    assert outcome(device)[0] == "committed"
    assert device.answer() == digest_of(V2)
    assert {key for key in before if key[0] == name}
    assert max(count for (blob, _), count in stored(device).items() if blob == name) == 1


def test_a_false_key_among_true_ones_hides_none(cache: SecretCache) -> None:
    def serve(request: KeyRequest) -> KeyAnswer:
        keys = [*_wrong(cache, request).keys, *_foreign(cache, request).keys, *cache.key_answer(request).keys]
        return KeyAnswer(keys=tuple(keys))

    device = online(cache, serve)
    cache.publish_secret("v2", V2)
    ask(device, "v2")
    device.settle()
    assert outcome(device) == ("committed", "")


@pytest.mark.parametrize(
    ("code", "said", "is_final"),
    [
        ("keys.no_certificate", "keys.no_certificate", True),
        ("keys.refused", "keys.refused", False),
        ("keys.of_the_future", "keys.refused", False),
        ("keys.unavailable", "keys.unavailable", False),
    ],
)
def test_a_refusal_ends_the_update_with_its_code(
    cache: SecretCache, code: str, said: str, is_final: bool
) -> None:
    device = online(cache, lambda _request: KeyAnswer(code=code, detail="no"))
    name = cache.publish_secret("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.FAILED)
    device.settle(until=lambda: not device.queue)
    assert outcome(device) == ("failed" if is_final else "running", said)
    assert (device.agent.deadline() is None) == is_final
    assert device.answer() == digest_of(V1)
    assert name not in {blob for blob, _ in stored(device)}


def test_an_answer_that_nobody_waits_for_is_no_answer(cache: SecretCache) -> None:
    device = online(cache)
    name = cache.publish_secret("v2", V2)
    refusal = encode_message(KeyAnswer(code="keys.refused", detail="no"))
    for answer in (refusal, encode_message(KeyAnswer(keys=(cache.wrapped(name),))), b"{", b""):
        device.deliver(TOPICS.keys(DEVICE), answer)
        device.deliver(TOPICS.keys(DeviceId("device-2")), answer)
    device.settle()
    assert device.state is State.IDLE
    assert not any(isinstance(effect, effects.OpenKeys) for effect in device.effects)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)


def test_an_update_that_is_withdrawn_forgets_its_keys(cache: SecretCache) -> None:
    device = online(cache)
    cache.publish_secret("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: len(stored(device)) >= 5)
    ask(device, "v1")
    device.settle()
    assert device.state is State.IDLE
    assert any(isinstance(effect, effects.ForgetKeys) for effect in device.effects)
    assert device.answer() == digest_of(V1)
