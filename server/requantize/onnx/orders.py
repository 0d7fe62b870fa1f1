"""What is asked of the process that runs ONNX models, and how it is asked. Arrays travel as files, all else as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct

from server.adapters.blobs import storage_errors
from server.children import ask_child
from server.requantize.onnx.distortion import AnswerKind, Answers
from server.requantize.onnx.inputs import Samples

TIMEOUT_S: Final = 24 * 3600
"""Of one order: a large model on many samples takes hours."""

_CHILD: Final = "server.requantize.onnx.running_child"


class Asked(Struct, frozen=True, kw_only=True):
    """How answers are drawn from a model.

    Attributes:
        kind: What they are.
        output: Name of the model's output; "" for the first.
        mask: Name of the input that says which positions count; "" for all.
        threads: Of one inference.
    """

    kind: AnswerKind
    output: str = ""
    mask: str = ""
    threads: int = 1


class Observe(Struct, frozen=True, kw_only=True, tag="observe"):
    """Measure what goes into matrices.

    Attributes:
        model: In floats.
        samples: File with the inputs.
        products: Tensors of which second moments are taken: file `products-N.npy` for the Nth.
        lookups: Tensors of numbers of rows, and how many rows there are: file `lookups-N.npy` has how often each was looked up.
        folder: Takes the files.
        asked: Mask and threads.
    """

    model: str
    samples: str
    products: tuple[str, ...]
    lookups: tuple[tuple[str, int], ...]
    folder: str
    asked: Asked


class Effects(Struct, frozen=True, kw_only=True, tag="effects"):
    """Measure what installed tensors do to the answers, each alone in the model in floats.

    Attributes:
        model: In floats.
        installed: The quantized file.
        tensors: Names in the model in floats, of matrices and of tensors that are floats in both.
        samples: File with the inputs.
        asked: How.
    """

    model: str
    installed: str
    tensors: tuple[str, ...]
    samples: str
    asked: Asked


class Answer(Struct, frozen=True, kw_only=True, tag="answer"):
    """Write a model's answers, as `rows` and `counts` of a file `.npz`."""

    model: str
    samples: str
    out: str
    asked: Asked


class QuantizeDynamic(Struct, frozen=True, kw_only=True, tag="quantize"):
    """Write a model with onnxruntime's dynamic quantizer.

    Attributes:
        model: In floats.
        out: The file.
        is_signed: Whether weights of matrix products are int8, or uint8.
        is_per_channel: Whether each output has a scale of its own.
        is_reduced: Whether codes have seven bits.
    """

    model: str
    out: str
    is_signed: bool
    is_per_channel: bool
    is_reduced: bool


Order = Observe | Effects | Answer | QuantizeDynamic


class Envelope(Struct, frozen=True):
    """Orders of one child."""

    orders: tuple[Order, ...]


class Finished(Struct, frozen=True, kw_only=True, tag=True):
    """The order was carried out.

    Attributes:
        values: What was measured: the mean distortion with each tensor for `Effects`.
    """

    values: tuple[float, ...] = ()


def carry_out(orders: Sequence[Order], label: str) -> list[tuple[float, ...]]:
    """Have orders carried out, one after the other in one process, since that takes longer to start than a small model to run.

    Args:
        orders: What.
        label: What a person calls the model.

    Returns:
        What was measured by each.

    Raises:
        ModelFileError: The runtime does not load a model, crashes, or gives no answer.
        EngineError: onnxruntime or the package `onnx` is not installed.
    """
    answer = ask_child(
        _CHILD,
        Envelope(tuple(orders)),
        list[Finished],
        label,
        TIMEOUT_S,
        missing="ONNX models need",
        hint="install whimbrel with the extra 'requantize'",
        runtime="onnxruntime",
        package="onnxruntime and onnx",
    )
    return [each.values for each in answer]


def read_answers(path: Path) -> Answers:
    """From the file of an `Answer`."""
    with storage_errors(path), np.load(path, allow_pickle=False) as file:
        return Answers(file["rows"], file["counts"])


def write_samples(samples: Samples, path: Path) -> None:
    """For `Observe`, `Effects` and `Answer`."""
    _save(path, samples.arrays)


def write_answers(found: Answers, path: Path) -> None:
    """As `read_answers` reads them."""
    _save(path, {"rows": found.rows, "counts": found.counts})


def _save(path: Path, arrays: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> None:
    with storage_errors(path), path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
