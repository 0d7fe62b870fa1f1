"""The fuzz targets without a fuzzer: every kept input is answered, mutated inputs reach what is behind the checksums."""

import random
from collections import Counter
from pathlib import Path

import pytest

from protocol.delta.format import HEADER_BYTES_MIN
from protocol.delta.reader import DeltaReader
from protocol.errors import WhimbrelError
from protocol.tensors import BytesSource, map_regions, parse_gguf, parse_onnx, parse_safetensors
from tests.fuzz import targets
from tests.fuzz.mutation import MUTATORS, mutate_reader, parse_patch, seal_patch
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import SEED_FOLDERS, TARGETS, BrokenPromiseError, join_input, split_input

CORPUS = Path(__file__).resolve().parent / "corpus"
_INPUTS = [(name, path) for name in TARGETS for path in sorted((CORPUS / SEED_FOLDERS[name]).iterdir())]
_PARSERS = {"gguf": parse_gguf, "onnx": parse_onnx, "safetensors": parse_safetensors}


def _blindly(data: bytes, size: int) -> bytes:
    """A fuzzer's way to change bytes, in small: one byte, or one more."""
    rng = random.Random(len(data) + sum(data[:64]))
    out = bytearray(data)
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        out.append(rng.randrange(256))
    return bytes(out[:size])


def test_every_target_has_seeds_and_a_way_to_change_them() -> None:
    assert set(TARGETS) == set(MUTATORS) == {name for name, _ in _INPUTS}
    assert set(SEEDS) == set(SEED_FOLDERS.values())


@pytest.mark.parametrize(("target", "path"), _INPUTS, ids=lambda value: getattr(value, "name", value))
def test_every_kept_input_is_answered(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


@pytest.mark.parametrize(
    ("target", "path"),
    [(target, path) for target, path in _INPUTS if path.name.startswith("seed-")],
    ids=lambda value: getattr(value, "name", value),
)
def test_seeds_are_valid_files(target: str, path: Path) -> None:
    data = path.read_bytes()
    if target in _PARSERS:
        assert _PARSERS[target](BytesSource(data))
        return
    if target == "planner":
        assert all(
            any(region.name for region in map_regions(BytesSource(file))) for file in split_input(data)
        )
        return
    base, patch = split_input(data)
    reader = DeltaReader(BytesSource(base), memory_limit_bytes=targets.READER_MEMORY_BYTES)
    for _ in reader.feed(patch):
        pass
    reader.finish()
    assert reader.is_result_verified


@pytest.mark.parametrize("target", TARGETS)
def test_changed_seeds_are_answered_and_some_still_understood(target: str) -> None:
    answers: Counter[str] = Counter()
    for _, path in (each for each in _INPUTS if each[0] == target):
        data = path.read_bytes()
        for seed in range(4 if target == "coders" else 40):
            changed = MUTATORS[target](data, 32 << 10, seed, _blindly)
            TARGETS[target](changed)
            answers[_answer(target, changed)] += 1
    assert answers["understood"] >= 10
    assert len(answers) >= 2


def _answer(target: str, data: bytes) -> str:
    try:
        if target in _PARSERS:
            _PARSERS[target](BytesSource(data))
        elif target == "planner":
            new = split_input(data)[1]
            return "understood" if any(region.name for region in map_regions(BytesSource(new))) else "raw"
        else:
            _apply(data)
    except WhimbrelError as error:
        return error.code
    return "understood"


def _apply(data: bytes) -> None:
    base, patch = split_input(data)
    reader = DeltaReader(BytesSource(base), memory_limit_bytes=targets.READER_MEMORY_BYTES)
    for _ in reader.feed(patch):
        pass
    reader.finish()


def test_a_payload_that_was_changed_is_decoded_because_its_checksums_agree() -> None:
    base, packed = split_input((CORPUS / "reader" / "seed-q8_0").read_bytes())
    patch = parse_patch(packed)
    assert patch is not None
    index = next(i for i, (segment, _) in enumerate(patch.segments) if segment.parameter_length)
    found: Counter[str] = Counter()
    segment, body = patch.segments[index]
    for offset in range(segment.parameter_length, len(body)):
        damaged = bytearray(body)
        damaged[offset] ^= 1
        patch.segments[index] = (segment, bytes(damaged))
        found[_answer("reader", join_input(base, seal_patch(patch, base, repairs=True)))] += 1
    # Without its digest a segment of other codes would be refused; with it, it is another result.
    assert found["understood"] > 0
    assert found["patch.invalid"] > 0


def test_taking_a_delta_apart_and_sealing_it_changes_nothing() -> None:
    for path in (CORPUS / "reader").glob("seed-*"):
        base, packed = split_input(path.read_bytes())
        patch = parse_patch(packed)
        assert patch is not None
        assert seal_patch(patch, base, repairs=False) == packed


def test_what_is_no_delta_is_changed_blindly() -> None:
    assert mutate_reader(b"", 100, 1, lambda data, _: data + b"x") == b"x"
    cut = join_input(b"", bytes(HEADER_BYTES_MIN - 1))
    assert mutate_reader(cut, 1000, 1, lambda data, _: data + b"x") == cut + b"x"


def test_a_map_with_a_gap_is_a_finding() -> None:
    data = (CORPUS / "gguf" / "seed-k").read_bytes()
    regions = parse_gguf(BytesSource(data)).regions
    with pytest.raises(BrokenPromiseError, match="does not follow"):
        targets._check_map(regions[1:], len(data))
    with pytest.raises(BrokenPromiseError, match="ends at"):
        targets._check_map(regions, len(data) + 1)


def test_reading_in_parts_resumes_and_ends_alike() -> None:
    base, patch = split_input((CORPUS / "reader" / "seed-text").read_bytes())
    at_once = targets._read(base, patch, len(patch), resumes=False)
    in_parts = targets._read(base, patch, 100, resumes=True)
    assert (at_once.result, at_once.error, at_once.is_verified) == (in_parts.result, "", True)
    assert not in_parts.is_verified  # it was restored on the way
    assert targets._read(base, patch[:-1], 100, resumes=True).error == "patch.truncated"
    assert targets._read(base, patch + b"x", 100, resumes=True).error == "patch.invalid"
