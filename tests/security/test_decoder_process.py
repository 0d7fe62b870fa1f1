"""Deltas decoded in a child process: the same results as in the agent's own, and nothing gained by whoever takes the decoder over (ADR 26)."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from device.adapters.decoder import ChildDecoder
from device.adapters.disk import RealDisk
from device.decoding import STEP_BYTES, DeltaJob, LocalDecoder, RewriteJob
from protocol.delta.format import Profile
from protocol.delta.inplace import read_header
from protocol.delta.undo_journal import journal_bytes
from protocol.delta.writer import make_delta
from protocol.errors import PatchError, PatchLimitError, StorageError, StorageFullError, WhimbrelError
from protocol.ids import digest_of
from protocol.tensors import BytesSource
from tests.server.brokers import wait_until

ROOT = Path(__file__).parents[2]
HOSTILE = Path(__file__).parent / "hostile_decoder"
MEMORY_BYTES = 64 << 20
OLD = np.random.default_rng(1).integers(0, 256, 3 * STEP_BYTES + 1000, np.uint8).tobytes()
NEW = OLD[:5000] + b"new" * 100 + OLD[5000:-3000] + bytes(2000)


@pytest.fixture(scope="module")
def patches() -> dict[bool, bytes]:
    """The delta from the old file to the new, for application beside it and in place."""
    return {in_place: _delta(in_place=in_place) for in_place in (False, True)}


def _delta(*, in_place: bool) -> bytes:
    sink = BytesIO()
    make_delta(BytesSource(OLD), BytesSource(NEW), sink, profile=Profile.FAST, in_place=in_place)
    return sink.getvalue()


@pytest.fixture
def disk(tmp_path: Path, patches: dict[bool, bytes]) -> RealDisk:
    disk = RealDisk(tmp_path / "state")
    disk.prepare()
    for name, data in (("old", OLD), ("patch", patches[False]), ("patch.in-place", patches[True])):
        _write(disk, name, data)
    disk.create("result", len(NEW))
    return disk


@pytest.fixture
def decoder() -> Iterator[ChildDecoder]:
    decoder = ChildDecoder()
    yield decoder
    decoder.stop()
    assert children() == []


def _write(disk: RealDisk, name: str, data: bytes) -> None:
    disk.create(name, len(data))
    disk.write(name, 0, data)
    disk.sync(name)


def children() -> list[psutil.Process]:
    """Processes below this one that decode, and have not ended."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("decoder_child" in word for word in child.cmdline()):
                found.append(child)
    return found


def _job(**changes: Any) -> DeltaJob:
    fields: dict[str, Any] = {
        "base": "old",
        "patch": "patch",
        "result": "result",
        "base_sha256": digest_of(OLD),
        "sha256": digest_of(NEW),
        "length": len(NEW),
        "memory_bytes_max": MEMORY_BYTES,
    }
    return DeltaJob(**{**fields, **changes})


def test_a_result_comes_about_step_by_step_in_one_process(disk: RealDisk, decoder: ChildDecoder) -> None:
    decoded, pids = decoder.decode(disk, _job(), b""), set()
    while not decoded.is_finished:
        pids.add(children()[0].pid)
        decoded = decoder.decode(disk, _job(), decoded.state)
    assert len(pids) == 1
    assert children() == []
    assert disk.read("result", 0, len(NEW) + 1) == NEW


def test_a_process_that_was_killed_between_two_steps_costs_nothing(
    disk: RealDisk, decoder: ChildDecoder
) -> None:
    decoded = decoder.decode(disk, _job(), b"")
    children()[0].kill()
    with pytest.raises(StorageError, match="was killed"):
        decoder.decode(disk, _job(), decoded.state)
    while not (decoded := decoder.decode(disk, _job(), decoded.state)).is_finished:
        pass
    assert disk.read("result", 0, len(NEW)) == NEW


def test_a_process_that_nobody_asks_anything_leaves_and_is_replaced(disk: RealDisk) -> None:
    decoder = ChildDecoder(idle_s_max=2.0)
    try:
        decoded = decoder.decode(disk, _job(), b"")
        assert wait_until(lambda: children() == [], 30)
        assert not decoder.decode(disk, _job(), decoded.state).is_finished
    finally:
        decoder.stop()


def test_a_file_is_rewritten_in_place_and_back_as_in_the_process_of_the_agent(
    disk: RealDisk, decoder: ChildDecoder, patches: dict[bool, bytes]
) -> None:
    header = read_header(BytesSource(patches[True]))
    for name in ("child", "local"):
        _write(disk, name, OLD)
        disk.create(f"{name}.journal", journal_bytes(header))
        disk.create(f"{name}.inverse", 32 << 20)

    def job(name: str, *, is_back: bool) -> RewriteJob:
        return RewriteJob(
            target=name,
            patch="" if is_back else "patch.in-place",
            header=header.pack(),
            journal=f"{name}.journal",
            inverse=f"{name}.inverse",
            is_back=is_back,
            memory_bytes_max=MEMORY_BYTES,
            inverse_bytes_max=32 << 20,
        )

    for is_back, wanted in ((False, NEW), (True, OLD)):
        steps = dict.fromkeys(("child", "local"), 1)
        for name, used in (("child", decoder), ("local", LocalDecoder())):
            while not used.rewrite(disk, job(name, is_back=is_back)):
                steps[name] += 1
            assert disk.read(name, 0, len(wanted) + 1) == wanted
        assert steps["child"] == steps["local"]
    assert decoder.rewrite(disk, job("child", is_back=True)), "it is done already"


def test_what_is_wrong_with_a_delta_is_said_as_ever(disk: RealDisk, decoder: ChildDecoder) -> None:
    _write(disk, "patch", b"no delta at all" * 10)
    with pytest.raises(PatchError, match="not a delta file") as refused:
        decoder.decode(disk, _job(), b"")
    assert refused.value.hint
    with pytest.raises(PatchError, match="the stored state"):
        decoder.decode(disk, _job(), b"x" * 200)
    with pytest.raises(StorageError, match="missing"):
        decoder.decode(disk, _job(patch="missing"), b"")


def test_memory_is_refused_as_ever(disk: RealDisk, decoder: ChildDecoder) -> None:
    with pytest.raises(PatchLimitError, match="bytes of memory"):
        decoder.decode(disk, _job(memory_bytes_max=1), b"")


def test_an_agent_that_was_stopped_decodes_no_more(disk: RealDisk) -> None:
    decoder = ChildDecoder()
    decoder.decode(disk, _job(), b"")
    decoder.stop()
    assert children() == []
    with pytest.raises(StorageError, match="was stopped"):
        decoder.decode(disk, _job(), b"")


def test_an_interpreter_that_is_not_there_says_nothing_about_the_delta(
    disk: RealDisk, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    for python in (str(tmp_path / "no-python"), str(other), "/bin/true", "/bin/yes"):
        decoder = ChildDecoder(python=python)
        with pytest.raises(StorageError, match="could be started") as refused:
            decoder.decode(disk, _job(), b"")
        assert refused.value.is_retryable
        decoder.stop()


ATTACKS = {
    "_connect": "refused: [Errno 1] Operation not permitted",
    "_read_key": "refused: [Errno 13] Permission denied",
    "_write_base": "old: Permission denied",
    "_write_record": "journal: Permission denied",
    "_rename_result": "old: Permission denied",
    "_grow_result": "result: File too large",
    "_take_memory": "refused: memory",
    "_fork": "refused: [Errno 1] Operation not permitted",
    "_crash": "ended the process that decoded it by signal 11",
    "_be_killed": "was killed",
    "_raise_bug": "ended the process that decoded it with status 1: AssertionError: a bug of ours",
    "_leave": "ends at once",
    "_say_nonsense": "said what is no answer",
    "_say_too_much": "said more than is accepted",
    "_say_another_thing": "gave a wrong answer",
    "_say_two_things": "said more than it was asked",
    "_say_what_is_not_its_own": "a ba ba b",
}
ENVIRONMENT = {"_write_base", "_write_record", "_rename_result", "_grow_result", "_be_killed", "_leave"}


@pytest.fixture
def attacked(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RealDisk, ChildDecoder]]:
    """A device with a secret, a durable record and an open port, and a decoder that does what it wants."""
    key = tmp_path / "device.key"
    key.write_bytes(b"secret")
    _write(disk, "journal", b"the record")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PYTHONPATH", f"{HOSTILE}{os.pathsep}{ROOT}")
        monkeypatch.setenv("ATTACK_KEY", str(key))
        monkeypatch.setenv("ATTACK_PORT", str(server.getsockname()[1]))
        decoder = ChildDecoder()
        yield disk, decoder
        decoder.stop()
    assert children() == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_decoder_that_was_taken_over_gains_nothing(
    attacked: tuple[RealDisk, ChildDecoder], attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACK", attack)
    disk, decoder = attacked
    with pytest.raises(WhimbrelError) as refused:
        decoder.decode(disk, _job(), b"")
    assert ATTACKS[attack] in refused.value.message
    assert isinstance(refused.value, StorageError if attack in ENVIRONMENT else PatchError)
    assert "\n" not in str(refused.value)
    assert len(refused.value.message) <= 400
    assert children() == []
    assert disk.read("old", 0, len(OLD) + 1) == OLD
    assert disk.read("journal", 0, 100) == b"the record"
    assert disk.length("result") == len(NEW)


def test_a_file_cannot_grow_beyond_what_is_signed(
    attacked: tuple[RealDisk, ChildDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACK", "_grow_result")
    disk, decoder = attacked
    with pytest.raises(StorageFullError):
        decoder.decode(disk, _job(), b"")


AGENT = """
import sys, time
from pathlib import Path
import msgspec
from device.adapters.decoder import ChildDecoder
from device.adapters.disk import RealDisk
from device.decoding import DeltaJob
ChildDecoder().decode(RealDisk(Path(sys.argv[1])), msgspec.json.decode(sys.argv[2], type=DeltaJob), b"")
time.sleep(600)
"""


@pytest.mark.parametrize("attack", ["", "_go_on_for_ever"], ids=["between two steps", "within a step"])
def test_a_decoder_dies_with_the_agent(disk: RealDisk, attack: str) -> None:
    order = msgspec.json.encode(_job()).decode()
    paths = [str(HOSTILE), str(ROOT)] if attack else [str(ROOT)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), ATTACK=attack)
    with subprocess.Popen([sys.executable, "-c", AGENT, str(disk.folder), order], env=environment) as agent:
        assert wait_until(lambda: any(_is_confined(child) for child in children()), 60)
        (child,) = children()
        agent.kill()
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert (len(gone), alive) == (1, [])


def _is_confined(process: psutil.Process) -> bool:
    return b"Seccomp:\t2" in Path(f"/proc/{process.pid}/status").read_bytes()
