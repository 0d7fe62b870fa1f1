"""Inputs that get past the first check: mutated inside, with lengths and checksums made to agree again.

A fuzzer that changes bytes blindly is refused by the first checksum. Each function here takes an input apart, changes one part
of it, and puts it together; what cannot be taken apart is changed blindly.
"""

import contextlib
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from protocol.delta import codecs
from protocol.delta.context import ContextModel
from protocol.delta.format import (
    HEADER_PREFIX_BYTES,
    RECORD_BYTES_MAX,
    SEGMENT_BYTES_MAX,
    SEGMENT_DIGEST_BYTES,
    WITH_DIGEST,
    WITHOUT_RESULT,
    Codec,
    EndRecord,
    Header,
    Position,
    SegmentHeader,
    check_segment,
    header_length,
    unpack_record,
)
from protocol.errors import PatchError
from tests.fuzz.targets import READER_MEMORY_BYTES, join_input, split_input

Mutate = Callable[[bytes, int], bytes]
"""Changes bytes blindly: takes them and the most that may come out."""

Mutator = Callable[[bytes, int, int, Mutate], bytes]
"""Takes an input, the most that may come out, a seed, and the blind way."""

_BLIND_SHARE = 0.2
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    63,
    64,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
_MESSAGE_DEPTH = 6
_FIELD_LIMITS = {
    "parameter_length": 2**16,
    "result_length": 2**32,
    "window_offset": 2**64,
    "window_length": 2**32,
    "payload_length": 2**32,
}


def mutate_blindly(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """GGUF has no checksums and few lengths of lengths: blind changes get far."""
    del seed
    return mutate(data, size)


def mutate_safetensors(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """Change the header, as text or as JSON, and let its length and the length of the file agree with it."""
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    if rng.random() < _BLIND_SHARE or length > len(data) - 8:
        return mutate(data, size)
    text, body = data[8 : 8 + length], data[8 + length :]
    try:
        header = json.loads(text)
        ends = _change_json(header, rng)
    except (ValueError, RecursionError):
        header, ends = None, []
    if header is None or rng.random() < 0.5:
        text = mutate(text, max(1, size - 8 - len(body)))
    else:
        text = json.dumps(header).encode()
    if ends and rng.random() < 0.7:
        body = body[: max(ends)].ljust(min(max(ends), 4096), b"\x01")
    return (len(text).to_bytes(8, "little") + text + body)[:size]


def _change_json(header: object, rng: random.Random) -> list[int]:
    """Change one value somewhere; return the offsets at which tensors would end."""
    if not isinstance(header, dict) or not header:
        return []
    name = rng.choice(list(header))
    entry = header[name]
    if isinstance(entry, dict) and entry:
        key = rng.choice(list(entry))
        value = entry[key]
        if isinstance(value, list) and value and rng.random() < 0.7:
            value[rng.randrange(len(value))] = rng.choice([*_NUMBERS[:12], -1, 2**63, "x", None, 1.5])
        elif isinstance(value, str):
            entry[key] = rng.choice(["F32", "F16", "I32", "U8", "F4", "F8_E4M3", "BOOL", "C64", "?"])
        else:
            del entry[key]
    elif rng.random() < 0.5:
        header[rng.choice(["l.qweight", "l.qzeros", "l.scales", "a_blocks", "a_scales"])] = header.pop(name)
    ends = [each.get("data_offsets") for each in header.values() if isinstance(each, dict)]
    return [
        each[1]
        for each in ends
        if isinstance(each, list) and len(each) == 2 and type(each[1]) is int and each[1] > 0
    ]


@dataclass
class _Field:
    """One field of a protobuf message: `value` is an integer, bytes, or a message of fields."""

    number: int
    wire: int
    value: "int | bytes | list[_Field]"


def mutate_onnx(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """Change one field anywhere in the tree of messages; the lengths around it follow."""
    rng = random.Random(seed)
    message = _parse_message(data, 0)
    if not message or rng.random() < _BLIND_SHARE:
        return mutate(data, size)
    fields = message
    while True:
        index = rng.randrange(len(fields))
        inner = fields[index].value
        if not isinstance(inner, list) or not inner or rng.random() < 0.1:
            break
        fields = inner
    _change_field(fields, index, rng, mutate)
    return _write_message(message)[:size]


def _change_field(fields: list[_Field], index: int, rng: random.Random, mutate: Mutate) -> None:
    chosen = fields[index]
    action = rng.random()
    if action < 0.1:
        del fields[index]
    elif action < 0.2:
        fields.insert(rng.randrange(len(fields) + 1), replace(chosen))
    elif action < 0.25:
        chosen.number = rng.choice(range(1, 21))
    elif isinstance(chosen.value, bytes):
        chosen.value = mutate(chosen.value, len(chosen.value) + 64)
    elif isinstance(chosen.value, list):
        chosen.value = mutate(_write_message(chosen.value), 4096)
    else:
        chosen.value = rng.choice([*_NUMBERS, chosen.value + 1, max(0, chosen.value - 1)]) % 2**64


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse_message(data: bytes, depth: int) -> list[_Field] | None:
    """Return the fields of what may be a message, None if it is none."""
    fields: list[_Field] = []
    at = 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = _read_varint(data, at)
                fields.append(_Field(number, wire, value))
                continue
            if wire == 2:
                length, at = _read_varint(data, at)
            elif wire in {1, 5}:
                length = 8 if wire == 1 else 4
            else:
                return None
            if number == 0 or at + length > len(data):
                return None
            part = data[at : at + length]
            inner = _parse_message(part, depth + 1) if wire == 2 and depth < _MESSAGE_DEPTH else None
            fields.append(_Field(number, wire, inner or part))
            at += length
    except (IndexError, ValueError):
        return None
    return fields


def _write_message(fields: list[_Field]) -> bytes:
    out = bytearray()
    for each in fields:
        out += _write_varint(each.number << 3 | each.wire)
        if isinstance(each.value, int):
            out += _write_varint(each.value)
            continue
        part = _write_message(each.value) if isinstance(each.value, list) else each.value
        if each.wire == 2:
            out += _write_varint(len(part))
        out += part
    return bytes(out)


def mutate_planner(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """Change one of the two files in the way of its kind."""
    rng = random.Random(seed)
    files = list(split_input(data))
    chosen = rng.randrange(2)
    file = files[chosen]
    kind = mutate_onnx if file[:1] == b"\x08" else mutate_safetensors if file[8:9] == b"{" else mutate_blindly
    files[chosen] = kind(file, max(1, size - len(files[1 - chosen]) - 4), rng.randrange(2**31), mutate)
    return join_input(*files)[:size]


@dataclass
class Patch:
    """A delta file taken apart; fields of records may be anything."""

    header: Header
    segments: list[tuple[SegmentHeader, bytes]]


def mutate_reader(data: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """Change a field, a body or the order of segments; lengths, checksums, memory and digests follow where that is possible."""
    rng = random.Random(seed)
    base, packed = split_input(data)
    patch = parse_patch(packed)
    if patch is None or not patch.segments or rng.random() < _BLIND_SHARE:
        return mutate(data, size)
    index = rng.randrange(len(patch.segments))
    action = rng.random()
    if action < 0.6:
        _change_body(patch, index, rng, mutate)
    elif action < 0.85:
        _change_record(patch, index, rng)
    elif action < 0.9:
        patch.segments.insert(rng.randrange(len(patch.segments) + 1), patch.segments[index])
    elif action < 0.95:
        del patch.segments[index]
    else:
        base = mutate(base, len(base) + 64)
    return join_input(base, seal_patch(patch, base, repairs=rng.random() < 0.8))[:size]


def _change_body(patch: Patch, index: int, rng: random.Random, mutate: Mutate) -> None:
    segment, body = patch.segments[index]
    parameters, payload = body[: segment.parameter_length], body[segment.parameter_length :]
    if parameters and rng.random() < 0.4:
        parameters = mutate(parameters, min(65_535, len(parameters) + 64))
    else:
        payload = mutate(payload, len(payload) + 64)
    patch.segments[index] = (
        replace(segment, parameter_length=len(parameters), payload_length=len(payload)),
        parameters + payload,
    )


def _change_record(patch: Patch, index: int, rng: random.Random) -> None:
    segment, body = patch.segments[index]
    name = rng.choice([*_FIELD_LIMITS, "codec", "continues"])
    before = int(getattr(segment, name))
    value = rng.choice([before + 1, max(0, before - 1), *_NUMBERS[:16]])
    changes: dict[str, Any] = {name: value % _FIELD_LIMITS.get(name, 2**32)}
    if name == "codec":
        changes = {name: rng.choice([codec for codec in Codec if codec is not Codec.END])}
    elif name == "continues":
        changes = {name: not segment.continues}
    segment = replace(segment, **changes)
    if segment.codec in WITH_DIGEST and not segment.digest:
        segment = replace(segment, digest=bytes(SEGMENT_DIGEST_BYTES))
    patch.segments[index] = (segment, body)


def parse_patch(data: bytes) -> Patch | None:
    """Take a delta file apart as far as it goes; None if not even its header is one."""
    try:
        at = header_length(data[:HEADER_PREFIX_BYTES])
        header = Header.unpack(data[:at])
    except (PatchError, struct.error):
        return None
    crc = int.from_bytes(data[at - 4 : at], "little")
    segments: list[tuple[SegmentHeader, bytes]] = []
    result_offset = 0
    while True:
        try:
            read = unpack_record(data[at : at + RECORD_BYTES_MAX], Position(crc, at, result_offset))
        except PatchError:
            break
        if read is None or isinstance(read[0], EndRecord):
            break
        record, length = read[0], read[1]
        at += length
        segments.append((record, data[at : at + record.body_length]))
        at += record.body_length
        result_offset += record.result_length
    return Patch(header, segments)


def seal_patch(patch: Patch, base: bytes, *, repairs: bool) -> bytes:
    """Put a delta file together with right checksums.

    Args:
        patch: Its parts.
        base: What it shall apply to.
        repairs: Make lengths in the header, the declared memory and the digests right as well, where segments can be decoded.
    """
    header, segments = replace(patch.header, base_length=len(base)), patch.segments
    if repairs:
        header, segments = _repaired(header, segments, base)
    out = bytearray(header.pack())
    crc = int.from_bytes(out[-4:], "little")
    result_offset = 0
    for segment, body in segments:
        sealed, content = segment, body
        if segment.codec is Codec.COPY:
            content = b""
        else:
            sealed = replace(segment, checksum=zlib.crc32(body[: segment.body_length]))
        out += sealed.pack(Position(crc, len(out), result_offset)) + content
        result_offset += segment.result_length
    return bytes(out + EndRecord().pack(Position(crc, len(out), result_offset)))


def _repaired(
    header: Header, segments: list[tuple[SegmentHeader, bytes]], base: bytes
) -> tuple[Header, list[tuple[SegmentHeader, bytes]]]:
    lengths = [segment.result_length for segment, _ in segments]
    longest = max(
        (segment.result_length for segment, _ in segments if segment.codec is not Codec.COPY), default=1
    )
    header = replace(
        header,
        result_length=min(sum(lengths), 2**40),
        decoder_memory_bytes=READER_MEMORY_BYTES,
        segment_bytes_max=max(1, min(SEGMENT_BYTES_MAX, longest)),
    )
    repaired: list[tuple[SegmentHeader, bytes]] = []
    whole = bytearray()
    model = ContextModel()
    for segment, body in segments:
        result = _decoded(segment, body, base, header, model)
        if segment.codec is Codec.COPY:
            segment = replace(segment, checksum=zlib.crc32(result))  # noqa: PLW2901 - the record that was read becomes the one that is written
        elif result:
            segment = replace(segment, digest=codecs.segment_digest(segment.codec, result))  # noqa: PLW2901 - likewise
        whole += result
        repaired.append((segment, body))
    return replace(header, result_sha256=hashlib.sha256(whole).digest()), repaired


def _decoded(segment: SegmentHeader, body: bytes, base: bytes, header: Header, model: ContextModel) -> bytes:
    """Return what a segment gives, whatever it was announced to give; nothing where it gives none."""
    window = base[max(0, segment.window_offset) :][: max(0, segment.window_length)]
    # Whatever goes wrong here goes wrong in the target as well, where it counts.
    with contextlib.suppress(Exception):
        check_segment(segment, header, 0)
        if segment.codec is Codec.COPY:
            return window
        if segment.codec is Codec.TABLES:
            model.basis = codecs.read_tables(replace(segment, checksum=zlib.crc32(body)), body)
        elif segment.codec not in WITHOUT_RESULT:
            return codecs._decode(segment, body, window, header, model)
    return b""


MUTATORS: dict[str, Mutator] = {
    "gguf": mutate_blindly,
    "onnx": mutate_onnx,
    "safetensors": mutate_safetensors,
    "planner": mutate_planner,
    "reader": mutate_reader,
    "coders": mutate_reader,
}
