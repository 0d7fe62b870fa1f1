"""What is done to a stretch of rows of one tensor, in this process or in several side by side: read, descend, write into the new file.

Stretches do not depend on each other and write to places of their own, so that the file is the same however they are shared out.
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from threadpoolctl import threadpool_limits

from protocol.errors import EngineError, ModelFileError
from server.adapters.blobs import storage_errors
from server.diagnosis.weights import Floats
from server.requantize.anchors import anchors_of, cheapest_codes, leading_rows
from server.requantize.calibration import Calibration, inputs_key
from server.requantize.codes import CodedRows, Codes
from server.requantize.correction import Slopes
from server.requantize.descent import Metric, Price, descend, single_gains
from server.requantize.extrapolation import Factors
from server.requantize.model import ModelFile, coded_rows, opened_gguf, row_bytes, rows_and_columns
from server.requantize.portions import Portion, shares_of
from server.requantize.scales import SCALED_LAYOUTS, changed_scales, descend_with_scales, within_reach

MetricName = Literal["outputs", "weights"]

STRETCH_WEIGHTS: Final = 1 << 20
"""Weights of a stretch, which bound a worker's memory together with one matrix of moments."""

DAMPING: Final = 0.01
"""Share of the mean second moment that is added to each input's: what the calibration text never showed may yet come."""

GAIN_BINS: Final = 160
_GAIN_BIN_MIN: Final = -120.0  # log2 of nats


@dataclass(frozen=True, slots=True)
class Files:
    """What a choice is made from.

    Attributes:
        new: The new model in floats.
        installed: The quantized file that devices have.
        calibration: Moments of the new model.
        before: The installed version in floats, for extrapolation.
        start: A quantized file whose codes the descent begins with, and those of its scales that a move can lead to.
        out: Takes the result; has the tensors of `installed` when work begins.
        metric: What is kept near: what the layers put out, or the weights.
        extrapolation: How far beyond the new weights the target lies, in steps from `before` to `new`.
        factors: Folder of what was learned to be added to it, by tensor (`extrapolation.py`); None for nothing.
        directions: Folder of the leading directions of what matrices take; needed for factors.
        is_afresh: Begin with the best codes for the target instead of the installed ones, and go back where that saves more than it
            costs.
        slopes: Gradient of the divergence at `start`.
        trust: How far to go from the gradient that the metric expects there towards it, 0 to 1.
        pairs: First steps that are tried for two together.
        also: Further files that a part of the devices has instead of `installed`.
    """

    new: Path
    installed: Path
    calibration: Calibration
    before: Path | None
    start: Path | None
    out: Path
    metric: MetricName
    extrapolation: float
    is_afresh: bool = False
    slopes: Slopes | None = None
    trust: float = 0.0
    pairs: int = 0
    also: tuple[Portion, ...] = ()
    factors: Path | None = None
    directions: Path | None = None

    def factors_of(self, name: str) -> Path:
        """Where the factors of a tensor are, if any were learned."""
        assert self.factors is not None
        return self.factors / f"{name}.npy"

    def directions_of(self, name: str) -> Path:
        """Where the leading directions of what a matrix takes are."""
        assert self.directions is not None
        return self.directions / f"{inputs_key(name)}.npy"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of a tensor, and what a changed code costs; without a price only gains are looked at."""

    name: str
    start: int
    stop: int
    price: Price | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stretch.

    Attributes:
        name: Of the tensor.
        changed: Codes that differ from the installed ones.
        scales: Scales of blocks that do.
        before: Cost of the installed codes, nats per token.
        after: Cost of the chosen ones.
        promised: What the divergence would fall by from the start, if its measured gradient held all the way.
        gains: How many single steps gain 2^n nats, for n from the smallest bin on; of a look without a price.
    """

    name: str
    changed: int
    scales: int
    before: float
    after: float
    promised: float = 0.0
    gains: tuple[int, ...] = ()


def gain_at(index: int) -> float:
    """Nats of a bin of `Outcome.gains`."""
    return float(2.0 ** (index + _GAIN_BIN_MIN))


class Worker:
    """Open files, and the work on stretches of them."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._stack = ExitStack()
        self._new = self._open(files.new)
        self._held = [self._open(path) for path in (files.installed, *(each.path for each in files.also))]
        self._before = None if files.before is None else self._open(files.before)
        self._start = None if files.start is None else self._open(files.start)
        with opened_gguf(files.out) as made:
            self._regions = made.tensors
        with storage_errors(files.out):
            self._out = self._stack.enter_context(files.out.open("r+b", buffering=0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, stretch: Stretch) -> Outcome:
        """Choose the codes of a stretch and write them.

        Raises:
            ModelFileError: A weight or a scale is no number.
            StorageError: The result cannot be written.
        """
        rows, anchors = self._rows(stretch)
        target = self._target(stretch)
        if not np.isfinite(target).all() or not np.isfinite(rows.steps).all():
            raise ModelFileError(f"{stretch.name}: there are weights or scales that are no numbers")
        metric = self._metric(stretch, rows.codes.shape[1])
        begun, start = self._begin(stretch, rows, target, metric)
        error = target - begun.weights(start)
        expected = metric.gradient(error)
        if stretch.price is None:
            gains = _binned(single_gains(rows, expected, metric))
            cost = 0.5 * _inner(error, expected)
            return Outcome(stretch.name, 0, 0, cost, cost, gains=gains)
        slopes = self._slopes(stretch)
        gradient = expected
        if slopes is not None:
            gradient = expected + np.float32(self._files.trust) * (slopes - expected)
        chosen, pairs = begun, self._files.pairs
        if _moves_scales(rows, stretch.price):
            chosen, codes, reached = descend_with_scales(
                rows, begun, start, gradient, metric, stretch.price, pairs
            )
        else:
            codes, reached = descend(rows, start, gradient, metric, stretch.price, pairs, anchors)
        self._write(stretch, chosen.joined(codes))
        before = 0.5 * _inner(error, expected)
        if start is not rows.codes:
            before = metric.cost(target - rows.weights(rows.codes))
        # What the gradient has changed by is the metric's, wherever it began.
        after = 0.5 * _inner(target - chosen.weights(codes), expected + (reached - gradient))
        moved = chosen.weights(codes) - begun.weights(start)
        promised = 0.0 if slopes is None else _inner(slopes, moved)
        changed = int(np.count_nonzero(codes != rows.codes))
        scales = 0 if chosen is rows else changed_scales(chosen, rows)
        return Outcome(stretch.name, changed, scales, before, after, promised)

    def _rows(self, stretch: Stretch) -> tuple[CodedRows, Codes | None]:
        """The rows that the descent works on, and what their codes cost is relative to; None for their own codes."""
        held = [_coded(model, stretch) for model in self._held]
        if len(held) == 1:
            return held[0], None
        for model, each in zip(self._held, held, strict=True):
            if not np.isfinite(each.steps).all() or not np.isfinite(each.offsets).all():
                raise ModelFileError(f"{model.path}: {stretch.name} has scales that are no numbers")
        rows = leading_rows(held, shares_of(self._files.also))
        anchors = anchors_of(rows, held)
        if stretch.price is not None:
            rows = replace(rows, codes=cheapest_codes(anchors, stretch.price))
        return rows, anchors

    def _begin(
        self, stretch: Stretch, rows: CodedRows, target: Floats, metric: Metric
    ) -> tuple[CodedRows, Codes]:
        """Scales and codes that the descent begins with."""
        if self._start is not None:
            start = _coded(self._start, stretch)
            if stretch.price is None:
                return start, start.codes
            return within_reach(rows, start) if _moves_scales(rows, stretch.price) else rows, start.codes
        if not self._files.is_afresh or stretch.price is None:
            return rows, rows.codes
        rounded = rows.nearest(target)
        gradient = metric.gradient(target - rows.weights(rounded))
        return rows, descend(rows, rounded, gradient, metric, Price(first=0.0, further=0.0))[0]

    def _slopes(self, stretch: Stretch) -> Floats | None:
        """The gradient that was measured at the start."""
        slopes = None if self._files.slopes is None else self._files.slopes.of(stretch.name)
        return None if slopes is None else np.asarray(slopes[stretch.start : stretch.stop], np.float32)

    def _write(self, stretch: Stretch, data: bytes) -> None:
        region = self._regions[stretch.name]
        with storage_errors(self._files.out):
            os.pwrite(self._out.fileno(), data, region.offset + stretch.start * row_bytes(region))

    def _open(self, path: Path) -> ModelFile:
        return self._stack.enter_context(opened_gguf(path))

    def _target(self, stretch: Stretch) -> Floats:
        part = slice(stretch.start, stretch.stop)
        new = self._new.floats(stretch.name, stretch.start, stretch.stop)
        beyond, factors = np.float32(self._files.extrapolation), self._factors(stretch.name)
        if self._before is None or (factors is None and not beyond):
            return new
        change = new - self._before.floats(stretch.name, stretch.start, stretch.stop)
        target = new + beyond * change
        if factors is not None:
            place = self._files.directions_of(stretch.name)
            with storage_errors(place):
                target += factors.added(change, np.load(place), part)
        return np.asarray(target, np.float32)

    def _factors(self, name: str) -> Factors | None:
        """What was learned of a tensor, if anything."""
        if self._files.factors is None or not self._files.factors_of(name).exists():
            return None
        with storage_errors(self._files.factors):
            return Factors(np.load(self._files.factors_of(name)), *rows_and_columns(self._new.region(name)))

    def _metric(self, stretch: Stretch, columns: int) -> Metric:
        if self._files.metric == "weights":
            none = np.zeros(stretch.stop - stretch.start, np.float32)
            return Metric(np.zeros((columns, columns), np.float32), none, none + 1)
        return metric_of(self._files.calibration, stretch.name, slice(stretch.start, stretch.stop), columns)


def metric_of(calibration: Calibration, name: str, rows: slice, columns: int) -> Metric:
    """What an error of some rows of a tensor costs, by the moments that were measured and a little damping."""
    none = np.zeros(rows.stop - rows.start, np.float32)
    lookups = calibration.lookups(name)
    outputs = calibration.outputs(name)
    looked_up = none if lookups is None else np.asarray(lookups[rows], np.float32)
    if outputs is None:
        return Metric(np.zeros((columns, columns), np.float32), none, looked_up)
    inputs = np.array(calibration.inputs(name), np.float32)
    diagonal = np.einsum("ii->i", inputs)
    diagonal += np.float32(DAMPING * diagonal.mean())
    return Metric(inputs, np.asarray(outputs[rows], np.float32), looked_up)


def run_all(files: Files, stretches: Iterable[Stretch], workers: int) -> Iterator[Outcome]:
    """Outcomes in order.

    Args:
        files: For each worker to open.
        stretches: The work.
        workers: Processes; 1 is this one.

    Raises:
        EngineError: A process died, most likely for want of memory.
    """
    if workers == 1:
        with threadpool_limits(1), Worker(files) as worker:
            yield from map(worker.run, stretches)
        return
    # Forking would copy threads of numerical libraries that it cannot copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (files,)) as pool:
        try:
            yield from pool.map(_run, stretches)
        except BrokenProcessPool as error:
            raise EngineError(
                "a process that chooses codes died", hint="there may be too little memory: try --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def stretches_of(model: ModelFile, names: Iterable[str], price: Price | None) -> Iterator[Stretch]:
    """Tensors cut into stretches of at most `STRETCH_WEIGHTS`, at the same places always."""
    for name in names:
        rows, columns = rows_and_columns(model.region(name))
        step = max(1, STRETCH_WEIGHTS // columns)
        for start in range(0, rows, step):
            yield Stretch(name, start, min(rows, start + step), price)


_workers: list[Worker] = []
"""In a process: its one worker."""


def _begin(files: Files) -> None:
    threadpool_limits(1)
    _workers.append(Worker(files))  # stays open as long as the process lives


def _run(stretch: Stretch) -> Outcome:
    return _workers[0].run(stretch)


def _moves_scales(rows: CodedRows, price: Price | None) -> bool:
    return price is not None and price.scale is not None and rows.layout in SCALED_LAYOUTS


def _inner(left: Floats, right: Floats) -> float:
    return float(np.sum(left * right, dtype=np.float64))


def _coded(model: ModelFile, stretch: Stretch) -> CodedRows:
    return coded_rows(model, stretch.name, stretch.start, stretch.stop)


def _binned(gains: Floats) -> tuple[int, ...]:
    positive = gains[gains > 0]
    bins = np.clip(np.log2(positive) - _GAIN_BIN_MIN, 0, GAIN_BINS - 1).astype(np.int64)
    return tuple(np.bincount(bins, minlength=GAIN_BINS).tolist())
