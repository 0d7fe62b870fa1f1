"""Verification of signed metadata for many agents at once: what was verified before is remembered, by content.

Every set of documents that differs in a byte is verified by `protocol.trust`, as on a device.
"""

from typing import Final

from protocol import trust
from protocol.errors import TrustError
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
