"""The MQTT 3.1.1 packet codec: values to bytes, and bytes to values through a bounded incremental reader.

Pure. What lives here is the layout of packets and nothing else: whether a packet is allowed at this moment, and
whether a topic makes sense, is decided in `core.py`. Section numbers are those of the OASIS standard
"MQTT Version 3.1.1" (29 October 2014).

Bad bytes are a value (`Malformed`), not an exception: packets that came before them in the same read still count,
and the broker core decides what happens to the connection.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

# --- Fixed by the standard ----------------------------------------------------------------------------------

PROTOCOL_LEVEL: Final = 4
"""3.1.1; section 3.1.2.2."""

PROTOCOL_NAMES: Final = ("MQTT", "MQIsdp")
"""3.1.1 and later, and the name that 3.1 used: such a client is told which version is spoken (3.1.2.2)."""

PACKET_BYTES_LIMIT: Final = 268_435_460
"""Largest packet that the four length bytes can describe, fixed header included (section 2.2.3)."""

SUBACK_FAILURE: Final = 0x80
"""Section 3.9.3."""


class Will(msgspec.Struct, frozen=True):
    """What the broker publishes when the client vanishes (section 3.1.2.5)."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


class Connect(msgspec.Struct, frozen=True):
    """Section 3.1. With a `protocol_level` other than 4 only the level was read."""

    client_id: str
    clean_session: bool = True
    keep_alive_s: int = 0
    will: Will | None = None
    username: str | None = None
    password: bytes | None = None
    protocol_level: int = PROTOCOL_LEVEL


class Connack(msgspec.Struct, frozen=True):
    """Section 3.2."""

    session_present: bool
    code: int


class Publish(msgspec.Struct, frozen=True):
    """Section 3.3. `packet_id` is 0 exactly when `qos` is 0 or no identifier was given yet."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0


class Puback(msgspec.Struct, frozen=True):
    """Section 3.4."""

    packet_id: int


class Pubrec(msgspec.Struct, frozen=True):
    """Section 3.5."""

    packet_id: int


class Pubrel(msgspec.Struct, frozen=True):
    """Section 3.6."""

    packet_id: int


class Pubcomp(msgspec.Struct, frozen=True):
    """Section 3.7."""

    packet_id: int


class Subscribe(msgspec.Struct, frozen=True):
    """Section 3.8: pairs of topic filter and wanted QoS."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]


class Suback(msgspec.Struct, frozen=True):
    """Section 3.9: the granted QoS of each filter, or `SUBACK_FAILURE`."""

    packet_id: int
    codes: tuple[int, ...]


class Unsubscribe(msgspec.Struct, frozen=True):
    """Section 3.10."""

    packet_id: int
    filters: tuple[str, ...]


class Unsuback(msgspec.Struct, frozen=True):
    """Section 3.11."""

    packet_id: int


class Pingreq(msgspec.Struct, frozen=True):
    """Section 3.12."""


class Pingresp(msgspec.Struct, frozen=True):
    """Section 3.13."""


class Disconnect(msgspec.Struct, frozen=True):
    """Section 3.14."""


class Malformed(msgspec.Struct, frozen=True):
    """Bytes that are no packet; nothing after them can be read. Never encoded."""

    reason: str


Packet: TypeAlias = (
    Connect
    | Connack
    | Publish
    | Puback
    | Pubrec
    | Pubrel
    | Pubcomp
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
)
"""Everything that travels."""

Received: TypeAlias = Packet | Malformed
"""What a reader hands out."""

# --- Encoding -----------------------------------------------------------------------------------------------


def _length(byte_count: int) -> bytes:
    """Encode a remaining length (section 2.2.3)."""
    encoded = bytearray()
    while byte_count > 0x7F:
        encoded.append(byte_count & 0x7F | 0x80)
        byte_count >>= 7
    encoded.append(byte_count)
    return bytes(encoded)


def _data(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _text(value: str) -> bytes:
    return _data(value.encode())


def _framed(first_byte: int, body: bytes) -> bytes:
    return bytes((first_byte,)) + _length(len(body)) + body


def _encode_connect(packet: Connect) -> bytes:
    will = packet.will
    flags = packet.clean_session << 1
    payload = _text(packet.client_id)
    if will is not None:
        flags |= 0x04 | will.qos << 3 | will.retain << 5
        payload += _text(will.topic) + _data(will.payload)
    if packet.username is not None:
        flags |= 0x80
        payload += _text(packet.username)
    if packet.password is not None:
        flags |= 0x40
        payload += _data(packet.password)
    head = _text(PROTOCOL_NAMES[0]) + bytes((packet.protocol_level, flags))
    return _framed(0x10, head + packet.keep_alive_s.to_bytes(2, "big") + payload)


def _encode_publish(packet: Publish) -> bytes:
    topic = packet.topic.encode()
    identifier = packet.packet_id.to_bytes(2, "big") if packet.qos else b""
    first_byte = 0x30 | packet.dup << 3 | packet.qos << 1 | packet.retain
    length = _length(2 + len(topic) + len(identifier) + len(packet.payload))
    # One join copies a large payload once.
    return b"".join(
        (bytes((first_byte,)), length, len(topic).to_bytes(2, "big"), topic, identifier, packet.payload)
    )


def _identified(first_byte: int) -> "Callable[[Puback], bytes]":
    head = bytes((first_byte, 2))
    return lambda packet: head + packet.packet_id.to_bytes(2, "big")


def _encode_subscribe(packet: Subscribe) -> bytes:
    filters = b"".join(_text(topic_filter) + bytes((qos,)) for topic_filter, qos in packet.filters)
    return _framed(0x82, packet.packet_id.to_bytes(2, "big") + filters)


def _encode_unsubscribe(packet: Unsubscribe) -> bytes:
    return _framed(0xA2, packet.packet_id.to_bytes(2, "big") + b"".join(map(_text, packet.filters)))


# One entry per packet type; the parameter types differ, so the table itself is untyped.
_ENCODERS: Final[dict[type, Callable[..., bytes]]] = {
    Connect: _encode_connect,
    Connack: lambda packet: bytes((0x20, 2, packet.session_present, packet.code)),
    Publish: _encode_publish,
    Puback: _identified(0x40),
    Pubrec: _identified(0x50),
    Pubrel: _identified(0x62),
    Pubcomp: _identified(0x70),
    Subscribe: _encode_subscribe,
    Suback: lambda packet: _framed(0x90, packet.packet_id.to_bytes(2, "big") + bytes(packet.codes)),
    Unsubscribe: _encode_unsubscribe,
    Unsuback: _identified(0xB0),
    Pingreq: lambda _packet: b"\xc0\x00",
    Pingresp: lambda _packet: b"\xd0\x00",
    Disconnect: lambda _packet: b"\xe0\x00",
}


def encode(packet: Packet) -> bytes:
    """Return the bytes of a packet whose fields are within the standard's ranges."""
    return _ENCODERS[type(packet)](packet)


_SMALL_BYTES: Final[dict[type, int]] = {
    **dict.fromkeys((Connack, Puback, Pubrec, Pubrel, Pubcomp, Unsuback), 4),
    **dict.fromkeys((Pingreq, Pingresp, Disconnect), 2),
}


def wire_bytes(packet: Packet) -> int:
    """Return how long `encode(packet)` is, without building it where that costs something."""
    if type(packet) is Publish:
        topic = packet.topic
        body = 2 + (len(topic) if topic.isascii() else len(topic.encode())) + len(packet.payload)
        if packet.qos:
            body += 2
        return body + (2 if body < 0x80 else 3 if body < 0x4000 else 4 if body < 0x20_0000 else 5)
    return _SMALL_BYTES.get(type(packet)) or len(encode(packet))


# --- Decoding -----------------------------------------------------------------------------------------------


class _MalformedError(Exception):
    """Leaves a decoder on its way to becoming a `Malformed`; never leaves this module."""


class _Body:
    """A cursor over the bytes after the fixed header; every read is checked against their end."""

    __slots__ = ("_bytes", "_offset")

    def __init__(self, body: bytes) -> None:
        self._bytes = body
        self._offset = 0

    def take(self, byte_count: int) -> bytes:
        start, end = self._offset, self._offset + byte_count
        if end > len(self._bytes):
            raise _MalformedError("a packet ends in the middle of a field")
        self._offset = end
        return self._bytes[start:end]

    def byte(self) -> int:
        return self.take(1)[0]

    def integer(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def data(self) -> bytes:
        return self.take(self.integer())

    def text(self) -> str:
        """Section 1.5.3: well-formed UTF-8 without the null character; surrogates do not decode."""
        try:
            value = self.data().decode()
        except UnicodeDecodeError:
            raise _MalformedError("a string is not UTF-8") from None
        if "\0" in value:
            raise _MalformedError("a string contains the null character")
        return value

    def identifier(self) -> int:
        """Section 2.3.1: never zero."""
        value = self.integer()
        if not value:
            raise _MalformedError("a packet identifier is zero")
        return value

    def rest(self) -> bytes:
        return self.take(len(self._bytes) - self._offset)

    def has_more(self) -> bool:
        return self._offset < len(self._bytes)


def _decode_connect(body: _Body, _flags: int) -> Connect:
    name = body.text()
    if name not in PROTOCOL_NAMES:
        raise _MalformedError("the protocol name is not MQTT")
    level = body.byte()
    if level != PROTOCOL_LEVEL or name != PROTOCOL_NAMES[0]:
        # Another version has another layout: what follows is not read (section 3.1.2.2).
        body.rest()
        return Connect("", protocol_level=level if level != PROTOCOL_LEVEL else 3)
    flags = body.byte()
    keep_alive_s = body.integer()
    has_will, will_qos, will_retain = bool(flags & 0x04), flags >> 3 & 3, bool(flags & 0x20)
    has_username, has_password = bool(flags & 0x80), bool(flags & 0x40)
    if flags & 1 or will_qos > 2 or (not has_will and flags & 0x38) or (has_password and not has_username):
        raise _MalformedError("the connect flags contradict each other")
    client_id = body.text()
    will = Will(body.text(), body.data(), will_qos, will_retain) if has_will else None
    username = body.text() if has_username else None
    password = body.data() if has_password else None
    return Connect(client_id, bool(flags & 0x02), keep_alive_s, will, username, password)


def _decode_connack(body: _Body, _flags: int) -> Connack:
    present, code = body.byte(), body.byte()
    if present > 1 or code > 5:
        raise _MalformedError("a CONNACK has reserved values")
    return Connack(bool(present), code)


def _decode_publish(body: _Body, flags: int) -> Publish:
    qos, dup = flags >> 1 & 3, bool(flags & 8)
    if qos == 3 or (dup and not qos):
        raise _MalformedError("the PUBLISH flags contradict each other")
    topic = body.text()
    packet_id = body.identifier() if qos else 0
    return Publish(topic, body.rest(), qos, bool(flags & 1), dup, packet_id)


def _decode_subscribe(body: _Body, _flags: int) -> Subscribe:
    packet_id = body.identifier()
    filters = []
    while body.has_more():
        topic_filter, qos = body.text(), body.byte()
        if qos > 2:
            raise _MalformedError("a SUBSCRIBE asks for a QoS that does not exist")
        filters.append((topic_filter, qos))
    if not filters:
        raise _MalformedError("a SUBSCRIBE names no filter")
    return Subscribe(packet_id, tuple(filters))


def _decode_suback(body: _Body, _flags: int) -> Suback:
    packet_id, codes = body.identifier(), body.rest()
    if not codes or any(code > 2 and code != SUBACK_FAILURE for code in codes):
        raise _MalformedError("a SUBACK has no or reserved codes")
    return Suback(packet_id, tuple(codes))


def _decode_unsubscribe(body: _Body, _flags: int) -> Unsubscribe:
    packet_id = body.identifier()
    filters = []
    while body.has_more():
        filters.append(body.text())
    if not filters:
        raise _MalformedError("an UNSUBSCRIBE names no filter")
    return Unsubscribe(packet_id, tuple(filters))


# Type nibble -> flags that the fixed header must carry (section 2.2.2; None: they mean something), decoder.
_DECODERS: Final[dict[int, tuple[int | None, Callable[[_Body, int], Packet]]]] = {
    1: (0, _decode_connect),
    2: (0, _decode_connack),
    3: (None, _decode_publish),
    4: (0, lambda body, _flags: Puback(body.identifier())),
    5: (0, lambda body, _flags: Pubrec(body.identifier())),
    6: (2, lambda body, _flags: Pubrel(body.identifier())),
    7: (0, lambda body, _flags: Pubcomp(body.identifier())),
    8: (2, _decode_subscribe),
    9: (0, _decode_suback),
    10: (2, _decode_unsubscribe),
    11: (0, lambda body, _flags: Unsuback(body.identifier())),
    12: (0, lambda _body, _flags: Pingreq()),
    13: (0, lambda _body, _flags: Pingresp()),
    14: (0, lambda _body, _flags: Disconnect()),
}


class PacketReader:
    """Turns a stream of bytes, cut anywhere, into packets.

    Holds at most one incomplete packet: a packet that would exceed the limit is refused when its length is read,
    before its body is waited for.

    Args:
        packet_bytes_max: Longest packet that is accepted, fixed header included.
    """

    __slots__ = ("_buffer", "_failed", "_packet_bytes_max")

    def __init__(self, packet_bytes_max: int = PACKET_BYTES_LIMIT) -> None:
        self._buffer = bytearray()
        self._packet_bytes_max = packet_bytes_max
        self._failed = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes of an incomplete packet that are being held."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[Received]:
        """Take more bytes; return the packets that they complete.

        The last element is a `Malformed` when the bytes after the others are no packet. From then on everything
        that is fed is discarded.
        """
        if self._failed:
            return []
        buffer = self._buffer
        buffer += data
        packets: list[Received] = []
        offset = 0
        try:
            while (bounds := self._bounds(offset)) is not None:
                start, end = bounds
                packets.append(self._decode(buffer[offset], start, end))
                offset = end
        except _MalformedError as error:
            self._failed = True
            buffer.clear()
            packets.append(Malformed(str(error)))
            return packets
        if offset:
            del buffer[:offset]
        return packets

    def _bounds(self, offset: int) -> tuple[int, int] | None:
        """Return where the body of the packet at `offset` starts and ends, or None while bytes are missing."""
        buffer = self._buffer
        available = len(buffer)
        if offset == available:
            return None
        known = _DECODERS.get(buffer[offset] >> 4)
        if known is None or (known[0] is not None and known[0] != buffer[offset] & 0x0F):
            raise _MalformedError("the first byte of a packet has a reserved type or reserved flags")
        length = 0
        for index in range(4):
            position = offset + 1 + index
            if position >= available:
                return None
            length |= (buffer[position] & 0x7F) << 7 * index
            if buffer[position] < 0x80:
                end = position + 1 + length
                if end - offset > self._packet_bytes_max:
                    raise _MalformedError(f"a packet is longer than {self._packet_bytes_max} bytes")
                return (position + 1, end) if end <= available else None
        raise _MalformedError("a length has more than four bytes")

    def _decode(self, first_byte: int, start: int, end: int) -> Packet:
        with memoryview(self._buffer) as view:
            body = _Body(bytes(view[start:end]))
        packet = _DECODERS[first_byte >> 4][1](body, first_byte & 0x0F)
        if body.has_more():
            raise _MalformedError("a packet has bytes after its last field")
        return packet
