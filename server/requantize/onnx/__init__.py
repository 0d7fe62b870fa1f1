"""The same for ONNX: codes of int8 and of block-quantized int4 weights, chosen by what they do to the outputs under onnxruntime. See ADR 49."""
