"""What trust costs: bytes of metadata, time and memory of verification, certificates and signed reports (`make bench-trust`).

    python -m benchmarks.trust [--rounds 200] [--broker embedded|mosquitto] [--json]

Repositories are made by the ceremony of docs/keys.md: root and targets 2 of 3, each family 2 of 2, Ed25519; `releases` of each family
are listed, each with its description, its whole file and a delta from the one before. Bytes on the wire count 52 bytes for each
TCP segment beside what it carries. Times are CPU time of this process, medians; on a shared machine read them as multiples of what stands beside
them, one Ed25519 verification and the SHA-256 of 1 MiB, which are measured in the same run. Memory is that of fresh processes.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]  # public, but without __all__

from benchmarks.at_rest import broker_of
from benchmarks.trust_repositories import Built, build
from benchmarks.trust_traffic import DEVICE, FLEET, measure_handshakes, measure_refresh, measure_update
from protocol.errors import RequestError
from protocol.identity import is_report_signed, make_key, seal_report
from protocol.ids import Family
from protocol.messages import MetadataBundle, decode_report, encode_message
from protocol.release import ARTIFACTS_ROLE, releases_role
from protocol.topics import Topics
from protocol.trust import Documents, Floors, verify
from server.adapters.clock import SystemClock
from server.broker.packets import Publish, encode

SIZES: Final = ((1, 1), (1, 10), (1, 100), (10, 1), (10, 10), (10, 100))
"""Families, and releases of each."""

FAMILY: Final = Family("family-0")
ROLES: Final = (releases_role(FAMILY), ARTIFACTS_ROLE)
MIB: Final = bytes(1 << 20)


class Report:
    """Rows for people as they come, or lines of JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._titles: tuple[str, ...] = ()

    def title(self, text: str) -> None:
        """Begin a table."""
        self._titles = ()
        if not self._as_json:
            print(f"\n{text}")

    def row(self, kind: str, **values: Any) -> None:
        """One row; the first one of a table brings its titles."""
        if self._as_json:
            print(json.dumps({"kind": kind, **values}), flush=True)
            return
        if tuple(values) != self._titles:
            self._titles = tuple(values)
            print("  ".join(name.replace("_", " ").rjust(_width(name)) for name in values))
        print("  ".join(_text(value).rjust(_width(name)) for name, value in values.items()), flush=True)


def _width(name: str) -> int:
    return max(len(name), 9)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trust", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=200, help="verifications of each kind (default: %(default)s)"
    )
    parser.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded")
    parser.add_argument("--json", action="store_true", help="one line for each row, for programs")
    arguments = parser.parse_args()
    report, now_ms = Report(as_json=arguments.json), SystemClock().now_ms()
    with tempfile.TemporaryDirectory() as scratch:
        built = list(repositories(report, now_ms))
        for each in built:
            show_documents(report, each)
        report.title(
            "to have the newest metadata: bytes on the wire of a device that trusts the newest root; and at rest, all of it signed anew"
        )
        for number, each in enumerate(built):
            with broker_of(arguments.broker, Path(scratch) / f"broker-{number}") as broker:
                show_refresh(report, each, measure_refresh(each, broker, now_ms))
        (Path(scratch) / "update").mkdir()
        with broker_of(arguments.broker, Path(scratch) / "broker-update") as broker:
            update = measure_update(Path(scratch) / "update", broker)
        report.title("MQTT bytes of a real agent of a small fleet (a 640 kB model), by what they are about")
        for name in ("check", "signed_anew", "update"):
            for about, count in sorted(getattr(update, name).items()) or [("nothing", 0)]:
                report.row("update", when=name, mqtt_bytes=count, about=about)
        show_times(report, built, arguments.rounds, now_ms)
        show_memory(report, built, Path(scratch), now_ms)
        show_identity(report, Path(scratch), now_ms, update.report, arguments.rounds)


def repositories(report: Report, now_ms: int) -> Iterator[Built]:
    """Those that can be."""
    for families, releases in SIZES:
        try:
            yield build(families, releases, now_ms)
        except RequestError as error:
            report.title(f"{families} families of {releases} releases cannot be: {error}")
            report.row("refused", families=families, per_family=releases, error=error.message)


# Bytes


def show_documents(report: Report, built: Built) -> None:
    """Lengths of the documents, and of the messages that carry them."""
    documents, topics = built.repository.documents, Topics(FLEET)
    delegated = dict(documents.delegated)
    found = {
        "root": built.repository.roots[-1],
        "timestamp": documents.timestamp,
        "snapshot": documents.snapshot,
        "targets": documents.targets,
        "releases": delegated[ROLES[0]],
        "artifacts": delegated[ROLES[1]],
    }
    needed = {role: data for role, data in found.items() if role != "root"}
    topic = {"releases": topics.metadata(ROLES[0]), "root": topics.root(len(built.repository.roots))}
    messages = {
        role: len(encode(Publish(topic.get(role) or topics.metadata(role), data, qos=1, packet_id=1)))
        for role, data in found.items()
    }
    if (built.families, built.releases) == SIZES[0]:
        report.title(
            "documents, bytes as signed (compact JSON); `update`: what a device looks at, as MQTT messages; `bundle`: the same as an answer"
        )
    bundle = MetadataBundle(
        roots=[],
        timestamp=documents.timestamp,
        snapshot=documents.snapshot,
        targets=documents.targets,
        delegated={role: delegated[role] for role in ROLES},
    )
    report.row(
        "documents",
        families=built.families,
        per_family=built.releases,
        **{role: len(data) for role, data in found.items()},
        update=sum(messages[role] for role in needed),
        bundle=len(encode_message(bundle)),
    )


def show_refresh(report: Report, built: Built, refresh: Any) -> None:
    """What went over the wire."""
    report.row(
        "refresh",
        families=built.families,
        per_family=built.releases,
        wire_bytes=refresh.traffic.wire_bytes,
        mqtt_bytes=refresh.traffic.payload_bytes,
        segments=refresh.traffic.segments,
        at_rest_bytes=refresh.at_rest.wire_bytes,
    )


# Time


def cpu_us(work: Callable[[], object], rounds: int) -> float:
    """CPU time of one call, microseconds: the median of batches."""
    batch = max(1, rounds // 20)
    work()
    found = []
    for _ in range(20):
        began = time.process_time_ns()
        for _ in range(batch):
            work()
        found.append((time.process_time_ns() - began) / batch / 1000)
    return statistics.median(found)


def signatures_checked(work: Callable[[], object]) -> int:
    """How many signatures a call verifies."""
    count = 0
    verify_signature = SSlibKey.verify_signature

    def counting(*arguments: Any) -> None:
        nonlocal count
        count += 1
        verify_signature(*arguments)

    with patch.object(SSlibKey, "verify_signature", counting):
        work()
    return count


def show_times(report: Report, built: list[Built], rounds: int, now_ms: int) -> None:
    """Verification of a whole set, beside the two yardsticks."""
    key, message = Ed25519PrivateKey.generate(), bytes(500)
    signature, public = key.sign(message), key.public_key()
    ed25519_us = cpu_us(lambda: public.verify(signature, message), 20 * rounds)
    sha256_us = cpu_us(lambda: hashlib.sha256(MIB).digest(), rounds)
    report.title("yardsticks of this run, microseconds of CPU time")
    report.row("yardsticks", ed25519_verify=ed25519_us, sha256_of_1_mib=sha256_us)
    report.title(
        "verification, CPU time: everything a device looks at, from the newest root; `rotated`: from the root before it"
    )
    for each in built:
        for name, trusted in (("newest", -1), ("rotated", 0)):
            repository = each.repository
            successors = repository.roots[trusted:][1:]
            documents = _needed(each, successors)
            root = repository.roots[trusted]

            def work(root: bytes = root, documents: Documents = documents) -> object:
                return verify(root, documents, Floors(), now_ms, ROLES)

            spent_us = cpu_us(work, rounds)
            report.row(
                "verify",
                families=each.families,
                per_family=each.releases,
                root=name,
                signatures=signatures_checked(work),
                ms=spent_us / 1000,
                x_ed25519=spent_us / ed25519_us,
                x_sha256_mib=spent_us / sha256_us,
            )


def _needed(built: Built, roots: tuple[bytes, ...] = ()) -> Documents:
    """What a device of one family looks at."""
    documents = built.repository.documents
    return Documents(
        roots=roots,
        timestamp=documents.timestamp,
        snapshot=documents.snapshot,
        targets=documents.targets,
        delegated=tuple((role, data) for role, data in documents.delegated if role in ROLES),
    )


# Memory


def show_memory(report: Report, built: list[Built], scratch: Path, now_ms: int) -> None:
    """Peaks of fresh processes; of which verification is what comes on top of the modules."""
    report.title(
        "peak of resident memory of a fresh process, MB: Python alone, with the modules, and after one verification"
    )
    nothing, imported = (_peak("nothing"), _peak("import"))
    for each in built:
        folder = scratch / f"documents-{each.families}-{each.releases}"
        folder.mkdir()
        documents = _needed(each)
        named = {
            "timestamp": documents.timestamp,
            "snapshot": documents.snapshot,
            "targets": documents.targets,
        }
        for role, data in {**named, **dict(documents.delegated), "root": each.repository.roots[-1]}.items():
            (folder / role).write_bytes(data)
        verified = _peak("verify", str(folder), str(now_ms))
        report.row(
            "memory",
            families=each.families,
            per_family=each.releases,
            python=nothing / 1e6,
            modules=imported / 1e6,
            verified=verified / 1e6,
            verification=(verified - imported) / 1e6,
        )


def _peak(*arguments: str) -> int:
    """The smallest of three: what a process needs, and not what else happened."""
    command = [sys.executable, "-m", "benchmarks.trust_memory", *arguments]
    return min(
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)
    )


# Identity


def show_identity(report: Report, scratch: Path, now_ms: int, sent: bytes, rounds: int) -> None:
    """Certificates, handshakes, signed reports."""
    folder = scratch / "identity"
    folder.mkdir()
    handshakes, certificates = measure_handshakes(folder, now_ms)
    report.title("certificates, bytes of DER (ECDSA on P-256)")
    report.row("certificates", **certificates)
    report.title("a TLS handshake in which both show a certificate, bytes above TCP")
    for each in handshakes:
        report.row("handshake", version=each.version, sent=each.sent, received=each.received)
    key, topic = make_key(), Topics(FLEET).report(DEVICE)
    sealed = seal_report(key, topic, sent)
    read = decode_report(sealed)
    public = key.public_key()
    if not is_report_signed(public, topic, read.signed, read.signature):
        raise SystemExit("whimbrel: the report is not signed")
    report.title("a report after an update, and the same one signed")
    report.row(
        "report",
        bytes=len(sent),
        signed=len(sealed),
        overhead=len(sealed) - len(sent),
        sign_us=cpu_us(lambda: seal_report(key, topic, sent), rounds),
        verify_us=cpu_us(lambda: is_report_signed(public, topic, read.signed, read.signature), rounds),
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
