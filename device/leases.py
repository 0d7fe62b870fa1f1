"""Who uses a loaded model: it is closed when it was replaced and its last user is done, and never before.

A request leases the model once and keeps to it, so it begins and ends on one version. This is the only place that closes one.
"""

import threading
from types import TracebackType
from typing import Final, Self

from device.ports import Model
from protocol.errors import EngineError


class NoModelError(EngineError):
    """Nothing answers now: no version is loaded yet, or its file is being rewritten."""

    code = "engine.no_model"
    is_retryable = True


class _Held:
    """A model and how many use it; guarded by the lock of its `Leases`."""

    __slots__ = ("ended", "is_closed", "is_retired", "is_revoked", "leases", "model", "version")

    def __init__(self, model: Model, version: str) -> None:
        self.model: Final = model
        self.version: Final = version
        self.leases = 0
        self.is_retired = False
        self.is_revoked = False
        self.is_closed = False
        self.ended: threading.Event | None = None  # for whoever waits until nobody uses it

    def is_to_close(self) -> bool:
        """Whether the caller has to close it now; true once."""
        if self.leases or not self.is_retired or self.is_closed:
            return False
        self.is_closed = True
        return True


class Lease:
    """The use of one model, as a context; returned at its end. From any thread, and by one at a time."""

    __slots__ = ("_held", "_leases")

    def __init__(self, leases: "Leases", held: _Held) -> None:
        self._leases = leases
        self._held = held

    @property
    def model(self) -> Model:
        """The same for the whole lease."""
        return self._held.model

    @property
    def version(self) -> str:
        """Version of the model."""
        return self._held.version

    @property
    def is_revoked(self) -> bool:
        """The file is about to be rewritten, and waiting is over: the model is closed at any moment."""
        return self._held.is_revoked

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases._returned(self._held)  # noqa: SLF001 - two halves of one thing


class Leases:
    """The model that answers now, and those before that are still in use."""

    __slots__ = ("_current", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: _Held | None = None

    @property
    def model(self) -> Model | None:
        """The model that answers now: to look at; to use it, lease it."""
        held = self._current
        return None if held is None else held.model

    @property
    def version(self) -> str:
        """Its version; empty for none."""
        held = self._current
        return "" if held is None else held.version

    def lease(self) -> Lease:
        """Use the model that answers now.

        Raises:
            NoModelError: There is none.
        """
        with self._lock:
            held = self._current
            if held is None:
                raise NoModelError("no model answers now", hint="ask again later")
            held.leases += 1
            return Lease(self, held)

    def swap(self, model: Model, version: str) -> bool:
        """Let another model answer from now on; the one before goes with its last lease, which nobody waits for.

        Returns:
            Whether the one before was in use.
        """
        with self._lock:
            before, self._current = self._current, _Held(model, version)
            if before is None:
                return False
            before.is_retired = True
            is_used, is_to_close = before.leases > 0, before.is_to_close()
        if is_to_close:
            before.model.close()
        return is_used

    def let_go(self, patience_s: float = 0.0) -> None:
        """Let nothing answer from now on. On return the model is closed.

        Args:
            patience_s: How long leases may go on; then they are revoked, and the model closes under them: what it does at that
                moment ends first, and what is asked of it later fails.
        """
        with self._lock:
            held, self._current = self._current, None
            if held is None:
                return
            held.is_retired = True
            is_to_close = held.is_to_close()
            held.ended = None if is_to_close else threading.Event()
        if held.ended is not None and not held.ended.wait(patience_s):
            with self._lock:
                held.is_revoked = True
                is_to_close, held.is_closed = not held.is_closed, True
            if not is_to_close:  # its last lease was returned just now
                held.ended.wait()
        if is_to_close:
            held.model.close()

    def _returned(self, held: _Held) -> None:
        with self._lock:
            held.leases -= 1
            is_to_close = held.is_to_close()
        if is_to_close:
            held.model.close()
            if held.ended is not None:
                held.ended.set()
