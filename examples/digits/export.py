"""Networks to ONNX files: float32 through `onnx.helper`, int8 through onnxruntime's own quantizer."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from examples.digits.network import Floats, Integers, Network

INPUT_NAME = "image"
OUTPUT_NAME = "logits"

# Opset 21 and IR 10 are read by every onnxruntime since 1.20 (its compatibility table).
_OPSET = 21
_IR_VERSION = 10
_CALIBRATION_BATCH = 64
_FATAL_ONLY = 3  # onnxruntime's log severities: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """Feeds images to the quantizer, batch by batch, once."""

    def __init__(self, images: Floats) -> None:
        self._batches: Iterator[Floats] = iter(
            [
                images[start : start + _CALIBRATION_BATCH]
                for start in range(0, len(images), _CALIBRATION_BATCH)
            ]
        )

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def float_model(network: Network, *, pixel_max: float) -> onnx.ModelProto:
    """The network as an ONNX graph that takes raw pixels.

    Args:
        network: Trained on pixels between 0 and 1.
        pixel_max: What a full pixel is in raw images; the first layer absorbs the division.

    Returns:
        A checked model: input `image` (batch, pixels) and output `logits` (batch, classes), float32.
    """
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    current = INPUT_NAME
    last = len(network.weights) - 1
    for position, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        scaled = weight / np.float32(pixel_max) if position == 0 else weight
        names = [f"layer{position}.weight", f"layer{position}.bias"]
        initializers += [
            onnx.numpy_helper.from_array(scaled, names[0]),
            onnx.numpy_helper.from_array(bias, names[1]),
        ]
        out = OUTPUT_NAME if position == last else f"layer{position}.sum"
        nodes.append(onnx.helper.make_node("Gemm", [current, *names], [out], name=f"layer{position}"))
        if position != last:
            current = f"layer{position}.active"
            nodes.append(onnx.helper.make_node("Relu", [out], [current], name=f"layer{position}.relu"))
    shape_in = ["batch", int(network.weights[0].shape[0])]
    shape_out = ["batch", int(network.weights[-1].shape[1])]
    graph = onnx.helper.make_graph(
        nodes,
        "digits",
        [onnx.helper.make_tensor_value_info(INPUT_NAME, onnx.TensorProto.FLOAT, shape_in)],
        [onnx.helper.make_tensor_value_info(OUTPUT_NAME, onnx.TensorProto.FLOAT, shape_out)],
        initializers,
    )
    model = onnx.helper.make_model(
        graph,
        producer_name="whimbrel-examples",
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def quantized(model: onnx.ModelProto, calibration: Floats) -> bytes:
    """The model with int8 weights and activations, as the bytes of an ONNX file.

    Static quantization in the QDQ form. One scale per weight matrix, not per column: then the integers of two
    versions of a network stay comparable, and a delta between them is small.

    Args:
        model: From `float_model`.
        calibration: Images in the scale that the caller believes the model gets; from them the quantizer measures
            the range of every activation. Shape (n, pixels).
    """
    with tempfile.TemporaryDirectory() as folder, _quiet_quantizer():
        plain, prepared, result = (
            Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx")
        )
        plain.write_bytes(model.SerializeToString())
        # A graph of five operators needs no symbolic shapes, and sympy would be one more dependency.
        quant_pre_process(os.fspath(plain), os.fspath(prepared), skip_symbolic_shape=True)
        quantize_static(
            os.fspath(prepared),
            os.fspath(result),
            _Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=False,
        )
        return result.read_bytes()


def predictions(model: bytes, images: Floats) -> Integers:
    """The classes that onnxruntime gives for raw images, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: images})
    return np.asarray(logits.argmax(axis=1), np.int64)


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Mutes the advice that the quantizer logs through the root logger, and only while it runs."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
