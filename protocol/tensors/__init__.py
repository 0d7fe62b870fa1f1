"""Tensor maps: which bytes of a model file belong to which tensor, and how they are arranged.

Pure and bounded: parsers read through `ReadAt`, hold one page at a time, and check every count, length and offset
before using it. `parse_*` refuse what is damaged; `map_*` never do, because a delta works on any two files.
"""

from protocol.tensors.gguf import GgufFile, parse_gguf
from protocol.tensors.maps import JoinedSource, join_maps, map_files, map_regions
from protocol.tensors.onnx import OnnxFile, map_external, parse_onnx
from protocol.tensors.raw import map_raw
from protocol.tensors.regions import BytesSource, Layout, ReadAt, Region
from protocol.tensors.safetensors import parse_safetensors

__all__ = [
    "BytesSource",
    "GgufFile",
    "JoinedSource",
    "Layout",
    "OnnxFile",
    "ReadAt",
    "Region",
    "join_maps",
    "map_external",
    "map_files",
    "map_raw",
    "map_regions",
    "parse_gguf",
    "parse_onnx",
    "parse_safetensors",
]
