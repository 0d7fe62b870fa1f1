import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MessageError
from protocol.ids import digest_of
from protocol.messages import (
    KEYS_MAX,
    REQUEST_WINDOW_CHUNKS_MAX,
    Capacity,
    ChunkRequest,
    Desired,
    KeyAnswer,
    KeyRequest,
    Link,
    MetadataBundle,
    MetadataRequest,
    Report,
    UpdateReport,
    WrappedKey,
    decode_message,
    decode_request,
    decode_window,
    encode_message,
    encode_window,
)

DESIRED = Desired(sequence=3, rollout="r1", family="digits", version="v2")
REPORT = Report(
    device="pi-7",
    sequence=9,
    state="idle",
    family="digits",
    version="v1",
    files={"model.onnx": digest_of(b"x")},
    capacity=Capacity(
        link_bytes_per_s=64_000, processor_percent=25, delta_memory_bytes=128 << 20, links_max=4
    ),
    update=UpdateReport(rollout="r1", sequence=3, version="v2", outcome="committed"),
)


@pytest.mark.parametrize(
    "message",
    [
        DESIRED,
        REPORT,
        Link(online=True),
        MetadataBundle(roots=[b"1"], timestamp=b"t", snapshot=b"s", targets=b"\xff"),
        KeyAnswer(code="keys.refused", detail="no"),
        KeyAnswer(keys=(WrappedKey(blob=digest_of(b"x"), recipient=digest_of(b"y"), wrapped=b"\xff" * 113),)),
    ],
)
def test_a_message_comes_back_as_it_was_sent(
    message: Desired | Report | Link | MetadataBundle | KeyAnswer,
) -> None:
    assert decode_message(type(message), encode_message(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        ChunkRequest(blob=digest_of(b"x"), first=8, wanted="gA=="),
        MetadataRequest(root_version=1),
        KeyRequest(blobs=(digest_of(b"x"), digest_of(b"y"))),
    ],
)
def test_a_request_comes_back_as_it_was_sent(message: ChunkRequest | MetadataRequest | KeyRequest) -> None:
    assert decode_request(encode_message(message)) == message


def test_the_longest_request_for_keys_and_its_answer_fit_into_a_message() -> None:
    blobs = tuple(digest_of(bytes([number])) for number in range(KEYS_MAX))
    keys = [WrappedKey(blob=blob, recipient=blob, wrapped=bytes(113)) for blob in blobs]
    assert decode_request(encode_message(KeyRequest(blobs=blobs))) == KeyRequest(blobs=blobs)
    for_two = KeyAnswer(keys=(*keys, *keys))
    assert decode_message(KeyAnswer, encode_message(for_two)) == for_two
    for wrong in ((), (*blobs, blobs[0])):
        with pytest.raises(MessageError):
            decode_request(encode_message(KeyRequest(blobs=wrong)))


def test_unknown_fields_are_ignored_and_another_version_is_refused() -> None:
    fields = json.loads(encode_message(DESIRED))
    assert decode_message(Desired, json.dumps({**fields, "later": 1}).encode()) == DESIRED
    with pytest.raises(MessageError, match="version 2"):
        decode_message(Desired, json.dumps({**fields, "v": 2}).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"v":1,"sequence":-1,"rollout":"r","family":"f","version":"v"}',
        b'{"v":1,"sequence":9007199254740992,"rollout":"r","family":"f","version":"v"}',
        b'{"v":1,"sequence":1,"rollout":"' + b"r" * 129 + b'","family":"f","version":"v"}',
        b" " * 65_537,
        b"\xff\xfe",
    ],
)
def test_a_malformed_message_is_refused(payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode_message(Desired, payload)


def test_a_report_without_a_capacity_is_one_of_a_device_that_does_not_say() -> None:
    fields = json.loads(encode_message(REPORT))
    del fields["capacity"]
    assert decode_message(Report, json.dumps(fields).encode()).capacity is None


@pytest.mark.parametrize(
    "change",
    [
        {"link_bytes_per_s": 0},
        {"link_bytes_per_s": (1 << 40) + 1},
        {"processor_percent": 0},
        {"processor_percent": 10_001},
        {"delta_memory_bytes": -1},
        {"links_max": 0},
        {"links_max": 65},
        {"links_max": 1.5},
    ],
)
def test_a_capacity_out_of_bounds_is_refused_with_its_report(change: dict[str, float]) -> None:
    fields = json.loads(encode_message(REPORT))
    fields["capacity"] |= change
    with pytest.raises(MessageError, match=f"capacity.{next(iter(change))}"):
        decode_message(Report, json.dumps(fields).encode())


@given(st.binary(max_size=200))
def test_decoding_never_does_anything_but_refuse(payload: bytes) -> None:
    for kind in (Desired, Report, Link, MetadataBundle):
        with pytest.raises(MessageError):
            decode_message(kind, payload)
    with pytest.raises(MessageError):
        decode_request(payload)


@given(st.integers(0, 1 << 40), st.sets(st.integers(0, REQUEST_WINDOW_CHUNKS_MAX - 1), min_size=1))
def test_a_window_names_exactly_the_chunks_it_was_made_of(first: int, offsets: set[int]) -> None:
    wanted = sorted(first + offset for offset in offsets)
    request = ChunkRequest(blob=digest_of(b"x"), first=first, wanted=encode_window(wanted, first))
    assert decode_window(request) == wanted


@pytest.mark.parametrize("wanted", ["", "!", "gA", "AAAAAAAAAAAA"])
def test_a_malformed_window_is_refused(wanted: str) -> None:
    with pytest.raises(MessageError):
        decode_window(ChunkRequest(blob=digest_of(b"x"), first=0, wanted=wanted))
