"""Where a run prints: on descriptors that nobody else turns away."""

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def own_descriptor(stream: TextIO) -> Iterator[TextIO]:
    """The same stream on a descriptor of its own.

    llama-cpp-python silences its library by turning the descriptors 1 and 2 of the whole process to nowhere while a model
    loads, in whatever thread that is; what we print meanwhile must not go there.
    """
    try:
        descriptor = os.dup(stream.fileno())
    except (OSError, ValueError):  # no real file, as under a test's capture
        yield stream
        return
    copy = os.fdopen(descriptor, "w", encoding=stream.encoding, buffering=1)
    with contextlib.suppress(BrokenPipeError), copy:
        yield copy
