"""The real server of a live fleet, in this process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from server.config import read_config
from server.runtime import Server

CONNECT_S_MAX: Final = 15.0


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Run the server of a folder that was set up before; it is connected to its broker, and stops with the context.

    Raises:
        TransportError: The broker does not answer in time.
    """
    server = Server(read_config(folder))
    server.start()
    try:
        server.wait_connected(CONNECT_S_MAX)
        yield server
    finally:
        server.stop()
