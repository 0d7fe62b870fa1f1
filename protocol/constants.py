"""Numbers of the protocol: those that both sides must agree on, and those that this implementation chose.

Section numbers refer to `SPEC.md`.
"""

from typing import Final

# --- Specification constants: a change here is a new protocol version ---------------------------------------

PROTOCOL_VERSION: Final = 1
"""Carried by every message (section 3)."""

DIGEST_BYTES: Final = 32
"""SHA-256 everywhere (section 2)."""

CHUNK_MESSAGE_BYTES_MAX: Final = 65_536
"""One MQTT payload that carries a chunk, header included (section 5): the size at which paho and the brokers
were fastest, and half of the smallest payload limit of the cloud brokers."""

CHUNK_HEADER_BYTES: Final = 40
"""magic(2) version(1) flags(1) index(4) digest of the blob(32); section 5.1."""

CHUNK_BYTES: Final = CHUNK_MESSAGE_BYTES_MAX - CHUNK_HEADER_BYTES
"""Payload of every chunk but the last of a blob (section 5.1)."""

GROUP_CHUNKS: Final = 8
"""Chunks below one topic group (section 4.3); also the largest number of filters in one SUBSCRIBE that the
cloud brokers take."""

INDEX_FANOUT: Final = CHUNK_BYTES // DIGEST_BYTES
"""Digests in one full chunk of an index blob (section 5.2)."""

CONTENT_KEY_BYTES: Final = 32
"""AES-256, for artifacts that are encrypted (section 5.5)."""

# --- Implementation limits: each bounds what outsiders can make us do ---------------------------------------

BLOB_BYTES_MAX: Final = 1 << 40
"""1 TiB: above every model file that exists; keeps all offsets far from 64-bit overflow."""

INDEX_LEVELS_MAX: Final = 4
"""2047 ** 4 chunks is more than `BLOB_BYTES_MAX` needs."""

MESSAGE_BYTES_MAX: Final = 65_536
"""A JSON message (reports, desired states, requests); real ones are below 4 KiB."""

METADATA_BYTES_MAX: Final = {
    "root": 32_768,
    "timestamp": 4_096,
    "snapshot": 65_536,
    "targets": 262_144,
    "artifacts": 262_144,
    "releases": 131_072,
}
"""Signed metadata documents. Together, with one root, they fit into one answer to a device (`BUNDLE_BYTES_MAX`)."""

DELEGATED_MAX: Final = 512
"""Delegated roles that are looked at: as many as a snapshot of the largest size lists (5.6.7.1 of TUF)."""

DESIRED_LEAP_MAX: Final = 1 << 20
"""How far above the last one the number of a wish may be (section 3): whoever has the director's key for a moment, or may publish once in
a fleet without a director, could use up all numbers at once, and no wish of the server would ever be newer. Honest numbers grow by a few
with each rollout."""

RELEASE_BYTES_MAX: Final = 1 << 20
"""A release description with its golden prompts."""

FLEET_TOPIC_PREFIX: Final = "wb1"
"""First level of every topic is `wb1.<fleet>` (section 4)."""


def metadata_bytes_max(role: str) -> int:
    """Longest document of a role; `releases.<family>` and delegated roles of other names share a limit."""
    return METADATA_BYTES_MAX.get(role, METADATA_BYTES_MAX["releases"])
