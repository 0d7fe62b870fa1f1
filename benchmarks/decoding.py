"""What it costs to decode deltas in a child process, as devices do, and not in the agent's own: `python -m benchmarks.decoding OLD NEW`.

The installer's steps into a second slot, over the real disk port with every sync. Each round in a process of its own that stands for
the agent, the two ways in turn, so that they meet the same machine. Shown are medians of wall and CPU time (with the child's), the
agent's resident memory at the end, when it is at rest again, and the peaks of both processes.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.two_files import arguments, profiles
from device.adapters.decoder import ChildDecoder
from device.adapters.disk import RealDisk
from device.decoding import IN_PROCESS
from device.install import install_step
from device.journal import InstallItem
from device.slots import SlotName
from protocol.delta.format import Profile
from protocol.release import ChunkTree

MEMORY_BYTES = 128 << 20


def main() -> int:
    args = arguments(__doc__.splitlines()[0], rounds=5)
    print(
        f"{'profile':<8}{'decoded in':<12}{'wall s':>8}{'ratio':>7}{'CPU s':>8}{'MB/s':>7}"
        f"{'agent after MB':>16}{'agent peak MB':>15}{'child peak MB':>15}"
    )
    for profile, folder in profiles(args):
        measure(args, profile, folder)
    return 0


def measure(args: argparse.Namespace, profile: Profile, folder: Path) -> None:
    # Not at the top: the processes that stand for agents import this module, and shall not have what they measure.
    from benchmarks.inplace import MODEL, prepare  # noqa: PLC0415
    from protocol.delta.inspection import inspect_delta  # noqa: PLC0415
    from protocol.delta.writer import make_delta  # noqa: PLC0415
    from server.adapters.blobs import FileSource  # noqa: PLC0415

    patch, state = folder / "patch", folder / "state"
    with args.old.open("rb") as old, args.new.open("rb") as new, patch.open("wb") as out:
        make_delta(FileSource(old), FileSource(new), out, profile=profile)
    with patch.open("rb") as file:
        header = inspect_delta(FileSource(file)).header
    item = InstallItem(
        name="model",
        sha256=header.result_sha256.hex(),
        length=header.result_length,
        action="delta",
        base_name=Path(MODEL).name,
        base_sha256=header.base_sha256.hex(),
        blob="d" * 64,
        blob_length=patch.stat().st_size,
        tree=ChunkTree(root="0" * 64, levels=1),
    )
    runs: dict[str, list[dict[str, float]]] = {"the agent": [], "a child": []}
    for _ in range(args.rounds):
        for name, found in runs.items():
            prepare(state, args.old, patch)
            found.append(in_process(state, item, is_beside=name == "a child"))
    before_s = statistics.median(run["work_s"] for run in runs["the agent"])
    for name, found in runs.items():
        row = {key: statistics.median(run[key] for run in found) for key in found[0]}
        print(
            f"{profile.name.lower():<8}{name:<12}{row['work_s']:>8.2f}{row['work_s'] / before_s:>7.2f}{row['cpu_s']:>8.2f}"
            f"{header.result_length / row['work_s'] / 1e6:>7.1f}{row['rest_bytes'] / 1e6:>16.1f}{row['peak_bytes'] / 1e6:>15.1f}"
            f"{row['child_peak_bytes'] / 1e6:>15.1f}"
        )
        if args.json:
            print(json.dumps({"profile": profile.name.lower(), "decoded_in": name, **row}))


def in_process(state: Path, item: InstallItem, *, is_beside: bool) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=agent, args=(theirs, state, item, is_beside))
    process.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def agent(pipe: Connection, state: Path, item: InstallItem, is_beside: bool) -> None:  # noqa: FBT001
    disk, decoder = RealDisk(state), ChildDecoder() if is_beside else IN_PROCESS
    began = time.perf_counter()
    while not install_step(disk, SlotName.A, SlotName.B, (item,), MEMORY_BYTES, decoder):
        pass
    work_s = time.perf_counter() - began
    own, child = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    pipe.send(
        {
            "work_s": work_s,
            "cpu_s": own.ru_utime + own.ru_stime + child.ru_utime + child.ru_stime,
            "rest_bytes": 1024 * int(status["VmRSS"].split()[0]),
            "peak_bytes": 1024 * int(status["VmHWM"].split()[0]),
            "child_peak_bytes": 1024 * child.ru_maxrss,
        }
    )


if __name__ == "__main__":
    raise SystemExit(main())
