"""What goes to the devices of each of several installed files: in records, and for people. Pure but for digests of the files."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from server.display import bytes_text, table
from server.requantize.model import sha256_of
from server.requantize.portions import Portion, all_portions, names_of
from server.scorecard.card import Check


class Sent(Struct, frozen=True, kw_only=True):
    """What goes to the devices of one of several installed files.

    Attributes:
        name: Of the file, for people.
        sha256: Of the file.
        share: Of the fleet that has it.
        delta_bytes: Of the delta from it to the chosen file.
        plain_bytes: Of that to the plain file; None where nobody made one.
        alone_bytes: Of that to a file which was chosen for these devices alone, at the same price; None where that was not tried.
        alone_objective: What that file costs in nats per token, beside `objective_after` of the common one.
    """

    name: str
    sha256: str
    share: float
    delta_bytes: int
    plain_bytes: int | None = None
    alone_bytes: int | None = None
    alone_objective: float | None = None


def sent_to(installed: Path, also: Sequence[Portion], sizes: Sequence[int]) -> tuple[Sent, ...]:
    """Of each installed file, where there are several; none where there is one.

    Raises:
        StorageError: One cannot be read.
    """
    if not also:
        return ()
    portions = zip(names_of(installed, also), all_portions(installed, also), sizes, strict=True)
    return tuple(
        Sent(name=name, sha256=sha256_of(each.path), share=each.share, delta_bytes=size)
        for name, each, size in portions
    )


def check_sent(sent: Sequence[Sent]) -> tuple[Check, ...]:
    """To no device goes more than the plain file would have taken: the mean over the fleet may hide that."""
    return tuple(
        Check(
            name=f"bytes from {each.name}",
            status="passed" if each.delta_bytes <= each.plain_bytes else "failed",
            detail=f"{each.delta_bytes:,} to send, {each.plain_bytes:,} to plain",
        )
        for each in sent
        if each.plain_bytes is not None
    )


def sent_lines(sent: Sequence[Sent]) -> list[str]:
    """A table, and what one file for all costs beside one for each; nothing where there is one installed file."""
    if not sent:
        return []
    found = table(
        ["INSTALLED", "SHARE %", "PLAIN", "CHOSEN", "CHOSEN ALONE"], [_cells(each) for each in sent]
    )
    alone = [each.share * each.alone_bytes for each in sent if each.alone_bytes is not None]
    if len(alone) == len(sent):
        common = sum(each.share * each.delta_bytes for each in sent)
        found.append(
            f"A device fetches {bytes_text(round(common))} on average; with a file for each of the {len(sent)} it would be"
            f" {bytes_text(round(sum(alone)))}, and as many versions to judge and to update from then on."
        )
    return found


def _cells(each: Sent) -> list[str]:
    sizes = (each.plain_bytes, each.delta_bytes, each.alone_bytes)
    return [each.name, f"{100 * each.share:.3g}", *("-" if size is None else f"{size:,}" for size in sizes)]
