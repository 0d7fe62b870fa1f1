"""One struct per JSON message, versioned and bounded (SPEC section 3).

Receivers ignore fields that they do not know, so that a newer sender may add some; a new meaning of an old field is a
new protocol version. Chunks are binary and live in `chunks.py`.
"""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from protocol.constants import MESSAGE_BYTES_MAX, PROTOCOL_VERSION
from protocol.errors import MessageError

Text = Annotated[str, Meta(max_length=512)]
ShortText = Annotated[str, Meta(max_length=128)]
DigestText = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Sequence = Annotated[int, Meta(ge=0, lt=1 << 53)]

ROLES_MAX: Final = 4
"""Delegated roles that a device may ask for: that of its family, and the one of the artifacts."""

KEYS_MAX: Final = 64
"""Content keys in one request: a release has at most 8 files, and a way to each of them at most 4 artifacts."""

RoleText = Annotated[str, Meta(min_length=1, max_length=80)]

NONCE_BYTES: Final = 16
"""Two nonces of one device are never the same."""

NONCE_BYTES_MAX: Final = 32
SIGNATURES_MAX: Final = 8
"""Keys that sign the time: one, or some more while they are exchanged."""

KeyIdText = Annotated[str, Meta(max_length=128)]
SignatureText = Annotated[str, Meta(max_length=1024, pattern="^([0-9a-f]{2})*$")]

Outcome = Literal["running", "committed", "rolled_back", "rejected", "failed"]


class Desired(Struct, frozen=True, kw_only=True):
    """What a device should run; `dev/<id>/desired`, retained, signed by the director where the fleet has one (`SignedDesired`).

    It can only choose among releases that signed metadata lists.
    """

    v: int = PROTOCOL_VERSION
    sequence: (
        Sequence  # grows with every change for this device; older ones and leaps are ignored (section 3)
    )
    rollout: ShortText
    family: ShortText
    version: ShortText


class LatencySummary(Struct, frozen=True, kw_only=True):
    """Latency of single inferences, milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


class TrialEvidence(Struct, frozen=True, kw_only=True):
    """What a trial of a new model measured on the device; every figure comes from the run."""

    prompts_passed: Count
    prompts_total: Count
    load_ms: float | None = None
    latency: LatencySummary | None = None
    memory_peak_bytes: Count | None = None
    detail: Text = ""


class UpdateReport(Struct, frozen=True, kw_only=True):
    """How the update that a rollout asked for is going."""

    rollout: ShortText
    sequence: Sequence  # of the `Desired` that asked for it
    version: ShortText
    outcome: Outcome
    code: ShortText = ""  # stable code of the reason where the outcome is a failure
    detail: Text = ""
    started_ms: Count = 0  # device clock
    finished_ms: Count | None = None
    transfer_bytes_total: Count = 0  # size of what has to be fetched
    full_bytes_total: Count = 0  # what whole files would take
    received_bytes: Count = 0  # chunk payloads taken from the air, useless ones included
    received_chunks: Count = 0
    redundant_chunks: Count = 0  # of these: valid, but there already
    invalid_chunks: Count = 0  # of these: not what the signed index says
    resumes: Count = 0  # times the transfer went on after a lost connection or a restart
    tries: Count = 0  # trials started
    states_ms: dict[ShortText, Count] = msgspec.field(default_factory=dict)  # time spent in each state
    evidence: TrialEvidence | None = None


class Capacity(Struct, frozen=True, kw_only=True):
    """What a device can spend on an update, by its configuration: it chooses among deltas by this (section 7.1)."""

    link_bytes_per_s: Annotated[int, Meta(ge=1, le=1 << 40)]
    processor_percent: Annotated[int, Meta(ge=1, le=10_000)]  # speed of one core, see `delta_graph.py`
    delta_memory_bytes: Count  # what applying a delta may take
    links_max: Annotated[int, Meta(ge=1, le=64)]  # files that it makes one after the other to get to a result
    in_place: bool = False  # it rewrites its files, and takes no delta that was not made for that


class Report(Struct, frozen=True, kw_only=True):
    """What a device says about itself; `dev/<id>/report`, retained, numbered, idempotent."""

    v: int = PROTOCOL_VERSION
    device: ShortText
    sequence: Sequence  # never goes back on one device, restarts included
    state: ShortText
    family: ShortText
    version: ShortText = ""  # empty: nothing installed
    files: dict[ShortText, DigestText] = msgspec.field(default_factory=dict)  # measured, not remembered
    tier: ShortText = ""
    runtimes: dict[ShortText, ShortText] = msgspec.field(default_factory=dict)
    disk_free_bytes: Count = 0
    memory_bytes: Count = 0
    capacity: Capacity | None = None  # absent: takes a single delta of profile `small`, or whole files
    root: Count = 0  # version of the newest root document that it trusts; 0 where it does not say
    desired_sequence: Sequence = 0  # highest of a `Desired` that it has recorded, whoever sent it
    update: UpdateReport | None = None
    alarm: ShortText | UnsetType = (
        UNSET  # stable code of why a wish was not taken: nobody who may wish has signed it, or that cannot be told
    )


class Link(Struct, frozen=True, kw_only=True):
    """Whether a device is connected; `dev/<id>/link`, retained, sent by the broker as the Will. A hint only."""

    v: int = PROTOCOL_VERSION
    online: bool


class ChunkRequest(Struct, frozen=True, kw_only=True, tag_field="type", tag="chunks"):
    """Asks for the chunks of a window that no cache delivered."""

    v: int = PROTOCOL_VERSION
    blob: DigestText
    first: Count  # number of the chunk that the first bit stands for
    wanted: Annotated[str, Meta(max_length=24)]  # base64, most significant bit first; see `encode_window`


class MetadataRequest(Struct, frozen=True, kw_only=True, tag_field="type", tag="metadata"):
    """Asks for the signed documents, for brokers that keep no retained messages."""

    v: int = PROTOCOL_VERSION
    root_version: Count  # the newest root that the device trusts
    roles: Annotated[tuple[RoleText, ...], Meta(max_length=ROLES_MAX)] = ()  # delegated ones that it needs
    nonce: Annotated[bytes, Meta(max_length=NONCE_BYTES_MAX)] = b""  # of a device that asks for the time, too


class TimeStatement(Struct, frozen=True, kw_only=True):
    """What time it is, for one request of one device; see `director.py` for what is signed."""

    time_ms: Count
    signatures: Annotated[
        dict[KeyIdText, SignatureText], Meta(max_length=SIGNATURES_MAX)
    ]  # hexadecimal, by key id


class MetadataBundle(Struct, frozen=True, kw_only=True):
    """Answer to a `MetadataRequest`: documents as they were signed, base64."""

    v: int = PROTOCOL_VERSION
    roots: list[bytes]  # successors of the root that was asked about, in order
    timestamp: bytes
    snapshot: bytes
    targets: bytes
    delegated: dict[RoleText, bytes] = msgspec.field(default_factory=dict)  # of the roles that were asked for
    time: TimeStatement | None = None  # for whoever asked with a nonce


class KeyRequest(Struct, frozen=True, kw_only=True, tag_field="type", tag="keys"):
    """Asks for the content keys of artifacts that are encrypted (section 5.5)."""

    v: int = PROTOCOL_VERSION
    blobs: Annotated[tuple[DigestText, ...], Meta(min_length=1, max_length=KEYS_MAX)]


class WrappedKey(Struct, frozen=True, kw_only=True):
    """A content key that one private key opens; see `encryption.py`."""

    blob: DigestText  # the artifact
    recipient: DigestText  # SHA-256 of the public key that it is wrapped for, as SubjectPublicKeyInfo
    wrapped: Annotated[bytes, Meta(max_length=256)]


class KeyAnswer(Struct, frozen=True, kw_only=True):
    """Answer to a `KeyRequest`: all keys, once for every valid certificate of the device, or the reason why there is none."""

    v: int = PROTOCOL_VERSION
    code: ShortText = ""
    detail: Text = ""
    keys: Annotated[tuple[WrappedKey, ...], Meta(max_length=2 * KEYS_MAX)] = ()


class CertificateRequest(Struct, frozen=True, kw_only=True):
    """Asks for a certificate, the first one with a claim or the next one; see `identity.py` for what is signed."""

    v: int = PROTOCOL_VERSION
    csr: Annotated[bytes, Meta(max_length=2048)]  # PKCS #10, DER
    signature: Annotated[
        bytes, Meta(max_length=128)
    ]  # by the key of the claim, or of the present certificate


class CertificateAnswer(Struct, frozen=True, kw_only=True):
    """What became of a `CertificateRequest`."""

    v: int = PROTOCOL_VERSION
    key: DigestText  # SHA-256 of the public key that was asked about, as SubjectPublicKeyInfo
    code: ShortText = ""  # stable code of why there is no certificate (yet)
    detail: Text = ""
    certificate: Annotated[bytes, Meta(max_length=4096)] = b""  # X.509, DER


class _Envelope(Struct, frozen=True, kw_only=True):
    """A report with its signature beside it; both are absent where a device has no certificate."""

    v: int = PROTOCOL_VERSION
    report: msgspec.Raw | UnsetType = UNSET
    signature: Annotated[bytes, Meta(max_length=128)] = b""


class SignedDesired(Struct, frozen=True, kw_only=True):
    """A `Desired` as the director signs it; see `director.py` for what is signed."""

    v: int = PROTOCOL_VERSION
    desired: msgspec.Raw
    signed_ms: Count
    expires_ms: Count
    signature: Annotated[bytes, Meta(max_length=128)]


class _DesiredEnvelope(Struct, frozen=True, kw_only=True):
    """A `Desired` with its signature beside it; without one, the fields are those of `Desired` itself."""

    v: int = PROTOCOL_VERSION
    desired: msgspec.Raw | UnsetType = UNSET
    signed_ms: Count = 0
    expires_ms: Count = 0
    signature: Annotated[bytes, Meta(max_length=128)] = b""


@dataclass(frozen=True, slots=True)
class ReceivedDesired:
    """A wish as it arrived.

    Attributes:
        desired: What it says.
        signed: The bytes that are signed.
        signed_ms: When, as the signer says; 0 where there is no signature.
        expires_ms: Until when it may be acted upon; likewise.
        signature: Empty where there is none.
    """

    desired: Desired
    signed: bytes
    signed_ms: int
    expires_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class ReceivedReport:
    """A report as it arrived.

    Attributes:
        report: What it says.
        signed: The bytes that are signed.
        signature: Empty where there is none.
    """

    report: Report
    signed: bytes
    signature: bytes


REQUEST_WINDOW_CHUNKS_MAX: Final = 64
"""Chunks that one request may name: 4 MiB of answers."""

BUNDLE_BYTES_MAX: Final = 1 << 20
"""A metadata bundle: the caps of the documents, several roots, base64."""

Request = ChunkRequest | MetadataRequest | KeyRequest
_Message = TypeVar("_Message", bound=Struct)
_encoder = msgspec.json.Encoder()
_decoders: Final[dict[Any, msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (
        Desired,
        Report,
        Link,
        Request,
        MetadataBundle,
        KeyAnswer,
        CertificateRequest,
        CertificateAnswer,
        _Envelope,
        _DesiredEnvelope,
    )
}


def encode_message(message: Struct) -> bytes:
    """Encode as JSON."""
    return _encoder.encode(message)


def decode_message(kind: type[_Message], payload: bytes) -> _Message:
    """Decode a JSON message of a known kind.

    Raises:
        MessageError: Too long, no valid JSON of that shape, or another protocol version.
    """
    message = _decode(kind, payload, BUNDLE_BYTES_MAX if kind is MetadataBundle else MESSAGE_BYTES_MAX)
    assert isinstance(message, kind)
    return message


def sealed_report(report: bytes, signature: bytes) -> bytes:
    """An encoded report, with its signature beside it."""
    return encode_message(_Envelope(report=msgspec.Raw(report), signature=signature))


def decode_report(payload: bytes) -> ReceivedReport:
    """Decode a report, signed or not; whether the signature is right is for `identity.py` to say.

    Raises:
        MessageError: As for `decode_message`.
    """
    envelope = decode_message(_Envelope, payload)
    signed = payload if envelope.report is UNSET else bytes(envelope.report)
    return ReceivedReport(decode_message(Report, signed), signed, envelope.signature)


def decode_desired(payload: bytes) -> ReceivedDesired:
    """Decode a wish, signed or not; whether the signature is right is for `director.py` to say.

    Raises:
        MessageError: As for `decode_message`.
    """
    envelope = decode_message(_DesiredEnvelope, payload)
    if envelope.desired is UNSET:
        return ReceivedDesired(decode_message(Desired, payload), payload, 0, 0, b"")
    signed = bytes(envelope.desired)
    desired = decode_message(Desired, signed)
    return ReceivedDesired(desired, signed, envelope.signed_ms, envelope.expires_ms, envelope.signature)


def decode_request(payload: bytes) -> Request:
    """Decode whatever a device may ask for.

    Raises:
        MessageError: As for `decode_message`.
    """
    message = _decode(Request, payload, MESSAGE_BYTES_MAX)
    assert isinstance(message, Request)
    return message


def encode_window(wanted: list[int], first: int) -> str:
    """Bitmap of the chunk numbers in `wanted`, which lie in `first` up to `first + REQUEST_WINDOW_CHUNKS_MAX`."""
    bits = bytearray((max(wanted) - first) // 8 + 1)
    for index in wanted:
        offset = index - first
        assert 0 <= offset < REQUEST_WINDOW_CHUNKS_MAX
        bits[offset // 8] |= 0x80 >> offset % 8
    return base64.b64encode(bits).decode()


def decode_window(request: ChunkRequest) -> list[int]:
    """Chunk numbers that a request names, ascending.

    Raises:
        MessageError: The bitmap is no base64, empty, or wider than `REQUEST_WINDOW_CHUNKS_MAX`.
    """
    try:
        bits = base64.b64decode(request.wanted, validate=True)
    except ValueError as error:
        raise MessageError("ChunkRequest.wanted is no base64") from error
    if not 0 < len(bits) <= REQUEST_WINDOW_CHUNKS_MAX // 8:
        raise MessageError(f"ChunkRequest.wanted has {len(bits)} bytes, allowed are 1 to 8")
    return [
        request.first + offset for offset in range(len(bits) * 8) if bits[offset // 8] & (0x80 >> offset % 8)
    ]


def _decode(kind: Any, payload: bytes, bytes_max: int) -> Any:
    name = getattr(kind, "__name__", "Request")
    if len(payload) > bytes_max:
        raise MessageError(f"{name} of {len(payload)} bytes, allowed are {bytes_max}")
    try:
        message = _decoders[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"{name}: {error}") from error
    if message.v != PROTOCOL_VERSION:
        raise MessageError(f"{name} of protocol version {message.v}, understood is {PROTOCOL_VERSION}")
    return message
