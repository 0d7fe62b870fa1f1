"""What a director and a server sign for single devices: which release to run, and what time it is (SPEC sections 8.4 and 8.5). Pure.

Whose keys count is said by signed metadata, see `trust.py`. A statement is a few lines of text that begin with its purpose and name the topic
on which it is sent, so none is good for another purpose, another device or another fleet.
"""

from typing import Final

from protocol.errors import TrustError
from protocol.ids import digest_of
from protocol.messages import ReceivedDesired

DESIRED_LIFE_MS: Final = 7 * 86_400_000
"""How long a signed wish may be acted upon: as long as a timestamp lives. A server signs those anew that wait for longer."""

DIRECTOR_KEYS_MAX: Final = 8
"""Keys of the director that are tried: one, or a second one for another server or while they are exchanged."""

KEY_BYTES: Final = 32
"""A public key of Ed25519, as it is."""

_DESIRED: Final = b"whimbrel desired 1"
_TIME: Final = b"whimbrel time 1"


class ForgedDesiredError(TrustError):
    """A wish that nobody has signed who may wish, by the newest metadata."""

    code = "trust.director"


class UnknownTimeError(TrustError):
    """What time it is cannot be told: the device has no clock that it could believe, and no server has said."""

    code = "trust.no_time"
    is_retryable = True


def desired_statement(topic: str, desired: bytes, signed_ms: int, expires_ms: int) -> bytes:
    """What the director signs.

    Args:
        topic: Of the device.
        desired: The wish, encoded.
        signed_ms: Now.
        expires_ms: Until when it may be acted upon.
    """
    parts = (topic, digest_of(desired), str(signed_ms), str(expires_ms))
    return b"\n".join((_DESIRED, *(part.encode() for part in parts)))


def time_statement(topic: str, nonce: bytes, time_ms: int) -> bytes:
    """What a server signs that is asked for the time.

    Args:
        topic: Of the answer.
        nonce: As the device asked.
        time_ms: Now.
    """
    return b"\n".join((_TIME, topic.encode(), nonce.hex().encode(), str(time_ms).encode()))


def received_statement(topic: str, received: ReceivedDesired) -> bytes:
    """What must have been signed if a wish that came on `topic` is genuine."""
    return desired_statement(topic, received.signed, received.signed_ms, received.expires_ms)
