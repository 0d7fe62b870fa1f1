import hashlib
import io
import random
from dataclasses import astuple, replace
from pathlib import Path

import gguf
import pytest

from device.decoding import DiskFile
from protocol.delta import writer
from protocol.delta.format import (
    HEADER_BYTES_MIN,
    REACH_BYTES_MAX,
    Codec,
    Header,
    Reach,
)
from protocol.delta.inplace import Files, InPlace, read_header
from protocol.delta.inspection import inspect_delta
from protocol.delta.inverse import inverse_header
from protocol.delta.needs import in_place_needs
from protocol.delta.undo_journal import Phase, journal_bytes, journal_bytes_max
from protocol.delta.writer import make_delta
from protocol.errors import (
    InverseFullError,
    NotInPlaceError,
    PatchError,
    PatchLimitError,
    StorageError,
    TruncatedPatchError,
    WrongBaseError,
)
from protocol.tensors import BytesSource
from simulator.disk import SimulatedDisk
from simulator.power import PowerCutError
from tests.protocol.delta_files import apply, header_end
from tests.protocol.model_files import gguf_file, safetensors_file, weights

SEGMENT_BYTES = 4096
STEP_BYTES = 10_000
ROOM = 1 << 20


class CutDisk(SimulatedDisk):
    """Loses power before the operation with number `cut_at`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.cut_at = -1
        self.written: set[str] = set()

    def write(self, name: str, offset: int, data: bytes) -> None:
        super().write(name, offset, data)
        self.written.add(name)

    def _check_writable(self, name: str) -> None:
        if self.operations == self.cut_at:
            raise PowerCutError
        self.operations += 1
        super()._check_writable(name)


def model(folder: Path, name: str, *, update: float = 0.0, rows: int = 40, order: int = 1) -> bytes:
    kind = gguf.GGMLQuantizationType.Q4_0
    names = ["embed", "up", "down", "out"][::order]
    tensors = {
        each: (weights((rows if each == "embed" else 64, 256), 3 + len(each), update), kind) for each in names
    }
    return gguf_file(folder / "model.gguf", tensors, name=name)


def noise(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


PAIRS = [
    "update",
    "longer header",
    "shorter header",
    "more rows",
    "fewer rows",
    "reordered",
    "same",
    "longer noise",
    "shorter noise",
    "to nothing",
    "from nothing",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    folder = tmp_path_factory.mktemp("models")
    old, long_name = model(folder, "m"), "m" * 3000
    return {
        "update": (old, model(folder, "m", update=0.05)),
        "longer header": (old, model(folder, long_name, update=0.05)),
        "shorter header": (model(folder, long_name), model(folder, "m", update=0.05)),
        "more rows": (old, model(folder, "m", update=0.05, rows=72)),
        "fewer rows": (model(folder, "m", rows=72), model(folder, "m", update=0.05)),
        "reordered": (old, model(folder, "m", update=0.05, order=-1)),
        "same": (old, old),
        "longer noise": (noise(30_000, 1), noise(50_000, 2)),
        "shorter noise": (noise(50_000, 1), noise(30_000, 2)),
        "to nothing": (noise(9_000, 1), b""),
        "from nothing": (b"", noise(9_000, 1)),
    }


def delta(old: bytes, new: bytes, *, in_place: bool = True) -> bytes:
    out = io.BytesIO()
    make_delta(BytesSource(old), BytesSource(new), out, segment_bytes=SEGMENT_BYTES, in_place=in_place)
    return out.getvalue()


def prepared(old: bytes, patch: bytes) -> CutDisk:
    """A disk with the old file and everything that an application in place needs."""
    disk = CutDisk()
    disk.create("model", len(old))
    disk.write("model", 0, old)
    disk.sync("model")
    disk.create("journal", journal_bytes(read_header(BytesSource(patch)), STEP_BYTES))
    disk.create("inverse", 0)
    disk.written.clear()
    return disk


def opened(disk: CutDisk, patch: bytes, *, inverse_bytes_max: int = ROOM) -> InPlace:
    files = Files(
        DiskFile(disk, "model"), BytesSource(patch), DiskFile(disk, "journal"), DiskFile(disk, "inverse")
    )
    return InPlace(files, inverse_bytes_max=inverse_bytes_max)


def content(disk: CutDisk, name: str = "model") -> bytes:
    return disk.read(name, 0, disk.length(name) or 0)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def begun(disk: CutDisk, patch: bytes, *, inverse_bytes_max: int = ROOM) -> InPlace:
    work = opened(disk, patch, inverse_bytes_max=inverse_bytes_max)
    if work.phase is Phase.NEW:
        work.begin(digest(content(disk)))
    return work


def finish(work: InPlace) -> int:
    steps = 1
    while not work.step():
        steps += 1
    return steps


@pytest.mark.parametrize("pair", PAIRS)
def test_the_file_becomes_the_new_one_and_its_inverse_is_a_delta_back(
    pairs: dict[str, tuple[bytes, bytes]], pair: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    disk = prepared(old, patch)
    work = begun(disk, patch)
    finish(work)
    assert work.phase is Phase.APPLIED
    assert content(disk) == new
    inverse = content(disk, "inverse")
    assert len(inverse) == work.inverse_length
    assert apply(new, inverse) == old
    assert inspect_delta(BytesSource(inverse)).header.result_sha256 == digest(old)
    assert apply(old, patch) == new  # it is an ordinary delta, too


@pytest.mark.parametrize("pair", PAIRS)
def test_the_room_for_the_inverse_is_known_before_anything_is_applied(
    pairs: dict[str, tuple[bytes, bytes]], pair: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    header, disk = read_header(BytesSource(patch)), prepared(old, patch)
    needs = in_place_needs(BytesSource(old), BytesSource(new), BytesSource(patch))
    assert needs is not None
    assert header.reach is not None
    assert (needs.base_bytes, needs.reach_bytes) == (
        len(old),
        max(header.reach.behind_bytes, header.reach.ahead_bytes),
    )
    assert journal_bytes(header) <= journal_bytes_max(needs.reach_bytes, max(len(old), len(new)))
    slack_bytes = 4096
    finish(begun(disk, patch, inverse_bytes_max=needs.inverse_bytes + needs.reach_bytes + slack_bytes))
    assert content(disk) == new
    assert abs((disk.length("inverse") or 0) - needs.inverse_bytes) < slack_bytes


def test_an_ordinary_delta_has_no_needs_in_place(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    old, new = pairs["update"]
    patch = delta(old, new, in_place=False)
    assert in_place_needs(BytesSource(old), BytesSource(new), BytesSource(patch)) is None


@pytest.mark.parametrize(
    ("pair", "is_marked"), [("update", True), ("longer header", True), ("reordered", False)]
)
def test_a_delta_can_be_marked_where_that_costs_nothing(
    pairs: dict[str, tuple[bytes, bytes]], pair: str, is_marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "REACH_BYTES_MAX", SEGMENT_BYTES)
    old, new = pairs[pair]
    plain, asked = io.BytesIO(), io.BytesIO()
    make_delta(BytesSource(old), BytesSource(new), plain, segment_bytes=SEGMENT_BYTES)
    make_delta(BytesSource(old), BytesSource(new), asked, segment_bytes=SEGMENT_BYTES, in_place=None)
    reach = inspect_delta(BytesSource(asked.getvalue())).header.reach
    assert (reach is not None) is is_marked
    varints = 0 if reach is None else sum(max(1, -(-each.bit_length() // 7)) for each in astuple(reach))
    assert len(asked.getvalue()) - len(plain.getvalue()) == varints


@pytest.mark.parametrize("pair", PAIRS)
def test_the_inverse_puts_the_old_file_back_in_place(
    pairs: dict[str, tuple[bytes, bytes]], pair: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    disk = prepared(old, patch)
    finish(begun(disk, patch))
    work = opened(disk, patch)
    assert work.phase is Phase.APPLIED
    work.undo()
    finish(work)
    assert content(disk) == old
    assert opened(disk, patch).phase is Phase.UNDONE


@pytest.mark.parametrize("pair", PAIRS)
def test_it_can_turn_round_after_every_step(pairs: dict[str, tuple[bytes, bytes]], pair: str) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    steps = finish(begun(prepared(old, patch), patch))
    for done in range(steps):
        disk = prepared(old, patch)
        work = begun(disk, patch)
        for _ in range(done):
            work.step()
        if done % 2:
            disk.crash(random.Random(done))
            work = opened(disk, patch)
        work.undo()
        finish(work)
        assert content(disk) == old


def test_an_inverse_of_a_small_update_is_small(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    for pair in ("update", "longer header", "shorter header", "more rows"):
        old, new = pairs[pair]
        patch = delta(old, new)
        disk = prepared(old, patch)
        finish(begun(disk, patch))
        assert len(content(disk, "inverse")) < 0.55 * len(old), pair


def test_bytes_that_do_not_change_are_not_written(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    old, _ = pairs["same"]
    patch = delta(old, old)
    disk = prepared(old, patch)
    finish(begun(disk, patch))
    assert "model" not in disk.written
    assert set(inspect_delta(BytesSource(content(disk, "inverse"))).segments) == {Codec.COPY}


# --- power cuts ------------------------------------------------------------------------------------------------


def until_the_cut(disk: CutDisk, patch: bytes, cut_at: int, *, and_back: bool) -> bool:
    """Work until the power goes; return whether it went."""
    disk.cut_at = cut_at
    try:
        work = begun(disk, patch)
        finish(work)
        if and_back:
            work.undo()
            finish(work)
    except PowerCutError:
        return True
    finally:
        disk.cut_at = -1
    return False


@pytest.mark.parametrize("ending", ["goes on", "goes back"])
@pytest.mark.parametrize("pair", ["update", "longer header", "shorter header", "more rows", "shorter noise"])
def test_a_power_cut_at_any_operation_loses_nothing(
    pairs: dict[str, tuple[bytes, bytes]], pair: str, ending: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    rng = random.Random(pair)
    cut_at = prepared(old, patch).operations
    cuts = 0
    while True:
        disk = prepared(old, patch)
        if not until_the_cut(disk, patch, cut_at, and_back=True):
            break
        disk.crash(rng)
        cuts += 1
        cut_at += cuts % 3 == 0  # what was not synced fares differently each time
        work = opened(disk, patch)
        if work.phase is Phase.NEW:
            assert content(disk) == old
            continue
        if ending == "goes back":
            work.undo()
        finish(work)
        is_back = work.phase is Phase.UNDONE
        assert is_back or ending == "goes on"
        assert content(disk) == (old if is_back else new), f"cut {cuts}, near operation {cut_at}"
        if not is_back:
            assert apply(new, content(disk, "inverse")) == old
    assert cuts > 150


def test_a_device_that_loses_power_all_the_time_gets_there(
    pairs: dict[str, tuple[bytes, bytes]],
) -> None:
    old, new = pairs["longer header"]
    patch = delta(old, new)
    for seed in range(25):
        rng = random.Random(seed)
        disk = prepared(old, patch)
        turn_at = rng.randrange(12)
        lives = 0
        while until_the_cut(
            disk, patch, disk.operations + rng.randrange(1, 25), and_back=lives >= turn_at and lives > 0
        ):
            disk.crash(rng)
            lives += 1
            assert lives < 500
        work = opened(disk, patch)
        assert content(disk) == (old if work.phase is Phase.UNDONE else new)


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_delta_that_was_not_made_for_it_is_refused(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    old, new = pairs["update"]
    good, patch = delta(old, new), delta(old, new, in_place=False)
    with pytest.raises(NotInPlaceError) as caught:
        opened(prepared(old, good), patch)
    assert caught.value.code == "patch.not_in_place"


@pytest.mark.parametrize("length", [0, 5, HEADER_BYTES_MIN])
def test_a_delta_that_ends_in_its_header_is_refused(
    pairs: dict[str, tuple[bytes, bytes]], length: int
) -> None:
    with pytest.raises(TruncatedPatchError):
        read_header(BytesSource(delta(*pairs["update"])[:length]))


def test_another_base_is_refused_before_a_byte_is_overwritten(
    pairs: dict[str, tuple[bytes, bytes]],
) -> None:
    old, new = pairs["update"]
    patch = delta(old, new)
    wrong = old[:-1] + bytes([old[-1] ^ 1])
    disk = prepared(wrong, patch)
    with pytest.raises(WrongBaseError):
        begun(disk, patch)
    assert content(disk) == wrong
    assert opened(disk, patch).phase is Phase.NEW


def test_too_little_memory_is_refused_before_a_byte_is_overwritten(
    pairs: dict[str, tuple[bytes, bytes]],
) -> None:
    old, new = pairs["update"]
    patch = delta(old, new)
    disk = prepared(old, patch)
    files = Files(
        DiskFile(disk, "model"), BytesSource(patch), DiskFile(disk, "journal"), DiskFile(disk, "inverse")
    )
    work = InPlace(files, memory_limit_bytes=1 << 20, inverse_bytes_max=ROOM)
    with pytest.raises(PatchLimitError):
        work.begin(digest(old))
    assert content(disk) == old


def test_a_journal_of_another_delta_is_refused(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    old, new = pairs["update"]
    patch = delta(old, new)
    disk = prepared(old, patch)
    begun(disk, patch)
    with pytest.raises(PatchError, match="another delta"):
        opened(disk, delta(old, old))


def test_a_journal_of_which_nothing_is_intact_is_said_to_be_damaged(
    pairs: dict[str, tuple[bytes, bytes]],
) -> None:
    old, new = pairs["update"]
    patch = delta(old, new)
    disk = prepared(old, patch)
    work = begun(disk, patch)
    work.step()
    for name_offset in (0, 512 << 10):
        disk.write("journal", name_offset + 40, b"\xff" * 8)
    with pytest.raises(StorageError, match="damaged"):
        opened(disk, patch)


def test_a_journal_that_is_too_short_is_refused(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    old, new = pairs["update"]
    patch = delta(old, new)
    disk = prepared(old, patch)
    disk.resize("journal", 1 << 20)
    with pytest.raises(StorageError, match="too short"):
        opened(disk, patch)


@pytest.mark.parametrize("pair", ["update", "longer noise", "shorter noise", "more rows"])
def test_where_the_inverse_does_not_fit_the_old_file_comes_back(
    pairs: dict[str, tuple[bytes, bytes]], pair: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    whole = prepared(old, patch)
    finish(begun(whole, patch))
    needed = len(content(whole, "inverse"))
    refused = 0
    for room in range(0, needed, needed // 9):
        disk = prepared(old, patch)
        with pytest.raises(InverseFullError) as caught:
            finish(begun(disk, patch, inverse_bytes_max=room))
        assert not caught.value.is_retryable
        work = opened(disk, patch, inverse_bytes_max=room)
        refused += work.phase is Phase.NEW
        work.undo()
        if work.phase is not Phase.NEW:
            finish(work)
        assert content(disk) == old
        assert (disk.length("inverse") or 0) <= max(
            room, len(inverse_header(read_header(BytesSource(patch))).pack())
        )
    assert refused >= 1


@pytest.mark.parametrize("pair", ["update", "longer header", "more rows"])
def test_a_damaged_delta_is_found_and_the_old_file_comes_back(
    pairs: dict[str, tuple[bytes, bytes]], pair: str
) -> None:
    old, new = pairs[pair]
    patch = delta(old, new)
    rng = random.Random(5)
    for _ in range(30):
        at = rng.randrange(header_end(patch), len(patch))
        broken = patch[:at] + bytes([patch[at] ^ 1 << rng.randrange(8)]) + patch[at + 1 :]
        disk = prepared(old, patch)
        with pytest.raises(PatchError):
            finish(begun(disk, broken))
        work = opened(disk, broken)
        work.undo()
        finish(work)
        assert content(disk) == old


# --- the format ------------------------------------------------------------------------------------------------


def test_a_header_tells_how_far_its_segments_reach(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    reach = {pair: read_header(BytesSource(delta(*pairs[pair]))).reach for pair in PAIRS}
    assert reach["update"] == Reach(0, 0)
    longer, shorter = reach["longer header"], reach["shorter header"]
    assert longer is not None
    assert shorter is not None
    assert longer.behind_bytes >= 2976
    assert shorter.ahead_bytes >= 2976


def test_a_segment_that_reaches_further_than_its_header_says_is_refused(
    pairs: dict[str, tuple[bytes, bytes]],
) -> None:
    old, new = pairs["longer header"]
    patch = delta(old, new)
    header = read_header(BytesSource(patch))
    lying = replace(header, reach=Reach(0, 0))
    packed = lying.pack()
    with pytest.raises(PatchError):
        apply(old, packed + patch[len(packed) :])


def test_a_reach_beyond_the_limit_is_refused(pairs: dict[str, tuple[bytes, bytes]]) -> None:
    header = read_header(BytesSource(delta(*pairs["update"])))
    too_far = replace(header, reach=Reach(REACH_BYTES_MAX + 1, 0))
    with pytest.raises(PatchLimitError):
        Header.unpack(too_far.pack())


def test_a_tensor_that_moved_far_back_is_sent_without_its_base() -> None:
    # As rows of large tensors are in the real world: more than the reach apart.
    big = noise(REACH_BYTES_MAX + 300_000, 1)
    small = {name: ("U8", (100_000,), noise(100_000, seed)) for seed, name in enumerate("ab", 7)}
    old = safetensors_file({"a": small["a"], "big": ("U8", (len(big),), big), "b": small["b"]})
    new = safetensors_file({"big": ("U8", (len(big),), big), "a": small["a"], "b": small["b"]})
    near, far = io.BytesIO(), io.BytesIO()
    make_delta(BytesSource(old), BytesSource(new), near, in_place=True)
    make_delta(BytesSource(old), BytesSource(new), far)
    assert len(far.getvalue()) < 5_000
    assert 100_000 < len(near.getvalue()) < 110_000  # only `a`
    assert apply(old, near.getvalue()) == new
