"""Inference on a simulated device: how a model answers, how fast, and in how much memory depends on its release.

Which release a file is, is decided by its bytes as they are on the disk now; a file that is none loads nowhere.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from device.ports import Model, ModelSource, TrialOrder
from protocol.errors import EngineError
from protocol.messages import LatencySummary, TrialEvidence
from protocol.release import ClassPrompt, HealthPlan, Prompt
from simulator.disk import Extent, SimulatedDisk
from simulator.loop import US_PER_MS, US_PER_S
from simulator.power import PowerCutError
from simulator.scenario import ReleaseKind

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice

LOAD_MS: Final = 300
"""Start of a runtime, whatever the model."""

TRIAL_INFERENCES_MIN: Final = 50
"""As the real trial does: prompts are repeated until a percentile means something."""

_SLOW_FACTOR: Final = 3.0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a release does, and where."""

    version: str
    kind: ReleaseKind
    bad_tiers: frozenset[str]

    def on(self, tier: str) -> ReleaseKind:
        """How it is on a tier."""
        return self.kind if not self.bad_tiers or tier in self.bad_tiers else "good"


class Fingerprints:
    """SHA-256 of files, remembered by content."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Extent, ...]], str] = {}

    def of(self, content: tuple[int, tuple[Extent, ...]]) -> str:
        """The digest of a file that holds this."""
        found = self._known.get(content)
        if found is None:
            length, extents = content
            digest = hashlib.sha256()
            at = 0
            for offset, data in extents:
                digest.update(bytes(offset - at))
                digest.update(data)
                at = offset + len(data)
            digest.update(bytes(max(0, length - at)))
            found = self._known[content] = digest.hexdigest()
        return found

    def on(self, disk: SimulatedDisk, name: str) -> str:
        """The digest of a file as it is now."""
        return self.of(disk.content(name))


class LoadedModel(Model):
    """A model that answers."""

    __slots__ = ("digest", "is_closed")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.is_closed = False

    def answer(self, prompt: Prompt) -> str:
        """As `Model.answer`."""
        if self.is_closed:
            raise EngineError("the model was let go")
        return str(prompt.label) if isinstance(prompt, ClassPrompt) else self.digest

    def close(self) -> None:
        """As `Model.close`."""
        self.is_closed = True


def _enough(health: HealthPlan) -> int:
    """Of how many answers fewer good ones fail a trial."""
    return max(1, math.ceil(len(health.prompts) * health.class_accuracy_min))


class SimulatedEngine:
    """The port `device.ports.Engine`.

    Args:
        device: Where it runs.
    """

    __slots__ = ("_device", "passed", "spent_us")

    def __init__(self, device: "SimulatedDevice") -> None:
        self.spent_us = 0  # by everything so far
        self.passed: set[str] = set()  # digests that passed a trial here
        self._device = device

    def versions(self) -> dict[str, str]:
        """As `Engine.versions`."""
        return {"onnx": self._device.kind.runtime_version}

    def load(self, source: ModelSource) -> Model:
        """As `Engine.load`."""
        digest = self._read(source)
        behaviour = self._device.world.behaviours.get(digest)
        if behaviour is None:
            raise EngineError("the runtime refuses the file")
        self._device.world.checks.loading(self._device, digest)
        if behaviour.on(self._device.kind.tier) == "unloadable":
            raise EngineError("the runtime refuses the file", hint="it accepted it in the trial")
        return LoadedModel(digest)

    def trial(self, order: TrialOrder) -> TrialEvidence:
        """As `Engine.trial`."""
        digest = self._read(order.model)
        total = len(order.health.prompts)
        nothing = TrialEvidence(prompts_passed=0, prompts_total=total)
        behaviour = self._device.world.behaviours.get(digest)
        if behaviour is None:
            return TrialEvidence(prompts_passed=0, prompts_total=total, detail="the runtime refuses the file")
        self._device.world.checks.loading(self._device, digest)
        kind = behaviour.on(self._device.kind.tier)
        if kind == "kills":
            self._device.world.count("device.killed_by_model")
            raise PowerCutError
        if kind == "crashes":
            return nothing
        if kind == "hangs":
            self.spent_us += order.health.prompt_timeout_ms * US_PER_MS
            return nothing
        evidence = self._measured(order, kind)
        if kind in {"good", "unloadable"}:
            self.passed.add(digest)
        return evidence

    def _measured(self, order: TrialOrder, kind: ReleaseKind) -> TrialEvidence:
        health, total = order.health, len(order.health.prompts)
        stream = self._device.stream
        middle_ms = self._device.kind.inference_ms
        if kind == "slow":
            middle_ms = max(middle_ms, health.latency_p99_ms_max * _SLOW_FACTOR)
        p50_ms = stream.spread(middle_ms, 1.1)
        count = max(TRIAL_INFERENCES_MIN, total)
        self.spent_us += max(int(p50_ms * count * US_PER_MS), health.soak_ms * US_PER_MS)
        memory = health.memory_peak_bytes_max
        return TrialEvidence(
            prompts_passed=stream.randrange(_enough(health)) if kind == "wrong" else total,
            prompts_total=total,
            load_ms=float(LOAD_MS),
            latency=LatencySummary(p50_ms=p50_ms, p95_ms=p50_ms * 1.2, p99_ms=p50_ms * 1.4),
            memory_peak_bytes=memory * 2 if kind == "hungry" else memory // 4,
        )

    def _read(self, source: ModelSource) -> str:
        disk = self._device.disk
        length = disk.length(source.path)
        if length is None:
            raise EngineError(f"{source.path} is not there")
        self.spent_us += LOAD_MS * US_PER_MS + length * US_PER_S // self._device.kind.read_bytes_per_s
        return self._device.world.fingerprints.on(disk, source.path)
