"""The compiled inner loops of the delta coder, where there are any: finds, checks and loads the shared library.

The library is plain C without Python's headers, so one file serves every interpreter of its platform. It is loaded with ctypes,
which releases the interpreter's lock during each call. Whatever it computes, the Python reference computes, too, bit for bit; a
platform without it is slow, not wrong. What the library offers stands in whimbrel.h; declaring the argument types of a
function is up to the module that calls it.
"""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Final

__all__ = ["ABI_VERSION", "LIBRARY", "library"]

ABI_VERSION: Final = 3
"""The same number as WHIMBREL_ABI_VERSION in whimbrel.h."""

LIBRARY: Final = Path(__file__).with_name("libwhimbrel_delta.so")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded once, or None where the reference is to be used.

    None without a word if no library is installed (a pure wheel). None with a warning if there is one that cannot be loaded
    (another processor, a system library that is too old) or that belongs to another version of this package: calling
    it could corrupt memory.

    The environment variable WHIMBREL_NATIVE is for tests and comparison: `0` gives None, `baseline` a library that uses only
    what every processor of the platform has, `1` is as if it were not set.

    Raises:
        ValueError: WHIMBREL_NATIVE is something else.
    """
    wish = os.environ.get("WHIMBREL_NATIVE", "1")
    if wish not in {"0", "1", "baseline"}:
        raise ValueError(f"WHIMBREL_NATIVE is {wish!r}, and knows 0, 1 and baseline")
    if wish == "0" or not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.whimbrel_abi_version.argtypes = []
        loaded.whimbrel_abi_version.restype = ctypes.c_uint32
        found = loaded.whimbrel_abi_version()
    except (OSError, AttributeError) as error:
        problem = f"cannot be loaded ({error})"
    else:
        if found == ABI_VERSION:
            if wish == "baseline":
                loaded.whimbrel_use_every_processor()
            return loaded
        problem = f"has ABI version {found}, and this package needs {ABI_VERSION}"
    warnings.warn(
        f"{LIBRARY.name} {problem}: deltas are decoded by the Python reference, slowly, until whimbrel is installed anew",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
