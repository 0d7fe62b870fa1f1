import random
from collections.abc import Callable
from pathlib import Path

import pytest

from device.adapters.disk import RealDisk
from device.ports import Disk
from protocol.errors import StorageError, StorageFullError
from simulator.disk import SimulatedDisk


def real(folder: Path) -> Disk:
    disk = RealDisk(folder / "state")
    disk.prepare()
    return disk


@pytest.fixture(params=[real, lambda _: SimulatedDisk()], ids=["real", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    make: Callable[[Path], Disk] = request.param
    return make(tmp_path)


def put(disk: Disk, name: str, data: bytes) -> None:
    disk.create(name, len(data))
    disk.write(name, 0, data)
    disk.sync(name)


def test_a_new_file_has_its_length_and_zeros(disk: Disk) -> None:
    disk.create("blobs/x", 10_000)
    assert disk.length("blobs/x") == 10_000
    assert disk.read("blobs/x", 0, 20_000) == bytes(10_000)


def test_an_empty_file_is_a_file(disk: Disk) -> None:
    disk.create("empty", 0)
    assert disk.length("empty") == 0
    assert disk.read("empty", 0, 5) == b""


def test_what_was_written_is_read_and_a_read_ends_at_the_end(disk: Disk) -> None:
    put(disk, "file", b"hello world")
    disk.write("file", 6, b"there")
    assert disk.read("file", 0, 100) == b"hello there"
    assert disk.read("file", 9, 100) == b"re"
    assert disk.read("file", 50, 10) == b""


def test_creating_again_gives_a_fresh_file_and_leaves_other_names_of_the_old_one(disk: Disk) -> None:
    put(disk, "a/file", b"old")
    disk.link("a/file", "b/file")
    put(disk, "a/file", b"newer")
    assert disk.read("a/file", 0, 10) == b"newer"
    assert disk.read("b/file", 0, 10) == b"old"


def test_a_name_can_be_replaced(disk: Disk) -> None:
    put(disk, "blobs/x", b"content")
    put(disk, "slots/b/model", b"before")
    disk.replace("blobs/x", "slots/b/model")
    assert disk.length("blobs/x") is None
    assert disk.read("slots/b/model", 0, 100) == b"content"


def test_a_linked_file_outlives_its_first_name(disk: Disk) -> None:
    put(disk, "slots/a/model", b"content")
    disk.link("slots/a/model", "slots/b/model")
    disk.remove("slots/a/model")
    assert disk.read("slots/b/model", 0, 100) == b"content"


def test_removing_what_is_not_there_is_no_error(disk: Disk) -> None:
    disk.remove("nothing")
    assert disk.length("nothing") is None


def test_names_are_listed_sorted_from_the_state_folder(disk: Disk) -> None:
    for name in ("slots/b/z", "slots/b/a", "slots/a/m", "other"):
        put(disk, name, b"x")
    assert disk.names("slots") == ["slots/a/m", "slots/b/a", "slots/b/z"]
    assert disk.names("slots/b") == ["slots/b/a", "slots/b/z"]
    assert disk.names("nowhere") == []


def test_a_file_is_cut_and_made_longer_with_zeros(disk: Disk) -> None:
    put(disk, "file", b"hello world")
    disk.resize("file", 5)
    assert disk.read("file", 0, 100) == b"hello"
    disk.resize("file", 8)
    assert disk.read("file", 0, 100) == b"hello\0\0\0"
    disk.resize("file", 8)
    assert disk.length("file") == 8


def test_a_file_that_cannot_be_made_longer_stays_as_it_is(disk: Disk) -> None:
    put(disk, "file", b"hello")
    with pytest.raises(StorageFullError):
        disk.resize("file", disk.free_bytes() + (1 << 40))
    assert disk.read("file", 0, 100) == b"hello"


def test_writing_behind_the_end_makes_a_file_longer(disk: Disk) -> None:
    put(disk, "file", b"hello")
    disk.write("file", 5, b" world")
    disk.sync("file")
    assert disk.read("file", 0, 100) == b"hello world"


@pytest.mark.parametrize("operation", ["read", "write", "resize", "sync", "replace", "link"])
def test_a_file_that_is_not_there_is_a_coded_error(disk: Disk, operation: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: disk.read("none", 0, 1),
        "write": lambda: disk.write("none", 0, b"x"),
        "resize": lambda: disk.resize("none", 1),
        "sync": lambda: disk.sync("none"),
        "replace": lambda: disk.replace("none", "other"),
        "link": lambda: disk.link("none", "other"),
    }
    with pytest.raises(StorageError, match=r"none|other"):
        calls[operation]()
    assert disk.length("other") is None


def test_space_that_is_not_there_is_refused_and_nothing_is_left(disk: Disk) -> None:
    with pytest.raises(StorageFullError):
        disk.create("large", disk.free_bytes() + (1 << 40))
    assert disk.length("large") is None
    assert disk.names(".") == [] or "large" not in disk.names(".")


def test_random_writes_give_what_a_plain_buffer_gives(disk: Disk) -> None:
    rng = random.Random(4)
    buffer = bytearray(50_000)
    disk.create("file", len(buffer))
    for _ in range(200):
        data = rng.randbytes(rng.randrange(1, 5_000))
        offset = rng.randrange(len(buffer) - len(data))
        disk.write("file", offset, data)
        buffer[offset : offset + len(data)] = data
    disk.sync("file")
    disk.forget_cached("file")
    assert disk.read("file", 0, len(buffer)) == buffer


def test_a_real_folder_forgets_what_an_interrupted_write_left_behind(tmp_path: Path) -> None:
    real(tmp_path)
    leftover = tmp_path / "state" / "record.0.tmp~"
    leftover.write_bytes(b"half")
    disk = real(tmp_path)
    assert not leftover.exists()
    assert disk.names(".") == []


def test_two_agents_cannot_run_on_one_folder(tmp_path: Path) -> None:
    first, second = RealDisk(tmp_path), RealDisk(tmp_path)
    with first.locked(), pytest.raises(StorageError, match="another agent"), second.locked():
        pass
    with second.locked():
        pass


def test_a_link_to_the_current_slot_is_moved_in_one_step(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    put(disk, "slots/a/model", b"1")
    put(disk, "slots/b/model", b"2")
    disk.point("current", "slots/a")
    disk.point("current", "slots/b")
    assert (tmp_path / "current" / "model").read_bytes() == b"2"


def test_what_was_written_before_a_resize_outlives_a_crash() -> None:
    disk = SimulatedDisk()
    put(disk, "file", b"a" * 2048)
    disk.write("file", 0, b"b" * 2048)
    disk.resize("file", 1024)
    disk.crash(random.Random(1))
    assert disk.read("file", 0, 4096) == b"b" * 1024


def test_a_crash_of_the_simulated_disk_takes_back_only_what_was_not_synced() -> None:
    rng = random.Random(2)
    outcomes = set()
    for _ in range(60):
        disk = SimulatedDisk()
        put(disk, "file", b"a" * 2048)
        disk.write("file", 0, b"b" * 2048)
        disk.crash(rng)
        content = disk.read("file", 0, 2048)
        outcomes.add(content.count(b"b"))
        assert content == b"b" * content.count(b"b") + b"a" * content.count(b"a")
    assert {0, 2048} < outcomes


def test_a_rename_over_a_second_name_of_the_same_file_does_nothing(disk: Disk) -> None:
    put(disk, "a/model", b"one")
    disk.link("a/model", "b/model")
    disk.replace("a/model", "b/model")
    assert disk.names("a") == ["a/model"]
    disk.remove("b/model")
    disk.replace("a/model", "b/model")
    assert (disk.names("a"), disk.names("b")) == ([], ["b/model"])


def test_a_name_that_was_removed_may_come_back_until_another_one_beside_it_is_durable() -> None:
    seen = set()
    for seed in range(20):
        disk = SimulatedDisk()
        put(disk, "a/old", b"old")
        put(disk, "b/old", b"old")
        disk.remove("a/old")
        disk.remove("b/old")
        put(disk, "b/new", b"new")
        disk.crash(random.Random(seed))
        assert disk.names("b") == ["b/new"]
        seen.add(disk.length("a/old"))
    assert seen == {None, 3}
