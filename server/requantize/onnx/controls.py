"""The plain file that a chosen one stands beside: what onnxruntime's dynamic quantizer makes of the new model, or a file that was made elsewhere."""

import shutil
import tempfile
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError
from server.adapters.blobs import storage_errors
from server.requantize.onnx.graph import INT8, Graph, names_text
from server.requantize.onnx.orders import QuantizeDynamic, carry_out
from server.requantize.onnx.storage import Form

_DYNAMIC: Final = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"})
_GIVE: Final = "quantize the new model as the installed file was, and give it with --plain"


def write_plain(new: Graph, installed: Graph, given: Path | None, out: Path) -> Graph:
    """Quantize the new model as the installed file was, or take the file that was given.

    Args:
        new: The new model in floats.
        installed: The quantized file that devices have.
        given: A plain file; None to make it.
        out: Takes the file.

    Returns:
        The plain file.

    Raises:
        ModelFileError: It has other tensors than the installed file, or nothing says how that was quantized.
        EngineError: onnxruntime is missing or refuses.
        StorageError: The file cannot be written.
    """
    if given is not None:
        with storage_errors(out):
            shutil.copyfile(given, out)
    else:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".plain-") as folder:
            made = Path(folder) / "plain.onnx"
            carry_out([_as_installed(new, installed, made)], f"{new.path}, to be quantized")
            with storage_errors(out):
                made.replace(out)
    plain = Graph(out)
    _check(plain, installed, given)
    return plain


def _as_installed(new: Graph, installed: Graph, out: Path) -> QuantizeDynamic:
    """The quantizer's settings, judged by the installed file."""
    products = [node for node in installed.nodes if node.operator == "MatMulInteger"]
    weights = [node.input(1) for node in products if node.input(1) in installed.stored]
    if not weights or not any(node.operator in _DYNAMIC for node in installed.nodes):
        raise ModelFileError(
            f"{installed.path}: no dynamic quantization of matrix products, so nothing says how the plain file is made",
            hint=_GIVE,
        )
    is_signed = installed.stored[weights[0]].data_type == INT8
    scales = [f"{name.removesuffix('_quantized')}_scale" for name in weights]
    is_per_channel = any(name in installed.stored and installed.array(name).size > 1 for name in scales)
    is_reduced = True
    for name in weights:
        form = Form(installed.stored[name].dims, is_signed)
        _, high = form.range(form.codes(installed.array_bytes(name)))
        is_reduced = is_reduced and high < (127 if is_signed else 255)
    return QuantizeDynamic(
        model=str(new.path),
        out=str(out),
        is_signed=is_signed,
        is_per_channel=is_per_channel,
        is_reduced=is_reduced,
    )


def _check(plain: Graph, installed: Graph, given: Path | None) -> None:
    """That the two files differ in values alone."""
    name = given or "what onnxruntime's quantizer makes"
    if set(plain.stored) != set(installed.stored):
        odd = sorted(set(plain.stored) ^ set(installed.stored))
        raise ModelFileError(
            f"{name}: not the tensors of {installed.path}: {names_text(odd)} in one of both only", hint=_GIVE
        )
    for each, theirs in installed.stored.items():
        ours = plain.stored[each]
        if (ours.dims, ours.data_type) != (theirs.dims, theirs.data_type):
            raise ModelFileError(
                f"{name}: {each} has another shape or type than in {installed.path}", hint=_GIVE
            )
