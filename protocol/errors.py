"""What can go wrong, who is at fault, and whether another try can help.

Every error that leaves a package carries a stable `code`: it travels in reports, so a code is never renamed or
reused. `fault` answers the operator's first question, `is_retryable` the agent's. A bug of our own is not in
this tree: it is an `AssertionError` or a `RuntimeError`, and it is meant to be loud.
"""

from enum import Enum
from typing import ClassVar


class Fault(Enum):
    """Who has to act."""

    REMOTE = "remote"  # bytes from outside are wrong: refuse them, ask for others
    ENVIRONMENT = "environment"  # disk, memory, network, clock: wait or make room
    REQUEST = "request"  # a person asked for something that cannot be: say what to do


class WhimbrelError(Exception):
    """Base of all errors that are expected to happen.

    Args:
        message: One line that names the file, field or limit concerned.
        hint: What the reader can do about it, one line, or empty.
    """

    code: ClassVar[str] = "error"
    fault: ClassVar[Fault] = Fault.REMOTE
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class MessageError(WhimbrelError):
    """A message from the broker has a wrong size, shape or version."""

    code = "message.invalid"


class ForgedReportError(MessageError):
    """A report is not signed with a certificate that the server issued to the device, and should be."""

    code = "message.forged"


class TopicError(WhimbrelError):
    """A name cannot be a topic level, or a topic is none of ours."""

    code = "topic.invalid"


class ChunkError(WhimbrelError):
    """A chunk does not match the signed index; another copy may."""

    code = "chunk.invalid"
    is_retryable = True


class TrustError(WhimbrelError):
    """Metadata or a target is not what trusted keys signed."""

    code = "trust.unverified"


class RollbackAttackError(TrustError):
    """Metadata is older than what this device has already seen."""

    code = "trust.rollback"


class ExpiredMetadataError(TrustError):
    """Metadata is past its date; newer metadata may arrive."""

    code = "trust.expired"
    is_retryable = True


class ReleaseError(WhimbrelError):
    """A release description is malformed or contradicts itself."""

    code = "release.invalid"


class ModelFileError(WhimbrelError):
    """A model file is damaged or not of the kind its name says."""

    code = "model.invalid"


class PatchError(WhimbrelError):
    """A delta file is malformed or damaged."""

    code = "patch.invalid"


class TruncatedPatchError(PatchError):
    """A delta file ends too early."""

    code = "patch.truncated"


class WrongBaseError(PatchError):
    """A delta file was made for another base than the one at hand."""

    code = "patch.wrong_base"


class PatchLimitError(PatchError):
    """A delta file asks for more memory, length or segments than was accepted."""

    code = "patch.limit"


class NotInPlaceError(PatchError):
    """A delta file was not made for application in place."""

    code = "patch.not_in_place"


class AdmissionError(WhimbrelError):
    """An update cannot succeed here and is refused before its first byte."""

    code = "admission.refused"


class ContentKeyError(WhimbrelError):
    """A content key cannot be opened, or is not the one that signed metadata names; another answer may bring it."""

    code = "keys.wrong"
    is_retryable = True


class KeyRefusedError(WhimbrelError):
    """A server gives no content key: as far as it knows, the device was not asked to run what the artifact leads to."""

    code = "keys.refused"
    is_retryable = True


class NotCertifiedError(KeyRefusedError):
    """The device has no valid certificate of that server to wrap a key for; it may have been revoked."""

    code = "keys.no_certificate"
    is_retryable = False


class KeysUnavailableError(WhimbrelError):
    """A server cannot read the content keys that it keeps."""

    code = "keys.unavailable"
    fault = Fault.ENVIRONMENT
    is_retryable = True


class StorageError(WhimbrelError):
    """A disk operation failed; see `code` of the subclass for the reason."""

    code = "storage.failed"
    fault = Fault.ENVIRONMENT
    is_retryable = True


class StorageFullError(StorageError):
    """No room for the update."""

    code = "storage.full"


class InverseFullError(StorageFullError):
    """The inverse of a delta does not fit into the room that it was given; whoever applies in place goes back."""

    code = "storage.inverse_full"
    is_retryable = False


class DamagedJournalError(StorageError):
    """What was written down for putting a half rewritten file back has not survived; only the whole file helps."""

    code = "storage.journal_damaged"
    is_retryable = False


class StorageReadOnlyError(StorageError):
    """The state folder cannot be written."""

    code = "storage.read_only"


class EngineError(WhimbrelError):
    """A model could not be loaded or did not answer."""

    code = "engine.failed"
    fault = Fault.ENVIRONMENT


class TransportError(WhimbrelError):
    """The broker cannot be reached or refused us."""

    code = "transport.failed"
    fault = Fault.ENVIRONMENT
    is_retryable = True


class RequestError(WhimbrelError):
    """A person asked for something that cannot be done as asked."""

    code = "request.invalid"
    fault = Fault.REQUEST


class UnknownReleaseError(RequestError):
    """There is no release of this family and version."""

    code = "request.unknown_release"


class AlreadyPublishedError(RequestError):
    """A release with this family and version exists, with other bytes or the same."""

    code = "request.already_published"


class MissingKeyError(RequestError):
    """A signing key is not where the configuration says."""

    code = "request.missing_key"


class PortInUseError(RequestError):
    """Another program listens on the port."""

    code = "request.port_in_use"
