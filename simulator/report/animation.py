"""The animated fleet: what single devices did, packed for the script of the page. Pure."""

import base64
from pathlib import Path
from typing import Final

from simulator.report.fleet_bands import band_of, classes_of
from simulator.report.timescale import TimeScale
from simulator.results import FleetRecording, FleetResult

SCRIPT: Final = Path(__file__).with_name("animation.js")
_CONTINUES: Final = 0x80


def animation_data(result: FleetResult, recording: FleetRecording, scale: TimeScale) -> dict[str, object]:
    """What the script needs, as values that become JSON.

    `changes` is base64 of one group per change in order of time, each number as LEB128: milliseconds since the change
    before, dot, band. Dots are ordered by kind of device.
    """
    tracks = recording.tracks
    order = sorted(range(len(tracks.kinds)), key=lambda index: (tracks.kinds[index], index))
    dots = {index: dot for dot, index in enumerate(order)}
    classes = classes_of(result.scenario)
    names = [name for name in classes if name in {band_of(label) for label in recording.labels}]
    bands = [names.index(band_of(label)) for label in recording.labels]
    packed, before_ms = bytearray(), 0
    now = [bands[0]] * len(order)
    for at_ms, device, label in zip(tracks.at_ms, tracks.device, tracks.label, strict=True):
        dot, band = dots[device], bands[label]
        if now[dot] != band:
            now[dot] = band
            for value in (at_ms - before_ms, dot, band):
                _append(packed, value)
            before_ms = at_ms
    return {
        "bands": [{"name": name, "kind": classes[name]} for name in names],
        "first": bands[0],
        "numbers": [result.scenario.first_device + index * tracks.stride for index in order],
        "groups": [{"name": kind, "count": tracks.kinds.count(kind)} for kind in sorted(set(tracks.kinds))],
        "knots": [[round(at_s * 1_000), round(position, 5)] for at_s, position in scale.knots],
        "zero": round(scale.zero_s * 1_000),
        "changes": base64.b64encode(packed).decode(),
    }


def _append(packed: bytearray, value: int) -> None:
    while value >= _CONTINUES:
        packed.append(value & (_CONTINUES - 1) | _CONTINUES)
        value >>= 7
    packed.append(value)
