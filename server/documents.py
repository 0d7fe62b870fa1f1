"""What is kept beside the files of a release, each by its digest in the signed description: where it comes from, and how good it is."""

from msgspec import UNSET

from protocol.errors import StorageError
from protocol.ids import Digest, digest_of
from protocol.release import Release
from server.adapters.blobs import storage_errors
from server.home import Home
from server.releases.provenance import Statement, decode_statement
from server.scorecard.card import Scorecard, decode_card


def named_documents(release: Release) -> list[tuple[str, Digest]]:
    """What a release names beside its files: file names for people, and digests."""
    named = []
    if release.provenance_sha256 is not UNSET:
        named.append(("provenance.json", Digest(release.provenance_sha256)))
    if release.scorecard_sha256 is not None:
        named.append(("scorecard.json", Digest(release.scorecard_sha256)))
    return named


def read_statement(home: Home, release: Release) -> Statement | None:
    """The statement about where a release comes from; None if nobody made one.

    Raises:
        StorageError: It is missing or damaged.
    """
    if release.provenance_sha256 is UNSET:
        return None
    return decode_statement(*_read(home, Digest(release.provenance_sha256), "add the release again"))


def read_card(home: Home, release: Release) -> Scorecard | None:
    """The scorecard of a release; None if it names none.

    Raises:
        StorageError: It is missing or damaged.
        ReleaseError: It is not understood.
    """
    if release.scorecard_sha256 is None:
        return None
    return decode_card(*_read(home, Digest(release.scorecard_sha256), "score the release again"))


def _read(home: Home, digest: Digest, hint: str) -> tuple[bytes, str]:
    path = home.blobs.path(digest)
    with storage_errors(path):
        data = path.read_bytes()
    if digest_of(data) != digest:
        raise StorageError(f"{path} is damaged", hint=hint)
    return data, str(path)
