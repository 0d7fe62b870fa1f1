"""Weights that a container declares as plain integers although they are packed codes: AWQ, GPTQ, MXFP4, FP8 with scales.

Recognised by names and shapes alone. Whatever does not fit exactly keeps the layout that its data type says.
Sources: AutoAWQ `packing_utils.py`, AutoGPTQ `qlinear_cuda.py`, the gpt-oss and DeepSeek-V3 checkpoints.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from protocol.tensors.regions import Layout, Region

_CODES_A_WORD = 8
# A weight's scales are called like the weight, with one of these endings.
_SCALE_ENDINGS = ("_scale_inv", "_scale")
_SCALED_LAYOUTS = {Layout.F8, Layout.I8}


def with_packing(tensors: Iterable[Region]) -> list[Region]:
    """Return the tensors, those that are packed with the layout, shape and scales that they really have."""
    listed = list(tensors)
    by_name = {tensor.name: tensor for tensor in listed}
    return [_unpacked(tensor, by_name) for tensor in listed]


def _unpacked(tensor: Region, by_name: Mapping[str, Region]) -> Region:
    if tensor.layout is Layout.I32:
        if tensor.name.endswith(".qweight"):
            return _int4_weight(tensor, by_name)
        if tensor.name.endswith(".qzeros"):
            return _int4_zeros(tensor, by_name)
    if tensor.layout is Layout.U8 and tensor.name.endswith("_blocks"):
        return _mxfp4_weight(tensor, by_name)
    if tensor.layout in _SCALED_LAYOUTS:
        for ending in _SCALE_ENDINGS:
            if tensor.name + ending in by_name:
                return replace(tensor, scales=tensor.name + ending)
    return tensor


def _int4_parts(stem: str, by_name: Mapping[str, Region]) -> tuple[Region, Region, Region] | None:
    """Return weight, zero points and scales of a layer with four-bit codes, None if there is no such layer."""
    parts = [by_name.get(stem + ending) for ending in (".qweight", ".qzeros", ".scales")]
    weight, zeros, scales = parts
    if (
        weight is None
        or zeros is None
        or scales is None
        or {len(part.dims) for part in (weight, zeros, scales)} != {2}
    ):
        return None
    groups, outputs = scales.dims
    is_four_bits = zeros.dims == (groups, outputs // _CODES_A_WORD) and outputs % _CODES_A_WORD == 0
    return (
        (weight, zeros, scales)
        if is_four_bits and weight.dims[1] in {outputs, outputs // _CODES_A_WORD}
        else None
    )


def _int4_weight(tensor: Region, by_name: Mapping[str, Region]) -> Region:
    """AWQ packs along the outputs, GPTQ along the inputs; the shape tells."""
    parts = _int4_parts(tensor.name.removesuffix(".qweight"), by_name)
    if parts is None:
        return tensor
    scales = parts[2]
    rows, columns = tensor.dims
    is_awq = columns != scales.dims[1]
    dims = (rows, columns * _CODES_A_WORD) if is_awq else (rows * _CODES_A_WORD, columns)
    return replace(tensor, layout=Layout.AWQ4 if is_awq else Layout.GPTQ4, dims=dims, scales=scales.name)


def _int4_zeros(tensor: Region, by_name: Mapping[str, Region]) -> Region:
    parts = _int4_parts(tensor.name.removesuffix(".qzeros"), by_name)
    if parts is None:
        return tensor
    weight, _, scales = parts
    layout = Layout.PACKED4 if weight.dims[1] == scales.dims[1] else Layout.AWQ4
    return replace(tensor, layout=layout, dims=scales.dims)


def _mxfp4_weight(tensor: Region, by_name: Mapping[str, Region]) -> Region:
    """Bytes of two FP4 values, sixteen for each shared exponent."""
    scales = by_name.get(tensor.name.removesuffix("_blocks") + "_scales")
    if scales is None or len(tensor.dims) < 3 or tensor.dims[-1] != 16 or scales.dims != tensor.dims[:-1]:
        return tensor
    blocks, size = tensor.dims[-2:]
    return replace(
        tensor,
        layout=Layout.PACKED4,
        dims=(*tensor.dims[:-2], blocks * size * 2),
        row_bytes=blocks * size,
        scales=scales.name,
    )
