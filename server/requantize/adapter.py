"""A low-rank adapter as a candidate beside the chosen file: the installed file stays, and the adapter is what is sent.

It is measured on the same texts, prompts and suites as the chosen file and passes by the same guards (`guards.py`). A device fetches it as a whole file: what it
weighs is its length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec import Struct

from protocol.errors import RequestError
from server.releases.adapter_files import check_adapter
from server.requantize.adapter_file import pack
from server.requantize.calibration import Calibration
from server.requantize.factors import write_factored
from server.requantize.guards import is_passed
from server.requantize.model import opened_gguf, sha256_of
from server.requantize.provenance import write_record
from server.scorecard.card import Check

SUFFIX: Final = ".adapter.gguf"
"""Of the adapter that is written, in place of the chosen file's own."""

GIVEN: Final = "adapter"
PACKED: Final = "adapter, 8 bits"
"""Names of rows."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that could be sent.

    Attributes:
        name: Of its row.
        path: The file.
        note: How it was made.
    """

    name: str
    path: Path
    note: str


class JudgedAdapter(Struct, frozen=True, kw_only=True):
    """What came of one.

    Attributes:
        name: Of its row.
        bytes: That a device fetches.
        checks: The guards, as of the chosen file.
        is_passed: Whether all of them passed.
    """

    name: str
    bytes: int
    checks: tuple[Check, ...]
    is_passed: bool


class AdapterRecord(Struct, frozen=True, kw_only=True):
    """How an adapter came about, as JSON beside it; digests are SHA-256.

    Attributes:
        new: The new model in floats.
        installed: The file that it is for.
        given: The adapter that it was made of; None where it was made from the models.
        rank: Of one that was made from the models.
        calibration_tokens: The runs of tokens of the calibration, as little-endian int32, of one that was made from the models.
        result: The adapter.
    """

    new: str
    installed: str
    given: str | None
    rank: int | None
    calibration_tokens: str | None
    result: str


Wish = Path | int
"""A file with an adapter, or the rank of one that is to be made from the models."""


def check_wish(wish: Wish, installed: Path) -> None:
    """Refuse a file that is no adapter for the installed one.

    Raises:
        RequestError: There is no such file.
        ModelFileError: It is damaged, no low-rank adapter, or for another model.
    """
    if isinstance(wish, int):
        return
    with opened_gguf(wish) as file, opened_gguf(installed) as model:
        check_adapter(wish, file.gguf, str(installed), [model.gguf])


def make_candidates(
    wish: Wish,
    new: Path,
    installed: Path,
    calibration: Calibration,
    folder: Path,
    report: Callable[[str], None],
    workers: int | None = None,
) -> tuple[Candidate, ...]:
    """A given adapter as it is and in few bits, or one of a rank in few bits.

    One that is made leads from the installed file to the new model, rounding included: beside that, one of what training changed alone is no match
    (docs/requantize.md).

    Args:
        wish: Which.
        new: The new model in floats.
        installed: What the adapter is for.
        calibration: Of the new model.
        folder: For what is made.
        report: Takes lines about the progress.
        workers: Threads.

    Raises:
        WhimbrelError: As `write_factored` and `pack`.
    """
    packed = folder / "adapter.gguf"
    if isinstance(wish, Path):
        pack(wish, packed)
        given = Candidate(GIVEN, wish, f"{wish.name} as it is")
        return given, Candidate(
            PACKED, packed, f"{wish.name} in Q8_0, and in F16 where rows are no whole blocks"
        )
    write_factored(new, installed, calibration, wish, packed, report, workers)
    return (Candidate(GIVEN, packed, f"of rank {wish}, from the installed file to the new model"),)


def cheapest(adapters: tuple[JudgedAdapter, ...]) -> JudgedAdapter | None:
    """The one with the fewest bytes among those that passed."""
    return min((each for each in adapters if each.is_passed), key=lambda each: each.bytes, default=None)


def judged(candidate: Candidate, checks: tuple[Check, ...]) -> JudgedAdapter:
    """With its guards."""
    return JudgedAdapter(
        name=candidate.name, bytes=candidate.path.stat().st_size, checks=checks, is_passed=is_passed(checks)
    )


def adapter_path(out: Path) -> Path:
    """Where an adapter that passes is written: beside the chosen file."""
    return out.with_name(f"{out.stem}{SUFFIX}")


def check_out(out: Path, wish: Wish, *, is_replaced: bool) -> None:
    """Refuse to overwrite an adapter from before, or the one that is given.

    Raises:
        RequestError: It is there.
    """
    path = adapter_path(out)
    if isinstance(wish, Path) and path.exists() and path.samefile(wish):
        raise RequestError(f"{path}: is the adapter that was given", hint="choose another --out")
    if path.exists() and not is_replaced:
        raise RequestError(f"{path}: exists", hint="choose another --out, or pass --force to replace it")


def record_adapter(out: Path, wish: Wish, new: Path, installed: Path, calibration: Calibration) -> None:
    """Write beside a written adapter how it came about.

    Raises:
        StorageError: It cannot be written.
    """
    is_made = isinstance(wish, int)
    write_record(
        out,
        AdapterRecord(
            new=sha256_of(new),
            installed=sha256_of(installed),
            given=None if isinstance(wish, int) else sha256_of(wish),
            rank=wish if isinstance(wish, int) else None,
            calibration_tokens=calibration.tokens_sha256 if is_made else None,
            result=sha256_of(out),
        ),
    )
