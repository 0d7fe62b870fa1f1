"""What an operator can do about identities, as plain calls: claims, certificates, and the files of a broker (SPEC section 10).

Each call opens the server's folder, acts in one transaction and closes it, as those of `operations.py`; a running server notices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import Struct

from protocol.errors import RequestError
from protocol.identity import Claim, PublicKey, encode_claim, key_number, key_pem, make_key, public_der
from protocol.ids import DeviceId, parse_device_id
from server.adapters.authority import Authority, Issued, write_secret
from server.adapters.blobs import storage_errors, write_file
from server.adapters.tls import expires_ms
from server.audit import Act
from server.broker_files import (
    CA_FILE,
    CERTIFICATE_FILE,
    CLAIMS_CA_FILE,
    CLAIMS_PORT,
    KEY_FILE,
    PORT,
    REVOKED_FILE,
    BrokerKind,
    BrokerLayout,
    layout_files,
    rule_files,
)
from server.config import TlsSettings
from server.fleet.identities import (
    CertificateRecord,
    ClaimRecord,
    Identities,
    IdentityRecord,
    Issue,
    Role,
    accept,
    open_claim,
    refuse,
    revoke,
    waiting_claim,
)
from server.home import Home, opened

AUTHORITY_FOLDER: Final = "ca"
TLS_FOLDER: Final = "tls"
BROKER_FILE: Final = "broker.json"
"""What `broker config` was told, so that a revocation can write the files again."""

SERVER_PREFIX: Final = "server."
"""Before the name of a server in its certificate: no device id has a dot."""

_COMMON_NAME_CHARS_MAX: Final = 64
"""X.520 allows no more (ub-common-name)."""

CLAIM_HOURS: Final = 72
CLAIM_HOURS_MAX: Final = 24 * 90
_HOUR_MS: Final = 3_600_000
RENEW_MS: Final = 60 * 24 * _HOUR_MS
"""The broker's and the server's own certificates are made anew by `broker config` this long before their end."""


class BrokerRecord(Struct, frozen=True, kw_only=True):
    """The broker of this server, as `broker config` was told.

    Attributes:
        kind: Of broker.
        output: Folder that the files are written to.
        hosts: Names and addresses by which it is called.
        installed: Where the files are going to lie on its machine.
        bind: Address that it listens on; empty for all.
        port: For devices and servers.
        claims_port: For claims.
        devices_max: Devices that may be connected at a time.
    """

    kind: BrokerKind
    output: str
    hosts: tuple[str, ...]
    installed: str
    bind: str = ""
    port: int = PORT
    claims_port: int = CLAIMS_PORT
    devices_max: int = 10_000


@dataclass(frozen=True, slots=True)
class ClaimGiven:
    """A claim, for the device.

    Attributes:
        text: What the device is given; a secret until it is used.
        record: What the server keeps.
    """

    text: str
    record: ClaimRecord


def claim_device(
    folder: Path, device: str, *, hours: int = CLAIM_HOURS, claims_port: int | None = None
) -> ClaimGiven:
    """Give a device leave to ask for its first certificate, once.

    Args:
        folder: The server's.
        device: Its name.
        hours: Until the claim expires.
        claims_port: Of the broker; by default what `broker config` was told.

    Raises:
        RequestError: The device has a certificate or has asked for one, or there is no authority.
        TopicError: The name is none.
    """
    name = parse_device_id(device)
    if not 1 <= hours <= CLAIM_HOURS_MAX:
        raise RequestError(f"a claim of {hours} hours; allowed are 1 to {CLAIM_HOURS_MAX}")
    with opened(folder) as home, home.attempting("device.claim", name):
        authority, now_ms, key = ensure_authority(home), home.clock.now_ms(), make_key()
        record = ClaimRecord(
            claim=authority.new_claim(),
            device=name,
            public_key=public_der(key.public_key()),
            created_ms=now_ms,
            expires_ms=now_ms + hours * _HOUR_MS,
        )
        issued = authority.issue_claim(record.claim, key.public_key(), now_ms, record.expires_ms)
        act = home.act("device.claim", name, claim=record.claim, hours=hours)
        home.store.change_identities(
            lambda identities: [*open_claim(identities, name, lambda: record, now_ms), act]
        )
        if claims_port is None:
            broker = read_broker(folder)
            claims_port = broker.claims_port if broker else CLAIMS_PORT
        claim = Claim(
            fleet=home.config.fleet,
            device=name,
            claim=record.claim,
            expires_ms=record.expires_ms,
            port=claims_port,
            key=key_number(key),
            certificate=issued.certificate,
            authority=authority.der(),
        )
        return ClaimGiven(encode_claim(claim), record)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A certificate that an operator gave.

    Attributes:
        record: The certificate.
        files: Of the broker, which shut the device out before; it has to be told to read them again.
    """

    record: CertificateRecord
    files: list[Path]


def pending_devices(folder: Path) -> list[ClaimRecord]:
    """Devices that wait for their certificate, those first that have waited longest."""
    with opened(folder) as home:
        return home.store.identities().pending(home.clock.now_ms())


def waiting_device(folder: Path, device: str) -> ClaimRecord:
    """The claim with which a device waits.

    Raises:
        RequestError: It does not.
    """
    with opened(folder) as home:
        return waiting_claim(home.store.identities(), parse_device_id(device), home.clock.now_ms())


def accept_device(folder: Path, device: str, expected: str = "") -> Accepted:
    """Give a device the certificate that it waits for.

    Args:
        folder: The server's.
        device: Its name.
        expected: Fingerprint that the device printed; empty where a person has compared it.

    Raises:
        RequestError: It waits for none, or its key has another fingerprint.
        MissingKeyError: The key of the authority is not there.
    """
    name = parse_device_id(device)
    with opened(folder) as home, home.attempting("device.accept", name):
        now_ms = home.clock.now_ms()
        issue = issuer(authority_of(folder), now_ms, home.config.certificate_days)
        was_barred = name in home.store.identities().barred(now_ms)
        identities = home.store.change_identities(
            lambda before: noted(accept(before, name, issue, now_ms, expected), home, "device.accept", name)
        )
        record = max(identities.valid(name, now_ms), key=lambda record: record.issued_ms)
        broker = read_broker(folder) if was_barred else None
        return Accepted(record, [] if broker is None else _write_rules(home, broker, identities, now_ms))


def refuse_device(folder: Path, device: str) -> None:
    """Do not give a device the certificate that it waits for; its claim is void.

    Raises:
        RequestError: It waits for none.
    """
    name = parse_device_id(device)
    with opened(folder) as home, home.attempting("device.refuse", name):
        now_ms = home.clock.now_ms()
        home.store.change_identities(
            lambda before: noted(refuse(before, name, now_ms), home, "device.refuse", name)
        )


def list_certificates(folder: Path) -> list[CertificateRecord]:
    """Every certificate that was issued, newest first."""
    with opened(folder) as home:
        records = home.store.identities().certificates.values()
        return sorted(records, key=lambda record: (-record.issued_ms, record.serial))


def revoke_name(folder: Path, name: str, role: Role = "device") -> list[Path]:
    """Let a device or a server speak no longer: its reports are ignored at once, the broker shuts it out once it has the new files.

    Returns:
        The files of the broker that changed; the broker has to be told to read them again.

    Raises:
        RequestError: It has no valid certificate and no claim.
        MissingKeyError: The key of the authority is not there, so that the broker's list cannot be signed.
    """
    if role == "device":
        parse_device_id(name)
    else:
        name = server_name(name)
    what = f"{role}.revoke"
    with opened(folder) as home, home.attempting(what, name):
        now_ms = home.clock.now_ms()
        identities = home.store.change_identities(
            lambda before: noted(revoke(before, name, role, now_ms), home, what, name)
        )
        broker = read_broker(folder)
        return [] if broker is None else _write_rules(home, broker, identities, now_ms)


def configure_broker(folder: Path, broker: BrokerRecord) -> list[Path]:
    """Write everything that a broker needs, and give this server a certificate to speak to it; authorities are made where there are none.

    Keys and certificates that are there and good for a while stay.

    Returns:
        The files that were written.

    Raises:
        RequestError: A host is none.
        MissingKeyError: The key of the authority is not there.
        StorageError: A folder cannot be written.
    """
    with opened(folder) as home:
        authority, now_ms = ensure_authority(home), home.clock.now_ms()
        output = Path(broker.output)
        before = read_broker(folder)
        with storage_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        written = []
        is_known = before is not None and (before.output, before.hosts) == (broker.output, broker.hosts)
        if not is_known or _is_stale(output / CERTIFICATE_FILE, output / KEY_FILE, now_ms):
            written += issue_broker(home, authority, output, broker.hosts, now_ms)
        server = home.config.folder / TLS_FOLDER
        if _is_stale(server / "server.pem", server / "server.key", now_ms):
            written += issue_server(home, authority, server, home.config.fleet, now_ms)
        for name, data in ((CA_FILE, authority.pem()), (CLAIMS_CA_FILE, authority.pem("claims"))):
            write_file(output / name, data)
            written.append(output / name)
        for name, text in layout_files(broker.kind, _layout(home, broker)).items():
            write_file(output / name, text.encode())
            written.append(output / name)
        write_file(folder / BROKER_FILE, msgspec.json.format(msgspec.json.encode(broker), indent=2))
        home.store.save(
            [home.act("broker.config", ", ".join(broker.hosts), kind=broker.kind, port=broker.port)]
        )
        return written + _write_rules(home, broker, home.store.identities(), now_ms)


def make_broker_certificate(folder: Path, output: Path, hosts: Sequence[str]) -> list[Path]:
    """A new key and certificate for a broker.

    Raises:
        RequestError: A host is none.
        MissingKeyError: The key of the authority is not there.
    """
    with opened(folder) as home:
        return issue_broker(home, ensure_authority(home), output, tuple(hosts), home.clock.now_ms())


def make_server_certificate(folder: Path, output: Path, name: str) -> list[Path]:
    """A key and a certificate for one more server on this fleet; the broker knows it once it has its new rules.

    Raises:
        TopicError: The name is none.
        MissingKeyError: The key of the authority is not there.
    """
    with opened(folder) as home:
        authority, now_ms = ensure_authority(home), home.clock.now_ms()
        written = issue_server(home, authority, output, parse_device_id(name), now_ms)
        write_file(output / CA_FILE, authority.pem())
        broker = read_broker(folder)
        rules = [] if broker is None else _write_rules(home, broker, home.store.identities(), now_ms)
        return [*written, output / CA_FILE, *rules]


def tls_settings() -> TlsSettings:
    """The table `[tls]` of this server, with what `configure_broker` made."""
    return TlsSettings(
        ca=f"{AUTHORITY_FOLDER}/devices.pem",
        certificate=f"{TLS_FOLDER}/server.pem",
        key=f"{TLS_FOLDER}/server.key",
    )


def read_broker(folder: Path) -> BrokerRecord | None:
    """What `broker config` was told last; nothing where it never ran.

    Raises:
        RequestError: The file is malformed.
    """
    path = folder / BROKER_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=BrokerRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise RequestError(f"{path}: {error}", hint="run `whimbrel broker config` anew") from error


def authority_of(folder: Path) -> Authority:
    """The authority in a server's folder, whether there is one or not."""
    return Authority(folder / AUTHORITY_FOLDER)


def server_name(name: str) -> str:
    """What a server is called in its certificate; a name that has the prefix keeps it, a long one is cut."""
    return (SERVER_PREFIX + name.removeprefix(SERVER_PREFIX))[:_COMMON_NAME_CHARS_MAX]


def ensure_authority(home: Home) -> Authority:
    """The authority in a server's folder, made where there is none.

    Raises:
        StorageError: The folder cannot be written.
    """
    authority = authority_of(home.config.folder)
    if not authority.exists:
        authority.create(home.config.fleet, home.clock.now_ms())
    return authority


def issuer(authority: Authority, now_ms: int, days: int) -> Issue:
    """Makes certificates for devices."""

    def issue(device: DeviceId, key: PublicKey) -> CertificateRecord:
        return _record("device", device, authority.issue_device(device, key, now_ms, days), now_ms)

    return issue


def issue_broker(
    home: Home, authority: Authority, output: Path, hosts: tuple[str, ...], now_ms: int
) -> list[Path]:
    """Make a key and a certificate for a broker, and note it."""
    if not hosts:
        raise RequestError(
            "by which names and addresses is the broker called?", hint="give --host, as often as needed"
        )
    key = make_key()
    issued = authority.issue_broker(hosts, key.public_key(), now_ms)
    act = home.act("broker.certificate", hosts[0], serial=issued.serial)
    home.store.change_identities(lambda _: [_record("broker", hosts[0], issued, now_ms), act])
    return _write_pair(output / CERTIFICATE_FILE, output / KEY_FILE, issued, key_pem(key))


def issue_server(home: Home, authority: Authority, output: Path, name: str, now_ms: int) -> list[Path]:
    """Make a key and a certificate for a server, and note it."""
    key, full = make_key(), server_name(name)
    issued = authority.issue_server(full, key.public_key(), now_ms)
    act = home.act("server.certificate", full, serial=issued.serial)
    home.store.change_identities(lambda _: [_record("server", full, issued, now_ms), act])
    return _write_pair(output / "server.pem", output / "server.key", issued, key_pem(key))


def noted(records: Sequence[IdentityRecord], home: Home, what: str, name: str) -> list[IdentityRecord | Act]:
    """What was decided about identities, with the act to be noted; the serial of a certificate says which one."""
    serials = [record.serial for record in records if isinstance(record, CertificateRecord)]
    return [*records, home.act(what, name, serial=", ".join(serials))] if records else []


def _record(role: Role, name: str, issued: Issued, now_ms: int) -> CertificateRecord:
    return CertificateRecord(
        serial=issued.serial,
        role=role,
        name=name,
        certificate=issued.certificate,
        key=issued.key,
        issued_ms=now_ms,
        expires_ms=issued.expires_ms,
    )


def _write_pair(certificate: Path, key: Path, issued: Issued, pem: bytes) -> list[Path]:
    with storage_errors(key.parent):
        key.parent.mkdir(parents=True, exist_ok=True)
    write_secret(key, pem)
    write_file(certificate, x509.load_der_x509_certificate(issued.certificate).public_bytes(Encoding.PEM))
    return [certificate, key]


def _is_stale(certificate: Path, key: Path, now_ms: int) -> bool:
    """Whether a pair has to be made (anew)."""
    return not key.exists() or not certificate.exists() or expires_ms(certificate) - now_ms < RENEW_MS


def _layout(home: Home, broker: BrokerRecord) -> BrokerLayout:
    return BrokerLayout(
        fleet=home.config.fleet,
        folder=broker.installed,
        bind=broker.bind,
        port=broker.port,
        claims_port=broker.claims_port,
        devices_max=broker.devices_max,
    )


def _write_rules(home: Home, broker: BrokerRecord, identities: Identities, now_ms: int) -> list[Path]:
    """Write what changes with revocations."""
    output = Path(broker.output)
    fleet = home.config.fleet
    texts = rule_files(broker.kind, fleet, identities.servers(now_ms), identities.barred(now_ms))
    files = {name: text.encode() for name, text in texts.items()}
    if broker.kind == "mosquitto":
        authority = authority_of(home.config.folder)
        files[REVOKED_FILE] = authority.revocations(identities.revoked(now_ms), now_ms)
    for name, data in files.items():
        write_file(output / name, data)
    return [output / name for name in files]
