"""How a file was chosen, as JSON beside it: enough to choose it again. Not in the file itself, whose every byte devices fetch."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from server.adapters.blobs import write_file
from server.requantize.calibration import Calibration
from server.requantize.model import sha256_of
from server.requantize.record import RECORD_SUFFIX, RECORD_VERSION
from server.requantize.texts import digest_of_tokens
from server.scorecard.card import Check


class Sources(Struct, frozen=True, kw_only=True):
    """SHA-256 of what went in and what came out.

    Attributes:
        new: The new model in floats.
        installed: The quantized file that devices have; of several, that of most (all are in `Chosen.sent`).
        before: The installed version in floats, where it was extrapolated from.
        start: The file whose codes the descent began with, where it was another.
        calibration_model: The float model whose layers were looked at, the new one as a rule.
        calibration_tokens: The runs of tokens, as little-endian int32.
        calibration_runs: How many, and tokens of each.
        distilled_tokens: All tokens of the calibration text, likewise, where the choice was distilled or its extrapolation learned.
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
    distilled_tokens: str | None = None


def sources_of(
    new: Path,
    installed: Path,
    before: Path | None,
    start: Path | None,
    calibration: Calibration,
    out: Path,
    *,
    is_read: bool = False,
) -> Sources:
    """Digests of all files, and of the text if it was read.

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
        distilled_tokens=digest_of_tokens(calibration.text) if is_read else None,
    )


def write_record(out: Path, chosen: Struct, guards: Sequence[Check] | None = None) -> Path:
    """Write beside the chosen file how it was chosen, and say where.

    Args:
        out: The chosen file.
        chosen: How it was chosen.
        guards: What it was judged by; None if nobody judged it.

    Raises:
        StorageError: It cannot be written.
    """
    path = out.with_name(f"{out.name}{RECORD_SUFFIX}")
    judged = None if guards is None else msgspec.to_builtins(guards)
    record = {"requantized": RECORD_VERSION, **msgspec.to_builtins(chosen), "guards": judged}
    write_file(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path
