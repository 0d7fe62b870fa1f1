"""A decoder that a delta has taken over: what it tries, `ATTACK` says. The child of `ChildDecoder` finds it through PYTHONPATH."""

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

from device.adapters import decoder
from device.decoding import Decoded, DeltaJob, LocalDecoder
from device.ports import Disk
from protocol.errors import PatchError


def _connect() -> None:
    socket.create_connection(("127.0.0.1", int(os.environ["ATTACK_PORT"])), timeout=5).close()


def _read_key() -> None:
    Path(os.environ["ATTACK_KEY"]).read_bytes()


def _write_base(disk: Disk, job: DeltaJob) -> None:
    disk.write(job.base, 0, b"mine")


def _write_record(disk: Disk, _job: DeltaJob) -> None:
    disk.write("journal", 0, b"mine")


def _rename_result(disk: Disk, job: DeltaJob) -> None:
    disk.replace(job.result, job.base)


def _grow_result(disk: Disk, job: DeltaJob) -> None:
    disk.write(job.result, job.length, b"more")


def _take_memory() -> None:
    try:
        bytearray(2 << 30)
    except MemoryError:
        raise PatchError("refused: memory") from None


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _crash() -> None:
    ctypes.string_at(0)


def _be_killed() -> None:
    signal.raise_signal(signal.SIGKILL)  # as the kernel does it when memory is gone


def _raise_bug() -> None:
    raise AssertionError("a bug of ours")


def _go_on_for_ever() -> None:
    time.sleep(600)


def _leave() -> None:
    os._exit(0)


def _say_nonsense() -> None:
    os.write(_out(), decoder.LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1")


def _say_too_much() -> None:
    os.write(_out(), decoder.LENGTH.pack(1 << 31))


def _say_another_thing() -> None:
    os.write(_out(), decoder.framed(decoder.Rewritten(is_done=True)))


def _say_two_things() -> None:
    os.write(_out(), decoder.framed(Decoded(is_finished=True)) * 2)


def _say_what_is_not_its_own() -> None:
    os.write(_out(), decoder.framed(decoder.Failed(code="trust.unverified", message="a\nb" * 500, hint="")))


def _close_output() -> None:
    os.close(_out())
    time.sleep(600)


def _out() -> int:
    """Where messages go: `take_stdout` has put another descriptor behind number 1."""
    for number in range(3, 20):
        try:
            if str(Path(f"/proc/self/fd/{number}").readlink()).startswith("pipe:"):
                return number
        except OSError:
            continue
    raise AssertionError("there is no pipe")


def _attack(_self: LocalDecoder, disk: Disk, job: DeltaJob, _state: bytes) -> Decoded:
    attack = globals()[os.environ["ATTACK"]]
    try:
        if attack.__code__.co_argcount:
            attack(disk, job)
        else:
            attack()
    except OSError as error:
        raise PatchError(f"refused: {error}") from error
    sys.stdout.flush()
    time.sleep(600 if os.environ["ATTACK"].startswith("_say") else 0)
    return Decoded(is_finished=True)


LocalDecoder.decode = _attack  # type: ignore[assignment, method-assign]  # this is the attack
