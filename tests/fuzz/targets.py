"""What must hold for any bytes. Each target takes one input and raises if something does not hold.

Errors of ours with a code are an answer. Anything else that is raised is a finding, and so is a process that takes too
long or too much memory; the driver sees to those.
"""

import contextlib
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from protocol.delta.context import Coder
from protocol.delta.inspection import inspect_delta
from protocol.delta.matching import match_regions
from protocol.delta.notes import Notes, read_notes
from protocol.delta.planner import Planner
from protocol.delta.reader import DeltaReader
from protocol.delta.reference import context as reference
from protocol.errors import ModelFileError, PatchError
from protocol.tensors import BytesSource, Region, map_files, map_regions
from protocol.tensors.gguf import parse_gguf
from protocol.tensors.onnx import map_external, parse_onnx
from protocol.tensors.safetensors import parse_safetensors

READER_MEMORY_BYTES = 32 << 20
"""What the reader may be told to take; the process as a whole gets a few times that."""

PLANNED_SEGMENT_BYTES = 1024
REFERENCE: Coder = reference
_BASE_LENGTH = struct.Struct("<I")


class BrokenPromiseError(AssertionError):
    """A target found an answer that is none."""


def _check_map(regions: tuple[Region, ...], length: int) -> None:
    position = 0
    for region in regions:
        is_sound = region.offset == position and region.length >= 1 and 0 <= region.row_bytes <= region.length
        if not is_sound:
            raise BrokenPromiseError(f"{region} does not follow {position}")
        region.name.encode()
        position = region.end
    if position != length:
        raise BrokenPromiseError(f"the map ends at {position}, the file at {length}")


def run_gguf(data: bytes) -> None:
    """A GGUF file is mapped without gaps, or refused."""
    source = BytesSource(data)
    _check_map(map_regions(source), len(data))
    try:
        parsed = parse_gguf(source)
    except ModelFileError:
        return
    _check_map(parsed.regions, len(data))


def run_safetensors(data: bytes) -> None:
    """A safetensors file is mapped without gaps, or refused."""
    source = BytesSource(data)
    _check_map(map_files({"m": source})["m"], len(data))
    try:
        regions = parse_safetensors(source)
    except ModelFileError:
        return
    _check_map(regions, len(data))


def run_onnx(data: bytes) -> None:
    """An ONNX file, and the external file it speaks of, are mapped without gaps, or refused; no path leads outside."""
    source = BytesSource(data)
    try:
        parsed = parse_onnx(source)
    except ModelFileError:
        _check_map(map_regions(source), len(data))
        return
    _check_map(parsed.regions, len(data))
    beside = bytes(4096)
    for location, tensors in parsed.external.items():
        if location.startswith("/") or {"", ".", ".."} & set(location.split("/")):
            raise BrokenPromiseError(f"the location {location!r} leads outside")
        try:
            _check_map(map_external(tensors, len(beside)), len(beside))
        except ModelFileError:
            continue
    files = {"m": source, **dict.fromkeys(parsed.external, BytesSource(beside))}
    for name, regions in map_files(files).items():
        _check_map(regions, files[name].length)


def join_input(base: bytes, other: bytes) -> bytes:
    """Return an input of `run_reader` or `run_planner`: a base, and a delta file or a new file."""
    return _BASE_LENGTH.pack(len(base)) + base + other


def split_input(data: bytes) -> tuple[bytes, bytes]:
    """Return the base and the other file."""
    length = int.from_bytes(data[: _BASE_LENGTH.size], "little")
    return data[_BASE_LENGTH.size :][:length], data[_BASE_LENGTH.size :][length:]


def run_planner(data: bytes) -> None:
    """Whatever two files are mapped as, the plan covers the new one in order, from windows inside the base."""
    base, new = (BytesSource(each) for each in split_input(data))
    base_map, new_map = map_regions(base), map_regions(new)
    matches = match_regions(base_map, new_map, base, new)
    notes = Notes(new_map, matches)
    position = 0
    for plan in Planner(base, new, PLANNED_SEGMENT_BYTES, base_map).plan(new_map, matches):
        runs = sum(run.length for run in plan.runs)
        is_sound = (
            plan.result_offset == position
            and 1 <= plan.length <= PLANNED_SEGMENT_BYTES
            and 0 <= plan.window_offset <= plan.window_offset + plan.window_length <= base.length
            and runs in {0, plan.length}
            and len(plan.runs) == len(plan.places)
        )
        for run in plan.runs:
            at = run.base_offset or 0
            is_sound = (
                is_sound and at >= 0 and (run.base_offset is None or at + run.length <= plan.window_length)
            )
        if not is_sound:
            raise BrokenPromiseError(f"{plan} does not follow {position}")
        window = base.read_at(plan.window_offset, plan.window_length)
        notes.add(plan, new.read_at(position, plan.length), window, is_copy=False)
        position += plan.length
    if position != new.length:
        raise BrokenPromiseError(f"the plan ends at {position}, the file at {new.length}")
    packed = notes.pack()
    if packed:
        read_notes(packed)


@dataclass(frozen=True)
class _Outcome:
    """What came of reading a delta file."""

    result: bytes
    error: str
    is_verified: bool


def run_reader(data: bytes) -> None:
    """A delta file gives the announced result or is refused, however it is cut and wherever reading is resumed."""
    base, patch = split_input(data)
    at_once = _read(base, patch, len(patch) or 1, resumes=False)
    in_parts = _read(base, patch, 1 + len(patch) // 7, resumes=True)
    if (at_once.result, at_once.error) != (in_parts.result, in_parts.error):
        raise BrokenPromiseError(f"read at once: {at_once.error!r}, read in parts: {in_parts.error!r}")
    if not at_once.error and not at_once.is_verified:
        raise BrokenPromiseError("a result that nobody verified")
    with contextlib.suppress(PatchError):
        inspect_delta(BytesSource(patch))


def run_coders(data: bytes) -> None:
    """The library and the reference in Python give the same result or refuse alike, the one where the other left off."""
    base, patch = split_input(data)
    ours = _read(base, patch, len(patch) or 1, resumes=False)
    theirs = _read(base, patch, 1 + len(patch) // 3, resumes=True, coder=REFERENCE)
    if (ours.result, ours.error) != (theirs.result, theirs.error):
        raise BrokenPromiseError(f"the library: {ours.error!r}, the reference: {theirs.error!r}")


def _read(
    base: bytes, patch: bytes, part_bytes: int, *, resumes: bool, coder: Coder | None = None
) -> _Outcome:
    source = BytesSource(base)
    reader = DeltaReader(source, memory_limit_bytes=READER_MEMORY_BYTES)
    reader._model._coder = coder or reader._model._coder
    result = bytearray()
    try:
        position, resumed_at = 0, (0, 0)
        while position < len(patch):
            for piece in reader.feed(patch[position : position + part_bytes]):
                if piece.offset != len(result):
                    raise BrokenPromiseError(f"a piece for {piece.offset} came at {len(result)}")
                result += piece.data
                if resumes:
                    break  # in the middle of a copy, too
            position += part_bytes
            reached = reader.patch_offset, reader.result_offset
            if resumes and reached > resumed_at:
                reader = DeltaReader.restore(source, reader.dump(), memory_limit_bytes=READER_MEMORY_BYTES)
                reader._model._coder = coder or reader._model._coder
                position, resumed_at = reader.patch_offset, reached
        reader.finish()
    except PatchError as error:
        return _Outcome(bytes(result), error.code, is_verified=False)
    if reader.header is None or hashlib.sha256(result).digest() != reader.header.result_sha256:
        # Only a reader that saw everything knows; the other one says that it does not.
        if reader.is_result_verified:
            raise BrokenPromiseError("the result is not the one that was announced")
        return _Outcome(bytes(result), PatchError.code, is_verified=False)
    return _Outcome(bytes(result), "", reader.is_result_verified)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "gguf": run_gguf,
    "onnx": run_onnx,
    "safetensors": run_safetensors,
    "planner": run_planner,
    "reader": run_reader,
    "coders": run_coders,
}

SEED_FOLDERS = dict(zip(TARGETS, TARGETS, strict=True)) | {"coders": "reader"}
"""Where in the corpus the seeds of a target are."""
