"""Back-of-envelope answers about a fleet: bytes, hours, dollars, broker load, server work. Pure formulas; nothing is simulated.

Units: 1 KB = 1,000 bytes, 1 MB = 1,000,000 bytes. What a formula leaves out stands in its docstring; `estimate_check` compares
them with the simulator.
"""

import math
from collections.abc import Callable
from typing import Annotated, Final

from msgspec import Meta, Struct

from device.download import PATIENCE_FIRST_MS
from device.reconnect import RECONNECT_BASE_S, RECONNECT_CAP_S
from protocol.chunks import chunk_count, index_lengths
from protocol.constants import CHUNK_BYTES, CHUNK_HEADER_BYTES, GROUP_CHUNKS
from simulator.network import HEADER_BYTES, SEGMENT_BYTES

SECONDS_PER_HOUR: Final = 3_600.0
HOURS_PER_DAY: Final = 24.0
DAYS_PER_MONTH: Final = 30

CHUNK_ENVELOPE_BYTES: Final = CHUNK_HEADER_BYTES + 100
"""The chunk's own header, and MQTT's: 5 bytes, and a topic of 90 to 100 (SPEC section 4.3)."""

DOCUMENT_BYTES: Final = 6_700
"""Timestamp, snapshot, targets, the documents of the family and of the artifacts, the desired state and the release's description with a few prompts, headers included."""

DOCUMENT_MESSAGES: Final = 7
"""As many messages."""

DESCRIPTION_MESSAGES: Final = 1
"""The release's description, which travels as a chunk of its own."""

REPORT_MESSAGES: Final = 7
"""A device says that it is there and what it runs, and reports on the way of an update."""

REPORT_BYTES: Final = 800
"""A report on the air."""

RETAINED_PER_DEVICE_BYTES: Final = 1_000
"""The last report, the desired state and the state of the link of one device (SPEC section 4)."""

ROUND_TRIPS: Final = 12
"""Of an update: subscriptions to metadata and to one group after the other, and reports."""

DEVICE_BYTES_PER_S: Final = 6_000_000
"""Of the result: decoding a delta, writing it, and reading it back twice; a Raspberry Pi class device."""

TRIAL_S: Final = 1.0
"""Loading the model and answering the golden prompts, for small models."""

STORM_STEP_S: Final = 0.05
STORM_ATTEMPTS_MAX: Final = 400
STORM_OUTAGE_S_MAX: Final = 600.0
"""By then every window is at its cap, and longer outages change nothing."""

INTERRUPTIONS_MAX: Final = 200.0
"""With more the sum of waits is within a tenth of its mean."""

QUANTILE_STEPS: Final = 60

Positive = Annotated[float, Meta(gt=0, le=1e12)]
NotNegative = Annotated[float, Meta(ge=0, le=1e12)]


class FleetPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known, or assumed. The prices are examples to be replaced: nobody's price list."""

    devices: Annotated[int, Meta(ge=1, le=1_000_000_000, description="devices in the fleet")] = 10_000
    model_mb: Annotated[float, Meta(gt=0, le=1e6, description="a model file")] = 100.0
    delta_percent: Annotated[float, Meta(gt=0, le=100, description="a delta's share of the model file")] = 4.0
    link_kb_per_s: Annotated[float, Meta(gt=0, le=1e7, description="of a device, while it is online")] = 64.0
    loss_percent: Annotated[float, Meta(ge=0, le=90, description="packets that are lost and sent again")] = (
        1.0
    )
    latency_ms: Annotated[float, Meta(ge=0, le=60_000, description="one way")] = 50.0
    online_hours: Annotated[float, Meta(gt=0, le=24, description="with a link, a day, in the mean")] = 24.0
    sessions_per_day: Annotated[float, Meta(gt=0, le=10_000, description="stretches with a link, a day")] = (
        1.0
    )
    site_devices: Annotated[int, Meta(ge=1, le=1_000_000, description="devices behind one site broker")] = 1
    canary: Annotated[int, Meta(ge=1, le=10_000_000, description="devices of the canary wave")] = 100
    bad_percent: Annotated[float, Meta(gt=0, le=100, description="share that a bad release fails on")] = 2.0
    releases_per_month: Annotated[
        float, Meta(ge=0, le=10_000, description="updates of each device a month")
    ] = 1.0
    price_per_gb: Annotated[NotNegative, Meta(description="metered traffic, an example")] = 1.0
    price_per_million_messages: Annotated[NotNegative, Meta(description="at the broker, an example")] = 1.0
    price_per_million_minutes: Annotated[NotNegative, Meta(description="of connection, an example")] = 0.1
    broker_mb_per_s: Annotated[float, Meta(gt=0, le=1e9, description="that the broker can send")] = 125.0
    keep_alive_s: Annotated[float, Meta(ge=5, le=65_535, description="between two pings")] = 1_200.0
    outage_s: Annotated[float, Meta(gt=0, le=86_400, description="that the broker is away")] = 60.0

    @property
    def delta_bytes(self) -> float:
        """Bytes of one delta."""
        return self.model_mb * 1e6 * self.delta_percent / 100

    @property
    def online_share(self) -> float:
        """Share of the time with a link."""
        return self.online_hours / HOURS_PER_DAY


class Line(Struct, frozen=True, kw_only=True):
    """One figure and how it came about."""

    group: str
    name: str  # with the unit last
    value: float
    working: str


def on_air_bytes(byte_count: float, loss: float) -> float:
    """Bytes on the link for a file of `byte_count` bytes, sent as chunks.

    `(file + index + chunks x envelope) x (1 + 40 / 1460) / (1 - loss)`: the chunk's header and topic, TCP and IP headers of every
    segment, and a repetition for every lost packet. Left out: TLS records (half a per mille) and TCP acknowledgements.

    Args:
        byte_count: Length of the delta or model.
        loss: Share of packets, below 1.
    """
    index = sum(index_lengths(math.ceil(byte_count)))
    payload = byte_count + index + chunks_of(byte_count) * CHUNK_ENVELOPE_BYTES
    return payload * (1 + HEADER_BYTES / SEGMENT_BYTES) / (1 - loss)


def chunks_of(byte_count: float) -> int:
    """Messages that carry a file: its chunks, and those of its index."""
    length = math.ceil(byte_count)
    return chunk_count(length) + sum(chunk_count(each) for each in index_lengths(length))


def update_bytes(byte_count: float, loss: float) -> float:
    """Bytes to one device for one update: the file, metadata, desired state and description."""
    return on_air_bytes(byte_count, loss) + DOCUMENT_BYTES / (1 - loss)


def busy_seconds(plan: FleetPlan, byte_count: float) -> float:
    """Seconds online that one update takes: transfer at the link's rate, round trips, applying and trial.

    Assumes that the link is the bottleneck, not the broker; `wave_hours` looks at the broker. Each lost packet costs TCP at least its timeout of
    0.2 s where nothing else is under way, which is left out.
    """
    transfer_s = update_bytes(byte_count, plan.loss_percent / 100) / (plan.link_kb_per_s * 1_000)
    return (
        transfer_s
        + ROUND_TRIPS * 2 * plan.latency_ms / 1_000
        + plan.model_mb * 1e6 / DEVICE_BYTES_PER_S
        + TRIAL_S
    )


def elapsed_hours(plan: FleetPlan, busy_s: float, share: float) -> float:
    """Hours from the request until `share` of the devices have had `busy_s` seconds online.

    Stretches with and without a link are exponential with the means that the plan gives, which makes their number a Poisson variable: a device
    is offline when asked with the probability `1 - online share`, and is interrupted `busy / useful stretch` times on average. Each
    interruption costs an exponential wait, so the sum of `k` of them is an Erlang variable; beyond 200 interruptions the mean is taken. A stretch begins with half the cap of
    the reconnection jitter, during which nothing comes. Real links follow the day; then the tail is shorter.
    """
    if plan.online_hours >= HOURS_PER_DAY:
        return busy_s / SECONDS_PER_HOUR
    on_s = plan.online_hours * SECONDS_PER_HOUR / plan.sessions_per_day
    off_s = (HOURS_PER_DAY - plan.online_hours) * SECONDS_PER_HOUR / plan.sessions_per_day
    useful_s = on_s * (1 - math.exp(-RECONNECT_CAP_S / on_s)) * on_s / RECONNECT_CAP_S
    interruptions = busy_s / useful_s
    off_at_first = 1 - plan.online_share
    if interruptions > INTERRUPTIONS_MAX:
        waits_s = (interruptions + off_at_first) * (off_s + RECONNECT_CAP_S / 2)
        return (busy_s + waits_s) / SECONDS_PER_HOUR

    def reached(hours: float) -> float:
        left_s = hours * SECONDS_PER_HOUR - busy_s
        return (
            _compound(left_s, interruptions, off_s + RECONNECT_CAP_S / 2, off_at_first)
            if left_s >= 0
            else 0.0
        )

    return _inverse(reached, share)


def _compound(left_s: float, mean: float, off_s: float, off_at_first: float) -> float:
    """Probability that `Poisson(mean)` exponential waits, and one more with a given probability, take at most `left_s`."""
    chance, total, erlang_tail, term = math.exp(-mean), 0.0, 0.0, math.exp(-left_s / off_s)
    for count in range(int(mean + 10 * math.sqrt(mean)) + 20):
        with_one_more = erlang_tail + term  # P(Erlang(count + 1) > left)
        total += chance * ((1 - off_at_first) * (1 - erlang_tail) + off_at_first * (1 - with_one_more))
        erlang_tail = with_one_more
        term *= left_s / off_s / (count + 1)
        chance *= mean / (count + 1)
    return total


def _inverse(share_of: Callable[[float], float], share: float) -> float:
    high = 1.0
    while share_of(high) < share and high < 1e7:
        high *= 2
    low = 0.0
    for _ in range(QUANTILE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of(middle) < share else (low, middle)
    return high


def wave_hours(plan: FleetPlan, devices: int, byte_count: float) -> float:
    """Hours until the last of `devices` that were asked together is done: the quantile `n / (n + 1)`, or what the broker needs for them."""
    link_h = elapsed_hours(plan, busy_seconds(plan, byte_count), devices / (devices + 1))
    total = devices / plan.site_devices * update_bytes(byte_count, plan.loss_percent / 100)
    return max(link_h, total / (plan.broker_mb_per_s * 1e6) / SECONDS_PER_HOUR)


def reconnects_per_s(devices: int, outage_s: float) -> float:
    """Most reconnections within one second after a broker comes back, with the jitter that devices have (`device.reconnect`).

    Attempt `k` comes `U(0, min(cap, base x 2^k))` after the one before. The densities are convolved on a grid; what falls behind the end of
    the outage is the storm. Rule of thumb: devices / outage for outages up to 30 s, and devices / 30 for longer ones.
    """
    outage_s = min(outage_s, STORM_OUTAGE_S_MAX)
    step_s = max(STORM_STEP_S, outage_s / 2_000)
    down = math.ceil(outage_s / step_s)
    length = down + math.ceil(RECONNECT_CAP_S / step_s) + 1
    waiting = [1.0] + [0.0] * (down - 1)  # instants of the last attempt that failed
    arrived = [0.0] * length
    for attempt in range(STORM_ATTEMPTS_MAX):
        window = max(1, round(min(RECONNECT_BASE_S * 2.0**attempt, RECONNECT_CAP_S) / step_s))
        steps = [0.0] * (length + 1)
        for at, chance in enumerate(waiting):
            steps[at + 1] += chance / window
            steps[min(at + 1 + window, length)] -= chance / window
        density, running = [], 0.0
        for each in steps[:length]:
            running += each
            density.append(max(0.0, running))
        for at in range(down, length):
            arrived[at] += density[at]
        waiting = density[:down]
        if sum(waiting) < 1e-6:
            break
    second = max(1, round(1 / step_s))
    return devices * max(sum(arrived[at : at + second]) for at in range(down, length))


def canary_detects(bad_share: float, canary: int) -> float:
    """Probability that a canary of `canary` random devices holds at least one on which the release fails: `1 - (1 - p)^n`."""
    return 1 - (1 - bad_share) ** canary


def canary_needed(bad_share: float, confidence: float) -> int:
    """Devices that a canary needs to hold at least one bad one with the probability `confidence`: `ln(1 - c) / ln(1 - p)`."""
    return 1 if bad_share >= 1 else math.ceil(math.log(1 - confidence) / math.log(1 - bad_share))


def estimate(plan: FleetPlan) -> tuple[Line, ...]:
    """All figures of a plan, each with its working, in the order in which one would say them."""
    return (
        *_byte_lines(plan),
        *_hour_lines(plan),
        *_broker_lines(plan),
        *_server_lines(plan),
        *_dollar_lines(plan),
        *_rollout_lines(plan),
    )


def _byte_lines(plan: FleetPlan) -> list[Line]:
    model, delta, loss = plan.model_mb * 1e6, plan.delta_bytes, plan.loss_percent / 100
    full_update, delta_update = update_bytes(model, loss), update_bytes(delta, loss)
    wan = delta_update * plan.devices / plan.site_devices
    envelope = f"+ {chunks_of(delta):,} chunk messages x {CHUNK_ENVELOPE_BYTES} B + {DOCUMENT_BYTES / 1e3:.1f} KB metadata"
    air = f"x {1 + HEADER_BYTES / SEGMENT_BYTES:.3f} TCP/IP / {1 - loss:.2f} loss"
    return [
        Line(group="bytes", name="delta_bytes", value=delta, working=f"{plan.model_mb:,.1f} MB x {plan.delta_percent:g} % = {size(delta)}"),
        Line(group="bytes", name="update_bytes", value=delta_update, working=f"{size(delta)} {envelope}, {air} = {size(delta_update)} a device"),
        Line(group="bytes", name="full_update_bytes", value=full_update, working=f"the whole file instead: {size(full_update)} a device, {full_update / delta_update:.1f} times as much"),
        Line(group="bytes", name="fleet_bytes", value=wan, working=f"{size(delta_update)} x {plan.devices:,} devices / {plan.site_devices:,} behind one link = {size(wan)}"),
        Line(group="bytes", name="flash_bytes", value=model + delta, working=f"written on a device with two slots: {size(model)} + {size(delta)} = {size(model + delta)}; in place about {size(2 * model + delta)} if every block changes"),
    ]  # fmt: skip


def _hour_lines(plan: FleetPlan) -> list[Line]:
    delta_s, full_s = busy_seconds(plan, plan.delta_bytes), busy_seconds(plan, plan.model_mb * 1e6)
    update = update_bytes(plan.delta_bytes, plan.loss_percent / 100)
    canary = min(plan.canary, plan.devices)
    rest = plan.devices - canary
    canary_h = wave_hours(plan, canary, plan.delta_bytes)
    rest_h = wave_hours(plan, rest, plan.delta_bytes) if rest else 0.0
    p50, p95 = (elapsed_hours(plan, delta_s, share) for share in (0.5, 0.95))
    full_p95 = elapsed_hours(plan, full_s, 0.95)
    chunk_s = (CHUNK_BYTES + CHUNK_ENVELOPE_BYTES) / (plan.link_kb_per_s * 1_000)
    online = f"{plan.online_hours:g} h online a day in {plan.sessions_per_day:g} stretch{'es' if plan.sessions_per_day != 1 else ''}"
    slow = f"a chunk takes {chunk_s:,.0f} s, longer than the {PATIENCE_FIRST_MS // 1_000} s after which a device asks again: configure link_kb_per_s there, which makes it wait for three chunks, or bytes come several times"
    return [
        *([Line(group="hours", name="chunk_s", value=chunk_s, working=slow)] if chunk_s * 1_000 > PATIENCE_FIRST_MS else []),
        Line(group="hours", name="online_s", value=delta_s, working=f"{size(update)} / {plan.link_kb_per_s:g} KB/s + {ROUND_TRIPS} round trips + apply and trial = {duration(delta_s)} online; the whole file {duration(full_s)}"),
        Line(group="hours", name="p50_hours", value=p50, working=f"{duration(delta_s)} of link, {online}: half of a wave within {duration(p50 * SECONDS_PER_HOUR)}"),
        Line(group="hours", name="p95_hours", value=p95, working=f"95 % within {duration(p95 * SECONDS_PER_HOUR)}; with whole files {duration(full_p95 * SECONDS_PER_HOUR)}"),
        Line(group="hours", name="rollout_hours", value=canary_h + rest_h, working=f"last of {canary:,} canaries {duration(canary_h * SECONDS_PER_HOUR)} + last of {rest:,} others {duration(rest_h * SECONDS_PER_HOUR)}, before any soak"),
    ]  # fmt: skip


def _broker_lines(plan: FleetPlan) -> list[Line]:
    connections = plan.devices * plan.online_share
    wanted = connections / plan.site_devices * plan.link_kb_per_s * 1e3
    sent = min(wanted, plan.broker_mb_per_s * 1e6)
    per_s = sent / (CHUNK_BYTES + CHUNK_ENVELOPE_BYTES)
    retained = plan.delta_bytes + plan.devices * RETAINED_PER_DEVICE_BYTES
    pings = connections / plan.keep_alive_s
    storm = reconnects_per_s(plan.devices, plan.outage_s)
    return [
        Line(group="broker", name="connections", value=connections, working=f"{plan.devices:,} x {plan.online_share:.0%} online = {connections:,.0f}"),
        Line(group="broker", name="wave_bytes_per_s", value=sent, working=f"all online fetch at once: {size(wanted)}/s wanted, {size(sent)}/s sent (the broker's line has {plan.broker_mb_per_s:g} MB/s)"),
        Line(group="broker", name="wave_messages_per_s", value=per_s, working=f"{size(sent)}/s / {(CHUNK_BYTES + CHUNK_ENVELOPE_BYTES) / 1e3:.1f} KB = {per_s:,.0f} chunk messages/s; pings add {pings:,.1f}/s"),
        Line(group="broker", name="retained_bytes", value=retained, working=f"{size(plan.delta_bytes)} delta + {plan.devices:,} x {RETAINED_PER_DEVICE_BYTES / 1e3:g} KB report and request = {size(retained)}"),
        Line(group="broker", name="storm_without_jitter_per_s", value=float(plan.devices), working=f"all return at one instant: {plan.devices:,} connections within a second"),
        Line(group="broker", name="storm_per_s", value=storm, working=f"full jitter, {plan.outage_s:g} s away: {storm:,.0f} connections in the worst second (1 in {plan.devices / storm:,.0f} of the fleet)"),
    ]  # fmt: skip


def _server_lines(plan: FleetPlan) -> list[Line]:
    chunks = chunks_of(plan.delta_bytes) + DESCRIPTION_MESSAGES
    answers = chunks * plan.devices
    requests = math.ceil(chunks / GROUP_CHUNKS) * plan.devices
    reports = REPORT_MESSAGES * plan.devices
    sent = plan.delta_bytes * plan.devices
    return [
        Line(group="server", name="cached_publishes", value=float(chunks), working=f"cached by the broker: {chunks:,} chunks published once, whatever the number of devices"),
        Line(group="server", name="reply_publishes", value=float(answers), working=f"a reply to each device: {chunks:,} x {plan.devices:,} = {answers:,} publishes, {size(sent)}, and {requests:,} requests"),
        Line(group="server", name="reports", value=float(reports), working=f"reports in any case: {plan.devices:,} x {REPORT_MESSAGES} = {reports:,} messages, {size(reports * REPORT_BYTES)}"),
    ]  # fmt: skip


def _dollar_lines(plan: FleetPlan) -> list[Line]:
    gigabytes = (
        plan.devices / plan.site_devices * update_bytes(plan.delta_bytes, plan.loss_percent / 100) / 1e9
    )
    full = plan.devices / plan.site_devices * update_bytes(plan.model_mb * 1e6, plan.loss_percent / 100) / 1e9
    traffic = gigabytes * plan.price_per_gb
    messages = plan.devices * (chunks_of(plan.delta_bytes) + DOCUMENT_MESSAGES + REPORT_MESSAGES) / 1e6
    minutes = plan.devices * plan.online_share * DAYS_PER_MONTH * HOURS_PER_DAY * 60 / 1e6
    release = traffic + messages * plan.price_per_million_messages
    connected = minutes * plan.price_per_million_minutes
    month = release * plan.releases_per_month + connected
    return [
        Line(group="dollars", name="traffic_dollars", value=traffic, working=f"{gigabytes:,.2f} GB x {plan.price_per_gb:g} = {traffic:,.2f} a release; whole files {full * plan.price_per_gb:,.2f}"),
        Line(group="dollars", name="message_dollars", value=release - traffic, working=f"{messages:,.2f} million messages x {plan.price_per_million_messages:g} = {release - traffic:,.2f} a release"),
        Line(group="dollars", name="month_dollars", value=month, working=f"{release:,.2f} x {plan.releases_per_month:g} releases + {minutes:,.1f} million minutes x {plan.price_per_million_minutes:g} = {month:,.2f} a month (prices are examples)"),
    ]  # fmt: skip


def _rollout_lines(plan: FleetPlan) -> list[Line]:
    share = plan.bad_percent / 100
    canary = min(plan.canary, plan.devices)
    found, needed = canary_detects(share, canary), canary_needed(share, 0.95)
    return [
        Line(group="rollout", name="canary_detects", value=found, working=f"a canary of {canary:,} meets a fault of {plan.bad_percent:g} % of the devices with 1 - {1 - share:.3f}^{canary} = {found:.1%}"),
        Line(group="rollout", name="canary_needed", value=float(needed), working=f"95 % need ln(0.05) / ln({1 - share:.3f}) = {needed:,} devices"),
    ]  # fmt: skip


def size(byte_count: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if byte_count >= factor:
            return f"{byte_count / factor:,.2f} {unit}"
    return f"{byte_count:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:,.1f} s"
