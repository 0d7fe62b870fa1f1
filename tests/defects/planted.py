"""Defects in the device's code, planted on purpose: each is one that somebody might write, and the simulator has to find it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

from device import blobs, executor, install
from device.assignments import Assignment
from device.conclusion import Conclusion
from device.executor import Executor
from device.ledger import Ledger
from device.ports import Cipher, Disk
from device.reconnect import RECONNECT_BASE_S, RECONNECT_CAP_S, Backoff
from device.sync import MetadataSync
from device.trial import Verdict
from device.update import Update
from protocol.chunks import Bitmap, BlobPlan
from protocol.messages import Report
from protocol.trust import Documents, Floors, Verified


class _Unsynced:
    """A disk that forgets to sync what a slot holds."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def sync(self, name: str) -> None:
        if not name.startswith("slots/"):
            self._disk.sync(name)


@contextmanager
def skipped_fsync() -> Iterator[None]:
    """What a delta gave is not synced before the checkpoint says that it is there."""

    def step(disk: Any, *arguments: Any) -> bool:
        return install.install_step(_Unsynced(disk), *arguments)

    with patch.object(executor, "install_step", step):
        yield


@contextmanager
def commit_before_trial() -> Iterator[None]:
    """The new version becomes the active one without having answered a prompt."""

    def begin(conclusion: Conclusion) -> None:
        conclusion.conclude(Verdict("", "looks fine"), None)

    with patch.object(Conclusion, "begin_trial", begin):
        yield


@contextmanager
def forgotten_floor() -> Iterator[None]:
    """Versions of metadata that were seen before are not compared with."""
    verify = MetadataSync.verify

    def forgetful(sync: MetadataSync, documents: Documents, _floors: Floors, now_ms: int) -> Verified | None:
        return verify(sync, documents, Floors(), now_ms)

    with patch.object(MetadataSync, "verify", forgetful):
        yield


@contextmanager
def dropped_jitter() -> Iterator[None]:
    """A lost connection is opened again after exactly the bound."""

    def wait_s(backoff: Backoff) -> float:
        backoff._attempts += 1
        return float(min(RECONNECT_BASE_S * 2 ** (backoff._attempts - 1), RECONNECT_CAP_S))

    with patch.object(Backoff, "wait_s", wait_s):
        yield


@contextmanager
def stale_job() -> Iterator[None]:
    """A request is taken whatever its number."""
    request = Update.request

    def credulous(update: Update, assignment: Assignment) -> None:
        update._ledger.change(desired_sequence=assignment.desired.sequence - 1)
        request(update, assignment)

    with patch.object(Update, "request", credulous):
        yield


@contextmanager
def forgotten_chunks() -> Iterator[None]:
    """A restart begins the download anew."""

    def open_blob(disk: Disk, plan: BlobPlan, _cipher: Cipher) -> Bitmap:
        if disk.length(blobs.blob_file(plan.name)) != plan.length:
            disk.create(blobs.blob_file(plan.name), plan.length)
        return Bitmap(plan.count)

    with patch.object(blobs, "open_blob", open_blob):
        yield


@contextmanager
def model_let_go_first() -> Iterator[None]:
    """The old model is closed before the new one is loaded."""
    serve = Executor._serve

    def hasty(own: Executor, effect: Any) -> Any:
        own.close()
        return serve(own, effect)

    with patch.object(Executor, "_serve", hasty):
        yield


@contextmanager
def remembered_digests() -> Iterator[None]:
    """A report says what the record says, not what was measured."""
    report = Ledger.report

    def hopeful(ledger: Ledger, state: Any, held: Any) -> Report:
        if ledger.record.update is not None and ledger.record.update.release is not None:
            ledger.files = {file.name: file.sha256 for file in ledger.record.update.release.files}
        return report(ledger, state, held)

    with patch.object(Ledger, "report", hopeful):
        yield


DEFECTS: Final[dict[str, tuple[Callable[[], Any], frozenset[int]]]] = {
    "skip the fsync": (skipped_fsync, frozenset({2})),
    "commit before trial": (commit_before_trial, frozenset({2})),
    "forget the floor": (forgotten_floor, frozenset({1})),
    "drop the jitter": (dropped_jitter, frozenset({8})),
    "accept a stale job": (stale_job, frozenset({1})),
    "forget what was fetched": (forgotten_chunks, frozenset({3})),
    "let go of the model first": (model_let_go_first, frozenset({6})),
    "report what was not measured": (remembered_digests, frozenset({7})),
}
"""What is planted, and the promises of which one has to be found broken."""
