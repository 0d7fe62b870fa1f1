"""From a new model to a file that may be published: chosen, measured beside everything else that could be sent, and written only if it is no worse than plain."""

import os
import shutil
from pathlib import Path

from msgspec import Struct

from server.adapters.blobs import storage_errors, sync_folder
from server.requantize import rows
from server.requantize.adapter import (
    JudgedAdapter,
    adapter_path,
    cheapest,
    judged,
    record_adapter,
)
from server.requantize.bench import Bench, Report
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen
from server.requantize.evaluation import Evaluator
from server.requantize.frontier import (
    with_verdict,
)
from server.requantize.guards import is_passed
from server.requantize.request import Aim, Models, Questions, check_request
from server.requantize.rows import Row
from server.requantize.sent import Sent, check_sent
from server.requantize.settings import Settings
from server.scorecard.card import Check
from server.scorecard.frontier import Frontier


class Judged(Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        rows: The chosen file beside the others.
        checks: The guards.
        is_written: Whether all guards passed, so that the file is there.
        price: At which it was chosen, in nats per token and bit.
        extrapolation: With which it was chosen.
        changed: Codes that differ from the installed ones.
        scales: Scales of blocks that do.
        codes: How many codes there are.
        seconds: Of the choice alone.
        calibration_sha256: Of the calibration's tokens.
        frontier: From which the file was chosen; None where it was not.
        sent: What goes to the devices of each of several installed files; empty where all have the same.
        adapters: Adapters that were asked for, with their guards.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    is_written: bool
    price: float
    extrapolation: float
    changed: int
    scales: int
    codes: int
    seconds: float
    calibration_sha256: str
    frontier: Frontier | None = None
    sent: tuple[Sent, ...] = ()
    adapters: tuple[JudgedAdapter, ...] = ()

    @property
    def adapter(self) -> JudgedAdapter | None:
        """The adapter that is written: the cheapest of those that passed."""
        return cheapest(self.adapters)


def judge(
    models: Models,
    questions: Questions,
    aim: Aim,
    calibration: Calibration,
    evaluator: Evaluator,
    settings: Settings,
    folder: Path,
    out: Path,
    report: Report,
) -> tuple[Judged, Chosen]:
    """Choose a file, measure all rows, and write it if it passes; likewise an adapter, if one is asked for.

    Args:
        models: What is chosen from.
        questions: What it is judged on.
        aim: What is wanted.
        calibration: Of the new model, on that text.
        evaluator: On the new model in floats.
        settings: Of the choice, but for budget and extrapolation.
        folder: For files on the way.
        out: The chosen file; not touched unless every guard passed.
        report: Takes lines about the progress.

    Raises:
        NoPointError: No point of the frontier is good enough.
        RequestError: Texts overlap, are too few or too short, or nothing within the budget keeps what is wanted.
        WhimbrelError: As `choose` and `Evaluator.measure`.
    """
    check_request(models, questions, aim)
    bench = Bench(models, questions, calibration, evaluator, settings, folder, report)
    trial, chosen = bench.chosen(aim)
    found = bench.rows(trial, aim)
    chosen = bench.beside_others(chosen)
    adapted = bench.adapter_rows()
    checks = (*bench.checks(rows.CHOSEN, aim.margins), *check_sent(chosen.sent))
    if is_passed(checks):
        publish(bench.file(rows.CHOSEN), out)
    frontier = bench.frontier
    if frontier is not None:
        frontier = with_verdict(frontier, found, chosen.sources.result if is_passed(checks) else None)
    adapters = tuple(judged(each, bench.checks(each.name, aim.margins)) for each in bench.adapters)
    if models.adapter is not None and (best := cheapest(adapters)) is not None:
        path = next(each.path for each in bench.adapters if each.name == best.name)
        publish(path, adapter_path(out))
        record_adapter(adapter_path(out), models.adapter, models.new, models.installed, calibration)
    verdict = Judged(
        rows=(*found, *adapted),
        checks=checks,
        is_written=is_passed(checks),
        price=chosen.price,
        extrapolation=trial.extrapolation,
        changed=sum(chosen.changed.values()),
        scales=sum(chosen.scales.values()),
        codes=chosen.codes,
        seconds=chosen.seconds,
        calibration_sha256=calibration.tokens_sha256,
        frontier=frontier,
        sent=chosen.sent,
        adapters=adapters,
    )
    return verdict, chosen


def publish(path: Path, out: Path) -> None:
    """Copy under the wanted name, which it takes when it is whole."""
    partial = out.with_name(f".partial-{out.name}")
    try:
        with storage_errors(out):
            shutil.copyfile(path, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(out)
            sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)
