"""What a delta cannot be much smaller than: two estimates of the entropy of the new file given the old one.

The *floor* assumes that the update of every weight is known exactly and for free, and the old weight is uniform in its
quantization cell: what remains is which cell the sum falls into. No coder that sees only the two quantized files reaches
it, since it does not know the update. It needs the weights that the two files were quantized from.

The *conditional entropy* is empirical: of each new code given the old code and the class of the ratio of the two steps,
with tables for each tensor and half the logarithm of the count for each parameter of a table (Rissanen, 1983). A coder
with better contexts goes below it.
"""

import argparse
import json
import lzma
import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import zstandard

from benchmarks.fields import Array, Fields, block_bytes, split
from protocol.errors import ModelFileError, RequestError, WhimbrelError
from protocol.tensors import map_regions
from protocol.tensors.regions import BytesSource, Layout, ReadAt, Region

_PART_BYTES = 32 << 20  # of a tensor at a time
_CODES = 256  # more than any layout has
# Class limits of |log2(new step / old step)|; both signs are told apart, and so is a step that stayed the same.
_RATIO_LIMITS = (0.002, 0.01)
_RATIO_CLASSES = 2 * (len(_RATIO_LIMITS) + 1) + 2  # and steps that are zero or change their sign
_WORD_BYTES = {Layout.F32: 4, Layout.F16: 2, Layout.BF16: 2}


def interval_bits(old: Fields, new: Fields, update: Array) -> float:
    """Bits of the new codes when the old weights are uniform in their cells and `update` is added to them.

    The sum is uniform over an interval as wide as an old cell; its entropy over the new cells is taken, not the cost of
    the code that was really chosen, which would be infinite wherever rounding of the step crossed a boundary.
    """
    usable = (old.steps != 0) & (new.steps != 0)
    step = np.where(usable, new.steps, 1).astype(np.float64)
    width = np.abs(old.steps / step)
    centre = (old.steps * old.codes - old.offsets + update + new.offsets) / step
    start = centre - width / 2
    first = np.clip(np.floor(start + 0.5), new.low, new.high)
    last = np.clip(np.floor(start + width + 0.5), new.low, new.high)
    width = np.where(usable, width, 1)
    at_first = np.clip((first + 0.5 - start) / width, 0, 1)
    at_last = np.clip((start + width - last + 0.5) / width, 0, 1)
    inner = np.maximum(last - first - 1, 0) * _surprise(np.minimum(1 / width, 1))
    bits = _surprise(at_first) + _surprise(at_last) + inner
    return float(np.where(usable & (last > first), bits, 0).sum())


def table_bits(contexts: Array, symbols: Array) -> float:
    """Bits of `symbols` coded with one table for each context, the tables included.

    Args:
        contexts: Small non-negative integers.
        symbols: Integers in `0 ... 255`, as many.
    """
    counts = np.bincount(contexts.ravel().astype(np.int64) * _CODES + symbols.ravel())
    counts = np.concatenate((counts, np.zeros(-len(counts) % _CODES, counts.dtype))).reshape(-1, _CODES)
    totals = counts.sum(axis=1)
    used = totals > 0
    counts, totals = counts[used], totals[used]
    bits = float((totals * np.log2(totals)).sum() - _weighted_log(counts).sum())
    parameters = (counts > 0).sum(axis=1) - 1
    return bits + float((0.5 * parameters * np.log2(totals)).sum())


def codes_bits(old: Fields, new: Fields) -> float:
    """Empirical conditional entropy of the new codes, by value or by difference, whichever is smaller."""
    ratio = _ratio_class(old.steps, new.steps)
    contexts = (old.codes - old.low) + _CODES * ratio
    by_value = table_bits(contexts, new.codes - new.low)
    by_difference = table_bits(np.broadcast_to(ratio, new.codes.shape), (new.codes - old.codes) % _CODES)
    return min(by_value, by_difference)


def words_bits(old: Array, new: Array) -> float:
    """Bits of integers of at most 16 bits given the old ones: of their differences, byte by byte."""
    difference = (new.astype(np.int64) - old.astype(np.int64)) % (1 << 16)
    # Differences are small and of both signs: folded, the second byte is nearly always zero.
    folded = np.where(difference < 1 << 15, 2 * difference, 2 * ((1 << 16) - difference) - 1)
    high, low = folded >> 8, folded & 0xFF
    return table_bits(np.zeros_like(high), high) + table_bits((high > 0).astype(np.int64), low)


def planes_bits(old: bytes, new: bytes, width: int) -> float:
    """Bits of words of `width` bytes given the old ones, each byte position on its own."""
    before = np.frombuffer(old, np.uint8).reshape(-1, width)
    after = np.frombuffer(new, np.uint8).reshape(-1, width)
    nothing = np.zeros(len(after), np.int64)
    return sum(
        min(
            table_bits(before[:, plane].astype(np.int64), after[:, plane]),
            table_bits(nothing, after[:, plane] - before[:, plane]),
            table_bits(nothing, after[:, plane]),
        )
        for plane in range(width)
    )


def conditional_bytes(base: ReadAt, new: ReadAt) -> int:
    """The empirical conditional entropy of a whole file, in bytes; any two files will do."""
    old_regions = map_regions(base)
    by_name = {region.name: region for region in old_regions if region.name}
    unnamed = [region for region in old_regions if not region.name]
    bits = 0.0
    for number, region in enumerate(map_regions(new)):
        old = by_name.get(region.name)
        if old is None or old.layout != region.layout or old.dims[1:] != region.dims[1:]:
            old = unnamed[min(number, len(unnamed) - 1)] if unnamed and not region.name else None
            bits += 8 * _plain_bytes(base, new, old, region)
        else:
            bits += _tensor_bits(base, new, old, region)
    return round(bits / 8)


def floor_bytes(base: ReadAt, new: ReadAt, base_weights: Path, new_weights: Path) -> int:
    """The floor of a pair of GGUF files, in bytes. Scales cost nothing: they follow from the update.

    Raises:
        ModelFileError: The weights do not belong to the files.
    """
    before, after = _weights(base_weights), _weights(new_weights)
    old_regions = {region.name: region for region in map_regions(base) if region.name}
    bits = 0.0
    for region in map_regions(new):
        if region.name not in old_regions or block_bytes(region.layout) is None:
            continue
        if region.name not in before or region.name not in after:
            raise ModelFileError(f"{region.name} is not in {new_weights.name}")
        old, end = old_regions[region.name], 0
        if old.length != region.length or old.layout != region.layout:
            continue  # its bytes are no update of a tensor that devices have
        for first, second in _parts(base, new, old, region):
            fields, start = (split(region.layout, first), split(region.layout, second)), end
            end += fields[1].codes.size
            update = _floats(after[region.name], start, end) - _floats(before[region.name], start, end)
            bits += interval_bits(*fields, update.reshape(fields[1].codes.shape))
    return round(bits / 8)


def _tensor_bits(base: ReadAt, new: ReadAt, old: Region, region: Region) -> float:
    bits = 0.0
    for first, second in _parts(base, new, old, region):
        if first == second:
            continue
        if block_bytes(region.layout) is None:
            bits += planes_bits(first, second, _WORD_BYTES.get(region.layout, 1))
            continue
        before, after = split(region.layout, first), split(region.layout, second)
        bits += codes_bits(before, after)
        bits += sum(words_bits(before.words[name], after.words[name]) for name in after.words)
    grown = region.length - old.length
    if grown > 0:
        bits += 8 * len(lzma.compress(new.read_at(region.offset + old.length, grown)))
    return bits


def _parts(base: ReadAt, new: ReadAt, old: Region, region: Region) -> Iterator[tuple[bytes, bytes]]:
    """Both tensors in parts of whole blocks, as far as both go."""
    unit = block_bytes(region.layout) or _WORD_BYTES.get(region.layout, 1)
    both = min(old.length, region.length) // unit * unit
    part = _PART_BYTES // unit * unit
    for at in range(0, both, part):
        length = min(part, both - at)
        yield base.read_at(old.offset + at, length), new.read_at(region.offset + at, length)


def _plain_bytes(base: ReadAt, new: ReadAt, old: Region | None, region: Region) -> int:
    """Bytes of a region that no tensor of the base stands against, with the old region as a dictionary if there is one."""
    data = new.read_at(region.offset, region.length)
    dictionary = base.read_at(old.offset, old.length) if old else b""
    if data == dictionary:
        return 0
    sizes = [len(lzma.compress(data, preset=9)), len(data)]
    if dictionary:
        prefix = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27)
        compressor = zstandard.ZstdCompressor(dict_data=prefix, compression_params=parameters)
        sizes.append(len(compressor.compress(data)))
    return min(sizes)


def _surprise(probability: Array) -> Array:
    return -probability * np.log2(np.where(probability > 0, probability, 1))


def _weighted_log(counts: Array) -> Array:
    return counts * np.log2(np.maximum(counts, 1))


def _ratio_class(old: Array, new: Array) -> Array:
    usable = old * new > 0
    logarithm = np.log2(np.where(usable, new, 1) / np.where(usable, old, 1))
    magnitude = np.searchsorted(_RATIO_LIMITS, np.abs(logarithm), side="right") + 1
    classes = np.where(logarithm == 0, 0, 2 * magnitude - (logarithm > 0))
    return np.where(usable, classes, _RATIO_CLASSES - 1)


def _weights(path: Path) -> Mapping[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _floats(tensor: gguf.ReaderTensor, start: int, end: int) -> Array:
    """Some weights of a BF16 or F32 tensor, counted in the file's order."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        return np.asarray(tensor.data).reshape(-1)[start:end]
    words = np.asarray(tensor.data).reshape(-1)[2 * start : 2 * end].view(np.uint16)
    return (words.astype(np.uint32) << 16).view(np.float32)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.entropy", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--weights", type=Path, nargs=2, metavar=("BASE", "NEW"), help="BF16 GGUF files")
    options = parser.parse_args(arguments)
    try:
        base, new = _source(options.base), _source(options.new)
        estimates: dict[str, int | None] = {
            "conditional_bytes": conditional_bytes(base, new),
            "floor_bytes": None,
        }
        if options.weights:
            estimates["floor_bytes"] = floor_bytes(base, new, *options.weights)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(estimates))
    return 0


def _source(path: Path) -> ReadAt:
    try:
        with path.open("rb") as file:
            return BytesSource(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError) as error:  # ValueError: an empty file has nothing to map
        raise RequestError(f"{path}: cannot be read") from error


if __name__ == "__main__":
    sys.exit(main())
