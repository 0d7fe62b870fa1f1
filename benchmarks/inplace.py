"""Applying in place with an inverse, against an ordinary apply of the same delta: `python -m benchmarks.inplace OLD NEW`.

Both as a device does it, over the real disk port with every sync: the ordinary one with the installer's steps into a second slot, the other
with `InPlace`; and then the way back. Each in a process of its own, in turn, so that they meet the same machine. Shown are the
median of the rounds' wall and CPU times, and the largest peak of resident memory.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.two_files import arguments, profiles
from device.adapters.disk import RealDisk
from device.blobs import blob_file
from device.decoding import DiskFile
from device.install import install_step
from device.journal import InstallItem
from device.slots import SlotName, slot_file
from protocol.delta.format import Profile
from protocol.delta.inplace import Files, InPlace, read_header
from protocol.delta.undo_journal import Phase, journal_bytes
from protocol.delta.writer import make_delta
from protocol.ids import Digest
from protocol.release import ChunkTree
from server.adapters.blobs import FileSource

MODEL = slot_file(SlotName.A, "model")
MEMORY_BYTES = 128 << 20
KEYS = ("wall_s", "cpu_s", "peak_bytes")


def main() -> int:
    args = arguments(__doc__.splitlines()[0], rounds=3)
    print(
        f"{'profile':<8}{'what':<10}{'wall s':>8}{'ratio':>7}{'CPU s':>8}{'ratio':>7}{'peak MB':>9}{'inverse MB':>12}"
    )
    for profile, folder in profiles(args):
        measure_profile(args, profile, folder)
    return 0


def measure_profile(args: argparse.Namespace, profile: Profile, folder: Path) -> None:
    patch = folder / "patch"
    with args.old.open("rb") as old, args.new.open("rb") as new, patch.open("wb") as out:
        make_delta(FileSource(old), FileSource(new), out, profile=profile, in_place=True)
    state = folder / "state"
    runs: dict[str, list[dict[str, float]]] = {"ordinary": [], "in place": [], "back": []}
    for _ in range(args.rounds):
        for name, work in (("ordinary", ordinary), ("in place", in_place), ("back", back)):
            if work is not back:
                prepare(state, args.old, patch)
            runs[name].append(in_child(work, state))
    base = {key: statistics.median(run[key] for run in runs["ordinary"]) for key in KEYS}
    for name, found in runs.items():
        row = {key: statistics.median(run[key] for run in found) for key in KEYS[:2]}
        peak = max(run["peak_bytes"] for run in found)
        inverse = max(run.get("inverse_bytes", 0) for run in found)
        ratios = {key: row[key] / base[key] for key in KEYS[:2]}
        print(
            f"{profile.name.lower():<8}{name:<10}{row['wall_s']:>8.2f}{ratios['wall_s']:>7.2f}{row['cpu_s']:>8.2f}"
            f"{ratios['cpu_s']:>7.2f}{peak / 1e6:>9.1f}{inverse / 1e6:>12.2f}"
        )
        if args.json:
            fields = {"profile": profile.name.lower(), "what": name, **row, "peak_bytes": peak}
            print(json.dumps({**fields, "ratio": ratios["wall_s"], "inverse_bytes": inverse}))


def prepare(state: Path, old: Path, patch: Path) -> None:
    """Lay out a device with the old model that has fetched the delta."""
    shutil.rmtree(state, ignore_errors=True)
    disk = RealDisk(state)
    disk.prepare()
    for name, path in ((MODEL, old), (blob_file(Digest("d" * 64)), patch)):
        target = Path(disk.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        disk.sync(name)


def in_child(work: Callable[[RealDisk], dict[str, float]], state: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=child_main, args=(theirs, work, state))
    child.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    child.join()
    return found


def child_main(pipe: Connection, work: Callable[[RealDisk], dict[str, float]], state: Path) -> None:
    disk = RealDisk(state)
    wall, cpu = time.perf_counter(), time.process_time()
    found = work(disk)
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    # Not `ru_maxrss`: that begins with what the parent had when it started this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found["peak_bytes"] = 1024 * int(status["VmHWM"].split()[0])
    pipe.send(found)


def ordinary(disk: RealDisk) -> dict[str, float]:
    blob = blob_file(Digest("d" * 64))
    header = read_header(DiskFile(disk, blob))
    length = disk.length(blob) or 0
    item = InstallItem(
        name="model",
        sha256=header.result_sha256.hex(),
        length=header.result_length,
        action="delta",
        base_name="model",
        base_sha256=header.base_sha256.hex(),
        blob="d" * 64,
        blob_length=length,
        tree=ChunkTree(root="0" * 64, levels=1),
    )
    while not install_step(disk, SlotName.A, SlotName.B, (item,), MEMORY_BYTES):
        pass
    return {}


def opened(disk: RealDisk) -> InPlace:
    patch = DiskFile(disk, blob_file(Digest("d" * 64)))
    for name, length in (("inverse", 0), ("journal", journal_bytes(read_header(patch)))):
        if disk.length(name) is None:
            disk.create(name, length)
    files = Files(DiskFile(disk, MODEL), patch, DiskFile(disk, "journal"), DiskFile(disk, "inverse"))
    return InPlace(files, memory_limit_bytes=MEMORY_BYTES, inverse_bytes_max=1 << 62)


def in_place(disk: RealDisk) -> dict[str, float]:
    work = opened(disk)
    work.begin(work.header.base_sha256)
    while not work.step():
        pass
    return {"inverse_bytes": work.inverse_length}


def back(disk: RealDisk) -> dict[str, float]:
    work = opened(disk)
    assert work.phase is Phase.APPLIED
    work.undo()
    while not work.step():
        pass
    with Path(disk.path(MODEL)).open(
        "rb"
    ) as file:  # not timed against the ordinary way: it is as cheap there
        assert hashlib.file_digest(file, "sha256").digest() == work.header.base_sha256
    return {}


if __name__ == "__main__":
    raise SystemExit(main())
