"""A repository by hand: whatever the metadata can express, signed by whoever the test says, as an honest or a hostile signer would."""

import datetime as dt
from collections.abc import Iterable
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from protocol.chunks import build_tree
from protocol.ids import Family, digest_of
from protocol.release import ARTIFACTS_ROLE, releases_role, role_paths
from protocol.trust import TIME_FIELD, Documents, Floors, Verified, verify

NOW_MS: Final = 1_800_000_000_000
DAY_MS: Final = 86_400_000
VERSION_MAX: Final = 1 << 63
DIGITS: Final = releases_role(Family("digits"))
SPEC: Final = "1.0.31"


def key(name: str) -> CryptoSigner:
    """A key of this name: always the same."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(digest_of(name.encode())[:32].encode()))


def renamed(signer: CryptoSigner, keyid: str) -> CryptoSigner:
    """The same key under another id."""
    public = signer.public_key
    copy = SSlibKey(keyid, public.keytype, public.scheme, dict(public.keyval))
    return CryptoSigner(signer._private_key, copy)


def expiry(days: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(NOW_MS // 1000, dt.UTC) + dt.timedelta(days=days)


def target_file(path: str, data: bytes = b"content") -> TargetFile:
    digest = digest_of(data)
    tree, _ = build_tree([bytes.fromhex(digest)])
    return TargetFile(
        len(data),
        {"sha256": digest},
        path,
        {"custom": {"chunks": {"root": tree.root, "levels": tree.levels}}},
    )


class Author:
    """Root and targets two of three, one family signed by builder and approver, the rest online: what `keys` leads to."""

    def __init__(self) -> None:
        self.signers: dict[str, list[CryptoSigner]] = {
            "root": [key("ana"), key("ben"), key("cem")],
            "targets": [key("ana"), key("ben"), key("cem")],
            "timestamp": [key("timestamp")],
            "snapshot": [key("snapshot")],
            ARTIFACTS_ROLE: [key("artifacts")],
            DIGITS: [key("builder"), key("approver")],
        }
        self.thresholds = {"root": 2, "targets": 2, DIGITS: 2}
        self.days: dict[str, float] = {"timestamp": 7, "snapshot": 14}
        self.versions: dict[str, int] = {}
        self.paths = {role: list(role_paths(role)) for role in (ARTIFACTS_ROLE, DIGITS)}
        self.content: dict[str, list[str]] = {
            DIGITS: ["releases/digits/v1.json"],
            ARTIFACTS_ROLE: [],
            "targets": [],
        }
        self.terminating = True
        self.unlisted: set[str] = set()
        self.time_ms: Any = None
        self.roots: list[bytes] = []
        self.rotate()

    # --- what honest signers do

    def rotate(self, **signers: list[CryptoSigner]) -> bytes:
        """The next root, signed by all keys of the one before and of its own."""
        before = self.signers["root"] if self.roots else []
        self.signers.update(signers)
        self.roots.append(self.root(by=[*before, *self.signers["root"]]))
        return self.roots[-1]

    def documents(self) -> Documents:
        """Everything signed anew, one version later."""
        for role in ("targets", *self.delegated(), "snapshot", "timestamp"):
            self.versions[role] = self.versions.get(role, 0) + 1
        return self.assembled()

    def assembled(self, **given: bytes) -> Documents:
        """The versions as they are, with what is given in place of what would be signed."""
        delegated = tuple((role, given.get(role) or self.targets(role)) for role in self.delegated())
        targets = given.get("targets") or self.top_targets()
        snapshot = given.get("snapshot") or self.snapshot(dict([*delegated, ("targets", targets)]))
        return Documents(
            timestamp=given.get("timestamp") or self.timestamp(snapshot),
            snapshot=snapshot,
            targets=targets,
            delegated=delegated,
        )

    # --- single documents, by whoever

    def root(self, by: Iterable[CryptoSigner], version: int | None = None, **changes: Any) -> bytes:
        root = Root(
            version or len(self.roots) + 1,
            SPEC,
            expiry(self.days.get("root", 365)),
            consistent_snapshot=False,
        )
        for role in ("root", "targets", "snapshot", "timestamp"):
            for signer in self.signers[role]:
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = self.thresholds.get(role, 1)
        for name, value in changes.items():
            setattr(root, name, value)
        return signed(root, by)

    def top_targets(self, by: Iterable[CryptoSigner] | None = None) -> bytes:
        targets = Targets(self.versions["targets"], SPEC, expiry(self.days.get("targets", 365)))
        targets.targets = {path: target_file(path) for path in self.content["targets"]}
        roles: dict[str, DelegatedRole] = {}
        keys: dict[str, Key] = {}
        for role in self.delegated():
            signers = self.signers[role]
            keys.update({signer.public_key.keyid: signer.public_key for signer in signers})
            roles[role] = DelegatedRole(
                role,
                [signer.public_key.keyid for signer in signers],
                self.thresholds.get(role, 1),
                self.terminating,
                self.paths[role],
            )
        targets.delegations = Delegations(keys, roles)
        return signed(targets, self.signers["targets"] if by is None else by)

    def targets(self, role: str, by: Iterable[CryptoSigner] | None = None) -> bytes:
        document = Targets(self.versions[role], SPEC, expiry(self.days.get(role, 90)))
        document.targets = {path: target_file(path, role.encode()) for path in self.content[role]}
        return signed(document, self.signers[role] if by is None else by)

    def snapshot(self, listed: dict[str, bytes], by: Iterable[CryptoSigner] | None = None) -> bytes:
        meta = {
            f"{role}.json": MetaFile.from_data(self.versions[role], data, ["sha256"])
            for role, data in listed.items()
            if role not in self.unlisted
        }
        snapshot = Snapshot(self.versions["snapshot"], SPEC, expiry(self.days["snapshot"]), meta)
        return signed(snapshot, self.signers["snapshot"] if by is None else by)

    def timestamp(self, snapshot: bytes, by: Iterable[CryptoSigner] | None = None) -> bytes:
        meta = MetaFile.from_data(self.versions["snapshot"], snapshot, ["sha256"])
        fields = {} if self.time_ms is None else {TIME_FIELD: self.time_ms}
        timestamp = Timestamp(self.versions["timestamp"], SPEC, expiry(self.days["timestamp"]), meta, fields)
        return signed(timestamp, self.signers["timestamp"] if by is None else by)

    def delegated(self) -> list[str]:
        return list(self.paths)


def signed(document: Any, by: Iterable[CryptoSigner]) -> bytes:
    metadata = Metadata(document)
    for signer in by:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


class Believer:
    """What a device keeps and does: the newest root, floors, one refresh after the other."""

    def __init__(self, root: bytes, now_ms: int = NOW_MS) -> None:
        self.root = root
        self.floors = Floors()
        self.now_ms = now_ms
        self.roles: tuple[str, ...] | None = None

    def refresh(self, documents: Documents, roots: Iterable[bytes] = ()) -> Verified:
        verified = verify(
            self.root, replace(documents, roots=tuple(roots)), self.floors, self.now_ms, self.roles
        )
        self.root, self.floors = verified.root, verified.floors
        return verified
