"""A runtime that a model has taken over: what it tries, `ATTACK` says, and what came of it is its error message.

Found by the child of a trial in place of the real one, through PYTHONPATH.
"""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any


def _connect() -> None:
    with socket.create_connection(("127.0.0.1", int(os.environ["ATTACK_PORT"])), timeout=5) as connection:
        connection.sendall(b"here I am")


def _ask_agent() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["ATTACK_SOCKET"])


def _read_key() -> None:
    Path(os.environ["ATTACK_KEY"]).read_bytes()


def _write_model() -> None:
    with Path(os.environ["ATTACK_MODEL"]).open("r+b") as file:
        file.write(b"mine")


def _leave_file() -> None:
    Path(os.environ["ATTACK_MODEL"]).with_name("left-behind").write_bytes(b"mine")


def _kill_agent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def _look_into_agent() -> None:
    with Path(f"/proc/{os.getppid()}/mem").open("rb") as memory:
        memory.read(1)


def _trace_agent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, os.getppid(), 0, 0) != 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")


def _limit_agent() -> None:
    resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _start_program() -> None:
    os.execv("/bin/true", ["true"])


def _start_shell() -> None:
    subprocess.run(["/bin/true"], check=True)


def _ring() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(425, 1, ctypes.create_string_buffer(120)) < 0:  # io_uring_setup: sockets without `socket`
        raise OSError(ctypes.get_errno(), "io_uring")


def _new_rights() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")


def _fill_disk() -> None:
    descriptor = os.memfd_create("large")
    os.ftruncate(descriptor, 1 << 30)


def _many_files() -> None:
    for _ in range(1000):
        os.dup(0)


def _privileges() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    raise PermissionError(next(line for line in status.splitlines() if line.startswith("CapEff")))


def _oom_score() -> None:
    raise PermissionError("score " + Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))


def _ordinary_work() -> None:
    """What every runtime does must go on: threads, its file, the libraries of the system."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    Path(os.environ["ATTACK_MODEL"]).read_bytes()
    ctypes.CDLL("libm.so.6")
    Path("/proc/cpuinfo").read_bytes()


def _abort() -> None:
    os.abort()


class SessionOptions: ...


class ExecutionMode:
    ORT_SEQUENTIAL = 0


def set_default_logger_severity(_severity: int) -> None: ...


class InferenceSession:
    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        name = os.environ["ATTACK"]
        try:
            globals()[name]()
        except OSError as error:
            raise RuntimeError(f"refused: {error}") from error
        raise RuntimeError("done")
