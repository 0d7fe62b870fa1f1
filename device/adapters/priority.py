"""Giving way to what else the machine does: processor and disk priority of one thread, and of what it starts. Linux only.

Priority can be given away and, without privileges, never be taken back. So gentle work runs in threads of its own, and a model that is
going to serve is never loaded in one: the threads of its runtime would stay as slow as their parent.
"""

import ctypes
import logging
import os
import platform
import threading
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeVar

_LOG: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")

IoClass = Literal["normal", "low", "idle"]

_IOPRIO: Final[dict[IoClass, int | None]] = {
    "normal": None,  # as the kernel derives it from the nice value
    "low": 2 << 13 | 7,  # best effort, lowest of eight, see ioprio_set(2)
    "idle": 3 << 13,
}
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_SET: Final[dict[str, int]] = {
    "x86_64": 251,
    "aarch64": 30,
    "riscv64": 30,
    "armv7l": 314,
    "armv6l": 314,
    "i686": 289,
}
"""Numbers of the system call, which the C library has no function for."""


class Priority(NamedTuple):
    """How far to give way.

    Attributes:
        nice: Nice value, 0 to 19; a process that is nicer already stays so.
        io: Of the disk; `idle` gets it only when nobody else wants it. Schedulers other than BFQ may not care.
    """

    nice: int = 10
    io: IoClass = "low"


DEFAULT_PRIORITY: Final = Priority()


def give_way(priority: Priority) -> None:
    """Lower the priority of the calling thread for good, and of every thread and process that it starts from now on.

    What the kernel does not allow is logged: a guest that cannot step back goes on.
    """
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, max(priority.nice, os.getpriority(os.PRIO_PROCESS, thread)))
    except OSError as error:
        _LOG.warning("nice %d: %s", priority.nice, error.strerror)
    number, value = _IOPRIO_SET.get(platform.machine()), _IOPRIO[priority.io]
    if number is None or value is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _IOPRIO_WHO_PROCESS, thread, value) != 0:
        _LOG.warning("disk priority %s: %s", priority.io, os.strerror(ctypes.get_errno()))


def gently(priority: Priority, work: Callable[[], _Result]) -> _Result:
    """Do `work` in a thread that gives way, and wait for it.

    Returns:
        What `work` returns.

    Raises:
        Exception: What `work` raises.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            give_way(priority)
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            errors.append(error)

    thread = threading.Thread(target=run, name="whimbrel-gentle", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
