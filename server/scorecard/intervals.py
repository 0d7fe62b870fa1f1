"""Estimates and what bounds them, for people. Pure."""

from server.scorecard.statistics import Interval, Quantile


def share_text(share: Interval | None) -> tuple[str, str]:
    """A share and its interval."""
    if share is None:
        return "-", "-"
    return f"{100 * share.value:.1f} %", f"{100 * share.low:.1f} to {100 * share.high:.1f} %"


def change_text(change: Interval) -> tuple[str, str]:
    """A difference of shares and its interval, in percentage points."""
    return f"{100 * change.value:+.1f}", f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"


def quantile_text(found: Quantile) -> str:
    """A latency with what bounds it."""
    high = "no bound" if found.high is None else f"{found.high:.2f}"
    low = "no bound" if found.low is None else f"{found.low:.2f}"
    return f"{found.value:.2f} ms ({low} to {high})"


def nats_text(mean: Interval) -> tuple[str, str]:
    """A mean divergence and its interval, in nats."""
    return f"{mean.value:.4f}", f"{mean.low:.4f} to {mean.high:.4f}"
