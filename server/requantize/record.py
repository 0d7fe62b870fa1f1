"""The record that stands beside a chosen file, as others read it: nothing here loads what choosing takes. Pure."""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.errors import ReleaseError

RECORD_SUFFIX: Final = ".requantized.json"
"""Added to the name of the chosen file."""

RECORD_VERSION: Final = 1

RECORD_BYTES_MAX: Final = 4 << 20
"""A line for each tensor is most of it: 10 KB for SmolLM2-135M."""

_NOTHING_BUT_TIME: Final = "workers"
"""The setting that the chosen file does not depend on."""

_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Meta(max_length=4096)]
_Count = Annotated[int, Meta(ge=0)]


class Sources(Struct, frozen=True, kw_only=True):
    """SHA-256 of what went in and what came out; `server.requantize.provenance` says what each is."""

    new: _Digest
    installed: _Digest
    result: _Digest
    before: _Digest | None = None
    start: _Digest | None = None
    calibration_model: _Digest | None = None
    calibration_tokens: _Digest | None = None
    calibration_runs: tuple[_Count, _Count] | None = None
    samples: _Digest | None = None
    distilled_tokens: _Digest | None = None


class Installed(Struct, frozen=True, kw_only=True):
    """One of several files that the fleet has."""

    name: _Text
    sha256: _Digest
    share: Annotated[float, Meta(gt=0, lt=1)]


class Guard(Struct, frozen=True, kw_only=True):
    """What was looked at before the file was written, and what came of it."""

    name: _Text
    status: Literal["passed", "failed", "undecided"]
    detail: _Text


class Record(Struct, frozen=True, kw_only=True):
    """How a file was chosen.

    Attributes:
        requantized: Version of this format.
        price: At which its codes stand, in nats per token and bit.
        delta_bytes: Of the delta from the installed file.
        settings: What was asked for.
        sources: Digests of what went in and came out.
        sent: The installed files where there are several, that which most devices have first.
        guards: Of the file that was judged beside a plain one; None where it was written without.
    """

    requantized: int
    price: float
    delta_bytes: _Count
    settings: Annotated[dict[_Text, Any], Meta(max_length=64)]
    sources: Sources
    sent: Annotated[list[Installed], Meta(max_length=64)] = []
    guards: Annotated[list[Guard], Meta(max_length=256)] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that were made and that decide which file is chosen."""
        return {
            name: value
            for name, value in self.settings.items()
            if value is not None and name != _NOTHING_BUT_TIME
        }


class _Kind(Struct):
    """As much as tells whether the rest is understood."""

    requantized: int


_kind_decoder = msgspec.json.Decoder(_Kind)
_decoder = msgspec.json.Decoder(Record)


def decode_record(data: bytes, source: str) -> Record:
    """Read a record.

    Args:
        data: Its bytes.
        source: Names it in errors.

    Raises:
        ReleaseError: Too long, malformed, or of a version that is not known here.
    """
    if len(data) > RECORD_BYTES_MAX:
        raise ReleaseError(f"{source}: a record has at most {RECORD_BYTES_MAX} bytes")
    try:
        version = _kind_decoder.decode(data).requantized
        if version != RECORD_VERSION:
            raise ReleaseError(
                f"{source}: record of version {version}, known is {RECORD_VERSION}",
                hint="add the release with the whimbrel that chose the file",
            )
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(
            f"{source} is no record of `whimbrel requantize`: {error}",
            hint="choose the file again, or say where it comes from with --source or --provenance",
        ) from error
