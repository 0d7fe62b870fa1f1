"""`python -m server.broker`: the embedded broker in a process of its own, until SIGTERM or Ctrl-C.

The first line on standard output says where it listens; with `--json` it is an object with `host`, `port` and `pid`, and
the last line is an object with the statistics. Exit codes: 0 stopped, 2 it could not be started as asked.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence

from protocol.errors import RequestError
from server.broker.limits import BrokerLimits
from server.broker.tcp import EmbeddedBroker


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the broker; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m server.broker", description="MQTT 3.1.1 broker for loopback"
    )
    parser.add_argument("--host", default="127.0.0.1", help="loopback address (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=1883, help="TCP port, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument("--retained-mb", type=int, default=1_024, help="memory for retained messages in MiB")
    parser.add_argument(
        "--queue-messages", type=int, default=1_000, help="messages that wait for one session"
    )
    parser.add_argument("--json", action="store_true", help="print for programs")
    options = parser.parse_args(arguments)
    try:
        limits = BrokerLimits(
            retained_bytes_max=options.retained_mb << 20, queue_messages_max=options.queue_messages
        )
        broker = EmbeddedBroker(options.host, options.port, limits)
        asyncio.run(_serve(broker, as_json=options.json))
    except RequestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


async def _serve(broker: EmbeddedBroker, *, as_json: bool) -> None:
    stop_wanted = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop_wanted.set)
    await broker.start()
    if as_json:
        _say(json.dumps({"host": broker.host, "port": broker.port, "pid": os.getpid()}))
    else:
        _say(f"MQTT broker on {broker.host} port {broker.port} (this machine only); Ctrl-C stops it")
    await stop_wanted.wait()
    await broker.stop()
    if as_json:
        _say(json.dumps(dataclasses.asdict(broker.statistics())))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
