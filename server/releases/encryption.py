"""Which releases travel encrypted, so that no file is a secret in one and open to all in another. Pure."""

from collections.abc import Iterable, Sequence

from protocol.errors import RequestError
from protocol.ids import Family
from protocol.release import Release
from server.ports import ReleaseRecord


def is_family_encrypted(records: Sequence[ReleaseRecord], family: Family) -> bool:
    """Whether the release of a family that was added last is encrypted: the next one is, unless somebody says otherwise.

    Args:
        records: All, in the order in which they were added.
        family: Which.
    """
    return next((each.is_encrypted for each in reversed(records) if each.release.family == family), False)


def check_files(records: Iterable[ReleaseRecord], release: Release, *, is_encrypted: bool) -> None:
    """Refuse a release whose files would be open to all here and a secret there.

    What was published for all to read is no secret any more: an encrypted release may have such files, and they travel as they are.

    Args:
        records: All.
        release: To be added.
        is_encrypted: Whether it shall be encrypted.

    Raises:
        RequestError: Names the file and the other release.
    """
    names = {file.sha256: file.name for file in release.files if file.length}
    for other in records:
        if other.is_encrypted == is_encrypted or (is_encrypted and other.published_ms is not None):
            continue
        if (other.release.family, other.release.version) == (release.family, release.version):
            continue  # a draft that this one replaces
        for file in other.release.files:
            if file.sha256 in names:
                raise _conflict(names[file.sha256], other, is_encrypted=is_encrypted)


def _conflict(name: str, other: ReleaseRecord, *, is_encrypted: bool) -> RequestError:
    version = f"{other.release.family} {other.release.version}"
    if is_encrypted:
        return RequestError(
            f"file {name} is in {version} as well, which is not encrypted",
            hint="add that one again with --encrypt, before it is published",
        )
    return RequestError(
        f"file {name} is encrypted in {version}, and everybody could read it in this release",
        hint="add it with --encrypt",
    )
