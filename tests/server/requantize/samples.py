"""What the tests of this folder share: tokens for the small model of `tests/models.py`, and quantized and chosen files of it."""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.gguf_files import as_type, read_stored, start_gguf
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen, choose
from server.requantize.settings import Settings

TYPES = gguf.GGMLQuantizationType


def tokens(seed: int, count: int = 2000) -> npt.NDArray[np.int32]:
    """Random tokens of its vocabulary."""
    return np.random.default_rng(seed).integers(0, 260, count).astype(np.int32)


def quantized(source: Path, out: Path, kind: gguf.GGMLQuantizationType = TYPES.Q4_0) -> Path:
    """The model with its matrices rounded to nearest, the embedding to Q8_0."""
    writer = start_gguf(source, out, {})
    for tensor in read_stored(source):
        stored = tensor
        if tensor.data.ndim == 2:
            is_embedding = tensor.name == "token_embd.weight"
            stored = as_type(tensor.name, tensor.data, TYPES.Q8_0 if is_embedding else kind)
        writer.add_tensor(stored.name, np.ascontiguousarray(stored.data), raw_dtype=stored.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quiet(_line: str) -> None:
    """Nobody listens."""


def choose_in(
    folder: Path, calibration: Calibration, out: Path, before: Path | None = None, **settings: object
) -> Chosen:
    """Choose a file for `new.gguf` against `installed.gguf`, in one process unless the settings say otherwise."""
    settings = {"workers": 1, **settings}
    return choose(
        folder / "new.gguf",
        folder / "installed.gguf",
        calibration,
        Settings(**settings),  # type: ignore[arg-type]  # names and values of its fields
        out,
        quiet,
        before=before,
    )
