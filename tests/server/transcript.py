"""A coordinator that is played from a text: lines that begin with `>` happen, the lines below are what it orders.

> report a 1                          device a runs version 1
> report a 1 running r1               ... and says how the update of rollout r1 is going (`#2` for sequence 2)
> rollout r1 2 canary=1 failures=0    an operator starts rollout r1 of version 2, judged by a count of failures
> rollout r1 2 tests=1 waves=2,100%   ... judged by the tests, in waves; flight=, pace=, soak=, hold=, timeout=, from=
> order r1 pause alice too early      an operator orders something, and says why
> label a lab                         an operator labels a device
> report a 1 running r1 code=held.window state=trial latency=12
> resigned 2                          a release of the same name is signed with another description
> report a 1 link=64000               ... and what its link carries; it then takes chains, and the profile that suits it
> built 1-2 1000                      the delta is there, with its length; `failed 1-2` if it could not be built
> built 1-2/fast 1000                 the same of profile `fast`
> signed                              what was to be signed last is signed; `unsigned` if that failed
> connect                             the broker is there
> link a online
> chunks a file2 0,1,5
> metadata a 1
> uncached file2
> removed delta1-2                    the blobs of a retired delta are gone
> wait 1000                           milliseconds pass, and the deadline with them if it is due
> restart                             everything is read from the store, unsaved memory is gone
"""

import base64
from collections.abc import Iterable

import msgspec

from protocol.delta.format import Profile
from protocol.delta_graph import LINKS_MAX
from protocol.ids import DeviceId, Digest, Family, Version, digest_of
from protocol.messages import (
    Capacity,
    ChunkRequest,
    LatencySummary,
    MetadataRequest,
    TrialEvidence,
    UpdateReport,
)
from protocol.release import DeltaName, delta_target, parse_delta_target, release_target
from protocol.trust import Target
from server.coordinator import Coordinator, CoordinatorLimits
from server.effects import (
    AnswerChunks,
    AnswerKeys,
    AnswerMetadata,
    BuildDelta,
    CacheBlob,
    Effect,
    PublishDesired,
    PublishMetadata,
    RemoveBlobs,
    Save,
    SignMetadata,
    UncacheBlob,
)
from server.events import (
    BlobsRemoved,
    BlobUncached,
    BrokerConnected,
    DeadlineReached,
    DeltaBuilt,
    DeltaFailed,
    Event,
    LabelsChanged,
    LinkReceived,
    MetadataChanged,
    ReportReceived,
    RequestReceived,
    RolloutOrdered,
    RolloutRequested,
    SigningFailed,
    Started,
)
from server.fleet.history import DeviceEvent
from server.fleet.registry import DeviceRecord
from server.ports import CacheEntry, CacheRemoval, DeltaRefusal, IdleDelta, IdleDeltaRemoval, Record
from server.releases.catalog import Catalog, blob_target, target_blobs
from server.rollouts.evidence import Rules
from server.rollouts.records import Decision, Labels, MemberRecord, Order, RolloutRecord
from server.rollouts.states import RolloutState
from server.rollouts.waves import parse_waves
from tests.server.samples import NOW_MS, model_bytes, paper_catalog, paper_release, report, stored

VERSIONS = ("1", "2", "3")


def _capacity(link_bytes_per_s: int) -> Capacity:
    return Capacity(
        link_bytes_per_s=link_bytes_per_s,
        processor_percent=100,
        delta_memory_bytes=1 << 27,
        links_max=LINKS_MAX,
    )


class Play:
    """A coordinator with a store in memory.

    Args:
        limits: Of the coordinator.
        tiers: That version 3 is for.
        tells_decisions: Whether records of decisions are among what is ordered.
    """

    def __init__(
        self,
        limits: CoordinatorLimits | None = None,
        tiers: tuple[str, ...] = (),
        *,
        tells_decisions: bool = False,
    ) -> None:
        self.tells_decisions = tells_decisions
        self.limits = limits or CoordinatorLimits()
        self.releases = [paper_release(version, tiers if version == "3" else ()) for version in VERSIONS]
        self.now_ms = NOW_MS
        self.deltas: dict[str, Target] = {}
        self.signing: SignMetadata | None = None
        self.sequences: dict[str, int] = {}
        self.labels: dict[str, Labels] = {}
        self.store: dict[tuple[str, ...], Record] = {}
        self.refresh_ms = 1 << 52
        self.last_effects: tuple[Effect, ...] = ()
        self.coordinator = Coordinator(self.limits)
        self.happen(self._started())

    def sign(self, pair: str, length: int) -> None:
        """Let a delta be signed since ever; known after a restart."""
        blob = stored(pair.encode() * (length // len(pair)))
        target = blob_target(delta_target(*self._name(pair)), blob, 4096)
        self.deltas[target.path] = target

    def sign_foreign(self, number: int) -> None:
        """Let a delta be signed between files of which nobody knows anything."""
        base, result = digest_of(b"base %d" % number), digest_of(b"result %d" % number)
        target = blob_target(delta_target(base, result), stored(b"delta %d" % number))
        self.deltas[target.path] = target

    def play(self, text: str) -> str:
        """The same text with what the coordinator really ordered."""
        lines: list[str] = []
        for line in text.strip().splitlines():
            if line.strip().startswith(">"):
                lines.append(line.strip())
                lines += self.command(line.strip()[1:].split())
        return "\n".join(lines)

    def check(self, text: str) -> None:
        """Assert that the coordinator orders what the text says."""
        expected = "\n".join(line.strip() for line in text.strip().splitlines())
        assert self.play(text) == expected

    def command(self, words: list[str]) -> list[str]:
        """Let one thing happen."""
        if words[0] == "restart":
            self.coordinator = Coordinator(self.limits)
        if words[0] == "wait":
            self.now_ms += int(words[1])
            self.last_effects = ()
            deadline_ms = self.coordinator.deadline()
            is_due = deadline_ms is not None and deadline_ms <= self.now_ms
            return self.happen(DeadlineReached()) if is_due else []
        return self.happen(self._event(words))

    def happen(self, event: Event) -> list[str]:
        """Hand an event over, keep what is to be saved, describe what is ordered."""
        effects = self.last_effects = self.coordinator.handle(event, self.now_ms)
        for effect in effects:
            if isinstance(effect, Save):
                self._save(effect.record)
            if isinstance(effect, SignMetadata):
                self.signing = effect
        return list(self._describe(effects))

    def _event(self, words: list[str]) -> Event:
        match words:
            case ["report", device, version, *update]:
                return self._report(device, version, update)
            case ["rollout", rollout, version, *options]:
                return RolloutRequested(self._rollout(rollout, version, options))
            case ["order", rollout, action, by, *reason]:
                number = 1 + sum(isinstance(record, Order) for record in self.store.values())
                order = msgspec.convert(
                    {"rollout": rollout, "number": number, "action": action, "by": by, "at_ms": self.now_ms}
                    | {"reason": " ".join(reason)},
                    Order,
                )
                self._save(order)
                return RolloutOrdered(order)
            case ["label", device, *labels]:
                self.labels[device] = Labels(device=DeviceId(device), labels=tuple(labels))
                return LabelsChanged(list(self.labels.values()))
            case ["resigned", version]:
                catalog = paper_catalog(*self.releases, extra=tuple(self.deltas.values()))
                path = release_target(Family("digits"), Version(version))
                other = blob_target(path, stored(b"another description"))
                return MetadataChanged(
                    Catalog.of({**catalog.targets, path: other}, self.releases, self.refresh_ms)
                )
            case ["built", pair, length]:
                blob = stored(pair.encode() * (int(length) // len(pair)))
                return DeltaBuilt(self._name(pair), blob, 4096)
            case ["failed", pair]:
                return DeltaFailed(self._name(pair), "no memory")
            case ["signed"]:
                assert self.signing is not None
                self.deltas |= {target.path: target for target in self.signing.added}
                for path in self.signing.retired:
                    self.deltas.pop(path, None)
                return MetadataChanged(paper_catalog(*self.releases, extra=tuple(self.deltas.values())))
            case ["withdrawn", version]:
                self.releases = [each for each in self.releases if each.version != version]
                return MetadataChanged(paper_catalog(*self.releases, extra=tuple(self.deltas.values())))
            case ["unsigned"]:
                assert self.signing is not None
                return SigningFailed(self.signing.deltas, self.now_ms + 1000)
            case ["connect"]:
                return BrokerConnected()
            case ["link", device, state]:
                return LinkReceived(DeviceId(device), state == "online")
            case ["chunks", device, name, numbers]:
                return RequestReceived(DeviceId(device), self._request(name, numbers))
            case ["metadata", device, version]:
                return RequestReceived(DeviceId(device), MetadataRequest(root_version=int(version)))
            case ["removed", name]:
                return BlobsRemoved(delta_target(*self._name(name.removeprefix("delta"))))
            case ["uncached", name]:
                return BlobUncached(self._digest(name))
            case ["restart"]:
                return self._started()
        raise AssertionError(words)

    def _rollout(self, rollout: str, version: str, options: list[str]) -> RolloutRecord:
        values = dict(option.split("=", 1) for option in options)
        numbers = {name: int(value) for name, value in values.items() if value.isdigit()}
        soak_ms = [numbers.get("soak", 0)]
        is_tested = "tests" in numbers
        return RolloutRecord(
            id=rollout,
            family=Family("digits"),
            version=Version(version),
            canary_count=numbers.get("canary", 1),
            failures_max=None if is_tested else numbers.get("failures", 0),
            waves=parse_waves(values["waves"], soak_ms) if "waves" in values else (),
            rules=Rules() if is_tested else None,
            in_flight_max=numbers.get("flight"),
            pace_per_minute=numbers.get("pace"),
            from_version=values.get("from", ""),
            wave_timeout_ms=numbers.get("timeout", 10_000),
            hold_max_ms=numbers.get("hold", 86_400_000),
            created_ms=self.now_ms,
        )

    def _report(self, device: str, version: str, update: list[str]) -> Event:
        self.sequences[device] = self.sequences.get(device, 0) + 1
        about = None
        options = dict(word.split("=") for word in update if "=" in word)
        update = [word for word in update if "=" not in word]
        if update:
            outcome, rollout = update[0], update[1]
            wanted = self.coordinator.campaigns[rollout].record.version
            sequence = int(update[2][1:]) if len(update) > 2 else 1
            about = msgspec.convert(
                {"rollout": rollout, "sequence": sequence, "version": wanted, "outcome": outcome}
                | {"code": options.get("code", "")},
                UpdateReport,
            )
            if "latency" in options:
                latency = LatencySummary(
                    p50_ms=float(options["latency"]), p95_ms=50.0, p99_ms=float(options["latency"])
                )
                evidence = TrialEvidence(prompts_passed=1, prompts_total=1, latency=latency)
                about = msgspec.structs.replace(about, evidence=evidence)
        said = report(
            device,
            self.sequences[device],
            version.replace("-", ""),
            about,
            files={"model.onnx": digest_of(b"foreign")} if "foreign" in options.get("file", "") else None,
            tier=options.get("tier", ""),
            capacity=_capacity(int(options["link"])) if "link" in options else None,
        )
        if "state" in options:
            said = msgspec.structs.replace(said, state=options["state"])
        return ReportReceived(DeviceId(device), said)

    def _request(self, name: str, numbers: str) -> ChunkRequest:
        bits = bytearray(8)
        for number in map(int, numbers.split(",")):
            bits[number // 8] |= 0x80 >> number % 8
        return ChunkRequest(blob=self._digest(name), first=0, wanted=base64.b64encode(bits).decode())

    def _started(self) -> Started:
        records = list(self.store.values())
        return Started(
            catalog=paper_catalog(
                *self.releases, extra=tuple(self.deltas.values()), refresh_ms=self.refresh_ms
            ),
            devices=[record for record in records if isinstance(record, DeviceRecord)],
            rollouts=[record for record in records if isinstance(record, RolloutRecord)],
            members=[record for record in records if isinstance(record, MemberRecord)],
            refusals=[record for record in records if isinstance(record, DeltaRefusal)],
            idle=[record for record in records if isinstance(record, IdleDelta)],
            cached=[record for record in records if isinstance(record, CacheEntry)],
            labels=list(self.labels.values()),
            orders=[record for record in records if isinstance(record, Order) and not record.answer],
        )

    def _save(self, record: Record) -> None:
        match record:
            case DeviceRecord():
                self.store["device", record.device] = record
            case RolloutRecord():
                self.store["rollout", record.id] = record
            case MemberRecord():
                self.store["member", record.rollout, record.device] = record
            case Decision():
                self.store["decision", record.rollout, str(record.number)] = record
            case Order():
                self.store["order", record.rollout, str(record.number)] = record
            case DeltaRefusal():
                self.store["refusal", record.path] = record
            case IdleDelta():
                self.store["idle", record.path] = record
            case IdleDeltaRemoval():
                del self.store["idle", record.path]
            case CacheEntry():
                self.store["cached", record.name] = record
            case CacheRemoval():
                del self.store["cached", record.name]

    def _name(self, text: str) -> DeltaName:
        pair, _, profile = text.partition("/")
        base, _, result = pair.partition("-")
        return DeltaName(
            digest_of(model_bytes(base)),
            digest_of(model_bytes(result)),
            Profile[profile.upper() or "SMALL"],
        )

    def _delta(self, name: DeltaName) -> str:
        suffix = "/fast" if name.profile is Profile.FAST else ""
        return f"{self._label(name.base)}-{self._label(name.result)}{suffix}"

    def _digest(self, name: str) -> Digest:
        for version in VERSIONS:
            if name == f"file{version}":
                return digest_of(model_bytes(version))
        if name.startswith("delta"):
            return self.deltas[delta_target(*self._name(name.removeprefix("delta")))].digest
        return digest_of(name.replace("release", "release ").encode())

    def _label(self, digest: str) -> str:
        labels = {digest_of(model_bytes(version)): version for version in VERSIONS}
        if digest in labels:
            return labels[Digest(digest)]
        for path, target in self.coordinator.catalog.targets.items():
            for level, (name, _) in enumerate(target_blobs(target)):
                if name == digest:
                    kind, *rest = path.removesuffix(".json").split("/")
                    label = "-".join(labels.get(Digest(part), part) for part in rest if part != "digits")
                    return f"{kind.removesuffix('s')}{label}" + ("/index" if level else "")
        return digest[:6]

    def _describe(self, effects: Iterable[Effect]) -> Iterable[str]:
        for effect in effects:
            match effect:
                case Save(Decision()) if not self.tells_decisions:
                    pass
                case Save(record):
                    yield f"save {self._record(record)}"
                case PublishDesired(device, None):
                    yield f"desired {device} nothing"
                case PublishDesired(device, desired):
                    assert desired is not None
                    yield f"desired {device} {desired.version} for {desired.rollout} #{desired.sequence}"
                case PublishMetadata():
                    yield "publish metadata"
                case CacheBlob(name, count):
                    yield f"cache {self._blob(name)} x{count}"
                case UncacheBlob(name, count):
                    yield f"uncache {self._blob(name)} x{count}"
                case AnswerChunks(device, name, chunks):
                    yield f"answer {device} {self._blob(name)} {','.join(map(str, chunks))}"
                case AnswerMetadata(device, version):
                    yield f"answer {device} metadata after root {version}"
                case AnswerKeys(device, blobs):
                    yield f"answer {device} keys of {' '.join(map(self._blob, blobs)) or 'nothing'}"
                case BuildDelta(name, base_files, result_files):
                    assert name.base in {file.sha256 for file in base_files}
                    assert name.result in {file.sha256 for file in result_files}
                    yield f"build {self._delta(name)}"
                case RemoveBlobs(path, names):
                    yield f"remove {self._path(path)} x{len(names)}"
                case SignMetadata(added, retired, deltas):
                    assert [target.path for target in added] == [delta_target(*name) for name in deltas]
                    signed = [self._delta(name) for name in deltas]
                    signed += [f"without {self._path(path)}" for path in retired]
                    yield f"sign {' '.join(signed) or 'again'}"

    def _path(self, path: str) -> str:
        name = parse_delta_target(path)
        assert name is not None
        return self._delta(name)

    def _blob(self, name: str) -> str:
        label = self._label(name)
        return f"file{label}" if label in VERSIONS else label

    def _record(self, record: Record) -> str:
        match record:
            case DeviceRecord():
                return f"device {record.device} running {record.version or 'nothing'}"
            case RolloutRecord():
                wave = f" {record.current.name}" if record.state is RolloutState.RUNNING else ""
                reason = f" ({record.reason})" if record.reason else ""
                return f"rollout {record.id} {record.state}{wave}{reason}"
            case Decision():
                return f"decision {record.number} {record.action}: {record.text}"
            case Order():
                return f"order {record.number} {record.action}: {record.answer}"
            case DeviceEvent():
                return f"event of {record.device}: {record.state} {record.outcome}"
            case MemberRecord():
                return f"member {record.device} {record.wave} {record.status}"
            case DeltaRefusal():
                return f"refusal {self._path(record.path)}"
            case IdleDelta():
                return f"idle {self._path(record.path)}"
            case IdleDeltaRemoval():
                return f"no longer idle {self._path(record.path)}"
            case CacheEntry():
                return f"cached {self._blob(record.name)}"
            case CacheRemoval():
                return f"uncached {self._blob(record.name)}"
