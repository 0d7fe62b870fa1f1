"""The list of mutants that no test can notice, each with the reason: `survivors.toml`."""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from tests.mutation.mutants import Mutant

SURVIVORS: Final = Path(__file__).with_name("survivors.toml")


class Survivor(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry.

    Attributes:
        module: Path of the source file.
        function: Qualified name.
        line: The first line of the statement, without indentation.
        change: As the report prints it.
        reason: Why nobody can notice.
    """

    module: str
    function: str
    line: str
    change: str
    reason: str

    def matches(self, mutant: Mutant) -> bool:
        """Whether this entry is about that mutant."""
        return (self.module, self.function, self.line, self.change) == (
            mutant.module,
            mutant.function,
            mutant.text,
            mutant.change,
        )


def load_survivors(path: Path = SURVIVORS) -> list[Survivor]:
    """All entries.

    Raises:
        ValueError: One has no reason, or stands there twice.
    """
    entries = msgspec.convert(tomllib.loads(path.read_text()).get("survivor", []), list[Survivor])
    known: set[tuple[str, str, str, str]] = set()
    for entry in entries:
        place = (entry.module, entry.function, entry.line, entry.change)
        if place in known or len(entry.reason) < 10:
            raise ValueError(f"survivors.toml: {' | '.join(place)}: listed twice, or without a reason")
        known.add(place)
    return entries


def stale(entries: Iterable[Survivor], mutants: Sequence[Mutant]) -> list[Survivor]:
    """Entries about mutants that are not among these."""
    return [entry for entry in entries if not any(entry.matches(mutant) for mutant in mutants)]
