"""The header of the chosen file: the tensors as installed, the metadata of the new model but for what says how it is quantized."""

import struct
from pathlib import Path
from typing import Final

from protocol.tensors.gguf import MAGIC
from server.adapters.blobs import storage_errors
from server.requantize.model import ModelFile

_OF_THE_FILE: Final = ("general.file_type", "general.quantization_version", "general.alignment")
_OF_THE_QUANTIZER: Final = "quantize."
_COPY_BYTES: Final = 1 << 20
_DEFAULT_ALIGNMENT: Final = 32


def start_file(new: ModelFile, installed: ModelFile, out: Path) -> None:
    """Write the installed file with the metadata of the new model.

    Keys stay where they are and the file is the same, byte for byte, where the metadata is.

    Args:
        new: The new model.
        installed: The file whose tensors are taken.
        out: The result, replaced when it exists.

    Raises:
        StorageError: It cannot be written.
    """
    header = _header(new, installed)
    start = min((region.offset for region in installed.tensors.values()), default=installed.source.length)
    with storage_errors(out), out.open("wb") as file:
        file.write(header)
        for offset in range(start, installed.source.length, _COPY_BYTES):
            file.write(installed.source.read_at(offset, min(_COPY_BYTES, installed.source.length - offset)))


def _header(new: ModelFile, installed: ModelFile) -> bytes:
    pairs = []
    for key in [*installed.gguf.pairs, *(key for key in new.gguf.pairs if key not in installed.gguf.pairs)]:
        is_own = key in _OF_THE_FILE or key.startswith(_OF_THE_QUANTIZER)
        model = installed if is_own else new
        if key in model.gguf.pairs:
            pairs.append(_bytes(model, *model.gguf.pairs[key]))
    counts = struct.pack("<IQQ", installed.gguf.version, len(installed.tensors), len(pairs))
    header = b"".join([MAGIC, counts, *pairs, _bytes(installed, *installed.gguf.infos)])
    alignment = installed.gguf.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)  # the parser has looked
    return header + bytes(-len(header) % alignment)


def _bytes(model: ModelFile, start: int, end: int) -> bytes:
    return model.source.read_at(start, end - start)
