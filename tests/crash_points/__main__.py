"""The power goes after every system call of an update, and again during the recovery; every image that may be left is started from.

Where a moment can leave more images than are asked for, they are drawn from the seed, and the table says so. After each start a verified
model must answer, and nothing that was written down before may be forgotten: version floors, requests, boots, releases that failed.
For each kind of start that is found, the device also goes on to the end of the update: what was asked for runs, no chunk that was
durable is fetched again, and nothing is left on the disk that nothing leads to.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from device.states import State
from tests.crash_points.campaign import Campaign, Place, Tally
from tests.crash_points.updates import UPDATES, small_steps

SECOND_SHARE = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash_points", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="images (default: %(default)s)")
    parser.add_argument(
        "--second",
        type=int,
        help="images of a second power cut, during a recovery (default: a fifth of COUNT)",
    )
    parser.add_argument("--seed", type=int, default=1, help="decides what is drawn (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, action="append", help="only this one; repeat")
    parser.add_argument("--replay", type=Place.parse, help="one image, as a violation names it")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(argv)
    with small_steps():
        if given.replay is not None:
            campaign = Campaign(given.seed, [given.replay.update])
            tally = campaign.replay(given.replay)
            sys.stdout.write(_violations(tally, given.seed) or f"{given.replay}: nothing is wrong\n")
            return 1 if tally.violations else 0
        began = time.monotonic()
        campaign = Campaign(given.seed, given.update or ())
        second = given.count // SECOND_SHARE if given.second is None else given.second
        tally = campaign.run(
            given.count, second, given.workers, _show if sys.stderr.isatty() else lambda _: None
        )
    seconds = time.monotonic() - began
    sys.stdout.write(_json(tally, given.seed, seconds) if given.json else summary(campaign, tally, seconds))
    return 1 if tally.violation_count else 0


def _show(tally: Tally) -> None:
    sys.stderr.write(f"\r{tally.images} images, {tally.second_images} of a second power cut ")


def summary(campaign: Campaign, tally: Tally, seconds: float) -> str:
    """The table that is printed."""
    moments = sum(len(course.moments) for course in campaign.courses.values())
    few = sum(each.is_exhaustive for course in campaign.courses.values() for each in course.choices)
    order = [state.value for state in State if tally.states[state.value]]
    lines = [
        "",
        f"seed                          {campaign.seed}",
        f"moments of {len(campaign.courses):>2} updates         {moments}",
        f"  with few enough images      {few}",
        f"  of which all were tried     {tally.exhausted}",
        f"crash images                  {tally.images}",
        f"  distinct                    {len(tally.seen)}",
        f"recoveries cut again          {tally.recoveries}",
        f"crash images of those         {tally.second_images}",
        f"  distinct                    {len(tally.second_seen)}",
        f"starts carried out            {tally.starts}",
        f"updates brought to their end  {tally.finished}",
        f"violations                    {tally.violation_count}",
        f"seconds                       {seconds:.0f}",
        f"images a second               {(tally.images + tally.second_images) / max(seconds, 0.001):.0f}",
        "images by update",
        *(f"  {name:<28}{tally.updates[name]}" for name in campaign.courses),
        "images by state of the agent when the power went",
        *(f"  {name:<28}{tally.states[name]}" for name in order),
        "images by the last system call",
        *(f"  {name:<28}{count}" for name, count in tally.calls.most_common()),
        "",
    ]
    return "\n".join(lines) + _violations(tally, campaign.seed)


def _violations(tally: Tally, seed: int) -> str:
    return "".join(
        f"VIOLATION after {call}: {wrong}\n  python -m tests.crash_points --seed {seed} --replay {place}\n"
        for place, call, wrong in tally.violations
    )


def _json(tally: Tally, seed: int, seconds: float) -> str:
    fields = {
        "seed": seed,
        "seconds": seconds,
        "images": tally.images,
        "images_distinct": len(tally.seen),
        "recoveries": tally.recoveries,
        "second_images": tally.second_images,
        "second_images_distinct": len(tally.second_seen),
        "starts": tally.starts,
        "finished": tally.finished,
        "exhausted_moments": tally.exhausted,
        "updates": tally.updates,
        "states": tally.states,
        "calls": tally.calls,
        "violation_count": tally.violation_count,
        "violations": [(str(place), call, wrong) for place, call, wrong in tally.violations],
    }
    return json.dumps(fields) + "\n"


if __name__ == "__main__":
    sys.exit(main())
