"""What a live run was asked to do."""

from dataclasses import dataclass
from pathlib import Path

from simulator.live.models import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for.

    Attributes:
        devices: How many.
        seed: Decides links and faults.
        broker: `embedded`, `mosquitto` or HOST:PORT.
        kind: Which example.
        models: Folder with models that are built already; None builds the digits.
        folder: Where everything lives; None makes a temporary folder.
        keep: Leave the temporary folder behind.
        phase_s_max: How long a rollout may take.
        command: That repeats the run.
    """

    devices: int
    seed: int
    broker: str
    kind: Kind
    models: Path | None
    folder: Path | None
    keep: bool
    phase_s_max: int
    command: str
