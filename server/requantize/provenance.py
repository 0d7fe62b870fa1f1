"""How a file was chosen, as JSON beside it: enough to choose it again. Not in the file itself, whose every byte devices fetch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from server.adapters.blobs import write_file
from server.requantize.calibration import Calibration
from server.requantize.model import sha256_of
from server.requantize.portions import Portion, all_portions, names_of

RECORD_SUFFIX: Final = ".requantized.json"
"""Added to the name of the chosen file."""

RECORD_VERSION: Final = 1


class Sources(Struct, frozen=True, kw_only=True):
    """SHA-256 of what went in and what came out.

    Attributes:
        new: The new model in floats.
        installed: The quantized file that devices have.
        before: The installed version in floats, where it was extrapolated from.
        start: The file whose codes the descent began with, where it was another.
        calibration_model: The float model whose layers were looked at, the new one as a rule.
        calibration_tokens: The runs of tokens, as little-endian int32.
        calibration_runs: How many, and tokens of each.
        result: The chosen file.
    """

    new: str
    installed: str
    before: str | None
    start: str | None
    calibration_model: str
    calibration_tokens: str
    calibration_runs: tuple[int, int]
    result: str


class Sent(Struct, frozen=True, kw_only=True):
    """What goes to the devices of one of several installed files.

    Attributes:
        name: Of the file, for people.
        sha256: Of the file.
        share: Of the fleet that has it.
        delta_bytes: Of the delta from it to the chosen file.
        plain_bytes: Of that to the plain file; None where nobody made one.
        alone_bytes: Of that to a file which was chosen for these devices alone, at the same price; None where that was not tried.
        alone_objective: What that file costs in nats per token, beside `objective_after` of the common one.
    """

    name: str
    sha256: str
    share: float
    delta_bytes: int
    plain_bytes: int | None = None
    alone_bytes: int | None = None
    alone_objective: float | None = None


def sent_to(installed: Path, also: Sequence[Portion], sizes: Sequence[int]) -> tuple[Sent, ...]:
    """Of each installed file, where there are several; none where there is one.

    Raises:
        StorageError: One cannot be read.
    """
    if not also:
        return ()
    return tuple(
        Sent(name=name, sha256=sha256_of(each.path), share=each.share, delta_bytes=size)
        for name, each, size in zip(
            names_of(installed, also), all_portions(installed, also), sizes, strict=True
        )
    )


def sources_of(
    new: Path, installed: Path, before: Path | None, start: Path | None, calibration: Calibration, out: Path
) -> Sources:
    """Digests of all files.

    Raises:
        StorageError: One cannot be read.
    """
    return Sources(
        new=sha256_of(new),
        installed=sha256_of(installed),
        before=None if before is None else sha256_of(before),
        start=None if start is None else sha256_of(start),
        calibration_model=calibration.model_sha256,
        calibration_tokens=calibration.tokens_sha256,
        calibration_runs=(calibration.sequences, calibration.sequence_tokens),
        result=sha256_of(out),
    )


def write_record(out: Path, chosen: Struct) -> Path:
    """Write beside the chosen file how it was chosen, and say where.

    Raises:
        StorageError: It cannot be written.
    """
    path = out.with_name(f"{out.name}{RECORD_SUFFIX}")
    record = {"requantized": RECORD_VERSION, **msgspec.to_builtins(chosen)}
    write_file(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path
