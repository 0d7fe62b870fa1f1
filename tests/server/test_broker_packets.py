"""The packet codec: layouts of the standard, round trips, and bytes that nobody should have sent."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.broker.packets import (
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    PacketReader,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Received,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
    Will,
    encode,
    wire_bytes,
)

identifiers = st.integers(1, 65_535)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
payloads = st.binary(max_size=300)
qualities = st.integers(0, 2)
wills = st.builds(Will, texts, payloads, qualities, st.booleans())


@st.composite
def connects(draw: st.DrawFn) -> Connect:
    username = draw(st.none() | texts)
    password = draw(st.none() | payloads) if username is not None else None
    return Connect(
        draw(texts),
        draw(st.booleans()),
        draw(st.integers(0, 65_535)),
        draw(st.none() | wills),
        username,
        password,
    )


@st.composite
def publishes(draw: st.DrawFn) -> Publish:
    qos = draw(qualities)
    dup = draw(st.booleans()) if qos else False
    packet_id = draw(identifiers) if qos else 0
    return Publish(draw(texts), draw(payloads), qos, draw(st.booleans()), dup, packet_id)


packets: st.SearchStrategy[Packet] = st.one_of(
    connects(),
    st.builds(Connack, st.booleans(), st.integers(0, 5)),
    publishes(),
    st.builds(Puback, identifiers),
    st.builds(Pubrec, identifiers),
    st.builds(Pubrel, identifiers),
    st.builds(Pubcomp, identifiers),
    st.builds(
        Subscribe, identifiers, st.lists(st.tuples(texts, qualities), min_size=1, max_size=5).map(tuple)
    ),
    st.builds(Suback, identifiers, st.lists(st.sampled_from([0, 1, 2, 0x80]), min_size=1).map(tuple)),
    st.builds(Unsubscribe, identifiers, st.lists(texts, min_size=1, max_size=5).map(tuple)),
    st.builds(Unsuback, identifiers),
    st.builds(Pingreq),
    st.builds(Pingresp),
    st.builds(Disconnect),
)


def read_in_pieces(data: bytes, cuts: list[int], packet_bytes_max: int = 1 << 20) -> list[Received]:
    reader = PacketReader(packet_bytes_max)
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [packet for start, end in itertools.pairwise(bounds) for packet in reader.feed(data[start:end])]


@given(st.lists(packets, max_size=6), st.lists(st.integers(0, 1 << 16), max_size=8))
def test_what_is_encoded_is_read_back_wherever_it_is_cut(sent: list[Packet], cuts: list[int]) -> None:
    data = b"".join([encode(packet) for packet in sent])
    assert read_in_pieces(data, cuts) == sent
    assert len(data) == sum(wire_bytes(packet) for packet in sent)


@settings(max_examples=30)
@given(st.lists(packets, min_size=1, max_size=3))
def test_every_byte_may_come_alone(sent: list[Packet]) -> None:
    reader = PacketReader()
    data = b"".join([encode(packet) for packet in sent])
    assert [packet for byte in data for packet in reader.feed(bytes((byte,)))] == sent
    assert reader.buffered_bytes == 0


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_no_bytes_crash_the_reader_or_make_it_hold_more_than_one_packet(data: bytes, cuts: list[int]) -> None:
    whole, pieces = PacketReader(64), read_in_pieces(data, cuts, 64)
    assert whole.feed(data) == pieces
    assert whole.buffered_bytes <= 64
    assert not any(isinstance(packet, Malformed) for packet in pieces[:-1])


@given(packets, st.data())
def test_a_packet_with_one_wrong_byte_is_another_packet_or_malformed(
    packet: Packet, data: st.DataObject
) -> None:
    damaged = bytearray(encode(packet))
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    for received in PacketReader(1 << 12).feed(bytes(damaged)):
        assert isinstance(received, Malformed) or encode(received)


@pytest.mark.parametrize(
    ("packet", "layout"),
    [
        (Connect("a", keep_alive_s=60), "10 0d 0004 4d515454 04 02 003c 0001 61"),
        (
            Connect("a", False, 10, Will("w", b"x", 1, True), "u", b"p"),
            "10 19 0004 4d515454 04 ec 000a 0001 61 0001 77 0001 78 0001 75 0001 70",
        ),
        (Connack(True, 0), "20 02 01 00"),
        (Publish("a/b", b"hi"), "30 07 0003 612f62 6869"),
        (Publish("a/b", b"hi", 1, True, True, 10), "3b 09 0003 612f62 000a 6869"),
        (Puback(258), "40 02 0102"),
        (Pubrec(258), "50 02 0102"),
        (Pubrel(258), "62 02 0102"),
        (Pubcomp(258), "70 02 0102"),
        (Subscribe(10, (("a/b", 1), ("c/d", 2))), "82 0e 000a 0003 612f62 01 0003 632f64 02"),
        (Suback(10, (0, 2, 0x80)), "90 05 000a 00 02 80"),
        (Unsubscribe(10, ("a/b",)), "a2 07 000a 0003 612f62"),
        (Unsuback(10), "b0 02 000a"),
        (Pingreq(), "c0 00"),
        (Pingresp(), "d0 00"),
        (Disconnect(), "e0 00"),
    ],
)
def test_packets_are_laid_out_as_in_the_standard(packet: Packet, layout: str) -> None:
    assert encode(packet) == bytes.fromhex(layout)
    assert PacketReader().feed(bytes.fromhex(layout)) == [packet]


@pytest.mark.parametrize("body_bytes", [127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_at_the_edges_of_their_encoding_are_right(body_bytes: int) -> None:
    packet = Publish("t", bytes(body_bytes - 3))
    data = encode(packet)
    assert len(data) == wire_bytes(packet)
    assert PacketReader().feed(data) == [packet]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("00 00", "reserved type"),
        ("f0 00", "reserved type"),
        ("c1 00", "reserved flags"),
        ("30 ffffffff", "more than four bytes"),
        ("30 ffffff7f", "longer than"),
        ("10 0c 0004 4d515458 04 02 003c 0000", "protocol name"),
        ("10 0c 0004 4d515454 04 03 003c 0000", "connect flags"),
        ("10 0c 0004 4d515454 04 0a 003c 0000", "connect flags"),
        ("10 0c 0004 4d515454 04 1e 003c 0000", "connect flags"),
        ("10 0c 0004 4d515454 04 42 003c 0000", "connect flags"),
        ("10 0d 0004 4d515454 04 02 003c 0000 00", "after its last field"),
        ("20 02 02 00", "reserved values"),
        ("36 05 0001 61 0001", "PUBLISH flags"),
        ("38 03 0001 61", "PUBLISH flags"),
        ("32 05 0001 61 0000", "identifier is zero"),
        ("30 03 0002 61", "middle of a field"),
        ("30 03 0001 00", "null character"),
        ("30 03 0001 ff", "not UTF-8"),
        ("30 05 0003 eda080", "not UTF-8"),
        ("40 03 000100", "after its last field"),
        ("82 02 0001", "names no filter"),
        ("82 06 0001 0001 61 03", "does not exist"),
        ("a2 02 0001", "names no filter"),
        ("c0 01 00", "after its last field"),
    ],
)
def test_malformed_packets_are_refused_with_a_reason(layout: str, reason: str) -> None:
    reader = PacketReader(1 << 20)
    (received,) = reader.feed(bytes.fromhex(layout))
    assert isinstance(received, Malformed)
    assert reason in received.reason
    assert reader.feed(encode(Pingreq())) == []
    assert reader.buffered_bytes == 0


def test_packets_before_a_malformed_one_still_count() -> None:
    received = PacketReader().feed(encode(Pingreq()) + b"\x00")
    assert received[0] == Pingreq()
    assert isinstance(received[1], Malformed)


def test_a_packet_that_is_too_long_is_refused_before_its_body_comes() -> None:
    longest = Publish("t", bytes(994))
    reader = PacketReader(wire_bytes(longest))
    assert reader.feed(encode(longest)) == [longest]
    (received,) = reader.feed(encode(Publish("t", bytes(995)))[:3])
    assert isinstance(received, Malformed)
    assert reader.buffered_bytes == 0


@pytest.mark.parametrize(
    ("name", "level"), [("0004 4d515454", 5), ("0004 4d515454", 0x84), ("0006 4d5149736470", 3)]
)
def test_of_another_version_only_the_level_is_read(name: str, level: int) -> None:
    body = bytes.fromhex(name) + bytes((level, 2, 0, 60, 0, 0, 1))
    (received,) = PacketReader().feed(bytes((0x10, len(body))) + body)
    assert isinstance(received, Connect)
    assert received.protocol_level == level
