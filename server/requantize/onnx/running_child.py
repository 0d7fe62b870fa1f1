"""ONNX models under onnxruntime, from inside: `python -m server.requantize.onnx.running_child`, an order on standard input. Started by `orders.py` only.

Samples go through a model in batches of one size, so that sums do not depend on anything but them.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from protocol.errors import ModelFileError, WhimbrelError
from server.children import Trouble, answer_parent
from server.requantize.onnx.distortion import Answers, answers_of, distortions
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.inputs import Samples
from server.requantize.onnx.matrices import find_matrices
from server.requantize.onnx.orders import (
    Answer,
    Asked,
    Effects,
    Envelope,
    Finished,
    Observe,
    Order,
    QuantizeDynamic,
    write_answers,
)
from server.scorecard.onnx import INPUT_TYPES

BATCH: Final = 8
"""Samples of one inference, where the model does not say how many it takes."""

MOMENTS_BYTES_MAX: Final = 1 << 30
"""Of second moments at once; the samples go through the model again for more."""

ANSWERS_BYTES_MAX: Final = 4 << 30

_TELEMETRY: Final = ("ORT_DISABLE_TELEMETRY", "1")
_LOG_ERRORS: Final = 3
_TYPES: Final = {**INPUT_TYPES, "tensor(bool)": np.bool_}

Array = npt.NDArray[Any]


def main() -> int:
    """Carry out the order of standard input; nothing but the answer is printed."""
    with threadpool_limits(1):  # sums in one order
        return answer_parent(Envelope, _carry_out)


def _carry_out(envelope: Envelope) -> list[Finished] | Trouble:
    os.environ.setdefault(*_TELEMETRY)
    try:
        import onnx  # noqa: F401, PLC0415 - what it lacks is answered, not raised
        import onnxruntime  # noqa: PLC0415 - likewise
    except ImportError as error:
        return Trouble(detail=str(error), is_missing=True)
    onnxruntime.set_default_logger_severity(_LOG_ERRORS)
    found = []
    for order in envelope.orders:
        try:
            found.append(_finished(order))
        except WhimbrelError as error:
            hint = f" ({error.hint})" if error.hint else ""
            return Trouble(detail=f"{order.model}: {error.message}{hint}")
        except Exception as error:  # noqa: BLE001 - onnxruntime has an exception for each of its codes
            reason = " ".join(str(error).split()) or type(error).__name__
            return Trouble(detail=f"onnxruntime, {order.model}: {reason}")
    return found


def _finished(order: Order) -> Finished:
    if isinstance(order, Observe):
        _observe(order)
    elif isinstance(order, Effects):
        return Finished(values=tuple(_effects(order)))
    elif isinstance(order, Answer):
        write_answers(_Model(order.model, order.asked).answers(_read(order.samples)), Path(order.out))
    else:
        _quantize(order)
    return Finished()


class _Model:
    """A loaded model.

    Args:
        content: Path of a file, or the bytes of a model.
        asked: How it is asked.
    """

    def __init__(self, content: str | bytes, asked: Asked) -> None:
        import onnxruntime as ort  # noqa: PLC0415 - it is there

        options = ort.SessionOptions()
        options.intra_op_num_threads = asked.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS
        self._session: Final[Any] = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._asked: Final = asked
        self._inputs: Final = {each.name: each for each in self._session.get_inputs()}
        names = [each.name for each in self._session.get_outputs()]
        if asked.output and asked.output not in names:
            raise ModelFileError(f"no output is called {asked.output}", hint=f"there are {', '.join(names)}")
        self._output: Final = asked.output or names[0]

    def answers(self, samples: Samples, replaced: dict[str, Array] | None = None) -> Answers:
        """To all samples, with some initializers replaced."""
        rows, counts, size = [], [], 0
        for feeds in self.feeds(samples):
            output = self.run([self._output], {**feeds, **(replaced or {})})[0]
            found = answers_of(self._asked.kind, output, self.mask(feeds))
            rows.append(found.rows)
            counts.append(found.counts)
            size += found.rows.nbytes
            if size > ANSWERS_BYTES_MAX:
                raise ModelFileError(
                    f"the answers to {samples.name} have more than {ANSWERS_BYTES_MAX:,} bytes",
                    hint="give fewer samples",
                )
        return Answers(np.concatenate(rows), np.concatenate(counts))

    def run(self, outputs: Sequence[str], feeds: dict[str, Array]) -> list[Array]:
        """One inference."""
        found = self._session.run(list(outputs), feeds)
        return [np.asarray(each) for each in found]

    def mask(self, feeds: dict[str, Array]) -> Array | None:
        """Which positions of a batch count."""
        return feeds[self._asked.mask] if self._asked.mask else None

    def feeds(self, samples: Samples) -> Iterator[dict[str, Array]]:
        """Batches as the runtime takes them."""
        arrays = samples.arrays
        if set(arrays) == {""} and len(self._inputs) == 1:
            ((name, declared),) = self._inputs.items()
            shape = [size if isinstance(size, int) and size > 0 else -1 for size in declared.shape[1:]]
            arrays = {name: arrays[""].reshape(len(samples), *shape)}
        for name in arrays:
            if name not in self._inputs:
                raise ModelFileError(
                    f"no input is called {name!r}, as one in {samples.name} is",
                    hint=f"there are {', '.join(self._inputs)}",
                )
        typed: dict[str, Array] = {}
        for name, values in arrays.items():
            kind = _TYPES.get(self._inputs[name].type)
            if kind is None:
                raise ModelFileError(f"input {name} is {self._inputs[name].type}, which is not known here")
            typed[name] = np.asarray(values, kind)
        first = next(name for name, values in typed.items() if values.ndim)
        size = self._inputs[first].shape[0]
        batch = size if isinstance(size, int) and size > 0 else BATCH
        if batch != BATCH and len(samples) % batch:
            raise ModelFileError(
                f"the model takes {batch} samples at once, {samples.name} has {len(samples)}",
                hint="give a multiple of that",
            )
        whole = Samples(samples.name, typed)
        for start in range(0, len(samples), batch):
            yield dict(whole.part(start, start + batch).arrays)


def _observe(order: Observe) -> None:
    graph, samples = Graph(Path(order.model)), _read(order.samples)
    places = [(f"products-{number}", name, 0) for number, name in enumerate(order.products)]
    places += [(f"lookups-{number}", name, rows) for number, (name, rows) in enumerate(order.lookups)]
    inner = {name for _, name, _ in places if name not in graph.inputs and name not in graph.stored}
    model = _Model(graph.with_taps(sorted(inner), ()), order.asked)
    left = places
    while left:
        taken, left = _measured(model, samples, left, inner)
        for file, values in taken.items():
            np.save(Path(order.folder) / f"{file}.npy", values.astype(np.float32))


def _measured(
    model: _Model, samples: Samples, places: list[tuple[str, str, int]], inner: set[str]
) -> tuple[dict[str, Array], list[tuple[str, str, int]]]:
    """As many tensors as memory holds, and those that are left."""
    sums: dict[str, Array] = {}
    late: set[str] = set()
    for feeds in model.feeds(samples):
        names = sorted({name for file, name, _ in places if name in inner and file not in late})
        values = {**feeds, **dict(zip(names, model.run(names, feeds), strict=True))} if names else dict(feeds)
        mask = model.mask(feeds)
        for file, name, rows in places:
            if file in late or name not in values:
                continue
            if file not in sums:
                width = rows or values[name].shape[-1]
                shape = (width,) if rows else (width, width)
                held = sum(each.nbytes for each in sums.values())
                if sums and held + 8 * int(np.prod(shape)) > MOMENTS_BYTES_MAX:
                    late.add(file)
                    continue
                sums[file] = np.zeros(shape)
            if rows:
                sums[file] += _counts(values[name], mask, rows)
            else:
                sums[file] += _moments(values[name], mask)
    return sums, [place for place in places if place[0] in late]


def _counted(values: Array, mask: Array | None, dimensions: int) -> Array:
    """Positions that count, the first dimensions as one."""
    flat = values.reshape(-1, *values.shape[dimensions:])
    if mask is not None and (values.shape[:dimensions] == mask.shape or len(flat) == mask.size):
        return np.asarray(flat[mask.reshape(-1) != 0])
    return np.asarray(flat)


def _moments(values: Array, mask: Array | None) -> Array:
    flat = _counted(values, mask, values.ndim - 1).astype(np.float32)
    return np.asarray((flat.T @ flat).astype(np.float64))


def _counts(values: Array, mask: Array | None, rows: int) -> Array:
    numbers = _counted(values, mask, values.ndim).astype(np.int64)
    return np.bincount(np.where(numbers < 0, numbers + rows, numbers), minlength=rows)


def _effects(order: Effects) -> Iterator[float]:
    graph, installed, samples = Graph(Path(order.model)), Graph(Path(order.installed)), _read(order.samples)
    matrices = {each.name: each for each in find_matrices(graph, installed)[0]}
    model = _Model(graph.with_taps((), order.tensors), order.asked)
    reference = model.answers(samples)
    for name in order.tensors:
        weights = (
            installed.floats(name) if name not in matrices else matrices[name].installed_weights(installed)
        )
        found = model.answers(samples, {name: weights.astype(graph.array(name).dtype)})
        yield float(distortions(order.asked.kind, reference, found).mean())


def _quantize(order: QuantizeDynamic) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - it is there

    quantize_dynamic(
        order.model,
        order.out,
        per_channel=order.is_per_channel,
        reduce_range=order.is_reduced,
        weight_type=QuantType.QInt8 if order.is_signed else QuantType.QUInt8,
    )


def _read(path: str) -> Samples:
    with np.load(path, allow_pickle=False) as file:
        return Samples(Path(path).stem, {name: file[name] for name in file.files})


if __name__ == "__main__":
    sys.exit(main())
