"""Taking rights away from the calling process for good: before it touches a file that somebody else made. Linux only.

Two mechanisms of the kernel, neither of which needs privileges, both inherited and never undone: a seccomp filter (seccomp(2)) refuses
whole system calls, and Landlock (landlock(7)) leaves read access to what runs a model, and to the model. What a kernel does not have is
left out, and said: a device that cannot confine a trial still has to have one. Decisions: docs/adr/0026.

To be called while the process has one thread: others would keep what they had.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

OPEN_FILES_MAX: Final = 512
"""Libraries of an accelerator open hundreds; the model and a runtime for the processor ten."""

FILE_BYTES_MAX: Final = 1 << 20
"""There is nothing to write; a runtime may want a small file in memory."""

_OOM_SCORE: Final = 1000
"""When memory is gone, the kernel ends this process first, and not what serves (proc_pid_oom_score_adj(5))."""

# What runs a model on any distribution, and holds no secrets. The rest of /etc may, and so may homes and the state of the agent.
_READABLE: Final = (
    "/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/proc", "/sys",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/ssl/openssl.cnf",
)  # fmt: skip
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")

# What libraries of accelerators use besides: their nodes, memory shared with their drivers, and descriptions of what is installed.
_ACCELERATOR_READABLE: Final = (
    "/opt",
    "/etc/OpenCL",
    "/etc/vulkan",
    "/etc/glvnd",
    "/etc/nv_tegra_release",
    "/run/nvidia-persistenced",
)
_ACCELERATOR_DEVICES: Final = (
    "dri", "nvidia*", "nvhost*", "nvmap", "kfd", "accel", "dma_heap", "mali*", "rknpu*", "apex_*", "hailo*", "qaic*", "shm",
)  # fmt: skip

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522
_SECCOMP_MODE_FILTER: Final = 2
_CLONE_THREAD: Final = 0x00010000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_AF_UNIX: Final = 1


class Confinement(Struct, frozen=True, kw_only=True):
    """What the kernel granted.

    Attributes:
        network: `seccomp`: no sockets, programs, processes, or looks into others. `namespace`: sockets that reach nobody.
            `open`: neither.
        files: Version of Landlock that leaves what was named readable and nothing writable; 0 for none.
    """

    network: Literal["seccomp", "namespace", "open"]
    files: int

    @property
    def is_complete(self) -> bool:
        """Whether there is neither network nor a file beyond what was named."""
        return self.network != "open" and self.files > 0

    def __str__(self) -> str:
        network = {
            "seccomp": "no network and no programs (seccomp)",
            "namespace": "no network (a namespace of its own)",
            "open": "the network is open: this kernel has no seccomp filters",
        }[self.network]
        files = (
            f"files read-only (Landlock {self.files})"
            if self.files
            else "files are open: this kernel has no Landlock"
        )
        return f"{network}, {files}"


def confine(
    readable: Iterable[str | Path],
    *,
    writable: Iterable[str | Path] = (),
    file_bytes_max: int = FILE_BYTES_MAX,
    data_bytes_max: int | None = None,
    accelerators: bool = False,
) -> Confinement:
    """Take rights away from this process, and from every thread that it starts from now on.

    Args:
        readable: Folders and files to read, besides what runs Python and its libraries.
        writable: Files that exist, to read and write.
        file_bytes_max: No file gets longer by this process.
        data_bytes_max: Memory that is its own: everything but what is mapped from files. None for what maps and reserves more than it
            touches, as runtimes do.
        accelerators: Whether a runtime may use one: its device nodes, and Unix sockets, by which some libraries find their service.
    """
    _limit(file_bytes_max, data_bytes_max)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:  # older than Linux 3.5: without it there is neither
        return Confinement(network="open", files=0)
    files = _restrict_files(libc, readable, writable, accelerators=accelerators)
    filtered = _can_filter(libc)
    is_apart = not filtered and _leave_network(libc)
    _drop_capabilities(libc)
    if filtered and _filter_calls(libc, accelerators=accelerators):
        return Confinement(network="seccomp", files=files)
    return Confinement(network="namespace" if is_apart else "open", files=files)


def end_with(parent: int) -> None:
    """Die with the thread of the parent process that started this one."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def take_stdout() -> BinaryIO:
    """Keep standard output for messages; what a library prints there goes to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def memory_of_data() -> int:
    """Bytes that `data_bytes_max` would count of this process now (VmData in proc_pid_status(5)).

    Raises:
        OSError: There is no /proc.
    """
    lines = Path("/proc/self/status").read_bytes().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(b"VmData:")) * 1024


def _limit(file_bytes_max: int, data_bytes_max: int | None) -> None:
    """Resource limits. None of address space: weights are mapped, and runtimes reserve far more than they touch.

    None of processes either: that counts all of a user. The filter refuses new ones instead.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))
    if data_bytes_max is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes_max, data_bytes_max))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{_OOM_SCORE}\n", encoding="ascii")
    except OSError:  # a container without /proc: the watch over its memory remains
        return


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Of an agent that runs as root: its files stay readable, the machine stays out of reach. Nobody else has any."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    libc.capset(header, bytes(24))


def _leave_network(libc: ctypes.CDLL) -> bool:
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET))


# System calls (seccomp(2), linux/filter.h)


class _Machine(NamedTuple):
    """How a processor numbers system calls: `linux/audit.h`, `asm/unistd.h`."""

    audit: int
    calls: dict[str, int]
    foreign_from: int = 1 << 31  # numbers of another ABI


_COMMON: Final = {"io_uring_setup": 425, "pidfd_send_signal": 424, "clone3": 435, "pidfd_getfd": 438}
_GENERIC: Final = _COMMON | {
    "unshare": 97, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "socket": 198,
    "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220, "execve": 221, "rt_tgsigqueueinfo": 240,
    "perf_event_open": 241, "prlimit64": 261, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
    "execveat": 281, "userfaultfd": 282,
}  # fmt: skip
_MACHINES: Final[dict[str, _Machine]] = {
    "x86_64": _Machine(
        0xC000003E,
        _COMMON | {
            "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "rt_sigqueueinfo": 129,
            "tkill": 200, "tgkill": 234, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
            "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "prlimit64": 302, "setns": 308, "process_vm_readv": 310,
            "process_vm_writev": 311, "bpf": 321, "execveat": 322, "userfaultfd": 323,
        },
        foreign_from=1 << 30,  # x32
    ),
    "aarch64": _Machine(0xC00000B7, _GENERIC),
    "riscv64": _Machine(0xC00000F3, _GENERIC),
}  # fmt: skip

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW: Final = 0x7FFF0000
_REFUSE: Final = 0x00050000
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # of `struct seccomp_data`, all little-endian here


def _can_filter(libc: ctypes.CDLL) -> bool:
    """Whether filters are there: a filter at an invalid address is refused for its address, not for being one."""
    if platform.machine() not in _MACHINES or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return False
    return bool(
        libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0) != 0
        and ctypes.get_errno() == errno.EFAULT
    )


def _filter_calls(libc: ctypes.CDLL, *, accelerators: bool) -> bool:
    program = b"".join(_program(_MACHINES[platform.machine()], os.getpid(), accelerators=accelerators))
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # `struct sock_fprog`
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0) == 0)


def _program(machine: _Machine, pid: int, *, accelerators: bool) -> list[bytes]:
    """The filter: what is named is refused, everything else allowed."""
    number = machine.calls
    lines = [
        _line(_LOAD, _MACHINE_AT),
        _line(_JUMP_EQUAL, machine.audit, then=1),
        _line(_RETURN, _REFUSE | errno.EPERM),
        _line(_LOAD, _NUMBER_AT),
        _line(_JUMP_AT_LEAST, machine.foreign_from, otherwise=1),
        _line(_RETURN, _REFUSE | errno.EPERM),
    ]
    for name in ("io_uring_setup", "clone3"):  # as on an older kernel: the C library does without
        lines += _refused(number[name], errno.ENOSYS)
    for name in (
        "fork", "vfork", "execve", "execveat", "unshare", "setns", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd",
        "kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "bpf", "perf_event_open", "userfaultfd",
        "add_key", "request_key", "keyctl",
    ):  # fmt: skip
        if name in number:
            lines += _refused(number[name], errno.EPERM)
    lines += _only(number["clone"], _JUMP_SET, _CLONE_THREAD)
    lines += _only(number["tgkill"], _JUMP_EQUAL, pid)  # how a process aborts
    lines += _only(number["prlimit64"], _JUMP_EQUAL, 0)
    lines += (
        _only(number["socket"], _JUMP_EQUAL, _AF_UNIX)
        if accelerators
        else _refused(number["socket"], errno.EPERM)
    )
    return [*lines, _line(_RETURN, _ALLOW)]


def _line(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One `struct sock_filter`; jumps count the lines that they leave out."""
    return struct.pack("<HBBI", code, then, otherwise, value)


def _refused(number: int, error: int) -> list[bytes]:
    return [_line(_JUMP_EQUAL, number, otherwise=1), _line(_RETURN, _REFUSE | error)]


def _only(number: int, test: int, value: int) -> list[bytes]:
    """Allow a call where its first argument passes a test."""
    return [
        _line(_JUMP_EQUAL, number, otherwise=4),
        _line(_LOAD, _FIRST_ARGUMENT_AT),
        _line(test, value, then=1),
        _line(_RETURN, _REFUSE | errno.EPERM),
        _line(_RETURN, _ALLOW),
    ]


# Files (landlock(7), linux/landlock.h)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # everywhere
_VERSION_FLAG: Final = 1
_PATH_BENEATH: Final = 1
_WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE, _DEVICE_ORDERS = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights each version of Landlock knows, the first bits; later ones know more, which are not asked for."""

_TCP_RIGHTS: Final = 0b11  # bind and connect, from version 4 on
_SCOPES: Final = 0b11  # abstract sockets and signals stay inside, from version 6 on


def _restrict_files(
    libc: ctypes.CDLL,
    readable: Iterable[str | Path],
    writable: Iterable[str | Path],
    *,
    accelerators: bool,
) -> int:
    """Leave files readable, and devices usable; returns the version of Landlock, or 0."""
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if version < 1:
        return 0
    handled = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    attributes = struct.pack("<QQQ", handled, _TCP_RIGHTS, _SCOPES)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return 0
    try:
        for path in _roots(readable, accelerators=accelerators):
            _allow(libc, ruleset, path, handled & (_READ_FILE | _READ_FOLDER))
        for path in map(Path, writable):
            _allow(libc, ruleset, path, handled & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
        for path in _devices(accelerators=accelerators):
            _allow(libc, ruleset, path, handled & (_READ_FILE | _READ_FOLDER | _WRITE_FILE | _DEVICE_ORDERS))
        return version if libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _roots(readable: Iterable[str | Path], *, accelerators: bool) -> set[Path]:
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix, *(path or "." for path in sys.path))
    paths = (*readable, *python, *_READABLE, *(_ACCELERATOR_READABLE if accelerators else ()))
    return {Path(path).resolve() for path in paths} - {Path("/")}


def _devices(*, accelerators: bool) -> list[Path]:
    patterns = _DEVICES + (_ACCELERATOR_DEVICES if accelerators else ())
    return [path for pattern in patterns for path in Path("/dev").glob(pattern)]


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """Add a rule; what is not there needs none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            rights &= ~_READ_FOLDER
        rule = struct.pack("<Qi", rights, descriptor)  # `struct landlock_path_beneath_attr`, packed
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)


if __name__ == "__main__":  # `doctor` asks what this kernel would grant
    sys.stdout.buffer.write(msgspec.json.encode(confine(())))
