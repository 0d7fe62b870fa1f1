"""What a device is doing, in the few words that every output uses. Pure."""

from typing import Final

RESTING: Final = frozenset({"idle", "rejected", "rolled_back", "failed"})
"""States in which no update is under way."""

DOWN: Final = "down"
"""Stands for the state of a device whose process was killed and has not been started again."""


def moment(state: str) -> str:
    """In which moment of an update something happened, as part of a sentence."""
    return {"trial": "in its trial", "suspended": "while offline"}.get(
        state, f"while {state.replace('_', ' ')}"
    )


def band(state: str, version: str, *, is_down: bool = False) -> str:
    """What a device is doing, in few words that a person understands."""
    if is_down or state == DOWN:
        return "killed"
    match state:
        case "syncing" | "admitting" | "downloading":
            return "fetching"
        case "suspended":
            return "offline"
        case "installing" | "verifying":
            return "installing"
        case "trial" | "committing":
            return "trial"
        case "rolling_back" | "rolled_back":
            return "rolled back"
    return f"runs {version}"
