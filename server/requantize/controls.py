"""Files that are made without a choice: what llama.cpp's own quantizer makes of the new model, that with the installed embedding, and nearest codes on installed scales."""

import shutil
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError
from protocol.tensors import Layout
from protocol.tensors.gguf import GGML_TYPES
from server.adapters.blobs import storage_errors
from server.requantize.codes import LINEAR_LAYOUTS
from server.requantize.evaluation import quantize
from server.requantize.model import EMBEDDING, ModelFile, coded_rows, layer_matrices, opened_gguf

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


def write_nearest(new: ModelFile, installed: ModelFile, base: Path, out: Path) -> None:
    """The codes nearest to the new weights on the installed scales, in all matrices of layers; the rest as installed.

    What a plain file has in other scales beside that is dear to send. An update that moves weights by less than half a step is carried
    whole, if coarsely: how many codes change is in proportion to how far it goes.

    Args:
        new: The new model in floats.
        installed: The quantized file that devices have.
        base: A file of the installed one's layout; its float tensors are taken.
        out: The result.

    Raises:
        ModelFileError: A weight is no number, or a tensor is missing.
        StorageError: The file cannot be written.
    """
    with storage_errors(out):
        shutil.copyfile(base, out)
    layers = frozenset(layer_matrices(installed))
    with opened_gguf(out) as made, storage_errors(out), out.open("r+b") as file:
        for name, region in made.tensors.items():
            if region.layout not in LINEAR_LAYOUTS:
                continue
            rows = coded_rows(installed, name)
            codes = rows.nearest(new.floats(name)) if name in layers else rows.codes
            file.seek(region.offset)
            file.write(rows.joined(codes))


def _check_types(made: ModelFile, known: ModelFile, out: Path) -> None:
    for name, region in known.tensors.items():
        other = made.tensors.get(name)
        if other is not None and other.layout is not region.layout:
            raise ModelFileError(
                f"{out}: llama.cpp makes {name} as {other.layout.value}, installed is {region.layout.value}",
                hint="give an installed file that llama.cpp's quantizer made without further options",
            )
