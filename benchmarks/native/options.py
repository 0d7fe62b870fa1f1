"""One way to run the loop, in a process of its own: `python options.py NAME FOLDER BITS` prints one line of JSON.

Runs with nothing but the standard library, numpy and the option itself, also in an emulator. Times are of the processor, so that
other programs on the machine show less.
"""

import ctypes
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Decode = Callable[[Any, int], Any]
"""From the coded bytes and the number of bits to the bits, one a byte."""


def decode_bits(
    data: Sequence[int], count: int, out: MutableSequence[int], zeros: MutableSequence[int]
) -> None:
    """The loop of coder.c in Python, fit for numba: signed numbers wide enough, since numba makes floats of mixed signs."""
    width = 0xFFFFFFFF
    code = (data[0] << 24) | (data[1] << 16) | (data[2] << 8) | data[3]
    position = 4
    context = 0
    for i in range(count):
        zero = zeros[context]
        bound = (width >> 16) * zero
        if code < bound:
            bit = 0
            width = bound
            zeros[context] = zero + ((65536 - zero) >> 4)
        else:
            bit = 1
            code -= bound
            width -= bound
            zeros[context] = zero - (zero >> 4)
        while width < 0x1000000:
            width = width << 8
            code = (code << 8) | data[position]
            position += 1
        context = ((context << 1) | bit) & 4095
        out[i] = bit


def python_option(_: Path) -> Decode:
    def decode(data: bytes, count: int) -> bytearray:
        out = bytearray(count)
        decode_bits(data, count, out, [1 << 15] * 4096)
        return out

    return decode


def numba_option(_: Path) -> Decode:
    # With the cache a second start does not compile anew; NUMBA_CACHE_DIR is the parent's choice.
    compiled = importlib.import_module("numba").njit(cache=True)(decode_bits)

    def decode(data: bytes, count: int) -> Any:
        out = np.empty(count, np.uint8)
        compiled(np.frombuffer(data, np.uint8).astype(np.int64), count, out, np.full(4096, 1 << 15))
        return out

    return decode


def library_option(path: Path, function: str, *, has_length: bool = False) -> Decode:
    native = getattr(ctypes.CDLL(str(path)), function)
    native.restype = None
    lengths = [ctypes.c_uint64] * (2 if has_length else 1)
    native.argtypes = [ctypes.c_void_p, *lengths, ctypes.c_void_p]

    def decode(data: bytes, count: int) -> Any:
        source, out = np.frombuffer(data, np.uint8), np.empty(count, np.uint8)
        numbers = [len(data), count] if has_length else [count]
        native(source.ctypes.data, *numbers, out.ctypes.data)
        return out

    return decode


def cython_option(folder: Path) -> Decode:
    sys.path.insert(0, str(folder))
    compiled = importlib.import_module("decoder").decode

    def decode(data: bytes, count: int) -> bytearray:
        out = bytearray(count)
        compiled(data, count, out)
        return out

    return decode


OPTIONS: dict[str, Callable[[Path], Decode]] = {
    "c": lambda folder: library_option(folder / "coder.so", "decode"),
    "c with AVX2": lambda folder: library_option(folder / "coder.so", "decode_hot"),
    "cython": cython_option,
    "numba": numba_option,
    "python": python_option,
    "rust": lambda folder: library_option(folder / "decoder.so", "decode", has_length=True),
}


def memory_bytes() -> int:
    """Resident memory of this process (proc(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(name: str, folder: Path, count: int) -> None:
    data = (folder / "coded").read_bytes()
    memory = memory_bytes()
    started = time.process_time()
    decode = OPTIONS[name](folder)
    decode(data, 1000)  # what compiles at the first call compiles here
    start_s = time.process_time() - started
    memory = memory_bytes() - memory
    times = []
    for _ in range(1 if name == "python" else 7):
        started = time.process_time()
        bits = decode(data, count)
        times.append(time.process_time() - started)
    print(
        json.dumps(
            {
                "start_s": start_s,
                "memory_bytes": memory,
                "bits_per_s": count / min(times),
                "sha256": hashlib.sha256(bytes(bits)).hexdigest(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
