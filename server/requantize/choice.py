"""Chooses the next quantized file: codes by descent at one price for all tensors, the price by what the delta then weighs."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from protocol.tensors import Layout
from server.adapters.blobs import storage_errors
from server.requantize.calibration import Calibration
from server.requantize.header import start_file
from server.requantize.model import FLOAT_LAYOUTS, ModelFile, opened_gguf
from server.requantize.pairing import check_pair
from server.requantize.portions import Portion, check_fleet
from server.requantize.provenance import Sources, sources_of
from server.requantize.refinement import Refinement
from server.requantize.rounds import Rounds
from server.requantize.sent import Sent, sent_to
from server.requantize.settings import Settings, check_settings, check_start
from server.requantize.student import check_readable
from server.requantize.work import Files


class Chosen(Struct, frozen=True, kw_only=True):
    """A file that was chosen, and what it took.

    Attributes:
        price: Nats per token and bit, at which its codes stand.
        delta_bytes: Of the delta from the installed file, as devices fetch it; of several files, the mean over the fleet.
        file_bytes: Of the chosen file.
        changed: Codes that differ from the installed ones, by tensor; of several files, from those that are cheapest to the fleet.
        codes: How many codes there are in these tensors.
        kept: Tensors that stay as installed, as their layout has no linear codes.
        objective_before: What the installed codes cost, in nats per token, as the metric sees it.
        objective_after: What the chosen ones cost.
        rounds: Price and bytes of each file that was coded on the way.
        divergences: KL from the float model on the calibration text, nats per token: before extrapolation is learned and after each round (on some of the runs); before each
            correction and after the last; before distillation and after it.
        seconds: From start to end; of what was done before an interruption, nothing.
        settings: What was asked for.
        sources: Digests of what went in and came out.
        sent: What goes to the devices of each installed file; empty where all have the same.
        scales: Scales of blocks that differ from the installed ones, by tensor.
    """

    price: float
    delta_bytes: int
    file_bytes: int
    changed: dict[str, int]
    codes: int
    kept: tuple[str, ...]
    objective_before: float
    objective_after: float
    rounds: tuple[tuple[float, int], ...]
    divergences: tuple[float, ...]
    seconds: float
    settings: Settings
    sources: Sources
    sent: tuple[Sent, ...] = ()
    scales: dict[str, int] = {}


def choose(
    new: Path,
    installed: Path,
    calibration: Calibration,
    settings: Settings,
    out: Path,
    report: Callable[[str], None],
    *,
    start: Path | None = None,
    before: Path | None = None,
    also: Sequence[Portion] = (),
) -> Chosen:
    """Write the quantized file of the new model that is worth most for what its delta from the installed one weighs.

    Layouts are the installed file's, and so are tensors whose layout has no linear codes, and scales, unless they may move. Float tensors are the
    new ones. Of several installed files each block has the scales that most of the fleet has.

    Args:
        new: The new model in floats, GGUF.
        installed: The quantized file that devices have, GGUF.
        calibration: Moments of the new model.
        settings: Budget or price, and how.
        out: The result; appears under its name when it is whole.
        report: Takes lines about the progress.
        start: A quantized file whose codes the descent begins with, and those of its scales that a move can lead to; the price stays
            relative to the installed ones.
        before: The installed version in floats; needed for extrapolation.
        also: Further files that a part of the devices has instead of `installed`, none of them more devices than have that.

    Raises:
        RequestError: The settings contradict each other, or a file is not there.
        ModelFileError: The files do not belong together, or one is damaged.
        StorageError: The result cannot be written.
    """
    check_settings(settings, before)
    check_start(settings, start, also)
    check_fleet(installed, also)
    began = time.perf_counter()
    partial = out.with_name(f".partial-{out.name}")
    try:
        files = Files(
            new=new,
            installed=installed,
            calibration=calibration,
            before=before,
            start=start,
            out=partial,
            metric=settings.metric,
            extrapolation=settings.extrapolation,
            pairs=settings.pairs,
            is_afresh=settings.is_afresh,
            also=tuple(also),
        )
        with opened_gguf(new) as fresh, opened_gguf(installed) as old:
            check_pair(fresh, old)
            if settings.distillation:
                check_readable(old, calibration.text, "--distill")
            if settings.learned:
                check_readable(old, calibration.text, "--learn-extrapolation")
            for each in also:
                with opened_gguf(each.path) as other:
                    check_pair(fresh, other)
            start_file(fresh, old, partial)
            _write_floats(fresh, partial)
            rounds = Rounds(files, old, settings, report)
            floor = rounds.floor() if settings.price is None else 0
            with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".refinement-") as name:
                refinement = Refinement(rounds, fresh, settings, Path(name), floor, report)
                result = refinement.run()
        with storage_errors(out):
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    return Chosen(
        price=result.price,
        delta_bytes=result.bytes,
        file_bytes=out.stat().st_size,
        changed=result.changed,
        codes=rounds.codes,
        kept=rounds.kept,
        objective_before=result.before,
        objective_after=result.after,
        rounds=tuple((each.price, each.bytes) for each in rounds.made),
        divergences=tuple(refinement.divergences),
        seconds=seconds,
        settings=settings,
        sources=sources_of(
            new,
            installed,
            before,
            start,
            calibration,
            out,
            is_read=settings.distillation + settings.learned > 0,
        ),
        sent=sent_to(installed, also, result.sizes),
        scales=result.scales,
    )


def _write_floats(new: ModelFile, out: Path) -> None:
    """Tensors that are floats in both files: the new ones, as the installed file has them."""
    with opened_gguf(out) as made:
        regions = made.tensors
    with storage_errors(out), out.open("r+b") as file:
        for name, region in regions.items():
            if region.layout in FLOAT_LAYOUTS:
                file.seek(region.offset)
                file.write(_stored(new.floats(name).reshape(-1), region.layout))


def _stored(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], layout: Layout) -> bytes:
    if layout is Layout.F32:
        return values.astype("<f4").tobytes()
    if layout is Layout.F16:
        return values.astype("<f2").tobytes()
    words = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded = words + 0x7FFF + (words >> 16 & 1)  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()
