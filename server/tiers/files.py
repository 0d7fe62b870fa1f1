"""Tiers as files: `tiers/NAME.toml` in the server's folder, checked field by field; what is wrong is told with its line."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from protocol.errors import RequestError
from protocol.ids import Digest
from protocol.release import RuntimeName

TIERS_FOLDER: Final = "tiers"
TIERS_MAX: Final = 64
"""As many as a release can name."""

FILE_BYTES_MAX: Final = 64 * 1024
"""A tier is some twenty lines; measured figures of a hundred models fit."""

DEFAULT_CONTEXT_TOKENS: Final = 512
"""As many as the agent gives to a text model."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATH: Final = re.compile(r"`\$\.?([^`]*)`$")
_FIELD: Final = re.compile(r"field `([^`]+)`")

_Megabytes = Annotated[int, Meta(ge=1, le=1 << 24)]
_Positive = Annotated[float, Meta(gt=0, le=1e6)]
_DigestText = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured with one model on a device of the tier; it counts instead of the formulas.

    Attributes:
        sha256: Of the model's first file.
        memory_mb: Peak of its process, with the context of the tier; None if it was not measured.
        tokens_per_s: Or answers, for models that are no text models; None likewise.
    """

    sha256: _DigestText
    memory_mb: _Megabytes | None = None
    tokens_per_s: _Positive | None = None


class Tier(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of devices. Megabytes are 2**20 bytes, as in the configuration of a device.

    Attributes:
        memory_mb: What everything of ours may take together: `memory_total_mb_max` of its devices.
        disk_mb: Room for models, both slots and a download together.
        runtime: Which models it runs.
        memory_gb_per_s: Speed of its memory in 10**9 bytes a second, which bounds how fast a text model decodes; None: not known.
        token_ms_max: Objective: longest time for a token, or for an answer of a model that is no text model; None for none.
        context_tokens: Prompt and answer together.
        stop_first: The old version stops before the new one is tried, so that they are never in memory together.
        measured: What is known better than by the formulas.
    """

    memory_mb: _Megabytes
    disk_mb: _Megabytes
    runtime: RuntimeName
    memory_gb_per_s: _Positive | None = None
    token_ms_max: _Positive | None = None
    context_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = DEFAULT_CONTEXT_TOKENS
    stop_first: bool = False
    measured: Annotated[list[Measured], Meta(max_length=256)] = []

    def measurement(self, digest: Digest) -> Measured | None:
        """What was measured with a model."""
        return next((each for each in self.measured if each.sha256 == digest), None)


def read_tiers(folder: Path) -> dict[str, Tier]:
    """The tiers of a server, by name; none where there are no files.

    Args:
        folder: The server's.

    Raises:
        RequestError: A file cannot be read or is malformed; names it, the line, and what was expected.
    """
    try:
        paths = sorted((folder / TIERS_FOLDER).glob("*.toml"))
    except OSError as error:
        raise RequestError(f"{folder / TIERS_FOLDER}: {error.strerror}") from error
    if len(paths) > TIERS_MAX:
        raise RequestError(f"{folder / TIERS_FOLDER} has {len(paths)} tiers, allowed are {TIERS_MAX}")
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> Tier:
    if not _NAME.fullmatch(path.stem):
        raise RequestError(
            f"{path}: {path.stem[:80]!r} is no name of a tier",
            hint="letters, digits, dot, dash and underscore, at most 64",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error
    if len(data) > FILE_BYTES_MAX:
        raise RequestError(f"{path} has {len(data)} bytes, allowed are {FILE_BYTES_MAX}")
    try:
        text = data.decode()
        return msgspec.convert(tomllib.loads(text), Tier)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(f"{path} line {line}: expected UTF-8", hint="correct the file") from error
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path}: {error}; expected TOML, for example memory_mb = 1024") from error
    except msgspec.ValidationError as error:
        raise RequestError(f"{path}{_place(text, str(error))}: {error}", hint=_EXAMPLE) from error


_EXAMPLE: Final = (
    'a tier has memory_mb, disk_mb and runtime = "llama" or "onnx"; docs/tiers.md lists the rest'
)


def _place(text: str, problem: str) -> str:
    """Where a field stands that is wrong, as ` line N`; nothing where one is missing."""
    path = _PATH.search(problem)
    unknown = _FIELD.search(problem) if "unknown field" in problem else None
    name = unknown[1] if unknown else path[1].split("[")[0].rsplit(".", 1)[-1] if path else ""
    inner = path[1].rsplit(".", 1)[-1] if path and not unknown else name
    for wanted in (inner, name):
        pattern = re.compile(rf"^\s*(\[\[?\s*)?{re.escape(wanted)}\s*(\]|=)")
        numbers = [
            number for number, line in enumerate(text.splitlines(), start=1) if wanted and pattern.match(line)
        ]
        if numbers:
            return f" line {numbers[_index(path[1]) if path and len(numbers) > 1 else 0]}"
    return ""


def _index(path: str) -> int:
    """Which of several tables of one name it is: `measured[1].sha256`."""
    found = re.search(r"\[(\d+)\]", path)
    return int(found[1]) if found else 0
