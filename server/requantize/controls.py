"""The files that a chosen one stands beside: what llama.cpp's own quantizer makes of the new model, and that with the installed embedding."""

import shutil
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError
from protocol.tensors import Layout
from protocol.tensors.gguf import GGML_TYPES
from server.adapters.blobs import storage_errors
from server.requantize.evaluation import quantize
from server.requantize.model import EMBEDDING, ModelFile, opened_gguf

FILE_TYPE_KEY: Final = "general.file_type"
"""Which kind of file llama.cpp made (`llama_ftype`)."""

_TYPE_OF_LAYOUT: Final[dict[Layout, int]] = {
    layout: number for number, (_, _, layout) in GGML_TYPES.items() if layout is not Layout.RAW
}


def write_plain(new: Path, installed: Path, out: Path, threads: int) -> None:
    """Quantize the new model as the installed file was: of the same kind, with the same type of embedding.

    Args:
        new: The new model in floats, GGUF.
        installed: The quantized file that devices have.
        out: Replaced when it is there; appears when it is whole.
        threads: Of the quantizer.

    Raises:
        ModelFileError: The installed file does not say of which kind it is, or its tensors are of types that its kind does not bring.
        EngineError: llama.cpp is missing or refuses.
        StorageError: The file cannot be written.
    """
    with opened_gguf(installed) as known:
        kind = known.gguf.metadata.get(FILE_TYPE_KEY)
        if not isinstance(kind, int) or isinstance(kind, bool):
            raise ModelFileError(
                f"{installed}: metadata has no number {FILE_TYPE_KEY}, so nothing says how the plain file is made"
            )
        embedding = _TYPE_OF_LAYOUT.get(known.region(EMBEDDING).layout)
        partial = out.with_name(f".partial-{out.name}")
        try:
            quantize(new, partial, kind, embedding, threads)
            with opened_gguf(partial) as made:
                _check_types(made, known, out)
            with storage_errors(out):
                partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def write_frozen(plain: Path, installed: Path, out: Path) -> None:
    """The plain file with the installed token embedding: it is a large part of a small model's delta, and a small part of its gain.

    Raises:
        ModelFileError: The two embeddings have other shapes or types.
        StorageError: The file cannot be written.
    """
    with opened_gguf(plain) as new, opened_gguf(installed) as old:
        to, source = new.region(EMBEDDING), old.region(EMBEDDING)
        if (to.dims, to.layout) != (source.dims, source.layout):
            raise ModelFileError(f"{plain}: {EMBEDDING} is not of the shape and type that {installed} has")
        partial = out.with_name(f".partial-{out.name}")
        try:
            with storage_errors(partial):
                shutil.copyfile(plain, partial)
                with partial.open("r+b") as file:
                    file.seek(to.offset)
                    file.write(old.source.read_at(source.offset, source.length))
                partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def _check_types(made: ModelFile, known: ModelFile, out: Path) -> None:
    for name, region in known.tensors.items():
        other = made.tensors.get(name)
        if other is not None and other.layout is not region.layout:
            raise ModelFileError(
                f"{out}: llama.cpp makes {name} as {other.layout.value}, installed is {region.layout.value}",
                hint="give an installed file that llama.cpp's quantizer made without further options",
            )
