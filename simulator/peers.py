"""What a whole file and a general binary difference cost; the only importer of bsdiff4 and zstandard in the simulator.

Whimbrel's own use of bsdiff4 frames and compresses its streams in another way; this is the peer as its users have it.
"""

import bsdiff4
import zstandard

_ZSTD_LEVEL = 19


def compressed_bytes(new: bytes) -> int:
    """Length of the new file under zstd."""
    return len(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(new))


def bsdiff_bytes(old: bytes, new: bytes) -> int:
    """Length of bsdiff4's patch."""
    return len(bsdiff4.diff(old, new))
