"""zstd with hard bounds; the only importer of `zstandard`.

`ZstdDecompressor.decompress(max_output_size=...)` bounds nothing when the frame names its own content size, so a frame
is looked at first and then read through a counted stream.
"""

import zstandard

from protocol.errors import PatchError

_LEVELS = {"quick": 1, "fast": 3, "small": 12, "smallest": 19}
# Residuals hold no repetitions: with almost no search zstd is a fast Huffman coder, and often a better one than with it.
_ENTROPY_ONLY = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, target_length=0, write_checksum=0
)
_SAMPLE_BYTES = 64 << 10
# A frame of ours never needs a larger window than one segment or one field stream.
_MAX_WINDOW_BYTES = 32 << 20


def compress(data: bytes, effort: str) -> bytes:
    """Return one zstd frame that names its content size.

    Args:
        data: Any bytes.
        effort: "quick", for a device, which tries on a sample what is worth trying; "fast"; "small", which is enough for residuals; or "smallest", which pays for text.
    """
    if effort == "quick" and len(data) > _SAMPLE_BYTES:
        middle = (len(data) - _SAMPLE_BYTES) // 2
        sample = data[middle : middle + _SAMPLE_BYTES]
        return min(_both("quick"), key=lambda compressor: len(compressor.compress(sample))).compress(data)
    frame, coded = (compressor.compress(data) for compressor in _both(effort))
    return min(frame, coded, key=len)


def _both(effort: str) -> tuple[zstandard.ZstdCompressor, zstandard.ZstdCompressor]:
    return (
        zstandard.ZstdCompressor(level=_LEVELS[effort], write_checksum=False),
        zstandard.ZstdCompressor(compression_params=_ENTROPY_ONLY),
    )


def decompress(frame: bytes, length: int) -> bytes:
    """Return the content of `frame`, which must be exactly `length` bytes, using memory for no more than that.

    Raises:
        PatchError: The frame is damaged, or holds another number of bytes.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != length or parameters.dict_id:
            raise PatchError("zstd frame does not hold the announced number of bytes")
        if parameters.window_size > _MAX_WINDOW_BYTES:
            raise PatchError(f"zstd frame needs a window of {parameters.window_size} bytes")
        with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(frame) as reader:
            data = reader.read(length)
            if len(data) != length or reader.read(1):
                raise PatchError("zstd frame does not hold the announced number of bytes")
    except zstandard.ZstdError as error:
        raise PatchError("zstd frame is damaged") from error
    return data


def decompress_up_to(frame: bytes, length_max: int) -> bytes:
    """Return the content of `frame`, whose length only the frame itself tells.

    Raises:
        PatchError: The frame is damaged, or holds more than `length_max` bytes.
    """
    try:
        length = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise PatchError("zstd frame is damaged") from error
    if length > length_max:
        raise PatchError(f"zstd frame holds more than {length_max} bytes")
    return decompress(frame, length)
