"""Tensor maps: which bytes of a model file belong to which tensor, and how they are arranged.

Pure and bounded: parsers read through `ReadAt`, hold one page at a time, and check every count, length and offset
before using it. `parse_*` refuse what is damaged; `map_regions` never does, because a delta works on any two files.
"""

from protocol.errors import ModelFileError
from protocol.tensors.gguf import MAGIC as GGUF_MAGIC
from protocol.tensors.gguf import GgufFile, parse_gguf
from protocol.tensors.onnx import OnnxFile, parse_onnx
from protocol.tensors.raw import map_raw
from protocol.tensors.regions import BytesSource, Layout, ReadAt, Region
from protocol.tensors.safetensors import looks_like_safetensors, parse_safetensors

__all__ = [
    "BytesSource",
    "GgufFile",
    "Layout",
    "OnnxFile",
    "ReadAt",
    "Region",
    "map_raw",
    "map_regions",
    "parse_gguf",
    "parse_onnx",
    "parse_safetensors",
]

_ONNX_FIRST_BYTE = 0x08  # ModelProto.ir_version, which every writer puts first


def map_regions(source: ReadAt) -> tuple[Region, ...]:
    """Map any file: by its kind where that is understood, else as one raw region.

    Returns:
        Regions in file order that cover the whole file without gaps; nothing for an empty file.
    """
    start = source.read_at(0, 9)
    try:
        if start[:4] == GGUF_MAGIC:
            return parse_gguf(source).regions
        if looks_like_safetensors(start, source.length):
            return parse_safetensors(source)
        if start[:1] == bytes([_ONNX_FIRST_BYTE]):
            return parse_onnx(source).regions
    except ModelFileError:
        pass  # a damaged or foreign file still has bytes to send
    return map_raw(source)
