"""What encrypted artifacts cost, beside the same ones as they are: `python -m benchmarks.encryption`.

The real code of a device and of a server, on one file of random bytes, both ways in turn in one run; medians of CPU time, since that is what is
taken from others. On a device: to check and store all chunks, and to find them again after a restart. On a server: to store the artifact
of a file that is there, against reading it through, which it does in any case. And to give and open one key.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from device.adapters.disk import RealDisk
from device.blobs import FOLDER, as_it_is, open_blob, write_chunk
from device.ports import Cipher
from protocol.chunks import BlobPlan, build_tree, chunk_count
from protocol.constants import CHUNK_BYTES
from protocol.encryption import ContentCipher, make_content_key, unwrap_key, wrap_key
from protocol.identity import make_key
from protocol.ids import DeviceId, FleetId, digest_of
from server.adapters.blobs import FolderBlobs

KEYS = 200


def main() -> int:
    """Measure, and print a table; `--json` for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where files are written (default: that for temporary files)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measured(Path(folder), arguments.megabytes << 20, arguments.rounds)
    if arguments.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    sys.stdout.write(f"{'':56}{'as it is':>12}{'encrypted':>12}{'ratio':>8}\n")
    for name, (plain, secret) in rows.items():
        before = (
            f"{plain:>12.1f}{secret:>12.1f}{plain / secret:>8.2f}" if plain else f"{'-':>12}{secret:>12.1f}"
        )
        sys.stdout.write(f"{name:56}{before}\n")
    return 0


def measured(folder: Path, length: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Figures by name, as it is and encrypted: MB a CPU second, and for keys microseconds each."""
    data = random.Random(1).randbytes(length)
    cipher = ContentCipher(make_content_key())
    disk = RealDisk(folder / "device")
    disk.prepare()
    blobs = FolderBlobs(folder / "blobs")
    stored = blobs.put(data)
    plans: list[tuple[Cipher, tuple[BlobPlan, list[bytes]]]] = [
        (as_it_is, _plan(data)),
        (cipher, _plan(cipher(0, data))),
    ]
    found: dict[str, list[list[float]]] = {}

    def note(name: str, way: int, work: Callable[[], object]) -> None:
        begun = time.process_time()
        work()
        found.setdefault(name, [[], []])[way].append(time.process_time() - begun)

    for _ in range(rounds):
        for way, (change, (plan, chunks)) in enumerate(plans):
            disk.create(f"{FOLDER}/{plan.name}", length)
            note("device: chunks checked and stored", way, lambda: _store(disk, plan, chunks, change))  # noqa: B023 - called now
            disk.sync(f"{FOLDER}/{plan.name}")
            note("device: chunks found after a restart", way, lambda: _find(disk, plan, change))  # noqa: B023 - likewise
            disk.remove(f"{FOLDER}/{plan.name}")
        note("server: artifact made", 0, lambda: blobs.describe(stored.digest))
        made = []
        note("server: artifact made", 1, lambda: made.append(blobs.put_changed(stored.digest, cipher)))  # noqa: B023 - likewise
        blobs.remove(made[0].digest)
    rows = {
        f"{name}, MB a CPU second": (
            length / 1e6 / statistics.median(plain),
            length / 1e6 / statistics.median(secret),
        )
        for name, (plain, secret) in found.items()
    }
    return rows | _keys()


def _plan(data: bytes) -> tuple[BlobPlan, list[bytes]]:
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    digests = [bytes.fromhex(digest_of(chunk)) for chunk in chunks]
    assert len(chunks) == chunk_count(len(data))
    assert build_tree(digests)[0].levels
    return BlobPlan(digest_of(data), len(data), b"".join(digests)), chunks


def _store(disk: RealDisk, plan: BlobPlan, chunks: list[bytes], cipher: Cipher) -> None:
    for index, chunk in enumerate(chunks):
        assert plan.accepts(index, chunk)
        write_chunk(disk, plan.name, index, chunk, cipher)


def _find(disk: RealDisk, plan: BlobPlan, cipher: Cipher) -> None:
    assert open_blob(disk, plan, cipher).is_complete


def _keys() -> dict[str, tuple[float, float]]:
    recipient, key, blob = make_key(), make_content_key(), digest_of(b"artifact")
    fleet, device = FleetId("bench"), DeviceId("device-1")
    begun = time.process_time()
    wrapped = [wrap_key(key, recipient.public_key(), fleet, device, blob) for _ in range(KEYS)]
    given = time.process_time()
    for each in wrapped:
        unwrap_key(each, recipient, fleet, device, blob)
    opened = time.process_time()
    return {
        "server: one key given, CPU microseconds": (0.0, (given - begun) / KEYS * 1e6),
        "device: one key opened, CPU microseconds": (0.0, (opened - given) / KEYS * 1e6),
    }


if __name__ == "__main__":
    sys.exit(main())
