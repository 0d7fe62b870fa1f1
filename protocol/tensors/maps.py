"""From files to tensor maps: one file by its kind, the files of a release together, and several files as one.

`map_*` never refuse a file, because a delta works on any bytes: what is damaged or foreign is one raw region.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from protocol.errors import ModelFileError
from protocol.tensors.gguf import MAGIC as GGUF_MAGIC
from protocol.tensors.gguf import parse_gguf
from protocol.tensors.onnx import map_external, parse_onnx
from protocol.tensors.packing import with_packing
from protocol.tensors.raw import map_raw
from protocol.tensors.regions import ReadAt, Region
from protocol.tensors.safetensors import looks_like_safetensors, parse_safetensors

_ONNX_FIRST_BYTE = 0x08  # ModelProto.ir_version, which every writer puts first
_START_BYTES = 9


def map_regions(source: ReadAt) -> tuple[Region, ...]:
    """Map any file: by its kind where that is understood, else as one raw region.

    Returns:
        Regions in file order that cover the whole file without gaps; nothing for an empty file.
    """
    start = source.read_at(0, _START_BYTES)
    try:
        if start[:4] == GGUF_MAGIC:
            return parse_gguf(source).regions
        if looks_like_safetensors(start, source.length):
            return parse_safetensors(source)
        if _looks_like_onnx(start):
            return parse_onnx(source).regions
    except ModelFileError:
        pass  # a damaged or foreign file still has bytes to send
    return map_raw(source)


def map_files(files: Mapping[str, ReadAt]) -> dict[str, tuple[Region, ...]]:
    """Map the files of one release, each with what the others say about it.

    The tensors of a file with external ONNX data are described in the ONNX file beside it, and nowhere else.

    Args:
        files: By their names, as ONNX files call them: paths relative to the folder of the model.

    Returns:
        A map for each file, as `map_regions` would give it.
    """
    maps = {name: map_regions(source) for name, source in files.items()}
    starts = {name: source.read_at(0, _START_BYTES) for name, source in files.items()}
    shards = [name for name in files if looks_like_safetensors(starts[name], files[name].length)]
    # The parts of a packed weight may lie in different files.
    packed = iter(with_packing(region for name in shards for region in maps[name]))
    maps |= {name: tuple(next(packed) for _ in maps[name]) for name in shards}
    maps |= _map_external_files(
        {name: files[name] for name in files if _looks_like_onnx(starts[name])}, files
    )
    return maps


def _map_external_files(
    models: Mapping[str, ReadAt], files: Mapping[str, ReadAt]
) -> dict[str, tuple[Region, ...]]:
    """Return the maps of those files whose tensors an ONNX model describes."""
    described: dict[str, dict[tuple[int, int], Region]] = {}
    for source in models.values():
        try:
            external = parse_onnx(source).external
        except ModelFileError:
            continue  # and what it says about others is not believed
        for location, tensors in external.items():
            # Several models may share one file of tensors.
            known = described.setdefault(location, {})
            for tensor in tensors:
                known.setdefault((tensor.offset, tensor.length), tensor)
    maps: dict[str, tuple[Region, ...]] = {}
    for location in described.keys() & files.keys():
        tensors_of = described[location]
        try:
            ordered = tuple(tensors_of[key] for key in sorted(tensors_of))
            maps[location] = map_external(ordered, files[location].length)
        except ModelFileError:
            pass  # a file that its model describes wrongly is sent as bytes
    return maps


class JoinedSource:
    """Several sources one behind the other, as one `ReadAt`: a model that is split into files.

    Args:
        sources: In order; their lengths must not change.
    """

    def __init__(self, sources: Sequence[ReadAt]) -> None:
        self._sources = tuple(sources)
        self._starts = (0, *accumulate(source.length for source in self._sources))

    @property
    def length(self) -> int:
        """Length in bytes of all sources together."""
        return self._starts[-1]

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ReadAt.read_at`."""
        parts: list[bytes] = []
        end = min(offset + length, self.length)
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            inside = offset - self._starts[index]
            wanted = min(end, self._starts[index + 1]) - offset
            part = self._sources[index].read_at(inside, wanted)
            parts.append(part)
            if len(part) < wanted:
                break
            offset += wanted
            index += 1
        return b"".join(parts)


def join_maps(maps: Sequence[Sequence[Region]], lengths: Sequence[int]) -> tuple[Region, ...]:
    """Return the map of a `JoinedSource` from the maps and lengths of its sources."""
    starts = accumulate(lengths, initial=0)
    return tuple(
        replace(region, offset=region.offset + start)
        for start, regions in zip(starts, maps, strict=False)
        for region in regions
    )


def _looks_like_onnx(start: bytes) -> bool:
    return start[:1] == bytes([_ONNX_FIRST_BYTE])
