"""Verification of signed metadata for many agents at once: what was verified before is remembered, by content.

Every set of documents that differs in a byte is verified by `protocol.trust`, as on a device. Of what the simulated server has just signed for
a device it is known that it verifies; everything else is verified.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

from protocol import trust
from protocol.director import received_statement
from protocol.errors import TrustError
from protocol.messages import decode_desired
from protocol.trust import Documents, Floors, Followed, Verified

AHEAD_MS: Final = 3_600_000
"""A set is tried at a later instant too: what is valid then is valid at every instant before, since time enters the
verification as an upper bound only."""

_Question = tuple[bytes, Documents, Floors, tuple[str, ...] | None]


class RememberedTrust:
    """The port `device.ports.Trust`."""

    def __init__(self) -> None:
        self.verifications = 0  # by `protocol.trust`
        self._roots: dict[bytes, int] = {}
        self._verified: dict[_Question, tuple[int, Verified]] = {}
        self._signed: set[bytes] = set()

    def check_root(self, root: bytes) -> int:
        """As `protocol.trust.check_root`."""
        version = self._roots.get(root)
        if version is None:
            version = self._roots[root] = trust.check_root(root)
        return version

    def follow(self, root: bytes, successor: bytes, floors: Floors) -> Followed:
        """As `protocol.trust.follow`."""
        return trust.follow(root, successor, floors)

    def verify(
        self,
        root: bytes,
        documents: Documents,
        floors: Floors,
        now_ms: int,
        roles: tuple[str, ...] | None = None,
    ) -> Verified:
        """As `protocol.trust.verify`; a refusal is never remembered."""
        key = (root, documents, floors, roles)
        known = self._verified.get(key)
        if known is not None and now_ms <= known[0]:
            return known[1]
        self.verifications += 1
        verified = trust.verify(root, documents, floors, now_ms, roles)
        until_ms = now_ms
        try:
            trust.verify(root, documents, floors, now_ms + AHEAD_MS, roles)
            until_ms += AHEAD_MS
        except TrustError:
            pass
        self._verified[key] = (until_ms, verified)
        return verified

    def verify_time(self, root: bytes, statement: bytes, signatures: Mapping[str, str]) -> None:
        """As `protocol.trust.verify_time`."""
        trust.verify_time(root, statement, signatures)

    def remember(self, topic: str, payload: bytes, key: bytes) -> None:
        """A wish was just signed with this key."""
        received = decode_desired(payload)
        self._signed.add(_digest(key, received_statement(topic, received), received.signature))

    def is_signed(self, key: bytes, statement: bytes, signature: bytes) -> bool:
        """As `protocol.trust.is_signed`."""
        return _digest(key, statement, signature) in self._signed or trust.is_signed(
            key, statement, signature
        )


def _digest(key: bytes, statement: bytes, signature: bytes) -> bytes:
    """Names a key, a signature and what it is under."""
    return hashlib.sha256(key + bytes([len(signature)]) + signature + statement).digest()
