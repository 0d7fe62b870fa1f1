"""What a megabyte over the air costs, as a file; what it does not name costs nobody knows how much, and is left out."""

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from protocol.errors import RequestError

MB: Final = 10**6
"""As networks charge it."""

FILE_BYTES_MAX: Final = 64 * 1024

_Price = Annotated[float, Meta(ge=0, le=1e6)]


class Prices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prices of data, in TOML with these keys.

    Attributes:
        currency: For people, for example "EUR".
        per_mb: Of 10**6 bytes to a device of any tier; None where only some tiers have a price.
        tiers: Likewise to devices of one tier, by its name.
    """

    currency: Annotated[str, Meta(min_length=1, max_length=16)]
    per_mb: _Price | None = None
    tiers: dict[str, _Price] = {}

    def per_mb_of(self, tier: str) -> float | None:
        """Price for a tier; None if nobody said so."""
        return self.tiers.get(tier, self.per_mb)


def read_prices(path: Path) -> Prices:
    """Read prices.

    Raises:
        RequestError: The file cannot be read or is malformed; names it, and the line or the field.
    """
    hint = 'expected are currency = "EUR", per_mb = 0.05 for all devices, and [tiers] with a price for some'
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a TOML file that can be read") from error
    if len(data) > FILE_BYTES_MAX:
        raise RequestError(f"{path} has more than {FILE_BYTES_MAX} bytes", hint=hint)
    try:
        return msgspec.convert(tomllib.loads(data.decode()), Prices)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path}: {error}", hint="expected is TOML") from error
    except msgspec.ValidationError as error:
        raise RequestError(f"{path}: {error}", hint=hint) from error
