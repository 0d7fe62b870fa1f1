"""What operators order of a rollout that is under way, and what they are told about it, as plain calls.

An order is a record in the store; the server carries it out, answers it, and notes the decision with who gave it and why. Orders are
numbered in one transaction each: of two operators who act at once the second one is told what the first one did.
"""

from pathlib import Path
from typing import Final

from msgspec import Struct

from protocol.errors import RequestError
from protocol.ids import DeviceId, parse_device_id
from server.home import opened
from server.rollouts import decisions
from server.rollouts.campaign import Campaign
from server.rollouts.records import (
    REASON_CHARS_MAX,
    Decision,
    Labels,
    MemberRecord,
    Order,
    OrderAction,
    RolloutRecord,
)
from server.rollouts.states import FINAL, RolloutTrigger, may
from server.rollouts.waves import parse_label

LABELS_MAX: Final = 16
"""Of one device."""

NAME_CHARS_MAX: Final = 128

IN_FLIGHT_MIN: Final = 5
IN_FLIGHT_SHARE: Final = 0.005
"""Of the family's devices: how many are asked at a time where nobody says, but at least `IN_FLIGHT_MIN`. It bounds what a bad release can do."""

_PAST: Final[dict[str, str]] = {
    "pause": "paused",
    "resume": "resumed",
    "promote": "promoted",
    "abort": "aborted",
}


class OrderConflictError(RequestError):
    """Another operator was first: their order is told, and this one was not given."""

    code = "request.conflict"


class Given(Struct, frozen=True, kw_only=True):
    """An order that was given.

    Attributes:
        order: It.
        before: The order before it, if there was one: whoever gives orders should know of it.
    """

    order: Order
    before: Order | None = None


class Explanation(Struct, frozen=True, kw_only=True):
    """Why a rollout is where it is.

    Attributes:
        rollout: It.
        standing: What it waits for, in words.
        evidence: What the outcomes say, in words; empty where failures are only counted.
        decisions: All that were taken, oldest first.
        orders: All that were given, oldest first.
    """

    rollout: RolloutRecord
    standing: str
    evidence: str
    decisions: list[Decision]
    orders: list[Order]


def order_rollout(
    folder: Path, rollout: str, action: OrderAction, *, by: str, reason: str = "", seen: int | None = None
) -> Given:
    """Order something of a rollout; the server acts.

    Args:
        folder: The server's.
        rollout: Which.
        action: What.
        by: Who orders it.
        reason: Why.
        seen: How many orders the operator knows of; any further one is a conflict. None: only one that the server has not answered yet.

    Raises:
        OrderConflictError: Another operator was first.
        RequestError: There is no such rollout, or it cannot do that where it stands.
    """
    if not by or len(by) > NAME_CHARS_MAX or not by.isprintable():
        raise RequestError(f"{by[:40]!r} is no name of an operator", hint="give yours with --by")
    if len(reason) > REASON_CHARS_MAX:
        raise RequestError(f"the reason has {len(reason)} characters, allowed are {REASON_CHARS_MAX}")
    what = f"order.{action}"
    with opened(folder) as home, home.attempting(what, rollout):
        now_ms = home.clock.now_ms()
        known: list[Order] = []

        def make(record: RolloutRecord | None, orders: list[Order]) -> Order:
            if record is None:
                raise RequestError(
                    f"there is no rollout {rollout[:80]!r}", hint="see `whimbrel rollout list`"
                )
            known[:] = orders
            _refuse_conflict(orders, seen, now_ms)
            _refuse_impossible(record, action, orders, now_ms)
            return Order(
                rollout=rollout, number=len(orders) + 1, action=action, by=by, at_ms=now_ms, reason=reason
            )

        order = home.store.order_rollout(
            rollout, make, lambda order: home.act(what, rollout, reason, operator=by, number=order.number)
        )
        return Given(order=order, before=known[-1] if known else None)


def usual_in_flight(folder: Path, family: str) -> int:
    """How many devices of a family are asked at a time where nobody says."""
    with opened(folder) as home:
        devices = sum(device.family == family for device in home.store.devices())
    return max(IN_FLIGHT_MIN, int(devices * IN_FLIGHT_SHARE))


def explain_rollout(folder: Path, rollout: str) -> Explanation:
    """Every decision about a rollout, and what it waits for.

    Raises:
        RequestError: There is no such rollout.
    """
    with opened(folder) as home:
        record = next((each for each in home.store.rollouts() if each.id == rollout), None)
        if record is None:
            raise RequestError(f"there is no rollout {rollout[:80]!r}", hint="see `whimbrel rollout list`")
        members: list[MemberRecord] = home.store.members(rollout)
        campaign = Campaign(record, members)
        return Explanation(
            rollout=record,
            standing=decisions.standing(campaign, home.clock.now_ms()),
            evidence="" if campaign.rates is None else decisions.rate_text(campaign.rates),
            decisions=home.store.decisions(rollout),
            orders=home.store.orders(rollout),
        )


def count_orders(folder: Path, rollout: str) -> int:
    """How many orders were given about a rollout: what `order_rollout` takes as seen."""
    with opened(folder) as home:
        return len(home.store.orders(rollout))


def label_device(folder: Path, device: str, add: list[str], remove: list[str]) -> Labels:
    """Change the labels of a device, by which waves tell devices apart; one that never reported can have some already.

    Raises:
        RequestError: A label cannot be spelled in a plan, or there are too many.
    """
    name: DeviceId = parse_device_id(device)
    wanted = {parse_label(label) for label in add}
    with opened(folder) as home:
        before = next((each.labels for each in home.store.labels() if each.device == name), ())
        labels = sorted((set(before) | wanted) - set(remove))
        if len(labels) > LABELS_MAX:
            raise RequestError(f"{device} would have {len(labels)} labels, allowed are {LABELS_MAX}")
        record = Labels(device=name, labels=tuple(labels))
        if record.labels != before:
            home.store.label(record, [home.act("device.label", name, labels=", ".join(labels))])
        return record


def list_labels(folder: Path) -> dict[DeviceId, tuple[str, ...]]:
    """The labels of all devices that have some."""
    with opened(folder) as home:
        return {each.device: each.labels for each in home.store.labels() if each.labels}


def order_text(order: Order, now_ms: int) -> str:
    """Who did what, how long ago, and why."""
    why = f": {order.reason}" if order.reason else ""
    return f"{order.by} {_PAST[order.action]} it {max(0, now_ms - order.at_ms) / 1000:.1f} s ago{why}"


def _refuse_conflict(orders: list[Order], seen: int | None, now_ms: int) -> None:
    if seen is None:
        news = [order for order in orders if not order.answer]
        hint = "the server has not acted on it yet; see `whimbrel rollout why`, then order again"
    else:
        news = orders[seen:]
        hint = f"you had seen {seen} orders, there are {len(orders)}: see `whimbrel rollout why`, then order again"
    if news:
        raise OrderConflictError("; ".join(order_text(order, now_ms) for order in news), hint=hint)


def _refuse_impossible(record: RolloutRecord, action: OrderAction, orders: list[Order], now_ms: int) -> None:
    last_wave = action == "promote" and record.wave >= len(record.plan) - 1
    if may(record.state, RolloutTrigger(action)) and not last_wave:
        return
    done = [order for order in orders if order.answer == "done"]
    said = f"{record.id} is {record.state}"
    if done:
        said += f": {order_text(done[-1], now_ms)}"
    elif record.reason:
        said += f": {record.reason}"
    if record.state in FINAL:
        hint = "it is over; start another one"
    elif last_wave:
        said, hint = f"the last wave of {record.id} is under way", "there is nothing to promote it to"
    else:
        hint = f"it cannot {action} where it stands; `abort` is possible"
    error = OrderConflictError if done else RequestError
    raise error(said, hint=hint)
