"""Signs for single devices: which release they should run, and what time it is (SPEC sections 8.4 and 8.5). Pure.

Who may is said by the signed documents: targets names the keys of the director, root those of `timestamp`. What a director can choose among is
said by the role of each family, whose keys are elsewhere.
"""

from collections.abc import Callable

import msgspec
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.director import DESIRED_LIFE_MS, desired_statement, time_statement
from protocol.errors import MissingKeyError
from protocol.messages import Desired, SignedDesired, TimeStatement, encode_message
from protocol.release import DIRECTOR_ROLE
from server.ports import Repository
from server.releases.metadata import Draft, delegations_of


class Director:
    """What the keys that are here may sign, by one set of documents.

    Args:
        repository: Says whose keys count.
        signer_for: The signer of a key, where that is here.
    """

    def __init__(self, repository: Repository, signer_for: Callable[[Key], Signer | None]) -> None:
        draft = Draft(repository, {})
        self.is_named = DIRECTOR_ROLE in delegations_of(draft.targets)
        named = draft.keys(DIRECTOR_ROLE) if self.is_named else []
        self._signer = next((signer for key in named if (signer := signer_for(key)) is not None), None)
        self._threshold = draft.role("timestamp").threshold
        self._time_signers = [
            signer for key in draft.keys("timestamp") if (signer := signer_for(key)) is not None
        ]

    @property
    def keyid(self) -> str:
        """Which key signs; empty where none does."""
        return "" if self._signer is None else self._signer.public_key.keyid

    @property
    def public(self) -> bytes:
        """That key (Ed25519, 32 bytes); empty where none signs."""
        return b"" if self._signer is None else bytes.fromhex(self._signer.public_key.keyval["public"])

    def seal(self, topic: str, desired: Desired, now_ms: int) -> bytes:
        """A wish as it is sent to a device: signed, where the fleet has a director.

        Args:
            topic: Of the device.
            desired: The wish.
            now_ms: When it begins to count.

        Raises:
            MissingKeyError: No key of the director is here, or it cannot sign.
        """
        encoded = encode_message(desired)
        if not self.is_named:
            return encoded
        if self._signer is None:
            raise MissingKeyError(
                "the key of role director is missing", hint="put director.pem back into the folder keys"
            )
        expires_ms = now_ms + DESIRED_LIFE_MS
        signature = _sign(self._signer, desired_statement(topic, encoded, now_ms, expires_ms))
        return encode_message(
            SignedDesired(
                desired=msgspec.Raw(encoded),
                signed_ms=now_ms,
                expires_ms=expires_ms,
                signature=bytes.fromhex(signature),
            )
        )

    def attest(self, topic: str, nonce: bytes, now_ms: int) -> TimeStatement | None:
        """What time it is, for whoever asks; None where too few keys of `timestamp` are here.

        Args:
            topic: Of the answer.
            nonce: As the device asked; an empty one asks for nothing.
            now_ms: Now.

        Raises:
            MissingKeyError: A key cannot sign.
        """
        if not nonce or len(self._time_signers) < self._threshold:
            return None
        statement = time_statement(topic, nonce, now_ms)
        signers = self._time_signers[: self._threshold]
        return TimeStatement(
            time_ms=now_ms,
            signatures={signer.public_key.keyid: _sign(signer, statement) for signer in signers},
        )


def _sign(signer: Signer, statement: bytes) -> str:
    """A signature, hexadecimal."""
    try:
        return str(signer.sign(statement).signature)
    except (SigningError, OSError, ValueError) as error:
        raise MissingKeyError(
            f"key {signer.public_key.keyid[:8]} cannot sign: {error}", hint="is its device connected?"
        ) from error
