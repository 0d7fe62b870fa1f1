"""Chooses the next quantized ONNX file: codes by descent at one price for all matrices, the price by what the delta then weighs.

The file is the installed one, byte for byte, but for codes that move, and for weights that are floats in both files: each of these is the installed
or the new one, as its bits pay or do not.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import numpy as np
from msgspec import Struct
from threadpoolctl import threadpool_limits

from protocol.errors import ModelFileError, RequestError
from server.adapters.blobs import storage_errors
from server.diagnosis.weights import Floats
from server.requantize.codes import Codes, LinearRows
from server.requantize.descent import Metric, Price, descend, single_gains
from server.requantize.onnx.calibration import Calibration
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.matrices import FloatTensor, Matrix, find_floats, find_matrices
from server.requantize.onnx.storage import Stored
from server.requantize.rounds import FIRST_BITS, price_of_bits
from server.requantize.search import price_of_budget
from server.requantize.settings import PAIRS
from server.requantize.weighing import delta_bytes
from server.requantize.work import STRETCH_WEIGHTS

MetricName = Literal["outputs", "weights"]

FLOAT_BITS_SHARE: Final = 0.6
"""Of the bits of a float, what the delta engine takes for one that changes by a fine-tune: 19 of 32 in MiniLM's biases and norms."""

_PROBE_EVERY: Final = 16
_PROBES_MIN: Final = 8

Report = Callable[[str], None]


class Settings(Struct, frozen=True, kw_only=True):
    """How a file is chosen.

    Attributes:
        budget_bytes: What the delta from the installed file may weigh; or
        price: Distortion that a bit of the delta must save. Exactly one of both.
        first_price: Where the search for the budget's price begins; None to look at what single steps gain. It changes the time.
        extrapolation: How far beyond the new weights the target lies, in steps from the installed version's to the new ones.
        metric: What is kept near: the answers, or the plain weights, which is a trap (docs/requantize.md).
        pairs: First steps that are tried for two together, where no single step pays; 0 for none.
        workers: Processes of the delta engine; None for as many as there are processors. They change nothing but the time.
    """

    budget_bytes: int | None = None
    price: float | None = None
    first_price: float | None = None
    extrapolation: float = 0.0
    metric: MetricName = "outputs"
    pairs: int = PAIRS
    workers: int | None = None


class Sources(Struct, frozen=True, kw_only=True):
    """SHA-256 of what went in and what came out; `samples` of the calibration's inputs."""

    new: str
    installed: str
    before: str | None
    samples: str
    result: str


class Chosen(Struct, frozen=True, kw_only=True):
    """A file that was chosen, and what it took.

    Attributes:
        price: Distortion of the answers for a bit, at which its codes stand.
        delta_bytes: Of the delta from the installed file, as devices fetch it.
        file_bytes: Of the chosen file.
        changed: Codes that differ from the installed ones, by matrix; floats likewise.
        codes: How many codes and floats there are in these tensors.
        kept: Quantized tensors that stay as installed, and why.
        objective_before: Distortion that is expected of the installed codes.
        objective_after: The same of the chosen ones.
        rounds: Price and bytes of each file that was coded on the way.
        settings: What was asked for.
        sources: Digests of what went in and came out.
    """

    price: float
    delta_bytes: int
    file_bytes: int
    changed: dict[str, int]
    codes: int
    kept: dict[str, str]
    objective_before: float
    objective_after: float
    rounds: tuple[tuple[float, int], ...]
    settings: Settings
    sources: Sources


def choose(
    new: Graph,
    installed: Graph,
    calibration: Calibration,
    settings: Settings,
    out: Path,
    report: Report,
    *,
    before: Graph | None = None,
) -> Chosen:
    """Write the quantized file of the new model that is worth most for what its delta from the installed one weighs.

    Args:
        new: The new model in floats.
        installed: The quantized file that devices have.
        calibration: Of both.
        settings: Budget or price, and how.
        out: The result; appears under its name when it is whole.
        report: Takes lines about the progress.
        before: The installed version in floats; needed for extrapolation.

    Raises:
        RequestError: The settings contradict each other, or the budget is too small.
        ModelFileError: The files do not belong together.
        StorageError: The result cannot be written.
    """
    if (settings.budget_bytes is None) == (settings.price is None):
        raise RequestError("a budget or a price is needed, and not both")
    if settings.extrapolation and before is None:
        raise RequestError("the installed version in floats is needed to extrapolate")
    partial = out.with_name(f".partial-{out.name}")
    try:
        with threadpool_limits(1):  # sums in one order
            choice = _Choice(new, installed, calibration, settings, partial, report, before)
            price, size = choice.run()
        with storage_errors(out):
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return Chosen(
        price=price,
        delta_bytes=size,
        file_bytes=installed.length,
        changed=choice.changed,
        codes=choice.codes,
        kept=choice.kept,
        objective_before=choice.before,
        objective_after=choice.after,
        rounds=tuple(choice.rounds),
        settings=settings,
        sources=Sources(
            new=new.sha256,
            installed=installed.sha256,
            before=None if before is None else before.sha256,
            samples=calibration.samples_sha256,
            result=Graph(out).sha256,
        ),
    )


class _Choice:
    """The search for the price, around the work on the matrices."""

    def __init__(
        self,
        new: Graph,
        installed: Graph,
        calibration: Calibration,
        settings: Settings,
        out: Path,
        report: Report,
        before: Graph | None,
    ) -> None:
        self._new, self._installed, self._before = new, installed, before
        self._calibration = calibration
        self._settings = settings
        self._out = out
        self._report = report
        self._matrices, self.kept = find_matrices(new, installed)
        self._floats = find_floats(new, installed)
        names = {each.name for each in self._matrices} | {each.name for each in self._floats}
        if not names <= set(calibration.worths):
            raise ModelFileError(f"{new.path}: was calibrated with other tensors")
        self._matrix_codes = sum(int(np.prod(each.form.dims)) for each in self._matrices)
        self.codes = self._matrix_codes + sum(new.array(each.name).size for each in self._floats)
        self.changed: dict[str, int] = {}
        self.before = self.after = 0.0
        self.rounds: list[tuple[float, int]] = []

    def run(self) -> tuple[float, int]:
        """Leave the chosen file in place; says its price and what its delta weighs."""
        with storage_errors(self._out):
            shutil.copyfile(self._installed.path, self._out)
        if self._settings.price is not None:
            return self._settings.price, self._bytes_at(self._settings.price)
        budget = self._settings.budget_bytes
        assert budget is not None
        first = self._settings.first_price or self._first_price(budget)
        price = price_of_budget(budget, self._weigh(), first, self._bytes_at)
        if self.rounds[-1][0] != price:
            self._bytes_at(price)
        return self.rounds[-1]

    def _weigh(self) -> int:
        return delta_bytes(self._installed.path, self._out, self._settings.workers)

    def _bytes_at(self, price: float) -> int:
        """Descend at a price, and code the result."""
        bits = price_of_bits(price)
        self.changed, self.before, self.after = {}, 0.0, 0.0
        for matrix in self._matrices:
            data = matrix.installed(self._installed)
            codes = self._chosen(matrix, matrix.form.codes(data), bits)
            self._write(matrix.offset, matrix.form.joined(codes, data))
        for tensor in self._floats:
            self._write(tensor.offset, self._mixed(tensor, price))
        size = self._weigh()
        self.rounds.append((price, size))
        self._report(
            f"round {len(self.rounds)}: at {price:.3g} a bit {sum(self.changed.values()):,} codes changed, {size:,} bytes,"
            f" expected distortion {self.before:.4g} to {self.after:.4g}"
        )
        return size

    def _write(self, offset: int, data: bytes) -> None:
        with storage_errors(self._out), self._out.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def _mixed(self, tensor: FloatTensor, price: float) -> bytes:
        """Bytes of a tensor of floats: the new ones where they pay."""
        new, installed = self._new.array(tensor.name), self._installed.array(tensor.name)
        factor = 1.0 if self._settings.metric == "weights" else self._calibration.worths[tensor.name].factor
        loss = 0.5 * factor * np.square(new.astype(np.float64) - installed)
        pays = loss > price * FLOAT_BITS_SHARE * tensor.bits
        self.changed[tensor.name] = int(np.count_nonzero(pays))
        self.before += float(loss.sum())
        self.after += float(loss[~pays].sum())
        return np.where(pays, new, installed).astype(installed.dtype).tobytes()

    def _chosen(self, matrix: Matrix, installed: Stored, bits: Price) -> Codes:
        """All codes of a matrix."""
        target, inputs, worth = self._target(matrix), self._inputs(matrix), self._rows(matrix)
        chosen = np.empty(installed.shape, np.int16)
        changed = 0
        step = max(1, STRETCH_WEIGHTS // installed.shape[1])
        for start in range(0, len(installed), step):
            part = slice(start, start + step)
            rows = matrix.grid.rows(installed, part, *matrix.form.range(installed))
            metric = self._metric(matrix, inputs, worth, part)
            error = target[part] - rows.weights(rows.codes)
            if inputs is None:
                codes = choose_separately(rows, target[part], metric.lookups, bits)
            else:
                gradient = metric.gradient(error)
                codes, _ = descend(rows, rows.codes, gradient, metric, bits, self._settings.pairs)
            chosen[part] = codes
            changed += int(np.count_nonzero(codes != rows.codes))
            self.before += metric.cost(error) if inputs is not None else _separate(error, metric.lookups)
            left = target[part] - rows.weights(codes)
            self.after += metric.cost(left) if inputs is not None else _separate(left, metric.lookups)
        self.changed[matrix.name] = changed
        return chosen

    def _target(self, matrix: Matrix) -> Floats:
        new = self._new.floats(matrix.name)
        if self._before is not None and self._settings.extrapolation:
            new = new + np.float32(self._settings.extrapolation) * (new - self._before.floats(matrix.name))
        if not np.isfinite(new).all():
            raise ModelFileError(f"{self._new.path}: {matrix.name} has weights that are no numbers")
        return matrix.target(new)

    def _inputs(self, matrix: Matrix) -> Floats | None:
        return None if self._settings.metric == "weights" else self._calibration.inputs(matrix)

    def _rows(self, matrix: Matrix) -> Floats:
        if self._settings.metric == "weights":
            return np.ones(matrix.form.shape[0], np.float32)
        return self._calibration.rows(matrix)

    def _metric(self, matrix: Matrix, inputs: Floats | None, worth: Floats, part: slice) -> Metric:
        if self._settings.metric == "weights":
            none = np.zeros((1, 1), np.float32)
            return Metric(none, np.zeros(len(worth[part]), np.float32), worth[part])
        return self._calibration.metric(matrix, inputs, worth, part)

    def _first_price(self, budget: int) -> float:
        """At which as many single steps pay as the budget has room for, by a look at a part of the rows."""
        gains, share = [], 0.0
        for matrix in self._matrices:
            installed = matrix.form.codes(matrix.installed(self._installed))
            part = slice(0, None, _PROBE_EVERY if len(installed) >= _PROBES_MIN * _PROBE_EVERY else 1)
            rows = matrix.grid.rows(installed, part, *matrix.form.range(installed))
            target, inputs, worth = self._target(matrix)[part], self._inputs(matrix), self._rows(matrix)
            metric = self._metric(matrix, inputs, worth, part)
            error = target - rows.weights(rows.codes)
            if inputs is None:
                curve = np.square(rows.steps) * metric.lookups[:, None]
                slope = rows.steps * error * metric.lookups[:, None]
                found = np.asarray(np.abs(slope) - curve / 2, np.float32)
            else:
                found = single_gains(rows, metric.gradient(error), metric)
            gains.append(found[found > 0])
            share += rows.codes.size / self._matrix_codes
        every = np.sort(np.concatenate(gains))[::-1]
        if not len(every):
            return 1.0
        wanted = int(8 * budget / FIRST_BITS * share)
        return float(every[min(wanted, len(every) - 1)]) / FIRST_BITS


def choose_separately(rows: LinearRows, target: Floats, worth: Floats, price: Price) -> Codes:
    """The best codes where an error of one weight has nothing to do with that of another.

    Args:
        rows: As installed.
        target: What the weights should be.
        worth: Of an error of any weight of each row: it costs half of that times its square.
        price: Relative to the installed codes.
    """
    steps = np.where(rows.steps == 0, np.float32(1), rows.steps)
    wanted = (target - rows.offsets) / steps - rows.codes  # how far to go, in codes
    curve = np.square(steps) * worth[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shrunk = np.maximum(np.abs(wanted) - np.float32(price.further) / curve, 0)
    distance = np.sign(wanted) * np.maximum(np.rint(np.nan_to_num(shrunk, posinf=0.0)), 1)
    moved = np.clip(rows.codes + distance, rows.low, rows.high)
    away = moved - rows.codes
    gain = 0.5 * curve * (np.square(wanted) - np.square(wanted - away))
    cost = price.first + price.further * np.maximum(np.abs(away) - 1, 0)
    pays = (gain > cost) & (rows.steps != 0) & (away != 0)
    return np.where(pays, moved, rows.codes).astype(np.int16)


def _separate(error: Floats, worth: Floats) -> float:
    return 0.5 * float(np.sum(np.square(error) * worth[:, None], dtype=np.float64))
