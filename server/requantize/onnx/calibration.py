"""What an error of each tensor is worth: second moments of what goes into matrices, and what installed tensors do to the answers of the new model.

onnxruntime gives no gradients. So the moments say which errors of one matrix matter beside others in it, and one number for each matrix, which is
measured, says what they do to the answers: the matrix as installed is put into the model in floats, alone, and the distortion of the answers is
divided by what the moments make of the same error. All matrices then cost in the same unit, and one price allocates bytes between them. Tensors that
are floats in both files are measured likewise, an error of each of their weights counting alike.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct
from threadpoolctl import threadpool_limits

from protocol.errors import RequestError
from protocol.ids import digest_of
from server.adapters.blobs import storage_errors, write_file
from server.diagnosis.weights import Floats
from server.requantize.descent import Metric
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.inputs import Samples
from server.requantize.onnx.matrices import FloatTensor, Matrix
from server.requantize.onnx.orders import Asked, Effects, Observe, carry_out, write_samples
from server.requantize.work import DAMPING

CALIBRATED_BY: Final = 1
"""Grows when something else is measured, so that nothing from before is believed."""

EFFECT_SAMPLES_MAX: Final = 16
"""On which the effect of each tensor is measured; moments are taken of all samples."""

LOOKUP_PRIOR: Final = 0.5
"""Added to how often a row was looked up (Krichevsky and Trofimov 1981): what the samples never showed may yet come."""

_DONE: Final = "calibration.json"

Report = Callable[[str], None]


class Worth(Struct, frozen=True, kw_only=True):
    """What errors of one tensor do.

    Attributes:
        factor: Half of it times the moments' form of an error is the distortion of the answers.
        effect: Mean distortion with the installed tensor alone in the model in floats.
    """

    factor: float
    effect: float


class _Record(Struct, frozen=True):
    """What is written when everything is there."""

    calibrated_by: int
    new: str
    installed: str
    samples: str
    asked: Asked
    worths: dict[str, Worth]
    products: tuple[str, ...]
    lookups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, on disk, read where it is needed.

    Attributes:
        folder: Where moments lie.
        samples_sha256: Of the samples.
        samples: How many.
        worths: By name of the tensor.
        products: Tensors whose second moments there are, in the order of their files.
        lookups: Tensors of row numbers, likewise.
    """

    folder: Path
    samples_sha256: str
    samples: int
    worths: dict[str, Worth]
    products: tuple[str, ...]
    lookups: tuple[str, ...]

    def inputs(self, matrix: Matrix, damping: float = DAMPING) -> Floats | None:
        """Second moments of what a matrix is multiplied with; None where it is not.

        Args:
            matrix: Which.
            damping: Share of the mean second moment that is added to each input's.
        """
        parts = [self._array("products", self.products, name) for name in matrix.readers.products]
        known = [each for each in parts if each is not None]
        if not known:
            return None
        total = np.asarray(np.sum(known, axis=0), np.float32)
        diagonal = np.einsum("ii->i", total)
        diagonal += np.float32(damping * diagonal.mean())
        return total

    def rows(self, matrix: Matrix, prior: float = LOOKUP_PRIOR) -> Floats:
        """Worth of an error of any weight of each row, beside `inputs`: how often it is looked up; 1 where nothing is known of how the matrix is read.

        Args:
            matrix: Which.
            prior: Added to how often a row was looked up.
        """
        count = matrix.form.shape[0]
        parts = [self._array("lookups", self.lookups, name) for name in matrix.readers.lookups]
        known = [each for each in parts if each is not None]
        if known:
            return np.asarray(np.sum(known, axis=0) + prior, np.float32)
        is_multiplied = any(self._has(name) for name in matrix.readers.products)
        return np.full(count, 0 if is_multiplied else 1, np.float32)

    def metric(self, matrix: Matrix, inputs: Floats | None, rows: Floats, part: slice) -> Metric:
        """What an error of some rows costs.

        Args:
            matrix: Which.
            inputs: As `inputs` gives them.
            rows: As `rows` gives them.
            part: Which rows.
        """
        factor = np.float32(self.worths[matrix.name].factor)
        columns = matrix.form.shape[1]
        none = np.zeros((1, 1), np.float32)
        through = np.broadcast_to(none, (columns, columns)) if inputs is None else inputs
        outputs = np.full(len(rows[part]), 0 if inputs is None else factor, np.float32)
        return Metric(through, outputs, np.asarray(rows[part] * factor, np.float32))

    def _has(self, name: str) -> bool:
        return name in self.products and (self.folder / f"products-{self.products.index(name)}.npy").exists()

    def _array(self, kind: str, names: Sequence[str], name: str) -> Floats | None:
        if name not in names:
            return None
        path = self.folder / f"{kind}-{names.index(name)}.npy"
        with storage_errors(path):
            return np.asarray(np.load(path), np.float32) if path.exists() else None


def calibrate(
    new: Graph,
    installed: Graph,
    matrices: Sequence[Matrix],
    floats: Sequence[FloatTensor],
    samples: Samples,
    asked: Asked,
    cache: Path,
    report: Report,
) -> Calibration:
    """Measure, unless it was measured before.

    Args:
        new: The new model in floats.
        installed: The quantized file that devices have.
        matrices: Which of its quantized tensors are chosen.
        floats: Which tensors are floats in both.
        samples: On which it is measured.
        asked: How answers are drawn.
        cache: Keeps what is measured.
        report: Takes lines about the progress.

    Raises:
        WhimbrelError: As `carry_out`; a file cannot be written.
    """
    identity = (CALIBRATED_BY, new.sha256, installed.sha256, samples.digest, asked)
    folder = cache / f"onnx-{digest_of(msgspec.json.encode(identity))[:24]}"
    done = folder / _DONE
    if done.exists():
        with storage_errors(done):
            known = msgspec.json.decode(done.read_bytes(), type=_Record)
        return _opened(folder, known, len(samples))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        record = _measured(new, installed, matrices, floats, samples, asked, folder, report)
        write_file(done, msgspec.json.encode(record))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _opened(folder, record, len(samples))


def _measured(
    new: Graph,
    installed: Graph,
    matrices: Sequence[Matrix],
    floats: Sequence[FloatTensor],
    samples: Samples,
    asked: Asked,
    folder: Path,
    report: Report,
) -> _Record:
    products = tuple(dict.fromkeys(name for each in matrices for name in each.readers.products))
    lookups = {name: each.form.shape[0] for each in matrices for name in each.readers.lookups}
    record = _Record(
        CALIBRATED_BY, new.sha256, installed.sha256, samples.digest, asked, {}, products, tuple(lookups)
    )
    label = f"{new.path} on {samples.name}"
    count = min(len(samples), EFFECT_SAMPLES_MAX)
    places = np.linspace(0, len(samples) - 1, count).astype(np.int64)
    few = Samples(
        samples.name, {name: each[places] if each.ndim else each for name, each in samples.arrays.items()}
    )
    files = folder / "samples.npz", folder / "few.npz"
    for each, path in zip((samples, few), files, strict=True):
        write_samples(each, path)
    names = (*(each.name for each in matrices), *(each.name for each in floats))
    report(
        f"calibration: {len(samples)} samples through the model in floats, and {count} with each of {len(names)} installed tensors"
    )
    observe = Observe(
        model=str(new.path),
        samples=str(files[0]),
        products=products,
        lookups=tuple(lookups.items()),
        folder=str(folder),
        asked=asked,
    )
    measure = Effects(
        model=str(new.path), installed=str(installed.path), tensors=names, samples=str(files[1]), asked=asked
    )
    _, effects = carry_out([observe, measure], label)
    for path in files:
        path.unlink()
    opened = _opened(folder, record, len(samples))
    with threadpool_limits(1):  # sums in one order
        forms = [_form(opened, each, new, installed) for each in matrices]
    forms += [float(np.square(new.floats(each.name) - installed.floats(each.name)).sum()) for each in floats]
    worths = {
        name: Worth(factor=2 * effect / form if form > 0 else 0.0, effect=effect)
        for name, form, effect in zip(names, forms, effects, strict=True)
    }
    if not any(each.factor for each in worths.values()):
        raise RequestError(
            f"no error of any tensor of {installed.path} shows in the answers to {samples.name}",
            hint="give samples of the kind that the model is for, and the --output that is used; or the model has not changed",
        )
    return msgspec.structs.replace(record, worths=worths)


def _form(calibration: Calibration, matrix: Matrix, new: Graph, installed: Graph) -> float:
    """What the moments make of the error of the installed codes."""
    error = matrix.target(new.floats(matrix.name) - matrix.installed_weights(installed))
    inputs, rows = calibration.inputs(matrix, damping=0.0), calibration.rows(matrix, prior=0.0)
    form = float(np.sum(np.square(error) * rows[:, None], dtype=np.float64))
    if inputs is not None:
        form += float(np.sum((error @ inputs) * error, dtype=np.float64))
    return form


def _opened(folder: Path, record: _Record, samples: int) -> Calibration:
    return Calibration(folder, record.samples, samples, record.worths, record.products, record.lookups)
