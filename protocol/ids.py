"""Names and digests: the few strings that identify things, each parsed once and typed from then on.

A name becomes an MQTT topic level and a file name, so the grammar is the narrow common part of both
(SPEC section 2). In particular no `/`, `+`, `#`, `.` or upper case, so no name can widen a subscription, leave a
folder, or differ from another by case only.
"""

import hashlib
import re
from typing import Final, NewType

from protocol.errors import TopicError

DeviceId = NewType("DeviceId", str)
FleetId = NewType("FleetId", str)
Family = NewType("Family", str)
Version = NewType("Version", str)
Digest = NewType("Digest", str)
"""SHA-256 in 64 lower-case hexadecimal digits."""

ClaimId = NewType("ClaimId", str)
"""16 lower-case hexadecimal digits (SPEC section 10.2)."""

NAME_PATTERN: Final = r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?"
_NAME: Final = re.compile(NAME_PATTERN)
VERSION_PATTERN: Final = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_VERSION: Final = re.compile(VERSION_PATTERN)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CLAIM: Final = re.compile(r"[0-9a-f]{16}")

NAME_RULE: Final = "lower-case letters, digits and inner hyphens, 1 to 64 characters"
VERSION_RULE: Final = "lower-case letters, digits and inner dots, hyphens or underscores, 1 to 64 characters"


def parse_device_id(text: str) -> DeviceId:
    """Check a device identity.

    Raises:
        TopicError: The text is no name.
    """
    return DeviceId(_checked(text, "device id", _NAME, NAME_RULE))


def parse_fleet_id(text: str) -> FleetId:
    """Check a fleet name.

    Raises:
        TopicError: The text is no name.
    """
    return FleetId(_checked(text, "fleet", _NAME, NAME_RULE))


def parse_family(text: str) -> Family:
    """Check the name of a model family.

    Raises:
        TopicError: The text is no name.
    """
    return Family(_checked(text, "model family", _NAME, NAME_RULE))


def parse_version(text: str) -> Version:
    """Check a version of a model family; versions are names, not numbers, and are never ordered.

    Raises:
        TopicError: The text is no version.
    """
    return Version(_checked(text, "version", _VERSION, VERSION_RULE))


def parse_digest(text: str) -> Digest:
    """Check a SHA-256 digest in lower-case hexadecimal.

    Raises:
        TopicError: The text is no digest.
    """
    return Digest(_checked(text, "digest", _DIGEST, "64 lower-case hexadecimal digits"))


def parse_claim_id(text: str) -> ClaimId:
    """Check the number of a claim.

    Raises:
        TopicError: The text is none.
    """
    return ClaimId(_checked(text, "claim", _CLAIM, "16 lower-case hexadecimal digits"))


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """SHA-256 of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())


def _checked(text: str, what: str, grammar: re.Pattern[str], rule: str) -> str:
    if not grammar.fullmatch(text):
        raise TopicError(f"{what} {text[:80]!r} is not allowed", hint=f"use {rule}")
    return text
