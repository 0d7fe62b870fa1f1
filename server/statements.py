"""What is said with a new release about where its files come from: read from files, checked, and made the statement that is kept."""

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from protocol.errors import RequestError
from protocol.release import Release
from server.releases.provenance import (
    PROVENANCE_BYTES_MAX,
    Origin,
    check_statement,
    decode_statement,
    make_statement,
)
from server.releases.requantized import check_record, make_choice_statement
from server.requantize.record import RECORD_BYTES_MAX, RECORD_SUFFIX, decode_record


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """The record that `whimbrel requantize` wrote beside the file of a release.

    Attributes:
        path: Of the record.
        builder: URI of who chose the file, "" for nobody in particular.
    """

    path: Path
    builder: str = ""


Said = Path | Origin | ChoiceRecord
"""The statement of a build system as a file, what a person says, or the record beside a chosen file."""

_VERSIONED: Final = "whimbrel"


def record_beside(file: Path) -> Path | None:
    """The record of how a file was chosen, if there is one."""
    path = file.with_name(f"{file.name}{RECORD_SUFFIX}")
    return path if path.is_file() else None


def check_said(said: Said | None) -> None:
    """Refuse what is malformed, before a large file is copied.

    Raises:
        RequestError: A file cannot be read.
        ReleaseError: It is not what it should be.
    """
    if isinstance(said, Path):
        decode_statement(_read(said, PROVENANCE_BYTES_MAX), str(said))
    elif isinstance(said, ChoiceRecord):
        decode_record(_read(said.path, RECORD_BYTES_MAX), str(said.path))


def statement_of(release: Release, said: Said) -> bytes:
    """The statement about the files of a release, as it is kept.

    Raises:
        RequestError: A file cannot be read, or what a person said cannot be kept.
        ReleaseError: It is malformed, or about other files.
    """
    if isinstance(said, Path):
        data = _read(said, PROVENANCE_BYTES_MAX)
        check_statement(decode_statement(data, str(said)), release, str(said))
        return data
    versions = {_VERSIONED: importlib.metadata.version(_VERSIONED)}
    if isinstance(said, Origin):
        return make_statement(release, replace(said, versions={**versions, **said.versions}))
    data = _read(said.path, RECORD_BYTES_MAX)
    record = decode_record(data, str(said.path))
    check_record(record, release, str(said.path))
    return make_choice_statement(release, record, data, said.builder, versions)


def _read(path: Path, bytes_max: int) -> bytes:
    """A small file that a person names, or one byte more than it may have."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a JSON file that can be read") from error
