"""A client for the tuf-conformance suite, whose CLIENT-CLI.md has its command line.

It fetches documents by name, as a client of a TUF mirror does and no device of ours, and hands the set to `protocol.trust`, which alone
decides. What it keeps is what a device keeps, root and floors; the other documents it lays where the suite looks, once they were
believed, and does not fetch again what they name.
"""

import argparse
import hashlib
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final

import msgspec
from tuf.api.metadata import TargetFile, Targets  # type: ignore[attr-defined]  # public, but without __all__

from protocol.constants import metadata_bytes_max
from protocol.errors import TransportError, TrustError, WhimbrelError
from protocol.trust import (
    ROOT_ROTATIONS_MAX,
    Documents,
    Floors,
    VerifiedFiles,
    check_root,
    follow,
    verify_files,
)

TIMEOUT_S: Final = 20.0
FLOORS: Final = "floors"
"""Has no .json at its end: the suite takes each such file for a document."""


class Client:
    """What a device knows, and a mirror.

    Args:
        folder: What is trusted.
        url: Of the mirror's metadata.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder: Final = folder
        self._url: Final = url.rstrip("/")
        self._root = (folder / "root.json").read_bytes()
        floors = folder / FLOORS
        self._floors = msgspec.json.decode(floors.read_bytes(), type=Floors) if floors.exists() else Floors()
        self._documents = Documents(timestamp=b"", snapshot=b"", targets=b"")

    def refresh(self) -> VerifiedFiles:
        """Follow the roots, then fetch and verify a set."""
        version = check_root(self._root)
        for number in range(version + 1, version + 1 + ROOT_ROTATIONS_MAX):
            successor = self._fetched(f"{number}.root.json", "root")
            if successor is None:
                break
            followed = follow(self._root, successor, self._floors)
            self._keep(followed.root, followed.floors)
        timestamp = self._needed("timestamp.json", "timestamp")
        if _version(timestamp) == self._floors.timestamp and (known := self._known("timestamp")):
            timestamp = known
        snapshot = self._listed("snapshot", _meta(timestamp))
        self._documents = Documents(
            timestamp=timestamp, snapshot=snapshot, targets=self._listed("targets", _meta(snapshot))
        )
        return self._verified()

    def find(self, path: str) -> TargetFile:
        """Who signs for a target: targets, or the first role that it asks and that knows it.

        Raises:
            TrustError: Nobody does.
        """
        found: TargetFile | None = self.refresh().files.get(path)
        targets = Targets.from_dict(_signed(self._documents.targets))
        delegations = targets.delegations.roles if targets.delegations is not None else None
        for role in (delegations or {}).values():
            if found is None and role.is_delegated_path(path):
                data = self._listed(role.name, _meta(self._documents.snapshot))
                delegated = (*self._documents.delegated, (role.name, data))
                self._documents = msgspec.structs.replace(self._documents, delegated=delegated)
                found = self._verified().files.get(path)
                if role.terminating:
                    break
        if found is None:
            raise TrustError(f"nobody signs for {path}")
        return found

    def _verified(self) -> VerifiedFiles:
        documents = self._documents
        delegated = dict(documents.delegated)
        now_ms = int(time.time() * 1000)
        verified = verify_files(self._root, documents, self._floors, now_ms, roles=tuple(delegated))
        self._keep(verified.root, verified.floors)
        believed = {
            "timestamp": documents.timestamp,
            "snapshot": documents.snapshot,
            "targets": documents.targets,
        }
        for role, data in (believed | delegated).items():
            self._file(role).write_bytes(data)
        return verified

    def _keep(self, root: bytes, floors: Floors) -> None:
        self._root, self._floors = root, floors
        (self._folder / "root.json").write_bytes(root)
        (self._folder / FLOORS).write_bytes(msgspec.json.encode(floors))

    def _listed(self, role: str, meta: dict[str, Any]) -> bytes:
        """A document by the version that another one names; a kept one if that is it."""
        entry = meta.get(f"{role}.json")
        if not isinstance(entry, dict):
            raise TrustError(f"{role} is not listed")
        known = self._known(role)
        if known is not None and _version(known) == entry.get("version"):
            return known
        name = urllib.parse.quote(role, "")
        return self._needed(f"{entry.get('version')}.{name}.json", role)

    def _known(self, role: str) -> bytes | None:
        path = self._file(role)
        return path.read_bytes() if path.exists() else None

    def _file(self, role: str) -> Path:
        return self._folder / f"{urllib.parse.quote(role, '')}.json"

    def _needed(self, name: str, role: str) -> bytes:
        data = self._fetched(name, role)
        if data is None:
            raise TransportError(f"{name} is not there")
        return data

    def _fetched(self, name: str, role: str) -> bytes | None:
        return fetched(f"{self._url}/{name}", metadata_bytes_max(role) + 1)


def fetched(url: str, length: int) -> bytes | None:
    """What stands at an address, at most so many bytes of it; None where nothing does."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return bytes(response.read(length))
    except urllib.error.HTTPError as error:
        if error.code in {403, 404}:
            return None
        raise TransportError(f"{url}: {error}") from error
    except OSError as error:
        raise TransportError(f"{url}: {error}") from error


def download(client: Client, name: str, url: str, folder: Path) -> None:
    """Fetch a target, if what was fetched before is not what is signed now."""
    file = client.find(name)
    path = folder / urllib.parse.quote(name, "")
    digest = file.hashes["sha256"]
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return
    before, slash, last = name.rpartition("/")
    data = fetched(f"{url.rstrip('/')}/{before}{slash}{digest}.{last}", file.length + 1)
    if data is None or len(data) != file.length or hashlib.sha256(data).hexdigest() != digest:
        raise TrustError(f"{name} is not what was signed")
    path.write_bytes(data)


def _signed(data: bytes) -> dict[str, Any]:
    """A document that is not believed yet, to see what it names."""
    try:
        document = json.loads(data)
        signed: dict[str, Any] = document["signed"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError(f"no document: {error}") from error
    return signed


def _version(data: bytes) -> object:
    return _signed(data).get("version")


def _meta(data: bytes) -> dict[str, Any]:
    meta = _signed(data).get("meta")
    return meta if isinstance(meta, dict) else {}


def main() -> int:
    """One command of the suite."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    arguments = parser.parse_args()
    try:
        if arguments.command == "init":
            (arguments.metadata_dir / "root.json").write_bytes(arguments.root.read_bytes())
            return 0
        client = Client(arguments.metadata_dir, arguments.metadata_url)
        if arguments.command == "refresh":
            client.refresh()
        for name in arguments.target_name:
            download(client, name, arguments.target_base_url, arguments.target_dir)
    except WhimbrelError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
