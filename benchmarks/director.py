"""What the signatures under a wish cost: to a server that signs it, and to a device that verifies it.

python -m benchmarks.director [--rounds 2000]
"""

import argparse
import time
from collections.abc import Callable

from protocol.director import received_statement
from protocol.ids import DeviceId, FleetId
from protocol.messages import Desired, decode_desired, encode_message
from protocol.topics import Topics
from protocol.trust import is_signed
from simulator.models import publisher_of

TOPIC = Topics(FleetId("bench")).desired(DeviceId("device-1"))
WISH = Desired(sequence=1, rollout="rollout-1", family="digits", version="v2")
NOW_MS = 1_800_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000, help="default: 2000")
    rounds = parser.parse_args().rounds
    publisher = publisher_of(1)
    director = publisher.director(publisher.create(NOW_MS).repository)
    payload = director.seal(TOPIC, WISH, NOW_MS)
    received = decode_desired(payload)
    statement = received_statement(TOPIC, received)
    assert is_signed(director.public, statement, received.signature)
    print(f"wish: {len(encode_message(WISH))} bytes, signed {len(payload)}")
    print(f"seal: {per_call_us(lambda: director.seal(TOPIC, WISH, NOW_MS), rounds):.0f} us of processor time")
    verify_us = per_call_us(lambda: is_signed(director.public, statement, received.signature), rounds)
    print(f"verify: {verify_us:.0f} us of processor time")


def per_call_us(work: Callable[[], object], rounds: int) -> float:
    begun = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - begun) / rounds * 1e6


if __name__ == "__main__":
    main()
