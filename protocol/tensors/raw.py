"""The map of a file that is not understood: one raw region."""

from protocol.tensors.regions import Layout, ReadAt, Region


def map_raw(source: ReadAt) -> tuple[Region, ...]:
    """Return one raw region over the whole file; nothing for an empty file."""
    if source.length == 0:
        return ()
    return (Region("", Layout.RAW, 0, source.length),)
