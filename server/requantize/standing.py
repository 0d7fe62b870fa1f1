"""Where learned extrapolation stands after a round, on disk: a choice of an hour that was interrupted goes on there.

It lies beside the calibration, under a digest of all that the choice is made from and of what was asked. What a round leaves is a folder, which takes its name
when it is whole; the one before goes then. Of choices that have ended the last one stays, for a command that is interrupted later.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import msgspec
import numpy as np
from msgspec import Struct

from protocol.errors import RequestError, StorageError
from protocol.ids import digest_of
from server.adapters.blobs import storage_errors, write_file
from server.adapters.lock import FolderLock, is_locked
from server.diagnosis.weights import Floats
from server.requantize.model import sha256_of
from server.requantize.rounds import Round
from server.requantize.settings import CHOSEN_BY, Settings
from server.requantize.work import Files

_PREFIX: Final = "learned-"
_FILE: Final = "kept.gguf"
_FACTORS: Final = "factors.npz"
_SHARES: Final = "shares.npz"
_RECORD: Final = "standing.json"
_ENDED: Final = "ended.json"
_LOCK: Final = "lock"
_PARTIAL: Final = ".partial"


class _Record(Struct, frozen=True, kw_only=True):
    """What is written last; digests are those of the other files, so that a part of them is not taken for all."""

    best: Round
    made: tuple[Round, ...]
    divergences: tuple[float, ...]
    digests: dict[str, str]


class _Ended(Struct, frozen=True, kw_only=True):
    """What rounds after the best one have added."""

    made: tuple[Round, ...]
    divergences: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """After some rounds.

    Attributes:
        number: How many; 0 after the first file.
        best: The file that is best.
        made: All files that were made, in order.
        divergences: As in `choice.Chosen`.
        file: Where the best file is.
        factors: What was learned so far, by tensor.
        shares: Of what is added, what arrives: of each leading direction, and last of the rest; by tensor. Empty before that is known.
        is_ended: Whether no other round follows.
    """

    number: int
    best: Round
    made: tuple[Round, ...]
    divergences: tuple[float, ...]
    file: Path
    factors: Mapping[str, Floats]
    shares: Mapping[str, Floats]
    is_ended: bool = False


class Standings:
    """The folder of one choice.

    Args:
        folder: For this choice alone.
        report: Takes lines about the progress.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._report = report

    def last(self) -> Standing | None:
        """Where the choice was when it was interrupted; None if it was not, or what is there is damaged."""
        with storage_errors(self._folder):
            found = sorted(int(each.name) for each in self._folder.iterdir() if each.name.isdecimal())
        if not found:
            return None
        place = self._folder / str(found[-1])
        try:
            record = msgspec.json.decode((place / _RECORD).read_bytes(), type=_Record)
            _check(place, record.digests)
            factors, shares = (_arrays(place / name) for name in (_FACTORS, _SHARES))
            ended = place / _ENDED
            last = msgspec.json.decode(ended.read_bytes(), type=_Ended) if ended.exists() else None
        except (StorageError, OSError, ValueError, BadZipFile, msgspec.DecodeError) as error:
            self._report(f"{place}: is damaged, the choice begins anew ({error})")
            return None
        return Standing(
            number=found[-1],
            best=record.best,
            made=record.made if last is None else last.made,
            divergences=record.divergences if last is None else last.divergences,
            file=place / _FILE,
            factors=factors,
            shares=shares,
            is_ended=last is not None,
        )

    def keep(self, standing: Standing) -> None:
        """Write down where the choice is, and forget where it was.

        Raises:
            StorageError: The folder cannot be written.
        """
        partial, place = self._folder / _PARTIAL, self._folder / str(standing.number)
        with storage_errors(self._folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            shutil.copyfile(standing.file, partial / _FILE)
            np.savez(partial / _FACTORS, **standing.factors)  # type: ignore[arg-type]  # names of tensors are no options
            np.savez(partial / _SHARES, **standing.shares)  # type: ignore[arg-type]
            digests = {name: sha256_of(partial / name) for name in (_FILE, _FACTORS, _SHARES)}
            record = _Record(
                best=standing.best, made=standing.made, divergences=standing.divergences, digests=digests
            )
            write_file(partial / _RECORD, msgspec.json.encode(record))
            shutil.rmtree(place, ignore_errors=True)
            partial.replace(place)
            for each in self._folder.iterdir():
                if each.name.isdecimal() and each != place:
                    shutil.rmtree(each)

    def end(self, made: Sequence[Round], divergences: Sequence[float]) -> None:
        """Note that no round follows the one that was kept last.

        Raises:
            StorageError: The folder cannot be written.
        """
        with storage_errors(self._folder):
            number = max(int(each.name) for each in self._folder.iterdir() if each.name.isdecimal())
        ended = _Ended(made=tuple(made), divergences=tuple(divergences))
        write_file(self._folder / str(number) / _ENDED, msgspec.json.encode(ended))


@contextmanager
def standings_of(files: Files, settings: Settings, report: Callable[[str], None]) -> Iterator[Standings]:
    """The folder of a choice; those of others with this calibration that have ended are removed.

    Raises:
        RequestError: Another process makes the same choice.
        StorageError: The folder cannot be written.
    """
    folder = files.calibration.folder / f"{_PREFIX}{_identity(files, settings)[:32]}"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for other in files.calibration.folder.glob(f"{_PREFIX}*"):
            if other != folder and any(other.glob(f"*/{_ENDED}")) and not is_locked(other / _LOCK):
                shutil.rmtree(other)
    try:
        lock = FolderLock(folder / _LOCK)
    except RequestError as error:
        raise RequestError(f"{folder}: another process makes this choice", hint="wait for it") from error
    try:
        yield Standings(folder, report)
    finally:
        lock.release()


def _check(place: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        if sha256_of(place / name) != digest:
            raise ValueError(f"{name} is another file")


def _arrays(path: Path) -> dict[str, Floats]:
    with np.load(path) as found:
        return dict(found)


def _identity(files: Files, settings: Settings) -> str:
    paths = (files.new, files.installed, files.before, files.start)
    identity = {
        "chosen_by": CHOSEN_BY,
        "files": [None if path is None else sha256_of(path) for path in paths],
        "also": [(sha256_of(each.path), each.share) for each in files.also],
        "calibration": files.calibration.identity,
        "settings": settings.identity,
    }
    return digest_of(msgspec.json.encode(identity))
