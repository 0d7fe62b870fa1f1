"""The child process that decodes deltas: `python -m device.adapters.decoder_child`, framed messages in and out.

Started by `decoder.py` only. It imports what it needs, takes all rights but those to its files from itself, and only then looks at a delta.
"""

import os
import select
import sys
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
from msgspec import Struct

# The decoder is imported here, before the rights and the memory for it are limited.
import protocol.delta.inplace
import protocol.delta.reader  # noqa: F401
from device.adapters.confinement import confine, end_with, memory_of_data, take_stdout
from device.adapters.decoder import (
    LENGTH,
    MESSAGE_BYTES_MAX,
    Answer,
    Failed,
    Ready,
    Rewritten,
    Start,
    Step,
    framed,
)
from device.adapters.disk import RealDisk
from device.adapters.priority import give_way
from device.decoding import DeltaJob, LocalDecoder, RewriteJob
from protocol.delta.native import library
from protocol.errors import PatchLimitError, WhimbrelError

_BESIDE_BYTES = 64 << 20
"""Memory beside what a delta declares: the pieces of a step, and the interpreter's own."""

_Message = TypeVar("_Message", Start, Step)


def main() -> int:
    """Answer steps until there are no more for a while."""
    out = take_stdout()
    start = _read(sys.stdin.buffer, Start)
    if start is None:
        return 0
    end_with(start.parent)
    give_way(start.priority)
    library()
    disk, job = RealDisk(Path(start.folder)), start.job
    if isinstance(job, DeltaJob):
        readable, writable = [job.base, job.patch], [job.result]
    else:
        readable, writable = [job.patch] if job.patch else [], [job.target, job.journal, job.inverse]
    confinement = confine(
        [disk.path(name) for name in readable],
        writable=[disk.path(name) for name in writable],
        file_bytes_max=start.file_bytes_max,
        data_bytes_max=memory_of_data() + job.memory_bytes_max + _BESIDE_BYTES,
    )
    _speak(out, Ready(confinement=confinement))
    while select.select([sys.stdin.buffer], [], [], start.idle_s_max)[0]:
        step = _read(sys.stdin.buffer, Step)
        if step is None:
            break
        _speak(out, _answer(disk, job, step))
    return 0


def _answer(disk: RealDisk, job: DeltaJob | RewriteJob, step: Step) -> Answer:
    decoder = LocalDecoder()
    try:
        if isinstance(job, DeltaJob):
            return decoder.decode(disk, job, step.state)
        return Rewritten(is_done=decoder.rewrite(disk, job))
    except WhimbrelError as error:
        return Failed(code=error.code, message=error.message, hint=error.hint)
    except MemoryError:
        return Failed(
            code=PatchLimitError.code, message="the delta takes more memory than it declares", hint=""
        )


def _read(stream: BinaryIO, kind: type[_Message]) -> _Message | None:
    """The next message; None where there is no other end any more."""
    prefix = stream.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(prefix)
    assert length <= MESSAGE_BYTES_MAX
    data = stream.read(length)
    return msgspec.msgpack.decode(data, type=kind) if len(data) == length else None


def _speak(out: BinaryIO, answer: Struct) -> None:
    out.write(framed(answer))
    out.flush()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # nothing is left to tidy up, and threads of libraries would take their time
