"""`whimbrel devices …` and `whimbrel broker …`: who may speak to the broker, and what the broker needs to know of it."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from protocol.errors import RequestError
from protocol.ids import DeviceId
from server import identity
from server.adapters.authority import PASSPHRASE_VARIABLE, write_secret
from server.broker_files import CLAIMS_PORT, PORT, BrokerKind
from server.config import read_config, tls_lines
from server.display import Printer, table
from server.fleet.identities import CertificateRecord, ClaimRecord

_RELOAD: Final = {
    "mosquitto": "let mosquitto read them: copy them to its machine, then `systemctl reload mosquitto`, or SIGHUP",
    "emqx": "let EMQX read them: copy them to its machine, and restart it",
}
_NO_BROKER: Final = "no broker was configured here (`whimbrel broker config`): tell yours by other means"


def add_device_actions(
    devices: argparse.ArgumentParser, common: argparse.ArgumentParser, show: Printer
) -> Any:
    """The actions below `whimbrel devices`; returns what further ones can be added to."""
    actions = devices.add_subparsers(metavar="ACTION", title="certificates and labels")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, parents=[common], help=text)
        action.set_defaults(run=lambda arguments: run(arguments, show))
        return action

    claim = add("claim", _claim, "give a device leave to ask for its first certificate, once")
    _add_device(claim)
    claim.add_argument(
        "--hours", type=int, default=identity.CLAIM_HOURS, help="until it expires (default: %(default)s)"
    )
    claim.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there instead of printing it"
    )
    add("pending", _pending, "list devices that wait for their certificate")
    accept = add("accept", _accept, "give a device the certificate that it waits for")
    _add_device(accept)
    accept.add_argument(
        "--fingerprint", default="", help="as the device printed it; without it you are asked to compare"
    )
    accept.add_argument("--yes", action="store_true", help="you have compared the fingerprints")
    _add_device(add("refuse", _refuse, "do not give it, and void the claim"))
    _add_device(add("revoke", _revoke, "let a device speak no longer"))
    add("certificates", _certificates, "list all certificates, the broker's and the servers' too")
    return actions


def add_broker_parser(subparsers: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """`whimbrel broker`."""
    broker = subparsers.add_parser(
        "broker", help="write what mosquitto or EMQX need: certificates, rules, limits"
    )
    actions = broker.add_subparsers(metavar="ACTION", required=True)
    config = actions.add_parser(
        "config",
        parents=[common],
        help="write everything into a folder",
        description=f"Write everything into a folder. The first time certificate authorities are made, encrypted where ${PASSPHRASE_VARIABLE} names a file with a passphrase.",
    )
    config.add_argument("--for", dest="kind", choices=get_args(BrokerKind), default="mosquitto")
    config.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    _add_hosts(config)
    config.add_argument(
        "--path", help="where the files are going to lie on the broker's machine (default: FOLDER)"
    )
    config.add_argument("--bind", default="", help="address to listen on (default: all)")
    config.add_argument("--port", type=int, default=PORT, help="for devices (default: %(default)s)")
    config.add_argument(
        "--claims-port", type=int, default=CLAIMS_PORT, help="for claims (default: %(default)s)"
    )
    config.add_argument(
        "--devices-max", type=int, default=10_000, help="connected at a time (default: %(default)s)"
    )
    config.set_defaults(run=lambda arguments: _config(arguments, show))
    cert = actions.add_parser(
        "cert",
        parents=[common],
        help="a new certificate for the broker, or with --server for one more server",
    )
    cert.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    _add_hosts(cert)
    cert.add_argument("--server", metavar="NAME", help="of a further server on this fleet")
    cert.set_defaults(run=lambda arguments: _cert(arguments, show))
    revoke = actions.add_parser("revoke", parents=[common], help="let a server speak no longer")
    revoke.add_argument("server", metavar="NAME")
    revoke.set_defaults(run=lambda arguments: _revoke_server(arguments, show))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="name of the device")


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        help="name or address by which devices or servers call the broker; repeat",
    )


def _claim(arguments: argparse.Namespace, show: Printer) -> int:
    given = identity.claim_device(arguments.dir, arguments.device, hours=arguments.hours)
    value = {"device": given.record.device, "expires_ms": given.record.expires_ms}
    until = _instant(given.record.expires_ms)
    if arguments.output is None:
        show(arguments, {**value, "claim": given.text}, [given.text])
        sys.stderr.write(f"Good once, until {until}. On the device: whimbrel-device enroll --claim FILE\n")
        return 0
    write_secret(arguments.output, given.text.encode() + b"\n")
    lines = [
        f"{arguments.output} is good once, until {until}: bring it to {given.record.device}, and to nobody else",
        f"There: sudo whimbrel-device enroll --claim {arguments.output.name}",
    ]
    show(arguments, {**value, "file": str(arguments.output)}, lines)
    return 0


def _pending(arguments: argparse.Namespace, show: Printer) -> int:
    waiting = identity.pending_devices(arguments.dir)
    rows = [[claim.device, claim.fingerprint, _instant(claim.requested_ms)] for claim in waiting]
    lines = table(["DEVICE", "FINGERPRINT", "SINCE"], rows)
    show(arguments, [_claim_json(claim) for claim in waiting], lines or ["No device waits"])
    return 0


def _accept(arguments: argparse.Namespace, show: Printer) -> int:
    waiting = identity.waiting_device(arguments.dir, arguments.device)
    expected = arguments.fingerprint
    if not expected:
        expected = waiting.fingerprint  # nothing else may come in between
        if not arguments.yes:
            _compare(waiting.device, expected)
    accepted = identity.accept_device(arguments.dir, arguments.device, expected)
    record, broker = accepted.record, identity.read_broker(arguments.dir)
    lines = [
        f"{record.name} has a certificate for the key {waiting.fingerprint}, until {_instant(record.expires_ms)}",
        "It is sent as soon as `whimbrel serve` runs and the device asks",
    ]
    if accepted.files and broker is not None:
        lines.append(f"It was shut out before. Changed: {', '.join(map(str, accepted.files))}")
        lines.append(f"To let it in, {_RELOAD[broker.kind]}")
    value = {**_certificate_json(record), "files": [str(path) for path in accepted.files]}
    show(arguments, value, lines)
    return 0


def _compare(device: DeviceId, fingerprint: str) -> None:
    """Let a person compare.

    Raises:
        RequestError: Nobody can be asked, or it is another key.
    """
    sys.stderr.write(f"The key of {device} has the fingerprint {fingerprint}\n")
    if not sys.stdin.isatty():
        raise RequestError(
            "nobody has compared the fingerprint",
            hint="give --fingerprint as the device printed it, or --yes",
        )
    sys.stderr.write("Did the device print the same? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise RequestError(
            "not accepted", hint=f"`whimbrel devices refuse {device}` voids the claim if it is another key"
        )


def _refuse(arguments: argparse.Namespace, show: Printer) -> int:
    identity.refuse_device(arguments.dir, arguments.device)
    show(
        arguments,
        {"device": arguments.device},
        [f"{arguments.device} gets no certificate, its claim is void"],
    )
    return 0


def _revoke(arguments: argparse.Namespace, show: Printer) -> int:
    files = identity.revoke_name(arguments.dir, arguments.device)
    return _show_revoked(arguments, show, arguments.device, files)


def _revoke_server(arguments: argparse.Namespace, show: Printer) -> int:
    files = identity.revoke_name(arguments.dir, arguments.server, "server")
    return _show_revoked(arguments, show, arguments.server, files)


def _show_revoked(arguments: argparse.Namespace, show: Printer, name: str, files: list[Path]) -> int:
    broker = identity.read_broker(arguments.dir)
    lines = [f"{name} is revoked: what it says is ignored from now on"]
    if broker is None:
        lines.append(f"Note: {_NO_BROKER}")
    else:
        lines.append(f"Changed: {', '.join(map(str, files))}")
        lines.append(f"To shut it out, {_RELOAD[broker.kind]}")
    show(arguments, {"name": name, "files": [str(path) for path in files]}, lines)
    return 0


def _certificates(arguments: argparse.Namespace, show: Printer) -> int:
    records = identity.list_certificates(arguments.dir)
    rows = [
        [
            record.name,
            record.role,
            "-" if record.revoked_ms is None else f"revoked {_instant(record.revoked_ms)}",
            _instant(record.expires_ms),
            record.serial,
        ]
        for record in records
    ]
    lines = table(["NAME", "FOR", "REVOKED", "EXPIRES", "SERIAL"], rows)
    show(
        arguments,
        [_certificate_json(record) for record in records],
        lines or ["No certificate was issued yet"],
    )
    return 0


def _config(arguments: argparse.Namespace, show: Printer) -> int:
    before = identity.read_broker(arguments.dir)
    output = arguments.output.absolute()
    hosts = tuple(arguments.host) or (before.hosts if before else ())
    broker = identity.BrokerRecord(
        kind=arguments.kind,
        output=str(output),
        hosts=hosts,
        installed=(arguments.path or str(output)).rstrip("/"),
        bind=arguments.bind,
        port=_port(arguments.port, "--port"),
        claims_port=_port(arguments.claims_port, "--claims-port"),
        devices_max=arguments.devices_max,
    )
    files = identity.configure_broker(arguments.dir, broker)
    lines = [f"{output} has what {broker.kind} needs; the private key in it is for its machine only"]
    if broker.installed == str(output) and broker.kind == "mosquitto":
        lines.append(f"Try it: mosquitto -c {output}/mosquitto.conf")
    else:
        lines.append(f"Copy it to {broker.installed} on that machine, readable by the broker's user")
    settings = read_config(arguments.dir)
    if settings.tls is None:
        lines += [
            f"This server has a certificate too. In {arguments.dir}/whimbrel.toml:",
            f'  broker = "{hosts[0]}:{broker.port}"',
            *(f"  {line}" for line in tls_lines(identity.tls_settings())),
        ]
    show(arguments, {"folder": str(output), "files": [str(path) for path in files]}, lines)
    return 0


def _cert(arguments: argparse.Namespace, show: Printer) -> int:
    if arguments.server is not None:
        files = identity.make_server_certificate(arguments.dir, arguments.output, arguments.server)
        lines = [
            f"{arguments.output} has a key and a certificate for the server {arguments.server}",
            "The broker lets it publish once it has read its rules again",
        ]
    else:
        files = identity.make_broker_certificate(arguments.dir, arguments.output, arguments.host)
        lines = [f"{arguments.output} has a new key and certificate for the broker"]
    show(arguments, {"files": [str(path) for path in files]}, lines)
    return 0


def _port(port: int, name: str) -> int:
    if not 0 < port < 1 << 16:
        raise RequestError(f"{name} {port} is no port", hint="1 to 65535")
    return port


def _claim_json(claim: ClaimRecord) -> dict[str, Any]:
    return {
        "device": claim.device,
        "fingerprint": claim.fingerprint,
        "requested_ms": claim.requested_ms,
        "expires_ms": claim.expires_ms,
    }


def _certificate_json(record: CertificateRecord) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(record)
    del value["v"]
    return value


def _instant(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
