"""What a file for each part of the fleet would take, beside the one that was chosen for all: one descent more for each installed file."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen, choose
from server.requantize.portions import Portion, all_portions


def with_alone(
    chosen: Chosen,
    new: Path,
    installed: Path,
    also: tuple[Portion, ...],
    calibration: Calibration,
    folder: Path,
    report: Callable[[str], None],
    *,
    before: Path | None = None,
) -> Chosen:
    """Choose for each installed file alone, at the price that the common file stands at, and say what its delta weighs.

    Args:
        chosen: The common file; given back as it is where the fleet has one file.
        new: The new model in floats, as for `choose`; likewise the others.
        installed: The file that most devices have.
        also: The other installed files.
        calibration: Moments of the new model.
        folder: For files on the way.
        report: Takes lines about the progress.
        before: The installed version in floats, where the choice was extrapolated.

    Raises:
        WhimbrelError: As `choose`.
    """
    if not also:
        return chosen
    settings = msgspec.structs.replace(chosen.settings, budget_bytes=None, price=chosen.price)
    sent = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".alone-") as name:
        for each, portion in zip(chosen.sent, all_portions(installed, also), strict=True):
            report(f"for {each.name} alone")
            out = Path(name) / "alone.gguf"
            own = choose(new, portion.path, calibration, settings, out, report, before=before)
            sent.append(
                msgspec.structs.replace(
                    each, alone_bytes=own.delta_bytes, alone_objective=own.objective_after
                )
            )
    return msgspec.structs.replace(chosen, sent=tuple(sent))
