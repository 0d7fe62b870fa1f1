"""What an update takes from the air: signed metadata, then the description of its release, later what the plan names. Pure.

`update.py` says when, and is told of what came.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec.structs import replace

from device import events
from device.content_keys import ContentKeys
from device.desk import Desk
from device.download import Pacer
from device.effects import Effect, SaveRoot
from device.journal import InstallItem
from device.states import State
from device.sync import MetadataSync
from device.transfer import Artifact, Requester, Transfer
from protocol.chunks import Chunk
from protocol.director import UnknownTimeError
from protocol.errors import ReleaseError, WhimbrelError
from protocol.ids import Digest, Family, Version
from protocol.messages import KeyAnswer, MetadataBundle
from protocol.release import ARTIFACTS_ROLE, encode_release, release_target, releases_role
from protocol.trust import Target, Verified


class Looker(Protocol):
    """Somebody who wants the newest metadata for its own sake."""

    def looked(self) -> None:
        """It was verified."""

    def failed(self, error: WhimbrelError) -> None:
        """It could not be had."""

    def interrupted(self) -> None:
        """The connection is gone, or nothing may be fetched for now."""


class Fetching:
    """The transfer under way, if there is one.

    Args:
        desk: Shared with the other parts.
        root: The newest trusted root document.
        check: Asked once metadata was verified for an update, before anything is done with it: whether the wish for it still counts at
            that time.
        on_described: Told of the signed description of the release.
        on_fetched: Told when all of the plan is on disk.
        on_refused: Told why no server gives the keys that the plan takes.
    """

    def __init__(
        self,
        desk: Desk,
        root: bytes,
        check: Callable[[int], bool],
        on_described: Callable[[bytes], None],
        on_fetched: Callable[[], None],
        on_refused: Callable[[WhimbrelError], None],
    ) -> None:
        config = desk.config
        self.targets: dict[str, Target] = {}  # what the metadata names that was verified last
        self._desk = desk
        self._ledger = desk.ledger
        self._check = check
        self._on_described = on_described
        self._on_fetched = on_fetched
        self._on_refused = on_refused
        roles = (releases_role(config.family), ARTIFACTS_ROLE)
        self._sync = MetadataSync(desk.topics, config.device, desk.rng, root, desk.trust, roles)
        self._requester = Requester(
            desk.topics,
            config.device,
            desk.rng,
            config.groups_outstanding,
            config.link_bytes_per_s,
            Pacer(config.bandwidth_bytes_per_s_max),
        )
        self._keys = ContentKeys(desk.topics, config.device, desk.rng)
        self._artifacts: list[Artifact] = []  # what is fetched once its keys are there
        self._transfer: Transfer | None = None
        self._looker: Looker | None = None
        self._fresh: tuple[Verified, int] | None = None  # and the time, while whoever wanted it is told of it

    # --- what update.py orders -----------------------------------------------------------------------------

    def sync(self) -> None:
        """Get the newest metadata, and with it the description of what is wanted."""
        self._desk.drop_question()
        self._transfer = None
        if self._fresh is None or not self._take(*self._fresh):
            self._collect()

    def look(self, looker: Looker) -> None:
        """Get the newest metadata, whatever the update is at."""
        self._looker = looker
        if not self._sync.is_collecting:
            self._collect()

    @property
    def is_looking(self) -> bool:
        """Whether somebody waits for the newest metadata."""
        return self._looker is not None

    def _collect(self) -> None:
        self._desk.extend(self._sync.begin(self._desk.now_ms, asks_time=not self._desk.is_clock_right))

    def download(self, items: tuple[InstallItem, ...]) -> None:
        """Fetch what a plan needs, first the keys; what is on disk of it is found when each blob is opened."""
        if self._transfer is not None:
            self._progress(self._transfer.resume(self._desk.now_ms))
            return
        self._artifacts = artifacts_of(items)
        wanted = {artifact.name: artifact.key for artifact in self._artifacts if artifact.key}
        self._desk.extend(self._keys.want(wanted, self._desk.now_ms))
        if self._keys.is_complete:
            self._begin(self._artifacts, read_last=False)

    def pause(self) -> None:
        """The connection is gone; the disk keeps what came."""
        self._sync.pause()
        self._keys.pause()
        if self._transfer is not None:
            self._transfer.pause()
        self._interrupt()

    def hold(self) -> None:
        """Want nothing more for now."""
        self._desk.extend(self._sync.end())
        self._desk.extend(self._keys.stop())
        if self._transfer is not None:
            self._desk.extend(self._transfer.stop())
        self._interrupt()

    def drop(self) -> None:
        """Forget the transfer; what is on disk stays."""
        if self._transfer is not None:
            self._desk.extend(self._transfer.stop())
            self._transfer = None
        self._forget_keys()
        if self._looker is None:
            self._desk.extend(self._sync.end())

    def _interrupt(self) -> None:
        looker, self._looker = self._looker, None
        if looker is not None:
            looker.interrupted()

    # --- time ----------------------------------------------------------------------------------------------

    def deadline(self) -> int | None:
        """When to call `timeout`."""
        instants = [each.deadline_ms for each in self._waiting()]
        return min((instant for instant in instants if instant is not None), default=None)

    def timeout(self) -> None:
        """Some deadline has passed; if it was one of ours, something did not come.

        Raises:
            WhimbrelError: It was asked for often enough.
        """
        now_ms = self._desk.now_ms
        for waiting in self._waiting():
            if waiting.deadline_ms is None or now_ms < waiting.deadline_ms:
                continue
            try:
                self._desk.extend(waiting.timeout(now_ms))
            except WhimbrelError as error:
                if waiting is self._sync:
                    self._give_up_looking(error)
                if waiting is not self._sync or self._is_wanted:
                    raise
                self._desk.extend(self._sync.end())

    def _give_up_looking(self, error: WhimbrelError) -> None:
        looker, self._looker = self._looker, None
        if looker is not None:
            looker.failed(error)

    def _waiting(self) -> list[MetadataSync | ContentKeys | Transfer]:
        waiting: list[MetadataSync | ContentKeys | Transfer] = [self._keys]
        if self._desk.state is State.SYNCING or self._looker is not None:
            waiting.append(self._sync)
        if self._transfer is not None:
            waiting.append(self._transfer)
        return waiting

    # --- what comes ----------------------------------------------------------------------------------------

    def document_received(self, document: str, data: bytes) -> None:
        """A signed document arrived."""
        self._sync.receive(document, data)
        self._try_metadata()

    def bundle_received(self, bundle: MetadataBundle) -> None:
        """A set of signed documents arrived."""
        self._sync.receive_bundle(bundle)
        self._try_metadata()

    def keys_received(self, answer: KeyAnswer) -> None:
        """Wrapped keys arrived, or why there are none."""
        try:
            self._desk.extend(self._keys.receive(answer))
        except WhimbrelError as error:
            self._on_refused(error)

    def keys_opened(self, event: events.KeysOpened) -> None:
        """What could be opened of them is open."""
        self._desk.extend(self._keys.opened(event))
        if (
            self._keys.is_complete
            and self._artifacts
            and self._transfer is None
            and self._desk.state is State.DOWNLOADING
        ):
            self._begin(self._artifacts, read_last=False)

    def chunk_received(self, chunk: Chunk) -> None:
        """A chunk arrived."""
        if self._transfer is not None:
            self._progress(self._transfer.receive(chunk, self._desk.now_ms))

    def blob_opened(self, event: events.BlobOpened) -> None:
        """Storage for a blob is ready."""
        if self._desk.answers(event.serial) and self._transfer is not None:
            self._progress(
                self._transfer.opened(event.present, self._desk.now_ms, connected=self._desk.may_fetch)
            )

    def blob_read(self, event: events.BlobRead) -> None:
        """The content of a blob is there."""
        if self._desk.answers(event.serial) and self._transfer is not None:
            self._progress(self._transfer.read(event.data))

    def _try_metadata(self) -> None:
        """Believe a set of documents once it verifies and names the release; wait for more until then."""
        if not self._is_wanted and self._looker is None:
            return
        self._follow_roots()
        self._hear_time()
        documents, time_ms = self._sync.documents(), self._desk.time_ms
        if documents is None:
            return
        if time_ms is None or self._sync.asks_time:
            self._sync.last_error = self._sync.last_error or UnknownTimeError(
                "no server has said what time it is, and the device's own clock is not set",
                hint="is the server as new as this agent?",
            )
            return
        verified = self._sync.verify(documents, self._ledger.record.floors, time_ms)
        if verified is None:
            return
        floors = replace(verified.floors, time_ms=max(verified.floors.time_ms, self._sync.attested_ms))
        self._believe(dataclasses.replace(verified, floors=floors), time_ms)

    def _believe(self, verified: Verified, time_ms: int) -> None:
        """A set verified: who may wish, and what may run."""
        looker, self._looker = self._looker, None
        is_taken = self._is_wanted and self._take(verified, time_ms)
        if looker is None:
            return
        if not is_taken and self._adopt(verified):
            self._desk.persist()
        if not self._is_wanted:
            self._desk.extend(self._sync.end())
        self._fresh = verified, time_ms
        looker.looked()
        self._fresh = None

    @property
    def _is_wanted(self) -> bool:
        """Whether the update waits for metadata."""
        return self._desk.state is State.SYNCING and self._transfer is None

    def _take(self, verified: Verified, time_ms: int) -> bool:
        """Go on with the update, if the metadata names its release; whether it does."""
        desired = self._ledger.update.desired
        target = verified.targets.get(release_target(Family(desired.family), Version(desired.version)))
        if target is None:
            self._sync.last_error = ReleaseError(
                f"{desired.family} {desired.version} is not in the signed metadata"
            )
            return False
        # The floors are durable before anything is done with what the metadata says.
        self._adopt(verified)
        self._ledger.note(current_until_ms=verified.until_ms)
        self._desk.persist()
        self._desk.extend(self._sync.end())
        if self._check(time_ms):
            self.targets = verified.targets
            update = self._ledger.update
            if update.release is not None and update.release_sha256 == target.digest:
                self._on_described(encode_release(update.release))  # it was read before an interruption
            else:
                description = Artifact(target.digest, target.length, target.custom.chunks)
                self._begin([description], read_last=True)
        return True

    def _adopt(self, verified: Verified) -> bool:
        """Hold to be true what was verified; whether the record says anything new by that."""
        is_new = verified.floors != self._ledger.record.floors
        self._ledger.change(floors=verified.floors)
        return self._ledger.appoint(verified.director) or is_new

    def _hear_time(self) -> None:
        """A server said what time it is: what was signed is judged by that."""
        time_ms = self._sync.hear_time()
        if time_ms is not None:
            self._desk.time.attested(time_ms, self._desk.now_ms)

    def _follow_roots(self) -> None:
        """Keep every step along the chain of roots, even if nothing else verifies (5.3.8 of TUF)."""
        floors = self._sync.follow(self._ledger.record.floors)
        if floors is None:
            return
        self._ledger.change(floors=floors)
        self._desk.persist()
        self._desk.emit(SaveRoot(self._sync.root))
        self._desk.extend(self._sync.await_successor())

    def _begin(self, artifacts: list[Artifact], *, read_last: bool) -> None:
        self._transfer = Transfer(
            artifacts, self._requester, self._ledger.tally, self._desk.ask, read_last=read_last
        )
        self._progress(self._transfer.resume(self._desk.now_ms))

    def _forget_keys(self) -> None:
        self._artifacts = []
        self._desk.extend(self._keys.forget())

    def _progress(self, effects: Iterable[Effect]) -> None:
        """Something of the transfer moved; say so once all of it is there."""
        self._desk.extend(effects)
        transfer = self._transfer
        if transfer is None or not transfer.is_finished or self._desk.state is State.SUSPENDED:
            return
        self._transfer = None
        self._forget_keys()
        if transfer.content is not None:
            self._on_described(transfer.content)
        else:
            self._on_fetched()


def artifacts_of(items: tuple[InstallItem, ...]) -> list[Artifact]:
    """What has to be fetched for a plan."""
    return [
        Artifact(Digest(link.blob), link.blob_length, link.tree, link.key)
        for item in items
        for link in item.links
    ]
