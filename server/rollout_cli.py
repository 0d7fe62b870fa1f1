"""`whimbrel rollout …`: start rollouts, steer them, and be told why they are where they are."""

import argparse
import re
from typing import Any, Final

import msgspec

from protocol.errors import RequestError
from server import operations, rollout_orders
from server.actors import login
from server.arguments import integer
from server.display import Printer, bytes_text, instant_text, table
from server.operations import RolloutPlan, RolloutStatus
from server.rollouts.evidence import Rules
from server.rollouts.records import Decision, OrderAction, RolloutRecord
from server.rollouts.states import RolloutState
from server.rollouts.waves import Wave, parse_waves, plain_waves

_UNITS_MS: Final = {"": 1_000, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)")
_DURATION_MS_MAX: Final = 366 * 86_400_000
_COUNT_MAX: Final = 10_000_000
_SHUT_OUT_SHOWN_MAX: Final = 10

_NOT_SERVED: Final = "no server runs on this folder: this takes effect once `whimbrel serve` does"
_ORDERS: Final[dict[OrderAction, str]] = {
    "pause": "ask nobody else for now; devices that were asked go on by themselves",
    "resume": "go on with a paused rollout, and accept what paused it",
    "promote": "begin the next wave now, whatever this one has proved",
    "abort": "ask nobody else, for good; devices that have not begun keep what they run",
}


def add_parser(subparsers: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """`whimbrel rollout`."""
    rollout = subparsers.add_parser("rollout", help="start rollouts, steer them, and see how they go")
    actions = rollout.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, run: Any, text: str, **options: Any) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, parents=[common], help=text, **options)
        action.set_defaults(run=lambda arguments: run(arguments, show))
        return action

    _add_start(
        add(
            "start",
            _start,
            "bring a published release to the fleet",
            description="Bring a published release to the fleet, or back to one before: any version that is signed can be led to. docs/rollouts.md says how a rollout is decided.",
        )
    )
    for name, text in _ORDERS.items():
        order = add(name, lambda arguments, printer, name=name: _order(arguments, printer, name), text)
        _add_id(order)
        order.add_argument("--reason", default="", help="why, for those who come after you")
        order.add_argument("--by", default=login(), metavar="NAME", help="who you are (default: %(default)s)")
        order.add_argument(
            "--seen",
            type=integer(0, _COUNT_MAX),
            metavar="N",
            help="refuse if there are other orders than the N that you know of",
        )
    _add_id(add("why", _why, "explain every decision about a rollout, and what it waits for"))
    status = add("status", _status, "show one rollout, or all")
    status.add_argument("rollout", metavar="ID", nargs="?", help="for example r1")
    add("list", _status, "list all rollouts").set_defaults(rollout=None)


def add_label_action(actions: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """`whimbrel devices label`."""
    label = actions.add_parser(
        "label", parents=[common], help="give a device labels, by which waves of rollouts tell devices apart"
    )
    label.set_defaults(run=lambda arguments: _label(arguments, show))
    label.add_argument("device", metavar="DEVICE", help="identity, for example pi-1")
    label.add_argument("labels", metavar="LABEL", nargs="*", help="for example lab or site=berlin")
    label.add_argument(
        "--remove", metavar="LABEL", action="append", default=[], help="take it away; repeatable"
    )


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollout", metavar="ID", help="for example r1")


def _add_start(start: argparse.ArgumentParser) -> None:
    start.add_argument("family", metavar="FAMILY", help="model family, for example digits")
    start.add_argument("version", metavar="VERSION", help="for example 2.0")
    plan = start.add_mutually_exclusive_group()
    plan.add_argument(
        "--canary",
        metavar="N",
        type=integer(1, _COUNT_MAX),
        default=2,
        help="devices that go first, then all (default: %(default)s)",
    )
    plan.add_argument(
        "--waves",
        metavar="PLAN",
        help="waves instead, for example 3@label:lab,59,10%%,50%%,100%%; `proof` for as many as it takes to prove the release",
    )
    start.add_argument(
        "--soak",
        metavar="TIME",
        default="0",
        help="to wait after each wave, for example 30m or 1h,1d,0 for each of three waves",
    )
    start.add_argument(
        "--pace", metavar="N", type=integer(1, _COUNT_MAX), help="devices that are asked in a minute, at most"
    )
    start.add_argument(
        "--in-flight",
        metavar="N",
        type=_in_flight,
        help="devices that are under way at any time, at most, or `none` (default: half a percent of the fleet, at least 5)",
    )
    start.add_argument(
        "--wave-timeout",
        metavar="TIME",
        type=_duration,
        default=_duration("1h"),
        help="that a device may take, times of being held left out, before it counts as failed (default: 1h)",
    )
    start.add_argument(
        "--hold-max",
        metavar="TIME",
        type=_duration,
        default=_duration("1d"),
        help="that a device's own policy may hold it before it is passed over (default: 1d)",
    )
    _add_judgement(start)


def _add_judgement(start: argparse.ArgumentParser) -> None:
    start.add_argument(
        "--acceptable",
        metavar="RATE",
        type=_rate,
        default=0.01,
        help="failures that a good release may have (default: 1%%)",
    )
    start.add_argument(
        "--unacceptable",
        metavar="RATE",
        type=_rate,
        default=0.05,
        help="failures that a release must not have (default: 5%%)",
    )
    start.add_argument(
        "--max-failures",
        metavar="K",
        type=integer(0, _COUNT_MAX),
        help="failures in a wave at which it stops at the latest (default: left to the tests)",
    )
    start.add_argument(
        "--from",
        dest="from_version",
        metavar="VERSION",
        default="",
        help="only devices that run this version",
    )
    start.add_argument("--by", default=login(), metavar="NAME", help="who you are (default: %(default)s)")


# Commands


def _start(arguments: argparse.Namespace, show: Printer) -> int:
    soaks = [_duration_or_request(part) for part in arguments.soak.split(",")]
    waves = _waves(arguments, soaks)
    in_flight_max = arguments.in_flight
    if in_flight_max is None:
        in_flight_max = rollout_orders.usual_in_flight(arguments.dir, arguments.family)
    plan = RolloutPlan(
        waves=waves,
        rules=Rules(acceptable=arguments.acceptable, unacceptable=arguments.unacceptable),
        in_flight_max=in_flight_max or None,
        pace_per_minute=arguments.pace,
        hold_max_ms=arguments.hold_max,
        from_version=arguments.from_version,
        by=arguments.by,
    )
    record = operations.start_rollout(
        arguments.dir,
        arguments.family,
        arguments.version,
        canary_count=arguments.canary,
        wave_timeout_ms=arguments.wave_timeout,
        failures_max=arguments.max_failures,
        plan=plan,
    )
    is_served = operations.is_served(arguments.dir)
    limit = f"at most {record.in_flight_max} at a time" if record.in_flight_max else "all at a time"
    lines = [
        f"Rollout {record.id} of {record.family} {record.version}: {', '.join(wave.size_text for wave in record.plan)}, {limit}",
        f"Follow it with `whimbrel rollout status {record.id}` and `whimbrel rollout why {record.id}`"
        if is_served
        else f"Note: {_NOT_SERVED}",
    ]
    shut_out = operations.devices_shut_out(arguments.dir, record.family, record.version)
    lines += shut_out_lines(shut_out)
    value = {**msgspec.to_builtins(record), "is_served": is_served, "shut_out": shut_out}
    show(arguments, value, lines)
    return 0


def _waves(arguments: argparse.Namespace, soaks: list[int]) -> tuple[Wave, ...]:
    if arguments.waves is not None:
        return parse_waves(arguments.waves, soaks)
    text = ",".join(wave.size_text for wave in plain_waves(arguments.canary))
    return parse_waves(text, soaks)


def _order(arguments: argparse.Namespace, show: Printer, action: OrderAction) -> int:
    given = rollout_orders.order_rollout(
        arguments.dir,
        arguments.rollout,
        action,
        by=arguments.by,
        reason=arguments.reason,
        seen=arguments.seen,
    )
    is_served = operations.is_served(arguments.dir)
    lines = [f"Ordered: {action} {arguments.rollout} (order {given.order.number})"]
    if given.before is not None:
        lines.append(f"Before you: {rollout_orders.order_text(given.before, given.order.at_ms)}")
    if not is_served:
        lines.append(f"Note: {_NOT_SERVED}")
    show(arguments, {**msgspec.to_builtins(given), "is_served": is_served}, lines)
    return 0


def _why(arguments: argparse.Namespace, show: Printer) -> int:
    explanation = rollout_orders.explain_rollout(arguments.dir, arguments.rollout)
    record = explanation.rollout
    lines = [
        f"Rollout {record.id}: {record.family} {record.version}, {record.state}",
        f"Now: {explanation.standing}",
    ]
    if explanation.evidence:
        lines.append(f"Evidence: {explanation.evidence}")
    lines.append(_started_text(record))
    lines += [_decision_text(decision) for decision in explanation.decisions]
    lines += [
        f"Not carried out yet: {order.action} by {order.by}"
        for order in explanation.orders
        if not order.answer
    ]
    lines.append(f"Orders so far: {len(explanation.orders)}")
    show(arguments, msgspec.to_builtins(explanation), lines)
    return 0


def _status(arguments: argparse.Namespace, show: Printer) -> int:
    if arguments.rollout is None:
        statuses = operations.list_rollouts(arguments.dir)
        rows = [
            [
                status.rollout.id,
                status.rollout.family,
                status.rollout.version,
                _state_text(status.rollout),
                _counts(status),
                status.rollout.reason,
            ]
            for status in statuses
        ]
        lines = table(["ID", "FAMILY", "VERSION", "STATE", "DEVICES", "REASON"], rows)
        show(arguments, [_status_json(status) for status in statuses], lines or ["No rollout yet"])
        return 0
    status = operations.rollout_status(arguments.dir, arguments.rollout)
    value = {
        **_status_json(status),
        "orders": rollout_orders.count_orders(arguments.dir, arguments.rollout),
        "members": msgspec.to_builtins(status.members),
    }
    show(arguments, value, _status_lines(status))
    return 0


def _label(arguments: argparse.Namespace, show: Printer) -> int:
    labels = rollout_orders.label_device(arguments.dir, arguments.device, arguments.labels, arguments.remove)
    lines = [f"{labels.device}: {', '.join(labels.labels) or 'no label'}"]
    show(arguments, msgspec.to_builtins(labels), lines)
    return 0


# Output


def _status_json(status: RolloutStatus) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(status.rollout),
        "wave_name": status.rollout.current.name,
        "counts": status.counts,
    }


def _status_lines(status: RolloutStatus) -> list[str]:
    rollout = status.rollout
    lines = [
        f"Rollout {rollout.id}: {rollout.family} {rollout.version}, {_state_text(rollout)}"
        + (f": {rollout.reason}" if rollout.reason else ""),
        f"Devices: {_counts(status) or 'none asked yet'}",
    ]
    rows = []
    for member in status.members:
        update = member.update
        received = whole = "-"
        if update is not None:
            received, whole = bytes_text(update.received_bytes), bytes_text(update.full_bytes_total)
        told = [received, whole, member.code or "-", member.detail[:60]]
        rows.append([member.device, member.wave, member.status, *told])
    return lines + table(["DEVICE", "WAVE", "STATUS", "RECEIVED", "WHOLE FILES", "CODE", "DETAIL"], rows)


def _state_text(record: RolloutRecord) -> str:
    """Where it stands; while it is under way, in which wave."""
    if record.state not in {RolloutState.RUNNING, RolloutState.PAUSED}:
        return record.state
    return f"{record.state}, wave {record.wave + 1} of {len(record.plan)}"


def _counts(status: RolloutStatus) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(status.counts.items()))


def shut_out_lines(devices: list[str]) -> list[str]:
    """Who cannot take an encrypted release."""
    if not devices:
        return []
    shown = ", ".join(devices[:_SHUT_OUT_SHOWN_MAX]) + (", …" if len(devices) > _SHUT_OUT_SHOWN_MAX else "")
    return [
        f"Without a certificate of this server, {len(devices)} device(s) will refuse it: {shown}",
        "`whimbrel devices claim` lets a device ask for one",
    ]


def _started_text(record: RolloutRecord) -> str:
    who = f" by {record.created_by}" if record.created_by else ""
    plan = ", ".join(wave.size_text for wave in record.plan)
    return f"{instant_text(record.created_ms)}  start{who}: {plan}"


def _decision_text(decision: Decision) -> str:
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in decision.numbers.items() if value != "")
    text = f"{instant_text(decision.at_ms)}  {decision.action}: {decision.text}"
    return f"{text} [{numbers}]" if numbers else text


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Arguments


def _duration_or_request(text: str) -> int:
    try:
        return _duration(text.strip())
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"--soak: {error}", hint="for example 30m, or 1h,1d,0 for three waves") from error


def _duration(text: str) -> int:
    """A time such as 90, 90s, 15m, 2h or 1d, in milliseconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no time such as 90s, 15m, 2h or 1d")
    value_ms = round(float(found[1]) * _UNITS_MS[found[2]])
    if value_ms > _DURATION_MS_MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]} is longer than a year")
    return value_ms


def _rate(text: str) -> float:
    """A share such as 1% or 0.01."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share such as 1%") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not above 0% and below 100%")
    return value


def _in_flight(text: str) -> int:
    return 0 if text == "none" else integer(1, _COUNT_MAX)(text)
