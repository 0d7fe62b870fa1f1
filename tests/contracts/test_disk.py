"""One suite for the real disk and the simulated ones.

The simulated disks are `simulator.disk.SimulatedDisk`, whose operations happen as a whole or not at all, and `tests.crash_points.disk.CrashDisk`,
which is taken apart into the system calls of the real one. They cannot agree in these:

- nobody can cut the power of a real disk in a test, so what a crash leaves is tested of the simulated ones only. In its place
  `test_the_model_of_the_real_disk_makes_its_system_calls` compares the calls: the model is that of the real disk as long as they are the same;
- `forget_cached` syncs a real file, since only clean pages are dropped. The port does not promise that, and the simulated disks do not do it;
- `free_bytes` of a real disk counts everything on its file system, and changes by itself;
- locks, temporary files of an earlier process and symbolic links that an intruder made are there on a real disk only.
"""

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from device.adapters.disk import RealDisk
from device.ports import Disk
from protocol.errors import StorageError, StorageFullError, StorageReadOnlyError
from simulator.disk import SimulatedDisk
from tests.crash_points.disk import Choices, CrashDisk

SIMULATED = pytest.mark.parametrize("kind", [SimulatedDisk, CrashDisk])


def real(folder: Path) -> Disk:
    disk = RealDisk(folder / "state")
    disk.prepare()
    return disk


@pytest.fixture(
    params=[real, lambda _: SimulatedDisk(), lambda _: CrashDisk()], ids=["real", "simulated", "by calls"]
)
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


@SIMULATED
def test_what_was_written_before_a_resize_outlives_a_crash(kind: type[SimulatedDisk]) -> None:
    disk = kind()
    put(disk, "file", b"a" * 2048)
    disk.write("file", 0, b"b" * 2048)
    disk.resize("file", 1024)
    disk.crash(random.Random(1))
    assert disk.read("file", 0, 4096) == b"b" * 1024


@SIMULATED
def test_a_crash_takes_back_only_what_was_not_synced(kind: type[SimulatedDisk]) -> None:
    rng = random.Random(2)
    outcomes = set()
    for _ in range(60):
        disk = kind()
        put(disk, "file", b"a" * 2048)
        disk.write("file", 0, b"b" * 2048)
        disk.crash(rng)
        content = disk.read("file", 0, 2048)
        outcomes.add(content.count(b"b"))
        sectors = [content[at : at + 512] for at in range(0, 2048, 512)]
        assert set(sectors) <= {b"a" * 512, b"b" * 512}
        if kind is SimulatedDisk:  # tears a write once, in order
            assert sectors == sorted(sectors, reverse=True)
    assert {0, 2048} < outcomes


def test_a_rename_over_a_second_name_of_the_same_file_does_nothing(disk: Disk) -> None:
    put(disk, "a/model", b"one")
    disk.link("a/model", "b/model")
    disk.replace("a/model", "b/model")
    assert disk.names("a") == ["a/model"]
    disk.remove("b/model")
    disk.replace("a/model", "b/model")
    assert (disk.names("a"), disk.names("b")) == ([], ["b/model"])


@SIMULATED
def test_a_name_that_was_removed_may_come_back_until_another_one_beside_it_is_durable(
    kind: type[SimulatedDisk],
) -> None:
    seen = set()
    for seed in range(20):
        disk = kind()
        put(disk, "a/old", b"old")
        put(disk, "b/old", b"old")
        disk.remove("a/old")
        disk.remove("b/old")
        put(disk, "b/new", b"new")
        disk.crash(random.Random(seed))
        assert disk.names("b") == ["b/new"]
        seen.add(disk.length("a/old"))
    assert seen == {None, 3}


@pytest.mark.parametrize("operation", ["create", "write", "sync", "resize", "replace", "link", "point"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EROFS, StorageReadOnlyError),
        (errno.EIO, StorageError),
    ],
)
def test_an_error_of_the_system_is_a_coded_error_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int, kind: type[StorageError]
) -> None:
    """What the simulated disks raise under a fault is what the real one makes of the system's errors."""
    disk = RealDisk(tmp_path)
    put(disk, "a/file", b"content")
    before = sorted(tmp_path.rglob("*"))
    calls = {
        "create": lambda: disk.create("a/new", 10),
        "write": lambda: disk.write("a/file", 0, b"x"),
        "sync": lambda: disk.sync("a/file"),
        "resize": lambda: disk.resize("a/file", 100),
        "replace": lambda: disk.replace("a/file", "a/other"),
        "link": lambda: disk.link("a/file", "a/other"),
        "point": lambda: disk.point("current", "a"),
    }

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    broken = {
        "write": "pwrite",
        "sync": "fdatasync",
        "replace": "replace",
        "link": "link",
        "point": "symlink",
    }
    with monkeypatch.context() as patched:
        patched.setattr(os, broken.get(operation, "posix_fallocate"), fail)
        with pytest.raises(StorageError) as caught:
            calls[operation]()
    assert type(caught.value) is kind
    assert sorted(tmp_path.rglob("*")) == before
    assert disk.read("a/file", 0, 100) == b"content"


# --- the model of the real disk, call by call ---------------------------------------------------------------------


@contextmanager
def calls_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """System calls that succeed and change a file system, in their order, with names relative to a folder."""
    calls: list[str] = []

    def relative(path: object) -> str:
        return str(Path(os.fsdecode(path)).relative_to(folder))  # type: ignore[arg-type]  # a path in one form or the other

    def opened(descriptor: int) -> str:
        return relative(Path(f"/proc/self/fd/{descriptor}").readlink())

    def synced(descriptor: int, *_: Any) -> str:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return f"sync folder {opened(descriptor)}" if is_folder else f"sync {opened(descriptor)}"

    told: dict[str, Callable[..., str]] = {
        "open": lambda path, flags, *_: f"create {relative(path)}" if flags & os.O_CREAT else "",
        "posix_fallocate": lambda descriptor, *_: f"allocate {opened(descriptor)}",
        "ftruncate": lambda descriptor, *_: f"truncate {opened(descriptor)}",
        "pwrite": lambda descriptor, *_: f"write {opened(descriptor)}",
        "fsync": synced,
        "fdatasync": synced,
        "replace": lambda _, target, *_more: f"rename {relative(target)}",
        "link": lambda _, target, *_more: f"link {relative(target)}",
        "symlink": lambda _, target, *_more: f"symlink {relative(target)}",
        "unlink": lambda path, *_: f"unlink {relative(path)}",
        "mkdir": lambda path, *_: f"mkdir {relative(path)}",
    }

    def recording(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        @wraps(call)
        def record(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if said := told[name](*arguments):
                calls.append(said)
            return result

        return record

    with monkeypatch.context() as patched:
        for name in told:
            patched.setattr(os, name, recording(name))
        yield calls


def everything(disk: Disk) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each operation that changes something, in each of its ways."""
    yield "create", lambda: disk.create("a/one", 1000)
    yield "create empty", lambda: disk.create("a/empty", 0)
    yield "create again", lambda: disk.create("a/one", 2000)
    yield "write", lambda: disk.write("a/one", 0, b"x" * 700)
    yield "write behind the end", lambda: disk.write("a/one", 2000, b"x")
    yield "sync", lambda: disk.sync("a/one")
    yield "resize to more", lambda: disk.resize("a/one", 5000)
    yield "resize to less", lambda: disk.resize("a/one", 500)
    yield "resize to the same", lambda: disk.resize("a/one", 500)
    yield "replace beside", lambda: disk.replace("a/one", "a/two")
    yield "replace elsewhere", lambda: disk.replace("a/two", "b/two")
    yield "link", lambda: disk.link("b/two", "a/three")
    yield "link again", lambda: disk.link("b/two", "a/three")
    yield "point", lambda: disk.point("current", "a")
    yield "point elsewhere", lambda: disk.point("current", "b")
    yield "create at the top", lambda: disk.create("top", 10)
    yield "remove", lambda: disk.remove("a/three")
    yield "remove nothing", lambda: disk.remove("a/three")


def test_the_model_of_the_real_disk_makes_its_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, model = RealDisk(tmp_path), CrashDisk()
    expected: list[str] = []
    model.on_call = expected.append
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for (what, do), (_, do_likewise) in zip(everything(disk), everything(model), strict=True):
        expected.clear()
        do_likewise()
        with calls_of(tmp_path, monkeypatch) as calls:
            do()
        assert calls == expected, what


def test_a_folder_is_durable_before_anything_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model does without folders: what it leaves out changes nothing."""
    disk = RealDisk(tmp_path)
    with calls_of(tmp_path, monkeypatch) as calls:
        disk.create("slots/a/model", 10)
    assert calls[:4] == ["mkdir slots", "sync folder .", "mkdir slots/a", "sync folder slots"]


def test_the_real_disk_syncs_what_it_is_to_forget_and_the_model_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, model = RealDisk(tmp_path), CrashDisk()
    told: list[str] = []
    for each in (disk, model):
        put(each, "file", b"content")
    model.on_call = told.append
    model.forget_cached("file")
    with calls_of(tmp_path, monkeypatch) as calls:
        disk.forget_cached("file")
    assert (calls, told) == (["sync file"], [])


@SIMULATED
def test_a_disk_that_was_remounted_read_only_refuses_every_change(kind: type[SimulatedDisk]) -> None:
    disk = kind()
    put(disk, "a/file", b"content")
    disk.is_read_only = True
    for what, do in everything(disk):
        with pytest.raises(StorageReadOnlyError):
            do()
        assert disk.names("a") == ["a/file"], what


def test_every_subset_of_pending_changes_can_be_what_a_crash_leaves() -> None:
    disk = CrashDisk()
    for name in ("a/one", "a/two", "b/three"):
        put(disk, name, b"content")
        disk.remove(name)
    choices = Choices(disk.moment(), 1)
    assert choices.is_exhaustive
    left = {frozenset(choices.image(number)) for number in range(choices.count)}
    assert len(left) == 4, "the removal of one was made durable with the name of two"
    assert max(left, key=len) == {"a/two", "b/three"}


def test_a_rename_to_another_folder_never_loses_both_names() -> None:
    disk = CrashDisk()
    put(disk, "a/file", b"content")
    seen: set[frozenset[str]] = set()

    def look(_call: str) -> None:
        choices = Choices(disk.moment(), 1)
        seen.update(frozenset(choices.image(number)) for number in range(choices.count))

    disk.on_call = look
    disk.replace("a/file", "b/file")
    assert seen == {frozenset({"a/file"}), frozenset({"b/file"}), frozenset({"a/file", "b/file"})}


def test_sectors_of_a_write_are_kept_or_lost_one_by_one() -> None:
    disk = CrashDisk()
    put(disk, "file", b"a" * 2048)
    disk.write("file", 256, b"b" * 1024)  # a part of the first sector, the second, and a part of the third
    choices = Choices(disk.moment(), 1)
    seen = set()
    for number in range(choices.count):
        left = CrashDisk(choices.image(number)).read("file", 0, 2048)
        seen.add((left[256:512], left[512:1024], left[1024:1280]))
        assert left[:256] + left[1280:] == b"a" * 1024
    assert len(seen) == choices.count == 8
